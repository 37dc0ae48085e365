"""Goldens by hand, and the identities that tie every mode to GRPO."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rredcot_jax.ops import advantages, types

T = 12
SIGMA = jax.jit(advantages.sigma, static_argnames=("mode", "floor"))
TOKEN_ADVANTAGES = jax.jit(advantages.token_advantages, static_argnames=("mode", "floor"))


def cut(lengths, num_tokens=T, max_segments=4):
  """The Segments of a trace whose segments have these lengths."""
  ends = np.cumsum(lengths, dtype=np.int32)
  length = int(ends[-1]) if len(lengths) else 0
  ids = np.full(num_tokens, -1, np.int32)
  ids[:length] = np.repeat(np.arange(len(lengths)), lengths)
  padded = np.full(max_segments, length, np.int32)
  padded[: len(lengths)] = ends
  return types.Segments(
    ends=jnp.array(padded),
    segment_ids=jnp.array(ids),
    num_segments=jnp.int32(len(lengths)),
    num_merged=jnp.int32(0),
  )


def reward_k(rewards, max_segments=4):
  """[K], with garbage where there is no segment."""
  return jnp.array([*rewards, *[np.nan] * (max_segments - len(rewards))], jnp.float32)


def test_group_advantages_goldens():
  returns = jnp.array([1.0, 0.0, 0.0, 1.0, 0.5])  # mean .5, population variance 1/5
  std = np.sqrt(0.2)
  centred = np.array([0.5, -0.5, -0.5, 0.5, 0.0])
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
  close(advantages.group_advantages(returns), centred / (std + 1e-6))
  close(advantages.group_advantages(returns, epsilon=0.1), centred / (std + 0.1))
  close(advantages.group_advantages(returns, scale="none"), centred)
  # The others' mean: for a 1, (0 + 0 + 1 + .5) / 4 = .375.
  leave_one_out = advantages.group_advantages(returns, baseline="rloo", scale="none")
  close(leave_one_out, [0.625, -0.625, -0.625, 0.625, 0.0])
  close(advantages.group_advantages(returns, baseline="rloo"), centred * 1.25 / (std + 1e-6))
  # The sample's deviation, 1/4 in place of 1/5, as TRL and Tunix have it.
  close(advantages.group_advantages(returns, ddof=1), centred / (0.5 + 1e-6))
  close(advantages.group_advantages(returns, baseline="rloo", ddof=1), centred * 1.25 / (0.5 + 1e-6))


@pytest.mark.parametrize("scale", advantages.SCALES)
@pytest.mark.parametrize("baseline", ["mean", "rloo"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 1 / 3])
def test_zero_variance_gives_exactly_zero(value, baseline, scale):
  returns = jnp.full(7, value)
  assert advantages.zero_variance(returns)
  np.testing.assert_array_equal(
    advantages.group_advantages(returns, baseline=baseline, scale=scale, epsilon=1e-12), np.zeros(7)
  )


def test_without_a_baseline_returns_are_kept():
  returns = jnp.array([1.0, 1.0])
  np.testing.assert_array_equal(advantages.group_advantages(returns, baseline="none", scale="none"), returns)
  with pytest.raises(ValueError, match="set scale='none'"):
    advantages.group_advantages(returns, baseline="none")


def test_zero_variance_is_exact():
  assert not advantages.zero_variance(jnp.array([1.0, 1.0, 1.0 + 2e-7]))


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("baseline, scale", [("mean", "std"), ("rloo", "std"), ("mean", "none"), ("none", "none")])
def test_a_return_that_cannot_be_used_is_left_out_of_its_group(baseline, scale, ddof, garbage):
  options = dict(baseline=baseline, scale=scale, ddof=ddof)
  compute = jax.jit(functools.partial(advantages.group_advantages, **options))
  rest = advantages.group_advantages(jnp.array([1.0, 0.0, 1.0, 0.5]), **options)
  expected = np.insert(np.asarray(rest), 2, 0.0)
  returns = jnp.array([1.0, 0.0, garbage, 1.0, 0.5])
  np.testing.assert_allclose(compute(returns), expected, rtol=1e-6)
  # Or where the caller says so, whatever the return is.
  usable = jnp.array([True, True, False, True, True])
  np.testing.assert_allclose(compute(jnp.array([1.0, 0.0, 7.0, 1.0, 0.5]), mask=usable), expected, rtol=1e-6)
  # Neighbouring groups do not see it.
  groups = jnp.stack([returns, jnp.array([1.0, 0.0, 0.0, 1.0, 0.5])])
  np.testing.assert_allclose(jax.vmap(compute)(groups)[0], expected, rtol=1e-6)
  np.testing.assert_allclose(jax.vmap(compute)(groups)[1], compute(groups[1]), rtol=1e-6)


@pytest.mark.parametrize("scale", advantages.SCALES)
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("returns", [[np.nan] * 3, [np.nan, 1.0, np.nan], [np.nan, 1.0, 1.0]])
def test_fewer_than_two_different_returns_that_can_be_used_say_nothing(returns, ddof, scale):
  for baseline in ("mean", "rloo"):
    with jax.debug_nans(True):
      got = advantages.group_advantages(np.float32(returns), baseline=baseline, scale=scale, ddof=ddof)
    np.testing.assert_array_equal(got, np.zeros(3))
  assert advantages.zero_variance(np.float32(returns))
  assert not advantages.zero_variance(jnp.array([jnp.nan, 0.0, 1.0]))
  assert advantages.zero_variance(jnp.array([2.0, 0.0, 2.0]), mask=jnp.array([True, False, True]))


@pytest.mark.parametrize("size", [0, 1])
def test_a_group_of_one_has_no_advantage(size):
  with pytest.raises(ValueError, match="Sample at least 2"):
    advantages.group_advantages(jnp.ones(size))


def test_groups_are_independent_under_jit_and_vmap():
  returns = jnp.array([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.5, 1.0]])
  batched = jax.jit(jax.vmap(advantages.group_advantages))(returns)
  for row in range(3):
    np.testing.assert_allclose(batched[row], advantages.group_advantages(returns[row]), rtol=1e-6)
  np.testing.assert_array_equal(jax.vmap(advantages.zero_variance)(returns), [False, True, False])


def test_sigma_golden_magnitude():
  # |r| = 1, 2, 3 over 2, 3, 1 tokens: token mean (2*1 + 3*2 + 1*3) / 6 = 11/6.
  got = advantages.sigma(reward_k([1, -2, 3]), 1.0, cut([2, 3, 1], 8), mode="magnitude")
  np.testing.assert_allclose(got, np.array([1, 1, 2, 2, 2, 3, 0, 0]) * 6 / 11, rtol=1e-6)


def test_sigma_golden_floor():
  got = advantages.sigma(reward_k([0, 2]), 1.0, cut([2, 2], 5), mode="magnitude", floor=0.25)
  np.testing.assert_allclose(got, [0.25, 0.25, 1.75, 1.75, 0], rtol=1e-6)


def test_sigma_golden_signed():
  segments, rewards = cut([2, 3, 1], 8), reward_k([1, -2, 3])
  praised = advantages.sigma(rewards, 0.3, segments, mode="signed")  # c = 1 0 3, token mean 5/6
  np.testing.assert_allclose(praised, np.array([1, 1, 0, 0, 0, 3, 0, 0]) * 6 / 5, rtol=1e-6)
  blamed = advantages.sigma(rewards, -0.3, segments, mode="signed")  # c = 0 2 0, token mean 1
  np.testing.assert_allclose(blamed, [0, 0, 2, 2, 2, 0, 0, 0], rtol=1e-6)


def test_signed_advantages_never_praise_a_loss_nor_blame_a_gain():
  segments, rewards = cut([2, 3, 1], 8), reward_k([1, -2, 3])
  signs = np.array([1, 1, -1, -1, -1, 1, 0, 0])
  for group_advantage in (0.7, -0.7):
    got = advantages.token_advantages(rewards, group_advantage, segments, mode="signed")
    assert np.all(got * signs >= 0) and np.any(got != 0)
    assert np.all(got * group_advantage >= 0)


lengths_and_rewards = st.lists(
  st.tuples(st.integers(1, 3), st.floats(-1, 1, width=32) | st.just(0.0)), min_size=1, max_size=4
)


@pytest.mark.parametrize("mode", advantages.SIGMA_MODES)
@given(
  rows=lengths_and_rewards,
  exponent=st.sampled_from([-30, -8, 0, 8, 30]),
  group_advantage=st.sampled_from([-1.5, 0.0, 0.5]),
  floor=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_sigma_has_token_mean_one(mode, rows, exponent, group_advantage, floor):
  lengths, rewards = zip(*rows)
  tiny_or_huge = reward_k(np.array(rewards) * 10.0**exponent)
  got = np.array(SIGMA(tiny_or_huge, group_advantage, cut(lengths), mode=mode, floor=floor))
  length = sum(lengths)
  np.testing.assert_allclose(np.mean(got[:length], dtype=np.float64), 1.0, atol=3e-6)
  assert np.all(got[:length] >= floor * (1 - 1e-6))
  np.testing.assert_array_equal(got[length:], 0)


@pytest.mark.parametrize("factor", [1e-37, 1e-8, 1e8, 5e37])
def test_sigma_does_not_depend_on_the_scale_of_the_rewards(factor):
  rewards, segments = reward_k([0.5, -0.125, 1.0]), cut([20, 30, 10], 64)  # Long: a plain sum overflows.
  np.testing.assert_allclose(
    advantages.sigma(rewards * factor, 1.0, segments), advantages.sigma(rewards, 1.0, segments), rtol=1e-5
  )


@pytest.mark.parametrize("mode", advantages.SIGMA_MODES)
@pytest.mark.parametrize("floor", [0.0, 0.5])
@pytest.mark.parametrize("group_advantage", [1.25, -0.75])
def test_reduces_to_grpo(mode, floor, group_advantage):
  """K = 1, equal rewards over segments of any lengths, and no information at all."""
  agreeing = np.sign(group_advantage) * 0.2
  for lengths, rewards in [
    ([5], [0.4]),
    ([5], [-0.4]),
    ([3, 3, 3], [agreeing] * 3),
    ([1, 4, 2], [agreeing] * 3),
    ([1, 4, 2], [0.0] * 3),
  ]:
    got = TOKEN_ADVANTAGES(reward_k(rewards), group_advantage, cut(lengths), mode=mode, floor=floor, scale=2.0)
    expected = np.where(np.arange(T) < sum(lengths), 2.0 * group_advantage, 0.0)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_signed_falls_back_when_nothing_agrees_with_the_outcome():
  segments = cut([2, 2], 5)
  for rewards, group_advantage in [([-0.1, -0.3], 1.0), ([0.1, 0.3], -1.0), ([0.1, -0.3], 0.0)]:
    got = advantages.sigma(reward_k(rewards), group_advantage, segments, mode="signed")
    np.testing.assert_array_equal(got, [1, 1, 1, 1, 0])


def test_a_nan_reward_of_a_real_segment_is_not_hidden():
  assert np.isnan(advantages.sigma(jnp.array([jnp.nan, 1.0, 0.0, 0.0]), 1.0, cut([2, 2]))).any()


@pytest.mark.parametrize("mode", advantages.MODES)
def test_an_empty_trace_gets_zeros(mode):
  got = advantages.token_advantages(reward_k([]), 1.0, cut([]), mode=mode)
  np.testing.assert_array_equal(got, np.zeros(T))


def test_difference_is_the_reward_itself():
  segments, rewards = cut([2, 3, 1], 8), reward_k([0.1, 0.25, -0.5])
  for group_advantage in (5.0, -5.0, 0.0, np.nan):  # The outcome is not added a second time.
    got = advantages.token_advantages(rewards, group_advantage, segments, mode="difference", scale=2.0)
    np.testing.assert_allclose(got, [0.2, 0.2, 0.5, 0.5, 0.5, -1.0, 0, 0], rtol=1e-6)


@given(lengths_and_rewards)
def test_difference_is_never_mean_shifted(rows):
  lengths, rewards = zip(*rows)
  got = TOKEN_ADVANTAGES(reward_k(rewards), 1.0, cut(lengths), mode="difference", floor=0.5)
  np.testing.assert_array_equal(
    np.sign(got[: sum(lengths)]), np.sign(np.repeat(np.array(rewards, np.float32), lengths))
  )


@pytest.mark.parametrize("mode", advantages.MODES)
def test_neighbouring_rows_are_independent_and_jit_vmap_equal_eager(mode):
  cuts = [cut([2, 3, 1]), cut([12]), cut([]), cut([1, 1, 1, 1])]
  rewards = jnp.stack([reward_k([1, -2, 3]), reward_k([0.5]), reward_k([]), reward_k([0.1, 0.2, -0.3, 0])])
  outcomes = jnp.array([1.0, -2.0, 3.0, 0.5])

  def one(rewards, outcome, segments):
    return advantages.token_advantages(rewards, outcome, segments, mode=mode, floor=0.1)

  segments = jax.tree.map(lambda *x: jnp.stack(x), *cuts)
  batched = jax.jit(jax.vmap(one))(rewards, outcomes, segments)
  for row in range(4):
    np.testing.assert_allclose(batched[row], one(rewards[row], outcomes[row], cuts[row]), rtol=1e-6)


@pytest.mark.parametrize("mode", advantages.MODES)
def test_advantages_carry_no_gradient(mode):
  def total(rewards, outcome):
    weights = jnp.arange(1.0, T + 1)
    return jnp.sum(weights * advantages.token_advantages(rewards, outcome, cut([2, 3]), mode=mode))

  gradient = jax.grad(total, argnums=(0, 1))(reward_k([1, 2]), jnp.float32(1.0))
  np.testing.assert_array_equal(gradient[0], np.zeros(4))
  assert gradient[1] == 0


def test_errors():
  segments = cut([2, 2])
  with pytest.raises(ValueError, match="did you mean 'magnitude'"):
    advantages.sigma(reward_k([1, 2]), 1.0, segments, mode="magnitud")
  with pytest.raises(ValueError, match="did you mean 'difference'"):
    advantages.token_advantages(reward_k([1, 2]), 1.0, segments, mode="differences")
  with pytest.raises(ValueError, match="unknown"):  # Not a sigma: it has no mean of 1.
    advantages.sigma(reward_k([1, 2]), 1.0, segments, mode="difference")
  for floor in (-0.1, 1.1):
    with pytest.raises(ValueError, match="floor"):
      advantages.sigma(reward_k([1, 2]), 1.0, segments, floor=floor)
  with pytest.raises(ValueError, match="did you mean 'mean'"):
    advantages.group_advantages(jnp.ones(3), baseline="means")
  for epsilon in (0.0, -1.0):
    with pytest.raises(ValueError, match=f"epsilon={epsilon} must be > 0"):
      advantages.group_advantages(jnp.ones(3), epsilon=epsilon)
  with pytest.raises(ValueError, match="did you mean 'std'"):
    advantages.group_advantages(jnp.ones(3), scale="sd")
  for ddof in (2, -1):
    with pytest.raises(ValueError, match=f"ddof={ddof} must be 0"):
      advantages.group_advantages(jnp.ones(3), ddof=ddof)


def test_half_precision_is_computed_in_float32():
  returns = jnp.asarray([1.0, 0.0] * 150 + [0.5], jnp.bfloat16)
  got = advantages.group_advantages(returns, scale="none")
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, returns.astype(jnp.float32) - 0.5, atol=1e-6)
  # 300 tokens of coefficient 1 and 300 of 2: bfloat16 sums stop growing at 256.
  segments, rewards = cut([300, 300], 600), reward_k([1, 2])
  got = advantages.sigma(rewards.astype(jnp.bfloat16), jnp.bfloat16(1.0), segments)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, np.repeat([2 / 3, 4 / 3], 300), rtol=1e-6)
  got = advantages.token_advantages(rewards.astype(jnp.bfloat16), jnp.bfloat16(1.0), segments, mode="difference")
  assert got.dtype == jnp.float32
  values = jnp.asarray(np.linspace(0, 1, 300), jnp.bfloat16)
  got = advantages.generalised_advantages(values, jnp.bfloat16(1.0), jnp.ones(300, bool), decay=1.0)
  np.testing.assert_allclose(got, 1 - values.astype(jnp.float32), atol=1e-5)


def test_numbers_can_change_inside_a_compiled_program():
  segments, rewards = cut([2, 3, 1]), reward_k([1, -2, 3])
  token = jax.jit(lambda f, c: advantages.token_advantages(rewards, 1.0, segments, mode="magnitude", floor=f, scale=c))
  group = jax.jit(lambda e: advantages.group_advantages(jnp.array([1.0, 0.0, 0.0]), epsilon=e))
  decayed = lambda d: advantages.generalised_advantages(rewards[:3], 1.0, jnp.ones(3, bool), decay=d)
  for x in (0.1, 0.5):
    expected = advantages.token_advantages(rewards, 1.0, segments, mode="magnitude", floor=x, scale=3 * x)
    np.testing.assert_allclose(token(x, 3 * x), expected, rtol=1e-6)
    np.testing.assert_allclose(group(x), advantages.group_advantages(jnp.array([1.0, 0.0, 0.0]), epsilon=x), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(decayed)(x), decayed(x), rtol=1e-6)


def test_generalised_advantages_by_their_definition():
  values = np.array([0.5, 0.25, 0.75, np.nan, np.nan], np.float32)
  mask = np.array([True, True, True, False, False])
  complete = [0.5, 0.25, 0.75, 1.0]
  for decay in (0.0, 0.3, 1.0):
    expected = [sum(decay ** (u - t) * (complete[u + 1] - complete[u]) for u in range(t, 3)) for t in range(3)]
    ours = advantages.generalised_advantages(values, np.float32(1.0), mask, decay=decay)
    np.testing.assert_allclose(ours, [*expected, 0, 0], atol=1e-6)
  # decay 1 is the return over the baseline, decay 0 the redistribution with a segment a token.
  np.testing.assert_allclose(ours[:3], [0.5, 0.75, 0.25], atol=1e-6)
  full = advantages.generalised_advantages(np.float32([0.5, 0.25]), np.float32(0.0), np.ones(2, bool), decay=0.0)
  np.testing.assert_allclose(full, [-0.25, -0.25], atol=1e-6)
  with pytest.raises(ValueError, match=r"decay=1\.1"):
    advantages.generalised_advantages(values, np.float32(1.0), mask, decay=1.1)
