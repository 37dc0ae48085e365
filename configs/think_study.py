"""The credit study on `think`: which estimator is right where the thought is not the solution.

    python experiments/credit_study.py --config configs/think_study.py --workdir runs/think-study

The policy is the shipped warm start of configs/think.py. Ground truth is 512 rollouts of every
distinct state of 2 traces in each of 24 groups of 8. The same command continues an interrupted study.
Figures are in docs/results.md; gradient variance was left out of that run. `:small` is the same study of a few
traces, which takes minutes and shows what the page looks like.
"""

from ml_collections import ConfigDict

from rredcot_jax.study import estimators
from rredcot_jax.train.config import add_study, default_config, options_of


def get_config(arg: str = "full") -> ConfigDict:
  """Options: size (full, small)."""
  small = options_of(arg, {"size": ("full", "small")})["size"] == "small"
  config = default_config()
  add_study(config)
  config.task.name = "think"
  config.response.answer = "Answer %s"
  config.initial_params = "think/warm_start.safetensors"
  config.rollout.group_size = 8
  config.rollout.max_prompt_tokens = 16
  config.rollout.max_tokens = 96
  config.segmentation.method = "newline"
  config.segmentation.k_max = 12
  study = config.study
  study.num_prompts = 24
  study.truth_traces = 2
  study.truth_samples = 512
  study.rows_at_once = 32
  study.integration_steps = 32
  study.resamples = 300
  # The thoughts do not follow the reference line by line, so the suffix bank has nothing to say.
  study.methods = tuple(name for name in estimators.METHODS if "suffix" not in name)
  study.segmentations = ("keyword", "hybrid", "probability", "entropy", "uniform", "whole")
  study.segmentation_prompts = 8
  study.segmentation_traces = 2
  study.gradient_prompts = 4
  study.gradient_groups = 40
  study.segmentation_estimators = (
    "rredcot_solutions_forced",
    "rredcot_solutions_forced_calibrated",
    "rredcot_own_forced_calibrated",
    "rredcot_answer_forced",
    "monte_carlo",
    "leave_one_out",
    "grpo",
  )
  study.gradient_estimators = (
    "grpo",
    "grpo:unscaled",
    "grpo:return",
    "rredcot_solutions_forced:difference",
    "rredcot_solutions_forced:action_value",
    "rredcot_solutions_forced:signed",
    "rredcot_solutions_forced_calibrated:difference",
    "rredcot_solutions_forced_calibrated:action_value",
    "rredcot_answer_forced:difference",
    "monte_carlo:difference",
    "leave_one_out:difference",
    "random:magnitude",
  )
  if small:
    config.study.update(
      num_prompts=4, truth_traces=8, truth_samples=32, samples_per_round=16, integration_steps=8, resamples=50,
      segmentation_prompts=2, segmentations=("hybrid", "uniform"), gradient_prompts=2, gradient_groups=8,
      groups_at_once=4,
    )  # fmt: skip
  return config
