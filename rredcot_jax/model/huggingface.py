"""Hugging Face checkpoints <-> (config, params), one tensor at a time.

Reads a directory of safetensors shards with its config.json, or a GGUF file,
of the Llama, Qwen2 and Qwen3 architectures; writes a directory that
transformers loads. A tensor is read, turned to our layout, put into its place
in the stack of layers on its devices, and dropped: beside the parameters
themselves the host holds one tensor. What the decoder does not compute
(sliding windows, other activations, biases elsewhere) is refused, never
ignored.
"""

import functools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.typing import DTypeLike

from rredcot_jax import sharding
from rredcot_jax.model import decoder
from rredcot_jax.model.config import ModelConfig, RopeScaling

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_TOP = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
_BLOCK = {
  "attention_norm": "input_layernorm.weight",
  "query": "self_attn.q_proj.weight",
  "key": "self_attn.k_proj.weight",
  "value": "self_attn.v_proj.weight",
  "out": "self_attn.o_proj.weight",
  "query_bias": "self_attn.q_proj.bias",
  "key_bias": "self_attn.k_proj.bias",
  "value_bias": "self_attn.v_proj.bias",
  "query_norm": "self_attn.q_norm.weight",
  "key_norm": "self_attn.k_norm.weight",
  "mlp_norm": "post_attention_layernorm.weight",
  "gate": "mlp.gate_proj.weight",
  "up": "mlp.up_proj.weight",
  "down": "mlp.down_proj.weight",
}
# Projections are [out, in] there and [in, ..., out] here.
_TRANSPOSED = ("query", "key", "value", "out", "gate", "up", "down")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHARD_BYTES = 5 * 10**9
# What of a checkpoint belongs to it beside its weights.
_COMPANIONS = ("config.json", "generation_config.json", "chat_template.jinja")


class Source(Protocol):
  """Where tensors come from, by their Hugging Face names."""

  path: pathlib.Path

  def names(self) -> set[str]:
    """The tensors that are there."""
    ...

  def read(self, name: str) -> np.ndarray:
    """One tensor, as transformers would hold it."""
    ...


# ---- Reading ---------------------------------------------------------------------------------


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
  abstract = jax.eval_shape(functools.partial(decoder.init, config), jax.random.key(0))
  _check_names(config, source, set(_names(config, abstract)))
  mesh = mesh or jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"))
  placement = sharding.infer(mesh, abstract)

  def fill(key_path: tuple, leaf: jax.ShapeDtypeStruct, place: jax.sharding.NamedSharding) -> jax.Array:
    if not _is_block(key_path):
      return _put(_read(source, _TOP[_last(key_path)], key_path, leaf.shape), dtype, place)
    whole = jax.jit(functools.partial(jnp.zeros, leaf.shape, dtype), out_shardings=place)()
    spec = jax.sharding.PartitionSpec(*place.spec[1:])
    for layer in range(config.num_layers):
      name = f"model.layers.{layer}.{_BLOCK[_last(key_path)]}"
      one = _put(
        _read(source, name, key_path, leaf.shape[1:]), dtype, jax.sharding.NamedSharding(mesh, spec)
      )  # fmt: skip
      whole = _write_layer(whole, one, layer)
    return whole

  return config, jax.tree_util.tree_map_with_path(fill, abstract, placement)


@functools.partial(jax.jit, donate_argnums=0)
def _write_layer(whole: jax.Array, one: jax.Array, layer: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(whole, one, layer, 0)


def _put(array: np.ndarray, dtype: DTypeLike, place: jax.sharding.NamedSharding) -> jax.Array:
  """A host array on its devices; each process puts only what its own devices hold."""
  array = array.astype(dtype)
  return jax.make_array_from_callback(array.shape, place, lambda index: np.ascontiguousarray(array[index]))


def _read(source: Source, name: str, key_path: tuple, shape: tuple[int, ...]) -> np.ndarray:
  """A tensor in our layout."""
  array = source.read(name)
  expected = _hf_shape(_last(key_path), shape)
  if array.shape != expected:
    raise ValueError(f"{source.path}: tensor {name!r} is {array.shape} and the config says {expected}.")
  return (array.T if _last(key_path) in _TRANSPOSED else array).reshape(shape)


def _open(path: pathlib.Path) -> tuple[ModelConfig, Source]:
  if path.suffix == ".gguf":
    from rredcot_jax.model import gguf

    file = gguf.GgufFile(path)
    return file.model_config(), file
  if not path.is_dir():
    raise FileNotFoundError(f"no checkpoint at {str(path)!r}: give a directory with config.json, or a .gguf file.")
  if not (path / "config.json").is_file():
    raise FileNotFoundError(f"no checkpoint in {str(path)!r}: the file 'config.json' is missing there.")
  return parse_config(path / "config.json"), _Safetensors(path)


def _check_names(config: ModelConfig, source: Source, wanted: set[str]) -> None:
  there = source.names()
  missing = sorted(wanted - there)
  if missing:
    raise ValueError(f"{source.path}: tensor {missing[0]!r} is missing ({len(missing)} of {len(wanted)} are).")
  # A tied head is often written twice; old checkpoints carry the rotary table, which is computed here.
  ignored = {"lm_head.weight"} if config.tied_embeddings else set()
  unknown = sorted(name for name in there - wanted - ignored if not name.endswith("rotary_emb.inv_freq"))
  if unknown:
    raise ValueError(f"{source.path}: tensor {unknown[0]!r} has no place in this architecture; it is not ignored.")


class _Safetensors:
  """A directory of safetensors shards, opened as they are needed and mapped, not read."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    index = path / _INDEX
    if index.is_file():
      self._where: dict[str, str] = _read_json(index).get("weight_map", {})
      if not self._where:
        raise ValueError(f"{index} has no 'weight_map'.")
      for shard in sorted(set(self._where.values())):
        if not (path / shard).is_file():
          raise FileNotFoundError(f"{index} names the shard {shard!r}, which is missing in {str(path)!r}.")
    elif (path / _SINGLE).is_file():
      self._where = dict.fromkeys(self._open(_SINGLE).keys(), _SINGLE)
    else:
      raise FileNotFoundError(f"no weights in {str(path)!r}: neither {_SINGLE!r} nor {_INDEX!r} is there.")

  def names(self) -> set[str]:
    return set(self._where)

  def read(self, name: str) -> np.ndarray:
    shard = self._where[name]
    file = self._open(shard)
    if name not in file.keys():  # noqa: SIM118: a safetensors file is no dict.
      raise ValueError(f"{self.path / shard}: tensor {name!r} is missing, though {_INDEX} places it there.")
    return file.get_tensor(name)

  def _open(self, shard: str) -> Any:
    try:
      return safetensors.safe_open(self.path / shard, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
      raise ValueError(f"{self.path / shard} is not a whole safetensors file: {error}") from error


def parse_config(path: pathlib.Path) -> ModelConfig:
  """Sizes from a config.json, older and newer spellings of the RoPE fields alike.

  Raises:
    ValueError: naming the file and the field that is missing or not covered.
  """
  raw = _read_json(path)
  kind = raw.get("model_type")
  if kind not in ARCHITECTURES:
    raise ValueError(f"{path}: model_type {kind!r} is not supported: {', '.join(ARCHITECTURES)} are.")
  refused = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "use_sliding_window": (False, None),
  }
  if "use_sliding_window" not in raw:  # Without the switch a window is meant.
    refused["sliding_window"] = (None,)
  for field, allowed in refused.items():
    if raw.get(field, allowed[0]) not in allowed:
      raise ValueError(f"{path}: {field}={raw[field]!r} is not supported by this decoder (only {allowed[0]!r} is).")
  if any(layer != "full_attention" for layer in raw.get("layer_types") or ()):
    raise ValueError(f"{path}: layer_types other than 'full_attention' (a sliding window) are not supported.")

  def need(field: str) -> Any:
    if raw.get(field) is None:
      raise ValueError(f"{path} has no {field!r}.")
    return raw[field]

  rope = dict(raw.get("rope_parameters") or {}) or dict(raw.get("rope_scaling") or {})
  theta = rope.pop("rope_theta", raw.get("rope_theta", 10_000.0))
  heads, width = need("num_attention_heads"), need("hidden_size")
  return ModelConfig(
    vocab_size=need("vocab_size"),
    width=width,
    num_layers=need("num_hidden_layers"),
    num_heads=heads,
    num_kv_heads=raw.get("num_key_value_heads") or heads,
    # Qwen3's own default is 128, whatever the width.
    head_dim=raw.get("head_dim") or (128 if kind == "qwen3" else width // heads),
    mlp_width=need("intermediate_size"),
    rope_theta=float(theta),
    rope_scaling=_rope_scaling(path, rope, raw),
    norm_epsilon=raw.get("rms_norm_eps", 1e-6),
    qkv_bias=kind == "qwen2",
    qk_norm=kind == "qwen3",
    tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
    max_positions=raw.get("max_position_embeddings") or 0,
  )


def _rope_scaling(path: pathlib.Path, rope: dict[str, Any], raw: dict[str, Any]) -> RopeScaling | None:
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return None
  if kind not in ("llama3", "yarn"):
    raise ValueError(f"{path}: RoPE type {kind!r} is not supported: default, llama3 and yarn are.")
  known = {"rope_type", "type", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
           "beta_fast", "beta_slow", "attention_factor"}  # fmt: skip
  unknown = sorted(name for name, value in rope.items() if name not in known and value is not None)
  if unknown:
    raise ValueError(f"{path}: the RoPE option {unknown[0]}={rope[unknown[0]]!r} is not supported.")
  context = rope.get("original_max_position_embeddings", raw.get("max_position_embeddings"))
  if rope.get("factor") is None or context is None:
    raise ValueError(f"{path}: RoPE type {kind!r} needs 'factor' and 'original_max_position_embeddings'.")
  names = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
  given = {name: float(rope[name]) for name in names if rope.get(name) is not None}
  return RopeScaling(kind, float(rope["factor"]), int(context), **given)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, OSError) as error:
    raise ValueError(f"{path} is not readable JSON: {error}") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path} holds no JSON object.")
  return value


# ---- Writing ---------------------------------------------------------------------------------


def save(
  config: ModelConfig,
  params: decoder.Params,
  directory: str | os.PathLike,
  *,
  tokenizer: Any = None,
  companions: str | os.PathLike | None = None,
  shard_bytes: int = _SHARD_BYTES,
) -> None:
  """Writes a checkpoint that transformers loads, shard by shard, in the parameters' dtype.

  Args:
    config, params: the model.
    directory: made if it is not there; the index is written last, so that an
      interrupted save cannot be taken for a checkpoint.
    tokenizer: written beside it, if given.
    companions: a directory whose config.json and generation_config.json are
      copied instead of written anew: the checkpoint that the model started from.
    shard_bytes: the most that one shard holds.

  Raises:
    ValueError: if no architecture has these sizes, or if the companions' config
      describes another model.
  """
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  for stale in (_INDEX, _SINGLE):
    (directory / stale).unlink(missing_ok=True)
  flat = {name: (key_path, leaf, layer) for name, key_path, leaf, layer in _tensors(config, params)}
  shards: list[list[str]] = [[]]
  sizes = [0]
  for name, (_, leaf, layer) in flat.items():
    size = leaf.size * leaf.dtype.itemsize // (config.num_layers if layer is not None else 1)
    if shards[-1] and sizes[-1] + size > shard_bytes:
      shards.append([])
      sizes.append(0)
    shards[-1].append(name)
    sizes[-1] += size
  files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
  for file, names in zip(files, shards):
    tensors = {name: _to_hf(*flat[name]) for name in names}
    safetensors.numpy.save_file(tensors, directory / file, metadata={"format": "pt"})
  if companions is None:
    _write_json(directory / "config.json", _config_json(config, jax.tree.leaves(params)[0].dtype))
  else:
    if parse_config(pathlib.Path(companions) / "config.json") != config:
      raise ValueError(f"{companions}/config.json describes another model than the one that is saved: {config}.")
    for name in _COMPANIONS:
      if (pathlib.Path(companions) / name).is_file() and pathlib.Path(companions).resolve() != directory.resolve():
        shutil.copyfile(pathlib.Path(companions) / name, directory / name)
  if tokenizer is not None:
    tokenizer.save_pretrained(directory)
  where = {name: file for file, names in zip(files, shards) for name in names}
  _write_json(directory / _INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": where})


def _to_hf(key_path: tuple, leaf: jax.Array, layer: int | None) -> np.ndarray:
  array = np.asarray(leaf if layer is None else leaf[layer])
  shape = _hf_shape(_last(key_path), array.shape)
  if _last(key_path) in _TRANSPOSED:
    return np.ascontiguousarray(array.reshape(shape[::-1]).T)
  return array.reshape(shape)


def _config_json(config: ModelConfig, dtype: Any) -> dict[str, Any]:
  if config.qk_norm and config.qkv_bias:
    raise ValueError("no supported architecture has both qk_norm and qkv_bias; the checkpoint cannot be written.")
  kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
  rope: dict[str, Any] = {"rope_type": "default"}
  if config.rope_scaling is not None:
    scaling = config.rope_scaling
    names = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_fast", "beta_slow", "attention_factor")}
    rope = {
      "rope_type": scaling.kind,
      "factor": scaling.factor,
      "original_max_position_embeddings": scaling.original_max_positions,
      **{name: getattr(scaling, name) for name in names[scaling.kind] if getattr(scaling, name)},
    }
  return {
    "architectures": [ARCHITECTURES[kind]],
    "model_type": kind,
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "intermediate_size": config.mlp_width,
    "hidden_act": "silu",
    "rms_norm_eps": config.norm_epsilon,
    "max_position_embeddings": config.max_positions or 4096,
    "rope_theta": config.rope_theta,
    "rope_scaling": None if config.rope_scaling is None else rope,
    "attention_bias": False,
    "tie_word_embeddings": config.tied_embeddings,
    "torch_dtype": str(dtype),
  }


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
  os.replace(temporary, path)


# ---- Names -----------------------------------------------------------------------------------


def _tensors(config: ModelConfig, params: decoder.Params) -> Iterator[tuple[str, tuple, Any, int | None]]:
  """(Hugging Face's name, our path, leaf, layer or None) of every tensor, layer by layer."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  for key_path, leaf in leaves:
    if not _is_block(key_path):
      yield _TOP[_last(key_path)], key_path, leaf, None
  for layer in range(config.num_layers):
    for key_path, leaf in leaves:
      if _is_block(key_path):
        yield f"model.layers.{layer}.{_BLOCK[_last(key_path)]}", key_path, leaf, layer


def _names(config: ModelConfig, params: decoder.Params) -> list[str]:
  return [name for name, *_ in _tensors(config, params)]


def _hf_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape there of what has `shape` here (without the layer axis)."""
  if name in ("query", "key", "value"):
    return (shape[1] * shape[2], shape[0])
  if name == "out":
    return (shape[2], shape[0] * shape[1])
  if name.endswith("_bias"):
    return (shape[0] * shape[1],)
  return shape[::-1] if name in _TRANSPOSED else shape


def _last(key_path: tuple) -> str:
  return str(key_path[-1].key)


def _is_block(key_path: tuple) -> bool:
  return str(key_path[0].key) == "blocks"
