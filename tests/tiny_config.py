"""A run small enough for tests: the shipped start, 16 rollouts a step, a few seconds."""

from ml_collections import ConfigDict

from rredcot_jax.train.config import default_config


def get_config(arg: str = "rredcot") -> ConfigDict:
  config = default_config()
  config.task.options.num_steps = 8
  config.initial_params = "chain/warm_start.safetensors"
  config.num_steps = 6
  config.rollout.prompts_per_step = 4
  config.rollout.group_size = 4
  config.rollout.max_prompt_tokens = 18
  config.rollout.max_tokens = 56
  config.segmentation.method = "hybrid"
  config.segmentation.k_max = 4
  config.credit.max_completion_tokens = 51
  if arg == "rredcot":
    config.credit.mode = "difference"
    config.credit.bank = "suffix"
  config.loss.kl = "k3"
  config.loss.kl_coefficient = 1e-3
  config.evaluation.every = 3
  config.evaluation.num_prompts = 8
  config.evaluation.samples = 2
  config.evaluation.rows = 16
  config.checkpoint.every = 2
  config.num_traces = 2
  return config
