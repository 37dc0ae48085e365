"""GGUF files: sizes, tensors and the tokenizer of a Llama, Qwen2 or Qwen3 model.

The `gguf` library reads the file and undoes its quantisation; what is here is
the names, and the order of rotary pairs that Llama files are stored in.
"""

import os
import pathlib
from typing import Any

import gguf
import numpy as np
import tokenizers
import transformers

from rredcot_jax.model.config import ModelConfig, RopeScaling

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

# How text is taken apart before the merges, by the name that GGUF gives it; \p classes as in the models' tokenizer.json.
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"qwen2": _WORDS.format(digits=""), "llama-bpe": _WORDS.format(digits="{1,3}")}
_PRE_TOKENIZERS = ("gpt-2", "default", "smollm", *_SPLITS)


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
    try:
      self._reader = gguf.GGUFReader(self.path)
    except Exception as error:  # The library raises what its parsing trips over: struct, value and index errors.
      raise ValueError(f"{self.path} is not a whole GGUF file: {error}") from error
    self._architecture = self._need("general.architecture")
    if self._architecture not in _ARCHITECTURES:
      raise ValueError(
        f"{self.path}: the GGUF architecture {self._architecture!r} is not supported: {', '.join(_ARCHITECTURES)} are."
      )
    self._tensors = {self._hf_name(tensor.name): tensor for tensor in self._reader.tensors}

  def model_config(self) -> ModelConfig:
    """The model's sizes, from the file's metadata."""
    need = lambda name: self._need(f"{self._architecture}.{name}")
    heads, width = need("attention.head_count"), need("embedding_length")
    if self._field(f"{self._architecture}.attention.sliding_window"):
      raise ValueError(f"{self.path}: a sliding window is not supported by this decoder.")
    return ModelConfig(
      vocab_size=int(self._tensor("model.embed_tokens.weight").shape[1]),
      width=width,
      num_layers=need("block_count"),
      num_heads=heads,
      num_kv_heads=self._field(f"{self._architecture}.attention.head_count_kv") or heads,
      head_dim=self._field(f"{self._architecture}.attention.key_length") or width // heads,
      mlp_width=need("feed_forward_length"),
      rope_theta=float(self._field(f"{self._architecture}.rope.freq_base") or 10_000.0),
      rope_scaling=self._rope_scaling(),
      # Stored as float32; six digits give back the decimal that was meant.
      norm_epsilon=float(f"{need('attention.layer_norm_rms_epsilon'):.6g}"),
      qkv_bias=self._architecture == "qwen2",
      qk_norm=self._architecture == "qwen3",
      tied_embeddings="lm_head.weight" not in self._tensors,
      max_positions=need("context_length"),
    )

  def names(self) -> set[str]:
    """The tensors' Hugging Face names."""
    return set(self._tensors)

  def read(self, name: str) -> np.ndarray:
    """One tensor in float32, in the layout of transformers.

    Raises:
      ValueError: naming the file, the tensor and the quantisation, if the library cannot undo that.
    """
    tensor = self._tensor(name)
    try:
      array = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
    except (NotImplementedError, KeyError) as error:
      raise ValueError(
        f"{self.path}: tensor {tensor.name!r} has the quantisation {tensor.tensor_type.name}, which is not supported."
      ) from error
    array = array.reshape([int(size) for size in tensor.shape][::-1])
    if self._architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
      return self._unpermute(array, name)
    return array

  def tokenizer(self) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer that the file carries.

    Raises:
      ValueError: if it is no byte-level BPE, or takes text apart in a way that is not known here.
    """
    kind, split = self._need("tokenizer.ggml.model"), self._field("tokenizer.ggml.pre") or "default"
    if kind != "gpt2" or split not in _PRE_TOKENIZERS:
      raise ValueError(
        f"{self.path}: the tokenizer {kind!r} with pre-tokenizer {split!r} is not supported: byte-level BPE with "
        f"{', '.join(_PRE_TOKENIZERS)} is. Give the directory of the original tokenizer instead."
      )
    tokens, types = self._need("tokenizer.ggml.tokens"), self._need("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in self._need("tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    # The models that take text apart by _SPLITS look a word up whole before they merge.
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
    if split == "qwen2":
      fast.normalizer = tokenizers.normalizers.NFC()
    control, user = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
    for special, wanted in ((True, control), (False, user)):
      added = [token for token, type_ in zip(tokens, types) if type_ == wanted]
      fast.add_tokens([tokenizers.AddedToken(t, special=special, normalized=False) for t in added])
    named = {}
    for name in ("bos", "eos", "unknown", "padding"):
      index = self._field(f"tokenizer.ggml.{name}_token_id")
      if index is not None:
        named[{"unknown": "unk", "padding": "pad"}.get(name, name) + "_token"] = tokens[index]
    result = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, clean_up_tokenization_spaces=False, **named)
    result.chat_template = self._field("tokenizer.chat_template")
    return result

  def _rope_scaling(self) -> RopeScaling | None:
    if any(tensor.name == "rope_freqs.weight" for tensor in self._reader.tensors):
      raise ValueError(
        f"{self.path}: tensor 'rope_freqs.weight' (RoPE scaling as a table) is not supported: "
        "load the safetensors checkpoint instead."
      )
    prefix = f"{self._architecture}.rope.scaling"
    kind = self._field(f"{prefix}.type") or "none"
    if kind == "none":
      return None
    if kind != "yarn":
      raise ValueError(f"{self.path}: RoPE type {kind!r} is not supported in a GGUF file: none and yarn are.")
    return RopeScaling("yarn", float(self._need(f"{prefix}.factor")), self._need(f"{prefix}.original_context_length"))

  def _unpermute(self, array: np.ndarray, name: str) -> np.ndarray:
    """Llama files interleave the two halves of a head's rotary pairs; transformers keeps them apart."""
    heads = self._need("llama.attention.head_count")
    if name.endswith("k_proj.weight"):
      heads = self._field("llama.attention.head_count_kv") or heads
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, array.shape[1])
    return pairs.swapaxes(1, 2).reshape(array.shape)

  def _tensor(self, name: str) -> Any:
    if name not in self._tensors:
      raise ValueError(f"{self.path}: tensor {name!r} is missing.")
    return self._tensors[name]

  def _hf_name(self, name: str) -> str:
    if name in _TOP:
      return _TOP[name]
    head, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    part, _, kind = rest.partition(".")
    if head == "blk" and part in _BLOCK:
      return f"model.layers.{layer}.{_BLOCK[part]}.{kind}"
    return name  # Refused by the loader as a tensor without a place.

  def _field(self, name: str) -> Any:
    field = self._reader.fields.get(name)
    return None if field is None else field.contents()

  def _need(self, name: str) -> Any:
    value = self._field(name)
    if value is None:
      raise ValueError(f"{self.path} has no metadata {name!r}.")
    return value
