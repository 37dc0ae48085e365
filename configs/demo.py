"""`make demo`: reinforcement learning of a 1 M-parameter reasoner on `chain`.

    python experiments/train.py --config configs/demo.py:rredcot --workdir runs/rredcot
    python experiments/train.py --config configs/demo.py:grpo --workdir runs/grpo

Both start from the shipped warm start (about 46% of sampled answers right) and get the
same prompts in the same order. A run takes about a minute on 2 cores. The warm start is
made by

    python experiments/warm_start.py --config configs/demo.py \
        --output rredcot_jax/assets/chain/warm_start.safetensors
"""

from ml_collections import ConfigDict

from rredcot_jax.ops.banks import BANKS
from rredcot_jax.train.config import default_config, options_of

METHODS = ("rredcot", "grpo")

# Tokens of the longest completion: </think> digit <eos>, and eight lines of six tokens before them.
_COMPLETION_TOKENS = {"answer": 3, "solution": 51, "solutions": 51, "suffix": 51, "rollouts": 56, "own": 56}


def get_config(arg: str = "rredcot") -> ConfigDict:
  """Options: method (rredcot, grpo), bank (suffix, answer, solution, solutions, rollouts, own)."""
  banks = ("suffix", *(bank for bank in BANKS if bank != "suffix"))
  options = options_of(arg, {"method": METHODS, "bank": banks})
  config = default_config()
  config.task.options.num_steps = 8
  config.initial_params = "chain/warm_start.safetensors"
  config.evaluation.every = 10
  config.checkpoint.every = 10
  config.num_steps = 70
  # Small steps, so that the gradient's variance is what limits learning, as it is with long traces.
  config.rollout.prompts_per_step = 2
  config.rollout.group_size = 8
  config.rollout.max_prompt_tokens = 18
  config.rollout.max_tokens = 56
  config.segmentation.method = "newline"
  config.segmentation.k_max = 10
  # Each method's best of the rates tried (docs/results.md).
  config.optimizer.learning_rate = 3e-4 if options["method"] == "rredcot" else 2e-4
  if options["method"] == "rredcot":
    config.credit.mode = "difference"
    config.credit.bank = options["bank"]
    config.credit.max_completion_tokens = _COMPLETION_TOKENS[options["bank"]]
  config.warm_start.num_steps = 900
  config.warm_start.learning_rate = 1.5e-3
  return config
