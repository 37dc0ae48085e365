"""The study's tables by hand: what is compared, whose prompts are resampled, and what each figure divides by."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rredcot_jax.ops import types
from rredcot_jax.study import agreement, estimators, gradients, ground_truth, tables

# States by number: the prompt, three ways to go on from it, and an end of the first two. Trace 3 has no truth.
VALUES = np.array([0.5, 0.8, 0.2, 0.76, 0.9])
STATE_OF = np.array([[0, 1, 4], [0, 2, -1], [0, 3, -1], [-1, -1, -1], [0, 1, -1]])
NUM_SEGMENTS = np.array([3, 2, 2, 2, 2])
RETURNS = np.array([1, 0, 1, 0, 0], np.float32)


def truth_of(values, samples=100):
  rewards = [np.arange(samples) < round(value * samples) for value in values]
  return ground_truth.GroundTruth([each.astype(np.float32) for each in rewards], 0, 0, 0.0)


def evidence(**changes):
  rows, k = STATE_OF.shape
  whole = tables.Evidence(
    state_of=STATE_OF, returns=RETURNS, num_segments=NUM_SEGMENTS, prompts=np.zeros(rows, int),
    position=np.tile(np.arange(k) / k, (rows, 1)), stated=np.tile(np.arange(k) == 2, (rows, 1)),
  )  # fmt: skip
  return dataclasses.replace(whole, **changes)


def estimate(rewards, values=None, **changes):
  rewards = np.asarray(rewards, np.float32)
  given = {"seconds": 1.0, "forward_tokens": 0, "generated_tokens": 0, "flops": 0.0, "covered": 1.0} | changes
  return estimators.Estimate(rewards, None if values is None else np.asarray(values, np.float32), **given)


nan = np.nan
TRUE = np.array([[0.3, 0.1, 0.1], [-0.3, -0.2, nan], [0.26, 0.24, nan], [nan] * 3, [0.3, -0.8, nan]])


def test_differences_end_with_the_return_and_are_none_without_a_truth():
  spread = evidence().spread(VALUES)
  np.testing.assert_array_equal(spread[:2], [[0.5, 0.8, 0.9], [0.5, 0.2, nan]])
  assert np.isnan(spread[3]).all()
  np.testing.assert_allclose(evidence().differences(VALUES), TRUE)


def test_the_position_of_a_segment_is_its_start_over_the_traces_length():
  mask = np.arange(8) < np.array([8, 4, 0])[:, None]
  segments = types.Segments(
    ends=np.array([[2, 6, 8], [1, 4, 4], [0, 0, 0]]), segment_ids=None, num_segments=np.array([3, 2, 0]),
    num_merged=np.zeros(3, int),
  )  # fmt: skip
  rollout = types.Rollout(None, None, None, mask, None, None, None, None)
  traces = estimators.Traces(rollout, None, segments, np.zeros(3), [None] * 3)
  found = tables.evidence_of(traces, np.full((3, 3), -1), [0, 0, 1], np.zeros((3, 3), bool))
  np.testing.assert_allclose(found.position[:2], [[0, 0.25, 0.75], [0, 0.25, 0.999]])
  assert found.num_segments.tolist() == [3, 2, 0] and found.prompts.tolist() == [0, 0, 1]


def test_values_and_differences_are_compared_where_there_is_a_truth():
  # Off by 0.1 everywhere; what stands where there is no truth must not be read.
  values = np.where(STATE_OF >= 0, VALUES[STATE_OF] + 0.1, 9)
  estimates = {
    "valued": estimate(np.where(STATE_OF >= 0, TRUE, 9), values),
    "credited": estimate(np.where(STATE_OF >= 0, TRUE - 0.2, 9)),
  }
  found = tables.value_quality(evidence(), truth_of(VALUES), estimates, resamples=3)
  sizes = {
    "all": 9, "correct traces": 5, "wrong traces": 4, "answer not stated": 8, "answer stated": 1, "decile 0": 4,
    "decile 3": 4, "decile 6": 1, "decile 9": 0,
  }  # fmt: skip
  for what in ("values", "differences"):
    assert {subset: found[what][subset]["n"] for subset in sizes} == sizes
  assert set(found["values"]["all"]["methods"]) == {"valued"}
  assert found["values"]["all"]["methods"]["valued"]["mean_absolute_error"][0] == pytest.approx(0.1)
  errors = {n: row["mean_absolute_error"][0] for n, row in found["differences"]["all"]["methods"].items()}
  assert errors == {"valued": pytest.approx(0, abs=1e-6), "credited": pytest.approx(0.2)}
  assert found["differences"]["all"]["methods"]["credited"]["pearson"][0] == pytest.approx(1)
  assert found["differences"]["all"]["methods"]["valued"]["pearson"][1:] == [None, None]  # One prompt: no interval.
  assert found["values"]["wrong traces"]["methods"] == {}  # Too few for a correlation.
  assert found["values"]["all"]["ceiling"]["ceiling"] > 0.9


def test_intervals_resample_prompts():
  """Two prompts that disagree: a resample holds one of them alone, which traces drawn one by one would hardly do."""
  prompts = np.repeat([0, 1], 6)
  rewards = np.where(prompts[:, None] == 0, [[-1.0, 0.0]], [[0.0, -1.0]])
  found = tables.localisation(np.zeros(12, int), np.full(12, 2), prompts, {"a": rewards}, resamples=200)
  assert found["methods"]["a"] == [0.5, 0.0, 1.0]
  whole = evidence(
    state_of=np.tile([0, 1], (12, 1)), returns=np.ones(12), num_segments=np.full(12, 2), prompts=prompts,
    position=np.zeros((12, 2)), stated=np.zeros((12, 2), bool),
  )  # fmt: skip
  values = np.where(prompts[:, None] == 0, VALUES[:2] + 0.2, VALUES[:2])
  methods = tables.value_quality(whole, truth_of(VALUES[:2]), {"b": estimate(values, values)}, resamples=200)
  figure = methods["values"]["all"]["methods"]["b"]["mean_absolute_error"]
  assert figure == pytest.approx([0.1, 0.0, 0.2], abs=1e-6)


def test_a_calibration_curve_has_bins_of_equally_many_estimates():
  true = np.array([[0.5, 1.0, nan], [0.0, 0.25, 7.0]])
  guess = np.array([[0.1, 0.9, 5.0], [0.4, 0.3, 6.0]])
  some = evidence(state_of=np.array([[0, 0, -1], [0, 0, -1]]))
  found = tables.calibration_curve(some, true, guess, bins=2)
  np.testing.assert_allclose(found, [[0.2, 0.375, 2], [0.65, 0.5, 2]])


def test_ranking_counts_pairs_whose_truth_differs_and_each_pair_of_states_once():
  # After the prompt: 0.8 > 0.2 and 0.76 > 0.2. Of 0.8 and 0.76 the truth is not sure. The last trace repeats a pair.
  nothing = np.zeros(STATE_OF.shape)
  places = lambda good, bad, other: np.array([[0.5, good, 0], [0.5, bad, 0], [0.5, other, 0], [0] * 3, [0.5, good, 0]])
  credit = lambda good, bad, other: np.array([[good, 0, 0], [bad, 0, 0], [other, 0, 0], [0] * 3, [good, 0, 0]])
  found = tables.ranking(
    evidence(), truth_of(VALUES),
    {
      "right": estimate(nothing, places(0.9, 0.1, 0.5)), "wrong": estimate(nothing, places(0.1, 0.9, 0.5)),
      "half": estimate(credit(0.3, 0.1, -0.2)), "undecided": estimate(nothing),
    }, resamples=3,
  )  # fmt: skip
  assert (found["pairs"], found["prompts"]) == (2, 1)
  assert {name: row[0] for name, row in found["methods"].items()} == {
    "right": 1, "wrong": 0, "half": 0.5, "undecided": 0.5,
  }  # fmt: skip
  few = tables.ranking(evidence(), truth_of(VALUES, samples=4), {"right": estimate(nothing)}, resamples=3)
  assert few == {"pairs": 0, "prompts": 0, "methods": {}}


def test_localisation_by_hand():
  wrong, counts = np.array([-1, 1, 0, 2]), np.array([3, 2, 2, 4])
  rewards = np.array([[0, -9, 0, 0], [0.1, -0.2, -9, 0], [0, 0, -9, 0], [-1, 0, 0.5, 0]])
  found = tables.localisation(wrong, counts, np.arange(4), {"a": rewards}, resamples=3)
  # Right; a tie of two; wrong.
  assert found["traces"] == 3 and found["methods"]["a"][0] == pytest.approx((1 + 1 / 2 + 0) / 3)
  assert found["chance"][0] == pytest.approx((1 / 2 + 1 / 2 + 1 / 4) / 3) and set(found["methods"]) == {"a"}
  nothing = tables.localisation(np.full(4, -1), counts, np.arange(4), {"a": rewards}, resamples=3)
  assert nothing == {"traces": 0, "methods": {}, "chance": None}


def test_the_largest_drop_of_a_failed_trace_is_significant():
  # Trace 1 falls first by 0.3, then by 0.2; trace 4 falls at its end; trace 3 has no truth; 0 and 2 succeeded.
  assert tables.largest_drops(evidence(), truth_of(VALUES)).tolist() == [-1, 0, -1, -1, 1]
  assert tables.largest_drops(evidence(), truth_of(VALUES, samples=10)).tolist() == [-1, -1, -1, -1, 1]


# ---- Gradients -----------------------------------------------------------------------------------


def traces_of(returns, num_segments=2, t=4):
  rows = len(returns)
  mask = np.ones((rows, t), bool)
  mask[:, -1] = False
  segments = types.Segments(
    ends=np.tile(np.array([1, t - 1], np.int32), (rows, 1)),
    segment_ids=np.tile(np.array([0, 1, 1, -1], np.int32), (rows, 1)),
    num_segments=np.full(rows, num_segments, np.int32), num_merged=np.zeros(rows, np.int32),
  )  # fmt: skip
  rollout = types.Rollout(None, None, np.zeros((rows, t), np.int32), mask, None, None, None, None)
  rollout, segments = jax.tree.map(jnp.asarray, (rollout, segments))
  return estimators.Traces(rollout, None, segments, np.array(returns, np.float32), [None] * rows)


def test_token_advantages_by_hand():
  traces = traces_of([1, 0, 0, 0])
  rewards = np.array([[0.2, 0.3]] * 4)
  estimates = {"mine": estimate(rewards, [[0.5, 0.7]] * 4)}
  of = lambda spec: np.asarray(tables.token_advantages(spec, estimates, traces, 4))[:2]
  spread = lambda a, b: [[a, a, a, 0], [b, b, b, 0]]
  np.testing.assert_allclose(of("grpo"), spread(3**0.5, -(3**-0.5)), rtol=1e-4)
  np.testing.assert_allclose(of("grpo:unscaled"), spread(1, -1 / 3), rtol=1e-5)
  np.testing.assert_array_equal(of("grpo:return"), spread(1, 0))
  np.testing.assert_allclose(of("mine:difference"), [[0.2, 0.3, 0.3, 0]] * 2, rtol=1e-5)
  np.testing.assert_allclose(of("mine:action_value"), [[0.7, 1.0, 1.0, 0]] * 2, rtol=1e-5)


def test_the_moments_of_a_prompt_are_of_all_its_groups():
  params = {"w": np.zeros(5, np.float32)}
  engine = SimpleNamespace(params=params, setting=SimpleNamespace(group_size=2))
  seen = []

  def add_groups(params, rollout, weights, total):
    seen.append(np.asarray(weights))
    assert rollout.mask.shape == (2, 2, 4)
    return total + 1, jnp.array([[1.0, 2.0], [2.0, 5.0]])

  batches = [(traces_of(returns), {"mine": estimate([[0.2, 0.3]] * 4)}) for returns in ([1, 0, 0, 1], [1, 1, 0, 1])]
  specs = ("grpo:return", "mine:difference")
  products, total = tables.prompt_moments(engine, specs, batches, part="all", add_groups=add_groups)
  np.testing.assert_array_equal(total, np.full((2, gradients.num_parameters(params, "all")), 2.0))
  np.testing.assert_array_equal(products, [[2, 4], [4, 10]])
  # [group, estimator, trace of the group, token].
  assert seen[0].shape == (2, 2, 2, 4)
  np.testing.assert_array_equal(seen[0][:, 0, :, 0], [[1, 0], [0, 1]])
  np.testing.assert_array_equal(seen[1][:, 0, :, 0], [[1, 1], [0, 1]])
  np.testing.assert_allclose(seen[0][:, 1, :, 1], 0.3, rtol=1e-5)


def moments_of(draws, names):
  """Of gradients [P, n, A, D]."""
  sums = draws.sum(axis=1)
  return tables.Moments(
    names, np.einsum("pgad,pgbd->pab", draws, draws), np.einsum("pad,pbd->pab", sums, sums),
    np.einsum("ad,bd->ab", sums.sum(axis=0), sums.sum(axis=0)), draws.shape[1],
  )  # fmt: skip


def test_gradient_variance_at_fixed_prompts_across_them_and_at_equal_compute():
  rng = np.random.default_rng(0)
  prompts, groups, size, names = 600, 8, 6, ["exact:difference", "grpo"]
  # Every prompt has a mean of its own, around a common one.
  means = np.eye(size)[0] * 2 + 0.7 * rng.normal(size=(prompts, 1, 1, size))
  noise = np.array([1.0, 2.0])[:, None] * rng.normal(size=(prompts, groups, 2, size))
  moments = moments_of(means + noise, names)
  found = tables.gradient_variance(
    moments, unbiased="exact:difference", step_flops={"exact:difference": 30.0, "grpo": 10.0}, resamples=3
  )
  assert (found["prompts"], found["groups"], found["unbiased"]) == (prompts, groups, "exact:difference")
  expected = agreement.gradient_figures(moments.same_group, moments.of_sums, groups, baseline=1, reference=0)
  for key, values in expected.items():
    for a, name in enumerate(names):
      assert found["fixed prompts"][name][key][0] == pytest.approx(values[a])
  exact = found["fixed prompts"]["exact:difference"]
  assert exact["variance"][0] == pytest.approx(size, rel=0.05)
  assert exact["compute_over_grpo"] == 3 and found["fixed prompts"]["grpo"]["compute_over_grpo"] == 1
  assert exact["own_ratio_at_equal_compute"] == pytest.approx([3 * x for x in exact["own_ratio"]])
  # A batch of one group of a random prompt has the variance between prompts as well.
  across = found["across prompts"]
  assert across["exact:difference"]["variance"] == pytest.approx(size * (1 + 0.7**2), rel=0.05)
  assert across["grpo"]["variance"] == pytest.approx(size * (4 + 0.7**2), rel=0.05)
  assert across["grpo"]["own"] == pytest.approx(size * (4 + 0.7**2) / 4, rel=0.1)
  # Of few prompts, term by term: the signal is in the products of different prompts alone.
  few = moments_of((means + noise)[:5], names)
  found = tables.gradient_variance(few, unbiased="exact:difference", step_flops=dict.fromkeys(names, 1.0), resamples=3)
  of_prompts = (means + noise)[:5, :, 1].mean(axis=1)
  products = of_prompts @ of_prompts.T
  signal = (products.sum() - np.trace(products)) / (5 * 4)
  power = (((means + noise)[:5, :, 1]) ** 2).sum(axis=-1).mean()
  assert found["across prompts"]["grpo"]["variance"] == pytest.approx(power - signal)
  alone = dataclasses.replace(moments, same_group=moments.same_group[:1], of_sums=moments.of_sums[:1])
  found = tables.gradient_variance(
    alone, unbiased="exact:difference", step_flops=dict.fromkeys(names, 1.0), resamples=3
  )
  assert set(found["across prompts"]["grpo"].values()) == {None}


# ---- Cost ----------------------------------------------------------------------------------------


def test_cost_is_per_trace():
  one = estimate([[0]], seconds=2.0, forward_tokens=40, generated_tokens=12, flops=8.0, covered=0.75)
  assert tables.cost(one, 4) == {
    "forward_tokens": 10, "generated_tokens": 3, "flops": 2, "seconds": 0.5, "covered_states": 0.75,
  }  # fmt: skip


def test_credit_in_chunks_joins_them_and_leaves_compiling_out_of_the_time():
  traces, keys = traces_of([0, 1, 2, 3, 4]), []

  class Engine:
    def credit(self, name, part, key):
      keys.append(jax.random.key_data(key).tolist())
      first = len(keys) == 1
      return estimate(
        part.returns[:, None], part.returns[:, None] + 1, seconds=50.0 if first else 2.0, forward_tokens=3,
        generated_tokens=5, flops=7.0, covered=1.0 if first else 0.25,
      )  # fmt: skip

  found = tables.credit_in_chunks(Engine(), "monte_carlo", traces, jax.random.key(0), 2)
  assert found.rewards[:, 0].tolist() == [0, 1, 2, 3, 4] and found.values[:, 0].tolist() == [1, 2, 3, 4, 5]
  assert (found.seconds, found.forward_tokens, found.generated_tokens, found.flops) == (6, 9, 15, 21)
  assert found.covered == 0.5 and len({tuple(key) for key in keys}) == 3


def test_json_has_no_nan():
  tree = {"a": [1.0, np.nan, (np.inf, "x")], "b": None}
  assert tables.jsonable(tree) == {"a": [1.0, None, [None, "x"]], "b": None}
  assert tables.figure(0.5, np.nan, np.inf) == [0.5, None, None]
