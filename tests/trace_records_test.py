"""The record of a trace: every list is as long as what it describes, and the wrong step is the segment of its line."""

import json

import numpy as np
import pytest

from rredcot_jax.data import tasks
from rredcot_jax.data.chain import make_example
from rredcot_jax.data.encoding import Codec
from rredcot_jax.model.tokenizer import load_tokenizer
from rredcot_jax.ops import types
from rredcot_jax.report import records
from rredcot_jax.train import initial, trace_records

EXAMPLE = make_example(3, ["+4", "*7"])  # 3+4=7, 7*7=9.
K, ROOM = 5, 30


def record_of(text, task=None, *, cuts=None):
  """The record of a trace that is cut before each of the tokens in `cuts`, and behind every line where it is None."""
  codec = Codec(load_tokenizer(initial.locate("chain")))
  task = tasks.make_task("chain", split="eval", num_steps=2) if task is None else task
  texts = [*text.replace("</think>", "\0")]
  texts = ["</think>" if one == "\0" else one for one in texts]
  ids = [i for one in texts for i in codec.tokenizer.encode(one, add_special_tokens=False)] + [codec.eos_id]
  length = len(ids)
  if cuts is None:
    cuts = [t + 1 for t, one in enumerate(texts) if one == "\n"]
  ends = np.array([*cuts, length], np.int32)
  place = np.arange(ROOM)
  padded = lambda values, fill: np.append(values, np.full(ROOM - length, fill, np.asarray(values).dtype))
  rollout = types.Rollout(
    prompt_tokens=np.zeros(1, np.int32), prompt_mask=np.ones(1, bool), tokens=padded(ids, codec.pad_id),
    mask=place < length, log_probs=np.zeros(ROOM), sampler_log_probs=np.zeros(ROOM), entropy=place / 100,
    truncated=np.array(False),
  )  # fmt: skip
  segments = types.Segments(
    ends=np.append(ends, np.full(K - len(ends), length, np.int32)),
    segment_ids=padded(np.searchsorted(ends, place[:length], side="right"), -1),
    num_segments=np.int32(len(ends)), num_merged=np.int32(0),
  )  # fmt: skip
  credit = types.Credit(
    values=np.arange(K + 1) / 8, rewards=np.arange(K) / 4, advantages=place / 2, effective_sample_size=np.ones(K)
  )
  return trace_records.trace_record(7, task, codec, EXAMPLE, rollout, segments, credit, np.float32(0.5))


def test_every_list_of_a_record_is_as_long_as_what_it_describes():
  found = record_of("3+4=7\n7*7=8\n</think>8")
  assert found == json.loads(json.dumps(found))
  assert found["tokens"][:6] == ["3", "+", "4", "=", "7", "\n"] and found["tokens"][12:14] == ["</think>", "8"]
  assert len(found["tokens"]) == 15
  assert found["segment_ids"] == [0] * 6 + [1] * 6 + [2] * 3
  assert found["values"] == [0, 0.125, 0.25, 0.375] and found["rewards"] == [0, 0.25, 0.5]
  assert found["advantages"] == [t / 2 for t in range(15)]
  assert found["entropies"] == [0, 0.06, 0.12]  # Of the first token of each segment.
  assert (found["step"], found["prompt"], found["answer"], found["return"]) == (7, "3+4*7", "9", 0.5)
  # It is what the report reads.
  trace = records.parse_trace(found)
  assert [segment.first_wrong for segment in trace.segments] == [False, True, False]


@pytest.mark.parametrize(
  ("text", "cuts", "wrong"),
  [
    ("3+4=7\n7*7=9\n</think>9", None, None),
    ("3+4=6\n6*7=2\n</think>2", None, 0),
    ("3+4=7\n7*7=8\n</think>8", None, 1),
    ("3+4=7\n7*7=8\n</think>8", [3, 6, 9], 2),  # The segment in which the wrong line begins.
    ("3+4=7\n7*7=8\n</think>8", [8], 0),
    ("3+4=7\n7*7=9\n9+1=0\n</think>9", None, 2),
  ],
)
def test_the_wrong_segment_is_that_of_the_wrong_lines_first_token(text, cuts, wrong):
  assert record_of(text, cuts=cuts)["first_wrong_segment"] == wrong


def test_a_task_that_knows_no_steps_has_no_wrong_one():
  assert record_of("3+4=6\n6*7=2\n</think>2", task=object())["first_wrong_segment"] is None
