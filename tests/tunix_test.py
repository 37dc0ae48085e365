"""The learner for Tunix: token advantages equal to ours, what it refuses, and the example. Needs google-tunix."""

import dataclasses
import importlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rredcot_jax as rr

pytestmark = pytest.mark.peers
QUESTIONS = {"prompts": ["3+4=", "1+1=", "2+0=", "4+4="], "answer": [2, 2, 2, 3]}


@pytest.fixture(autouse=True)
def as_tunix_expects():
  """Tunix's models rely on rank promotion, which the other tests forbid."""
  pytest.importorskip("tunix", reason="google-tunix is not installed: make test-tunix makes a set-up with it")
  before = jax.config.jax_numpy_rank_promotion
  jax.config.update("jax_numpy_rank_promotion", "allow")  # In all threads, because Tunix samples in one of its own.
  yield
  jax.config.update("jax_numpy_rank_promotion", before)


@pytest.fixture(scope="module")
def lib():
  pytest.importorskip("tunix", reason="google-tunix is not installed: make test-tunix makes a set-up with it")
  from rredcot_jax.integrations import tunix

  return tunix


@pytest.fixture(scope="module")
def example():
  pytest.importorskip("tunix", reason="google-tunix is not installed: make test-tunix makes a set-up with it")
  import tunix_grpo

  return tunix_grpo


def batch_of(group):
  """Rows of the data set as Tunix hands them to the learner: each as often as it is answered."""
  return {name: np.repeat(np.array(rows), group) for name, rows in QUESTIONS.items()}


def learner_of(example, *args):
  """A learner that has not been told to train, which is when Tunix sets the sizes of its parts."""
  learner = example.make_learner(1, *args)
  learner._rollout_micro_batch_size = learner._compute_logps_micro_batch_size = len(QUESTIONS["prompts"])
  return learner


# ---- The same numbers ------------------------------------------------------------------------


def our_model(model):
  """Our decoder's configuration and parameters with the weights of Tunix's Qwen3."""
  from rredcot_jax.model.config import ModelConfig

  config = model.config
  sizes = ModelConfig(
    vocab_size=config.vocab_size, width=config.embed_dim, num_layers=config.num_layers, num_heads=config.num_heads,
    num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, mlp_width=config.hidden_dim, qk_norm=True,
    tied_embeddings=False, rope_theta=1e6, norm_epsilon=config.norm_eps,
  )  # fmt: skip
  of_layer = lambda layer: {
    "attention_norm": layer.input_layernorm.w, "query": layer.attn.q_proj.w, "key": layer.attn.k_proj.w,
    "value": layer.attn.v_proj.w, "out": layer.attn.o_proj.w, "query_norm": layer.attn.q_norm.w,
    "key_norm": layer.attn.k_norm.w, "mlp_norm": layer.post_attention_layernorm.w, "gate": layer.mlp.gate_proj.kernel,
    "up": layer.mlp.up_proj.kernel, "down": layer.mlp.down_proj.kernel,
  }  # fmt: skip
  layers = [{name: np.asarray(x[...]) for name, x in of_layer(layer).items()} for layer in model.layers]
  params = {
    "embedding": jnp.asarray(model.embedder.input_embedding[...]), "final_norm": jnp.asarray(model.final_norm.w[...]),
    "head": jnp.asarray(model.lm_head.w[...]).T, "blocks": jax.tree.map(lambda *x: jnp.stack(x), *layers),
  }  # fmt: skip
  return sizes, params


def our_advantages(model, rollout, returns, batch, example, temperature):
  """By our decoder and its cache, with nothing of the learner."""
  from rredcot_jax.model import decoder, scoring

  config, params = our_model(model)
  tables = rr.vocab_tables(example.VOCABULARY, keywords=[])
  cut = lambda tokens, mask: rr.segment(tokens, mask, tables, method="newline", k_max=4)
  segments = jax.vmap(cut)(rollout.tokens, rollout.mask)
  bank = rr.make_bank("answer", example.references(batch), max_tokens=2).completions
  tokens = jnp.concatenate([rollout.prompt_tokens, rollout.tokens], axis=1)
  mask = jnp.concatenate([rollout.prompt_mask, rollout.mask], axis=1)
  _, cache = decoder.forward(params, config, tokens, mask)
  log_p = scoring.score_with_cache(params, config, cache, rollout, segments, bank, temperature=temperature)
  return rr.credit_from_log_probs(
    log_p, bank, segments, returns, group_size=example.GROUP, mode="difference"
  ).advantages


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_advantages_equal_ours_for_the_same_traces(lib, example, temperature):
  returns = []

  def reward(**columns):
    returns.extend(np.random.default_rng(0).integers(0, 2, len(columns["prompts"])).astype(float))
    return list(returns)

  learner = learner_of(example, reward)
  learner.rl_cluster.get_rollout_config(lib.clusters.Mode.TRAIN).temperature = temperature
  batch = batch_of(example.GROUP)
  made = learner._generate_and_compute_advantage(dict(batch))
  rollout = lib.rollout_of(made)
  model = learner.rl_cluster.rollout.model()
  expected = our_advantages(model, rollout, jnp.array(returns, jnp.float32), batch, example, temperature)
  assert made.advantages.shape == made.completion_ids.shape == (4 * example.GROUP, example.LENGTH)
  np.testing.assert_allclose(made.advantages, expected, atol=1e-5)
  # There is something to get wrong: traces with several segments, and tokens that are credited differently.
  spread = [np.ptp(row[real]) for row, real in zip(np.asarray(made.advantages), np.asarray(rollout.mask)) if real.any()]
  assert np.sum(np.array(spread) > 1e-2) >= 2


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama3"])
def test_a_family_scores_a_tree_as_every_prefix_run_again(lib, family):
  from flax import nnx

  module = importlib.import_module(f"tunix.models.{family}.model")
  known = {
    "num_layers": 2, "vocab_size": 11, "embed_dim": 16, "hidden_dim": 32, "num_heads": 4, "head_dim": 8,
    "num_kv_heads": 2, "rope_theta": 1_000_000, "norm_eps": 1e-6, "use_tied_embedding": False,
    "weight_tying": False,
  }  # fmt: skip
  fields = {field.name for field in dataclasses.fields(module.ModelConfig)}
  config = module.ModelConfig(**{name: value for name, value in known.items() if name in fields})
  model = getattr(module, family.capitalize())(config, rngs=nnx.Rngs(0))
  graph, state = nnx.split(model)
  keys = iter(jax.random.split(jax.random.key(1), 100))
  state = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), state)

  def plain(params, tokens, positions, mask):
    causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
    return lib.apply(params, tokens, positions, (causal & mask[:, None]) | jnp.eye(tokens.shape[1], dtype=bool))

  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.integers(0, 11, shape), jnp.int32)
  rollout = rr.Rollout(
    draw(2, 3), jnp.array([[False, True, True], [True] * 3]), draw(2, 6), jnp.arange(6) < jnp.array([[6], [4]])
  )
  cut = lambda tokens, mask: rr.segment(tokens, mask, None, method="stride", stride=2, k_max=3)
  segments = jax.vmap(cut)(rollout.tokens, rollout.mask)
  used = jnp.ones((2, 3, 2, 3), bool)
  ones = jnp.ones(used.shape[:3])
  bank = rr.Completions(draw(*used.shape), used, used, ones, 0 * ones, ones > 0)
  tree = rr.score_tree(lib.apply, (graph, state), rollout, segments, bank, temperature=1.0)
  again = rr.score_generic(plain, (graph, state), rollout, segments, bank, temperature=1.0)
  assert np.ptp(np.asarray(tree)) > 1
  np.testing.assert_allclose(tree, again, atol=2e-5)


# ---- What Tunix does ----------------------------------------------------------------------------


def test_a_sampled_padding_id_makes_no_hole(lib):
  from tunix.rl import common

  counted = jnp.array([[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
  ids = jnp.where(counted, 3, 0)
  given = common.TrainExample(ids[:, :2], counted[:, :2], ids, counted, jnp.zeros(3), None, None)
  rollout = lib.rollout_of(given)
  assert rollout.mask.tolist() == [[True] * 4 + [False] * 2, [False] * 6, [True] * 6]
  assert rollout.truncated.tolist() == [False, False, True]


def test_every_batch_draws_with_another_key_and_a_run_repeats(lib, example):
  def tokens(seed, steps):
    learner = learner_of(example)
    learner._key = jax.random.PRNGKey(seed)
    found = []
    for step in steps:
      learner._iter_steps = step
      found.append(np.asarray(learner._generate_and_compute_advantage(batch_of(example.GROUP)).completion_ids))
    return found

  first, second = tokens(0, [0, 1])
  assert (first != second).any()
  np.testing.assert_array_equal(tokens(0, [1])[0], second)
  assert (tokens(1, [0])[0] != first).any()


def test_another_release_is_refused_at_import(lib, monkeypatch):
  import tunix

  monkeypatch.setattr(tunix, "__version__", "0.1.6")
  monkeypatch.delitem(sys.modules, "rredcot_jax.integrations.tunix")
  with pytest.raises(ImportError, match=r"google-tunix 0\.1\.6 is installed\. .* pip install google-tunix==0\.1\.7"):
    importlib.import_module("rredcot_jax.integrations.tunix")


@pytest.mark.parametrize(
  ("where", "name", "value", "message"),
  [
    ("model", "use_flash_attention", True, "use_flash_attention=True cannot be used .* does not read the mask"),
    ("training", "max_seq_token_per_tpu", 64, "max_seq_token_per_tpu=64 cannot be used .* one advantage for a trace"),
    ("cluster", "offload_to_cpu", True, "offload_to_cpu=True cannot be used"),
  ],
)
def test_what_would_make_scores_wrong_is_refused(lib, example, where, name, value, message):
  cluster = example.make_learner(1).rl_cluster
  holder = {
    "model": cluster.rollout.model().config, "training": cluster.cluster_config.training_config,
    "cluster": cluster.cluster_config,
  }[where]  # fmt: skip
  object.__setattr__(holder, name, value)
  with pytest.raises(ValueError, match=message):
    lib._check(cluster)


def test_a_model_that_may_not_read_the_mask_is_refused(lib, example, monkeypatch):
  cluster = example.make_learner(1).rl_cluster
  monkeypatch.setattr(lib, "MODELS", ("llama3",))
  with pytest.raises(ValueError, match=r"samples is a Qwen3, and must be one of tunix\.models llama3: they"):
    lib._check(cluster)


def test_a_rotary_base_that_tunix_ignores_is_said(lib, example):
  cluster = example.make_learner(1).rl_cluster
  cluster.rollout.model().config.rope_theta = 10_000
  with pytest.warns(UserWarning, match="qwen3 computes with rope_theta=1000000 and ignores the 10000 of its config"):
    lib._check(cluster)


# ---- The example --------------------------------------------------------------------------------


def test_the_example_trains(example, monkeypatch, capsys):
  learners, make = [], example.make_learner
  monkeypatch.setattr(example, "make_learner", lambda *args: learners.append(make(*args)) or learners[-1])
  monkeypatch.setattr(sys, "argv", ["tunix_grpo.py", "--steps", "2"])
  example.main()
  figures = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert figures.keys() == {"first_reward", "last_reward", "steps", "seconds"} and figures["steps"] == 2
  from flax import nnx

  models = (example.tiny_qwen3(), learners[0].rl_cluster.actor_trainer.model)
  before, after = (jax.tree.leaves(nnx.state(model, nnx.Param)) for model in models)
  moved = [np.abs(np.asarray(old) - np.asarray(new)).max() > 1e-6 for old, new in zip(before, after, strict=True)]
  assert all(moved) and len(moved) > 20
