"""Statistics of runs: pass@k, maj@k, means and their intervals."""

import itertools
import math
from collections.abc import Callable

import numpy as np


def pass_at_k(num_correct: np.ndarray, num_samples: int, k: int) -> np.ndarray:
  """Unbiased pass@k of each prompt (arXiv 2107.03374): 1 - C(n - c, k) / C(n, k).

  Args:
    num_correct: [B] int in [0, n].
    num_samples: n.
    k: in [1, n].

  Returns:
    [B] float64 in [0, 1].
  """
  if not 1 <= k <= num_samples:
    raise ValueError(f"pass@{k} needs 1 <= k <= {num_samples} samples a prompt.")
  total = math.comb(num_samples, k)
  return np.array([1.0 - math.comb(num_samples - int(c), k) / total for c in num_correct])


def maj_at_k(votes: np.ndarray, correct: np.ndarray, k: int, *, max_subsets: int = 2000, seed: int = 0) -> np.ndarray:
  """maj@k of each prompt: P(the majority among k of its n samples is right), the k drawn without replacement.

  The answer with the most votes wins, ties are broken uniformly, and the winner is
  handed in as one of its voters, drawn uniformly, wrote it: that matters where a
  verifier tells samples apart that vote alike. Without any vote nothing is right.

  Exact where there are at most `max_subsets` subsets of k samples, as for k = 1 and
  k = n; else the mean over `max_subsets` random ones, the same for every prompt.

  Args:
    votes: [B, n] int; samples of a prompt with one number give one answer, and a
      negative number votes for nothing.
    correct: [B, n] bool, the verifier's judgement of each sample.
    k: in [1, n].
    max_subsets: at least 1.
    seed: of the random subsets.

  Returns:
    [B] float64 in [0, 1].
  """
  votes, correct = np.asarray(votes), np.asarray(correct)
  if votes.ndim != 2 or votes.shape != correct.shape:
    raise ValueError(f"votes {votes.shape} and correct {correct.shape} must both be [B, n].")
  num_samples = votes.shape[1]
  if not 1 <= k <= num_samples:
    raise ValueError(f"maj@{k} needs 1 <= k <= {num_samples} samples a prompt.")
  if math.comb(num_samples, k) <= max_subsets:
    places = np.array(list(itertools.combinations(range(num_samples), k)))
  else:
    order = np.random.default_rng(seed).random((max_subsets, num_samples))
    places = np.argsort(order, axis=1)[:, :k]
  chosen = np.zeros((len(places), num_samples))
  np.put_along_axis(chosen, places, 1.0, axis=1)
  return np.array([_majority_right(*row, chosen) for row in zip(votes, correct)])


def _majority_right(votes: np.ndarray, correct: np.ndarray, chosen: np.ndarray) -> float:
  """maj@k of one prompt: votes and correct [n], chosen [S, n] one subset a row, 1.0 on its samples."""
  answers = np.unique(votes[votes >= 0])
  if not answers.size:
    return 0.0
  gives = votes[:, None] == answers
  counts, right = chosen @ gives, chosen @ (gives & correct[:, None])
  # Where nobody votes all answers win, none of them right.
  wins = counts == counts.max(axis=1, keepdims=True)
  share = np.where(wins, right / np.maximum(counts, 1), 0.0)
  return float((share.sum(axis=1) / wins.sum(axis=1)).mean())


def bootstrap(
  statistic: Callable[[np.ndarray], np.ndarray],
  clusters: np.ndarray,
  *,
  resamples: int,
  seed: int = 0,
  level: float = 0.95,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """A statistic of n items with its percentile bootstrap interval, whole clusters resampled.

  Items of one cluster (states of a prompt, traces of a group) are not independent, so a resample
  draws as many clusters as there are, with replacement, and takes all items of each. The interval
  holds the quantiles (1 - level) / 2 and (1 + level) / 2 of the statistic over resamples; resamples
  in which it is NaN are left out.

  Args:
    statistic: indices [m] into the items, repeats included -> [...] float; several methods
      in one statistic see the same resamples, so that their differences can be read.
    clusters: [n] int, each item's cluster.
    resamples: at least 1.
    seed: of the resampling.
    level: in (0, 1).

  Returns:
    The statistic on all items, the lower and the upper end, each [...] float64. The ends are NaN
    where no resample has a number, and with fewer than 2 clusters.
  """
  counts = np.unique(clusters, return_counts=True)[1]
  order = np.argsort(clusters, kind="stable")  # Items by cluster; cluster c begins at starts[c].
  starts = np.cumsum(counts) - counts
  point = np.asarray(statistic(np.arange(len(clusters))), np.float64)
  ends = np.full((2, *point.shape), np.nan)
  if len(counts) < 2:
    return point, ends[0], ends[1]
  rng = np.random.default_rng(seed)
  draws = []
  for _ in range(resamples):
    chosen = rng.integers(len(counts), size=len(counts))
    sizes = counts[chosen]
    places = np.repeat(starts[chosen] + sizes - np.cumsum(sizes), sizes) + np.arange(sizes.sum())
    draws.append(np.asarray(statistic(order[places]), np.float64))
  stacked = np.stack(draws)
  some = np.isfinite(stacked).any(axis=0)
  if some.any():
    ends[:, some] = np.nanquantile(stacked[:, some], [(1 - level) / 2, (1 + level) / 2], axis=0)
  return point, ends[0], ends[1]


def bootstrap_interval(
  values: np.ndarray, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> np.ndarray:
  """Percentile bootstrap interval of a mean over prompts; see `bootstrap`.

  Prompts are resampled, not samples: another draw of questions and of answers to
  them is what a figure should be expected to move by. It never leaves the values'
  range, as mean +- 1.96 errors would near 0 and 1. Where all values are equal it has
  no width, which says that the prompts are too few or too easy, not that the mean
  is known.

  Args:
    values: [B, ...] float, one row a prompt, B >= 2; all columns see the same resamples.
    level: in (0, 1).
    resamples: at least 1.
    seed: of the resampling.

  Returns:
    [2, ...] float64, the lower and the upper end.

  Raises:
    ValueError: for fewer than 2 prompts.
  """
  values = np.asarray(values, np.float64)
  if len(values) < 2:
    raise ValueError(f"an interval over prompts needs at least 2 of them and there are {len(values)}.")
  mean = lambda rows: values[rows].mean(axis=0)
  return np.stack(bootstrap(mean, np.arange(len(values)), resamples=resamples, seed=seed, level=level)[1:])


def mean_and_error(x: np.ndarray) -> tuple[float, float]:
  """Mean and its standard error over the leading axis; the error of one value is NaN."""
  x = np.asarray(x, np.float64)
  error = x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
  return float(x.mean()), float(error)
