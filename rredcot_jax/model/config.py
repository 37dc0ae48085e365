"""Sizes of the decoder: one frozen record that covers Llama, Qwen2 and Qwen3, and the models known by name."""

import dataclasses
from typing import Any

from rredcot_jax.ops.names import check_option

DTYPES = ("float32", "bfloat16")
REMATS = ("dots", "none", "attention", "full")
ATTENTIONS = ("auto", "blocks", "splash", "cudnn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched beyond the context a model was first trained on.

  `attention.rotary_frequencies` has the equations. `kind` is "llama3" (Llama 3.1's
  rule, low_freq_factor and high_freq_factor) or "yarn" (arXiv 2309.00071,
  beta_fast and beta_slow); an `attention_factor` of 0 is YaRN's own,
  0.1 ln(factor) + 1.
  """

  kind: str
  factor: float
  original_max_positions: int
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float = 0.0

  def __post_init__(self) -> None:
    if self.kind not in ("llama3", "yarn"):
      raise ValueError(f"RoPE type {self.kind!r} is not supported: default, llama3 and yarn are.")
    if not self.factor >= 1 or self.original_max_positions < 1:
      raise ValueError(
        f"RoPE scaling needs factor >= 1 and original_max_positions >= 1; they are {self.factor} and "
        f"{self.original_max_positions}."
      )
    if self.kind == "llama3" and not self.high_freq_factor > self.low_freq_factor:
      raise ValueError(
        f"llama3 RoPE scaling needs high_freq_factor={self.high_freq_factor} > low_freq_factor={self.low_freq_factor}."
      )


@dataclasses.dataclass(frozen=True)
class Compute:
  """How a model is computed. It changes speed and memory, and the result by rounding alone.

  dtype: of matrix products and of activations, one of `DTYPES`. Parameters and the
    optimizer's state stay float32, and parameters are rounded when they are used. Norms,
    softmax, log-probabilities and sums of gradients are float32.
  remat: what a layer keeps for its gradient besides its input, one of `REMATS`. The rest
    is computed again. "dots" keeps the results of matrix products with parameters and of
    attention, "none" keeps everything and computes nothing again, "attention" keeps
    attention's result alone, "full" keeps nothing.
  attention: how whole sequences attend, one of `ATTENTIONS`. "blocks" is ours, "splash" is
    JAX's Pallas kernel for TPUs, "cudnn" is for GPUs, "auto" takes the one of the platform.
  log_prob_chunk: tokens of a row whose log-probabilities over the vocabulary exist at
    once, forward and backward. 0 is all of them.
  """

  dtype: str = "float32"
  remat: str = "dots"
  attention: str = "auto"
  log_prob_chunk: int = 0

  def __post_init__(self) -> None:
    check_option("compute.dtype", self.dtype, DTYPES)
    check_option("compute.remat", self.remat, REMATS)
    check_option("compute.attention", self.attention, ATTENTIONS)
    if self.log_prob_chunk < 0:
      raise ValueError(f"compute.log_prob_chunk={self.log_prob_chunk} must be at least 0; 0 is the whole trace.")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder's shape. Hashable, so it can be a static argument under jit.

  Llama is the default; Qwen2 sets `qkv_bias`; Qwen3 sets `qk_norm` and a
  `head_dim` that need not be width / num_heads.
  """

  vocab_size: int
  width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_width: int
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  norm_epsilon: float = 1e-6
  qkv_bias: bool = False
  qk_norm: bool = False
  tied_embeddings: bool = True
  max_positions: int = 0  # The longest sequence the model is meant for; 0 where that is not known.
  compute: Compute = Compute()

  def __post_init__(self) -> None:
    for field in ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_width"):
      if getattr(self, field) < 1:
        raise ValueError(f"model {field}={getattr(self, field)} must be at least 1.")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads} "
        "(grouped-query attention shares each key head among equally many query heads)."
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs.")

  def sizes(self) -> dict[str, Any]:
    """What the model is, without how it is computed."""
    sizes = dataclasses.asdict(self)
    del sizes["compute"]
    return sizes


def _smollm2(width: int, layers: int, heads: int, kv: int, mlp: int, theta: float) -> ModelConfig:
  return ModelConfig(
    49152, width, layers, heads, kv, 64, mlp, rope_theta=theta, norm_epsilon=1e-5, max_positions=8192
  )  # fmt: skip


def _qwen2(
  vocab: int, width: int, layers: int, heads: int, kv: int, head_dim: int, mlp: int, theta: float, tied: bool, room: int
) -> ModelConfig:
  return ModelConfig(
    vocab, width, layers, heads, kv, head_dim, mlp, rope_theta=theta, qkv_bias=True, tied_embeddings=tied,
    max_positions=room,
  )  # fmt: skip


def _qwen3(width: int, layers: int, heads: int, mlp: int, tied: bool) -> ModelConfig:
  return ModelConfig(
    151936, width, layers, heads, 8, 128, mlp, rope_theta=1e6, qk_norm=True, tied_embeddings=tied, max_positions=40960
  )  # fmt: skip


def _llama32(width: int, layers: int, heads: int, head_dim: int) -> ModelConfig:
  return ModelConfig(
    128256, width, layers, heads, 8, head_dim, 8192, rope_theta=5e5, norm_epsilon=1e-5, max_positions=131072,
    rope_scaling=RopeScaling("llama3", 32.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
  )  # fmt: skip


# Sizes by the model's name, as its published config.json has them.
SIZES = {
  "SmolLM2-135M": _smollm2(576, 30, 9, 3, 1536, 1e5),
  "SmolLM2-360M": _smollm2(960, 32, 15, 5, 2560, 1e5),
  "SmolLM2-1.7B": _smollm2(2048, 24, 32, 32, 8192, 1.3e5),
  "Qwen2.5-0.5B": _qwen2(151936, 896, 24, 14, 2, 64, 4864, 1e6, True, 32768),
  "Qwen2.5-1.5B": _qwen2(151936, 1536, 28, 12, 2, 128, 8960, 1e6, True, 131072),
  "Qwen2.5-7B": _qwen2(152064, 3584, 28, 28, 4, 128, 18944, 1e6, False, 131072),
  "DeepSeek-R1-Distill-Qwen-1.5B": _qwen2(151936, 1536, 28, 12, 2, 128, 8960, 1e4, False, 131072),
  "DeepSeek-R1-Distill-Qwen-7B": _qwen2(152064, 3584, 28, 28, 4, 128, 18944, 1e4, False, 131072),
  "Qwen3-0.6B": _qwen3(1024, 28, 16, 3072, True),
  "Qwen3-1.7B": _qwen3(2048, 28, 16, 6144, True),
  "Qwen3-4B": _qwen3(2560, 36, 32, 9728, True),
  "Qwen3-8B": _qwen3(4096, 36, 32, 12288, False),
  "Llama-3.2-1B": _llama32(2048, 16, 32, 64),
  "Llama-3.2-3B": _llama32(3072, 28, 24, 128),
}
