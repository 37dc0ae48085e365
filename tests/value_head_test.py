"""The critic: its regression against least squares, padding, and a run that resumes with it bit for bit."""

import dataclasses
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from helpers import run, saved_params, untimed

from rredcot_jax.credit import source, value_head
from rredcot_jax.model import decoder
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.ops import types
from rredcot_jax.train.experiment import Experiment

OPTIMIZER = value_head.make_optimizer(learning_rate=0.05)


def test_regression_finds_the_least_squares_solution_and_ignores_padding():
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(6, 5, 3)).astype(np.float32)
  mask = np.arange(5) < np.array([5, 4, 3, 5, 1, 2])[:, None]
  returns = np.array([1, 0, 1, 0, 1, 1], np.float32)
  x = np.c_[hidden[mask], np.ones(mask.sum())]
  y = np.broadcast_to(returns[:, None], mask.shape)[mask]
  solution = np.linalg.lstsq(x, y, rcond=None)[0]
  hidden[~mask] = np.nan
  critic = value_head.init(3, OPTIMIZER, initial_value=0.25)
  learnt, metrics = value_head.update(critic, hidden, returns, mask, optimizer=OPTIMIZER, num_updates=400)
  np.testing.assert_allclose(np.append(learnt.head.weight, learnt.head.bias), solution, atol=1e-3)
  assert metrics["critic_loss"] == pytest.approx(0.5 * np.mean((0.25 - y) ** 2))
  assert metrics["critic_explained_variance"] == pytest.approx(1 - np.mean((0.25 - y) ** 2) / y.var(), abs=1e-6)
  _, again = value_head.update(learnt, hidden, returns, mask, optimizer=OPTIMIZER, num_updates=1)
  assert again["critic_explained_variance"] == pytest.approx(1 - np.mean((x @ solution - y) ** 2) / y.var(), abs=1e-4)


def test_features_are_those_that_predict_the_token_and_carry_no_gradient():
  config = ModelConfig(vocab_size=7, width=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=8)
  params = decoder.init(config, jax.random.key(0))
  prompts, prompt_mask = jnp.array([[0, 3, 2]]), jnp.array([[False, True, True]])
  tokens = jnp.array([[4, 5, 1, 0]])
  mask = jnp.array([[True, True, True, False]])
  zeros = jnp.zeros(tokens.shape)
  rollout = types.Rollout(
    prompt_tokens=prompts, prompt_mask=prompt_mask, tokens=tokens, mask=mask, log_probs=zeros,
    sampler_log_probs=zeros, entropy=zeros, truncated=jnp.array([False]),
  )  # fmt: skip
  hidden = value_head.features(params, config, rollout)
  # The state before token 2 is what is known without it, whatever it and its followers are.
  whole = jnp.array([[3, 2, 4, 5]])
  alone, _ = decoder.forward(params, config, whole, jnp.ones(whole.shape, bool))
  np.testing.assert_allclose(hidden[0, 2], alone[0, -1], atol=1e-5)
  other = value_head.features(params, config, dataclasses.replace(rollout, tokens=tokens.at[0, 2].set(6)))
  np.testing.assert_array_equal(hidden[:, :3], other[:, :3])
  gradient = jax.grad(lambda p: value_head.features(p, config, rollout).sum())(params)
  assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))


def test_a_batch_is_valued_at_its_cuts_and_then_learnt_from_as_often_and_as_fast_as_configured():
  config = ModelConfig(vocab_size=7, width=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=8)
  params = decoder.init(config, jax.random.key(0))
  mask = jnp.array([[True] * 5 + [False], [True] * 3 + [False] * 3])
  zeros = jnp.zeros(mask.shape)
  rollout = types.Rollout(
    prompt_tokens=jnp.array([[3, 2], [1, 5]]), prompt_mask=jnp.ones((2, 2), bool),
    tokens=jnp.array([[4, 5, 1, 6, 2, 0], [6, 3, 2, 0, 0, 0]]), mask=mask, log_probs=zeros, sampler_log_probs=zeros,
    entropy=zeros, truncated=jnp.zeros(2, bool),
  )  # fmt: skip
  segments = types.Segments(
    ends=jnp.array([[1, 4, 5], [2, 3, 3]]), segment_ids=jnp.array([[0, 1, 1, 1, 2, -1], [0, 0, 1, -1, -1, -1]]),
    num_segments=jnp.array([3, 2]), num_merged=jnp.zeros(2, int),
  )  # fmt: skip
  setting = SimpleNamespace(model=config, mesh=None, put=lambda tree: tree)
  critique = value_head.Critique(setting, learning_rate=0.03, updates_per_rollout=3)
  critic = critique.init_state()
  head = value_head.ValueHead(jax.random.normal(jax.random.key(1), (8,)), jnp.float32(0.1))
  batch = source.Batch(
    params, None, rollout, segments, np.array([1, 0], np.float32), [None] * 2, None,
    state=dataclasses.replace(critic, head=head),
  )  # fmt: skip
  found = critique.assign(batch)
  each = value_head.predict(head, value_head.features(params, config, rollout))
  expected = [[each[0, 0], each[0, 1], each[0, 4]], [each[1, 0], each[1, 2], 0]]
  np.testing.assert_allclose(found.values, expected, rtol=1e-4)
  assert np.ptp(np.asarray(found.values)[0]) > 0.1
  assert int(found.state.opt_state[0].count) == 3
  # Adam's steps are of the learning rate's size.
  moved = np.abs(np.asarray(found.state.head.weight - head.weight))
  assert 0.05 < moved.max() < 0.1


@pytest.mark.faults  # calibrated_test.py has the same for another source's state.
def test_a_run_resumes_with_its_critic_bit_for_bit(tmp_path):
  config = tiny_config.get_config("grpo")
  config.initial_params, config.tokenizer.path = "", "chain"
  config.model.update({"width": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "mlp_width": 16})
  config.rollout.max_tokens, config.num_steps, config.evaluation.num_prompts = 16, 4, 4
  config.evaluation.samples, config.evaluation.rows = 1, 4
  config.credit.update({"source": "value_head", "mode": "difference"})
  whole = untimed(run(config, tmp_path / "whole"))
  losses = [line["credit/critic_loss"] for line in whole if "credit/critic_loss" in line]
  assert len(losses) == 4 and losses[-1] < losses[0]  # Random parameters never succeed: it learns that.
  shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
  shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "4")
  between, _ = saved_params(tmp_path / "resumed", 2, config)
  assert untimed(run(config, tmp_path / "resumed")) == whole
  (ours, data), (theirs, expected) = (saved_params(tmp_path / name, 4, config) for name in ("resumed", "whole"))
  assert data == expected
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  # A configuration without a critic reads the policy of a run with one.
  config.credit.mode = "uniform"
  step, params = Experiment(config).restore_params(tmp_path / "whole")
  assert step == 4
  jax.tree.map(np.testing.assert_array_equal, params, theirs.params)
  # What the critic has learnt is in the checkpoint, and goes on from there.
  assert isinstance(ours.learnt, value_head.Critic)
  assert 0 < np.abs(between.learnt.head.weight).max() and (between.learnt.head.weight != ours.learnt.head.weight).any()
