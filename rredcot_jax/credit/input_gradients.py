"""Attribution by the gradient at the input embeddings."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rredcot_jax.credit import attribution, source
from rredcot_jax.model import decoder
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.ops import names, types


class GradientXInput(attribution.Attribution):
  """`gradient_x_input` as a source of credit."""

  name = "gradient_x_input"
  default_space = "log"

  def __init__(self, setting: source.Setting, *, space: str = "log"):
    """`space`: of `attribution.SPACES`."""
    super().__init__(setting)
    self._space = space

  def attribute(self, params, rollout, segments, completions, exit_ids):
    """See `gradient_x_input`."""
    return gradient_x_input(
      params, self.setting.model, rollout, segments, completions, exit_ids=exit_ids,
      temperature=self.setting.temperature, space=self._space,
    )  # fmt: skip

  def forward_passes(self, states: int) -> int:
    """One forward and one backward pass."""
    return 3


class IntegratedGradients(attribution.Attribution):
  """`integrated_gradients` as a source of credit."""

  name = "integrated_gradients"
  default_space = "log"

  def __init__(self, setting: source.Setting, *, space: str = "log", steps: int = 64):
    """`space`: of `attribution.SPACES`; `steps`: nodes of the quadrature, at least 1."""
    super().__init__(setting)
    if steps < 1:
      raise ValueError(f"credit.options.steps={steps} must be at least 1: it counts the points of the path.")
    self._space, self._steps = space, steps

  def attribute(self, params, rollout, segments, completions, exit_ids):
    """See `integrated_gradients`."""
    return integrated_gradients(
      params, self.setting.model, rollout, segments, completions, exit_ids=exit_ids,
      temperature=self.setting.temperature, space=self._space, steps=self._steps,
    )  # fmt: skip

  def forward_passes(self, states: int) -> int:
    """One forward and one backward pass a node."""
    return 3 * self._steps


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

  e_t is token t's input embedding. Credit in probability space is p times that in log space.

  This method is weak on decoders whose layers open with RMSNorm, because RMSNorm removes the
  scale of its input. What is measured is only the weight of e_t beside what attention and MLP
  add to it. For a model without layers it is 0.

  It costs one forward and one backward pass over P + T + S tokens a trace.

  Args:
    params, config: the policy that sampled.
    rollout, segments, completions, exit_ids: see `attribution.lay_out`.
    temperature: logits are divided by it; use the sampling temperature.
    space: one of `SPACES`.

  Returns:
    [B, K] float32; 0 where there is no segment, where a segment has no token in the thought, and on rows
    without a valid completion. No gradient flows to `params`.

  Raises:
    ValueError: on an unknown space, or more than one completion a trace.
  """
  names.check_option("space", space, attribution.SPACES)
  layout = attribution.lay_out(rollout, segments, completions, exit_ids)
  x = attribution.embeddings(params, layout)
  gradient = _gradient(params, config, x, layout, temperature, space)
  token_credit = jnp.sum(gradient * x.astype(jnp.float32), axis=-1)
  return attribution.finish(attribution.sum_segments(token_credit, layout, segments.ends.shape[1]), layout)


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

  Prompt and thought follow the path together. The completion's own inputs are kept, because
  the completion is what is explained. Completeness: over all tokens of prompt and thought the
  a_t sum to F(e) - F(e'), up to the error of the quadrature. The thought's share of that sum
  cannot be separated from the prompt's.

  The baseline e' is the mean over the embedding table [C], the same for every token. Zeros,
  the usual choice, do not work here, because RMSNorm divides a vanishing input by
  sqrt(epsilon) = 1e-3 in every layer. The whole gain then lies in the first 1e-3 of the path
  with one layer and in the first 1e-6 with two, where no quadrature finds it. With two layers
  and 256 nodes the error was larger than the gain. On the path from the mean 64 nodes were
  exact to 1e-5.

  The integral is taken by Gauss-Legendre quadrature. The number of nodes that it needs depends
  on the model. On the shipped start of `chain` the sum was off by 1.5 nats at 32, 0.4 at 64
  and 0.1 at 128 (mean over 32 failed traces, gains near -5). Compare with twice the steps
  before you trust a number.

  It costs `steps` forward and backward passes over P + T + S tokens a trace, one after the other.

  Args:
    steps: nodes of the quadrature, >= 1.

  The other arguments, the result and the errors are those of `gradient_x_input`. ValueError also on steps below 1.
  """
  names.check_option("space", space, attribution.SPACES)
  layout = attribution.lay_out(rollout, segments, completions, exit_ids)
  token_credit = _token_integrated_gradients(params, config, layout, temperature, space, steps)
  return attribution.finish(attribution.sum_segments(token_credit, layout, segments.ends.shape[1]), layout)


def _gradient(
  params: decoder.Params,
  config: ModelConfig,
  x: chex.Array,
  layout: attribution.Layout,
  temperature: float,
  space: str,
) -> chex.Array:
  """[B, C, D] float32, dF/dx of each row: the gradient of the sum over rows, because rows are independent."""

  def total(x: chex.Array) -> chex.Array:
    return jnp.sum(
      attribution.in_space(attribution.log_likelihood(params, config, x, layout.mask, layout, temperature), space)
    )

  return jax.grad(total)(x).astype(jnp.float32)


def _token_integrated_gradients(
  params: decoder.Params,
  config: ModelConfig,
  layout: attribution.Layout,
  temperature: float,
  space: str,
  steps: int,
) -> chex.Array:
  """[B, C] float32, a_t of `integrated_gradients` for every column; 0 on the completion's."""
  if steps < 1:
    raise ValueError(f"steps={steps} must be at least 1: it counts the points of the path.")
  x = attribution.embeddings(params, layout)
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


def _blank(params: decoder.Params, layout: attribution.Layout, x: chex.Array) -> chex.Array:
  """`x` with the context's embeddings replaced by the mean one, the completion's kept."""
  mean = jnp.mean(params["embedding"].astype(jnp.float32), axis=0)
  context = jnp.arange(x.shape[1]) < x.shape[1] - layout.targets.shape[1]
  return jnp.where(context[None, :, None], mean[None, None], x)
