"""The training comparison on `chain`: every source of credit, at equal rollout tokens, from one warm start.

    python experiments/compare.py --directory runs/comparison --seeds 1,2,3,4,5
    python experiments/train.py --config configs/chain_comparison.py:method=value_head --workdir runs/value_head

A run is 60 steps of 16 rollouts, two updates on each batch, about a minute on 2 idle
cores (three with Monte Carlo); the sweep of 13 methods over five seeds about 90 minutes.
Expected: from 46% to about 88% with GRPO, 92% with RREDCoT (docs/results.md).

What all methods share: the prompts, the steps, the loss, the schedule. What is each
method's own: its learning rate, the best on seed 0 of the grid in docs/results.md.
"""

from ml_collections import ConfigDict

from rredcot_jax import completions
from rredcot_jax.config import default_config, options_of

OTHERS = (
  "monte_carlo", "leave_one_out", "gradient_x_input", "integrated_gradients", "attention", "attention_rollout",
  "value_head",
)  # fmt: skip
BANKS = ("suffix", *(bank for bank in completions.BANKS if bank != "suffix"))

# What the comparison runs, by the name it has in tables and file names.
METHODS = {
  "grpo": "method=grpo",
  "rredcot-suffix-difference": "method=rredcot,bank=suffix,mode=difference",
  "rredcot-answer-difference": "method=rredcot,bank=answer,mode=difference",
  "rredcot-solution-difference": "method=rredcot,bank=solution,mode=difference",
  "rredcot-rollouts-difference": "method=rredcot,bank=rollouts,mode=difference",
  "rredcot-suffix-signed": "method=rredcot,bank=suffix,mode=signed",
  "rredcot-suffix-magnitude": "method=rredcot,bank=suffix,mode=magnitude",
  "leave_one_out-difference": "method=leave_one_out,mode=difference",
  "leave_one_out-signed": "method=leave_one_out,mode=signed",
  "gradient_x_input-signed": "method=gradient_x_input,mode=signed",
  "attention-magnitude": "method=attention,mode=magnitude",
  "value_head": "method=value_head,mode=difference",
  "monte_carlo-difference": "method=monte_carlo,mode=difference",
}

# What is each method's own: (learning rate, rollouts a prompt, updates on each batch). Other combinations take GRPO's.
SETTINGS = {
  "grpo": (3e-4, 8, 1),
  "rredcot-suffix-difference": (3e-4, 2, 2),
  "rredcot-answer-difference": (3e-4, 2, 2),
  "rredcot-solution-difference": (3e-4, 2, 2),
  "rredcot-rollouts-difference": (3e-4, 8, 1),
  "rredcot-suffix-signed": (3e-4, 8, 1),
  "rredcot-suffix-magnitude": (3e-4, 8, 1),
  "leave_one_out-difference": (3e-4, 2, 2),
  "leave_one_out-signed": (3e-4, 8, 1),
  "gradient_x_input-signed": (3e-4, 8, 1),
  "attention-magnitude": (3e-4, 8, 1),
  "value_head": (3e-4, 2, 2),
  "monte_carlo-difference": (3e-4, 2, 2),
}
_ROLLOUTS = 16  # A step, of all prompts.

# Tokens of the longest completion: </think> digit <eos>, and eight lines of six tokens before them.
_COMPLETION_TOKENS = {"answer": 3, "solution": 51, "suffix": 51, "rollouts": 56}


def get_config(arg: str = "rredcot") -> ConfigDict:
  """Options: method (rredcot, grpo, monte_carlo, leave_one_out, gradient_x_input, integrated_gradients, attention,
  attention_rollout, value_head), bank (suffix, answer, solution, rollouts), mode (difference, signed, magnitude).

  The bank is RREDCoT's alone. Modes that a source cannot give are refused when the run starts.
  """
  modes = ("difference", "signed", "magnitude")
  options = options_of(arg, {"method": ("rredcot", "grpo", *OTHERS), "bank": BANKS, "mode": modes})
  method, bank, mode = options["method"], options["bank"], options["mode"]
  config = default_config()
  config.task.options.num_steps = 8
  config.initial_params = "chain_warm_start.safetensors"
  config.num_steps = 60
  config.rollout.max_prompt_tokens = 18
  config.rollout.max_tokens = 56
  config.segmentation.method = "newline"
  config.segmentation.k_max = 10
  config.evaluation.every = 5
  config.evaluation.num_prompts = 256
  config.evaluation.samples = 2
  config.evaluation.rows = 512
  config.checkpoint.every = 30
  name = {"grpo": "grpo", "value_head": "value_head", "rredcot": f"rredcot-{bank}-{mode}"}.get(
    method, f"{method}-{mode}"
  )
  if method != "grpo":
    config.credit.source = "scoring" if method == "rredcot" else method
    config.credit.mode = mode
  if method == "rredcot":
    config.credit.bank = bank
    config.credit.max_completion_tokens = _COMPLETION_TOKENS[bank]
  if method == "monte_carlo":
    config.credit.chunk_size = 30  # Slots a trace, of 9 continuations of each of 9 states.
  rate, group_size, updates = SETTINGS.get(name, SETTINGS["grpo"])
  config.optimizer.learning_rate = rate
  config.rollout.group_size = group_size
  config.rollout.prompts_per_step = _ROLLOUTS // group_size
  config.loss.updates_per_rollout = updates
  return config
