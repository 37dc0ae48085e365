"""Checks a configuration before anything is made or written."""

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from rredcot_jax.credit import source as source_lib
from rredcot_jax.credit.sources import source_class
from rredcot_jax.data.encoding import Layout
from rredcot_jax.model.config import ATTENTIONS, DTYPES, REMATS
from rredcot_jax.ops import advantages, banks, losses, redistribution, segmentation, values
from rredcot_jax.ops.names import check_option, resolve
from rredcot_jax.train import preflight, tracking

_WORD, _NAMED = object(), object()  # A built-in name alone, or also "package.module:name".

_CHOICES: Mapping[str, tuple[tuple[str, ...], object]] = {
  "rollout.overlong": (preflight.OVERLONG, _WORD),
  "segmentation.method": (segmentation.METHODS, _NAMED),
  "segmentation.after_exit": (segmentation.AFTER_EXIT, _WORD),
  "credit.mode": (advantages.MODES, _WORD),
  "credit.bank": (banks.BANKS, _NAMED),
  "credit.scored": (banks.SCORED, _WORD),
  "credit.fallback": (banks.FALLBACKS, _NAMED),
  "credit.form": (values.FORMS, _NAMED),
  "credit.initial_value": (redistribution.INITIAL_VALUES, _WORD),
  "advantages.baseline": (advantages.BASELINES, _WORD),
  "advantages.scale": (advantages.SCALES, _WORD),
  "loss.name": (losses.LOSSES, _WORD),
  "loss.kl": (losses.KL_ESTIMATORS, _WORD),
  "loss.non_finite": (("stop", "skip"), _WORD),
  "checkpoint.on_failure": (("stop", "continue"), _WORD),
  "tracker": (tracking.TRACKERS, _WORD),
  "compute.dtype": (DTYPES, _WORD),
  "compute.remat": (REMATS, _WORD),
  "compute.attention": (ATTENTIONS, _WORD),
}

_POSITIVE = (1, 2**31 - 1)  # Counts of something.
_WHOLE: Mapping[str, tuple[int, int]] = {
  "seed": (0, 2**32 - 1),
  "num_steps": _POSITIVE,
  "num_traces": _POSITIVE,
  "model.vocab_size": (0, 2**31 - 1),
  "model.max_positions": (0, 2**31 - 1),
  **dict.fromkeys(
    (f"model.{name}" for name in ("width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_width")),
    _POSITIVE,
  ),
  "rollout.prompts_per_step": _POSITIVE,
  "rollout.group_size": (2, 2**31 - 1),  # A group of 1 has no group advantage.
  "rollout.max_prompt_tokens": _POSITIVE,
  "rollout.max_tokens": _POSITIVE,
  "rollout.top_k": (0, 2**31 - 1),
  "segmentation.k_max": _POSITIVE,
  "segmentation.stride": _POSITIVE,
  "credit.bank_size": _POSITIVE,
  "credit.max_completion_tokens": _POSITIVE,
  "credit.chunk_size": (0, 2**31 - 1),
  "loss.updates_per_rollout": _POSITIVE,
  "optimizer.warmup_steps": (0, 2**31 - 1),
  "evaluation.every": _POSITIVE,
  "evaluation.num_prompts": _POSITIVE,
  "evaluation.rows": _POSITIVE,
  "evaluation.samples": _POSITIVE,
  "checkpoint.every": _POSITIVE,
  "warm_start.num_steps": _POSITIVE,
  "warm_start.batch_size": _POSITIVE,
  **dict.fromkeys((f"mesh.{axis}" for axis in ("data", "fsdp", "tensor", "sequence")), (-1, 2**31 - 1)),
  **dict.fromkeys((f"rollout_mesh.{axis}" for axis in ("data", "fsdp", "tensor", "sequence")), (-1, 2**31 - 1)),
  "compute.log_prob_chunk": (0, 2**31 - 1),
  "compute.microbatches": _POSITIVE,
  "compute.length_buckets": _POSITIVE,
  "distributed.heartbeat_seconds": _POSITIVE,
}

# (least, most, whether the least itself is allowed); the most always is.
_NUMBERS: Mapping[str, tuple[float, float, bool]] = {
  "model.rope_theta": (0.0, 1e30, False),
  "model.norm_epsilon": (0.0, 1.0, False),
  "rollout.temperature": (0.0, 1e6, False),
  "rollout.top_p": (0.0, 1.0, False),
  "credit.floor": (0.0, 1.0, True),
  "loss.clip_low": (0.0, 1.0, True),
  "loss.clip_high": (0.0, 1e6, True),
  "loss.dual_clip": (0.0, 1e6, True),
  "loss.kl_coefficient": (0.0, 1e6, True),
  "optimizer.learning_rate": (0.0, 1e6, True),
  "optimizer.weight_decay": (0.0, 1e6, True),
  "optimizer.max_grad_norm": (0.0, 1e30, False),
  "warm_start.learning_rate": (0.0, 1e6, True),
}


def validate(config: ConfigDict) -> None:
  """Checks all that can be known without a task, a model or a device.

  Raises:
    ValueError: naming the key, its value and the fix.
  """
  for name, (options, kind) in _CHOICES.items():
    value = _get(config, name)
    if kind is _NAMED and not (isinstance(value, str) and value in options):
      resolve(name, value, dict.fromkeys(options))
    else:
      check_option(name, value, options)
  for name, (least, most) in _WHOLE.items():
    value = _get(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
      raise ValueError(f"{name}={value!r} must be a whole number of at least {least} and at most {most}.")
  for name, (low, high, closed) in _NUMBERS.items():
    number = _get(config, name)
    if not math.isfinite(number) or not (low <= number if closed else low < number) or number > high:
      least_words = f"at least {low:g}" if closed else f"above {low:g}"
      raise ValueError(f"{name}={number!r} must be a finite number, {least_words} and at most {high:g}.")
  _check_finite("", config.to_dict())
  tracking.check_installed(config.tracker)
  _check_meshes(config)
  _check_rows(config)
  _check_losses(config)
  _check_credit(config)
  Layout(**{name: text for name, text in config.response.to_dict().items() if text})


def bank_options(config: ConfigDict) -> source_lib.BankOptions:
  """The configured bank."""
  return source_lib.BankOptions(
    name=config.credit.bank, max_tokens=config.credit.max_completion_tokens, form=config.credit.form,
    scored=config.credit.scored, fallback=config.credit.fallback, size=config.credit.bank_size,
  )  # fmt: skip


def _get(config: ConfigDict, name: str) -> Any:
  value: Any = config
  for key in name.split("."):
    value = value[key]
  return value


def _check_finite(prefix: str, tree: Any) -> None:
  """Refuses NaN in the options of a class: such a run could not be resumed, because NaN does not equal itself."""
  if isinstance(tree, Mapping):
    for name, value in tree.items():
      _check_finite(f"{prefix}.{name}" if prefix else str(name), value)
  elif isinstance(tree, list | tuple):
    for place, value in enumerate(tree):
      _check_finite(f"{prefix}[{place}]", value)
  elif isinstance(tree, float) and not math.isfinite(tree):
    raise ValueError(f"{prefix}={tree!r} must be a finite number.")


def _check_meshes(config: ConfigDict) -> None:
  for name in ("mesh", "rollout_mesh"):
    sizes = config[name].to_dict()
    for axis, size in sizes.items():
      if size == 0 and not (name == "rollout_mesh" and axis == "data"):
        raise ValueError(f"{name}.{axis}=0 must be at least 1, or -1 for the devices that are left.")
    if sum(size == -1 for size in sizes.values()) > 1:
      raise ValueError(f"{name} has more than one axis of -1: only one can take the devices that are left.")
  room = config.rollout.max_prompt_tokens + config.rollout.max_tokens
  if config.mesh.sequence > 0 and room % config.mesh.sequence:
    raise ValueError(
      f"mesh.sequence={config.mesh.sequence} does not divide rollout.max_prompt_tokens + rollout.max_tokens = {room}: "
      f"each of its devices would compute all of it. Add {-room % config.mesh.sequence} to one of them."
    )
  if 0 < config.model.max_positions < room:
    raise ValueError(
      f"rollout.max_prompt_tokens + rollout.max_tokens = {room} is more than model.max_positions="
      f"{config.model.max_positions}: lower one of them, or set RoPE scaling and raise the last."
    )


def _check_rows(config: ConfigDict) -> None:
  rows = config.rollout.prompts_per_step * config.rollout.group_size
  if rows % config.compute.microbatches:
    raise ValueError(
      f"compute.microbatches={config.compute.microbatches} does not divide the {rows} rollouts of a step "
      "(rollout.prompts_per_step x rollout.group_size)."
    )


def _check_losses(config: ConfigDict) -> None:
  if config.loss.dual_clip and config.loss.dual_clip <= 1:
    raise ValueError(f"loss.dual_clip={config.loss.dual_clip} must be above 1, or 0 for off.")
  if config.loss.dual_clip and config.loss.name == "cispo":
    raise ValueError("loss.dual_clip with loss.name='cispo': cispo has no clipped objective; set loss.dual_clip=0.")
  if config.loss.kl == "off" and config.loss.kl_coefficient:
    raise ValueError(
      f"loss.kl_coefficient={config.loss.kl_coefficient} with loss.kl='off' is read by nothing: choose loss.kl."
    )
  if config.advantages.baseline == "none" and config.advantages.scale != "none":
    raise ValueError("advantages.baseline='none' divides by 0 where all returns agree; set advantages.scale='none'.")


def _check_credit(config: ConfigDict) -> None:
  found = source_class(config.credit.source)
  if config.credit.mode == "uniform":
    return
  found.check(config.credit.mode, bank_options(config), config.credit.options.to_dict())
  if not config.credit.state_baseline and (config.credit.mode != "difference" or not found.estimates_values):
    raise ValueError(
      f"credit.state_baseline=False with mode={config.credit.mode!r} and source={config.credit.source!r}: "
      "only 'difference' of state values has a baseline to leave out."
    )
