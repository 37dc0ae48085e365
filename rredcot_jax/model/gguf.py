"""GGUF files: sizes, tensors and the tokenizer of a Llama, Qwen2 or Qwen3 model.

The `gguf` library undoes the quantisation. This module maps names, and undoes the order of rotary pairs in which
Llama files are stored.
"""

import dataclasses
import os
import pathlib
from typing import Any

import gguf
import numpy as np
import tokenizers
import transformers

from rredcot_jax.model import attention, gguf_reader
from rredcot_jax.model.config import ModelConfig, RopeScaling
from rredcot_jax.model.source import MOST, Fields, refusing

_TOP = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}
_BLOCK = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Llama 3's RoPE scaling is stored as a divisor for each frequency. Only the factor differs among the models.
_ROPE_TABLE = "rope_freqs.weight"
_LLAMA3 = RopeScaling("llama3", 1.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)

# How text is split before the merges, by GGUF's name for it, as in the models' tokenizer.json.
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
  "qwen2": _WORDS.format(digits=""),
  "deepseek-r1-qwen": _WORDS.format(digits=""),
  "llama-bpe": _WORDS.format(digits="{1,3}"),
}
# Files older than May 2024 do not name theirs, or call it "default". They are refused.
_PRE_TOKENIZERS = ("gpt-2", "smollm", *_SPLITS)


class GgufFile:
  """One GGUF file; tensors are mapped and dequantised one at a time."""

  def __init__(self, path: str | os.PathLike):
    """Opens `path`.

    Raises:
      FileNotFoundError: if it is not there.
      ValueError: if it is no whole GGUF file, or of an architecture other than Llama, Qwen2 and Qwen3.
    """
    self.path = pathlib.Path(path)
    if not self.path.is_file():
      raise FileNotFoundError(f"no GGUF file at {str(self.path)!r}.")
    with refusing(f"{self.path} is no GGUF file that can be read"):
      values, tensors = gguf_reader.read(self.path)
    self._fields = Fields(self.path, values)
    self._architecture = self._fields["general.architecture"]
    if self._architecture not in _ARCHITECTURES:
      raise ValueError(
        f"{self.path}: the GGUF architecture {self._architecture!r} is not supported: {', '.join(_ARCHITECTURES)} are."
      )
    self._tensors = {self._hf_name(name): tensor for name, tensor in tensors.items()}
    if len(self._tensors) < len(tensors):
      raise ValueError(f"{self.path}: two of its tensors mean the same place of the model.")

  def model_config(self) -> ModelConfig:
    """The model's sizes, from the file's metadata."""
    prefix = f"{self._architecture}."
    names = (name for name in self._fields.values if name.startswith(prefix))
    fields = Fields(self.path, {name.removeprefix(prefix): self._fields[name] for name in names})
    heads, width = fields.integer("attention.head_count"), fields.integer("embedding_length")
    head_dim = fields.integer("attention.key_length", max(width // heads, 1))
    embedding = self.shapes().get("model.embed_tokens.weight", ())
    if len(embedding) != 2:
      raise ValueError(f"{self.path}: tensor 'token_embd.weight' is missing, or no matrix.")
    for name in ("attention.value_length", "rope.dimension_count"):
      if fields.integer(name, head_dim) != head_dim:
        raise ValueError(f"{self.path}: {name}={fields[name]} other than the head's {head_dim} is not supported.")
    for name in ("attention.sliding_window", "rope.scale_linear", "expert_count"):
      if fields.values.get(name):
        raise ValueError(f"{self.path}: {name}={fields[name]} is not supported by this decoder.")
    config = fields.build(
      ModelConfig,
      vocab_size=embedding[0],
      width=width,
      num_layers=fields.integer("block_count", most=10_000),
      num_heads=heads,
      num_kv_heads=fields.integer("attention.head_count_kv", heads),
      head_dim=head_dim,
      mlp_width=fields.integer("feed_forward_length"),
      rope_theta=fields.number("rope.freq_base", 10_000.0),
      rope_scaling=self._rope_scaling(fields),
      # It is stored as float32. Rounding to six digits restores the decimal number of the original.
      norm_epsilon=float(f"{fields.number('attention.layer_norm_rms_epsilon'):.6g}"),
      qkv_bias=self._architecture == "qwen2",
      qk_norm=self._architecture == "qwen3",
      tied_embeddings="lm_head.weight" not in self._tensors,
      max_positions=fields.integer("context_length"),
    )
    return config if _ROPE_TABLE not in self._tensors else self._with_rope_table(config)

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """The tensors' Hugging Face names and their shapes there."""
    tensors = ((name, tensor) for name, tensor in self._tensors.items() if name != _ROPE_TABLE)
    return {name: tensor.shape for name, tensor in tensors}

  def file(self, name: str) -> pathlib.Path:
    """The path of this file, which holds every tensor."""
    return self.path

  def read(self, name: str) -> np.ndarray:
    """One tensor in float32, in the layout of transformers.

    Raises:
      ValueError: naming the file, the tensor and the quantisation, if the library cannot undo that.
    """
    tensor = self._tensors[name]
    try:
      array = np.asarray(gguf.quants.dequantize(tensor.data, tensor.kind), np.float32)
    except NotImplementedError as error:
      raise ValueError(
        f"{self.path}: tensor {tensor.name!r} has the quantisation {tensor.kind.name}, which is not supported."
      ) from error
    array = array.reshape(tensor.shape)
    if self._architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
      return self._unpermute(array, name)
    return array

  def tokenizer(self) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer that the file carries.

    Raises:
      ValueError: if it is no byte-level BPE, or splits text in a way that is not known here.
    """
    fields = self._fields
    kind, split = fields["tokenizer.ggml.model"], fields.values.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in _PRE_TOKENIZERS:
      raise ValueError(
        f"{self.path}: the tokenizer {kind!r} with pre-tokenizer {split!r} is not supported: byte-level BPE with "
        f"{', '.join(_PRE_TOKENIZERS)} is. Give the directory of the original tokenizer instead."
      )
    with refusing(f"{self.path}: its tokenizer is damaged"):
      return self._byte_level_bpe(fields, split)

  def end_ids(self) -> tuple[int, ...]:
    """The ids that the file calls end of sequence and end of turn, where it has them."""
    found = []
    for name in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"):
      value = self._fields.values.get(name)
      if value is not None:
        if type(value) is not int or not 0 <= value < MOST:
          raise ValueError(f"{self.path}: {name}={value!r:.80} is no token id.")
        found.append(value)
    return tuple(found)

  def _byte_level_bpe(self, fields: Fields, split: str) -> transformers.PreTrainedTokenizerFast:
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    # Llama 3 first looks up the whole word, and merges only if it is not there.
    fast = tokenizers.Tokenizer(
      tokenizers.models.BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=split == "llama-bpe")
    )
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split not in _SPLITS)
    parts: list[Any] = [byte_level]
    if split == "smollm":
      parts.insert(0, tokenizers.pre_tokenizers.Digits(individual_digits=True))
    elif split in _SPLITS:
      parts.insert(0, tokenizers.pre_tokenizers.Split(tokenizers.Regex(_SPLITS[split]), behavior="isolated"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(parts)
    fast.decoder = tokenizers.decoders.ByteLevel()
    if split.endswith(("qwen2", "-qwen")):
      fast.normalizer = tokenizers.normalizers.NFC()
    control, user = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
    for special, wanted in ((True, control), (False, user)):
      added = [token for token, type_ in zip(tokens, types, strict=True) if type_ == wanted]
      fast.add_tokens([tokenizers.AddedToken(t, special=special, normalized=False) for t in added])
    named = {}
    for ours, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
      index = fields.values.get(f"tokenizer.ggml.{name}_token_id")
      if index is not None:
        named[f"{ours}_token"] = tokens[index]
    # llama.cpp also puts this token before a text. A Llama 3 file need not say so.
    frame = {"bos": fields.values.get("tokenizer.ggml.add_bos_token", split == "llama-bpe"),
             "eos": fields.values.get("tokenizer.ggml.add_eos_token", False)}  # fmt: skip
    if any(frame.values()):
      before, after = ([named[f"{name}_token"]] * bool(frame[name]) for name in ("bos", "eos"))
      fast.post_processor = tokenizers.processors.TemplateProcessing(
        single=[*before, "$A", *after], special_tokens=[(token, vocab[token]) for token in {*before, *after}]
      )
    result = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, clean_up_tokenization_spaces=False, **named)
    result.chat_template = fields.values.get("tokenizer.chat_template")
    return result

  def _with_rope_table(self, config: ModelConfig) -> ModelConfig:
    """`config` with the scaling of the file's table of divisors, which must follow Llama 3's rule."""
    table = self.read(_ROPE_TABLE)
    factor = float(table.max(initial=1.0))
    if config.rope_scaling is None and 1 <= factor < 1e4:
      scaled = dataclasses.replace(config, rope_scaling=dataclasses.replace(_LLAMA3, factor=factor))
      divisors = attention.rotary_frequencies(config)[0] / attention.rotary_frequencies(scaled)[0]
      if table.shape == divisors.shape and np.allclose(table, divisors, rtol=1e-4, atol=0):
        return scaled
    raise ValueError(
      f"{self.path}: tensor {_ROPE_TABLE!r} (RoPE scaling as a table) is not Llama 3's, of a context of "
      f"{_LLAMA3.original_max_positions}: load the safetensors checkpoint instead."
    )

  def _rope_scaling(self, fields: Fields) -> RopeScaling | None:
    kind = fields.values.get("rope.scaling.type", "none")
    if kind == "none":
      return None
    if kind != "yarn":
      raise ValueError(f"{self.path}: RoPE type {kind!r} is not supported in a GGUF file: none and yarn are.")
    known = {f"rope.scaling.{name}" for name in ("type", "factor", "original_context_length", "finetuned")}
    for name in fields.values:
      if name.startswith("rope.scaling.") and name not in known:
        raise ValueError(f"{self.path}: {name}={fields[name]} is not supported.")
    return fields.build(
      RopeScaling,
      kind="yarn",
      factor=fields.number("rope.scaling.factor"),
      original_max_positions=fields.integer("rope.scaling.original_context_length"),
    )

  def _unpermute(self, array: np.ndarray, name: str) -> np.ndarray:
    """Llama files interleave the two halves of a head's rotary pairs; transformers keeps them apart."""
    heads = self._fields.integer("llama.attention.head_count")
    if name.endswith("k_proj.weight"):
      heads = self._fields.integer("llama.attention.head_count_kv", heads)
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, array.shape[1])
    return pairs.swapaxes(1, 2).reshape(array.shape)

  def _hf_name(self, name: str) -> str:
    if name in _TOP:
      return _TOP[name]
    head, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    part, _, kind = rest.partition(".")
    if head == "blk" and part in _BLOCK:
      return f"model.layers.{layer}.{_BLOCK[part]}.{kind}"
    return name  # Refused by the loader as a tensor without a place.
