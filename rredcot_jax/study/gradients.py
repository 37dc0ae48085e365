"""Policy gradients of many credit assignments on the same rollouts, kept as inner products.

    g_a = 1/G sum_i sum_t A^a_{i,t} grad log pi(o_{i,t} | x_i, o_{i,<t})      one group of G traces, estimator a

All estimators share one forward pass, because the gradient is linear in the advantages. No gradient
is kept. `agreement.gradient_figures` needs only sums over groups and products within a group, so a
million parameters and a thousand groups fit into memory.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from rredcot_jax.model import decoder, scoring
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.ops import types
from rredcot_jax.ops.names import check_option

PARTS = ("all", "head")


def num_parameters(params: decoder.Params, part: str) -> int:
  """D, the length of a gradient over `part` of the parameters."""
  return sum(x.size for x in jax.tree.leaves(_variable(params, part)))


def add_groups(
  params: decoder.Params,
  config: ModelConfig,
  rollout: types.Rollout,
  advantages: chex.Array,
  total: chex.Array,
  *,
  temperature: float,
  part: str,
) -> tuple[chex.Array, chex.Array]:
  """Adds n groups' gradients to `total` and returns the products within groups.

  Args:
    params, config: the policy that sampled.
    rollout: fields [n, G, ...].
    advantages: [n, A, G, T] float32.
    total: [A, D] float32, the sum over earlier groups.
    temperature: the sampling temperature.
    part: one of `PARTS`: "all" parameters, or the output "head" alone (its use of the
      embedding table where the two are tied). The head needs no backward pass through the
      layers. It is for models whose whole gradients cost too much to take by the hundred.

  Returns:
    [A, D] the new total, and [A, A] S = sum over the n groups of g^a . g^b.
  """
  check_option("gradient_part", part, PARTS)

  def one_group(carry: tuple[chex.Array, chex.Array], group: tuple[Any, chex.Array]) -> tuple:
    total, products = carry
    traces, weights = group
    _, pull = jax.vjp(_log_probs_of(params, config, traces, temperature, part), _variable(params, part))
    size = weights.shape[1]
    # One after the other, because under vmap XLA (jax 0.10.2, CPU) gives wrong gradients from 8 estimators on.
    gradients = jax.lax.map(lambda one: pull(jnp.where(traces.mask, one, 0) / size)[0], weights)
    flat = jnp.concatenate([x.reshape(x.shape[0], -1) for x in jax.tree.leaves(gradients)], axis=1)
    flat = flat.astype(jnp.float32)
    return (total + flat, products + flat @ flat.T), None

  start = (total, jnp.zeros((advantages.shape[1],) * 2, jnp.float32))
  (total, products), _ = jax.lax.scan(one_group, start, (rollout, advantages))
  return total, products


def _head_name(params: decoder.Params) -> str:
  return "head" if "head" in params else "embedding"


def _variable(params: decoder.Params, part: str) -> Any:
  return params if part == "all" else params[_head_name(params)]


def _log_probs_of(params: decoder.Params, config: ModelConfig, traces: types.Rollout, temperature: float, part: str):
  """Variable -> [G, T] log-probabilities of the traces' tokens."""
  if part == "all":
    return lambda variable: scoring.trace_log_probs(variable, config, traces, temperature=temperature)[0]
  tokens = jnp.concatenate([traces.prompt_tokens, traces.tokens], axis=1)
  hidden, _ = decoder.forward(params, config, tokens, jnp.concatenate([traces.prompt_mask, traces.mask], axis=1))
  hidden = jax.lax.stop_gradient(hidden[:, traces.prompt_tokens.shape[1] - 1 : -1])

  def log_probs(variable: chex.Array) -> chex.Array:
    logits = decoder.logits({**params, _head_name(params): variable}, hidden) / temperature
    chosen = jnp.take_along_axis(logits, traces.tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)

  return log_probs
