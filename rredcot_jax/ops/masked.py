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
