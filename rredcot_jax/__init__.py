"""Credit assignment for RL of reasoning models: the pure operations, for those who own a trainer.

    segments    vocab_tables, prefix_mask, find_exit, segment
    bank        Reference, make_bank
    log p(c|s)  score_tree, score_generic
    values      estimate_values, log_likelihoods, fit_calibration, calibrate, cross_fit
    credit      credit_from_log_probs, credit_from_values, advantages_from_rewards, values_from_log_probs
                or, a trace at a time: state_values, redistribute, sigma, group_advantages, token_advantages
    loss        policy_loss, or its pieces

They take and return arrays and the pytrees of `types`, and run under jit and vmap. What makes
a bank or a table runs on the host. Importing this needs jax, chex and numpy only.
"""

from rredcot_jax.ops.advantages import (
  generalised_advantages,
  group_advantages,
  sigma,
  token_advantages,
  zero_variance,
)
from rredcot_jax.ops.anatomy import ExitTable, exit_table, exit_table_of_ids, find_exit, prefix_mask
from rredcot_jax.ops.banks import Reference, make_bank
from rredcot_jax.ops.composition import (
  advantages_from_rewards,
  credit_from_log_probs,
  credit_from_values,
  values_from_log_probs,
)
from rredcot_jax.ops.losses import (
  clipped_objective,
  constant_mean,
  importance_weights,
  k1,
  k2,
  k3,
  log_ratio,
  loss_mask,
  loss_weight,
  merge_metrics,
  policy_loss,
  sequence_mean,
  sequence_ratio,
  token_mean,
  token_ratio,
  weighted_objective,
)
from rredcot_jax.ops.redistribution import redistribute, state_values
from rredcot_jax.ops.scoring import positions_of, score_generic, score_tree
from rredcot_jax.ops.segmentation import VocabTables, segment, vocab_tables
from rredcot_jax.ops.types import Completions, Credit, Rollout, Segments, TrainBatch
from rredcot_jax.ops.values import (
  Evidence,
  calibrate,
  cross_fit,
  estimate_values,
  fit_calibration,
  log_likelihoods,
)

__version__ = "0.2.0"

__all__ = [
  "Completions",
  "Credit",
  "Evidence",
  "ExitTable",
  "Reference",
  "Rollout",
  "Segments",
  "TrainBatch",
  "VocabTables",
  "advantages_from_rewards",
  "calibrate",
  "clipped_objective",
  "constant_mean",
  "credit_from_log_probs",
  "credit_from_values",
  "cross_fit",
  "estimate_values",
  "exit_table",
  "exit_table_of_ids",
  "find_exit",
  "fit_calibration",
  "generalised_advantages",
  "group_advantages",
  "importance_weights",
  "k1",
  "k2",
  "k3",
  "log_likelihoods",
  "log_ratio",
  "loss_mask",
  "loss_weight",
  "make_bank",
  "merge_metrics",
  "policy_loss",
  "positions_of",
  "prefix_mask",
  "redistribute",
  "score_generic",
  "score_tree",
  "segment",
  "sequence_mean",
  "sequence_ratio",
  "sigma",
  "state_values",
  "token_advantages",
  "token_mean",
  "token_ratio",
  "values_from_log_probs",
  "vocab_tables",
  "weighted_objective",
  "zero_variance",
]
