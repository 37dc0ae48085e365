"""The same path on real questions: `gsm_symbolic` of reasoning-gym, for a few steps.

    python experiments/train.py --config configs/gsm_symbolic_tiny.py --workdir runs/gsm_symbolic_tiny

A random model of 0.9 M parameters does not solve it, so expect a reward of 0. The run
exercises a byte-level BPE, prompts and solutions of varying length, truncated traces,
groups that are all wrong, and the rollouts bank's fallback. It takes about 2 minutes on 2
cores.
"""

from ml_collections import ConfigDict

from rredcot_jax.ops.banks import BANKS
from rredcot_jax.train.config import default_config, options_of


def get_config(arg: str = "rredcot") -> ConfigDict:
  """Options: method (rredcot, grpo), bank (rollouts, answer, solution, solutions, suffix, own)."""
  banks = ("rollouts", *(bank for bank in BANKS if bank != "rollouts"))
  options = options_of(arg, {"method": ("rredcot", "grpo"), "bank": banks})
  config = default_config()
  config.task.name = "reasoning_gym/gsm_symbolic"
  config.task.options.aligned = True  # So that every bank can be tried.
  config.task.options.size = 512
  config.task.options.seed = 0
  config.tokenizer.path = "gsm_symbolic"
  config.task.options.scorer = "numeric"  # The library's own accepts "-5" for 5.
  config.num_steps = 4
  config.rollout.prompts_per_step = 4
  config.rollout.group_size = 4
  config.rollout.max_prompt_tokens = 320
  config.rollout.max_tokens = 96
  config.segmentation.method = "hybrid"
  config.segmentation.k_max = 8
  if options["method"] == "rredcot":
    config.credit.mode = "signed"
    config.credit.bank = options["bank"]
    config.credit.fallback = "solution"
    config.credit.max_completion_tokens = 320
    config.credit.chunk_size = 8
  config.evaluation.every = 2
  config.evaluation.num_prompts = 16
  config.evaluation.samples = 2
  config.evaluation.rows = 16
  config.checkpoint.every = 2
  return config
