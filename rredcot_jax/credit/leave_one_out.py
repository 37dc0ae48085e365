"""Attribution by deleting a segment from the thought."""

import chex
import jax
import jax.numpy as jnp

from rredcot_jax.credit import attribution, source
from rredcot_jax.model import decoder
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.ops import names, types


class LeaveOneOut(attribution.Attribution):
  """`leave_one_out` as a source of credit."""

  name = "leave_one_out"
  default_space = "probability"

  def __init__(self, setting: source.Setting, *, space: str = "probability"):
    """`space`: of `attribution.SPACES`."""
    super().__init__(setting)
    self._space = space

  def attribute(self, params, rollout, segments, completions, exit_ids):
    """See `leave_one_out`."""
    return leave_one_out(
      params, self.setting.model, rollout, segments, completions, exit_ids=exit_ids,
      temperature=self.setting.temperature, space=self._space, chunk_size=self.setting.chunk_size,
    )  # fmt: skip

  def forward_passes(self, states: int) -> int:
    """One pass for each deletion, and one for the whole thought."""
    return states + 1


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

  Deleted tokens are masked and do not count in positions, so the model sees a shorter
  thought. F is a probability by default [C]. Credit is then in [-1, 1] and has the units of
  state values. The logarithm keeps its resolution where the likelihood of a long answer
  underflows. Within a trace, log credit d_k and p (1 - e^{-d_k}) rank the segments alike.

  It costs (K + 1) (P + T + S) token-forwards a trace. The tokens after a deletion have to be
  run again, and with static shapes this means all tokens.

  Args:
    params, config: the policy that sampled.
    rollout, segments, completions, exit_ids: see `attribution.lay_out`.
    temperature: logits are divided by it; use the sampling temperature.
    space: one of `SPACES`.
    chunk_size: deletions of a trace run at once; None runs them all together.

  Returns:
    [B, K] float32; 0 where there is no segment, where a segment has no token in the thought, and on rows
    without a valid completion. No gradient flows to `params`.

  Raises:
    ValueError: on an unknown space, more than one completion a trace, or a chunk_size below 1.
  """
  names.check_option("space", space, attribution.SPACES)
  layout = attribution.lay_out(rollout, segments, completions, exit_ids)
  k_max = segments.ends.shape[1]
  x = attribution.embeddings(params, layout)

  def score_without(k: chex.Array) -> chex.Array:
    kept = jnp.logical_and(layout.mask, layout.segment_ids != k)
    return attribution.in_space(attribution.log_likelihood(params, config, x, kept, layout, temperature), space)

  # No token has the segment number K, so the last of these deletes nothing.
  scores = jax.lax.map(score_without, jnp.arange(k_max + 1), batch_size=attribution.chunk(chunk_size, k_max + 1))
  return attribution.finish(jnp.moveaxis(scores[-1:] - scores[:-1], 0, 1), layout)
