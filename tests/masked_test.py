"""Identities of the masked reductions: f(x, mask) == f(x[mask]), and nothing masked gets through."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rredcot_jax.ops import masked

REDUCTIONS: dict[str, Any] = {
  "sum": (masked.masked_sum, np.sum, 0.0),
  "mean": (masked.masked_mean, np.mean, 0.0),
  "max": (masked.masked_max, np.max, -np.inf),
  "logsumexp": (masked.masked_logsumexp, lambda x: np.log(np.sum(np.exp(x))), -np.inf),
}
everyone = pytest.mark.parametrize("name", REDUCTIONS)
rows = st.lists(st.tuples(st.floats(-8, 8, width=32), st.booleans()), min_size=5, max_size=5)


@everyone
@given(rows)
def test_equals_the_reduction_of_the_kept(name, row):
  reduce, numpy_reduce, empty = REDUCTIONS[name]
  x, mask = (np.array(column) for column in zip(*row))
  expected = numpy_reduce(x[mask]) if mask.any() else empty
  got = reduce(jnp.array(x, jnp.float32), jnp.array(mask))
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@everyone
def test_rows_are_independent_of_each_others_masks(name):
  reduce, numpy_reduce, empty = REDUCTIONS[name]
  x = jnp.array([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
  mask = jnp.array([[True, True, False], [False, True, True], [False, False, False]])
  expected = [numpy_reduce([1.0, 2.0]), numpy_reduce([2.0, 4.0]), empty]
  np.testing.assert_allclose(reduce(x, mask, axis=1), expected, rtol=1e-6)
  np.testing.assert_allclose(reduce(x, mask, axis=-1), expected, rtol=1e-6)
  np.testing.assert_allclose(reduce(x.T, mask.T, axis=0), expected, rtol=1e-6)
  np.testing.assert_allclose(reduce(x, mask, axis=(0, 1)), numpy_reduce([1.0, 2.0, 2.0, 4.0]), rtol=1e-6)


@everyone
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_masked_garbage_reaches_neither_value_nor_gradient(name, garbage):
  reduce = REDUCTIONS[name][0]
  clean, mask = jnp.array([1.0, 3.0, 0.0]), jnp.array([True, True, False])
  value, gradient = jax.value_and_grad(lambda x: reduce(x, mask))(clean.at[2].set(garbage))
  expected, expected_gradient = jax.value_and_grad(lambda x: reduce(x, jnp.ones(2, bool)))(clean[:2])
  np.testing.assert_allclose(value, expected)
  np.testing.assert_allclose(gradient, np.append(expected_gradient, 0.0))
  assert np.any(gradient != 0)


@everyone
def test_gradient_over_nothing_is_zero(name):
  gradient = jax.grad(lambda x: REDUCTIONS[name][0](x, jnp.zeros(3, bool)))(jnp.array([1.0, jnp.nan, -jnp.inf]))
  np.testing.assert_array_equal(gradient, np.zeros(3))


def test_a_size_one_axis_of_the_mask_broadcasts():
  x = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
  mask = jnp.array([[True], [False]])
  np.testing.assert_allclose(masked.masked_mean(x, mask), 2.0)
  np.testing.assert_allclose(masked.masked_mean(x, mask, axis=0), [1.0, 2.0, 3.0])


def test_logsumexp_counts_log_zero_as_nothing():
  x = jnp.array([-jnp.inf, 1.0, -jnp.inf])
  value, gradient = jax.value_and_grad(lambda x: masked.masked_logsumexp(x, jnp.ones(3, bool)))(x)
  np.testing.assert_allclose(value, 1.0)
  np.testing.assert_allclose(gradient, [0.0, 1.0, 0.0])
  none = jnp.full(3, -jnp.inf)
  value, gradient = jax.value_and_grad(lambda x: masked.masked_logsumexp(x, jnp.ones(3, bool)))(none)
  assert value == -jnp.inf
  np.testing.assert_array_equal(gradient, np.zeros(3))


def test_an_unmasked_nan_is_not_hidden():
  x = jnp.array([1.0, jnp.nan])
  for reduce, _, _ in REDUCTIONS.values():
    assert np.isnan(reduce(x, jnp.ones(2, bool)))


def test_logsumexp_survives_large_inputs():
  x, mask = jnp.array([-1000.0, -1001.0, jnp.inf, jnp.nan]), jnp.array([True, True, False, False])
  np.testing.assert_allclose(masked.masked_logsumexp(x, mask), -1000 + np.log1p(np.exp(-1)), rtol=1e-6)


def test_jit_and_vmap_equal_eager():
  x = jnp.array([[1.0, 2.0, 4.0], [3.0, 2.0, 9.0]])
  mask = jnp.array([[True, False, True], [True, True, False]])
  for reduce, _, _ in REDUCTIONS.values():
    eager = reduce(x, mask, axis=1)
    np.testing.assert_allclose(jax.jit(lambda x, m, f=reduce: f(x, m, axis=1))(x, mask), eager, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(reduce)(x, mask), eager, rtol=1e-6)
