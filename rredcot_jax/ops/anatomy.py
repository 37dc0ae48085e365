r"""Where the parts of a response are: the thought, the exit, what follows it, and the end.

A reasoning model writes `thought, exit, solution, end`; for Qwen3 and DeepSeek-R1

    7*8 = 54. Wait, 7*8 = 56.\n</think>\n\nThe product is\n\n\[ \boxed{56} \]\n<|im_end|>

The exit is recognised by a *marker*, here `</think>`. A vocabulary can spell it in many
ways: as one token of its own, as several ("</", "think", ">"), with text of the thought
before it (".</") or of the solution after it (">\n\n"). `find_exit` finds it in every one
of them, from token ids and an `ExitTable` that is made once per tokenizer. Nothing is
decoded.

Written for one trace `[T]`; vmap over a batch. All of it is our choice [C].
"""

import dataclasses
from collections.abc import Sequence
from typing import AnyStr

import chex
import jax.numpy as jnp
import numpy as np

from rredcot_jax.ops import checks
from rredcot_jax.ops.types import pytree

# Bits of the integers in an `ExitTable`: the longest marker, in bytes or in ids.
MAX_MARKER = 32


@pytree
class ExitTable:
  """How each token of a vocabulary of `V` moves the search for the exit, in `M` spellings of it.

  A spelling is a string of `m <= MAX_MARKER` symbols: bytes of text, or ids. Bit `s` of an
  integer stands for "the first s symbols of the spelling have been read". Ids outside
  `[0, V)`, and ids without text, are no part of any exit.
  """

  begins: chex.Array  # [M, V] uint32, bit s in [1, m): the token ends in the first s symbols.
  continues: (
    chex.Array
  )  # [M, V] uint32, bit s: after s symbols the whole token is symbols of the spelling, not its last.
  finishes: (
    chex.Array
  )  # [M, V] uint32, bit s: after s symbols the token begins with all the rest; bit 0: holds them all.
  lengths: chex.Array  # [V] uint32, symbols of the token, MAX_MARKER if there are more.
  longest: int = dataclasses.field(metadata={"static": True})  # Symbols of the longest spelling.


def exit_table(token_texts: Sequence[str] | Sequence[bytes], marker: str | bytes) -> ExitTable:
  """The table that recognises `marker` in every tokenisation of it. Runs on the host, once per tokenizer.

  Args:
    token_texts: the text of every token id, in order: as decoded alone, or as bytes. Special
      tokens are given as their literal. Text is enough where the marker is ASCII; a marker
      with other characters may be split within a character, so it needs bytes.
    marker: what leaves the thought, such as "</think>". White space around it is no part of
      it: newlines before it are the thought's, newlines after it the solution's.

  Returns:
    ExitTable of numpy arrays with M = 1 and V = len(token_texts). Put it on the device once.

  Raises:
    ValueError: for an empty marker or one of more than `MAX_MARKER` bytes, and for a marker
      with characters beyond ASCII beside texts that hold broken characters.
  """
  symbols = marker.encode() if isinstance(marker, str) else bytes(marker)
  if not 1 <= len(symbols) <= MAX_MARKER:
    raise ValueError(f"marker={marker!r} has {len(symbols)} bytes; it must have 1 to {MAX_MARKER}.")
  texts = [text.encode(errors="replace") if isinstance(text, str) else bytes(text) for text in token_texts]
  if not symbols.isascii() and any(isinstance(text, str) and "\ufffd" in text for text in token_texts):
    raise ValueError(
      f"marker={marker!r} is not ASCII and some token texts are parts of characters (U+FFFD): "
      "give token_texts as bytes."
    )
  return _table([symbols], texts)


def exit_table_of_ids(spellings: Sequence[Sequence[int]]) -> ExitTable:
  """The table that recognises an exit by its token ids alone, for callers without token texts.

  Unlike `exit_table` it knows no other spelling than those given. Among spellings that begin
  at the same token the longest counts.

  Args:
    spellings: M >= 1 sequences of 1 to `MAX_MARKER` ids each, such as `[[151668]]`.

  Returns:
    ExitTable of numpy arrays; V is the largest id + 1.

  Raises:
    ValueError: for no spelling, an empty or too long one, or a negative id.
  """
  if isinstance(spellings, (str, bytes)) or not len(spellings):
    raise ValueError(f"spellings={spellings!r} must be at least one sequence of token ids, such as [[5], [7, 8]].")
  for spelling in spellings:
    if np.ndim(spelling) != 1 or not 1 <= len(spelling) <= MAX_MARKER or not all(int(i) == i >= 0 for i in spelling):
      raise ValueError(f"spelling {spelling!r} must be 1 to {MAX_MARKER} token ids >= 0.")
  known = sorted({int(i) for spelling in spellings for i in spelling})
  # Each id as one symbol of text.
  symbol = {token: chr(n) for n, token in enumerate(known)}
  texts = [symbol.get(token, "") for token in range(known[-1] + 1)]
  return _table(["".join(symbol[int(i)] for i in spelling) for spelling in spellings], texts)


def _table(spellings: Sequence[AnyStr], texts: Sequence[AnyStr]) -> ExitTable:
  begins, continues, finishes = (np.zeros((len(spellings), len(texts)), np.uint32) for _ in range(3))
  for row, spelling in enumerate(spellings):
    size = len(spelling)
    starts = {spelling[:s]: 1 << s for s in range(1, size)}
    inside: dict[AnyStr, int] = {}
    for s in range(1, size):
      for end in range(s + 1, size):
        inside[spelling[s:end]] = inside.get(spelling[s:end], 0) | 1 << s
    for token, text in enumerate(texts):
      begins[row, token] = sum(starts.get(text[-s:], 0) for s in range(1, min(size - 1, len(text)) + 1))
      continues[row, token] = inside.get(text, 0)
      rests = sum(1 << s for s in range(max(1, size - len(text)), size) if text.startswith(spelling[s:]))
      finishes[row, token] = rests | (spelling in text)
  lengths = np.array([min(len(text), MAX_MARKER) for text in texts], np.uint32)
  return ExitTable(begins, continues, finishes, lengths, longest=max(map(len, spellings)))


def find_exit(tokens: chex.Array, mask: chex.Array, table: ExitTable) -> tuple[chex.Array, chex.Array]:
  """Where a trace leaves its thought: the first exit.

      thought = tokens[:thought_end],   exit = tokens[thought_end:solution_start],   then the solution

  The exit is all tokens that hold a part of the marker. Text of the thought in the first of
  them, and text of the solution in the last, belong to the exit, because cuts are between
  tokens. What is written after the first exit is never searched.

  | a trace that                | thought_end                                   | solution_start           |
  | --------------------------- | --------------------------------------------- | ------------------------ |
  | has no exit, or is empty    | its length                                    | its length               |
  | begins with the exit        | 0                                             | the length of the exit   |
  | has several exits           | that of the first                             | that of the first        |
  | ends with the exit          | its length less that of the exit              | its length               |
  | was cut off within the exit | its length: what was begun counts as thought  | its length               |

  So a trace has an exit if and only if thought_end is less than its length.

  It takes O(m T) operations on [T] vectors, m the length of the marker, and no scan over T.

  Args:
    tokens: [T] integer, the trace.
    mask: [T] bool, True on real tokens: a prefix of True; see `segmentation.segment` for one
      with a hole.
    table: of the tokenizer that wrote `tokens`; not batched.

  Returns:
    thought_end: [] int32 in [0, length].
    solution_start: [] int32 in [thought_end, length].

  Raises:
    ValueError: on wrong shapes and types, or a concrete mask with a hole.
  """
  checks.check_array("tokens", tokens, "T", int)
  checks.check_array("mask", mask, "T", bool)
  checks.check_shape("mask", mask, tokens.shape, "tokens")
  mask = true_prefix(mask)
  t = jnp.arange(tokens.shape[0], dtype=jnp.int32)
  length = jnp.sum(mask, dtype=jnp.int32)
  never = tokens.shape[0] + 1

  def look_up(column: chex.Array) -> chex.Array:
    read = jnp.asarray(column).at[tokens].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return jnp.where(mask, read, jnp.zeros_like(read))

  lengths = look_up(table.lengths)
  thought_end, solution_start = jnp.int32(never), jnp.int32(never)
  for row in range(table.begins.shape[0]):
    begins, continues, finishes = (look_up(x[row]) for x in (table.begins, table.continues, table.finishes))
    # Every token at once as the one that the exit begins in: bits of what has been read of it n tokens later.
    read, ends = begins, jnp.where(finishes & 1 != 0, t + 1, never)
    for n in range(1, table.longest):
      ends = jnp.minimum(ends, jnp.where(read & following(finishes, n) != 0, t + n + 1, never))
      read = jnp.left_shift(read & following(continues, n), following(lengths, n))
    first = jnp.min(jnp.where(ends < never, t, never), initial=never)
    end = jnp.min(jnp.where(t == first, ends, never), initial=never)
    sooner = (first < thought_end) | ((first == thought_end) & (end > solution_start))
    thought_end, solution_start = jnp.where(sooner, first, thought_end), jnp.where(sooner, end, solution_start)
  return jnp.minimum(thought_end, length), jnp.minimum(solution_start, length)


def prefix_mask(tokens: chex.Array, end_ids: int | Sequence[int]) -> chex.Array:
  """The mask of traces: True up to and including the first token that ends a trace; all True without one.

  Use it where only ids are known, as from another engine. It does not look at the id that
  fills the places after a trace, so that a trace in which that id was sampled stays whole.

  Args:
    tokens: [..., T] integer.
    end_ids: the id or ids that end a trace, at least one.

  Returns:
    [..., T] bool.

  Raises:
    ValueError: for tokens that are no integer array, or no end id.
  """
  if not hasattr(tokens, "dtype") or not jnp.issubdtype(tokens.dtype, jnp.integer) or not jnp.ndim(tokens):
    what = f"{tokens.dtype}{list(tokens.shape)}" if hasattr(tokens, "dtype") else type(tokens).__name__
    raise ValueError(f"tokens is {what} and must be an integer array [..., T]: pass jnp.asarray(tokens, jnp.int32).")
  ids = id_tuple("end_ids", end_ids)
  if not ids:
    raise ValueError(f"end_ids={end_ids!r} ends no trace; give the ids of the end-of-sequence tokens.")
  ends = is_any_of(tokens, ids).astype(jnp.int32)
  return jnp.cumsum(ends, axis=-1) - ends == 0


def true_prefix(mask: chex.Array) -> chex.Array:
  """[T] bool, `mask` up to its first False.

  Under `jit` and `vmap`, where values are not known, that is what a mask with a hole counts as.

  Raises:
    ValueError: if values are known and a True comes after a False.
  """
  known = checks.concrete(mask)
  if known is not None and (known[1:] & ~known[:-1]).any():
    hole = int(np.argmin(known))
    again = hole + int(np.argmax(known[hole:]))
    raise ValueError(
      f"mask[{hole}] is False and mask[{again}] is True: a mask is True on a trace's tokens and False after them. "
      "If the padding id can be sampled, make the mask with prefix_mask(tokens, end_ids)."
    )
  return jnp.cumsum(~jnp.asarray(mask)) == 0


def id_tuple(name: str, ids: int | Sequence[int]) -> tuple[int, ...]:
  """One id or several as a tuple of int; ValueError naming `name` for anything else."""
  several = np.asarray(ids, np.int64 if isinstance(ids, (tuple, list)) and not ids else None)
  if several.dtype.kind not in "iu" or several.ndim > 1:
    raise ValueError(f"{name}={ids!r} must be a token id or a tuple of token ids.")
  return tuple(int(i) for i in np.atleast_1d(several))


def is_any_of(tokens: chex.Array, ids: Sequence[int]) -> chex.Array:
  """[...] bool, whether each of `tokens` [...] is one of `ids`."""
  found = jnp.zeros(jnp.shape(tokens), bool)
  for i in ids:
    found |= tokens == i
  return found


def following(x: chex.Array, n: int, fill: int = 0) -> chex.Array:
  """[T], element t + n of `x` [T] at t; `fill` past the end."""
  return jnp.concatenate([x[n:], jnp.full_like(x[:n], fill)])
