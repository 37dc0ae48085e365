"""Redistributed rewards and the group's returns -> one advantage for each token.

Marks as in docs/method.md: [A] abstract, [S] readers' summaries of the paper, [C] our choice.
"""

import chex
import jax
import jax.numpy as jnp

from rredcot_jax.ops import masked, types

BASELINES = ("mean", "leave_one_out", "none")
SCALES = ("std", "none")
SIGMA_MODES = ("uniform", "magnitude", "signed")
MODES = (*SIGMA_MODES, "difference")


def zero_variance(returns: chex.Array) -> chex.Array:
  """Whether every return of the group is the same, so that no outcome is better than another.

  The test is exact equality, without a tolerance. A NaN return makes it False.

  Args:
    returns: [G] floating, G >= 1, one return for each trace of one prompt's group.

  Returns:
    [] bool.
  """
  chex.assert_rank(returns, 1)
  chex.assert_type(returns, float)
  return jnp.max(returns) == jnp.min(returns)


def group_advantages(
  returns: chex.Array, *, baseline: str = "mean", scale: str = "std", epsilon: float = 1e-6
) -> chex.Array:
  """The group-relative advantage of each trace of one prompt.

      A_i = (R_i - b_i) / (std(R) + epsilon)      scale="std"
      A_i =  R_i - b_i                            scale="none"

      b_i = mean_j R_j                            baseline="mean"
      b_i = mean_{j != i} R_j                     baseline="leave_one_out"
      b_i = 0                                     baseline="none", with scale="none" only

  mean with std is GRPO (arXiv 2402.03300), mean with none is Dr. GRPO
  (arXiv 2503.20783), leave_one_out with none is RLOO (arXiv 2402.14740), none with
  none is REINFORCE without a baseline: rewards of 0 and 1 then only ever praise.
  The deviation is the population one, over all G returns. Dividing by it
  overweights prompts that are nearly solved or nearly hopeless.

  A group of zero variance (see `zero_variance`) gets exactly 0, not the rounding
  error of its mean divided by epsilon; without a baseline it keeps its returns.

  Args:
    returns: [G] floating, G >= 2, one return for each trace of one prompt.
    baseline: one of `BASELINES`.
    scale: one of `SCALES`.
    epsilon: float > 0 added to the deviation; read by scale="std" only.

  Returns:
    [G] of the type of `returns`. No gradient flows to `returns`.

  Raises:
    ValueError: if an option is unknown, G < 2, epsilon is not positive, or scale="std" has no baseline.
  """
  types.check_option("baseline", baseline, BASELINES)
  types.check_option("scale", scale, SCALES)
  chex.assert_rank(returns, 1)
  chex.assert_type(returns, float)
  if not epsilon > 0:
    raise ValueError(f"epsilon={epsilon} must be > 0: it keeps a group of equal returns from a division by 0.")
  group_size = returns.shape[0]
  if group_size < 2:
    raise ValueError(
      f"A group of {group_size} has no group-relative advantage: there is nothing to compare a return with. "
      "Sample at least 2 traces for each prompt."
    )

  returns = jax.lax.stop_gradient(returns)
  if baseline == "none":
    if scale != "none":
      raise ValueError("baseline='none' with scale='std' divides by 0 where all returns agree; set scale='none'.")
    return returns
  centred = returns - jnp.mean(returns)
  if baseline == "leave_one_out":
    centred = centred * (group_size / (group_size - 1))
  if scale == "std":
    centred = centred / (jnp.std(returns) + epsilon)
  return jnp.where(zero_variance(returns), 0, centred)


def sigma(
  rewards: chex.Array,
  group_advantage: chex.Numeric,
  segments: types.Segments,
  *,
  mode: str = "magnitude",
  floor: float = 0.0,
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
      "uniform" does not depend on it.

  Returns:
    [T] of the type of `rewards`, >= 0, of mean 1 over the trace's tokens, 0 on
    padding. No gradient flows to `rewards` or to `group_advantage`.

  Raises:
    ValueError: if `mode` is unknown or `floor` is outside [0, 1].
  """
  types.check_option("mode", mode, SIGMA_MODES)
  _check_trace(rewards, group_advantage, segments)
  if not 0.0 <= floor <= 1.0:
    raise ValueError(f"floor={floor} must be in [0, 1].")

  rewards = jax.lax.stop_gradient(rewards)
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
  floor: float = 0.0,
  scale: float = 1.0,
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
    floor: float in [0, 1], see `sigma`; without effect on "uniform" and "difference".
    scale: float, multiplies every advantage.

  Returns:
    [T] of the type of `rewards`, 0 on padding. No gradient flows to the arguments.

  Raises:
    ValueError: if `mode` is unknown or `floor`, where it is read, is outside [0, 1].
  """
  types.check_option("mode", mode, MODES)
  _check_trace(rewards, group_advantage, segments)

  if mode == "difference":
    return scale * _to_tokens(jax.lax.stop_gradient(rewards), segments)
  outcome = jax.lax.stop_gradient(jnp.asarray(group_advantage, rewards.dtype))
  return scale * outcome * sigma(rewards, group_advantage, segments, mode=mode, floor=floor)


def generalised_advantages(values: chex.Array, return_: chex.Numeric, mask: chex.Array, *, decay: float) -> chex.Array:
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
    decay: lambda in [0, 1].

  Returns:
    [T] of the type of `values`, 0 on padding. No gradient flows to the arguments.

  Raises:
    ValueError: if `decay` is outside [0, 1].
  """
  if not 0.0 <= decay <= 1.0:
    raise ValueError(f"decay={decay} must be in [0, 1].")
  chex.assert_rank([values, return_, mask], [1, 0, 1])
  chex.assert_type([values, return_, mask], [float, float, bool])
  chex.assert_equal_shape([values, mask])
  values = jax.lax.stop_gradient(jnp.where(mask, values, jnp.asarray(return_, values.dtype)))
  deltas = jnp.where(mask, jnp.append(values[1:], jnp.asarray(return_, values.dtype)) - values, 0)

  def back(later: chex.Array, delta: chex.Array) -> tuple[chex.Array, chex.Array]:
    now = delta + decay * later
    return now, now

  _, result = jax.lax.scan(back, jnp.zeros((), values.dtype), deltas, reverse=True)
  return jax.lax.stop_gradient(jnp.where(mask, result, 0))


def _check_trace(rewards: chex.Array, group_advantage: chex.Numeric, segments: types.Segments) -> None:
  chex.assert_rank(
    [rewards, group_advantage, segments.ends, segments.segment_ids, segments.num_segments], [1, 0, 1, 1, 0]
  )
  chex.assert_type([rewards, group_advantage, segments.segment_ids], [float, float, int])
  chex.assert_equal_shape([rewards, segments.ends])


def _to_tokens(x_k: chex.Array, segments: types.Segments) -> chex.Array:
  """[K] -> [T]: each token its segment's element, 0 on padding."""
  ids = segments.segment_ids
  return jnp.where(ids >= 0, x_k[jnp.maximum(ids, 0)], 0)
