"""Text becomes token ids, and token ids become text, here and nowhere else.

A prompt and its response are laid out as

    question <think> thought exit solution answer <eos>

`Codec.prompt_ids` makes the part up to and including `<think>`, and the policy writes the rest. The
exit is `Layout.exit`, such as "\n</think>\n\n", and the answer is written into `Layout.answer`, such as
"\boxed{%s}". In a task whose reference steps are the thought itself, no solution follows the exit.

Each piece is encoded on its own and the ids are joined, never the texts, so every boundary between
pieces is a token position. A tokenizer with a chat template has the question wrapped in it, up to
where the assistant speaks. A tokenizer without the markers writes them as plain text.

A question may hold any text. It is encoded so that no marker or special token written in it becomes
the token of that name: only this file puts those in.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np
import transformers

from rredcot_jax.data.tasks import Example, Trace
from rredcot_jax.model.tokenizer import encode_piece, render_chat
from rredcot_jax.ops import anatomy, banks, segmentation, types

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"

# A place between the first and the second character of a marker.
_INSIDE_MARKER = re.compile("(?<=<)(?=think>|/think>)")
# Stands for the question while a chat template is rendered, so that the question itself is never parsed with it.
_PLACEHOLDER = "\ue000question\ue000"


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a model writes what follows its thought.

  Attributes:
    exit: the text that leaves the thought. White space around the marker belongs to it.
    answer: the text of an answer, with "%s" once in the place of the answer itself.
  """

  exit: str = THINK_CLOSE
  answer: str = "%s"

  def __post_init__(self) -> None:
    if not self.marker:
      raise ValueError(f"response.exit={self.exit!r} must hold more than white space: it is what ends the thought.")
    if self.answer.count("%s") != 1:
      raise ValueError(f"response.answer={self.answer!r} must hold '%s' once, in the place of the answer.")

  @property
  def marker(self) -> str:
    """The exit without the white space around it: what a trace is searched for."""
    return self.exit.strip()

  def write(self, answer: str) -> str:
    """The text of `answer`."""
    return self.answer.replace("%s", answer)


@dataclasses.dataclass(frozen=True)
class Codec:
  """A model's tokenizer and how a response is written with it.

  Attributes:
    tokenizer: the model's. It has an end-of-sequence and a padding token (see `model.tokenizer.load_tokenizer`).
    chat: whether the tokenizer's chat template, if it has one, wraps the question.
    layout: how the model writes what follows its thought.
    end_ids: all ids that end a trace; () is the tokenizer's end-of-sequence token alone.
  """

  tokenizer: transformers.PreTrainedTokenizerFast
  chat: bool = True
  layout: Layout = Layout()
  end_ids: tuple[int, ...] = ()

  def __post_init__(self) -> None:
    if not self.end_ids:
      object.__setattr__(self, "end_ids", (self.eos_id,))

  @property
  def vocab_size(self) -> int:
    """The number of token ids that the tokenizer knows."""
    return len(self.tokenizer)

  @property
  def eos_id(self) -> int:
    """The id that a reference ends with; a trace may end with any of `end_ids`."""
    return int(self.tokenizer.eos_token_id)

  @property
  def pad_id(self) -> int:
    """The id that fills places without a token. Masks say which places those are."""
    return int(self.tokenizer.pad_token_id)

  # ---- Text to ids -------------------------------------------------------------------------

  def prompt_ids(self, example: Example) -> list[int]:
    """Ids of the question, in the chat template if there is one, then of the marker that opens the thought."""
    before, after, begins = self._frame
    return [*before, *self._encode(example.question, begins=begins), *after]

  def solution_ids(self, example: Example) -> list[list[int]]:
    """Ids of the reference solution, one list a step; [] where there is none."""
    return [self._encode(step) for step in example.steps]

  def answer_ids(self, example: Example) -> list[int]:
    """Ids of the gold answer in its template, then the end-of-sequence token."""
    return [*self._encode(self.layout.write(example.answer)), self.eos_id]

  def trace_ids(self, trace: Trace) -> list[int]:
    """Ids of a whole response: thought, exit, solution, answer, end."""
    pieces = lambda texts: [token for text in texts for token in self._encode(text)]
    answer = [*self._encode(self.layout.write(trace.answer)), self.eos_id]
    return [*pieces(trace.steps), *self.exit_ids, *pieces(trace.solution), *answer]

  @functools.cached_property
  def exit_ids(self) -> list[int]:
    """Ids of the exit: its marker's own token where the vocabulary has one, and the white space around it."""
    before, _, after = self.layout.exit.partition(self.layout.marker)
    if self.layout.marker not in self.tokenizer.get_vocab():
      return self._encode(self.layout.exit)
    return [*self._encode(before), *self._marker_ids(self.layout.marker), *self._encode(after)]

  def reference(self, example: Example, *, aligned: bool = True) -> banks.Reference:
    """The reference solutions and the answer as token ids, for the banks.

    Args:
      example: the question.
      aligned: whether the model's thought follows the reference line by line, see `tasks.Task`.
    """
    return banks.Reference(
      self.solution_ids(example), self.exit_ids, self.answer_ids(example),
      solutions=[[self._encode(step) for step in steps] for steps in example.solutions], aligned=aligned,
    )  # fmt: skip

  # ---- Ids to text -------------------------------------------------------------------------

  def decode(self, ids: Sequence[int]) -> str:
    """The text of `ids`, special tokens as their literal; for verifiers and reports only.

    Never raises: ids outside the vocabulary are left out, broken UTF-8 reads as U+FFFD. Its result
    must not be encoded again, because that is not the inverse.
    """
    known = [int(token) for token in ids if 0 <= token < len(self.tokenizer)]
    return str(self.tokenizer.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False))

  def response(self, ids: Sequence[int]) -> str:
    """The text of a trace as verifiers read it: without the tokens that end it, and with `</think>` as its exit."""
    text = self.decode([token for token in ids if token not in self.end_ids])
    return text if self.layout.marker == THINK_CLOSE else text.replace(self.layout.marker, THINK_CLOSE, 1)

  def responses(self, rollout: types.Rollout) -> list[str]:
    """`response` of each trace of a batch on the host."""
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    return [self.response(row[kept].tolist()) for row, kept in zip(tokens, mask)]

  def token_texts(self) -> list[str]:
    """The text of every id in [0, vocab_size), special tokens as their literal.

    A byte-level token that is not valid UTF-8 on its own reads as U+FFFD. An id that the vocabulary
    leaves out reads as "".
    """
    return [self.decode([token]) for token in range(len(self.tokenizer))]

  @functools.cached_property
  def tables(self) -> segmentation.VocabTables:
    """What segmentation reads of the vocabulary; each keyword in both spellings that open a word."""
    spellings = [spelling for word in segmentation.KEYWORDS for spelling in (word, " " + word)]
    encoded = [encode_piece(self.tokenizer, spelling) for spelling in spellings]
    unknown = self.tokenizer.unk_token_id
    known = [ids for ids in encoded if unknown is None or unknown not in ids]
    return segmentation.vocab_tables(self.token_texts(), known)

  @functools.cached_property
  def exit_table(self) -> anatomy.ExitTable:
    """What recognises the exit in every tokenisation of its marker."""
    return anatomy.exit_table(self.token_texts(), self.layout.marker)

  # ---- Pieces ------------------------------------------------------------------------------

  @functools.cached_property
  def _frame(self) -> tuple[list[int], list[int], bool]:
    """Ids before and after the question, and whether the question is where the tokenizer sees a text begin.

    The template is trusted text, in which special tokens are recognised.
    """
    tokenizer, marker = self.tokenizer, self._marker_ids(THINK_OPEN)
    if not (self.chat and tokenizer.chat_template):
      # Some tokenizers begin every text with a token of their own.
      opening = [token for token in tokenizer.encode("") if token != tokenizer.eos_token_id]
      return opening, marker, True
    chat = [{"role": "user", "content": _PLACEHOLDER}]
    text = render_chat(tokenizer, chat)
    before, found, after = text.partition(_PLACEHOLDER)
    if not found or _PLACEHOLDER in after:
      raise ValueError("The tokenizer's chat template does not hold the question once; set tokenizer.chat=False.")
    opening = list(tokenizer.encode(before, add_special_tokens=False))
    # Behind nothing, and with some tokenizers behind a special token, the text begins with the question.
    begun = [*opening, *encode_piece(tokenizer, "a", begins=True)]
    begins = tokenizer.encode(before + "a", add_special_tokens=False) == begun
    # Some templates open the thought themselves.
    closing = [] if after.rstrip().endswith(THINK_OPEN) else marker
    return opening, encode_piece(tokenizer, after, special=True) + closing, begins

  def _encode(self, text: str, *, begins: bool = False) -> list[int]:
    """Ids of untrusted text, in which no marker or special token is recognised; for `begins` see `encode_piece`."""
    # `split_special_tokens` covers the tokens that a tokenizer calls special. Some (Qwen3's) list the markers as
    # ordinary added tokens, which it does not cover, so a marker is also taken apart in the text.
    pieces = [piece for piece in _INSIDE_MARKER.split(text) if piece]
    encoded = [encode_piece(self.tokenizer, piece, begins=begins and not i) for i, piece in enumerate(pieces)]
    return [token for ids in encoded for token in ids]

  def _marker_ids(self, marker: str) -> list[int]:
    """The marker's own token, or its text's tokens where the vocabulary has none."""
    token = self.tokenizer.get_vocab().get(marker)
    return self._encode(marker) if token is None else [token]
