"""The warm start of `think`: three stages of supervised training, each from the one before.

    python experiments/warm_start.py --config configs/think_start.py:short --output runs/think-short.safetensors
    python experiments/warm_start.py --config configs/think_start.py:long --output runs/think-long.safetensors
    python experiments/warm_start.py --config configs/think_start.py:plain \
        --output rredcot_jax/assets/think/warm_start.safetensors

The first stage teaches arithmetic and copying on short questions, where a step costs a third. The second one
teaches whole questions. The third one teaches thoughts without corrections, because the second did not learn to
tell a wrong line from a right one: it said 12% of the wrong lines again and 10% of the right ones. Each takes 12 to 25
minutes on 2 cores. `benchmarks/think_start.py` measures the result.
"""

from ml_collections import ConfigDict

from rredcot_jax.train.config import default_config, options_of


def get_config(arg: str = "short") -> ConfigDict:
  """Options: stage (short, long, plain)."""
  stage = options_of(arg, {"stage": ("short", "long", "plain")})["stage"]
  config = default_config()
  config.task.name = "think"
  config.tokenizer.path = "think"  # There is nothing beside a start that is not made yet.
  config.response.answer = "Answer %s"
  config.rollout.max_prompt_tokens = 16
  config.warm_start.batch_size = 64
  if stage == "short":
    config.task.options.num_steps = 2
    config.rollout.max_tokens = 64
    config.warm_start.num_steps = 2500
    config.warm_start.learning_rate = 2e-3
  if stage == "long":
    config.rollout.max_tokens = 144  # Of 25,000 traces of the teacher the longest had 125 tokens.
    config.warm_start.initial_params = "runs/think-short.safetensors"
    config.warm_start.num_steps = 1500
    config.warm_start.learning_rate = 1.5e-3
  if stage == "plain":
    config.task.options.update({"notice": 0.0, "doubt": 0.0})
    config.rollout.max_tokens = 112  # The longest of 25,000 had 90.
    config.warm_start.initial_params = "runs/think-long.safetensors"
    config.warm_start.num_steps = 1000
    config.warm_start.learning_rate = 1e-3
  return config
