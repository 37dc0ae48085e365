"""The parameters that a run starts from: at random, a checkpoint of others, or one safetensors file of ours."""

import dataclasses
import os
import pathlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.typing import DTypeLike

from rredcot_jax.model import decoder, huggingface
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.model.source import open_safetensors, refusing
from rredcot_jax.parallel import sharding
from rredcot_jax.report import files
from rredcot_jax.report.text import shorten, visible

_SEPARATOR = "/"
_SHOWN = 400  # Characters of a file's tensor names in an error.
ASSETS = pathlib.Path(__file__).parent.parent / "assets"


def locate(path: str | os.PathLike) -> pathlib.Path:
  """`path` where there is such a file or directory, else what rredcot_jax/assets holds under that name."""
  path = pathlib.Path(path)
  shipped = ASSETS / path
  return shipped if not path.exists() and not path.is_absolute() and shipped.exists() else path


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


def save_params(params: Any, path: str | os.PathLike) -> None:
  """Writes a parameter tree as one safetensors file, atomically. Tensors are named by path, as "blocks/query"."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  flat = {_SEPARATOR.join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in leaves}
  with files.replacing(path) as temporary:
    safetensors.numpy.save_file(flat, temporary)


def load_params(path: str | os.PathLike, abstract_params: Any) -> Any:
  """Reads parameters written by `save_params` into the structure of `abstract_params`.

  See `locate` for where it is looked for.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: naming the file and the tensor, if one is missing, has another
      shape than the configured model, or if the file is damaged or its header
      too large.
  """
  path = locate(path)
  if not path.is_file():
    raise FileNotFoundError(f"no parameters at {path}: check initial_params, or make the file with warm_start.py.")
  opened = open_safetensors(path)
  there = set(opened.keys())

  def pick(key_path: tuple, leaf: Any) -> np.ndarray:
    name = _SEPARATOR.join(str(key.key) for key in key_path)
    if name not in there:
      raise ValueError(f"{path} has no tensor {name!r}; it holds {visible(shorten(', '.join(sorted(there)), _SHOWN))}.")
    shape = tuple(opened.get_slice(name).get_shape())
    if shape != leaf.shape:
      raise ValueError(f"{path}: tensor {name!r} is {shape} and the model needs {leaf.shape}.")
    with refusing(f"{path}: tensor {name!r} cannot be read"):
      return opened.get_tensor(name).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(pick, abstract_params)
