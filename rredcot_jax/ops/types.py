"""The frozen pytrees that travel from one file to the next.

Shapes are given as the method functions see them: one trace of at most `T`
tokens, cut into at most `K` segments. Batched code carries one leading axis
`B` on every field and vmaps.

Index convention, fixed here once: `t` counts trace tokens from 0; segment `k`
(from 0) holds the tokens `starts[k] <= t < ends[k]`; state `k` is the prompt
followed by the tokens `t < starts[k]`, so state 0 is the prompt alone and the
terminal state, number `num_segments`, is the whole trace. In the notation of
docs/method.md, `ends[k]` is e_{k+1} and state `k` is s_k.
"""

import dataclasses
from typing import TypeVar, dataclass_transform

import chex
import jax
import jax.numpy as jnp

_Class = TypeVar("_Class")


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def pytree(cls: type[_Class]) -> type[_Class]:
  """A frozen dataclass that jax transforms and `jax.tree.map` see through.

  Change a field with `dataclasses.replace`. A field with the metadata `{"static": True}` is
  compared and hashed when a jitted function looks for its program, and is no array.
  """
  return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@pytree
class Rollout:
  """Sampled traces, right-padded, after left-padded prompts.

  Everything is kept as token ids: no text is decoded and encoded again.

  The last four fields may be None for the scorers and for every bank but two: `rollouts` reads
  `sampler_log_probs`, and `own` reads `truncated`.
  """

  prompt_tokens: chex.Array  # [P] int32, left-padded.
  prompt_mask: chex.Array  # [P] bool, True on real tokens.
  tokens: chex.Array  # [T] int32, the trace, its end-of-sequence token included.
  mask: chex.Array  # [T] bool, True on real tokens (a prefix of True).
  log_probs: chex.Array | None = None  # [T] float32, of the policy at the sampling temperature (nats).
  sampler_log_probs: chex.Array | None = None  # [T] float32, of what was sampled from: after top-k and top-p (nats).
  entropy: chex.Array | None = None  # [T] float32, of the model's next-token distribution (nats).
  truncated: chex.Array | None = None  # [] bool, True where the trace ran out of room.


@pytree
class Segments:
  """A cut of one trace into `num_segments <= K` consecutive segments.

  Where `thought_end` is known, the exit's first token opens a segment (unless only one was
  wanted), so that a state lies either in the thought or after it, and no segment holds both.
  """

  ends: chex.Array  # [K] int32, exclusive; the trace's length from num_segments - 1 on.
  segment_ids: chex.Array  # [T] int32 in [0, num_segments), -1 on padding.
  num_segments: chex.Array  # [] int32; 0 only for an empty trace.
  num_merged: chex.Array  # [] int32, cuts found but given up to fit (never silent).
  # Both are the trace's length without an exit, and None where no exit was looked for.
  thought_end: chex.Array | None = None  # [] int32, the first token of the exit.
  solution_start: chex.Array | None = None  # [] int32, the first token after the exit.

  @property
  def starts(self) -> chex.Array:
    """[..., K] int32, the first token of each segment: the cut of its state."""
    first = jnp.zeros_like(self.ends[..., :1])
    return jnp.concatenate([first, self.ends[..., :-1]], axis=-1)

  @property
  def mask(self) -> chex.Array:
    """[..., K] bool, True on segments that exist."""
    k = jax.lax.broadcasted_iota(jnp.int32, self.ends.shape, self.ends.ndim - 1)
    return k < self.num_segments[..., None]

  @property
  def lengths(self) -> chex.Array:
    """[..., K] int32, tokens in each segment, 0 where there is none."""
    return self.ends - self.starts

  @property
  def after_exit(self) -> chex.Array:
    """[..., K] bool, states at which the trace has begun to leave its thought: `starts[k] > thought_end`.

    A completion that leaves the thought makes no sense there. False where `thought_end` is None.
    The state of the whole thought, at which the exit is yet to be written, is not one of them.
    """
    if self.thought_end is None:
      return jnp.zeros_like(self.mask)
    return self.mask & (self.starts > jnp.asarray(self.thought_end)[..., None])


@pytree
class Completions:
  """A bank: for each state `k`, `N` ways in which the trace might go on and end."""

  tokens: chex.Array  # [K, N, S] int32, right-padded.
  mask: chex.Array  # [K, N, S] bool, True on real tokens (a prefix of True).
  scored: chex.Array  # [K, N, S] bool, the tokens whose log-probability counts; in mask.
  utilities: chex.Array  # [K, N] float32 >= 0, zeta_n.
  log_q: chex.Array  # [K, N] float32, log-probability under the proposal (nats).
  valid: chex.Array  # [K, N] bool, False on empty places.


@pytree
class Credit:
  """What one trace's reward was turned into."""

  values: chex.Array  # [K + 1] float32, v(s_0) .. v(s_K); R from num_segments on; NaN from attribution, which has none.
  rewards: chex.Array  # [K] float32, r_k, 0 where there is no segment.
  advantages: chex.Array  # [T] float32, A_t, 0 on padding.
  effective_sample_size: chex.Array  # [K] float32, of the weights behind each value.


@pytree
class TrainBatch:
  """What a policy update needs of a trace, and nothing else."""

  prompt_tokens: chex.Array  # [P] int32, left-padded.
  prompt_mask: chex.Array  # [P] bool.
  tokens: chex.Array  # [T] int32.
  mask: chex.Array  # [T] bool, tokens the model reads.
  loss_mask: chex.Array  # [T] bool, tokens the loss counts; in mask.
  old_log_probs: chex.Array  # [T] float32, of the policy that sampled (nats).
  reference_log_probs: chex.Array  # [T] float32, of the KL reference (nats).
  advantages: chex.Array  # [T] float32.
  sampler_log_probs: chex.Array | None = None  # [T] float32, of what was sampled from (nats); for losses' importance.
