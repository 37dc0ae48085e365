"""The parts of a response: an oracle on bytes, traces cut by hand, every tokenisation of the exit."""

import functools
import itertools
import pathlib
import re

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

import rredcot_jax
from rredcot_jax.ops import anatomy

ASSETS = pathlib.Path(rredcot_jax.__file__).parent / "assets"

T = 12
MARKER = "</think>"
# The marker as one token, in pieces, with text before and after it; "" is an id that the vocabulary leaves out.
VOCAB = [
  "",
  "a",
  "\n",
  "</think>",
  "</",
  "think",
  ">",
  "<",
  "/",
  "th",
  "ink",
  ">\n",
  ".</",
  "x</think>y",
  "nk></think>",
]
IDS = {text: token for token, text in enumerate(VOCAB)}
TABLE = anatomy.exit_table(VOCAB, MARKER)

jitted = jax.jit(anatomy.find_exit)
batched = jax.jit(jax.vmap(anatomy.find_exit, in_axes=(0, 0, None)))


def padded(ids, width=T, fill=IDS[MARKER]):
  """Tokens and mask; the padding is the exit itself, which must not be read."""
  return np.array([*ids, *[fill] * (width - len(ids))], np.int32), np.arange(width) < len(ids)


def places(ids, table=TABLE, width=T):
  return tuple(int(x) for x in jitted(*padded(ids, width), table))


def of(pieces):
  return places([IDS[piece] for piece in pieces])


# ----------------------------------------------------------------- goldens


@pytest.mark.parametrize(
  ("pieces", "expected"),
  [
    ([], (0, 0)),
    (["a", "a"], (2, 2)),  # No exit.
    (["a", "\n", "</think>", "\n", "a"], (2, 3)),
    (["a", "</", "think", ">", "a"], (1, 4)),
    (["a", "<", "/", "th", "ink", ">\n", "a"], (1, 6)),  # What follows the marker in its last token is the exit's.
    (["a", ".</", "think", ">\n", "a"], (1, 4)),  # What precedes it in its first token, too.
    (["a", "x</think>y", "a"], (1, 2)),
    (["</think>", "a"], (0, 1)),  # It comes first.
    (["</think>"], (0, 1)),
    (["a", "</think>", "a", "</think>"], (1, 2)),  # The first of two.
    (["a", "<", "</think>", "a"], (2, 3)),
    (["</", "</", "think", ">"], (1, 4)),  # A false start.
    (["</", "th", "</", "th", "ink", ">"], (2, 6)),
    (["a", "</", "think"], (3, 3)),  # Cut off within the exit.
    (["</", "th", "nk></think>"], (2, 3)),  # Not the end of the first one, but a whole second one.
    (["</", "think", "a", ">"], (4, 4)),
    (["</", "th", "", "ink", ">"], (5, 5)),  # An id without text is no part of an exit.
    (["a"] * 11 + ["</think>"], (11, 12)),
    (["a"] * 9 + ["</", "think", ">"], (9, 12)),
    (["a"] * 10 + ["</", "think"], (12, 12)),
  ],
)
def test_find_exit_golden(pieces, expected):
  assert of(pieces) == expected


def test_a_token_that_ends_one_exit_and_holds_another():
  vocab = ["a", "</thi", "nk></think>"]
  assert places([0, 1, 2, 0], anatomy.exit_table(vocab, MARKER)) == (1, 3)


def test_a_marker_that_overlaps_itself():
  vocab = ["a", "b", "aa", "ab", "aab"]
  table = anatomy.exit_table(vocab, "aab")
  assert places([0, 0, 0, 1], table) == (1, 4)  # a|aab: the first a is no part of it.
  assert places([2, 3], table) == (0, 2)  # aa|ab holds aab from the second a on, in token 0.
  assert places([2, 0, 1], table) == (0, 3)
  assert places([0, 4], table) == (1, 2)


def test_markers_of_one_byte_and_of_the_longest():
  assert places([0, 1, 2], anatomy.exit_table(["a", "b#c", "#"], "#")) == (1, 2)
  longest = "0123456789abcdefghijklmnopqrstuv"
  assert len(longest) == anatomy.MAX_MARKER
  vocab = [*longest, longest[:31], "x" * 40 + longest[:30]]
  table = anatomy.exit_table(vocab, longest)
  assert places(range(32), table, width=40) == (0, 32)
  assert places([0, 32, 31], table) == (1, 3)
  assert places([33, 30, 31, 5], table) == (0, 3)
  assert places([33, 31], table) == (2, 2)


def test_ids_outside_the_vocabulary_are_no_part_of_an_exit():
  for outside in (len(VOCAB), 10**6, -1, -len(VOCAB) + IDS["think"]):  # The last would wrap round to "think".
    assert places([IDS["a"], outside, IDS["</think>"]]) == (2, 3)
    assert places([IDS["</"], outside, IDS[">"]]) == (3, 3)


def test_characters_split_between_tokens_are_found_in_bytes():
  marker = "思考完"
  data = marker.encode()
  vocab = [b"a", data[:1], data[1:4], data[4:], data[4:] + b"\n", data]
  table = anatomy.exit_table(vocab, marker)
  assert places([0, 1, 2, 3, 0], table) == (1, 4)
  assert places([0, 1, 2, 4, 0], table) == (1, 4)
  assert places([0, 5], table) == (1, 2)
  assert places([0, 1, 3], table) == (3, 3)
  with pytest.raises(ValueError, match="give token_texts as bytes"):
    anatomy.exit_table(["a", "\ufffd"], marker)
  assert places([1], anatomy.exit_table(["a", marker], marker)) == (0, 1)
  # In ASCII a broken character beside the marker does no harm.
  assert places([0, 1], anatomy.exit_table(["\ufffd</", "think>\ufffd"], MARKER)) == (0, 2)


# ------------------------------------------------------- an oracle on bytes


def oracle(texts, marker):
  """(thought_end, solution_start) by searching the joined bytes."""
  begins = "".join(texts).find(marker)
  if begins < 0:
    return len(texts), len(texts)
  ends = list(itertools.accumulate(map(len, texts)))
  holds = lambda place: next(t for t, end in enumerate(ends) if place < end)
  return holds(begins), holds(begins + len(marker) - 1) + 1


MARKERS = (MARKER, "aab", "aa", "abab", "b", "abaab")


@functools.cache
def vocabulary(marker):
  """Pieces of the marker, alone and with neighbours, and what only looks like it."""
  pieces = {marker[i:j] for i in range(len(marker)) for j in range(i + 1, len(marker) + 1)}
  if len(marker) > 5:
    pieces = {p for p in pieces if len(p) < 4 or len(p) > 6}
  mixed = {"a" + p for p in pieces} | {p + "a" for p in pieces} | {marker[-2:] + marker, marker + marker[:2]}
  return sorted(pieces | mixed | {"a", "b", "ab"})


@functools.cache
def table_of(marker):
  return anatomy.exit_table(vocabulary(marker), marker)


@hypothesis.settings(max_examples=400)
@hypothesis.given(st.sampled_from(MARKERS), st.data())
def test_equals_a_search_of_the_text(marker, data):
  vocab = vocabulary(marker)
  ids = data.draw(st.lists(st.integers(0, len(vocab) - 1), max_size=T))
  assert places(ids, table_of(marker)) == oracle([vocab[i] for i in ids], marker)


@hypothesis.given(st.lists(st.integers(1, 7), unique=True), st.integers(0, 3), st.integers(0, 3))
def test_every_way_to_split_the_marker_is_found(splits, before, after):
  bounds = [0, *sorted(splits), len(MARKER)]
  pieces = [MARKER[i:j] for i, j in itertools.pairwise(bounds)]
  texts = ["a"] * before + pieces + ["a"] * after
  vocab = sorted(set(texts))
  ids = [vocab.index(text) for text in texts]
  assert places(ids, anatomy.exit_table(vocab, MARKER), width=16) == (before, before + len(pieces))


@functools.cache
def byte_level():
  """A byte-level BPE, which has the marker as a token of its own, and its table."""
  tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed: the operations do not need it")
  tokenizer = tokenizers.Tokenizer.from_file(str(ASSETS / "gsm_symbolic" / "tokenizer.json"))
  texts = [tokenizer.decode([token], skip_special_tokens=False) for token in range(tokenizer.get_vocab_size())]
  return tokenizer, texts, anatomy.exit_table(texts, MARKER)


@pytest.mark.parametrize("before", ["", "So 7 + 1 = 8.\n", "caf\u00e9 \u601d </", "</think", "<"])
@pytest.mark.parametrize("after", ["", "\n\nThe answer is 8.", ">", " </think>"])
def test_a_byte_level_vocabulary_is_searched_as_its_text_is(before, after):
  tokenizer, texts, table = byte_level()
  encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
  for split in range(len(MARKER)):  # At 0 the marker is the token of that name.
    ids = [*encode(before), *encode(MARKER[:split]), *encode(MARKER[split:]), *encode(after)]
    found = places(ids, table, width=48)
    assert found == oracle([texts[token] for token in ids], MARKER), ids
    assert found[0] < len(ids)


# ------------------------------------------------------------- spellings


def test_spellings_of_ids():
  table = anatomy.exit_table_of_ids([[9], [3, 4], [3, 4, 2]])
  cases = {
    (1, 9, 5): (1, 2),
    (1, 3, 4, 5): (1, 3),
    (1, 3, 4, 2, 5): (1, 4),  # The longer of two that begin at the same token.
    (1, 3, 5, 4): (4, 4),
    (3, 3, 4): (1, 3),
    (1, 3, 4, 9): (1, 3),  # The first, not the shortest.
    (9, 3, 4): (0, 1),
    (1, 3): (2, 2),
    (10**6, -1, 9): (2, 3),
  }
  assert {ids: places(ids, table) for ids in cases} == cases


def test_ids_and_texts_agree_where_the_exit_is_a_token():
  by_ids = anatomy.exit_table_of_ids([[IDS[MARKER]]])
  for ids in ([1, 2, 3, 1], [3], [1], [], [3, 3]):
    assert places(ids, by_ids) == places(ids)


# ----------------------------------------------- prefix masks and holes


def test_prefix_mask_golden():
  tokens = np.array([[5, 0, 7, 0], [0, 0, 0, 0], [7, 7, 5, 0], [5, 5, 5, 8]])
  one = anatomy.prefix_mask(tokens, 7)
  assert one.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]]
  several = anatomy.prefix_mask(tokens, (7, 8, 5))
  assert several.tolist() == [[1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0]]
  assert one.dtype == bool
  np.testing.assert_array_equal(jax.jit(functools.partial(anatomy.prefix_mask, end_ids=7))(tokens), one)
  assert anatomy.prefix_mask(tokens[0], 7).tolist() == [True, True, True, False]
  assert anatomy.prefix_mask(np.zeros((2, 0), np.int32), 7).shape == (2, 0)


@hypothesis.given(st.lists(st.integers(0, 3), max_size=9), st.sets(st.integers(0, 3), min_size=1))
def test_prefix_mask_ends_with_the_first_end(ids, ends):
  mask = np.asarray(anatomy.prefix_mask(np.array(ids, np.int32), sorted(ends))).tolist()
  first = next((t for t, token in enumerate(ids) if token in ends), len(ids))
  assert mask == [t <= first for t in range(len(ids))]


@pytest.mark.parametrize("tokens", [np.ones((2, 3)), [1, 2], 3, np.int32(3), np.ones(3, bool)])
def test_prefix_mask_refuses_what_is_no_array_of_ids(tokens):
  with pytest.raises(ValueError, match=re.escape("must be an integer array [..., T]")):
    anatomy.prefix_mask(tokens, 7)


@pytest.mark.parametrize("ids", ["7", 7.0, (), None, ((7,),), True])
def test_prefix_mask_refuses_what_is_no_id(ids):
  with pytest.raises(ValueError, match=f"end_ids={re.escape(repr(ids))}"):
    anatomy.prefix_mask(np.zeros(3, np.int32), ids)


def test_a_hole_is_named_and_under_tracing_ends_the_trace():
  tokens, _ = padded([IDS["a"], IDS["</think>"], IDS["a"], IDS["</think>"]])
  mask = np.array([True, False, True, True] + [False] * (T - 4))
  with pytest.raises(ValueError, match=r"mask\[1\] is False and mask\[2\] is True.*prefix_mask"):
    anatomy.find_exit(tokens, mask, TABLE)
  assert tuple(map(int, jitted(tokens, mask, TABLE))) == (1, 1)


# ------------------------------------------------ transformations, errors


def random_batch(seed, lengths):
  tokens = np.random.default_rng(seed).integers(0, len(VOCAB), (len(lengths), T)).astype(np.int32)
  tokens[0, 2:5] = [IDS["</"], IDS["think"], IDS[">"]]
  return tokens, np.arange(T)[None, :] < np.array(lengths)[:, None]


def test_jit_and_vmap_equal_eager_and_rows_do_not_see_their_neighbours():
  batch = random_batch(0, [9, 0, 12, 7, 4, 12])
  result = np.stack(batched(*batch, TABLE), axis=1)
  assert result.dtype == np.int32 and result[0].tolist() == [2, 5]
  assert len({tuple(row) for row in result.tolist()}) > 3
  others = random_batch(1, [12, 3, 0, 1, 12, 5])
  for row, (tokens, mask) in enumerate(zip(*batch)):
    np.testing.assert_array_equal(np.stack(anatomy.find_exit(tokens, mask, TABLE)), result[row])
    np.testing.assert_array_equal(np.stack(jitted(tokens, mask, TABLE)), result[row])
    neighbours = [x.copy() for x in others]
    neighbours[0][row], neighbours[1][row] = tokens, mask
    np.testing.assert_array_equal(np.stack(batched(*neighbours, TABLE), axis=1)[row], result[row])


def test_a_trace_without_room():
  assert tuple(map(int, anatomy.find_exit(np.zeros(0, np.int32), np.zeros(0, bool), TABLE))) == (0, 0)


def test_memory_is_linear_in_the_trace():
  length = 2**15
  args = jax.ShapeDtypeStruct((length,), np.int32), jax.ShapeDtypeStruct((length,), bool)
  compiled = jitted.lower(*args, TABLE).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 200 * length


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: anatomy.exit_table(VOCAB, ""), "marker='' has 0 bytes"),
    (lambda: anatomy.exit_table(VOCAB, "x" * 33), "has 33 bytes; it must have 1 to 32"),
    (lambda: anatomy.exit_table_of_ids([]), r"spellings=\[\] must be"),
    (lambda: anatomy.exit_table_of_ids("abc"), "spellings='abc' must be"),
    (lambda: anatomy.exit_table_of_ids([[]]), r"spelling \[\] must be 1 to 32"),
    (lambda: anatomy.exit_table_of_ids([[1], [2, -3]]), r"spelling \[2, -3\]"),
    (lambda: anatomy.exit_table_of_ids([[1] * 33]), "must be 1 to 32 token ids"),
    (lambda: anatomy.exit_table_of_ids([3]), "spelling 3 must be"),
    (lambda: anatomy.find_exit(np.zeros(3), np.ones(3, bool), TABLE), "tokens is float64 and must be integer"),
    (lambda: anatomy.find_exit([1, 2], np.ones(2, bool), TABLE), "tokens is a list"),
    (
      lambda: anatomy.find_exit(np.zeros((2, 3), int), np.ones((2, 3), bool), TABLE),
      r"tokens has shape \(2, 3\).*vmap",
    ),
    (lambda: anatomy.find_exit(np.zeros(3, int), np.ones(3, int), TABLE), "mask is int64 and must be boolean"),
    (lambda: anatomy.find_exit(np.zeros(3, int), np.ones(4, bool), TABLE), r"mask has shape \(4,\)"),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
