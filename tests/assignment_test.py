"""Every source, bank, form and sigma trains: one tiny batch through credit and update; what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config

from rredcot_jax.credit import assignment, monte_carlo, rules
from rredcot_jax.data import batching, judging, tasks
from rredcot_jax.model import decoder, sampling
from rredcot_jax.ops import advantages, banks, types, values
from rredcot_jax.parallel import sharding
from rredcot_jax.train import config as config_lib
from rredcot_jax.train import train_step

GROUP = 2
RETURNS = np.array([1, 0, 0, 0], np.float32)  # A group with a success, and one without.


def config_with(**options):
  config = tiny_config.get_config("grpo")
  config.task.options.num_steps = 1
  config.initial_params = ""
  config.model.update({"width": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "mlp_width": 16})
  config.rollout.update({"prompts_per_step": 2, "group_size": GROUP, "max_prompt_tokens": 6, "max_tokens": 12})
  config.segmentation.update({"method": "stride", "stride": 4})
  config.credit.update({"max_completion_tokens": 12, "bank": "answer"})
  config.credit.attribution.steps, config.credit.monte_carlo.samples = 2, 2
  config.loss.update({"kl": "off", "kl_coefficient": 0.0})
  config.update_from_flattened_dict(options)
  return config


@functools.cache
def batch():
  """Sampled traces of two prompts, and all that credit is made from."""
  config = config_with()
  task = tasks.make_task(**config_lib.task_options(config, "train"))
  model = config_lib.model_config(config, len(task.tokenizer))
  mesh = sharding.make_mesh()
  optimizer = train_step.make_optimizer(**config_lib.optimizer_options(config))
  state = train_step.init_state(decoder.init(model, jax.random.key(0)), optimizer)
  steps = train_step.compile_steps(
    model, optimizer, sharding.infer(mesh, state), mesh, temperature=1.0, eos_id=task.tokenizer.eos_token_id,
    segmentation_options=config_lib.segmentation_options(config), loss_options=config_lib.loss_options(config),
  )  # fmt: skip
  examples = [task[i // GROUP] for i in range(4)]
  prompts = sharding.put_batch(mesh, batching.prompt_arrays(task, examples, 6))
  rollout, cache = sampling.sample(
    state.params, model, *prompts, jax.random.key(1), max_tokens=12, eos_id=task.tokenizer.eos_token_id,
    pad_id=task.tokenizer.pad_token_id,
  )  # fmt: skip
  segments = steps.segment(rollout, batching.vocab_tables(task.tokenizer))
  return task, model, mesh, state, steps, examples, rollout, cache, segments


def assign(config, **given):
  task, model, mesh, state, _, examples, rollout, cache, segments = batch()
  config_lib.validate(config)
  critic = given.get("critic", config_lib.init_critic(config, model.width))
  assigner = assignment.Assigner(task, model, mesh, **config_lib.assigner_options(config))
  return assigner(
    state.params, critic, cache, rollout, segments, RETURNS, jax.random.key(5),
    on_host=jax.device_get(rollout), segments_on_host=jax.device_get(segments), examples=examples,
  )  # fmt: skip


def case(source, mode, **options):
  named = {f"credit.{name.replace('__', '.')}": value for name, value in options.items()}
  return pytest.param(
    {"rules.source": source, "rules.mode": mode, **named}, id="-".join([source, mode, *map(str, options.values())])
  )


SIGMAS = ("magnitude", "signed", "difference")
CASES = [
  case("scoring", "uniform"),
  *(case("scoring", mode, bank=bank) for bank in ("answer", "solution", "suffix", "rollouts") for mode in SIGMAS),
  *(case("scoring", "difference", bank="rollouts", fallback=bank) for bank in ("answer", "solution", "suffix")),
  *(case("scoring", "difference", bank="suffix", form=form) for form in ("truncated", "length_normalised")),
  case("scoring", "difference", bank="rollouts", form="self_normalised"),
  case("scoring", "difference", bank="suffix", initial_value="first_segment"),
  case("scoring", "difference", bank="suffix", state_baseline=False),
  case("scoring", "signed", bank="suffix", floor=0.5),
  case("scoring", "difference", bank="answer", force_exit=True),
  *(case("monte_carlo", mode) for mode in SIGMAS),
  *(case("leave_one_out", mode) for mode in SIGMAS),
  *(case(name, mode) for name in ("gradient_x_input", "integrated_gradients") for mode in ("magnitude", "signed")),
  *(case(n, "difference", attribution__space="probability") for n in ("gradient_x_input", "integrated_gradients")),
  *(case(name, "magnitude") for name in ("attention", "attention_rollout")),
  case("value_head", "difference"),
]


@pytest.mark.parametrize("options", CASES)
def test_every_choice_trains(options):
  config = config_with(**options)
  assigned = assign(config)
  _, _, mesh, state, steps, _, rollout, _, segments = batch()
  mask, advantages = np.asarray(rollout.mask), np.asarray(assigned.advantages)
  assert np.isfinite(advantages).all() and (advantages[~mask] == 0).all() and np.abs(advantages[0]).max() > 0
  mode, source = config.credit.mode, config.credit.source
  outcome = np.array([1, -1, 0, 0])
  uniform = np.zeros(4, bool)
  if config.credit.bank == "rollouts" and config.credit.fallback == "uniform":
    uniform[2:] = True
    assert assigned.metrics["fallback_rows"] == 0.5
  if mode != "difference":
    # Every sigma has mean 1 over a trace's tokens.
    mean = (advantages * mask).sum(axis=1) / mask.sum(axis=1)
    np.testing.assert_allclose(mean, outcome, atol=1e-4)
  elif source in ("scoring", "monte_carlo"):
    values, rewards = np.asarray(assigned.credit.values), np.asarray(assigned.credit.rewards)
    first = values[:, 0] if config.credit.initial_value == "baseline" else 0
    np.testing.assert_allclose(rewards.sum(axis=1), RETURNS - first, atol=1e-5)
    if not config.credit.state_baseline:
      rewards = np.where(segments.mask, values[:, 1:], 0)
    rows = np.arange(4)[:, None]
    ids = np.asarray(segments.segment_ids)
    np.testing.assert_allclose(advantages[~uniform], np.where(mask, rewards[rows, ids], 0)[~uniform], atol=1e-6)
  if source == "monte_carlo":
    assert assigned.metrics["generated_tokens"] > 0
  else:
    assert assigned.metrics["generated_tokens"] == 0
  assert (assigned.metrics["token_forwards"] > 0) == (mode != "uniform")

  made = types.TrainBatch(
    prompt_tokens=rollout.prompt_tokens, prompt_mask=rollout.prompt_mask, tokens=rollout.tokens, mask=rollout.mask,
    loss_mask=rollout.mask, old_log_probs=rollout.log_probs, reference_log_probs=rollout.log_probs,
    advantages=assigned.advantages,
  )  # fmt: skip
  before = jax.device_put(jax.tree.map(jnp.copy, state), sharding.infer(mesh, state))
  _, metrics = steps.update(before, sharding.put_batch(mesh, made))
  assert np.isfinite(metrics["loss"]) and metrics["gradient_norm"] > 0


def test_the_cases_hold_every_choice():
  chosen = [param.values[0] for param in CASES]
  assert {options["rules.source"] for options in chosen} == set(rules.SOURCES)
  assert {options["rules.mode"] for options in chosen} == set(advantages.MODES)
  assert {options.get("rules.bank") for options in chosen} >= set(banks.BANKS)
  assert {options.get("rules.form", "plain") for options in chosen} == set(values.FORMS)


def test_monte_carlo_credit_is_the_estimate_of_its_key():
  config = config_with(**{"rules.source": "monte_carlo", "rules.mode": "difference"})
  assigned = assign(config)
  task, model, _, state, _, examples, rollout, cache, segments = batch()
  judge = judging.judge_of(task, examples)
  # The verifier sees what `returns_of` shows it: the end-of-sequence token is no part of the text.
  host = jax.device_get(rollout)
  traces = [(row, tuple(host.tokens[row, host.mask[row]].tolist())) for row in range(4)]
  assert judge(traces) == judging.returns_of(task, examples, host).tolist()
  estimate = monte_carlo.values_by_generation(
    state.params, model, cache, rollout, segments, RETURNS, jax.random.key(5), judge,
    k=2, max_tokens=12, temperature=1.0, eos_id=task.tokenizer.eos_token_id, pad_id=task.tokenizer.pad_token_id,
  )  # fmt: skip
  np.testing.assert_array_equal(assigned.credit.values, estimate.values)
  assert assigned.metrics["generated_tokens"] == estimate.generated_tokens
  assert float(assigned.metrics["effective_sample_size"]) == 2.0


def test_value_head_credit_is_of_the_critic_before_it_learnt():
  config = config_with(**{"rules.source": "value_head", "rules.mode": "difference", "rules.value_head.decay": 0.5})
  assigned = assign(config)
  rollout = batch()[6]
  mask = np.asarray(rollout.mask)
  # At its start it values every state at 0.5, so that only the last delta is left.
  to_go = mask.sum(axis=1)[:, None] - 1 - np.arange(mask.shape[1])
  expected = np.where(mask, 0.5 ** np.maximum(to_go, 0) * (RETURNS[:, None] - 0.5), 0)
  np.testing.assert_allclose(assigned.advantages, expected, atol=1e-6)
  assert float(jnp.abs(assigned.critic.head.weight).max()) > 0
  np.testing.assert_allclose(assigned.metrics["critic_loss"], 0.125, rtol=1e-5)
  with pytest.raises(ValueError, match="lives in the train state"):
    assign(config, critic=None)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"rules.source": "monte_karlo"}, "did you mean 'monte_carlo'"),
    ({"rules.source": "value_head", "rules.mode": "signed"}, "set rules.mode='difference'"),
    ({"rules.source": "attention", "rules.mode": "signed"}, "set rules.mode='magnitude'"),
    ({"rules.source": "attention_rollout", "rules.mode": "difference"}, "set rules.mode='magnitude'"),
    ({"rules.source": "gradient_x_input", "rules.mode": "difference"}, "rules.attribution.space='probability'"),
    (
      {"rules.source": "leave_one_out", "rules.mode": "difference", "rules.attribution.space": "log"},
      "rules.attribution.space='probability'",
    ),
    ({"rules.source": "leave_one_out", "rules.mode": "signed", "rules.bank": "suffix"}, "set rules.bank='answer'"),
    ({"rules.attribution.space": "logs"}, "did you mean 'log'"),
    ({"rules.state_baseline": False, "rules.mode": "signed"}, "has a baseline to leave out"),
    ({"rules.monte_carlo.samples": 0}, r"credit\.monte_carlo\.samples=0 must be at least 1"),
    ({"rules.value_head.decay": 1.5}, r"decay=1.5 must be in \[0, 1\]"),
  ],
)
def test_illegitimate_combinations_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    config_lib.validate(config_with(**options))


def test_token_forwards_by_hand():
  sizes = {"batch": 2, "prompt": 3, "trace": 5, "states": 4, "completions": 2, "completion_tokens": 7}
  rule = rules.CreditRule(group_size=2, temperature=1.0, mode="signed", attribution_steps=10)
  counts = {source: rules.token_forwards(dataclasses.replace(rule, source=source), **sizes) for source in rules.SOURCES}
  whole = 2 * (3 + 5 + 7)
  assert counts == {
    "scoring": 2 * 4 * 2 * 7, "monte_carlo": 0, "leave_one_out": 5 * whole, "gradient_x_input": 3 * whole,
    "integrated_gradients": 30 * whole, "attention": whole, "attention_rollout": whole, "value_head": 2 * (3 + 5),
  }  # fmt: skip
  assert rules.token_forwards(dataclasses.replace(rule, mode="uniform"), **sizes) == 0
