"""The distinct states of many traces and their values from many rollouts: what estimators are measured against.

Traces of a group share prefixes, or are equal where the policy repeats itself. A state is
its prompt and its tokens. So equal prefixes are one state, which is valued once.

Each round of samples is written to a file when it is made. An interrupted study continues
with the round that was interrupted.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from rredcot_jax.credit import monte_carlo
from rredcot_jax.data import encoding, judging, tasks, verifiers
from rredcot_jax.data.encoding import Codec
from rredcot_jax.ops import types
from rredcot_jax.report import files
from rredcot_jax.study import estimators


@dataclasses.dataclass
class States:
  """Distinct states, numbered in the order of their first use, and for each a trace that passes through it."""

  places: dict[tuple[int, tuple[int, ...]], int] = dataclasses.field(default_factory=dict)
  prompts: list[int] = dataclasses.field(default_factory=list)
  rows: list[int] = dataclasses.field(default_factory=list)
  starts: list[int] = dataclasses.field(default_factory=list)

  def add(self, prompt: int, row: int, prefix: Sequence[int]) -> int:
    """The number of the state that `prefix` is after prompt `prompt`; trace `row` begins with it."""
    place = self.places.setdefault((prompt, tuple(prefix)), len(self.rows))
    if place == len(self.rows):
      self.prompts.append(prompt)
      self.rows.append(row)
      self.starts.append(len(prefix))
    return place

  def of_segments(self, traces: estimators.Traces, prompts: Sequence[int], rows: Iterable[int]) -> np.ndarray:
    """[B, K] int, the number of the state before each segment of the traces `rows`; -1 elsewhere."""
    starts, counts = np.asarray(traces.segments.starts), traces.num_segments
    tokens = np.asarray(traces.rollout.tokens)
    result = np.full(starts.shape, -1)
    for row in rows:
      for k in range(counts[row]):
        result[row, k] = self.add(prompts[row], row, tokens[row, : starts[row, k]].tolist())
    return result


@dataclasses.dataclass(frozen=True)
class GroundTruth:
  """Rewards of the continuations of each state, and what they cost."""

  samples: list[np.ndarray]  # S of them, [n_s] float32.
  generated_tokens: int
  computed_tokens: int
  seconds: float

  @property
  def values(self) -> np.ndarray:
    """[S] float64."""
    return np.array([rewards.mean(dtype=np.float64) for rewards in self.samples])

  @property
  def standard_errors(self) -> np.ndarray:
    """[S] float64, with Laplace's rule (two more samples, one of them a success), so that n of n is not certain."""
    counts = np.array([len(rewards) for rewards in self.samples])
    share = (np.array([rewards.sum() for rewards in self.samples]) + 1) / (counts + 2)
    return np.sqrt(share * (1 - share) / counts)

  def halves(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """[S] and [S], the values from a random half of each state's samples and from the other half."""
    first, second = [], []
    for rewards in self.samples:
      shuffled = rng.permutation(rewards)
      middle = len(shuffled) // 2
      first.append(shuffled[:middle].mean(dtype=np.float64))
      second.append(shuffled[middle:].mean(dtype=np.float64))
    return np.array(first), np.array(second)


def measure(
  engine: estimators.Estimators,
  traces: estimators.Traces,
  states: States,
  key: jax.Array,
  directory: pathlib.Path,
  *,
  samples: int,
  samples_per_round: int,
  rows_at_once: int,
  slots: int,
) -> GroundTruth:
  """Continues every state `samples` times, or reads what an earlier call has written.

  Args:
    engine: the policy and the task.
    traces: that the states lie on.
    states: to be valued. Their order decides the files, so it must be the same in every call.
    key: of all samples; continuation m of a state does not depend on rounds.
    directory: where the rounds are kept.
    samples: a state; a multiple of `samples_per_round`.
    samples_per_round: a state and file.
    rows_at_once: traces run together.
    slots: continuations of a trace run at once.

  Raises:
    ValueError: if `samples` is no such multiple, or if a file holds other states.
  """
  if samples % samples_per_round:
    raise ValueError(f"study.truth_samples={samples} must be a multiple of study.samples_per_round={samples_per_round}")
  directory.mkdir(parents=True, exist_ok=True)
  setting = engine.setting
  chunks = _chunks(states, rows_at_once)
  k_max = max(len(cuts) for chunk in chunks for _, cuts in chunk)
  found: list[list[np.ndarray]] = [[] for _ in states.rows]
  generated = computed = 0
  seconds = 0.0
  progress = tqdm(total=len(chunks) * (samples // samples_per_round), desc="ground truth", mininterval=1)
  for first_sample in range(0, samples, samples_per_round):
    for number, chunk in enumerate(chunks):
      path = directory / f"states-{number:04d}-from-{first_sample:05d}.npz"
      layout = np.array([(row, *cuts, *[-1] * (k_max - len(cuts))) for row, cuts in chunk])
      values = _read(path, layout)
      if values is None:
        some = traces.rows(np.array([row for row, _ in chunk] + [chunk[-1][0]] * (rows_at_once - len(chunk))))
        values = monte_carlo.values_by_generation(
          engine.params, setting.model, some.cache, some.rollout, _segments(some, chunk, k_max), some.returns,
          jax.random.fold_in(key, number), judging.judge_of(setting.task, setting.codec, some.examples),
          k=samples_per_round, first_sample=first_sample, chunk_size=slots, **setting.generation,
        )  # fmt: skip
        _write(path, layout, values)
      for row, (_, cuts) in enumerate(chunk):
        for k, place in enumerate(cuts.values()):
          found[place].append(values.rewards[row, k])
      generated, computed = generated + values.generated_tokens, computed + values.computed_tokens
      seconds += values.seconds
      progress.update()
  progress.close()
  return GroundTruth([np.concatenate(rewards) for rewards in found], generated, computed, seconds)


def _chunks(states: States, rows_at_once: int) -> list[list[tuple[int, dict[int, int]]]]:
  """Traces to run together, each with {place to cut: state number}, long ones first, so that rows of a chunk are alike.

  A trace's first segment begins at its prompt, so the prompt is sampled from again. Those samples count for the prompt.
  """
  cuts: dict[int, dict[int, int]] = {}
  for place, (prompt, row, start) in enumerate(zip(states.prompts, states.rows, states.starts)):
    cuts.setdefault(row, {0: states.places[prompt, ()]})[start] = place
  ordered = sorted(cuts.items(), key=lambda item: (-len(item[1]), item[0]))
  by_row = [(row, dict(sorted(places.items()))) for row, places in ordered]
  return [by_row[i : i + rows_at_once] for i in range(0, len(by_row), rows_at_once)]


def _segments(traces: estimators.Traces, chunk: list[tuple[int, dict[int, int]]], k_max: int) -> types.Segments:
  """Segments that begin at the cuts of a chunk; rows that only fill it up have none."""
  mask = np.asarray(traces.rollout.mask)
  lengths = mask.sum(axis=1)
  batch, size = mask.shape
  ends = np.repeat(lengths[:, None], k_max, axis=1).astype(np.int32)
  num_segments = np.zeros(batch, np.int32)
  for row, (_, cuts) in enumerate(chunk):
    ends[row, : len(cuts) - 1] = list(cuts)[1:]
    num_segments[row] = len(cuts)
  ids = (np.arange(size)[None, :, None] >= ends[:, None, :]).sum(axis=2)
  return types.Segments(
    ends=ends, segment_ids=np.where(mask, ids, -1).astype(np.int32), num_segments=num_segments,
    num_merged=np.zeros(batch, np.int32),
  )  # fmt: skip


def _write(path: pathlib.Path, layout: np.ndarray, values: monte_carlo.MonteCarloValues) -> None:
  """Writes a file whole or not at all, because a killed study must not leave half a file."""
  with files.replacing(path) as temporary, open(temporary, "wb") as file:
    np.savez_compressed(file, layout=layout, **dataclasses.asdict(values))


def _read(path: pathlib.Path, layout: np.ndarray) -> monte_carlo.MonteCarloValues | None:
  if not path.exists():
    return None
  with np.load(path) as file:
    stored: dict[str, Any] = dict(file)
  if not np.array_equal(stored.pop("layout"), layout):
    raise ValueError(f"{path} holds the values of other states: give the study another --workdir, or remove it.")
  scalars = ("generated_tokens", "computed_tokens", "judged", "generation_seconds", "seconds")
  return monte_carlo.MonteCarloValues(**stored | {name: stored[name].item() for name in scalars})


def first_wrong_segments(task: tasks.Task, codec: Codec, traces: estimators.Traces) -> np.ndarray:
  """[B] int, the segment in which a failed trace made its first mistake; -1 where unknown.

  It is known for tasks that have a `first_wrong_step`, because elsewhere many wordings are right. The place is
  the first token of that line which differs from the reference's line, or its first token where thoughts do not
  follow the reference. It is also -1 for traces that succeeded,
  and for failed traces whose lines are all right.
  """
  result = np.full(len(traces.returns), -1)
  rollout, ids = jax.device_get((traces.rollout, traces.segments.segment_ids))
  texts = codec.responses(rollout)
  newline = codec.tables.newlines[rollout.tokens] > 0
  for row, (example, text) in enumerate(zip(traces.examples, texts)):
    line = tasks.first_wrong_step(task, example, text) if traces.returns[row] < 1 else None
    if line is None:
      continue
    start = np.flatnonzero(newline[row] & rollout.mask[row])[line - 1] + 1 if line else 0
    follows = getattr(task, "aligned", False) and line < len(example.steps)
    expected = codec.solution_ids(example)[line] if follows else []
    same = 0
    while same < len(expected) and rollout.tokens[row, start + same] == expected[same]:
      same += 1
    result[row] = ids[row, start + same]
  return result


def answer_stated(task: tasks.Task, codec: Codec, traces: estimators.Traces) -> np.ndarray:
  """[B, K] bool, states whose trace has already stated its answer.

  The task's own `answer_stated` decides, if it has one. Otherwise the answer is stated once the trace's final
  answer stands in it as a whole word. In both cases it is stated once the thought was left.
  """
  rollout, segments = jax.device_get((traces.rollout, traces.segments))
  starts = np.asarray(segments.starts)
  result = np.zeros(starts.shape, bool)
  states_answer = getattr(task, "answer_stated", None)
  for row, example in enumerate(traces.examples):
    tokens = rollout.tokens[row, : int(rollout.mask[row].sum())].tolist()
    answer = verifiers.answer_of(codec.decode(tokens))
    for k in range(int(segments.num_segments[row])):
      text = codec.decode(tokens[: starts[row, k]])
      if states_answer is not None:
        said = states_answer(example, text)
      else:
        said = bool(answer) and re.search(rf"(?<![\w.]){re.escape(str(answer))}(?![\w]|\.\d)", text) is not None
      result[row, k] = said or encoding.THINK_CLOSE in text
  return result
