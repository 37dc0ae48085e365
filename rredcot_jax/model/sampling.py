"""prompts -> Rollout: batched, KV-cached sampling; token ids in, token ids out.

Randomness is per row: row i draws token t with fold_in(fold_in(key, i), t), so a
row's trace does not depend on what its neighbours hold.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp

from rredcot_jax.model import decoder
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.ops import anatomy, types

_BLOCK = 256  # Words of the vocabulary that `draw` takes together.


def policy_log_probs(logits: chex.Array, *, temperature: float) -> chex.Array:
  """[..., V] float32 log-probabilities of the policy, log softmax(logits / temperature), of logits [..., V].

  These are what a trainer computes of a given trace (`scoring.trace_log_probs`).

  Raises:
    ValueError: if the temperature is not above 0.
  """
  if not temperature > 0:
    raise ValueError(f"temperature={temperature} must be > 0; for greedy decoding use top_k=1.")
  return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)


def cut(log_probs: chex.Array, *, top_k: int = 0, top_p: float = 1.0) -> chex.Array:
  """The distribution without its unlikely tokens.

  `log_probs` is cut to the `top_k` likeliest tokens, then to the smallest set of likeliest tokens whose
  probability reaches `top_p` (nucleus sampling, arXiv 1904.09751), renormalised after each cut. Of tokens
  that are equally likely, the lower ids are kept.

  Args:
    log_probs: [..., V] float32, normalised, in nats.
    top_k: tokens kept; 0 keeps all.
    top_p: in (0, 1]; 1 keeps all.

  Returns:
    [..., V] float32 in nats, -inf on tokens that are never drawn; the argument itself where nothing is cut.

  Raises:
    ValueError: if an argument is out of range.
  """
  if not 0 < top_p <= 1:
    raise ValueError(f"top_p={top_p} must lie in (0, 1]; 1 turns it off.")
  vocab_size = log_probs.shape[-1]
  if not 0 <= top_k <= vocab_size:
    raise ValueError(f"top_k={top_k} must lie in [0, {vocab_size}] (the vocabulary); 0 turns it off.")
  if top_k:
    # By index: a comparison with the k-th value fails where XLA computes the log-probabilities once more for it.
    places = jax.lax.top_k(log_probs, top_k)[1]
    kept = jnp.put_along_axis(jnp.zeros(log_probs.shape, bool), places, True, axis=-1, inplace=False)
    log_probs = jax.nn.log_softmax(jnp.where(kept, log_probs, -jnp.inf), axis=-1)
  if top_p < 1:
    order = jnp.argsort(-log_probs, axis=-1)
    sorted_probs = jnp.exp(jnp.take_along_axis(log_probs, order, axis=-1))
    before = jnp.cumsum(sorted_probs, axis=-1) - sorted_probs
    kept = jnp.take_along_axis(before < top_p, jnp.argsort(order, axis=-1), axis=-1)
    log_probs = jax.nn.log_softmax(jnp.where(kept, log_probs, -jnp.inf), axis=-1)
  return log_probs


def sampling_log_probs(logits: chex.Array, *, temperature: float, top_k: int = 0, top_p: float = 1.0) -> chex.Array:
  """[..., V] float32 log-probabilities of what is sampled from: `cut` of `policy_log_probs`."""
  return cut(policy_log_probs(logits, temperature=temperature), top_k=top_k, top_p=top_p)


def entropy_of(log_probs: chex.Array) -> chex.Array:
  """[...] float32 entropy in nats, -sum p log p, of normalised finite log-probabilities [..., V]."""
  return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def draw(key: chex.PRNGKey, log_probs: chex.Array) -> chex.Array:
  """One token by inverse distribution function: first its block of the vocabulary, then its place there.

  It takes two random numbers a token, and `jax.random.categorical` takes one a word of the vocabulary.
  benchmarks/drawing.py measures both. On an AMD EPYC with AVX-512, 16 rows take 1.6 times as long this
  way with 32 words (0.04 ms more), and the library's way takes 7 times as long as this one with 4096
  words, 27 times with 49152 and 15 times with 151936 (89 ms).

  Args:
    key: of this draw alone.
    log_probs: [V] float32 in nats, normalised; -inf is never drawn.

  Returns:
    [] int32 in [0, V).
  """
  blocks = jnp.pad(jnp.exp(log_probs), (0, -log_probs.shape[0] % _BLOCK)).reshape(-1, _BLOCK)
  for_block, for_place = jax.random.uniform(key, (2,))
  block = _place_of(for_block, jnp.sum(blocks, axis=1))
  return block * _BLOCK + _place_of(for_place, blocks[block])


def _place_of(uniform: chex.Array, weights: chex.Array) -> chex.Array:
  """The first place at which the running sum of `weights` passes `uniform` of their sum; of weight > 0 always."""
  running = jnp.cumsum(weights)
  passed = jnp.logical_and(running > uniform * running[-1], weights > 0)
  last = weights.shape[0] - 1 - jnp.argmax(weights[::-1] > 0)
  return jnp.where(jnp.any(passed), jnp.argmax(passed), last).astype(jnp.int32)


@functools.partial(
  jax.jit, static_argnames=("config", "max_tokens", "temperature", "top_k", "top_p", "eos_id", "pad_id")
)
def sample(
  params: decoder.Params,
  config: ModelConfig,
  prompt_tokens: chex.Array,
  prompt_mask: chex.Array,
  key: chex.PRNGKey,
  *,
  max_tokens: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  eos_id: int | tuple[int, ...],
  pad_id: int,
) -> tuple[types.Rollout, decoder.Cache]:
  """Samples one trace a prompt, until every row has ended or `max_tokens`.

  Args:
    params, config: the policy.
    prompt_tokens: [B, P] int32, left-padded, at least one real token a row.
    prompt_mask: [B, P] bool.
    key: the call's key.
    max_tokens: T, the room for a trace; a row that fills it without an end is truncated.
    temperature, top_k, top_p: see `policy_log_probs` and `cut`.
    eos_id: the id or the ids that end a trace; the one that does belongs to it. One that never occurs, such as -1,
      ends none.
    pad_id: fills the places after it.

  Returns:
    The rollout, fields [B, ...], and the cache (P + T columns) that scoring
    reads the traces' keys and values from.
  """
  chex.assert_rank([prompt_tokens, prompt_mask], 2)
  chex.assert_equal_shape([prompt_tokens, prompt_mask])
  batch, width = prompt_tokens.shape
  room = jnp.zeros((batch, max_tokens), bool)
  params = decoder.rounded(params, config)  # Once, and not once a token.
  _, cache = decoder.forward(params, config, prompt_tokens, prompt_mask)
  cache = cache.extended(max_tokens)
  row_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))

  def unfinished(loop: tuple) -> chex.Array:
    t, _, _, _, ended, _ = loop
    return jnp.logical_and(t < max_tokens, jnp.logical_not(jnp.all(ended)))

  def step(loop: tuple) -> tuple:
    t, cache, last, rollout, ended, mask = loop
    # The token before t is run again here: the last prompt token's column is simply rewritten.
    hidden, cache = decoder.decode_step(params, config, cache, last, width + t - 1, mask)
    logits = decoder.logits(params, hidden)
    log_probs = policy_log_probs(logits, temperature=temperature)
    sampler_log_probs = cut(log_probs, top_k=top_k, top_p=top_p)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys, t)
    token = jax.vmap(draw)(keys, sampler_log_probs)
    token = jnp.where(ended, pad_id, token)
    record = lambda whole, values: whole.at[:, t].set(jnp.where(ended, 0.0, values))
    chosen_of = lambda log_probs: jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]
    rollout = dataclasses.replace(
      rollout,
      tokens=rollout.tokens.at[:, t].set(token),
      mask=rollout.mask.at[:, t].set(jnp.logical_not(ended)),
      log_probs=record(rollout.log_probs, chosen_of(log_probs)),
      sampler_log_probs=record(rollout.sampler_log_probs, chosen_of(sampler_log_probs)),
      entropy=record(rollout.entropy, entropy_of(log_probs)),
    )
    mask = mask.at[:, width + t].set(jnp.logical_not(ended))
    ended = jnp.logical_or(ended, anatomy.is_any_of(token, anatomy.id_tuple("eos_id", eos_id)))
    return t + 1, cache, token, rollout, ended, mask

  rollout = types.Rollout(
    prompt_tokens=prompt_tokens,
    prompt_mask=prompt_mask,
    tokens=jnp.full((batch, max_tokens), pad_id, jnp.int32),
    mask=room,
    log_probs=jnp.zeros((batch, max_tokens), jnp.float32),
    sampler_log_probs=jnp.zeros((batch, max_tokens), jnp.float32),
    entropy=jnp.zeros((batch, max_tokens), jnp.float32),
    truncated=jnp.zeros((batch,), bool),
  )
  mask = jnp.concatenate([prompt_mask, room], axis=1)
  start = (jnp.int32(0), cache, prompt_tokens[:, -1], rollout, jnp.zeros((batch,), bool), mask)
  _, cache, _, rollout, ended, _ = jax.lax.while_loop(unfinished, step, start)
  return dataclasses.replace(rollout, truncated=jnp.logical_not(ended)), cache
