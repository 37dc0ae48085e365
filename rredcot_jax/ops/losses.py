"""Token advantages and log-probabilities -> loss: the GRPO family.

Advantages are inputs, one a token: whatever made them, the losses are the same.
"""

import chex
import jax
import jax.numpy as jnp

from rredcot_jax.ops import masked, types

LOSSES = ("grpo", "dapo", "dr_grpo", "cispo", "gspo")
KL_ESTIMATORS = ("off", "k1", "k2", "k3")

# Log-ratios are limited to +-20 nats (a ratio of 5e8) before exp: one token beyond must not overflow, since
# inf * 0 in a clipped branch's gradient is NaN. No gradient flows from beyond.
_MAX_LOG_RATIO = 20.0


def loss_mask(
  mask: chex.Array,
  truncated: chex.Array,
  zero_variance: chex.Array,
  *,
  mask_truncated: bool,
  filter_zero_variance: bool,
) -> chex.Array:
  """The tokens that the loss counts: `TrainBatch.loss_mask`.

  mask_truncated drops the traces that ran out of room, whose reward says nothing
  about their reasoning (DAPO's overlong filtering, arXiv 2503.14476).
  filter_zero_variance drops the traces of groups whose returns are all equal. With
  sigma-shaped advantages those tokens have A_t = 0, so that the filter changes the
  normaliser (and spares them the KL term), not the policy's gradient direction.
  With mode="difference" such groups still carry information: leave it off there.

  Args:
    mask: [B, T] bool, True on real tokens of the trace.
    truncated: [B] bool.
    zero_variance: [B] bool, for each trace its group's `advantages.zero_variance`.
    mask_truncated: whether to drop truncated traces.
    filter_zero_variance: whether to drop traces of zero-variance groups.

  Returns:
    [B, T] bool, a subset of `mask`.
  """
  chex.assert_rank([mask, truncated, zero_variance], [2, 1, 1])
  chex.assert_type([mask, truncated, zero_variance], bool)
  chex.assert_equal_shape_prefix([mask, truncated, zero_variance], 1)

  dropped = jnp.zeros_like(truncated)
  if mask_truncated:
    dropped = jnp.logical_or(dropped, truncated)
  if filter_zero_variance:
    dropped = jnp.logical_or(dropped, zero_variance)
  return jnp.logical_and(mask, jnp.logical_not(dropped)[:, None])


def policy_loss(
  log_probs: chex.Array,
  batch: types.TrainBatch,
  *,
  loss: str,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  dual_clip: float | None = None,
  kl: str = "off",
  kl_coefficient: float = 0.0,
  max_length: int | None = None,
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """The loss of a batch of traces under one of the `LOSSES`.

  With rho_t = pi(o_t) / pi_old(o_t), A_t the token's advantage, sg the stop-gradient
  and clip(x) = x limited to [1 - clip_low, 1 + clip_high], the loss is
  aggregate(-J_t + kl_coefficient * KL_t) over the tokens of `batch.loss_mask`:

      loss      J_t                                        aggregate               source
      grpo      min(rho_t A_t, clip(rho_t) A_t)            sequence mean, mean     arXiv 2402.03300
      dapo      as grpo, clip_high > clip_low              token mean              arXiv 2503.14476
      dr_grpo   as grpo                                    sum / (B max_length)    arXiv 2503.20783
      cispo     sg[clip(rho_t)] A_t log pi(o_t)            token mean              arXiv 2506.13585
      gspo      as grpo with s_t in place of rho_t         sequence mean, mean     arXiv 2507.18071

  - sequence mean, mean: the mean over each trace's loss tokens, then over the traces
    that have any. Traces without loss tokens (padding rows, truncation, filters)
    count neither above nor below.
  - token mean: over all loss tokens of the batch, so that long traces weigh more.
  - sum / (B max_length): the sum over all loss tokens by a constant, all B traces
    counted whether or not they have loss tokens: no data changes the normaliser.
  - gspo is GSPO-token: s_t = sg[s] pi(o_t) / sg[pi(o_t)] with the sequence's ratio
    s = exp(mean_t log rho_t), which for a constant A_t has the gradient of GSPO itself.
    Its clip range is far narrower than the default: the paper's is 3e-4 and 4e-4.
  - cispo's clip bounds a weight and stops no token's gradient; clip_low=1 leaves it
    without a lower bound, as in the paper.
  - dual_clip (arXiv 1912.09729), for all but cispo: where A_t < 0, J_t is at least
    dual_clip * A_t, so that a ratio that ran away cannot dominate. It acts only
    where it exceeds 1 + clip_high.

  A batch without loss tokens has loss 0 and gradient 0. Log-ratios are limited to
  +-20 nats before exp, beyond which no gradient flows through them (cispo's flows
  through log pi, those of k1 and k2 are not limited). Log-probabilities of loss tokens
  are finite.

  KL_t estimates KL(pi || pi_ref) from the sampled token, with
  d = log pi_ref(o_t) - log pi(o_t) (Schulman, joschu.net/blog/kl-approx.html):

      k1 = -d      k2 = d^2 / 2      k3 = exp(d) - d - 1

  As values, k1 and k3 are unbiased and k2 and k3 are never negative. What a *loss*
  uses is the gradient, of which (arXiv 2506.09477), on-policy and in expectation,
  k1 gives 0 (pure noise), k2 that of KL(pi || pi_ref), as one would want, and
  k3, GRPO's own, that of KL(pi_ref || pi). All are per-token gradients: none counts what a
  token does to later states. No importance weight corrects them off-policy.

  Args:
    log_probs: [B, T] floating, log pi(o_t) in nats under the policy being trained.
      The gradient flows here and nowhere else.
    batch: `TrainBatch` with a leading axis [B]. `loss_mask` says what counts; where
      it is False, `log_probs` and every field of the batch may hold anything, NaN and
      inf included. Prompt, tokens and mask are not read; `reference_log_probs` is
      read unless kl="off".
    loss: one of `LOSSES`.
    clip_low: float in [0, 1].
    clip_high: float >= 0.
    dual_clip: float > 1, or None for off.
    kl: one of `KL_ESTIMATORS`.
    kl_coefficient: float >= 0; without effect where kl="off".
    max_length: int > 0, dr_grpo's constant, for example the sampling budget of a
      trace (not this batch's T, which may be a bucket's); read by dr_grpo only.

  Returns:
    loss: [] float32.
    metrics: a dict of [] float32 without gradient, means over loss tokens unless
      said otherwise, 0 where there are none. `ratio` is what is clipped: rho_t, or
      gspo's s.
        loss                  the loss
        kl                    k3 to the reference; absent where kl="off"
        approx_kl             k3 of KL(pi_old || pi), from the old policy's tokens
        clip_fraction_low     ratio < 1 - clip_low where that clips (A_t < 0; cispo: always)
        clip_fraction_high    ratio > 1 + clip_high where that clips (A_t > 0; cispo: always)
        clip_fraction_dual    tokens on the bound of dual_clip
        ratio_mean, ratio_max
        advantage_mean_abs    |A_t|
        loss_tokens           their number

  Raises:
    ValueError: if an option is unknown, a range is left, dual_clip is asked of cispo,
      or dr_grpo lacks max_length.
  """
  types.check_option("loss", loss, LOSSES)
  types.check_option("kl", kl, KL_ESTIMATORS)
  _check_ranges(loss, clip_low, clip_high, dual_clip, kl_coefficient, max_length)
  mask = batch.loss_mask
  _check_tokens(mask, log_probs, batch.old_log_probs, batch.advantages)

  log_probs = _clean(log_probs, mask)
  log_ratio = _limit(log_probs - jax.lax.stop_gradient(_clean(batch.old_log_probs, mask)))
  advantages = jax.lax.stop_gradient(_clean(batch.advantages, mask))
  ratio = _sequence_ratio(log_ratio, mask) if loss == "gspo" else jnp.exp(log_ratio)

  low, high = 1.0 - clip_low, 1.0 + clip_high
  below, above = ratio < low, ratio > high
  bounded = jnp.zeros_like(mask)
  if loss == "cispo":
    objective = jax.lax.stop_gradient(jnp.clip(ratio, low, high)) * advantages * log_probs
  else:
    # min(ratio A, clip(ratio) A), but a ratio on a bound keeps its whole gradient instead of a tie's half.
    below, above = below & (advantages < 0), above & (advantages > 0)
    objective = jnp.where(below | above, jnp.clip(ratio, low, high), ratio) * advantages
    if dual_clip is not None:
      bounded = (advantages < 0) & (objective < dual_clip * advantages)
      objective = jnp.where(bounded, dual_clip * advantages, objective)

  per_token = -objective
  metrics = {}
  if kl != "off":
    _check_tokens(mask, batch.reference_log_probs)
    reference = jax.lax.stop_gradient(_clean(batch.reference_log_probs, mask))
    per_token = per_token + kl_coefficient * _kl(log_probs, reference, kl)
    metrics["kl"] = masked.masked_mean(_k3(_limit(reference - log_probs)), mask)

  numerator, denominator = _aggregate(per_token, mask, loss, max_length)
  total = numerator / jnp.maximum(denominator, 1)

  some = jnp.any(mask)
  metrics |= {
    "loss": total,
    "approx_kl": masked.masked_mean(_k3(log_ratio), mask),
    "clip_fraction_low": masked.masked_mean(below, mask),
    "clip_fraction_high": masked.masked_mean(above, mask),
    "clip_fraction_dual": masked.masked_mean(bounded, mask),
    "ratio_mean": masked.masked_mean(ratio, mask),
    "ratio_max": jnp.where(some, masked.masked_max(ratio, mask), 0.0),
    "advantage_mean_abs": masked.masked_mean(jnp.abs(advantages), mask),
    "loss_tokens": jnp.sum(mask),
  }
  metrics = {name: jax.lax.stop_gradient(value.astype(jnp.float32)) for name, value in metrics.items()}
  return total, metrics


def loss_weight(mask: chex.Array, *, loss: str, max_length: int | None = None) -> chex.Array:
  """What `policy_loss` divides by: the share of a part of a batch in the whole batch's loss.

  With weights w_m of parts that make up a batch, sum_m (w_m / sum w) loss_m is the
  loss of the whole batch, and so is its gradient, for every one of the `LOSSES`.

  Args:
    mask: [B, T] bool, the part's `TrainBatch.loss_mask`.
    loss, max_length: see `policy_loss`.

  Returns:
    [] float32: traces with loss tokens (grpo, gspo), B max_length (dr_grpo), or loss tokens.
  """
  types.check_option("loss", loss, LOSSES)
  return _aggregate(jnp.zeros(mask.shape, jnp.float32), mask, loss, max_length)[1].astype(jnp.float32)


def merge_metrics(parts: dict[str, chex.Array], weights: chex.Array) -> dict[str, chex.Array]:
  """The metrics of `policy_loss` for a batch from those of its parts.

  Args:
    parts: each metric [M], of M parts.
    weights: [M] float32, their `loss_weight`.

  Returns:
    Each metric [] float32.
  """
  tokens = parts["loss_tokens"]
  mean = lambda values, by: jnp.sum(values * by) / jnp.maximum(jnp.sum(by), 1)
  merged = {name: mean(values, tokens) for name, values in parts.items()}
  return merged | {
    "loss": mean(parts["loss"], weights),
    "ratio_max": jnp.max(parts["ratio_max"]),
    "loss_tokens": jnp.sum(tokens),
  }


def _check_ranges(
  loss: str,
  clip_low: float,
  clip_high: float,
  dual_clip: float | None,
  kl_coefficient: float,
  max_length: int | None,
) -> None:
  if not 0.0 <= clip_low <= 1.0:
    raise ValueError(f"clip_low={clip_low} must be in [0, 1]: the ratio's lower bound is 1 - clip_low.")
  if clip_high < 0.0:
    raise ValueError(f"clip_high={clip_high} must be >= 0: the ratio's upper bound is 1 + clip_high.")
  if dual_clip is not None and loss == "cispo":
    raise ValueError("cispo has no clipped objective for dual_clip to bound; set dual_clip=None.")
  if dual_clip is not None and dual_clip <= 1.0:
    raise ValueError(f"dual_clip={dual_clip} must be > 1, or None for off.")
  if kl_coefficient < 0.0:
    raise ValueError(f"kl_coefficient={kl_coefficient} must be >= 0.")
  if loss == "dr_grpo" and (max_length is None or max_length <= 0):
    raise ValueError(f"dr_grpo divides by a constant: it needs max_length > 0, not {max_length}.")


def _check_tokens(mask: chex.Array, *per_token: chex.Array) -> None:
  chex.assert_rank([mask, *per_token], 2)
  chex.assert_type(mask, bool)
  chex.assert_type(list(per_token), float)
  chex.assert_equal_shape([mask, *per_token])


def _clean(x: chex.Array, mask: chex.Array) -> chex.Array:
  """float32, 0 where masked: what is masked reaches neither a value nor a gradient."""
  return jnp.where(mask, x, 0).astype(jnp.float32)


def _limit(log_ratio: chex.Array) -> chex.Array:
  return jnp.clip(log_ratio, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _sequence_ratio(log_ratio: chex.Array, mask: chex.Array) -> chex.Array:
  """[B, T], GSPO-token's s_t: the sequence's ratio in value, the token's own log-probability in gradient."""
  sequence = jax.lax.stop_gradient(jnp.exp(masked.masked_mean(log_ratio, mask, axis=1)))
  return sequence[:, None] * jnp.exp(log_ratio - jax.lax.stop_gradient(log_ratio))


def _k3(log_ratio: chex.Array) -> chex.Array:
  """exp(x) - 1 - x, which is never negative."""
  return jnp.expm1(log_ratio) - log_ratio


def _kl(log_probs: chex.Array, reference: chex.Array, estimator: str) -> chex.Array:
  """[B, T], the per-token estimate of KL(pi || pi_ref)."""
  if estimator == "k1":
    return log_probs - reference
  if estimator == "k2":
    return 0.5 * (log_probs - reference) ** 2
  return _k3(_limit(reference - log_probs))


def _aggregate(
  per_token: chex.Array, mask: chex.Array, loss: str, max_length: int | None
) -> tuple[chex.Array, chex.Array]:
  """Numerator and denominator of the loss; both add up over parts of a batch."""
  if loss in ("grpo", "gspo"):
    sequences = jnp.sum(jnp.any(mask, axis=1))
    return jnp.sum(masked.masked_mean(per_token, mask, axis=1)), sequences
  if loss == "dr_grpo":
    assert max_length is not None
    return masked.masked_sum(per_token, mask), jnp.asarray(mask.shape[0] * max_length, jnp.float32)
  return masked.masked_sum(per_token, mask), jnp.sum(mask)
