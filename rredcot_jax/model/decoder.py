"""The decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Flax NNX modules hold the parameters and their initialisation. The layers are
one stack: every block parameter carries a leading layer axis and the layers
run as one `lax.scan`. Outside this file a model is `(config, params)`, a
frozen record and a pytree, and the four pure functions below:

  forward          a whole sequence          -> hidden states, and its keys and values
  decode_step      one token a row           -> hidden states, cache extended
  run_branches     many continuations        -> hidden states, cache shared and untouched
  decode_branches  one token a continuation  -> hidden states, cache shared, the branches' own extended

`forward_from_embeddings` and `attention_weights` are variants of `forward` for attribution.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.ad_checkpoint import checkpoint_name

from rredcot_jax.model import attention
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.parallel import sharding

Params = Any

_KEPT = jax.checkpoint_policies.save_only_these_names("attention")
# By `Compute.remat`. "dots" also keeps the attention kernels' results by name, because XLA sees no matrix product.
_POLICIES = {
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _KEPT
  ),
  "attention": _KEPT,
  "full": jax.checkpoint_policies.nothing_saveable,
}


@struct.dataclass
class Cache:
  """Keys and values of a prompt and its trace, column by column.

  Columns [0, P) hold the left-padded prompt and P + t holds trace token t. The
  last sampled token is never run, so its column holds nothing. No state needs that column,
  because the state after the last token is terminal.
  """

  key: chex.Array  # [L, B, KV, P + T, D], rotary positions applied.
  value: chex.Array  # [L, B, KV, P + T, D].

  def extended(self, columns: int) -> "Cache":
    """The cache with room for `columns` more tokens."""
    return jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, columns), (0, 0)]), self).placed()

  def placed(self) -> "Cache":
    """The cache split by rows, key heads and, where a mesh splits tokens, columns."""
    return jax.tree.map(lambda x: sharding.constrain(x, None, "rows", "heads", "tokens", None), self)


class Block(nnx.Module):
  """Parameters of one layer; `Decoder` stacks them."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    d, h, kv, hd, f = config.width, config.num_heads, config.num_kv_heads, config.head_dim, config.mlp_width
    down_scale = (2 * config.num_layers) ** -0.5
    self.attention_norm = nnx.Param(jnp.ones(d))
    self.query = _normal(rngs, (d, h, hd), d)
    self.key = _normal(rngs, (d, kv, hd), d)
    self.value = _normal(rngs, (d, kv, hd), d)
    self.out = _normal(rngs, (h, hd, d), h * hd, down_scale)
    if config.qkv_bias:
      self.query_bias = nnx.Param(jnp.zeros((h, hd)))
      self.key_bias = nnx.Param(jnp.zeros((kv, hd)))
      self.value_bias = nnx.Param(jnp.zeros((kv, hd)))
    if config.qk_norm:
      self.query_norm = nnx.Param(jnp.ones(hd))
      self.key_norm = nnx.Param(jnp.ones(hd))
    self.mlp_norm = nnx.Param(jnp.ones(d))
    self.gate = _normal(rngs, (d, f), d)
    self.up = _normal(rngs, (d, f), d)
    self.down = _normal(rngs, (f, d), f, down_scale)


class Decoder(nnx.Module):
  """Parameters of the whole model, block parameters stacked over layers."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.embedding = _normal(rngs, (config.vocab_size, config.width), config.width)

    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stack(layer_rngs: nnx.Rngs) -> Block:
      return Block(config, layer_rngs)

    self.blocks = stack(rngs)
    self.final_norm = nnx.Param(jnp.ones(config.width))
    if not config.tied_embeddings:
      self.head = _normal(rngs, (config.vocab_size, config.width), config.width)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, scale: float = 1.0) -> nnx.Param:
  return nnx.Param(jax.random.normal(rngs.params(), shape) * (scale * fan_in**-0.5))


def init(config: ModelConfig, key: chex.PRNGKey) -> Params:
  """Random float32 parameters as a nested dict; block leaves are [L, ...]."""
  return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(params=key)), nnx.Param))


def num_params(config: ModelConfig) -> int:
  """Number of parameters, without allocating them."""
  shapes = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def rounded(params: Params, config: ModelConfig) -> Params:
  """The parameters in the type that they are computed with; norms keep theirs."""
  dtype = jnp.dtype(config.compute.dtype)
  round_one = lambda path, x: x if any("norm" in str(key) for key in path) else x.astype(dtype)
  return jax.tree_util.tree_map_with_path(round_one, params)


def forward(params: Params, config: ModelConfig, tokens: chex.Array, mask: chex.Array) -> tuple[chex.Array, Cache]:
  """Runs whole sequences, padded on either side.

  Args:
    params: as `init` makes them.
    config: static.
    tokens: [B, C] int32.
    mask: [B, C] bool, True on real tokens; positions count real tokens.

  Returns:
    Final hidden states [B, C, D] (garbage on padding) and the cache, C columns.
  """
  chex.assert_rank([tokens, mask], 2)
  chex.assert_equal_shape([tokens, mask])
  return forward_from_embeddings(params, config, _embed(params, config, tokens), mask)


def forward_from_embeddings(
  params: Params, config: ModelConfig, x: chex.Array, mask: chex.Array
) -> tuple[chex.Array, Cache]:
  """`forward` of sequences given as input embeddings, for what differentiates with respect to them.

  Args:
    params: as `init` makes them; the table of embeddings is not read.
    config: static.
    x: [B, C, D] of the parameters' type.
    mask: [B, C] bool, True on real tokens; positions count real tokens.

  Returns:
    Final hidden states [B, C, D] (garbage on padding) and the cache, C columns.
  """
  chex.assert_rank([x, mask], [3, 2])
  chex.assert_equal_shape_prefix([x, mask], 2)
  positions = positions_of(mask)

  def attend(query: chex.Array, key: chex.Array, value: chex.Array, carry: None, layer: chex.Array) -> Any:
    kept = Cache(key=jnp.swapaxes(key, 1, 2), value=jnp.swapaxes(value, 1, 2))
    return attention.attend(query, key, value, mask, config.compute.attention), carry, kept

  hidden, _, cache = _run_layers(params, config, x, positions, attend, None)
  return hidden, cache.placed()


def attention_weights(params: Params, config: ModelConfig, tokens: chex.Array, mask: chex.Array) -> chex.Array:
  """What each token of whole sequences attends to in each layer, averaged over heads.

  For analysis: memory is quadratic in C, L B C^2 floats kept and H B C^2 more
  while a layer runs. `forward` never holds these weights.

  Args:
    params, config, tokens, mask: see `forward`.

  Returns:
    [L, B, C, C] float32, query by key; the rows of real tokens sum to 1, with 0
    on padding and on later tokens; those of padding are 0.
  """
  chex.assert_rank([tokens, mask], 2)
  chex.assert_equal_shape([tokens, mask])

  def attend(query: chex.Array, key: chex.Array, value: chex.Array, carry: None, layer: chex.Array) -> Any:
    mixed = attention.attend(query, key, value, mask, config.compute.attention)
    return mixed, carry, attention.mean_weights(query, key, mask)

  _, _, weights = _run(params, config, tokens, positions_of(mask), attend, None)
  return weights


def decode_step(
  params: Params, config: ModelConfig, cache: Cache, token: chex.Array, column: chex.Array, mask: chex.Array
) -> tuple[chex.Array, Cache]:
  """Runs one token a row and writes its keys and values into `column`.

  Args:
    params: as `init` makes them.
    config: static.
    cache: columns before `column` filled.
    token: [B] int32.
    column: [] int32, the same for every row (prompts are left-padded).
    mask: [B, P + T] bool, real columns, `column` included, later ones False.

  Returns:
    Hidden states [B, D] and the cache with `column` written.
  """
  positions = jnp.sum(mask, axis=1, keepdims=True) - 1

  def attend(query: chex.Array, key: chex.Array, value: chex.Array, carry: Cache, layer: chex.Array) -> Any:
    def write(whole: chex.Array, new: chex.Array) -> chex.Array:
      return jax.lax.dynamic_update_slice(whole, jnp.swapaxes(new, 1, 2)[None], (layer, 0, 0, column, 0))

    carry = Cache(key=write(carry.key, key), value=write(carry.value, value))
    out = attention.attend_one(query[:, 0], carry.key[layer], carry.value[layer], mask)
    return out[:, None], carry, None

  hidden, cache, _ = _run(params, config, token[:, None], positions, attend, cache)
  return hidden[:, 0], cache


def run_branches(
  params: Params,
  config: ModelConfig,
  cache: Cache,
  cache_mask: chex.Array,
  tokens: chex.Array,
  columns: chex.Array,
) -> chex.Array:
  """Runs M continuations of each row's trace, which is read from the cache.

  Branch m of a row sees the real columns before `columns[m]` and its own earlier
  tokens, at positions that continue the count of those columns.

  Args:
    params: as `init` makes them.
    config: static.
    cache: keys and values of the traces, C columns.
    cache_mask: [B, C] bool, real columns.
    tokens: [B, M, S] int32 branch tokens, right-padded.
    columns: [B, M] int32, the first column that the branch replaces.

  Returns:
    Hidden states [B, M, S, D] (garbage on padding).
  """
  chex.assert_rank([tokens, columns, cache_mask], [3, 2, 2])
  c = cache_mask.shape[1]
  before = jnp.arange(c)[None, None] < columns[:, :, None]
  prefix_mask = jnp.logical_and(cache_mask[:, None], before)
  offsets = jnp.arange(tokens.shape[2], dtype=jnp.int32)[None, None]
  positions = jnp.sum(prefix_mask, axis=-1, dtype=jnp.int32)[:, :, None] + offsets

  def attend(query: chex.Array, key: chex.Array, value: chex.Array, carry: None, layer: Cache) -> Any:
    out = attention.attend_with_prefix(query, key, value, layer.key, layer.value, prefix_mask)
    return out, carry, None

  hidden, _, _ = _run(params, config, tokens, positions, attend, None, cache)
  return hidden


def decode_branches(
  params: Params,
  config: ModelConfig,
  cache: Cache,
  prefix_mask: chex.Array,
  branches: Cache,
  token: chex.Array,
  column: chex.Array,
  mask: chex.Array,
) -> tuple[chex.Array, Cache]:
  """Runs one token of M continuations of each row's trace, which is read from the cache.

  A branch keeps its own tokens in its own columns. Their order is free, because keys carry
  their positions. So branches of different lengths can all write the same `column`.

  Args:
    params: as `init` makes them.
    config: static.
    cache: keys and values of the traces, C columns; shared by a row's branches and untouched.
    prefix_mask: [B, M, C] bool, the columns that each branch continues.
    branches: keys and values of the branches' own tokens, B M rows of S columns.
    token: [B, M] int32.
    column: [] int32, where the branches' keys and values are written, in [0, S).
    mask: [B, M, S] bool, each branch's own columns, `column` included.

  Returns:
    Hidden states [B, M, D] and `branches` with `column` written.
  """
  chex.assert_rank([token, prefix_mask, mask], [2, 3, 3])
  b, m = token.shape
  positions = jnp.sum(prefix_mask, axis=-1, dtype=jnp.int32) + jnp.sum(mask, axis=-1, dtype=jnp.int32) - 1
  flat_mask = mask.reshape(b * m, -1)

  def attend(
    query: chex.Array, key: chex.Array, value: chex.Array, carry: Cache, scanned: tuple[chex.Array, Cache]
  ) -> Any:
    layer, prefix = scanned

    def write(whole: chex.Array, new: chex.Array) -> chex.Array:
      return jax.lax.dynamic_update_slice(
        whole, new.reshape(1, b * m, -1, 1, config.head_dim), (layer, 0, 0, column, 0)
      )

    carry = Cache(key=write(carry.key, key), value=write(carry.value, value))
    own_key, own_value = carry.key[layer], carry.value[layer]
    out = attention.attend_branches(query, own_key, own_value, flat_mask, prefix.key, prefix.value, prefix_mask)
    return out, carry, None

  layers = (jnp.arange(config.num_layers), cache)
  hidden, branches, _ = _run(params, config, token, positions, attend, branches, layers)
  return hidden, branches


def logits(params: Params, hidden: chex.Array) -> chex.Array:
  """Next-token logits [..., V] float32 of hidden states [..., D]."""
  return project_to_words(head_of(params), hidden)


def head_of(params: Params) -> chex.Array:
  """[V, D], the output head: the table of embeddings where the two are tied."""
  return params["head"] if "head" in params else params["embedding"]


def project_to_words(head: chex.Array, hidden: chex.Array) -> chex.Array:
  """`logits` with the head given, which is rounded to the hidden states' type."""
  return jnp.einsum("...d,vd->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)


def positions_of(mask: chex.Array) -> chex.Array:
  """[B, C] int32 position of each real token, counted over real tokens; 0 on left padding."""
  return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def _run(
  params: Params,
  config: ModelConfig,
  tokens: chex.Array,
  positions: chex.Array,
  attend: Callable[..., Any],
  carry: Any,
  layers: Any = None,
) -> tuple[chex.Array, Any, Any]:
  """`_run_layers` of tokens."""
  return _run_layers(params, config, _embed(params, config, tokens), positions, attend, carry, layers)


def _embed(params: Params, config: ModelConfig, tokens: chex.Array) -> chex.Array:
  return _placed(jnp.take(params["embedding"], tokens, axis=0).astype(config.compute.dtype))


def _placed(x: chex.Array) -> chex.Array:
  """[B, S, D] or [B, M, S, D] between layers: by rows and, where a mesh splits them, tokens or branches."""
  return sharding.constrain(x, "rows", "tokens", *[None] * (x.ndim - 2))


def _placed_heads(x: chex.Array) -> chex.Array:
  """[B, S, H, D] or [B, M, S, H, D] beside a product with parameters: as `_placed`, and heads where a mesh splits any.

  Without this the compiler gathers the whole traces of all chips for the gradients of these parameters.
  """
  return sharding.constrain(x, "rows", "tokens", *[None] * (x.ndim - 4), "heads", None)


def _run_layers(
  params: Params,
  config: ModelConfig,
  x: chex.Array,
  positions: chex.Array,
  attend: Callable[..., Any],
  carry: Any,
  layers: Any = None,
) -> tuple[chex.Array, Any, Any]:
  """Scans the layers; `attend` decides what the queries of a layer look at."""
  layers = jnp.arange(config.num_layers) if layers is None else layers
  turns = attention.rotary_turns(positions, config)
  blocks = rounded(params["blocks"], config)

  def layer_step(state: tuple[chex.Array, Any], scanned: tuple[Any, Any]) -> Any:
    x, carry = state
    block, layer = scanned
    query, key, value = _project(block, config, _rms_norm(x, block["attention_norm"], config), turns)
    mixed, carry, kept = attend(query, key, value, carry, layer)
    mixed = _placed_heads(mixed)
    mixed = checkpoint_name(mixed, "attention") if config.compute.remat == "attention" else mixed
    x = x + _linear(mixed.reshape(*x.shape[:-1], -1), block["out"].reshape(-1, config.width))
    y = _rms_norm(x, block["mlp_norm"], config)
    x = x + _linear(jax.nn.silu(_linear(y, block["gate"])) * _linear(y, block["up"]), block["down"])
    return (_placed(x), carry), kept

  if config.compute.remat != "none":
    layer_step = jax.checkpoint(layer_step, policy=_POLICIES[config.compute.remat], prevent_cse=False)
  (x, carry), kept = jax.lax.scan(layer_step, (x, carry), (blocks, layers))
  return _rms_norm(x, params["final_norm"], config), carry, kept


def _project(
  block: Params, config: ModelConfig, x: chex.Array, turns: tuple[chex.Array, chex.Array]
) -> tuple[chex.Array, chex.Array, chex.Array]:
  def project(name: str) -> chex.Array:
    y = _placed_heads(_linear(x, block[name].reshape(config.width, -1)).reshape(*x.shape[:-1], -1, config.head_dim))
    if config.qkv_bias:
      y = y + jnp.expand_dims(block[f"{name}_bias"], range(y.ndim - 2))
    if config.qk_norm and name != "value":
      y = _rms_norm(y, block[f"{name}_norm"], config)
    return y if name == "value" else attention.rotary(y, turns)

  return project("query"), project("key"), project("value")


def _linear(x: chex.Array, weight: chex.Array) -> chex.Array:
  """[..., D] @ [D, F], as one product of matrices: on CPU its gradient is twice as fast that way."""
  return (x.reshape(-1, x.shape[-1]) @ weight).reshape(*x.shape[:-1], weight.shape[-1])


def _rms_norm(x: chex.Array, scale: chex.Array, config: ModelConfig) -> chex.Array:
  x32 = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + config.norm_epsilon)
  return (x32 * inverse * jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))).astype(x.dtype)
