"""Every masked reduction of the package.

All are written with `where`, so that a masked element can hold anything (NaN,
inf) without reaching the result or its gradient. Reductions over nothing give
the stated empty value instead of NaN.
"""

import chex
import jax
import jax.numpy as jnp

Axis = int | tuple[int, ...] | None


def masked_sum(x: chex.Array, mask: chex.Array, axis: Axis = None) -> chex.Array:
  """sum_i mask_i x_i; 0 over nothing. `mask` broadcasts against `x`."""
  return jnp.sum(jnp.where(mask, x, 0), axis=axis)


def masked_mean(x: chex.Array, mask: chex.Array, axis: Axis = None) -> chex.Array:
  """Mean of the unmasked elements; 0 over nothing."""
  count = jnp.sum(jnp.broadcast_to(mask, x.shape), axis=axis)
  return masked_sum(x, mask, axis) / jnp.maximum(count, 1)


def masked_std(x: chex.Array, mask: chex.Array, axis: Axis = None) -> chex.Array:
  """Population standard deviation of the unmasked elements; 0 over nothing.

  Its gradient is finite (0) where the deviation is 0.
  """
  count = jnp.sum(jnp.broadcast_to(mask, x.shape), axis=axis, keepdims=True)
  mean = jnp.sum(jnp.where(mask, x, 0), axis=axis, keepdims=True) / jnp.maximum(count, 1)
  variance = masked_mean(jnp.where(mask, x - mean, 0) ** 2, mask, axis)
  positive = variance != 0  # Not > 0, which would turn an unmasked NaN into 0.
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)


def masked_max(x: chex.Array, mask: chex.Array, axis: Axis = None) -> chex.Array:
  """Largest unmasked element; -inf over nothing."""
  return jnp.max(jnp.where(mask, x, -jnp.inf), axis=axis)


def masked_logsumexp(x: chex.Array, mask: chex.Array, axis: Axis = None) -> chex.Array:
  """log sum_i mask_i exp(x_i); -inf over nothing, with a zero gradient there.

  An unmasked -inf is exp(x_i) = 0 and counts as nothing.
  """
  mask = jnp.logical_and(mask, x != -jnp.inf)
  some = jnp.any(jnp.broadcast_to(mask, x.shape), axis=axis, keepdims=True)
  kept = jnp.where(mask, x, -jnp.inf)
  total = jax.nn.logsumexp(jnp.where(some, kept, 0.0), axis=axis)
  return jnp.where(jnp.squeeze(some, axis) if axis is not None else some.reshape(()), total, -jnp.inf)


def masked_softmax(x: chex.Array, mask: chex.Array, axis: int = -1) -> chex.Array:
  """Softmax over the unmasked elements; 0 on masked ones and over nothing."""
  some = jnp.any(mask, axis=axis, keepdims=True)
  safe_mask = jnp.logical_or(mask, jnp.logical_not(some))
  weights = jax.nn.softmax(jnp.where(mask, x, 0.0), axis=axis, where=safe_mask)
  return jnp.where(mask, weights, 0.0)
