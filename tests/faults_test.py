"""What goes wrong on the way: kills and signals at any moment, a full disk under each writer, two runs, a NaN step."""

import contextlib
import dataclasses
import functools
import json
import logging
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import killed_run
import numpy as np
import process_run
import pytest
import tiny_config
from helpers import (
  UPDATES,
  check_moved,
  full_disk,
  make_batch,
  make_state,
  reward_of_length,
  run,
  saved_params,
  untimed,
)
from process_run import NO_FATE, Started

from rredcot_jax.data.chain import Chain
from rredcot_jax.parallel import processes
from rredcot_jax.report import records
from rredcot_jax.train import checkpoint, loop, workdir

# ---- The same run, left alone ----------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The uninterrupted run of process_run's configuration, which has learnt something."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Chain, "reward", reward_of_length)
    directory = run(process_run.get_config(), tmp_path_factory.mktemp("whole") / "run")
  check_moved(directory, process_run.get_config())
  return directory


def check_same_run(directory, whole, config=None):
  """Bit for bit: metrics but for the clock, traces, parameters, optimizer, position in the data."""
  config = config or process_run.get_config()
  lines = [{name: x for name, x in line.items() if name != "train/tensorboard_lost"} for line in untimed(directory)]
  assert lines == untimed(whole)
  traces = list(records.read_traces(directory / "traces.jsonl"))
  assert traces and traces == list(records.read_traces(whole / "traces.jsonl"))
  (ours, data), (theirs, their_data) = (saved_params(path, config.num_steps, config) for path in (directory, whole))
  assert data == their_data
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  assert not [*(directory / "checkpoints").glob("*tmp*")]


# ---- A signal to stop, in each phase ---------------------------------------------------------

PHASES = [
  ("start", 1, 0),  # Compiling and drawing parameters.
  ("evaluation", 1, 0),  # The first one.
  ("rollout", 2, 1),
  ("update", 3, 2),
  ("save", 1, 2),  # Every 2 steps, in the background.
  ("seal", 1, 2),
  ("evaluation", 3, 6),  # The last one.
  ("last save", 1, None),  # Too late to be told: it has ended.
]


@pytest.mark.parametrize(
  ("place", "count", "saved_at"),
  [phase if phase[:2] == ("evaluation", 1) else pytest.param(*phase, marks=pytest.mark.faults) for phase in PHASES],
)
def test_a_run_told_to_stop_saves_and_the_same_command_goes_on(tmp_path, monkeypatch, whole, place, count, saved_at):
  monkeypatch.setattr(Chain, "reward", reward_of_length)
  config, directory = process_run.get_config(), tmp_path / "run"
  with monkeypatch.context() as patch, processes.StopNotice() as notice, workdir.claim(directory, config, "x") as claim:
    process_run.meet_at(place, count, lambda: signal.raise_signal(signal.SIGTERM), patch.setattr)
    finished = loop.run(config, directory, notice=notice, claim=claim)
    assert notice.reason == "SIGTERM"
  assert finished == (saved_at is None)
  if saved_at is not None:
    newest = max(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdecimal())
    # What is under way when it is told is finished or given up; nothing that was done is lost.
    assert saved_at <= newest <= saved_at + 1
  run(config, directory)
  check_same_run(directory, whole)


# ---- Kills -----------------------------------------------------------------------------------


# All 20 with `make faults`.
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.faults)])
def test_killed_at_random_moments_a_run_repeats_bit_for_bit(tmp_path, kills):
  environment = process_run.environment_of(tmp_path, devices=1)
  command = [sys.executable, killed_run.__file__, str(tmp_path), str(kills), "0"]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300 + 90 * kills, check=False)
  logs = "".join(path.read_text(errors="replace")[-2000:] for path in tmp_path.glob("*.log"))
  assert done.returncode == 0, done.stderr[-2000:] + logs
  kept = json.loads(done.stdout.splitlines()[-1])
  assert kept["statuses"] == [0, *[-signal.SIGKILL] * kills, 0], logs
  assert kept["half_written"] > 0  # Some kills fell into the write of a checkpoint.
  config = killed_run.get_config(kills)
  check_moved(tmp_path / "whole", config)
  check_same_run(tmp_path / "killed", tmp_path / "whole", config)


# ---- Two runs --------------------------------------------------------------------------------


@pytest.mark.faults
def test_a_second_run_in_one_directory_is_refused_and_the_first_goes_on(tmp_path, whole):
  directory = tmp_path / "run"
  first = Started(directory, ("WAIT", "rollout", "3"), [], devices=4)
  try:
    process_run.wait_for(lambda: "waiting to be told" in first.text or first.poll())
    second = Started(directory, NO_FATE, [], devices=4)
    process_run.wait_for(second.poll)
    expected = rf"is in use by a run on \S+, pid {first.process.pid} .*choose another --workdir"
    assert second.status == 1 and re.search(expected, second.text), second.text[-2000:]
    first.process.stdin.write(b"\n")
    first.process.stdin.flush()
    process_run.wait_for(first.poll)
    assert first.status == 0, first.text[-2000:]
  finally:
    first.end()
  check_same_run(directory, whole)


# ---- A full disk -----------------------------------------------------------------------------


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
  assert saver.num_failed == 1 and saver.last_good == 2
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


class Disk:
  """A filesystem of its own, of a few kilobytes, that can be made larger."""

  def __init__(self, path):
    self.path = path
    path.mkdir()
    self._mount("size=16k")

  def _mount(self, options):
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", self.path], capture_output=True, check=False)
    if done.returncode:
      pytest.skip(f"a small filesystem cannot be mounted here: {done.stderr.decode().strip()}")

  def fill(self):
    with contextlib.suppress(OSError), open(self.path / "filler", "ab", buffering=0) as file:
      while True:
        file.write(b"\0" * 512)

  def make_room(self):
    self._mount("remount,size=64m")
    (self.path / "filler").unlink(missing_ok=True)

  def unmount(self):
    subprocess.run(["umount", "--lazy", self.path], check=False)


@pytest.fixture
def disk(tmp_path):
  disk = Disk(tmp_path / "small")
  yield disk
  disk.unmount()


# Which writer's file lies on a full disk, when it fills up, and what the run then says. Checkpoint 2 is there, or is
# being written still.
WRITERS = {
  "metrics.jsonl": ("update", 3, r"metrics\.jsonl could not be written \(No space left on device\); .*checkpoint"),
  "traces.jsonl": ("evaluation", 1, r"traces\.jsonl could not be written \(No space left on device\); .*checkpoint"),
  "checkpoints": ("rollout", 1, r"checkpoint 2 could not be written \(No space left on device\); there is none before"),
  "tensorboard": ("update", 3, None),
}


@pytest.mark.faults
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_under_each_writer_is_named_and_room_is_enough_to_go_on(
  tmp_path, monkeypatch, caplog, disk, whole, writer
):
  monkeypatch.setattr(Chain, "reward", reward_of_length)
  config, directory = process_run.get_config(), tmp_path / "run"
  place, count, said = WRITERS[writer]
  workdir.claim(directory, config, "test").close()
  if writer in ("checkpoints", "tensorboard"):
    (disk.path / writer).mkdir()
  (directory / writer).symlink_to(disk.path / writer)

  def begin():
    with monkeypatch.context() as patch, workdir.claim(directory, config, "test") as claim:
      process_run.meet_at(place, count, disk.fill, patch.setattr)
      return loop.run(config, directory, claim=claim)

  began = time.monotonic()
  if said is None:
    with caplog.at_level(logging.WARNING):
      assert begin()
    assert "TensorBoard's events cannot be written (No space left on device)" in caplog.text
    assert untimed(directory)[-1]["train/tensorboard_lost"] >= 3
  else:
    with pytest.raises((workdir.WriteFailed, checkpoint.SaveFailed), match=f"{said}.*Make room in"):
      begin()
    disk.make_room()
    run(config, directory)
  assert time.monotonic() - began < 300  # It did not hang.
  check_same_run(directory, whole)


@pytest.mark.faults
def test_a_disk_full_from_the_start_or_at_the_report_is_named(tmp_path, disk, whole):
  disk.fill()
  with pytest.raises(
    workdir.WriteFailed, match=r"could not be written \(No space left on device\); there is no checkpoint"
  ):
    workdir.claim(disk.path / "run", process_run.get_config(), "test")
  disk.make_room()
  workdir.claim(disk.path / "run", process_run.get_config(), "test").close()
  started = Started(tmp_path / "run", ("FULL", "report", "1"), [], devices=4)
  process_run.wait_for(started.poll)
  assert started.status == 1
  assert re.search(r"report\.html could not be written \(File too large\); checkpoint 6 is untouched", started.text)
  check_same_run(tmp_path / "run", whole)


# ---- A step that is not finite ---------------------------------------------------------------


def test_a_run_goes_on_without_a_checkpoint_and_without_a_step(tmp_path, monkeypatch, caplog):
  config = tiny_config.get_config()
  config.num_steps, config.evaluation.num_prompts, config.checkpoint.every = 3, 4, 1
  config.loss.non_finite, config.checkpoint.on_failure = "skip", "continue"
  original, batches = loop.train_batch, []

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

  monkeypatch.setattr(loop, "train_batch", poisoned)
  monkeypatch.setattr(checkpoint.Checkpointer, "save", save_but_the_first)
  with caplog.at_level(logging.WARNING):
    directory = run(config, tmp_path / "skipped")
  assert "the loss of step 2 is not finite" in caplog.text and "skipped" in caplog.text
  lines = [line for line in untimed(directory) if "train/loss" in line]
  assert [line["train/skipped"] for line in lines] == [0.0, 1.0, 0.0]
  assert [np.isfinite(line["train/loss"]) for line in lines] == [True, False, True]
  assert np.isnan(np.load(directory / "nan_batch_2.npz")["advantages"]).any()
  assert "checkpoint 1 could not be written" in caplog.text and "goes on without it" in caplog.text
  assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["2", "3"]
  after, _ = saved_params(directory, 3, config)
  assert after.step == 2  # Updates made.
  assert np.isfinite(after.params["embedding"]).all()


def test_a_skipped_step_changes_nothing():
  update = functools.partial(UPDATES["policy"], skip_non_finite=True)
  state, batch = make_state(), make_batch()
  first, metrics = jax.jit(update)(state, batch)
  assert metrics["skipped"] == 0.0 and first.step == 1
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), first.params, state.params)))
  skipped, metrics = jax.jit(update)(
    first, dataclasses.replace(batch, advantages=np.full_like(batch.advantages, np.nan))
  )
  assert metrics["skipped"] == 1.0
  jax.tree.map(np.testing.assert_array_equal, skipped, first)
