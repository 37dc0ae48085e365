"""v(s_k) by generation: k continuations of every state, judged; the baseline and the ground truth.

    v_hat(s) = 1/k sum_m R(s, c_m),   c_m ~ pi(. | s)

The estimate is unbiased. Its variance is v (1 - v) / k for rewards of 0 and 1. It is expensive,
because each value costs k generated continuations, and scoring a completion costs one pass
over a few tokens. With k = 9 and `advantages.token_advantages(mode="difference")` this is
VinePPO (arXiv 2410.01679). With k >= 256 other estimators are measured against it.

model/continuations.py generates them.
"""

import concurrent.futures
import dataclasses
import time

import chex
import jax
import numpy as np

from rredcot_jax.credit import source
from rredcot_jax.data import judging
from rredcot_jax.data.judging import Judge
from rredcot_jax.model import continuations, decoder
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.ops import redistribution, types
from rredcot_jax.parallel import processes


@dataclasses.dataclass(frozen=True)
class MonteCarloValues:
  """The rewards of all continuations of a batch's states, on the host, and what they cost."""

  rewards: np.ndarray  # [B, K, N] float32, of continuation n of state k; NaN where the state does not exist.
  returns: np.ndarray  # [B] float32, of the traces themselves.
  num_segments: np.ndarray  # [B] int32.
  generated_tokens: int  # Tokens of all continuations: the token-forwards they need.
  computed_tokens: int  # Token-forwards run for them, idle slots included.
  judged: int  # Distinct traces that the verifier saw.
  generation_seconds: float  # Wall time in generation, compiling included.
  seconds: float  # Wall time in all; the verifier runs beside the next round's generation.

  @property
  def exists(self) -> np.ndarray:
    """[B, K] bool, states that are not terminal."""
    return np.arange(self.rewards.shape[1]) < self.num_segments[:, None]

  @property
  def num_samples(self) -> int:
    """N; also the `first_sample` of a call that goes on from here."""
    return self.rewards.shape[2]

  @property
  def state_values(self) -> np.ndarray:
    """[B, K] float32, v(s_0) .. v(s_{K-1}) as `redistribution.redistribute` takes them; 0 where there is no state."""
    return np.where(self.exists, self.rewards.mean(axis=2, dtype=np.float64), 0.0).astype(np.float32)

  @property
  def values(self) -> np.ndarray:
    """[B, K + 1] float32, v(s_0) .. v(s_K); the trace's own return from `num_segments` on."""
    completed = jax.vmap(redistribution.state_values)(self.state_values, self.returns, self.num_segments)
    return np.asarray(completed)

  @property
  def standard_errors(self) -> np.ndarray:
    """[B, K + 1] float32 of `values`: s / sqrt(N), s with N - 1; 0 on terminal values, NaN if N = 1.

    0 also where all N rewards agree. This does not mean that the value is certain: after N
    successes of N, a failure probability of up to about 3 / N is still plausible (95%).
    """
    if self.num_samples < 2:
      errors = np.full(self.exists.shape, np.nan)
    else:
      errors = self.rewards.std(axis=2, ddof=1, dtype=np.float64) / np.sqrt(self.num_samples)
    errors = np.where(self.exists, errors, 0.0)
    return np.pad(errors, [(0, 0), (0, 1)]).astype(np.float32)

  @property
  def successes(self) -> np.ndarray:
    """[B, K] int, continuations of reward 1."""
    return (self.rewards >= 1.0).sum(axis=2)

  def joined(self, other: "MonteCarloValues") -> "MonteCarloValues":
    """Both estimates as one, samples of `self` first; costs add up.

    Raises:
      ValueError: if they are not of the same traces, judged by returns and segments.
    """
    same = np.array_equal(self.returns, other.returns) and np.array_equal(self.num_segments, other.num_segments)
    if not same or self.rewards.shape[:2] != other.rewards.shape[:2]:
      raise ValueError("Monte Carlo estimates of different traces cannot be joined: returns or segments differ.")
    counts = ("generated_tokens", "computed_tokens", "judged", "generation_seconds", "seconds")
    return dataclasses.replace(
      self,
      rewards=np.concatenate([self.rewards, other.rewards], axis=2),
      **{name: getattr(self, name) + getattr(other, name) for name in counts},
    )


def values_by_generation(
  params: decoder.Params,
  config: ModelConfig,
  cache: decoder.Cache,
  rollout: types.Rollout,
  segments: types.Segments,
  returns: np.ndarray,
  key: chex.PRNGKey,
  judge: Judge,
  *,
  k: int,
  first_sample: int = 0,
  samples_per_round: int | None = None,
  workers: int = 1,
  mesh: jax.sharding.Mesh | None = None,
  **options,
) -> MonteCarloValues:
  """Generates `k` continuations of every state and has them judged: v(s), and what it cost.

  It runs in rounds, so that k = 256 needs only the memory of `samples_per_round`. The verifier
  judges one round in threads while the next is generated. Equal traces of a row are judged
  once, because a verifier must depend on its arguments alone. Where there are several
  processes, each judges its share of the rows, and all return the same result.

  Args:
    params, config, cache, rollout, segments, key: see `generate_from_states`; on devices.
    returns: [B] float32, the traces' own rewards.
    judge: the verifier, safe to call from `workers` threads at once; asked about this process's rows.
    k: continuations a state in this call.
    first_sample: continuations a state that earlier calls with this key have drawn. `joined`
      joins their results with this call's.
    samples_per_round: continuations a state in a round; None is k. It should divide k,
      because a last round of another size is compiled anew.
    workers: threads that judge.
    mesh: that the rows are split over; needed where there are several processes.
    **options: of `generate_from_states`: max_tokens, temperature, eos_id, chunk_size, ...

  Returns:
    The estimate; its `values` do not depend on rounds, workers or `chunk_size`.

  Raises:
    ValueError: on a number out of range, or if `judge` gives another number of rewards
      than it was asked for, or one that is not finite.
  """
  per_round = samples_per_round or k
  if min(k, per_round, workers) < 1 or first_sample < 0:
    raise ValueError(
      f"k={k}, samples_per_round={samples_per_round} and workers={workers} must be at least 1, "
      f"first_sample={first_sample} at least 0."
    )
  began = time.perf_counter()
  batch = len(returns)
  rows = processes.every_row(batch) if mesh is None else processes.rows_of(mesh, batch)
  # From here on arrays on the host are of the rows that this process judges.
  on_host = lambda tree: jax.tree.map(lambda x: x[rows.judged], processes.to_host(mesh, tree))
  traces, segments_here = on_host((rollout.tokens, segments))
  numbers, starts = rows.here[rows.judged], segments_here.starts
  places: dict[tuple[int, tuple[int, ...]], int] = {}  # Of each distinct trace among the verdicts.
  rounds: list[np.ndarray] = []
  futures: list[concurrent.futures.Future] = []
  generated, computed = np.zeros(len(numbers), int), 0  # Tokens: of each row, and run in all.
  generation_seconds = 0.0
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    for done in range(0, k, per_round):
      round_began = time.perf_counter()
      drawn, steps = continuations.generate_from_states(
        params, config, cache, rollout, segments, key, k=min(per_round, k - done),
        first_sample=np.int32(first_sample + done), **options,
      )  # fmt: skip
      drawn = on_host(drawn)
      generation_seconds += time.perf_counter() - round_began
      generated += drawn.lengths.sum(axis=(1, 2))
      each_row = drawn.lengths.shape[1] * drawn.lengths.shape[2]
      computed += int(steps) * batch * min(options.get("chunk_size") or each_row, each_row)
      verdict = np.full(drawn.lengths.shape, -1)
      known = len(places)
      for row, state, sample in np.argwhere(drawn.lengths > 0):
        ids = drawn.tokens[row, state, sample, : drawn.lengths[row, state, sample]]
        trace = (int(numbers[row]), (*traces[row, : starts[row, state]].tolist(), *ids.tolist()))
        verdict[row, state, sample] = places.setdefault(trace, len(places))
      rounds.append(verdict)
      # Dictionaries keep the order of insertion, so verdicts come in the order of their places.
      new = list(places)[known:]
      shares = [new[i * len(new) // workers : (i + 1) * len(new) // workers] for i in range(workers)]
      futures += [pool.submit(_ask, judge, share) for share in shares if share]
    verdicts = np.concatenate([np.zeros(0, np.float32), *(future.result() for future in futures)])
  place = np.concatenate(rounds, axis=2)
  rewards = np.where(place >= 0, np.append(verdicts, np.float32(np.nan))[place], np.float32(np.nan))
  judged = np.bincount([row for row, _ in places], minlength=batch)[numbers]
  each_row = (segments_here.num_segments, generated, judged, *rewards.reshape(len(numbers), -1).T)
  (num_segments, generated, judged, *columns), _ = rows.gather(numbers, *each_row)
  return MonteCarloValues(
    rewards=np.stack(columns, axis=1).reshape(batch, *place.shape[1:]),
    returns=np.asarray(returns, np.float32),
    num_segments=num_segments.astype(np.int32),
    generated_tokens=int(generated.sum(dtype=np.float64)),
    computed_tokens=computed,
    judged=int(judged.sum()),
    generation_seconds=generation_seconds,
    seconds=time.perf_counter() - began,
  )


def _ask(judge: Judge, traces: list[tuple[int, tuple[int, ...]]]) -> np.ndarray:
  rewards = np.asarray(judge(traces), np.float32)
  if rewards.shape != (len(traces),) or not np.isfinite(rewards).all():
    raise ValueError(f"the judge was asked for {len(traces)} finite rewards and gave {rewards.shape}: {rewards}.")
  return rewards


class MonteCarlo(source.Source):
  """Values of states by a few generated continuations each (VinePPO, arXiv 2410.01679)."""

  name = "monte_carlo"
  needs = frozenset({"cache", "verifier"})
  estimates_values = True

  def __init__(self, setting: source.Setting, *, samples: int = 9, workers: int = 1):
    """`samples`: continuations a state, VinePPO's number; `workers`: threads that judge them."""
    super().__init__(setting)
    for name, value in (("samples", samples), ("workers", workers)):
      if value < 1:
        raise ValueError(f"credit.options.{name}={value} must be at least 1.")
    self._samples, self._workers = samples, workers

  def assign(self, batch: source.Batch) -> source.Found:
    """See `Source.assign`; the verifier judges what was generated."""
    setting = self.setting
    of_row = dict(zip(batch.rows.tolist(), batch.examples, strict=True))
    found = values_by_generation(
      batch.params, setting.model, batch.cache, batch.rollout, batch.segments, batch.returns, batch.key,
      judging.judge_of(setting.task, setting.codec, of_row), k=self._samples, workers=self._workers, mesh=setting.mesh,
      chunk_size=setting.chunk_size, **setting.generation,
    )  # fmt: skip
    sizes = np.where(found.exists, np.float32(found.num_samples), np.float32(0))
    values, sizes = setting.put((found.state_values[batch.rows], sizes[batch.rows]))
    return source.Found(
      values=values,
      sample_sizes=sizes,
      token_forwards=found.computed_tokens,
      generated_tokens=found.generated_tokens,
      metrics={"verifier_calls": found.judged, "generation_seconds": found.generation_seconds},
    )
