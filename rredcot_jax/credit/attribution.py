"""A trace and the reference answer -> credit of each segment, by attribution instead of state values.

The paper compares its redistribution with attribution methods [A]; which ones, and
every detail below, is our choice [C]. Each asks which segments a finished thought's
likelihood of the reference completion is due to:

    F = log p(c | x, o_1 .. o_L)                     space="log"
    F = p(c | x, o_1 .. o_L)                         space="probability"

and answers with `[B, K]` credit, of the shape and meaning of `redistribution.redistribute`'s
r_k, so that it can be compared with it and can train as well as be looked at.

Every method reads the *thought* only: a trace that goes on to state an answer would
make any completion after it the likelihood of a second answer. The thought is the
tokens before the first exit; without an exit, all tokens but the end-of-sequence
token of a trace that was not truncated. The completion (exit, answer, end of
sequence) takes the place of the rest. A segment gets the credit of its tokens
within the thought, so one that holds nothing but exit and answer gets 0.

None of these is an estimate of r_k = v(s_{k+1}) - v(s_k), and none sums to R - v(s_0):

- leave_one_out puts the model before a thought with a hole, which the policy would not
  have written, and what a segment caused *through the segments after it* it does not see:
  those are held fixed.
- Gradients are of the one thought that was written; they say how F moves with its
  embeddings, not what else could have been written. The logarithm of a small
  likelihood makes them large.
- Attention says where the answer was read from, never whether it became more likely.

tests/attribution_test.py has a language model small enough to enumerate in which each
misses the exact differences by a stated number.

To train, `advantages.token_advantages` takes a trace's credit as its rewards:

| credit of                              | magnitude | signed                | difference               |
| -------------------------------------- | --------- | --------------------- | ------------------------ |
| leave_one_out                          | yes       | yes                   | space="probability" only |
| gradient_x_input, integrated_gradients | yes       | yes                   | space="probability" only |
| attention, attention_rollout           | yes       | no: never negative    | no                       |

"difference" takes r_k as it is, so its units must be the return's: credit in log space is
unbounded. Attention is never negative: "difference" would praise every trace, and
"signed" fall back to uniform credit wherever the advantage is negative. Credit is
credit for the *reference* answer, whatever the trace's own outcome was.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rredcot_jax.model import decoder
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.ops import types
from rredcot_jax.ops.masked import masked_sum

ATTRIBUTIONS = ("leave_one_out", "gradient_x_input", "integrated_gradients", "attention", "attention_rollout")
SPACES = ("probability", "log")


def attribute(
  name: str,
  params: decoder.Params,
  config: ModelConfig,
  rollout: types.Rollout,
  segments: types.Segments,
  completions: types.Completions,
  *,
  exit_ids: chex.Array,
  temperature: float,
  space: str | None = None,
  chunk_size: int | None = None,
  steps: int = 64,
) -> chex.Array:
  """The credit of each segment by the attribution called `name`.

  Args:
    name: one of `ATTRIBUTIONS`; static, as are config, space, chunk_size and steps.
    params, config: the policy that sampled.
    rollout, segments: fields [B, ...]. A prompt has at least one token.
    completions: fields [B, 1, 1, ...], one reference completion a trace, as
      `completions.make_bank("answer", ...)` makes them. Its `scored` tokens count;
      utilities and log_q are not read.
    exit_ids: [E] int32, the tokens that leave the thought (`Reference.exit`); E may be
      0, for a task whose thought has no end of its own.
    temperature: logits are divided by it; use the sampling temperature. Attention does not read it.
    space: one of `SPACES`; None takes the method's own default. Attention does not read it.
    chunk_size: bounds memory at the price of time; see each method. None runs all at once.
    steps: of `integrated_gradients`; the others do not read it.

  Returns:
    [B, K] float32; 0 where there is no segment, where a segment has no token in the
    thought, and on rows without a valid completion. No gradient flows to `params`.

  Raises:
    ValueError: on an unknown name or option, more than one completion a trace, or a
      chunk_size or steps below 1.
  """
  types.check_option("attribution", name, ATTRIBUTIONS)
  if space is not None:
    types.check_option("space", space, SPACES)
  trace = (params, config, rollout, segments, completions)
  if name == "attention":
    return attention(*trace, exit_ids=exit_ids, chunk_size=chunk_size)
  if name == "attention_rollout":
    return attention_rollout(*trace, exit_ids=exit_ids, chunk_size=chunk_size)
  if name == "leave_one_out":
    return leave_one_out(
      *trace, exit_ids=exit_ids, temperature=temperature, space=space or "probability", chunk_size=chunk_size
    )
  space = space or "log"
  if name == "gradient_x_input":
    return gradient_x_input(*trace, exit_ids=exit_ids, temperature=temperature, space=space)
  return integrated_gradients(*trace, exit_ids=exit_ids, temperature=temperature, space=space, steps=steps)


def leave_one_out(
  params: decoder.Params,
  config: ModelConfig,
  rollout: types.Rollout,
  segments: types.Segments,
  completions: types.Completions,
  *,
  exit_ids: chex.Array,
  temperature: float,
  space: str = "probability",
  chunk_size: int | None = None,
) -> chex.Array:
  """What the reference completion loses when a segment is deleted from the thought.

      credit_k = F(o_1 .. o_L) - F(o_1 .. o_L without segment k)

  Deleted tokens are attended to by nothing and counted in no position: the model sees
  a shorter thought. With F a probability, the default [C], credit is in [-1, 1] and in
  the units of the values that redistribution takes differences of; the logarithm keeps
  its resolution where long answers underflow. Within a trace, log credit d_k and
  p (1 - e^{-d_k}) rank the segments alike.

  Costs (K + 1) (P + T + S) token-forwards a trace: what follows a deletion has to be
  run again, and with static shapes that is the whole.

  Args:
    params, config, rollout, segments, completions, exit_ids, temperature: see `attribute`.
    space: one of `SPACES`.
    chunk_size: deletions of a trace run at once; None runs them all together.

  Returns:
    [B, K] float32; see `attribute` for where it is 0.

  Raises:
    ValueError: see `attribute`.
  """
  types.check_option("space", space, SPACES)
  layout = _lay_out(rollout, segments, completions, exit_ids)
  k_max = segments.ends.shape[1]
  x = _embeddings(params, layout)

  def score_without(k: chex.Array) -> chex.Array:
    kept = jnp.logical_and(layout.mask, layout.segment_ids != k)
    return _in_space(_log_likelihood(params, config, x, kept, layout, temperature), space)

  # No token has the segment number K, so that the last of these deletes nothing.
  scores = jax.lax.map(score_without, jnp.arange(k_max + 1), batch_size=_chunk(chunk_size, k_max + 1))
  return _finish(jnp.moveaxis(scores[-1:] - scores[:-1], 0, 1), layout)


def gradient_x_input(
  params: decoder.Params,
  config: ModelConfig,
  rollout: types.Rollout,
  segments: types.Segments,
  completions: types.Completions,
  *,
  exit_ids: chex.Array,
  temperature: float,
  space: str = "log",
) -> chex.Array:
  """First-order effect on the reference completion of scaling a segment's input embeddings.

      credit_k = sum_{t in segment k} dF / de_t . e_t

  e_t is token t's input embedding. In probability space it is p times that in log space.
  A layer that opens with RMSNorm does not see the scale of its input, so that what
  is measured is only how e_t weighs against what attention and MLP add to it: this
  method is weak on such decoders by construction, and 0 for a model without layers.

  Costs one forward and one backward pass over P + T + S tokens a trace.

  Args:
    params, config, rollout, segments, completions, exit_ids, temperature: see `attribute`.
    space: one of `SPACES`.

  Returns:
    [B, K] float32; see `attribute` for where it is 0.

  Raises:
    ValueError: see `attribute`.
  """
  types.check_option("space", space, SPACES)
  layout = _lay_out(rollout, segments, completions, exit_ids)
  x = _embeddings(params, layout)
  gradient = _gradient(params, config, x, layout, temperature, space)
  token_credit = jnp.sum(gradient * x.astype(jnp.float32), axis=-1)
  return _finish(_sum_segments(token_credit, layout, segments.ends.shape[1]), layout)


def integrated_gradients(
  params: decoder.Params,
  config: ModelConfig,
  rollout: types.Rollout,
  segments: types.Segments,
  completions: types.Completions,
  *,
  exit_ids: chex.Array,
  temperature: float,
  space: str = "log",
  steps: int = 64,
) -> chex.Array:
  """The reference completion's gain over a blank context, split over tokens (arXiv 1703.01365).

      a_t = (e_t - e') . int_0^1 dF / de_t (e' + alpha (e - e')) d alpha
      credit_k = sum_{t in segment k} a_t

  Prompt and thought travel the path together; the completion's own inputs are kept, as
  they belong to what is asked. Completeness: over all tokens of prompt and thought the
  a_t sum to F(e) - F(e'), up to the quadrature; the thought's share is not separable from
  the prompt's.

  The baseline e' is the mean over the embedding table [C], the same for every token.
  Zeros, the usual choice, do not work here: RMSNorm divides a vanishing input by
  sqrt(epsilon) = 1e-3 in every layer, so that the whole gain falls within the first 1e-3
  of the path in one layer, 1e-6 in two, and no quadrature finds it (two layers, 256
  nodes: off by more than the gain, where the mean's path is exact to 1e-5 with 64).

  The integral is taken by Gauss-Legendre quadrature. How many nodes it needs is the
  model's: the sum was off by 1.5 nats at 32, 0.4 at 64 and 0.1 at 128 on the shipped
  start of `chain` (mean over 32 failed traces, gains near -5). Compare with twice the
  steps before trusting a number.

  Costs `steps` forward and backward passes over P + T + S tokens a trace, one after the other.

  Args:
    params, config, rollout, segments, completions, exit_ids, temperature: see `attribute`.
    space: one of `SPACES`.
    steps: nodes of the quadrature, >= 1.

  Returns:
    [B, K] float32; see `attribute` for where it is 0.

  Raises:
    ValueError: see `attribute`.
  """
  types.check_option("space", space, SPACES)
  layout = _lay_out(rollout, segments, completions, exit_ids)
  token_credit = _token_integrated_gradients(params, config, layout, temperature, space, steps)
  return _finish(_sum_segments(token_credit, layout, segments.ends.shape[1]), layout)


def attention(
  params: decoder.Params,
  config: ModelConfig,
  rollout: types.Rollout,
  segments: types.Segments,
  completions: types.Completions,
  *,
  exit_ids: chex.Array,
  chunk_size: int | None = None,
) -> chex.Array:
  """The last layer's attention from the reference completion to each segment.

      credit_k = mean_i sum_{t in segment k} A_{i t}

  A is the last layer's attention averaged over heads, i runs over the scored tokens of
  the completion as queries. What goes to the prompt and to the completion itself is
  nobody's credit, so a trace's credit sums to less than 1.

  Memory of a trace is quadratic in P + T + S; see `decoder.attention_weights`.

  Args:
    params, config, rollout, segments, completions, exit_ids: see `attribute`.
    chunk_size: traces run at once; None runs the batch together.

  Returns:
    [B, K] float32 in [0, 1]; see `attribute` for where it is 0.

  Raises:
    ValueError: see `attribute`.
  """
  return _attention_credit(params, config, rollout, segments, completions, exit_ids, chunk_size, through_layers=False)


def attention_rollout(
  params: decoder.Params,
  config: ModelConfig,
  rollout: types.Rollout,
  segments: types.Segments,
  completions: types.Completions,
  *,
  exit_ids: chex.Array,
  chunk_size: int | None = None,
) -> chex.Array:
  """Attention followed down to the inputs, through all layers (arXiv 2005.00928).

      credit_k = mean_i sum_{t in segment k} (M_L M_{L-1} .. M_1)_{i t},   M_l = (A_l + I) / 2

  A_l is layer l's attention averaged over heads, the half identity stands for the
  residual stream, i runs over the scored tokens of the completion as queries.

  Memory of a trace is quadratic in P + T + S; see `decoder.attention_weights`.

  Args:
    params, config, rollout, segments, completions, exit_ids: see `attribute`.
    chunk_size: traces run at once; None runs the batch together.

  Returns:
    [B, K] float32 in [0, 1]; see `attribute` for where it is 0.

  Raises:
    ValueError: see `attribute`.
  """
  return _attention_credit(params, config, rollout, segments, completions, exit_ids, chunk_size, through_layers=True)


def thought_lengths(rollout: types.Rollout, exit_ids: chex.Array) -> chex.Array:
  """Tokens of each trace that come before it leaves its thought.

  Up to the first whole exit; without one, all tokens but the last (the end of
  sequence) of a trace that was not truncated. An exit that a truncated trace began and
  did not finish counts as thought.

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
  ended = jnp.logical_and(jnp.logical_not(rollout.truncated), lengths > 0)
  written = lengths - ended.astype(jnp.int32)
  if width == 0 or width > size:
    return written
  windows = jnp.arange(size - width + 1)[:, None] + jnp.arange(width)[None]
  leaves = jnp.all(rollout.tokens[:, windows] == exit_ids[None, None], axis=-1)
  leaves = jnp.logical_and(leaves, rollout.mask[:, width - 1 :])
  return jnp.where(jnp.any(leaves, axis=1), jnp.argmax(leaves, axis=1).astype(jnp.int32), written)


@struct.dataclass
class _Layout:
  """Prompt [P], thought [T] and completion [S] side by side, C = P + T + S columns."""

  tokens: chex.Array  # [B, C] int32.
  mask: chex.Array  # [B, C] bool; False on what follows the thought, so that the completion does.
  segment_ids: chex.Array  # [B, C] int32, -1 outside the thought.
  targets: chex.Array  # [B, S] int32.
  scored: chex.Array  # [B, S] bool.
  valid: chex.Array  # [B] bool.


def _lay_out(
  rollout: types.Rollout, segments: types.Segments, completions: types.Completions, exit_ids: chex.Array
) -> _Layout:
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
  in_thought = jnp.arange(size)[None] < thought_lengths(rollout, exit_ids)[:, None]
  ids = jnp.where(in_thought, segments.segment_ids, -1)
  nowhere = lambda width: jnp.full((batch, width), -1, jnp.int32)
  return _Layout(
    tokens=jnp.concatenate([rollout.prompt_tokens, rollout.tokens, completions.tokens[:, 0, 0]], axis=1),
    mask=jnp.concatenate(
      [rollout.prompt_mask, jnp.logical_and(rollout.mask, in_thought), completions.mask[:, 0, 0]], axis=1
    ),
    segment_ids=jnp.concatenate([nowhere(p), ids.astype(jnp.int32), nowhere(s)], axis=1),
    targets=jnp.asarray(completions.tokens[:, 0, 0]),
    scored=jnp.asarray(completions.scored[:, 0, 0]),
    valid=jnp.asarray(completions.valid[:, 0, 0]),
  )


def _embeddings(params: decoder.Params, layout: _Layout) -> chex.Array:
  return jnp.take(params["embedding"], layout.tokens, axis=0)


def _log_likelihood(
  params: decoder.Params,
  config: ModelConfig,
  x: chex.Array,
  mask: chex.Array,
  layout: _Layout,
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


def _in_space(log_p: chex.Array, space: str) -> chex.Array:
  return jnp.exp(log_p) if space == "probability" else log_p


def _gradient(
  params: decoder.Params,
  config: ModelConfig,
  x: chex.Array,
  layout: _Layout,
  temperature: float,
  space: str,
) -> chex.Array:
  """[B, C, D] float32, dF/dx: rows do not see each other, so the gradient of their sum is each row's own."""

  def total(x: chex.Array) -> chex.Array:
    return jnp.sum(_in_space(_log_likelihood(params, config, x, layout.mask, layout, temperature), space))

  return jax.grad(total)(x).astype(jnp.float32)


def _token_integrated_gradients(
  params: decoder.Params,
  config: ModelConfig,
  layout: _Layout,
  temperature: float,
  space: str,
  steps: int,
) -> chex.Array:
  """[B, C] float32, a_t of `integrated_gradients` for every column; 0 on the completion's."""
  if steps < 1:
    raise ValueError(f"steps={steps} must be at least 1: it counts the points of the path.")
  x = _embeddings(params, layout)
  path_end = x.astype(jnp.float32)
  path_start = _blank(params, layout, path_end)
  nodes, weights = np.polynomial.legendre.leggauss(steps)
  alpha_and_weight = jnp.asarray((nodes + 1) / 2, jnp.float32), jnp.asarray(weights / 2, jnp.float32)

  def add_node(total: chex.Array, node: tuple[chex.Array, chex.Array]) -> tuple[chex.Array, None]:
    alpha, weight = node
    at = (path_start + alpha * (path_end - path_start)).astype(x.dtype)
    return total + weight * _gradient(params, config, at, layout, temperature, space), None

  mean_gradient, _ = jax.lax.scan(add_node, jnp.zeros_like(path_end), alpha_and_weight)
  return jnp.sum(mean_gradient * (path_end - path_start), axis=-1)


def _blank(params: decoder.Params, layout: _Layout, x: chex.Array) -> chex.Array:
  """`x` with the context's embeddings replaced by the mean one, the completion's kept."""
  mean = jnp.mean(params["embedding"].astype(jnp.float32), axis=0)
  context = jnp.arange(x.shape[1]) < x.shape[1] - layout.targets.shape[1]
  return jnp.where(context[None, :, None], mean[None, None], x)


def _attention_credit(
  params: decoder.Params,
  config: ModelConfig,
  rollout: types.Rollout,
  segments: types.Segments,
  completions: types.Completions,
  exit_ids: chex.Array,
  chunk_size: int | None,
  *,
  through_layers: bool,
) -> chex.Array:
  layout = _lay_out(rollout, segments, completions, exit_ids)
  start = layout.tokens.shape[1] - layout.targets.shape[1]

  def of_trace(row: _Layout) -> chex.Array:
    weights = decoder.attention_weights(params, config, row.tokens[None], row.mask[None])[:, 0]
    asking = jnp.zeros(row.tokens.shape, jnp.float32).at[start:].set(row.scored)
    asking = asking / jnp.maximum(jnp.sum(asking), 1)
    if not through_layers:
      return asking @ weights[-1]
    # From the top down a vector passes through the layers, and no product of two matrices is needed.
    flow, _ = jax.lax.scan(lambda flow, layer: (0.5 * (flow @ layer) + 0.5 * flow, None), asking, weights, reverse=True)
    return flow

  token_credit = jax.lax.map(of_trace, layout, batch_size=_chunk(chunk_size, layout.tokens.shape[0]))
  return _finish(_sum_segments(token_credit, layout, segments.ends.shape[1]), layout)


def _chunk(chunk_size: int | None, total: int) -> int:
  if chunk_size is not None and chunk_size < 1:
    raise ValueError(f"chunk_size={chunk_size} must be at least 1, or None to run all at once.")
  return total if chunk_size is None else min(chunk_size, total)


def _in_segment(layout: _Layout, k_max: int) -> chex.Array:
  """[B, K, C] bool, the thought's columns of each segment."""
  return layout.segment_ids[:, None] == jnp.arange(k_max)[None, :, None]


def _sum_segments(token_credit: chex.Array, layout: _Layout, k_max: int) -> chex.Array:
  """[B, C] -> [B, K]."""
  return masked_sum(token_credit[:, None], _in_segment(layout, k_max), axis=-1)


def _finish(credit: chex.Array, layout: _Layout) -> chex.Array:
  """Zeros where nothing was asked or nothing could answer, and no gradient."""
  counts = jnp.logical_and(jnp.any(_in_segment(layout, credit.shape[1]), axis=-1), layout.valid[:, None])
  return jax.lax.stop_gradient(jnp.where(counts, credit.astype(jnp.float32), 0.0))
