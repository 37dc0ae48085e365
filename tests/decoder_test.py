"""The decoder against a plain numpy one, its cache against itself."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FAMILIES, LLAMA, params_of, plain

from rredcot_jax.model import attention, decoder


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_plain_implementation_padded_on_either_side(family):
  config = FAMILIES[family]
  params = params_of(config)
  tokens = np.random.default_rng(1).integers(0, 11, 9)
  expected = plain(params, config, tokens)
  for left in (0, 3):
    padded = np.pad(tokens, (left, 3 - left), constant_values=7)[None].astype(np.int32)
    mask = ((np.arange(12) >= left) & (np.arange(12) < left + 9))[None]
    hidden, _ = decoder.forward(params, config, padded, mask)
    logits = decoder.logits(params, hidden)[0, left : left + 9]
    np.testing.assert_allclose(logits, expected, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_equals_prefill(family):
  config = FAMILIES[family]
  params = params_of(config)
  mask = np.arange(8) >= np.array([0, 3])[:, None]
  tokens = np.where(mask, np.random.default_rng(2).integers(0, 11, (2, 8)), 0).astype(np.int32)
  whole, _ = decoder.forward(params, config, tokens, mask)
  _, cache = decoder.forward(params, config, tokens[:, :5], mask[:, :5])
  cache = cache.extended(3)
  for column in range(5, 8):
    seen = mask & (np.arange(8) <= column)
    hidden, cache = decoder.decode_step(params, config, cache, tokens[:, column], jnp.int32(column), seen)
    np.testing.assert_allclose(hidden, whole[:, column], atol=1e-4)


def test_the_future_is_not_seen():
  params = params_of(LLAMA)
  tokens = jnp.arange(8, dtype=jnp.int32)[None]
  mask = jnp.ones((1, 8), bool)
  before, _ = decoder.forward(params, LLAMA, tokens, mask)
  after, _ = decoder.forward(params, LLAMA, tokens.at[0, 5].set(0), mask)
  np.testing.assert_array_equal(before[:, :5], after[:, :5])
  assert not np.allclose(before[:, 5:], after[:, 5:])


def test_merged_attention_is_one_softmax():
  rng = np.random.default_rng(0)
  scores, values = rng.normal(size=(3, 7)) * 4, rng.normal(size=(7, 5))

  def attend(columns):
    weights = np.exp(scores[:, columns])
    return (weights / weights.sum(1, keepdims=True)) @ values[columns], np.log(weights.sum(1))

  whole, _ = attend(slice(0, 7))
  merged = attention.merge(*map(jnp.asarray, (*attend(slice(0, 4)), *attend(slice(4, 7)))))
  np.testing.assert_allclose(merged, whole, atol=1e-5)
  alone, lse = attend(slice(4, 7))
  nothing = attention.merge(jnp.zeros((3, 5)), jnp.full(3, -jnp.inf), jnp.asarray(alone), jnp.asarray(lse))
  np.testing.assert_allclose(nothing, alone, atol=1e-6)


@pytest.mark.parametrize(
  ("change", "message"),
  [({"num_kv_heads": 3}, "num_heads=4"), ({"head_dim": 5}, "head_dim=5"), ({"width": 0}, "width=0")],
)
def test_bad_sizes_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(LLAMA, **change)
