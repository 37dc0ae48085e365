"""Token advantages and log-probabilities -> loss: the GRPO family.

Advantages are inputs, one a token: whatever made them, the losses are the same.
`policy_loss` composes four kinds of pieces, each a function of its own here:

    ratio        log_ratio -> token_ratio | sequence_ratio
    objective    clipped_objective | weighted_objective
    penalty      k1 | k2 | k3
    aggregation  sequence_mean | token_mean | constant_mean

The same names mean the same losses in TRL. tests/losses_test.py holds values and gradients
to those of TRL 1.16 on a ragged batch, to 1e-5. Where the two differ:

    what                          here                                  TRL 1.16
    traces without loss tokens    grpo and gspo leave them out of the   counted: the loss is smaller
                                  mean over traces
    dapo, cispo: tokens divided   of this call; `loss_weight` joins     of the whole generation batch
    by                            parts of a batch
    bnpo                          is dapo of one call                   a token mean of the micro-batch
    cispo's bounds                [1 - clip_low, 1 + clip_high]         above only: clip_low=1, and
                                                                        clip_high = epsilon_high - 1
    gspo                          GSPO-token: a token's advantage and   GSPO: a trace's tokens share the
                                  weight reach its own log-probability  gradient; the same where advantage
                                                                        and weight are constant in a trace
    importance                    NaN of the sampler is NaN             NaN of the sampler has weight 1;
                                                                        also from below, and masks
    dual_clip < 1 + clip_high     bounds where A < 0, as published      delta limits the ratio and not
                                                                        the objective: no bound where
                                                                        A < 0, a lower one where A > 0
    a ratio exactly on a bound    its whole gradient                    half of it
    |log ratio| > 20 nats         limited, and no gradient              overflows
    KL                            k1, k2, k3                            k3; with an option, weighted by
                                                                        the ratio
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rredcot_jax.ops import checks, masked, names, types

# Log-ratios are limited to +-20 nats (a ratio of 5e8) before exp: one token beyond must not overflow, since
# inf * 0 in a clipped branch's gradient is NaN. No gradient flows from beyond.
_MAX_LOG_RATIO = 20.0


# ---- Ratios ----------------------------------------------------------------------------------


def log_ratio(log_probs: chex.Array, old_log_probs: chex.Array, mask: chex.Array) -> chex.Array:
  """log rho_t = log pi(o_t) - log pi_old(o_t), limited to +-20 nats.

  Args:
    log_probs: [B, T] floating, nats; the gradient flows here.
    old_log_probs: [B, T] floating, nats; no gradient flows here.
    mask: [B, T] bool; where it is False both may hold anything.

  Returns:
    [B, T] float32, 0 where masked. No gradient flows from beyond the limit.
  """
  _check_tokens(mask, log_probs=log_probs, old_log_probs=old_log_probs)
  return _limit(_clean(log_probs, mask) - jax.lax.stop_gradient(_clean(old_log_probs, mask)))


def token_ratio(log_ratios: chex.Array, mask: chex.Array) -> chex.Array:
  """rho_t = exp(log rho_t), the ratio of grpo, dapo, dr_grpo and cispo.

  Args:
    log_ratios: [B, T] float32, of `log_ratio`.
    mask: [B, T] bool, the tokens of the loss.

  Returns:
    [B, T] float32, 1 where masked.
  """
  return jnp.where(mask, jnp.exp(log_ratios), 1.0)


def sequence_ratio(log_ratios: chex.Array, mask: chex.Array) -> chex.Array:
  """GSPO-token's s_t = sg[s] pi(o_t) / sg[pi(o_t)] with s = exp(mean_t log rho_t) (arXiv 2507.18071).

  Args:
    log_ratios: [B, T] float32, of `log_ratio`.
    mask: [B, T] bool, the tokens that the mean counts.

  Returns:
    [B, T] float32: the sequence's ratio in value, the token's own log-probability in gradient.
  """
  sequence = jax.lax.stop_gradient(jnp.exp(masked.masked_mean(log_ratios, mask, axis=1)))
  return sequence[:, None] * jnp.exp(log_ratios - jax.lax.stop_gradient(log_ratios))


# ---- Objectives ------------------------------------------------------------------------------


class Clipped(NamedTuple):
  """Where an objective was limited: each [B, T] bool."""

  low: chex.Array  # The ratio is below 1 - clip_low and limited there.
  high: chex.Array  # The ratio is above 1 + clip_high and limited there.
  dual: chex.Array  # The objective is on the bound of dual_clip.


def clipped_objective(
  ratio: chex.Array,
  advantages: chex.Array,
  *,
  clip_low: chex.Numeric = 0.2,
  clip_high: chex.Numeric = 0.2,
  dual_clip: chex.Numeric | None = None,
) -> tuple[chex.Array, Clipped]:
  """J_t = min(ratio A, clip(ratio) A), and with `dual_clip` at least dual_clip * A where A < 0.

  PPO's objective (arXiv 1707.06347) with a range of two sides; dual clip is arXiv 1912.09729.
  A ratio exactly on a bound keeps its whole gradient.

  Args:
    ratio: [B, T] float32 > 0.
    advantages: [B, T] float32.
    clip_low, clip_high, dual_clip: see `policy_loss`.

  Returns:
    [B, T] float32, and where it was limited.
  """
  low, high = 1.0 - clip_low, 1.0 + clip_high
  below, above = (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
  # Not jnp.minimum, which would halve the gradient of a tie.
  objective = jnp.where(below | above, jnp.clip(ratio, low, high), ratio) * advantages
  bounded = jnp.zeros(ratio.shape, bool)
  if dual_clip is not None:
    bounded = (advantages < 0) & (objective < dual_clip * advantages)
    objective = jnp.where(bounded, dual_clip * advantages, objective)
  return objective, Clipped(below, above, bounded)


def weighted_objective(
  ratio: chex.Array,
  advantages: chex.Array,
  log_probs: chex.Array,
  *,
  clip_low: chex.Numeric = 0.2,
  clip_high: chex.Numeric = 0.2,
) -> tuple[chex.Array, Clipped]:
  """J_t = sg[clip(ratio)] A log pi(o_t): the clip bounds a weight and stops no token's gradient (arXiv 2506.13585).

  Args:
    ratio: [B, T] float32 > 0; no gradient flows here.
    advantages: [B, T] float32.
    log_probs: [B, T] float32, nats; the gradient flows here.
    clip_low, clip_high: see `policy_loss`.

  Returns:
    [B, T] float32, and where the weight was limited.
  """
  low, high = 1.0 - clip_low, 1.0 + clip_high
  objective = jax.lax.stop_gradient(jnp.clip(ratio, low, high)) * advantages * log_probs
  return objective, Clipped(ratio < low, ratio > high, jnp.zeros(ratio.shape, bool))


# ---- Estimators of KL(pi || pi_ref), one a token ---------------------------------------------


def k1(log_probs: chex.Array, reference_log_probs: chex.Array) -> chex.Array:
  """KL estimator log pi(o_t) - log pi_ref(o_t): unbiased, of either sign.

  Args:
    log_probs: [B, T] floating, log pi(o_t), nats; the gradient flows here.
    reference_log_probs: [B, T] floating, log pi_ref(o_t), nats.

  Returns:
    [B, T] floating, nats. `policy_loss` says what its gradient is, and checks shapes.
  """
  return log_probs - reference_log_probs


def k2(log_probs: chex.Array, reference_log_probs: chex.Array) -> chex.Array:
  """KL estimator (log pi_ref(o_t) - log pi(o_t))^2 / 2: biased, never negative.

  Args:
    log_probs: [B, T] floating, log pi(o_t), nats; the gradient flows here.
    reference_log_probs: [B, T] floating, log pi_ref(o_t), nats.

  Returns:
    [B, T] floating, nats, >= 0. `policy_loss` says what its gradient is, and checks shapes.
  """
  return 0.5 * (log_probs - reference_log_probs) ** 2


def k3(log_probs: chex.Array, reference_log_probs: chex.Array) -> chex.Array:
  """KL estimator exp(d) - d - 1 with d = log pi_ref(o_t) - log pi(o_t), limited to +-20 nats: unbiased, never negative.

  Args:
    log_probs: [B, T] floating, log pi(o_t), nats; the gradient flows here.
    reference_log_probs: [B, T] floating, log pi_ref(o_t), nats.

  Returns:
    [B, T] floating, nats, >= 0. `policy_loss` says what its gradient is, and checks shapes.
  """
  d = _limit(reference_log_probs - log_probs)
  return jnp.expm1(d) - d


# ---- Aggregation: a numerator and a denominator, both of which add up over parts of a batch ---


def sequence_mean(per_token: chex.Array, mask: chex.Array) -> tuple[chex.Array, chex.Array]:
  """The mean over each trace's loss tokens, summed over traces, and the number of traces that have any.

  Args:
    per_token: [B, T] floating, losses.
    mask: [B, T] bool, the tokens of the loss.

  Returns:
    Numerator [] and denominator [] of the loss; both add up over the parts of a batch.
  """
  return jnp.sum(masked.masked_mean(per_token, mask, axis=1)), jnp.sum(jnp.any(mask, axis=1))


def token_mean(per_token: chex.Array, mask: chex.Array) -> tuple[chex.Array, chex.Array]:
  """The sum over all loss tokens, and their number.

  Args:
    per_token: [B, T] floating, losses.
    mask: [B, T] bool, the tokens of the loss.

  Returns:
    Numerator [] and denominator [] of the loss; both add up over the parts of a batch.
  """
  return masked.masked_sum(per_token, mask), jnp.sum(mask)


def constant_mean(per_token: chex.Array, mask: chex.Array, *, max_length: int) -> tuple[chex.Array, chex.Array]:
  """The sum over all loss tokens, and B max_length, whatever the mask says (Dr. GRPO, arXiv 2503.20783).

  Args:
    per_token: [B, T] floating, losses.
    mask: [B, T] bool, the tokens of the loss.
    max_length: the constant that stands for the length of every trace, at least 1.

  Returns:
    Numerator [] and denominator [] of the loss; both add up over the parts of a batch.
  """
  return masked.masked_sum(per_token, mask), jnp.asarray(mask.shape[0] * max_length, jnp.float32)


# ---- Sampler and policy ----------------------------------------------------------------------


def importance_weights(
  old_log_probs: chex.Array,
  sampler_log_probs: chex.Array,
  mask: chex.Array,
  *,
  level: str = "token",
  cap: chex.Numeric = 2.0,
) -> chex.Array:
  """Truncated weights for traces that another program sampled than the one that trains.

      token       w_t = min(cap, pi_old(o_t) / mu(o_t))
      sequence    w_t = min(cap, prod_t' pi_old(o_t') / mu(o_t'))

  mu is the distribution that was sampled from: an inference engine of other kernels or of lower
  precision, or a policy cut by top-k or top-p. pi_old is the same policy as the trainer computes
  it. Truncation is Ionides' (2008, doi 10.1198/106186008X320456): a bounded weight, and a small
  bias for it. The sequence's product is limited to +-20 nats before exp.

  Args:
    old_log_probs: [B, T] floating, log pi_old(o_t), nats.
    sampler_log_probs: [B, T] floating, log mu(o_t), nats, finite where `mask`.
    mask: [B, T] bool; where it is False both may hold anything.
    level: one of `IMPORTANCE_LEVELS` but "off".
    cap: > 0, the largest weight. May be traced.

  Returns:
    [B, T] float32 in [0, cap], equal over a trace with "sequence"; no gradient flows.
  """
  names.check_option("level", level, IMPORTANCE_LEVELS[1:])
  checks.check_number("cap", cap, lambda x: x > 0, "be > 0: it is the largest importance weight.")
  _check_tokens(mask, old_log_probs=old_log_probs, sampler_log_probs=sampler_log_probs)
  log_weights = jax.lax.stop_gradient(log_ratio(old_log_probs, sampler_log_probs, mask))
  if level == "sequence":
    log_weights = jnp.broadcast_to(_limit(jnp.sum(log_weights, axis=1, keepdims=True)), mask.shape)
  return jnp.minimum(jnp.exp(log_weights), cap)


# ---- The losses ------------------------------------------------------------------------------

_RATIOS: dict[str, Callable[[chex.Array, chex.Array], chex.Array]] = {
  "grpo": token_ratio,
  "dapo": token_ratio,
  "dr_grpo": token_ratio,
  "cispo": token_ratio,
  "gspo": sequence_ratio,
}
_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
LOSSES = tuple(_RATIOS)
KL_ESTIMATORS = ("off", *_ESTIMATORS)
IMPORTANCE_LEVELS = ("off", "token", "sequence")


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

  Raises:
    ValueError: on wrong shapes and types.
  """
  checks.check_array("mask", mask, "B T", bool)
  for name, x in (("truncated", truncated), ("zero_variance", zero_variance)):
    checks.check_array(name, x, "B", bool)
    checks.check_shape(name, x, mask.shape[:1], "the traces of mask")

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
  clip_low: chex.Numeric = 0.2,
  clip_high: chex.Numeric = 0.2,
  dual_clip: chex.Numeric | None = None,
  kl: str = "off",
  kl_coefficient: chex.Numeric = 0.0,
  max_length: int | None = None,
  importance: str = "off",
  importance_cap: chex.Numeric = 2.0,
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """The loss of a batch of traces under one of the `LOSSES`.

  With rho_t = pi(o_t) / pi_old(o_t), A_t the token's advantage, sg the stop-gradient
  and clip(x) = x limited to [1 - clip_low, 1 + clip_high], the loss is
  aggregate(-w_t J_t + kl_coefficient * KL_t) over the tokens of `batch.loss_mask`:

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
    dual_clip * A_t, so that a ratio that ran away cannot dominate. It acts wherever
    A_t < 0 and the ratio exceeds dual_clip, which for dual_clip < 1 + clip_high includes
    ratios that the clip lets through: a ratio of 1.15 with A = -1 and dual_clip = 1.1 costs 1.1.
  - w_t is 1, or with `importance` the truncated weight of `importance_weights`, which
    corrects for a sampler whose probabilities are not those of pi_old.

  A batch without loss tokens has loss 0 and gradient 0. `loss_mask` may have holes: a token
  that it leaves out in the middle of a trace is like one that was never there. Log-ratios are
  limited to +-20 nats before exp, beyond which no gradient flows through them (cispo's flows
  through log pi, those of k1 and k2 are not limited). Log-probabilities of loss tokens
  are finite. Sums are taken in float32 whatever the type of the inputs.

  KL_t estimates KL(pi || pi_ref) from the sampled token, with
  d = log pi_ref(o_t) - log pi(o_t) (Schulman, joschu.net/blog/kl-approx.html):

      k1 = -d      k2 = d^2 / 2      k3 = exp(d) - d - 1

  As values, k1 and k3 are unbiased and k2 and k3 are never negative. What a *loss*
  uses is the gradient, of which (arXiv 2506.09477), on-policy and in expectation,
  k1 gives 0 (pure noise), k2 that of KL(pi || pi_ref), as one would want, and
  k3, GRPO's own, that of KL(pi_ref || pi). All are per-token gradients: none counts what a
  token does to later states. No importance weight corrects them off-policy.

  Numbers that may change during a run (clip_low, clip_high, dual_clip, kl_coefficient,
  importance_cap) may be traced. Their ranges are checked where they are concrete.

  Args:
    log_probs: [B, T] floating, log pi(o_t) in nats under the policy being trained.
      The gradient flows here and nowhere else.
    batch: `TrainBatch` with a leading axis [B]. `loss_mask` says what counts; where
      it is False, `log_probs` and every field of the batch may hold anything, NaN and
      inf included. Prompt, tokens and mask are not read; `reference_log_probs` is
      read unless kl="off", `sampler_log_probs` unless importance="off".
    loss: one of `LOSSES`.
    clip_low: float in [0, 1].
    clip_high: float >= 0.
    dual_clip: float > 1, or None for off.
    kl: one of `KL_ESTIMATORS`.
    kl_coefficient: float >= 0; without effect where kl="off".
    max_length: int > 0, dr_grpo's constant, for example the sampling budget of a
      trace (not this batch's T, which may be a bucket's); read by dr_grpo only.
    importance: one of `IMPORTANCE_LEVELS`.
    importance_cap: float > 0, the largest w_t.

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
      and unless importance="off", of pi_old / mu before it is truncated:
        sampler_kl            k3 of KL(mu || pi_old), from the sampler's tokens
        sampler_ratio_p5, sampler_ratio_p50, sampler_ratio_p95    percentiles over loss tokens
        importance_truncated  tokens whose weight is on the cap

  Raises:
    ValueError: on wrong shapes and types, if an option is unknown, a range is left, dual_clip is
      asked of cispo, dr_grpo lacks max_length, or importance lacks sampler_log_probs.
  """
  _check_options(loss, clip_low, clip_high, dual_clip, kl, kl_coefficient, max_length, importance)
  mask = batch.loss_mask
  _check_tokens(mask, log_probs=log_probs, old_log_probs=batch.old_log_probs, advantages=batch.advantages)

  log_ratios = log_ratio(log_probs, batch.old_log_probs, mask)
  log_probs = _clean(log_probs, mask)
  advantages = jax.lax.stop_gradient(_clean(batch.advantages, mask))
  ratio = _RATIOS[loss](log_ratios, mask)
  if loss == "cispo":
    objective, clipped = weighted_objective(ratio, advantages, log_probs, clip_low=clip_low, clip_high=clip_high)
  else:
    objective, clipped = clipped_objective(
      ratio, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )

  metrics: dict[str, chex.Array] = {}
  if importance != "off":
    weights, metrics = _importance(batch, mask, importance, importance_cap)
    objective = weights * objective
  per_token = -objective
  if kl != "off":
    _check_tokens(mask, reference_log_probs=batch.reference_log_probs)
    reference = jax.lax.stop_gradient(_clean(batch.reference_log_probs, mask))
    per_token = per_token + kl_coefficient * _ESTIMATORS[kl](log_probs, reference)
    metrics["kl"] = masked.masked_mean(k3(log_probs, reference), mask)

  numerator, denominator = _aggregate(per_token, mask, loss, max_length)
  total = numerator / jnp.maximum(denominator, 1)
  metrics |= {"loss": total} | _ratio_metrics(ratio, log_ratios, clipped, advantages, mask)
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
  names.check_option("loss", loss, LOSSES)
  return _aggregate(jnp.zeros(mask.shape, jnp.float32), mask, loss, max_length)[1].astype(jnp.float32)


def merge_metrics(parts: dict[str, chex.Array], weights: chex.Array) -> dict[str, chex.Array]:
  """The metrics of `policy_loss` for a batch from those of its parts.

  Args:
    parts: each metric [M], of M parts.
    weights: [M] float32, their `loss_weight`.

  Returns:
    Each metric [] float32. Percentiles are those of the parts, averaged over tokens: no
    percentiles of the whole.
  """
  tokens = parts["loss_tokens"]
  mean = lambda values, by: jnp.sum(values * by) / jnp.maximum(jnp.sum(by), 1)
  merged = {name: mean(values, tokens) for name, values in parts.items()}
  return merged | {
    "loss": mean(parts["loss"], weights),
    "ratio_max": jnp.max(parts["ratio_max"]),
    "loss_tokens": jnp.sum(tokens),
  }


def _check_options(
  loss: str,
  clip_low: chex.Numeric,
  clip_high: chex.Numeric,
  dual_clip: chex.Numeric | None,
  kl: str,
  kl_coefficient: chex.Numeric,
  max_length: int | None,
  importance: str,
) -> None:
  names.check_option("loss", loss, LOSSES)
  names.check_option("kl", kl, KL_ESTIMATORS)
  names.check_option("importance", importance, IMPORTANCE_LEVELS)
  number = checks.check_number
  number("clip_low", clip_low, lambda x: 0 <= x <= 1, "be in [0, 1]: the ratio's lower bound is 1 - clip_low.")
  number("clip_high", clip_high, lambda x: x >= 0, "be >= 0: the ratio's upper bound is 1 + clip_high.")
  number("kl_coefficient", kl_coefficient, lambda x: x >= 0, "be >= 0.")
  if dual_clip is not None and loss == "cispo":
    raise ValueError("cispo has no clipped objective for dual_clip to bound; set dual_clip=None.")
  if dual_clip is not None:
    number("dual_clip", dual_clip, lambda x: x > 1, "be > 1, or None for off.")
  if loss == "dr_grpo" and (max_length is None or max_length <= 0):
    raise ValueError(f"dr_grpo divides by a constant: it needs max_length > 0, not {max_length}.")


def _check_tokens(mask: chex.Array, **per_token: chex.Array) -> None:
  checks.check_array("loss_mask", mask, "B T", bool)
  for name, x in per_token.items():
    checks.check_array(name, x, "B T", float)
    checks.check_shape(name, x, mask.shape, "loss_mask")


def _clean(x: chex.Array, mask: chex.Array) -> chex.Array:
  """float32, 0 where masked: what is masked reaches neither a value nor a gradient."""
  return jnp.where(mask, x, 0).astype(jnp.float32)


def _limit(log_ratios: chex.Array) -> chex.Array:
  return jnp.clip(log_ratios, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _importance(
  batch: types.TrainBatch, mask: chex.Array, level: str, cap: chex.Numeric
) -> tuple[chex.Array, dict[str, chex.Array]]:
  """`importance_weights` of a batch, and what they say of the sampler."""
  if batch.sampler_log_probs is None:
    raise ValueError(f"importance={level!r} needs the batch's sampler_log_probs; set them, or importance='off'.")
  weights = importance_weights(batch.old_log_probs, batch.sampler_log_probs, mask, level=level, cap=cap)
  log_ratios = log_ratio(batch.old_log_probs, batch.sampler_log_probs, mask)
  ratios = jnp.exp(log_ratios)
  metrics = {
    "sampler_kl": masked.masked_mean(jnp.expm1(log_ratios) - log_ratios, mask),
    "importance_truncated": masked.masked_mean(weights >= cap, mask),
  }
  return weights, metrics | {f"sampler_ratio_p{p}": _percentile(ratios, mask, p) for p in (5, 50, 95)}


def _percentile(x: chex.Array, mask: chex.Array, percent: int) -> chex.Array:
  """The smallest unmasked element that at least `percent` of 100 of them do not exceed; 0 over nothing."""
  count = jnp.sum(mask)
  rank = jnp.clip(jnp.ceil(count * (percent / 100)).astype(jnp.int32) - 1, 0, x.size - 1)
  return jnp.where(count > 0, jnp.sort(jnp.where(mask, x, jnp.inf).reshape(-1))[rank], 0.0)


def _ratio_metrics(
  ratio: chex.Array, log_ratios: chex.Array, clipped: Clipped, advantages: chex.Array, mask: chex.Array
) -> dict[str, chex.Array]:
  return {
    "approx_kl": masked.masked_mean(jnp.expm1(log_ratios) - log_ratios, mask),
    "clip_fraction_low": masked.masked_mean(clipped.low, mask),
    "clip_fraction_high": masked.masked_mean(clipped.high, mask),
    "clip_fraction_dual": masked.masked_mean(clipped.dual, mask),
    "ratio_mean": masked.masked_mean(ratio, mask),
    "ratio_max": jnp.where(jnp.any(mask), masked.masked_max(ratio, mask), 0.0),
    "advantage_mean_abs": masked.masked_mean(jnp.abs(advantages), mask),
    "loss_tokens": jnp.sum(mask),
  }


def _aggregate(
  per_token: chex.Array, mask: chex.Array, loss: str, max_length: int | None
) -> tuple[chex.Array, chex.Array]:
  if loss in ("grpo", "gspo"):
    return sequence_mean(per_token, mask)
  if loss == "dr_grpo":
    assert max_length is not None
    return constant_mean(per_token, mask, max_length=max_length)
  return token_mean(per_token, mask)
