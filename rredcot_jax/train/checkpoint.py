"""Checkpoints: train state, step and data iterator through Orbax, read back and hashed before they count.

A checkpoint is written beside its place and renamed when complete. So a process that
is killed at any moment leaves the last complete checkpoint untouched. Before the
renaming the structure is read back, and the hashes of the files are written beside them
(see `manifest`). The hashes are compared before a checkpoint is restored.
"""

import errno
import json
import logging
import os
import pathlib
import shutil
import time
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from rredcot_jax.ops.names import check_option
from rredcot_jax.parallel import processes
from rredcot_jax.train import fingerprints, manifest
from rredcot_jax.train import workdir as workdir_lib

ON_FAILURE = ("stop", "continue")
_REMOVAL_SECONDS = 2.0  # For Orbax's threads to stop writing what has failed.
_FORMAT = 1  # Of the data beside the state; see `Checkpointer.save`.


class SaveFailed(RuntimeError):
  """A checkpoint could not be written; those before it are untouched."""


class Checkpointer:
  """Saves and restores (state, data iterator state) by step in one directory."""

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    keep: int = 2,
    on_failure: str = "stop",
    writes: bool = True,
    fingerprints: Mapping[str, str] | None = None,
  ):
    """Opens `directory`, keeping the newest `keep` checkpoints.

    Args:
      directory: made if need be.
      keep: at least 2.
      on_failure: "stop" raises `SaveFailed` for a checkpoint that cannot be written (a full
        disk). "continue" reports it and counts it in `num_failed`. Where there are several
        processes, the one that cannot write raises.
      writes: whether the caller is the run that writes here. Half-written checkpoints of
        killed runs are then removed. Otherwise nothing in the directory is changed.
      fingerprints: hashes of what the run is made from, by name, kept in every checkpoint
        and compared when one is restored; see `fingerprints.check`.

    Raises:
      ValueError: if `keep` < 2, because a damaged newest checkpoint needs another one before
        it; if there are several processes and `on_failure` is "continue".
    """
    check_option("checkpoint.on_failure", on_failure, ON_FAILURE)
    if on_failure == "continue" and jax.process_count() > 1:
      raise ValueError(
        f"checkpoint.on_failure='continue' and {jax.process_count()} processes: a checkpoint that one of them cannot "
        "write keeps the others waiting for it. Set it to 'stop': those before it stay, and the same command resumes."
      )
    if keep < 2:
      raise ValueError(f"checkpoint.keep={keep} must be at least 2, so that a damaged one can be passed over.")
    self._directory = pathlib.Path(directory).absolute()
    self._on_failure, self._writes, self.num_failed = on_failure, writes, 0
    self._fingerprints = dict(fingerprints or {})
    self._saving: int | None = None  # The step that is being written.
    self._written: tuple[Any, dict] = (None, {})  # Its arrays' shapes, and its data.
    self._own_failure: Exception | None = None  # Of several processes, this one's in the background.
    self._options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, create=True, enable_async_checkpointing=True, cleanup_tmp_directories=writes,
      async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
    )  # fmt: skip
    self._manager = self._open()

  @property
  def last_good(self) -> int | None:
    """The newest step that can be restored; None where there is none."""
    return max((step for step in self._manager.all_steps() if step != self._saving), default=None)

  def save(self, step: int, state: Any, data: dict) -> None:
    """Writes in the background, unless `step` is there already; `wait` before leaving.

    Args:
      step: of the state.
      state: a tree of arrays.
      data: of JSON values; what else the run needs to go on.
    """
    self._settle(self._on_failure)
    if step in self._manager.all_steps():
      return
    held = {"format": _FORMAT, "step": step, "fingerprints": self._fingerprints, "data": data}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(held))
    self._saving, self._written = step, (_shapes(state), json.loads(json.dumps(held)))
    try:
      self._manager.save(step, args=args)
    except Exception as error:  # See `restore_latest`.
      self._failed(error, self._on_failure)

  def check(self) -> None:
    """Reports a write that has failed meanwhile, without waiting for one that goes on."""
    if self._saving is None:
      return
    if self._manager.is_saving_in_progress():
      self._raise_own_failure()
    else:
      self._settle(self._on_failure)

  def restore_latest(self, abstract_state: Any) -> tuple[int, Any, dict] | None:
    """The newest readable checkpoint, or None where there is none at all.

    If the files of a checkpoint are not what was written, or a process cannot read it, a
    warning names it, it is moved aside so that its step can be saved again, and the one
    before it is tried. A checkpoint without hashes (of an older version, or of a run killed
    just before they were written) is read with a warning.

    Args:
      abstract_state: shapes, dtypes and shardings to restore into.

    Returns:
      (step, state, data iterator state).

    Raises:
      ValueError: if there are checkpoints and none can be read; if one was written by another
        version, or made from other contents (see `fingerprints`).
    """
    damaged: dict[int, str] = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      restored, reason = self._restore(step, abstract_state)
      if reason:
        logging.warning("checkpoint %s cannot be read (%s); falling back to the one before it", step, reason)
        damaged[step] = reason
        continue
      self._set_aside(list(damaged))
      return step, restored["state"], restored["data"]
    if damaged:
      reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
      raise ValueError(
        f"none of the checkpoints in {self._directory} can be read ({reasons}). Put them back from a copy, or choose "
        "another --workdir."
      )
    return None

  def _restore(self, step: int, abstract_state: Any) -> tuple[Any, str]:
    """The state and data of one checkpoint, or why it cannot be read. All processes agree whether it can."""
    path, elsewhere = self._directory / str(step), "another process cannot read it"
    reason = ""
    if manifest.exists(path):
      reason = manifest.damage(path, part=jax.process_index(), parts=jax.process_count())
    elif processes.is_main():
      logging.warning("checkpoint %s has no hashes of its files: whether they are as written is not verified.", step)
    if not processes.on_all(not reason):
      return None, reason or elsewhere
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore())
    held: Any = {}
    try:
      restored = self._manager.restore(step, args=args)
      jax.block_until_ready(restored["state"])
      held = restored["data"]
      if held.get("format", _FORMAT) == _FORMAT and held.get("step", step) != step:
        reason = f"it is the checkpoint of step {held['step']}"
    except Exception as error:  # Orbax and TensorStore raise many kinds of errors. All mean the same here.
      if processes.is_loss(error):
        raise
      reason = _reason(error)
    if not processes.on_all(not reason):
      return None, reason or elsewhere
    if held.get("format", _FORMAT) != _FORMAT:
      raise ValueError(
        f"checkpoint {step} in {self._directory} has the format {held['format']!r}, not {_FORMAT}: go on "
        "with the version of this program that wrote it."
      )
    fingerprints.check(
      held.get("fingerprints", {}), self._fingerprints, where=f"checkpoint {step} in {self._directory}"
    )
    return {"state": restored["state"], "data": held["data"] if "format" in held else held}, ""

  def wait(self) -> None:
    """Returns when everything saved is on disk; raises `SaveFailed` if it cannot be, whatever `on_failure` is."""
    self._settle("stop")

  def close(self) -> None:
    self._manager.close()

  def _settle(self, on_failure: str) -> None:
    if self._saving is None:
      return
    while jax.process_count() > 1 and self._manager.is_saving_in_progress():
      self._raise_own_failure()
      time.sleep(0.01)
    try:
      self._manager.wait_until_finished()
      if processes.is_main():
        self._check_place(self._saving)
    except Exception as error:  # See `restore_latest`.
      self._failed(error, on_failure)
    self._saving = None

  def _check_place(self, step: int) -> None:
    """Raises OSError unless a checkpoint with hashes is in its place; syncs its name to the disk."""
    if not manifest.exists(self._directory / str(step)):
      raise FileNotFoundError(f"it is not at {self._directory / str(step)} after it was written")
    manifest.sync_directory(self._directory)

  def _seal(self) -> None:
    """Reads back what was written of a checkpoint, on process 0 and before it gets its name, and writes its hashes."""
    step, (shapes, data) = self._saving, self._written
    # Where a filesystem cannot rename, Orbax writes it in its place.
    places = [path for path in self._directory.iterdir() if path.name.partition(".")[0] == str(step)]
    if len(places) != 1:
      raise FileNotFoundError(f"{len(places)} directories of step {step} are in {self._directory}")
    read = ocp.StandardCheckpointHandler().metadata(places[0] / "state")
    if _shapes(getattr(read, "tree", read)) != shapes:
      raise OSError("its arrays cannot be read back")
    if json.loads((places[0] / "data" / "metadata").read_text(encoding="utf-8")) != data:
      raise OSError("its data cannot be read back")
    manifest.write(places[0])

  def _open(self) -> ocp.CheckpointManager:
    manager = ocp.CheckpointManager(self._directory, options=self._options)
    if jax.process_count() == 1:
      return manager
    # The error is stored, because Orbax reports it only after the other processes, which wait for this one.
    checkpointer = manager._checkpointer
    wait = checkpointer.wait_until_finished

    def noted() -> None:
      try:
        wait()
      except Exception as error:
        self._own_failure = error
        raise

    checkpointer.wait_until_finished = noted
    return manager

  def _raise_own_failure(self) -> None:
    """Of several processes: raises what this one could not write, or that another one was lost meanwhile."""
    error = self._own_failure
    if error is None:
      return
    if processes.is_loss(error):
      raise error
    raise SaveFailed(
      f"checkpoint {self._saving} could not be written by process {jax.process_index()} ({_reason(error)}); those "
      f"before it are untouched. {self._advice(error)} and run the same command again."
    ) from error

  def _failed(self, error: Exception, on_failure: str) -> None:
    if processes.is_loss(error):
      raise error
    step, self._saving = self._saving, None
    self.num_failed += 1
    if processes.is_main():
      self._remove_half_written(step)
    self._manager.reload()
    good = self.last_good
    message = (
      f"checkpoint {step} could not be written ({_reason(error)}); "
      + (f"the last good one is {good}" if good is not None else "there is none before it")
      + f". {self._advice(error)}"
    )
    if on_failure == "stop":
      raise SaveFailed(
        f"{message} and run the same command again; or set checkpoint.on_failure=continue, to go on without it."
      ) from error
    logging.error("%s: the run goes on without it.", message)

  def _remove_half_written(self, step: int | None) -> None:
    """Its files take disk space that the next one needs. Other threads may still write them for a moment."""
    end = time.monotonic() + _REMOVAL_SECONDS
    while (left := list(self._directory.glob(f"{step}.*"))) and time.monotonic() < end:
      for path in left:
        shutil.rmtree(path, ignore_errors=True)
      time.sleep(0.02)

  def _advice(self, error: Exception) -> str:
    return workdir_lib.advice(_system_error(error) or OSError(0, ""), self._directory)

  def _set_aside(self, steps: list[int]) -> None:
    if not steps or not self._writes:
      return
    self._manager.close()
    processes.barrier("closed the checkpoints")
    for step in steps if processes.is_main() else ():
      aside = self._directory / f"damaged-{step}"
      number = 1
      while aside.exists():
        number += 1
        aside = self._directory / f"damaged-{step}-{number}"
      (self._directory / str(step)).rename(aside)
    processes.barrier("moved the damaged checkpoints")
    self._manager = self._open()


def _shapes(tree: Any) -> list[tuple]:
  """Shapes and dtypes of a tree's arrays, sorted, because Orbax returns trees of other node types."""
  return sorted((tuple(leaf.shape), str(leaf.dtype)) for leaf in jax.tree.leaves(tree))


def _system_error(error: BaseException) -> OSError | None:
  """The operating system's error that caused `error`, if there is one."""
  text = str(error)
  numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)
  said = next((number for number in numbers if os.strerror(number) in text), None)
  if isinstance(error, OSError) and error.errno:
    return error
  return None if said is None else OSError(said, os.strerror(said))


def _reason(error: Exception) -> str:
  """An error in one line: the operating system's message where there is one, else the beginning."""
  system = _system_error(error)
  if system is not None:
    return os.strerror(system.errno or 0)
  return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
