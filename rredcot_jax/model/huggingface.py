"""Checkpoints of others -> (config, params), one tensor at a time.

Reads a directory of safetensors shards with its config.json, or a GGUF file, of the Llama, Qwen2 and
Qwen3 architectures. Names and shapes are checked before anything is allocated. Then a tensor is read,
turned to our layout, put into its place in the stack of layers on its devices, and dropped: beside the
parameters themselves the host holds one tensor. export.py is the way back.
"""

import functools
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from rredcot_jax.model import decoder, gguf
from rredcot_jax.model import huggingface_format as fmt
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.model.source import MOST_LAYERS, Source, open_safetensors, read_json
from rredcot_jax.parallel import sharding

_STORED = ("F64", "F32", "F16", "BF16")
# A model has at most `MOST_LAYERS` layers of twelve tensors.
_MOST_TENSORS, _MOST_SHARDS = 16 * MOST_LAYERS, 4096
_MOST_INDEX = 2**25  # Bytes.


def load_config(path: str | os.PathLike) -> ModelConfig:
  """The sizes of a checkpoint: a directory with a config.json, or a GGUF file.

  Raises:
    FileNotFoundError: if there is no such directory, config.json or file.
    ValueError: naming the file and the field that the decoder does not cover.
  """
  return _open(pathlib.Path(path))[0]


def load(
  path: str | os.PathLike, *, dtype: DTypeLike = jnp.float32, mesh: jax.sharding.Mesh | None = None
) -> tuple[ModelConfig, decoder.Params]:
  """Parameters of a checkpoint, placed as `sharding.infer` says.

  Args:
    path: a directory in Hugging Face's format, or a `.gguf` file.
    dtype: of the parameters in memory.
    mesh: where they go; None puts them on the default device.

  Returns:
    The model's sizes and its parameters, as `decoder.init` lays them out.

  Raises:
    FileNotFoundError: naming the file or shard that is missing.
    ValueError: naming the file and the tensor that is missing, unknown, damaged
      or of another shape than config.json says.
  """
  config, source = _open(pathlib.Path(path))
  # A forged config may name any shape, so nothing is allocated before the tensors are known to have that shape.
  abstract = jax.eval_shape(functools.partial(decoder.init, config), jax.random.key(0))
  _check(config, abstract, source)
  mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
  placement = sharding.infer(mesh, abstract)

  def fill(key_path: tuple, leaf: jax.ShapeDtypeStruct, place: jax.sharding.NamedSharding) -> jax.Array:
    name = fmt.last(key_path)
    if not fmt.is_block(key_path):
      return _put(source.read(fmt.TOP[name]), name, leaf.shape, dtype, place)
    whole = jax.jit(functools.partial(jnp.zeros, leaf.shape, dtype), out_shardings=place)()
    of_layer = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*place.spec[1:]))
    for layer in range(config.num_layers):
      array = source.read(f"model.layers.{layer}.{fmt.BLOCK[name]}")
      whole = _write_layer(whole, _put(array, name, leaf.shape[1:], dtype, of_layer), layer)
    return whole

  return config, jax.tree_util.tree_map_with_path(fill, abstract, placement)


@functools.partial(jax.jit, donate_argnums=0)
def _write_layer(whole: jax.Array, one: jax.Array, layer: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(whole, one, layer, 0)


def _put(
  array: np.ndarray, name: str, shape: tuple[int, ...], dtype: DTypeLike, place: jax.sharding.NamedSharding
) -> jax.Array:
  """A tensor in our layout on its devices; each process puts only what its own devices hold."""
  array = (array.T if name in fmt.TRANSPOSED else array).reshape(shape).astype(dtype)
  return jax.make_array_from_callback(shape, place, lambda index: np.ascontiguousarray(array[index]))


def _open(path: pathlib.Path) -> tuple[ModelConfig, Source]:
  if path.suffix == ".gguf":
    file = gguf.GgufFile(path)
    return file.model_config(), file
  if not path.is_dir():
    raise FileNotFoundError(f"no checkpoint at {str(path)!r}: give a directory with config.json, or a .gguf file.")
  if not (path / "config.json").is_file():
    raise FileNotFoundError(f"no checkpoint in {str(path)!r}: the file 'config.json' is missing there.")
  return fmt.parse_config(path / "config.json"), _Safetensors(path)


def _check(config: ModelConfig, abstract: decoder.Params, source: Source) -> None:
  """Refuses a source that does not hold exactly this model."""
  there, head, embedding = source.shapes(), fmt.TOP["head"], fmt.TOP["embedding"]
  wanted = {
    name: fmt.stored_shape(fmt.last(key_path), leaf.shape if layer is None else leaf.shape[1:])
    for name, key_path, leaf, layer in fmt.tensors(config, abstract)
  }
  missing = [name for name in wanted if name not in there]
  if missing:
    raise ValueError(
      f"{source.file(missing[0])}: tensor {missing[0]!r} is missing ({len(missing)} of {len(wanted)} are)."
    )
  twice = config.tied_embeddings and head in there  # A tied head is often written to the file too.
  if twice:
    wanted[head] = wanted[embedding]
  for name, shape in there.items():
    if name.endswith("rotary_emb.inv_freq"):  # Old checkpoints hold the rotary table, which we compute instead.
      continue
    if name not in wanted:
      raise ValueError(f"{source.file(name)}: tensor {name!r} has no place in this architecture; it is not ignored.")
    if shape != wanted[name]:
      raise ValueError(f"{source.file(name)}: tensor {name!r} is {shape} and the config says {wanted[name]}.")
  if twice and not np.array_equal(source.read(head), source.read(embedding)):
    raise ValueError(
      f"{source.file(head)}: tensor {head!r} differs from {embedding!r}, and the config says that they are one."
    )


class _Safetensors:
  """A directory of safetensors shards, mapped, not read."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    placed: dict[str, str] = {}
    if (path / fmt.SINGLE).is_file():  # Where both are there, transformers takes this one.
      shards = [fmt.SINGLE]
    elif (path / fmt.INDEX).is_file():
      placed = self._weight_map()
      shards = sorted(set(placed.values()))
    else:
      raise FileNotFoundError(f"no weights in {str(path)!r}: neither {fmt.SINGLE!r} nor {fmt.INDEX!r} is there.")
    self._files: dict[str, Any] = {}
    self._where: dict[str, str] = {}
    for shard in shards:
      self._add(shard)
    for name, shard in placed.items():
      if self._where.get(name) != shard:
        raise ValueError(f"{path / shard}: tensor {name!r} is missing, though {fmt.INDEX} places it there.")

  def shapes(self) -> dict[str, tuple[int, ...]]:
    found = {}
    for name, shard in self._where.items():
      tensor = self._files[shard].get_slice(name)
      if tensor.get_dtype() not in _STORED:
        raise ValueError(
          f"{self.file(name)}: tensor {name!r} is stored as {tensor.get_dtype()}, which is not supported: "
          f"{', '.join(_STORED)} are."
        )
      found[name] = tuple(tensor.get_shape())
    return found

  def file(self, name: str) -> pathlib.Path:
    return self._path / self._where.get(name, "")

  def read(self, name: str) -> np.ndarray:
    return self._files[self._where[name]].get_tensor(name)

  def _weight_map(self) -> dict[str, str]:
    index = self._path / fmt.INDEX
    placed = read_json(index, most=_MOST_INDEX).get("weight_map")
    # An index may come from anywhere, so it may only name files of its own directory.
    if not isinstance(placed, dict) or not placed or not all(_is_file_name(shard) for shard in placed.values()):
      raise ValueError(f"{index}: 'weight_map' must give each tensor the name of a file beside it.")
    shards = sorted(set(placed.values()))
    if len(shards) > _MOST_SHARDS:
      raise ValueError(f"{index} names {len(shards)} files; at most {_MOST_SHARDS} are opened.")
    for shard in shards:
      if not (self._path / shard).is_file():
        raise FileNotFoundError(f"{index} names the shard {shard!r}, which is missing in {str(self._path)!r}.")
    return placed

  def _add(self, shard: str) -> None:
    path = self._path / shard
    opened = open_safetensors(path)
    names = opened.keys()
    if len(self._where) + len(names) > _MOST_TENSORS:
      raise ValueError(f"{path}: the checkpoint has more than {_MOST_TENSORS} tensors, which no model has.")
    for name in names:
      if name in self._where:
        raise ValueError(f"{path}: tensor {name!r} is also in {self._where[name]!r}.")
      self._where[name] = shard
    self._files[shard] = opened


def _is_file_name(value: Any) -> bool:
  if not isinstance(value, str) or not value.isprintable():
    return False
  return value not in ("", "..") and value == pathlib.PurePath(value).name
