"""From what a source found to token advantages: the batched arrows of docs/method.md, section 5."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp

from rredcot_jax.ops import advantages, redistribution, types
from rredcot_jax.ops.masked import masked_mean


@dataclasses.dataclass(frozen=True)
class Rule:
  """How credit becomes advantages: one static argument."""

  group_size: int
  mode: str = "uniform"  # advantages.MODES; uniform is GRPO and reads no source.
  initial_value: str = "baseline"  # redistribution.INITIAL_VALUES
  state_baseline: bool = True  # Off: mode "difference" takes v(s_{k+1}) and not v(s_{k+1}) - v(s_k).
  floor: float = 0.0
  baseline: str = "mean"  # advantages.BASELINES
  scale: str = "std"  # advantages.SCALES

  @property
  def redistributes(self) -> bool:
    """Whether credit is anything but GRPO's."""
    return self.mode != "uniform"


def group_advantages(returns: chex.Array, rule: Rule) -> chex.Array:
  """[B] group-relative advantages of [B] returns, rows of a group together."""
  grouped = jax.vmap(functools.partial(advantages.group_advantages, baseline=rule.baseline, scale=rule.scale))
  return grouped(returns.reshape(-1, rule.group_size)).reshape(-1)


def zero_variance(returns: chex.Array, rule: Rule) -> chex.Array:
  """[B] bool: whether all returns of the row's group are the same."""
  return jnp.repeat(jax.vmap(advantages.zero_variance)(returns.reshape(-1, rule.group_size)), rule.group_size)


def uniform_advantages(mask: chex.Array, returns: chex.Array, rule: Rule) -> chex.Array:
  """GRPO's token advantages: [B, T], A_i on every token of `mask` [B, T]."""
  return jnp.where(mask, group_advantages(returns, rule)[:, None], 0.0)


def credit_of_values(
  estimated: chex.Array,
  sample_sizes: chex.Array,
  mask: chex.Array,
  segments: types.Segments,
  returns: chex.Array,
  uniform_rows: chex.Array,
  *,
  rule: Rule,
) -> types.Credit:
  """The arrows from state values to token advantages, whatever the values were estimated with.

  Args:
    estimated: [B, K] float32, v(s_0) .. v(s_{K-1}).
    sample_sizes: [B, K] float32, behind each value.
    mask: [B, T] bool, real trace tokens.
    segments: fields [B, ...], rows of a group together.
    returns: [B] float32, the verifier's rewards.
    uniform_rows: [B] bool, rows that get GRPO's uniform credit because their bank is empty.
    rule: static; the choices.

  Returns:
    Credit with fields [B, ...].
  """
  redistribute = functools.partial(redistribution.redistribute, initial_value=rule.initial_value)
  rewards = jax.vmap(redistribute)(estimated, returns, segments.num_segments)
  completed = jax.vmap(redistribution.state_values)(estimated, returns, segments.num_segments)
  # A state's value is a baseline: with or without it the expected gradient is the same, and the variance is not.
  credited = rewards if rule.state_baseline else jnp.where(segments.mask, completed[:, 1:], 0.0)
  return types.Credit(
    values=completed,
    rewards=rewards,
    advantages=advantages_of_rewards(credited, mask, segments, returns, uniform_rows, rule),
    effective_sample_size=jnp.where(segments.mask, sample_sizes, 0.0),
  )


def credit_of_rewards(
  rewards: chex.Array,
  sample_sizes: chex.Array,
  mask: chex.Array,
  segments: types.Segments,
  returns: chex.Array,
  uniform_rows: chex.Array,
  *,
  rule: Rule,
) -> types.Credit:
  """As `credit_of_values` for credit [B, K] that is no difference of values, which are NaN."""
  return types.Credit(
    values=jnp.full((rewards.shape[0], rewards.shape[1] + 1), jnp.nan, jnp.float32),
    rewards=rewards,
    advantages=advantages_of_rewards(rewards, mask, segments, returns, uniform_rows, rule),
    effective_sample_size=sample_sizes,
  )


def advantages_of_rewards(
  rewards: chex.Array,
  mask: chex.Array,
  segments: types.Segments,
  returns: chex.Array,
  uniform_rows: chex.Array,
  rule: Rule,
) -> chex.Array:
  """[B, T] from [B, K] rewards, uniform where the row asks for it."""
  to_tokens = functools.partial(advantages.token_advantages, mode=rule.mode, floor=rule.floor)
  token_advantages = jax.vmap(to_tokens)(rewards, group_advantages(returns, rule), segments)
  return jnp.where(uniform_rows[:, None], uniform_advantages(mask, returns, rule), token_advantages)


def summary(credit: types.Credit, segments: types.Segments) -> dict[str, chex.Array]:
  """Scalars: the share of states with a value behind them, its mean effective sample size, the mean v(s_0)."""
  size = credit.effective_sample_size
  return {
    "covered_states": masked_mean((size > 0).astype(jnp.float32), segments.mask),
    "effective_sample_size": masked_mean(size, segments.mask),
    "initial_value": jnp.mean(credit.values[:, 0]),
  }
