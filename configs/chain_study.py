"""The credit study on `chain`: which estimator of a segment's credit is right, and what it costs.

    python experiments/credit_study.py --config configs/chain_study.py --workdir runs/chain-study

The policy is the shipped warm start (46% of sampled answers right). Ground truth is 512 rollouts of
every distinct state of 4 traces in each of 24 groups of 8. The study takes about half an hour on 2
cores. The same command continues an interrupted study. `:small` is the same study of a few traces,
which takes minutes and shows what the page looks like.
"""

from ml_collections import ConfigDict

from rredcot_jax.study import estimators
from rredcot_jax.train.config import add_study, default_config, options_of


def get_config(arg: str = "full") -> ConfigDict:
  """Options: size (full, small)."""
  small = options_of(arg, {"size": ("full", "small")})["size"] == "small"
  config = default_config()
  add_study(config)
  config.task.options.num_steps = 8
  config.initial_params = "chain/warm_start.safetensors"
  config.rollout.group_size = 8
  config.rollout.max_prompt_tokens = 18
  config.rollout.max_tokens = 56
  config.segmentation.method = "newline"
  config.segmentation.k_max = 10
  study = config.study
  study.num_prompts = 24
  study.truth_traces = 4
  study.truth_samples = 512  # With 256 the truth's own noise hides the last hundredths of a rank correlation.
  study.rows_at_once = 32
  study.integration_steps = 32
  study.resamples = 300
  # A question of `chain` has one reference solution.
  study.methods = tuple(name for name in estimators.METHODS if "solutions" not in name)
  study.segmentations = ("stride", "uniform", "entropy", "probability", "sentence", "hybrid", "whole")
  study.segmentation_prompts = 8
  study.segmentation_traces = 1
  study.gradient_prompts = 4
  study.gradient_groups = 40
  study.segmentation_estimators = ("rredcot_suffix", "rredcot_answer_forced", "monte_carlo", "leave_one_out")
  study.gradient_estimators = (
    "grpo",
    "grpo:unscaled",
    "grpo:return",
    "rredcot_suffix:difference",
    "rredcot_suffix:action_value",
    "rredcot_suffix:signed",
    "rredcot_suffix:magnitude",
    "rredcot_answer_forced:difference",
    "rredcot_rollouts:difference",
    "monte_carlo:difference",
    "leave_one_out:difference",
    "gradient_x_input:signed",
    "attention:magnitude",
    "random:magnitude",
  )
  if small:
    config.study.update(
      num_prompts=4, truth_traces=8, truth_samples=32, samples_per_round=16, integration_steps=8, resamples=50,
      segmentation_prompts=2, segmentations=("uniform", "entropy"), gradient_prompts=2, gradient_groups=8,
      groups_at_once=4,
    )  # fmt: skip
  return config
