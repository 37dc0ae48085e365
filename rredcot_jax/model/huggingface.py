"""Hugging Face checkpoints <-> (config, params), one tensor at a time.

Reads a directory of safetensors shards with its config.json, or a GGUF file,
of the Llama, Qwen2 and Qwen3 architectures; writes a directory that
transformers loads. Names and shapes are checked before anything is allocated;
then a tensor is read, turned to our layout, put into its place in the stack of
layers on its devices, and dropped: beside the parameters themselves the host
holds one tensor. What the decoder does not compute (sliding windows, other
activations, biases elsewhere) is refused, never ignored.
"""

import functools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.typing import DTypeLike

from rredcot_jax.model import decoder, gguf
from rredcot_jax.model.config import ModelConfig, RopeScaling
from rredcot_jax.model.source import MOST_LAYERS, Fields, Source
from rredcot_jax.parallel import sharding
from rredcot_jax.report import files

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
# Fields of config.json and the values that the decoder computes, the first of them what their absence means.
_COVERED: dict[str, tuple] = {
  "hidden_act": ("silu",),
  "attention_bias": (False, None),
  "mlp_bias": (False, None),
  "quantization_config": (None,),
  "partial_rotary_factor": (1, None),
  "use_sliding_window": (False, None),
}
# RoPE options beside the factor and the context, needed or not.
_ROPE_OPTIONS = {
  "default": (),
  "llama3": ("low_freq_factor", "high_freq_factor"),
  "yarn": ("beta_fast", "beta_slow", "attention_factor"),
}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHARD_BYTES = 5 * 10**9
_STORED = ("F64", "F32", "F16", "BF16")
# What of a checkpoint belongs to it beside its weights and its config.json.
_COMPANIONS = ("generation_config.json", "chat_template.jinja")


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
  # A forged config may ask for any shape: nothing is allocated before the tensors are known to have it.
  abstract = jax.eval_shape(functools.partial(decoder.init, config), jax.random.key(0))
  _check(config, abstract, source)
  mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
  placement = sharding.infer(mesh, abstract)

  def fill(key_path: tuple, leaf: jax.ShapeDtypeStruct, place: jax.sharding.NamedSharding) -> jax.Array:
    name = _last(key_path)
    if not _is_block(key_path):
      return _put(source.read(_TOP[name]), name, leaf.shape, dtype, place)
    whole = jax.jit(functools.partial(jnp.zeros, leaf.shape, dtype), out_shardings=place)()
    of_layer = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*place.spec[1:]))
    for layer in range(config.num_layers):
      array = source.read(f"model.layers.{layer}.{_BLOCK[name]}")
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
  array = (array.T if name in _TRANSPOSED else array).reshape(shape).astype(dtype)
  return jax.make_array_from_callback(shape, place, lambda index: np.ascontiguousarray(array[index]))


def _open(path: pathlib.Path) -> tuple[ModelConfig, Source]:
  if path.suffix == ".gguf":
    file = gguf.GgufFile(path)
    return file.model_config(), file
  if not path.is_dir():
    raise FileNotFoundError(f"no checkpoint at {str(path)!r}: give a directory with config.json, or a .gguf file.")
  if not (path / "config.json").is_file():
    raise FileNotFoundError(f"no checkpoint in {str(path)!r}: the file 'config.json' is missing there.")
  return parse_config(path / "config.json"), _Safetensors(path)


def _check(config: ModelConfig, abstract: decoder.Params, source: Source) -> None:
  """Refuses a source that does not hold exactly this model."""
  there, head, embedding = source.shapes(), _TOP["head"], _TOP["embedding"]
  wanted = {
    name: _hf_shape(_last(key_path), leaf.shape if layer is None else leaf.shape[1:])
    for name, key_path, leaf, layer in _tensors(config, abstract)
  }
  missing = [name for name in wanted if name not in there]
  if missing:
    raise ValueError(
      f"{source.file(missing[0])}: tensor {missing[0]!r} is missing ({len(missing)} of {len(wanted)} are)."
    )
  twice = config.tied_embeddings and head in there  # A tied head is often written all the same.
  if twice:
    wanted[head] = wanted[embedding]
  for name, shape in there.items():
    if name.endswith("rotary_emb.inv_freq"):  # Old checkpoints carry the rotary table, which is computed here.
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
    if (path / _SINGLE).is_file():  # Where both are there, transformers takes this one.
      shards = [_SINGLE]
    elif (path / _INDEX).is_file():
      placed = self._weight_map()
      shards = sorted(set(placed.values()))
    else:
      raise FileNotFoundError(f"no weights in {str(path)!r}: neither {_SINGLE!r} nor {_INDEX!r} is there.")
    self._files = {shard: self._open(shard) for shard in shards}
    self._where = {name: shard for shard, file in self._files.items() for name in file.keys()}
    for name, shard in placed.items():
      if self._where.get(name) != shard:
        raise ValueError(f"{path / shard}: tensor {name!r} is missing, though {_INDEX} places it there.")

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
    index = self._path / _INDEX
    placed = _read_json(index).get("weight_map")
    # An index may come from anywhere: it names files of its own directory.
    if not isinstance(placed, dict) or not placed or not all(_is_file_name(shard) for shard in placed.values()):
      raise ValueError(f"{index}: 'weight_map' must give each tensor the name of a file beside it.")
    for shard in sorted(set(placed.values())):
      if not (self._path / shard).is_file():
        raise FileNotFoundError(f"{index} names the shard {shard!r}, which is missing in {str(self._path)!r}.")
    return placed

  def _open(self, shard: str) -> Any:
    try:
      return safetensors.safe_open(self._path / shard, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
      raise ValueError(f"{self._path / shard} is not a whole safetensors file: {error}") from error


def _is_file_name(value: Any) -> bool:
  return isinstance(value, str) and value not in ("", "..") and value == pathlib.PurePath(value).name


def parse_config(path: pathlib.Path) -> ModelConfig:
  """Sizes from a config.json, older and newer spellings of the RoPE fields alike.

  Raises:
    ValueError: naming the file and the field that is missing, of a wrong type
      or size, or not covered.
  """
  raw = _read_json(path)
  fields, kind = Fields(path, raw), raw.get("model_type")
  if kind not in tuple(ARCHITECTURES):
    raise ValueError(f"{path}: model_type={kind!r:.80} is not supported: {', '.join(ARCHITECTURES)} are.")
  covered = dict(_COVERED)
  if "use_sliding_window" not in raw:  # Without the switch a window is meant.
    covered["sliding_window"] = (None,)
  for field, values in covered.items():
    if raw.get(field, values[0]) not in values:
      raise ValueError(f"{path}: {field}={raw[field]!r:.80} is not supported by this decoder (only {values[0]!r} is).")
  layers = raw.get("layer_types") or []
  if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
    raise ValueError(f"{path}: layer_types other than 'full_attention' (a sliding window) are not supported.")
  tied = raw.get("tie_word_embeddings", False)
  if not isinstance(tied, bool):
    raise ValueError(f"{path}: tie_word_embeddings={tied!r:.80} must be true or false.")
  width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
  if "head_dim" not in fields.values and kind != "qwen3" and width % heads:
    raise ValueError(f"{path}: hidden_size={width} must be a multiple of num_attention_heads={heads}.")
  rope = _rope_fields(fields)
  return fields.build(
    ModelConfig,
    vocab_size=fields.integer("vocab_size"),
    width=width,
    num_layers=fields.integer("num_hidden_layers", most=MOST_LAYERS),
    num_heads=heads,
    # Left out, it means no groups in Llama's config, and in Qwen's a number that has nothing to do with the model.
    num_kv_heads=fields.integer(
      "num_key_value_heads", heads if kind == "llama" or "num_key_value_heads" in raw else None
    ),
    # Qwen3's own default is 128, whatever the width.
    head_dim=fields.integer("head_dim", 128 if kind == "qwen3" else width // heads),
    mlp_width=fields.integer("intermediate_size"),
    rope_theta=rope.number("rope_theta", 10_000.0),
    rope_scaling=_rope_scaling(rope),
    norm_epsilon=fields.number("rms_norm_eps", 1e-6),
    qkv_bias=kind == "qwen2",
    qk_norm=kind == "qwen3",
    tied_embeddings=tied,
    max_positions=fields.integer("max_position_embeddings", 0),
  )


def _rope_fields(fields: Fields) -> Fields:
  """The RoPE options of a config.json, those that older ones keep at the top included."""
  raw = fields.values
  rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # In transformers' order.
  if not isinstance(rope, dict):
    raise ValueError(f"{fields.path}: the RoPE options {rope!r:.80} are no JSON object.")
  context = {
    "original_max_position_embeddings": raw.get("max_position_embeddings"),
    "rope_theta": raw.get("rope_theta"),
  }
  return Fields(fields.path, context | {name: value for name, value in rope.items() if value is not None})


def _rope_scaling(rope: Fields) -> RopeScaling | None:
  kind = rope.values.get("rope_type", rope.values.get("type", "default"))
  if kind not in tuple(_ROPE_OPTIONS):
    raise ValueError(f"{rope.path}: RoPE type {kind!r:.80} is not supported: {', '.join(_ROPE_OPTIONS)} are.")
  known = {"rope_type", "type", "rope_theta", "original_max_position_embeddings", *_ROPE_OPTIONS[kind]}
  neutral = {"partial_rotary_factor": 1, "truncate": True}
  if kind != "default":
    known.add("factor")
  for name, value in rope.values.items():
    if name not in known and neutral.get(name) != value:
      raise ValueError(f"{rope.path}: the RoPE option {name}={value!r:.80} is not supported with type {kind!r}.")
  if kind == "default":
    return None
  needed = _ROPE_OPTIONS["llama3"]
  return rope.build(
    RopeScaling,
    kind=kind,
    factor=rope.number("factor"),
    original_max_positions=rope.integer("original_max_position_embeddings"),
    **{name: rope.number(name) for name in _ROPE_OPTIONS[kind] if name in rope.values or name in needed},
  )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, OSError, RecursionError) as error:
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
    tokenizer: written beside it, if given, and its special tokens into config.json.
    companions: a directory whose config.json and generation_config.json are
      taken over instead of written anew: the checkpoint that the model started from.
    shard_bytes: the most that one shard holds, unless one tensor is larger.

  Raises:
    ValueError: if no architecture has these sizes, or if the companions' config
      describes another model.
  """
  directory = pathlib.Path(directory)
  described = _config_json(config, jax.tree.leaves(params)[0].dtype, tokenizer)
  if companions is not None:
    described = _taken_over(pathlib.Path(companions) / "config.json", config, described)
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
  shard_files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
  for file, names in zip(shard_files, shards):
    tensors = {name: _to_hf(*flat[name]) for name in names}
    with files.replacing(directory / file) as temporary:
      safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
  _write_json(directory / "config.json", described)
  if companions is not None and pathlib.Path(companions).resolve() != directory.resolve():
    for name in _COMPANIONS:
      if (pathlib.Path(companions) / name).is_file():
        shutil.copyfile(pathlib.Path(companions) / name, directory / name)
  if tokenizer is not None:
    tokenizer.save_pretrained(directory)
  where = {name: file for file, names in zip(shard_files, shards) for name in names}
  _write_json(directory / _INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": where})


def _to_hf(key_path: tuple, leaf: jax.Array, layer: int | None) -> np.ndarray:
  array = np.asarray(leaf if layer is None else leaf[layer])
  shape = _hf_shape(_last(key_path), array.shape)
  if _last(key_path) in _TRANSPOSED:
    return np.ascontiguousarray(array.reshape(shape[::-1]).T)
  return array.reshape(shape)


def _config_json(config: ModelConfig, dtype: Any, tokenizer: Any) -> dict[str, Any]:
  if config.qk_norm and config.qkv_bias:
    raise ValueError("no supported architecture has both qk_norm and qkv_bias; the checkpoint cannot be written.")
  kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
  described: dict[str, Any] = {
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
    "rope_theta": config.rope_theta,
    "rope_scaling": None,
    "attention_bias": False,
    "tie_word_embeddings": config.tied_embeddings,
    "torch_dtype": str(dtype),
  }
  if config.max_positions:
    described["max_position_embeddings"] = config.max_positions
  if config.rope_scaling is not None:
    scaling = config.rope_scaling
    options = {name: getattr(scaling, name) for name in _ROPE_OPTIONS[scaling.kind]}
    if not options.get("attention_factor", 1):  # 0 is YaRN's own, which is what its absence means.
      del options["attention_factor"]
    described["rope_scaling"] = {
      "rope_type": scaling.kind,
      "factor": scaling.factor,
      "original_max_position_embeddings": scaling.original_max_positions,
      **options,
    }
  for name in ("bos", "eos", "pad"):  # Absent, some architectures would take numbers of their own.
    if tokenizer is not None:
      described[f"{name}_token_id"] = getattr(tokenizer, f"{name}_token_id")
  return described


def _taken_over(path: pathlib.Path, config: ModelConfig, described: dict[str, Any]) -> dict[str, Any]:
  """The config.json that a model started from, with the dtype of what is saved."""
  if parse_config(path) != config:
    raise ValueError(f"{path} describes another model than the one that is saved: {config}.")
  kept = {name: value for name, value in _read_json(path).items() if name not in ("dtype", "torch_dtype")}
  return kept | {"torch_dtype": described["torch_dtype"]}


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  files.write_whole(path, json.dumps(value, indent=1))


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
