"""Tasks: where questions, reference solutions and rewards come from."""

import dataclasses
from typing import Any, Protocol

import transformers

from rredcot_jax.ops import types


@dataclasses.dataclass(frozen=True)
class Example:
  """One question and what is known about its answer."""

  question: str  # The prompt's text, without the token that opens the thought.
  steps: tuple[str, ...]  # "".join(steps) is the reference solution; () where the source has none.
  answer: str  # The gold final answer.
  entry: Any = None  # Whatever the task's verifier needs.


class Task(Protocol):
  """One split of a source of examples, with its verifier and its tokenizer."""

  name: str
  tokenizer: transformers.PreTrainedTokenizerFast

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


def make_task(name: str, *, split: str, **options: Any) -> Task:
  """Makes the task called `name`: "chain", "reasoning_gym/<data set>" or "dataset/<corpus>".

  Args:
    name: the task's name.
    split: "train" or "eval".
    **options: passed on to the task's class.

  Raises:
    ValueError: if `name` is unknown (the nearest valid name is offered), or if
      the task refuses an option.
  """
  if name == "chain":
    from rredcot_jax.data.chain import Chain

    return Chain(split=split, **options)

  from rredcot_jax.data import datasets, reasoning_gym

  prefix, _, dataset = name.partition("/")
  if prefix == "dataset" and dataset:
    return datasets.Dataset(dataset, split=split, **options)
  if prefix == "reasoning_gym" and dataset:
    return reasoning_gym.ReasoningGym(dataset, split=split, **options)
  corpora = (f"dataset/{dataset}" for dataset in datasets.SCHEMAS)
  valid = ("chain", *corpora, *(f"reasoning_gym/{dataset}" for dataset in reasoning_gym.DATASETS))
  types.check_option("task", name, valid)
  raise AssertionError(f"Unreachable: {name!r} passed for a valid name.")
