"""Reasoning Gym's data sets as tasks: generated questions, with the library's own scorers.

Splits. The library seeds item `i` with `seed + i`, so two seeds that lie closer
than a data set's size give the same items again, and even distant seeds meet in
templates with few variants. Splits are therefore not made by seed: a hash of
its question sends every question to train (three in four) or to eval (one in
four). No question is in both, for any seed, size and options of the two.

Scorers. The library's scorers were written for trusted text: some evaluate the
answer as Python. Only data sets with the base class's scorer (a comparison of
strings) or with one that has been read and found safe are offered, and a scorer
sees the final answer only, never the thought. Where a scorer pays for more than the
right answer, a guard of ours has to agree with it (`_GUARDS`).

Examples whose gold answer its own scorer does not give full marks are left out:
in them no policy could be right.
"""

import dataclasses
import hashlib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import reasoning_gym as library
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS as _LIBRARY_DATASETS

from rredcot_jax.data import verifiers
from rredcot_jax.data.encoding import THINK_CLOSE
from rredcot_jax.data.tasks import Example
from rredcot_jax.ops import names

SPLITS = ("train", "eval")
_SCORERS = {"library": None, "numeric": verifiers.numeric_match, "exact": verifiers.exact_match}

# Items of the library that stand behind one example, of which the first in the split is taken. A train example needs
# 1.3 of them on average, an eval example 4; all 64 fall outside eval with probability 1e-8.
_CANDIDATES = 64
_MAX_TEMPLATES = 100  # Of one data set: with k chosen, 100 / k times as many items are needed.

# Data sets whose own scorer was read in version 0.1.19 of the library's source (0.1.25 of its package): it compares
# strings or reads numbers with int, float or Decimal, in time linear in an answer that is capped in length.
_SCORER_READ = frozenset(
  """
  ab bitwise_arithmetic chain_sum circuit_logic color_cube_rotation decimal_chain_sum dice
  emoji_mystery family_relationships futoshiki gsm_symbolic knights_knaves manipulate_matrix
  mini_sudoku needle_haystack number_format palindrome_generation path_star products rectangle_count
  self_reference sentence_reordering shortest_path spell_backward sudoku tsumego word_sorting
  zebra_puzzles
  """.split()
)

_CLAUSE = r"[^\W\d_]+\s+is\s+an?\s+[^\W\d_]+"
_CLAUSES = re.compile(rf"{_CLAUSE}(?:\s*(?:,\s*and|,|\band)\s+{_CLAUSE})*\s*\.?", re.IGNORECASE)


def _is_the_number(answer: str, entry: Mapping[str, Any]) -> bool:
  """gsm_symbolic's scorer takes the first number in the answer, so that `5 or 7` is paid for 5, and loses its sign."""
  number = verifiers.parse_number(answer)
  return number is not None and number == verifiers.parse_number(str(entry["answer"]))


def _says_nothing_else(answer: str, entry: Mapping[str, Any]) -> bool:
  """knights_knaves' scorer drops words that it does not know, such as those of `it is false that A is a knight`."""
  clauses = _CLAUSES.fullmatch(answer)
  return clauses is not None and len(re.findall(_CLAUSE, answer, re.IGNORECASE)) == len(entry["metadata"]["names"])


def _has_as_many_words(answer: str, entry: Mapping[str, Any]) -> bool:
  """word_sorting's scorer compares as many words as there should be and reads no further."""
  return len(answer.split(",")) == len(entry["metadata"]["sorted_words"])


# What has to hold beside full marks of the library's scorer, where that can be cheated.
_GUARDS: Mapping[str, Callable[[str, Mapping[str, Any]], bool]] = {
  "gsm_symbolic": _is_the_number,
  "knights_knaves": _says_nothing_else,
  "word_sorting": _has_as_many_words,
}

_EVALUATES = "its scorer evaluates the answer as Python"
_PARSES = "its scorer hands the answer to sympy's parser, which evaluates it as Python"
_VARIES = "its questions change with PYTHONHASHSEED, so that a resumed run or another host would see other ones"
_WHY_REFUSED = {
  **dict.fromkeys(("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"), _EVALUATES),
  **dict.fromkeys(("countdown", "puzzle24", "simple_integration", "intermediate_integration"), _PARSES),
  "polynomial_multiplication": _PARSES,
  **dict.fromkeys(("isomorphic_strings", "list_functions", "ransom_note", "word_ladder"), _VARIES),
  "coin_flip": "its scorer writes out numbers such as 1e999999999, which takes hours",
  "game_of_life_halting": "its scorer gives full marks to any answer",
}

DATASETS = tuple(
  sorted(
    name
    for name, (dataset_class, _) in _LIBRARY_DATASETS.items()
    if name in _SCORER_READ
    or (dataset_class.score_answer is ProceduralDataset.score_answer and name not in _WHY_REFUSED)
  )
)


class ReasoningGym:
  """One split of a data set of Reasoning Gym.

  Args:
    dataset: a name in `DATASETS`, such as "gsm_symbolic".
    split: "train" or "eval".
    size: number of examples; a longer split begins with the examples of a
      shorter one.
    seed: of the library's generator.
    options: further fields of the data set's configuration in the library.
    scorer: what judges a final answer. "library": the data set's own scorer.
      "numeric" and "exact": `verifiers.numeric_match` and `verifiers.exact_match`
      against the gold answer; "package.module:function" of one's own likewise.
    partial_credit: whether the library's scores between 0 and 1 are passed on.
      Off, they count as 0: the base class pays 0.5 for "42" where "4" is right,
      and gsm_symbolic 0.01 for any number.
    templates: numbers of the templates that examples are taken from, for data
      sets of the library that have them (gsm_symbolic); () is all.
    aligned: whether the model was trained to think as the reference solutions are written, line by line.

  Raises:
    ValueError: on an unknown name or option (the nearest valid one is offered),
      on a data set whose scorer is not safe, and on a task that yields no prompt.
  """

  def __init__(
    self,
    dataset: str,
    *,
    split: str,
    size: int = 1000,
    seed: int = 0,
    options: Mapping[str, Any] = MappingProxyType({}),
    scorer: str = "library",
    partial_credit: bool = False,
    templates: Sequence[int] = (),
    aligned: bool = False,
  ):
    _check_dataset(dataset)
    names.check_option("split", split, SPLITS)
    self._match = names.resolve("task.options.scorer", scorer, _SCORERS)
    if size < 1:
      raise ValueError(f"size={size} of {dataset!r} makes a task that yields no prompt.")
    self.name = f"reasoning_gym/{dataset}"
    self.aligned = aligned
    self._split = split
    self._size = size
    self._candidates = _CANDIDATES * (-(-_MAX_TEMPLATES // len(templates)) if templates else 1)
    self._library = _make_library_dataset(dataset, seed, size * self._candidates, options)
    self._templates = frozenset(templates)
    if self._templates:
      of_item = getattr(self._library, "task_indices", None)
      if of_item is None:
        raise ValueError(f"The data set {dataset!r} has no templates; leave out templates={tuple(templates)}.")
      unknown = sorted(self._templates - set(of_item))
      if unknown:
        raise ValueError(f"Template {unknown[0]} of {dataset!r} does not exist: {sorted(set(of_item))} do.")
    self._partial_credit = partial_credit
    _ = self[0]  # Raises if the options leave no example.

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index: int) -> Example:
    """The example at `index`, a function of (seed, split, index) and the options alone.

    Raises:
      IndexError: unless 0 <= index < len(self).
      ValueError: if none of the library's items behind this index is in the split.
    """
    index = operator.index(index)
    if not 0 <= index < self._size:
      raise IndexError(f"Example {index} of {self.name}, which has {self._size}.")
    for item in range(index * self._candidates, (index + 1) * self._candidates):
      if self._templates and self._library.task_indices[item] not in self._templates:
        continue
      entry = self._library[item]
      if split_of(entry["question"]) == self._split:
        answer = str(entry["answer"])
        example = Example(entry["question"], solution_steps(entry), answer, entry)
        if self.reward(example, THINK_CLOSE + answer) == 1.0:
          return example
    raise ValueError(
      f"{self.name} is a task that yields no prompt for split {self._split!r} at index {index}: each of "
      f"{self._candidates} generated questions is in the other split or has a gold answer that its scorer rejects."
    )

  def reward(self, example: Example, text: str) -> float:
    """See `Task.reward`."""
    if self._match is not None:
      return self._match(text, example.answer)
    return self._library_score(example, text)

  def _library_score(self, example: Example, text: str) -> float:
    answer = verifiers.final_answer(text)
    if answer is None:
      return 0.0
    try:
      score = float(self._library.score_answer(answer, example.entry))
      if score == 1.0:
        guard = _GUARDS.get(self.name.removeprefix("reasoning_gym/"))
        return 1.0 if guard is None or guard(answer, example.entry) else 0.0
    except Exception:  # A scorer trips over text that it cannot read: a wrong answer, and no reason to end a run.
      return 0.0
    return score if self._partial_credit and 0.0 <= score < 1.0 else 0.0


def split_of(question: str) -> str:
  """The split that a question belongs to: "eval" for one question in four, by its hash."""
  return "eval" if hashlib.blake2b(question.encode(errors="replace")).digest()[0] < 64 else "train"


def solution_steps(entry: Mapping[str, Any]) -> tuple[str, ...]:
  """The reference solution in the library's entry, one step a line, () where there is none.

  A step ends with its newlines, blank lines after it included. The last line,
  `#### 42`, is the answer and no step.
  """
  solution = entry["metadata"].get("answer_cot")
  if solution is None:
    return ()
  body, mark, _ = solution.rpartition("\n####")
  if not mark:
    raise ValueError(f"The reference solution has no line '#### <answer>': {solution!r}.")
  return tuple(re.findall(r"\n*[^\n]+\n*", body + "\n"))


def _check_dataset(dataset: str) -> None:
  if dataset in _LIBRARY_DATASETS and dataset not in DATASETS:
    why = _WHY_REFUSED.get(dataset, "its scorer has not been read for what it does with a hostile answer")
    raise ValueError(f"The data set {dataset!r} of reasoning_gym is refused: {why}.")
  names.check_option("dataset", dataset, DATASETS)


def _make_library_dataset(dataset: str, seed: int, size: int, options: Mapping[str, Any]) -> ProceduralDataset:
  fields = [f.name for f in dataclasses.fields(_LIBRARY_DATASETS[dataset][1]) if f.name not in ("seed", "size")]
  for option in options:
    names.check_option(f"option of {dataset}", option, fields)
  try:
    return library.create_dataset(dataset, seed=seed, size=size, **options)
  except AssertionError as error:  # The library's way to refuse a value.
    raise ValueError(f"reasoning_gym refuses {dict(options)} for {dataset!r}: {error}") from error
