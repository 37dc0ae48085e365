"""The train state, the two updates, and the compiled steps of a training loop."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct

from rredcot_jax.data.encoding import Codec
from rredcot_jax.model import decoder, sampling, scoring
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.ops import losses, segmentation, types
from rredcot_jax.ops.masked import masked_mean
from rredcot_jax.parallel import sharding

Metrics = dict[str, chex.Array]


@struct.dataclass
class TrainState:
  """All that an update changes."""

  step: chex.Array  # [] int32, updates made.
  params: decoder.Params
  opt_state: Any
  learnt: Any = None  # What the source of credit has learnt; no policy update changes it.


class RolloutSteps(NamedTuple):
  """The jitted arrows from parameters to segments, in the order they are called."""

  params: Callable[..., decoder.Params]  # (params) -> as sampling and scoring want them: layout and type.
  sample: Callable[..., tuple[types.Rollout, decoder.Cache]]  # (params, prompts, mask, key); see `sampling.sample`.
  segment: Callable[..., types.Segments]  # (rollout)


class UpdateSteps(NamedTuple):
  """The jitted arrows from credited traces to the next state."""

  log_probs: Callable[..., chex.Array]  # (params, batch) -> [B, T], of the policy that the KL term compares with.
  update: Callable[..., tuple[TrainState, Metrics]]  # (state, batch, longest trace or None); the state is donated.


def make_optimizer(
  *,
  learning_rate: float,
  warmup_steps: int,
  decay_steps: int | None,
  weight_decay: float,
  max_grad_norm: float,
) -> optax.GradientTransformation:
  """AdamW behind a clip by global norm; linear warm-up, then constant or a cosine to a tenth.

  Args:
    learning_rate: its peak.
    warmup_steps: updates until the peak.
    decay_steps: updates until the cosine ends, warm-up included; None keeps the peak.
    weight_decay: decoupled, on matrices only.
    max_grad_norm: gradients are scaled down to this global norm.
  """
  if decay_steps is None:
    schedule = optax.linear_schedule(learning_rate / max(warmup_steps, 1), learning_rate, warmup_steps)
  else:
    # A run shorter than its warm-up still has to fall at its end.
    schedule = optax.warmup_cosine_decay_schedule(
      0.0, learning_rate, min(warmup_steps, decay_steps - 1), decay_steps, end_value=learning_rate / 10
    )
  # Block parameters are stacked over layers. A norm's scale then has two axes, so it is recognised by name.
  decayed = lambda params: jax.tree_util.tree_map_with_path(
    lambda path, _: not any("norm" in str(k) or "bias" in str(k) for k in path), params
  )
  return optax.chain(
    optax.clip_by_global_norm(max_grad_norm),
    optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=weight_decay, mask=decayed),
  )


def init_state(params: decoder.Params, optimizer: optax.GradientTransformation, learnt: Any = None) -> TrainState:
  """The state before the first update."""
  return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params), learnt=learnt)


def policy_update(
  state: TrainState,
  batch: types.TrainBatch,
  *,
  config: ModelConfig,
  optimizer: optax.GradientTransformation,
  temperature: float,
  loss: Callable[[chex.Array, types.TrainBatch], tuple[chex.Array, Metrics]],
  weight: Callable[[chex.Array], chex.Array] | None = None,
  microbatches: int = 1,
  skip_non_finite: bool = False,
) -> tuple[TrainState, Metrics]:
  """One policy-gradient update on credited traces.

  Args:
    state: donated by callers that jit this.
    batch: fields [B, ...]; advantages and old log-probabilities are inputs.
    config, optimizer, temperature: static.
    loss: (log_probs [B, T], batch) -> (loss [], metrics), such as a partial of
      `losses.policy_loss`.
    weight: (loss_mask) -> [], a part's share in the loss of the batch, such as a partial of
      `losses.loss_weight`; needed for more than one microbatch.
    microbatches: static; parts of B / microbatches rows whose gradients are added up in
      float32. The update is that of the whole batch, with the memory of one part.
    skip_non_finite: leave the state unchanged where the loss or its gradient is not
      finite, and count it in the metric `skipped`.

  Returns:
    The new state and scalar metrics, `gradient_norm` and `entropy` among them.

  Raises:
    ValueError: if the parts are not of equal size.
  """

  def loss_fn(params: decoder.Params, part: types.TrainBatch) -> tuple[chex.Array, Metrics]:
    log_probs, entropy = scoring.trace_log_probs(params, config, part, temperature=temperature)
    value, metrics = loss(log_probs, part)
    return value, metrics | {"entropy": masked_mean(jax.lax.stop_gradient(entropy), part.mask)}

  if microbatches == 1:
    (_, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
    return _apply(state, gradient, metrics, optimizer, skip_non_finite=skip_non_finite)

  assert weight is not None
  parts = split_rows(batch, microbatches)
  weights = jax.vmap(weight)(parts.loss_mask)
  whole = jnp.maximum(jnp.sum(weights), 1)

  def add_part(
    gradient: decoder.Params, scanned: tuple[types.TrainBatch, chex.Array]
  ) -> tuple[decoder.Params, Metrics]:
    part, share = scanned
    (_, metrics), more = jax.value_and_grad(loss_fn, has_aux=True)(state.params, part)
    gradient = jax.tree.map(lambda total, x: total + share * x.astype(jnp.float32), gradient, more)
    return sharding.constrain_params(gradient), metrics

  zeros = sharding.constrain_params(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.params))
  gradient, of_parts = jax.lax.scan(add_part, zeros, (parts, weights / whole))
  entropy, tokens = of_parts.pop("entropy"), jnp.sum(parts.mask, axis=(1, 2))
  metrics = losses.merge_metrics(of_parts, weights)
  metrics["entropy"] = jnp.sum(entropy * tokens) / jnp.maximum(jnp.sum(tokens), 1)
  return _apply(state, gradient, metrics, optimizer, skip_non_finite=skip_non_finite)


def split_rows(batch: Any, parts: int) -> Any:
  """[B, ...] -> [parts, B / parts, ...]; every part has rows of every device, if they divide.

  Raises:
    ValueError: if `parts` does not divide B.
  """

  def split(x: chex.Array) -> chex.Array:
    if x.shape[0] % parts:
      raise ValueError(f"microbatches={parts} does not divide a batch of {x.shape[0]} rows.")
    x = jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
    return sharding.constrain(x, None, "rows", *[None] * (x.ndim - 2))

  return jax.tree.map(split, batch)


def supervised_update(
  state: TrainState, batch: types.TrainBatch, *, config: ModelConfig, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
  """One maximum-likelihood update: minus the mean log-probability of the loss tokens."""

  def loss_fn(params: decoder.Params) -> tuple[chex.Array, Metrics]:
    log_probs, _ = scoring.trace_log_probs(params, config, batch, temperature=1.0)
    value = -masked_mean(log_probs, batch.loss_mask)
    return value, {"loss": value}

  (_, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  return _apply(state, gradient, metrics, optimizer)


def compile_rollouts(
  config: ModelConfig,
  mesh: jax.sharding.Mesh,
  rollout_mesh: jax.sharding.Mesh,
  codec: Codec,
  *,
  segmentation_options: Mapping[str, Any],
  sampling_options: Mapping[str, Any],
) -> RolloutSteps:
  """Jits the arrows from parameters to segments.

  Args:
    config: the model.
    mesh: that parameters lie on.
    rollout_mesh: the layout in which rollouts are sampled, cut and scored.
    codec: what ends a trace, what leaves its thought, and what its tokens say.
    segmentation_options: of `segmentation.segment`.
    sampling_options: of `sampling.sample`, without the ids.
  """
  one: Callable[..., types.Segments] = functools.partial(
    segmentation.segment, eos_ids=codec.end_ids, **segmentation_options
  )
  cut = lambda rollout, tables, exit_table: jax.vmap(
    lambda r: one(r.tokens, r.mask, tables, log_probs=r.log_probs, entropy=r.entropy, exit_table=exit_table)
  )(rollout)
  ids = {"eos_id": codec.end_ids, "pad_id": codec.pad_id}
  jitted = sharding.on(rollout_mesh, jax.jit(cut))
  tables: Any = (codec.tables, codec.exit_table)  # Put there once, because they are sent at every step otherwise.
  tables = sharding.put_state(jax.tree.map(lambda _: sharding.replicated(rollout_mesh), tables), tables)
  return RolloutSteps(
    params=for_rollouts(config, mesh, rollout_mesh),
    sample=sharding.on(rollout_mesh, functools.partial(_sample, config, {**sampling_options, **ids})),
    segment=lambda rollout: jitted(rollout, *tables),
  )


def bind_update(
  config: ModelConfig,
  optimizer: optax.GradientTransformation,
  *,
  temperature: float,
  loss_options: Mapping[str, Any],
  microbatches: int,
  skip_non_finite: bool,
) -> Callable[[TrainState, types.TrainBatch], tuple[TrainState, Metrics]]:
  """`policy_update` with one of the `losses`; see `compile_updates` for the arguments."""
  return functools.partial(
    policy_update,
    config=config,
    optimizer=optimizer,
    temperature=temperature,
    loss=functools.partial(losses.policy_loss, **loss_options),
    weight=functools.partial(losses.loss_weight, loss=loss_options["loss"], max_length=loss_options.get("max_length")),
    microbatches=microbatches,
    skip_non_finite=skip_non_finite,
  )


def compile_updates(
  config: ModelConfig,
  optimizer: optax.GradientTransformation,
  placement: TrainState,
  mesh: jax.sharding.Mesh,
  *,
  temperature: float,
  loss_options: Mapping[str, Any],
  microbatches: int = 1,
  length_buckets: int = 1,
  skip_non_finite: bool = False,
) -> UpdateSteps:
  """Jits the arrows from credited traces to the next state.

  Args:
    config, optimizer: the model and its optimizer.
    placement: the state's shardings, as `sharding.infer` gives them.
    mesh: batches are split over its data axes.
    temperature: that the traces are sampled at.
    loss_options: of `losses.policy_loss`.
    microbatches: of `policy_update`.
    length_buckets: lengths, evenly spaced up to a batch's room, that the update is compiled for, all
      of them by its first call; a batch runs at the shortest that holds its longest trace.
    skip_non_finite: see `policy_update`.
  """
  update = bind_update(
    config, optimizer, temperature=temperature, loss_options=loss_options, microbatches=microbatches,
    skip_non_finite=skip_non_finite,
  )  # fmt: skip
  log_probs = lambda params, batch: scoring.trace_log_probs(params, config, batch, temperature=temperature)[0]
  return UpdateSteps(
    log_probs=sharding.on(mesh, jax.jit(log_probs)),
    update=sharding.on(mesh, _in_buckets(update, length_buckets, placement, mesh)),
  )


def for_rollouts(
  config: ModelConfig, mesh: jax.sharding.Mesh, rollout_mesh: jax.sharding.Mesh
) -> Callable[[decoder.Params], decoder.Params]:
  """A function of parameters placed on `mesh`: as sampling and scoring want them on `rollout_mesh`.

  Sampling reads every parameter once a token. So they are rounded to the compute type and
  moved to the layout of sampling once. The parameters themselves where neither changes them.
  """
  if rollout_mesh is mesh and config.compute.dtype == "float32":
    return lambda params: params
  abstract = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
  return jax.jit(lambda params: decoder.rounded(params, config), out_shardings=sharding.infer(rollout_mesh, abstract))


def bucket_lengths(room: int, buckets: int) -> list[int]:
  """Lengths of `buckets` evenly spaced buckets, the last `room`."""
  return sorted({-(-room * i // buckets) for i in range(1, buckets + 1)})


def shortened(batch: types.TrainBatch, length: int) -> types.TrainBatch:
  """The first `length` columns of the traces."""
  prompt = ("prompt_tokens", "prompt_mask")
  fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
  # A field that the batch leaves out is None, which has no leaves.
  cut = functools.partial(jax.tree.map, lambda x: x[:, :length])
  return types.TrainBatch(**{name: x if name in prompt else cut(x) for name, x in fields.items()})


def _in_buckets(
  update: Callable[..., tuple[TrainState, Metrics]], buckets: int, placement: TrainState, mesh: jax.sharding.Mesh
) -> Callable[..., tuple[TrainState, Metrics]]:
  """The jitted update; with more than one bucket, compiled for each length at the first call and never again."""
  options: Any = {
    "in_shardings": (placement, sharding.batch(mesh)),
    "out_shardings": (placement, sharding.replicated(mesh)),
    "donate_argnums": 0,
  }
  compiled: dict[int, Any] = {}

  def call(state: TrainState, batch: types.TrainBatch, longest: int | None = None) -> tuple[TrainState, Metrics]:
    room = batch.tokens.shape[1]
    if not compiled:
      for length in bucket_lengths(room, buckets):
        at_length = jax.jit(lambda state, batch, at=length: update(state, shortened(batch, at)), **options)
        compiled[length] = at_length.lower(state, batch).compile()
    length = next(length for length in compiled if length >= (room if longest is None else longest))
    return compiled[length](state, batch)

  if buckets > 1:
    return call
  whole = jax.jit(update, **options)
  return lambda state, batch, longest=None: whole(state, batch)


def _sample(
  config: ModelConfig,
  options: Mapping[str, Any],
  params: decoder.Params,
  prompts: chex.Array,
  mask: chex.Array,
  key: Any,
) -> tuple[types.Rollout, decoder.Cache]:
  return sampling.sample(params, config, prompts, mask, key, **options)


def _apply(
  state: TrainState,
  gradient: decoder.Params,
  metrics: Metrics,
  optimizer: optax.GradientTransformation,
  *,
  skip_non_finite: bool = False,
) -> tuple[TrainState, Metrics]:
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = metrics | {"gradient_norm": optax.tree.norm(gradient)}
  new = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
  if skip_non_finite:
    finite = jnp.logical_and(jnp.isfinite(metrics["loss"]), jnp.isfinite(metrics["gradient_norm"]))
    new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
    metrics = metrics | {"skipped": 1.0 - finite}
  return new, metrics
