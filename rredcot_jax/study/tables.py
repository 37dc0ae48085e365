"""The tables of the credit study, from traces, their credit by every method, and the ground truth.

Figures are JSON values. A number with its interval is [value, low, high], None where there is none.
Intervals are 95%, by bootstrap over prompts, because states of one prompt are not independent: traces of
a group share prefixes.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rredcot_jax.credit.assigner import Rule, uniform_advantages
from rredcot_jax.ops import advantages, composition
from rredcot_jax.report import statistics
from rredcot_jax.study import agreement, gradients, ground_truth
from rredcot_jax.study.estimators import CALIBRATED, Estimate, Estimators, Traces

Figure = list[float | None]
UNBIASED = "monte_carlo:difference"  # The estimator whose mean is the policy gradient.
_LEAST = 20  # Items that a subset needs before a correlation over it is given.


@dataclasses.dataclass(frozen=True)
class Evidence:
  """The traces whose states have a ground truth; fields [B, K] or [B], as `Traces` has them."""

  state_of: np.ndarray  # [B, K] int, -1 where there is no truth.
  returns: np.ndarray  # [B]
  num_segments: np.ndarray  # [B]
  prompts: np.ndarray  # [B] int, the cluster.
  position: np.ndarray  # [B, K] in [0, 1), where in its trace the segment begins.
  stated: np.ndarray  # [B, K] bool, see `ground_truth.answer_stated`.

  @property
  def mask(self) -> np.ndarray:
    return self.state_of >= 0

  def spread(self, per_state: np.ndarray) -> np.ndarray:
    """[S] -> [B, K]; NaN where there is no state."""
    return np.where(self.mask, per_state[self.state_of], np.nan)

  def differences(self, per_state: np.ndarray) -> np.ndarray:
    """[S] values -> [B, K] r_k = v(s_{k+1}) - v(s_k), the last of a trace with its observed return."""
    values = self.spread(per_state)
    last = np.arange(values.shape[1])[None] == self.num_segments[:, None] - 1
    following = np.where(last, self.returns[:, None], np.pad(values[:, 1:], [(0, 0), (0, 1)], constant_values=np.nan))
    return following - values


def evidence_of(traces: Traces, state_of: np.ndarray, prompts: np.ndarray, stated: np.ndarray) -> Evidence:
  lengths = np.maximum(np.asarray(traces.rollout.mask).sum(axis=1), 1)
  position = np.minimum(np.asarray(traces.segments.starts) / lengths[:, None], 0.999)
  return Evidence(state_of, traces.returns, traces.num_segments, np.asarray(prompts), position, stated)


def credit_in_chunks(engine: Estimators, name: str, traces: Traces, key: jax.Array, rows_at_once: int) -> Estimate:
  """`engine.credit` of many traces in chunks. Seconds are the median chunk's, so that compiling does not count."""
  if name in CALIBRATED:  # Over all prompts together, because each is calibrated by the others.
    return engine.calibrated(credit_in_chunks(engine, CALIBRATED[name], traces, key, rows_at_once), traces)
  total = len(traces.returns)
  parts = [
    engine.credit(name, traces.rows(np.arange(first, min(first + rows_at_once, total))), jax.random.fold_in(key, first))
    for first in range(0, total, rows_at_once)
  ]
  warm = parts[1:] or parts
  return Estimate(
    rewards=np.concatenate([part.rewards for part in parts]),
    values=None if parts[0].values is None else np.concatenate([part.values for part in parts]),  # type: ignore[misc]
    seconds=float(np.median([part.seconds for part in warm])) * len(parts),
    forward_tokens=sum(part.forward_tokens for part in parts),
    generated_tokens=sum(part.generated_tokens for part in parts),
    flops=sum(part.flops for part in parts),
    covered=float(np.mean([part.covered for part in parts])),
  )


# ---- a. Value quality --------------------------------------------------------------------


def value_quality(
  evidence: Evidence, truth: ground_truth.GroundTruth, estimates: Mapping[str, Estimate], *, resamples: int
) -> dict[str, Any]:
  """{"values" or "differences": {subset: {"n", "ceiling", "methods": {method: {measure: figure}}}}}."""
  true_values = evidence.spread(truth.values)
  true_rewards = evidence.differences(truth.values)
  with_values = {name: e.values for name, e in estimates.items() if e.values is not None}
  rewards = {name: e.rewards for name, e in estimates.items()}
  tables: dict[str, Any] = {"values": {}, "differences": {}}
  for subset, mask in _subsets(evidence).items():
    for what, true, by_method, spread in (
      ("values", true_values, with_values, evidence.spread),
      ("differences", true_rewards, rewards, evidence.differences),
    ):
      enough = mask.sum() >= _LEAST or subset == "all"
      chosen = by_method if enough else {}
      tables[what][subset] = _compare(true, chosen, spread, mask, evidence, truth, resamples)
  return tables


def _subsets(evidence: Evidence) -> dict[str, np.ndarray]:
  right = np.broadcast_to(evidence.returns[:, None] >= 1, evidence.mask.shape)
  subsets = {
    "all": evidence.mask,
    "correct traces": evidence.mask & right,
    "wrong traces": evidence.mask & ~right,
    "answer not stated": evidence.mask & ~evidence.stated,
    "answer stated": evidence.mask & evidence.stated,
  }
  decile = np.floor(10 * evidence.position)
  return subsets | {f"decile {d}": evidence.mask & (decile == d) for d in range(10)}


def _compare(true, by_method, spread, mask, evidence, truth, resamples) -> dict[str, Any]:
  rows, columns = np.nonzero(mask)
  table: dict[str, Any] = {"n": len(rows), "ceiling": None, "methods": {}}
  if not by_method or not len(rows):
    return table
  target = true[rows, columns]
  guesses = [np.asarray(values, np.float64)[rows, columns] for values in by_method.values()]
  statistic = lambda i: np.stack([agreement.measures(guess[i], target[i]) for guess in guesses])
  point, low, high = statistics.bootstrap(statistic, evidence.prompts[rows], resamples=resamples)
  table["ceiling"] = jsonable(
    agreement.noise_ceiling(lambda rng: tuple(spread(half)[rows, columns] for half in truth.halves(rng)))
  )
  for i, name in enumerate(by_method):
    table["methods"][name] = {
      measure: figure(point[i, j], low[i, j], high[i, j]) for j, measure in enumerate(agreement.MEASURES)
    }
  return table


def calibration_curve(evidence: Evidence, true: np.ndarray, guess: np.ndarray, bins: int = 10) -> list[list[float]]:
  """[mean estimate, mean truth, n] of bins of equally many estimates."""
  pairs = np.stack([guess[evidence.mask], true[evidence.mask]], axis=1)
  ordered = pairs[np.argsort(pairs[:, 0], kind="stable")]
  return [[*part.mean(axis=0).tolist(), len(part)] for part in np.array_split(ordered, bins) if len(part)]


# ---- b. Ranking --------------------------------------------------------------------------


def ranking(
  evidence: Evidence, truth: ground_truth.GroundTruth, estimates: Mapping[str, Estimate], *, resamples: int
) -> dict[str, Any]:
  """How often a method orders two continuations of one state as the truth does.

  Continuations are the segments that traces of a group wrote after the same prefix. A pair counts if
  the values that it leads to differ by more than 1.96 of their standard errors; each pair of states once.
  A method that values states is asked for the values of the two, any other for its credit.
  """
  values, errors = truth.values, truth.standard_errors
  following: dict[int, dict[int, tuple[int, int]]] = {}
  for row, k in np.argwhere(evidence.mask):
    if k + 1 < evidence.num_segments[row]:
      children = following.setdefault(int(evidence.state_of[row, k]), {})
      children.setdefault(int(evidence.state_of[row, k + 1]), (int(row), int(k)))
  pairs, clusters = [], []
  for children in following.values():
    names = sorted(children)
    for i, first in enumerate(names):
      for second in names[:i]:
        if abs(values[first] - values[second]) > 1.96 * math.hypot(errors[first], errors[second]):
          better, worse = (first, second) if values[first] > values[second] else (second, first)
          pairs.append((children[better], children[worse]))
          clusters.append(evidence.prompts[children[better][0]])
  table: dict[str, Any] = {"pairs": len(pairs), "prompts": len(set(clusters)), "methods": {}}
  if not pairs:
    return table
  scores = []
  for e in estimates.values():
    if e.values is None:
      credit_of = [(e.rewards[b], e.rewards[w]) for b, w in pairs]
    else:
      credit_of = [(e.values[b[0], b[1] + 1], e.values[w[0], w[1] + 1]) for b, w in pairs]
    flat = np.array(credit_of, np.float64).reshape(-1)
    scores.append(agreement.ordered_pairs(flat, [(2 * i, 2 * i + 1) for i in range(len(pairs))]))
  return table | {"methods": _means(scores, list(estimates), np.array(clusters), resamples)}


# ---- c. Error localisation ---------------------------------------------------------------


def localisation(
  wrong: np.ndarray,
  num_segments: np.ndarray,
  prompts: np.ndarray,
  rewards: Mapping[str, np.ndarray],
  *,
  resamples: int,
) -> dict[str, Any]:
  """Share of failed traces whose most negative reward is that of segment `wrong` [B], -1 where unknown."""
  rows = np.flatnonzero(wrong >= 0)
  table: dict[str, Any] = {"traces": len(rows), "methods": {}, "chance": None}
  if not len(rows):
    return table
  scores = [
    np.array([agreement.blame(r[row], num_segments[row], wrong[row]) for row in rows]) for r in rewards.values()
  ]
  scores.append(1 / num_segments[rows])
  methods = _means(scores, [*rewards, "chance"], prompts[rows], resamples)
  return table | {"chance": methods.pop("chance"), "methods": methods}


def largest_drops(evidence: Evidence, truth: ground_truth.GroundTruth) -> np.ndarray:
  """[B] int, the segment of a failed trace at which the true value falls most; -1 if not by 1.96 standard errors.

  It replaces the first wrong step for tasks in which that is not known.
  """
  rewards = evidence.differences(truth.values)
  errors = evidence.spread(truth.standard_errors)
  result = np.full(len(rewards), -1)
  for row in np.flatnonzero(evidence.mask.any(axis=1) & (evidence.returns < 1)):
    k = int(np.argmin(rewards[row, : evidence.num_segments[row]]))
    after = errors[row, k + 1] if k + 1 < evidence.num_segments[row] else 0.0
    if rewards[row, k] < -1.96 * math.hypot(errors[row, k], after):
      result[row] = k
  return result


# ---- d. Gradient variance ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Moments:
  """Inner products of gradients, see `agreement.gradient_figures`; P prompts, A estimators."""

  names: list[str]
  same_group: np.ndarray  # [P, A, A]
  of_sums: np.ndarray  # [P, A, A]
  of_all: np.ndarray  # [A, A], inner products of the sums over all prompts.
  groups: int  # n, of each prompt.
  seconds: float = 0.0


def token_advantages(spec: str, estimates: Mapping[str, Estimate], traces: Traces, group_size: int) -> jax.Array:
  """[B, T] advantages of "<method>:<mode>", or of one of GRPO's forms.

  Modes are `advantages.MODES` and "action_value": v(s_{k+1}) on the tokens of segment k, unbiased as
  "difference" is, but with no baseline. "grpo" is GRPO, "grpo:unscaled" its unbiased form (leave-one-out
  baseline, no deviation), "grpo:return" R on every token.
  """
  method, _, mode = spec.partition(":")
  unscaled = mode == "unscaled"
  rule = Rule(group_size, baseline="rloo" if unscaled else "mean", advantage_scale="none" if unscaled else "std")
  returns = jnp.asarray(traces.returns)
  if method == "grpo" and mode == "return":
    return jnp.where(traces.rollout.mask, returns[:, None], 0.0)
  if method == "grpo":
    return uniform_advantages(traces.rollout.mask, returns, rule=rule)
  rewards = jnp.asarray(estimates[method].rewards)
  if mode == "action_value":
    # v(s_{k+1}) = r_k + v(s_k).
    rewards, mode = rewards + jnp.asarray(estimates[method].values), "difference"
  to_tokens = jax.vmap(lambda r, a, s: advantages.token_advantages(r, a, s, mode=mode))
  return to_tokens(rewards, composition.group_advantages(returns, **rule.of_group), traces.segments)


def prompt_moments(
  engine: Estimators, specs: Sequence[str], batches: Sequence[tuple[Traces, Mapping[str, Estimate]]], *,
  part: str, add_groups: Any,
) -> tuple[np.ndarray, jax.Array]:  # fmt: skip
  """S [A, A] and the sum [A, D] of one prompt's gradients over all groups in `batches`."""
  total = jnp.zeros((len(specs), gradients.num_parameters(engine.params, part)), jnp.float32)
  products = np.zeros((len(specs),) * 2)
  size = engine.setting.group_size
  for traces, estimates in batches:
    weights = jnp.stack([token_advantages(spec, estimates, traces, size) for spec in specs], axis=1)
    grouped = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (traces.rollout, weights))
    total, within = add_groups(engine.params, grouped[0], jnp.swapaxes(grouped[1], 1, 2), total)
    products += np.asarray(within, np.float64)
  return products, total


def gradient_variance(
  moments: Moments, *, unbiased: str = UNBIASED, step_flops: Mapping[str, float], resamples: int
) -> dict[str, Any]:
  """{"fixed prompts": {method: {figure: [..]}}, "across prompts": {...}, ...} over the estimators of `moments`.

  Args:
    moments: of the estimators, "grpo" among them.
    unbiased: the one whose mean stands for the policy gradient.
    step_flops: operations of a training step with each, for "at equal compute": n groups more
      cheaply bought divide the variance by n.
    resamples: of the bootstrap over prompts; it needs at least 2 prompts.
  """
  places = {"baseline": moments.names.index("grpo"), "reference": moments.names.index(unbiased)}
  figures_of = lambda rows: agreement.gradient_figures(
    moments.same_group[rows], moments.of_sums[rows], moments.groups, **places
  )
  keys = list(figures_of(np.arange(len(moments.same_group))))
  statistic = lambda rows: np.stack([figures_of(rows)[key] for key in keys])
  point, low, high = statistics.bootstrap(statistic, np.arange(len(moments.same_group)), resamples=resamples)
  across = _across_prompts(moments, **places)
  table: dict[str, Any] = {"groups": moments.groups, "prompts": len(moments.same_group), "unbiased": unbiased}
  fixed: dict[str, Any] = {}
  for a, name in enumerate(moments.names):
    fixed[name] = {key: figure(point[j, a], low[j, a], high[j, a]) for j, key in enumerate(keys)}
    cost = step_flops[name] / step_flops["grpo"]
    fixed[name]["compute_over_grpo"] = cost
    for key in ("own_ratio", "useful_ratio"):
      fixed[name][f"{key}_at_equal_compute"] = [None if x is None else x * cost for x in fixed[name][key]]
  return table | {
    "fixed prompts": fixed,
    "across prompts": {n: {key: number(across[key][a]) for key in keys} for a, n in enumerate(moments.names)},
  }


def _across_prompts(moments: Moments, *, baseline: int, reference: int) -> dict[str, np.ndarray]:
  """The same figures where a batch is one group of one random prompt: prompts take the place of groups."""
  prompts, n = len(moments.same_group), moments.groups
  power = moments.same_group.sum(axis=0) / n  # Sum over prompts of E g.g within a group.
  if prompts < 2:
    nothing = np.full(len(moments.names), np.nan)
    keys = agreement.gradient_figures(moments.same_group, moments.of_sums, n, baseline=baseline, reference=reference)
    return {key: nothing for key in keys}
  # Products of different prompts' means are what is unbiased here.
  cross = (moments.of_all - moments.of_sums.sum(axis=0)) / n**2
  of_sums = cross + power
  return agreement.gradient_figures(power[None], of_sums[None], prompts, baseline=baseline, reference=reference)


# ---- Shared ------------------------------------------------------------------------------


def cost(estimate: Estimate, num_traces: int) -> dict[str, float]:
  """What crediting one trace costs."""
  return {
    "forward_tokens": estimate.forward_tokens / num_traces,
    "generated_tokens": estimate.generated_tokens / num_traces,
    "flops": estimate.flops / num_traces,
    "seconds": estimate.seconds / num_traces,
    "covered_states": estimate.covered,
  }


def figure(value: float, low: float, high: float) -> Figure:
  return [number(value), number(low), number(high)]


def number(value: float) -> float | None:
  return float(value) if math.isfinite(value) else None


def jsonable(tree: Any) -> Any:
  """NaN and infinities as None, which JSON has."""
  if isinstance(tree, Mapping):
    return {key: jsonable(value) for key, value in tree.items()}
  if isinstance(tree, list | tuple):
    return [jsonable(value) for value in tree]
  return number(tree) if isinstance(tree, float) else tree


def _means(scores: list[np.ndarray], names: list[str], clusters: np.ndarray, resamples: int) -> dict[str, Figure]:
  stacked = np.stack(scores)
  point, low, high = statistics.bootstrap(lambda i: stacked[:, i].mean(axis=1), clusters, resamples=resamples)
  return {name: figure(point[i], low[i], high[i]) for i, name in enumerate(names)}
