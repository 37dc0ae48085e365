"""The one schema of an experiment: every option, its default and who reads it.

A file under configs/ starts from `default_config()`, changes what it wants and
returns the result from `get_config(arg)`. Modules receive plain values; only
the experiments read a ConfigDict.
"""

from ml_collections import ConfigDict

from rredcot_jax import advantages, completions, losses, redistribution, segmentation, types, values
from rredcot_jax.model.config import ModelConfig


def default_config() -> ConfigDict:
  """The schema with its defaults: plain GRPO on `chain`. Locked: unknown keys raise."""
  config = ConfigDict()
  config.seed = 0
  config.num_steps = 100  # Policy updates.

  config.task = ConfigDict()
  config.task.name = "chain"  # "chain" or "reasoning_gym/<data set>".
  config.task.options = ConfigDict()  # Passed to the task's class; its keys are free.
  config.task.options.unlock()

  config.model = ConfigDict()  # Sizes; the vocabulary's comes from the tokenizer.
  config.model.width = 128
  config.model.num_layers = 4
  config.model.num_heads = 4
  config.model.num_kv_heads = 2
  config.model.head_dim = 32
  config.model.mlp_width = 576
  config.model.rope_theta = 10_000.0
  config.model.qkv_bias = False
  config.model.qk_norm = False
  config.model.tied_embeddings = True
  config.initial_params = ""  # A safetensors file to start from; "" starts at random.

  config.rollout = ConfigDict()
  config.rollout.prompts_per_step = 16
  config.rollout.group_size = 8  # Rollouts a prompt; the group advantage needs at least 2.
  config.rollout.max_prompt_tokens = 24  # A longer prompt is an error that names it.
  config.rollout.max_tokens = 56  # Room for a trace; longer ones are truncated.
  config.rollout.temperature = 1.0
  config.rollout.top_k = 0  # 0 is off.
  config.rollout.top_p = 1.0  # 1 is off.

  config.segmentation = ConfigDict()
  config.segmentation.method = "newline"  # segmentation.METHODS
  config.segmentation.k_max = 12  # More cuts than fit are merged, and counted.
  config.segmentation.target = 0  # Segments to aim at, for uniform, entropy and hybrid; 0 is k_max.
  config.segmentation.stride = 8  # Tokens a segment, for stride.
  config.segmentation.threshold = 0.9  # A token below this probability opens a segment, for probability.

  config.credit = ConfigDict()
  config.credit.mode = "uniform"  # advantages.MODES; uniform is GRPO and scores nothing.
  config.credit.bank = "answer"  # completions.BANKS
  config.credit.bank_size = 4  # Most completions a state, for the rollouts bank.
  config.credit.force_exit = False  # Score completions as if the thought had been left already.
  config.credit.fallback = "uniform"  # Where the rollouts bank is empty: "uniform", or a reference bank's name.
  config.credit.form = "plain"  # values.FORMS
  config.credit.max_weight = 1.0  # Cap of an importance weight, for the truncated form.
  config.credit.initial_value = "baseline"  # redistribution.INITIAL_VALUES
  config.credit.floor = 0.0  # Share of uniform credit mixed into sigma.
  config.credit.scale = 1.0  # Multiplies every advantage.
  config.credit.chunk_size = 0  # Branches of a trace scored at once; 0 is all.

  config.advantages = ConfigDict()
  config.advantages.baseline = "mean"  # advantages.BASELINES
  config.advantages.scale = "std"  # advantages.SCALES

  config.loss = ConfigDict()
  config.loss.name = "grpo"  # losses.LOSSES
  config.loss.clip_low = 0.2
  config.loss.clip_high = 0.2
  config.loss.dual_clip = 0.0  # 0 is off; else > 1.
  config.loss.kl = "off"  # losses.KL
  config.loss.kl_coefficient = 0.0  # Against the starting policy.
  config.loss.mask_truncated = False
  config.loss.filter_zero_variance = False
  config.loss.updates_per_rollout = 1  # Minibatch passes; the ratio leaves 1 from the second on.

  config.optimizer = ConfigDict()
  config.optimizer.learning_rate = 1e-4
  config.optimizer.warmup_steps = 5
  config.optimizer.weight_decay = 0.0
  config.optimizer.max_grad_norm = 1.0

  config.evaluation = ConfigDict()
  config.evaluation.every = 20  # Steps; the first and the last state are always evaluated.
  config.evaluation.num_prompts = 256  # Held out, the same at every evaluation.
  config.evaluation.samples = 4  # A prompt; pass@1 and pass@samples are reported.

  config.checkpoint = ConfigDict()
  config.checkpoint.every = 20  # Steps; the last state is always saved.
  config.checkpoint.keep = 2  # Newest ones kept; at least 2, so that a damaged one can be passed over.

  config.warm_start = ConfigDict()  # Read by experiments/warm_start.py.
  config.warm_start.num_steps = 1500
  config.warm_start.batch_size = 64
  config.warm_start.learning_rate = 2e-3
  config.warm_start.wrong_share = 0.08  # Steps of the teacher that are wrong, for chain.
  config.warm_start.early_share = 0.15  # Traces that leave the thought early, for chain.

  config.num_traces = 8  # Traces a step kept for the report, at evaluation steps.
  config.skip_nan = False  # Go on after a step whose loss is not finite, instead of stopping.
  return config.lock()
