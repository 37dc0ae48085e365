"""Prefix-shared scoring against re-running every prefix, and the masks around it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rredcot_jax.model import decoder, sampling, scoring
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.ops import types
from rredcot_jax.parallel import sharding

CONFIG = ModelConfig(
  vocab_size=23, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, qk_norm=True
)
B, P, T, K, N, S = 4, 6, 14, 5, 3, 7
TEMPERATURE = 0.8


def apply(params, tokens, positions, mask):
  del positions  # Our decoder counts them from the mask.
  return decoder.logits(params, decoder.forward(params, CONFIG, tokens, mask)[0])


@functools.cache
def case():
  rng = np.random.default_rng(0)
  params = decoder.init(CONFIG, jax.random.key(0))
  prompt_lengths, lengths = np.array([6, 1, 3, 4]), np.array([14, 9, 3, 1])
  prompt_mask = np.arange(P) >= P - prompt_lengths[:, None]
  mask = np.arange(T) < lengths[:, None]
  rollout = types.Rollout(
    prompt_tokens=np.where(prompt_mask, rng.integers(2, 23, (B, P)), 0).astype(np.int32),
    prompt_mask=prompt_mask,
    tokens=np.where(mask, rng.integers(2, 23, (B, T)), 0).astype(np.int32),
    mask=mask,
    log_probs=np.zeros((B, T), np.float32),
    sampler_log_probs=np.zeros((B, T), np.float32),
    entropy=np.zeros((B, T), np.float32),
    truncated=np.zeros(B, bool),
  )
  ends = np.array([[2, 5, 9, 12, 14], [4, 5, 9, 9, 9], [1, 2, 3, 3, 3], [1, 1, 1, 1, 1]], np.int32)
  num_segments = np.array([5, 3, 3, 1], np.int32)
  ids = np.stack([np.searchsorted(e[:n], np.arange(T), side="right") for e, n in zip(ends, num_segments)])
  segments = types.Segments(
    ends=ends,
    segment_ids=np.where(mask, ids, -1).astype(np.int32),
    num_segments=num_segments,
    num_merged=np.zeros(B, np.int32),
  )
  completion_lengths = rng.integers(0, S + 1, (B, K, N))
  completion_mask = np.arange(S) < completion_lengths[..., None]
  completions = types.Completions(
    tokens=np.where(completion_mask, rng.integers(2, 23, (B, K, N, S)), 0).astype(np.int32),
    mask=completion_mask,
    scored=completion_mask & (np.arange(S) >= rng.integers(0, 3, (B, K, N))[..., None]),
    utilities=np.ones((B, K, N), np.float32),
    log_q=np.zeros((B, K, N), np.float32),
    valid=completion_lengths > 0,
  )
  return params, *jax.tree.map(jnp.asarray, (rollout, segments, completions))


@functools.cache
def cache_of():
  params, rollout, _, _ = case()
  tokens = jnp.concatenate([rollout.prompt_tokens, rollout.tokens], axis=1)
  mask = jnp.concatenate([rollout.prompt_mask, rollout.mask], axis=1)
  return decoder.forward(params, CONFIG, tokens, mask)[1]


def shared(rollout, segments, completions, **options):
  params = case()[0]
  return scoring.score_with_cache(
    params, CONFIG, cache_of(), rollout, segments, completions, temperature=TEMPERATURE, **options
  )


def generic(rollout, segments, completions):
  return scoring.score_generic(apply, case()[0], rollout, segments, completions, temperature=TEMPERATURE)


def test_shared_prefix_equals_forwarding_again():
  _, rollout, segments, completions = case()
  ours, reference = shared(rollout, segments, completions), generic(rollout, segments, completions)
  exists = np.asarray(completions.valid & segments.mask[:, :, None])
  assert exists.sum() > 20 and (np.asarray(reference)[exists] < -1).any()
  np.testing.assert_allclose(ours, reference, atol=1e-4)
  np.testing.assert_array_equal(np.asarray(ours)[~exists], 0.0)


def test_one_bank_for_all_states_is_broadcast():
  _, rollout, segments, completions = case()
  one = jax.tree.map(lambda x: x[:, :1], completions)
  spread = jax.tree.map(lambda x: jnp.broadcast_to(x[:, :1], x.shape), completions)
  np.testing.assert_allclose(shared(rollout, segments, one), shared(rollout, segments, spread), atol=1e-6)
  np.testing.assert_allclose(generic(rollout, segments, one), generic(rollout, segments, spread), atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 4, 15, 100])
def test_chunks_change_nothing(chunk_size):
  _, rollout, segments, completions = case()
  np.testing.assert_allclose(
    shared(rollout, segments, completions, chunk_size=chunk_size), shared(rollout, segments, completions), atol=1e-5
  )


def test_bad_chunk_size_is_named():
  with pytest.raises(ValueError, match="chunk_size=0"):
    shared(*case()[1:], chunk_size=0)


def test_the_traces_own_rest_has_its_own_log_probability():
  params, rollout, segments, _ = case()
  per_token, _ = scoring.trace_log_probs(params, CONFIG, rollout, temperature=TEMPERATURE)
  rest = np.zeros((B, K, 1, T), np.int32)
  mask = np.zeros((B, K, 1, T), bool)
  expected = np.zeros((B, K))
  for b in range(B):
    length = int(rollout.mask[b].sum())
    for k in range(int(segments.num_segments[b])):
      start = int(segments.starts[b, k])
      rest[b, k, 0, : length - start] = rollout.tokens[b, start:length]
      mask[b, k, 0, : length - start] = True
      expected[b, k] = np.asarray(per_token)[b, start:length].sum()
  ones = np.ones((B, K, 1), np.float32)
  bank = types.Completions(tokens=rest, mask=mask, scored=mask, utilities=ones, log_q=0 * ones, valid=ones > 0)
  np.testing.assert_allclose(shared(rollout, segments, bank)[..., 0], expected, atol=1e-4)


def test_trace_log_probs_are_those_of_decoding_step_by_step():
  params, rollout, _, _ = case()
  step = jax.jit(functools.partial(decoder.decode_step, params, CONFIG))
  _, cache = decoder.forward(params, CONFIG, rollout.prompt_tokens, rollout.prompt_mask)
  cache = cache.extended(T)
  tokens = np.concatenate([rollout.prompt_tokens, rollout.tokens], axis=1)
  real = np.concatenate([rollout.prompt_mask, rollout.mask], axis=1)
  expected, entropy = np.zeros((B, T)), np.zeros((B, T))
  for t in range(T):
    column = P + t - 1
    seen = real & (np.arange(P + T) <= column)
    hidden, cache = step(cache, tokens[:, column], jnp.int32(column), seen)
    logits = np.asarray(decoder.logits(params, hidden), np.float64) / TEMPERATURE
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected[:, t] = log_probs[np.arange(B), tokens[:, P + t]]
    entropy[:, t] = -(np.exp(log_probs) * log_probs).sum(axis=1)
  ours = scoring.trace_log_probs(params, CONFIG, rollout, temperature=TEMPERATURE)
  np.testing.assert_allclose(ours[0], np.where(rollout.mask, expected, 0), atol=1e-4)
  np.testing.assert_allclose(ours[1], np.where(rollout.mask, entropy, 0), atol=1e-4)


def test_compiled_equals_eager():
  _, rollout, segments, completions = case()
  eager = shared(rollout, segments, completions)
  np.testing.assert_allclose(jax.jit(shared)(rollout, segments, completions), eager, atol=1e-5)


def test_the_samplers_cache_serves_as_well_as_a_forward_pass():
  params, rollout, _, completions = case()
  sampled, cache = sampling.sample(
    params, CONFIG, rollout.prompt_tokens, rollout.prompt_mask, jax.random.key(3),
    max_tokens=T, temperature=TEMPERATURE, eos_id=1, pad_id=0,
  )  # fmt: skip
  lengths = sampled.mask.sum(axis=1)
  ends = jnp.minimum(jnp.array([[2, 4, 6, 9, 14]] * B), lengths[:, None]).astype(jnp.int32)
  num = jnp.sum(jnp.concatenate([jnp.ones((B, 1), bool), ends[:, :-1] < lengths[:, None]], axis=1), axis=1)
  ids = jnp.sum(jnp.arange(T)[None, :, None] >= ends[:, None], axis=-1, dtype=jnp.int32)
  ids = jnp.where(sampled.mask, ids, -1)
  segments = types.Segments(ends=ends, segment_ids=ids, num_segments=num, num_merged=num)
  ours = scoring.score_with_cache(params, CONFIG, cache, sampled, segments, completions, temperature=TEMPERATURE)
  np.testing.assert_allclose(ours, generic(sampled, segments, completions), atol=1e-4)


def test_rows_do_not_see_their_neighbours():
  _, rollout, segments, completions = case()
  whole = shared(rollout, segments, completions)
  noisy = dataclasses.replace(
    completions, tokens=completions.tokens.at[0].set(5), scored=completions.scored.at[0].set(True)
  )
  np.testing.assert_allclose(shared(rollout, segments, noisy)[1:], whole[1:], atol=1e-6)
  assert not np.allclose(shared(rollout, segments, noisy)[0], whole[0])


def test_padding_of_a_completion_is_never_read():
  _, rollout, segments, completions = case()
  garbage = dataclasses.replace(completions, tokens=jnp.where(completions.mask, completions.tokens, 7))
  np.testing.assert_array_equal(shared(rollout, segments, garbage), shared(rollout, segments, completions))


def test_no_gradient_reaches_the_policy():
  params, rollout, segments, completions = case()
  gradient = jax.grad(
    lambda p: scoring.score_with_cache(
      p, CONFIG, cache_of(), rollout, segments, completions, temperature=TEMPERATURE
    ).sum()
  )(params)
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_sharded_over_four_devices_equals_one():
  params, rollout, segments, completions = case()
  mesh = sharding.make_mesh()
  assert mesh.size == 4
  placed = sharding.put_batch(mesh, (rollout, segments, completions))
  cache = cache_of()
  cache = jax.device_put(cache, sharding.cache(mesh, cache.key.shape))
  score = jax.jit(lambda c, *rest: scoring.score_with_cache(params, CONFIG, c, *rest, temperature=TEMPERATURE))
  sharded = score(cache, *placed)
  assert len(sharded.sharding.device_set) == 4
  np.testing.assert_allclose(sharded, shared(rollout, segments, completions), atol=1e-5)
