"""log p(c_n | s_k) for every state and completion, by our decoder and its cache.

Re-running every prefix would cost about K N (T / 2 + S) token-forwards. Here
the trace is run once and each completion is a branch of S tokens that attends
to the trace's keys and values before its cut and to itself: T + K N S in all,
and inside a training step only K N S, because the sampler has left the trace's
keys and values in its cache.

A branch's first input is the last token of its prefix, run again, so that the
probability of the completion's first token needs nothing of the trace but its
cache: inputs (o_{e-1}, c_0 .. c_{S-2}) give the log-probabilities of c_0 .. c_{S-1}.

Scores of completions carry no gradient, because values belong to the policy that sampled.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from rredcot_jax.model import decoder
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.ops import types
from rredcot_jax.ops.masked import masked_sum
from rredcot_jax.ops.scoring import score_generic as score_generic
from rredcot_jax.parallel import sharding


def trace_log_probs(
  params: decoder.Params,
  config: ModelConfig,
  batch: types.Rollout | types.TrainBatch,
  *,
  temperature: float,
) -> tuple[chex.Array, chex.Array]:
  """log pi(o_t | x, o_<t) of every trace token, and the policy's entropy there.

  Args:
    params, config: the policy; gradients flow.
    batch: prompts [B, P] and traces [B, T] with their masks.
    temperature: logits are divided by it, as when the trace was sampled.

  With `config.compute.log_prob_chunk` [B, T, V] never exists, forward or backward:
  logits are made for that many tokens of a row at a time, and made again for the
  gradient.

  Returns:
    [B, T] float32 log-probabilities and [B, T] float32 entropies, nats; 0 on padding.
    The entropies carry no gradient.
  """
  tokens = jnp.concatenate([batch.prompt_tokens, batch.tokens], axis=1)
  mask = jnp.concatenate([batch.prompt_mask, batch.mask], axis=1)
  hidden, _ = decoder.forward(params, config, tokens, mask)
  # The last prompt token predicts the first trace token; the last trace token predicts nothing here.
  width = batch.prompt_tokens.shape[1]
  chunk = -(-config.compute.log_prob_chunk // sharding.parts("tokens"))
  of_tokens = functools.partial(_of_tokens, temperature=temperature, chunk=chunk)
  chosen, entropy = sharding.by_tokens(of_tokens, decoder.head_of(params), hidden[:, width - 1 : -1], batch.tokens)
  return jnp.where(batch.mask, chosen, 0.0), jnp.where(batch.mask, entropy, 0.0)


def _of_tokens(
  head: chex.Array, hidden: chex.Array, tokens: chex.Array, *, temperature: float, chunk: int
) -> tuple[chex.Array, chex.Array]:
  """[B, T] log-probabilities of `tokens` and entropies, of hidden states [B, T, D] that predict them."""

  def of_chunk(hidden: chex.Array, tokens: chex.Array) -> tuple[chex.Array, chex.Array]:
    hidden = sharding.constrain(hidden, "rows", "tokens", None)
    logits = sharding.constrain(decoder.project_to_words(head, hidden), "rows", "tokens", "words") / temperature
    # A large vocabulary costs memory traffic, so only the chosen logit and the sum are kept for the gradient.
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - normaliser
    frozen, total = jax.lax.stop_gradient((logits, normaliser))
    return chosen, total - jnp.sum(jnp.exp(frozen - total[..., None]) * frozen, axis=-1)

  batch, t = tokens.shape
  if not chunk or chunk >= t:
    return of_chunk(hidden, tokens)
  count = -(-t // chunk)
  room = count * chunk - t
  by_chunk = lambda x: jnp.swapaxes(x.reshape(batch, count, chunk, *x.shape[2:]), 0, 1)
  hidden, tokens = jnp.pad(hidden, [(0, 0), (0, room), (0, 0)]), jnp.pad(tokens, [(0, 0), (0, room)])
  # The head is float32 here, and so is the sum of its gradients over chunks.
  each = jax.checkpoint(lambda chunk: of_chunk(*chunk), prevent_cse=False)
  chosen, entropy = jax.lax.map(each, (by_chunk(hidden), by_chunk(tokens)))
  whole = lambda x: jnp.swapaxes(x, 0, 1).reshape(batch, -1)[:, :t]
  return whole(chosen), whole(entropy)


def score_with_cache(
  params: decoder.Params,
  config: ModelConfig,
  cache: decoder.Cache,
  rollout: types.Rollout,
  segments: types.Segments,
  completions: types.Completions,
  *,
  temperature: float,
  chunk_size: int | None = None,
) -> chex.Array:
  """log p(c_n | s_k) = sum_i log p(c_{n,i} | s_k, c_{n,<i}) over scored i, prefix shared.

  Args:
    params, config: the policy that sampled `rollout`.
    cache: the traces' keys and values, from `sampling.sample` or `decoder.forward`.
    rollout: fields [B, ...].
    segments: fields [B, ...]; state k is cut at `starts[k]`.
    completions: fields [B, K or 1, N, ...]; with 1, all states share one bank.
    temperature: logits are divided by it; use the sampling temperature.
    chunk_size: branches of a row run at once (memory grows with it and not with
      K N); None runs them all together.

  Returns:
    [B, K, N] float32 in nats; 0 where the state or the completion does not exist.
  """
  batch, k_max = segments.ends.shape
  _, _, n, s = completions.tokens.shape
  completions = jax.tree.map(
    lambda x: jnp.broadcast_to(x, (batch, k_max, *x.shape[2:])).reshape(batch, k_max * n, *x.shape[3:]),
    completions,
  )
  width = rollout.prompt_tokens.shape[1]
  tokens = jnp.concatenate([rollout.prompt_tokens, rollout.tokens], axis=1)
  mask = jnp.concatenate([rollout.prompt_mask, rollout.mask], axis=1)
  columns = jnp.repeat(segments.starts + (width - 1), n, axis=1)
  last = jnp.take_along_axis(tokens, columns, axis=1)

  def score_chunk(chunk: tuple[chex.Array, ...]) -> chex.Array:
    targets, scored, columns, last = (jnp.moveaxis(x, 0, 1) for x in chunk)
    inputs = jnp.concatenate([last[:, :, None], targets[:, :, : s - 1]], axis=2)
    hidden = decoder.run_branches(params, config, cache, mask, inputs, columns)
    logits = decoder.logits(params, hidden) / temperature
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    return jnp.moveaxis(masked_sum(chosen, scored, axis=2), 0, 1)

  branches = tuple(jnp.moveaxis(x, 1, 0) for x in (completions.tokens, completions.scored, columns, last))
  log_p = _map_chunks(score_chunk, branches, chunk_size)
  log_p = jnp.moveaxis(log_p, 0, 1).reshape(batch, k_max, n)
  exists = jnp.logical_and(completions.valid.reshape(batch, k_max, n), segments.mask[:, :, None])
  return jax.lax.stop_gradient(jnp.where(exists, log_p, 0.0))


def _map_chunks(
  function: Callable[[tuple[chex.Array, ...]], chex.Array], xs: tuple[chex.Array, ...], chunk_size: int | None
) -> chex.Array:
  """`function` over the leading axis of `xs`, `chunk_size` places at a time."""
  total = xs[0].shape[0]
  if chunk_size is None or chunk_size >= total:
    return function(xs)
  if chunk_size < 1:
    raise ValueError(f"chunk_size={chunk_size} must be at least 1, or None for all branches at once.")
  whole = total // chunk_size * chunk_size
  split = tuple(x[:whole].reshape(-1, chunk_size, *x.shape[1:]) for x in xs)
  done = jax.lax.map(function, split)
  done = done.reshape(whole, *done.shape[2:])
  return done if whole == total else jnp.concatenate([done, function(tuple(x[whole:] for x in xs))])
