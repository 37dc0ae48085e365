"""Every source, bank, form and sigma trains: one tiny batch through credit and update."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config

from rredcot_jax.credit import assigner, monte_carlo, source
from rredcot_jax.credit.sources import SOURCES
from rredcot_jax.data import batching, judging
from rredcot_jax.model import continuations, scoring
from rredcot_jax.ops import advantages, banks, types, values
from rredcot_jax.parallel import sharding
from rredcot_jax.train.experiment import Experiment

GROUP, P, T, K, S = 2, 6, 12, 4, 12
RETURNS = np.array([1, 0, 0, 0], np.float32)  # A group with a success, and one without.
OUTCOMES = np.array([1, -1, 0, 0])  # GRPO's advantages of them.
# Small numbers of what a source is dear for.
CHEAP = {"monte_carlo": {"samples": 2}, "integrated_gradients": {"steps": 2}}


def config_with(**options):
  config = tiny_config.get_config("grpo")
  config.task.options.num_steps = 1
  config.initial_params, config.tokenizer.path = "", "chain"
  config.model.update({"width": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "mlp_width": 16})
  config.rollout.update({"prompts_per_step": 2, "group_size": GROUP, "max_prompt_tokens": P, "max_tokens": T})
  config.segmentation.update({"method": "stride", "stride": 4, "k_max": K})
  config.credit.update({"max_completion_tokens": S, "bank": "answer"})
  config.loss.update({"kl": "off", "kl_coefficient": 0.0})
  for name, value in options.items():
    if name.startswith("options__"):
      config.credit.options[name.removeprefix("options__")] = value
    else:
      config.credit[name] = value
  for name, value in CHEAP.get(config.credit.source, {}).items():
    config.credit.options[name] = value
  return config


@functools.cache
def batch():
  """Sampled traces of two prompts, and all that credit is made from."""
  experiment = Experiment(config_with())
  state = experiment.init_state(experiment.start_params(jax.random.key(0)))
  examples = [experiment.train_task[i // GROUP] for i in range(4)]
  prompts = sharding.put_batch(experiment.mesh, batching.prompt_arrays(experiment.codec, examples, P))
  steps = experiment.rollout_steps
  # A key with which the success leaves its thought and ends: other banks than references have something to hold.
  rollout, cache = steps.sample(steps.params(state.params), *prompts, jax.random.key(19))
  traces = source.Batch(
    state.params, cache, rollout, steps.segment(rollout), RETURNS, examples, jax.random.key(5)
  )  # fmt: skip
  return experiment, state, traces


def assign(config, **changes):
  experiment = Experiment(config)
  if experiment.source is not None:
    changes = {"state": experiment.source.init_state()} | changes
  return sharding.on(experiment.mesh, experiment.assigner)(dataclasses.replace(batch()[2], **changes))


def update(advantages):
  """The next state and the metrics of a step with these advantages."""
  experiment, state, traces = batch()
  rollout = traces.rollout
  made = types.TrainBatch(
    prompt_tokens=rollout.prompt_tokens, prompt_mask=rollout.prompt_mask, tokens=rollout.tokens, mask=rollout.mask,
    loss_mask=rollout.mask, old_log_probs=rollout.log_probs, reference_log_probs=rollout.log_probs,
    advantages=advantages,
  )  # fmt: skip
  before = jax.device_put(jax.tree.map(jnp.copy, state), experiment.placement)
  return experiment.update_steps.update(before, sharding.put_batch(experiment.mesh, made))


# ---- Every choice ------------------------------------------------------------------------


def case(name, mode, **options):
  return pytest.param({"source": name, "mode": mode} | options, id="-".join([name, mode, *map(str, options.values())]))


SIGMAS = ("magnitude", "signed", "difference")
CASES = [
  case("scoring", "uniform"),
  *(case("scoring", mode, bank=bank) for bank in banks.BANKS for mode in SIGMAS),
  *(case("scoring", "difference", bank="rollouts", fallback=bank) for bank in banks.FALLBACKS[1:]),
  *(case("scoring", "difference", bank="suffix", form=form) for form in ("truncated", "length_normalised", "power")),
  case("scoring", "difference", bank="rollouts", form="self_normalised"),
  case("scoring", "difference", bank="suffix", initial_value="first_segment"),
  case("scoring", "difference", bank="suffix", state_baseline=False),
  case("scoring", "signed", bank="suffix", floor=0.5),
  *(case("scoring", "difference", bank="answer", scored=scored) for scored in ("body", "answer")),
  *(case("monte_carlo", mode) for mode in SIGMAS),
  *(case("leave_one_out", mode) for mode in SIGMAS),
  *(case(name, mode) for name in ("gradient_x_input", "integrated_gradients") for mode in ("magnitude", "signed")),
  *(
    case(name, "difference", options__space="probability") for name in ("gradient_x_input", "integrated_gradients")
  ),
  *(case(name, "magnitude") for name in ("attention", "attention_rollout")),
  case("value_head", "difference"),
  *(case("calibrated", mode, bank="answer") for mode in SIGMAS),
  case("calibrated", "difference", bank="own", scored="body"),
]  # fmt: skip


@pytest.mark.parametrize("options", CASES)
def test_every_choice_trains(options):
  config = config_with(**options)
  assigned = assign(config)
  traces = batch()[2]
  segments, mask = traces.segments, np.asarray(traces.rollout.mask)
  advantages = np.asarray(assigned.advantages)
  assert np.isfinite(advantages).all() and (advantages[~mask] == 0).all() and np.abs(advantages[0]).max() > 0
  mode, name = config.credit.mode, config.credit.source
  uniform = np.zeros(4, bool)
  if config.credit.bank in ("rollouts", "own") and config.credit.fallback == "uniform":
    uniform[2:] = True
    assert assigned.metrics["fallback_rows"] == 0.5
  if mode != "difference":
    # Every sigma has mean 1 over a trace's tokens.
    mean = (advantages * mask).sum(axis=1) / mask.sum(axis=1)
    np.testing.assert_allclose(mean, OUTCOMES, atol=1e-4)
  elif name in ("scoring", "calibrated", "monte_carlo"):
    values, rewards = np.asarray(assigned.credit.values), np.asarray(assigned.credit.rewards)
    first = values[:, 0] if config.credit.initial_value == "baseline" else 0
    np.testing.assert_allclose(rewards.sum(axis=1), RETURNS - first, atol=1e-5)
    if not config.credit.state_baseline:
      rewards = np.where(segments.mask, values[:, 1:], 0)
    rows, ids = np.arange(4)[:, None], np.asarray(segments.segment_ids)
    np.testing.assert_allclose(advantages[~uniform], np.where(mask, rewards[rows, ids], 0)[~uniform], atol=1e-6)
  np.testing.assert_allclose(advantages[uniform], (mask * OUTCOMES[:, None])[uniform], atol=1e-5)
  if name == "monte_carlo":
    assert assigned.metrics["generated_tokens"] > 0
  else:
    assert assigned.metrics["generated_tokens"] == 0
  assert (assigned.metrics["token_forwards"] > 0) == (mode != "uniform")
  assert (assigned.credit is None) == (mode == "uniform")
  assert (assigned.state is None) == (name not in ("value_head", "calibrated"))

  state, metrics = update(assigned.advantages)
  assert np.isfinite(metrics["loss"]) and metrics["gradient_norm"] > 0 and int(state.step) == 1


def test_the_cases_hold_every_choice():
  chosen = [param.values[0] for param in CASES]
  assert {options["source"] for options in chosen} == set(SOURCES)
  assert {options["mode"] for options in chosen} == set(advantages.MODES)
  assert {options.get("bank", "answer") for options in chosen} == set(banks.BANKS)
  assert {options.get("fallback", "uniform") for options in chosen} == set(banks.FALLBACKS)
  assert {options.get("form", "plain") for options in chosen} == set(values.FORMS)
  assert {options.get("scored", "all") for options in chosen} == set(banks.SCORED)


# ---- What each source's credit is --------------------------------------------------------


def test_token_forwards_by_hand():
  whole = 4 * (P + T + S)
  expected = {
    "scoring": 4 * K * S, "calibrated": 4 * K * S, "leave_one_out": (K + 1) * whole, "gradient_x_input": 3 * whole,
    "integrated_gradients": 3 * 2 * whole, "attention": whole, "attention_rollout": whole, "value_head": 4 * (P + T),
  }  # fmt: skip
  modes = {"attention": "magnitude", "attention_rollout": "magnitude", "value_head": "difference"}
  counts = {
    name: assign(config_with(source=name, mode=modes.get(name, "signed"))).metrics["token_forwards"]
    for name in expected
  }
  assert counts == expected and {*expected, "monte_carlo"} == set(SOURCES)
  config = config_with(source="scoring", mode="signed", bank="rollouts")
  size = Experiment(config).setting.make_bank(batch()[2]).completions.tokens.shape[2]
  assert size > 1 and assign(config).metrics["token_forwards"] == 4 * K * size * S


def test_values_are_the_configured_form_at_the_sampling_temperature_of_the_configured_tokens():
  config = config_with(source="scoring", mode="difference", bank="answer", scored="body", form="length_normalised")
  config.rollout.temperature = 0.7
  experiment, _, traces = batch()
  assigned = assign(config)
  bank = Experiment(config).setting.make_bank(traces).completions
  exits = len(experiment.codec.exit_ids)
  assert not bank.scored[..., :exits].any() and bank.scored[..., exits].any() and bank.mask[..., 0].any()
  log_p = scoring.score_with_cache(
    traces.params, experiment.model, traces.cache, traces.rollout, traces.segments, bank, temperature=0.7,
    chunk_size=None,
  )  # fmt: skip
  of_trace = jax.vmap(functools.partial(values.estimate_values, form="length_normalised"))
  expected, _ = of_trace(log_p, bank.utilities, bank.log_q, bank.valid, bank.scored.sum(axis=-1))
  decided = np.asarray(traces.segments.after_exit) & ~bank.valid.any(axis=-1)
  some = np.asarray(traces.segments.mask) & ~decided
  np.testing.assert_allclose(np.asarray(assigned.credit.values)[:, :-1][some], np.asarray(expected)[some], rtol=1e-4)
  assert some.sum() > 4 and np.asarray(expected)[some].min() > 0


def test_calibration_is_of_likelihoods_at_the_sampling_temperature_and_of_the_tokens_before():
  config = config_with(source="calibrated", mode="difference", options__window=4 * K)
  config.rollout.temperature = 0.7
  experiment, _, traces = batch()
  pairs = assign(config).state
  bank = Experiment(config).setting.make_bank(traces).completions
  log_p = scoring.score_with_cache(
    traces.params, experiment.model, traces.cache, traces.rollout, traces.segments, bank, temperature=0.7,
    chunk_size=None,
  )  # fmt: skip
  used = np.asarray(pairs.used)
  np.testing.assert_allclose(np.asarray(pairs.log_p)[used], np.asarray(log_p).reshape(-1)[used], rtol=1e-4)
  before = np.append(0, np.asarray(traces.segments.ends)[0, :-1])
  np.testing.assert_allclose(pairs.features[:K, 0][used[:K]], np.log1p(before)[used[:K]], rtol=1e-6)
  assert used[:K].sum() > 1


@pytest.mark.parametrize(
  ("name", "module", "function"),
  [
    ("scoring", scoring, "score_with_cache"),
    ("calibrated", scoring, "score_with_cache"),
    ("monte_carlo", continuations, "generate_from_states"),
  ],
)
def test_as_much_is_run_at_once_as_is_configured(name, module, function, monkeypatch):
  asked, whole = [], getattr(module, function)
  monkeypatch.setattr(
    module, function, lambda *args, **options: asked.append(options["chunk_size"]) or whole(*args, **options)
  )
  assign(config_with(source=name, mode="difference", chunk_size=2))
  assert set(asked) == {2}


def test_a_state_without_a_completion_is_not_calibrated():
  options = {"mode": "difference", "max_completion_tokens": 2}  # No reference fits.
  calibrated, scored = (assign(config_with(source=name, **options)) for name in ("calibrated", "scoring"))
  np.testing.assert_array_equal(calibrated.credit.values, scored.credit.values)
  assert not np.asarray(calibrated.state.used).any()


def test_a_bank_is_made_with_the_options_of_the_setting():
  _, _, traces = batch()
  make = lambda **options: Experiment(config_with(source="scoring", mode="difference", **options)).setting.make_bank(
    traces
  )
  plain, normalised = (make(bank="rollouts", form=form).completions for form in ("plain", "self_normalised"))
  assert (plain.utilities[plain.valid] > 0).all()
  assert (normalised.utilities[normalised.valid] == 0).any()  # The failures of the group.
  # A group with a success offers it to both of its rows; each group has its own.
  assert plain.valid[:2].any(axis=(1, 2)).all() and not plain.valid[2:].any()
  short = make(bank="answer", max_completion_tokens=2)
  assert short.num_dropped > 1
  metrics = source.bank_metrics(batch()[0].setting, short)
  assert int(metrics["dropped_completions"]) == short.num_dropped and float(metrics["fallback_rows"]) == 1
  assert make(bank="rollouts", bank_size=3).completions.valid.shape[2] == 3


def test_the_solutions_bank_has_no_room_for_more_than_the_task_has():
  _, _, traces = batch()
  setting = Experiment(config_with(source="scoring", mode="difference", bank="solutions", bank_size=3)).setting
  few = lambda most, **options: dataclasses.replace(
    setting, task=SimpleNamespace(max_solutions=most, aligned=True), bank=dataclasses.replace(setting.bank, **options)
  )
  room = lambda setting: setting.make_bank(traces).completions.valid.shape[2]
  assert [room(few(1)), room(few(2)), room(few(9)), room(setting)] == [1, 2, 3, 3]
  assert room(few(1, name="rollouts")) == room(few(1, fallback=lambda inputs: ())) == 3


@pytest.mark.parametrize("room", [2, S])
def test_a_group_that_processes_share_has_one_bank_which_is_counted_once(room):
  """This process holds the second row of the first group and the first row of the second."""
  config = config_with(source="scoring", mode="signed", bank="rollouts", max_completion_tokens=room)
  setting = Experiment(config).setting
  traces, here = batch()[2], np.array([1, 2])
  whole = setting.make_bank(traces)
  host = jax.device_get((traces.rollout, traces.segments))
  dropped = []
  for judges in ([0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]):
    share = SimpleNamespace(
      split=True, here=here, around=np.arange(4), judges=np.array(judges), with_groups=lambda tree: host
    )
    mine = dataclasses.replace(
      traces, here=here, share=share, examples=[traces.examples[row] for row in here],
      on_host=jax.tree.map(lambda x: x[here], host),
    )  # fmt: skip
    made = setting.make_bank(mine)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[here]), made.completions, whole.completions)
    np.testing.assert_array_equal(made.fallback, whole.fallback[here])
    dropped.append(made.num_dropped)
  assert dropped[0] == whole.num_dropped == dropped[1] + dropped[2] and (dropped[0] > 0) == (room == 2)
  # The first group has a success, the second none, so one alone has something to leave out.
  assert room == S or dropped[1] != dropped[2]


@pytest.mark.parametrize("name", ["scoring", "leave_one_out"])
def test_rows_whose_bank_is_empty_get_uniform_credit(name):
  # No reference fits into two tokens.
  assigned = assign(config_with(source=name, mode="difference", max_completion_tokens=2))
  np.testing.assert_allclose(assigned.advantages, np.asarray(batch()[2].rollout.mask) * OUTCOMES[:, None], atol=1e-4)
  assert float(assigned.metrics["fallback_rows"]) == 1 and int(assigned.metrics["dropped_completions"]) > 0


def test_a_task_that_does_not_say_so_is_not_aligned(monkeypatch):
  experiment, _, traces = batch()
  asked = []
  reference = type(experiment.codec).reference
  monkeypatch.setattr(
    type(experiment.codec), "reference",
    lambda self, example, *, aligned: asked.append(aligned) or reference(self, example, aligned=aligned),
  )  # fmt: skip
  for task, expected in ((experiment.train_task, True), (SimpleNamespace(), False)):
    dataclasses.replace(experiment.setting, task=task).make_bank(traces)
    assert set(asked) == {expected}
    asked.clear()


def test_monte_carlo_credit_is_the_estimate_of_its_key():
  assigned = assign(config_with(source="monte_carlo", mode="difference"))
  experiment, state, traces = batch()
  judge = judging.judge_of(experiment.train_task, experiment.codec, traces.examples)
  # The verifier sees what `returns_of` shows it: the end-of-sequence token is no part of the text.
  host = jax.device_get(traces.rollout)
  whole = [(row, tuple(host.tokens[row, host.mask[row]].tolist())) for row in range(4)]
  returns = judging.returns_of(experiment.train_task, experiment.codec, traces.examples, host)
  assert judge(whole) == returns.tolist()
  estimate = monte_carlo.values_by_generation(
    state.params, experiment.model, traces.cache, traces.rollout, traces.segments, RETURNS, jax.random.key(5), judge,
    k=2, max_tokens=T, temperature=1.0, eos_id=experiment.codec.end_ids, pad_id=experiment.codec.pad_id,
  )  # fmt: skip
  np.testing.assert_array_equal(assigned.credit.values, estimate.values)
  assert assigned.metrics["generated_tokens"] == estimate.generated_tokens
  assert assigned.metrics["token_forwards"] == estimate.computed_tokens > 0
  assert float(assigned.metrics["effective_sample_size"]) == 2.0
  other = assign(config_with(source="monte_carlo", mode="difference"), key=jax.random.key(6))
  assert other.metrics["generated_tokens"] != estimate.generated_tokens


def test_value_head_credit_is_of_the_critic_before_it_learnt():
  config = config_with(source="value_head", mode="difference", options__decay=0.5)
  assigned = assign(config)
  mask = np.asarray(batch()[2].rollout.mask)
  # At its start it values every state at 0.5, so that only the last delta is left.
  to_go = mask.sum(axis=1)[:, None] - 1 - np.arange(mask.shape[1])
  expected = np.where(mask, 0.5 ** np.maximum(to_go, 0) * (RETURNS[:, None] - 0.5), 0)
  np.testing.assert_allclose(assigned.advantages, expected, atol=1e-6)
  assert float(jnp.abs(assigned.state.head.weight).max()) > 0
  np.testing.assert_allclose(assigned.metrics["critic_loss"], 0.125, rtol=1e-5)
  with pytest.raises(ValueError, match="lives in the train state"):
    assign(config, state=None)


# ---- Credit that is given ----------------------------------------------------------------


class Given(source.Source):
  """Says what it was told to."""

  name = "given"

  def __init__(self, setting, found):
    super().__init__(setting)
    self.found = found

  def assign(self, batch):
    return self.found


def of(found, **options):
  """What the assigner makes of `found`."""
  experiment, _, traces = batch()
  rule = assigner.Rule(group_size=GROUP, **options)
  with sharding.use(experiment.mesh):
    return assigner.Assigner(experiment.setting, rule, Given(experiment.setting, found))(traces)


def test_rewards_that_are_no_values_have_none():
  segments = batch()[2].segments
  rewards = jnp.where(segments.mask, jnp.arange(1.0, 5)[None] * jnp.array([[1.0], [-1.0], [2.0], [0.5]]), 0)
  assigned = of(source.Found(rewards=rewards), mode="difference")
  assert np.isnan(assigned.credit.values).all() and "initial_value" not in assigned.metrics
  ids = np.asarray(segments.segment_ids)
  expected = np.where(ids >= 0, np.asarray(rewards)[np.arange(4)[:, None], ids], 0)
  np.testing.assert_array_equal(assigned.advantages, expected)
  np.testing.assert_array_equal(assigned.credit.rewards, rewards)
  # Nothing said of the samples behind it: one each.
  np.testing.assert_array_equal(assigned.credit.effective_sample_size, segments.mask)
  assert float(assigned.metrics["effective_sample_size"]) == float(assigned.metrics["covered_states"]) == 1.0


def test_rows_that_ask_for_it_get_the_uniform_advantage_and_no_other():
  segments, mask = batch()[2].segments, np.asarray(batch()[2].rollout.mask)
  rewards = jnp.where(segments.mask, 7.0, 0.0)
  found = source.Found(rewards=rewards, uniform_rows=jnp.array([False, True, False, True]))
  ours = np.asarray(of(found, mode="difference").advantages)
  np.testing.assert_allclose(ours[0][mask[0]], 7.0)
  np.testing.assert_allclose(ours[1][mask[1]], -1.0, atol=1e-5)
  np.testing.assert_allclose(ours[2][mask[2]], 7.0)
  np.testing.assert_allclose(ours[3], 0.0)


def test_the_sources_metrics_and_state_are_passed_on_and_summarised():
  segments = batch()[2].segments
  values = jnp.where(segments.mask, 0.25, 0.0).at[:, 0].set(jnp.array([0.1, 0.2, 0.3, 0.6]))
  sizes = jnp.zeros(segments.ends.shape).at[:, 0].set(3.0)
  found = source.Found(values=values, sample_sizes=sizes, state="learnt", token_forwards=5, metrics={"mine": 1.5})
  assigned = of(found, mode="signed")
  states = int(segments.num_segments.sum())
  assert assigned.state == "learnt" and assigned.metrics["mine"] == 1.5 and assigned.metrics["token_forwards"] == 5
  assert float(assigned.metrics["covered_states"]) == pytest.approx(4 / states)
  assert float(assigned.metrics["effective_sample_size"]) == pytest.approx(12 / states)
  assert float(assigned.metrics["initial_value"]) == pytest.approx(0.3)


def test_the_rules_options_reach_rewards_and_uniform_credit():
  segments, mask = batch()[2].segments, np.asarray(batch()[2].rollout.mask)
  rewards = jnp.where(segments.mask, jnp.arange(1.0, 5)[None], 0)
  rows = jnp.ones(4, bool)
  # All of a row's credit is uniform where the floor is 1.
  spread = of(source.Found(rewards=rewards), mode="magnitude", floor=1.0).advantages
  np.testing.assert_allclose(spread, mask * OUTCOMES[:, None], atol=1e-4)
  # Half of the difference of a group of two is its standard deviation.
  for found in (source.Found(rewards=rewards, uniform_rows=rows), source.Found(values=rewards, uniform_rows=rows)):
    unscaled = of(found, mode="signed", advantage_scale="none").advantages
    np.testing.assert_allclose(unscaled, 0.5 * mask * OUTCOMES[:, None], atol=1e-5)
  plain = assigner.uniform_advantages(mask, RETURNS, rule=assigner.Rule(GROUP, baseline="none", advantage_scale="none"))
  np.testing.assert_array_equal(plain, mask * RETURNS[:, None])


def test_a_source_may_credit_tokens_itself():
  mask = batch()[2].rollout.mask
  own = jnp.where(mask, jnp.arange(float(T))[None], 0.0)
  values = jnp.zeros(batch()[2].segments.ends.shape)
  assigned = of(source.Found(values=values, advantages=own), mode="difference")
  np.testing.assert_array_equal(assigned.advantages, own)
  np.testing.assert_array_equal(assigned.credit.advantages, own)
