"""One batch of traces -> its token advantages, from the source that the configuration names."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rredcot_jax.credit import source
from rredcot_jax.ops import composition, types
from rredcot_jax.ops.masked import masked_mean


@dataclasses.dataclass(frozen=True)
class Rule:
  """How credit becomes advantages; see `ops.composition`."""

  group_size: int
  mode: str = "uniform"  # advantages.MODES; uniform is GRPO and reads no source.
  initial_value: str = "baseline"  # redistribution.INITIAL_VALUES
  state_baseline: bool = True  # Off: mode "difference" takes v(s_{k+1}) and not v(s_{k+1}) - v(s_k).
  floor: float = 0.0
  baseline: str = "mean"  # advantages.BASELINES
  advantage_scale: str = "std"  # advantages.SCALES
  ddof: int = 0

  @property
  def redistributes(self) -> bool:
    """Whether credit is anything but GRPO's."""
    return self.mode != "uniform"

  @property
  def of_group(self) -> dict[str, Any]:
    """Keyword arguments of `composition.group_advantages`."""
    return {
      "group_size": self.group_size, "baseline": self.baseline, "scale": self.advantage_scale, "ddof": self.ddof,
    }  # fmt: skip

  @property
  def of_rewards(self) -> dict[str, Any]:
    """Keyword arguments of `composition.advantages_from_rewards`."""
    names = ("group_size", "mode", "floor", "baseline", "advantage_scale", "ddof")
    return {name: getattr(self, name) for name in names}

  @property
  def of_values(self) -> dict[str, Any]:
    """Keyword arguments of `composition.credit_from_values`."""
    return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Assigned:
  """The advantages of one batch, and what they were made from."""

  advantages: chex.Array  # [B, T] float32, on devices.
  credit: types.Credit | None  # Fields [B, ...]; None for uniform credit, which is GRPO's.
  state: Any  # What the source has learnt, this batch included; None where it learns nothing.
  metrics: dict[str, Any]  # Without a prefix; scalars.


class Assigner:
  """Assigns credit to batches; compiles what it needs once."""

  def __init__(self, setting: source.Setting, rule: Rule, credit_source: source.Source | None):
    """
    Args:
      setting: the policy and how traces are sampled.
      rule: how credit becomes advantages.
      credit_source: where credit comes from; None with mode "uniform", which reads none.
    """
    self.setting, self.rule, self.source = setting, rule, credit_source
    self._uniform = jax.jit(functools.partial(uniform_advantages, rule=rule))
    self._of_values = jax.jit(functools.partial(_credit_of_values, rule=rule))
    self._of_rewards = jax.jit(functools.partial(_credit_of_rewards, rule=rule))
    self._summary = jax.jit(_summary)

  def uniform(self, mask: chex.Array, returns: np.ndarray) -> Assigned:
    """GRPO's credit of traces whose real tokens are `mask` [B, T]."""
    counts = {"generated_tokens": 0, "token_forwards": 0}
    return Assigned(self._uniform(mask, returns), None, None, counts)

  def __call__(self, batch: source.Batch) -> Assigned:
    """The credit of one batch; see `Source.assign` for what it raises."""
    if self.source is None:
      return self.uniform(batch.rollout.mask, batch.returns)
    found = self.source.assign(batch)
    segments, mine = batch.segments, batch.returns[batch.rows]
    returns, no_rows = self.setting.put((mine, np.zeros(len(mine), bool)))
    sizes = segments.mask.astype(jnp.float32) if found.sample_sizes is None else found.sample_sizes
    uniform_rows = no_rows if found.uniform_rows is None else found.uniform_rows
    if found.values is None:
      credit = self._of_rewards(found.rewards, sizes, segments, returns, uniform_rows)
    else:
      credit = self._of_values(found.values, sizes, segments, returns, uniform_rows)
    if found.advantages is not None:
      credit = dataclasses.replace(credit, advantages=found.advantages)
    metrics = {"generated_tokens": found.generated_tokens, "token_forwards": found.token_forwards}
    metrics |= dict(found.metrics) | self._summary(credit, segments)
    if found.values is None:
      del metrics["initial_value"]
    return Assigned(credit.advantages, credit, found.state, metrics)


def uniform_advantages(mask: chex.Array, returns: chex.Array, *, rule: Rule) -> chex.Array:
  """GRPO's token advantages: [B, T], A_i on every token of `mask` [B, T]; 0 where a return is not finite."""
  return jnp.where(mask, composition.group_advantages(returns, **rule.of_group)[:, None], 0.0)


def _credit_of_values(
  values: chex.Array,
  sizes: chex.Array,
  segments: types.Segments,
  returns: chex.Array,
  uniform_rows: chex.Array,
  *,
  rule: Rule,
) -> types.Credit:
  return composition.credit_from_values(
    values, segments, returns, sample_sizes=sizes, uniform_rows=uniform_rows, **rule.of_values
  )


def _credit_of_rewards(
  rewards: chex.Array,
  sizes: chex.Array,
  segments: types.Segments,
  returns: chex.Array,
  uniform_rows: chex.Array,
  *,
  rule: Rule,
) -> types.Credit:
  """The record of credit that is no difference of values; its values are NaN."""
  return types.Credit(
    values=jnp.full((rewards.shape[0], rewards.shape[1] + 1), jnp.nan, jnp.float32),
    rewards=rewards,
    advantages=composition.advantages_from_rewards(
      rewards, segments, returns, uniform_rows=uniform_rows, **rule.of_rewards
    ),
    effective_sample_size=sizes,
  )


def _summary(credit: types.Credit, segments: types.Segments) -> dict[str, chex.Array]:
  """Scalars: the share of states with a value behind them, its mean effective sample size, the mean v(s_0)."""
  size = credit.effective_sample_size
  return {
    "covered_states": masked_mean((size > 0).astype(jnp.float32), segments.mask),
    "effective_sample_size": masked_mean(size, segments.mask),
    "initial_value": jnp.mean(credit.values[:, 0]),
  }
