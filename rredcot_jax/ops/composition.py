"""From log-probabilities of completions, or state values, to the token advantages of a batch.

    log p(c | s) [B, K, N] -> v(s) [B, K] -> r [B, K] -> A [B, T]

The other modules of the method work on one trace. These functions are their composition over
a batch of groups, the same for every source of credit, as a trainer needs it. Rows of a
prompt's group stand together, so that B is a multiple of `group_size`. All are pure and safe
under jit, where what their docstrings call static must be constants.

A return that is not finite says nothing about its trace: the trace's advantages are 0, and its
group's are computed without it (`advantages.group_advantages`). Its rewards keep the NaN. The
caller counts such returns.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from rredcot_jax.ops import advantages, checks, redistribution, types
from rredcot_jax.ops import values as values_lib


def values_from_log_probs(
  log_p: chex.Array,
  bank: types.Completions,
  segments: types.Segments,
  returns: chex.Array,
  *,
  form: str | values_lib.Form = "plain",
  max_weight: chex.Numeric = 1.0,
  exponent: chex.Numeric = 0.5,
) -> tuple[chex.Array, chex.Array]:
  """State values of a batch from what a model says of a bank of completions (arXiv 2606.06475).

  States after the exit of the thought (`Segments.after_exit`) that have no completion take the
  observed return as their value, and count as one sample: their trace is decided, and nothing
  else is known of them [C]. Every other state without a completion has the value 0.

  Args:
    log_p: [B, K, N] floating, log p(c_n | s_k) <= 0 at the sampling temperature, nats, such as
      `scoring.score_tree` gives.
    bank: fields [B, K or 1, N, ...]; with 1, all states share one bank. Only `scored`,
      `utilities`, `log_q` and `valid` are read.
    segments: fields [B, ...].
    returns: [B] floating, the verifier's rewards.
    form, max_weight, exponent: of `values.estimate_values`; `form` is static.

  Returns:
    values and effective sample sizes, [B, K] float32 each. No gradient flows to any argument.

  Raises:
    ValueError: on wrong shapes and types and unknown options, and, where arrays are concrete, on
      the first number that is outside its range.
  """
  checks.check_array("log_p", log_p, "B K N", float)
  checks.check_array("returns", returns, "B", float)
  checks.check_segments(segments, "B")
  checks.check_shape("log_p", log_p, (*segments.ends.shape, None), "segments.ends [B, K]")
  checks.check_shape("returns", returns, log_p.shape[:1], "the traces of log_p")
  states = 1 if bank.valid.shape[1:2] == (1,) else log_p.shape[1]
  for name in ("utilities", "log_q", "valid"):
    checks.check_shape(f"bank.{name}", getattr(bank, name), (log_p.shape[0], states, log_p.shape[2]), "log_p")
  values_lib.check_numbers(log_p, bank.utilities, bank.log_q, bank.valid)

  estimate = functools.partial(values_lib.estimate_values, form=form, max_weight=max_weight, exponent=exponent)
  lengths = jnp.sum(bank.scored, axis=-1)
  estimated, sizes = jax.vmap(estimate)(log_p, bank.utilities, bank.log_q, bank.valid, lengths)
  decided = jnp.logical_and(segments.after_exit, jnp.logical_not(jnp.any(bank.valid, axis=-1)))
  observed = jax.lax.stop_gradient(jnp.asarray(returns, jnp.float32))[:, None]
  return jnp.where(decided, observed, estimated), jnp.where(decided, 1.0, sizes)


def credit_from_log_probs(
  log_p: chex.Array,
  bank: types.Completions,
  segments: types.Segments,
  returns: chex.Array,
  *,
  group_size: int,
  mode: str,
  form: str | values_lib.Form = "plain",
  max_weight: chex.Numeric = 1.0,
  exponent: chex.Numeric = 0.5,
  initial_value: str = "baseline",
  state_baseline: bool = True,
  floor: chex.Numeric = 0.0,
  scale: chex.Numeric = 1.0,
  baseline: str = "mean",
  advantage_scale: str = "std",
  ddof: int = 0,
  epsilon: chex.Numeric = 1e-6,
  uniform_rows: chex.Array | None = None,
) -> types.Credit:
  """RREDCoT's credit (arXiv 2606.06475): `values_from_log_probs`, then `credit_from_values`.

  Args:
    log_p, bank, form, max_weight, exponent: see `values_from_log_probs`; form is static.
    segments: fields [B, ...].
    returns: [B] floating, the verifier's rewards.
    group_size, mode, initial_value, state_baseline, floor, scale, baseline, advantage_scale, ddof, epsilon,
      uniform_rows: see `credit_from_values`, which says which of them are static.

  Returns:
    Credit with fields [B, ...]. No gradient flows to any argument.

  Raises:
    ValueError: as those two.
  """
  values, sizes = values_from_log_probs(
    log_p, bank, segments, returns, form=form, max_weight=max_weight, exponent=exponent
  )
  return credit_from_values(
    values, segments, returns, group_size=group_size, mode=mode, initial_value=initial_value,
    state_baseline=state_baseline, floor=floor, scale=scale, baseline=baseline, advantage_scale=advantage_scale,
    ddof=ddof, epsilon=epsilon, sample_sizes=sizes, uniform_rows=uniform_rows,
  )  # fmt: skip


def credit_from_values(
  values: chex.Array,
  segments: types.Segments,
  returns: chex.Array,
  *,
  group_size: int,
  mode: str,
  initial_value: str = "baseline",
  state_baseline: bool = True,
  floor: chex.Numeric = 0.0,
  scale: chex.Numeric = 1.0,
  baseline: str = "mean",
  advantage_scale: str = "std",
  ddof: int = 0,
  epsilon: chex.Numeric = 1e-6,
  sample_sizes: chex.Array | None = None,
  uniform_rows: chex.Array | None = None,
) -> types.Credit:
  """Credit from state values, whatever they were estimated with.

  With values of generated continuations and mode="difference" it is VinePPO's (arXiv 2410.01679).

  Args:
    values: [B, K] floating, v(s_0) .. v(s_{K-1}) in the units of the return.
    segments: fields [B, ...].
    returns: [B] floating, the verifier's rewards.
    group_size: rows of a prompt that stand together, static.
    mode: one of `advantages.MODES`, static.
    initial_value: one of `redistribution.INITIAL_VALUES`, static.
    state_baseline: static; False credits v(s_{k+1}) in the place of r_k = v(s_{k+1}) - v(s_k). For exact
      values the expected gradient is the same, and the variance is not.
    floor, scale: of `advantages.token_advantages`.
    baseline, advantage_scale, ddof, epsilon: of `advantages.group_advantages` (`advantage_scale` is its
      `scale`); all but epsilon static.
    sample_sizes: [B, K] floating, effective samples behind each value; 1 where None.
    uniform_rows: [B] bool, rows that get GRPO's uniform credit, such as those whose bank is empty.

  Returns:
    Credit with fields [B, ...]. No gradient flows to any argument.

  Raises:
    ValueError: on wrong shapes and types, unknown options, and, where arrays are concrete, on
      the first number that is outside its range.
  """
  checks.check_array("values", values, "B K", float)
  _check_batch(segments, returns, group_size)
  checks.check_shape("values", values, segments.ends.shape, "segments.ends [B, K]")
  values = jnp.asarray(values, jnp.float32)
  redistribute = functools.partial(redistribution.redistribute, initial_value=initial_value)
  rewards = jax.vmap(redistribute)(values, returns, segments.num_segments)
  completed = jax.vmap(redistribution.state_values)(values, returns, segments.num_segments)
  credited = rewards if state_baseline else jnp.where(segments.mask, completed[:, 1:], 0.0)
  sizes = jnp.ones_like(values) if sample_sizes is None else sample_sizes
  checks.check_shape("sample_sizes", sizes, values.shape, "values")
  return types.Credit(
    values=completed,
    rewards=rewards,
    advantages=advantages_from_rewards(
      credited, segments, returns, group_size=group_size, mode=mode, floor=floor, scale=scale, baseline=baseline,
      advantage_scale=advantage_scale, ddof=ddof, epsilon=epsilon, uniform_rows=uniform_rows,
    ),
    effective_sample_size=jnp.where(segments.mask, sizes, 0.0),
  )  # fmt: skip


def advantages_from_rewards(
  rewards: chex.Array,
  segments: types.Segments,
  returns: chex.Array,
  *,
  group_size: int,
  mode: str,
  floor: chex.Numeric = 0.0,
  scale: chex.Numeric = 1.0,
  baseline: str = "mean",
  advantage_scale: str = "std",
  ddof: int = 0,
  epsilon: chex.Numeric = 1e-6,
  uniform_rows: chex.Array | None = None,
) -> chex.Array:
  """The last arrow: token advantages from credit that segments have already been given.

  Args:
    rewards: [B, K] floating, r_k of `redistribution.redistribute`, or an attribution's.
    segments, returns, group_size, mode, floor, scale, baseline, advantage_scale, ddof, epsilon, uniform_rows: see
      `credit_from_values`.

  Returns:
    [B, T] float32. No gradient flows to any argument.

  Raises:
    ValueError: as `credit_from_values`.
  """
  checks.check_array("rewards", rewards, "B K", float)
  _check_batch(segments, returns, group_size)
  checks.check_shape("rewards", rewards, segments.ends.shape, "segments.ends [B, K]")
  outcomes = group_advantages(
    returns, group_size=group_size, baseline=baseline, scale=advantage_scale, ddof=ddof, epsilon=epsilon
  )
  to_tokens = functools.partial(advantages.token_advantages, mode=mode, floor=floor, scale=scale)
  token_advantages = jax.vmap(to_tokens)(rewards, outcomes, segments)
  if uniform_rows is not None:
    checks.check_array("uniform_rows", uniform_rows, "B", bool)
    uniform = jnp.where(segments.segment_ids >= 0, scale * outcomes[:, None], 0.0)
    token_advantages = jnp.where(uniform_rows[:, None], uniform, token_advantages)
  return jax.lax.stop_gradient(jnp.where(jnp.isfinite(returns)[:, None], token_advantages, 0.0))


def group_advantages(
  returns: chex.Array,
  *,
  group_size: int,
  baseline: str = "mean",
  scale: str = "std",
  ddof: int = 0,
  epsilon: chex.Numeric = 1e-6,
) -> chex.Array:
  """[B] float32: `advantages.group_advantages` of each group of `group_size` rows of `returns` [B]."""
  compute = functools.partial(advantages.group_advantages, baseline=baseline, scale=scale, ddof=ddof, epsilon=epsilon)
  return jax.vmap(compute)(_groups(returns, group_size)).reshape(-1)


def zero_variance(returns: chex.Array, *, group_size: int) -> chex.Array:
  """[B] bool: `advantages.zero_variance` of each row's group."""
  return jnp.repeat(jax.vmap(advantages.zero_variance)(_groups(returns, group_size)), group_size)


def _groups(returns: chex.Array, group_size: int) -> chex.Array:
  checks.check_array("returns", returns, "B", float)
  if group_size < 1 or returns.shape[0] % group_size:
    raise ValueError(f"group_size={group_size} does not divide the {returns.shape[0]} traces into groups.")
  return returns.reshape(-1, group_size)


def _check_batch(segments: types.Segments, returns: chex.Array, group_size: int) -> None:
  checks.check_segments(segments, "B")
  _groups(returns, group_size)
  checks.check_shape("returns", returns, segments.num_segments.shape, "segments.num_segments [B]")
