"""The train state, and the two updates: on credited traces, and on given ones."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct

from rredcot_jax import losses, scoring, types
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


def make_optimizer(
  *, learning_rate: float, warmup_steps: int, decay_steps: int | None, weight_decay: float, max_grad_norm: float
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
    schedule = optax.warmup_cosine_decay_schedule(
      0.0, learning_rate, warmup_steps, decay_steps, end_value=learning_rate / 10
    )
  # Block parameters are stacked over layers, so a norm's scale is a matrix by rank and must be told by name.
  decayed = lambda params: jax.tree_util.tree_map_with_path(
    lambda path, _: not any("norm" in str(k) or "bias" in str(k) for k in path), params
  )
  return optax.chain(
    optax.clip_by_global_norm(max_grad_norm),
    optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=weight_decay, mask=decayed),
  )


def init_state(params: decoder.Params, optimizer: optax.GradientTransformation) -> TrainState:
  """The state before the first update."""
  return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))


def policy_update(
  state: TrainState,
  batch: types.TrainBatch,
  *,
  config: ModelConfig,
  optimizer: optax.GradientTransformation,
  temperature: float,
  loss: Callable[[chex.Array, types.TrainBatch], tuple[chex.Array, Metrics]],
) -> tuple[TrainState, Metrics]:
  """One policy-gradient update on credited traces.

  Args:
    state: donated by callers that jit this.
    batch: fields [B, ...]; advantages and old log-probabilities are inputs.
    config, optimizer, temperature: static.
    loss: (log_probs [B, T], batch) -> (loss [], metrics), such as a partial of
      `losses.policy_loss`.

  Returns:
    The new state and scalar metrics, `gradient_norm` and `entropy` among them.
  """

  def loss_fn(params: decoder.Params) -> tuple[chex.Array, Metrics]:
    log_probs, entropy = scoring.trace_log_probs(params, config, batch, temperature=temperature)
    value, metrics = loss(log_probs, batch)
    return value, metrics | {"entropy": masked_mean(jax.lax.stop_gradient(entropy), batch.mask)}

  return _apply(state, loss_fn, optimizer)


def supervised_update(
  state: TrainState, batch: types.TrainBatch, *, config: ModelConfig, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
  """One maximum-likelihood update: minus the mean log-probability of the loss tokens."""

  def loss_fn(params: decoder.Params) -> tuple[chex.Array, Metrics]:
    log_probs, _ = scoring.trace_log_probs(params, config, batch, temperature=1.0)
    value = -masked_mean(log_probs, batch.loss_mask)
    return value, {"loss": value}

  return _apply(state, loss_fn, optimizer)


def _apply(
  state: TrainState,
  loss_fn: Callable[[decoder.Params], tuple[chex.Array, Metrics]],
  optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
  (_, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = metrics | {"gradient_norm": optax.global_norm(gradient)}
  return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics
