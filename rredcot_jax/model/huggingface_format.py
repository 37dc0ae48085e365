"""Hugging Face's format of Llama, Qwen2 and Qwen3 checkpoints, as reading and writing share it: config.json and names.

Options that the decoder does not compute (sliding windows, other activations, other biases) are refused, not ignored.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from rredcot_jax.model import decoder
from rredcot_jax.model.config import ModelConfig, RopeScaling
from rredcot_jax.model.source import MOST_LAYERS, Fields, read_json

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

TOP = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
BLOCK = {
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
TRANSPOSED = ("query", "key", "value", "out", "gate", "up", "down")
# Fields of config.json and the values that the decoder computes. The first value is the default of a missing field.
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
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


# ---- config.json ------------------------------------------------------------------------------


def parse_config(path: pathlib.Path) -> ModelConfig:
  """Sizes from a config.json, older and newer spellings of the RoPE fields alike.

  Raises:
    ValueError: naming the file and the field that is missing, of a wrong type
      or size, or not covered.
  """
  raw = read_json(path)
  fields, kind = Fields(path, raw), raw.get("model_type")
  if kind not in tuple(ARCHITECTURES):
    raise ValueError(f"{path}: model_type={kind!r:.80} is not supported: {', '.join(ARCHITECTURES)} are.")
  covered = dict(_COVERED)
  if "use_sliding_window" not in raw:  # Without the switch the window is used.
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
    # Its absence means no groups in Llama's config. In Qwen's it means a fixed number that fits no model: refused.
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


def describe_config(config: ModelConfig, dtype: Any, tokenizer: Any) -> dict[str, Any]:
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
    if not options.get("attention_factor", 1):  # 0 stands for YaRN's own factor, as does a missing field.
      del options["attention_factor"]
    described["rope_scaling"] = {
      "rope_type": scaling.kind,
      "factor": scaling.factor,
      "original_max_position_embeddings": scaling.original_max_positions,
      **options,
    }
  for name in ("bos", "eos", "pad"):  # It is always written, because some architectures have defaults of their own.
    if tokenizer is not None:
      described[f"{name}_token_id"] = getattr(tokenizer, f"{name}_token_id")
  return described


# ---- Names -----------------------------------------------------------------------------------


def tensors(config: ModelConfig, params: decoder.Params) -> Iterator[tuple[str, tuple, Any, int | None]]:
  """(Hugging Face's name, our path, leaf, layer or None) of every tensor, layer by layer."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  for key_path, leaf in leaves:
    if not is_block(key_path):
      yield TOP[last(key_path)], key_path, leaf, None
  for layer in range(config.num_layers):
    for key_path, leaf in leaves:
      if is_block(key_path):
        yield f"model.layers.{layer}.{BLOCK[last(key_path)]}", key_path, leaf, layer


def stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape there of what has `shape` here (without the layer axis)."""
  if name in ("query", "key", "value"):
    return (shape[1] * shape[2], shape[0])
  if name == "out":
    return (shape[2], shape[0] * shape[1])
  if name.endswith("_bias"):
    return (shape[0] * shape[1],)
  return shape[::-1] if name in TRANSPOSED else shape


def last(key_path: tuple) -> str:
  return str(key_path[-1].key)


def is_block(key_path: tuple) -> bool:
  return str(key_path[0].key) == "blocks"
