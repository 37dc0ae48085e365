"""How a policy goes on from every state of a trace: independent continuations, sampled.

A prompt is prefilled once, by the sampler that wrote the trace: a continuation reads the
trace's cache before its cut and keeps only its own tokens' keys and values. Its first
input is the last token of its prefix, run again, as in scoring.py.

Continuations end at different times, so they are not run in fixed chunks. A row has a
queue of (state, sample) and some slots. A slot whose continuation has ended takes the
next one from the queue. Memory therefore grows with the slots and not with K k. States
that do not exist are never queued. Slots are idle only when the queue is empty.

Randomness: continuation m of state j of row i draws its token t with
fold_in(fold_in(fold_in(fold_in(key, i), j), m), t): no result depends on slots, rounds
or neighbours. State 0 of row i is what `sampling.sample` draws from the prompt in row m
under the key fold_in(fold_in(key, i), 0).
"""

import functools

import chex
import jax
import jax.numpy as jnp
from flax import struct

from rredcot_jax.model import decoder, sampling
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.ops import anatomy, types


@struct.dataclass
class Continuations:
  """`N` samples of how each state of a trace goes on; states that do not exist have length 0."""

  tokens: chex.Array  # [K, N, S] int32, right-padded, end-of-sequence token included.
  sampler_log_probs: chex.Array  # [K, N, S] float32, of what was sampled from (nats); 0 on padding.
  lengths: chex.Array  # [K, N] int32, at most the room that the state leaves.
  truncated: chex.Array  # [K, N] bool, True where the room ran out.

  @property
  def mask(self) -> chex.Array:
    """[..., K, N, S] bool, True on real tokens."""
    s = jax.lax.broadcasted_iota(jnp.int32, self.tokens.shape, self.tokens.ndim - 1)
    return s < self.lengths[..., None]


@struct.dataclass
class _Slots:
  """What the slots of each row are working on; fields [B, M] but the last."""

  item: chex.Array  # int32, place in the row's queue; its length and beyond is idle.
  age: chex.Array  # int32, tokens that the continuation has.
  last: chex.Array  # int32, the newest of them.
  queued: chex.Array  # [B] int32, the next place in the queue.


@functools.partial(
  jax.jit,
  static_argnames=("config", "k", "max_tokens", "temperature", "top_k", "top_p", "eos_id", "pad_id", "chunk_size"),
)
def generate_from_states(
  params: decoder.Params,
  config: ModelConfig,
  cache: decoder.Cache,
  rollout: types.Rollout,
  segments: types.Segments,
  key: chex.PRNGKey,
  *,
  k: int,
  max_tokens: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  eos_id: int | tuple[int, ...],
  pad_id: int,
  chunk_size: int | None = None,
  first_sample: chex.Numeric = 0,
) -> tuple[Continuations, chex.Array]:
  """Draws `k` independent continuations of every state s_0 .. s_{num_segments - 1} of every trace.

  Args:
    params, config: the policy that sampled `rollout`.
    cache: the traces' keys and values, P + T columns, from `sampling.sample` or `decoder.forward`.
    rollout: fields [B, ...]; prompts of at least one real token.
    segments: fields [B, ...]; state j is cut at `starts[j]`.
    key: the call's key; see the module's docstring.
    k: continuations a state.
    max_tokens: the most tokens of a trace, at least T. A continuation of state j has room
      for `max_tokens - starts[j]`, so that it ends under the limit that the trace had.
    temperature, top_k, top_p: see `sampling.sampling_log_probs`; the rollout's own, to value its policy.
    eos_id: the id or the ids that end a continuation; the one that does belongs to it.
    pad_id: fills the places after it.
    chunk_size: slots a row, that is continuations of a row run at once; memory grows
      with it. None runs them all together.
    first_sample: [] int32, number of the first continuation; a call with
      `first_sample=n` goes on where one with k = n stopped, and repeats none.

  Returns:
    Continuations with fields [B, K, k, ...], S = `max_tokens`, and [] int32, the steps that
    the loop took, of B times the slots token-forwards each. Neither carries a gradient.

  Raises:
    ValueError: if k or `chunk_size` is below 1, or `max_tokens` below T.
  """
  chex.assert_rank([rollout.tokens, segments.ends, segments.num_segments], [2, 2, 1])
  batch, k_max = segments.ends.shape
  width = rollout.prompt_tokens.shape[1]
  slots = k_max * k if chunk_size is None else min(chunk_size, k_max * k)
  if k < 1 or slots < 1:
    raise ValueError(f"k={k} and chunk_size={chunk_size} must be at least 1, chunk_size may be None for all at once.")
  if max_tokens < rollout.tokens.shape[1]:
    raise ValueError(
      f"max_tokens={max_tokens} is below the rollout's room of {rollout.tokens.shape[1]}: states near its end would "
      "have nowhere to go. Give the limit that the traces were sampled with."
    )
  params, cache = jax.lax.stop_gradient((params, cache))
  tokens = jnp.concatenate([rollout.prompt_tokens, rollout.tokens], axis=1)
  real = jnp.concatenate([rollout.prompt_mask, rollout.mask], axis=1)
  starts, total = segments.starts, segments.num_segments * k
  state_keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(
    jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch)), jnp.arange(k_max)
  )
  columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, None]
  own_columns = jnp.arange(max_tokens, dtype=jnp.int32)
  take = functools.partial(jnp.take_along_axis, axis=1)
  fold_each = jax.vmap(jax.vmap(jax.random.fold_in))

  def working(loop: tuple) -> chex.Array:
    _, _, slot, _ = loop
    return jnp.any(slot.item < total[:, None])

  def step(loop: tuple) -> tuple:
    i, branches, slot, drawn = loop
    active = slot.item < total[:, None]
    state, sample = jnp.minimum(slot.item // k, k_max - 1), slot.item % k
    start = take(starts, state)
    # The last prefix token's column is not read, because the token is run again.
    cut = start + (width - 1)
    token = jnp.where(slot.age == 0, take(tokens, cut), slot.last)
    prefix_mask = jnp.logical_and(real[:, None], columns < cut[..., None])
    # All slots write the same column, and columns are reused in turn. A slot's own are the last `age` and this one.
    own_mask = ((i - own_columns) % max_tokens)[None, None] <= slot.age[..., None]
    hidden, branches = decoder.decode_branches(
      params, config, cache, prefix_mask, branches, token, i % max_tokens, own_mask
    )
    log_probs = sampling.sampling_log_probs(
      decoder.logits(params, hidden), temperature=temperature, top_k=top_k, top_p=top_p
    )
    keys = fold_each(fold_each(take(state_keys, state), sample + first_sample), slot.age)
    token = jax.vmap(jax.vmap(sampling.draw))(keys, log_probs)
    chosen = jnp.take_along_axis(log_probs, token[..., None], axis=-1)[..., 0]
    stopped = anatomy.is_any_of(token, anatomy.id_tuple("eos_id", eos_id))
    ended = jnp.logical_and(active, jnp.logical_or(stopped, slot.age + 1 == max_tokens - start))
    # Idle slots have places out of range, which are dropped.
    place = jnp.where(active, slot.item, k_max * k)
    drawn = drawn.replace(
      tokens=_set_tokens(drawn.tokens, place, slot.age, token),
      sampler_log_probs=_set_tokens(drawn.sampler_log_probs, place, slot.age, chosen),
      lengths=_set(drawn.lengths, place, slot.age + 1),
      truncated=_set(drawn.truncated, place, jnp.logical_not(stopped)),
    )
    slot = _Slots(
      item=jnp.where(ended, slot.queued[:, None] + jnp.cumsum(ended, axis=1) - 1, slot.item),
      age=jnp.where(jnp.logical_and(active, jnp.logical_not(ended)), slot.age + 1, 0),
      last=token,
      queued=slot.queued + jnp.sum(ended, axis=1),
    )
    return i + 1, branches, slot, drawn

  own = lambda x: jnp.zeros((x.shape[0], batch * slots, x.shape[2], max_tokens, x.shape[4]), x.dtype)
  each = (batch, k_max * k)
  drawn = Continuations(
    tokens=jnp.full((*each, max_tokens), pad_id, jnp.int32),
    sampler_log_probs=jnp.zeros((*each, max_tokens), jnp.float32),
    lengths=jnp.zeros(each, jnp.int32),
    truncated=jnp.zeros(each, bool),
  )
  zeros = jnp.zeros((batch, slots), jnp.int32)
  slot = _Slots(
    item=zeros + jnp.arange(slots, dtype=jnp.int32)[None], age=zeros, last=zeros, queued=jnp.full(batch, slots)
  )
  steps, _, _, drawn = jax.lax.while_loop(working, step, (jnp.int32(0), jax.tree.map(own, cache), slot, drawn))
  return jax.tree.map(lambda x: x.reshape(batch, k_max, k, *x.shape[2:]), drawn), steps


@jax.vmap
def _set(buffer: chex.Array, place: chex.Array, value: chex.Array) -> chex.Array:
  """[B, Q] with `value` [B, M] at `place` [B, M]; those out of range are dropped."""
  return buffer.at[place].set(value, mode="drop", unique_indices=False)


@jax.vmap
def _set_tokens(buffer: chex.Array, place: chex.Array, t: chex.Array, value: chex.Array) -> chex.Array:
  """[B, Q, S] with `value` [B, M] at (`place`, `t`), [B, M] each; those out of range are dropped."""
  return buffer.at[place, t].set(value, mode="drop", unique_indices=False)
