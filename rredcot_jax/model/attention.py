"""Attention over a trace, over a cache, and over a branch that shares its trace.

The kernel is the library's (`jax.nn.dot_product_attention`). What is written
here is the merge of two attention results by their log-sum-exp, which lets a
branch attend to the keys of a trace that was run once and to its own keys in
two calls, as if it had been run after that trace.
"""

import chex
import jax
import jax.numpy as jnp


def rotary(x: chex.Array, positions: chex.Array, theta: float) -> chex.Array:
  """Rotary position embedding (arXiv 2104.09864), in the halves layout of Llama and Qwen.

  Args:
    x: [..., S, H, D] queries or keys, D even.
    positions: [..., S] int32, from 0.
    theta: base of the wavelengths theta^(2i/D).

  Returns:
    [..., S, H, D], the dtype of `x`; angles are float32.
  """
  half = x.shape[-1] // 2
  frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = jnp.expand_dims(positions.astype(jnp.float32), (-1, -2))
  angles = angles * jnp.expand_dims(frequencies, range(angles.ndim - 1))
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  left, right = x[..., :half], x[..., half:]
  return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def attend(query: chex.Array, key: chex.Array, value: chex.Array, mask: chex.Array) -> chex.Array:
  """softmax(q k^T / sqrt(D)) v with grouped query heads.

  Args:
    query: [B, S, H, D].
    key, value: [B, C, KV, D], H a multiple of KV.
    mask: [B, S, C] bool, True where the query may look. A row without any True
      gives finite garbage, which callers mask.

  Returns:
    [B, S, H, D].
  """
  return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])


def attend_with_prefix(
  query: chex.Array,
  key: chex.Array,
  value: chex.Array,
  prefix_key: chex.Array,
  prefix_value: chex.Array,
  prefix_mask: chex.Array,
) -> chex.Array:
  """Attention of M branches to a shared prefix and, causally, to themselves.

  Equal to one softmax over the concatenated keys: with o_i, l_i the result and
  the log-sum-exp of each part, o = sum_i exp(l_i) o_i / sum_i exp(l_i). A branch
  whose prefix mask is empty attends to itself alone.

  Args:
    query: [B, M, S, H, D] branch queries, rotary positions continuing the prefix.
    key, value: [B, M, S, KV, D] branch keys and values.
    prefix_key, prefix_value: [B, C, KV, D], shared by the M branches of a row.
    prefix_mask: [B, M, C] bool, the part of the prefix before each branch's cut.

  Returns:
    [B, M, S, H, D].
  """
  b, m, s, h, d = query.shape
  c = prefix_key.shape[1]
  mask = jnp.broadcast_to(prefix_mask[:, :, None], (b, m, s, c)).reshape(b, 1, m * s, c)
  over_prefix, prefix_lse = jax.nn.dot_product_attention(
    query.reshape(b, m * s, h, d), prefix_key, prefix_value, mask=mask, return_residual=True
  )
  flat = lambda x: x.reshape(b * m, s, *x.shape[3:])
  over_self, self_lse = jax.nn.dot_product_attention(
    flat(query), flat(key), flat(value), is_causal=True, return_residual=True
  )
  prefix_lse = prefix_lse.reshape(b, m, s, h)
  prefix_lse = jnp.where(jnp.any(prefix_mask, axis=-1)[:, :, None, None], prefix_lse, -jnp.inf)
  return merge(
    over_prefix.reshape(b, m, s, h, d),
    prefix_lse,
    over_self.reshape(b, m, s, h, d),
    self_lse.reshape(b, m, s, h),
  )


def merge(out_a: chex.Array, lse_a: chex.Array, out_b: chex.Array, lse_b: chex.Array) -> chex.Array:
  """One attention result from two over disjoint keys.

  Args:
    out_a, out_b: [..., H, D] results.
    lse_a, lse_b: [..., H] log-sum-exp of each part's logits; at most one is -inf.

  Returns:
    [..., H, D] (e^lse_a out_a + e^lse_b out_b) / (e^lse_a + e^lse_b).
  """
  weight_a = jax.nn.sigmoid(lse_a.astype(jnp.float32) - lse_b.astype(jnp.float32))[..., None]
  return (weight_a * out_a + (1 - weight_a) * out_b).astype(out_a.dtype)
