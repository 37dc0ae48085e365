"""Credit of a batch: by hand, against a row at a time, after the exit, and with returns that say nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rredcot_jax.ops import advantages, composition, redistribution, types, values

B, K, T, N, GROUP = 6, 4, 9, 2, 3
STATIC = ("group_size", "mode", "initial_value", "state_baseline", "baseline", "advantage_scale", "ddof")
from_values = jax.jit(composition.credit_from_values, static_argnames=STATIC)
from_log_probs = jax.jit(composition.credit_from_log_probs, static_argnames=(*STATIC, "form"))
close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)


def cut(*rows, thought_end=None):
  """Segments of traces whose segments have these lengths, [len(rows)] of them."""
  ends, ids = np.zeros((len(rows), K), np.int32), np.full((len(rows), T), -1, np.int32)
  for row, lengths in enumerate(rows):
    ends[row] = sum(lengths)
    ends[row, : len(lengths)] = np.cumsum(lengths)
    ids[row, : sum(lengths)] = np.repeat(np.arange(len(lengths)), lengths)
  number = np.array([len(lengths) for lengths in rows], np.int32)
  exits = None if thought_end is None else np.array(thought_end, np.int32)
  return jax.tree.map(jnp.asarray, types.Segments(ends, ids, number, 0 * number, exits))


@functools.cache
def case():
  """Two groups of three traces of 4, 1, 2, 3, 0 and 4 segments, with their bank and its log-probabilities."""
  rng = np.random.default_rng(0)
  segments = cut([2, 3, 1, 1], [9], [4, 2], [1, 1, 1], [], [2, 2, 2, 2])
  returns = jnp.array([1.0, 0.0, 1.0, 0.25, 0.0, 1.0])
  log_p = jnp.asarray(-rng.exponential(2.0, (B, K, N)), jnp.float32)
  scored = np.arange(3) < rng.integers(1, 4, (B, K, N))[..., None]
  bank = types.Completions(
    tokens=np.zeros((B, K, N, 3), np.int32), mask=scored, scored=scored,
    utilities=rng.random((B, K, N)).astype(np.float32), log_q=rng.normal(-2, 1, (B, K, N)).astype(np.float32),
    valid=rng.random((B, K, N)) < 0.7,
  )  # fmt: skip
  return log_p, jax.tree.map(jnp.asarray, bank), segments, returns


def rows_of(tree):
  return [jax.tree.map(lambda x, row=row: x[row], tree) for row in range(B)]


def test_golden():
  """Values .5, .6, .9 | R = 1 and .5, .1, .1 | R = 0 over segments of 2, 2 and 2 tokens."""
  segments = cut([2, 2, 2], [2, 2, 2])
  estimated = jnp.array([[0.5, 0.6, 0.9, 7.0], [0.5, 0.1, 0.1, jnp.nan]])
  credit = from_values(estimated, segments, jnp.array([1.0, 0.0]), group_size=2, mode="difference")
  close(credit.values, [[0.5, 0.6, 0.9, 1.0, 1.0], [0.5, 0.1, 0.1, 0.0, 0.0]])
  close(credit.rewards, [[0.1, 0.3, 0.1, 0.0], [-0.4, 0.0, -0.1, 0.0]])
  padding = [0.0] * 3
  close(credit.advantages[0], [0.1, 0.1, 0.3, 0.3, 0.1, 0.1, *padding])
  close(credit.advantages[1], [-0.4, -0.4, 0.0, 0.0, -0.1, -0.1, *padding])
  close(credit.effective_sample_size, [[1, 1, 1, 0]] * 2)
  # The value that a segment leads to, and not what it changed.
  reached = from_values(
    estimated, segments, jnp.array([1.0, 0.0]), group_size=2, mode="difference", state_baseline=False, scale=2.0
  )
  close(reached.advantages[0], [1.2, 1.2, 1.8, 1.8, 2.0, 2.0, *padding])
  close(reached.rewards, credit.rewards)


@pytest.mark.parametrize("mode", advantages.MODES)
@pytest.mark.parametrize("initial_value", redistribution.INITIAL_VALUES)
def test_equals_a_row_at_a_time(mode, initial_value):
  log_p, bank, segments, returns = case()
  uniform = jnp.array([False, False, True, False, True, False])
  options = dict(floor=0.1, scale=2.0)
  credit = from_log_probs(
    log_p, bank, segments, returns, group_size=GROUP, mode=mode, form="truncated", max_weight=0.8,
    initial_value=initial_value, baseline="rloo", ddof=1, epsilon=1e-3, uniform_rows=uniform, **options,
  )  # fmt: skip
  outcomes = [
    advantages.group_advantages(group, baseline="rloo", ddof=1, epsilon=1e-3) for group in returns.reshape(-1, GROUP)
  ]
  outcomes = jnp.concatenate(outcomes)
  for row, (p, b, s, r) in enumerate(zip(*map(rows_of, (log_p, bank, segments, returns)))):
    lengths = jnp.sum(b.scored, axis=-1)
    estimated, sizes = values.estimate_values(
      p, b.utilities, b.log_q, b.valid, lengths, form="truncated", max_weight=0.8
    )
    rewards = redistribution.redistribute(estimated, r, s.num_segments, initial_value=initial_value)
    expected = advantages.token_advantages(
      rewards, outcomes[row], s, mode="uniform" if uniform[row] else mode, **options
    )
    close(credit.values[row], redistribution.state_values(estimated, r, s.num_segments))
    close(credit.rewards[row], rewards)
    close(credit.advantages[row], expected, rtol=1e-5)
    close(credit.effective_sample_size[row], jnp.where(s.mask, sizes, 0), rtol=1e-5)


@pytest.mark.parametrize("form", values.FORMS)
def test_from_log_probs_is_from_the_values_of_the_form(form):
  log_p, bank, segments, returns = case()
  one = jax.tree.map(lambda x: x[:, :1], bank)  # One bank for all states of a trace.
  estimated, sizes = composition.values_from_log_probs(log_p, one, segments, returns, form=form, exponent=0.7)
  spread = jax.tree.map(lambda x: jnp.broadcast_to(x[:, :1], x.shape), bank)
  again, _ = composition.values_from_log_probs(log_p, spread, segments, returns, form=form, exponent=0.7)
  close(estimated, again)
  for row in range(B):
    lengths = jnp.sum(one.scored[row], axis=-1)
    of_row = (log_p[row], one.utilities[row], one.log_q[row], one.valid[row], lengths)
    close(estimated[row], values.estimate_values(*of_row, form=form, exponent=0.7)[0])
  whole = from_log_probs(log_p, one, segments, returns, group_size=GROUP, mode="difference", form=form, exponent=0.7)
  parts = from_values(estimated, segments, returns, group_size=GROUP, mode="difference", sample_sizes=sizes)
  jax.tree.map(close, whole, parts)


def test_a_decided_state_has_the_observed_return():
  """A trace of 2 + 2 + 2 + 2 tokens whose exit is token 2: states 2 and 3, cut at 4 and 6, lie behind it."""
  rows = [[2, 2, 2, 2]] * 3
  segments = cut(*rows, thought_end=[2, 2, 8])
  log_p = jnp.log(jnp.full((3, K, 1), 0.5))
  valid = np.ones((3, K, 1), bool)
  valid[:, 2:] = False  # No completion leaves a thought that is left already.
  valid[1, 3] = True  # But something may be known there.
  valid[2, 1] = False  # A state of the thought without a completion has no value.
  ones = np.ones((3, K, 1), np.float32)
  scored = np.ones((3, K, 1, 2), bool)
  bank = types.Completions(np.zeros((3, K, 1, 2), np.int32), scored, scored, ones, 0 * ones, valid)
  returns = jnp.array([1.0, 0.25, 1.0])
  credit = from_log_probs(log_p, bank, segments, returns, group_size=3, mode="difference")
  close(credit.values[:, :4], [[0.5, 0.5, 1.0, 1.0], [0.5, 0.5, 0.25, 0.5], [0.5, 0.0, 0.0, 0.0]])
  close(credit.effective_sample_size, [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]])
  # The segment with the exit gets all that is left, those behind it nothing.
  close(credit.rewards[0], [0.0, 0.5, 0.0, 0.0])
  nothing = dataclasses.replace(segments, thought_end=None)
  unknown = from_log_probs(log_p, bank, nothing, returns, group_size=3, mode="difference")
  close(unknown.values[:, :4], [[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.5], [0.5, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize("mode", advantages.MODES)
@pytest.mark.parametrize("garbage, uniform_row", [(np.nan, False), (np.inf, False), (np.nan, True)])
def test_a_return_that_is_not_finite_costs_its_own_trace_only(mode, garbage, uniform_row):
  log_p, bank, segments, returns = case()
  uniform = jnp.array([uniform_row, True, False, False, False, False])
  call = functools.partial(from_log_probs, group_size=GROUP, mode=mode, uniform_rows=uniform)
  broken = call(log_p, bank, segments, returns.at[0].set(garbage))
  np.testing.assert_array_equal(broken.advantages[0], np.zeros(T))
  assert np.isfinite(broken.advantages).all() and not np.isfinite(broken.rewards[0]).all()
  # Its group is computed without it.
  pair = jax.tree.map(lambda x: x[1:3], (log_p, bank, segments, returns))
  rest = composition.credit_from_log_probs(*pair, group_size=2, mode=mode, uniform_rows=uniform[1:3])
  close(broken.advantages[1:3], rest.advantages, rtol=1e-5)
  # The other group does not see it.
  np.testing.assert_array_equal(broken.advantages[3:], call(log_p, bank, segments, returns).advantages[3:])


def test_groups_are_independent_and_their_order_says_nothing():
  everything = case()
  whole = from_log_probs(*everything, group_size=GROUP, mode="signed")
  swapped = from_log_probs(
    *jax.tree.map(lambda x: jnp.roll(x, GROUP, axis=0), everything), group_size=GROUP, mode="signed"
  )
  jax.tree.map(lambda x, y: close(jnp.roll(x, GROUP, axis=0), y), whole, swapped)
  first = composition.credit_from_log_probs(
    *jax.tree.map(lambda x: x[:GROUP], everything), group_size=GROUP, mode="signed"
  )
  jax.tree.map(lambda x, y: close(x[:GROUP], y, rtol=1e-5), whole, first)


def test_batched_group_functions():
  returns = jnp.array([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
  got = composition.group_advantages(returns, group_size=3, scale="none")
  close(got, [2 / 3, -1 / 3, -1 / 3, 0, 0, 0])
  np.testing.assert_array_equal(composition.zero_variance(returns, group_size=3), [False] * 3 + [True] * 3)
  np.testing.assert_array_equal(composition.zero_variance(returns, group_size=2), [False] * 4 + [True] * 2)


def test_credit_that_is_no_difference_of_values():
  _, _, segments, returns = case()
  rewards = jnp.arange(B * K, dtype=jnp.float32).reshape(B, K)
  got = composition.advantages_from_rewards(rewards, segments, returns, group_size=GROUP, mode="difference", scale=0.5)
  ids = np.asarray(segments.segment_ids)
  expected = np.where(ids >= 0, np.take_along_axis(np.asarray(rewards), np.maximum(ids, 0), axis=1) / 2, 0)
  np.testing.assert_array_equal(got, expected)


def test_calibrated_values_compose():
  log_p, bank, segments, returns = case()
  likelihoods = jax.vmap(values.log_likelihoods)(log_p, bank.utilities, bank.log_q, bank.valid)
  usable = segments.mask & bank.valid.any(axis=-1)
  estimated = values.cross_fit(likelihoods, None, returns, usable, group_size=GROUP)
  credit = composition.credit_from_values(estimated, segments, returns, group_size=GROUP, mode="difference")
  close(jnp.sum(credit.rewards, axis=1), returns - credit.values[:, 0])
  assert np.isfinite(credit.advantages).all() and np.abs(credit.advantages).max() > 0


def test_numbers_can_change_inside_a_compiled_program():
  everything = case()
  for x in (0.1, 0.4):
    numbers = dict(floor=x, scale=3 * x, epsilon=x, max_weight=x)
    options = dict(group_size=GROUP, mode="magnitude", form="truncated")
    traced = from_log_probs(*everything, **options, **numbers)
    fixed = composition.credit_from_log_probs(*everything, **options, **numbers)
    jax.tree.map(lambda x, y: close(x, y, rtol=1e-5), traced, fixed)


def test_no_gradient_flows():
  log_p, bank, segments, returns = case()

  def total(log_p, utilities, returns):
    changed = dataclasses.replace(bank, utilities=utilities)
    credit = composition.credit_from_log_probs(log_p, changed, segments, returns, group_size=GROUP, mode="signed")
    return sum(jnp.sum(x) for x in jax.tree.leaves(credit))

  for gradient in jax.grad(total, argnums=(0, 1, 2))(log_p, bank.utilities, returns):
    np.testing.assert_array_equal(gradient, 0)
