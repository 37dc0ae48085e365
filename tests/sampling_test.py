"""Sampling: recorded log-probabilities, cuts of the distribution, rows on their own, endings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rredcot_jax.model import decoder, sampling, scoring
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.parallel import sharding

CONFIG = ModelConfig(vocab_size=13, width=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, mlp_width=32)
PARAMS = decoder.init(CONFIG, jax.random.key(0))
PROMPT_MASK = np.arange(5) >= np.array([0, 2, 4, 1])[:, None]
PROMPTS = np.where(PROMPT_MASK, np.random.default_rng(0).integers(2, 13, (4, 5)), 0).astype(np.int32)


def draw(prompts=PROMPTS, mask=PROMPT_MASK, seed=0, **options):
  options = {"max_tokens": 20, "eos_id": 1, "pad_id": 0} | options
  return sampling.sample(PARAMS, CONFIG, prompts, mask, jax.random.key(seed), **options)[0]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.6)])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_recorded_log_probs_are_the_training_forwards(temperature, top_k, top_p):
  rollout = draw(temperature=temperature, top_k=top_k, top_p=top_p)
  log_probs, entropy = scoring.trace_log_probs(PARAMS, CONFIG, rollout, temperature=temperature)
  # The ratio of the first update is 1, whatever the sampler cuts away.
  np.testing.assert_allclose(rollout.log_probs, log_probs, atol=1e-4)
  np.testing.assert_allclose(rollout.entropy, entropy, atol=1e-4)
  mask, cut = np.asarray(rollout.mask), top_k or top_p < 1
  gain = np.asarray(rollout.sampler_log_probs - rollout.log_probs)
  assert np.asarray(rollout.log_probs)[mask].max() < 0
  assert (gain[mask].min() > 0.01) if cut else (gain == 0).all()
  assert (np.asarray(rollout.sampler_log_probs)[~mask] == 0).all() and (np.asarray(rollout.log_probs)[~mask] == 0).all()


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.6), (5, 0.7)])
def test_the_samplers_log_probs_are_those_of_the_cut_distribution(top_k, top_p):
  rollout = draw(top_k=top_k, top_p=top_p)
  tokens = np.concatenate([PROMPTS, rollout.tokens], axis=1)
  mask = np.concatenate([PROMPT_MASK, rollout.mask], axis=1)
  logits = np.asarray(decoder.logits(PARAMS, decoder.forward(PARAMS, CONFIG, tokens, mask)[0]), np.float64)
  checked = 0
  for b, t in np.argwhere(np.asarray(rollout.mask)):
    p = np.exp(logits[b, 4 + t] - logits[b, 4 + t].max())
    order = np.argsort(-p)
    p = p / p.sum()
    if top_k:
      p[order[top_k:]] = 0
      p = p / p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    p = p / p.sum()
    token = int(rollout.tokens[b, t])
    assert p[token] > 0
    assert float(rollout.sampler_log_probs[b, t]) == pytest.approx(np.log(p[token]), abs=1e-4)
    checked += 1
  assert checked > 10


def test_cut_distribution_by_hand():
  logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
  probs = lambda **options: np.exp(sampling.sampling_log_probs(logits, temperature=1.0, **options))
  np.testing.assert_allclose(probs(), [0.5, 0.3, 0.15, 0.05], atol=1e-6)
  np.testing.assert_allclose(probs(top_k=2), [0.625, 0.375, 0, 0], atol=1e-6)
  np.testing.assert_allclose(probs(top_p=0.79), [0.625, 0.375, 0, 0], atol=1e-6)
  np.testing.assert_allclose(probs(top_p=0.5), [1, 0, 0, 0], atol=1e-6)
  np.testing.assert_allclose(probs(top_p=0.81), np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=1e-6)
  half = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
  np.testing.assert_allclose(np.exp(sampling.sampling_log_probs(logits, temperature=0.5)), half / half.sum(), atol=1e-6)


def test_exactly_k_tokens_are_kept():
  equal = np.exp(sampling.sampling_log_probs(jnp.zeros(4), temperature=1.0, top_k=3))
  np.testing.assert_allclose(equal, [1 / 3, 1 / 3, 1 / 3, 0], atol=1e-6)
  # Within one program the k-th token is lost where it is compared with another rounding of itself.
  logits = np.random.default_rng(0).normal(size=(4000, 13)).astype(np.float32)
  jitted = jax.jit(lambda x: sampling.sampling_log_probs(x, temperature=0.7, top_k=10))
  assert (np.isfinite(jitted(logits)).sum(axis=1) == 10).all()


def test_a_row_does_not_depend_on_its_neighbours():
  whole = draw()
  changed = PROMPTS.copy()
  changed[0] = 3
  other = draw(prompts=changed)
  np.testing.assert_array_equal(whole.tokens[1:], other.tokens[1:])
  assert not np.array_equal(draw(seed=1).tokens, whole.tokens)
  np.testing.assert_array_equal(draw().tokens, whole.tokens)


def test_rows_of_one_prompt_differ():
  rollout = draw(prompts=np.repeat(PROMPTS[:1], 4, 0), mask=np.repeat(PROMPT_MASK[:1], 4, 0))
  assert len({tuple(row) for row in np.asarray(rollout.tokens).tolist()}) == 4


def test_traces_end_with_eos_or_are_truncated():
  seen = set()
  for seed in range(6):
    rollout = jax.device_get(draw(seed=seed, max_tokens=12))
    for tokens, mask, truncated in zip(rollout.tokens, rollout.mask, rollout.truncated):
      length = mask.sum()
      assert mask[:length].all() and (tokens[length:] == 0).all()
      assert truncated == (1 not in tokens[:length])
      assert (tokens[: length - 1] != 1).all()
      assert length == 12 or tokens[length - 1] == 1
      seen.add(bool(truncated))
  assert seen == {True, False}


def test_any_of_several_ids_ends_a_trace():
  ends, one = (1, 5, 7), jax.device_get(draw(eos_id=-1))
  rollout = jax.device_get(draw(eos_id=ends))
  lengths = rollout.mask.sum(axis=1)
  for tokens, longer, length, truncated in zip(rollout.tokens, one.tokens, lengths, rollout.truncated):
    # What would have been drawn without an end, up to the first of them.
    first = next((t for t, token in enumerate(longer) if token in ends), len(longer) - 1)
    np.testing.assert_array_equal(tokens[:length], longer[: first + 1])
    assert truncated == (longer[first] not in ends)
  assert len({int(tokens[length - 1]) for tokens, length in zip(rollout.tokens, lengths)} & set(ends)) > 1
  for single in (1, (1,)):
    np.testing.assert_array_equal(draw(eos_id=single).tokens, draw().tokens)


def test_first_tokens_follow_the_softmax():
  n = 4096
  prompts, mask = np.repeat(PROMPTS[:1], n, 0), np.repeat(PROMPT_MASK[:1], n, 0)
  rollout = draw(prompts=prompts, mask=mask, max_tokens=1)
  logits = decoder.logits(PARAMS, decoder.forward(PARAMS, CONFIG, PROMPTS[:1], PROMPT_MASK[:1])[0][0, -1])
  p = np.asarray(jax.nn.softmax(logits))
  counts = np.bincount(np.asarray(rollout.tokens[:, 0]), minlength=13)
  chi_square = ((counts - n * p) ** 2 / (n * p)).sum()
  assert chi_square < 33  # 12 degrees of freedom, p = 0.001.


def test_sharded_over_four_devices_equals_one():
  mesh = sharding.make_mesh()
  prompts, mask = sharding.put_batch(mesh, (PROMPTS, PROMPT_MASK))
  sharded = draw(prompts=prompts, mask=mask)
  assert len(sharded.tokens.sharding.device_set) == 4
  np.testing.assert_array_equal(sharded.tokens, draw().tokens)
  np.testing.assert_allclose(sharded.log_probs, draw().log_probs, atol=1e-5)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"temperature": 0.0}, "temperature=0"),
    ({"top_p": 0.0}, "top_p=0"),
    ({"top_p": 1.1}, r"top_p=1\.1"),
    ({"top_k": 99}, r"top_k=99 must lie in \[0, 13\] .the vocabulary."),
    ({"top_k": -1}, "top_k=-1 must lie in"),
  ],
)
def test_bad_options_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    draw(**options)


def test_draws_follow_the_distribution_over_several_blocks():
  probs = np.zeros(700)
  places = np.array([0, 1, 255, 256, 300, 511, 512, 699])  # On both sides of every block's edge.
  probs[places] = [0.05, 0.1, 0.2, 0.05, 0.25, 0.05, 0.1, 0.2]
  log_probs = jnp.log(jnp.asarray(probs, jnp.float32))
  n = 20_000
  tokens = jax.vmap(sampling.draw, in_axes=(0, None))(jax.random.split(jax.random.key(3), n), log_probs)
  counts = np.bincount(np.asarray(tokens), minlength=700)
  assert counts.sum() == counts[places].sum() == n
  chi_square = ((counts[places] - n * probs[places]) ** 2 / (n * probs[places])).sum()
  assert chi_square < 24.3  # 7 degrees of freedom, p = 0.001.


@pytest.mark.parametrize("uniform", [0.0, 0.3, 0.9999999, 1.0])
def test_a_place_has_weight_at_both_ends_of_the_unit_interval(uniform):
  weights = jnp.array([0.0, 1e-9, 0.0, 0.7, 0.0, 0.3, 0.0])
  assert float(weights[sampling._place_of(jnp.float32(uniform), weights)]) > 0
