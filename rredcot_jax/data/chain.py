r"""The embedded task: left-to-right arithmetic modulo 10, one step a line.

    3+4*7-2  ->  3+4=7\n 7*7=9\n 9-2=7\n </think> 7

The question is a start digit and `num_steps` operations, taken from left to
right without precedence. The operations are +d and -d (d = 1..9) and *3, *7,
*9: each is a bijection modulo 10, so one wrong step carried on correctly
always ends in a wrong answer; a trace with wrong steps is right only when a
later mistake undoes an earlier one (`lucky_rate`). So the first wrong step is
well defined, it is where the value of the state truly falls to nearly zero,
and p(rest of the reference | correct prefix) is the policy's success
probability up to those collisions.

The supervised corpus comes from a sloppy teacher (`teacher_trace`): some steps
are wrong on purpose, so that a policy trained on it is partly competent in a
known way and has something to sharpen; and some traces leave the thought early
and answer at once, so that the policy's belief in the answer is meaningful
from a partial thought.
"""

import zlib
from collections.abc import Sequence

import numpy as np

from rredcot_jax.data import encoding, tasks, verifiers
from rredcot_jax.ops import names

OPERATIONS = (*(f"{s}{d}" for s in "+-" for d in range(1, 10)), "*3", "*7", "*9")
SPLITS = ("train", "eval")

# One question in this many, by a hash of its text, is kept for evaluation alone.
_EVAL_SHARE = 8


def apply_operation(value: int, operation: str) -> int:
  """The value after `operation`, modulo 10: `apply_operation(7, "*7") == 9`."""
  operand = int(operation[1:])
  results = {"+": value + operand, "-": value - operand, "*": value * operand}
  return results[operation[0]] % 10


def lucky_rate(num_steps: int, wrong_share: float) -> float:
  """P(right answer | at least one wrong step) of a teacher that errs independently.

  The difference to the true value is zero or not. From zero it becomes nonzero
  with probability e; from nonzero a wrong step makes it zero with e/9, since
  operations are bijections and wrong digits are uniform over the other nine:

      p_{i+1} = p_i (1 - e) + (1 - p_i) e / 9,   p_0 = 1
      rate = (p_n - (1 - e)^n) / (1 - (1 - e)^n)
  """
  if not 0 < wrong_share < 1:
    raise ValueError(f"wrong_share={wrong_share} must lie strictly between 0 and 1.")
  right = 1.0
  for _ in range(num_steps):
    right = right * (1 - wrong_share) + (1 - right) * wrong_share / 9
  never_wrong = (1 - wrong_share) ** num_steps
  return (right - never_wrong) / (1 - never_wrong)


def first_wrong_step(example: tasks.Example, text: str) -> int | None:
  """Index of the first line of `text` that differs from the reference, or None.

  A missing line (thought left early, or cut off) is no wrong step; a line
  beyond the reference's last one is. The answer after `</think>` is not a step.
  """
  thought = text.partition(encoding.THINK_CLOSE)[0]
  lines = [line + "\n" for line in thought.split("\n")[:-1]]
  for index, line in enumerate(lines):
    if index >= len(example.steps) or line != example.steps[index]:
      return index
  return None


class Chain:
  """One split of the task; an infinite family cut at `size` examples.

  Train and evaluation questions are disjoint: a hash of its text says which
  split a question belongs to.
  """

  name = "chain"
  aligned = True  # A thought is the reference solution, line by line.

  def __init__(
    self,
    *,
    split: str,
    size: int = 1 << 20,
    num_steps: int = 8,
    seed: int = 0,
    wrong_share: float = 0.08,
    early_share: float = 0.15,
  ):
    """
    Args:
      split: "train" or "eval".
      size: number of examples.
      num_steps: operations of a question.
      seed: of the questions.
      wrong_share, early_share: of the teacher, see `teacher_trace`.
    """
    names.check_option("split", split, SPLITS)
    if size < 1:
      raise ValueError(f"chain: size={size} yields no prompt; give at least 1.")
    if num_steps < 1:
      raise ValueError(f"chain: num_steps={num_steps} must be at least 1.")
    self.split, self.size, self.num_steps, self.seed = split, size, num_steps, seed
    self._wrong_share, self._early_share = wrong_share, early_share

  def __len__(self) -> int:
    return self.size

  def __getitem__(self, index: int) -> tasks.Example:
    if not 0 <= index < self.size:
      raise IndexError(f"chain: index {index} is outside [0, {self.size}).")
    rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
    while True:
      start = int(rng.integers(10))
      operations = [OPERATIONS[i] for i in rng.integers(len(OPERATIONS), size=self.num_steps)]
      question = str(start) + "".join(operations)
      if (zlib.crc32(question.encode()) % _EVAL_SHARE == 0) == (self.split == "eval"):
        return make_example(start, operations)

  def reward(self, example: tasks.Example, text: str) -> float:
    """1 if the answer after the last `</think>` is the gold one to the letter, else 0."""
    return verifiers.exact_match(text, example.answer)

  def teacher_trace(self, example: tasks.Example, rng: np.random.Generator) -> tasks.Trace:
    """A trace of the sloppy teacher; see the function of this name."""
    text = teacher_trace(example, rng, wrong_share=self._wrong_share, early_share=self._early_share)
    thought, _, answer = text.partition(encoding.THINK_CLOSE)
    return tasks.Trace((thought,), answer)

  def first_wrong_step(self, example: tasks.Example, text: str) -> int | None:
    """See the function of this name."""
    return first_wrong_step(example, text)

  def answer_stated(self, example: tasks.Example, text: str) -> bool:
    """Whether all steps are written: a digit alone says nothing about the answer before."""
    return text.count("\n") >= len(example.steps)


def make_example(start: int, operations: Sequence[str]) -> tasks.Example:
  """The example of a start digit and its operations, with its reference steps."""
  steps, value = [], start
  for operation in operations:
    result = apply_operation(value, operation)
    steps.append(f"{value}{operation}={result}\n")
    value = result
  return tasks.Example(question=str(start) + "".join(operations), steps=tuple(steps), answer=str(value))


def teacher_trace(example: tasks.Example, rng: np.random.Generator, *, wrong_share: float, early_share: float) -> str:
  """A trace of the sloppy teacher, `</think>` and answer included.

  Args:
    example: the question.
    rng: the teacher's randomness.
    wrong_share: probability that a step's result is one of the nine wrong digits, uniformly;
      the teacher carries on from what it wrote.
    early_share: probability that the trace leaves the thought before a uniformly drawn step
      and answers with the true end of the chain from the value reached so far.
  """
  operations = [step.rstrip("\n").partition("=")[0][1:] for step in example.steps]
  value = int(example.question[0])
  early = rng.random() < early_share
  written = int(rng.integers(len(operations))) if early else len(operations)
  lines = []
  for operation in operations[:written]:
    result = apply_operation(value, operation)
    if rng.random() < wrong_share:
      result = (result + int(rng.integers(1, 10))) % 10
    lines.append(f"{value}{operation}={result}\n")
    value = result
  for operation in operations[written:]:
    value = apply_operation(value, operation)
  return "".join(lines) + encoding.THINK_CLOSE + str(value)
