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

from rredcot_jax import losses, scoring, segmentation, sharding, types, value_head
from rredcot_jax.masked import masked_mean
from rredcot_jax.model import decoder
from rredcot_jax.model.config import ModelConfig

Metrics = dict[str, chex.Array]


@struct.dataclass
class TrainState:
  """All that an update changes."""

  step: chex.Array  # [] int32, updates made.
  params: decoder.Params
  opt_state: Any
  critic: value_head.Critic | None = None  # Where credit.source is "value_head"; no policy update changes it.


class Steps(NamedTuple):
  """The jitted arrows of a training step, in the order they are called."""

  segment: Callable[..., types.Segments]  # (rollout, tables)
  reference: Callable[..., chex.Array]  # (params, batch) -> [B, T] log-probabilities.
  update: Callable[..., tuple[TrainState, Metrics]]  # (state, batch); the state is donated.


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
  # Block parameters are stacked over layers, so a norm's scale is a matrix by rank and must be told by name.
  decayed = lambda params: jax.tree_util.tree_map_with_path(
    lambda path, _: not any("norm" in str(k) or "bias" in str(k) for k in path), params
  )
  return optax.chain(
    optax.clip_by_global_norm(max_grad_norm),
    optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=weight_decay, mask=decayed),
  )


def init_state(
  params: decoder.Params, optimizer: optax.GradientTransformation, critic: value_head.Critic | None = None
) -> TrainState:
  """The state before the first update."""
  return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params), critic=critic)


def policy_update(
  state: TrainState,
  batch: types.TrainBatch,
  *,
  config: ModelConfig,
  optimizer: optax.GradientTransformation,
  temperature: float,
  loss: Callable[[chex.Array, types.TrainBatch], tuple[chex.Array, Metrics]],
  skip_non_finite: bool = False,
) -> tuple[TrainState, Metrics]:
  """One policy-gradient update on credited traces.

  Args:
    state: donated by callers that jit this.
    batch: fields [B, ...]; advantages and old log-probabilities are inputs.
    config, optimizer, temperature: static.
    loss: (log_probs [B, T], batch) -> (loss [], metrics), such as a partial of
      `losses.policy_loss`.
    skip_non_finite: leave the state as it is where the loss or its gradient is not
      finite, and say so in the metric `skipped`.

  Returns:
    The new state and scalar metrics, `gradient_norm` and `entropy` among them.
  """

  def loss_fn(params: decoder.Params) -> tuple[chex.Array, Metrics]:
    log_probs, entropy = scoring.trace_log_probs(params, config, batch, temperature=temperature)
    value, metrics = loss(log_probs, batch)
    return value, metrics | {"entropy": masked_mean(jax.lax.stop_gradient(entropy), batch.mask)}

  return _apply(state, loss_fn, optimizer, skip_non_finite=skip_non_finite)


def supervised_update(
  state: TrainState, batch: types.TrainBatch, *, config: ModelConfig, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
  """One maximum-likelihood update: minus the mean log-probability of the loss tokens."""

  def loss_fn(params: decoder.Params) -> tuple[chex.Array, Metrics]:
    log_probs, _ = scoring.trace_log_probs(params, config, batch, temperature=1.0)
    value = -masked_mean(log_probs, batch.loss_mask)
    return value, {"loss": value}

  return _apply(state, loss_fn, optimizer)


def compile_steps(
  config: ModelConfig,
  optimizer: optax.GradientTransformation,
  placement: TrainState,
  mesh: jax.sharding.Mesh,
  *,
  temperature: float,
  eos_id: int,
  segmentation_options: Mapping[str, Any],
  loss_options: Mapping[str, Any],
  skip_non_finite: bool = False,
) -> Steps:
  """Jits the arrows between a rollout and the next state.

  Args:
    config, optimizer: the model and its optimizer.
    placement: the state's shardings, as `sharding.infer` gives them.
    mesh: batches are split over its data axes.
    temperature: that the traces are sampled at.
    eos_id: ends a trace.
    segmentation_options: of `segmentation.segment`.
    loss_options: of `losses.policy_loss`.
    skip_non_finite: see `policy_update`.
  """
  one: Callable[..., types.Segments] = functools.partial(segmentation.segment, eos_id=eos_id, **segmentation_options)
  cut = jax.vmap(one, in_axes=(0, 0, 0, 0, None))
  update = functools.partial(
    policy_update,
    config=config,
    optimizer=optimizer,
    temperature=temperature,
    loss=functools.partial(losses.policy_loss, **loss_options),
    skip_non_finite=skip_non_finite,
  )
  return Steps(
    segment=jax.jit(lambda r, tables: cut(r.tokens, r.log_probs, r.entropy, r.mask, tables)),
    reference=jax.jit(lambda params, batch: scoring.trace_log_probs(params, config, batch, temperature=temperature)[0]),
    update=jax.jit(
      update,
      in_shardings=(placement, sharding.batch(mesh)),
      out_shardings=(placement, sharding.replicated(mesh)),
      donate_argnums=0,
    ),
  )


def _apply(
  state: TrainState,
  loss_fn: Callable[[decoder.Params], tuple[chex.Array, Metrics]],
  optimizer: optax.GradientTransformation,
  *,
  skip_non_finite: bool = False,
) -> tuple[TrainState, Metrics]:
  (value, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = metrics | {"gradient_norm": optax.tree.norm(gradient)}
  new = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
  if skip_non_finite:
    finite = jnp.logical_and(jnp.isfinite(value), jnp.isfinite(metrics["gradient_norm"]))
    new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
    metrics = metrics | {"skipped": 1.0 - finite}
  return new, metrics
