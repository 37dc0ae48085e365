"""What a run has written: config.json, metrics.jsonl, traces.jsonl. Everything read here is untrusted."""

import dataclasses
import itertools
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rredcot_jax.report.text import shorten

MAX_SEGMENTS = 512  # of a trace, shown


@dataclasses.dataclass(frozen=True)
class Segment:
  """Segment k of a trace: tokens [start, end) among those that are no padding, and its credit."""

  index: int
  start: int
  end: int
  text: str
  reward: float  # r_k
  before: float  # v(s_k)
  after: float  # v(s_{k+1})
  advantage: float  # Mean of A_t over the segment; NaN if it has no token or the trace no advantages.
  first_wrong: bool
  entropy: float = math.nan  # Nats, of the policy at the segment's first token; NaN where the run did not say it.


@dataclasses.dataclass(frozen=True)
class Trace:
  """A line of traces.jsonl whose fields fit together. Numbers are floats, NaN where JSON has null."""

  step: Any  # A number where our own training wrote it.
  prompt: str
  answer: str
  return_: float
  values: tuple[float, ...]  # v(s_0) .. v(s_K)
  segments: tuple[Segment, ...]  # K
  length: int  # Tokens, padding included.
  copies: int = 1  # How many lines of the file hold this very trace.

  @property
  def text(self) -> str:
    return "".join(segment.text for segment in self.segments)

  @property
  def peak(self) -> float:
    """The largest finite |r_k|, 0 if there is none."""
    return max((abs(s.reward) for s in self.segments if math.isfinite(s.reward)), default=0.0)

  @property
  def concentration(self) -> float:
    """sum r_k^2 / (sum |r_k|)^2 over finite r_k, in [1/K, 1]: 1 where one segment has all credit; 0 without credit."""
    if not self.peak:
      return 0.0
    # Over the largest, because the sum of what a file holds may be larger than any float.
    sizes = [abs(s.reward) / self.peak for s in self.segments if math.isfinite(s.reward)]
    return math.fsum(size**2 for size in sizes) / math.fsum(sizes) ** 2

  @property
  def is_right(self) -> bool:
    return self.return_ >= 0.5

  @property
  def verdict(self) -> str:
    if math.isnan(self.return_):
      return "not judged"
    return "correct" if self.return_ >= 1 else "wrong" if self.return_ <= 0 else "partly right"


# ---- Files -------------------------------------------------------------------------------


def read_metrics(path: str | os.PathLike) -> list[dict]:
  """The lines of a metrics.jsonl, in file order; a half-written last line is left out.

  Raises FileNotFoundError where there is no such file and ValueError where it holds no complete line; both
  name the file. Any other line that is not a JSON object is left out with a warning.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"no metrics at {path}: is it the work directory of a run?")
  rows = list(_json_lines(path))
  if not rows:
    raise ValueError(f"{path} holds no complete line yet: the run logged nothing")
  return rows


def read_traces(path: str | os.PathLike) -> Iterator[dict]:
  """The lines of a traces.jsonl one at a time, read as `read_metrics` reads; none where there is no such file."""
  path = Path(path)
  return _json_lines(path) if path.is_file() else iter(())


def read_config(path: str | os.PathLike) -> tuple[str, Any] | None:
  """The command and the settings in a run's config.json; None where there is no such file.

  Raises ValueError, naming the file, where it is not a JSON object.
  """
  path = Path(path)
  if not path.is_file():
    return None
  try:
    config = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    return str(config.get("command", "")), config.get("config", {})
  except (ValueError, AttributeError, RecursionError) as error:
    raise ValueError(f"{path} is not a JSON object with command and config: {error}") from error


def _json_lines(path: Path) -> Iterator[dict]:
  """The JSON objects of a file, a line at a time, because a file of traces may be larger than the memory."""
  broken = 0
  # Lines end in "\n" alone: JSON strings may hold U+2028 and other characters that str.splitlines takes for ends.
  with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
    for number, line in enumerate(file, start=1):
      if not line.strip():
        continue
      if broken:
        warnings.warn(f"{path}:{broken} is not a JSON object; left out", stacklevel=3)
      try:
        row = json.loads(line)
      except (ValueError, RecursionError):
        row = None
      broken = 0 if isinstance(row, dict) else number
      if not broken:
        yield row


# ---- Traces ------------------------------------------------------------------------------


def parse_trace(record: Mapping) -> Trace:
  """A line of traces.jsonl as a `Trace`. Raises ValueError, naming the field, where it does not fit together."""
  for name in ("step", "prompt", "answer", "return", "tokens", "segment_ids", "rewards", "values"):
    if name not in record:
      raise ValueError(f"a trace has no field {name!r}")
  where = f"the trace at step {shorten(repr(record['step']), 60)}"  # repr: an error message reaches the terminal.
  tokens, ids = _list(record, "tokens", where), _list(record, "segment_ids", where)
  if not all(isinstance(token, str) for token in tokens) or not all(type(k) is int for k in ids):
    raise ValueError(f"{where} needs strings for tokens and integers for segment_ids")
  rewards, values = _numbers(record, "rewards", where), _numbers(record, "values", where)
  advantages = _numbers(record, "advantages", where) if record.get("advantages") else [math.nan] * len(tokens)
  sizes = (len(tokens), len(ids), len(advantages), len(values), len(rewards))
  if len(set(sizes[:3])) > 1 or len(values) != len(rewards) + 1 or max(ids, default=-1) >= len(rewards):
    raise ValueError(
      f"{where} does not fit together: {sizes[0]} tokens, {sizes[1]} segment_ids up"
      f" to {max(ids, default=-1)}, {sizes[2]} advantages, {sizes[3]} values, {sizes[4]} rewards"
    )
  entropies = _numbers(record, "entropies", where) if record.get("entropies") else [math.nan] * len(rewards)
  if len(entropies) != len(rewards):
    raise ValueError(f"{where} does not fit together: {len(entropies)} entropies, {len(rewards)} rewards")
  wrong = record.get("first_wrong_segment")
  places: list[list[int]] = [[] for _ in rewards]
  for t, k in enumerate(ids):
    if k >= 0:  # -1 is padding
      places[k].append(t)
  segments, start = [], 0
  for k, inside in enumerate(places):
    mean = sum(advantages[t] for t in inside) / len(inside) if inside else math.nan
    text, end = "".join(tokens[t] for t in inside), start + len(inside)
    segments.append(Segment(k, start, end, text, rewards[k], values[k], values[k + 1], mean, k == wrong, entropies[k]))
    start = end
  return Trace(
    step=record["step"],
    prompt=str(record["prompt"]),
    answer=str(record["answer"]),
    return_=_number(record["return"], "return", where),
    values=tuple(values),
    segments=tuple(segments),
    length=len(tokens),
  )


def distinct_traces(path: str | os.PathLike) -> list[Trace]:
  """The traces of a traces.jsonl in file order, each once: a step's equal texts to one prompt are one trace.

  Raises ValueError, naming the file and the place of the trace, where a trace does not fit together.
  """
  found: dict[tuple, Trace] = {}
  for place, record in enumerate(read_traces(path), start=1):
    try:
      trace = parse_trace(record)
    except ValueError as error:
      raise ValueError(f"{path}, trace {place}: {error}") from error
    key = (repr(trace.step), trace.prompt, trace.text)
    known = found.get(key)
    found[key] = trace if known is None else dataclasses.replace(known, copies=known.copies + 1)
  return list(found.values())


def most_informative(traces: Sequence[Trace], limit: int) -> list[Trace]:
  """At most `limit` traces, half of them wrong where there are so many of both, by `informative_order`."""
  ordered = sorted(traces, key=informative_order)
  wrong = [trace for trace in ordered if not trace.is_right]
  right = [trace for trace in ordered if trace.is_right]
  mixed = [trace for pair in itertools.zip_longest(wrong, right) for trace in pair if trace is not None]
  return sorted(mixed[:limit], key=informative_order)


def informative_order(trace: Trace) -> tuple[float, bool, float]:
  """A sort key: the largest |r| first, as printed; of equal ones wrong before right, then the latest step first."""
  step = number(trace.step)
  return -round(trace.peak, 3), trace.is_right, -step if math.isfinite(step) else math.inf


def scale_of(traces: Sequence[Trace]) -> float:
  """The largest finite |r_k|: one scale for traces shown together, so that their tints compare."""
  return max((trace.peak for trace in traces), default=0.0)


def shown_segments(trace: Trace, characters: int) -> tuple[list[tuple[Segment, str]], str]:
  """The first segments with their texts, at most MAX_SEGMENTS and `characters` in all, and what was left out.

  The second value is "" where nothing was. A segment whose text does not fit keeps its place and its numbers.
  """
  shown, room = [], characters
  for segment in trace.segments[:MAX_SEGMENTS]:
    shown.append((segment, segment.text[:room]))
    room -= len(shown[-1][1])
  missing = sum(len(segment.text) for segment in trace.segments) - sum(len(text) for _, text in shown)
  more = len(trace.segments) - len(shown)
  parts = [f"{missing:,} more characters" if missing else "", f"{more:,} more segments" if more else ""]
  return shown, " and ".join(part for part in parts if part)


def _list(record: Mapping, name: str, where: str) -> list:
  if not isinstance(record[name], list | tuple):
    raise ValueError(f"{where} needs a list for {name}, not {shorten(repr(record[name]), 60)}")
  return list(record[name])


def _numbers(record: Mapping, name: str, where: str) -> list[float]:
  return [_number(value, name, where) for value in _list(record, name, where)]


def is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def number(value: Any) -> float:
  """A JSON value as a float; NaN for what is no number or larger than any float."""
  try:
    return float(value) if is_number(value) else math.nan
  except OverflowError:
    return math.nan


def _number(value: Any, name: str, where: str) -> float:
  if value is not None and not is_number(value):
    raise ValueError(f"{where} needs a number in {name}, not {shorten(repr(value), 60)}")
  return number(value)
