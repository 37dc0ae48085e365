"""The decoder against a plain numpy one, its cache against itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FAMILIES, LLAMA, params_of, plain

from rredcot_jax.model import attention, decoder
from rredcot_jax.model.config import Compute


@pytest.mark.parametrize(
  "config", [*FAMILIES.values(), dataclasses.replace(LLAMA, norm_epsilon=0.1)], ids=[*FAMILIES, "large epsilon"]
)
def test_equals_a_plain_implementation_padded_on_either_side(config):
  params = params_of(config)
  tokens = np.random.default_rng(1).integers(0, 11, 9)
  expected = plain(params, config, tokens)
  for left in (0, 3):
    padded = np.pad(tokens, (left, 3 - left), constant_values=7)[None].astype(np.int32)
    mask = ((np.arange(12) >= left) & (np.arange(12) < left + 9))[None]
    hidden, _ = decoder.forward(params, config, padded, mask)
    logits = decoder.logits(params, hidden)[0, left : left + 9]
    np.testing.assert_allclose(logits, expected, atol=2e-4)


def test_random_parameters_keep_the_size_of_what_they_are_given():
  """Entries have variance 1 / inputs; of what is added to the stream 2 L times, 1 / (2 L inputs)."""
  config = dataclasses.replace(
    LLAMA, vocab_size=101, width=64, num_layers=3, mlp_width=96, qkv_bias=True, qk_norm=True, tied_embeddings=False
  )
  params = decoder.init(config, jax.random.key(5))
  inputs = dict.fromkeys(("embedding", "head", "query", "key", "value", "gate", "up"), 64)
  inputs |= {"out": 6 * config.num_heads * config.head_dim, "down": 6 * 96}
  for name, leaf in (params["blocks"] | params).items():
    if name.endswith("norm"):
      assert (leaf == 1).all()
    elif name.endswith("bias"):
      assert (leaf == 0).all()
    elif name != "blocks":
      assert np.std(leaf) == pytest.approx(inputs[name] ** -0.5, rel=0.1) and abs(np.mean(leaf)) < 0.01, name
  assert not np.array_equal(params["blocks"]["query"][0], params["blocks"]["query"][1])


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


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_that_are_masked_out_of_the_middle_were_never_there(family):
  """Positions count real tokens, so that what follows a hole is not further away."""
  config = FAMILIES[family]
  params = params_of(config)
  tokens = np.random.default_rng(3).integers(0, 11, (1, 12)).astype(np.int32)
  real = np.isin(np.arange(12), [0, 1, 5, 8, 9, 10])
  holed, _ = decoder.forward(params, config, tokens, real[None])
  whole, _ = decoder.forward(params, config, tokens[:, real], np.ones((1, 6), bool))
  np.testing.assert_allclose(holed[:, real], whole, atol=1e-5)


def test_a_mask_of_other_rows_is_refused():
  params = params_of(LLAMA)
  for x, mask in (((1, 4, 16), (2, 4)), ((2, 4, 16), (1, 4)), ((2, 4, 16), (2, 1))):
    with pytest.raises(AssertionError):
      decoder.forward_from_embeddings(params, LLAMA, jnp.zeros(x), jnp.ones(mask, bool))


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


def branches(seed=0, b=2, m=3, s=4, h=6, kv=2, d=8, c=37):
  """Random queries, keys and values of branches and of their prefixes, whose masks are empty, whole, cut and holed."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  own = normal(b, m, s, h, d), normal(b, m, s, kv, d), normal(b, m, s, kv, d)
  mask = np.arange(c) < np.array([[0, 1, 20], [37, 13, 30]])[..., None]
  mask[1, 2, :12] = False
  return (*own, normal(b, kv, c, d), normal(b, kv, c, d), mask)


def one_softmax(query, key, value, prefix_key, prefix_value, prefix_mask):
  """`attend_with_prefix` in float64, query by query over the keys that it sees."""
  b, m, s, h, d = query.shape
  group = h // key.shape[3]
  out = np.zeros(query.shape)
  for i, j, t, head in np.ndindex(b, m, s, h):
    seen = prefix_mask[i, j]
    keys = np.concatenate([prefix_key[i, head // group][seen], key[i, j, : t + 1, head // group]])
    values = np.concatenate([prefix_value[i, head // group][seen], value[i, j, : t + 1, head // group]])
    scores = keys.astype(np.float64) @ query[i, j, t, head] / np.sqrt(d)
    weights = np.exp(scores - scores.max())
    out[i, j, t, head] = weights @ values / weights.sum()
  return out


@pytest.mark.parametrize("block", [8, 2048])
def test_branches_attend_as_if_run_after_their_prefix(block, monkeypatch):
  monkeypatch.setattr(attention, "_PREFIX_BLOCK", block)
  query, key, value, *prefix = branches()
  expected = one_softmax(query, key, value, *prefix)
  np.testing.assert_allclose(attention.attend_with_prefix(query, key, value, *prefix), expected, atol=5e-6)
  np.testing.assert_allclose(jax.jit(attention.attend_with_prefix)(query, key, value, *prefix), expected, atol=5e-6)
  # The last token of each branch alone, its own keys in a cache in another order.
  by_branch = lambda x: np.moveaxis(x, 3, 2).reshape(6, 2, 4, 8)[:, :, [3, 0, 2, 1]]
  one = attention.attend_branches(query[:, :, -1], by_branch(key), by_branch(value), np.ones((6, 4), bool), *prefix)
  np.testing.assert_allclose(one, expected[:, :, -1], atol=5e-6)
  # Columns that are not a branch's own count nothing.
  older = attention.attend_branches(
    query[:, :, 2], by_branch(key), by_branch(value), np.tile([False, True, True, True], (6, 1)), *prefix
  )
  np.testing.assert_allclose(older, expected[:, :, 2], atol=5e-6)


@pytest.mark.parametrize("block", [64, 2048])
def test_sixteen_bits_merge_by_a_log_sum_exp_of_thirty_two(block, monkeypatch):
  """Every score is 100, so the result is (prefix - own) / (prefix + own) columns; the sums are 104.5 and the like."""
  monkeypatch.setattr(attention, "_PREFIX_BLOCK", block)
  c, s, d = 200, 90, 4
  ones = lambda *shape: jnp.ones(shape, jnp.bfloat16)
  query, mask = 200 * ones(1, 1, s, 1, d) / d, np.ones((1, 1, c), bool)
  prefix = ones(1, 1, c, d), ones(1, 1, c, d), mask
  out = attention.attend_with_prefix(query, ones(1, 1, s, 1, d), -ones(1, 1, s, 1, d), *prefix)
  assert out.dtype == jnp.bfloat16
  expected = (c - np.arange(1, s + 1)) / (c + np.arange(1, s + 1))
  np.testing.assert_allclose(out[0, 0, :, 0, 0].astype(np.float32), expected, rtol=2**-8)
  one = attention.attend_branches(query[:, :, -1], ones(1, 1, s, d), -ones(1, 1, s, d), np.ones((1, s), bool), *prefix)
  assert one.dtype == jnp.bfloat16
  np.testing.assert_allclose(one[0, 0, 0].astype(np.float32), expected[-1], rtol=2**-8)


# Padding on either side, a hole in the middle, nothing real at all.
COLUMNS = np.arange(20)
MASKS = np.stack([COLUMNS >= 7, COLUMNS < 13, np.isin(COLUMNS, [2, 3, 9, 10, 17]), COLUMNS < 0])


def sequences(dtype=jnp.float32):
  rng = np.random.default_rng(5)
  return tuple(jnp.asarray(rng.normal(size=(4, 20, h, 8)), dtype) for h in (4, 2, 2))


def test_what_cudnn_is_given_is_the_attention_of_our_blocks(monkeypatch):
  """The library's own XLA stands in for the kernel: tested is how the kernel is called, not the GPU."""
  library = jax.nn.dot_product_attention
  given = []

  def stand_in(*args, implementation, **options):
    given.append(implementation)
    for lengths in ("query_seq_lengths", "key_value_seq_lengths"):  # The kernel does not compute padding.
      np.testing.assert_array_equal(options[lengths], [13, 13, 5, 1])
    out = library(*args, implementation="xla", **options)
    behind = jnp.arange(20)[None] >= options["query_seq_lengths"][:, None]
    return jnp.where(behind[..., None, None], jnp.nan, out)  # The kernel leaves there what it likes.

  def attended(kind):
    total = lambda qkv: jnp.sum(jnp.sin(jnp.where(MASKS[..., None, None], attention.attend(*qkv, MASKS, kind), 0)))
    return attention.attend(*sequences(), MASKS, kind), jax.grad(total)(sequences())

  expected, expected_gradient = attended("blocks")
  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  out, gradient = attended("cudnn")
  assert set(given) == {"cudnn"}
  np.testing.assert_allclose(out[MASKS], expected[MASKS], atol=1e-5)
  np.testing.assert_array_equal(out[~MASKS], 0)
  for got, wanted in zip(gradient, expected_gradient):
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_cudnn_takes_what_a_training_step_gives_it(monkeypatch):
  """Compiled for a GPU that is not there, as far as JAX goes: its checks of shapes, types and masks pass."""
  fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
  monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(attention.sharding, "platform", lambda: "gpu")

  def lowered(**changes):
    config = dataclasses.replace(LLAMA, **{"head_dim": 8, "compute": Compute(dtype="bfloat16", remat="none")} | changes)

    def total(params):
      hidden, _ = decoder.forward(params, config, np.ones((4, 20), np.int32), MASKS)
      return jnp.sum(jnp.square(hidden.astype(jnp.float32)), where=MASKS[..., None])

    return jax.jit(jax.grad(total)).trace(params_of(config)).lower(lowering_platforms=("cuda",)).as_text()

  program = lowered()
  assert "__cudnn$fmhaSoftmaxBackward" in program and "PADDING_CAUSAL" in program
  assert "fmhaScaleBias" not in program  # No mask of S by S.
  for unknown in ({"head_dim": 6}, {"head_dim": 192}, {"compute": Compute()}):
    assert "cudnn" not in lowered(**unknown)  # Our blocks do what the kernel does not have.


@pytest.mark.parametrize(
  ("change", "message"),
  [({"num_kv_heads": 3}, "num_heads=4"), ({"head_dim": 5}, "head_dim=5"), ({"width": 0}, "width=0")],
)
def test_bad_sizes_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(LLAMA, **change)
