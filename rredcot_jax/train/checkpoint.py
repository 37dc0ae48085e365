"""Checkpoints: train state, step and data iterator through Orbax; the parameters that a run starts from.

A checkpoint is written beside its place and renamed when complete, so that a
process killed at any moment leaves the last complete one untouched.
"""

import errno
import logging
import os
import pathlib
import shutil
import time
from typing import Any

import jax
import orbax.checkpoint as ocp

from rredcot_jax.ops.names import check_option
from rredcot_jax.parallel import processes

ON_FAILURE = ("stop", "continue")


class SaveFailed(RuntimeError):
  """A checkpoint could not be written; those before it are untouched."""


class Checkpointer:
  """Saves and restores (state, data iterator state) by step in one directory."""

  def __init__(self, directory: str | os.PathLike, *, keep: int = 2, on_failure: str = "stop", writes: bool = True):
    """Opens `directory`, keeping the newest `keep` checkpoints.

    Args:
      directory: made if need be.
      keep: at least 2.
      on_failure: whether a checkpoint that cannot be written (a full disk) raises
        `SaveFailed`, or is reported and counted in `num_failed`; of several processes the
        one that cannot write raises.
      writes: whether this is the run's own; what killed runs have left half-written is
        then removed. Off, nothing in the directory is changed.

    Raises:
      ValueError: if `keep` < 2: a damaged newest checkpoint could not be passed over; if
        there are several processes and `on_failure` is "continue".
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
    self._saving: int | None = None  # The step that is being written.
    self._own_failure: Exception | None = None  # Of several processes, this one's in the background.
    self._options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, create=True, enable_async_checkpointing=True, cleanup_tmp_directories=writes
    )
    self._manager = self._open()

  def save(self, step: int, state: Any, data: dict) -> None:
    """Writes in the background, unless `step` is there already; `wait` before leaving."""
    self._settle(self._on_failure)
    if step in self._manager.all_steps():
      return
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
    self._saving = step
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

    A checkpoint that cannot be read, by any process, is named in a warning, moved aside
    (so that its step can be saved again) and the one before it is tried.

    Args:
      abstract_state: shapes, dtypes and shardings to restore into.

    Returns:
      (step, state, data iterator state).

    Raises:
      ValueError: if there are checkpoints and none can be read.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    damaged = []
    for step in steps:
      args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore())
      reason = "another process cannot read it"
      try:
        restored = self._manager.restore(step, args=args)
        jax.block_until_ready(restored["state"])
        readable = True
      except Exception as error:  # Orbax and TensorStore raise many kinds; each means the same here.
        reason, readable = _reason(error), False
      if not processes.on_all(readable):
        logging.warning("checkpoint %s cannot be read (%s); falling back to the one before it", step, reason)
        damaged.append(step)
        continue
      self._set_aside(damaged)
      return step, restored["state"], restored["data"]
    if damaged:
      raise ValueError(f"none of the checkpoints {damaged} in {self._directory} can be read.")
    return None

  def wait(self) -> None:
    """Returns when everything saved is on disk; raises `SaveFailed`, whatever `on_failure` says, if it cannot be."""
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
    except Exception as error:  # See `restore_latest`.
      self._failed(error, on_failure)
    self._saving = None

  def _open(self) -> ocp.CheckpointManager:
    manager = ocp.CheckpointManager(self._directory, options=self._options)
    if jax.process_count() == 1:
      return manager
    # Orbax waits for the other processes before it tells what went wrong, and they for this one: it is noted here.
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
    if isinstance(error.__cause__, jax.errors.JaxRuntimeError):
      raise error.__cause__
    raise SaveFailed(
      f"checkpoint {self._saving} could not be written by process {jax.process_index()} ({_reason(error)}); those "
      f"before it are untouched. Make room in {self._directory} and run the same command again."
    ) from error

  def _failed(self, error: Exception, on_failure: str) -> None:
    step, self._saving = self._saving, None
    self.num_failed += 1
    if processes.is_main():
      # What there is of it takes the place that the next one needs.
      for path in self._directory.glob(f"{step}.*"):
        shutil.rmtree(path, ignore_errors=True)
    self._manager.reload()
    good = max(self._manager.all_steps(), default=None)
    message = (
      f"checkpoint {step} could not be written ({_reason(error)}); "
      + (f"the last good one is {good}" if good is not None else "there is none before it")
      + f". Make room in {self._directory}"
    )
    if on_failure == "stop":
      raise SaveFailed(
        f"{message} and run the same command again; or set checkpoint.on_failure=continue, to go on without it."
      ) from error
    logging.error("%s: the run goes on without it.", message)

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


def _reason(error: Exception) -> str:
  """An error in a line: what the system said, if it is known to be that, else the beginning."""
  text = (str(error).strip() or type(error).__name__).splitlines()[0]
  said = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO) if number]
  return next((phrase for phrase in said if phrase in text), text[:200])
