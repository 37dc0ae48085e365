"""The loop: what a run writes, damaged checkpoints, one device equals four, bad input, the real path."""

import functools
import importlib.util
import json
import logging
import pathlib

import jax
import numpy as np
import pytest
import tiny_config
import train
from helpers import run, untimed

from rredcot_jax.data import batching, tasks
from rredcot_jax.model import decoder, sampling
from rredcot_jax.ops import losses
from rredcot_jax.report import page
from rredcot_jax.train import config as config_lib
from rredcot_jax.train import initial, train_step

ROOT = pathlib.Path(__file__).parent.parent


def load_config(name: str, arg: str):
  spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(arg)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  return run(tiny_config.get_config(), tmp_path_factory.mktemp("runs") / "whole")


def test_run_writes_what_it_promises(uninterrupted):
  lines = untimed(uninterrupted)
  assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
  assert [line["step"] for line in lines if "eval/pass@1" in line] == [0, 3, 6]
  assert all(np.isfinite(line["train/loss"]) for line in lines if "train/loss" in line)
  tokens = [line["train/rollout_tokens"] for line in lines if "train/loss" in line]
  assert tokens == sorted(tokens) and tokens[0] > 0
  assert all(0 < line["train/reward"] < 1 for line in lines if "train/loss" in line)
  traces = page.read_traces(uninterrupted / "traces.jsonl")
  assert len(traces) == 4
  for trace in traces:
    # Return equivalence, on what a run wrote.
    assert sum(trace["rewards"]) == pytest.approx(trace["return"] - trace["values"][0], abs=1e-5)
    assert len(trace["tokens"]) == len(trace["segment_ids"]) == len(trace["advantages"])
  assert any((uninterrupted / "tensorboard").iterdir())


def test_nothing_is_compiled_twice(uninterrupted):
  before = sampling.sample._cache_size()
  run(tiny_config.get_config(), uninterrupted.parent / "again")
  assert sampling.sample._cache_size() == before


def test_damaged_checkpoint_falls_back(uninterrupted, caplog):
  workdir = run(tiny_config.get_config(), uninterrupted.parent / "damaged")
  for path in (workdir / "checkpoints" / "6").rglob("*"):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with caplog.at_level(logging.WARNING):
    run(tiny_config.get_config(), workdir)
  assert "checkpoint 6 cannot be read" in caplog.text
  assert untimed(workdir) == untimed(uninterrupted)


def test_one_device_equals_four(uninterrupted, monkeypatch):
  one = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *args: one)
  lines = untimed(run(tiny_config.get_config(), uninterrupted.parent / "one"))
  for ours, theirs in zip(lines, untimed(uninterrupted), strict=True):
    assert ours.keys() == theirs.keys()
    for name in ("train/loss", "train/entropy", "train/reward", "eval/pass@1", "train/rollout_tokens"):
      if name in ours:
        assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name


def test_fsdp_and_tensor_mesh_runs(uninterrupted):
  config = tiny_config.get_config()
  config.mesh.fsdp, config.mesh.tensor = 2, 2
  first = untimed(run(config, uninterrupted.parent / "mesh"))[1]
  assert first["train/loss"] == pytest.approx(untimed(uninterrupted)[1]["train/loss"], abs=1e-4)


def test_finished_run_is_left_alone(uninterrupted):
  before = (uninterrupted / "metrics.jsonl").read_bytes()
  run(tiny_config.get_config(), uninterrupted)
  assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_other_configuration_is_refused(uninterrupted):
  config = tiny_config.get_config()
  config.optimizer.learning_rate = 5e-4
  before = (uninterrupted / "config.json").read_bytes()
  with pytest.raises(ValueError, match=r"optimizer.learning_rate \(0.0001 there, 0.0005 here\)"):
    train.claim_workdir(uninterrupted, config, "test", resume=True)
  with pytest.raises(ValueError, match="noresume"):
    train.claim_workdir(uninterrupted, tiny_config.get_config(), "test", resume=False)
  assert (uninterrupted / "config.json").read_bytes() == before


def test_nan_loss_stops_with_its_batch(tmp_path, monkeypatch):
  real = losses.policy_loss

  def broken(log_probs, batch, **options):
    value, metrics = real(log_probs, batch, **options)
    return value * np.nan, metrics | {"loss": value * np.nan}

  monkeypatch.setattr(losses, "policy_loss", broken)
  with pytest.raises(FloatingPointError, match="step 1 is not finite"):
    run(tiny_config.get_config(), tmp_path / "nan")
  batch = np.load(tmp_path / "nan" / "nan_batch_1.npz")
  assert batch["tokens"].shape == (16, 56) and batch["mask"].any()
  assert not [path for path in (tmp_path / "nan" / "checkpoints").iterdir() if path.name.isdigit()]


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("credit.bank", "sufix", "did you mean 'suffix'"),
    ("credit.mode", "diference", "did you mean 'difference'"),
    ("segmentation.method", "newlines", "did you mean 'newline'"),
    ("loss.name", "grp", "did you mean 'grpo'"),
    ("rollout.group_size", 1, "group_size=1 must be at least 2"),
    ("num_steps", 0, "num_steps=0"),
  ],
)
def test_bad_option_is_named(key, value, message):
  config = tiny_config.get_config()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=message):
    config_lib.validate(config)


def test_unknown_key_offers_the_nearest():
  config = tiny_config.get_config()
  with pytest.raises((AttributeError, KeyError), match='Did you mean "learning_rate"'):
    config.optimizer.learning_rat = 1.0


def test_config_argument_is_checked():
  with pytest.raises(ValueError, match="did you mean 'rredcot'"):
    load_config("demo", "redcot")
  with pytest.raises(ValueError, match="did you mean 'bank'"):
    load_config("demo", "grpo,banks=answer")
  assert load_config("demo", "rredcot,bank=answer").credit.bank == "answer"
  assert load_config("demo", "grpo").credit.mode == "uniform"


def test_task_without_prompts_is_refused(tmp_path):
  config = tiny_config.get_config()
  config.task.options.size = 0
  with pytest.raises(ValueError, match="yields no prompt"):
    run(config, tmp_path / "empty")
  config.task.options.size = 3
  with pytest.raises(ValueError, match="yields 3 prompts and a step needs 4"):
    run(config, tmp_path / "few")


def test_half_written_parameters_are_named(tmp_path):
  path = tmp_path / "half.safetensors"
  initial.save_params({"a": np.ones((4, 4), np.float32)}, path)
  wrong = {"a": jax.ShapeDtypeStruct((4, 5), np.float32)}
  with pytest.raises(ValueError, match=r"tensor 'a' is \(4, 4\) and the model needs \(4, 5\)"):
    initial.load_params(path, wrong)
  with pytest.raises(ValueError, match="no tensor 'b'"):
    initial.load_params(path, {"b": wrong["a"]})
  path.write_bytes(path.read_bytes()[:-8])
  with pytest.raises(ValueError, match=r"half\.safetensors is not a readable"):
    initial.load_params(path, wrong)
  with pytest.raises(FileNotFoundError, match="nowhere"):
    initial.load_params("nowhere.safetensors", wrong)


def test_real_questions_hold_the_path(tmp_path):
  config = load_config("gsm_symbolic_tiny", "rredcot")
  config.model.width, config.model.num_layers = 32, 2
  config.num_steps, config.task.options.size = 2, 64
  config.rollout.max_tokens, config.credit.max_completion_tokens = 24, 256
  config.evaluation.num_prompts = 4
  workdir = run(config, tmp_path / "gsm")
  lines = [line for line in untimed(workdir) if "train/loss" in line]
  assert [line["step"] for line in lines] == [1, 2]
  # Random parameters answer nothing: every group is all wrong, and says so.
  assert lines[0]["train/zero_variance_groups"] == 1.0 and lines[0]["credit/fallback_rows"] == 1.0
  assert lines[0]["train/truncated"] > 0 and lines[0]["train/loss"] == pytest.approx(0.0, abs=1e-6)


def test_golden_supervised_loss_of_the_shipped_start():
  """May be updated only with the shipped parameters, by the command in configs/demo.py."""
  config = load_config("demo", "grpo")
  task = tasks.make_task("chain", split="train", **config.task.options)
  model = config_lib.model_config(config, len(task.tokenizer))
  abstract = jax.eval_shape(lambda: decoder.init(model, jax.random.key(0)))
  params = initial.load_params(config.initial_params, abstract)
  optimizer = train_step.make_optimizer(**config_lib.optimizer_options(config))
  batch = batching.supervised_batch(
    task, np.random.default_rng(10_000), batch_size=64, max_prompt_tokens=18, max_tokens=56,
    wrong_share=config.warm_start.wrong_share, early_share=config.warm_start.early_share,
  )  # fmt: skip
  update = jax.jit(functools.partial(train_step.supervised_update, config=model, optimizer=optimizer))
  _, metrics = update(train_step.init_state(params, optimizer), batch)
  assert float(metrics["loss"]) == pytest.approx(GOLDEN_LOSS, abs=1e-3)


GOLDEN_LOSS = json.loads((ROOT / "tests" / "golden.json").read_text())["supervised_loss"]
