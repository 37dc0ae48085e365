"""Banks on hand-made ids: 9 leaves the thought, 8 is a newline, 7 ends the sequence."""

import numpy as np
import pytest

from rredcot_jax.ops.banks import Reference, make_bank
from rredcot_jax.ops.types import Rollout, Segments

NEWLINES = np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 0])
REFERENCE = Reference(steps=[[1, 2, 8], [3, 4, 8]], exit=[9], answer=[5, 7])


def batch(rows, ends, log_probs=None):
  width = max(map(len, rows))
  tokens = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
  mask = np.array([[True] * len(row) + [False] * (width - len(row)) for row in rows])
  k_max = max(map(len, ends))
  rollout = Rollout(
    prompt_tokens=np.zeros((len(rows), 1), np.int32), prompt_mask=np.ones((len(rows), 1), bool), tokens=tokens,
    mask=mask, log_probs=np.zeros(tokens.shape, np.float32) if log_probs is None else log_probs,
    entropy=np.zeros(tokens.shape, np.float32), truncated=np.zeros(len(rows), bool),
  )  # fmt: skip
  segments = Segments(
    ends=np.array([e + [len(row)] * (k_max - len(e)) for e, row in zip(ends, rows)], np.int32),
    segment_ids=np.zeros(tokens.shape, np.int32),
    num_segments=np.array([len(e) for e in ends], np.int32),
    num_merged=np.zeros(len(rows), np.int32),
  )
  return rollout, segments


def make(name, rows, ends, *, returns=None, log_probs=None, references=None, **options):
  rollout, segments = batch(rows, ends, log_probs)
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
  forced = make("answer", [TRACE], [[3, 6, 9]], force_exit=True)
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


def test_errors_name_the_fix():
  with pytest.raises(ValueError, match="did you mean 'suffix'"):
    make("sufix", [TRACE], [[9]])
  with pytest.raises(ValueError, match="use 'answer' or 'rollouts'"):
    make("suffix", [TRACE], [[9]], references=[Reference(steps=[], exit=[9], answer=[5, 7])])
  with pytest.raises(ValueError, match="3 traces do not make groups of 2"):
    make("rollouts", [TRACE] * 3, [[9]] * 3, group_size=2)
