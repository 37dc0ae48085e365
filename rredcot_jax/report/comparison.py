"""Runs of several methods over several seeds -> who reached what, with how many rollouts and at what cost.

Reads the metrics that experiments/train.py writes; draws what it found.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.stats

from rredcot_jax.report import records
from rredcot_jax.report.statistics import mean_and_error
from rredcot_jax.report.text import visible

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

# Steps left out of the time per step: they hold the compilations.
_WARM_UP = 3
# Okabe and Ito, and two more.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7a5195", "#8c564b")
_MARKERS = "os^Dv<>P"
# Costs of credit that are averaged over steps, where a run logs them.
_COSTS = (
  "train/credit_seconds", "credit/generated_tokens", "credit/token_forwards", "credit/effective_sample_size",
  "credit/covered_states", "credit/fallback_rows", "credit/critic_explained_variance",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
  """The figures of one run; sequences have one entry an evaluation."""

  steps: Sequence[int]
  tokens: Sequence[float]  # Rollout tokens so far.
  token_forwards: Sequence[float]  # Of sampling, credit and updates so far, a backward pass as two; NaN if not logged.
  accuracy: Sequence[float]
  error: Sequence[float]
  step_seconds: float  # Median.
  credit_seconds: float  # Median.
  costs: Mapping[str, float]  # Means over steps of what there is of `_COSTS`, without their prefixes.


def read_run(workdir: Path) -> Run:
  """The figures of one run, from its metrics; see `records.read_metrics` for what it raises."""
  lines = records.read_metrics(workdir / "metrics.jsonl")
  evaluations = [line for line in lines if "eval/pass@1" in line]
  steps = [line for line in lines if "train/step_seconds" in line]
  spent = {0: 0.0}
  for line in steps:
    spent[line["step"]] = spent.get(line["step"] - 1, math.nan) + line.get("train/token_forwards", math.nan)
  costs = {}
  for name in _COSTS:
    logged = [line[name] for line in steps[_WARM_UP:] if name in line]
    if logged:
      costs[name.partition("/")[2]] = statistics.fmean(logged)
  return Run(
    steps=[line["step"] for line in evaluations],
    tokens=[line["train/rollout_tokens"] for line in evaluations],
    token_forwards=[spent.get(line["step"], math.nan) for line in evaluations],
    accuracy=[line["eval/pass@1"] for line in evaluations],
    error=[line["eval/pass@1_se"] for line in evaluations],
    step_seconds=statistics.median(line["train/step_seconds"] for line in steps[_WARM_UP:]),
    credit_seconds=statistics.median(line["train/credit_seconds"] for line in steps[_WARM_UP:]),
    costs=costs,
  )


def spent_to_reach(spent: Sequence[float], accuracy: Sequence[float], goal: float) -> float | None:
  """What was `spent` when `accuracy` first reached `goal`, linear between evaluations; None if it never did."""
  for i, reached in enumerate(accuracy):
    if reached >= goal:
      if i == 0:
        return spent[0]
      share = (goal - accuracy[i - 1]) / (reached - accuracy[i - 1])
      return spent[i - 1] + share * (spent[i] - spent[i - 1])
  return None


def mean_interval(values: Sequence[float]) -> dict[str, float | None]:
  """Mean over n seeds and its 95% interval, mean +- t s / sqrt(n), rounded to 4 digits; no interval for one seed.

  s is the sample's standard deviation and t the 97.5% quantile of Student's distribution with n - 1
  degrees of freedom.
  """
  mean, error = mean_and_error(np.asarray(values))
  if len(values) < 2:
    return {"mean": round(mean, 4), "low": None, "high": None}
  half = float(scipy.stats.t.ppf(0.975, len(values) - 1)) * error
  return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4)}


def compare(runs: Mapping[str, Mapping[int, Run]], num_params: int, *, baseline: str = "grpo") -> dict[str, Any]:
  """Every figure of the comparison.

  A method's ratio is what it spent until it first reached the baseline's final accuracy of
  the same seed, over what the baseline spent in all; below 1 is better. The mean is over the
  seeds that reached it, and `reached` says how many did: where some did not, it flatters.
  `..._of_mean_curve` takes the mean curves over seeds instead: their noise is smaller, and so
  is the luck in "first".

  Args:
    runs: by method and seed; only seeds that the baseline has finished count.
    num_params: FLOPs are 2 x this x token-forwards, generation and padding included, a
      backward pass counted as two forward passes. Attention's own products are left out.
    baseline: the method that the others are over.

  Raises:
    ValueError: if the baseline has no run.
  """
  result: dict[str, Any] = {
    name: {}
    for name in (
      "rollouts_to_grpo_accuracy_over_grpo", "rollouts_to_grpo_accuracy_over_grpo_interval", "reached",
      "rollouts_to_grpo_accuracy_over_grpo_of_mean_curve", "flops_to_grpo_accuracy_over_grpo", "final_accuracy",
      "final_accuracy_over_grpo", "step_seconds_over_grpo", "costs_a_step", "per_seed", "curves",
    )
  }  # fmt: skip
  base = runs.get(baseline, {})
  if not base:
    raise ValueError(f"no finished run of {baseline!r}, which the other methods are compared with: run it first.")
  for name, by_seed in runs.items():
    pairs = [(seed, run, base[seed]) for seed, run in sorted(by_seed.items()) if seed in base]
    if not pairs:
      continue
    rollouts, flops, per_seed = [], [], {}
    for seed, run, over in pairs:
      # An accuracy that the baseline had before its first token is none that it reached.
      target = over.accuracy[-1] if over.accuracy[-1] > over.accuracy[0] else math.inf
      tokens = spent_to_reach(run.tokens, run.accuracy, target)
      forwards = spent_to_reach(run.token_forwards, run.accuracy, target)
      if tokens is not None and forwards is not None:
        rollouts.append(tokens / over.tokens[-1])
        flops.append(forwards / over.token_forwards[-1])
      per_seed[seed] = {
        "rollouts_over_grpo": None if tokens is None else round(rollouts[-1], 4),
        "flops_over_grpo": None if tokens is None else round(flops[-1], 4),
        "accuracy_before": round(run.accuracy[0], 4),
        "accuracy_after": round(run.accuracy[-1], 4),
        "rollout_tokens": run.tokens[-1],
        "step_seconds": round(run.step_seconds, 4),
      }
    of_runs = [run for _, run, _ in pairs]
    curve = _mean_curve(of_runs)
    goal = float(np.mean([over.accuracy[-1] for _, _, over in pairs]))
    reached = spent_to_reach(curve["rollout_tokens"], curve["accuracy"], goal)
    total = float(np.mean([over.tokens[-1] for _, _, over in pairs]))
    figures = {
      "rollouts_to_grpo_accuracy_over_grpo": round(statistics.fmean(rollouts), 4) if rollouts else None,
      "rollouts_to_grpo_accuracy_over_grpo_interval": mean_interval(rollouts) if len(rollouts) > 1 else None,
      "reached": f"{len(rollouts)} of {len(pairs)}",
      "rollouts_to_grpo_accuracy_over_grpo_of_mean_curve": None if reached is None else round(reached / total, 4),
      "flops_to_grpo_accuracy_over_grpo": round(statistics.fmean(flops), 4) if flops else None,
      "final_accuracy": mean_interval([run.accuracy[-1] for run in of_runs]),
      "final_accuracy_over_grpo": mean_interval([run.accuracy[-1] - over.accuracy[-1] for _, run, over in pairs]),
      "step_seconds_over_grpo": round(statistics.median(r.step_seconds / o.step_seconds for _, r, o in pairs), 3),
      "costs_a_step": {
        key: round(statistics.fmean(run.costs[key] for run in of_runs), 4)
        for key in of_runs[0].costs
        if all(key in run.costs for run in of_runs)
      },
      "per_seed": per_seed,
      "curves": curve | {"flops": [2.0 * num_params * x for x in curve.pop("token_forwards")]},
    }
    for key, value in figures.items():
      result[key][name] = value
  return result | {"baseline": baseline, "seeds": sorted(base), "num_params": num_params}


def _mean_curve(runs: Sequence[Run]) -> dict[str, list]:
  """Means over runs at each evaluation that all of them have, and the accuracy's 95% interval."""
  count = min(len(run.steps) for run in runs)
  accuracy = np.array([run.accuracy[:count] for run in runs])
  intervals = [mean_interval(column) for column in accuracy.T]
  return {
    "steps": list(runs[0].steps[:count]),
    "rollout_tokens": np.mean([run.tokens[:count] for run in runs], axis=0).tolist(),
    "token_forwards": np.mean([run.token_forwards[:count] for run in runs], axis=0).tolist(),
    "accuracy": [x["mean"] for x in intervals],
    "low": [x["low"] for x in intervals],
    "high": [x["high"] for x in intervals],
  }


# ---------------------------------------------------------------------------------------------- figures


def curves_figure(figures: Mapping[str, Any], x_key: str, panels: Mapping[str, Sequence[str]]) -> "Figure":
  """Accuracy against `x_key` ("rollout_tokens" or "flops"), one panel a title -> methods; the baseline in each."""
  from matplotlib.figure import Figure

  labels = {"rollout_tokens": "rollout tokens (thousands)", "flops": "floating-point operations (10¹² = 1 TFLOP)"}
  scale = {"rollout_tokens": 1e3, "flops": 1e12}[x_key]
  figure = Figure(figsize=(10, 5.6), layout="constrained")
  axes: Sequence[Axes] = list(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0])
  baseline = figures["baseline"]
  for ax, (title, names) in zip(axes, panels.items()):
    shown = [name for name in names if name in figures["curves"]]
    for i, name in enumerate([baseline, *shown]):
      curve = figures["curves"][name]
      color, marker = ("#222222", "o") if i == 0 else (_COLORS[(i - 1) % len(_COLORS)], _MARKERS[i % len(_MARKERS)])
      x, y, low, high = (np.array(curve[key], float) for key in (x_key, "accuracy", "low", "high"))
      # The start has spent nothing, which a logarithmic axis cannot show.
      keep = x > 0 if x_key == "flops" else np.ones(len(x), bool)
      x, y, low, high = (100 * part[keep] if j else part[keep] / scale for j, part in enumerate((x, y, low, high)))
      ax.fill_between(x, np.clip(low, 0, 100), np.clip(high, 0, 100), color=color, alpha=0.1, linewidth=0)
      ax.plot(x, y, color=color, marker=marker, markersize=3, linewidth=1.6, label=name)
    ax.axhline(100 * figures["final_accuracy"][baseline]["mean"], color="#222222", linewidth=0.7, linestyle=":")
    ax.set(title=title, xlabel=labels[x_key])
    ax.set_xscale("log" if x_key == "flops" else "linear")
    ax.grid(color="#ececf0", linewidth=0.7)
    ax.spines[["top", "right"]].set_visible(False)
    # Below the axes: nowhere within is free of curves.
    ax.legend(fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
  axes[0].set_ylabel("held-out accuracy, pass@1 (%)")
  return figure


def summary_figure(figures: Mapping[str, Any]) -> "Figure":
  """Each method's ratio to the baseline's rollouts, seed by seed, and its final accuracy with interval."""
  from matplotlib.figure import Figure

  names = list(figures["curves"])[::-1]
  figure = Figure(figsize=(10, 0.9 + 0.34 * len(names)), layout="constrained")
  left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.15, 1))
  for y, name in enumerate(names):
    ratios = [seed["rollouts_over_grpo"] for seed in figures["per_seed"][name].values()]
    reached = [ratio for ratio in ratios if ratio is not None]
    left.plot(reached, [y] * len(reached), "o", color="#0072B2", alpha=0.45, markersize=4)
    if reached:
      left.plot(statistics.fmean(reached), y, "|", color="#0072B2", markersize=14, markeredgewidth=2.4)
    if len(reached) < len(ratios):
      left.text(1.03, y, f"{len(reached)} of {len(ratios)} reached it", va="center", fontsize=7.5, color="#b3261e")
    final = figures["final_accuracy"][name]
    # A few seeds' interval may leave what an accuracy can be; one seed's is NaN and draws no bar.
    ends = np.clip(np.array([[final["low"]], [final["high"]]], float), 0, 1)
    right.errorbar(
      100 * final["mean"], y, xerr=100 * np.abs(ends - final["mean"]), fmt="o", color="#222222", capsize=3, markersize=4
    )
  left.axvline(0.5, color="#9a9aa2", linestyle="--", linewidth=1)
  left.axvline(1.0, color="#222222", linestyle=":", linewidth=1)
  left.set_yticks(range(len(names)), names)
  left.set(xlabel="rollout tokens to GRPO's final accuracy,\nover GRPO's (dot: seed, bar: mean)", xlim=(0, 1.45))
  right.set(xlabel="final held-out accuracy (%),\nmean and 95% interval over seeds")
  goal = figures["final_accuracy"][figures["baseline"]]["mean"]
  right.axvline(100 * goal, color="#222222", linestyle=":", linewidth=1)
  for ax in (left, right):
    ax.grid(axis="x", color="#ececf0", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
  return figure


def print_table(table: Sequence[Mapping[str, str]]) -> None:
  """Prints rows of one set of columns, aligned; control characters are shown as codes."""
  table = [{visible(key): visible(cell) for key, cell in line.items()} for line in table]
  widths = {key: max(len(key), *(len(line[key]) for line in table)) for key in table[0]}
  print("\n" + "  ".join(key.ljust(width) for key, width in widths.items()))
  for line in table:
    print("  ".join(line[key].ljust(width) for key, width in widths.items()))
