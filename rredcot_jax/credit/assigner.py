"""One batch of traces -> its token advantages, from whichever source the configuration names."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rredcot_jax.credit import rules, source
from rredcot_jax.ops import types


@dataclasses.dataclass(frozen=True)
class Assigned:
  """What came of one batch."""

  advantages: chex.Array  # [B, T] float32, on devices.
  credit: types.Credit | None  # Fields [B, ...]; None for uniform credit, which is GRPO's.
  state: Any  # What the source has learnt, this batch included; None where it learns nothing.
  metrics: dict[str, Any]  # Without a prefix; scalars.


class Assigner:
  """Assigns credit to batches; compiles what it needs once."""

  def __init__(self, setting: source.Setting, rule: rules.Rule, credit_source: source.Source | None):
    """
    Args:
      setting: the policy and how traces are sampled.
      rule: how credit becomes advantages.
      credit_source: where credit comes from; None with mode "uniform", which reads none.
    """
    self.setting, self.rule, self.source = setting, rule, credit_source
    self._uniform = jax.jit(functools.partial(rules.uniform_advantages, rule=rule))
    self._of_values = jax.jit(functools.partial(rules.credit_of_values, rule=rule))
    self._of_rewards = jax.jit(functools.partial(rules.credit_of_rewards, rule=rule))
    self._summary = jax.jit(rules.summary)

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
      credit = self._of_rewards(found.rewards, sizes, batch.rollout.mask, segments, returns, uniform_rows)
    else:
      credit = self._of_values(found.values, sizes, batch.rollout.mask, segments, returns, uniform_rows)
    if found.advantages is not None:
      credit = dataclasses.replace(credit, advantages=found.advantages)
    metrics = {"generated_tokens": found.generated_tokens, "token_forwards": found.token_forwards}
    metrics |= dict(found.metrics) | self._summary(credit, segments)
    if found.values is None:
      del metrics["initial_value"]
    return Assigned(credit.advantages, credit, found.state, metrics)
