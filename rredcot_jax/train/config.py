"""The one schema of an experiment: every option, its default and what it means.

A file under configs/ starts from `default_config()`, changes some options and
returns the result from `get_config(arg)`. `Experiment` turns a configuration into
objects, so that modules receive plain values.
"""

from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from rredcot_jax.model.config import SIZES
from rredcot_jax.ops.names import check_option


def default_config() -> ConfigDict:
  """The schema with its defaults: plain GRPO on `chain`. Locked: unknown keys raise."""
  config = ConfigDict()
  config.seed = 0
  config.num_steps = 100  # Policy updates.

  config.task = ConfigDict()
  # "chain", "reasoning_gym/<data set>", "dataset/<corpus>", or "package.module:Class" of your own.
  config.task.name = "chain"
  config.task.options = ConfigDict()  # Passed to the task's class; a config file may add keys.

  config.tokenizer = ConfigDict()
  config.tokenizer.path = ""  # A directory or .gguf file, or one under rredcot_jax/assets; "" is beside initial_params.
  config.tokenizer.chat = True  # Whether its chat template, if it has one, wraps the question.

  config.response = ConfigDict()  # How the model writes what follows its thought; `set_model` knows some families.
  config.response.exit = ""  # The text that leaves the thought, such as "\n</think>\n\n"; "" is "</think>".
  config.response.answer = ""  # The text of an answer, with "%s" in its place, such as "\\boxed{%s}"; "" is "%s".

  config.model = ConfigDict()  # Sizes; `set_model` fills them in for a model known by name.
  config.model.vocab_size = 0  # 0 is the tokenizer's.
  config.model.width = 128
  config.model.num_layers = 4
  config.model.num_heads = 4
  config.model.num_kv_heads = 2
  config.model.head_dim = 32
  config.model.mlp_width = 576
  config.model.rope_theta = 10_000.0
  config.model.rope_scaling = ConfigDict()  # model.config.RopeScaling
  config.model.rope_scaling.kind = "none"
  config.model.rope_scaling.factor = 1.0
  config.model.rope_scaling.original_max_positions = 1
  config.model.rope_scaling.low_freq_factor = 1.0
  config.model.rope_scaling.high_freq_factor = 4.0
  config.model.rope_scaling.beta_fast = 32.0
  config.model.rope_scaling.beta_slow = 1.0
  config.model.rope_scaling.attention_factor = 0.0
  config.model.norm_epsilon = 1e-6
  config.model.qkv_bias = False
  config.model.qk_norm = False
  config.model.tied_embeddings = True
  config.model.max_positions = 0  # The longest prompt and trace together; 0 is no limit.
  # A checkpoint directory in Hugging Face's format, a .gguf file, or a safetensors file of ours, by path or by name
  # under rredcot_jax/assets; "" starts at random.
  config.initial_params = ""

  config.rollout = ConfigDict()
  config.rollout.prompts_per_step = 16
  config.rollout.group_size = 8  # Rollouts a prompt; the group advantage needs at least 2.
  config.rollout.max_prompt_tokens = 24
  config.rollout.overlong = "refuse"  # preflight.OVERLONG: "refuse" a task with longer prompts, or "skip" them.
  config.rollout.max_tokens = 56  # Room for a trace; longer ones are truncated.
  config.rollout.temperature = 1.0
  config.rollout.top_k = 0  # 0 is off.
  config.rollout.top_p = 1.0  # 1 is off.

  config.segmentation = ConfigDict()
  config.segmentation.method = "newline"  # segmentation.METHODS, or "package.module:function".
  config.segmentation.k_max = 12  # More cuts than fit are merged, and counted.
  config.segmentation.after_exit = "one"  # segmentation.AFTER_EXIT: one segment, or as the thought is cut.
  config.segmentation.stride = 8  # Tokens a segment, for stride.

  config.credit = ConfigDict()
  config.credit.mode = "uniform"  # advantages.MODES; uniform is GRPO and reads nothing else here.
  # credit.sources.SOURCES, or "package.module:Class": where credit comes from, RREDCoT or what it is compared with.
  config.credit.source = "scoring"
  config.credit.options = ConfigDict()  # Passed to the source's class; a config file may add keys.
  config.credit.bank = "answer"  # banks.BANKS, or "package.module:function".
  config.credit.bank_size = 4  # N, the most completions of a state; answer, solution and suffix have one.
  config.credit.max_completion_tokens = 56  # Room for a completion; longer ones are left out, and counted.
  config.credit.scored = "all"  # Which of its tokens count, banks.SCORED; "body" leaves out the exit.
  config.credit.fallback = "uniform"  # Where the rollouts bank is empty: "uniform", or a reference bank's name.
  config.credit.form = "plain"  # values.FORMS, or "package.module:function".
  config.credit.initial_value = "baseline"  # redistribution.INITIAL_VALUES
  config.credit.state_baseline = True  # Off: "difference" credits v(s_{k+1}) whole, so that credit is never negative.
  config.credit.floor = 0.0  # Share of uniform credit mixed into sigma.
  config.credit.chunk_size = 0  # Branches, deletions or slots of a trace run at once; 0 is all.

  config.advantages = ConfigDict()
  config.advantages.baseline = "mean"  # advantages.BASELINES
  config.advantages.scale = "std"  # advantages.SCALES

  config.loss = ConfigDict()
  config.loss.name = "grpo"  # losses.LOSSES
  config.loss.clip_low = 0.2
  config.loss.clip_high = 0.2
  config.loss.dual_clip = 0.0  # 0 is off; else > 1.
  config.loss.kl = "off"  # losses.KL_ESTIMATORS
  config.loss.kl_coefficient = 0.0  # Against the starting policy.
  config.loss.mask_truncated = False
  config.loss.non_finite = "stop"  # A NaN step's batch is saved; then "stop", or "skip" its update and go on.
  config.loss.updates_per_rollout = 1  # Passes over a batch; the ratio leaves 1 from the second on.

  config.optimizer = ConfigDict()
  config.optimizer.learning_rate = 1e-4
  config.optimizer.warmup_steps = 5  # Updates until the peak.
  config.optimizer.cosine = True  # Fall to a tenth of the peak at the last update, instead of staying there.
  config.optimizer.weight_decay = 0.0
  config.optimizer.max_grad_norm = 1.0

  config.evaluation = ConfigDict()
  config.evaluation.task = ConfigDict()  # What is held out.
  config.evaluation.task.name = ""  # "" is the eval split of the task above, with its options.
  config.evaluation.task.options = ConfigDict()
  config.evaluation.every = 20  # Steps; the first and the last state are always evaluated.
  config.evaluation.num_prompts = 256  # Held out, the same at every evaluation.
  config.evaluation.rows = 128  # Traces sampled at once.
  config.evaluation.samples = 4  # A prompt; pass@1 and pass@samples are reported.

  config.checkpoint = ConfigDict()
  config.checkpoint.every = 20  # Steps; the last state is always saved.
  config.checkpoint.on_failure = "stop"  # Where one cannot be written: "stop", or "continue" to go on without it.

  config.warm_start = ConfigDict()  # Read by experiments/warm_start.py.
  config.warm_start.initial_params = ""  # What it starts from, as initial_params above.
  config.warm_start.num_steps = 1500
  config.warm_start.batch_size = 64
  config.warm_start.learning_rate = 2e-3

  config.mesh = ConfigDict()  # Sizes of the device mesh's axes.
  config.mesh.data = -1  # -1 takes the devices that are left.
  config.mesh.fsdp = 1
  config.mesh.tensor = 1
  config.mesh.sequence = 1

  config.rollout_mesh = ConfigDict()  # The same devices as sampling and scoring see them.
  config.rollout_mesh.data = 0  # 0 is the mesh above, -1 takes the devices that are left.
  config.rollout_mesh.fsdp = 1
  config.rollout_mesh.tensor = 1
  config.rollout_mesh.sequence = 1

  config.compute = ConfigDict()  # Speed and memory; the result changes by rounding alone.
  config.compute.dtype = "float32"  # model.config.DTYPES; the parameters themselves and the optimizer stay float32.
  config.compute.remat = "dots"  # model.config.REMATS
  config.compute.attention = "auto"  # model.config.ATTENTIONS
  config.compute.log_prob_chunk = 0  # Tokens of a row whose log-probabilities over the vocabulary exist; 0 is all.
  config.compute.microbatches = 1  # Parts of a batch whose gradients are added up for one update.
  config.compute.length_buckets = 1  # Lengths that an update is compiled for, up to rollout.max_tokens.

  config.distributed = ConfigDict()  # Several processes. Their number is not part of an experiment.
  config.distributed.heartbeat_seconds = 100  # A process silent for so long is considered dead, and the others stop.

  config.num_traces = 8  # Traces kept for the report, at every evaluation.
  # tracking.TRACKERS: where metrics go beside metrics.jsonl and TensorBoard; wandb or trackio, which must be installed.
  config.tracker = "none"
  config.lock()
  return _open_options(config)


def add_study(config: ConfigDict) -> None:
  """Adds the options of experiments/credit_study.py to the schema: a run of train.py has none of them."""
  config.unlock()
  study = config.study = ConfigDict()
  study.num_prompts = 32  # Held out; a group of rollout.group_size traces each.
  study.truth_traces = 8  # Of each group, how many have their states valued by many rollouts.
  study.truth_samples = 256  # Rollouts a state; a multiple of:
  study.samples_per_round = 64  # Rollouts a state and file.
  study.rows_at_once = 16  # Traces that are continued, scored and attributed together; a multiple of the group.
  study.slots = 32  # Continuations of a trace run at once.
  study.monte_carlo_samples = 9  # k of the Monte Carlo estimator, independent of the truth's; VinePPO's.
  study.integration_steps = 64  # Of integrated gradients.
  study.methods = ()  # estimators.METHODS
  study.segmentations = ()  # segmentation.METHODS compared beside segmentation.method.
  study.segmentation_prompts = 8  # Prompts whose traces are cut by all of them.
  study.segmentation_traces = 2  # Of each of those groups.
  study.segmentation_estimators = ()  # estimators.METHODS, tried on each segmentation.
  study.gradient_prompts = 4  # Fixed prompts for the gradient's variance; 0 leaves it out.
  study.gradient_groups = 64  # Independent groups of rollouts of each, at least 2.
  study.groups_at_once = 8
  # Names of `study.token_advantages`: "<method>:<mode>", or "grpo" (the denominator) in one of its forms.
  study.gradient_estimators = ()
  study.resamples = 500  # Of the bootstrap over prompts.
  config.lock()
  _open_options(config)


def fill_in(config: ConfigDict, defaults: ConfigDict) -> None:
  """Puts in the options of `defaults` that `config` lacks, because the version that wrote it did not have them."""
  for name, value in defaults.items():
    if name not in config:
      config[name] = value
    elif isinstance(value, ConfigDict) and isinstance(config[name], ConfigDict):
      fill_in(config[name], value)


def _open_options(config: ConfigDict) -> ConfigDict:
  """Unlocks the options that are passed to classes which a configuration names."""
  for options in (config.task.options, config.evaluation.task.options, config.credit.options):
    options.unlock()
  return config


# Families that leave their thought with a line of its own and answer in a box.
_THINKING = ("Qwen3-", "DeepSeek-R1-")


def set_model(config: ConfigDict, name: str) -> None:
  """Fills in the sizes of a model known by name, and how its family writes a response.

  Raises:
    ValueError: if `name` is not in `model.config.SIZES`, offering the nearest.
  """
  check_option("model", name, tuple(SIZES))
  sizes = SIZES[name].sizes()
  scaling = sizes.pop("rope_scaling")
  config.model.update(sizes)
  config.model.rope_scaling.update(scaling or {"kind": "none"})
  if any(name.startswith(family) for family in _THINKING):
    config.response.update({"exit": "\n</think>\n\n", "answer": "\\boxed{%s}"})


def options_of(arg: str, allowed: Mapping[str, Sequence[str]]) -> dict[str, str]:
  """Reads `name=value,name=value` of a `get_config(arg)`; the first option may stand without its name.

  Args:
    arg: what follows the colon in `--config configs/demo.py:arg`.
    allowed: each option's values; the first is its default.

  Raises:
    ValueError: on an unknown option or value, naming the nearest valid one.
  """
  chosen = {name: values[0] for name, values in allowed.items()}
  for i, part in enumerate(piece for piece in arg.split(",") if piece):
    name, equals, value = part.partition("=")
    if not equals and i == 0:
      name, value = next(iter(allowed)), part
    check_option("config option", name, tuple(allowed))
    check_option(name, value, tuple(allowed[name]))
    chosen[name] = value
  return chosen
