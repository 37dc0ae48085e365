"""The compiled programs of a configuration's training step, without allocating it, and the largest batch that fits."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rredcot_jax.credit import likelihood
from rredcot_jax.model import decoder, sampling
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.ops import banks, composition, types
from rredcot_jax.parallel import sharding
from rredcot_jax.train import train_step
from rredcot_jax.train.experiment import Experiment, loss_options

REMATS_BY_COST = ("none", "dots", "attention", "full")  # From least computed again to most.


def programs(experiment: Experiment) -> dict[str, Callable[[], Any]]:
  """The three programs of a training step, each to be lowered by a call: sample, score, update.

  Nothing is allocated. Arguments are shapes with the placement of training. The devices of the
  experiment need not exist.

  Args:
    experiment: of a configuration as experiments/train.py takes it.
  """
  config, model = experiment.config, experiment.model
  mesh, rollout_mesh, rule = experiment.mesh, experiment.rollout_mesh, experiment.rule
  state = experiment.abstract_params_state
  whole = jax.eval_shape(lambda params: decoder.rounded(params, model), state.params)
  policy = _placed(whole, sharding.infer(rollout_mesh, whole))
  rollout, cache, segments, bank, returns = _abstract_rollout(config, model, rollout_mesh)
  options = experiment.sampling_options | {"eos_id": model.vocab_size - 1, "pad_id": model.vocab_size - 1}

  def sample() -> Any:
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(rollout_mesh))
    with sharding.use(rollout_mesh):
      return sampling.sample.lower(policy, model, rollout.prompt_tokens, rollout.prompt_mask, key, **options)

  def assign(params: Any, cache: Any, rollout: Any, segments: Any, bank: Any, returns: Any, rows: Any) -> Any:
    estimated, sizes = likelihood.bank_values(
      params, model, cache, rollout, segments, bank, returns, temperature=config.rollout.temperature,
      form=config.credit.form, chunk_size=config.credit.chunk_size or None,
    )  # fmt: skip
    return composition.credit_from_values(
      estimated, segments, returns, sample_sizes=sizes, uniform_rows=rows, **rule.of_values
    )

  def score() -> Any:
    rows = jax.ShapeDtypeStruct(returns.shape, bool, sharding=returns.sharding)
    with sharding.use(rollout_mesh):
      return jax.jit(assign).lower(policy, cache, rollout, segments, bank, returns, rows)

  def update() -> Any:
    fields = ("prompt_tokens", "prompt_mask", "tokens", "mask")
    batch = types.TrainBatch(
      loss_mask=rollout.mask, old_log_probs=rollout.log_probs, reference_log_probs=rollout.log_probs,
      advantages=rollout.log_probs, **{name: getattr(rollout, name) for name in fields},
    )  # fmt: skip
    batch = _placed(batch, jax.tree.map(lambda _: sharding.batch(mesh), batch))
    step = train_step.bind_update(
      model, experiment.optimizer, temperature=config.rollout.temperature, loss_options=loss_options(config),
      microbatches=config.compute.microbatches, skip_non_finite=config.loss.non_finite == "skip",
    )  # fmt: skip
    placement = jax.tree.map(lambda x: x.sharding, state)
    out = (placement, sharding.replicated(mesh))
    with sharding.use(mesh):
      return jax.jit(step, out_shardings=out, donate_argnums=0).lower(state, batch)

  lowered = {"sample": sample, "score": score, "update": update}
  scores = rule.redistributes and config.credit.source == "scoring"
  return lowered if scores else {"sample": sample, "update": update}


def _placed(tree: Any, placement: Any) -> Any:
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, placement)


def _abstract_rollout(config: ConfigDict, model: ModelConfig, mesh: Any) -> tuple[Any, ...]:
  rows = config.rollout.prompts_per_step * config.rollout.group_size
  prompt, room, k = config.rollout.max_prompt_tokens, config.rollout.max_tokens, config.segmentation.k_max
  by_rows = sharding.batch(mesh)
  array = lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=by_rows)
  rollout = types.Rollout(
    prompt_tokens=array(jnp.int32, prompt), prompt_mask=array(bool, prompt), tokens=array(jnp.int32, room),
    mask=array(bool, room), log_probs=array(jnp.float32, room),
    sampler_log_probs=array(jnp.float32, room), entropy=array(jnp.float32, room), truncated=array(bool),
  )  # fmt: skip
  segments = types.Segments(
    ends=array(jnp.int32, k), segment_ids=array(jnp.int32, room), num_segments=array(jnp.int32),
    num_merged=array(jnp.int32), thought_end=array(jnp.int32),
  )  # fmt: skip
  each = (k, banks.num_completions(config.credit.bank, config.credit.fallback, config.credit.bank_size))
  tokens = (*each, config.credit.max_completion_tokens)
  bank = types.Completions(
    tokens=array(jnp.int32, *tokens), mask=array(bool, *tokens), scored=array(bool, *tokens),
    utilities=array(jnp.float32, *each), log_q=array(jnp.float32, *each), valid=array(bool, *each),
  )  # fmt: skip
  shape = (model.num_layers, rows, model.num_kv_heads, prompt + room, model.head_dim)
  column = jax.ShapeDtypeStruct(shape, jnp.dtype(model.compute.dtype), sharding=sharding.cache(mesh, shape))
  return rollout, decoder.Cache(key=column, value=column), segments, bank, array(jnp.float32)


def search(
  fits: Callable[[list[str], dict[str, Any]], bool], prompts: int, *, group_size: int, row_parts: int
) -> dict[str, Any] | None:
  """The largest batch that fits, and for it the remat policy that computes least again with the fewest microbatches.

  Args:
    fits: (programs, changes) -> whether they fit; changes are prompts, remat and microbatches.
    prompts: of a step, to begin with. Doubled while sampling, scoring and the update with least memory fit.
    group_size: rows a prompt.
    row_parts: devices that rows are split over; a microbatch has at least a row for each.

  Returns:
    The changes, or None if not even the first batch fits.
  """
  smallest = lambda prompts: max(prompts * group_size // row_parts, 1)
  best = None
  while fits(["sample", "score"], {"prompts": prompts}) and fits(
    ["update"], {"prompts": prompts, "remat": REMATS_BY_COST[-1], "microbatches": smallest(prompts)}
  ):
    best, prompts = prompts, 2 * prompts
  if best is None:
    return None
  for remat in REMATS_BY_COST:
    microbatches = 1
    while microbatches <= smallest(best):
      changes = {"prompts": best, "remat": remat, "microbatches": microbatches}
      if fits(["update"], changes):
        return changes
      microbatches *= 2
  return None
