"""Losses, metrics and gradients worked out by hand, then the identities between them."""

import dataclasses
import functools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rredcot_jax.ops import advantages, losses, types

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tools"))
import make_trl_goldens as trl

OPTIONS = ("loss", "kl", "max_length", "importance")
NAN = np.nan
ROWS, TOKENS = 8, 6
# With [ROWS, TOKENS], one compilation a loss for most tests. Where reference = new, k3 adds nothing.
SHARED: dict[str, Any] = dict(clip_high=0.3, kl="k3", kl_coefficient=0.1)
every_loss = pytest.mark.parametrize("loss", losses.LOSSES)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)


@functools.partial(jax.jit, static_argnames=OPTIONS)
def loss_metrics_gradient(log_probs, batch, max_length=10, **options):
  """(loss, metrics, d loss / d log_probs); numbers such as clip_low are traced."""
  grad = jax.value_and_grad(losses.policy_loss, has_aux=True)
  (loss, metrics), gradient = grad(log_probs, batch, max_length=max_length, **options)
  return loss, metrics, gradient


@functools.partial(jax.jit, static_argnames="mode")
def token_advantages(rewards, outcomes, segments, mode):
  return jax.vmap(functools.partial(advantages.token_advantages, mode=mode))(rewards, outcomes, segments)


def make_batch(old, advantages, mask, reference=None, sampler=None):
  old = jnp.array(old, jnp.float32)
  zeros = jnp.zeros(old.shape, jnp.int32)
  mask = jnp.array(mask, bool)
  return types.TrainBatch(
    prompt_tokens=zeros,
    prompt_mask=jnp.zeros(old.shape, bool),
    tokens=zeros,
    mask=mask,
    loss_mask=mask,
    old_log_probs=old,
    reference_log_probs=old if reference is None else jnp.array(reference, jnp.float32),
    advantages=jnp.array(advantages, jnp.float32),
    sampler_log_probs=None if sampler is None else jnp.array(sampler, jnp.float32),
  )


def golden_batch():
  """Rows of 3, 2 and no loss tokens; the ratios lie below, above and within [0.8, 1.3]."""
  log_probs = np.array([[-1, -2, -3], [-1, -2, NAN], [NAN, NAN, NAN]], np.float32)
  ratios = np.array([[1.5, 0.5, 1.0], [1.5, 0.5, 1.0], [1.0, 1.0, 1.0]])
  a = [[1, 1, -1], [-1, -1, NAN], [NAN, np.inf, 1]]
  mask = [[1, 1, 1], [1, 1, 0], [0, 0, 0]]
  batch = make_batch(widen(log_probs - np.log(ratios)), widen(a), widen(mask), widen(log_probs))
  return jnp.array(widen(log_probs)), batch


def widen(x):
  """Zeros up to [ROWS, TOKENS]."""
  x = np.array(x)
  return np.pad(x, ((0, ROWS - x.shape[0]), (0, TOKENS - x.shape[1])))


def random_batch(seed=0):
  """Random everything, with a row of no loss tokens, a hole in one row and garbage under the mask."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, TOKENS + 1, ROWS)
  lengths[1] = 0
  mask = np.arange(TOKENS)[None] < lengths[:, None]
  mask[0] = [True, False, *[True] * (TOKENS - 2)]

  def draw(scale):
    return rng.normal(scale=scale, size=(ROWS, TOKENS))

  def fill(x):
    return np.where(mask, x, rng.choice([NAN, np.inf, -np.inf], (ROWS, TOKENS)))

  old = -1.0 - np.abs(draw(1.0))
  batch = make_batch(fill(old), fill(draw(1.0)), mask, fill(old + draw(0.3)))
  return jnp.array(fill(old + draw(0.3)), jnp.float32), batch


# Values by hand, clip range [0.8, 1.3].
# min(rho A, clip(rho) A) of the two rows: 1.3, 0.5, -1.0 and -1.5, -0.8.


def test_golden_grpo():
  loss, _, gradient = loss_metrics_gradient(*golden_batch(), loss="grpo", **SHARED)
  close(loss, -(0.8 / 3 - 2.3 / 2) / 2)  # An empty row is no sequence.
  # d rho / d log pi = rho where not clipped.
  close(gradient, widen([[0, -0.5 / 6, 1 / 6], [1.5 / 4, 0, 0]]))


def test_golden_dapo():
  loss, _, gradient = loss_metrics_gradient(*golden_batch(), loss="dapo", **SHARED)
  close(loss, 1.5 / 5)
  close(gradient, widen([[0, -0.5, 1], [1.5, 0, 0]]) / 5)


def test_golden_dr_grpo():
  loss, _, gradient = loss_metrics_gradient(*golden_batch(), loss="dr_grpo", **SHARED)
  close(loss, 1.5 / (ROWS * 10))  # Empty rows count in B.
  close(gradient, widen([[0, -0.5, 1], [1.5, 0, 0]]) / (ROWS * 10))


def test_golden_cispo():
  # clip(rho) A log pi: -1.3, -1.6, 3 and 1.3, 1.6. The gradient is the clipped weight, on every token.
  loss, _, gradient = loss_metrics_gradient(*golden_batch(), loss="cispo", **SHARED)
  close(loss, -3.0 / 5)
  close(gradient, -widen([[1.3, 0.8, -1.0], [-1.3, -0.8, 0]]) / 5)


def test_golden_gspo():
  s0, s1 = 0.75 ** (1 / 3), 0.75**0.5  # .9086, .8660: geometric means of the rows' ratios
  loss, _, gradient = loss_metrics_gradient(*golden_batch(), loss="gspo", **SHARED)
  close(loss, -(s0 * (1 + 1 - 1) / 3 - s1) / 2)
  close(gradient, widen([[-s0 / 6, -s0 / 6, s0 / 6], [s1 / 4, s1 / 4, 0]]))
  # With the lower bound at .9 the second row, all A < 0, is clipped as a whole.
  loss, metrics, gradient = loss_metrics_gradient(*golden_batch(), loss="gspo", clip_low=0.1)
  close(loss, -(s0 / 3 - 0.9) / 2)
  close(gradient, widen([[-s0 / 6, -s0 / 6, s0 / 6]]))
  close(metrics["clip_fraction_low"], 2 / 5)
  close(metrics["ratio_max"], s0)


def test_golden_metrics():
  log_probs, batch = golden_batch()
  _, metrics, _ = loss_metrics_gradient(log_probs, batch, loss="grpo", **SHARED)
  close(metrics["clip_fraction_low"], 1 / 5)  # Only where A < 0.
  close(metrics["clip_fraction_high"], 1 / 5)  # Only where A > 0.
  close(metrics["clip_fraction_dual"], 0)
  close(metrics["ratio_mean"], (1.5 + 0.5 + 1.0 + 1.5 + 0.5) / 5)
  close(metrics["ratio_max"], 1.5)
  close(metrics["advantage_mean_abs"], 1)
  close(metrics["loss_tokens"], 5)
  close(metrics["approx_kl"], (2 * (1.5 - 1 - np.log(1.5)) + 2 * (0.5 - 1 - np.log(0.5))) / 5)
  close(metrics["kl"], 0)
  assert all(value.shape == () and value.dtype == jnp.float32 for value in metrics.values())
  _, metrics, _ = loss_metrics_gradient(log_probs, batch, loss="cispo", **SHARED)
  close(metrics["clip_fraction_low"], 2 / 5)  # cispo clips whatever the sign of A.
  close(metrics["clip_fraction_high"], 2 / 5)


def test_dual_clip_bounds_what_a_wrong_trace_can_cost():
  ratios, a = np.array([[5.0, 2.0, 5.0, 0.5]]), [[-2.0, -2.0, 2.0, -2.0]]
  batch = make_batch(-np.log(ratios), a, np.ones((1, 4)))
  zeros = jnp.zeros((1, 4))
  loss, metrics, gradient = loss_metrics_gradient(zeros, batch, loss="grpo", dual_clip=3.0)
  close(loss, -(-3.0 * 2 - 2.0 * 2 + 1.2 * 2 - 0.8 * 2) / 4)
  close(gradient, [[0, 2 * 2 / 4, 0, 0]])
  close(metrics["clip_fraction_dual"], 1 / 4)
  assert "kl" not in metrics
  loss, _, gradient = loss_metrics_gradient(zeros, batch, loss="grpo")
  close(loss, -(-5.0 * 2 - 2.0 * 2 + 1.2 * 2 - 0.8 * 2) / 4)
  close(gradient, [[5 * 2 / 4, 2 * 2 / 4, 0, 0]])


def test_dual_clip_acts_within_the_clip_as_well():
  """Its docstring's example: a ratio of 1.15 is within [0.8, 1.2] and beyond 1.1."""
  batch = make_batch(-np.log([[1.15]]), [[-1.0]], [[1]])
  loss, metrics, gradient = loss_metrics_gradient(jnp.zeros((1, 1)), batch, loss="grpo", dual_clip=1.1)
  close(loss, 1.1)
  close(gradient, [[0.0]])
  close(metrics["clip_fraction_dual"], 1)
  loss, _, _ = loss_metrics_gradient(jnp.zeros((1, 1)), batch, loss="grpo", dual_clip=1.2)
  close(loss, 1.15)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_a_clipped_token_has_no_gradient_outwards_and_a_full_one_inwards(loss):
  """One token a row: ratio out of bounds above or below, with A pushing it on or pulling it back."""
  ratios = np.array([[2.0], [2.0], [0.5], [0.5]])
  zeros = jnp.zeros((ROWS, TOKENS))
  a, mask = [[1.0], [-1.0], [1.0], [-1.0]], np.ones((4, 1))
  batch = make_batch(widen(-np.log(ratios)), widen(a), widen(mask), reference=zeros)
  _, _, gradient = loss_metrics_gradient(zeros, batch, loss=loss, **SHARED)
  normaliser = ROWS * 10 if loss == "dr_grpo" else 4
  close(gradient, widen([[0.0], [2.0], [-0.5], [0.0]]) / normaliser)


@pytest.mark.parametrize(
  "loss, clip", [*((loss, {}) for loss in losses.LOSSES), ("grpo", dict(clip_low=0.0, clip_high=0.0))]
)
def test_the_on_policy_gradient_is_minus_a_over_the_normaliser(loss, clip):
  log_probs = jnp.array(widen([[-1.0, -2.0, -0.5], [-1.0, -3.0, 0.0], [0.0, 0.0, 0.0]]))
  a = widen([[0.5, -2.0, 0.25], [1.0, 3.0, 9.0], [9.0, 9.0, 9.0]])
  mask = widen([[1, 1, 1], [1, 1, 0], [0, 0, 0]])
  _, metrics, gradient = loss_metrics_gradient(
    log_probs, make_batch(log_probs, a, mask, log_probs), loss=loss, **SHARED | clip
  )
  by_sequence = np.array([[3 * 2], [2 * 2], *[[1]] * 6])
  normaliser = {"grpo": by_sequence, "gspo": by_sequence, "dapo": 5, "cispo": 5, "dr_grpo": 80}[loss]
  close(gradient, -a * mask / normaliser)
  close(metrics["ratio_mean"], 1)
  close(metrics["approx_kl"], 0)


def test_gspo_token_has_the_gradient_of_gspo_where_the_advantage_is_constant():
  log_probs, batch = random_batch()
  batch = dataclasses.replace(batch, advantages=jnp.broadcast_to(jnp.linspace(-1, 1, 8)[:, None], (8, 6)))

  def gspo(log_probs):
    mask = batch.loss_mask
    count = jnp.maximum(mask.sum(1), 1)
    s = jnp.exp(jnp.where(mask, log_probs - batch.old_log_probs, 0).sum(1) / count)
    a = batch.advantages[:, 0]
    objective = jnp.minimum(s * a, jnp.clip(s, 0.9, 1.1) * a)
    return -jnp.where(mask.any(1), objective, 0).sum() / mask.any(1).sum()

  expected, expected_gradient = jax.jit(jax.value_and_grad(gspo))(log_probs)
  loss, metrics, gradient = loss_metrics_gradient(log_probs, batch, loss="gspo", clip_low=0.1, clip_high=0.1)
  assert metrics["clip_fraction_low"] + metrics["clip_fraction_high"] > 0
  close(loss, expected)
  close(gradient, expected_gradient)


@pytest.mark.parametrize(
  "kl, value, slope, slope_at_0",
  [("k1", 0.5, 1.0, 1.0), ("k2", 0.125, 0.5, 0.0), ("k3", np.exp(-0.5) + 0.5 - 1, 1 - np.exp(-0.5), 0.0)],
)
def test_golden_kl(kl, value, slope, slope_at_0):
  """log pi - log pi_ref = 0.5 on the first row's two tokens, 0 on the second row's one."""
  log_probs = jnp.array([[-1.0, -1.0], [-2.0, 0.0]])
  zeros = np.zeros((2, 2))
  batch = make_batch(log_probs, zeros, [[1, 1], [1, 0]], [[-1.5, -1.5], [-2.0, NAN]])
  for loss, share, weight_0, weight_1 in [
    ("grpo", 1 / 2, 1 / 4, 1 / 2),
    ("dapo", 2 / 3, 1 / 3, 1 / 3),
    ("dr_grpo", 2 / 20, 1 / 20, 1 / 20),
  ]:
    got, metrics, gradient = loss_metrics_gradient(log_probs, batch, loss=loss, **SHARED | dict(kl=kl))
    close(got, 0.1 * value * share)
    close(gradient, 0.1 * np.array([[slope * weight_0, slope * weight_0], [slope_at_0 * weight_1, 0]]))
    close(metrics["kl"], (np.exp(-0.5) + 0.5 - 1) * 2 / 3)  # k3, whichever is in the loss.


def test_expected_kl_gradients_by_enumeration():
  """On-policy over a whole vocabulary: k1 none, k2 that of KL(pi || ref), k3 that of KL(ref || pi)."""
  logits, ref = jnp.array([0.3, -1.0, 0.8, 0.1]), jax.nn.log_softmax(jnp.array([1.0, 0.2, -0.5, 0.0]))
  log_pi = jax.nn.log_softmax(logits)
  batch = make_batch(log_pi[:, None], np.zeros((4, 1)), np.ones((4, 1)), ref[:, None])
  score = jax.jacobian(jax.nn.log_softmax)(logits)

  def expected(kl):
    _, _, gradient = loss_metrics_gradient(log_pi[:, None], batch, loss="dapo", kl=kl, kl_coefficient=1.0)
    return jnp.sum((jnp.exp(log_pi) * 4 * gradient[:, 0])[:, None] * score, axis=0)

  forward = jax.grad(lambda x: jnp.sum(jnp.exp(ref) * (ref - jax.nn.log_softmax(x))))(logits)
  reverse = jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - ref)))(logits)
  assert np.abs(forward - reverse).max() > 0.01
  close(expected("k1"), np.zeros(4), atol=1e-6)
  close(expected("k2"), reverse, atol=1e-6)
  close(expected("k3"), forward, atol=1e-6)


@pytest.mark.parametrize(
  "loss, kl", [*((loss, "k3") for loss in losses.LOSSES), *(("grpo", kl) for kl in ("off", "k1", "k2"))]
)
def test_masked_garbage_reaches_neither_loss_nor_gradient_nor_metrics(loss, kl):
  log_probs, batch = random_batch()

  def clean(x):
    return jnp.where(batch.loss_mask, x, 0)

  cleaned = dataclasses.replace(
    batch,
    old_log_probs=clean(batch.old_log_probs),
    reference_log_probs=clean(batch.reference_log_probs),
    advantages=clean(batch.advantages),
  )
  got = loss_metrics_gradient(log_probs, batch, loss=loss, **SHARED | dict(kl=kl))
  expected = loss_metrics_gradient(clean(log_probs), cleaned, loss=loss, **SHARED | dict(kl=kl))
  jax.tree.map(np.testing.assert_array_equal, got, expected)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
  np.testing.assert_array_equal(got[2][~batch.loss_mask], 0)
  assert np.abs(got[2]).max() > 0


@every_loss
def test_padding_columns_change_nothing(loss):
  log_probs, batch = random_batch()
  pad = functools.partial(np.pad, pad_width=((0, 0), (0, 3)))
  loss_, metrics, gradient = loss_metrics_gradient(log_probs, batch, loss=loss, **SHARED)
  padded = loss_metrics_gradient(pad(log_probs), jax.tree.map(pad, batch), loss=loss, **SHARED)
  close(padded[0], loss_)
  close(padded[2], pad(gradient))
  jax.tree.map(close, padded[1], metrics)


@every_loss
def test_a_token_left_out_in_the_middle_is_like_one_that_was_never_there(loss):
  log_probs, batch = random_batch()  # Row 0 has a hole at token 1.
  assert not batch.loss_mask[0, 1] and batch.loss_mask[0, 2]
  close_up = lambda x: jnp.concatenate([x[:, :1], x[:, 2:], x[:, 1:2]], axis=1) if jnp.ndim(x) == 2 else x
  closed = jax.tree.map(lambda x: x.at[0].set(close_up(x)[0]), batch)
  got = loss_metrics_gradient(log_probs.at[0].set(close_up(log_probs)[0]), closed, loss=loss, **SHARED)
  expected = loss_metrics_gradient(log_probs, batch, loss=loss, **SHARED)
  close(got[0], expected[0])
  close(got[2][0], close_up(expected[2])[0])
  jax.tree.map(close, got[1], expected[1])


@every_loss
def test_neighbouring_rows_are_independent(loss):
  """Another row's values reach no other row's gradient; its mask only through the normaliser."""
  log_probs, batch = random_batch()
  _, _, gradient = loss_metrics_gradient(log_probs, batch, loss=loss, **SHARED)
  changed = dataclasses.replace(batch, advantages=batch.advantages.at[2].mul(-3.0))
  _, _, other = loss_metrics_gradient(log_probs.at[2].add(0.5), changed, loss=loss, **SHARED)
  rest = np.arange(8) != 2
  np.testing.assert_array_equal(other[rest], gradient[rest])
  assert np.abs(other[2] - gradient[2]).max() > 0

  dropped = dataclasses.replace(batch, loss_mask=batch.loss_mask.at[2].set(False))
  _, _, other = loss_metrics_gradient(log_probs, dropped, loss=loss, **SHARED)
  tokens = batch.loss_mask.sum() / dropped.loss_mask.sum()
  rescaled = {"grpo": 7 / 6, "gspo": 7 / 6, "dapo": tokens, "cispo": tokens, "dr_grpo": 1.0}[loss]
  close(other[rest], gradient[rest] * rescaled)
  np.testing.assert_array_equal(other[2], 0)


@every_loss
def test_a_batch_without_loss_tokens_is_zero(loss):
  log_probs, batch = random_batch()
  batch = dataclasses.replace(batch, loss_mask=jnp.zeros_like(batch.loss_mask))
  result = loss_metrics_gradient(log_probs, batch, loss=loss, **SHARED)
  for leaf in jax.tree.leaves(result):
    np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


@every_loss
@pytest.mark.parametrize("drift", [-200.0, 200.0])
def test_a_runaway_ratio_stays_finite(loss, drift):
  log_probs, ones = jnp.full((ROWS, TOKENS), -250.0), np.ones((ROWS, TOKENS))
  batch = make_batch(log_probs - drift, ones * (-1.0) ** np.arange(TOKENS)[None], ones, log_probs + drift)
  result = loss_metrics_gradient(log_probs, batch, loss=loss, **SHARED)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(result))


def test_the_gradient_flows_to_the_new_log_probs_alone():
  log_probs, batch = random_batch()

  def loss_of(old, reference, a, sampler):
    changed = dataclasses.replace(
      batch, old_log_probs=old, reference_log_probs=reference, advantages=a, sampler_log_probs=sampler
    )
    return losses.policy_loss(log_probs, changed, loss="grpo", kl="k2", kl_coefficient=0.5, importance="token")[0]

  floats = batch.old_log_probs, batch.reference_log_probs, batch.advantages, batch.old_log_probs - 0.1
  for gradient in jax.jit(jax.grad(loss_of, argnums=(0, 1, 2, 3)))(*floats):
    np.testing.assert_array_equal(gradient, np.zeros((ROWS, TOKENS)))


@every_loss
def test_half_precision_is_added_up_in_float32(loss):
  log_probs, batch = golden_batch()  # These log-probabilities and advantages are exact in bfloat16.
  expected = loss_metrics_gradient(log_probs, batch, loss=loss, **SHARED)
  half = dataclasses.replace(
    batch,
    reference_log_probs=batch.reference_log_probs.astype(jnp.bfloat16),
    advantages=batch.advantages.astype(jnp.bfloat16),
  )
  got = loss_metrics_gradient(log_probs.astype(jnp.bfloat16), half, loss=loss, **SHARED)
  assert got[0].dtype == jnp.float32 and got[2].dtype == jnp.bfloat16
  close(got[0], expected[0])
  jax.tree.map(close, got[1], expected[1])
  # 1000 equal tokens, all fields in bfloat16, whose sums stop growing at 256.
  many = jnp.full((10, 100), -1.0, jnp.bfloat16)
  ones = np.ones((10, 100))
  batch = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, make_batch(many, ones, ones))
  got, metrics, _ = loss_metrics_gradient(many, batch, loss=loss, max_length=100)
  assert got.dtype == jnp.float32
  close(got, 1.0 if loss == "cispo" else -1.0)
  close(metrics["loss_tokens"], 1000)


@every_loss
@pytest.mark.parametrize("mode", advantages.SIGMA_MODES)
def test_one_segment_and_constant_credit_have_the_loss_of_grpo_advantages(loss, mode):
  rng = np.random.default_rng(3)
  old = rng.uniform(-3, -1, (ROWS, TOKENS))
  log_probs = jnp.array(old + rng.normal(scale=0.2, size=old.shape), jnp.float32)
  lengths = jnp.array([6, 4, 6, 4, 6, 4, 2, 0])
  mask = jnp.arange(TOKENS)[None] < lengths[:, None]
  outcomes = advantages.group_advantages(jnp.array([1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0]))
  batch = make_batch(old, mask * outcomes[:, None], mask)
  grpo = loss_metrics_gradient(log_probs, batch, loss=loss, **SHARED)
  assert np.abs(grpo[2]).max() > 0

  # One segment, and two of unequal lengths with one reward of the outcome's sign.
  for num_segments, cut in [(1, 6), (2, 1)]:
    first = jnp.minimum(lengths, cut)
    segments = types.Segments(
      ends=jnp.stack([first, lengths], axis=-1),
      segment_ids=jnp.where(mask, (jnp.arange(TOKENS)[None] >= cut).astype(jnp.int32), -1),
      num_segments=jnp.minimum(lengths, num_segments),
      num_merged=jnp.zeros(ROWS, jnp.int32),
    )
    rewards = jnp.stack([outcomes * 0.35, outcomes * 0.35 if num_segments == 2 else outcomes * NAN], axis=-1)
    credit = token_advantages(rewards, outcomes, segments, mode)
    credited = loss_metrics_gradient(log_probs, dataclasses.replace(batch, advantages=credit), loss=loss, **SHARED)
    jax.tree.map(close, credited, grpo)


def test_loss_mask():
  mask = jnp.array([[True, True, False]] * 4)
  truncated = jnp.array([False, True, False, True])
  flat = jnp.array([False, False, True, True])
  for mask_truncated, filter_zero_variance, kept in [
    (False, False, [True, True, True, True]),
    (True, False, [True, False, True, False]),
    (False, True, [True, True, False, False]),
    (True, True, [True, False, False, False]),
  ]:
    got = losses.loss_mask(
      mask, truncated, flat, mask_truncated=mask_truncated, filter_zero_variance=filter_zero_variance
    )
    np.testing.assert_array_equal(got, np.array(mask) & np.array(kept)[:, None])


@every_loss
def test_jit_and_vmap_equal_eager(loss):
  log_probs, batch = random_batch()
  policy_loss: Any = functools.partial(losses.policy_loss, loss=loss, max_length=10, **SHARED)
  eager = policy_loss(log_probs, batch)
  jitted = loss_metrics_gradient(log_probs, batch, loss=loss, **SHARED)
  jax.tree.map(close, jitted[:2], eager)
  flipped = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), (log_probs, batch))
  batched = jax.jit(jax.vmap(policy_loss))(*flipped)
  for member in (
    jax.tree.map(lambda x: x[0], batched),
    jax.tree.map(lambda x: x[1], batched),
  ):  # A batch means the same in any order of its rows.
    jax.tree.map(close, member, eager)


@every_loss
def test_four_devices_equal_one(loss):
  assert len(jax.devices()) >= 4
  log_probs, batch = random_batch()
  options = dict(loss=loss, **SHARED)
  expected = loss_metrics_gradient(log_probs, batch, **options)
  rows = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("data",)), PartitionSpec("data"))
  got = loss_metrics_gradient(jax.device_put(log_probs, rows), jax.device_put(batch, rows), **options)
  assert len(got[2].sharding.device_set) == 4
  jax.tree.map(close, got, expected)


# ---- The pieces, by themselves -----------------------------------------------------------------


def test_the_pieces_by_hand():
  mask = jnp.array([[True, True, False]])
  log_ratios = losses.log_ratio(jnp.array([[-1.0, -2.0, NAN]]), jnp.array([[-1.5, -30.0, NAN]]), mask)
  close(log_ratios, [[0.5, 20.0, 0.0]])
  small = jnp.array([[0.5, -0.1, 0.0]])
  close(losses.token_ratio(small, mask), [[np.exp(0.5), np.exp(-0.1), 1.0]])
  close(losses.sequence_ratio(small, mask)[:, :2], [[np.exp(0.2), np.exp(0.2)]])
  ratio, a = jnp.array([[1.5, 0.5, 1.0]]), jnp.array([[1.0, -2.0, 3.0]])
  objective, clipped = losses.clipped_objective(ratio, a, clip_low=0.2, clip_high=0.3)
  close(objective, [[1.3, -1.6, 3.0]])
  np.testing.assert_array_equal(clipped.low, [[False, True, False]])
  np.testing.assert_array_equal(clipped.high, [[True, False, False]])
  objective, clipped = losses.weighted_objective(ratio, a, jnp.array([[-1.0, -2.0, -3.0]]), clip_low=0.2, clip_high=0.3)
  close(objective, [[-1.3, 3.2, -9.0]])
  new, reference = jnp.float32(-1.0), jnp.float32(-1.5)
  close(losses.k1(new, reference), 0.5)
  close(losses.k2(new, reference), 0.125)
  close(losses.k3(new, reference), np.exp(-0.5) + 0.5 - 1)
  per_token = jnp.array([[1.0, 2.0, NAN], [4.0, NAN, NAN], [NAN, NAN, NAN]])
  mask = jnp.isfinite(per_token)
  close(losses.sequence_mean(per_token, mask), [1.5 + 4.0, 2])
  close(losses.token_mean(per_token, mask), [7.0, 3])
  close(losses.constant_mean(per_token, mask, max_length=10), [7.0, 30])


@pytest.mark.parametrize("loss, options", [*((loss, {}) for loss in losses.LOSSES), ("grpo", dict(dual_clip=1.5))])
def test_numbers_can_change_inside_a_compiled_program(loss, options):
  """Annealed by a schedule: one program, and the same result as with constants."""
  log_probs, batch = random_batch()
  batch = dataclasses.replace(batch, sampler_log_probs=batch.reference_log_probs)
  programs = loss_metrics_gradient._cache_size()
  for numbers in (
    dict(clip_low=0.1, clip_high=0.3, kl_coefficient=0.1, importance_cap=1.1),
    dict(clip_low=0.3, clip_high=0.1, kl_coefficient=0.7, importance_cap=0.9),
  ):
    call = dict(loss=loss, kl="k3", importance="token") | numbers | options
    fixed = losses.policy_loss(log_probs, batch, max_length=10, **call)
    traced = loss_metrics_gradient(log_probs, batch, **call)
    jax.tree.map(close, traced[:2], fixed)
  assert loss_metrics_gradient._cache_size() == programs + 1


# ---- Sampler and policy --------------------------------------------------------------------


def sampler_batch():
  """pi_old / mu = 2, 1/2, 1 and 4; the ratio to the policy is 1."""
  log_probs = np.log([[0.2, 0.1, 0.2], [0.4, NAN, NAN]])
  sampler = np.log([[0.1, 0.2, 0.2], [0.1, NAN, NAN]])
  return jnp.array(log_probs, jnp.float32), make_batch(
    log_probs, [[1, 1, -1], [-1, 1, 1]], [[1, 1, 1], [1, 0, 0]], log_probs - 0.5, sampler
  )


def test_golden_importance_weights():
  log_probs, batch = sampler_batch()
  arguments = (batch.old_log_probs, batch.sampler_log_probs, batch.loss_mask)
  close(losses.importance_weights(*arguments, cap=3.0) * batch.loss_mask, [[2, 0.5, 1], [3, 0, 0]])
  weights = losses.importance_weights(*arguments, level="sequence", cap=3.0)
  close(weights, [[1, 1, 1], [3, 3, 3]])
  options = dict(loss="dapo", importance_cap=3.0, kl="k1", kl_coefficient=0.1)
  loss, metrics, gradient = loss_metrics_gradient(log_probs, batch, importance="token", **options)
  # The objective is weighted, the penalty of 0.5 nats is not.
  close(loss, -(2 + 0.5 - 1 - 3) / 4 + 0.1 * 0.5)
  close(gradient, np.array([[-2, -0.5, 1], [3, 0, 0]]) / 4 + 0.1 * np.array([[1, 1, 1], [1, 0, 0]]) / 4)
  close(metrics["importance_truncated"], 1 / 4)
  k3 = lambda ratio: ratio - 1 - np.log(ratio)
  close(metrics["sampler_kl"], (k3(2) + k3(0.5) + k3(1) + k3(4)) / 4)
  close([metrics[f"sampler_ratio_p{p}"] for p in (5, 50, 95)], [0.5, 1.0, 4.0])
  loss, _, _ = loss_metrics_gradient(log_probs, batch, importance="sequence", **options)
  close(loss, -(1 + 1 - 1 - 3) / 4 + 0.1 * 0.5)


@pytest.mark.parametrize("level", ["token", "sequence"])
@every_loss
def test_a_sampler_that_is_the_policy_changes_nothing(loss, level):
  log_probs, batch = random_batch()
  same = dataclasses.replace(batch, sampler_log_probs=batch.old_log_probs)
  got = loss_metrics_gradient(log_probs, same, loss=loss, importance=level, importance_cap=1.5, **SHARED)
  expected = loss_metrics_gradient(log_probs, batch, loss=loss, **SHARED)
  close(got[0], expected[0])
  close(got[2], expected[2])
  assert {name: got[1].pop(name) for name in got[1].keys() - expected[1].keys()} == {
    "sampler_kl": 0.0, "sampler_ratio_p5": 1.0, "sampler_ratio_p50": 1.0, "sampler_ratio_p95": 1.0,
    "importance_truncated": 0.0,
  }  # fmt: skip
  jax.tree.map(close, got[1], expected[1])


def test_importance_weighting_undoes_another_sampler_in_expectation():
  """Over a whole vocabulary, drawn from mu: with a cap that is not reached the gradient is that under pi."""
  log_pi, log_mu = (jax.nn.log_softmax(jnp.array(x)) for x in ([0.3, -1.0, 0.8, 0.1], [1.0, 0.2, -0.5, 0.0]))
  a = np.array([[1.0], [-2.0], [0.5], [3.0]])
  batch = make_batch(log_pi[:, None], a, np.ones((4, 1)), sampler=log_mu[:, None])
  for level in ("token", "sequence"):
    _, _, gradient = loss_metrics_gradient(log_pi[:, None], batch, loss="dapo", importance=level, importance_cap=100.0)
    close(jnp.exp(log_mu) * 4 * gradient[:, 0], -jnp.exp(log_pi) * a[:, 0])


def test_importance_refuses_what_it_cannot_do():
  log_probs, batch = sampler_batch()
  bare = dataclasses.replace(batch, sampler_log_probs=None)
  with pytest.raises(ValueError, match="needs the batch's sampler_log_probs"):
    losses.policy_loss(log_probs, bare, loss="grpo", importance="token")
  with pytest.raises(ValueError, match="importance='tokens' is unknown; did you mean 'token'"):
    losses.policy_loss(log_probs, batch, loss="grpo", importance="tokens")
  with pytest.raises(ValueError, match="cap=0 must be > 0"):
    losses.policy_loss(log_probs, batch, loss="grpo", importance="token", importance_cap=0)


def test_metrics_of_parts_make_those_of_the_batch():
  log_probs, batch = random_batch()
  batch = dataclasses.replace(batch, sampler_log_probs=batch.old_log_probs)
  call = functools.partial(losses.policy_loss, loss="dapo", importance="token", **SHARED)
  parts = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), (log_probs, batch))
  _, of_parts = jax.vmap(call)(*parts)
  weights = jax.vmap(functools.partial(losses.loss_weight, loss="dapo"))(parts[1].loss_mask)
  close_tree = lambda x, y: jax.tree.map(functools.partial(close, rtol=1e-4, atol=1e-6), x, y)
  close_tree(losses.merge_metrics(of_parts, weights), call(log_probs, batch)[1])


# ---- TRL -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept():
  return trl.golden()


def trl_case(name):
  arrays = trl.batch()
  garbage = np.where(arrays["mask"], 0.0, NAN)  # Here what is masked may be anything.
  batch = make_batch(
    arrays["old_log_probs"] + garbage, arrays["advantages"] + garbage, arrays["mask"],
    arrays["reference_log_probs"] + garbage, arrays["sampler_log_probs"] + garbage,
  )  # fmt: skip
  log_probs = jnp.asarray(arrays["log_probs"] + garbage, jnp.float32)
  return loss_metrics_gradient(log_probs, batch, max_length=trl.MAX_LENGTH, **trl.CASES[name][1])


@pytest.mark.parametrize("name", trl.CASES)
def test_losses_and_gradients_equal_those_kept_of_trl(name, kept):
  loss, metrics, gradient = trl_case(name)
  np.testing.assert_allclose(loss, kept[name][0], atol=1e-5)
  np.testing.assert_allclose(gradient, kept[name][1], atol=1e-5)
  # The batch reaches what it compares.
  assert np.abs(kept[name][1]).max() > 1e-3
  if "cispo" not in name:
    assert metrics["clip_fraction_low"] > 0
  assert metrics["clip_fraction_high"] > 0
  assert ("dual" in name) == (metrics["clip_fraction_dual"] > 0)
  assert "importance" not in name or 0 < metrics["importance_truncated"] < 1


@pytest.mark.peers
@pytest.mark.parametrize("name", trl.CASES)
def test_what_is_kept_of_trl_is_what_it_answers(name, kept):
  assert trl.installed() == trl.VERSION, f"goldens are of trl {trl.VERSION}, not {trl.installed()}: make peers"
  loss, gradient = trl.trl_loss(name)
  np.testing.assert_allclose(loss, kept[name][0], atol=1e-6)
  np.testing.assert_allclose(gradient, kept[name][1], atol=1e-6)


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(loss="dr_gpo"), "did you mean 'dr_grpo'"),
    (dict(loss="grpo", kl="k4"), "kl='k4' is unknown"),
    (dict(loss="grpo", clip_low=1.5), "clip_low"),
    (dict(loss="grpo", clip_high=-0.1), "clip_high"),
    (dict(loss="grpo", dual_clip=1.0), "dual_clip"),
    (dict(loss="cispo", dual_clip=3.0), "cispo has no clipped objective"),
    (dict(loss="grpo", kl_coefficient=-0.1), "kl_coefficient"),
    (dict(loss="dr_grpo"), "max_length"),
  ],
)
def test_wrong_options(options, message):
  with pytest.raises(ValueError, match=message):
    losses.policy_loss(*golden_batch(), **options)


def test_wrong_shapes_and_types():
  log_probs, batch = golden_batch()
  for bad_log_probs, bad_batch in [
    (log_probs[:, :2], batch),
    (log_probs[0], batch),
    (log_probs, dataclasses.replace(batch, loss_mask=batch.loss_mask.astype(jnp.float32))),
    (log_probs, dataclasses.replace(batch, advantages=batch.advantages[:, :1])),  # One a trace: broadcast it first.
  ]:
    with pytest.raises(ValueError, match=r"(loss_mask|log_probs|advantages) (has|is)"):
      losses.policy_loss(bad_log_probs, bad_batch, loss="grpo")
