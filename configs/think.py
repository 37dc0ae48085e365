"""Reinforcement learning of a 1 M-parameter reasoner on `think`: a thought, an exit, a solution with the answer.

    python experiments/train.py --config configs/think.py:rredcot --workdir runs/think-rredcot
    python experiments/train.py --config configs/think.py:grpo --workdir runs/think-grpo

Both start from the shipped warm start (39% of sampled answers right), which configs/think_start.py makes. `rredcot`
scores three reference solutions after every state of the thought.
"""

from ml_collections import ConfigDict

from rredcot_jax.train.config import default_config, options_of

METHODS = ("rredcot", "grpo")

# Tokens of the longest completion; six steps of six tokens at most in a solution.
_COMPLETION_TOKENS = {"solutions": 40, "solution": 40, "answer": 4, "rollouts": 96, "own": 96}


def get_config(arg: str = "rredcot") -> ConfigDict:
  """Options: method (rredcot, grpo), bank (solutions, solution, answer, rollouts, own)."""
  options = options_of(arg, {"method": METHODS, "bank": tuple(_COMPLETION_TOKENS)})
  config = default_config()
  config.task.name = "think"
  config.response.answer = "Answer %s"
  config.initial_params = "think/warm_start.safetensors"
  config.num_steps = 40
  config.evaluation.every = 10
  config.rollout.prompts_per_step = 2
  config.rollout.group_size = 8
  config.rollout.max_prompt_tokens = 16
  config.rollout.max_tokens = 96
  config.segmentation.method = "newline"
  config.segmentation.k_max = 12
  config.optimizer.learning_rate = 2e-4
  if options["method"] == "rredcot":
    config.credit.mode = "difference"
    config.credit.bank = options["bank"]
    # What is scored is the value of being made to leave the thought now. The log q of rollouts is of all tokens.
    config.credit.scored = "all" if options["bank"] == "rollouts" else "body"
    config.credit.max_completion_tokens = _COMPLETION_TOKENS[options["bank"]]
  return config
