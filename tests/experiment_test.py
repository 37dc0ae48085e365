"""A configuration as objects: each option reaches what reads it; what does not belong together is refused."""

import json

import jax
import numpy as np
import pytest
import tiny_config

from rredcot_jax.data import tasks
from rredcot_jax.model import decoder, export, tokenizer
from rredcot_jax.ops import types
from rredcot_jax.parallel import sharding
from rredcot_jax.train import initial, loop, train_step
from rredcot_jax.train import workdir as workdir_lib
from rredcot_jax.train.experiment import Experiment, loss_options, optimizer_options

SIZES = {"width": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "mlp_width": 16}


def experiment_with(**options):
  config = tiny_config.get_config()
  config.update_from_flattened_dict(options)
  return Experiment(config)


def small(**options):
  """A random policy on the shipped tokenizer of `chain`."""
  sizes = {f"model.{name}": value for name, value in SIZES.items()}
  return experiment_with(**sizes | {"initial_params": "", "tokenizer.path": "chain"} | options)


# ---- Options -----------------------------------------------------------------------------

RULE = {
  "credit.mode": "signed", "credit.initial_value": "first_segment", "credit.floor": 0.25,
  "advantages.baseline": "rloo", "advantages.scale": "none",
}  # fmt: skip
REACHED = [
  ("loss.name", "dapo", lambda e: loss_options(e.config)["loss"]),
  ("loss.clip_low", 0.1, lambda e: loss_options(e.config)["clip_low"]),
  ("loss.clip_high", 0.3, lambda e: loss_options(e.config)["clip_high"]),
  ("loss.dual_clip", 3.0, lambda e: loss_options(e.config)["dual_clip"]),
  ("loss.kl", "k2", lambda e: loss_options(e.config)["kl"]),
  ("loss.kl_coefficient", 0.5, lambda e: loss_options(e.config)["kl_coefficient"]),
  ("rollout.max_tokens", 40, lambda e: loss_options(e.config)["max_length"]),
  ("optimizer.learning_rate", 0.5, lambda e: optimizer_options(e.config)["learning_rate"]),
  ("optimizer.warmup_steps", 7, lambda e: optimizer_options(e.config)["warmup_steps"]),
  ("optimizer.weight_decay", 0.1, lambda e: optimizer_options(e.config)["weight_decay"]),
  ("optimizer.max_grad_norm", 2.0, lambda e: optimizer_options(e.config)["max_grad_norm"]),
  ("rollout.temperature", 0.5, lambda e: e.generation_options["temperature"]),
  ("rollout.top_k", 5, lambda e: e.generation_options["top_k"]),
  ("rollout.top_p", 0.5, lambda e: e.generation_options["top_p"]),
  ("compute.attention", "blocks", lambda e: e.model.compute.attention),
  ("compute.remat", "full", lambda e: e.model.compute.remat),
  ("mesh.fsdp", 2, lambda e: e.mesh.shape["fsdp"]),
  ("mesh.tensor", 2, lambda e: e.rollout_mesh.shape["tensor"]),
  ("mesh.sequence", 2, lambda e: e.mesh.shape["sequence"]),
  ("credit.state_baseline", False, lambda e: e.rule.state_baseline),
  *((name, value, lambda e, name=name: rule_field(e, name)) for name, value in RULE.items()),
  ("response.exit", "\n</think>\n\n", lambda e: e.codec.layout.exit),
  ("response.answer", "= %s", lambda e: e.codec.layout.answer),
]


def rule_field(experiment, name):
  return getattr(experiment.rule, "advantage_scale" if name == "advantages.scale" else name.partition(".")[2])


@pytest.mark.parametrize(("key", "value", "read"), REACHED, ids=[key for key, _, _ in REACHED])
def test_an_option_reaches_what_reads_it(key, value, read):
  assert read(experiment_with()) != value
  assert read(experiment_with(**{key: value})) == value


def test_the_optimizer_falls_by_the_last_update_or_not_at_all():
  options = {"num_steps": 6, "loss.updates_per_rollout": 3}
  assert optimizer_options(experiment_with(**options).config)["decay_steps"] == 18
  assert optimizer_options(experiment_with(**options | {"optimizer.cosine": False}).config)["decay_steps"] is None


def test_a_rollout_mesh_lies_on_the_same_devices():
  experiment = experiment_with(
    **{"mesh.fsdp": 4, "rollout_mesh.data": 1, "rollout_mesh.fsdp": 2, "rollout_mesh.sequence": 2}
  )
  assert dict(experiment.rollout_mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 1, "sequence": 2}
  assert set(experiment.rollout_mesh.devices.flat) == set(experiment.mesh.devices.flat)
  assert experiment_with().rollout_mesh is not None
  same = experiment_with()
  assert same.rollout_mesh is same.mesh
  two = Experiment(tiny_config.get_config(), devices=jax.devices()[:2])
  assert two.mesh.size == two.rollout_mesh.size == 2


def test_the_update_is_compiled_with_what_is_configured(monkeypatch):
  seen = {}
  monkeypatch.setattr(train_step, "compile_updates", lambda *args, **options: seen.update(options))
  _ = experiment_with(
    **{"compute.microbatches": 4, "compute.length_buckets": 3, "rollout.temperature": 0.5}
  ).update_steps
  assert (seen["microbatches"], seen["length_buckets"], seen["temperature"]) == (4, 3, 0.5)
  assert seen["skip_non_finite"] is False and seen["loss_options"]["kl"] == "k3"
  _ = experiment_with(**{"loss.non_finite": "skip"}).update_steps
  assert seen["skip_non_finite"] is True


def test_what_follows_the_exit_is_cut_as_configured(monkeypatch):
  def segments_with(**options):
    experiment = small(**{"segmentation.method": "newline", "segmentation.k_max": 6} | options)
    text = "1+1=2\n</think>2\n2\n"
    ids = experiment.codec.tokenizer.encode(text, add_special_tokens=False)
    tokens = np.array([[*ids, experiment.codec.eos_id]] * 4, np.int32)
    zeros = np.zeros(tokens.shape, np.float32)
    rollout = types.Rollout(
      prompt_tokens=tokens[:, :1], prompt_mask=np.ones((4, 1), bool), tokens=tokens, mask=np.ones(tokens.shape, bool),
      log_probs=zeros, sampler_log_probs=zeros, entropy=zeros, truncated=np.zeros(4, bool),
    )  # fmt: skip
    return experiment.rollout_steps.segment(sharding.put_batch(experiment.mesh, rollout)).num_segments.tolist()

  assert segments_with() == [2] * 4
  assert segments_with(**{"segmentation.after_exit": "cut"}) != [2] * 4


@pytest.mark.parametrize(("masked", "expected"), [(False, [3, 2]), (True, [0, 2])])
def test_truncated_traces_are_trained_on_unless_told_not_to(masked, expected):
  config = experiment_with(**{"loss.mask_truncated": masked}).config
  mask = np.array([[True, True, True], [True, True, False]])
  zeros = np.zeros((2, 3), np.float32)
  rollout = types.Rollout(
    prompt_tokens=np.zeros((2, 1), np.int32), prompt_mask=np.ones((2, 1), bool), tokens=np.zeros((2, 3), np.int32),
    mask=mask, log_probs=zeros - 1, sampler_log_probs=zeros - 2, entropy=zeros, truncated=np.array([True, False]),
  )  # fmt: skip
  batch = loop.train_batch(
    config, sharding.make_mesh(data=2, devices=jax.devices()[:2]), rollout, zeros, np.zeros(2, bool)
  )
  assert batch.loss_mask.sum(axis=1).tolist() == expected
  # The ratio is to the policy, not to what was cut from it for sampling.
  np.testing.assert_array_equal(batch.old_log_probs, rollout.log_probs)


# ---- Tasks and tokenizers ----------------------------------------------------------------


def test_what_is_held_out_is_the_tasks_own_split_or_another_task():
  experiment = experiment_with()
  assert experiment.task_options("train") == {"name": "chain", "split": "train", "num_steps": 8}
  assert experiment.task_options("eval") == {"name": "chain", "split": "eval", "num_steps": 8}
  assert (experiment.train_task.split, experiment.held_out.split) == ("train", "eval")
  config = tiny_config.get_config()
  config.evaluation.task.name = "chain"
  config.evaluation.task.options.num_steps = 2
  other = Experiment(config)
  assert other.held_out.num_steps == 2 and other.train_task.num_steps == 8


def test_the_tokenizer_lies_beside_the_parameters_or_where_it_is_said_to(tmp_path):
  beside = experiment_with().codec
  assert beside.vocab_size == 20 and beside.tokenizer.name_or_path.endswith("assets/chain")
  assert small(**{"tokenizer.path": "gsm_symbolic"}).codec.vocab_size == 1024
  with pytest.raises(ValueError, match=r"no tokenizer beside initial_params='': set tokenizer\.path"):
    _ = small(**{"tokenizer.path": ""}).codec
  # Before a warm start there is what it starts from.
  model = small().model
  export.save(model, decoder.init(model, jax.random.key(0)), tmp_path / "base", tokenizer=beside.tokenizer)
  started = small(**{"tokenizer.path": "", "warm_start.initial_params": str(tmp_path / "base")})
  assert started.codec.tokenizer.get_vocab() == beside.tokenizer.get_vocab()


def test_a_tokenizer_that_is_not_the_models_is_refused():
  with pytest.raises(ValueError, match=r"has 1024 ids and config\.model\.vocab_size is 20"):
    _ = small(**{"tokenizer.path": "gsm_symbolic", "model.vocab_size": 20}).codec
  with pytest.raises(ValueError, match=r"gsm_symbolic' is not that of the checkpoint .*chain/warm_start"):
    _ = experiment_with(**{"tokenizer.path": "gsm_symbolic"}).codec
  assert experiment_with(**{"tokenizer.path": "chain"}).codec.vocab_size == 20


def test_the_chat_template_is_used_unless_told_not_to(tmp_path):
  loaded = tokenizer.load_tokenizer(initial.locate("gsm_symbolic"))
  loaded.chat_template = "Q: {{ messages[0]['content'] }}{% if add_generation_prompt %} A: {% endif %}"
  loaded.save_pretrained(tmp_path)
  example = tasks.Example("1+1", (), "2")
  texts = {}
  for chat in (True, False):
    codec = small(**{"tokenizer.path": str(tmp_path), "tokenizer.chat": chat}).codec
    texts[chat] = codec.decode(codec.prompt_ids(example))
  assert texts == {True: "Q: 1+1 A: <think>", False: "1+1<think>"}


# ---- State -------------------------------------------------------------------------------


def test_the_state_that_is_made_is_the_abstract_one():
  experiment = small(**{"credit.source": "value_head", "credit.mode": "difference", "mesh.fsdp": 2, "mesh.tensor": 2})
  params = experiment.start_params(jax.random.key(0))
  state = jax.jit(experiment.init_state, out_shardings=experiment.placement)(params)
  describe = lambda x: (x.shape, x.dtype, x.sharding)
  assert jax.tree.map(describe, state) == jax.tree.map(describe, experiment.abstract_state)
  assert state.learnt is not None and experiment.abstract_params_state.learnt is None
  assert state.params["blocks"]["query"].sharding.spec != jax.sharding.PartitionSpec()


def test_parameters_are_those_that_are_named(tmp_path):
  experiment = small()
  drawn = experiment.start_params(jax.random.key(1))
  initial.save_params(drawn, tmp_path / "mine.safetensors")
  named = small(**{"initial_params": str(tmp_path / "mine.safetensors")})
  for params in (
    named.start_params(jax.random.key(2)),
    experiment.start_params(jax.random.key(2), str(tmp_path / "mine.safetensors")),
  ):
    jax.tree.map(np.testing.assert_array_equal, params, drawn)


def test_a_run_of_another_model_is_named_size_by_size(tmp_path):
  trained = small().config
  workdir_lib.claim(tmp_path / "run", trained, "test").close()
  with pytest.raises(ValueError, match="holds no checkpoint yet"):
    small().restore_params(tmp_path / "run")
  with pytest.raises(ValueError, match=r"num_layers \(1 there, 2 here\), width \(16 there, 32 here\)"):
    small(**{"model.num_layers": 2, "model.width": 32}).restore_params(tmp_path / "run")
  with pytest.raises(ValueError, match="no work directory of experiments/train"):
    small().restore_params(tmp_path / "nowhere")
  assert not (tmp_path / "nowhere").exists()


def test_a_run_that_was_trained_with_another_tokenizer_or_end_is_said(tmp_path, monkeypatch):
  experiment = small()
  prints, warned = experiment.fingerprints(), []
  monkeypatch.setattr("rredcot_jax.train.experiment.logging.warning", lambda text, *args: warned.append(text % args))
  for changes in ({}, {"code": "1"}, {"ends": "1"}, {"tokenizer": "1", "ends": "1"}):
    directory = tmp_path / "-".join(["run", *changes])
    workdir_lib.claim(directory, experiment.config, "test", fingerprints=prints | changes).close()
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
      experiment.restore_params(directory)
  assert len(warned) == 2 and "run-ends was trained: ends. Its ids may mean other tokens here" in warned[0]
  assert "run-tokenizer-ends was trained: tokenizer and ends." in warned[1]


@pytest.mark.parametrize("change", [{"rollout": None}, {"rollout": {}}, {"loss": 5}, {"seed": "x"}, {"model": []}])
def test_a_run_whose_configuration_is_another_programs_is_named(tmp_path, change):
  workdir_lib.claim(tmp_path / "run", small().config, "test").close()
  path = tmp_path / "run" / "config.json"
  held = json.loads(path.read_text())
  path.write_text(json.dumps(held | {"config": held["config"] | change}))
  with pytest.raises(ValueError):
    small().restore_params(tmp_path / "run")


def test_a_run_of_before_an_option_was_added_has_its_default(tmp_path):
  workdir_lib.claim(tmp_path / "run", small().config, "test").close()
  path = tmp_path / "run" / "config.json"
  held = json.loads(path.read_text())
  del held["config"]["credit"]["bank_size"], held["config"]["response"]
  path.write_text(json.dumps(held))
  with pytest.raises(ValueError, match="holds no checkpoint yet"):  # Its configuration is read before.
    small().restore_params(tmp_path / "run")


def test_another_end_is_another_content(tmp_path):
  experiment, prints = small(), []
  for ends in ([1], [1, 4]):
    beside = tmp_path / str(len(ends))
    export.save(
      experiment.model, decoder.init(experiment.model, jax.random.key(0)), beside, tokenizer=experiment.codec.tokenizer
    )
    (beside / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    prints.append(small(**{"tokenizer.path": str(beside)}).fingerprints())
  assert [name for name in prints[0] if prints[0][name] != prints[1][name]] == ["ends"]


# ---- Credit ------------------------------------------------------------------------------


def test_plain_grpo_makes_no_source_and_no_other_does_without():
  assert Experiment(tiny_config.get_config("grpo")).source is None
  experiment = experiment_with()
  assert experiment.source.setting is experiment.setting and experiment.assigner.source is experiment.source
  assert experiment.assigner.rule is experiment.rule and experiment.setting.task is experiment.train_task
  held_out = experiment.setting_of(experiment.held_out)
  assert held_out.task is experiment.held_out and held_out.bank == experiment.setting.bank
