"""What goes wrong on the way: kills at any moment, a full disk, a step that is not finite."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import killed_run
import numpy as np
import pytest
import tiny_config
import train
from helpers import UPDATES, make_batch, make_state, run, saved_params, untimed

from rredcot_jax.report import records
from rredcot_jax.train import checkpoint

ROOT = pathlib.Path(__file__).parent.parent

# ---- A full disk -----------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(limit=20_000):
  """No file may grow beyond `limit` bytes: writes fail as on a full disk, without being root."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


STATE = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(300, 300)).astype(np.float32))}


@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_a_full_disk_costs_one_checkpoint_at_most(tmp_path, caplog, on_failure):
  saver = checkpoint.Checkpointer(tmp_path, keep=2, on_failure=on_failure)
  for step in (1, 2):
    saver.save(step, STATE, {"x": step})
  saver.wait()
  said = r"checkpoint 3 could not be written \(File too large\); the last good one is 2. Make room in"
  with full_disk():
    saver.save(3, STATE, {"x": 3})
    deadline = time.monotonic() + 30
    with pytest.raises(checkpoint.SaveFailed, match=said) if on_failure == "stop" else contextlib.nullcontext():
      while not saver.num_failed and time.monotonic() < deadline:
        saver.check()
  assert saver.num_failed == 1
  assert on_failure == "stop" or re.search(said, caplog.text)
  # The two before are still there, and nothing of the third.
  assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
  saver.save(4, STATE, {"x": 4})
  saver.wait()
  saver.close()
  again = checkpoint.Checkpointer(tmp_path, keep=2)
  step, state, data = again.restore_latest(jax.eval_shape(lambda: STATE))
  assert (step, data) == (4, {"x": 4})
  np.testing.assert_array_equal(state["a"], STATE["a"])
  assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4"]
  # The last state of a run must be on disk, whatever the option says.
  with full_disk(), pytest.raises(checkpoint.SaveFailed, match="checkpoint 5"):
    again.save(5, STATE, {})
    again.wait()


# ---- Kills -----------------------------------------------------------------------------------


# All 20 with `pytest -m faults`.
@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.faults)])
def test_killed_at_random_moments_a_run_repeats_bit_for_bit(tmp_path, kills):
  environment = os.environ | {
    "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=1"),
    "PYTHONPATH": f"{ROOT}:{ROOT / 'experiments'}",
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  command = [sys.executable, str(ROOT / "tests" / "killed_run.py"), str(tmp_path), str(kills), "0"]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300 + 90 * kills, check=False)
  logs = "".join(path.read_text(errors="replace")[-2000:] for path in tmp_path.glob("*.log"))
  assert done.returncode == 0, done.stderr[-2000:] + logs
  kept = json.loads(done.stdout.splitlines()[-1])
  assert kept["statuses"] == [0, *[-signal.SIGKILL] * kills, 0], logs
  assert kept["half_written"] > 0  # Some kills fell into the write of a checkpoint.
  killed, whole = tmp_path / "killed", tmp_path / "whole"
  assert untimed(killed) == untimed(whole)
  assert records.read_traces(killed / "traces.jsonl") == records.read_traces(whole / "traces.jsonl")
  config = killed_run.get_config(kills)
  (ours, data), (theirs, their_data) = (saved_params(run, config.num_steps, config) for run in (killed, whole))
  assert data == their_data
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  assert not [*(killed / "checkpoints").glob("*tmp*")]


# ---- A step that is not finite ---------------------------------------------------------------


def test_a_run_goes_on_without_a_checkpoint_and_without_a_step(tmp_path, monkeypatch, caplog):
  config = tiny_config.get_config()
  config.num_steps, config.evaluation.num_prompts, config.checkpoint.every = 3, 4, 1
  config.loss.non_finite, config.checkpoint.on_failure = "skip", "continue"
  original, batches = train.train_batch, []

  def poisoned(*args):
    batch = original(*args)
    batches.append(batch)
    return dataclasses.replace(batch, advantages=batch.advantages * jnp.nan) if len(batches) == 2 else batch

  saved, save = [], checkpoint.Checkpointer.save

  def save_but_the_first(self, *args):
    with full_disk() if not saved else contextlib.nullcontext():
      save(self, *args)
      while self._manager.is_saving_in_progress():
        time.sleep(0.01)
    saved.append(args[0])

  monkeypatch.setattr(train, "train_batch", poisoned)
  monkeypatch.setattr(checkpoint.Checkpointer, "save", save_but_the_first)
  with caplog.at_level(logging.WARNING):
    workdir = run(config, tmp_path / "skipped")
  assert "the loss of step 2 is not finite" in caplog.text and "skipped" in caplog.text
  lines = [line for line in untimed(workdir) if "train/loss" in line]
  assert [line["train/skipped"] for line in lines] == [0.0, 1.0, 0.0]
  assert [np.isfinite(line["train/loss"]) for line in lines] == [True, False, True]
  assert np.isnan(np.load(workdir / "nan_batch_2.npz")["advantages"]).any()
  assert "checkpoint 1 could not be written" in caplog.text and "goes on without it" in caplog.text
  assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "3"]
  after, _ = saved_params(workdir, 3)
  assert after.step == 2  # Updates made.
  assert np.isfinite(after.params["embedding"]).all()


def test_a_skipped_step_changes_nothing():
  update = functools.partial(UPDATES["policy"], skip_non_finite=True)
  state, batch = make_state(), make_batch()
  first, metrics = jax.jit(update)(state, batch)
  assert metrics["skipped"] == 0.0 and first.step == 1
  skipped, metrics = jax.jit(update)(
    first, dataclasses.replace(batch, advantages=np.full_like(batch.advantages, np.nan))
  )
  assert metrics["skipped"] == 1.0
  jax.tree.map(np.testing.assert_array_equal, skipped, first)
