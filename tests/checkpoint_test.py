"""Checkpoints: what is restored is what was saved, bit by bit, or is named and passed over."""

import errno
import json
import logging
import os
import pathlib
import random
import re
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rredcot_jax.parallel import peers, processes
from rredcot_jax.train import checkpoint, manifest

RNG = np.random.default_rng(0)
STATE = {
  "a": jnp.asarray(RNG.normal(size=(30, 30)).astype(np.float32)),
  "b": {"c": jnp.asarray(RNG.integers(0, 9, 5), jnp.int32), "d": jnp.float32(0.5)},
}
ABSTRACT = jax.eval_shape(lambda: STATE)


def state_at(step):
  return jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), STATE)


def data_at(step):
  return {"prompts": {"epoch": step, "order": [1, 2]}, "tokens": 10 * step}


@pytest.fixture
def saved(tmp_path):
  """A directory with checkpoints 1 and 2."""
  saver = checkpoint.Checkpointer(tmp_path / "checkpoints", keep=3)
  for step in (1, 2):
    saver.save(step, state_at(step), data_at(step))
  saver.wait()
  assert saver.last_good == 2
  saver.close()
  return tmp_path / "checkpoints"


def restored(directory, **options):
  saver = checkpoint.Checkpointer(directory, **options)
  try:
    return saver.restore_latest(ABSTRACT)
  finally:
    saver.close()


def check_restored(found, step):
  assert found is not None and found[0] == step
  jax.tree.map(np.testing.assert_array_equal, found[1], state_at(step))
  assert found[2] == data_at(step)


def test_what_is_restored_is_what_was_saved_and_another_step_is_not_it(saved):
  found = restored(saved)
  check_restored(found, 2)
  assert not np.array_equal(found[1]["a"], state_at(1)["a"])
  shutil.rmtree(saved / "2")
  check_restored(restored(saved), 1)
  assert restored(saved.parent / "empty") is None


# ---- Damage ----------------------------------------------------------------------------------


def covered_files(step_directory):
  return sorted(json.loads((step_directory / manifest.NAME).read_text())["files"])


def flip_a_bit(path, draw):
  data = bytearray(path.read_bytes())
  place = draw.randrange(8 * len(data))
  data[place // 8] ^= 1 << place % 8
  path.write_bytes(data)
  return place


def test_every_file_is_covered(saved):
  found = {str(path.relative_to(saved / "2")) for path in (saved / "2").rglob("*") if path.is_file()}
  assert found - set(covered_files(saved / "2")) == {manifest.NAME, "commit_success.txt"}


# Every file, and 15 bits of every file with `pytest -m faults`.
@pytest.mark.parametrize("bits", [1, pytest.param(15, marks=pytest.mark.faults)])
def test_one_flipped_bit_is_named_and_passed_over(saved, tmp_path, caplog, bits):
  draw, whole = random.Random(0), tmp_path / "whole"
  shutil.copytree(saved, whole)
  for name in [*covered_files(saved / "2"), manifest.NAME]:
    for _ in range(bits):
      shutil.rmtree(saved)
      shutil.copytree(whole, saved)
      place = flip_a_bit(saved / "2" / name, draw)
      caplog.clear()
      with caplog.at_level(logging.WARNING):
        found = restored(saved)
      # Orbax's stamp of the time is the one thing that may change: it is read by nobody.
      if name == "_CHECKPOINT_METADATA" and not manifest.damage(saved / "2" if found[0] == 2 else saved / "damaged-2"):
        check_restored(found, 2)
        continue
      check_restored(found, 1)
      named = "MANIFEST.json|holds other bytes|bytes and was written|is not readable"
      assert re.search(f"checkpoint 2 cannot be read .*({named})", caplog.text), (name, place, caplog.text)
      # It is set aside, not removed, so that its step can be saved again.
      assert sorted(path.name for path in saved.iterdir()) == ["1", "damaged-2"]


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "longer", "swapped", "renamed"])
def test_other_damage_is_named_and_passed_over(saved, caplog, damage):
  data = max((saved / "2" / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
  if damage in ("cut", "empty"):
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2] if damage == "cut" else b"")
  elif damage == "gone":
    data.unlink()
  elif damage == "longer":
    data.write_bytes(data.read_bytes() + b"\0")
  elif damage == "swapped":  # The data of another checkpoint, readable by itself.
    (saved / "2" / "data" / "metadata").write_bytes((saved / "1" / "data" / "metadata").read_bytes())
  else:  # A copy of a checkpoint under another step's name.
    shutil.rmtree(saved / "2")
    shutil.copytree(saved / "1", saved / "2")
  with caplog.at_level(logging.WARNING):
    check_restored(restored(saved), 1)
  assert "checkpoint 2 cannot be read" in caplog.text
  assert damage != "renamed" or "it is the checkpoint of step 1" in caplog.text


def test_where_all_are_damaged_nothing_is_begun_again_or_moved(saved):
  for step in ("1", "2"):
    (saved / step / "data" / "metadata").write_text("{}")
  with pytest.raises(ValueError, match=r"none of the checkpoints in .* can be read \(2: data/metadata has 2 bytes"):
    restored(saved)
  assert sorted(path.name for path in saved.iterdir()) == ["1", "2"]


def test_a_reader_that_is_not_the_run_moves_nothing(saved):
  (saved / "2" / "data" / "metadata").write_text("{}")
  check_restored(restored(saved, writes=False), 1)
  assert sorted(path.name for path in saved.iterdir()) == ["1", "2"]


def test_one_without_hashes_is_said_to_be_unverified(saved, caplog):
  (saved / "2" / manifest.NAME).unlink()
  with caplog.at_level(logging.WARNING):
    check_restored(restored(saved), 2)
  assert "checkpoint 2 has no hashes of its files: whether they are as written is not verified" in caplog.text


def test_one_of_an_older_version_is_its_data_alone(saved):
  (saved / "2" / manifest.NAME).unlink()
  (saved / "2" / "data" / "metadata").write_text(json.dumps(data_at(2)))
  check_restored(restored(saved), 2)


def test_a_step_that_is_damaged_twice_is_set_aside_twice(saved):
  for aside in (["damaged-2"], ["damaged-2", "damaged-2-2"]):
    (saved / "2" / "data" / "metadata").write_text("{}")
    check_restored(restored(saved), 1)
    assert sorted(path.name for path in saved.iterdir()) == ["1", *aside]
    saver = checkpoint.Checkpointer(saved, keep=3)
    saver.save(2, state_at(2), data_at(2))
    saver.wait()
    saver.close()
  check_restored(restored(saved), 2)


def test_damage_is_shared_out_among_processes(tmp_path):
  for name in "abcde":
    (tmp_path / name).write_text(name)
  manifest.write(tmp_path)
  (tmp_path / "c").write_text("x")
  found = [manifest.damage(tmp_path, part=part, parts=3) for part in range(3)]
  assert found == ["", "", "c holds other bytes than were written"]
  assert manifest.damage(tmp_path) == found[2]


def test_what_a_manifest_says_can_be_shown_and_a_pipe_is_not_waited_for(tmp_path):
  (tmp_path / "a").write_text("a")
  manifest.write(tmp_path)
  held = json.loads((tmp_path / manifest.NAME).read_text())
  (tmp_path / manifest.NAME).write_text(json.dumps(held | {"files": {"\x1b[2J" + "x" * 999: [1, "x"]}}))
  said = manifest.damage(tmp_path)
  assert said.isprintable() and said.startswith("\\x1b[2Jxx") and len(said) < 400
  (tmp_path / manifest.NAME).write_text(json.dumps(held | {"files": {}}))
  assert manifest.damage(tmp_path) == f"{manifest.NAME} names no files"
  (tmp_path / manifest.NAME).write_text("[" * 100_000)
  assert manifest.damage(tmp_path) == f"{manifest.NAME} is not readable (RecursionError)"
  (tmp_path / manifest.NAME).write_text(json.dumps(held))
  (tmp_path / "a").unlink()
  os.mkfifo(tmp_path / "a")
  assert manifest.damage(tmp_path) == "a is not readable (FileNotFoundError)"


def test_a_manifest_leads_nowhere_else(tmp_path):
  (tmp_path / "a").write_text("a")
  manifest.write(tmp_path)
  held = json.loads((tmp_path / manifest.NAME).read_text())
  for name in ("../a", "/etc/passwd"):
    (tmp_path / manifest.NAME).write_text(json.dumps(held | {"files": {name: [1, "x"]}}))
    assert manifest.damage(tmp_path) == f"{manifest.NAME} names files outside of its directory"


# ---- A save counts when it has been read back ------------------------------------------------


def test_what_cannot_be_read_back_is_no_checkpoint(tmp_path):
  """TensorStore takes brackets for a pattern: what it writes there it cannot read."""
  saver = checkpoint.Checkpointer(tmp_path / "sweep[1]")
  saver.save(1, STATE, {})
  with pytest.raises(checkpoint.SaveFailed, match=r"checkpoint 1 could not be written .* there is none before it"):
    saver.wait()
  assert saver.num_failed == 1 and saver.last_good is None
  assert not [path for path in (tmp_path / "sweep[1]").iterdir() if path.name.isdecimal()]


@pytest.mark.parametrize("what", ["fewer arrays", "other data", "nothing"])
def test_what_reads_back_as_something_else_is_no_checkpoint(saved, tmp_path, monkeypatch, what):
  """As where the storage loses or mixes up files while they are written."""
  other = checkpoint.Checkpointer(tmp_path / "other")
  other.save(1, {"a": STATE["a"]}, {})
  other.wait()
  other.close()
  seal = checkpoint.Checkpointer._seal

  def mixed_up(self):
    (place,) = saved.glob("3.*")
    if what == "fewer arrays":
      shutil.rmtree(place / "state")
      shutil.copytree(tmp_path / "other" / "1" / "state", place / "state")
    elif what == "other data":
      shutil.copy(saved / "2" / "data" / "metadata", place / "data" / "metadata")
    seal(self)

  monkeypatch.setattr(checkpoint.Checkpointer, "_seal", mixed_up)
  saver = checkpoint.Checkpointer(saved, keep=2)
  saver.save(3, state_at(3), data_at(3))
  assert saver.last_good == 2  # Until it has been read back, the new one does not count.
  if what == "nothing":
    saver.wait()
  else:
    message = {"fewer arrays": "its arrays cannot be read back", "other data": "its data cannot be read back"}[what]
    with pytest.raises(
      checkpoint.SaveFailed, match=rf"checkpoint 3 could not be written \({message}\); the last good one"
    ):
      saver.wait()
  saver.close()
  # With 2 kept, the oldest goes when a new one counts, and not before.
  assert sorted(path.name for path in saved.iterdir()) == (["2", "3"] if what == "nothing" else ["1", "2"])


def test_what_is_gone_after_it_was_written_is_no_checkpoint(saved):
  saver = checkpoint.Checkpointer(saved)
  saver.save(3, state_at(3), data_at(3))
  saver._manager.wait_until_finished()
  shutil.rmtree(saved / "3")
  with pytest.raises(checkpoint.SaveFailed, match=r"checkpoint 3 could not be written \(it is not at .*good one is 2"):
    saver.wait()
  saver.close()


def test_only_the_run_removes_what_a_killed_run_left_half_written(saved):
  half = saved / "2.orbax-checkpoint-tmp"
  half.mkdir()
  check_restored(restored(saved, writes=False), 2)
  assert half.is_dir()
  saver = checkpoint.Checkpointer(saved, keep=3)
  saver.save(3, state_at(3), data_at(3))  # It waits for the removal, which runs in the background.
  saver.wait()
  saver.close()
  assert sorted(path.name for path in saved.iterdir()) == ["1", "2", "3"]


def test_a_damaged_one_needs_another_before_it(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match=r"checkpoint\.keep=1 must be at least 2"):
    checkpoint.Checkpointer(tmp_path / "new", keep=1)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match=r"on_failure='continue' and 2 processes.*Set it to 'stop'"):
    checkpoint.Checkpointer(tmp_path / "new", on_failure="continue")
  assert not (tmp_path / "new").exists()


# ---- Another run's ---------------------------------------------------------------------------


def test_half_written_files_are_removed_although_another_thread_still_writes_them(tmp_path, monkeypatch):
  saver = checkpoint.Checkpointer(tmp_path / "checkpoints", on_failure="continue")
  half = tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp"
  begun = threading.Event()

  def write():
    for number in range(100):
      half.mkdir(exist_ok=True)
      (half / f"{number}").touch()
      begun.set()
      time.sleep(0.002)

  writer = threading.Thread(target=write)

  def fail(*_, **__):
    writer.start()
    begun.wait()
    raise OSError(errno.ENOSPC, "")

  monkeypatch.setattr(saver._manager, "save", fail)
  saver.save(1, STATE, {})
  writer.join()
  assert saver.num_failed == 1 and not list((tmp_path / "checkpoints").iterdir())
  saver.close()


def test_fingerprints_are_kept_and_compared(tmp_path, caplog):
  mine = {"corpus": "1", "code": "2"}
  saver = checkpoint.Checkpointer(tmp_path, fingerprints=mine)
  saver.save(3, state_at(3), data_at(3))
  saver.wait()
  saver.close()
  check_restored(restored(tmp_path, fingerprints=mine), 3)
  check_restored(restored(tmp_path), 3)
  assert not caplog.records
  with caplog.at_level(logging.WARNING):
    check_restored(restored(tmp_path, fingerprints=mine | {"code": "x"}), 3)
  assert "the code has changed since checkpoint 3" in caplog.text
  with pytest.raises(ValueError, match=r"checkpoint 3 in .* was made from other contents: corpus"):
    restored(tmp_path, fingerprints=mine | {"corpus": "x"})
  assert (tmp_path / "3").is_dir()  # It is another run's, not damaged.


def test_another_format_is_refused_and_not_taken_for_damage(tmp_path, monkeypatch):
  with monkeypatch.context() as later:
    later.setattr(checkpoint, "_FORMAT", 9)
    saver = checkpoint.Checkpointer(tmp_path)
    saver.save(3, state_at(3), data_at(3))
    saver.wait()
    saver.close()
  with pytest.raises(ValueError, match=r"checkpoint 3 in .* has the format 9, not 1"):
    restored(tmp_path)
  assert (tmp_path / "3").is_dir()


# ---- Several processes -----------------------------------------------------------------------


def test_a_lost_process_is_not_taken_for_a_full_disk(saved, monkeypatch):
  """What Orbax raises where another process does not come to its barrier."""
  saver = checkpoint.Checkpointer(saved)

  def wait():
    try:
      raise jax.errors.JaxRuntimeError("UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats)")
    except jax.errors.JaxRuntimeError as error:
      raise TimeoutError("Timed out while waiting for async_write_complete barrier.") from error

  monkeypatch.setattr(processes, "_peers", peers.Peers(0, 1, {}, 30))
  monkeypatch.setattr(saver._manager, "wait_until_finished", wait)
  saver._saving = 3
  with pytest.raises(TimeoutError) as raised:
    saver.wait()
  assert processes.is_loss(raised.value) and saver.num_failed == 0
  assert sorted(path.name for path in pathlib.Path(saved).iterdir()) == ["1", "2"]
