"""Redistributed rewards and the group's returns -> one advantage for each token.

Marks as in docs/method.md: [A] abstract, [S] readers' summaries of the paper, [C] our choice.
"""

import chex
import jax
import jax.numpy as jnp

from rredcot_jax.ops import checks, masked, names, types

BASELINES = ("mean", "rloo", "none")
SCALES = ("std", "none")
SIGMA_MODES = ("uniform", "magnitude", "signed")
MODES = (*SIGMA_MODES, "difference")


def zero_variance(returns: chex.Array, *, mask: chex.Array | None = None) -> chex.Array:
  """Whether every return of the group is the same, so that no outcome is better than another.

  The test is exact equality, without a tolerance.

  Args:
    returns: [G] floating, G >= 1, one return for each trace of one prompt's group.
    mask: [G] bool, the returns that can be used, see `group_advantages`.

  Returns:
    [] bool; True where fewer than two returns can be used.
  """
  usable = _usable(returns, mask)
  highest = jnp.max(jnp.where(usable, returns, -jnp.inf))
  lowest = jnp.min(jnp.where(usable, returns, jnp.inf))
  return highest <= lowest


def group_advantages(
  returns: chex.Array,
  *,
  baseline: str = "mean",
  scale: str = "std",
  epsilon: chex.Numeric = 1e-6,
  ddof: int = 0,
  mask: chex.Array | None = None,
) -> chex.Array:
  """The group-relative advantage of each trace of one prompt.

      A_i = (R_i - b_i) / (std(R) + epsilon)      scale="std"
      A_i =  R_i - b_i                            scale="none"

      b_i = mean_j R_j                            baseline="mean"
      b_i = mean_{j != i} R_j                     baseline="rloo"
      b_i = 0                                     baseline="none", with scale="none" only

      std(R)^2 = sum_j (R_j - mean R)^2 / (G - ddof)

  mean with std is GRPO (arXiv 2402.03300), mean with none is Dr. GRPO
  (arXiv 2503.20783), rloo with none is RLOO (arXiv 2402.14740), none with
  none is REINFORCE without a baseline: rewards of 0 and 1 then only ever praise.
  The deviation is the population's by default (ddof=0). TRL and Tunix divide by G - 1
  (ddof=1), which makes advantages smaller by a factor of sqrt((G - 1) / G): 0.935 for G = 8.
  Dividing by the deviation overweights prompts that are nearly solved or nearly hopeless.

  A group of zero variance (see `zero_variance`) gets exactly 0, not the rounding
  error of its mean divided by epsilon; without a baseline it keeps its returns.

  A return that cannot be used (NaN, infinite, or not in `mask`) is left out: its own
  advantage is 0, and those of the others are computed as if G were smaller by one. Nothing
  counts such returns here: the caller does, with `jnp.sum(~jnp.isfinite(returns))`.

  Args:
    returns: [G] floating, G >= 2, one return for each trace of one prompt.
    baseline: one of `BASELINES`.
    scale: one of `SCALES`.
    epsilon: float > 0 added to the deviation; read by scale="std" only. May be traced.
    ddof: 0 or 1, what is taken from G under the deviation.
    mask: [G] bool, the returns that can be used; all that are finite where None.

  Returns:
    [G] float32 (float64 where `returns` is). No gradient flows to `returns`.

  Raises:
    ValueError: on wrong shapes and types; if an option is unknown, G < 2, epsilon is not
      positive, ddof is neither 0 nor 1, or scale="std" has no baseline.
  """
  names.check_option("baseline", baseline, BASELINES)
  names.check_option("scale", scale, SCALES)
  usable = _usable(returns, mask)
  must = "be > 0: it keeps a group of equal returns from a division by 0."
  checks.check_number("epsilon", epsilon, lambda x: x > 0, must)
  if ddof not in (0, 1):
    raise ValueError(f"ddof={ddof} must be 0 (the population's deviation) or 1 (the sample's).")
  if returns.shape[0] < 2:
    raise ValueError(
      f"A group of {returns.shape[0]} has no group-relative advantage: there is nothing to compare a return with. "
      "Sample at least 2 traces for each prompt."
    )
  if baseline == "none" and scale != "none":
    raise ValueError("baseline='none' with scale='std' divides by 0 where all returns agree; set scale='none'.")

  returns = jax.lax.stop_gradient(jnp.where(usable, checks.at_least_float32(returns), 0))
  if baseline == "none":
    return returns
  count = jnp.sum(usable)
  centred = jnp.where(usable, returns - masked.masked_mean(returns, usable), 0)
  deviation = jnp.sqrt(jnp.sum(centred**2) / jnp.maximum(count - ddof, 1))
  if baseline == "rloo":
    centred = centred * (count / jnp.maximum(count - 1, 1))
  if scale == "std":
    centred = centred / (deviation + epsilon)
  return jnp.where(zero_variance(returns, mask=usable), 0, centred)


def _usable(returns: chex.Array, mask: chex.Array | None) -> chex.Array:
  """[G] bool: the returns that are finite and in `mask`."""
  checks.check_array("returns", returns, "G", float)
  usable = jnp.isfinite(returns)
  if mask is None:
    return usable
  checks.check_array("mask", mask, "G", bool)
  checks.check_shape("mask", mask, returns.shape, "returns")
  return jnp.logical_and(usable, mask)


def sigma(
  rewards: chex.Array,
  group_advantage: chex.Numeric,
  segments: types.Segments,
  *,
  mode: str = "magnitude",
  floor: chex.Numeric = 0.0,
) -> chex.Array:
  """The normalised coefficients that multiply GRPO's gradient, token by token.

      sigma_t = floor + (1 - floor) * c_{k(t)} / mean_{t'} c_{k(t')}

      c_k = |r_k|                       mode="magnitude"
      c_k = max(0, sign(A_i) * r_k)     mode="signed"
      c_k = 1                           mode="uniform"

  That GRPO's coefficient is multiplied by a per-trace normalised sigma(t) is [S]
  (RREDCoT, arXiv 2606.06475); the raw coefficients, the floor and the
  normalisation are [C]. "signed" praises, in a trace with A_i > 0, the segments
  that gained value, and blames, in one with A_i < 0, those that lost it.

  The mean runs over the trace's tokens and is 1, so that the trace's total weight
  is that of GRPO, and only its distribution changes. The coefficients are per
  token: the tokens of a segment all get c_k, undivided by its length, so a
  segment's total weight is c_k times its length [C]. (Spreading c_k over the
  segment instead would make constant credit favour the tokens of short segments
  and no longer reduce to GRPO.)

  Reduces to GRPO (sigma = 1 on every token) when all segments have the same c_k,
  whatever their lengths; for K = 1 in every mode; and when every c_k is 0, that is
  when the redistribution says nothing about this trace: all r_k are 0, or, with
  "signed", none has the sign of A_i, or A_i = 0.

  Args:
    rewards: [K] floating, r_k; entries of segments that do not exist are ignored
      and may hold anything. Their scale does not matter.
    group_advantage: [] floating, A_i of this trace; only its sign is read, by "signed".
    segments: the trace's `Segments`, unbatched.
    mode: one of `SIGMA_MODES`.
    floor: float in [0, 1], the least coefficient of a token; 1 gives uniform credit.
      "uniform" does not depend on it. May be traced, and is not checked then.

  Returns:
    [T] float32 (float64 where `rewards` is), >= 0, of mean 1 over the trace's tokens, 0 on
    padding. No gradient flows to `rewards` or to `group_advantage`.

  Raises:
    ValueError: on wrong shapes and types, if `mode` is unknown, if `floor` is outside [0, 1], and, where
      segments are concrete, if their ids decrease or lie outside [-1, K).
  """
  names.check_option("mode", mode, SIGMA_MODES)
  _check_trace(rewards, group_advantage, segments)
  checks.check_number("floor", floor, lambda x: 0 <= x <= 1, "lie in [0, 1].")

  rewards = jax.lax.stop_gradient(checks.at_least_float32(rewards))
  if mode == "uniform":
    raw_k = jnp.ones_like(rewards)
  elif mode == "magnitude":
    raw_k = jnp.abs(rewards)
  else:
    outcome = jax.lax.stop_gradient(jnp.asarray(group_advantage, rewards.dtype))
    raw_k = jnp.maximum(jnp.sign(outcome) * rewards, 0)

  token_mask = segments.segment_ids >= 0
  raw_t = _to_tokens(raw_k, segments)
  # Dividing by the largest first keeps the mean of tiny or huge coefficients representable.
  largest = masked.masked_max(raw_t, token_mask)
  silent = largest <= 0  # No token has a coefficient, or there is no token (-inf).
  relative = jnp.where(silent, 1, raw_t / jnp.where(silent, 1, largest))
  normalised = relative / jnp.where(silent, 1, masked.masked_mean(relative, token_mask))
  return jnp.where(token_mask, floor + (1 - floor) * normalised, 0)


def token_advantages(
  rewards: chex.Array,
  group_advantage: chex.Numeric,
  segments: types.Segments,
  *,
  mode: str = "uniform",
  floor: chex.Numeric = 0.0,
  scale: chex.Numeric = 1.0,
) -> chex.Array:
  """The advantage of each token of one trace.

      A_t = scale * sigma_t * A_i     mode in SIGMA_MODES; "uniform" is GRPO
      A_t = scale * r_{k(t)}          mode="difference"

  "difference" [C] takes the redistributed reward itself; with Monte Carlo values
  it is VinePPO (arXiv 2410.01679). It is never shifted by a mean, which would turn
  the sign of a small gain; A_i is not added to it, which would count the outcome
  twice; and it is not summed into a return-to-go, which would undo the
  redistribution. It does not depend on the group, so a group of zero variance
  still teaches something.

  Args:
    rewards: [K] floating, r_k; entries of segments that do not exist are ignored
      and may hold anything.
    group_advantage: [] floating, A_i of this trace; not read by "difference".
    segments: the trace's `Segments`, unbatched.
    mode: one of `MODES`.
    floor: float in [0, 1], see `sigma`; without effect on "uniform" and "difference". May be traced.
    scale: float, multiplies every advantage. May be traced.

  Returns:
    [T] float32 (float64 where `rewards` is), 0 on padding. No gradient flows to the arguments.

  Raises:
    ValueError: as `sigma`; `floor` is checked where it is read.
  """
  names.check_option("mode", mode, MODES)
  _check_trace(rewards, group_advantage, segments)

  rewards = checks.at_least_float32(rewards)
  if mode == "difference":
    return scale * _to_tokens(jax.lax.stop_gradient(rewards), segments)
  outcome = jax.lax.stop_gradient(jnp.asarray(group_advantage, rewards.dtype))
  return scale * outcome * sigma(rewards, group_advantage, segments, mode=mode, floor=floor)


def generalised_advantages(
  values: chex.Array, return_: chex.Numeric, mask: chex.Array, *, decay: chex.Numeric
) -> chex.Array:
  """Generalised advantage estimation for one reward at the trace's end (arXiv 1506.02438), undiscounted.

      delta_t = V(s_{t+1}) - V(s_t),   V(s_L) := R
      A_t = sum_{l >= 0} decay^l delta_{t+l}

  The paper's equation 16 with gamma = 1, where the only reward is R at the end and the
  terminal value is 0: the last delta is R - V(s_{L-1}), the same as with V(s_L) := R.
  decay = 0 is the redistribution `redistribution.redistribute` with a segment a token,
  decay = 1 the whole return over a baseline, R - V(s_t). In between, what a token is
  given decays with the distance to what it caused.

  Args:
    values: [T] floating, V(s_t) of the state before token t; what is not in `mask` is ignored.
    return_: [] floating, the verifier's reward R.
    mask: [T] bool, the trace's L real tokens, a prefix of True.
    decay: lambda in [0, 1]. May be traced, and is not checked then.

  Returns:
    [T] float32 (float64 where `values` is), 0 on padding. No gradient flows to the arguments.

  Raises:
    ValueError: on wrong shapes and types, or if `decay` is outside [0, 1].
  """
  checks.check_number("decay", decay, lambda x: 0 <= x <= 1, "lie in [0, 1].")
  checks.check_array("values", values, "T", float)
  checks.check_array("return_", return_, "", float)
  checks.check_array("mask", mask, "T", bool)
  checks.check_shape("mask", mask, values.shape, "values")
  values = checks.at_least_float32(values)
  values = jax.lax.stop_gradient(jnp.where(mask, values, jnp.asarray(return_, values.dtype)))
  deltas = jnp.where(mask, jnp.append(values[1:], jnp.asarray(return_, values.dtype)) - values, 0)

  def back(later: chex.Array, delta: chex.Array) -> tuple[chex.Array, chex.Array]:
    now = delta + decay * later
    return now, now

  _, result = jax.lax.scan(back, jnp.zeros((), values.dtype), deltas, reverse=True)
  return jax.lax.stop_gradient(jnp.where(mask, result, 0))


def _check_trace(rewards: chex.Array, group_advantage: chex.Numeric, segments: types.Segments) -> None:
  checks.check_array("rewards", rewards, "K", float)
  checks.check_array("group_advantage", group_advantage, "", float)
  checks.check_segments(segments)
  checks.check_shape("rewards", rewards, segments.ends.shape, "segments.ends")


def _to_tokens(x_k: chex.Array, segments: types.Segments) -> chex.Array:
  """[K] -> [T]: each token its segment's element, 0 on padding."""
  ids = segments.segment_ids
  return jnp.where(ids >= 0, x_k[jnp.maximum(ids, 0)], 0)
