"""Reinforcement learning of a 1 M-parameter reasoner on `think`: a thought, an exit, a solution with the answer.

    python experiments/train.py --config configs/think.py:rredcot --workdir runs/think-rredcot
    python experiments/train.py --config configs/think.py:grpo --workdir runs/think-grpo

Both start from the shipped warm start, which is made in three stages by

    python experiments/warm_start.py --config configs/think.py:short --output runs/think-short.safetensors
    python experiments/warm_start.py --config configs/think.py:long --output runs/think-long.safetensors
    python experiments/warm_start.py --config configs/think.py:plain \
        --output rredcot_jax/assets/think/warm_start.safetensors

The first stage teaches arithmetic and copying on short questions, where a step costs a third. The second one
teaches whole questions. The third one teaches thoughts without corrections, because the second did not learn to
tell a wrong line from a right one: it said 12% of the wrong lines again and 10% of the right ones.
"""

from ml_collections import ConfigDict

from rredcot_jax.train.config import default_config, options_of

METHODS = ("rredcot", "grpo", "short", "long", "plain")


def get_config(arg: str = "rredcot") -> ConfigDict:
  """Options: method (rredcot, grpo, or the stages of the warm start: short, long, plain)."""
  method = options_of(arg, {"method": METHODS})["method"]
  config = default_config()
  config.task.name = "think"
  config.response.answer = "Answer %s"
  config.initial_params = "think/warm_start.safetensors"
  config.rollout.max_prompt_tokens = 16
  config.rollout.max_tokens = 128
  config.num_steps = 40
  config.rollout.prompts_per_step = 2
  config.segmentation.method = "newline"
  config.optimizer.learning_rate = 2e-4
  if method == "rredcot":
    config.credit.mode = "difference"
    config.credit.bank = "solutions"
    config.credit.scored = "body"  # The value of being made to leave the thought now.
    config.credit.max_completion_tokens = 48
  config.warm_start.batch_size = 64
  if method in ("short", "long", "plain"):
    config.tokenizer.path = "think"  # There is nothing beside a start that is not made yet.
  if method == "short":
    config.task.options.num_steps = 2
    config.rollout.max_tokens = 64
    config.warm_start.num_steps = 2500
    config.warm_start.learning_rate = 2e-3
  if method == "long":
    config.rollout.max_tokens = 144  # Of 25,000 traces of the teacher the longest had 125 tokens.
    config.warm_start.initial_params = "runs/think-short.safetensors"
    config.warm_start.num_steps = 1500
    config.warm_start.learning_rate = 1.5e-3
  if method == "plain":
    # The second stage did not learn to notice a wrong line, so what it says again is noise, and is left out here.
    config.task.options.update({"notice": 0.0, "doubt": 0.0})
    config.rollout.max_tokens = 112
    config.warm_start.initial_params = "runs/think-long.safetensors"
    config.warm_start.num_steps = 1000
    config.warm_start.learning_rate = 1e-3
  return config
