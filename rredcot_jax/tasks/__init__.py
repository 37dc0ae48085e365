"""Tasks: where questions, reference solutions and rewards come from.

A trace is laid out as

    question <think> step_1 .. step_n </think> answer <eos>

of which `prompt_ids` makes the part up to and including `<think>`, and the
policy writes the rest. Each piece is encoded on its own and the ids are joined,
never the texts, so that every boundary between pieces is a token position. A
tokenizer with a chat template has the question wrapped in it, up to where the
assistant speaks; a tokenizer without the markers writes them as plain text.

A question may hold any text. It is encoded so that no marker or special token
written in it becomes the token of that name: only this file puts those in.
"""

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any, Protocol

import transformers

from rredcot_jax import types

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"

# A place between the first and the second character of a marker.
_INSIDE_MARKER = re.compile("(?<=<)(?=think>|/think>)")
# Stands for the question while a chat template is rendered, so that the question itself is never parsed with it.
_PLACEHOLDER = "\ue000question\ue000"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


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


def load_tokenizer(path: str | pathlib.Path, *, chat: bool = True) -> transformers.PreTrainedTokenizerFast:
  """Loads a tokenizer from a local directory in Hugging Face's format, or from a GGUF file; never a hub.

  Args:
    path: the directory or `.gguf` file.
    chat: whether its chat template, if it has one, is to wrap the question.

  Raises:
    FileNotFoundError: naming the file that is missing.
    ValueError: if the tokenizer has no end-of-sequence token.
  """
  path = pathlib.Path(path)
  if path.suffix == ".gguf":
    from rredcot_jax.model import gguf

    tokenizer = gguf.GgufFile(path).tokenizer()
  else:
    for name in _TOKENIZER_FILES:
      if not (path / name).is_file():
        raise FileNotFoundError(f"No tokenizer in {str(path)!r}: the file {name!r} is missing there.")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
  if tokenizer.eos_token_id is None:
    raise ValueError(f"The tokenizer in {str(path)!r} names no eos_token; answers could not end.")
  if tokenizer.pad_token_id is None:  # Masks say what padding is; the id only fills the place.
    tokenizer.pad_token = tokenizer.eos_token
  if not chat:
    tokenizer.chat_template = None
  return tokenizer


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
    from rredcot_jax.tasks.chain import Chain

    return Chain(split=split, **options)

  from rredcot_jax.tasks import datasets, reasoning_gym

  prefix, _, dataset = name.partition("/")
  if prefix == "dataset" and dataset:
    return datasets.Dataset(dataset, split=split, **options)
  if prefix == "reasoning_gym" and dataset:
    return reasoning_gym.ReasoningGym(dataset, split=split, **options)
  corpora = (f"dataset/{dataset}" for dataset in datasets.SCHEMAS)
  valid = ("chain", *corpora, *(f"reasoning_gym/{dataset}" for dataset in reasoning_gym.DATASETS))
  types.check_option("task", name, valid)
  raise AssertionError(f"Unreachable: {name!r} passed for a valid name.")


def prompt_ids(tokenizer: transformers.PreTrainedTokenizerFast, example: Example) -> list[int]:
  """Ids of the question, in the tokenizer's chat template if it has one, then of the marker that opens the thought."""
  before, after = _frame(tokenizer)
  return [*before, *_encode(tokenizer, example.question), *after]


def solution_ids(tokenizer: transformers.PreTrainedTokenizerFast, example: Example) -> list[list[int]]:
  """Ids of the reference solution, one list a step; [] where there is none."""
  return [_encode(tokenizer, step) for step in example.steps]


def answer_ids(tokenizer: transformers.PreTrainedTokenizerFast, example: Example) -> list[int]:
  """Ids of the gold answer, then the end-of-sequence token."""
  return [*_encode(tokenizer, example.answer), tokenizer.eos_token_id]


def exit_ids(tokenizer: transformers.PreTrainedTokenizerFast) -> list[int]:
  """Ids of the marker that leaves the thought."""
  return _marker_ids(tokenizer, THINK_CLOSE)


def token_texts(tokenizer: transformers.PreTrainedTokenizerFast) -> list[str]:
  """The text of every id in [0, len(tokenizer)), special tokens as their literal.

  A byte-level token that is not valid UTF-8 on its own reads as U+FFFD; an id
  that the vocabulary leaves out reads as "".
  """
  return [decode(tokenizer, [token]) for token in range(len(tokenizer))]


def decode(tokenizer: transformers.PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
  """The text of `ids`, special tokens as their literal; for verifiers and reports only.

  Never raises: ids outside the vocabulary are left out, broken UTF-8 reads as
  U+FFFD. Its result must not be encoded again: that is not the inverse.
  """
  known = [int(token) for token in ids if 0 <= token < len(tokenizer)]
  return str(tokenizer.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _frame(tokenizer: transformers.PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
  """Ids before and after the question; the template is trusted text, in which special tokens are recognised."""
  marker = _marker_ids(tokenizer, THINK_OPEN)
  if not tokenizer.chat_template:
    # Some tokenizers begin every text with a token of their own.
    opening = [token for token in tokenizer.encode("") if token != tokenizer.eos_token_id]
    return opening, marker
  chat = [{"role": "user", "content": _PLACEHOLDER}]
  text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
  before, found, after = text.partition(_PLACEHOLDER)
  if not found or _PLACEHOLDER in after:
    raise ValueError("The tokenizer's chat template does not hold the question once; load it with chat=False.")
  encode = lambda piece: list(tokenizer.encode(piece, add_special_tokens=False))
  # Some templates open the thought themselves.
  return encode(before), encode(after) + ([] if after.rstrip().endswith(THINK_OPEN) else marker)


def _encode(tokenizer: transformers.PreTrainedTokenizerFast, text: str) -> list[int]:
  """Ids of untrusted text, in which no marker or special token is recognised."""
  # `split_special_tokens` covers the tokens that a tokenizer calls special. Some (Qwen3's) list the markers as
  # ordinary added tokens, which it does not cover, so a marker is also taken apart in the text.
  pieces = _INSIDE_MARKER.split(text)
  encoded = [tokenizer.encode(p, add_special_tokens=False, split_special_tokens=True) for p in pieces if p]
  return [token for ids in encoded for token in ids]


def _marker_ids(tokenizer: transformers.PreTrainedTokenizerFast, marker: str) -> list[int]:
  """The marker's own token, or its text's tokens where the vocabulary has none."""
  token = tokenizer.get_vocab().get(marker)
  return _encode(tokenizer, marker) if token is None else [token]
