"""Credit assignment for RL of reasoning models: the pure operations.

Each works on one trace, takes and returns arrays and the pytrees of `types`,
and is safe under jit and vmap. Importing this needs jax, flax and chex only.
"""

from rredcot_jax.ops.advantages import group_advantages, sigma, token_advantages, zero_variance
from rredcot_jax.ops.banks import Reference, make_bank
from rredcot_jax.ops.losses import loss_mask, policy_loss
from rredcot_jax.ops.redistribution import redistribute, state_values
from rredcot_jax.ops.segmentation import VocabTables, segment, vocab_tables
from rredcot_jax.ops.types import Completions, Credit, Rollout, Segments, TrainBatch
from rredcot_jax.ops.values import estimate_values

__version__ = "0.2.0"

__all__ = [
  "Completions",
  "Credit",
  "Reference",
  "Rollout",
  "Segments",
  "TrainBatch",
  "VocabTables",
  "estimate_values",
  "group_advantages",
  "loss_mask",
  "make_bank",
  "policy_loss",
  "redistribute",
  "segment",
  "sigma",
  "state_values",
  "token_advantages",
  "vocab_tables",
  "zero_variance",
]
