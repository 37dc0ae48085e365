"""The credit study: its statistics against what is known exactly, and the script from prompts to a page."""

import dataclasses
import functools
import html.parser
import json
from types import SimpleNamespace

import credit_study
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import FAMILIES, params_of

from rredcot_jax.credit import monte_carlo
from rredcot_jax.credit.source import BankOptions, Found, Setting
from rredcot_jax.data import batching, judging, tasks
from rredcot_jax.data.chain import make_example
from rredcot_jax.data.encoding import Codec
from rredcot_jax.model import scoring
from rredcot_jax.model.tokenizer import load_tokenizer
from rredcot_jax.ops import banks, types
from rredcot_jax.study import agreement, estimators, gradients, ground_truth
from rredcot_jax.study import page as study_page
from rredcot_jax.train import config as config_lib
from rredcot_jax.train import initial

# ---- Statistics --------------------------------------------------------------------------


def test_correlations_are_scipys_and_nothing_is_no_number():
  rng = np.random.default_rng(0)
  x = rng.integers(0, 5, 40).astype(float)
  y = x + rng.normal(size=40)
  expected = [f(x, y).statistic for f in (scipy.stats.pearsonr, scipy.stats.spearmanr, scipy.stats.kendalltau)]
  np.testing.assert_allclose(agreement.measures(x, y)[:3], expected, atol=1e-12)
  assert np.isnan(agreement.measures(np.ones(9), y[:9])[:3]).all()
  assert np.isnan(agreement.measures(x[:0], y[:0])).all()


def test_calibration_error_by_hand():
  # Two bins of two: the first is off by 0.1 on average although both its states are off by more.
  estimate, truth = np.array([0.1, 0.2, 0.8, 0.9]), np.array([0.4, 0.1, 0.6, 0.7])
  assert agreement.calibration_error(estimate, truth, bins=2) == pytest.approx((0.1 + 0.2) / 2)
  assert agreement.mean_absolute_error(estimate, truth) == pytest.approx(0.2)
  # An estimate that is an edge belongs to the upper bin.
  assert agreement.calibration_error(np.array([0, 1, 1.0]), np.full(3, 0.5), bins=2) == pytest.approx(0.5)
  # Equal estimates are one bin, whatever the number of bins.
  assert agreement.calibration_error(np.zeros(6), np.array([0, 0, 0, 1, 1, 1.0])) == pytest.approx(0.5)


def test_noise_ceiling_is_what_a_perfect_estimator_reaches():
  rng = np.random.default_rng(2)
  true = rng.normal(size=4000)
  noise = rng.normal(size=(64, 4000)) * 8  # The mean of all 64 has a standard deviation of 1, as the truth has.
  samples = true + noise

  def halves(generator):
    order = generator.permutation(64)
    return samples[order[:32]].mean(axis=0), samples[order[32:]].mean(axis=0)

  found = agreement.noise_ceiling(halves, splits=5)
  assert found["ceiling"] == pytest.approx(agreement.spearman(true, samples.mean(axis=0)), abs=0.03)
  assert found["reliability"] == pytest.approx(0.5, abs=0.05)


def test_blame_shares_ties_and_ignores_padding():
  rewards = np.array([0.1, -0.4, 0.2, -9.0])
  assert agreement.blame(rewards, 3, 1) == 1 and agreement.blame(rewards, 3, 0) == 0
  assert agreement.blame(np.zeros(4), 4, 2) == 0.25
  ordered = agreement.ordered_pairs(np.array([1.0, 2.0, 2.0]), [(1, 0), (0, 1), (1, 2)])
  np.testing.assert_array_equal(ordered, [1, 0, 0.5])


def test_gradient_figures_recover_known_gaussians():
  """Estimators with known means and covariances: the products of different groups leave no bias."""
  rng = np.random.default_rng(3)
  prompts, groups, size = 400, 32, 30
  direction = np.zeros(size)
  direction[0] = 1.0
  # The last is precise, but only a fifth of its mean lies along dJ.
  aside = 0.2 * direction + np.sqrt(1 - 0.2**2) * np.roll(direction, 1)
  scales, means = np.array([1.0, 3.0, 0.5]), np.stack([direction, 3 * direction, aside])
  draws = means + scales[:, None] * rng.normal(size=(prompts, groups, 3, size))
  same = np.einsum("pgad,pgbd->pab", draws, draws)
  sums = draws.sum(axis=1)
  found = agreement.gradient_figures(
    same, np.einsum("pad,pbd->pab", sums, sums), groups, baseline=0, reference=0
  )  # fmt: skip
  np.testing.assert_allclose(found["variance"], size * scales**2, rtol=0.05)
  np.testing.assert_allclose(found["own"], [size, size, size / 4], rtol=0.2)
  # Three times the scale is no difference; what a precise mean has across dJ is no signal: 0.25 / 0.2^2 of noise.
  np.testing.assert_allclose(found["useful_ratio"], [1, 1, 0.25 / 0.2**2], rtol=0.2)
  np.testing.assert_allclose(found["own_ratio"], [1, 1, 0.25], rtol=0.1)
  np.testing.assert_allclose(found["cosine_of_means"], [1, 1, 0.2], atol=0.02)
  np.testing.assert_allclose(found["cosine"], [1, 1, 0.2] / np.sqrt(1 + size * np.array([1, 1, 0.25])), rtol=0.15)


def test_gradient_figures_of_a_signal_lost_in_noise_are_no_numbers():
  """Products of different groups that come out negative: whatever divides by them is NaN, and nothing else."""
  same = np.array([[[4.0, 0.0], [0.0, 4.0]]])  # Of 2 groups: a mean of g.g of 2.
  sums = same + np.array([[[2.0, -1.0], [-1.0, -3.0]]])  # I = 1, -1/2 and -3/2.
  found = agreement.gradient_figures(same, sums, 2, baseline=0, reference=0)
  np.testing.assert_allclose(found["variance"], [1, 3.5])
  np.testing.assert_allclose(found["variance_ratio"], [1, 3.5])
  for name in ("own", "own_ratio", "useful", "useful_ratio", "cosine_of_means"):
    np.testing.assert_allclose(found[name], [1, np.nan])
  np.testing.assert_allclose(found["cosine"], [1 / np.sqrt(2), -0.5 / np.sqrt(2)])
  unknown = agreement.gradient_figures(same, sums, 2, baseline=0, reference=1)
  assert all(np.isnan(unknown[name]).all() for name in ("useful", "cosine_of_means", "cosine"))


# ---- Gradients and operations -------------------------------------------------------------

MODEL = FAMILIES["qwen3"]  # Untied: the head has a gradient of its own.


@functools.cache
def traces_of_groups():
  rng = np.random.default_rng(4)
  ids = lambda *shape: jnp.asarray(rng.integers(1, MODEL.vocab_size, shape), jnp.int32)
  mask = jnp.asarray(np.arange(6) < np.array([6, 3, 5, 6])[:, None])
  zeros = jnp.zeros((4, 6), jnp.float32)
  return types.Rollout(
    prompt_tokens=ids(4, 3), prompt_mask=jnp.ones((4, 3), bool), tokens=ids(4, 6), mask=mask, log_probs=zeros,
    sampler_log_probs=zeros, entropy=zeros, truncated=jnp.zeros(4, bool),
  )  # fmt: skip


@pytest.mark.parametrize("part", gradients.PARTS)
def test_products_of_gradients_are_those_of_gradients_taken_one_by_one(part):
  params, rollout = params_of(MODEL), traces_of_groups()
  # Ten estimators: batched over 8 and more of them, XLA's gradients were wrong.
  weights = jax.random.normal(jax.random.key(0), (2, 10, 2, 6))
  grouped = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), rollout)
  total = jnp.zeros((10, gradients.num_parameters(params, part)))
  add = jax.jit(functools.partial(gradients.add_groups, config=MODEL, temperature=0.7, part=part))
  total, products = add(params, rollout=grouped, advantages=weights, total=total)

  @jax.jit
  def one(rows, weights):
    def loss(params):
      log_probs, _ = scoring.trace_log_probs(params, MODEL, rows, temperature=0.7)
      return jnp.sum(jnp.where(rows.mask, log_probs * weights, 0)) / 2

    gradient = jax.grad(loss)(params)
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(gradient if part == "all" else gradient["head"])])

  by_hand = np.stack([
    [one(jax.tree.map(lambda x, g=g: x[g], grouped), weights[g, a]) for a in range(10)] for g in range(2)
  ])  # fmt: skip
  np.testing.assert_allclose(total, by_hand.sum(axis=0), atol=2e-5)
  np.testing.assert_allclose(products, np.einsum("gad,gbd->ab", by_hand, by_hand), rtol=1e-4, atol=1e-4)


# ---- What is known of a trace -------------------------------------------------------------


def traces_with(texts, examples, codec, returns):
  ids = [[*codec.tokenizer.encode(text, add_special_tokens=False), codec.eos_id] for text in texts]
  tokens, mask = batching.pad(ids, 24, side="right", pad_id=codec.pad_id, what="trace")
  newline = tokens == codec.tokenizer.convert_tokens_to_ids("\n")
  before = np.cumsum(newline, axis=1) - newline
  ends = np.stack([
    [m.sum() if k >= n.sum() else np.flatnonzero(n)[k] + 1 for k in range(5)] for n, m in zip(newline, mask)
  ])  # fmt: skip
  segments = types.Segments(
    ends=ends.astype(np.int32), segment_ids=np.where(mask, before, -1).astype(np.int32),
    num_segments=(newline.sum(axis=1) + 1).astype(np.int32), num_merged=np.zeros(len(texts), np.int32),
  )  # fmt: skip
  zeros = np.zeros(tokens.shape, np.float32)
  rollout = types.Rollout(tokens[:, :1], mask[:, :1], tokens, mask, zeros, zeros, zeros, np.zeros(len(texts), bool))
  return estimators.Traces(rollout, None, segments, np.array(returns, np.float32), examples)


def test_wrong_steps_stated_answers_and_shared_states():
  task, codec = tasks.make_task("chain", split="eval", num_steps=2), Codec(load_tokenizer(initial.locate("chain")))
  example = make_example(3, ["+4", "*7"])  # 3+4=7, 7*7=9.
  texts = ["3+4=7\n7*7=9\n</think>9", "3+4=7\n7*7=8\n</think>8", "3+4=6\n6*7=2\n</think>2", "3+4=7\n</think>9"]
  traces = traces_with(texts, [example] * 4, codec, [1, 0, 0, 1])
  np.testing.assert_array_equal(ground_truth.first_wrong_segments(task, codec, traces), [-1, 1, 0, -1])
  stated = ground_truth.answer_stated(task, codec, traces)
  np.testing.assert_array_equal(stated[:2, :3], [[False, False, True]] * 2)
  # Once the thought is left, the answer is stated, whatever the thought had come to.
  left = traces_with(["</think>\n9"], [example], codec, [1])
  np.testing.assert_array_equal(ground_truth.answer_stated(task, codec, left)[0, :2], [False, True])
  # Cut within a line: the segment of the first token that differs from the reference's line.
  tokens = np.arange(traces.rollout.tokens.shape[1]) // 2
  fine = dataclasses.replace(
    traces, segments=dataclasses.replace(traces.segments, segment_ids=np.where(traces.rollout.mask, tokens, -1))
  )
  np.testing.assert_array_equal(ground_truth.first_wrong_segments(task, codec, fine), [-1, 5, 2, -1])
  states = ground_truth.States()
  of = states.of_segments(traces, [0, 0, 0, 1], range(4))
  # Both first traces share two states, the third the prompt; the last has another prompt.
  np.testing.assert_array_equal(of[:, :3], [[0, 1, 2], [0, 1, 3], [0, 4, 5], [6, 7, -1]])


# ---- Ground truth ------------------------------------------------------------------------


def test_a_states_value_error_and_halves_are_of_its_own_samples():
  samples = [np.array([1, 1, 1, 1], np.float32), np.array([0, 1, 0, 0, 0, 1, 0, 0], np.float32)]
  truth = ground_truth.GroundTruth(samples, 0, 0, 0.0)
  np.testing.assert_array_equal(truth.values, [1, 0.25])
  # Laplace's rule: 5 of 6 and 3 of 10, so that 4 of 4 is not certain.
  np.testing.assert_allclose(truth.standard_errors, [np.sqrt(5 / 36 / 4), np.sqrt(0.3 * 0.7 / 8)])
  splits = set()
  for seed in range(9):
    first, second = truth.halves(np.random.default_rng(seed))
    np.testing.assert_allclose((first + second) / 2, truth.values)
    splits.add((first[1], second[1]))
  assert len(splits) > 1


def test_every_state_is_valued_by_samples_of_its_own_that_no_round_repeats(tmp_path, monkeypatch):
  """Three rounds over two chunks of traces, the sampler replaced by one whose rewards say what they were asked for."""
  tokens = np.array([[1, 2, 3, 4], [1, 2, 5, 6], [7, 8, 9, 9], [1, 2, 5, 5]], np.int32)
  mask = np.ones((4, 4), bool)
  segments = types.Segments(
    ends=np.array([[2, 3, 4], [2, 4, 4], [1, 4, 4], [2, 3, 4]], np.int32), segment_ids=None,
    num_segments=np.array([3, 2, 2, 3], np.int32), num_merged=np.zeros(4, np.int32),
  )  # fmt: skip
  rollout = types.Rollout(tokens[:, :1], mask[:, :1], tokens, mask, mask, mask, mask, np.zeros(4, bool))
  traces = estimators.Traces(rollout, np.zeros((1, 4)), segments, np.zeros(4, np.float32), list("pppp"))
  states = ground_truth.States()
  of = states.of_segments(traces, [0, 0, 1, 0], range(4))
  assert of.tolist() == [[0, 1, 2], [0, 1, -1], [3, 4, -1], [0, 1, 5]]
  keys, seen = {}, []

  def sampler(params, model, cache, rollout, cut, returns, key, judge, *, k, first_sample, **options):
    keys.setdefault(tuple(jax.random.key_data(key).tolist()), []).append(first_sample)
    starts, rows = np.asarray(cut.starts), np.arange(len(returns))
    rewards = np.zeros((*starts.shape, k), np.float32)
    for row in rows:
      for state in range(int(cut.num_segments[row])):
        prefix = rollout.tokens[row, : starts[row, state]].tolist()
        seen.append((int(rollout.prompt_tokens[row, 0]), tuple(prefix)))
        rewards[row, state] = [1000 * sum(prefix) + first_sample + i for i in range(k)]
    counts = np.asarray(cut.num_segments)
    return monte_carlo.MonteCarloValues(rewards, returns, counts, 10, 20, 1, 0.0, 0.5)

  monkeypatch.setattr(monte_carlo, "values_by_generation", sampler)
  monkeypatch.setattr(judging, "judge_of", lambda *_: None)
  setting = SimpleNamespace(model=None, task=None, codec=None, generation={})
  engine = SimpleNamespace(params=None, setting=setting)
  measure = functools.partial(
    ground_truth.measure, engine, traces, states, jax.random.key(0), tmp_path, samples=6, samples_per_round=2,
    rows_at_once=2, slots=4,
  )  # fmt: skip
  truth = measure()
  sums = [0, 3, 6, 0, 7, 8]
  assert [sorted(set(each.tolist())) for each in truth.samples] == [[1000 * x + i for i in range(6)] for x in sums]
  assert sorted(keys.values()) == [[0, 2, 4], [0, 2, 4]]  # A key for each chunk of traces.
  assert (truth.generated_tokens, truth.computed_tokens, truth.seconds) == (60, 120, 3.0)
  asked = len(seen)
  again = measure()
  assert len(seen) == asked and all(map(np.array_equal, again.samples, truth.samples))
  assert again.generated_tokens == 60
  with pytest.raises(ValueError, match=r"truth_samples=5 must be a multiple of study\.samples_per_round=2"):
    measure(samples=5)


# ---- Estimators --------------------------------------------------------------------------


def engine_of(found=None, group_size=2):
  """An engine whose sources give what they are told to."""
  setting = Setting(None, None, None, group_size, {"temperature": 1.0, "max_tokens": 6})
  room = dict.fromkeys(("answer", "solution", "suffix", "solutions", "rollouts", "own"), 7) | {"suffix": 9}
  engine = estimators.Estimators({}, setting, room, {"monte_carlo": {"samples": 5}})
  if found is not None:
    engine.source = lambda name: SimpleNamespace(assign=lambda batch: found, count_flops=lambda batch: 11.0)
    engine.decode_flops = lambda traces: 3.0
  return engine


def ragged():
  mask = np.arange(6) < np.array([6, 3, 5, 6])[:, None]
  segments = types.Segments(
    ends=np.array([[2, 4, 6], [1, 3, 3], [2, 3, 5], [6, 6, 6]], np.int32), segment_ids=None,
    num_segments=np.array([3, 2, 3, 1], np.int32), num_merged=np.zeros(4, np.int32),
  )  # fmt: skip
  rollout = types.Rollout(*[np.arange(4)[:, None]] * 2, np.arange(24).reshape(4, 6), mask, mask, mask, mask, mask[:, 0])
  cache = np.arange(8).reshape(2, 4)
  return estimators.Traces(rollout, cache, segments, np.array([1, 0, 0, 0], np.float32), list("abcd"))


def test_some_of_the_traces_are_those_rows_of_everything():
  some = ragged().rows(np.array([2, 0]))
  assert some.rollout.tokens[:, 0].tolist() == [12, 0] and some.num_segments.tolist() == [3, 3]
  assert some.cache.tolist() == [[2, 0], [6, 4]] and some.returns.tolist() == [0, 1] and some.examples == ["c", "a"]


def test_a_method_is_its_source_with_a_bank_of_its_own():
  engine = engine_of(group_size=4)
  scored = engine.source("rredcot_own_self_normalised").setting.bank
  assert scored == BankOptions("own", max_tokens=7, form="self_normalised", size=4)
  assert engine.source("rredcot_suffix").setting.bank == BankOptions("suffix", max_tokens=9, size=4)
  assert engine.source("monte_carlo")._samples == 5 and engine.source("monte_carlo").setting.bank.name == "answer"


def test_controls_by_hand():
  engine, traces = engine_of(), ragged()
  uniform = engine.credit("grpo", traces, jax.random.key(0))
  # The group's outcome, evenly over the segments that there are.
  np.testing.assert_allclose(uniform.rewards, [[1 / 6] * 3, [-1 / 4, -1 / 4, 0], [0] * 3, [0] * 3], rtol=1e-6)
  noise = engine.credit("random", traces, jax.random.key(0)).rewards
  exists = np.asarray(traces.segments.mask)
  assert (noise[~exists] == 0).all() and len(set(noise[exists].tolist())) == exists.sum()
  assert uniform.values is None and uniform.flops == uniform.forward_tokens == 0


def test_an_estimate_is_redistributed_and_counts_what_exists():
  traces = ragged()
  values = jnp.asarray([[0.5, 0.75, 0.25], [0.5, 0.25, 9], [0.5, 0.5, 0.5], [0.25, 9, 9]])
  sizes = jnp.asarray([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 1]])
  scored = engine_of(Found(values=values, sample_sizes=sizes, token_forwards=40))
  found = scored.credit("rredcot_suffix", traces, jax.random.key(0))
  np.testing.assert_allclose(found.rewards, [[0.25, -0.5, 0.75], [-0.25, -0.25, 0], [0, 0, -0.5], [-0.25, 0, 0]])
  np.testing.assert_array_equal(found.values, np.where(np.asarray(traces.segments.mask), values, 0))
  assert (found.covered, found.forward_tokens, found.generated_tokens, found.flops) == (6 / 9, 40, 0, 11)
  sampled = engine_of(Found(values=values, token_forwards=40, generated_tokens=30))
  found = sampled.credit("monte_carlo", traces, jax.random.key(0))
  assert (found.forward_tokens, found.generated_tokens, found.flops, found.covered) == (0, 30, 120, 1)
  given = engine_of(Found(rewards=values, token_forwards=40)).credit("attention", traces, jax.random.key(0))
  assert given.values is None and given.covered == 1
  np.testing.assert_array_equal(given.rewards, values)


def test_calibration_leaves_what_the_return_decides():
  traces = ragged()
  traces = dataclasses.replace(
    traces, segments=dataclasses.replace(traces.segments, thought_end=np.array([3, 3, 5, 6], np.int32))
  )
  values = np.array([[0.5, 0.125, 1.0], [0.25, 0.0, 0], [0.5, 0.25, 0.5], [0.125, 0, 0]], np.float32)
  before = estimators.Estimate(np.zeros((4, 3)), values, 1.0, 2, 3, 4.0, 0.5)
  after = engine_of().calibrated(before, traces)
  decided = np.asarray(traces.segments.after_exit)
  assert decided.tolist() == [[False, False, True], [False] * 3, [False] * 3, [False] * 3]
  # After the exit, where the likelihood was 0 and where there is no state, values stay.
  stays = decided | (values == 0)
  np.testing.assert_array_equal(after.values[stays], values[stays])
  assert (after.values[~stays] != values[~stays]).all() and (after.forward_tokens, after.flops) == (2, 4)
  np.testing.assert_allclose(after.rewards.sum(axis=1), traces.returns - after.values[:, 0], atol=1e-6)


def test_rooms_hold_the_longest_completion_of_each_bank():
  steps = lambda *sizes: [[0] * size for size in sizes]
  references = [
    banks.Reference(steps(2, 3), [0], [0] * 2, solutions=[steps(4, 6), steps(1)], aligned=True),
    banks.Reference(steps(7), [0], [0] * 4, solutions=[], aligned=True),
  ]
  assert estimators.completion_rooms(references, 20) == {
    "answer": 5, "solution": 12, "suffix": 12, "solutions": 13, "rollouts": 20, "own": 20,
  }  # fmt: skip


# ---- The script --------------------------------------------------------------------------


def tiny(prompts=2):
  config = config_lib.default_config()
  config_lib.add_study(config)
  config.tokenizer.path = "chain"
  config.task.options.num_steps = 2
  config.model.update(width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=16)
  config.rollout.update(group_size=4, max_prompt_tokens=8, max_tokens=12)
  config.segmentation.update(method="uniform", k_max=3)
  config.study.update(
    num_prompts=prompts, truth_traces=2, truth_samples=4, samples_per_round=2, rows_at_once=4, slots=4,
    monte_carlo_samples=2, methods=("rredcot_suffix", "monte_carlo", "leave_one_out", "grpo", "random"),
    segmentations=("entropy",), segmentation_prompts=2, segmentation_traces=1,
    segmentation_estimators=("rredcot_suffix",), gradient_prompts=2, gradient_groups=2, groups_at_once=2,
    gradient_estimators=("grpo", "grpo:return", "rredcot_suffix:action_value", "monte_carlo:difference"), resamples=5,
  )  # fmt: skip
  return config


class Tags(html.parser.HTMLParser):
  def __init__(self, text):
    super().__init__()
    self.found = []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.found.append((tag, dict(attributes)))


def test_the_study_runs_resumes_and_writes_what_it_promises(tmp_path, monkeypatch):
  calls = []
  original = monte_carlo.values_by_generation

  def counting(*args, **options):
    calls.append(options["k"])
    return original(*args, **options)

  monkeypatch.setattr(monte_carlo, "values_by_generation", counting)
  config = tiny()
  credit_study.validate(config)
  headline = credit_study.run(config, tmp_path, "<script>alert(1)</script>")
  json.dumps(headline, allow_nan=False)
  result = json.loads((tmp_path / "study.json").read_text())
  for name in ("spearman_difference", "error_localisation", "gradient_variance_over_grpo"):
    assert isinstance(result[name], dict) and set(result[name]) == set(result[f"{name}_interval"])
  assert set(result["spearman_difference"]) == set(config.study.methods)
  assert set(result["gradient_variance_over_grpo"]) == set(config.study.gradient_estimators)
  assert result["cost"]["monte_carlo"]["generated_tokens"] > 0 == result["cost"]["rredcot_suffix"]["generated_tokens"]
  # The picture is of these figures; study_page_test.py holds it to what it draws of them.
  summary = (tmp_path / "figures" / "summary.png").read_bytes()
  study_page._save(study_page.summary_figure(result), tmp_path / "again.png")
  assert (tmp_path / "again.png").read_bytes() == summary
  page = Tags((tmp_path / "study.html").read_text())
  assert not any(tag == "script" for tag, _ in page.found)
  assert all(a["src"].startswith("data:") for tag, a in page.found if tag == "img")

  # Again: truth and gradients are read, only the Monte Carlo estimator generates, and nothing changes but the clock.
  truth_calls = len(list((tmp_path / "truth").iterdir()))
  first, _ = len(calls), calls.clear()
  (tmp_path / "truth" / sorted(p.name for p in (tmp_path / "truth").iterdir())[0]).unlink()
  again = credit_study.run(config, tmp_path, "again")
  assert len(calls) < first - truth_calls + 2 and calls.count(config.study.samples_per_round) >= 1
  assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in headline.items() if k != "seconds"}


def test_files_of_other_states_are_refused_and_bad_options_named(tmp_path):
  layout = np.array([[0, 0, 3]])
  values = monte_carlo.MonteCarloValues(
    np.zeros((1, 2, 4), np.float32), np.zeros(1, np.float32), np.array([2]), 1, 1, 1, 0.0, 0.0
  )
  path = tmp_path / "states.npz"
  ground_truth._write(path, layout, values)
  read = ground_truth._read(path, layout)
  assert read.num_samples == 4 and read.generated_tokens == 1
  with pytest.raises(ValueError, match=r"states\.npz holds the values of other states"):
    ground_truth._read(path, layout + 1)
  config = tiny()
  config.study.methods = ("rredcot_sufix",)
  with pytest.raises(ValueError, match="did you mean 'rredcot_suffix'"):
    credit_study.validate(config)
  config = tiny()
  config.study.rows_at_once = 6
  with pytest.raises(ValueError, match="rows_at_once=6"):
    credit_study.validate(config)
