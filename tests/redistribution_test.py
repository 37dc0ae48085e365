"""Return equivalence, the index convention, and goldens by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rredcot_jax.ops import redistribution

K = 5
REDISTRIBUTE = jax.jit(redistribution.redistribute, static_argnames="initial_value")


def redistribute(values, return_, num_segments, **kwargs):
  return REDISTRIBUTE(jnp.array(values, jnp.float32), jnp.float32(return_), jnp.int32(num_segments), **kwargs)


def test_golden_baseline():
  # v = .2 .5 .4 | R = 1: the first segment gains .3, the second loses .1, the third gains what is left.
  got = redistribute([0.2, 0.5, 0.4, np.nan, np.inf], 1.0, 3)
  np.testing.assert_allclose(got, [0.3, -0.1, 0.6, 0.0, 0.0], atol=1e-6)


def test_golden_first_segment():
  got = redistribute([0.2, 0.5, 0.4, np.nan, np.inf], 1.0, 3, initial_value="first_segment")
  np.testing.assert_allclose(got, [0.5, -0.1, 0.6, 0.0, 0.0], atol=1e-6)


def test_golden_state_values():
  got = redistribution.state_values(jnp.array([0.2, 0.5, jnp.nan]), jnp.float32(1.0), jnp.int32(2))
  np.testing.assert_allclose(got, [0.2, 0.5, 1.0, 1.0])
  assert got.dtype == jnp.float32


def test_all_segments_used_ends_in_the_return():
  np.testing.assert_allclose(redistribute([0.1, 0.2, 0.4], 0.0, 3), [0.1, 0.2, -0.4], atol=1e-6)


def test_one_segment_gets_everything():
  np.testing.assert_allclose(redistribute([0.25], 1.0, 1), [0.75])
  np.testing.assert_allclose(redistribute([0.25], 1.0, 1, initial_value="first_segment"), [1.0])


@pytest.mark.parametrize("initial_value", redistribution.INITIAL_VALUES)
def test_an_empty_trace_gets_nothing(initial_value):
  got = redistribute([np.nan, 0.3], 1.0, 0, initial_value=initial_value)
  np.testing.assert_array_equal(got, [0.0, 0.0])
  completed = redistribution.state_values(jnp.array([jnp.nan, 0.3]), jnp.float32(1.0), jnp.int32(0))
  np.testing.assert_array_equal(completed, [1.0, 1.0, 1.0])


@given(
  values=st.lists(st.floats(-4, 4, width=32) | st.sampled_from([0.0, 1.0]), min_size=K, max_size=K),
  return_=st.floats(-2, 2, width=32),
  num_segments=st.integers(0, K),
  garbage=st.sampled_from([np.nan, np.inf, -np.inf, 3e38]),
)
def test_return_equivalence(values, return_, num_segments, garbage):
  dirty = np.array(values, np.float32)
  dirty[num_segments:] = garbage
  baseline = redistribute(dirty, return_, num_segments)
  first = redistribute(dirty, return_, num_segments, initial_value="first_segment")
  expected = (return_ - values[0], return_) if num_segments else (0.0, 0.0)
  np.testing.assert_allclose(jnp.sum(baseline), expected[0], atol=1e-5)
  np.testing.assert_allclose(jnp.sum(first), expected[1], atol=1e-5)
  np.testing.assert_array_equal(baseline[num_segments:], 0)
  np.testing.assert_array_equal(first[num_segments:], 0)
  np.testing.assert_array_equal(baseline[1:], first[1:])


@given(values=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=K), return_=st.floats(-2, 2, width=32))
def test_return_equivalence_for_ragged_k(values, return_):
  got = redistribute(values, return_, len(values))
  np.testing.assert_allclose(jnp.sum(got), return_ - values[0], atol=1e-5)
  padded = redistribute(np.pad(np.array(values), (0, K - len(values)), constant_values=7.0), return_, len(values))
  np.testing.assert_array_equal(padded[: len(values)], got)


def test_values_and_return_are_stop_gradient():
  def total(values, return_):
    weights = jnp.array([1.0, 2.0, 3.0])
    return jnp.sum(weights * redistribution.redistribute(values, return_, jnp.int32(3)))

  gradient = jax.grad(total, argnums=(0, 1))(jnp.array([0.1, 0.2, 0.3]), jnp.float32(1.0))
  np.testing.assert_array_equal(gradient[0], np.zeros(3))
  assert gradient[1] == 0


def test_neighbouring_rows_are_independent_and_jit_vmap_equal_eager():
  values = jnp.array([[0.2, 0.5, 0.4], [0.2, 0.5, 0.4], [jnp.nan, 0.5, 0.4]])
  returns, numbers = jnp.array([1.0, 0.0, 1.0]), jnp.array([3, 2, 0])
  batched = jax.jit(jax.vmap(redistribution.redistribute))(values, returns, numbers)
  np.testing.assert_allclose(batched, [[0.3, -0.1, 0.6], [0.3, -0.5, 0.0], [0.0, 0.0, 0.0]], atol=1e-6)
  for row in range(3):
    eager = redistribution.redistribute(values[row], returns[row], numbers[row])
    np.testing.assert_array_equal(batched[row], eager)


@pytest.mark.parametrize("initial_value, total", [("baseline", 0.75), ("first_segment", 1.0)])
def test_half_precision_does_not_lose_the_return(initial_value, total):
  """512 differences of bfloat16 values: taken in bfloat16 they miss the return by one percent."""
  values = jnp.asarray(0.25 + 0.7 * np.sin(np.arange(512)) ** 2 * (np.arange(512) > 0), jnp.bfloat16)
  got = redistribution.redistribute(values, jnp.bfloat16(1.0), jnp.int32(512), initial_value=initial_value)
  assert got.dtype == redistribution.state_values(values, 1.0, 512).dtype == jnp.float32
  np.testing.assert_allclose(jnp.sum(got), total, atol=1e-5)
  in_half = jnp.diff(jnp.append(values, jnp.bfloat16(1.0)))
  assert abs(float(jnp.sum(in_half)) - 0.75) > 0.005


def test_more_segments_than_room_raise_or_keep_the_return():
  values = jnp.array([0.2, 0.5, 0.4])
  for number in (4, -1):
    with pytest.raises(ValueError, match=rf"num_segments={number} must lie in \[0, 3\]"):
      redistribution.redistribute(values, 1.0, number)
    with pytest.raises(ValueError, match=rf"num_segments={number} must"):
      redistribution.state_values(values, jnp.float32(1.0), jnp.int32(number))
  np.testing.assert_allclose(redistribute([0.2, 0.5, 0.4], 1.0, 4), [0.3, -0.1, 0.6], atol=1e-6)
  np.testing.assert_array_equal(redistribute([0.2, 0.5, 0.4], 1.0, -1), np.zeros(3))
  completed = jax.jit(redistribution.state_values)(values, jnp.float32(1.0), jnp.int32(9))
  np.testing.assert_allclose(completed, [0.2, 0.5, 0.4, 1.0])


def test_errors():
  with pytest.raises(ValueError, match="did you mean 'baseline'"):
    redistribute([0.1], 1.0, 1, initial_value="base_line")
