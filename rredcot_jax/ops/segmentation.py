"""Tokens, log-probabilities and entropy of a trace -> where its segments begin.

Segmentation is a subject of the paper's analysis [A]; its own rule, newlines and
keywords merged by entropy (`hybrid`), is known from summaries [S]; `probability` is
SPO's (arXiv 2505.23564); the other methods and every detail below are our choice [C].
See docs/method.md, section 4, for these marks.

Everything works on token ids. What has to be known of the text is looked up in
`VocabTables`, made once per tokenizer, so that nothing is decoded here and the same
code runs under `jit` and, written for one trace `[T]`, under `vmap`.

A *cut* at token `t` means that a segment opens at `t`. The rules that all methods share:

* Segment 0 opens at token 0, so `t = 0` is no cut; there are no empty segments.
* Tokens of the trailing run of EOS (one token, in a sampled trace) open no segment:
  EOS belongs to the last segment. Such a place counts neither as found nor as merged.
* A newline belongs to the segment it closes: the cut follows the last newline of a run.
* A keyword belongs to the segment it opens, and is a keyword only as whole words.
* At most `target` segments are left. Cuts given up for that are in `num_merged`.
* Ties go to the earliest token.
"""

import math
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rredcot_jax.ops import types

METHODS = (
  "whole",
  "stride",
  "uniform",
  "newline",
  "paragraph",
  "sentence",
  "keyword",
  "entropy",
  "probability",
  "hybrid",
)

# Phrases that open a new thought. The first seven are the paper's by way of summaries [S], the rest ours [C].
KEYWORDS = (
  "Wait",
  "Alternatively",
  "So",
  "Therefore",
  "But",
  "Let me",
  "Hmm",
  "However",
  "Thus",
  "Hence",
  "Actually",
  "Finally",
)

_CLOSING_MARKS = "\"'”’»)]}"
_SENTENCE_ENDS = (".", "!", "?")
# These propose exactly as many cuts as they were asked for, and so give none up.
_COUNT_METHODS = ("uniform", "entropy")


@struct.dataclass
class VocabTables:
  """What segmentation needs to know of the text side, over a vocabulary of `V` token ids.

  Ids outside `[0, V)`, which padded embedding tables can emit, read as 0 and False.
  """

  newlines: chex.Array  # [V] int32 >= 0, number of newline characters in the token.
  ends_sentence: chex.Array  # [V] bool, ends in . ! ? once closing quotes and brackets are stripped.
  starts_space: chex.Array  # [V] bool, the first character is whitespace.
  starts_letter: chex.Array  # [V] bool, the first character is a letter: after a letter, it continues a word.
  ends_letter: chex.Array  # [V] bool, the last character is a letter: a letter after it continues its word.
  keywords: chex.Array  # [W, L] int32, n-grams of ids that open a new thought, right-padded with -1.


def vocab_tables(token_texts: Sequence[str], keywords: Sequence[Sequence[int]]) -> VocabTables:
  """Builds the tables on the host, once per tokenizer.

  Args:
    token_texts: the decoded text of every token id, in order. Leading spaces must be
      there: a tokenizer that drops them when it decodes one token alone needs care.
    keywords: n-grams of token ids, one for each way in which a keyword is spelled
      (`"Wait"` and `" Wait"` are two). May be empty.

  Returns:
    VocabTables of numpy arrays, `V = len(token_texts)`, `W = len(keywords)`, `L` the
    longest n-gram. Put them on the device once rather than at every call.

  Raises:
    ValueError: for a keyword that is empty or holds an id outside `[0, V)`.
  """
  for n_gram in keywords:
    if not n_gram or not all(0 <= token < len(token_texts) for token in n_gram):
      raise ValueError(f"keyword {list(n_gram)!r} must be a non-empty n-gram of token ids in [0, {len(token_texts)}).")
  longest = max((len(n_gram) for n_gram in keywords), default=0)
  padded = np.full((len(keywords), longest), -1, np.int32)
  for row, n_gram in zip(padded, keywords):
    row[: len(n_gram)] = n_gram
  return VocabTables(
    newlines=np.array([text.count("\n") for text in token_texts], np.int32),
    ends_sentence=np.array([_ends_sentence(text) for text in token_texts], bool),
    starts_space=np.array([text[:1].isspace() for text in token_texts], bool),
    starts_letter=np.array([text[:1].isalpha() for text in token_texts], bool),
    ends_letter=np.array([text[-1:].isalpha() for text in token_texts], bool),
    keywords=padded,
  )


def _ends_sentence(text: str) -> bool:
  return text.rstrip(_CLOSING_MARKS).endswith(_SENTENCE_ENDS)


def segment(
  tokens: chex.Array,
  log_probs: chex.Array,
  entropy: chex.Array,
  mask: chex.Array,
  tables: VocabTables,
  *,
  method: str,
  k_max: int,
  target: int | None = None,
  stride: int = 64,
  threshold: float = 0.9,
  eos_id: int,
) -> types.Segments:
  """Cuts one trace into at most `target` consecutive segments.

  | method        | a segment opens at token t > 0 where                               | too many: keep     |
  | ------------- | ------------------------------------------------------------------ | ------------------ |
  | `whole`       | never: one segment, GRPO                                           |                    |
  | `stride`      | t is a multiple of `stride`                                        | evenly             |
  | `uniform`     | one of `target` parts of the tokens begins (fewer in a short       |                    |
  |               | trace), whose lengths differ by at most 1                          |                    |
  | `newline`     | a run of newlines has just ended                                   | evenly             |
  | `paragraph`   | a run of two or more newlines has just ended                       | evenly             |
  | `sentence`    | t - 1 ends a sentence and t starts with space, or as for `newline` | evenly             |
  | `keyword`     | an n-gram of `tables.keywords` begins                              | evenly             |
  | `entropy`     | entropy[t] is among the `target - 1` highest                       |                    |
  | `probability` | exp(log_probs[t]) < threshold (SPO)                                | lowest probability |
  | `hybrid`      | as for `newline` or `keyword`                                      | highest entropy    |

  "Evenly" merges the n segments found into `target` groups of consecutive ones, whose
  counts differ by at most 1: group g begins with segment ceil(g n / target). `uniform` is that
  rule on the tokens before EOS: the last group is never a longer one, so one EOS fits in it.

  A run of newlines is a maximal sequence of tokens that contain one, each after the first
  starting with whitespace: `"x\\n", "\\n"` is one run and `"}\\n", "}\\n"` are two. No sentence
  is cut from newlines that follow it: the cut waits for their end. A keyword must not
  touch a letter outside it on either side: `" So"` opens nothing in `" So", "me"`.

  Args:
    tokens: [T] integer, the trace, its EOS included.
    log_probs: [T] float (nats), of each token under the distribution it was sampled from.
    entropy: [T] float >= 0 (nats), of the distribution that token t was sampled from. NaN ranks lowest.
    mask: [T] bool, True on real tokens: a prefix of True. What lies outside is not read.
    tables: text tables of the tokenizer that wrote `tokens`; not batched.
    method: one of METHODS. Static, as are all that follow.
    k_max: K >= 1, places for segments in the result.
    target: in [1, k_max], the most segments wanted; `k_max` when None.
    stride: >= 1, tokens a segment (`stride`).
    threshold: in (0, 1), a probability (`probability`).
    eos_id: id of the end-of-sequence token; an id that never occurs turns the EOS rule off.

  Returns:
    types.Segments with K = k_max. `num_segments` is 0 for an empty trace, else in
    [1, target]; `num_merged` is 0 for `whole`, `uniform` and `entropy`.

  Raises:
    ValueError: for an unknown method, or a number outside its range.
    AssertionError: for wrong ranks, dtypes or shapes.
  """
  chex.assert_rank([tokens, log_probs, entropy, mask], 1)
  chex.assert_type([tokens, log_probs, entropy, mask], [int, float, float, bool])
  chex.assert_equal_shape([tokens, log_probs, entropy, mask])
  _check_tables(tables)
  limit = _check_options(method, k_max, target, stride, threshold, num_tokens=tokens.shape[0])

  t = jnp.arange(tokens.shape[0], dtype=jnp.int32)
  before_eos = jnp.max(jnp.where(mask & (tokens != eos_id), t + 1, 0), initial=0)
  can_open = (t > 0) & (t < before_eos)

  cuts, priority = _propose(tokens, log_probs, entropy, mask, tables, method, stride, threshold)
  cuts = cuts & can_open
  kept = _keep_evenly(cuts, limit) if priority is None else _keep_highest(cuts, priority, limit)
  num_merged = 0 if method in _COUNT_METHODS else jnp.sum(cuts & ~kept)
  return _build(kept, mask, k_max, num_merged)


def _check_options(method: str, k_max: int, target: int | None, stride: int, threshold: float, num_tokens: int) -> int:
  """Raises ValueError on a bad option; returns the most segments to leave."""
  types.check_option("method", method, METHODS)
  if k_max < 1:
    raise ValueError(f"k_max={k_max} leaves no place for a segment; use k_max >= 1.")
  if target is not None and not 1 <= target <= k_max:
    raise ValueError(f"target={target} is outside [1, k_max={k_max}]; lower target or raise k_max.")
  if stride < 1:
    raise ValueError(f"stride={stride} is no number of tokens; use stride >= 1.")
  if not 0 < threshold < 1:
    raise ValueError(f"threshold={threshold} is outside (0, 1); it is a probability, SPO uses 0.9.")
  limit = k_max if target is None else target
  if num_tokens * min(limit, num_tokens) >= 2**31:
    raise ValueError(f"k_max or target={limit} times T={num_tokens} overflows int32; lower either.")
  return limit


def _check_tables(tables: VocabTables) -> None:
  by_token = [
    tables.newlines,
    tables.ends_sentence,
    tables.starts_space,
    tables.starts_letter,
    tables.ends_letter,
  ]
  chex.assert_rank([*by_token, tables.keywords], [1] * len(by_token) + [2])
  chex.assert_type([*by_token, tables.keywords], [int, bool, bool, bool, bool, int])
  chex.assert_equal_shape(by_token)


def _propose(
  tokens: chex.Array,
  log_probs: chex.Array,
  entropy: chex.Array,
  mask: chex.Array,
  tables: VocabTables,
  method: str,
  stride: int,
  threshold: float,
) -> tuple[chex.Array, chex.Array | None]:
  """[T] bool cuts and their [T] float priority, None where all cuts are alike.

  Places where no segment may open are the caller's to remove.
  """

  def look_up(table: chex.Array) -> chex.Array:
    read = jnp.asarray(table).at[tokens].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return jnp.where(mask, read, jnp.zeros_like(read))

  def newline_cuts(at_least: int = 1) -> chex.Array:
    return _newline_cuts(look_up(tables.newlines), look_up(tables.starts_space), at_least)

  def keyword_cuts() -> chex.Array:
    joined = _previous(look_up(tables.ends_letter)) & look_up(tables.starts_letter)
    return _keyword_cuts(jnp.where(mask, tokens, -1), joined, jnp.asarray(tables.keywords))

  if method == "whole":
    return jnp.zeros_like(mask), None
  if method == "stride":
    return jnp.arange(mask.shape[0]) % stride == 0, None
  if method == "uniform":  # One token a segment, merged evenly.
    return jnp.ones_like(mask), None
  if method == "newline":
    return newline_cuts(), None
  if method == "paragraph":
    return newline_cuts(at_least=2), None
  if method == "sentence":
    opens = look_up(tables.starts_space) & (look_up(tables.newlines) == 0)
    return (_previous(look_up(tables.ends_sentence)) & opens) | newline_cuts(), None
  if method == "keyword":
    return keyword_cuts(), None
  if method == "entropy":
    return jnp.ones_like(mask), entropy
  if method == "probability":
    return log_probs < math.log(threshold), -log_probs
  if method == "hybrid":
    return newline_cuts() | keyword_cuts(), entropy
  raise AssertionError(f"{method} is in METHODS and has no rule.")


def _previous(x: chex.Array) -> chex.Array:
  """[T], element t - 1 at t; 0 or False at 0."""
  return jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])


def _following(x: chex.Array, n: int, fill: int) -> chex.Array:
  """[T], element t + n at t; `fill` past the end."""
  return jnp.concatenate([x[n:], jnp.full_like(x[:n], fill)])


def _newline_cuts(newlines: chex.Array, starts_space: chex.Array, at_least: int) -> chex.Array:
  """[T] bool, True right after each run of `at_least` or more newlines."""
  has_newline = newlines > 0
  after_newline = _previous(has_newline)
  goes_on = after_newline & has_newline & starts_space
  total = jnp.cumsum(newlines, dtype=jnp.int32)
  # Newlines before the run that t is in, or that ended last: non-decreasing, so a running maximum carries it.
  before_run = jax.lax.cummax(jnp.where(has_newline & ~goes_on, total - newlines, 0))
  long_enough = total - before_run >= at_least
  return after_newline & ~goes_on & _previous(long_enough)


def _keyword_cuts(ids: chex.Array, joined: chex.Array, keywords: chex.Array) -> chex.Array:
  """[T] bool, True where a keyword begins.

  Args:
    ids: [T] int, -1 on padding.
    joined: [T] bool, True where token t continues the word of token t - 1.
    keywords: [W, L] int, right-padded with -1.
  """
  lengths = jnp.sum(keywords >= 0, axis=1)[:, None]  # [W, 1]
  matches = (lengths > 0) & ~joined[None, :]  # [W, T]
  for n in range(keywords.shape[1]):
    same = _following(ids, n, fill=-1)[None, :] == keywords[:, n, None]
    stops_inside_word = (lengths == n + 1) & _following(joined, n + 1, fill=0)[None, :]
    matches &= ((lengths <= n) | same) & ~stops_inside_word
  return jnp.any(matches, axis=0)


def _keep_evenly(cuts: chex.Array, limit: int) -> chex.Array:
  """[T] bool, the cuts left when the segments are merged into `limit` groups of equal count, within 1."""
  index = jnp.cumsum(cuts, dtype=jnp.int32)  # Of the segment that t is in.
  found = jnp.sum(cuts) + 1
  groups = jnp.minimum(limit, found)
  group = index * groups // found
  return cuts & (group != _previous(group))


def _keep_highest(cuts: chex.Array, priority: chex.Array, limit: int) -> chex.Array:
  """[T] bool, the `limit - 1` cuts of highest priority, the earliest among equals."""
  t = jnp.arange(cuts.shape[0], dtype=jnp.int32)
  # Two keys and a stable sort: a cut of priority -inf or NaN still comes before what is no cut.
  _, _, order = jax.lax.sort((~cuts, -priority.astype(jnp.float32), t), num_keys=2, is_stable=True)
  chosen = jnp.zeros_like(cuts).at[order[: limit - 1]].set(True)
  return cuts & chosen


def _build(kept: chex.Array, mask: chex.Array, k_max: int, num_merged: chex.Array | int) -> types.Segments:
  index = jnp.cumsum(kept, dtype=jnp.int32)
  length = jnp.sum(mask)
  # The first token of segment k + 1; T, so the length, where there is none.
  next_starts = jnp.searchsorted(index, jnp.arange(1, k_max + 1, dtype=jnp.int32))
  return types.Segments(
    ends=jnp.minimum(next_starts, length).astype(jnp.int32),
    segment_ids=jnp.where(mask, index, -1),
    num_segments=jnp.where(length > 0, jnp.sum(kept) + 1, 0).astype(jnp.int32),
    num_merged=jnp.asarray(num_merged, jnp.int32),
  )
