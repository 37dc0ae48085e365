r"""The second embedded task: a free thought, an exit, a clean solution, the answer.

    3-6+9*7  ->  So 3-6 gives 7\nWait 3-6=7\n7+9=6*7=2\n</think>3-6=7\n7+9=6\n6*7=2\nAnswer 2

The questions are those of `chain`. The thought is free: its wording varies, two steps may share a line, lines are
said again, and some lines say nothing. So the thought is not aligned with the solution. The solution is written in
one of `STYLES`, and each style is one reference.

The supervised corpus comes from a sloppy teacher. It errs, and sometimes notices, at once or one line later; what was
built on the wrong value is then said anew. Its solution copies what the thought last said, right or wrong. Steps that
the thought did not reach are guessed, and guessed right less often.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rredcot_jax.data import encoding, tasks
from rredcot_jax.data.chain import Chain, apply_operation

WORDS = ("Wait", "So", "Hmm", "Let me", " check ", "Now ", " gives ", " is ", "Answer ")
STYLES = ("lines", "short", "chained")
ANSWER = "Answer "

_FILLER = "Hmm\n"


@dataclasses.dataclass(frozen=True)
class Teacher:
  """Rates of the sloppy teacher."""

  wrong: float = 0.12  # Steps of the thought whose result is one of the nine wrong digits.
  notice: float = 0.5  # Wrong lines that are said again, half of them at once and half after the next line.
  doubt: float = 0.08  # Right lines that are said again.
  mend: float = 0.95  # Steps said again that are right.
  pair: float = 0.25  # Lines of two steps.
  filler: float = 0.06  # Lines that say nothing.
  lines: int = 9  # From this line on nothing is said again and no line says nothing, so that length is bounded.
  early: float = 0.25  # Traces that leave the thought before a uniformly drawn step.
  guess: float = 0.6  # Steps that the thought did not reach and that the solution has right.
  direct: float = 0.1  # Traces that answer without a solution.


class Think(Chain):
  """One split of the task; see the module's docstring. Its layout is `encoding.Layout(answer="Answer %s")`."""

  name = "think"
  aligned = False
  max_solutions = len(STYLES)

  def __init__(self, *, split: str, size: int = 1 << 20, num_steps: int = 6, seed: int = 0, **rates: Any):
    """
    Args:
      split, size, num_steps, seed: see `Chain`.
      **rates: of `Teacher`.
    """
    super().__init__(split=split, size=size, num_steps=num_steps, seed=seed)
    self._teacher = Teacher(**rates)

  def __getitem__(self, index: int) -> tasks.Example:
    """The example at `index`, whose references are the true solution in each style."""
    example = super().__getitem__(index)
    start, operations = _operations(example.question)
    values = _values(start, operations)
    first, *others = (solution(values, operations, style) for style in STYLES)
    return dataclasses.replace(example, steps=first, solutions=tuple(others))

  def reward(self, example: tasks.Example, text: str) -> float:
    """1 if the text after the last "Answer " behind the thought is the gold digit to the letter, else 0."""
    _, left, rest = text.rpartition(encoding.THINK_CLOSE)
    _, said, digit = rest.rpartition(ANSWER)
    return float(bool(left) and bool(said) and digit == example.answer)

  def teacher_trace(self, example: tasks.Example, rng: np.random.Generator) -> tasks.Trace:
    """A trace of the sloppy teacher."""
    return teacher_trace(example, rng, self._teacher)

  def first_wrong_step(self, example: tasks.Example, text: str) -> int | None:
    """The first line whose wrong value still stands at the end of the thought; None if there is none."""
    return read_thought(example, text.partition(encoding.THINK_CLOSE)[0]).culprit

  def answer_stated(self, example: tasks.Example, text: str) -> bool:
    """Whether the thought has said a value for every step."""
    return read_thought(example, text.partition(encoding.THINK_CLOSE)[0]).covered == len(example.steps)


def solution(values: Sequence[int], operations: Sequence[str], style: str) -> tuple[str, ...]:
  """A solution through `values` (one more than `operations`) in one of `STYLES`, one string a step."""
  steps = list(zip(values, operations, values[1:]))
  if style == "lines":
    return tuple(f"{before}{operation}={after}\n" for before, operation, after in steps)
  if style == "short":
    return tuple(f"{operation} gives {after}\n" for _, operation, after in steps)
  last = len(steps) - 1
  return tuple(
    ("" if i else str(before)) + f"{operation}={after}" + ("\n" if i == last else "")
    for i, (before, operation, after) in enumerate(steps)
  )


def _operations(question: str) -> tuple[int, list[str]]:
  return int(question[0]), [question[i : i + 2] for i in range(1, len(question), 2)]


def _values(start: int, operations: Sequence[str]) -> list[int]:
  values = [start]
  for operation in operations:
    values.append(apply_operation(values[-1], operation))
  return values


def _wrong(rng: np.random.Generator, value: int) -> int:
  return (value + int(rng.integers(1, 10))) % 10


# ---- The teacher -----------------------------------------------------------------------------


@dataclasses.dataclass
class _Writer:
  """A thought being written."""

  operations: Sequence[str]
  rng: np.random.Generator
  rates: Teacher
  lines: list[str]
  said: list[int | None]  # Value after each operation, as last said.
  value: int  # Of the chain where it stands.
  done: int = 0  # Operations said without a gap.

  def say(self, first: int, size: int, before: int, wrong_share: float, again: bool) -> bool:
    """Writes the line of `size` operations from `first` on; whether a step of it is wrong."""
    results, value, wrong = [], before, False
    for operation in self.operations[first : first + size]:
      value = apply_operation(value, operation)
      if self.rng.random() < wrong_share:
        value, wrong = _wrong(self.rng, value), True
      results.append(value)
    self.lines.append(self._worded(first, results, before, again))
    changed = results[-1] != self.said[first + size - 1]
    self.said[first : first + size] = results
    if not again or changed or self.done == first + size:
      self.done, self.value = first + size, results[-1]
      # What was built on another value is to be said anew.
      self.said[self.done :] = [None] * (len(self.said) - self.done)
    return wrong

  def _worded(self, first: int, results: Sequence[int], before: int, again: bool) -> str:
    group = self.operations[first : first + len(results)]
    body = str(before) + "".join(f"{operation}={result}" for operation, result in zip(group, results))
    if again:
      return f"Wait {body}\n" if self.rng.random() < 0.6 else f"Let me check {body}\n"
    wording = int(self.rng.integers(4)) if len(group) == 1 else 0
    if wording == 1:
      return f"So {before}{group[0]} gives {results[0]}\n"
    if wording == 2:
      return f"Now {before}{group[0]} is {results[0]}\n"
    return f"{body}\n"


def teacher_trace(example: tasks.Example, rng: np.random.Generator, rates: Teacher) -> tasks.Trace:
  """A thought of the sloppy teacher, and the solution and answer that it led to.

  Args:
    example: the question.
    rng: the teacher's randomness.
    rates: how it errs.
  """
  start, operations = _operations(example.question)
  total = len(operations)
  reach = int(rng.integers(total)) if rng.random() < rates.early else total
  writer = _Writer(operations, rng, rates, lines=[], said=[None] * total, value=start)
  pending: tuple[int, int, int] | None = None  # A wrong line to come back to after the next one.
  while writer.done < reach:
    if rng.random() < rates.filler and len(writer.lines) < rates.lines:
      writer.lines.append(_FILLER)
    size = 2 if writer.done + 2 <= reach and rng.random() < rates.pair else 1
    line = (writer.done, size, writer.value)
    wrong = writer.say(*line, rates.wrong, again=False)
    back, pending = pending, None
    if back is None and rng.random() < (rates.notice if wrong else rates.doubt):
      if wrong and rng.random() < 0.5 and writer.done < reach:
        pending = line
      else:
        back = line
    if back is not None and len(writer.lines) < rates.lines:
      writer.say(*back, 1 - rates.mend, again=True)
  values = [start]
  for operation, said in zip(operations, writer.said):
    right = apply_operation(values[-1], operation)
    guessed = right if rng.random() < rates.guess else _wrong(rng, right)
    values.append(guessed if said is None else said)
  written = rng.random() >= rates.direct
  style = STYLES[int(rng.integers(len(STYLES)))]
  return tasks.Trace(
    steps=("".join(writer.lines),),
    solution=solution(values, operations, style) if written else (),
    answer=str(values[-1]),
  )


# ---- Reading a thought -----------------------------------------------------------------------

_BODY = re.compile(r"(?:So |Now |Wait |Let me check )?(\d)((?:[+\-*]\d(?:=| gives | is )\d)+)")
_STEP = re.compile(r"([+\-*]\d)(?:=| gives | is )(\d)")


class Line(NamedTuple):
  """One line of a thought that could be read and stands where the chain was."""

  first: int  # The operation that it begins with.
  again: bool  # It says again what was said before.
  slip: bool  # One of its results is not what its own operation gives.


@dataclasses.dataclass(frozen=True)
class Reading:
  """What a thought's lines say."""

  clean: bool  # Every line could be read and stands where the chain was.
  values: list[int | None]  # After each operation, as last said; None where nothing stands.
  culprit: int | None  # The line of the first wrong value that stands at the end of the thought.
  covered: int  # Operations said, without a gap.
  lines: list[Line]  # Without the filler.


def read_thought(example: tasks.Example, thought: str) -> Reading:
  """Follows a thought line by line; the last line counts only if it has ended.

  A value is wrong if it differs from the true chain's. The culprit is the line in which the first operation that
  ends wrong was first said wrong since it was last right. The thought comes from a model and may be any text.
  """
  start, operations = _operations(example.question)
  true = _values(start, operations)[1:]
  said: list[int | None] = [None] * len(operations)
  since: list[int | None] = [None] * len(operations)  # The line from which on the value is wrong.
  clean, done, lines = True, 0, []
  for number, line in enumerate(thought.split("\n")[:-1]):
    match = _BODY.fullmatch(line)
    if not match:
      clean &= line + "\n" == _FILLER
      continue
    steps = _STEP.findall(match[2])
    again = line.startswith(("Wait", "Let me"))
    first = _place(int(match[1]), [operation for operation, _ in steps], again, done, operations, start, said)
    if first is None:
      clean = False
      continue
    last = first + len(steps)
    befores = [match[1], *(result for _, result in steps)]
    slip = any(apply_operation(int(b), operation) != int(r) for b, (operation, r) in zip(befores, steps))
    lines.append(Line(first, again, slip))
    changed = said[last - 1] != int(steps[-1][1])
    for place, (_, result) in enumerate(steps, first):
      said[place] = int(result)
      wrong = said[place] != true[place]
      since[place] = (number if since[place] is None else since[place]) if wrong else None
    if not again or changed:
      done = last
      said[done:] = since[done:] = [None] * (len(operations) - done)
  culprit = next((line for line, value in zip(since, said) if value is not None and line is not None), None)
  covered = next((i for i, value in enumerate(said) if value is None), len(said))
  return Reading(clean, said, culprit, covered, lines)


def habits(examples: Sequence[tasks.Example], texts: Sequence[str]) -> dict[str, float]:
  """How a policy writes: what its warm start was meant to teach.

  Args:
    examples: the questions.
    texts: a response to each, as `Codec.response` gives it.

  Returns:
    readable: share of traces whose whole thought could be read and that left it.
    copied: share of solution steps with the value that the thought last said, where it said one.
    solved: share of traces that wrote a whole solution.
    noticed_wrong, noticed_right: share of lines, not said again themselves, that one of the next two lines says
      again, among lines with a slip and among lines without.
    thought_lines: mean number of lines of a thought.

    NaN is a share of nothing.
  """
  readable, copied, solved, lines = [], [], [], []
  noticed: dict[bool, list[bool]] = {True: [], False: []}
  for example, text in zip(examples, texts, strict=True):
    thought, left, rest = text.partition(encoding.THINK_CLOSE)
    reading = read_thought(example, thought)
    readable.append(bool(left) and reading.clean and (not thought or thought.endswith("\n")))
    written = re.findall(r"(?:=| gives )(\d)", rest)
    solved.append(len(written) == len(reading.values))
    if solved[-1]:
      copied += [said == int(digit) for said, digit in zip(reading.values, written) if said is not None]
    lines.append(thought.count("\n"))
    for place, line in enumerate(reading.lines):
      if not line.again:
        after = reading.lines[place + 1 : place + 3]
        noticed[line.slip].append(any(other.again and other.first == line.first for other in after))
  mean = lambda x: float(np.mean(x)) if x else float("nan")
  return {
    "readable": mean(readable), "copied": mean(copied), "solved": mean(solved), "noticed_wrong": mean(noticed[True]),
    "noticed_right": mean(noticed[False]), "thought_lines": mean(lines),
  }  # fmt: skip


def _place(
  before: int,
  group: Sequence[str],
  again: bool,
  done: int,
  operations: Sequence[str],
  start: int,
  said: Sequence[int | None],
) -> int | None:
  """The operation that a line begins with: the next one, or, of a line said again, the latest that it fits."""
  places = range(done - len(group), -1, -1) if again else [done]
  for first in places:
    standing = start if first == 0 else said[first - 1]
    if first >= 0 and list(operations[first : first + len(group)]) == list(group) and standing in (None, before):
      return first
  return None
