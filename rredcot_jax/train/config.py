"""The one schema of an experiment: every option, its default and who reads it.

A file under configs/ starts from `default_config()`, changes what it wants and
returns the result from `get_config(arg)`. Modules receive plain values; only
the experiments read a ConfigDict.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from rredcot_jax.credit import attribution, value_head
from rredcot_jax.credit.rules import SOURCES, CreditRule, check_combination
from rredcot_jax.model.config import ATTENTIONS, DTYPES, REMATS, SIZES, Compute, ModelConfig, RopeScaling
from rredcot_jax.ops import advantages, banks, losses, redistribution, segmentation, values
from rredcot_jax.ops.types import check_option
from rredcot_jax.parallel import sharding


def default_config() -> ConfigDict:
  """The schema with its defaults: plain GRPO on `chain`. Locked: unknown keys raise."""
  config = ConfigDict()
  config.seed = 0
  config.num_steps = 100  # Policy updates.

  config.task = ConfigDict()
  config.task.name = "chain"  # "chain", "reasoning_gym/<data set>" or "dataset/<corpus>".
  config.task.options = ConfigDict()  # Passed to the task's class; a config file may add keys.

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
  config.credit.mode = "uniform"  # advantages.MODES; uniform is GRPO and reads nothing else here but scale.
  config.credit.source = "scoring"  # credit.SOURCES, where credit comes from: RREDCoT, or what it is compared with.
  config.credit.bank = "answer"  # banks.BANKS
  config.credit.max_completion_tokens = 56  # Room for a completion; longer ones are left out, and counted.
  config.credit.bank_size = 4  # Most completions a state, for the rollouts bank.
  config.credit.force_exit = False  # Score completions as if the thought had been left already.
  config.credit.fallback = "uniform"  # Where the rollouts bank is empty: "uniform", or a reference bank's name.
  config.credit.form = "plain"  # values.FORMS
  config.credit.max_weight = 1.0  # Cap of an importance weight, for the truncated form.
  config.credit.initial_value = "baseline"  # redistribution.INITIAL_VALUES
  config.credit.state_baseline = True  # Off: "difference" credits v(s_{k+1}) whole, and praise is all there is.
  config.credit.floor = 0.0  # Share of uniform credit mixed into sigma.
  config.credit.scale = 1.0  # Multiplies every advantage.
  config.credit.chunk_size = 0  # Branches of a trace scored at once, slots or deletions run at once; 0 is all.
  config.credit.monte_carlo = ConfigDict()
  config.credit.monte_carlo.samples = 9  # Continuations a state; VinePPO's number.
  config.credit.monte_carlo.workers = 1  # Threads that judge them.
  config.credit.attribution = ConfigDict()
  config.credit.attribution.space = ""  # attribution.SPACES; "" is the method's own.
  config.credit.attribution.steps = 64  # Nodes of the quadrature, for integrated_gradients.
  config.credit.value_head = ConfigDict()
  config.credit.value_head.learning_rate = 1e-2  # Of the critic alone.
  config.credit.value_head.updates_per_rollout = 8  # Steps of its regression on each batch.
  config.credit.value_head.initial_value = 0.5  # What it values every state at, before it has learnt.
  config.credit.value_head.decay = 0.95  # lambda of generalised advantage estimation.

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
  config.loss.filter_zero_variance = False
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
  config.checkpoint.keep = 2  # Newest ones kept; at least 2, so that a damaged one can be passed over.
  config.checkpoint.on_failure = "stop"  # Where one cannot be written: "stop", or "continue" to go on without it.

  config.warm_start = ConfigDict()  # Read by experiments/warm_start.py.
  config.warm_start.initial_params = ""  # What it starts from, as initial_params above.
  config.warm_start.num_steps = 1500
  config.warm_start.batch_size = 64
  config.warm_start.learning_rate = 2e-3
  config.warm_start.wrong_share = 0.08  # Steps of the teacher that are wrong, for chain.
  config.warm_start.early_share = 0.15  # Traces that leave the thought early, for chain.

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

  config.distributed = ConfigDict()  # Several processes; how many is no part of an experiment.
  config.distributed.heartbeat_seconds = 100  # A process silent for so long is taken for dead, and the others stop.

  config.num_traces = 8  # Traces kept for the report, at every evaluation.
  config.lock()
  config.task.options.unlock()
  config.evaluation.task.options.unlock()
  return config


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
  # What `study.token_advantages` knows: "<method>:<mode>", or "grpo" (what others are over) in one of its forms.
  study.gradient_estimators = ()
  study.gradient_reference = "monte_carlo:difference"  # One of them whose mean is the policy gradient.
  study.gradient_part = "all"  # gradients.PARTS
  study.resamples = 500  # Of the bootstrap over prompts.
  config.lock()
  config.task.options.unlock()
  config.evaluation.task.options.unlock()


def task_options(config: ConfigDict, split: str) -> dict[str, Any]:
  """Keyword arguments of `tasks.make_task` for "train" or "eval"."""
  task = config.evaluation.task if split == "eval" and config.evaluation.task.name else config.task
  return {"name": task.name, "split": split, **task.options.to_dict()}


def set_model(config: ConfigDict, name: str) -> None:
  """Fills in the sizes of a model known by name.

  Raises:
    ValueError: if `name` is not in `model.config.SIZES`, offering the nearest.
  """
  check_option("model", name, tuple(SIZES))
  sizes = SIZES[name].sizes()
  scaling = sizes.pop("rope_scaling")
  config.model.update(sizes)
  config.model.rope_scaling.update(scaling or {"kind": "none"})


def model_config(config: ConfigDict, vocab_size: int) -> ModelConfig:
  """The decoder's sizes; `vocab_size` is the tokenizer's.

  Raises:
    ValueError: if the tokenizer has more words than the model.
  """
  sizes = config.model.to_dict()
  scaling = sizes.pop("rope_scaling")
  sizes["vocab_size"] = sizes["vocab_size"] or vocab_size
  if vocab_size > sizes["vocab_size"]:
    raise ValueError(
      f"the tokenizer has {vocab_size} words and the model {sizes['vocab_size']}: they do not belong together."
    )
  compute = Compute(**{field.name: config.compute[field.name] for field in dataclasses.fields(Compute)})
  return ModelConfig(
    rope_scaling=None if scaling["kind"] == "none" else RopeScaling(**scaling), compute=compute, **sizes
  )


def credit_rule(config: ConfigDict) -> CreditRule:
  """The credit's static choices as plain values."""
  names = ("mode", "form", "max_weight", "initial_value", "state_baseline", "floor", "scale")
  return CreditRule(
    group_size=config.rollout.group_size,
    temperature=config.rollout.temperature,
    baseline=config.advantages.baseline,
    advantage_scale=config.advantages.scale,
    chunk_size=config.credit.chunk_size or None,
    source=config.credit.source,
    space=config.credit.attribution.space or None,
    attribution_steps=config.credit.attribution.steps,
    gae_decay=config.credit.value_head.decay,
    **{name: config.credit[name] for name in names},
  )


def sampling_options(config: ConfigDict, *, eos_id: int, pad_id: int) -> dict[str, Any]:
  """Keyword arguments of `sampling.sample` for the rollouts of a training step."""
  names = ("max_tokens", "temperature", "top_k", "top_p")
  return {name: config.rollout[name] for name in names} | {"eos_id": eos_id, "pad_id": pad_id}


def bank_options(config: ConfigDict) -> dict[str, Any]:
  """Keyword arguments of `banks.make_bank`."""
  names = ("bank_size", "force_exit", "fallback")
  return {
    "group_size": config.rollout.group_size,
    "max_tokens": config.credit.max_completion_tokens,
    "with_failures": config.credit.form == "self_normalised",
    **{name: config.credit[name] for name in names},
  }


def assigner_options(config: ConfigDict) -> dict[str, Any]:
  """Keyword arguments of `assignment.Assigner`."""
  names = ("max_tokens", "top_k", "top_p")
  return {
    "rule": credit_rule(config),
    "bank": config.credit.bank,
    "bank_options": bank_options(config),
    "monte_carlo_options": {
      "k": config.credit.monte_carlo.samples,
      "workers": config.credit.monte_carlo.workers,
      "chunk_size": config.credit.chunk_size or None,
      **{name: config.rollout[name] for name in names},
    },
    "critic_optimizer": critic_optimizer(config),
    "critic_updates": config.credit.value_head.updates_per_rollout,
  }


def critic_optimizer(config: ConfigDict) -> optax.GradientTransformation | None:
  """The critic's, where the credit's source learns one."""
  if not credit_rule(config).learns_values:
    return None
  return value_head.make_optimizer(learning_rate=config.credit.value_head.learning_rate)


def init_critic(config: ConfigDict, width: int) -> value_head.Critic | None:
  """The critic of a run's first state, for a model of `width`; None where the credit's source learns nothing."""
  optimizer = critic_optimizer(config)
  if optimizer is None:
    return None
  return value_head.init(width, optimizer, initial_value=config.credit.value_head.initial_value)


def meshes(config: ConfigDict, devices: Sequence[Any] | None = None) -> tuple[jax.sharding.Mesh, jax.sharding.Mesh]:
  """The layouts of training and of rollouts, the same one where `rollout_mesh` says nothing; see `sharding`."""
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  return mesh, sharding.relayout(mesh, **config.rollout_mesh)


def optimizer_options(config: ConfigDict) -> dict[str, Any]:
  """Keyword arguments of `train_step.make_optimizer`."""
  options = config.optimizer.to_dict()
  updates = config.num_steps * config.loss.updates_per_rollout
  return {"decay_steps": updates if options.pop("cosine") else None, **options}


def segmentation_options(config: ConfigDict) -> dict[str, Any]:
  """Keyword arguments of `segmentation.segment`, but the tokenizer's."""
  return config.segmentation.to_dict() | {"target": config.segmentation.target or None}


def loss_options(config: ConfigDict) -> dict[str, Any]:
  """Keyword arguments of `losses.policy_loss`."""
  names = ("clip_low", "clip_high", "kl", "kl_coefficient")
  return {
    "loss": config.loss.name,
    "dual_clip": config.loss.dual_clip or None,
    "max_length": config.rollout.max_tokens,
    **{name: config.loss[name] for name in names},
  }


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


def differences(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
  """What differs between two nested dicts, each as "a.b (1 there, 2 here)"."""
  there, here = _flatten(held), _flatten(wanted)
  return [
    f"{name} ({there.get(name)!r} there, {here.get(name)!r} here)"
    for name in sorted(there.keys() | here.keys())
    if there.get(name) != here.get(name)
  ]


# How a run is laid out and looked after, not what it computes; another layout agrees to float32 reassociation.
_LAYOUT = ("mesh.", "rollout_mesh.", "distributed.", "checkpoint.")


def run_differences(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
  """As `differences`, between a run's stored configuration and one to resume it with.

  A key that the run does not have, being older, is taken to have its default; keys of
  the layout (mesh, distributed, checkpoint) may change.
  """
  flat = _flatten(default_config().to_dict()) | _flatten(held)
  kept = lambda tree: {name: value for name, value in tree.items() if not name.startswith(_LAYOUT)}
  return differences(kept(flat), kept(_flatten(wanted)))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
  return flat


def validate(config: ConfigDict) -> None:
  """Checks what can be checked before anything is made.

  Raises:
    ValueError: naming the key, its value and the fix.
  """
  choices: tuple[tuple[str, str, Sequence[str]], ...] = (
    ("segmentation.method", config.segmentation.method, segmentation.METHODS),
    ("credit.mode", config.credit.mode, advantages.MODES),
    ("credit.source", config.credit.source, SOURCES),
    ("credit.bank", config.credit.bank, banks.BANKS),
    ("credit.fallback", config.credit.fallback, banks.FALLBACKS),
    ("credit.form", config.credit.form, values.FORMS),
    ("credit.initial_value", config.credit.initial_value, redistribution.INITIAL_VALUES),
    ("advantages.baseline", config.advantages.baseline, advantages.BASELINES),
    ("advantages.scale", config.advantages.scale, advantages.SCALES),
    ("loss.name", config.loss.name, losses.LOSSES),
    ("loss.kl", config.loss.kl, losses.KL_ESTIMATORS),
    ("loss.non_finite", config.loss.non_finite, ("stop", "skip")),
    ("checkpoint.on_failure", config.checkpoint.on_failure, ("stop", "continue")),
    ("compute.dtype", config.compute.dtype, DTYPES),
    ("compute.remat", config.compute.remat, REMATS),
    ("compute.attention", config.compute.attention, ATTENTIONS),
  )
  for name, value, options in choices:
    check_option(name, value, options)
  _at_least(config, 2, "rollout.group_size", "a group of 1 has no group advantage")
  for name in (
    "num_steps", "rollout.prompts_per_step", "rollout.max_tokens", "rollout.max_prompt_tokens",
    "segmentation.k_max", "credit.bank_size", "credit.max_completion_tokens", "loss.updates_per_rollout",
    "credit.monte_carlo.samples", "credit.monte_carlo.workers", "credit.attribution.steps",
    "credit.value_head.updates_per_rollout", "evaluation.every", "evaluation.samples",
    "evaluation.num_prompts", "checkpoint.every", "compute.microbatches", "compute.length_buckets",
  ):  # fmt: skip
    _at_least(config, 1, name, "it counts something")
  rows = config.rollout.prompts_per_step * config.rollout.group_size
  if rows % config.compute.microbatches:
    raise ValueError(
      f"compute.microbatches={config.compute.microbatches} does not divide the {rows} rollouts of a step "
      "(rollout.prompts_per_step x rollout.group_size)."
    )
  room = config.rollout.max_prompt_tokens + config.rollout.max_tokens
  if room % config.mesh.sequence:
    raise ValueError(
      f"mesh.sequence={config.mesh.sequence} does not divide rollout.max_prompt_tokens + rollout.max_tokens = {room}: "
      f"each of its devices would compute all of it. Add {-room % config.mesh.sequence} to one of them."
    )
  if 0 < config.model.max_positions < room:
    raise ValueError(
      f"rollout.max_prompt_tokens + rollout.max_tokens = {room} is more than model.max_positions="
      f"{config.model.max_positions}: lower one of them, or set RoPE scaling and raise the last."
    )
  if config.advantages.baseline == "none" and config.advantages.scale != "none":
    raise ValueError("advantages.baseline='none' divides by 0 where all returns agree; set advantages.scale='none'.")
  space = config.credit.attribution.space
  if space:
    check_option("credit.attribution.space", space, attribution.SPACES)
  check_combination(config.credit.source, config.credit.mode, config.credit.bank, space or None)
  if not config.credit.state_baseline and (
    config.credit.mode != "difference" or config.credit.source not in ("scoring", "monte_carlo")
  ):
    raise ValueError(
      f"credit.state_baseline=False with mode={config.credit.mode!r} and source={config.credit.source!r}: "
      "only 'difference' of state values (scoring, monte_carlo) has a baseline to leave out."
    )
  if not 0 <= config.credit.value_head.decay <= 1:
    raise ValueError(f"credit.value_head.decay={config.credit.value_head.decay} must be in [0, 1].")
  if config.credit.form == "self_normalised" and config.credit.bank != "rollouts":
    raise ValueError(
      f"credit.form='self_normalised' with credit.bank={config.credit.bank!r} gives every state the same value: "
      "it needs completions of zero utility, which only the 'rollouts' bank has."
    )


def _at_least(config: ConfigDict, least: int, name: str, why: str) -> None:
  value: Any = config
  for key in name.split("."):
    value = value[key]
  if value < least:
    raise ValueError(f"{name}={value} must be at least {least}: {why}.")
