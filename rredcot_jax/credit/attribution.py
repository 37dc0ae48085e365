"""A trace and the reference answer -> credit of each segment, by attribution instead of state values.

The paper compares its redistribution with attribution methods [A]; which ones, and
every detail below, is our choice [C]. Each method splits over the segments of a finished
thought the likelihood F of the reference completion after it:

    F = log p(c | x, o_1 .. o_L)                     space="log"
    F = p(c | x, o_1 .. o_L)                         space="probability"

The result is `[B, K]` credit of the shape of `redistribution.redistribute`'s r_k. So it can be
compared with r_k, and a policy can be trained with it.

Every method reads the *thought* only. After a trace that already states an answer, the
completion would be a second answer. The thought is the tokens before the first exit.
Without an exit it is all tokens but the end-of-sequence token of a trace that was not
truncated. The completion (exit, answer, end of sequence) replaces the rest. A segment gets
the credit of its tokens within the thought. So a segment of exit and answer alone gets 0.

None of these is an estimate of r_k = v(s_{k+1}) - v(s_k), and none sums to R - v(s_0):

- leave_one_out shows the model a thought with a hole, which the policy would not have
  written. It does not see what a segment caused *through the segments after it*, because
  those are held fixed.
- Gradients belong to the one thought that was written. They say how F changes with its
  embeddings, not what else could have been written. In log space they are large
  where the likelihood is small.
- Attention says where the answer was read from. It does not say whether the answer became
  more likely.

tests/attribution_test.py has a language model that is small enough to enumerate. There each
method misses the exact differences by a stated number.

For training, `advantages.token_advantages` takes a trace's credit as its rewards:

| credit of                              | magnitude | signed                | difference               |
| -------------------------------------- | --------- | --------------------- | ------------------------ |
| leave_one_out                          | yes       | yes                   | space="probability" only |
| gradient_x_input, integrated_gradients | yes       | yes                   | space="probability" only |
| attention, attention_rollout           | yes       | no: never negative    | no                       |

"difference" takes r_k as it is, so r_k must have the units of the return. Credit in log space
has not, and is unbounded. Attention is never negative. So "difference" would reward every
trace, and "signed" would be uniform credit wherever the advantage is negative. Credit is
given for the *reference* answer, whatever answer the trace itself gave.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rredcot_jax.cost import flops
from rredcot_jax.credit import source
from rredcot_jax.model import decoder
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.ops import names, types
from rredcot_jax.ops.masked import masked_sum

SPACES = ("probability", "log")


class Attribution(source.Source):
  """What attributions share: they attribute the likelihood of the reference answer after the thought."""

  needs = frozenset({"bank"})
  default_space: str | None = None  # Of `SPACES`; None where the method measures no likelihood.

  def __init__(self, setting: source.Setting):
    super().__init__(setting)
    self._exit_ids = jnp.asarray(setting.codec.exit_ids, jnp.int32)
    self._attribute = jax.jit(self.attribute)

  @classmethod
  def check(cls, mode: str, bank: source.BankOptions, options: Mapping[str, Any]) -> None:
    """See `Source.check`."""
    super().check(mode, bank, options)
    if bank.name != "answer":
      raise ValueError(
        f"credit.bank={bank.name!r} with credit.source={cls.name!r}: attribution explains one completion after a "
        "finished thought; set credit.bank='answer'."
      )
    if cls.default_space is None:
      return
    space = options.get("space", cls.default_space)
    names.check_option("credit.options.space", space, SPACES)
    if mode == "difference" and space != "probability":
      raise ValueError(
        f"credit.mode={mode!r} with credit.source={cls.name!r} in space {space!r}: 'difference' takes credit as it is, "
        "so it must be in the return's units; set credit.options.space='probability', or another credit.mode."
      )

  @abc.abstractmethod
  def attribute(
    self,
    params: decoder.Params,
    rollout: types.Rollout,
    segments: types.Segments,
    completions: types.Completions,
    exit_ids: chex.Array,
  ) -> chex.Array:
    """[B, K] float32, the credit of each segment; pure."""

  @abc.abstractmethod
  def forward_passes(self, states: int) -> int:
    """Passes over prompt, thought and completion; a backward pass counts as two."""

  def assign(self, batch: source.Batch) -> source.Found:
    """See `Source.assign`."""
    bank = self.setting.make_bank(batch)
    of_thought = after_thought(bank.completions, batch.segments_here)
    completions, uniform_rows = self.setting.put((of_thought, bank.uniform_rows))
    rewards = self._attribute(batch.params, batch.rollout, batch.segments, completions, self._exit_ids)
    columns = sum(x.shape[-1] for x in (batch.rollout.prompt_tokens, batch.rollout.tokens, completions.tokens))
    batch_size, states = batch.segments.ends.shape
    return source.Found(
      rewards=rewards,
      sample_sizes=jnp.logical_and(batch.segments.mask, completions.valid[:, 0]).astype(jnp.float32),
      uniform_rows=uniform_rows,
      token_forwards=batch_size * columns * self.forward_passes(states),
      metrics=source.bank_metrics(self.setting, bank),
    )

  def count_flops(self, batch: source.Batch) -> float:
    """See `Source.count_flops`."""
    completions = after_thought(self.setting.make_bank(batch).completions, batch.segments_here)
    return flops.count(self.attribute, batch.params, batch.rollout, batch.segments, completions, self._exit_ids)


def after_thought(completions: types.Completions, segments: types.Segments) -> types.Completions:
  """The completions [B, 1, N, ...] of the last state of each thought, of those [B, K or 1, N, ...] of all states."""
  if completions.valid.shape[1] == 1:
    return completions
  thought = np.asarray(segments.mask) & ~np.asarray(segments.after_exit)
  last = np.maximum(thought.sum(axis=1) - 1, 0)
  return jax.tree.map(lambda x: x[np.arange(len(last)), last][:, None], completions)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
  """Prompt [P], thought [T] and completion [S] side by side, C = P + T + S columns."""

  tokens: chex.Array  # [B, C] int32.
  mask: chex.Array  # [B, C] bool; False on trace tokens after the thought, so that the completion follows the thought.
  segment_ids: chex.Array  # [B, C] int32, -1 outside the thought.
  targets: chex.Array  # [B, S] int32.
  scored: chex.Array  # [B, S] bool.
  valid: chex.Array  # [B] bool.


def lay_out(
  rollout: types.Rollout, segments: types.Segments, completions: types.Completions, exit_ids: chex.Array
) -> Layout:
  """Puts each row's prompt, thought and completion side by side.

  Args:
    rollout, segments: fields [B, ...]. A prompt has at least one token.
    completions: fields [B, 1, 1, ...], one reference completion a trace, as
      `banks.make_bank("answer", ...)` makes them. Its `scored` tokens count; utilities and log_q are not read.
    exit_ids: [E] int32, the tokens that leave the thought (`Reference.exit`). E may be
      0, for a task in which nothing leaves the thought.

  Raises:
    ValueError: on more than one completion a trace.
  """
  chex.assert_rank(
    [rollout.prompt_tokens, rollout.tokens, segments.ends, segments.segment_ids, completions.tokens], [2, 2, 2, 2, 4]
  )
  chex.assert_equal_shape([rollout.tokens, rollout.mask, segments.segment_ids])
  batch, p = rollout.prompt_tokens.shape
  _, k, n, s = completions.tokens.shape
  if (k, n) != (1, 1):
    raise ValueError(
      f"Attribution explains one completion a trace; these have {n} for each of {k} states. Use the 'answer' bank."
    )
  chex.assert_shape([completions.tokens, completions.mask, completions.scored], (batch, 1, 1, s))
  size = rollout.tokens.shape[1]
  if segments.thought_end is None:
    lengths = thought_lengths(rollout, exit_ids)
  else:  # Known in every tokenisation of the exit.
    lengths = jnp.minimum(thought_lengths(rollout, jnp.zeros(0, jnp.int32)), segments.thought_end)
  in_thought = jnp.arange(size)[None] < lengths[:, None]
  ids = jnp.where(in_thought, segments.segment_ids, -1)
  nowhere = lambda width: jnp.full((batch, width), -1, jnp.int32)
  return Layout(
    tokens=jnp.concatenate([rollout.prompt_tokens, rollout.tokens, completions.tokens[:, 0, 0]], axis=1),
    mask=jnp.concatenate(
      [rollout.prompt_mask, jnp.logical_and(rollout.mask, in_thought), completions.mask[:, 0, 0]], axis=1
    ),
    segment_ids=jnp.concatenate([nowhere(p), ids.astype(jnp.int32), nowhere(s)], axis=1),
    targets=jnp.asarray(completions.tokens[:, 0, 0]),
    scored=jnp.asarray(completions.scored[:, 0, 0]),
    valid=jnp.asarray(completions.valid[:, 0, 0]),
  )


def thought_lengths(rollout: types.Rollout, exit_ids: chex.Array) -> chex.Array:
  """Tokens of each trace that come before it leaves its thought.

  These are the tokens up to the first whole exit. Without an exit they are all tokens but
  the end-of-sequence token of a trace that was not truncated. An exit that was begun and cut
  off by truncation counts as thought.

  Args:
    rollout: fields [B, ...].
    exit_ids: [E] int32, E >= 0.

  Returns:
    [B] int32.
  """
  exit_ids = jnp.asarray(exit_ids, jnp.int32)
  chex.assert_rank([rollout.tokens, rollout.mask, rollout.truncated, exit_ids], [2, 2, 1, 1])
  size, width = rollout.tokens.shape[1], exit_ids.shape[0]
  lengths = jnp.sum(rollout.mask, axis=1, dtype=jnp.int32)
  assert rollout.truncated is not None  # The sampler records it.
  ended = jnp.logical_and(jnp.logical_not(rollout.truncated), lengths > 0)
  written = lengths - ended.astype(jnp.int32)
  if width == 0 or width > size:
    return written
  windows = jnp.arange(size - width + 1)[:, None] + jnp.arange(width)[None]
  leaves = jnp.all(rollout.tokens[:, windows] == exit_ids[None, None], axis=-1)
  leaves = jnp.logical_and(leaves, rollout.mask[:, width - 1 :])
  return jnp.where(jnp.any(leaves, axis=1), jnp.argmax(leaves, axis=1).astype(jnp.int32), written)


def embeddings(params: decoder.Params, layout: Layout) -> chex.Array:
  """[B, C, D], the input embeddings of a layout's tokens."""
  return jnp.take(params["embedding"], layout.tokens, axis=0)


def log_likelihood(
  params: decoder.Params,
  config: ModelConfig,
  x: chex.Array,
  mask: chex.Array,
  layout: Layout,
  temperature: float,
) -> chex.Array:
  """[B] float32, log p of the completion's scored tokens after what `mask` leaves of the context."""
  hidden, _ = decoder.forward_from_embeddings(params, config, x, mask)
  columns, s = mask.shape[1], layout.targets.shape[1]
  start = columns - s
  last = start - 1 - jnp.argmax(mask[:, :start][:, ::-1], axis=1)
  # The context's last token predicts the completion's first; the completion's last predicts nothing.
  before = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
  predicting = jnp.concatenate([before, hidden[:, start : columns - 1]], axis=1)
  log_probs = jax.nn.log_softmax(decoder.logits(params, predicting) / temperature, axis=-1)
  chosen = jnp.take_along_axis(log_probs, layout.targets[..., None], axis=-1)[..., 0]
  return masked_sum(chosen, layout.scored, axis=1)


def in_space(log_p: chex.Array, space: str) -> chex.Array:
  """F in one of `SPACES`, from log-probabilities."""
  return jnp.exp(log_p) if space == "probability" else log_p


def chunk(chunk_size: int | None, total: int) -> int:
  """How many of `total` to run at once; None is all."""
  if chunk_size is not None and chunk_size < 1:
    raise ValueError(f"chunk_size={chunk_size} must be at least 1, or None to run all at once.")
  return total if chunk_size is None else min(chunk_size, total)


def in_segment(layout: Layout, k_max: int) -> chex.Array:
  """[B, K, C] bool, the thought's columns of each segment."""
  return layout.segment_ids[:, None] == jnp.arange(k_max)[None, :, None]


def sum_segments(token_credit: chex.Array, layout: Layout, k_max: int) -> chex.Array:
  """The sum over each segment's tokens: [B, C] -> [B, K]."""
  return masked_sum(token_credit[:, None], in_segment(layout, k_max), axis=-1)


def finish(credit: chex.Array, layout: Layout) -> chex.Array:
  """Credit with 0 where there is no segment or no valid completion, and without gradient."""
  counts = jnp.logical_and(jnp.any(in_segment(layout, credit.shape[1]), axis=-1), layout.valid[:, None])
  return jax.lax.stop_gradient(jnp.where(counts, credit.astype(jnp.float32), 0.0))
