"""Every way of crediting segments, by name, as the credit study compares them.

    rredcot_<bank>[_<form>]     values by importance sampling over a bank, nothing generated
    monte_carlo                 values by a few generated continuations a state (VinePPO)
    leave_one_out, ...          attribution.ATTRIBUTIONS
    grpo                        the group advantage, the same on every segment
    random                      noise, the control

Each gives rewards r_k, and those that estimate state values give these as well. Names are
what study.json is keyed by.
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
from rredcot_jax.credit import attribution, monte_carlo
from rredcot_jax.data import batching, encoding, tasks
from rredcot_jax.model import decoder, scoring
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.ops import banks, redistribution, types, values


@dataclasses.dataclass(frozen=True)
class Scored:
  """An RREDCoT estimator: which bank, how its scores become values."""

  bank: str
  form: str = "plain"
  force_exit: bool = False


# What is offered by name; forms that a bank cannot carry (METHOD: self_normalised needs failures) are left out.
SCORED: Mapping[str, Scored] = {
  "rredcot_suffix": Scored("suffix"),
  "rredcot_suffix_length_normalised": Scored("suffix", "length_normalised"),
  "rredcot_solution": Scored("solution"),
  "rredcot_answer": Scored("answer"),
  "rredcot_answer_forced": Scored("answer", force_exit=True),
  "rredcot_solution_forced": Scored("solution", force_exit=True),
  "rredcot_rollouts": Scored("rollouts"),
  "rredcot_rollouts_truncated": Scored("rollouts", "truncated"),
  "rredcot_rollouts_self_normalised": Scored("rollouts", "self_normalised"),
}
METHODS = (*SCORED, "monte_carlo", *attribution.ATTRIBUTIONS, "grpo", "random")


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
  covered: float  # Share of states with anything behind their value.


class Estimators:
  """The methods bound to one policy and task; compiled functions are kept from call to call."""

  def __init__(
    self,
    params: decoder.Params,
    model: ModelConfig,
    task: tasks.Task,
    newlines: np.ndarray,
    *,
    group_size: int,
    sampling_options: Mapping[str, Any],
    room: Mapping[str, int],
    monte_carlo_samples: int,
    slots: int,
    integration_steps: int,
    chunk_size: int | None,
  ):
    """Binds them.

    Args:
      params, model, task: the policy and what it is asked.
      newlines: [V] int, newline characters in each token.
      group_size: rows of a prompt stand together; also the size of the rollouts bank.
      sampling_options: max_tokens, temperature, top_k, top_p, as the traces were sampled.
      room: tokens of the longest completion in each bank.
      monte_carlo_samples: k of "monte_carlo".
      slots: continuations of a row that it runs at once.
      integration_steps: nodes of integrated gradients.
      chunk_size: branches or deletions of a trace run at once; None is all.
    """
    self.params, self.model, self.task, self.newlines = params, model, task, newlines
    self.group_size, self.sampling_options, self.room = group_size, dict(sampling_options), dict(room)
    self.monte_carlo_samples, self.slots = monte_carlo_samples, slots
    self.integration_steps, self.chunk_size = integration_steps, chunk_size
    self.exit_ids = jnp.array(encoding.exit_ids(task.tokenizer), jnp.int32)
    self._flops: dict[Any, float] = {}
    self._score = jax.jit(self._scores, static_argnames="form")
    self._explain = jax.jit(self._attribution, static_argnames="name")
    self._redistribute = jax.jit(jax.vmap(redistribution.redistribute))

  @property
  def generation_options(self) -> dict[str, Any]:
    """Of `continuations.generate_from_states`."""
    tokenizer = self.task.tokenizer
    return self.sampling_options | {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}

  def credit(self, name: str, traces: Traces, key: jax.Array) -> Estimate:
    """The credit of `traces` by the method called `name`; `key` is read by what draws."""
    types.check_option("method", name, METHODS)
    if name in SCORED:
      return self._by_scoring(SCORED[name], traces)
    if name == "monte_carlo":
      return self._by_generation(traces, key)
    if name in attribution.ATTRIBUTIONS:
      return self._by_attribution(name, traces)
    began = time.perf_counter()
    exists = np.asarray(traces.segments.mask)
    if name == "random":
      rewards = np.asarray(jax.random.normal(key, exists.shape))
    else:
      groups = traces.returns.reshape(-1, self.group_size)
      outcome = (groups - groups.mean(axis=1, keepdims=True)).reshape(-1, 1)
      rewards = np.broadcast_to(outcome / np.maximum(traces.num_segments, 1)[:, None], exists.shape)
    rewards = np.where(exists, rewards, 0).astype(np.float32)
    return Estimate(rewards, None, time.perf_counter() - began, 0, 0, 0.0, 1.0)

  def _by_scoring(self, method: Scored, traces: Traces) -> Estimate:
    began = time.perf_counter()
    bank = self._bank(method.bank, traces, force_exit=method.force_exit, with_failures=method.form == "self_normalised")
    arguments = (traces.cache, traces.rollout, traces.segments, bank.completions)
    estimated, size = jax.device_get(self._score(self.params, *arguments, form=method.form))
    rewards = self._rewards(estimated, traces)
    seconds = time.perf_counter() - began
    batch, k_max = estimated.shape
    _, _, n, s = bank.completions.tokens.shape
    exists = np.asarray(traces.segments.mask)
    return Estimate(
      rewards, np.where(exists, estimated, 0), seconds, batch * k_max * n * s, 0,
      self._count((method, batch), functools.partial(self._scores, form=method.form), self.params, *arguments),
      float((size > 0)[exists].mean()),
    )  # fmt: skip

  def _by_generation(self, traces: Traces, key: jax.Array) -> Estimate:
    found = monte_carlo.values_by_generation(
      self.params, self.model, traces.cache, traces.rollout, traces.segments, traces.returns, key,
      judge_of(self.task, traces.examples), k=self.monte_carlo_samples, chunk_size=self.slots,
      **self.generation_options,
    )  # fmt: skip
    return Estimate(
      self._rewards(found.state_values, traces), found.state_values, found.seconds, 0, found.generated_tokens,
      found.computed_tokens * self.decode_flops(traces), 1.0,
    )  # fmt: skip

  def _by_attribution(self, name: str, traces: Traces) -> Estimate:
    began = time.perf_counter()
    bank = self._bank("answer", traces)
    arguments = (traces.rollout, traces.segments, bank.completions)
    rewards = np.asarray(self._explain(self.params, *arguments, name=name))
    seconds = time.perf_counter() - began
    batch, k_max = rewards.shape
    row = traces.rollout.prompt_tokens.shape[1] + traces.rollout.tokens.shape[1] + bank.completions.tokens.shape[-1]
    passes = {"leave_one_out": k_max + 1, "gradient_x_input": 3, "integrated_gradients": 3 * self.integration_steps}
    return Estimate(
      rewards, None, seconds, batch * row * passes.get(name, 1), 0,
      self._count((name, batch), functools.partial(self._attribution, name=name), self.params, *arguments), 1.0,
    )  # fmt: skip

  def _bank(self, name: str, traces: Traces, **options: Any) -> banks.Bank:
    host, segments = jax.device_get((traces.rollout, traces.segments))
    return banks.make_bank(
      name, batching.references(self.task, traces.examples), host, segments, traces.returns, self.newlines,
      group_size=self.group_size, bank_size=self.group_size, max_tokens=self.room[name], **options,
    )  # fmt: skip

  def _rewards(self, estimated: np.ndarray, traces: Traces) -> np.ndarray:
    return np.asarray(self._redistribute(jnp.asarray(estimated), traces.returns, traces.segments.num_segments))

  def _scores(self, params, cache, rollout, segments, bank, form: str) -> tuple[jax.Array, jax.Array]:
    log_p = scoring.score_with_cache(
      params, self.model, cache, rollout, segments, bank, temperature=self.sampling_options["temperature"],
      chunk_size=self.chunk_size,
    )  # fmt: skip
    lengths = jnp.sum(bank.scored, axis=-1)
    estimate = jax.vmap(functools.partial(values.estimate_values, form=form))
    return estimate(log_p, bank.utilities, bank.log_q, bank.valid, lengths)

  def _attribution(self, params, rollout, segments, bank, name: str) -> jax.Array:
    return attribution.attribute(
      name, params, self.model, rollout, segments, bank, exit_ids=self.exit_ids,
      temperature=self.sampling_options["temperature"], chunk_size=self.chunk_size, steps=self.integration_steps,
    )  # fmt: skip

  def decode_flops(self, traces: Traces) -> float:
    """Operations of one generated token after the whole width of `traces`."""
    one = jax.tree.map(lambda x: x[:, :1], traces.cache)
    columns = traces.rollout.prompt_tokens.shape[1] + traces.rollout.tokens.shape[1]

    def step(params, cache, token, mask):
      hidden, _ = decoder.decode_step(params, self.model, cache, token, columns - 1, mask)
      return decoder.logits(params, hidden)

    return self._count("decode", step, self.params, one, np.zeros(1, np.int32), np.ones((1, columns), bool))

  def _count(self, name: Any, function: Any, *arguments: Any) -> float:
    if name not in self._flops:
      self._flops[name] = flops.count(function, *arguments)
    return self._flops[name]


def judge_of(task: tasks.Task, examples: Sequence[tasks.Example]) -> monte_carlo.Judge:
  """The verifier of traces of `examples`, row by row."""
  eos_id = task.tokenizer.eos_token_id

  def judge(traces: Sequence[tuple[int, tuple[int, ...]]]) -> list[float]:
    texts = (encoding.decode(task.tokenizer, [token for token in ids if token != eos_id]) for _, ids in traces)
    return [task.reward(examples[row], text) for (row, _), text in zip(traces, texts)]

  return judge


def completion_rooms(references: Sequence[banks.Reference], max_tokens: int) -> dict[str, int]:
  """Tokens of the longest completion in each bank, so that short banks are not padded to the longest of all."""
  answer = max(len(reference.exit) + len(reference.answer) for reference in references)
  whole = max(sum(map(len, r.steps)) + len(r.exit) + len(r.answer) for r in references)
  return {"answer": answer, "solution": whole, "suffix": whole, "rollouts": max_tokens}
