"""log p(c_n | s_k) and a bank -> v(s_k): state values without generating anything.

Importance sampling over a bank of completions with utilities zeta_n [S]
(RREDCoT, arXiv 2606.06475):

    v(s) = 1/N sum_n w_n zeta_n,    w_n = p(c_n | s) / q(c_n)

For utilities >= 0 this never overestimates in expectation, E[v_hat] <= v, with
equality only where the proposal covers every completion of non-zero utility [S].
Weights are handled as logarithms throughout: long completions underflow.
Written for one trace; vmap over a batch.
"""

import chex
import jax
import jax.numpy as jnp

from rredcot_jax.ops.masked import masked_logsumexp, masked_max
from rredcot_jax.ops.types import check_option

FORMS = ("plain", "truncated", "self_normalised", "length_normalised")

# exp of this is still finite in float32, and so is a sum of many such terms.
_MAX_LOG = 80.0


def estimate_values(
  log_p: chex.Array,
  utilities: chex.Array,
  log_q: chex.Array,
  valid: chex.Array,
  lengths: chex.Array,
  *,
  form: str = "plain",
  max_weight: float = 1.0,
) -> tuple[chex.Array, chex.Array]:
  """v(s_k) for every state, and the effective sample size behind it.

  Forms ([C] but the first):
    plain: 1/N sum w zeta. With log_q = 0 and N = 1 it is the likelihood of the
      one reference; with log_q = -log N (uniform over a bank of N distinct
      completions) it is the mass sum_n p(c_n | s) zeta_n; with rollouts and
      their sampling log-probabilities it is importance sampling proper.
    truncated: w capped at `max_weight`: lower variance, never larger than plain.
    self_normalised: sum w zeta / sum w. Consistent rather than conservative, and
      meaningful only if the bank also holds completions of zero utility.
    length_normalised: w^(1/length), the geometric mean per token. No longer a
      probability of success; keeps long completions comparable.

  Args:
    log_p: [K, N] float, log p(c_n | s_k), nats.
    utilities: [K or 1, N] float >= 0.
    log_q: [K or 1, N] float, finite where valid, nats.
    valid: [K or 1, N] bool; N in the formulas counts the valid ones of a state.
    lengths: [K or 1, N] int, scored tokens of each completion.
    form: one of `FORMS`.
    max_weight: the cap, > 0, of the truncated form.

  Returns:
    values [K] float32, 0 for a state without valid completions, and
    effective sample size [K] float32, (sum w)^2 / sum w^2 in [1, N] but for rounding, or
    0 then. A value is at most e^80. Neither carries a gradient.

  Raises:
    ValueError: on an unknown form or a cap that is not positive.
  """
  check_option("form", form, FORMS)
  if not max_weight > 0:
    raise ValueError(f"max_weight={max_weight} must be > 0: it caps the importance weights.")
  chex.assert_rank([log_p, utilities, log_q, valid, lengths], 2)
  chex.assert_equal_shape([utilities, log_q, valid, lengths])
  utilities, log_q, valid, lengths = (jnp.broadcast_to(x, log_p.shape) for x in (utilities, log_q, valid, lengths))
  utilities = jax.lax.stop_gradient(utilities)
  log_weights = jax.lax.stop_gradient(jnp.where(valid, log_p - log_q, 0.0)).astype(jnp.float32)
  if form == "length_normalised":
    log_weights = log_weights / jnp.maximum(lengths, 1)
  if form == "truncated":
    log_weights = jnp.minimum(log_weights, jnp.log(max_weight))
  # Ratios of weights are taken between small numbers: logarithms of -500 have lost the digits that they differ in.
  largest = masked_max(log_weights, valid, axis=-1)
  largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
  log_weights = log_weights - largest[:, None]

  useful = jnp.logical_and(valid, utilities > 0)
  log_utilities = jnp.log(jnp.where(useful, utilities, 1.0))
  log_sum = masked_logsumexp(log_weights + log_utilities, useful, axis=-1)
  log_total = masked_logsumexp(log_weights, valid, axis=-1)
  count = jnp.sum(valid, axis=-1)
  # Where no completion has any likelihood at all the weights say nothing: value 0, sample size 0.
  some = jnp.logical_and(count > 0, log_total != -jnp.inf)
  log_count = jnp.log(jnp.maximum(count, 1).astype(jnp.float32))
  log_norm = log_total if form == "self_normalised" else log_count - largest
  log_values = jnp.where(some, log_sum, -jnp.inf) - jnp.where(some, log_norm, 0.0)
  log_ess = 2 * log_total - masked_logsumexp(2 * log_weights, valid, axis=-1)
  ess = jnp.where(some, jnp.exp(jnp.where(some, log_ess, 0.0)), 0.0)
  return jnp.exp(jnp.minimum(log_values, _MAX_LOG)), ess
