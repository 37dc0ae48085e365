"""Attention over a trace, over a cache, and over a branch that shares its trace.

A branch attends to the keys of a trace that was run once, and to its own keys, in two calls. The two
results are merged by their log-sum-exp, as if the branch had been run after that trace. These calls are
written out because `jax.nn.dot_product_attention` rounds the log-sum-exp to the type of the keys. In
bfloat16 that is 3 digits, and a merge of weights e^l is then wrong by a tenth. Whole sequences and
single tokens are written out because the library's order of the same products is 2.5 and 4 times slower
on CPU. On TPUs whole sequences go to JAX's Pallas kernel ("splash"), on GPUs to cuDNN's.
"""

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention

from rredcot_jax.model.config import ModelConfig
from rredcot_jax.parallel import sharding

_QUERY_BLOCK = 128
_MAX_BLOCKS = 16  # Each is compiled on its own.
_PREFIX_BLOCK = 2048  # Columns of a long prefix that branches attend to at once.
_KERNEL_BLOCK = 512  # Queries and keys of a step of the Pallas kernel; a multiple of 128.
_CUDNN_HEAD_DIM = 128  # The most that all GPUs since Ampere have.
_MASKED = -1e30  # A masked logit. It is finite, because a row of -inf alone gives NaN.


def rotary_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
  """Angular frequencies of the rotary embedding, in radians a token, and the factor on its result.

  Without scaling f_i = theta^(-2i/D), i in [0, D/2), and the factor is 1.

  llama3: with wavelength w_i = 2 pi / f_i and context C = original_max_positions,
  f_i / factor where w_i > C / low_freq_factor, f_i where w_i < C / high_freq_factor,
  and in between (1 - s) f_i / factor + s f_i, s = (C / w_i - low) / (high - low).

  yarn (arXiv 2309.00071, sec. 3.2-3.4): the pair that turns r times within C has
  index d(r) = D ln(C / 2 pi r) / (2 ln theta); f_i below floor(d(beta_fast)),
  f_i / factor above ceil(d(beta_slow)), a linear ramp of the two in between;
  queries and keys are multiplied by attention_factor, 0.1 ln(factor) + 1.

  Returns:
    [D/2] float32 and the factor.
  """
  half = config.head_dim // 2
  frequencies = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
  scaling = config.rope_scaling
  if scaling is None:
    return frequencies.astype(np.float32), 1.0
  context, slow = scaling.original_max_positions, frequencies / scaling.factor
  if scaling.kind == "llama3":
    turns = context * frequencies / (2 * np.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    factor = 1.0
  else:
    index = lambda turns: config.head_dim * np.log(context / (2 * np.pi * turns)) / (2 * np.log(config.rope_theta))
    low = max(np.floor(index(scaling.beta_fast)), 0)
    high = min(np.ceil(index(scaling.beta_slow)), config.head_dim - 1)
    keep = 1 - (np.arange(half) - low) / max(high - low, 1e-3)
    factor = scaling.attention_factor or 0.1 * np.log(scaling.factor) + 1.0
  keep = np.clip(keep, 0, 1)
  return (keep * frequencies + (1 - keep) * slow).astype(np.float32), float(factor)


def rotary_turns(positions: chex.Array, config: ModelConfig) -> tuple[chex.Array, chex.Array]:
  """cos and sin of each position's angles, [..., S, D/2] float32; made once for all layers.

  Args:
    positions: [..., S] int32, from 0.
    config: the model's theta and scaling.
  """
  frequencies, factor = rotary_frequencies(config)
  angles = positions[..., None].astype(jnp.float32)
  angles = angles * jnp.expand_dims(jnp.asarray(frequencies), range(positions.ndim))
  return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotary(x: chex.Array, turns: tuple[chex.Array, chex.Array]) -> chex.Array:
  """Rotary position embedding (arXiv 2104.09864), in the halves layout of Llama and Qwen.

  Args:
    x: [..., S, H, D] queries or keys, D even.
    turns: of `rotary_turns`, [..., S, D/2] each.

  Returns:
    [..., S, H, D], the dtype of `x`; the products are float32.
  """
  half = x.shape[-1] // 2
  cos, sin = (jnp.expand_dims(turn, -2) for turn in turns)
  left, right = x[..., :half], x[..., half:]
  return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def attend(query: chex.Array, key: chex.Array, value: chex.Array, mask: chex.Array, kind: str = "blocks") -> chex.Array:
  """Causal softmax(q k^T / sqrt(D)) v of whole sequences with grouped query heads, softmax in float32.

  Where a mesh splits the tokens of a row, the heads are split over it instead
  while they look at the whole sequence (Ulysses, arXiv 2309.14509).

  Args:
    query: [B, S, H, D].
    key, value: [B, S, KV, D], H a multiple of KV.
    mask: [B, S] bool, True on real tokens; a query sees real tokens up to its own.
      A query that sees none gives a finite result without meaning, which callers mask.
    kind: static, one of `config.ATTENTIONS`; "auto" is the best that the platform has.

  Returns:
    [B, S, H, D].

  Raises:
    NotImplementedError: by "cudnn", of float32 or a head dimension that its kernel does not have.
  """
  query, key, value = (sharding.constrain(x, "rows", None, "gathered_heads", None) for x in (query, key, value))
  if kind == "auto":
    kind = {"tpu": "splash", "gpu": "cudnn"}.get(sharding.platform(), "blocks")
    if kind == "cudnn" and (query.dtype == jnp.float32 or query.shape[-1] % 8 or query.shape[-1] > _CUDNN_HEAD_DIM):
      kind = "blocks"  # cuDNN's kernel computes 16-bit types and these head dimensions only.
  if kind == "splash":
    return _attend_splash(query, key, value, mask)
  if kind == "cudnn":
    return _attend_cudnn(query, key, value, mask)
  return _attend_blocks(query, key, value, mask)


def _attend_splash(query: chex.Array, key: chex.Array, value: chex.Array, mask: chex.Array) -> chex.Array:
  """`attend` by JAX's Pallas kernel, padded to whole blocks; padding is a segment of its own."""
  s, d = query.shape[1], query.shape[3]
  key, value, heads = _key_heads_of_parts(query, key, value)
  block = min(_KERNEL_BLOCK, -(-s // 128) * 128)
  room = -s % block
  by_head = lambda x: jnp.swapaxes(jnp.pad(x, [(0, 0), (0, room), (0, 0), (0, 0)]), 1, 2)
  segments = jnp.pad(mask, [(0, 0), (0, room)]).astype(jnp.int32)
  blocks = splash_attention.BlockSizes(
    block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
  )

  # The kernel is interpreted where there is no TPU, as in tests. The platform is asked here, because inside a part
  # there is no mesh to ask.
  interpret = sharding.platform() != "tpu"

  def attend_part(query: chex.Array, key: chex.Array, value: chex.Array, segments: chex.Array) -> chex.Array:
    causal = splash_attention.CausalMask((s + room, s + room))
    kernel = splash_attention.make_splash_mha(
      splash_attention.MultiHeadMask([causal] * query.shape[1]), block_sizes=blocks, head_shards=1, q_seq_shards=1,
      residual_checkpoint_name="attention", interpret=interpret,
    )  # fmt: skip
    return jax.vmap(lambda q, k, v, ids: kernel(q, k, v, splash_attention.SegmentIds(ids, ids)))(
      query, key, value, segments
    )

  split = ("rows", heads, None, None)
  out = sharding.each_part(
    attend_part,
    (by_head(query * d**-0.5), by_head(key), by_head(value), segments),
    (split, split, split, ("rows", None)),
    split,
  )
  return jnp.swapaxes(out, 1, 2)[:, :s]


def _key_heads_of_parts(
  query: chex.Array, key: chex.Array, value: chex.Array
) -> tuple[chex.Array, chex.Array, str | None]:
  """Keys and values for a kernel that runs on each device's heads, and what the dimension of the heads is split by.

  Every device needs the key heads of its query heads, so few key heads are repeated.
  """
  h, kv = query.shape[2], key.shape[2]
  copies = math.lcm(kv, sharding.parts("gathered_heads")) // kv
  if h % (kv * copies):
    return key, value, None
  key, value = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (key, value))
  return key, value, "gathered_heads"


def _attend_cudnn(query: chex.Array, key: chex.Array, value: chex.Array, mask: chex.Array) -> chex.Array:
  """`attend` by cuDNN's kernel, which takes the lengths of rows instead of a mask over their keys.

  The real tokens of each row are moved to its start, in their order, and the result back to their
  places. Padding gets 0. A mask would become a bias [B, H, S, S], whose memory the kernel exists to avoid.
  """
  key, value, heads = _key_heads_of_parts(query, key, value)
  split = ("rows", None, heads, None)
  # A gradient of unique indices needs no atomic sums.
  take = jax.vmap(lambda x, at: x.at[at].get(unique_indices=True, mode="promise_in_bounds"))

  def attend_part(query: chex.Array, key: chex.Array, value: chex.Array, mask: chex.Array) -> chex.Array:
    order = jnp.argsort(jnp.logical_not(mask), axis=1, stable=True)
    lengths = jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.int32), 1)
    out = jax.nn.dot_product_attention(
      take(query, order), take(key, order), take(value, order), is_causal=True, query_seq_lengths=lengths,
      key_value_seq_lengths=lengths, implementation="cudnn",
    )  # fmt: skip
    # What the kernel writes after a row's length has no meaning. It is masked here, also for the gradient.
    return jnp.where(mask[:, :, None, None], take(out, jnp.argsort(order, axis=1)), 0)

  return sharding.each_part(attend_part, (query, key, value, mask), (split, split, split, ("rows", None)), split)


def _attend_blocks(query: chex.Array, key: chex.Array, value: chex.Array, mask: chex.Array) -> chex.Array:
  """`attend` in XLA's operations.

  A block of queries attends only to the keys up to its own end. This is half the work of
  the whole square. The gradient computes a block's weights again instead of keeping them,
  so memory grows with S and not with S^2.
  """
  size = query.shape[1]
  block = max(_QUERY_BLOCK, -(-size // _MAX_BLOCKS))
  key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
  blocks = []
  for start in range(0, size, block):
    end = min(start + block, size)
    seen = jnp.logical_and(jnp.tril(jnp.ones((end - start, end), bool), k=start)[None], mask[:, None, :end])
    blocks.append(_attend_block(query[:, start:end], key[:, :, :end], value[:, :, :end], seen))
  return jnp.concatenate(blocks, axis=1)


@jax.checkpoint
def _attend_block(query: chex.Array, key: chex.Array, value: chex.Array, seen: chex.Array) -> chex.Array:
  """[B, Q, H, D] queries over [B, KV, C, D] keys; one product for all the query heads that share a key head."""
  b, q, h, d = query.shape
  kv, c = key.shape[1:3]
  grouped = jnp.moveaxis(query.reshape(b, q, kv, h // kv, d), 1, 3).reshape(b, kv, -1, d)
  scores = jnp.einsum("bkqd,bkcd->bkqc", grouped * d**-0.5, key, preferred_element_type=jnp.float32)
  scores = jnp.where(seen[:, None, None], scores.reshape(b, kv, h // kv, q, c), _MASKED)
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype).reshape(b, kv, -1, c)
  mixed = jnp.einsum("bkqc,bkcd->bkqd", weights, value).reshape(b, kv, h // kv, q, d)
  return jnp.moveaxis(mixed, 3, 1).reshape(b, q, h, d)


def mean_weights(query: chex.Array, key: chex.Array, mask: chex.Array) -> chex.Array:
  """The softmax weights of `attend`, averaged over query heads; quadratic memory, for analysis.

  Args:
    query: [B, S, H, D].
    key: [B, S, KV, D], H a multiple of KV.
    mask: [B, S] bool, True on real tokens.

  Returns:
    [B, S, S] float32, query by key; rows of real tokens sum to 1, those of padding are 0.
  """
  b, s, _, d = query.shape
  grouped = query.reshape(b, s, key.shape[2], -1, d)
  scores = jnp.einsum("bqkgd,bckd->bkgqc", grouped * d**-0.5, key, preferred_element_type=jnp.float32)
  seen = jnp.logical_and(jnp.tril(jnp.ones((s, s), bool))[None], mask[:, None, :])
  weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, _MASKED), axis=-1)
  return jnp.where(mask[:, :, None], jnp.mean(weights, axis=(1, 2)), 0.0)


def attend_one(query: chex.Array, key: chex.Array, value: chex.Array, mask: chex.Array) -> chex.Array:
  """`attend` of one query a row to a cache, softmax in float32.

  It is written out because one query a row is a product of a matrix and a few vectors. With
  the keys as the left side this is four times faster on CPU than the library's order.

  Args:
    query: [B, H, D].
    key, value: [B, KV, C, D], H a multiple of KV.
    mask: [B, C] bool, at least one True a row.

  Returns:
    [B, H, D].
  """
  b, kv, _, d = key.shape
  grouped = query.reshape(b, kv, -1, d)
  scores = jnp.einsum("bkcd,bkgd->bkcg", key, grouped, preferred_element_type=jnp.float32) * d**-0.5
  weights = jax.nn.softmax(jnp.where(mask[:, None, :, None], scores, _MASKED), axis=2).astype(value.dtype)
  return jnp.einsum("bkcg,bkcd->bkgd", weights, value).reshape(query.shape)


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
  whose prefix mask is empty attends to itself alone. A long prefix is taken in
  blocks, merged alike, so that memory does not grow with M S C.

  Args:
    query: [B, M, S, H, D] branch queries, rotary positions continuing the prefix.
    key, value: [B, M, S, KV, D] branch keys and values.
    prefix_key, prefix_value: [B, KV, C, D] as a cache holds them, shared by the M branches of a row.
    prefix_mask: [B, M, C] bool, the part of the prefix before each branch's cut.

  Returns:
    [B, M, S, H, D].
  """
  b, m, s, h, d = query.shape
  kv = key.shape[3]
  grouped = jnp.moveaxis(query.reshape(b, m, s, kv, h // kv, d), 3, 1)  # [B, KV, M, S, H / KV, D].
  over_prefix, prefix_lse = _attend_prefix(grouped, prefix_key, prefix_value, prefix_mask)
  causal = jnp.tril(jnp.ones((s, s), bool))[None, None, :, None]
  flat = lambda x: jnp.moveaxis(x, -2, 2).reshape(b * m, kv, s, d)
  own = jnp.swapaxes(grouped, 1, 2).reshape(b * m, kv, s, h // kv, d)
  over_self, self_lse = _attend_keys(own, flat(key), flat(value), causal)
  by_branch = lambda x: jnp.swapaxes(x.reshape(b, m, kv, *x.shape[2:]), 1, 2)
  mixed = merge(over_prefix, prefix_lse, by_branch(over_self), by_branch(self_lse))
  return jnp.moveaxis(mixed, 1, 3).reshape(query.shape).astype(query.dtype)


def _attend_keys(
  query: chex.Array, key: chex.Array, value: chex.Array, seen: chex.Array
) -> tuple[chex.Array, chex.Array]:
  """[N, KV, Q.., G, D] queries over [N, KV, C, D] keys where `seen`, which broadcasts to [N, KV, Q.., G, C].

  Returns:
    [N, KV, Q.., G, D] results and [N, KV, Q.., G] log-sum-exp, float32 both. A query that sees nothing
    gives a finite result without meaning, with a log-sum-exp near `_MASKED`, so that its weight in a merge is 0.
  """
  n, kv, *_, d = query.shape
  flat = query.reshape(n, kv, -1, d)
  scores = jnp.einsum("nkqd,nkcd->nkqc", flat, key, preferred_element_type=jnp.float32) * d**-0.5
  scores = jnp.where(seen, scores.reshape(*query.shape[:-1], -1), _MASKED)
  highest = jnp.max(scores, axis=-1)
  weights = jnp.exp(scores - highest[..., None])
  total = jnp.sum(weights, axis=-1)
  weights = weights.astype(value.dtype).reshape(n, kv, flat.shape[2], -1)
  out = jnp.einsum("nkqc,nkcd->nkqd", weights, value, preferred_element_type=jnp.float32)
  return out.reshape(query.shape) / total[..., None], highest + jnp.log(total)


def _attend_prefix(
  query: chex.Array, prefix_key: chex.Array, prefix_value: chex.Array, prefix_mask: chex.Array
) -> tuple[chex.Array, chex.Array]:
  """`_attend_keys` of branch queries [B, KV, M, S, G, D] over a prefix [B, KV, C, D] where `prefix_mask` [B, M, C]."""
  c = prefix_mask.shape[2]
  by_query = lambda mask: mask[:, None, :, None, None]
  if c <= _PREFIX_BLOCK:
    return _attend_keys(query, prefix_key, prefix_value, by_query(prefix_mask))

  # A mesh may split the columns into parts. Each block takes columns of every part, because their order is free.
  parts = sharding.parts("tokens")
  count = -(-c // _PREFIX_BLOCK)
  room = -c % (parts * count)
  prefix_key, prefix_value = (jnp.pad(x, [(0, 0), (0, 0), (0, room), (0, 0)]) for x in (prefix_key, prefix_value))
  split = lambda x, axis: jnp.moveaxis(x.reshape(*x.shape[:axis], parts, count, -1, *x.shape[axis + 1 :]), axis + 1, 0)
  blocks = (split(prefix_key, 2), split(prefix_value, 2), split(jnp.pad(prefix_mask, [(0, 0), (0, 0), (0, room)]), 2))

  def add_block(carry: tuple[chex.Array, chex.Array], block: tuple[chex.Array, ...]) -> Any:
    key, value, mask = block
    together = lambda x, axis: x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    out, lse = _attend_keys(query, together(key, 2), together(value, 2), by_query(together(mask, 2)))
    return (merge(carry[0], carry[1], out, lse), jnp.logaddexp(carry[1], lse)), None

  start = (jnp.zeros(query.shape, jnp.float32), jnp.full(query.shape[:-1], _MASKED))
  return jax.lax.scan(add_block, start, blocks)[0]


def attend_branches(
  query: chex.Array,
  key: chex.Array,
  value: chex.Array,
  mask: chex.Array,
  prefix_key: chex.Array,
  prefix_value: chex.Array,
  prefix_mask: chex.Array,
) -> chex.Array:
  """`attend_with_prefix` of one query a branch, whose own keys and values are in a cache; softmax in float32.

  The row's prefix is read once for all its branches, as the left side of one product.

  Args:
    query: [B, M, H, D].
    key, value: [B M, KV, S, D], the branches' own caches, H a multiple of KV.
    mask: [B M, S] bool, at least one True a branch.
    prefix_key, prefix_value: [B, KV, C, D], shared by the M branches of a row.
    prefix_mask: [B, M, C] bool, the part of the prefix before each branch's cut; may be empty.

  Returns:
    [B, M, H, D].
  """
  b, m, h, d = query.shape
  kv = prefix_key.shape[1]
  over_self, self_lse = _attend_cache(query.reshape(b * m, kv, -1, d), key, value, mask[:, None, :, None])
  grouped = jnp.moveaxis(query.reshape(b, m, kv, h // kv, d), 1, 2).reshape(b, kv, -1, d)
  seen = jnp.repeat(jnp.swapaxes(prefix_mask, 1, 2), h // kv, axis=2)
  over_prefix, prefix_lse = _attend_cache(grouped, prefix_key, prefix_value, seen[:, None])
  by_branch = lambda x: jnp.moveaxis(x.reshape(b, kv, m, h // kv, *x.shape[3:]), 2, 1).reshape(b, m, h, *x.shape[3:])
  mixed = merge(by_branch(over_prefix), by_branch(prefix_lse), over_self.reshape(b, m, h, d), self_lse.reshape(b, m, h))
  return mixed.astype(query.dtype)


def _attend_cache(
  query: chex.Array, key: chex.Array, value: chex.Array, seen: chex.Array
) -> tuple[chex.Array, chex.Array]:
  """`_attend_keys` of few queries [B, KV, Q, D], with the keys as the left side: `seen` broadcasts to [B, KV, C, Q]."""
  scores = jnp.einsum("bkcd,bkqd->bkcq", key, query, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
  scores = jnp.where(seen, scores, _MASKED)
  highest = jnp.max(scores, axis=2)
  weights = jnp.exp(scores - highest[:, :, None])
  total = jnp.sum(weights, axis=2)
  out = jnp.einsum("bkcq,bkcd->bkqd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
  return out / total[..., None], highest + jnp.log(total)


def merge(out_a: chex.Array, lse_a: chex.Array, out_b: chex.Array, lse_b: chex.Array) -> chex.Array:
  """One attention result from two over disjoint keys.

  Args:
    out_a, out_b: [..., H, D] results.
    lse_a, lse_b: [..., H] float32, log-sum-exp of each part's logits; at most one is -inf.

  Returns:
    [..., H, D] (e^lse_a out_a + e^lse_b out_b) / (e^lse_a + e^lse_b).
  """
  weight_a = jax.nn.sigmoid(lse_a - lse_b)[..., None]
  return weight_a * out_a + (1 - weight_a) * out_b
