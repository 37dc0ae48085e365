"""State values and the observed return -> one redistributed reward for each segment.

Marks as in docs/method.md: [A] abstract, [S] readers' summaries of the paper, [C] our choice.
"""

import chex
import jax
import jax.numpy as jnp

from rredcot_jax.ops import checks, names

INITIAL_VALUES = ("baseline", "first_segment")


def state_values(values: chex.Array, return_: chex.Numeric, num_segments: chex.Numeric) -> chex.Array:
  """Completes the estimated values with the terminal one, which is observed.

      v(s_k) = values_k  for k < num_segments,   v(s_k) := R  for k >= num_segments   [C]

  The terminal state, number `num_segments`, is the whole trace; its value needs
  no estimator. Fixing it to R is what makes `redistribute` return-equivalent
  whatever the estimator.

  Args:
    values: [K] floating, v(s_0) .. v(s_{K-1}), in the units of the return. Entry
      k is the value of the state *before* segment k. Entries at k >= num_segments
      are ignored and may hold anything, NaN included.
    return_: [] floating, the verifier's reward R for the whole trace.
    num_segments: [] integer in [0, K]. Outside that range a concrete number raises. A traced
      one is limited to it, so that the return always has a place.

  Returns:
    [K + 1] float32 (float64 where `values` is): v(s_0) .. v(s_K), R from num_segments on.
    No gradient flows to `values` or to `return_`.

  Raises:
    ValueError: on wrong shapes and types, K = 0, or a concrete `num_segments` outside [0, K].
  """
  checks.check_array("values", values, "K", float)
  checks.check_array("return_", return_, "", float)
  checks.check_array("num_segments", num_segments, "", int)
  k_max = values.shape[0]
  if not k_max:
    raise ValueError("values has shape (0,): there must be room for at least one state (K).")
  must = f"lie in [0, {k_max}], the room that values [K] has: cut the trace into at most K segments."
  checks.check_number("num_segments", num_segments, lambda n: 0 <= n <= k_max, must)

  values = checks.at_least_float32(values)
  values = jnp.append(values, jnp.zeros((1,), values.dtype))
  terminal = jnp.asarray(return_, values.dtype)
  completed = jnp.where(jnp.arange(k_max + 1) < jnp.minimum(num_segments, k_max), values, terminal)
  return jax.lax.stop_gradient(completed)


def redistribute(
  values: chex.Array,
  return_: chex.Numeric,
  num_segments: chex.Numeric,
  *,
  initial_value: str = "baseline",
) -> chex.Array:
  """RUDDER's optimal redistribution: what each segment did to the expected return.

      r_k = v(s_{k+1}) - v(s_k),   k = 0 .. num_segments - 1,   v(s_{num_segments}) := R

  with segments counted from 0, so that segment k leads from state k to state
  k + 1. This is r_k = q(s_{k-1}, a_k) - q(s_{k-2}, a_{k-1}) of RREDCoT
  (arXiv 2606.06475 [A, S], after RUDDER, arXiv 1806.07857), written for a
  deterministic transition and shifted to our index. Return equivalence:

      initial_value="baseline":        sum_k r_k = R - v(s_0)
      initial_value="first_segment":   sum_k r_k = R,   as r_0 also receives v(s_0)

  Both conventions exist; "baseline" is our default [C], because v(s_0) is the
  prompt's and no segment's merit. An empty trace (num_segments = 0) has no
  segment to credit: every r_k is 0, in both forms, and state 0 is terminal, so
  that "baseline" still sums to R - v(s_0) = 0 while "first_segment" drops R.

  The differences are taken in float32 whatever the type of `values`: in bfloat16 the sum
  over 512 segments misses the return by one or two percent.

  Args:
    values: [K] floating, v(s_0) .. v(s_{K-1}); entries at k >= num_segments are
      ignored and may hold anything.
    return_: [] floating, the verifier's reward R.
    num_segments: [] integer in [0, K]; see `state_values` for what is outside.
    initial_value: one of `INITIAL_VALUES`.

  Returns:
    [K] float32 (float64 where `values` is), r_k, 0 where there is no segment. No gradient
    flows to `values` or to `return_`.

  Raises:
    ValueError: as `state_values`, and if `initial_value` is unknown.
  """
  names.check_option("initial_value", initial_value, INITIAL_VALUES)
  completed = state_values(values, return_, num_segments)

  before = completed[:-1]
  if initial_value == "first_segment":
    before = jnp.where(jnp.arange(before.shape[0]) == 0, 0, before)
  exists = jnp.arange(before.shape[0]) < num_segments
  return jnp.where(exists, completed[1:] - before, 0)
