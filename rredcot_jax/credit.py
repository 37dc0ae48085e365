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
  redistribute = functools.partial(redistribution.redistribute, initial_value=rule.initial_value)
  rewards = jax.vmap(redistribute)(estimated, returns, segments.num_segments)
  to_tokens = functools.partial(advantages.token_advantages, mode=rule.mode, floor=rule.floor, scale=rule.scale)
  token_advantages = jax.vmap(to_tokens)(rewards, group_advantages(returns, rule), segments)
  uniform = uniform_advantages(rollout.mask, returns, rule)
  return types.Credit(
    values=jax.vmap(redistribution.state_values)(estimated, returns, segments.num_segments),
    rewards=rewards,
    advantages=jnp.where(uniform_rows[:, None], uniform, token_advantages),
    effective_sample_size=jnp.where(segments.mask, ess, 0.0),
  )
