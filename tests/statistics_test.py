"""Statistics of runs: pass@k and maj@k by enumeration, intervals against known distributions."""

import collections
import itertools
import math

import numpy as np
import pytest

from rredcot_jax.report import statistics


@pytest.mark.parametrize(("n", "k"), [(4, 1), (4, 2), (5, 3), (4, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_success(n, k):
  for correct in range(n + 1):
    samples = [True] * correct + [False] * (n - correct)
    subsets = list(itertools.combinations(samples, k))
    expected = sum(any(subset) for subset in subsets) / len(subsets)
    assert statistics.pass_at_k(np.array([correct]), n, k)[0] == pytest.approx(expected, abs=1e-12)
  with pytest.raises(ValueError, match=f"pass@{n + 1}"):
    statistics.pass_at_k(np.array([0]), n, n + 1)


def majority_by_enumeration(votes, correct, k):
  """maj@k of one prompt, as its docstring has it, subset by subset and ballot by ballot."""
  subsets = list(itertools.combinations(zip(votes, correct), k))
  total = 0.0
  for subset in subsets:
    ballots = collections.Counter(vote for vote, _ in subset if vote >= 0)
    most = max(ballots.values(), default=0)
    winners = [vote for vote, count in ballots.items() if count == most]
    for winner in winners:
      judged = [right for vote, right in subset if vote == winner]
      total += sum(judged) / len(judged) / len(winners)
  return total / len(subsets)


@pytest.mark.parametrize("n", [1, 3, 5, 6])
def test_maj_at_k_is_the_share_of_subsets_whose_majority_is_right(n):
  rng = np.random.default_rng(n)
  votes = rng.integers(-1, 3, size=(20, n))
  correct = {
    "one answer is right": votes == 1,
    "voters of one answer differ": rng.random((20, n)) < 0.5,
    "right without an answer": votes == -1,
  }
  for case, right in correct.items():
    for k in range(1, n + 1):
      expected = [majority_by_enumeration(*row, k) for row in zip(votes.tolist(), right.tolist())]
      np.testing.assert_allclose(statistics.maj_at_k(votes, right, k), expected, atol=1e-12, err_msg=f"{case}, k={k}")
  assert not statistics.maj_at_k(votes, votes == -1, n).any()


def test_maj_at_k_by_hand():
  votes = np.array([[0, 0, 1, 2], [0, 0, 1, 1], [-1, -1, -1, 3], [-1, -1, -1, -1]])
  right = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]], bool)
  np.testing.assert_allclose(statistics.maj_at_k(votes, right, 4), [1.0, 0.5, 1.0, 0.0])
  np.testing.assert_allclose(statistics.maj_at_k(votes, right, 1), [0.5, 0.5, 0.25, 0.0])


def test_maj_at_k_from_random_subsets_is_near_the_enumeration_and_repeats():
  rng = np.random.default_rng(0)
  votes = rng.choice(4, size=(50, 16), p=[0.4, 0.3, 0.2, 0.1])
  exact = statistics.maj_at_k(votes, votes == 0, 8, max_subsets=math.comb(16, 8))
  estimate = statistics.maj_at_k(votes, votes == 0, 8)
  assert (
    0 < np.abs(estimate - exact).max() < 4.5 * 0.5 / 2000**0.5
  )  # The error of a share of 2000, four and a half times.
  np.testing.assert_array_equal(estimate, statistics.maj_at_k(votes, votes == 0, 8))
  assert (estimate != statistics.maj_at_k(votes, votes == 0, 8, seed=1)).any()


def test_maj_at_k_checks_its_arguments():
  votes = np.zeros((2, 4), int)
  for k in (0, 5):
    with pytest.raises(ValueError, match=f"maj@{k} needs 1 <= k <= 4"):
      statistics.maj_at_k(votes, votes == 0, k)
  with pytest.raises(ValueError, match=r"\(2, 4\) and correct \(2, 3\)"):
    statistics.maj_at_k(votes, votes[:, :3] == 0, 1)


def test_bootstrap_interval_has_the_quantiles_of_the_binomial():
  # Means of resamples of five ones and five zeros are Binomial(10, 1/2) / 10: P(X <= 1) = 1.1%, P(X <= 2) = 5.5%.
  values = np.array([1.0, 0.0] * 5)
  np.testing.assert_allclose(statistics.bootstrap_interval(values), [0.2, 0.8])
  # P(X <= 3) = 17.2%, P(X <= 4) = 37.7%.
  np.testing.assert_allclose(statistics.bootstrap_interval(values, level=0.5), [0.4, 0.6])


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
  rng = np.random.default_rng(0)
  values = rng.beta(2, 1, size=(60, 400))  # 400 evaluations of 60 prompts, mean 2/3.
  low, high = statistics.bootstrap_interval(values, resamples=1000)
  assert 0.91 < np.mean((low < 2 / 3) & (2 / 3 < high)) < 0.98


def test_bootstrap_interval_of_columns():
  rng = np.random.default_rng(0)
  values = rng.random((40, 2, 3))
  ends = statistics.bootstrap_interval(values, resamples=1234)
  assert ends.shape == (2, 2, 3)
  np.testing.assert_allclose(ends[:, 1, 2], statistics.bootstrap_interval(values[:, 1, 2], resamples=1234))
  np.testing.assert_array_equal(statistics.bootstrap_interval(values, resamples=1234), ends)
  assert (statistics.bootstrap_interval(values, resamples=1234, seed=1) != ends).any()
  np.testing.assert_array_equal(statistics.bootstrap_interval(np.ones(5)), [1.0, 1.0])
  with pytest.raises(ValueError, match="at least 2 of them and there are 1"):
    statistics.bootstrap_interval(np.ones(1))


def test_standard_error():
  assert statistics.mean_and_error(np.array([1.0, 0.0, 1.0, 0.0])) == (0.5, pytest.approx((1 / 3) ** 0.5 / 2))
  mean, error = statistics.mean_and_error(np.array([3]))
  assert mean == 3.0 and math.isnan(error)


def test_bootstrap_resamples_clusters_and_not_items():
  rng = np.random.default_rng(1)
  x = rng.normal(size=20)
  mean = lambda values: lambda i: np.array([values[i].mean()])
  point, low, high = statistics.bootstrap(mean(x), np.arange(20), resamples=400)
  # Every item ten times says nothing more, and must not narrow the interval.
  again = statistics.bootstrap(mean(np.repeat(x, 10)), np.repeat(np.arange(20), 10), resamples=400)
  np.testing.assert_allclose(again, (point, low, high), atol=1e-12)
  naive = statistics.bootstrap(mean(np.repeat(x, 10)), np.arange(200), resamples=400)
  assert (naive[2] - naive[1]) < 0.5 * (high - low)


def test_a_resample_holds_whole_clusters_as_many_as_there_are():
  clusters = np.array([7, 3, 7, 5, 3, 7])  # Neither sorted nor of one size.
  members = {3: {1, 4}, 5: {3}, 7: {0, 2, 5}}
  drawn = []
  statistics.bootstrap(lambda i: drawn.append(i) or np.zeros(1), clusters, resamples=200)
  assert drawn[0].tolist() == list(range(6)) and len(drawn) == 201
  sizes, seen = set(), set()
  for rows in drawn[1:]:
    counts = np.bincount(rows, minlength=6)
    times = {name: {counts[i] for i in inside} for name, inside in members.items()}
    assert all(len(of) == 1 for of in times.values())  # All of a cluster, equally often.
    assert sum(of.copy().pop() for of in times.values()) == 3
    sizes.add(len(rows))
    seen |= {name for name, of in times.items() if of != {0}}
  # 1, 2 or 3 items three times: every sum from 3 to 9 can come.
  assert sizes == {3, 4, 5, 6, 7, 8, 9} and seen == {3, 5, 7}


def test_the_ends_are_quantiles_of_the_statistic_over_resamples():
  rng = np.random.default_rng(5)
  values, clusters, drawn = rng.normal(size=(30, 2)), np.arange(30) // 3, []

  def statistic(rows):
    drawn.append(values[rows].sum(axis=0))
    return drawn[-1]

  for level, low_share in ((0.95, 0.025), (0.5, 0.25)):
    drawn.clear()
    point, low, high = statistics.bootstrap(statistic, clusters, resamples=101, level=level)
    np.testing.assert_allclose(point, values.sum(axis=0))
    np.testing.assert_allclose(low, np.quantile(drawn[1:], low_share, axis=0))
    np.testing.assert_allclose(high, np.quantile(drawn[1:], 1 - low_share, axis=0))
  again = statistics.bootstrap(lambda i: values[i].sum(axis=0), clusters, resamples=101, level=0.5)
  np.testing.assert_array_equal(again, (point, low, high))
  assert (statistics.bootstrap(lambda i: values[i].sum(axis=0), clusters, resamples=101, seed=1)[1] != low).all()


def test_resamples_without_a_number_are_left_out_and_one_cluster_has_no_interval():
  def statistic(rows):
    some = np.mean(rows == 0)
    return np.array([some if some else np.nan, np.nan, 1.0])

  point, low, high = statistics.bootstrap(statistic, np.arange(4), resamples=50)
  assert low[0] >= 0.25 and np.isfinite(high[0])
  assert np.isnan([low[1], high[1]]).all() and low[2] == high[2] == 1.0
  point, low, high = statistics.bootstrap(statistic, np.zeros(4), resamples=50)
  assert point[0] == 0.25 and np.isnan(low).all() and np.isnan(high).all() and low.shape == high.shape == (3,)
