"""Checkpoints: train state, step and data iterator through Orbax; the parameters that a run starts from.

A checkpoint is written beside its place and renamed when complete, so that a
process killed at any moment leaves the last complete one untouched.
"""

import dataclasses
import errno
import json
import logging
import os
import pathlib
import shutil
import time
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from rredcot_jax import config as config_lib
from rredcot_jax import distributed, sharding, train_step
from rredcot_jax.model import decoder, huggingface
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.types import check_option

_SEPARATOR = "/"


ON_FAILURE = ("stop", "continue")


class SaveFailed(RuntimeError):
  """A checkpoint could not be written; those before it are untouched."""


class Checkpointer:
  """Saves and restores (state, data iterator state) by step in one directory."""

  def __init__(self, directory: str | os.PathLike, *, keep: int, on_failure: str = "stop", writes: bool = True):
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
      if not distributed.on_all(readable):
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
    if distributed.is_main():
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
    distributed.barrier("closed the checkpoints")
    for step in steps if distributed.is_main() else ():
      aside = self._directory / f"damaged-{step}"
      number = 1
      while aside.exists():
        number += 1
        aside = self._directory / f"damaged-{step}-{number}"
      (self._directory / str(step)).rename(aside)
    distributed.barrier("moved the damaged checkpoints")
    self._manager = self._open()


def _reason(error: Exception) -> str:
  """An error in a line: what the system said, if it is known to be that, else the beginning."""
  text = (str(error).strip() or type(error).__name__).splitlines()[0]
  said = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO) if number]
  return next((phrase for phrase in said if phrase in text), text[:200])


def start_params(
  path: str, model: ModelConfig, mesh: jax.sharding.Mesh, key: chex.PRNGKey, *, dtype: DTypeLike = jnp.float32
) -> Any:
  """The parameters that a run starts from, placed on the mesh.

  Args:
    path: a directory in Hugging Face's format, a `.gguf` file, or a file that
      `save_params` wrote; "" draws them at random with `key`.
    model: the configured sizes.
    mesh: where they go.
    key: of the random start.
    dtype: of the parameters in memory.

  Raises:
    ValueError: if a checkpoint is of other sizes than configured, naming them;
      see also `huggingface.load` and `load_params`.
  """
  abstract = jax.eval_shape(lambda: decoder.init(model, key))
  if pathlib.Path(path).suffix == ".gguf" or (path and pathlib.Path(path).is_dir()):
    held = huggingface.load_config(path)
    differing = [
      f"{field.name} ({getattr(held, field.name)!r} there, {getattr(model, field.name)!r} configured)"
      for field in dataclasses.fields(model)
      if field.name not in ("max_positions", "compute") and getattr(held, field.name) != getattr(model, field.name)
    ]
    if differing:
      raise ValueError(f"the checkpoint {path!r} is another model than config.model says: {', '.join(differing)}.")
    return huggingface.load(path, dtype=dtype, mesh=mesh)[1]
  params = load_params(path, abstract) if path else decoder.init(model, key)
  return sharding.put_state(sharding.infer(mesh, abstract), jax.tree.map(lambda x: x.astype(dtype), params))


def restore_run(
  workdir: pathlib.Path, model: ModelConfig, mesh: jax.sharding.Mesh, *, vocab_size: int
) -> tuple[int, Any]:
  """The newest checkpoint of a run: its step and its parameters.

  Raises:
    ValueError: if there is none, or if its model is not `model`, naming the sizes that differ.
  """
  if not (workdir / "config.json").is_file():
    raise ValueError(f"{workdir} is no work directory of experiments/train.py: it has no config.json.")
  trained = ConfigDict(json.loads((workdir / "config.json").read_text(encoding="utf-8"))["config"])
  differing = config_lib.differences(config_lib.model_config(trained, vocab_size).sizes(), model.sizes())
  if differing:
    raise ValueError(f"the run in {workdir} trained another model than config.model says: {', '.join(differing)}.")
  optimizer = train_step.make_optimizer(**config_lib.optimizer_options(trained))
  # Runs older than the choice of a source scored.
  critic = config_lib.init_critic(trained, model.width) if "source" in trained.credit else None
  abstract = jax.eval_shape(lambda: train_step.init_state(decoder.init(model, jax.random.key(0)), optimizer, critic))
  placement = sharding.infer(mesh, abstract)
  abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placement)
  saver = Checkpointer(workdir / "checkpoints", keep=trained.checkpoint.keep, writes=False)
  restored = saver.restore_latest(abstract)
  saver.close()
  if restored is None:
    raise ValueError(f"{workdir} holds no checkpoint yet.")
  return restored[0], restored[1].params


def save_params(params: Any, path: str | os.PathLike) -> None:
  """Writes a parameter tree as one safetensors file, atomically; names are paths, "blocks/query"."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  flat = {_SEPARATOR.join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in leaves}
  path = pathlib.Path(path)
  temporary = path.with_name(path.name + ".tmp")
  safetensors.numpy.save_file(flat, temporary)
  os.replace(temporary, path)


def load_params(path: str | os.PathLike, abstract_params: Any) -> Any:
  """Reads parameters written by `save_params` into the structure of `abstract_params`.

  A bare file name that is not in the current folder is looked for among the
  package's assets.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: naming the file and the tensor, if one is missing, has another
      shape than the configured model, or if the file is damaged.
  """
  path = pathlib.Path(path)
  if not path.exists() and path.parent == pathlib.Path("."):
    path = pathlib.Path(__file__).parent / "assets" / path
  if not path.is_file():
    raise FileNotFoundError(f"no parameters at {path}: check initial_params, or make the file with warm_start.py.")
  try:
    flat = safetensors.numpy.load_file(path)
  except (safetensors.SafetensorError, json.JSONDecodeError, OSError) as error:
    raise ValueError(f"{path} is not a readable safetensors file: {error}") from error

  def pick(key_path: tuple, leaf: Any) -> np.ndarray:
    name = _SEPARATOR.join(str(key.key) for key in key_path)
    if name not in flat:
      raise ValueError(f"{path} has no tensor {name!r}; it holds {', '.join(sorted(flat))}.")
    if flat[name].shape != leaf.shape:
      raise ValueError(f"{path}: tensor {name!r} is {flat[name].shape} and the model needs {leaf.shape}.")
    return flat[name].astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(pick, abstract_params)
