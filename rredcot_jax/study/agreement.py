"""How well estimated credit agrees with a ground truth: the statistics of the credit study.

Numpy and scipy on flat arrays. The caller chooses which states are compared.
"""

from collections.abc import Callable, Sequence

import numpy as np
import scipy.stats

MEASURES = ("pearson", "spearman", "kendall", "mean_absolute_error", "calibration_error")


def pearson(x: np.ndarray, y: np.ndarray) -> float:
  """Linear correlation; NaN where there are fewer than 3 pairs or either side is constant."""
  if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
    return float("nan")
  return float(np.corrcoef(x, y)[0, 1])


def spearman(x: np.ndarray, y: np.ndarray) -> float:
  """Rank correlation, ties at their mean rank; NaN as `pearson`."""
  return pearson(scipy.stats.rankdata(x), scipy.stats.rankdata(y))


def kendall(x: np.ndarray, y: np.ndarray) -> float:
  """Kendall's tau-b; NaN as `pearson`."""
  if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
    return float("nan")
  return float(scipy.stats.kendalltau(x, y).statistic)


def mean_absolute_error(estimate: np.ndarray, truth: np.ndarray) -> float:
  """mean |estimate - truth|; NaN over nothing."""
  return float(np.abs(estimate - truth).mean()) if len(truth) else float("nan")


def calibration_error(estimate: np.ndarray, truth: np.ndarray, *, bins: int = 10) -> float:
  """Expected calibration error: sum_b n_b / n |mean of the estimates - mean of the truth| over bins of the estimate.

  Bins hold equally many estimates, and equal estimates stay together. Bins of equal width would
  not do, because differences lie near 0 and nearly all would fall into one bin. NaN of no estimate.
  """
  if not len(truth):
    return float("nan")
  edges = np.unique(np.quantile(estimate, np.arange(1, bins) / bins))
  place = np.searchsorted(edges, estimate, side="right")
  error = np.bincount(place, weights=estimate - truth, minlength=bins)
  return float(np.abs(error).sum() / len(truth))


def measures(estimate: np.ndarray, truth: np.ndarray) -> np.ndarray:
  """[5] float64, one number for each of `MEASURES`."""
  functions = (pearson, spearman, kendall, mean_absolute_error, calibration_error)
  return np.array([function(estimate, truth) for function in functions])


def spearman_brown(correlation: float) -> float:
  """Reliability of the whole from the correlation of its two halves: 2 r / (1 + r)."""
  return 2 * correlation / (1 + correlation)


def noise_ceiling(
  halves: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]], *, splits: int = 20, seed: int = 0
) -> dict[str, float]:
  """The rank correlation that a perfect estimator would have with this noisy truth.

      r = Spearman(half 1, half 2), mean over random splits;  reliability = 2 r / (1 + r);  ceiling = sqrt(reliability)

  The second step is the Spearman-Brown formula, from half the samples to all of them. The third
  step is the attenuation by noise on one side alone. Both are exact for linear correlation with
  equal error variances, and approximate for ranks.

  Args:
    halves: generator -> the truth from a random half of its samples and from the other half.
    splits: how many random splits.
    seed: of the splits.
  """
  rng = np.random.default_rng(seed)
  half = float(np.mean([spearman(*halves(rng)) for _ in range(splits)]))
  reliability = spearman_brown(half)
  return {"split_half": half, "reliability": reliability, "ceiling": float(np.sqrt(max(reliability, 0.0)))}


def blame(rewards: np.ndarray, num_segments: int, wrong: int) -> float:
  """Whether the most negative reward falls on segment `wrong`: 1 or 0, or 1 / ties if it is among equal ones."""
  credit = rewards[:num_segments]
  lowest = np.flatnonzero(credit == credit.min())
  return float(wrong in lowest) / len(lowest)


def ordered_pairs(estimate: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
  """[len(pairs)]: 1 where estimate[better] > estimate[worse], 0.5 for a tie, 0 otherwise; pairs are (better, worse)."""
  better, worse = np.array(pairs, int).reshape(-1, 2).T
  difference = estimate[better] - estimate[worse]
  return np.where(difference > 0, 1.0, np.where(difference == 0, 0.5, 0.0))


def gradient_figures(
  same_group: np.ndarray, of_sums: np.ndarray, groups: int, *, baseline: int, reference: int
) -> dict[str, np.ndarray]:
  """Variance and direction of gradient estimators from inner products alone.

  With g_m^a the gradient of estimator a from group m of n independent groups of one prompt,

      S_ab = sum_m g_m^a . g_m^b        C_ab = (sum_m g_m^a) . (sum_m g_m^b)
      I_ab = (C_ab - S_ab) / (n (n - 1))      unbiased for E g^a . E g^b: only products of different groups
      V_a  = S_aa / n - I_aa                  unbiased for the trace of the covariance of g^a

  Averages over prompts are taken of I, V and S first, and ratios last. With the reference r an
  unbiased estimator of the policy gradient dJ:

      variance_ratio      V_a / V_baseline: raw, so an estimator can look better because its scale is small
      own                 V_a / I_aa: noise over own signal (inverse signal-to-noise), independent of scale
      useful              V_a I_rr / I_ar^2: as own, but only the part of the mean along dJ is signal. The same as
                          `own` where E g^a is parallel to dJ; a precise mean in a useless direction counts as noise.
      cosine_of_means     I_ar / sqrt(I_aa I_rr): the direction that many rollouts lead to
      cosine              I_ar / sqrt(S_aa / n I_rr): root-mean-square cosine of one group's gradient with dJ.
                          Its square is, to first order, the best gain in J that a step along g^a makes.

  Args:
    same_group, of_sums: [P, A, A] S and C of each prompt.
    groups: n >= 2.
    baseline, reference: places among the A estimators.

  Returns:
    Each of the above by name, [A]; NaN where what has to be positive is not, because the signal
    is lost in the noise of its own estimate.
  """
  inner = ((of_sums - same_group) / (groups * (groups - 1))).mean(axis=0)
  second = (same_group / groups).mean(axis=0)
  signal, power = np.diagonal(inner), np.diagonal(second)
  variance = power - signal
  along = inner[:, reference]
  positive = lambda x: np.where(x > 0, x, np.nan)
  true_signal = positive(inner[reference, reference])
  own = variance / positive(signal)
  useful = variance * true_signal / positive(along) ** 2
  return {
    "variance": variance,
    "variance_ratio": variance / positive(variance[baseline]),
    "own": own,
    "own_ratio": own / own[baseline],
    "useful": useful,
    "useful_ratio": useful / useful[baseline],
    "cosine_of_means": along / np.sqrt(positive(signal) * true_signal),
    "cosine": along / np.sqrt(power * true_signal),
  }
