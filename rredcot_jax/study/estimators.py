"""Every way of crediting segments, by name, as the credit study compares them.

    rredcot_<bank>[_<form>]     values by importance sampling over a bank, nothing generated
    ..._calibrated              the same, calibrated with the returns of the other prompts
    monte_carlo                 values by a few generated continuations a state (VinePPO)
    leave_one_out, ...          the other sources of credit that learn nothing
    grpo                        the group advantage, the same on every segment
    random                      noise, the control

Each gives rewards r_k. Those that estimate state values give the values too. The sources are the
objects that training uses (`credit.sources`). study.json uses these names as keys.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rredcot_jax.cost import flops
from rredcot_jax.credit import calibrated
from rredcot_jax.credit.likelihood import Likelihood
from rredcot_jax.credit.source import BankOptions, Batch, Setting, Source
from rredcot_jax.credit.sources import SOURCES
from rredcot_jax.data import tasks
from rredcot_jax.model import decoder
from rredcot_jax.ops import banks, redistribution, types
from rredcot_jax.ops import values as values_lib
from rredcot_jax.ops.names import check_option

# The methods by name. Forms that a bank does not allow are left out, because self_normalised needs failures.
SCORED: Mapping[str, BankOptions] = {
  "rredcot_suffix": BankOptions("suffix"),
  "rredcot_suffix_length_normalised": BankOptions("suffix", form="length_normalised"),
  "rredcot_solution": BankOptions("solution"),
  "rredcot_answer": BankOptions("answer"),
  "rredcot_answer_forced": BankOptions("answer", scored="body"),
  "rredcot_solution_forced": BankOptions("solution", scored="body"),
  "rredcot_solutions": BankOptions("solutions"),
  "rredcot_solutions_forced": BankOptions("solutions", scored="body"),
  "rredcot_solutions_answer": BankOptions("solutions", scored="answer"),
  "rredcot_solutions_forced_power": BankOptions("solutions", scored="body", form="power"),
  "rredcot_own": BankOptions("own"),
  "rredcot_own_forced": BankOptions("own", scored="body"),
  "rredcot_own_self_normalised": BankOptions("own", form="self_normalised"),
  "rredcot_rollouts": BankOptions("rollouts"),
  "rredcot_rollouts_truncated": BankOptions("rollouts", form="truncated"),
  "rredcot_rollouts_self_normalised": BankOptions("rollouts", form="self_normalised"),
}
CONTROLS = ("grpo", "random")
_OTHERS = tuple(name for name, kind in SOURCES.items() if kind is not Likelihood and "state" not in kind.needs)
_PLAIN = tuple(name for name, bank in SCORED.items() if bank.form == "plain")
CALIBRATED: Mapping[str, str] = {f"{name}_calibrated": name for name in _PLAIN}  # The method that each calibrates.
METHODS = (*SCORED, *CALIBRATED, *_OTHERS, *CONTROLS)


@dataclasses.dataclass(frozen=True)
class Traces:
  """Groups of traces with what crediting them needs; fields [B, ...], rows of a prompt's group together."""

  rollout: types.Rollout
  cache: decoder.Cache
  segments: types.Segments
  returns: np.ndarray  # [B] float32.
  examples: Sequence[tasks.Example]  # B of them.

  def rows(self, rows: np.ndarray) -> "Traces":
    """Some of the traces, in the order of `rows`."""
    take = functools.partial(jax.tree.map, lambda x: x[rows])
    return Traces(
      rollout=take(self.rollout),
      cache=jax.tree.map(lambda x: x[:, rows], self.cache),
      segments=take(self.segments),
      returns=self.returns[rows],
      examples=[self.examples[row] for row in rows],
    )

  @property
  def num_segments(self) -> np.ndarray:
    """[B] int."""
    return np.asarray(self.segments.num_segments)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Credit of a batch by one method, and what it cost."""

  rewards: np.ndarray  # [B, K] float32, 0 where there is no segment.
  values: np.ndarray | None  # [B, K] float32 of the states before the segments; None where none are estimated.
  seconds: float  # Wall time; compiling included if this call compiled.
  forward_tokens: int  # Token-forwards run, padding included; a backward pass counts as two. Generated ones apart.
  generated_tokens: int
  flops: float
  covered: float  # Share of states whose value has at least one completion.


class Estimators:
  """The methods bound to one policy and task; compiled functions are kept from call to call."""

  def __init__(
    self, params: decoder.Params, setting: Setting, room: Mapping[str, int], options: Mapping[str, Mapping[str, Any]]
  ):
    """
    Args:
      params: the policy.
      setting: what sources are bound to; its bank is replaced by each method's.
      room: tokens of the longest completion in each bank.
      options: keyword arguments of sources, by their name.
    """
    self.params, self.setting = params, setting
    self._room, self._options = dict(room), options
    self._flops: dict[Any, float] = {}
    self._redistribute = jax.jit(jax.vmap(redistribution.redistribute))

  @functools.cache  # noqa: B019, it lives as long as the study.
  def source(self, name: str) -> Source:
    """The source behind the method called `name`."""
    options = SCORED.get(name, BankOptions("answer"))
    bank = dataclasses.replace(options, max_tokens=self._room[options.name], size=self.setting.group_size)
    setting = dataclasses.replace(self.setting, bank=bank)
    if name in SCORED:
      return Likelihood(setting)
    return SOURCES[name](setting, **self._options.get(name, {}))

  def credit(self, name: str, traces: Traces, key: jax.Array) -> Estimate:
    """The credit of `traces` by the method called `name`; `key` is read by what draws.

    A method of `CALIBRATED` learns from the prompts of `traces` alone, each by a fit on the others.
    """
    check_option("method", name, METHODS)
    if name in CALIBRATED:
      return self.calibrated(self.credit(CALIBRATED[name], traces, key), traces)
    if name in CONTROLS:
      return self._control(name, traces, key)
    began = time.perf_counter()
    source = self.source(name)
    batch = Batch(self.params, traces.cache, traces.rollout, traces.segments, traces.returns, traces.examples, key)
    found = source.assign(batch)
    values, sizes = jax.device_get((found.values, found.sample_sizes))
    if values is None:
      rewards = np.asarray(found.rewards)
    else:
      rewards = np.asarray(self._redistribute(jnp.asarray(values), traces.returns, traces.segments.num_segments))
    seconds = time.perf_counter() - began
    exists = np.asarray(traces.segments.mask)
    sampled = found.generated_tokens > 0
    key_of_flops = (name, len(traces.returns))
    if not sampled and key_of_flops not in self._flops:
      self._flops[key_of_flops] = source.count_flops(batch)
    return Estimate(
      rewards=rewards,
      values=None if values is None else np.where(exists, values, 0),
      seconds=seconds,
      forward_tokens=0 if sampled else found.token_forwards,
      generated_tokens=found.generated_tokens,
      flops=found.token_forwards * self.decode_flops(traces) if sampled else self._flops[key_of_flops],
      covered=1.0 if values is None or sizes is None else float((sizes > 0)[exists].mean()),
    )

  def calibrated(self, estimate: Estimate, traces: Traces) -> Estimate:
    """`estimate` with its values calibrated: those of a prompt by a fit on the other prompts; costs are unchanged."""
    assert estimate.values is not None
    segments = traces.segments
    exists = np.asarray(segments.mask)
    # The return decides the states after the exit, so they have nothing to learn from and nothing to be corrected.
    scored = exists & ~np.asarray(segments.after_exit) & (estimate.values > 0)
    log_p = np.log(np.where(scored, estimate.values, 1))
    fitted = values_lib.cross_fit(
      jnp.asarray(log_p, jnp.float32), calibrated.features_of(segments), jnp.asarray(traces.returns),
      jnp.asarray(scored), group_size=self.setting.group_size,
    )  # fmt: skip
    values = np.where(scored, np.asarray(fitted), estimate.values).astype(np.float32)
    rewards = np.asarray(self._redistribute(jnp.asarray(values), traces.returns, segments.num_segments))
    return dataclasses.replace(estimate, values=values, rewards=rewards)

  def _control(self, name: str, traces: Traces, key: jax.Array) -> Estimate:
    """The credit of the two methods without a source: the group's advantage spread evenly, or noise."""
    began = time.perf_counter()
    exists = np.asarray(traces.segments.mask)
    if name == "random":
      rewards = np.asarray(jax.random.normal(key, exists.shape))
    else:
      groups = traces.returns.reshape(-1, self.setting.group_size)
      outcome = (groups - groups.mean(axis=1, keepdims=True)).reshape(-1, 1)
      rewards = np.broadcast_to(outcome / np.maximum(traces.num_segments, 1)[:, None], exists.shape)
    rewards = np.where(exists, rewards, 0).astype(np.float32)
    return Estimate(rewards, None, time.perf_counter() - began, 0, 0, 0.0, 1.0)

  def decode_flops(self, traces: Traces) -> float:
    """Operations of one generated token after the whole width of `traces`."""
    if "decode" not in self._flops:
      model = self.setting.model
      one = jax.tree.map(lambda x: x[:, :1], traces.cache)
      columns = traces.rollout.prompt_tokens.shape[1] + traces.rollout.tokens.shape[1]

      def step(params, cache, token, mask):
        hidden, _ = decoder.decode_step(params, model, cache, token, columns - 1, mask)
        return decoder.logits(params, hidden)

      token, mask = np.zeros(1, np.int32), np.ones((1, columns), bool)
      self._flops["decode"] = flops.count(step, self.params, one, token, mask)
    return self._flops["decode"]


def completion_rooms(references: Sequence[banks.Reference], max_tokens: int) -> dict[str, int]:
  """Tokens of the longest completion in each bank, so that short banks are not padded to the longest of all."""
  answer = max(len(reference.exit) + len(reference.answer) for reference in references)
  sizes = [[sum(map(len, steps)) for steps in (r.steps, *r.solutions)] for r in references]
  frames = [len(r.exit) + len(r.answer) for r in references]
  whole = max(frame + first for frame, (first, *_) in zip(frames, sizes))
  longest = max(frame + max(each) for frame, each in zip(frames, sizes))
  generated = {"rollouts": max_tokens, "own": max_tokens}
  return {"answer": answer, "solution": whole, "suffix": whole, "solutions": longest, **generated}
