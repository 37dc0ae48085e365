"""The decoder against a plain numpy one, its cache against itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rredcot_jax.model import attention, decoder
from rredcot_jax.model.config import ModelConfig

LLAMA = ModelConfig(vocab_size=11, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24)
FAMILIES = {
  "llama": LLAMA,
  "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, rope_theta=1e6),
  "qwen3": dataclasses.replace(LLAMA, qk_norm=True, head_dim=6, tied_embeddings=False),
}


def params_of(config, seed=0):
  """Random parameters in which norms and biases are not their trivial selves."""
  params = decoder.init(config, jax.random.key(seed))
  keys = iter(jax.random.split(jax.random.key(seed + 1), 100))
  return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), params)


def plain(params, config, tokens):
  """One unpadded sequence, head by head, in numpy float64."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  norm = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale
  half = config.head_dim // 2
  angle = np.arange(len(tokens))[:, None] * config.rope_theta ** (-np.arange(half) / half)

  def turn(x):
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1)

  x = p["embedding"][tokens]
  for layer in range(config.num_layers):
    block = {name: value[layer] for name, value in p["blocks"].items()}
    y, mixed = norm(x, block["attention_norm"]), 0.0

    def project(name, head, y=y, block=block):
      out = y @ block[name][:, head] + (block[f"{name}_bias"][head] if config.qkv_bias else 0)
      return norm(out, block[f"{name}_norm"]) if config.qk_norm and name != "value" else out

    for head in range(config.num_heads):
      group = head // (config.num_heads // config.num_kv_heads)
      scores = turn(project("query", head)) @ turn(project("key", group)).T / np.sqrt(config.head_dim)
      scores[np.triu_indices(len(tokens), 1)] = -np.inf
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      weights /= weights.sum(-1, keepdims=True)
      mixed = mixed + weights @ project("value", group) @ block["out"][head]
    x = x + mixed
    y = norm(x, block["mlp_norm"])
    gate = y @ block["gate"]
    x = x + (gate / (1 + np.exp(-gate)) * (y @ block["up"])) @ block["down"]
  return norm(x, p["final_norm"]) @ p["embedding" if config.tied_embeddings else "head"].T


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
