"""Forms as functions, what bad numbers do, and the calibration of likelihoods. Exactness is in exact_test.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rredcot_jax.ops import values

SHAPE = (3, 2)


def arguments(**changes):
  """log_p, utilities, log_q, valid and lengths of three states and two completions."""
  log_p = jnp.log(jnp.array([[0.5, 0.25], [0.125, 1.0], [0.5, 0.5]]))
  ones = jnp.ones(SHAPE)
  found = dict(log_p=log_p, utilities=ones, log_q=0 * ones, valid=ones > 0, lengths=jnp.full(SHAPE, 3)) | changes
  return list(found.values())


# ---- Forms as functions ----------------------------------------------------------------------


def best_of(evidence):
  """A form of the user's own: the likeliest useful completion."""
  useful = evidence.valid & (evidence.utilities > 0)
  log_weights = jnp.where(useful, evidence.log_ratio, -jnp.inf)
  return jnp.exp(jnp.max(log_weights, axis=-1)), log_weights


def test_the_names_are_those_of_the_functions():
  assert values.FORMS == ("plain", "truncated", "self_normalised", "length_normalised", "power")


@pytest.mark.parametrize("form", ["values_test:best_of", best_of])
def test_a_form_of_ones_own_is_a_name_or_a_function(form):
  found, size = jax.jit(values.estimate_values, static_argnames="form")(*arguments(), form=form)
  np.testing.assert_allclose(found, [0.5, 1.0, 0.5], rtol=1e-6)
  np.testing.assert_allclose(size, [0.75**2 / (0.25 + 0.0625), 1.125**2 / (1 + 1 / 64), 2], rtol=1e-5)
  # It need not treat a state without completions.
  none = jnp.zeros(SHAPE, bool)
  np.testing.assert_array_equal(values.estimate_values(*arguments(valid=none), form=form), np.zeros((2, 3)))


@pytest.mark.parametrize("form", values.FORMS)
def test_a_built_in_form_by_name_is_its_function(form):
  by_name = values.estimate_values(*arguments(), form=form)
  by_function = values.estimate_values(*arguments(), form=getattr(values, form))
  jax.tree.map(np.testing.assert_array_equal, by_name, by_function)


def test_options_reach_their_form_and_no_other():
  plain = values.estimate_values(*arguments(), max_weight=0.3, exponent=3.0)[0]
  np.testing.assert_allclose(plain, [0.375, 0.5625, 0.5], rtol=1e-6)
  capped = values.estimate_values(*arguments(), form="truncated", max_weight=0.3)[0]
  np.testing.assert_allclose(capped, [(0.3 + 0.25) / 2, (0.125 + 0.3) / 2, 0.3], rtol=1e-6)
  cubed = values.estimate_values(*arguments(), form="power", exponent=3.0)[0]
  np.testing.assert_allclose(cubed, [(1 / 8 + 1 / 64) / 2, (1 / 512 + 1) / 2, 1 / 8], rtol=1e-6)


@pytest.mark.parametrize("form, name", [("truncated", "max_weight"), ("power", "exponent")])
def test_options_can_change_inside_a_compiled_program(form, name):
  traced = jax.jit(lambda x: values.estimate_values(*arguments(), form=form, **{name: x})[0])
  for x in (0.3, 2.0):
    np.testing.assert_allclose(traced(x), values.estimate_values(*arguments(), form=form, **{name: x})[0], rtol=1e-6)


def test_a_form_of_the_wrong_shape_is_refused():
  with pytest.raises(ValueError, match=r"values of form=.* has shape \(\) and must have \(3,\)"):
    values.estimate_values(*arguments(), form=lambda evidence: (jnp.float32(1.0), evidence.log_ratio))
  with pytest.raises(ValueError, match=r"log-weights of form=.* has shape \(3,\) and must have \(3, 2\)"):
    values.estimate_values(*arguments(), form=lambda evidence: (evidence.log_ratio[:, 0], evidence.log_ratio[:, 0]))
  with pytest.raises(ValueError, match="has no 'worst_of'"):
    values.estimate_values(*arguments(), form="values_test:worst_of")


def test_the_logarithm_of_the_plain_value_does_not_underflow():
  log_p = jnp.array([[-200.0, -201.0], [-jnp.inf, -jnp.inf], [-1.0, -1.0]])
  log_q, utilities = jnp.full(SHAPE, -jnp.log(2.0)), jnp.array([[1.0, 0.5]] * 3)
  valid = jnp.array([[True, True], [True, True], [False, False]])
  found = values.log_likelihoods(log_p, utilities, log_q, valid)
  np.testing.assert_allclose(found, [-200 + np.log(1 + 0.5 * np.exp(-1)), -np.inf, -np.inf], rtol=1e-6)


# ---- Numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", values.FORMS)
def test_nothing_is_nan_on_the_way_where_a_state_has_no_completion(form):
  valid = jnp.array([[True, False], [False, False], [True, True]])
  with jax.debug_nans(True):
    found, size = values.estimate_values(*arguments(valid=valid), form=form)
    jitted = jax.jit(functools.partial(values.estimate_values, form=form))(*arguments(valid=valid))
    impossible = values.estimate_values(*arguments(log_p=jnp.full(SHAPE, -jnp.inf)), form=form)
  assert float(found[1]) == float(size[1]) == 0.0
  assert float(found[0]) > 0 and float(size[0]) == 1.0
  np.testing.assert_allclose(jitted[0], found, rtol=1e-6)
  np.testing.assert_array_equal(impossible, np.zeros((2, 3)))


def test_half_precision_is_computed_in_float32():
  log_p, log_q = jnp.full((1, 512), -2.0, jnp.bfloat16), jnp.full((1, 512), -301.0, jnp.bfloat16)
  ones = jnp.ones((1, 512), jnp.bfloat16)
  log_p = log_p - 300  # -302 is exact in bfloat16, and -302 + 300 in float32.
  found, size = values.estimate_values(log_p, ones, log_q * 0 - 300, ones > 0, jnp.ones((1, 512), int))
  assert found.dtype == size.dtype == jnp.float32
  np.testing.assert_allclose(found, np.exp(float(log_p[0, 0]) + 300.0), rtol=1e-6)
  np.testing.assert_allclose(size, 512, rtol=1e-5)


BAD = [
  ("utilities", -1.0, r"utilities\[1, 0\] = -1.0 must be finite and >= 0"),
  ("utilities", np.nan, r"utilities\[1, 0\] = nan must"),
  ("utilities", np.inf, r"utilities\[1, 0\] = inf must"),
  ("log_q", np.nan, r"log_q\[1, 0\] = nan must be finite"),
  ("log_q", -np.inf, r"log_q\[1, 0\] = -inf must be finite"),
  ("log_q", np.inf, r"log_q\[1, 0\] = inf must be finite"),
  ("log_p", np.nan, r"log_p\[1, 0\] = nan must be <= 0"),
  ("log_p", 0.5, r"log_p\[1, 0\] = 0.5 must be <= 0"),
]


def spoilt(name, value):
  names = ("log_p", "utilities", "log_q", "valid", "lengths")
  whole = dict(zip(names, arguments()))
  return arguments(**{name: whole[name].at[1, 0].set(value)})


@pytest.mark.parametrize("name, value, message", BAD)
def test_the_first_bad_number_is_named_where_it_can_be_read(name, value, message):
  with pytest.raises(ValueError, match=message):
    values.estimate_values(*spoilt(name, value))
  # It may hold anything where the place is empty.
  empty = spoilt(name, value)
  empty[3] = empty[3].at[1, 0].set(False)
  np.testing.assert_allclose(values.estimate_values(*empty)[0], [0.375, 1.0, 0.5], rtol=1e-6)


@pytest.mark.parametrize("name, value, message", BAD[:7])
@pytest.mark.parametrize("form", values.FORMS)
def test_under_tracing_a_bad_number_counts_as_a_failure(form, name, value, message):
  del message
  found, size = jax.jit(functools.partial(values.estimate_values, form=form))(*spoilt(name, value))
  failure = arguments(log_p=arguments()[0].at[1, 0].set(-jnp.inf), utilities=arguments()[1].at[1, 0].set(0.0))
  expected, expected_size = values.estimate_values(*failure, form=form)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  np.testing.assert_allclose(size, expected_size, rtol=1e-6)


def test_one_row_of_a_bank_stands_for_all_states():
  one = [x[:1] for x in arguments()[1:]]
  jax.tree.map(
    np.testing.assert_array_equal,
    values.estimate_values(arguments()[0], *one),
    values.estimate_values(*arguments()),
  )
  bad = [one[0].at[0, 1].set(-2.0), *one[1:]]
  with pytest.raises(ValueError, match=r"utilities\[0, 1\] = -2.0"):
    values.estimate_values(arguments()[0], *bad)


# ---- Calibration -----------------------------------------------------------------------------


def pairs(seed=0, rows=12, states=5, features=2):
  rng = np.random.default_rng(seed)
  log_p = rng.normal(-4, 2, (rows, states)).astype(np.float32)
  extra = rng.normal(size=(rows, states, features)).astype(np.float32)
  returns = (rng.random(rows) < 0.6).astype(np.float32)
  mask = np.arange(states) < rng.integers(2, states + 1, rows)[:, None]
  return log_p, extra, returns, mask


def newton(log_p, extra, returns, mask, ridge):
  """The same fit in float64, pair by pair, until it stands still."""
  kept = np.argwhere(mask & np.isfinite(log_p) & ~np.isnan(returns)[:, None])
  x = np.array([[log_p[i, k], *extra[i, k]] for i, k in kept], np.float64)
  y = np.array([returns[i] for i, _ in kept], np.float64)
  mean, spread = x.mean(0), x.std(0)
  z = np.concatenate([np.ones((len(y), 1)), (x - mean) / spread], 1)
  share = (y.sum() + 0.5) / (len(y) + 1)
  start = np.zeros(z.shape[1])
  start[0] = np.log(share / (1 - share))
  theta = start.copy()
  for _ in range(50):
    p = 1 / (1 + np.exp(-z @ theta))
    gradient = z.T @ (p - y) + ridge * (theta - start)
    theta -= np.linalg.solve((z.T * (p * (1 - p))) @ z + ridge * np.eye(len(theta)), gradient)
  slopes = theta[1:] / spread
  return np.array([theta[0] - slopes @ mean, *slopes])


@pytest.mark.parametrize("ridge", [0.1, 1.0, 10.0])
def test_the_fit_is_that_of_a_logistic_regression(ridge):
  log_p, extra, returns, mask = pairs()
  found = jax.jit(values.fit_calibration)(log_p, extra, returns, mask, ridge=ridge)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, newton(log_p, extra, returns, mask, ridge), rtol=1e-3, atol=1e-4)
  eager = values.fit_calibration(log_p, extra, returns, mask, ridge=ridge)
  np.testing.assert_allclose(found, eager, rtol=1e-4, atol=1e-5)


def test_a_steep_start_does_not_throw_the_fit_off():
  """One success in 200 that its likelihood tells apart: whole Newton steps from the prior overshoot."""
  log_p = np.full((200, 1), -20.0, np.float32)
  log_p[0] = 0.0
  returns = np.zeros(200, np.float32)
  returns[0] = 1.0
  found = values.fit_calibration(log_p, None, returns, np.ones((200, 1), bool), ridge=0.01, num_steps=30)
  np.testing.assert_allclose(found, [7.394506, 0.799425], rtol=1e-4)  # By scipy.optimize.minimize in float64.
  fitted = np.asarray(values.calibrate(log_p[:, 0], found))
  assert fitted[0] > 0.5 and fitted[1] < 0.01


def test_what_is_left_out_of_a_fit_is_not_read():
  log_p, extra, returns, mask = pairs()
  clean = values.fit_calibration(log_p, extra, returns, mask)
  dirty = np.where(mask, log_p, np.nan), np.where(mask[..., None], extra, np.inf)
  np.testing.assert_array_equal(values.fit_calibration(*dirty, returns, mask), clean)
  # A NaN return drops its trace, an impossible or unknown likelihood its state.
  returns[3], log_p[5, 0], log_p[6, 1] = np.nan, -np.inf, np.nan
  rest = mask.copy()
  rest[3] = rest[5, 0] = rest[6, 1] = False
  dropped = values.fit_calibration(log_p, extra, np.nan_to_num(returns), rest)
  np.testing.assert_array_equal(values.fit_calibration(log_p, extra, returns, mask), dropped)
  assert np.isfinite(dropped).all() and np.abs(dropped - clean).max() > 1e-3


@pytest.mark.parametrize("return_", [0.0, 1.0])
def test_equal_returns_have_a_fit_near_that_return(return_):
  log_p, extra, returns, mask = pairs()
  found = values.fit_calibration(log_p, extra, np.full_like(returns, return_), mask)
  assert np.isfinite(found).all()
  fitted = np.asarray(values.calibrate(log_p, found, extra))[mask]
  np.testing.assert_allclose(fitted, return_, atol=0.05)


def test_without_data_every_value_is_a_half():
  log_p, extra, returns, mask = pairs()
  found = values.fit_calibration(log_p, extra, returns, np.zeros_like(mask))
  np.testing.assert_array_equal(found, np.zeros(4))
  np.testing.assert_array_equal(values.cross_fit(log_p, None, returns, mask, group_size=12), np.full(log_p.shape, 0.5))


def test_coefficients_are_bounded_where_the_data_are_separable():
  log_p = np.where(np.arange(40) < 20, -8.0, -1.0).astype(np.float32)[:, None]
  returns = (np.arange(40) >= 20).astype(np.float32)
  ones = np.ones((40, 1), bool)
  found = values.fit_calibration(log_p, None, returns, ones, ridge=1e-6, bound=2.0, num_steps=30)
  np.testing.assert_allclose(found[1] * log_p.std(), 2.0, rtol=1e-5)
  # A likelihood that does not vary has no slope.
  flat = values.fit_calibration(np.full_like(log_p, -3.0), None, returns, ones)
  np.testing.assert_allclose(flat, [0.0, 0.0], atol=1e-6)


def test_calibrate_by_hand():
  found = values.calibrate(
    jnp.array([0.0, -2.0, -jnp.inf]), jnp.array([1.0, 0.5, 2.0]), jnp.array([[0.0], [1.0], [3.0]])
  )
  np.testing.assert_allclose(found, [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(-2)), 0.0], rtol=1e-6)
  # A slope of 0 does not care how impossible a completion is.
  assert float(values.calibrate(jnp.float32(-jnp.inf), jnp.array([0.0, 0.0]))) == 0.5
  with pytest.raises(ValueError, match=r"coefficients has shape \(2,\) and must have \(3,\)"):
    values.calibrate(jnp.zeros(3), jnp.zeros(2), jnp.zeros((3, 1)))


def test_a_calibrated_form_reads_the_logarithm_of_the_plain_value():
  coefficients = jnp.array([2.0, 0.5])
  form = functools.partial(values.calibrated, coefficients=coefficients)
  found, size = values.estimate_values(*arguments(), form=form)
  np.testing.assert_allclose(found, 1 / (1 + np.exp(-2 - 0.5 * np.log([0.375, 0.5625, 0.5]))), rtol=1e-5)
  np.testing.assert_array_equal(size, values.estimate_values(*arguments())[1])
  # A state without completions has the value 0 and not sigmoid(a).
  half = functools.partial(values.calibrated, coefficients=jnp.zeros(2))
  none = values.estimate_values(*arguments(valid=jnp.zeros(SHAPE, bool)), form=half)
  np.testing.assert_array_equal(none, np.zeros((2, 3)))
  np.testing.assert_array_equal(values.estimate_values(*arguments(), form=half)[0], np.full(3, 0.5))


def test_no_trace_values_itself_by_its_own_groups_returns():
  log_p, extra, returns, mask = pairs()
  fit = jax.jit(functools.partial(values.cross_fit, group_size=3))
  before = fit(log_p, extra, returns, mask)
  for changed in (1 - returns[3:6], np.roll(returns[3:6], 1), np.full(3, np.nan, np.float32)):
    other = returns.copy()
    other[3:6] = changed
    after = fit(log_p, extra, other, mask)
    np.testing.assert_array_equal(after[3:6], before[3:6])
    if not np.array_equal(changed, returns[3:6]):
      assert np.abs(after[:3] - before[:3]).max() > 1e-4
  # Nor does the spread of its own group's likelihoods enter: its values are those of a fit without it.
  rest = mask.copy()
  rest[3:6] = False
  alone = values.calibrate(log_p[3:6], values.fit_calibration(log_p, extra, returns, rest), extra[3:6])
  np.testing.assert_allclose(before[3:6], alone, rtol=1e-5)


def test_calibrations_carry_no_gradient_and_refuse_bad_arguments():
  log_p, extra, returns, mask = map(jnp.asarray, pairs())
  total = lambda *x: jnp.sum(values.cross_fit(x[0], x[1], x[2], mask, group_size=3))
  for gradient in jax.grad(total, argnums=(0, 1, 2))(log_p, extra, returns):
    np.testing.assert_array_equal(gradient, 0)
  with pytest.raises(ValueError, match=r"returns\[2\] = 1.5 must lie in \[0, 1\]"):
    values.fit_calibration(log_p, extra, returns.at[2].set(1.5), mask)
  with pytest.raises(ValueError, match="ridge=0 must be > 0"):
    values.fit_calibration(log_p, extra, returns, mask, ridge=0)
  with pytest.raises(ValueError, match="bound=-1 must be > 0"):
    values.fit_calibration(log_p, extra, returns, mask, bound=-1)
  with pytest.raises(ValueError, match="group_size=5 does not divide the 12 traces"):
    values.cross_fit(log_p, extra, returns, mask, group_size=5)
  with pytest.raises(ValueError, match=r"features has shape \(11, 5, 2\)"):
    values.fit_calibration(log_p, extra[:11], returns, mask)
