"""The training comparison on `chain`: every source of credit, at equal rollout tokens, from one warm start.

    python experiments/compare.py --workdir runs/comparison --seeds 1,2,3,4,5
    python experiments/train.py --config configs/chain_comparison.py:method=value_head --workdir runs/value_head

A run is 60 steps of 16 rollouts. It takes about a minute on 2 idle cores, and several minutes with
Monte Carlo. Expected from a start at 46%: GRPO about 83%, RREDCoT's difference about 89%, Monte
Carlo's difference about the same (docs/results.md has all methods over five seeds).

All methods share the start, the rollouts a step, the loss and the schedule. Methods whose credit
reads no group take 8 prompts of 2 rollouts a step instead of 2 of 8. The learning rates of GRPO and
RREDCoT are those of configs/demo.py, where they were tried. Methods that scale the group's
advantage take GRPO's rate, and methods that credit segments directly take RREDCoT's. The rates of
these other methods were not tuned.
"""

from ml_collections import ConfigDict

from rredcot_jax.train.config import default_config, options_of

OTHERS = (
  "reinforce", "monte_carlo", "leave_one_out", "gradient_x_input", "integrated_gradients", "attention",
  "attention_rollout", "value_head",
)  # fmt: skip
BANKS = ("suffix", "answer", "solution", "rollouts")

# What the comparison runs, by the name it has in tables and file names.
METHODS = {
  "grpo": "method=grpo",
  "reinforce": "method=reinforce",
  "rredcot-suffix-difference": "method=rredcot,bank=suffix,mode=difference",
  "rredcot-suffix-action_value": "method=rredcot,bank=suffix,mode=action_value",
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

# Of each method: (learning rate, rollouts a prompt, updates on each batch). Other combinations take GRPO's.
SETTINGS = {
  "grpo": (2e-4, 8, 1),
  "rredcot-suffix-difference": (3e-4, 2, 1),
  "reinforce": (3e-4, 2, 1),
  "rredcot-suffix-action_value": (3e-4, 2, 1),
  "rredcot-answer-difference": (3e-4, 2, 1),
  "rredcot-solution-difference": (3e-4, 2, 1),
  "rredcot-rollouts-difference": (3e-4, 8, 1),
  "rredcot-suffix-signed": (2e-4, 8, 1),
  "rredcot-suffix-magnitude": (2e-4, 8, 1),
  "leave_one_out-difference": (3e-4, 2, 1),
  "leave_one_out-signed": (2e-4, 8, 1),
  "gradient_x_input-signed": (2e-4, 8, 1),
  "attention-magnitude": (2e-4, 8, 1),
  "value_head": (2e-4, 2, 1),
  "monte_carlo-difference": (3e-4, 2, 1),
}
_ROLLOUTS = 16  # A step, of all prompts.
# An evaluation costs as much as 30 steps. These are evaluated often, because their crossing is needed to a few steps.
_EVALUATED_OFTEN = ("grpo", "rredcot-suffix-difference", "rredcot-suffix-action_value")

# Tokens of the longest completion: </think> digit <eos>, and eight lines of six tokens before them.
_COMPLETION_TOKENS = {"answer": 3, "solution": 51, "suffix": 51, "rollouts": 56}


def get_config(arg: str = "rredcot") -> ConfigDict:
  """Options: method (rredcot, grpo, reinforce, monte_carlo, leave_one_out, gradient_x_input, integrated_gradients,
  attention, attention_rollout, value_head), bank (suffix, answer, solution, rollouts), mode (difference, signed,
  magnitude, action_value).

  reinforce credits every token with R, without a baseline. It is the control for methods whose credit is hardly ever
  negative. Only rredcot reads the bank. action_value is difference without the state's own value as a baseline.
  Modes that a source does not support are refused when the run starts.
  """
  modes = ("difference", "signed", "magnitude", "action_value")
  options = options_of(arg, {"method": ("rredcot", "grpo", *OTHERS), "bank": BANKS, "mode": modes})
  method, bank, mode = options["method"], options["bank"], options["mode"]
  config = default_config()
  config.task.options.num_steps = 8
  config.initial_params = "chain/warm_start.safetensors"
  config.num_steps = 60
  config.rollout.max_prompt_tokens = 18
  config.rollout.max_tokens = 56
  config.segmentation.method = "newline"
  config.segmentation.k_max = 10
  config.evaluation.num_prompts = 256
  config.evaluation.samples = 2
  config.evaluation.rows = 512
  config.checkpoint.every = 30
  with_bank = f"-{bank}" if method == "rredcot" else ""
  name = method if method in ("grpo", "reinforce", "value_head") else f"{method}{with_bank}-{mode}"
  if method == "reinforce":
    config.advantages.baseline = config.advantages.scale = "none"
  elif method != "grpo":
    config.credit.source = "scoring" if method == "rredcot" else method
    config.credit.mode = "difference" if mode == "action_value" else mode
    config.credit.state_baseline = mode != "action_value"
  if method == "rredcot":
    config.credit.bank = bank
    config.credit.max_completion_tokens = _COMPLETION_TOKENS[bank]
  if method == "monte_carlo":
    config.credit.chunk_size = 30  # Slots a trace, of 9 continuations of each of 9 states.
  config.evaluation.every = 5 if name in _EVALUATED_OFTEN else 10
  rate, group_size, updates = SETTINGS.get(name, SETTINGS["grpo"])
  config.optimizer.learning_rate = rate
  config.rollout.group_size = group_size
  config.rollout.prompts_per_step = _ROLLOUTS // group_size
  config.loss.updates_per_rollout = updates
  return config
