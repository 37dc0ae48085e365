"""Segmentation: hand-cut texts, an oracle that works on characters, and the rules every method shares."""

import dataclasses
import functools
import itertools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from rredcot_jax.ops import anatomy, segmentation, types

T = 24
EOS = "<eos>"
# Tokens of letters, words that a keyword is a part of ("Some"), every shape of newline, numbers.
VOCAB = (EOS, "\n", "\n\n", ".\n", " \n", ".", '?"', " x", "x", "3")
VOCAB += ("So", " So", " Let", "Let", " me", "me", "Hmm,")
VOCAB += ("</think>", "</", "think>\n")
IDS = {text: token for token, text in enumerate(VOCAB)}
KEYWORD_TEXTS = (("So",), (" So",), (" Let", " me"), ("Let", " me"), ("Hmm,",))
TABLES = segmentation.vocab_tables(VOCAB, [[IDS[piece] for piece in n_gram] for n_gram in KEYWORD_TEXTS])
EXIT_TABLE = anatomy.exit_table(VOCAB, "</think>")

# Values of which random traces are full, so that ties occur.
ENTROPIES = np.array([0.0, -0.0, 0.5, 1.0, 2.0], np.float32)
LOG_PROBS = np.array([-0.0, -0.01, -0.2, -1.0, -np.inf], np.float32)


# (k_max, target): no choice, a target below the places, room for all.
LIMITS = ((1, None), (12, 3), (16, None))
STRIDE, THRESHOLD = 3, 0.9


def bound(method, k_max, target=None, stride=STRIDE, threshold=THRESHOLD, eos_ids=IDS[EOS], **options):
  """`segment` as a function of arrays alone."""
  options |= {"k_max": k_max, "target": target, "stride": stride, "threshold": threshold, "eos_ids": eos_ids}

  def run(tokens, mask, log_probs, entropy, tables):
    return segmentation.segment(tokens, mask, tables, method=method, log_probs=log_probs, entropy=entropy, **options)

  return run


def every_method(*args, k_max, target=None, after_exit=None, **options):
  """{method: Segments}: one function to compile for each setting rather than ten."""
  if after_exit:
    options |= {"exit_table": EXIT_TABLE, "after_exit": after_exit}
  return {method: bound(method, k_max, target, **options)(*args) for method in segmentation.METHODS}


@functools.cache
def jitted(k_max, target=None, **options):
  return jax.jit(functools.partial(every_method, k_max=k_max, target=target, **options))


@functools.cache
def batched():
  every = functools.partial(every_method, k_max=12, target=3)
  return jax.jit(jax.vmap(every, in_axes=(0, 0, 0, 0, None)))


def padded(values, fill, dtype):
  return np.concatenate([np.asarray(values, dtype), np.full(T - len(values), fill, dtype)])


def trace(pieces, entropy=None, probs=None):
  """Arguments of `segment` for a trace given as text, with harmful padding."""
  ones = np.ones(len(pieces))
  return (
    padded([IDS[piece] for piece in pieces], IDS["\n"], np.int32),
    padded(ones, 0, bool),
    padded(np.log(ones if probs is None else probs), -np.inf, np.float32),
    padded(ones if entropy is None else entropy, np.nan, np.float32),
    TABLES,
  )


def split(result, pieces):
  """The segments as lists of pieces, after `ends`."""
  assert isinstance(result, types.Segments)
  num = int(result.num_segments)
  bounds = [0, *np.asarray(result.ends)[:num].tolist()]
  return [list(pieces[start:end]) for start, end in itertools.pairwise(bounds)]


def cut(pieces, method, limits=LIMITS[2], entropy=None, probs=None):
  """Segments of a trace given as text, each as one string, and the number of cuts given up."""
  result = jitted(*limits)(*trace(pieces, entropy, probs))[method]
  return ["|".join(piece) for piece in split(result, pieces)], int(result.num_merged)


# ------------------------------------------------------------------ tables


def test_vocab_tables_golden():
  texts = ["a", " b", "\n\n", "x.\n", 'no!")', "...", ".)x", "", "é", "中", "\tif", "1a", "a1"]
  tables = segmentation.vocab_tables(texts, [[0, 1], [2]])
  np.testing.assert_array_equal(tables.newlines, [0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0])
  np.testing.assert_array_equal(np.flatnonzero(tables.ends_sentence), [4, 5])
  np.testing.assert_array_equal(np.flatnonzero(tables.starts_space), [1, 2, 10])
  np.testing.assert_array_equal(np.flatnonzero(tables.starts_letter), [0, 3, 4, 8, 9, 12])
  np.testing.assert_array_equal(np.flatnonzero(tables.ends_letter), [0, 1, 6, 8, 9, 10, 11])
  np.testing.assert_array_equal(tables.keywords, [[0, 1], [2, -1]])
  dtypes = [leaf.dtype for leaf in jax.tree.leaves(tables)]
  assert dtypes == [np.int32, bool, bool, bool, bool, np.int32]


@pytest.mark.parametrize("n_gram", [[], [3], [-1], [0, -1]])
def test_vocab_tables_rejects_bad_keywords(n_gram):
  with pytest.raises(ValueError, match=re.escape(str(n_gram))):
    segmentation.vocab_tables(["a", "b", "c"], [[0], n_gram])


# ----------------------------------------------------------------- goldens

ONE, THREE, ALL = LIMITS


def test_whole_golden():
  assert cut(["x", "\n", " So", EOS], "whole") == (["x|\n| So|<eos>"], 0)


def test_stride_golden():
  assert cut(["x"] * 7, "stride") == (["x|x|x", "x|x|x", "x"], 0)
  assert cut(["x"] * 6, "stride") == (["x|x|x", "x|x|x"], 0)
  # EOS at a multiple of the stride joins the segment before it.
  assert cut(["x"] * 6 + [EOS], "stride") == (["x|x|x", "x|x|x|<eos>"], 0)


def test_uniform_golden():
  assert cut(["x"] * 10, "uniform", THREE) == (["x|x|x|x", "x|x|x", "x|x|x"], 0)
  assert cut(["x"] * 8, "uniform", THREE) == (["x|x|x", "x|x|x", "x|x"], 0)
  assert cut(["x"] * 8 + [EOS], "uniform", THREE) == (["x|x|x", "x|x|x", "x|x|<eos>"], 0)
  assert cut(["x"] * 2 + [EOS], "uniform", THREE) == (["x", "x|<eos>"], 0)


def test_newline_golden():
  # The newline closes its segment; a run is one cut; the next line's own newline starts no run.
  pieces = ["x", ".\n", "\n", " \n", "3", "\n\n", ".\n", ".\n", "x"]
  assert cut(pieces, "newline") == (["x|.\n|\n| \n", "3|\n\n", ".\n", ".\n", "x"], 0)
  # Newlines first make a segment; newlines last, or before EOS only, make no empty one.
  assert cut(["\n", "x", "\n"], "newline") == (["\n", "x|\n"], 0)
  assert cut(["x", "\n", "x", "\n", EOS], "newline") == (["x|\n", "x|\n|<eos>"], 0)


def test_paragraph_golden():
  pieces = ["x", "\n", "x", "\n", "\n", "x", "\n\n", "x", ".\n", ".\n", "x", ".\n", " \n", "3"]
  expected = ["x|\n|x|\n|\n", "x|\n\n", "x|.\n|.\n|x|.\n| \n", "3"]
  assert cut(pieces, "paragraph") == (expected, 0)


def test_sentence_golden():
  # "3.3" is no end; a closing quote is part of the end; newlines join the sentence that they end.
  pieces = ["x", ".", " x", "3", ".", "3", '?"', " x", ".", "\n", " x", ".", " \n", "x", "\n", "x", ".", EOS]
  expected = ["x|.", ' x|3|.|3|?"', " x|.|\n", " x|.| \n", "x|\n", "x|.|<eos>"]
  assert cut(pieces, "sentence") == (expected, 0)


def test_keyword_golden():
  # Whole words: not in "Some", "xSo", "Let mex"; whatever the sides when they are no letters.
  pieces = [
    "x",
    " So",
    " x",
    " So",
    "me",
    "x",
    "So",
    "3",
    "So",
    ".",
    " Let",
    " me",
    "x",
    " Let",
    " me",
    "\n",
    "So",
  ]
  expected = ["x", " So| x| So|me|x|So|3", "So|.| Let| me|x", " Let| me|\n", "So"]
  assert cut(pieces, "keyword") == (expected, 0)
  # A keyword that ends in a comma may touch a letter; one at token 0 opens the segment that is open anyway.
  assert cut(["So", ".", "Hmm,", "x", EOS], "keyword") == (["So|.", "Hmm,|x|<eos>"], 0)
  # Half a keyword at the end is none, whatever the padding holds.
  assert cut(["x", " Let"], "keyword") == (["x| Let"], 0)


def test_keyword_does_not_reach_into_padding():
  tokens, mask, log_probs, entropy, tables = trace(["x", "\n", "Let"])
  tokens[3] = IDS[" me"]
  assert int(jitted(*ALL)(tokens, mask, log_probs, entropy, tables)["keyword"].num_segments) == 1
  tokens, mask, log_probs, entropy, tables = trace(["x", "\n", "So"])
  tokens[3] = IDS["me"]
  assert int(jitted(*ALL)(tokens, mask, log_probs, entropy, tables)["keyword"].num_segments) == 2


def test_no_keywords():
  tables = segmentation.vocab_tables(VOCAB, [])
  result = bound("keyword", 16)(*trace(["x", " So", "3"])[:4], tables)
  assert int(result.num_segments) == 1


def test_entropy_golden():
  entropy = [9.0, 0.5, 2.0, 0.5, 3.0, 2.0, 7.0]
  pieces = ["x", "3", "x", "3", "x", "3", EOS]
  # Token 0 and EOS have the highest entropy and open nothing; of the two 2.0 the earlier is taken.
  assert cut(pieces, "entropy", THREE, entropy=entropy) == (["x|3", "x|3", "x|3|<eos>"], 0)
  assert cut(pieces[:4], "entropy", THREE, entropy=entropy[:4]) == (["x", "3", "x|3"], 0)
  assert cut(pieces, "entropy", ONE, entropy=entropy) == (["x|3|x|3|x|3|<eos>"], 0)


def test_probability_golden():
  probs = [0.1, 0.95, 0.2, 1.0, 0.5, 0.2, 0.3]
  pieces = ["x", "3", "x", "3", "x", "3", EOS]
  assert cut(pieces, "probability", probs=probs) == (["x|3", "x|3", "x", "3|<eos>"], 0)
  low = bound("probability", 16, threshold=0.4)(*trace(pieces, probs=probs))
  np.testing.assert_array_equal(low.segment_ids[:8], [0, 0, 1, 1, 1, 2, 2, -1])
  # Too many: the least probable stay; of the two 0.2 the earlier.
  assert cut(pieces, "probability", THREE, probs=probs) == (["x|3", "x|3|x", "3|<eos>"], 1)
  assert cut(pieces, "probability", ONE, probs=probs) == (["x|3|x|3|x|3|<eos>"], 3)


def test_probability_threshold_is_strict():
  at, below = np.float32(np.log(0.9)), np.nextafter(np.float32(np.log(0.9)), np.float32(-1))
  args = trace(["x", "3", "x"])
  args[2][1:3] = at, below
  np.testing.assert_array_equal(jitted(*ALL)(*args)["probability"].segment_ids[:3], [0, 0, 1])


def test_hybrid_golden():
  pieces = ["x", "\n", "x", " So", "3", "\n", " Let", " me", ".", "So", EOS]
  entropy = [0.0, 9.0, 1.0, 3.0, 9.0, 9.0, 2.0, 9.0, 9.0, 2.0, 9.0]
  # Candidates, with their entropy: x 1, So 3, Let 2 (newline and keyword, one cut), So 2.
  everything = ["x|\n", "x", " So|3|\n", " Let| me|.", "So|<eos>"]
  assert cut(pieces, "hybrid", entropy=entropy) == (everything, 0)
  merged = ["x|\n|x", " So|3|\n", " Let| me|.|So|<eos>"]
  assert cut(pieces, "hybrid", THREE, entropy=entropy) == (merged, 2)
  same = bound("hybrid", 3)(*trace(pieces, entropy=entropy))  # The target is k_max unless given.
  assert split(same, pieces) == [segment.split("|") for segment in merged]


def test_a_nan_or_infinite_priority_still_precedes_what_is_no_cut():
  pieces = ["x", "x", "\n", "x", "\n", "3", "\n", "3"]
  for bad in (np.nan, -np.inf):
    entropy = [5, 5, 5, bad, 5, bad, 5, bad]
    assert cut(pieces, "hybrid", THREE, entropy=entropy) == (["x|x|\n", "x|\n", "3|\n|3"], 1)


def test_thinning_is_even_over_the_cuts_found():
  pieces = ["x", "\n"] * 7
  line = "x|\n"
  # Seven lines in three groups: lines 0-2, 3-4, 5-6.
  assert cut(pieces, "newline", THREE) == (["|".join([line] * n) for n in (3, 2, 2)], 4)
  assert cut(pieces, "newline", ONE) == (["|".join([line] * 7)], 6)
  assert cut(pieces[:6], "newline", THREE) == ([line] * 3, 0)
  # Even over cuts, not over tokens.
  pieces = ["x", "\n"] * 5 + ["x"] * 12 + ["\n"]
  assert cut(pieces, "newline", THREE)[0][:2] == ["|".join([line] * 2)] * 2


# ------------------------------------------------------- edges of the trace


@pytest.mark.parametrize("method", segmentation.METHODS)
def test_short_traces(method):
  run = jitted(*ALL)
  empty = run(*trace([]))[method]
  assert (int(empty.num_segments), int(empty.num_merged)) == (0, 0)
  np.testing.assert_array_equal(empty.ends, np.zeros(16))
  np.testing.assert_array_equal(empty.segment_ids, np.full(T, -1))
  for pieces in (["x"], [EOS], ["x", EOS], ["\n", EOS], [EOS, EOS, EOS]):
    result = run(*trace(pieces, probs=[0.1] * len(pieces)))[method]
    assert (int(result.num_segments), int(result.num_merged)) == (1, 0), pieces
    np.testing.assert_array_equal(result.ends, np.full(16, len(pieces)))
    np.testing.assert_array_equal(result.segment_ids, padded([0] * len(pieces), -1, int))


@pytest.mark.parametrize("method", ["stride", "uniform", "entropy", "probability"])
def test_eos_rule_is_what_joins_eos(method):
  pieces = ["x", "3", "x", EOS]
  args = trace(pieces, probs=[0.1] * 4)
  assert split(jitted(4, stride=1)(*args)[method], pieces) == [["x"], ["3"], ["x", EOS]]
  without_rule = jitted(4, stride=1, eos_ids=())(*args)[method]
  assert split(without_rule, pieces) == [["x"], ["3"], ["x"], [EOS]]


@pytest.mark.parametrize("method", segmentation.METHODS)
def test_trace_that_fills_its_room(method):
  pieces = ["x", ".", " So", " x", ".", "\n\n"] * (T // 6)
  args = trace(pieces, probs=[0.5] * T)
  result = jitted(*ALL)(*args)[method]
  assert int(result.ends[-1]) == T
  assert list(itertools.chain(*split(result, pieces))) == pieces
  assert (int(result.num_segments) == 1) == (method == "whole")


# -------------------------------------------------- an oracle on characters

LETTER_BEFORE = "(?<![A-Za-z])"
KEYWORD_PATTERN = re.compile(f"(?: |{LETTER_BEFORE})(?:(?:So|Let me)(?![A-Za-z])|Hmm,)")


def opens_line(head, rest):
  return head.endswith("\n") and not re.match(r"\s*\n", rest)


def opens_by_text(method, head, rest):
  """Whether a segment opens between the texts `head` and `rest`."""
  if method == "newline":
    return opens_line(head, rest)
  if method == "paragraph":
    return opens_line(head, rest) and head[len(head.rstrip()) :].count("\n") >= 2
  if method == "sentence":
    ends = re.search(r"[.?!]\"?\Z", head) and rest.startswith(" ") and not re.match(r"\s*\n", rest)
    return opens_line(head, rest) or bool(ends)
  if method == "keyword":
    return bool(KEYWORD_PATTERN.match(head + rest, len(head)))
  assert method == "hybrid"
  return opens_line(head, rest) or opens_by_text("keyword", head, rest)


def oracle(method, pieces, log_probs, entropy, limit, after_exit=None):
  """Cuts kept and number of cuts given up, in plain Python over the text."""
  last = len(pieces)
  while last and pieces[last - 1] == EOS:
    last -= 1
  places, exits = range(1, last), []
  if after_exit:
    left = exit_place(pieces)
    if 0 < left < last and limit > 1 and method != "whole":
      exits, limit = [left], limit - 1
    places = [t for t in places if (t < left if after_exit == "one" else t not in exits)]
  found = {
    "whole": lambda: [],
    "stride": lambda: [t for t in places if t % STRIDE == 0],
    "uniform": lambda: list(places),
    "entropy": lambda: list(places),
    "probability": lambda: [t for t in places if log_probs[t] < np.log(THRESHOLD)],
  }.get(
    method,
    lambda: [t for t in places if opens_by_text(method, "".join(pieces[:t]), "".join(pieces[t:]))],
  )()
  if method in ("entropy", "hybrid"):
    kept = sorted(found, key=lambda t: (-entropy[t], t))[: limit - 1]
  elif method == "probability":
    kept = sorted(found, key=lambda t: (log_probs[t], t))[: limit - 1]
  elif len(found) >= limit:
    segments = len(found) + 1
    firsts = [(g * segments + limit - 1) // limit for g in range(1, limit)]
    kept = [found[first - 1] for first in firsts]
  else:
    kept = found
  return sorted(kept + exits), 0 if method in ("uniform", "entropy") else len(found) - len(kept)


def exit_place(pieces):
  """The piece in which the first exit begins, by searching the text; len(pieces) without one."""
  place = "".join(pieces).find("</think>")
  ends = list(itertools.accumulate(map(len, pieces)))
  return next((t for t, end in enumerate(ends) if place < end), 0) if place >= 0 else len(pieces)


@st.composite
def traces(draw):
  """Random texts, mostly closed by EOS, with ties in entropy and log-probability."""
  pieces = draw(st.lists(st.sampled_from(VOCAB), max_size=T - 1))
  pieces += [EOS] * draw(st.sampled_from([0, 1]))
  rng = np.random.default_rng(draw(st.integers(0, 2**16)))
  return pieces, rng.choice(LOG_PROBS, T), rng.choice(ENTROPIES, T)


def arguments(pieces, log_probs, entropy):
  return trace(pieces)[0], np.arange(T) < len(pieces), log_probs, entropy, TABLES


@hypothesis.settings(max_examples=150)
@hypothesis.given(traces())
def test_equals_oracle(random_trace):
  pieces, log_probs, entropy = random_trace
  for k_max, target in LIMITS:
    results = jax.device_get(jitted(k_max, target)(*arguments(*random_trace)))
    for method, result in results.items():
      kept, merged = oracle(method, pieces, log_probs, entropy, target or k_max)
      assert result.ends.tolist() == (kept + [len(pieces)] * k_max)[:k_max], method
      assert result.num_segments == (len(kept) + 1 if pieces else 0), method
      assert result.num_merged == merged, method


@hypothesis.given(traces())
def test_segments_partition_the_trace(random_trace):
  pieces, length = random_trace[0], len(random_trace[0])
  for k_max, target in LIMITS:
    results = jax.device_get(jitted(k_max, target)(*arguments(*random_trace)))
    for method, result in results.items():
      num = int(result.num_segments)
      assert (1 if length else 0) <= num <= (target or k_max), method
      assert np.all(np.diff(result.ends[:num], prepend=0) > 0), method
      np.testing.assert_array_equal(result.ends[max(num - 1, 0) :], length, method)
      np.testing.assert_array_equal(np.repeat(np.arange(k_max), result.lengths), result.segment_ids[:length])
      np.testing.assert_array_equal(result.segment_ids[length:], -1, method)
      np.testing.assert_array_equal(result.lengths > 0, result.mask, method)
      assert num <= 1 or set(split(result, pieces)[-1]) != {EOS}, method
      assert all(leaf.dtype == np.int32 for leaf in jax.tree.leaves(result)), method


@hypothesis.given(traces())
def test_uniform_lengths_differ_by_at_most_one(random_trace):
  content = [piece for piece in random_trace[0] if piece != EOS]
  for pieces in (content, [*content, EOS]):
    lengths = [len(piece) for piece in split(jitted(*THREE)(*trace(pieces))["uniform"], pieces)]
    assert not pieces or max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("method", segmentation.METHODS)
def test_one_place_is_the_whole_trace(method):
  for length in (0, 1, 9, T):
    args = (*(x[0] for x in random_batch(length, [length])), TABLES)
    one, whole = (jitted(*ONE)(*args)[name] for name in (method, "whole"))
    for name in ("ends", "segment_ids", "num_segments"):
      np.testing.assert_array_equal(getattr(one, name), getattr(whole, name))


# ------------------------------------------- padding, batches, transformations


def random_batch(seed, lengths):
  rng = np.random.default_rng(seed)
  b = len(lengths)
  tokens = rng.integers(0, len(VOCAB), (b, T)).astype(np.int32)
  mask = np.arange(T)[None, :] < np.array(lengths)[:, None]
  return tokens, mask, rng.choice(LOG_PROBS, (b, T)), rng.choice(ENTROPIES, (b, T))


def test_padding_content_changes_nothing():
  tokens, mask, log_probs, entropy = random_batch(0, lengths=[0, 1, 7, 13, 23])
  clean = batched()(np.where(mask, tokens, 0), mask, *(np.where(mask, x, 0) for x in (log_probs, entropy)), TABLES)
  for garbage_token in (IDS["\n"], IDS["So"], IDS["me"], IDS["x"], -1, len(VOCAB) + 5):
    for garbage in (np.nan, -np.inf, np.inf):
      dirty = (
        np.where(mask, tokens, garbage_token).astype(np.int32),
        mask,
        np.where(mask, log_probs, garbage).astype(np.float32),
        np.where(mask, entropy, garbage).astype(np.float32),
      )
      jax.tree.map(np.testing.assert_array_equal, batched()(*dirty, TABLES), clean)


def row_of(tree, row):
  return jax.tree.map(lambda x: x[row], tree)


def test_rows_do_not_see_their_neighbours():
  batch = random_batch(1, lengths=[5, 24, 0, 17, 9])
  others = random_batch(2, lengths=[24, 3, 11, 1, 0])
  result = batched()(*batch, TABLES)
  for row in range(5):
    neighbours = [other.copy() for other in others]
    for neighbour, x in zip(neighbours, batch):
      neighbour[row] = x[row]
    again = batched()(*neighbours, TABLES)
    jax.tree.map(np.testing.assert_array_equal, row_of(again, row), row_of(result, row))


def test_vmap_and_jit_equal_eager():
  batch = random_batch(1, lengths=[5, 24, 0, 17, 9])
  result = batched()(*batch, TABLES)
  for row in range(5):
    args = (*(x[row] for x in batch), TABLES)
    eager = every_method(*args, k_max=12, target=3)
    jax.tree.map(np.testing.assert_array_equal, row_of(result, row), eager)
    jax.tree.map(np.testing.assert_array_equal, jitted(*THREE)(*args), eager)


def test_ids_outside_the_vocabulary_read_as_plain_tokens():
  # Embedding tables are padded, so a sampler can emit ids that the tokenizer lacks.
  tokens, mask, log_probs, entropy, tables = trace(["x", "3", "\n", "3", "So"])
  plain = jitted(*ALL)(tokens, mask, log_probs, entropy, tables)
  for outside in (len(VOCAB), 10**6, -len(VOCAB) + 1):  # The last would wrap round to a newline.
    tokens[3] = outside
    again = jitted(*ALL)(tokens, mask, log_probs, entropy, tables)
    jax.tree.map(np.testing.assert_array_equal, again, plain)


def test_long_traces_need_linear_memory():
  length = 2**15
  shape = functools.partial(jax.ShapeDtypeStruct, (length,))
  fun = bound("hybrid", k_max=64, exit_table=EXIT_TABLE)  # Its parts are those of all others.
  tables = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), TABLES)
  args = shape(np.int32), shape(bool), shape(np.float32), shape(np.float32), tables
  compiled = jax.jit(fun).lower(*args).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 200 * length  # [T, T] would be 32768 T.


# ------------------------------------------------------------ the exit


RESPONSE = ["x", "\n", " So", ".", "\n", "</", "think>\n", "x", "\n", "3", "\n", EOS]


def cut_with_exit(pieces, method, after_exit, limits=LIMITS[2], entropy=None):
  """As `cut`, and then the first token of the exit and the states after it."""
  result = jitted(*limits, after_exit=after_exit)(*trace(pieces, entropy))[method]
  segments = ["|".join(piece) for piece in split(result, pieces)]
  return segments, int(result.num_merged), int(result.thought_end), np.flatnonzero(result.after_exit).tolist()


def test_the_exit_opens_the_last_segment_golden():
  rest = "</|think>\n|x|\n|3|\n|<eos>"
  assert cut_with_exit(RESPONSE, "newline", "one") == (["x|\n", " So|.|\n", rest], 0, 5, [])
  # Where the method would not cut, the exit opens a segment all the same.
  assert cut_with_exit(RESPONSE, "keyword", "one") == (["x|\n", " So|.|\n", rest], 0, 5, [])
  assert cut_with_exit(RESPONSE[2:], "keyword", "one") == ([" So|.|\n", rest], 0, 3, [])
  # Its segment counts: with a target of 3, two are left for the thought.
  longer = ["x", "\n", *RESPONSE]
  assert cut_with_exit(longer, "newline", "one", THREE) == (["x|\n|x|\n", " So|.|\n", rest], 1, 7, [])
  assert cut_with_exit(longer, "uniform", "one", THREE) == (["x|\n|x|\n", " So|.|\n", rest], 0, 7, [])
  # Entropies beyond the exit are nothing to the thought: of the thought's the highest is at 3.
  entropy = [0, 1, 2, 9, 1, 8, 8, 8, 8, 8, 8, 8, 8, 8]
  assert cut_with_exit(longer, "entropy", "one", THREE, entropy) == (["x|\n|x", "\n| So|.|\n", rest], 0, 7, [])


def test_the_exit_is_cut_after_too_where_that_is_asked_for():
  parts = ["x|\n", " So|.|\n", "</|think>\n", "x|\n", "3|\n|<eos>"]
  # State 2 is the whole thought: the exit is yet to be written there.
  assert cut_with_exit(RESPONSE, "newline", "cut") == (parts, 0, 5, [3, 4])
  # Of four other segments two are left: the exit keeps its own.
  assert cut_with_exit(RESPONSE, "newline", "cut", THREE) == (
    ["x|\n| So|.|\n", "</|think>\n", "x|\n|3|\n|<eos>"],
    2,
    5,
    [2],
  )


@pytest.mark.parametrize("after_exit", segmentation.AFTER_EXIT)
def test_traces_without_an_exit_or_with_one_first(after_exit):
  for pieces in (["x", "\n", "x", "\n", "3", EOS], ["x", "\n", "x", "</"], []):
    results = jitted(*THREE, after_exit=after_exit)(*trace(pieces))
    for method, plain in jitted(*THREE)(*trace(pieces)).items():
      assert results[method].thought_end == len(pieces) and not np.any(results[method].after_exit)
      same = dataclasses.replace(results[method], thought_end=None, solution_start=None)
      jax.tree.map(np.testing.assert_array_equal, same, plain)
  pieces = ["</think>", "x", "\n", "3", "\n", "3", EOS]
  segments = {"one": ["|".join(pieces)], "cut": ["</think>|x|\n", "3|\n", "3|<eos>"]}[after_exit]
  states = {"one": [], "cut": [1, 2]}[after_exit]
  assert cut_with_exit(pieces, "newline", after_exit) == (segments, 0, 0, states)


def test_one_place_or_the_method_whole_is_one_segment_exit_and_all():
  for method, limits in (("whole", ALL), ("newline", ONE)):
    segments, _, thought_end, after = cut_with_exit(RESPONSE, method, "one", limits)
    assert (segments, thought_end, after) == (["|".join(RESPONSE)], 5, [])


def test_no_table_is_no_exit():
  assert jitted(*ALL)(*trace(RESPONSE))["newline"].thought_end is None
  assert not np.any(jitted(*ALL)(*trace(RESPONSE))["newline"].after_exit)


@hypothesis.settings(max_examples=150)
@hypothesis.given(traces(), st.sampled_from(segmentation.AFTER_EXIT), st.integers(0, T - 1))
def test_with_an_exit_equals_oracle(random_trace, after_exit, place):
  pieces, log_probs, entropy = random_trace
  if place < len(pieces) and pieces[place] != EOS:  # Random texts have an exit too seldom.
    pieces[place] = "</think>"
  for k_max, target in LIMITS:
    results = jax.device_get(jitted(k_max, target, after_exit=after_exit)(*arguments(*random_trace)))
    for method, result in results.items():
      kept, merged = oracle(method, pieces, log_probs, entropy, target or k_max, after_exit)
      assert result.ends.tolist() == (kept + [len(pieces)] * k_max)[:k_max], method
      assert result.num_segments == (len(kept) + 1 if pieces else 0), method
      assert result.num_merged == merged, method
      assert result.thought_end == exit_place(pieces), method
      # "</" is followed by "think>", or the exit is one token.
      size = 0 if result.thought_end == len(pieces) else 1 + (pieces[result.thought_end] == "</")
      assert result.solution_start == result.thought_end + size, method
      starts = [0, *kept][:k_max] if pieces else []
      assert np.flatnonzero(result.after_exit).tolist() == [k for k, t in enumerate(starts) if t > exit_place(pieces)]


def test_the_exit_of_a_row_is_nothing_to_its_neighbours():
  batch = random_batch(3, lengths=[24, 24, 9])
  batch[0][0, 7] = batch[0][2, 3] = IDS["</think>"]
  every = functools.partial(every_method, k_max=12, target=4, after_exit="one")
  result = jax.jit(jax.vmap(every, in_axes=(0, 0, 0, 0, None)))(*batch, TABLES)
  assert result["newline"].thought_end.tolist()[0] <= 7 and result["newline"].thought_end.tolist()[2] <= 3
  for row in range(3):
    eager = every(*(x[row] for x in batch), TABLES)
    jax.tree.map(np.testing.assert_array_equal, row_of(result, row), eager)


# ------------------------------------------------- methods of one's own


def odd_tokens(trace):
  """A method as users write one: before every token of odd id, those of high id kept."""
  return trace.tokens % 2 == 1, trace.tokens.astype(np.float32)


def test_a_method_of_ones_own_is_a_callable_or_a_path():
  args = trace(["x", "3", "So", "3", ".", EOS])  # 8 9 10 9 5 0: the places of 9 and 5.
  for method in (odd_tokens, f"{__name__}:odd_tokens"):
    assert split(bound(method, 4)(*args), range(6)) == [[0], [1, 2], [3], [4, 5]]
    result = bound(method, 3)(*args)
    assert split(result, range(6)) == [[0], [1, 2], [3, 4, 5]] and int(result.num_merged) == 1


def test_what_a_method_may_read():
  def spy(trace):
    seen.append(trace)
    return trace.can_open, None

  seen = []
  args = trace(["x", "\n", "</think>", "x", EOS])
  bound(spy, 8, target=3, stride=5, threshold=0.5, exit_table=EXIT_TABLE)(*args)
  assert np.flatnonzero(seen[0].can_open).tolist() == [1]  # Not the first token, nor from the exit on.
  assert int(seen[0].target) == 2 and (seen[0].stride, seen[0].threshold) == (5, 0.5)
  assert seen[0].look_up("newlines")[:3].tolist() == [0, 1, 0]
  np.testing.assert_array_equal(seen[0].read("entropy"), args[3])


@pytest.mark.parametrize(
  ("returned", "message"),
  [
    (lambda t: t.can_open, "method='method' returned a .* must return \\(cuts, priority\\)"),
    (lambda t: (t.tokens, None), "cuts of method='method' is int32 and must be boolean"),
    (lambda t: (t.can_open[1:], None), r"cuts of method='method' has shape \(23,\)"),
    (lambda t: (t.can_open, t.tokens), "priority of method='method' is int32 and must be floating"),
    (lambda t: (t.can_open, t.entropy[1:]), r"priority of method='method' has shape \(23,\)"),
  ],
)
def test_a_method_that_returns_something_else_is_refused(returned, message):
  def method(trace):
    return returned(trace)

  with pytest.raises(ValueError, match=message):
    bound(method, 4)(*trace(["x"]))


# ------------------------------------------------------------------ errors


def test_what_a_method_does_not_read_is_not_asked_for():
  tokens, mask, log_probs, entropy, tables = trace(["x", "\n", " So", "3", EOS], probs=[0.1] * 5)
  given = {
    "whole": {}, "stride": {}, "uniform": {}, "newline": {"tables": tables}, "paragraph": {"tables": tables},
    "sentence": {"tables": tables}, "keyword": {"tables": tables}, "entropy": {"entropy": entropy},
    "probability": {"log_probs": log_probs}, "hybrid": {"tables": tables, "entropy": entropy},
  }  # fmt: skip
  every = jitted(*ALL)(tokens, mask, log_probs, entropy, tables)
  for method, needed in given.items():
    run = functools.partial(segmentation.segment, tokens, mask, method=method, k_max=16, stride=STRIDE, eos_ids=0)
    jax.tree.map(np.testing.assert_array_equal, run(**{"tables": None} | needed), every[method])
    for name in needed:
      with pytest.raises(ValueError, match=f"method='{method}' reads {name}, which is None: pass"):
        run(**{"tables": None} | needed | {name: None})
  assert set(given) == set(segmentation.METHODS)


def test_several_ids_may_end_a_trace():
  args = trace(["x", "3", "x", "So", EOS])
  both = bound("stride", 8, stride=1, eos_ids=(IDS[EOS], IDS["So"]))(*args)
  assert split(both, range(5)) == [[0], [1], [2, 3, 4]]
  jax.tree.map(
    np.testing.assert_array_equal, both, bound("stride", 8, stride=1, eos_ids=[IDS["So"], np.int32(0)])(*args)
  )
  # One that ends no trace here changes nothing.
  other = bound("stride", 8, stride=1, eos_ids=(IDS[EOS], 10**6))(*args)
  assert split(other, range(5)) == [[0], [1], [2], [3, 4]]


def test_a_hole_in_the_mask_is_named_and_under_tracing_ends_the_trace():
  pieces = ["x", "\n", "x", "\n", "x", "\n", "x"]
  args = list(trace(pieces, probs=[0.1] * 7))
  args[1][3] = False
  with pytest.raises(ValueError, match=r"mask\[3\] is False and mask\[4\] is True.*prefix_mask"):
    bound("newline", 4)(*args)
  prefix = [x.copy() if isinstance(x, np.ndarray) else x for x in args]
  prefix[1][3:] = False
  for method, result in jitted(*ALL)(*args).items():
    jax.tree.map(np.testing.assert_array_equal, result, jitted(*ALL)(*prefix)[method])
    assert int(result.ends[-1]) == 3 and result.segment_ids[3:].tolist() == [-1] * (T - 3)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"method": "newlines"}, "method='newlines' is unknown; did you mean 'newline'"),
    ({"method": 3}, "method=3 is a int"),
    ({"k_max": 0}, "k_max=0 .* k_max >= 1"),
    ({"target": 0}, r"target=0 is outside \[1, k_max=4\]"),
    ({"target": 5}, r"target=5 is outside \[1, k_max=4\]"),
    ({"stride": 0}, "stride=0 .* stride >= 1"),
    ({"threshold": 0.0}, r"threshold=0.0 is outside \(0, 1\)"),
    ({"threshold": 1.0}, r"threshold=1.0 is outside \(0, 1\)"),
    ({"threshold": float("nan")}, "threshold=nan"),
    ({"after_exit": "none"}, "after_exit='none' is unknown; did you mean 'one'"),
    ({"eos_ids": "7"}, "eos_ids='7' must be a token id or a tuple of token ids"),
    ({"eos_ids": 2.0}, "eos_ids=2.0 must be a token id"),
  ],
)
def test_bad_options_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    bound(**{"method": "stride", "k_max": 4, **options})(*trace(["x"]))


def test_int32_overflow_is_an_error():
  shape = functools.partial(jax.ShapeDtypeStruct, (2**17,))
  run = functools.partial(segmentation.segment, tables=TABLES, method="stride")
  jax.eval_shape(functools.partial(run, k_max=2**13), shape(np.int32), shape(bool))
  with pytest.raises(ValueError, match="overflows int32"):
    jax.eval_shape(functools.partial(run, k_max=2**14), shape(np.int32), shape(bool))


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize(
  ("spoil", "message"),
  [
    (lambda x: x[None], r"has shape \(1, 24\).*vmap"),
    (lambda x: x[:-1], r"has shape \((24|23),\)"),
    (lambda x: x.astype(np.complex64), "is complex64 and must be"),
    (lambda x: x.tolist(), r"is a list and must be an array \[T\]: pass jnp.asarray"),
  ],
)
def test_bad_arrays_are_refused(place, spoil, message):
  args = list(trace(["x"]))
  args[place] = spoil(args[place])
  with pytest.raises(ValueError, match=message):
    bound("newline", 4)(*args)


def test_a_float_token_says_what_to_do():
  args = list(trace(["x"]))
  args[0] = args[0].astype(np.float32)
  with pytest.raises(ValueError, match=r"tokens is float32 and must be integer: pass tokens.astype\(jnp.int32\)"):
    bound("newline", 4)(*args)


def test_bad_tables_are_refused():
  args = trace(["x"])[:4]
  with pytest.raises(ValueError, match=r"tables.ends_sentence has shape \(20,\)"):
    bound("newline", 4)(*args, dataclasses.replace(TABLES, newlines=TABLES.newlines[:-1]))
  with pytest.raises(ValueError, match=r"tables.keywords has shape \(2,\) and must be \[W, L\]"):
    bound("whole", 4)(*args, dataclasses.replace(TABLES, keywords=TABLES.keywords[0]))
  with pytest.raises(ValueError, match="tables is a tuple: make it with vocab_tables"):
    bound("whole", 4)(*args, ())
