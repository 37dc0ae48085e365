"""Sizes of the decoder: one frozen record that covers Llama, Qwen2 and Qwen3."""

import dataclasses


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
  norm_epsilon: float = 1e-6
  qkv_bias: bool = False
  qk_norm: bool = False
  tied_embeddings: bool = True

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
