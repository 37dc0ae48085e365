"""Banks on hand-made ids: 9 leaves the thought, 8 is a newline, 7 ends the sequence."""

import dataclasses
import functools
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from rredcot_jax.ops import anatomy, banks, segmentation
from rredcot_jax.ops.banks import Place, Reference, make_bank
from rredcot_jax.ops.types import Rollout, Segments

NEWLINES = np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 0])
REFERENCE = Reference(steps=[[1, 2, 8], [3, 4, 8]], exit=[9], answer=[5, 7])


def batch(rows, ends, log_probs=None, exits=None, prompt=0, truncated=False):
  """A rollout and its segments; `exits` are (thought_end, solution_start) of each row."""
  width = max(map(len, rows))
  tokens = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
  mask = np.array([[True] * len(row) + [False] * (width - len(row)) for row in rows])
  k_max = max(map(len, ends))
  log_probs = np.zeros(tokens.shape, np.float32) if log_probs is None else log_probs
  rollout = Rollout(
    prompt_tokens=np.full((len(rows), 1), prompt, np.int32), prompt_mask=np.ones((len(rows), 1), bool), tokens=tokens,
    mask=mask, log_probs=log_probs, sampler_log_probs=log_probs, entropy=np.zeros(tokens.shape, np.float32),
    truncated=np.broadcast_to(truncated, len(rows)),
  )  # fmt: skip
  segments = Segments(
    ends=np.array([e + [len(row)] * (k_max - len(e)) for e, row in zip(ends, rows)], np.int32),
    segment_ids=np.zeros(tokens.shape, np.int32),
    num_segments=np.array([len(e) for e in ends], np.int32),
    num_merged=np.zeros(len(rows), np.int32),
    thought_end=None if exits is None else np.array(exits, np.int32)[:, 0],
    solution_start=None if exits is None else np.array(exits, np.int32)[:, 1],
  )
  return rollout, segments


def make(
  name, rows, ends, *, returns=None, log_probs=None, references=None, exits=None, prompt=0, truncated=False, **options
):
  rollout, segments = batch(rows, ends, log_probs, exits, prompt, truncated)
  options = {"group_size": len(rows), "bank_size": 3, "max_tokens": 12} | options
  returns = np.zeros(len(rows)) if returns is None else np.array(returns)
  return make_bank(name, references or [REFERENCE] * len(rows), rollout, segments, returns, NEWLINES, **options)


def texts(bank, row, n=0):
  completions = bank.completions
  return [completions.tokens[row, k, n][completions.mask[row, k, n]].tolist() for k in range(completions.mask.shape[1])]


TRACE = [1, 2, 8, 3, 4, 8, 9, 5, 7]


def test_answer_and_solution_are_the_same_for_every_state():
  bank = make("answer", [TRACE], [[3, 6, 9]])
  assert texts(bank, 0) == [[9, 5, 7]]
  assert texts(make("solution", [TRACE], [[3, 6, 9]]), 0) == [[9, 1, 2, 8, 3, 4, 8, 5, 7]]
  assert bank.completions.scored[0, 0, 0].sum() == 3
  forced = make("answer", [TRACE], [[3, 6, 9]], scored="body")
  assert forced.completions.scored[0, 0, 0, :4].tolist() == [False, True, True, False]


@pytest.mark.parametrize(
  ("prefix", "rest"),
  [
    ([], [1, 2, 8, 3, 4, 8, 9, 5, 7]),
    ([1, 2, 8], [3, 4, 8, 9, 5, 7]),
    ([6, 6, 8], [3, 4, 8, 9, 5, 7]),  # A wrong line: the reference goes on all the same, and scores low.
    ([1, 2], [8, 3, 4, 8, 9, 5, 7]),
    ([1, 2, 8, 3], [4, 8, 9, 5, 7]),
    ([1, 2, 8, 3, 4, 8], [9, 5, 7]),
    ([1, 2, 8, 3, 4, 8, 6, 8], [9, 5, 7]),  # More lines than the reference.
    ([1, 2, 8, 9], [5, 7]),  # Left early.
    ([1, 2, 8, 9, 5], [7]),
    ([1, 2, 8, 9, 5, 6], []),
  ],
)
def test_suffix_goes_on_from_where_the_state_stands(prefix, rest):
  trace = [*prefix, 6, 7]
  ends = [[len(prefix), len(trace)]] if prefix else [[len(trace)]]
  bank = make("suffix", [trace], ends)
  state = 1 if prefix else 0
  assert texts(bank, 0)[state] == rest
  assert bool(bank.completions.valid[0, state, 0]) == bool(rest)


def test_rollouts_carry_their_own_probability_and_the_share_of_successes():
  rows = [[1, 8, 9, 7], [2, 2, 8, 9, 5, 7], [3, 7]]
  log_probs = -np.arange(1, 19, dtype=np.float32).reshape(3, 6)
  bank = make("rollouts", rows, [[2, 4], [3, 6], [2]], returns=[0.0, 1.0, 1.0], log_probs=log_probs)
  completions = bank.completions
  # State 0 of row 0: traces 1 and 2 succeeded, of 3 that have a segment 0.
  assert [completions.tokens[0, 0, n][completions.mask[0, 0, n]].tolist() for n in range(3)] == [rows[1], rows[2], []]
  np.testing.assert_allclose(completions.log_q[0, 0, :2], [log_probs[1, :6].sum(), log_probs[2, :2].sum()])
  np.testing.assert_allclose(completions.utilities[0, 0, :2], 2 / 3)
  # State 1: trace 2 has none, so trace 1 alone succeeded, of 2.
  assert texts(bank, 0)[1] == [9, 5, 7]
  np.testing.assert_allclose(completions.utilities[0, 1, 0], 1 / 2)
  np.testing.assert_allclose(completions.log_q[0, 1, 0], log_probs[1, 3:6].sum())
  assert not bank.fallback.any()


def test_failures_are_put_in_when_asked_for():
  bank = make("rollouts", [[1, 7], [2, 7]], [[2], [2]], returns=[0.0, 1.0], with_failures=True)
  assert bank.completions.valid[0, 0].tolist() == [True, True, False]
  assert bank.completions.utilities[0, 0, :2].tolist() == [0.0, 1.0]


def test_all_wrong_group_falls_back_and_says_so():
  rows, ends = [[1, 7], [2, 7]], [[2], [2]]
  bank = make("rollouts", rows, ends, group_size=2)
  assert bank.fallback.tolist() == [True, True] and not bank.completions.valid.any()
  mixed = make("rollouts", rows * 2, ends * 2, returns=[0, 0, 1, 0], group_size=2, fallback="answer")
  assert mixed.fallback.tolist() == [True, True, False, False]
  assert texts(mixed, 0) == [[9, 5, 7]] and texts(mixed, 2) == [[1, 7]]


def test_too_long_is_left_out_and_counted_never_cut():
  bank = make("suffix", [TRACE], [[3, 6, 9]], max_tokens=6)
  assert bank.num_dropped == 1
  assert bank.completions.valid[0, :, 0].tolist() == [False, True, True]


def test_a_success_that_does_not_fit_counts_as_none():
  rows, ends = [[1, 7], [2, 2, 2, 7]], [[2], [4]]
  bank = make("rollouts", rows, ends, returns=[1.0, 1.0], max_tokens=3)
  assert bank.num_dropped == 2  # Once for each of the two rows.
  np.testing.assert_allclose(bank.completions.utilities[0, 0], [0.5, 0, 0])
  assert not bank.fallback.any()
  nothing = make("rollouts", rows, ends, returns=[0.0, 1.0], max_tokens=3)
  assert nothing.fallback.all() and nothing.uniform_rows.all()


def test_a_reference_fallback_replaces_the_failures_and_is_not_uniform():
  bank = make("rollouts", [[1, 7], [2, 7]], [[2], [2]], with_failures=True, fallback="answer")
  assert bank.fallback.all() and not bank.uniform_rows.any()
  assert bank.completions.valid[0, 0].tolist() == [True, False, False] and texts(bank, 0) == [[9, 5, 7]]


@pytest.mark.parametrize(
  "reference",
  [
    REFERENCE,
    Reference(steps=REFERENCE.steps, exit=[], answer=[5, 7]),
    Reference(steps=REFERENCE.steps, exit=[9, 4], answer=[5, 7]),
    Reference(steps=[[1, 2, 8, 8], [3, 4]], exit=[8, 9], answer=[5, 5, 7]),
    Reference(steps=[[1, 2, 8, 8], [3, 4, 8, 8, 8]], exit=[], answer=[3, 4, 7]),
  ],
)
def test_along_the_reference_the_suffix_is_what_is_left_of_it(reference):
  whole = [*(token for step in reference.steps for token in step), *reference.exit, *reference.answer]
  bank = make("suffix", [whole], [list(range(1, len(whole) + 1))], references=[reference])
  assert texts(bank, 0) == [whole[k:] for k in range(len(whole))]


@pytest.mark.parametrize(
  ("exit_ids", "prefix", "rest"),
  [
    ([9, 4], [1, 6, 8, 9], [4, 5, 7]),  # Cut inside an exit of several tokens.
    ([9, 4], [1, 6, 9], [4, 5, 7]),
    ([], [6, 6, 8, 3, 4, 8], [5, 7]),
    ([], [6, 6, 8, 3, 4, 8, 5], [7]),
    ([], [6, 6, 8, 3, 4, 8, 6], []),  # Another answer is stated.
    ([9], [6, 6, 8, 8], [3, 4, 8, 9, 5, 7]),  # A blank line is none of the reference's.
    ([9], [8, 6, 6, 8], [3, 4, 8, 9, 5, 7]),
    ([9], [6, 50, 8, 3], [4, 8, 9, 5, 7]),  # A token that the tokenizer does not know.
    ([8, 8], [6, 6, 8], [3, 4, 8, 8, 8, 5, 7]),  # A newline is no beginning of an exit of newlines.
  ],
)
def test_suffix_off_the_reference(exit_ids, prefix, rest):
  reference = Reference(steps=REFERENCE.steps, exit=exit_ids, answer=[5, 7])
  trace = [*prefix, 6, 7]
  assert texts(make("suffix", [trace], [[len(prefix), len(trace)]], references=[reference]), 0)[1] == rest


def test_suffix_writes_the_blank_line_that_the_reference_has():
  reference = Reference(steps=[[1, 2, 8, 8], [3, 4, 8]], exit=[9], answer=[5, 7])
  bank = make("suffix", [[6, 8, 3, 7]], [[2, 4]], references=[reference])
  assert texts(bank, 0)[1] == [8, 3, 4, 8, 9, 5, 7]


def test_the_end_of_a_right_answer_does_not_mend_a_wrong_one():
  rows, ends = [[1, 8, 9, 5, 7], [1, 8, 9, 6, 7]], [[2, 3, 4, 5]] * 2
  bank = make("rollouts", rows, ends, returns=[1.0, 0.0])
  assert texts(bank, 1) == [rows[0], [9, 5, 7], [5, 7], []]  # The last state has stated 6.
  np.testing.assert_allclose(bank.completions.utilities[:, :, 0], [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.0]])
  suffix = make("suffix", rows, ends, references=[Reference(steps=[[1, 8]], exit=[9], answer=[5, 7])] * 2)
  assert texts(suffix, 1)[2:] == [[5, 7], []]


def test_log_q_of_a_long_suffix_keeps_its_digits():
  log_probs = -np.random.default_rng(0).exponential(size=(1, 20_000)).astype(np.float32)
  bank = make("rollouts", [[1] * 20_000], [[20_000]], returns=[1.0], log_probs=log_probs, max_tokens=20_000)
  assert bank.completions.log_q[0, 0, 0] == np.float32(log_probs.astype(np.float64).sum())


# ---------------------------------------------------- several solutions


TWO = dataclasses.replace(REFERENCE, solutions=[[[6, 8], [4, 8]], [[1, 2, 8, 3, 4, 8]], [[2, 8]]])


def test_solutions_hold_each_different_one_once():
  bank = make("solutions", [TRACE], [[3, 6, 9]], references=[TWO], bank_size=5, scored="answer")
  found = [texts(bank, 0, n)[0] for n in range(5)]
  # The second is `steps` in one piece.
  assert found == [[9, 1, 2, 8, 3, 4, 8, 5, 7], [9, 6, 8, 4, 8, 5, 7], [9, 2, 8, 5, 7], [], []]
  np.testing.assert_allclose(bank.completions.log_q[0, 0], [-math.log(3)] * 3 + [0, 0], rtol=1e-6)
  assert bank.completions.utilities[0, 0].tolist() == [1, 1, 1, 0, 0]
  assert bank.completions.scored[0, 0, 1].tolist() == [False] * 5 + [True] * 2 + [False] * 5


def test_solutions_that_are_too_many_or_too_long_leave_the_mass_of_the_rest():
  two = make("solutions", [TRACE], [[9]], references=[TWO], bank_size=2)
  assert two.completions.valid[0, 0].tolist() == [True, True] and two.num_dropped == 0
  np.testing.assert_allclose(two.completions.log_q[0, 0], -math.log(2), rtol=1e-6)
  short = make("solutions", [TRACE], [[9]], references=[TWO], bank_size=3, max_tokens=7)
  assert [texts(short, 0, n)[0] for n in range(3)] == [[9, 6, 8, 4, 8, 5, 7], [9, 2, 8, 5, 7], []]
  assert short.num_dropped == 1
  np.testing.assert_allclose(short.completions.log_q[0, 0, :2], -math.log(2), rtol=1e-6)


def test_one_solution_is_the_solution_bank():
  one, single = (make(name, [TRACE], [[9]], bank_size=1) for name in ("solutions", "solution"))
  jax.tree.map(np.testing.assert_array_equal, one.completions, single.completions)
  assert single.completions.log_q[0, 0, 0] == 0


# ---------------------------------------------- what is scored of a completion


@pytest.mark.parametrize(
  ("name", "scored", "expected"),
  [
    ("answer", "all", [9, 5, 7]),
    ("answer", "body", [5, 7]),
    ("answer", "answer", [5, 7]),
    ("solution", "all", [9, 1, 2, 8, 3, 4, 8, 5, 7]),
    ("solution", "body", [1, 2, 8, 3, 4, 8, 5, 7]),
    ("solution", "answer", [5, 7]),
    ("suffix", "all", [4, 8, 9, 5, 7]),
    ("suffix", "body", [4, 8, 5, 7]),
    ("suffix", "answer", [5, 7]),
  ],
)
def test_which_tokens_are_scored(name, scored, expected):
  completions = make(name, [[1, 2, 8, 3, 6, 7]], [[4, 6]], scored=scored).completions
  assert completions.tokens[0, -1, 0][completions.scored[0, -1, 0]].tolist() == expected
  assert not (completions.scored & ~completions.mask).any()


def test_within_the_answer_what_is_left_of_it_is_scored():
  completions = make("suffix", [[1, 2, 8, 9, 5, 6]], [[4, 5, 6]], scored="answer").completions
  scored = [completions.tokens[0, k, 0][completions.scored[0, k, 0]].tolist() for k in range(3)]
  assert scored == [[5, 7], [5, 7], [7]]


@pytest.mark.parametrize("scored", ["body", "answer"])
def test_a_bank_that_does_not_know_a_part_refuses_to_score_it(scored):
  with pytest.raises(ValueError, match=f"scored='{scored}' needs to know .* bank='rollouts' does not say"):
    make("rollouts", [TRACE], [[9]], returns=[1.0], scored=scored)


# ------------------------------------------------------- the exit's newline

# A line break, the marker, a blank line: as in "\n</think>\n\n".
LINE = Reference(steps=[[1, 2, 8], [3, 4, 8]], exit=[8, 9, 8], answer=[5, 7])


def test_the_newline_of_an_exit_is_not_doubled():
  trace = [1, 2, 8, 3, 4, 8, 9, 8, 5, 7]
  bank = make("answer", [trace], [[2, 3, 10]], references=[LINE], scored="body")
  assert texts(bank, 0) == [[8, 9, 8, 5, 7], [8, 9, 8, 5, 7], [9, 8, 5, 7]]
  assert bank.completions.scored[0, :, 0].sum(axis=1).tolist() == [2, 2, 2]
  # What state 0 ends in is the prompt's.
  assert texts(make("answer", [trace], [[2, 3, 10]], references=[LINE], prompt=8), 0)[0] == [9, 8, 5, 7]
  solution = make("solution", [trace], [[2, 3, 10]], references=[LINE])
  assert texts(solution, 0)[1:] == [[8, 9, 8, 1, 2, 8, 3, 4, 8, 5, 7], [9, 8, 1, 2, 8, 3, 4, 8, 5, 7]]


def test_without_a_table_of_newlines_the_exit_is_written_as_it_is():
  trace = [1, 2, 8, 3, 4, 8, 9, 8, 5, 7]
  rollout, segments = batch([trace], [[2, 3, 10]])
  for bank in (
    make_bank("answer", [LINE], max_tokens=8),
    make_bank("answer", [LINE], rollout, segments, max_tokens=8),
    make_bank("answer", [LINE], None, None, None, NEWLINES, max_tokens=8),
  ):
    assert texts(bank, 0) == [[8, 9, 8, 5, 7]]


def test_an_exit_that_is_all_newlines_stays():
  reference = dataclasses.replace(LINE, exit=[8, 8])
  assert texts(make("answer", [[1, 8, 5, 7]], [[2, 4]], references=[reference]), 0) == [[8, 8, 5, 7]]
  assert banks.leading_newlines([8, 8], NEWLINES) == 0
  assert banks.leading_newlines([8, 8, 1, 8], NEWLINES) == 2
  assert banks.leading_newlines([], NEWLINES) == 0


@pytest.mark.parametrize(
  ("prefix", "rest"),
  [
    ([1, 2, 8, 3, 4, 8], [9, 8, 5, 7]),  # On the reference: its last line has the newline already.
    ([1, 2, 8, 3, 4, 8, 9], [8, 5, 7]),
    ([1, 2, 8, 3, 4, 8, 9, 8], [5, 7]),
    ([6, 6, 8, 3, 6], [8, 9, 8, 5, 7]),
    ([6, 6, 8, 3, 4, 8, 6], [8, 9, 8, 5, 7]),  # A line too many, not ended.
    ([6, 6, 8, 3, 4, 8, 6, 8], [9, 8, 5, 7]),
    ([6, 8, 9], [8, 5, 7]),  # Inside the exit.
    ([6, 8, 9, 8, 5], [7]),
    ([6, 9, 8, 5], [7]),  # Left in the middle of a line.
    ([6, 8, 9, 8, 6], []),
  ],
)
def test_suffix_with_an_exit_on_a_line_of_its_own(prefix, rest):
  bank = make("suffix", [[*prefix, 6, 7]], [[len(prefix), len(prefix) + 2]], references=[LINE])
  assert texts(bank, 0)[1] == rest


@hypothesis.given(
  st.lists(st.lists(st.sampled_from([1, 2, 3, 8]), min_size=1, max_size=4), min_size=1, max_size=3), st.data()
)
def test_along_any_reference_the_suffix_is_what_is_left_of_it(steps, data):
  leave = data.draw(st.sampled_from([[9], [8, 9], [8, 8, 9, 8], [9, 4], []]))
  reference = Reference(steps=steps, exit=leave, answer=[5, 7])
  flat = [*itertools.chain(*steps)]
  skip = next((i for i, token in enumerate(leave) if token != 8), 0) if flat[-1] == 8 else 0
  whole = [*flat, *leave[skip:], 5, 7]
  bank = make("suffix", [whole], [list(range(1, len(whole) + 1))], references=[reference], max_tokens=24)
  assert texts(bank, 0) == [whole[k:] for k in range(len(whole))]
  answers = make("suffix", [whole], [[len(whole)]], references=[reference], max_tokens=24, scored="answer").completions
  assert answers.tokens[0, 0, 0][answers.scored[0, 0, 0]].tolist() == [5, 7]


# ------------------------------------------------------ states after the exit


def test_no_state_after_the_exit_leaves_once_more():
  ends, exits = [[3, 6, 7, 9]], [(6, 7)]
  for name in ("answer", "solution", "solutions"):
    completions = make(name, [TRACE], ends, exits=exits).completions
    # State 2 is the whole thought; state 3 stands after the exit.
    assert completions.valid[0, :, 0].tolist() == [True, True, True, False], name
  # Those that go on from what is written are there.
  assert texts(make("suffix", [TRACE], ends, exits=exits), 0)[2:] == [[9, 5, 7], [5, 7]]
  assert texts(make("rollouts", [TRACE], ends, exits=exits, returns=[1.0]), 0)[2:] == [[9, 5, 7], [5, 7]]
  assert make("own", [TRACE], ends, exits=exits, returns=[1.0]).completions.valid[0, :, 0].tolist() == [
    True, True, True, False,
  ]  # fmt: skip


def test_suffix_does_not_leave_again_where_the_exit_is_spelled_otherwise():
  # The trace leaves by 6 4, which the reference does not know.
  trace = [1, 2, 8, 6, 4, 5, 7]
  assert texts(make("suffix", [trace], [[3, 4, 5, 7]], exits=[(3, 5)]), 0) == [
    [1, 2, 8, 3, 4, 8, 9, 5, 7],
    [3, 4, 8, 9, 5, 7],
    [],
    [],
  ]
  longer = [1, 2, 8, 3, 4, 8, 6, 4, 5, 7]
  assert texts(make("suffix", [longer], [[6, 8, 10]], exits=[(6, 8)]), 0)[1:] == [[9, 5, 7], []]


def test_a_trace_without_an_exit_is_all_thought():
  trace = [1, 2, 8, 3, 7]
  plain, cut = (make("answer", [trace], [[3, 5]], exits=exits) for exits in (None, [(5, 5)]))
  assert texts(plain, 0) == [[9, 5, 7]] and texts(cut, 0) == [[9, 5, 7]] * 2


def test_rollouts_compare_what_was_stated_after_the_exit():
  rows, ends = [[1, 8, 9, 5, 7], [1, 8, 9, 6, 7]], [[2, 3, 4, 5]] * 2
  plain = make("rollouts", rows, ends, returns=[1.0, 0.0])
  known = make("rollouts", rows, ends, returns=[1.0, 0.0], exits=[(2, 3)] * 2)
  jax.tree.map(np.testing.assert_array_equal, plain.completions, known.completions)
  # Without references nothing is known of an exit that was not looked for.
  rollout, segments = batch(rows, ends, exits=[(2, 3)] * 2)
  options = {"group_size": 2, "bank_size": 3, "max_tokens": 12}
  alone = make_bank("rollouts", None, rollout, segments, np.array([1.0, 0.0]), **options)
  jax.tree.map(np.testing.assert_array_equal, alone.completions, known.completions)


# ------------------------------------------------- the group's own endings


OWN_ROWS = [[1, 8, 9, 5, 7], [2, 2, 8, 9, 5, 7], [1, 9, 6, 7], [3, 7], [1, 9, 5]]
OWN_EXITS = [(2, 3), (3, 4), (1, 2), (2, 2), (1, 2)]
OWN_ENDS = [[2, 5], [3, 6], [1, 4], [2], [1, 3]]
own_bank = functools.partial(
  make, "own", OWN_ROWS, OWN_ENDS, exits=OWN_EXITS, truncated=[False, False, False, False, True]
)


def test_own_holds_each_different_ending_once():
  bank = own_bank(returns=[1.0, 0.5, 0.25, 1.0, 1.0])
  # Rows 0 and 1 wrote the same; row 3 has no exit and row 4 no end.
  for row in range(5):
    found = [texts(bank, row, n)[0] for n in range(3)]
    order = [[9, 6, 7], [9, 5, 7]] if row == 2 else [[9, 5, 7], [9, 6, 7]]
    assert found == [*order, []], row  # A row's own comes first.
  np.testing.assert_allclose(bank.completions.utilities[0, 0], [0.75, 0.25, 0])
  np.testing.assert_allclose(bank.completions.log_q[0, 0], [-math.log(2)] * 2 + [0], rtol=1e-6)
  assert bank.completions.valid[:, 0, 0].all() and not bank.fallback.any()


def test_own_failures_come_last_and_only_when_asked_for():
  returns = [0.0, 0.0, 1.0, 0.0, 0.0]
  assert [texts(own_bank(returns=returns), 0, n)[0] for n in range(3)] == [[9, 6, 7], [], []]
  both = own_bank(returns=returns, with_failures=True)
  assert [texts(both, 0, n)[0] for n in range(3)] == [[9, 6, 7], [9, 5, 7], []]
  assert both.completions.utilities[0, 0].tolist() == [1, 0, 0]
  np.testing.assert_allclose(both.completions.log_q[0, 0, :2], -math.log(2), rtol=1e-6)


def test_a_trace_without_a_finite_return_is_no_part_of_a_bank():
  for bad in (math.nan, math.inf):
    returns = [bad, 0.0, 1.0, 0.0, 0.0]
    found = own_bank(returns=returns, with_failures=True)
    assert [texts(found, 0, n)[0] for n in range(3)] == [[9, 6, 7], [9, 5, 7], []]
    rollouts = make("rollouts", [[1, 7], [2, 7], [3, 7]], [[2]] * 3, returns=returns[:3], with_failures=True)
    assert [texts(rollouts, 0, n)[0] for n in range(3)] == [[2, 7], [3, 7], []]
    assert rollouts.completions.utilities[0, 0].tolist() == [0, 1, 0]
  assert make("rollouts", [[1, 7]], [[2]], returns=[math.nan]).uniform_rows.all()


def test_own_falls_back_where_nobody_succeeded():
  bank = own_bank(with_failures=True)
  assert bank.fallback.all() and bank.uniform_rows.all() and not bank.completions.valid.any()
  mended = own_bank(fallback="solutions", references=[TWO] * 5)
  assert mended.fallback.all() and not mended.uniform_rows.any()
  assert mended.completions.valid[0, 0].tolist() == [True, True, True]


def test_own_needs_no_reference_and_uses_its_newline_where_there_is_one():
  rows, ends, exits = [[1, 8, 9, 8, 5, 7], [2, 3, 4, 7]], [[1, 2, 6], [2, 4]], [(2, 4), (4, 4)]
  options = {"returns": [1.0, 0.0], "exits": exits, "scored": "body"}
  bank = make("own", rows, ends, references=[LINE] * 2, **options)
  # The newline before the marker is needed in the middle of a line.
  assert texts(bank, 0) == [[8, 9, 8, 5, 7], [8, 9, 8, 5, 7], [9, 8, 5, 7]]
  assert texts(bank, 1)[:2] == [[8, 9, 8, 5, 7]] * 2
  assert bank.completions.scored[0, :, 0].sum(axis=1).tolist() == [2, 2, 2]
  rollout, segments = batch(rows, ends, exits=exits)
  alone = make_bank(
    "own", None, rollout, segments, np.array([1.0, 0.0]), group_size=2, bank_size=1, max_tokens=5, scored="body"
  )
  assert texts(alone, 0) == [[9, 8, 5, 7]] * 3
  assert alone.completions.scored[0, 0, 0].tolist() == [False, False, True, True, False]


def test_own_that_does_not_fit_is_left_out_and_counted():
  rows, ends, exits = [[1, 9, 5, 7], [2, 9, 6, 6, 6, 7]], [[1, 4], [1, 6]], [(1, 2)] * 2
  bank = make("own", rows, ends, exits=exits, returns=[1.0, 1.0], max_tokens=3)
  assert bank.num_dropped == 4  # Two states of two rows.
  assert bank.completions.log_q[:, :, 0].tolist() == [[0, 0], [0, 0]]


# ------------------------------------------------------ banks of one's own


def echo(inputs):
  """A bank as users write one: the state's last token said again, with what it may read."""
  returns = inputs.read("returns")
  for row in inputs.rows:
    for k in inputs.states(row):
      last = inputs.written(row, k)[-1:]
      if len(last):
        yield Place(row, k, last, utility=float(returns[row]), log_q=-1.0)


def test_a_bank_of_ones_own_is_a_callable_or_a_path():
  for bank in (echo, f"{__name__}:echo"):
    made = make(bank, [[1, 2, 3, 7], [4, 7]], [[1, 3, 4], [1, 2]], returns=[0.5, 0.0])
    assert made.completions.valid[:, :, 0].tolist() == [[False, True, True], [False] * 3]
    assert texts(made, 0)[1:] == [[1], [3]]
    assert made.completions.utilities[0, 1, 0] == 0.5 and made.completions.log_q[0, 1, 0] == -1
    assert made.fallback.tolist() == [False, True]
    assert made.completions.tokens.shape == (2, 3, 3, 12)


def test_a_fallback_of_ones_own():
  made = make("own", [[1, 2, 7]], [[1, 3]], exits=[(3, 3)], fallback=lambda inputs: [Place(0, 1, [6])])
  assert texts(made, 0) == [[], [6]] and made.fallback.tolist() == [True]


@pytest.mark.parametrize(
  ("place", "message"),
  [
    (Place(0, 0, []), r"bank='bank', row 0, state 0: tokens=\[\] must be at least one token id"),
    (Place(0, 0, [1.5]), r"tokens=\[1.5\] must be"),
    (Place(0, 2, [1]), "state 2: there is no such state in 1 rows of 2"),
    (Place(1, 0, [1]), "row 1, state 0: there is no such state"),
    (Place(0, 0, [1], utility=-1.0), "utility=-1.0 must be finite and >= 0"),
    (Place(0, 0, [1], utility=math.nan), "utility=nan must be"),
    (Place(0, 0, [1], log_q=-math.inf), "log_q=-inf finite"),
  ],
)
def test_places_that_are_no_completions_are_named(place, message):
  def bank(inputs):
    return [place]

  with pytest.raises(ValueError, match=message):
    make(bank, [[1, 2, 7]], [[1, 3]])


def test_more_completions_than_bank_size_are_an_error():
  with pytest.raises(ValueError, match="row 0, state 1 more than 2 completions; raise bank_size"):
    make(lambda inputs: [Place(0, 1, [n]) for n in range(3)], [[1, 2, 7]], [[1, 3]], bank_size=2)


# --------------------------------------------------------- rows and states


@pytest.mark.parametrize("name", ["answer", "solution", "solutions", "suffix"])
@pytest.mark.parametrize("exits", [None, [(3, 4), (6, 7), (4, 4)]])
def test_rows_of_a_reference_bank_do_not_see_their_neighbours(name, exits):
  rows = [[6, 2, 8, 9, 5, 7], TRACE, [1, 2, 8, 7]]
  ends = [[3, 6], [3, 6, 7, 9], [2, 4]]
  references = [LINE, TWO, REFERENCE]
  together = make(name, rows, ends, references=references, exits=exits).completions
  for row in range(3):
    # Another K and T, so that a row alone is padded less.
    one = None if exits is None else exits[row : row + 1]
    alone = make(name, rows[row : row + 1], ends[row : row + 1], references=references[row : row + 1], exits=one)
    k = min(together.valid.shape[1], alone.completions.valid.shape[1])
    for field in dataclasses.fields(together):
      np.testing.assert_array_equal(
        getattr(together, field.name)[row, :k], getattr(alone.completions, field.name)[0, :k], err_msg=field.name
      )


@pytest.mark.parametrize("name", ["rollouts", "own"])
def test_groups_do_not_see_each_other(name):
  options = {"exits": OWN_EXITS[:4] * 2, "group_size": 2, "returns": [1.0, 0.5, 0.25, 1.0] + [0.0] * 4}
  both = make(name, OWN_ROWS[:4] * 2, OWN_ENDS[:4] * 2, **options).completions
  first = make(name, OWN_ROWS[:2], OWN_ENDS[:2], exits=OWN_EXITS[:2], returns=[1.0, 0.5], group_size=2).completions
  for field in dataclasses.fields(both):
    np.testing.assert_array_equal(getattr(both, field.name)[:2], getattr(first, field.name), err_msg=field.name)
  assert not both.valid[4:].any()


def test_one_set_of_completions_for_all_states_where_nothing_tells_them_apart():
  assert make("answer", [TRACE], [[3, 6, 9]]).completions.valid.shape[1] == 1
  assert make_bank("solution", [REFERENCE] * 2, max_tokens=12).completions.valid.shape == (2, 1, 1)
  assert make("answer", [TRACE], [[3, 6, 9]], exits=[(6, 7)]).completions.valid.shape[1] == 3
  assert make("answer", [TRACE], [[3, 6, 9]], references=[LINE]).completions.valid.shape[1] == 3
  assert make("answer", [TRACE], [[3, 6, 9]], fallback="suffix").completions.valid.shape[1] == 3


# ------------------------------------------------------------ a real response

# How a model that thinks writes: the marker is a token, ".\n" too.
PIECES = ("<think>\n", "7*8 = 54", ".", " Wait", ",", " 7*8 = 56", ".\n", "\n", "</think>", "\n\n", "The product is")
PIECES += ("\\[ \\boxed{", "56", "} \\]\n", "<|im_end|>", "54")
ID = {piece: token for token, piece in enumerate(PIECES)}
THOUGHT = ("7*8 = 54", ".", " Wait", ",", " 7*8 = 56", ".\n")
EXIT, ANSWER = ("\n", "</think>", "\n\n"), ("\\[ \\boxed{", "56", "} \\]\n", "<|im_end|>")
RESPONSE = (*THOUGHT, "</think>", "\n\n", "The product is", "\n\n", *ANSWER)


def ids_of(pieces):
  return [ID[piece] for piece in pieces]


def response_bank(name, after_exit, **options):
  """The bank of the response above and of a wrong one, cut at newlines and keywords; texts of row 0, a list a state."""
  wrong = [*RESPONSE[:-3], "54", *RESPONSE[-2:]]
  rows = np.array([ids_of(RESPONSE), ids_of(wrong)], np.int32)
  mask = np.ones(rows.shape, bool)
  tables = segmentation.vocab_tables(PIECES, [[ID[" Wait"]]])
  zeros = np.zeros(rows.shape, np.float32)
  cut = functools.partial(
    segmentation.segment, method="hybrid", k_max=8, eos_ids=ID["<|im_end|>"], after_exit=after_exit,
    exit_table=anatomy.exit_table(PIECES, "</think>"),
  )  # fmt: skip
  segments = jax.device_get(jax.vmap(cut, in_axes=(0, 0, None))(rows, mask, tables, entropy=zeros))
  prompt = np.full((2, 1), ID["<think>\n"], np.int32)
  rollout = Rollout(prompt, np.ones((2, 1), bool), rows, mask, zeros, zeros, zeros, np.zeros(2, bool))
  reference = Reference(steps=[ids_of(["The product is", "\n\n"])], exit=ids_of(EXIT), answer=ids_of(ANSWER))
  bank = make_bank(
    name, [dataclasses.replace(reference, **options.pop("reference", {}))] * 2, rollout, segments,
    np.array([1.0, 0.0]), tables.newlines, group_size=2, bank_size=1, max_tokens=16, **options,
  )  # fmt: skip
  spell = lambda ids: "".join(PIECES[token] for token in ids)
  return [spell(ids) for ids in texts(bank, 0)], jax.tree.map(lambda x: x[0], segments)


def test_the_response_of_a_model_that_thinks():
  answer = "\\[ \\boxed{56} \\]\n<|im_end|>"
  found, segments = response_bank("answer", "one")
  assert np.asarray(segments.ends)[:3].tolist() == [2, 6, 14] and segments.num_segments == 3
  # The prompt and the second line end in a newline, the state before "Wait" does not.
  leave = "</think>\n\n"
  assert found[:3] == [leave + answer, "\n" + leave + answer, leave + answer] and not any(found[3:])
  solution, _ = response_bank("solution", "one")
  assert solution[1:3] == ["\n" + leave + "The product is\n\n" + answer, leave + "The product is\n\n" + answer]
  own, _ = response_bank("own", "one")
  assert own[1:3] == ["\n" + leave + "The product is\n\n" + answer, leave + "The product is\n\n" + answer]


def test_the_solution_that_is_cut_too_is_never_left_once_more():
  for name in ("answer", "solution", "solutions", "own"):
    found, segments = response_bank(name, "cut")
    # Cuts after the blank lines: [exit], [The product is, blank line], [answer].
    assert segments.num_segments == 5 and np.asarray(segments.starts)[:5].tolist() == [0, 2, 6, 8, 10], name
    assert all(found[:3]) and not any(found[3:]), name
  rollouts, _ = response_bank("rollouts", "cut")
  assert rollouts[3:5] == ["The product is\n\n\\[ \\boxed{56} \\]\n<|im_end|>", "\\[ \\boxed{56} \\]\n<|im_end|>"]
  with pytest.raises(ValueError, match="bank='suffix' goes on with the reference line by line"):
    response_bank("suffix", "cut", reference={"aligned": False})


# ------------------------------------------------------------------ errors


def test_errors_name_the_fix():
  with pytest.raises(ValueError, match="bank='sufix' is unknown; did you mean 'suffix'"):
    make("sufix", [TRACE], [[9]])
  with pytest.raises(ValueError, match="fallback='answers' is unknown; did you mean 'answer'"):
    make("rollouts", [TRACE], [[9]], fallback="answers")
  with pytest.raises(ValueError, match="scored='bodies' is unknown; did you mean 'body'"):
    make("answer", [TRACE], [[9]], scored="bodies")
  nothing = [Reference(steps=[], exit=[9], answer=[5, 7])]
  for name in ("suffix", "solution", "solutions"):
    with pytest.raises(
      ValueError, match=f"bank='{name}' needs reference solutions .* use 'answer', 'own' or 'rollouts'"
    ):
      make(name, [TRACE], [[9]], references=nothing)
  # A fallback is checked before a row needs it.
  with pytest.raises(ValueError, match="bank='solution' needs reference solutions"):
    make("rollouts", [TRACE], [[9]], references=nothing, returns=[1.0], fallback="solution")
  with pytest.raises(ValueError, match="3 traces do not make groups of 2"):
    make("rollouts", [TRACE] * 3, [[9]] * 3, group_size=2)
  with pytest.raises(ValueError, match="bank='own' reads where traces leave their thought"):
    make("own", [TRACE], [[9]])


@pytest.mark.parametrize("option", ["max_tokens", "bank_size", "group_size"])
def test_numbers_below_one_are_named(option):
  with pytest.raises(ValueError, match=f"{option}=0 must be at least 1"):
    make("answer", [TRACE], [[9]], **{option: 0})


@pytest.mark.parametrize(
  ("name", "missing"),
  [
    ("answer", "references"),
    ("solutions", "references"),
    ("suffix", "newlines"),
    ("suffix", "rollout"),
    ("rollouts", "rollout"),
    ("rollouts", "segments"),
    ("rollouts", "returns"),
    ("rollouts", "group_size"),
    ("own", "segments"),
  ],
)
def test_what_a_bank_reads_and_is_not_given_is_named(name, missing):
  rollout, segments = batch([TRACE], [[9]], exits=[(6, 7)])
  given = {
    "references": [REFERENCE], "rollout": rollout, "segments": segments, "returns": np.ones(1), "newlines": NEWLINES,
    "group_size": 1,
  }  # fmt: skip
  with pytest.raises(
    ValueError, match=rf"bank='{name}' reads {missing}, which is None: pass make_bank\(..., {missing}="
  ):
    make_bank(name, **given | {missing: None}, max_tokens=9)


@pytest.mark.parametrize(("name", "field"), [("rollouts", "sampler_log_probs"), ("own", "truncated")])
def test_only_two_banks_read_more_of_a_rollout_than_tokens(name, field):
  rollout, segments = batch([TRACE], [[9]], exits=[(6, 7)])
  bare = Rollout(rollout.prompt_tokens, rollout.prompt_mask, rollout.tokens, rollout.mask)
  options = {"max_tokens": 9, "group_size": 1}
  for other in banks.BANKS:
    if other not in ("rollouts", "own"):
      assert make_bank(other, [REFERENCE], bare, segments, None, NEWLINES, **options).completions.valid.any()
  given = dataclasses.replace(bare, **{field: getattr(rollout, field)})
  assert make_bank(name, [REFERENCE], given, segments, np.ones(1), **options).completions.valid.any()
  with pytest.raises(ValueError, match=rf"bank='{name}' reads rollout.{field}, which is None: make the Rollout with"):
    make_bank(name, [REFERENCE], bare, segments, np.ones(1), **options)


def test_arrays_of_unequal_rows_are_named():
  rollout, segments = batch([TRACE], [[9]])
  with pytest.raises(ValueError, match=r"rows differ: references has 2, rollout.tokens has 1, segments.ends has 1"):
    make_bank("answer", [REFERENCE] * 2, rollout, segments, max_tokens=3)
  with pytest.raises(ValueError, match="neither references nor a rollout"):
    make_bank("answer", None, max_tokens=3)
  with pytest.raises(ValueError, match=r"newlines is float64\[10\] and must be integer"):
    make_bank("answer", [REFERENCE], rollout, segments, None, NEWLINES * 1.0, max_tokens=3)
