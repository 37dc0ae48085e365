"""(config, params) -> a directory that transformers loads."""

import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from rredcot_jax.model import decoder
from rredcot_jax.model import huggingface_format as fmt
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.model.source import read_json
from rredcot_jax.model.tokenizer import GENERATION, generation_ends
from rredcot_jax.report import files

_SHARD_BYTES = 5 * 10**9
_TEMPLATE = "chat_template.jinja"


def save(
  config: ModelConfig,
  params: decoder.Params,
  directory: str | os.PathLike,
  *,
  tokenizer: Any = None,
  companions: str | os.PathLike | None = None,
  end_ids: Sequence[int] = (),
  shard_bytes: int = _SHARD_BYTES,
) -> None:
  """Writes a checkpoint that transformers loads, shard by shard, in the parameters' dtype.

  Args:
    config, params: the model.
    directory: made if it is not there. The index is written last, so that an interrupted
      save is not mistaken for a checkpoint.
    tokenizer: written beside it, if given, and its special tokens into config.json.
    companions: a directory whose config.json, generation_config.json and chat template are
      taken over instead of written anew: the checkpoint that the model started from.
    end_ids: all ids that end a trace, for generation_config.json, see `tokenizer.end_ids`. Those of the
      tokenizer and of the companions are written there in any case.
    shard_bytes: the most that one shard holds, unless one tensor is larger.

  Raises:
    ValueError: if no architecture has these sizes, or if the companions' config
      describes another model.
  """
  directory = pathlib.Path(directory)
  described = fmt.describe_config(config, jax.tree.leaves(params)[0].dtype, tokenizer)
  if companions is not None:
    described = _taken_over(pathlib.Path(companions) / "config.json", config, described)
  generation = _generation(companions, tokenizer, end_ids)
  directory.mkdir(parents=True, exist_ok=True)
  for stale in (fmt.INDEX, fmt.SINGLE):
    (directory / stale).unlink(missing_ok=True)
  flat = {name: (key_path, leaf, layer) for name, key_path, leaf, layer in fmt.tensors(config, params)}
  shards: list[list[str]] = [[]]
  sizes = [0]
  for name, (_, leaf, layer) in flat.items():
    size = leaf.size * leaf.dtype.itemsize // (config.num_layers if layer is not None else 1)
    if shards[-1] and sizes[-1] + size > shard_bytes:
      shards.append([])
      sizes.append(0)
    shards[-1].append(name)
    sizes[-1] += size
  shard_files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
  for file, names in zip(shard_files, shards):
    tensors = {name: _to_hf(*flat[name]) for name in names}
    with files.replacing(directory / file) as temporary:
      safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
  _write_json(directory / "config.json", described)
  if generation:
    _write_json(directory / GENERATION, generation)
  if companions is not None and pathlib.Path(companions).resolve() != directory.resolve():
    if (pathlib.Path(companions) / _TEMPLATE).is_file():
      shutil.copyfile(pathlib.Path(companions) / _TEMPLATE, directory / _TEMPLATE)
  if tokenizer is not None:
    tokenizer.save_pretrained(directory)
  where = {name: file for file, names in zip(shard_files, shards) for name in names}
  _write_json(directory / fmt.INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": where})


def _to_hf(key_path: tuple, leaf: jax.Array, layer: int | None) -> np.ndarray:
  array = np.asarray(leaf if layer is None else leaf[layer])
  shape = fmt.stored_shape(fmt.last(key_path), array.shape)
  if fmt.last(key_path) in fmt.TRANSPOSED:
    return np.ascontiguousarray(array.reshape(shape[::-1]).T)
  return array.reshape(shape)


def _taken_over(path: pathlib.Path, config: ModelConfig, described: dict[str, Any]) -> dict[str, Any]:
  """The config.json that a model started from, with the dtype of what is saved."""
  if fmt.parse_config(path) != config:
    raise ValueError(f"{path} describes another model than the one that is saved: {config}.")
  kept = {name: value for name, value in read_json(path).items() if name not in ("dtype", "torch_dtype")}
  return kept | {"torch_dtype": described["torch_dtype"]}


def _generation(companions: str | os.PathLike | None, tokenizer: Any, end_ids: Sequence[int]) -> dict[str, Any]:
  """The contents of generation_config.json: those of the companions, and every id that ends a trace."""
  inherited = None if companions is None else pathlib.Path(companions) / GENERATION
  kept, ends = {}, [] if tokenizer is None else [int(tokenizer.eos_token_id)]
  if inherited is not None and inherited.is_file():
    kept = read_json(inherited)
    ends += generation_ends(inherited)
  ends = list(dict.fromkeys([*ends, *end_ids]))
  named = ("bos", "pad") if tokenizer is not None else ()
  special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in named}
  return special | kept | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  files.write_whole(path, json.dumps(value, indent=1))
