"""log p(c_n | s_k) and a bank -> v(s_k): state values without generating anything.

Importance sampling over a bank of completions with utilities zeta_n [S]
(RREDCoT, arXiv 2606.06475):

    v(s) = 1/N sum_n w_n zeta_n,    w_n = p(c_n | s) / q(c_n)

For utilities >= 0 this never overestimates in expectation, E[v_hat] <= v, with
equality only where the proposal covers every completion of non-zero utility [S].
Weights are handled as logarithms throughout: long completions underflow.

How weights become a value is a *form*, a function of `Evidence`. The built-in
ones are in `FORMS`; a form of your own has the same signature:

    def form(evidence: Evidence) -> tuple[values [K], log_weights [K, N]]

Its values are v(s_k). Its log-weights say how much each completion counted: the
effective sample size is computed from them and nothing else is. It runs under jit and
vmap, and need not treat a state without completions, whose value is 0.

One more form, `calibrated`, learns from the returns of other prompts what a likelihood
is worth: `fit_calibration` and `cross_fit` [C].

Written for one trace; vmap over a batch. Marks as in docs/method.md: [S] readers'
summaries of the paper, [C] our choice.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rredcot_jax.ops import checks, names
from rredcot_jax.ops.masked import masked_logsumexp, masked_max, masked_mean

# exp of this is still finite in float32, and so is a sum of many such terms.
_MAX_LOG = 80.0
# Log-probabilities are computed in float32 or bfloat16: of certain completions they exceed 0 by rounding.
_ROUNDING = 1e-2
# What log p = -inf counts as in a calibration, so that a slope of 0 still gives a value.
_MIN_LOG_P = -1e4
# A standard deviation below this counts as this: what hardly varies in the data cannot get a steep slope.
_MIN_SPREAD = 1e-3


class Evidence(NamedTuple):
  """What a bank says of the states of one trace: the argument of every form."""

  log_ratio: chex.Array  # [K, N] float32, log w_n = log p(c_n | s_k) - log q(c_n) in nats, 0 where not valid.
  utilities: chex.Array  # [K, N] float32, zeta_n >= 0, 0 where not valid.
  valid: chex.Array  # [K, N] bool.
  lengths: chex.Array  # [K, N] int32, scored tokens of each completion.


Form = Callable[[Evidence], tuple[chex.Array, chex.Array]]


def log_weighted_mean(log_weights: chex.Array, evidence: Evidence, *, self_normalised: bool = False) -> chex.Array:
  """log (1/N sum_n w_n zeta_n), or log (sum_n w_n zeta_n / sum_n w_n), of the valid completions of each state.

  Args:
    log_weights: [K, N] float32, log w_n.
    evidence: utilities and places.
    self_normalised: divide by the sum of the weights and not by their number.

  Returns:
    [K] float32, -inf where no completion has a weight or none is useful.
  """
  valid = evidence.valid
  # Ratios of weights are taken between small numbers: logarithms of -500 have lost the digits that they differ in.
  log_weights, largest = _shifted(log_weights, valid)
  log_sum = masked_logsumexp(log_weights + jnp.log(evidence.utilities), valid, axis=-1)
  log_total = masked_logsumexp(log_weights, valid, axis=-1)
  count = jnp.sum(valid, axis=-1)
  # Where no completion has any likelihood at all the weights say nothing.
  some = jnp.logical_and(count > 0, log_total != -jnp.inf)
  log_count = jnp.log(jnp.maximum(count, 1).astype(jnp.float32))
  log_norm = log_total if self_normalised else log_count - largest
  return jnp.where(some, log_sum, -jnp.inf) - jnp.where(some, log_norm, 0.0)


def weighted_mean(log_weights: chex.Array, evidence: Evidence, *, self_normalised: bool = False) -> chex.Array:
  """[K] float32, exp of `log_weighted_mean`: 0 where it is -inf, at most e^80."""
  return jnp.exp(jnp.minimum(log_weighted_mean(log_weights, evidence, self_normalised=self_normalised), _MAX_LOG))


def effective_sample_size(log_weights: chex.Array, valid: chex.Array) -> chex.Array:
  """(sum w)^2 / sum w^2 of each state's valid completions: [K] float32 in [1, N] but for rounding, 0 over nothing."""
  log_weights, _ = _shifted(log_weights, valid)
  log_total = masked_logsumexp(log_weights, valid, axis=-1)
  log_squares = masked_logsumexp(2 * log_weights, valid, axis=-1)
  some = log_total != -jnp.inf
  # Both logarithms are -inf over nothing, and their difference would be NaN.
  log_size = 2 * jnp.where(some, log_total, 0.0) - jnp.where(some, log_squares, 0.0)
  return jnp.where(some, jnp.exp(log_size), 0.0)


def _shifted(log_weights: chex.Array, valid: chex.Array) -> tuple[chex.Array, chex.Array]:
  """Log-weights less the largest of their state, and that one [K]."""
  largest = masked_max(log_weights, valid, axis=-1)
  largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
  return log_weights - largest[:, None], largest


# ---- Forms -----------------------------------------------------------------------------------


def plain(evidence: Evidence) -> tuple[chex.Array, chex.Array]:
  """1/N sum w zeta [S]: see `estimate_values`."""
  return weighted_mean(evidence.log_ratio, evidence), evidence.log_ratio


def truncated(evidence: Evidence, *, max_weight: chex.Numeric = 1.0) -> tuple[chex.Array, chex.Array]:
  """1/N sum min(w, max_weight) zeta [C]: lower variance, never larger than plain."""
  checks.check_number("max_weight", max_weight, lambda x: x > 0, "be > 0: it caps the importance weights.")
  log_weights = jnp.minimum(evidence.log_ratio, jnp.log(max_weight))
  return weighted_mean(log_weights, evidence), log_weights


def self_normalised(evidence: Evidence) -> tuple[chex.Array, chex.Array]:
  """sum w zeta / sum w [C]: consistent rather than conservative; the bank must also hold failures."""
  return weighted_mean(evidence.log_ratio, evidence, self_normalised=True), evidence.log_ratio


def length_normalised(evidence: Evidence) -> tuple[chex.Array, chex.Array]:
  """1/N sum w^(1/length) zeta [C]: no longer a probability of success."""
  log_weights = evidence.log_ratio / jnp.maximum(evidence.lengths, 1)
  return weighted_mean(log_weights, evidence), log_weights


def power(evidence: Evidence, *, exponent: chex.Numeric = 0.5) -> tuple[chex.Array, chex.Array]:
  """1/N sum w^exponent zeta [C], one exponent for all states and completions.

  Exponents below 1 lift the values of long completions, which underflow, and keep the
  order that plain gives to the states of one completion. They are biased, in two directions:

  - One reference, log q = 0, has p^exponent >= p: above plain, and above v where this
    reference is the only way to succeed.
  - Completions drawn from q have E[w^exponent] <= E[w]^exponent = 1 by Jensen: where all
    utilities agree, the expectation is below v.

  Exponents above 1 do the opposite. The exponent 1 is plain.
  """
  checks.check_number("exponent", exponent, lambda x: x > 0, "be > 0: 1 is the plain form.")
  log_weights = evidence.log_ratio * exponent
  return weighted_mean(log_weights, evidence), log_weights


_FORMS: Mapping[str, Callable[..., tuple[chex.Array, chex.Array]]] = {
  "plain": plain,
  "truncated": truncated,
  "self_normalised": self_normalised,
  "length_normalised": length_normalised,
  "power": power,
}
FORMS = tuple(_FORMS)


def estimate_values(
  log_p: chex.Array,
  utilities: chex.Array,
  log_q: chex.Array,
  valid: chex.Array,
  lengths: chex.Array,
  *,
  form: str | Form = "plain",
  max_weight: chex.Numeric = 1.0,
  exponent: chex.Numeric = 0.5,
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
    power: w^exponent with one exponent for all. Biased, see `power`.

  Args:
    log_p: [K, N] floating, log p(c_n | s_k) <= 0, nats; -inf is an impossible completion.
    utilities: [K or 1, N] floating, finite and >= 0.
    log_q: [K or 1, N] floating, finite where valid, nats.
    valid: [K or 1, N] bool; N in the formulas counts the valid ones of a state.
    lengths: [K or 1, N] int >= 0, scored tokens of each completion.
    form: one of `FORMS`, "package.module:Name", or a `Form`; a form with options of its own is
      bound to them by `functools.partial`.
    max_weight: the cap, > 0, of form="truncated". May be traced.
    exponent: of form="power", > 0. May be traced.

  Where it is not valid a completion may hold anything. Where it is valid and its
  log p, log q or utility is outside the range above, concrete arrays raise; traced ones
  cannot, and there it counts as a failure of weight 0, so that the value stays finite and
  is too small.

  Returns:
    values [K] float32, 0 for a state without valid completions, and
    effective sample size [K] float32, (sum w)^2 / sum w^2 in [1, N] but for rounding, or
    0 then. A value of a built-in form is at most e^80. Neither carries a gradient.

  Raises:
    ValueError: on wrong shapes or types, no state or no completion, an unknown form, a cap or an
      exponent that is not positive, and, where arrays are concrete, on the first bad place.
  """
  evidence = _evidence(log_p, utilities, log_q, valid, lengths)
  make = names.resolve("form", form, _FORMS)
  options = {"truncated": {"max_weight": max_weight}, "power": {"exponent": exponent}}
  make = functools.partial(make, **options.get(form, {})) if isinstance(form, str) else make
  values, log_weights = make(evidence)
  checks.check_shape(f"values of form={form!r}", values, evidence.valid.shape[:1], "the states of log_p")
  checks.check_shape(f"log-weights of form={form!r}", log_weights, evidence.valid.shape, "log_p")
  values = jnp.where(jnp.any(evidence.valid, axis=-1), values, 0.0)
  return jax.lax.stop_gradient((values, effective_sample_size(log_weights, evidence.valid)))


def log_likelihoods(log_p: chex.Array, utilities: chex.Array, log_q: chex.Array, valid: chex.Array) -> chex.Array:
  """log of the plain form's values, which does not underflow: what `calibrate` reads.

  Args:
    log_p, utilities, log_q, valid: see `estimate_values`.

  Returns:
    [K] float32, nats, -inf where there is no valid completion. No gradient flows.
  """
  evidence = _evidence(log_p, utilities, log_q, valid, jnp.ones(jnp.shape(valid), jnp.int32))
  return jax.lax.stop_gradient(log_weighted_mean(evidence.log_ratio, evidence))


def check_numbers(log_p: chex.Array, utilities: chex.Array, log_q: chex.Array, valid: chex.Array) -> None:
  """Raises ValueError naming the first number outside its range that is concrete and valid, under any leading axes."""
  must = "be finite and >= 0; it is what a completion is worth."
  checks.check_values("utilities", utilities, lambda x: np.isfinite(x) & (x >= 0), must, where=valid)
  checks.check_values("log_q", log_q, np.isfinite, "be finite; it is a log-probability in nats.", where=valid)
  must = "be <= 0 and no NaN; it is a log-probability in nats."
  checks.check_values("log_p", log_p, lambda x: x <= _ROUNDING, must, where=valid)


def _evidence(
  log_p: chex.Array, utilities: chex.Array, log_q: chex.Array, valid: chex.Array, lengths: chex.Array
) -> Evidence:
  """The arguments of `estimate_values`, checked, broadcast to [K, N] and harmless where they are bad."""
  checks.check_array("log_p", log_p, "K N", float)
  if 0 in log_p.shape:
    raise ValueError(f"log_p has shape {log_p.shape}: there must be at least one state (K) and one completion (N).")
  for name, x, kind in (
    ("utilities", utilities, float), ("log_q", log_q, float), ("valid", valid, bool), ("lengths", lengths, int),
  ):  # fmt: skip
    checks.check_array(name, x, "K N", kind)
    states = 1 if utilities.shape[0] == 1 else log_p.shape[0]
    checks.check_shape(name, x, (states, log_p.shape[1]), "log_p or, with one row for all states, utilities")
  check_numbers(log_p, utilities, log_q, valid)

  log_p, utilities, log_q = (jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)) for x in (log_p, utilities, log_q))
  utilities, log_q, valid, lengths = (jnp.broadcast_to(x, log_p.shape) for x in (utilities, log_q, valid, lengths))
  log_ratio = jnp.where(valid, log_p, 0.0) - jnp.where(valid, log_q, 0.0)
  utilities = jnp.where(valid, utilities, 0.0)
  good = jnp.isfinite(utilities) & (utilities >= 0) & (log_ratio < jnp.inf)
  return Evidence(jnp.where(good, log_ratio, -jnp.inf), jnp.where(good, utilities, 0.0), valid, lengths)


# ---- Calibration -----------------------------------------------------------------------------


def calibrate(log_p: chex.Array, coefficients: chex.Array, features: chex.Array | None = None) -> chex.Array:
  """v(s) = sigmoid(a + b log p(s) + c . features(s)): what a likelihood is worth as a probability of success [C].

  Args:
    log_p: [...] floating, log p(s) in nats, such as `log_likelihoods`; -inf counts as -10000.
    coefficients: [2 + F] floating: a, b and c, of `fit_calibration`.
    features: [..., F] floating, finite: what else is known of a state, such as its place in the
      trace; None where F = 0.

  Returns:
    [...] float32 in [0, 1].

  Raises:
    ValueError: if the number of coefficients does not fit that of the features.
  """
  design = _design(log_p, features)
  checks.check_shape("coefficients", coefficients, (design.shape[-1] + 1,), "a, b and one for each feature")
  coefficients = jnp.asarray(coefficients, jnp.float32)
  return jax.nn.sigmoid(coefficients[0] + design @ coefficients[1:])


def calibrated(
  evidence: Evidence, *, coefficients: chex.Array, features: chex.Array | None = None
) -> tuple[chex.Array, chex.Array]:
  """`calibrate` of the logarithm of the plain value, as a form.

  Use `functools.partial(calibrated, coefficients=...)` as `form`; features are [K, F].
  """
  log_p = log_weighted_mean(evidence.log_ratio, evidence)
  return calibrate(log_p, coefficients, features), evidence.log_ratio


def fit_calibration(
  log_p: chex.Array,
  features: chex.Array | None,
  returns: chex.Array,
  mask: chex.Array,
  *,
  ridge: chex.Numeric = 1.0,
  bound: chex.Numeric = 10.0,
  num_steps: int = 8,
) -> chex.Array:
  """The coefficients of `calibrate`, by logistic regression over pairs (state, return of its trace) [C].

      minimise  sum_i [log(1 + e^{eta_i}) - R_i eta_i] + ridge / 2 |theta - theta_0|^2

  eta_i = theta . (1, z_i) with z_i the log-likelihood and the features of state i, standardised over
  the data, and theta_0 = (logit of the mean return, 0, ..., 0), the mean taken with half a success and
  half a failure more. So without data the value is 0.5, and where all returns are equal it is close to
  that return and defined. Newton's steps (iteratively reweighted least squares) start from theta_0; each
  takes the best of the lengths 1, 1/2, 1/4, 1/8 and 0, so that none makes the objective worse.

  The model is trained on returns of the traces that it values: use `cross_fit` for these.

  Args:
    log_p: [B, K] floating, log p(s_k) of each trace, nats; states where it is not finite are left out.
    features: [B, K, F] floating, finite where `mask`; None where F = 0.
    returns: [B] floating in [0, 1]; traces whose return is NaN are left out, and where `returns` is
      traced, others are clipped to [0, 1].
    mask: [B, K] bool, the states that count.
    ridge: > 0, the weight of the prior on standardised coefficients, in pairs. May be traced.
    bound: > 0, the largest size of a standardised slope and of the standardised intercept. May be traced.
    num_steps: of Newton's method, static.

  Returns:
    [2 + F] float32, finite: a, b and c, in the units of `log_p` and `features`. No gradient flows.

  Raises:
    ValueError: on wrong shapes, types and ranges; on returns outside [0, 1] where they are concrete.
  """
  _check_calibration(log_p, features, returns, mask, ridge, bound)
  design = _design(log_p, features)
  return jax.lax.stop_gradient(_fit(design, returns, _usable(log_p, returns, mask), ridge, bound, num_steps))


def cross_fit(
  log_p: chex.Array,
  features: chex.Array | None,
  returns: chex.Array,
  mask: chex.Array,
  *,
  group_size: int,
  ridge: chex.Numeric = 1.0,
  bound: chex.Numeric = 10.0,
  num_steps: int = 8,
) -> chex.Array:
  """Calibrated values of a batch: each group's by a fit on the other groups [C].

  No return of a trace's own group enters its values, neither by the fit nor by the
  standardisation, so that values remain a function of the state that is independent of the
  trace's own outcome. One group alone has no others: its values are 0.5.

  Args:
    log_p, features, returns, mask, ridge, bound, num_steps: see `fit_calibration`.
    group_size: traces of a prompt stand together, B is a multiple of it.

  Returns:
    [B, K] float32 in [0, 1], anything where not `mask`. No gradient flows.

  Raises:
    ValueError: as `fit_calibration`, and if `group_size` does not divide B.
  """
  _check_calibration(log_p, features, returns, mask, ridge, bound)
  rows = log_p.shape[0]
  if group_size < 1 or rows % group_size:
    raise ValueError(f"group_size={group_size} does not divide the {rows} traces into groups.")
  design, usable = _design(log_p, features), _usable(log_p, returns, mask)
  group_of = jnp.arange(rows) // group_size

  def values_of(group: chex.Array) -> chex.Array:
    others = jnp.logical_and(usable, (group_of != group)[:, None])
    coefficients = _fit(design, returns, others, ridge, bound, num_steps)
    own = jax.lax.dynamic_slice_in_dim(design, group * group_size, group_size)
    return jax.nn.sigmoid(coefficients[0] + own @ coefficients[1:])

  values = jax.lax.map(values_of, jnp.arange(rows // group_size))
  return jax.lax.stop_gradient(values.reshape(log_p.shape))


def _check_calibration(
  log_p: chex.Array,
  features: chex.Array | None,
  returns: chex.Array,
  mask: chex.Array,
  ridge: chex.Numeric,
  bound: chex.Numeric,
) -> None:
  checks.check_array("log_p", log_p, "B K", float)
  checks.check_array("returns", returns, "B", float)
  checks.check_array("mask", mask, "B K", bool)
  checks.check_shape("returns", returns, log_p.shape[:1], "the traces of log_p")
  checks.check_shape("mask", mask, log_p.shape, "log_p")
  if features is not None:
    checks.check_array("features", features, "B K F", float)
  checks.check_number("ridge", ridge, lambda x: x > 0, "be > 0: without it equal returns have no fit.")
  checks.check_number("bound", bound, lambda x: x > 0, "be > 0.")
  in_range = lambda x: np.isnan(x) | ((x >= 0) & (x <= 1))
  checks.check_values("returns", returns, in_range, "lie in [0, 1], as a probability does; rescale the returns.")


def _usable(log_p: chex.Array, returns: chex.Array, mask: chex.Array) -> chex.Array:
  return mask & jnp.isfinite(log_p) & jnp.logical_not(jnp.isnan(returns))[:, None]


def _design(log_p: chex.Array, features: chex.Array | None) -> chex.Array:
  """[..., 1 + F] float32: what the slopes multiply."""
  log_p = jnp.maximum(jnp.asarray(log_p, jnp.float32), _MIN_LOG_P)[..., None]
  if features is None:
    return log_p
  checks.check_shape("features", features, (*log_p.shape[:-1], None), "log_p [..., F]")
  return jnp.concatenate([log_p, jnp.asarray(features, jnp.float32)], axis=-1)


def _fit(
  design: chex.Array,
  returns: chex.Array,
  usable: chex.Array,
  ridge: chex.Numeric,
  bound: chex.Numeric,
  num_steps: int,
) -> chex.Array:
  """`fit_calibration` of a [B, K, 1 + F] design; what is not `usable` [B, K] is not read."""
  weights = usable.reshape(-1).astype(jnp.float32)
  target = jnp.where(usable, jnp.clip(returns.astype(jnp.float32), 0.0, 1.0)[:, None], 0.0).reshape(-1)
  design = jnp.where(usable[..., None], design, 0.0).reshape(weights.shape[0], -1)
  counted = weights[:, None] > 0
  mean = masked_mean(design, counted, axis=0)
  spread = jnp.maximum(jnp.sqrt(masked_mean((design - mean[None]) ** 2, counted, axis=0)), _MIN_SPREAD)
  x = jnp.concatenate([weights[:, None], jnp.where(counted, (design - mean[None]) / spread[None], 0.0)], axis=1)

  success = (jnp.sum(target) + 0.5) / (jnp.sum(weights) + 1.0)
  start = jnp.zeros(x.shape[1]).at[0].set(jnp.log(success) - jnp.log1p(-success))

  def objective(theta: chex.Array) -> chex.Array:
    eta = x @ theta
    losses = jnp.where(weights > 0, jax.nn.softplus(eta) - target * eta, 0.0)
    return jnp.sum(losses) + 0.5 * ridge * jnp.sum((theta - start) ** 2)

  def step(theta: chex.Array, _: None) -> tuple[chex.Array, None]:
    probability = jax.nn.sigmoid(x @ theta)
    gradient = x.T @ (weights * (probability - target)) + ridge * (theta - start)
    curvature = (x.T * (probability * (1 - probability))[None]) @ x + ridge * jnp.eye(x.shape[1])
    newton = jnp.linalg.solve(curvature, gradient)
    tried = theta[None] - jnp.array([1.0, 0.5, 0.25, 0.125, 0.0])[:, None] * newton[None]
    return tried[jnp.argmin(jax.vmap(objective)(tried))], None

  theta, _ = jax.lax.scan(step, start, None, length=num_steps)
  theta = jnp.clip(theta, -bound, bound)
  slopes = theta[1:] / spread
  return jnp.append(theta[0] - jnp.sum(slopes * mean), slopes)
