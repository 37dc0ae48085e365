"""Attribution by attention weights."""

import chex
import jax
import jax.numpy as jnp

from rredcot_jax.credit import attribution
from rredcot_jax.model import decoder
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.ops import types


class Attention(attribution.Attribution):
  """`attention` as a source of credit."""

  name = "attention"
  modes = ("magnitude",)

  @classmethod
  def why_not(cls, mode: str) -> str:
    """See `Source.why_not`."""
    return "attention is never negative, so it says where to look and not which way"

  def attribute(self, params, rollout, segments, completions, exit_ids):
    """See `attention`."""
    return attention(
      params, self.setting.model, rollout, segments, completions, exit_ids=exit_ids, chunk_size=self.setting.chunk_size
    )

  def forward_passes(self, states: int) -> int:
    """One forward pass."""
    return 1


class AttentionRollout(Attention):
  """`attention_rollout` as a source of credit."""

  name = "attention_rollout"

  def attribute(self, params, rollout, segments, completions, exit_ids):
    """See `attention_rollout`."""
    return attention_rollout(
      params, self.setting.model, rollout, segments, completions, exit_ids=exit_ids, chunk_size=self.setting.chunk_size
    )


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
  the completion as queries. Attention to the prompt and to the completion itself
  counts for no segment, so a trace's credit sums to less than 1.

  Memory of a trace is quadratic in P + T + S; see `decoder.attention_weights`.

  Args:
    params, config: the policy that sampled.
    rollout, segments, completions, exit_ids: see `attribution.lay_out`.
    chunk_size: traces run at once; None runs the batch together.

  Returns:
    [B, K] float32 in [0, 1]; 0 where there is no segment, where a segment has no token in the thought, and on
    rows without a valid completion. No gradient flows to `params`.

  Raises:
    ValueError: on more than one completion a trace, or a chunk_size below 1.
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

  Memory, arguments, result and errors are those of `attention`.
  """
  return _attention_credit(params, config, rollout, segments, completions, exit_ids, chunk_size, through_layers=True)


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
  layout = attribution.lay_out(rollout, segments, completions, exit_ids)
  start = layout.tokens.shape[1] - layout.targets.shape[1]

  def of_trace(row: attribution.Layout) -> chex.Array:
    weights = decoder.attention_weights(params, config, row.tokens[None], row.mask[None])[:, 0]
    asking = jnp.zeros(row.tokens.shape, jnp.float32).at[start:].set(row.scored)
    asking = asking / jnp.maximum(jnp.sum(asking), 1)
    if not through_layers:
      return asking @ weights[-1]
    # A vector is multiplied through the layers from the top down, so no product of two matrices is needed.
    flow, _ = jax.lax.scan(lambda flow, layer: (0.5 * (flow @ layer) + 0.5 * flow, None), asking, weights, reverse=True)
    return flow

  token_credit = jax.lax.map(of_trace, layout, batch_size=attribution.chunk(chunk_size, layout.tokens.shape[0]))
  return attribution.finish(attribution.sum_segments(token_credit, layout, segments.ends.shape[1]), layout)
