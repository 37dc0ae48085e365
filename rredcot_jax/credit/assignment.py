"""One batch of rollouts -> its credit, from whichever source the configuration names, and what that cost.

The host's side of rules.py: it makes the bank, asks the verifier about generated
continuations, and counts. The training loop, the terminal tool and the benchmark
call this one object.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rredcot_jax.credit import monte_carlo, rules, value_head
from rredcot_jax.data import batching, encoding, judging, tasks
from rredcot_jax.model import decoder
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.ops import banks, types
from rredcot_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Assigned:
  """What came of one batch."""

  advantages: chex.Array  # [B, T] float32, on devices.
  credit: types.Credit | None  # Fields [B, ...]; None for uniform credit, which is GRPO's.
  critic: value_head.Critic | None  # The next one, where the source learns.
  metrics: dict[str, Any]  # Without a prefix; scalars.


class Assigner:
  """Assigns credit to batches; compiles what it needs once."""

  def __init__(
    self,
    task: tasks.Task,
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    *,
    rule: rules.CreditRule,
    bank: str,
    bank_options: Mapping[str, Any],
    monte_carlo_options: Mapping[str, Any],
    critic_optimizer: optax.GradientTransformation | None,
    critic_updates: int,
  ):
    """
    Args:
      task: whose verifier judges and whose references fill the bank.
      config, mesh: the policy's sizes, and where it lives.
      rule: how credit is assigned.
      bank, bank_options: of `banks.make_bank`; read by scoring and attribution.
      monte_carlo_options: of `monte_carlo.values_by_generation`, the tokenizer's left out.
      critic_optimizer, critic_updates: of `value_head.update`; None where no critic learns.
    """
    self.rule = rule
    self._task, self._config, self._mesh = task, config, mesh
    self._bank, self._bank_options = bank, dict(bank_options)
    tokenizer = task.tokenizer
    self._newlines = batching.vocab_tables(tokenizer).newlines
    self._exit_ids = jnp.asarray(encoding.exit_ids(tokenizer), jnp.int32)
    self._monte_carlo_options = dict(monte_carlo_options) | {
      "temperature": rule.temperature, "eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id,
    }  # fmt: skip
    self._uniform = jax.jit(functools.partial(rules.uniform_advantages, rule=rule))
    self._score = jax.jit(lambda params, cache, *rest: rules.assign_credit(params, config, cache, *rest, rule=rule))
    self._of_values = jax.jit(functools.partial(rules.credit_of_values, rule=rule))
    self._attribute = jax.jit(lambda params, *rest: rules.attribute_credit(params, config, *rest, rule=rule))
    self._learn = jax.jit(
      lambda params, critic, *rest: rules.value_head_credit(
        params, config, critic, *rest, rule=rule, optimizer=critic_optimizer, num_updates=critic_updates
      ),
      out_shardings=(None, sharding.replicated(mesh), None),
    )
    self._summary = jax.jit(rules.summary)

  def __call__(
    self,
    params: decoder.Params,
    critic: value_head.Critic | None,
    cache: decoder.Cache,
    rollout: types.Rollout,
    segments: types.Segments | None,
    returns: np.ndarray,
    key: chex.PRNGKey,
    *,
    on_host: types.Rollout,
    segments_on_host: types.Segments | None,
    examples: Sequence[tasks.Example],
    here: np.ndarray | None = None,
  ) -> Assigned:
    """Assigns credit to one batch.

    Args:
      params: the policy that sampled.
      critic: where the source learns; it is not changed.
      cache: the traces' keys and values, as the sampler leaves them.
      rollout, segments: fields [B, ...], on devices, rows of a group together; uniform credit reads no segments.
      returns: [B] float32, the verifier's rewards, on the host.
      key: of this batch; read by Monte Carlo alone.
      on_host, segments_on_host, examples: this process's rows of them.
      here: which rows those are; None is all.

    Raises:
      ValueError: if there is no critic for a source that learns one.
    """
    rule = self.rule
    if not rule.redistributes:
      return Assigned(self._uniform(rollout.mask, returns), None, None, {"generated_tokens": 0, "token_forwards": 0})
    assert segments is not None and segments_on_host is not None
    here = np.arange(len(returns)) if here is None else here
    mine = returns[here]
    next_critic, bank = None, None
    extra: dict[str, Any] = {}
    if rule.needs_bank:
      bank = banks.make_bank(
        self._bank, batching.references(self._task, examples), on_host, segments_on_host, mine, self._newlines,
        **self._bank_options,
      )  # fmt: skip
    if rule.source == "monte_carlo":
      credits, extra = self._generate(params, cache, rollout, segments, returns, examples, here, key)
    elif rule.learns_values:
      if critic is None:
        raise ValueError("rules.source='value_head' needs its critic, which lives in the train state.")
      placed = sharding.put_batch(self._mesh, mine)
      credits, next_critic, extra = self._learn(params, critic, rollout, segments, placed)
    else:
      assert bank is not None
      placed = sharding.put_batch(self._mesh, (bank.completions, mine, bank.uniform_rows))
      if rule.attributes:
        credits = self._attribute(params, rollout, segments, *placed, self._exit_ids)
      else:
        credits = self._score(params, cache, rollout, segments, *placed)
    metrics = self._counted(rollout, segments, bank) | extra | self._summary(credits, segments)
    if rule.attributes:
      del metrics["initial_value"]
    return Assigned(credits.advantages, credits, next_critic, metrics)

  def _generate(
    self,
    params: decoder.Params,
    cache: decoder.Cache,
    rollout: types.Rollout,
    segments: types.Segments,
    returns: np.ndarray,
    examples: Sequence[tasks.Example],
    here: np.ndarray,
    key: chex.PRNGKey,
  ) -> tuple[types.Credit, dict[str, Any]]:
    of_row = dict(zip(here.tolist(), examples, strict=True))
    estimate = monte_carlo.values_by_generation(
      params, self._config, cache, rollout, segments, returns, key, judging.judge_of(self._task, of_row),
      mesh=self._mesh, **self._monte_carlo_options,
    )  # fmt: skip
    samples = np.where(estimate.exists, np.float32(estimate.num_samples), np.float32(0))
    values, samples, mine, uniform_rows = sharding.put_batch(
      self._mesh, (estimate.state_values[here], samples[here], returns[here], np.zeros(len(here), bool))
    )
    counts = {
      "generated_tokens": estimate.generated_tokens,
      "token_forwards": estimate.computed_tokens,
      "verifier_calls": estimate.judged,
      "generation_seconds": estimate.generation_seconds,
    }
    return self._of_values(values, samples, rollout.mask, segments, mine, uniform_rows), counts

  def _counted(self, rollout: types.Rollout, segments: types.Segments, bank: banks.Bank | None) -> dict[str, Any]:
    """Over all processes; what only a process knows is summed on the devices."""
    n, s = bank.completions.tokens.shape[2:] if bank is not None else (0, 0)
    batch, trace = rollout.tokens.shape
    counts: dict[str, Any] = {
      "generated_tokens": 0,
      "token_forwards": rules.token_forwards(
        self.rule, batch=batch, prompt=rollout.prompt_tokens.shape[1], trace=trace, states=segments.ends.shape[1],
        completions=n, completion_tokens=s,
      ),
    }  # fmt: skip
    if bank is not None:
      dropped = np.zeros(len(bank.fallback), np.int32)
      dropped[0] = bank.num_dropped  # Of this process's rows together.
      fallback, dropped = sharding.put_batch(self._mesh, (bank.fallback, dropped))
      counts |= {"fallback_rows": fallback.mean(), "dropped_completions": dropped.sum()}
    return counts
