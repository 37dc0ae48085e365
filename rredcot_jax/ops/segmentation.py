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
* States are states of the thought: where an exit is looked for, its first token opens the last segment.
* At most `target` segments are left. Cuts given up for that are in `num_merged`.
* Ties go to the earliest token.

A method is a function of a `Trace` that proposes cuts and says which of them to keep:

    def method(trace: Trace) -> tuple[cuts, priority]

    cuts      [T] bool, the places where it wants a segment to open. Places outside `trace.can_open` are left out.
    priority  [T] float, how much each cut is worth where there are too many: the highest are kept.
              None where all are alike: segments are then merged into groups of equal count.

It runs under `jit` and `vmap`. The built-in methods are the functions of this file that
`METHODS` lists; one of the user's own is passed itself, or as "package.module:function".
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rredcot_jax.ops import anatomy, checks, names, types

AFTER_EXIT = ("one", "cut")

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


@types.pytree
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


@dataclasses.dataclass(frozen=True)
class Trace:
  """What a segmentation method may read of one trace."""

  tokens: chex.Array  # [T] integer.
  mask: chex.Array  # [T] bool, a prefix of True; what lies outside is not to be read.
  can_open: chex.Array  # [T] bool, places where the method may open a segment.
  target: chex.Numeric  # [] integer >= 1, segments that its cuts may leave at most; a number of cuts is one less.
  tables: VocabTables | None  # Of the tokenizer.
  log_probs: chex.Array | None  # [T] float, nats.
  entropy: chex.Array | None  # [T] float, nats.
  stride: int
  threshold: float
  method: str  # Its own name, for errors.

  def read(self, name: str) -> chex.Array:
    """The array `name`: "log_probs" or "entropy".

    Raises:
      ValueError: naming the method, if it was not given.
    """
    return self._given(name, getattr(self, name))

  def look_up(self, column: str) -> chex.Array:
    """[T], the column of `tables` of that name for each token; 0 and False outside the mask and the vocabulary.

    Raises:
      ValueError: naming the method, if no tables were given.
    """
    table = jnp.asarray(getattr(self._given("tables", self.tables), column))
    read = table.at[self.tokens].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return jnp.where(self.mask, read, jnp.zeros_like(read))

  def _given(self, name: str, value):
    if value is None:
      raise ValueError(f"method={self.method!r} reads {name}, which is None: pass segment(..., {name}=...).")
    return value


Method = Callable[[Trace], tuple[chex.Array, chex.Array | None]]


# ---- Methods ---------------------------------------------------------------------------------


def whole(trace: Trace) -> tuple[chex.Array, None]:
  """One segment, exit and all: GRPO."""
  return jnp.zeros_like(trace.mask), None


def stride(trace: Trace) -> tuple[chex.Array, None]:
  """Every `stride` tokens."""
  return jnp.arange(trace.mask.shape[0]) % trace.stride == 0, None


def uniform(trace: Trace) -> tuple[chex.Array, None]:
  """`target` parts of the tokens, whose lengths differ by at most 1."""
  return keep_evenly(trace.can_open, trace.target), None


def newline(trace: Trace) -> tuple[chex.Array, None]:
  """After each run of newlines."""
  return _after_newlines(trace), None


def paragraph(trace: Trace) -> tuple[chex.Array, None]:
  """After each run of two or more newlines."""
  return _after_newlines(trace, at_least=2), None


def sentence(trace: Trace) -> tuple[chex.Array, None]:
  """After each sentence that space follows, and after newlines."""
  opens = trace.look_up("starts_space") & (trace.look_up("newlines") == 0)
  return (_previous(trace.look_up("ends_sentence")) & opens) | _after_newlines(trace), None


def keyword(trace: Trace) -> tuple[chex.Array, None]:
  """Before each keyword."""
  return _before_keywords(trace), None


def entropy(trace: Trace) -> tuple[chex.Array, None]:
  """Before the `target - 1` tokens of highest entropy."""
  return keep_highest(trace.can_open, trace.read("entropy"), trace.target), None


def probability(trace: Trace) -> tuple[chex.Array, chex.Array]:
  """Before tokens less likely than `threshold`; the least likely are kept (SPO, arXiv 2505.23564)."""
  log_probs = trace.read("log_probs")
  return log_probs < math.log(trace.threshold), -log_probs


def hybrid(trace: Trace) -> tuple[chex.Array, chex.Array]:
  """After newlines and before keywords; where the entropy is highest they are kept."""
  return _after_newlines(trace) | _before_keywords(trace), trace.read("entropy")


_METHODS: Mapping[str, Method] = {
  method.__name__: method
  for method in (whole, stride, uniform, newline, paragraph, sentence, keyword, entropy, probability, hybrid)
}
METHODS = tuple(_METHODS)


# ---- Cutting ---------------------------------------------------------------------------------


def segment(
  tokens: chex.Array,
  mask: chex.Array,
  tables: VocabTables | None,
  *,
  method: str | Method,
  k_max: int,
  eos_ids: int | Sequence[int] = (),
  log_probs: chex.Array | None = None,
  entropy: chex.Array | None = None,
  target: int | None = None,
  stride: int = 64,
  threshold: float = 0.9,
  exit_table: anatomy.ExitTable | None = None,
  after_exit: str = "one",
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

  With an `exit_table` the method cuts the thought, in at most `target - 1` segments, and the
  first token of the exit opens one more, whatever the method. That one holds all the rest
  (`after_exit="one"`), or the method's cuts go on in it ("cut", one `target` for all). A
  trace without an exit is cut as if there were no table, and so is every trace where
  `target` is 1 or the method is `whole`. `thought_end` and `solution_start` of the result say
  where the exit is all the same, and `after_exit` which states lie beyond its first token.

  Args:
    tokens: [T] integer, the trace, its EOS included.
    mask: [T] bool, True on real tokens: a prefix of True. What lies outside is not read. A
      mask with a hole, which a sampled padding id can make, raises where its values are
      known; under `jit` and `vmap` the trace ends at the hole. See `anatomy.prefix_mask`.
    tables: text tables of the tokenizer that wrote `tokens`; not batched. None for methods
      that read none: whole, stride, uniform, entropy, probability.
    method: one of METHODS, "package.module:function", or a function; see this module's
      docstring. Static, as are all that follow but arrays.
    k_max: K >= 1, places for segments in the result.
    eos_ids: the id or ids of end-of-sequence tokens; () turns the EOS rule off.
    log_probs: [T] float (nats), of each token under the policy; read by `probability`.
    entropy: [T] float >= 0 (nats), of the policy's distribution over token t; read by
      `entropy` and `hybrid`. NaN ranks lowest.
    target: in [1, k_max], the most segments wanted; `k_max` when None.
    stride: >= 1, tokens a segment (`stride`).
    threshold: in (0, 1), a probability (`probability`).
    exit_table: recognises where the thought is left (`anatomy.exit_table`); not batched.
      None looks for no exit.
    after_exit: one of AFTER_EXIT.

  Returns:
    types.Segments with K = k_max. `num_segments` is 0 for an empty trace, else in
    [1, target]; `num_merged` is 0 for `whole`, `uniform` and `entropy`.

  Raises:
    ValueError: for an unknown method, one that reads what is missing or returns something
      else than cuts, a number outside its range, wrong shapes and types, or a mask with a hole.
  """
  _check_arrays(tokens, mask, tables, log_probs, entropy)
  rule = names.resolve("method", method, _METHODS)
  most = _check_options(k_max, target, stride, threshold, after_exit, num_tokens=tokens.shape[0])
  most = 1 if rule is whole else most
  mask = anatomy.true_prefix(mask)
  t = jnp.arange(tokens.shape[0], dtype=jnp.int32)
  is_eos = anatomy.is_any_of(tokens, anatomy.id_tuple("eos_ids", eos_ids))
  before_eos = jnp.max(jnp.where(mask & ~is_eos, t + 1, 0), initial=0)
  can_open = (t > 0) & (t < before_eos)

  limit: chex.Numeric = most
  exit_cut, thought_end, solution_start = jnp.zeros_like(mask), None, None
  if exit_table is not None:
    thought_end, solution_start = anatomy.find_exit(tokens, mask, exit_table)
    if most > 1:
      exit_cut = can_open & (t == thought_end)
    can_open &= t < thought_end if after_exit == "one" else ~exit_cut
    limit = most - jnp.any(exit_cut).astype(jnp.int32)

  trace = Trace(
    tokens, mask, can_open, limit, tables, log_probs, entropy, stride, threshold, method=names.label(method)
  )
  cuts, priority = _checked(rule(trace), trace)
  cuts = cuts & can_open
  kept = keep_evenly(cuts, limit) if priority is None else keep_highest(cuts, priority, limit)
  segments = _build(kept | exit_cut, mask, k_max, jnp.sum(cuts & ~kept))
  return dataclasses.replace(segments, thought_end=thought_end, solution_start=solution_start)


def _check_arrays(
  tokens: chex.Array,
  mask: chex.Array,
  tables: VocabTables | None,
  log_probs: chex.Array | None,
  entropy: chex.Array | None,
) -> None:
  """Raises ValueError on wrong shapes and types."""
  checks.check_array("tokens", tokens, "T", int)
  for name, x, kind in (("mask", mask, bool), ("log_probs", log_probs, float), ("entropy", entropy, float)):
    if x is None and name != "mask":
      continue
    checks.check_array(name, x, "T", kind)
    checks.check_shape(name, x, tokens.shape, "tokens")
  if tables is None:
    return
  if not isinstance(tables, VocabTables):
    raise ValueError(f"tables is a {type(tables).__name__}: make it with vocab_tables, or pass None.")
  checks.check_array("tables.keywords", tables.keywords, "W L", int)
  checks.check_array("tables.newlines", tables.newlines, "V", int)
  for name in ("ends_sentence", "starts_space", "starts_letter", "ends_letter"):
    checks.check_array(f"tables.{name}", getattr(tables, name), "V", bool)
    checks.check_shape(f"tables.{name}", getattr(tables, name), tables.newlines.shape, "tables.newlines")


def _check_options(
  k_max: int, target: int | None, stride: int, threshold: float, after_exit: str, num_tokens: int
) -> int:
  """Raises ValueError on a bad option; returns the most segments to leave."""
  names.check_option("after_exit", after_exit, AFTER_EXIT)
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


def _checked(proposed: object, trace: Trace) -> tuple[chex.Array, chex.Array | None]:
  """What a method returned; ValueError naming the method unless it is cuts and a priority."""
  if not isinstance(proposed, tuple) or len(proposed) != 2:
    raise ValueError(f"method={trace.method!r} returned a {type(proposed).__name__} and must return (cuts, priority).")
  cuts, priority = proposed
  checks.check_array(f"cuts of method={trace.method!r}", cuts, "T", bool)
  checks.check_shape(f"cuts of method={trace.method!r}", cuts, trace.tokens.shape, "tokens")
  if priority is not None:
    checks.check_array(f"priority of method={trace.method!r}", priority, "T", float)
    checks.check_shape(f"priority of method={trace.method!r}", priority, trace.tokens.shape, "tokens")
  return cuts, priority


def _after_newlines(trace: Trace, at_least: int = 1) -> chex.Array:
  return _newline_cuts(trace.look_up("newlines"), trace.look_up("starts_space"), at_least)


def _before_keywords(trace: Trace) -> chex.Array:
  joined = _previous(trace.look_up("ends_letter")) & trace.look_up("starts_letter")
  assert trace.tables is not None  # `look_up` has checked it.
  return _keyword_cuts(jnp.where(trace.mask, trace.tokens, -1), joined, jnp.asarray(trace.tables.keywords))


def _previous(x: chex.Array) -> chex.Array:
  """[T], element t - 1 at t; 0 or False at 0."""
  return jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])


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
    same = anatomy.following(ids, n, fill=-1)[None, :] == keywords[:, n, None]
    stops_inside_word = (lengths == n + 1) & anatomy.following(joined, n + 1)[None, :]
    matches &= ((lengths <= n) | same) & ~stops_inside_word
  return jnp.any(matches, axis=0)


def keep_evenly(cuts: chex.Array, limit: chex.Numeric) -> chex.Array:
  """[T] bool, the cuts left when the segments are merged into `limit` groups of equal count, within 1."""
  index = jnp.cumsum(cuts, dtype=jnp.int32)  # Of the segment that t is in.
  found = jnp.sum(cuts) + 1
  groups = jnp.minimum(limit, found)
  group = index * groups // found
  return cuts & (group != _previous(group))


def keep_highest(cuts: chex.Array, priority: chex.Array, limit: chex.Numeric) -> chex.Array:
  """[T] bool, the `limit - 1` cuts of highest priority, the earliest among equals."""
  t = jnp.arange(cuts.shape[0], dtype=jnp.int32)
  # Two keys and a stable sort: a cut of priority -inf or NaN still comes before what is no cut.
  _, _, order = jax.lax.sort((~cuts, -priority.astype(jnp.float32), t), num_keys=2, is_stable=True)
  return cuts & jnp.zeros_like(cuts).at[order].set(t < limit - 1)


def _build(kept: chex.Array, mask: chex.Array, k_max: int, num_merged: chex.Array) -> types.Segments:
  index = jnp.cumsum(kept, dtype=jnp.int32)
  length = jnp.sum(mask)
  # The first token of segment k + 1; T, so the length, where there is none.
  next_starts = jnp.searchsorted(index, jnp.arange(1, k_max + 1, dtype=jnp.int32))
  return types.Segments(
    ends=jnp.minimum(next_starts, length).astype(jnp.int32),
    segment_ids=jnp.where(mask, index, -1),
    num_segments=jnp.where(length > 0, jnp.sum(kept) + 1, 0).astype(jnp.int32),
    num_merged=num_merged.astype(jnp.int32),
  )
