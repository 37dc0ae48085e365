"""How a model is computed changes nothing but rounding: kernels, chunks, remat, microbatches, bfloat16."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rredcot_jax.model import attention, decoder, scoring
from rredcot_jax.model.config import REMATS, Compute, ModelConfig
from rredcot_jax.ops import losses, types
from rredcot_jax.parallel import sharding
from rredcot_jax.train import programs, train_step

CONFIG = ModelConfig(vocab_size=29, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24)
OPTIMIZER = optax.sgd(0.1)
LOSSES = {
  "grpo": {}, "dapo": {"clip_high": 0.3, "kl": "k3", "kl_coefficient": 0.1}, "dr_grpo": {"max_length": 11},
  "gspo": {"clip_low": 0.05, "clip_high": 0.05},
}  # fmt: skip


def with_compute(**options):
  return dataclasses.replace(CONFIG, compute=Compute(**options))


@functools.cache
def params():
  return decoder.init(CONFIG, jax.random.key(0))


@functools.cache
def batch():
  """Rows of very different lengths, one of them without loss tokens."""
  rng = np.random.default_rng(0)
  prompt_mask = np.arange(3) >= np.array([0, 2, 1, 0] * 2)[:, None]
  mask = np.arange(7) < np.array([7, 2, 5, 3, 1, 6, 4, 2])[:, None]
  noise = lambda: rng.normal(size=mask.shape).astype(np.float32) * mask
  return types.TrainBatch(
    prompt_tokens=rng.integers(0, 29, prompt_mask.shape).astype(np.int32), prompt_mask=prompt_mask,
    tokens=rng.integers(0, 29, mask.shape).astype(np.int32), mask=mask,
    loss_mask=mask & (np.arange(8) != 5)[:, None], old_log_probs=-3.4 * mask + 0.3 * noise(),
    reference_log_probs=-3.4 * mask + 0.3 * noise(), advantages=noise(),
  )  # fmt: skip


def log_probs_and_gradient(config):
  def total(params):
    log_probs, entropy = scoring.trace_log_probs(params, config, batch(), temperature=0.8)
    return jnp.sum(log_probs * batch().advantages), (log_probs, entropy)

  (_, aux), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params())
  return aux, gradient


@functools.cache
def plain():
  return log_probs_and_gradient(CONFIG)


# Seven tokens in chunks of one, in three with one left over, and in two.
@pytest.mark.parametrize(("remat", "chunk"), [*zip(REMATS, (0, 1, 3, 4), strict=True)])
def test_chunks_and_remat_change_neither_values_nor_gradients(remat, chunk):
  config = with_compute(remat=remat, log_prob_chunk=chunk)
  for ours, theirs in zip(jax.tree.leaves(log_probs_and_gradient(config)), jax.tree.leaves(plain())):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def largest(jaxpr):
  """Elements of the largest array that a program makes, loops and calls within included."""
  sizes = [0]
  for equation in jaxpr.eqns:
    sizes += [v.aval.size for v in equation.outvars if hasattr(v.aval, "size")]
    sizes += [largest(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params)]
  return max(sizes)


def test_whole_logits_never_exist_in_chunks_forward_or_backward():
  sizes = dataclasses.replace(CONFIG, vocab_size=499)
  abstract = jax.eval_shape(lambda: decoder.init(sizes, jax.random.key(0)))

  def largest_of(chunk):
    config = dataclasses.replace(sizes, compute=Compute(log_prob_chunk=chunk))
    total = lambda params: sum(jnp.sum(x) for x in scoring.trace_log_probs(params, config, batch(), temperature=1.0))
    return largest(jax.make_jaxpr(jax.grad(total))(abstract).jaxpr)

  assert largest_of(0) == 8 * 7 * 499
  assert largest_of(2) == max(8 * 2 * 499, 499 * 16)


def test_memory_of_each_remat_policy_falls():
  def temporaries(remat):
    config = dataclasses.replace(CONFIG, num_layers=32, compute=Compute(remat=remat))  # Enough to outweigh one layer.
    abstract = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
    mask = np.ones((4, 64), bool)
    total = lambda params: jnp.sum(decoder.forward(params, config, mask.astype(np.int32), mask)[0])
    return jax.jit(jax.grad(total)).lower(abstract).compile().memory_analysis().temp_size_in_bytes

  kept = [temporaries(remat) for remat in programs.REMATS_BY_COST]
  assert set(programs.REMATS_BY_COST) == set(REMATS)
  assert kept == sorted(set(kept), reverse=True), dict(zip(programs.REMATS_BY_COST, kept))


@pytest.mark.parametrize("loss", LOSSES)
def test_microbatches_make_the_update_of_the_whole_batch(loss):
  options = {"loss": loss} | LOSSES[loss]
  update = functools.partial(
    train_step.policy_update, config=CONFIG, optimizer=OPTIMIZER, temperature=0.8,
    loss=functools.partial(losses.policy_loss, **options),
    weight=functools.partial(losses.loss_weight, loss=loss, max_length=options.get("max_length")),
  )  # fmt: skip
  state = train_step.init_state(params(), OPTIMIZER)
  whole, metrics = jax.jit(update)(state, batch())
  parts, of_parts = jax.jit(functools.partial(update, microbatches=4))(state, batch())
  assert float(metrics["gradient_norm"]) > 1e-3 and float(metrics["clip_fraction_low"]) > 0
  assert metrics.keys() == of_parts.keys()
  for name, value in metrics.items():
    np.testing.assert_allclose(of_parts[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
  for ours, theirs in zip(jax.tree.leaves(parts), jax.tree.leaves(whole)):
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_parts_of_other_sizes_are_refused():
  with pytest.raises(ValueError, match="microbatches=3 does not divide a batch of 8 rows"):
    train_step.split_rows(batch(), 3)


def test_bfloat16_rounds_and_keeps_master_parameters_and_gradients():
  config = with_compute(dtype="bfloat16")
  (log_probs, entropy), gradient = log_probs_and_gradient(config)
  (expected, expected_entropy), expected_gradient = plain()
  assert log_probs.dtype == entropy.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
  assert 1e-5 < np.abs(log_probs - expected).max() < 0.05  # Rounded, and no more than that.
  np.testing.assert_allclose(entropy, expected_entropy, atol=0.05)
  ours, theirs = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for g in (gradient, expected_gradient))
  assert float(ours @ theirs / jnp.linalg.norm(ours) / jnp.linalg.norm(theirs)) > 0.999
  hidden, cache = decoder.forward(params(), config, batch().tokens, batch().mask)
  assert hidden.dtype == cache.key.dtype == jnp.bfloat16
  kept = decoder.rounded(params(), config)
  assert kept["embedding"].dtype == kept["blocks"]["gate"].dtype == jnp.bfloat16
  assert kept["blocks"]["mlp_norm"].dtype == kept["final_norm"].dtype == jnp.float32


@functools.cache
def sequences():
  rng = np.random.default_rng(3)
  query, key, value = (jnp.asarray(rng.normal(size=(2, 150, h, 128)), jnp.float32) for h in (4, 2, 2))
  mask = jnp.asarray((np.arange(150) >= np.array([[0], [7]])) & (np.arange(150) < np.array([[150], [140]])))
  return query, key, value, mask


def attended(kind, mesh=None):
  *qkv, mask = sequences()

  def total(qkv):
    out = jnp.where(mask[:, :, None, None], attention.attend(*qkv, mask, kind), 0)
    return jnp.sum(jnp.sin(out)), out

  with sharding.use(mesh):
    return jax.jit(jax.grad(total, has_aux=True))(tuple(qkv))


@pytest.mark.parametrize("axes", [None, {"data": 1, "fsdp": 2, "tensor": 2}, {"data": 1, "tensor": 4}])
def test_the_tpu_kernel_equals_our_blocks_sharded_or_not(axes):
  """Interpreted: tested is how the kernel is called, not the TPU. Two key heads on four devices are repeated."""
  ours = attended("splash", None if axes is None else sharding.make_mesh(**axes))
  for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(attended("blocks"))):
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("mesh", [None, {"data": 1, "fsdp": 2, "sequence": 2}])
def test_a_long_prefix_in_blocks_is_one_softmax(monkeypatch, mesh):
  rng = np.random.default_rng(4)
  b, m, s, h, kv, d, c = 2, 3, 4, 4, 2, 8, 37
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  args = (
    normal(b, m, s, h, d),
    normal(b, m, s, kv, d),
    normal(b, m, s, kv, d),
    normal(b, kv, c, d),
    normal(b, kv, c, d),
  )
  # A branch without a prefix, one of a column, one across blocks, one whose first block is all padding.
  mask = np.arange(c) < np.array([[0, 1, 20], [37, 13, 30]])[..., None]
  mask[1, 2, :12] = False
  whole = attention.attend_with_prefix(*args, mask)
  monkeypatch.setattr(attention, "_PREFIX_BLOCK", 8)
  with sharding.use(None if mesh is None else sharding.make_mesh(**mesh)):
    np.testing.assert_allclose(jax.jit(attention.attend_with_prefix)(*args, mask), whole, atol=2e-6)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"dtype": "bf16"}, "did you mean 'bfloat16'"),
    ({"remat": "dot"}, "did you mean 'dots'"),
    ({"attention": "slpash"}, "did you mean 'splash'"),
    ({"log_prob_chunk": -1}, "log_prob_chunk=-1"),
  ],
)
def test_unknown_options_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    Compute(**options)
