"""The training comparison on `think`: sources of credit where the thought is not the solution, from one warm start.

    python experiments/compare.py --comparison configs/think_comparison.py --workdir runs/think-comparison
    python experiments/compare.py --comparison configs/think_comparison.py --workdir runs/think-rates --seeds 101,102 \
        --rates 1e-4,2e-4,3e-4,4e-4                                                        (the tuning)

A run is 40 steps of 16 rollouts, 2 prompts of 8. All methods share the start, the rollouts, the loss, the schedule and
the learning rate. The exit is forced: it does not count in the likelihood of a completion. **Not run by us yet**: no
figure is known, and the rate is not tuned.
"""

from ml_collections import ConfigDict

from rredcot_jax.train.config import default_config, options_of

# What the comparison runs, by the name it has in tables and file names.
METHODS = {
  "grpo": "method=grpo",
  "reinforce": "method=reinforce",
  "rredcot-difference": "method=rredcot,bank=solutions,mode=difference",
  "rredcot-action_value": "method=rredcot,bank=solutions,mode=action_value",
  "rredcot-signed": "method=rredcot,bank=solutions,mode=signed",
  "rredcot-first_segment": "method=rredcot,bank=solutions,mode=first_segment",
  "rredcot-answer-difference": "method=rredcot,bank=answer,mode=difference",
  "rredcot-own-difference": "method=rredcot,bank=own,mode=difference",
  "calibrated-difference": "method=calibrated,mode=difference",
  "calibrated-action_value": "method=calibrated,mode=action_value",
  "calibrated-signed": "method=calibrated,mode=signed",
  "calibrated_own-difference": "method=calibrated,mode=difference,bank=own",
  "monte_carlo-difference": "method=monte_carlo,mode=difference",
  "leave_one_out-difference": "method=leave_one_out,mode=difference",
}


def get_config(arg: str = "rredcot") -> ConfigDict:
  """Options: method (rredcot, calibrated, grpo, reinforce, monte_carlo, leave_one_out), mode (difference, action_value,
  signed, magnitude, first_segment), bank (solutions, own, answer).

  reinforce credits every token with R, without a baseline. action_value is difference without the state's own value as
  a baseline. first_segment is difference whose first segment has v(s_0) as well, so that rewards sum to R.
  """
  options = options_of(
    arg,
    {
      "method": ("rredcot", "calibrated", "grpo", "reinforce", "monte_carlo", "leave_one_out"),
      "mode": ("difference", "action_value", "signed", "magnitude", "first_segment"),
      "bank": ("solutions", "own", "answer"),
    },
  )
  method, mode = options["method"], options["mode"]
  config = default_config()
  config.task.name = "think"
  config.response.answer = "Answer %s"
  config.initial_params = "think/warm_start.safetensors"
  config.num_steps = 40
  config.rollout.prompts_per_step = 2
  config.rollout.group_size = 8
  config.rollout.max_prompt_tokens = 16
  config.rollout.max_tokens = 96
  config.segmentation.method = "hybrid"
  config.segmentation.k_max = 12
  config.evaluation.num_prompts = 256
  config.evaluation.samples = 2
  config.evaluation.rows = 512
  config.evaluation.every = 10
  config.checkpoint.every = 40
  config.optimizer.learning_rate = 2e-4
  if method == "reinforce":
    config.advantages.baseline = config.advantages.scale = "none"
  elif method != "grpo":
    config.credit.source = "scoring" if method == "rredcot" else method
    config.credit.mode = "difference" if mode in ("action_value", "first_segment") else mode
    config.credit.state_baseline = mode != "action_value"
    config.credit.initial_value = "first_segment" if mode == "first_segment" else "baseline"
  if method in ("rredcot", "calibrated"):
    config.credit.bank = options["bank"]
    config.credit.scored = "body"
    config.credit.max_completion_tokens = {"own": 96, "answer": 4}.get(options["bank"], 40)
  if method == "monte_carlo":
    config.credit.chunk_size = 32  # Slots a trace.
  return config
