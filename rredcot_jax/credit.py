"""The arrows between a rollout and its token advantages, as one pure function.

segments, completions, returns -> log p(c | s) -> v(s) -> r -> A, for a batch of
groups; jitted by the caller. Nothing is generated.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp

from rredcot_jax import advantages, redistribution, scoring, types, values
from rredcot_jax.model import decoder
from rredcot_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class CreditRule:
  """The choices of docs/method.md, sections 3 and 5, as one static argument."""

  group_size: int
  temperature: float
  mode: str = "uniform"  # advantages.MODES; uniform is GRPO and scores nothing.
  form: str = "plain"  # values.FORMS
  max_weight: float = 1.0
  initial_value: str = "baseline"  # redistribution.INITIAL_VALUES
  floor: float = 0.0
  scale: float = 1.0
  baseline: str = "mean"  # advantages.BASELINES
  advantage_scale: str = "std"  # advantages.SCALES
  chunk_size: int | None = None

  @property
  def needs_values(self) -> bool:
    return self.mode != "uniform"


def group_advantages(returns: chex.Array, rule: CreditRule) -> chex.Array:
  """[B] group-relative advantages of [B] returns, rows of a group together."""
  grouped = jax.vmap(functools.partial(advantages.group_advantages, baseline=rule.baseline, scale=rule.advantage_scale))
  return grouped(returns.reshape(-1, rule.group_size)).reshape(-1)


def zero_variance(returns: chex.Array, rule: CreditRule) -> chex.Array:
  """[B] bool: whether all returns of the row's group are the same."""
  return jnp.repeat(jax.vmap(advantages.zero_variance)(returns.reshape(-1, rule.group_size)), rule.group_size)


def uniform_advantages(mask: chex.Array, returns: chex.Array, rule: CreditRule) -> chex.Array:
  """GRPO's token advantages: [B, T], A_i on every token of `mask` [B, T]."""
  return jnp.where(mask, rule.scale * group_advantages(returns, rule)[:, None], 0.0)


def assign_credit(
  params: decoder.Params,
  config: ModelConfig,
  cache: decoder.Cache,
  rollout: types.Rollout,
  segments: types.Segments,
  completions: types.Completions,
  returns: chex.Array,
  uniform_rows: chex.Array,
  *,
  rule: CreditRule,
) -> types.Credit:
  """Redistributes each trace's return over its tokens.

  Args:
    params, config, cache: the policy that sampled, and the traces' keys and values.
    rollout, segments, completions: fields [B, ...], rows of a group together.
    returns: [B] float32, the verifier's rewards.
    uniform_rows: [B] bool, rows that get GRPO's uniform credit because their bank is empty.
    rule: static; the choices.

  Returns:
    Credit with fields [B, ...].
  """
  chex.assert_rank([returns, uniform_rows], 1)
  log_p = scoring.score_with_cache(
    params, config, cache, rollout, segments, completions,
    temperature=rule.temperature, chunk_size=rule.chunk_size,
  )  # fmt: skip
  estimate = functools.partial(values.estimate_values, form=rule.form, max_weight=rule.max_weight)
  lengths = jnp.sum(completions.scored, axis=-1)
  estimated, ess = jax.vmap(estimate)(log_p, completions.utilities, completions.log_q, completions.valid, lengths)
  return credit_of_values(estimated, ess, rollout.mask, segments, returns, uniform_rows, rule=rule)


def credit_of_values(
  estimated: chex.Array,
  effective_sample_size: chex.Array,
  mask: chex.Array,
  segments: types.Segments,
  returns: chex.Array,
  uniform_rows: chex.Array,
  *,
  rule: CreditRule,
) -> types.Credit:
  """The arrows from state values to token advantages, whatever the values were estimated with.

  Args:
    estimated: [B, K] float32, v(s_0) .. v(s_{K-1}): by `values.estimate_values`, or by generation
      (`monte_carlo.MonteCarloValues.state_values`), which with mode="difference" is VinePPO (arXiv 2410.01679).
    effective_sample_size: [B, K] float32, behind each value; k for k generated continuations.
    mask: [B, T] bool, real trace tokens.
    segments, returns, uniform_rows, rule: see `assign_credit`.

  Returns:
    Credit with fields [B, ...].
  """
  redistribute = functools.partial(redistribution.redistribute, initial_value=rule.initial_value)
  rewards = jax.vmap(redistribute)(estimated, returns, segments.num_segments)
  to_tokens = functools.partial(advantages.token_advantages, mode=rule.mode, floor=rule.floor, scale=rule.scale)
  token_advantages = jax.vmap(to_tokens)(rewards, group_advantages(returns, rule), segments)
  uniform = uniform_advantages(mask, returns, rule)
  return types.Credit(
    values=jax.vmap(redistribution.state_values)(estimated, returns, segments.num_segments),
    rewards=rewards,
    advantages=jnp.where(uniform_rows[:, None], uniform, token_advantages),
    effective_sample_size=jnp.where(segments.mask, effective_sample_size, 0.0),
  )
