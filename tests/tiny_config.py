"""A run small enough for tests: two operations, 10k parameters, a few seconds."""

from ml_collections import ConfigDict

from rredcot_jax.config import default_config


def get_config(arg: str = "rredcot") -> ConfigDict:
  config = default_config()
  config.task.options.num_steps = 2
  config.num_steps = 6
  config.model.width = 32
  config.model.num_layers = 2
  config.model.num_kv_heads = 2
  config.model.head_dim = 8
  config.model.mlp_width = 32
  config.rollout.prompts_per_step = 4
  config.rollout.group_size = 4
  config.rollout.max_prompt_tokens = 8
  config.rollout.max_tokens = 12
  config.segmentation.method = "hybrid"
  config.segmentation.k_max = 4
  config.credit.max_completion_tokens = 16
  config.optimizer.learning_rate = 1e-3
  if arg == "rredcot":
    config.credit.mode = "difference"
    config.credit.bank = "suffix"
  config.loss.kl = "k3"
  config.loss.kl_coefficient = 1e-3
  config.evaluation.every = 3
  config.evaluation.num_prompts = 8
  config.evaluation.samples = 2
  config.checkpoint.every = 2
  config.num_traces = 2
  return config
