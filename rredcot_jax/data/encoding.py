"""Text becomes token ids, and token ids text, here and nowhere else.

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

import re
from collections.abc import Sequence

import transformers

from rredcot_jax.data.tasks import Example

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"

# A place between the first and the second character of a marker.
_INSIDE_MARKER = re.compile("(?<=<)(?=think>|/think>)")
# Stands for the question while a chat template is rendered, so that the question itself is never parsed with it.
_PLACEHOLDER = "\ue000question\ue000"


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
