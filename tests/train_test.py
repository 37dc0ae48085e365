"""The loop: what a run writes, damaged checkpoints, one device equals four, bad input, the real path."""

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import pathlib

import jax
import numpy as np
import pytest
import tiny_config
from helpers import compilations, run, untimed

from rredcot_jax.credit import assigner
from rredcot_jax.data import batching
from rredcot_jax.ops import losses
from rredcot_jax.report import records
from rredcot_jax.train import launch, loop, train_step
from rredcot_jax.train import workdir as workdir_lib
from rredcot_jax.train.experiment import Experiment

ROOT = pathlib.Path(__file__).parent.parent


def load_config(name: str, arg: str):
  return launch.load_file(ROOT / "configs" / f"{name}.py").get_config(arg)


@pytest.fixture(scope="module")
def compiled():
  """What the first run compiled; filled by `uninterrupted`."""
  return []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, compiled):
  with compilations() as programs:
    workdir = run(tiny_config.get_config(), tmp_path_factory.mktemp("runs") / "whole")
  compiled += programs
  return workdir


def test_run_writes_what_it_promises(uninterrupted):
  lines = untimed(uninterrupted)
  assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
  assert [line["step"] for line in lines if "eval/pass@1" in line] == [0, 3, 6]
  assert all(np.isfinite(line["train/loss"]) for line in lines if "train/loss" in line)
  tokens = [line["train/rollout_tokens"] for line in lines if "train/loss" in line]
  assert tokens == sorted(tokens) and tokens[0] > 0
  assert all(0 < line["train/reward"] < 1 for line in lines if "train/loss" in line)
  traces = list(records.read_traces(uninterrupted / "traces.jsonl"))
  assert len(traces) == 4
  for trace in traces:
    # Return equivalence, on what a run wrote.
    assert sum(trace["rewards"]) == pytest.approx(trace["return"] - trace["values"][0], abs=1e-5)
    assert len(trace["tokens"]) == len(trace["segment_ids"]) == len(trace["advantages"])
  assert any((uninterrupted / "tensorboard").iterdir())


def test_nothing_is_compiled_twice(uninterrupted, compiled):
  # Sampling serves evaluation too. `_values` is the source's estimate; the lambdas cut traces and compare for the KL.
  steps = dict.fromkeys(("init_state", "sample", "_values", "_credit_of_values", "_summary", "policy_update"), 1)
  names = [name for _, name in compiled]
  assert {name: names.count(name) for name in (*steps, "<lambda>")} == {**steps, "<lambda>": 2}
  # The first checkpoint, evaluation and traces come after the lines of steps 2 and 3.
  assert [name for step, name in compiled if step > 3] == []
  assert not {name for step, name in compiled if step >= 1} & {*steps, "<lambda>"}


@pytest.mark.faults  # checkpoint_test.py has the same for a checkpoint alone.
def test_damaged_checkpoint_falls_back(uninterrupted, caplog):
  workdir = run(tiny_config.get_config(), uninterrupted.parent / "damaged")
  for path in (workdir / "checkpoints" / "6").rglob("*"):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with caplog.at_level(logging.WARNING):
    run(tiny_config.get_config(), workdir)
  assert "checkpoint 6 cannot be read" in caplog.text
  assert untimed(workdir) == untimed(uninterrupted)


def assert_alike(lines, expected):
  for ours, theirs in zip(lines, expected, strict=True):
    assert ours.keys() == theirs.keys()
    for name in ("train/loss", "train/entropy", "train/reward", "eval/pass@1", "train/rollout_tokens"):
      if name in ours:
        assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name


def test_one_device_equals_four(uninterrupted, monkeypatch):
  one = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *args: one)
  lines = untimed(run(tiny_config.get_config(), uninterrupted.parent / "one"))
  assert_alike(lines, untimed(uninterrupted))


def test_fsdp_and_tensor_mesh_equals_data_alone(uninterrupted):
  config = tiny_config.get_config()
  config.mesh.fsdp, config.mesh.tensor = 2, 2
  assert_alike(untimed(run(config, uninterrupted.parent / "mesh")), untimed(uninterrupted))


def test_compiled_steps_are_given_what_is_on_the_devices_already(tmp_path, monkeypatch):
  """No array is moved or laid out anew behind a step's back."""
  allowed = {"sample": ["host_to_device"]}  # The key goes to all devices.
  calls = collections.Counter()

  def guarded(name, function):
    def call(*args, **kwargs):
      calls[name] += 1
      with contextlib.ExitStack() as stack:
        for way in allowed.get(name, ["host_to_device", "device_to_device"]):
          stack.enter_context(getattr(jax, f"transfer_guard_{way}")("disallow"))
        return function(*args, **kwargs)

    return call

  def guard_all(function):
    def made(*args, **kwargs):
      steps = function(*args, **kwargs)
      return type(steps)(**{name: guarded(name, step) for name, step in steps._asdict().items()})

    return made

  for name in ("compile_rollouts", "compile_updates"):
    monkeypatch.setattr(train_step, name, guard_all(getattr(train_step, name)))
  make = assigner.Assigner.__init__

  def guarded_assigner(self, *args):
    make(self, *args)
    self._of_values, self._summary = guarded("credit", self._of_values), guarded("summary", self._summary)
    self.source._estimate = guarded("estimate", self.source._estimate)

  monkeypatch.setattr(assigner.Assigner, "__init__", guarded_assigner)
  config = tiny_config.get_config()
  config.num_steps = 2
  run(config, tmp_path / "guarded")
  names = ("sample", "segment", "estimate", "credit", "summary", "log_probs", "update")
  assert {name: calls.pop(name) for name in names} == dict.fromkeys(names, 2)
  assert calls == {"params": 4}  # Two evaluations as well.


def test_finished_run_is_left_alone(uninterrupted):
  before = (uninterrupted / "metrics.jsonl").read_bytes()
  run(tiny_config.get_config(), uninterrupted)
  assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_other_configuration_is_refused(uninterrupted):
  config = tiny_config.get_config()
  config.optimizer.learning_rate = 5e-4
  before = (uninterrupted / "config.json").read_bytes()
  with pytest.raises(ValueError, match=r"optimizer.learning_rate \(0.0001 there, 0.0005 here\)"):
    workdir_lib.claim(uninterrupted, config, "test", resume=True)
  with pytest.raises(ValueError, match="noresume"):
    workdir_lib.claim(uninterrupted, tiny_config.get_config(), "test", resume=False)
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


def test_a_full_disk_does_not_hide_a_nan_loss(tmp_path):
  @dataclasses.dataclass
  class Batch:
    tokens: np.ndarray

  line = {"step": 3, "train/loss": float("nan")}
  with pytest.raises(FloatingPointError, match=r"step 3 is not finite; the batch could not be saved in .*\(No such"):
    loop.check_finite([line], tmp_path / "gone", {3: Batch(np.zeros(2))}, skipped=False)


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
  experiment = Experiment(load_config("demo", "grpo"))
  params = experiment.start_params(jax.random.key(0))
  batch = batching.supervised_batch(
    experiment.train_task, experiment.codec, np.random.default_rng(10_000), batch_size=64, max_prompt_tokens=18,
    max_tokens=56,
  )  # fmt: skip
  optimizer = experiment.optimizer
  update = jax.jit(functools.partial(train_step.supervised_update, config=experiment.model, optimizer=optimizer))
  _, metrics = update(train_step.init_state(params, optimizer), batch)
  assert float(metrics["loss"]) == pytest.approx(GOLDEN_LOSS, abs=1e-3)


GOLDEN_LOSS = json.loads((ROOT / "tests" / "golden.json").read_text())["supervised_loss"]
