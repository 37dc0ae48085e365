"""The credit study on SmolLM2-135M after its warm start on gsm_symbolic, on a CPU or on an accelerator.

    make demo-llm                                                     # makes runs/demo-llm/start, among other things
    python experiments/credit_study.py --config configs/smollm2_study.py --workdir runs/smollm2-study
    python experiments/credit_study.py --config configs/smollm2_study.py:accelerator --workdir runs/smollm2-study-256

`cpu` (the default) takes 64 rollouts a state, of 2 traces in each of 16 groups of 4. It leaves out integrated gradients
and the gradient's variance, and takes about 20 minutes on 2 cores. `accelerator` takes 256 rollouts a state, of every
trace in 32 groups of 8, and leaves nothing out. It has not been run. Questions and model are those of
configs/demo_llm.py.
"""

from ml_collections import ConfigDict

from rredcot_jax.train.config import add_study, default_config, options_of, set_model

TEMPLATES = (10, 16, 43, 72)


def get_config(arg: str = "cpu") -> ConfigDict:
  """Options: where (cpu, accelerator)."""
  where = options_of(arg, {"where": ("cpu", "accelerator")})["where"]
  config = default_config()
  add_study(config)
  set_model(config, "SmolLM2-135M")
  config.initial_params = "runs/demo-llm/start"
  config.task.name = "reasoning_gym/gsm_symbolic"
  config.task.options.aligned = True  # The warm start imitates the references, line by line.
  config.task.options.size = 4096
  config.task.options.scorer = "numeric"
  config.task.options.templates = TEMPLATES
  config.tokenizer.chat = False
  config.rollout.group_size = 4
  config.rollout.max_prompt_tokens = 72
  config.rollout.max_tokens = 60
  config.segmentation.method = "newline"
  config.segmentation.k_max = 6
  config.credit.chunk_size = 2  # Branches run at once: logits over 49152 words are large.
  study = config.study
  study.num_prompts = 16
  study.truth_traces = 2
  study.truth_samples = 64
  study.samples_per_round = 16
  study.rows_at_once = 8
  study.slots = 16
  study.methods = (
    "rredcot_answer",
    "rredcot_answer_forced",
    "rredcot_suffix",
    "rredcot_rollouts",
    "monte_carlo",
    "leave_one_out",
    "gradient_x_input",
    "attention",
    "attention_rollout",
    "grpo",
    "random",
  )
  study.segmentations = ("sentence", "entropy")
  study.segmentation_prompts = 2
  study.segmentation_traces = 1
  study.segmentation_estimators = ("rredcot_answer_forced",)
  study.gradient_prompts = 0
  if where == "accelerator":
    config.rollout.group_size = 8
    config.credit.chunk_size = 0
    config.study.update(
      num_prompts=32, truth_traces=8, truth_samples=256, samples_per_round=64, rows_at_once=32, slots=64,
      methods=(*study.methods, "rredcot_solution", "rredcot_rollouts_self_normalised", "integrated_gradients"),
      segmentation_prompts=16, segmentation_traces=4, gradient_prompts=8, gradient_groups=64, groups_at_once=4,
      gradient_estimators=(
        "grpo", "grpo:unscaled", "rredcot_answer_forced:difference", "rredcot_answer_forced:signed",
        "rredcot_rollouts:difference", "monte_carlo:difference", "leave_one_out:difference", "attention:magnitude",
        "random:magnitude",
      ),
    )  # fmt: skip
  return config
