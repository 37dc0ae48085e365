"""Tasks: where questions, reference solutions and rewards come from.

A task of one's own is a class with the members of `Task`, named in a config as
`task.name="my_package.my_module:MyTask"`. It is called with `split` and `task.options`.
docs/extending.md shows one.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from rredcot_jax.ops import names


@dataclasses.dataclass(frozen=True)
class Example:
  """One question and what is known about its answer."""

  question: str  # The prompt's text, without the token that opens the thought.
  steps: tuple[str, ...]  # "".join(steps) is the reference solution; () where the source has none.
  answer: str  # The gold final answer.
  entry: Any = None  # Whatever the task's verifier needs.
  solutions: tuple[tuple[str, ...], ...] = ()  # Further reference solutions with the same answer, each like `steps`.


class Task(Protocol):
  """One split of a source of examples, with its verifier.

  Optional members, each read where it is there:
    `teacher_trace(example, rng) -> Trace`, a trace to imitate in a supervised warm start; else the reference is.
    `first_wrong_step(example, text) -> int | None`, the line of the thought in which the first mistake was made.
    `answer_stated(example, text) -> bool`, whether the beginning `text` of a trace has stated its answer.
    `fingerprint: str`, a hash of the examples, where they come from files: a run is not resumed with another one.
    `aligned: bool`, whether a thought follows the reference solution line by line, so that the `suffix` bank can go
      on with the reference from where a thought stands; False where it is missing.
    `max_solutions: int`, the most reference solutions of an example, so that no room is made for more; where it is
      missing there is room for `credit.bank_size`.
  """

  name: str

  def __len__(self) -> int:
    """The number of examples in this split."""
    ...

  def __getitem__(self, index: int) -> Example:
    """The example at `index`, a function of (seed, split, index) alone."""
    ...

  def reward(self, example: Example, text: str) -> float:
    """The verifier's reward in [0, 1] for a response; it reads the final answer only.

    `text` is the decoded trace: `</think>` literal, without end-of-sequence
    and padding. It comes from a model, so it may be any text and never raises.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Trace:
  """A trace to imitate, as text."""

  steps: Sequence[str]  # The thought; each piece is encoded on its own.
  answer: str  # As `Example.answer`.
  solution: Sequence[str] = ()  # What stands between the exit and the answer.


def teacher_of(task: Task) -> Callable[[Example, np.random.Generator], Trace]:
  """Who writes the traces that a warm start imitates: the task's `teacher_trace`, or else its references."""
  reference: Callable[[Example, np.random.Generator], Trace] = lambda example, _: Trace(example.steps, example.answer)
  return getattr(task, "teacher_trace", reference)


def first_wrong_step(task: Task, example: Example, text: str) -> int | None:
  """The task's `first_wrong_step`; None where it has none."""
  find = getattr(task, "first_wrong_step", None)
  return None if find is None else find(example, text)


def make_task(name: str, *, split: str, **options: Any) -> Task:
  """Makes the task called `name`.

  Args:
    name: "chain", "think", "reasoning_gym/<data set>", "dataset/<corpus>", or "package.module:Class" of one's own.
    split: "train" or "eval".
    **options: passed on to the task's class.

  Raises:
    ValueError: if `name` is unknown (the nearest valid name is offered), or if
      the task refuses an option.
  """
  if ":" in name:
    return names.resolve("task.name", name, {})(split=split, **options)
  if name == "chain":
    from rredcot_jax.data.chain import Chain

    return Chain(split=split, **options)
  if name == "think":
    from rredcot_jax.data.think import Think

    return Think(split=split, **options)

  from rredcot_jax.data import datasets, reasoning_gym

  prefix, _, dataset = name.partition("/")
  if prefix == "dataset" and dataset:
    return datasets.Dataset(dataset, split=split, **options)
  if prefix == "reasoning_gym" and dataset:
    return reasoning_gym.ReasoningGym(dataset, split=split, **options)
  corpora = (f"dataset/{dataset}" for dataset in datasets.SCHEMAS)
  valid = ("chain", "think", *corpora, *(f"reasoning_gym/{dataset}" for dataset in reasoning_gym.DATASETS))
  names.check_option("task", name, valid)
  raise AssertionError(f"Unreachable: {name!r} passed for a valid name.")
