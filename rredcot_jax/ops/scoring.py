"""log p(c_n | s_k) for every state and completion, from any model that can be applied to tokens.

    score_generic   every prefix run again: K N (P + T + S) token-forwards a row, any model
    score_tree      the trace run once, completions as branches of it: P + T + K N (S - 1),
                    any model that takes an attention mask of queries by keys

Both give the same numbers. `model.scoring.score_with_cache` does, too, with this package's own decoder,
whose sampler leaves the trace's keys and values behind: K N S token-forwards and no mask.

Nothing here carries a gradient: values belong to the policy that sampled.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rredcot_jax.ops import checks, types
from rredcot_jax.ops.masked import masked_sum

# (params, tokens [M, L] int32, positions [M, L] int32, mask [M, L] bool) -> logits [M, L, V]; causal.
Apply = Callable[[Any, chex.Array, chex.Array, chex.Array], chex.Array]
# (params, tokens [M, L] int32, positions [M, L] int32, mask [M, L, L] bool) -> logits [M, L, V];
# mask[m, i, j] says whether token i may attend to token j.
ApplyTree = Callable[[Any, chex.Array, chex.Array, chex.Array], chex.Array]


def score_generic(
  apply: Apply,
  params: Any,
  rollout: types.Rollout,
  segments: types.Segments,
  completions: types.Completions,
  *,
  temperature: chex.Numeric,
) -> chex.Array:
  """log p(c_n | s_k) = sum_i log p(c_{n,i} | s_k, c_{n,<i}) over scored i, every prefix run again.

  The reference that faster paths are tested against. Rows and states run one after another, so that
  memory is that of N sequences of P + T + S tokens, logits included.

  Args:
    apply: a causal model, see `Apply`. Real tokens of a row are consecutive, with padding on both sides.
    params: passed on to `apply`.
    rollout: fields [B, ...]; only prompts and tokens with their masks are read.
    segments: fields [B, ...]; state k is cut at `starts[k]`.
    completions: fields [B, K or 1, N, ...]; with 1, all states share one bank.
    temperature: logits are divided by it; use the sampling temperature, > 0.

  Returns:
    [B, K, N] float32 in nats; 0 where the state or the completion does not exist.

  Raises:
    ValueError: on wrong shapes and types, a temperature that is not positive, and, where it is
      concrete, a prompt without tokens, whose traces' first tokens nothing predicts.
  """
  _check(rollout, segments, completions, temperature)
  k_max = segments.ends.shape[1]
  s = completions.tokens.shape[-1]
  width = rollout.prompt_tokens.shape[1]

  def score_state(rows: tuple) -> chex.Array:
    rollout, starts, bank = rows
    prefix = jnp.concatenate([rollout.prompt_tokens, rollout.tokens])
    prefix_mask = jnp.concatenate([rollout.prompt_mask, rollout.mask])
    column = jnp.arange(prefix.shape[0] + s)
    cut = width + starts
    # Columns [0, cut) are the prefix, [cut, cut + s) the completion, the rest padding.
    from_prefix = jnp.minimum(column, prefix.shape[0] - 1)
    from_bank = jnp.clip(column - cut, 0, s - 1)
    in_prefix = column < cut
    in_bank = jnp.logical_and(column >= cut, column < cut + s)
    splice = lambda old, new, fill: jnp.where(
      in_prefix[None], old[from_prefix][None], jnp.where(in_bank[None], new[:, from_bank], fill)
    )
    tokens = splice(prefix, bank.tokens, 0)
    mask = splice(prefix_mask, bank.mask, False)
    logits = apply(params, tokens, positions_of(mask), mask)
    at = jnp.clip(cut - 1 + jnp.arange(s), 0, prefix.shape[0] + s - 1)
    chosen = _chosen(logits[:, at], bank.tokens, temperature)
    return masked_sum(chosen, bank.scored, axis=1)

  def score_row(row: tuple) -> chex.Array:
    rollout, starts, bank = row
    bank = jax.tree.map(lambda x: jnp.broadcast_to(x, (k_max, *x.shape[1:])), bank)
    return jax.lax.map(lambda rows: score_state((rollout, *rows)), (starts, bank))

  rollout, starts, completions = jax.tree.map(jnp.asarray, (rollout, segments.starts, completions))
  log_p = jax.lax.map(score_row, (rollout, starts, completions))
  return _existing(log_p, segments, completions)


def score_tree(
  apply: ApplyTree,
  params: Any,
  rollout: types.Rollout,
  segments: types.Segments,
  completions: types.Completions,
  *,
  temperature: chex.Numeric,
  chunk_size: int | None = None,
) -> chex.Array:
  """The same log-probabilities from one forward over the trace with its completions as branches.

  A row is the prompt, the trace, and the K N completions one after another, each without its last
  token, which predicts nothing. A token of the trace attends to the trace up to itself; a token of
  completion (k, n) to the trace before the cut of state k and to that completion up to itself.
  Positions of a completion go on from its cut. The first token of a completion is predicted by the
  last token before the cut.

  Memory is that of `apply` on [B, L, L] masks and [B, L, V] logits, L = P + T + K N (S - 1). With
  `chunk_size` completions at a time L is P + T + chunk_size (S - 1), at the price of the trace again
  for every chunk. Rows do not depend on each other: slice the batch where B rows are too many.

  Args:
    apply: see `ApplyTree`. Every token attends to itself, padding included, so that no row of the mask
      is empty; nothing else attends to padding, which has the position 0.
    params, rollout, segments, completions, temperature: see `score_generic`.
    chunk_size: completions of a row in one forward, static; None is all K N.

  Returns:
    [B, K, N] float32 in nats; 0 where the state or the completion does not exist.

  Raises:
    ValueError: as `score_generic`, and on a `chunk_size` below 1.
  """
  _check(rollout, segments, completions, temperature)
  batch, k_max = segments.ends.shape
  _, _, n, s = completions.tokens.shape
  if chunk_size is not None and chunk_size < 1:
    raise ValueError(f"chunk_size={chunk_size} must be at least 1, or None for all completions at once.")
  width = rollout.prompt_tokens.shape[1]
  tokens = jnp.concatenate([rollout.prompt_tokens, rollout.tokens], axis=1)
  mask = jnp.concatenate([rollout.prompt_mask, rollout.mask], axis=1)
  flat = lambda x: jnp.broadcast_to(x, (batch, k_max, n, *x.shape[3:])).reshape(batch, k_max * n, *x.shape[3:])
  targets, scored = flat(completions.tokens), flat(completions.scored)
  cuts = jnp.repeat(segments.starts + width, n, axis=1)

  def score_chunk(targets: chex.Array, scored: chex.Array, cuts: chex.Array) -> chex.Array:
    inputs = targets[:, :, : s - 1]
    tree_mask, positions = _tree(mask, cuts, s - 1)
    everything = jnp.concatenate([tokens, inputs.reshape(batch, -1)], axis=1)
    logits = apply(params, everything, positions, tree_mask)
    first = jnp.take_along_axis(logits, (cuts - 1)[..., None], axis=1)
    rest = logits[:, tokens.shape[1] :].reshape(*inputs.shape, logits.shape[-1])
    chosen = _chosen(jnp.concatenate([first[:, :, None], rest], axis=2), targets, temperature)
    return masked_sum(chosen, scored, axis=2)

  branches = k_max * n
  size = min(chunk_size or branches, branches)
  if size == branches:
    log_p = score_chunk(targets, scored, cuts)
  else:
    room = -branches % size
    padded = (jnp.pad(targets, [(0, 0), (0, room), (0, 0)]), jnp.pad(scored, [(0, 0), (0, room), (0, 0)]))
    cuts = jnp.pad(cuts, [(0, 0), (0, room)], constant_values=width)
    by_chunk = lambda x: jnp.swapaxes(x.reshape(batch, -1, size, *x.shape[2:]), 0, 1)
    chunks = jax.lax.map(lambda x: score_chunk(*x), tuple(map(by_chunk, (*padded, cuts))))
    log_p = jnp.swapaxes(chunks, 0, 1).reshape(batch, -1)[:, :branches]
  log_p = log_p.reshape(batch, k_max, n)
  return _existing(log_p, segments, completions)


def positions_of(mask: chex.Array) -> chex.Array:
  """Positions counted over real tokens, as a model with left padding needs them.

  Args:
    mask: [M, L] bool, real tokens.

  Returns:
    [M, L] int32; 0 on left padding.
  """
  return jnp.maximum(jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, 0)


def _tree(mask: chex.Array, cuts: chex.Array, size: int) -> tuple[chex.Array, chex.Array]:
  """Who attends to whom, and where each token stands.

  Args:
    mask: [B, C] bool, real columns of prompt and trace.
    cuts: [B, M] int32, the column that each branch replaces first.
    size: tokens of a branch.

  Returns:
    [B, L, L] bool and [B, L] int32 with L = C + M size.
  """
  batch, columns = mask.shape
  branches = cuts.shape[1]
  # For each token: its branch, or -1; how far into it; and the columns of the trace that it sees.
  branch = jnp.concatenate([jnp.full(columns, -1), jnp.repeat(jnp.arange(branches), size)])
  offset = jnp.concatenate([jnp.arange(columns), jnp.tile(jnp.arange(size), branches)])
  seen = jnp.concatenate(
    [jnp.broadcast_to(jnp.arange(columns) + 1, mask.shape), jnp.repeat(cuts, size, axis=1)], axis=1
  )
  real = jnp.concatenate([mask, jnp.ones((batch, branches * size), bool)], axis=1)
  of_trace = (jnp.arange(branch.shape[0])[None, None] < seen[:, :, None]) & (branch < 0)[None, None]
  of_branch = (branch[:, None] == branch[None]) & (offset[:, None] >= offset[None]) & (branch >= 0)[:, None]
  tree_mask = (of_trace | of_branch[None]) & real[:, None, :]
  tree_mask = tree_mask | jnp.eye(branch.shape[0], dtype=bool)[None]
  before_cut = jnp.sum(mask[:, None] & (jnp.arange(columns)[None, None] < cuts[:, :, None]), axis=-1, dtype=jnp.int32)
  of_branches = jnp.repeat(before_cut, size, axis=1) + jnp.tile(jnp.arange(size, dtype=jnp.int32), branches)[None]
  return tree_mask, jnp.concatenate([positions_of(mask), of_branches], axis=1)


def _chosen(logits: chex.Array, targets: chex.Array, temperature: chex.Numeric) -> chex.Array:
  """[...] float32 log-probability of each target of [...] under logits [..., V]."""
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)
  return jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]


def _existing(log_p: chex.Array, segments: types.Segments, completions: types.Completions) -> chex.Array:
  exists = jnp.logical_and(completions.valid, segments.mask[:, :, None])
  return jax.lax.stop_gradient(jnp.where(exists, log_p, 0.0))


def _check(
  rollout: types.Rollout, segments: types.Segments, completions: types.Completions, temperature: chex.Numeric
) -> None:
  must = "be > 0: logits are divided by it. For the likelihood under the model itself use 1."
  checks.check_number("temperature", temperature, lambda x: x > 0, must)
  for name, x, axes, kind in (
    ("rollout.prompt_tokens", rollout.prompt_tokens, "B P", int),
    ("rollout.prompt_mask", rollout.prompt_mask, "B P", bool),
    ("rollout.tokens", rollout.tokens, "B T", int),
    ("rollout.mask", rollout.mask, "B T", bool),
    ("completions.tokens", completions.tokens, "B K N S", int),
    ("completions.mask", completions.mask, "B K N S", bool),
    ("completions.scored", completions.scored, "B K N S", bool),
    ("completions.valid", completions.valid, "B K N", bool),
  ):
    checks.check_array(name, x, axes, kind)
  checks.check_segments(segments, "B")
  batch, k_max = segments.ends.shape
  states = 1 if completions.tokens.shape[1] == 1 else k_max
  shape = (batch, states, *completions.tokens.shape[2:])
  checks.check_shape("completions.tokens", completions.tokens, shape, "segments.ends [B, K or 1]")
  checks.check_shape("rollout.tokens", rollout.tokens, segments.segment_ids.shape, "segments.segment_ids")
  for part in ("mask", "scored"):
    checks.check_shape(f"completions.{part}", getattr(completions, part), shape, "completions.tokens")
  checks.check_shape("completions.valid", completions.valid, shape[:3], "completions.tokens")
  if 0 in shape:
    raise ValueError(f"completions.tokens has shape {shape}: there must be a completion (N) with room for a token (S).")
  if not rollout.prompt_tokens.shape[1]:
    raise ValueError("rollout.prompt_tokens has no column: nothing predicts the traces' first tokens.")
  prompts = checks.concrete(rollout.prompt_mask)
  if prompts is not None and not np.all(prompts.any(axis=-1)):
    row = int(np.argmin(prompts.any(axis=-1)))
    raise ValueError(
      f"rollout.prompt_mask[{row}] is all False: the prompt of row {row} has no token, so that nothing predicts the "
      "trace's first one; begin prompts with a beginning-of-sequence token."
    )
