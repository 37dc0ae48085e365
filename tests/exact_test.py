"""Every estimator of values.py against exact enumeration of a toy language model.

The toy: vocabulary {0 = EOS, 1, 2}, traces of at most 4 tokens (the fourth is
always EOS), a random next-token table for every prefix, a random utility for
every whole trace. v(s) is enumerated, not estimated.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rredcot_jax import redistribute
from rredcot_jax.values import estimate_values

LENGTH, VOCAB, EOS = 4, 3, 0
SEEDS = range(4)


class Toy:
  def __init__(self, seed, zero_share=0.0):
    rng = np.random.default_rng(seed)
    self.next = {}
    for length in range(LENGTH):
      for prefix in itertools.product(range(1, VOCAB), repeat=length):
        last = length == LENGTH - 1
        self.next[prefix] = np.array([1.0, 0.0, 0.0]) if last else rng.dirichlet(np.ones(VOCAB))
    self.utility = {t: float(rng.random() * (rng.random() >= zero_share)) for t in self.completions(())}

  def completions(self, prefix):
    """Every way to end a trace that begins with `prefix`."""
    if prefix and prefix[-1] == EOS:
      return [prefix]
    ended = [(*prefix, EOS)]
    if len(prefix) == LENGTH - 1:
      return ended
    return ended + [t for token in range(1, VOCAB) for t in self.completions((*prefix, token))]

  def log_prob(self, trace, start):
    return sum(np.log(self.next[trace[:t]][trace[t]]) for t in range(start, len(trace)))

  def value(self, prefix):
    return sum(np.exp(self.log_prob(t, len(prefix))) * self.utility[t] for t in self.completions(prefix))

  def states(self):
    return [prefix for prefix in self.next if len(prefix) < LENGTH - 1]


jitted = jax.jit(estimate_values, static_argnames=("form", "max_weight"))


def estimate(log_p, utilities, log_q, form="plain", **options):
  arrays = [jnp.asarray(x, jnp.float32)[None] for x in (log_p, utilities, log_q)]
  valid, lengths = jnp.ones_like(arrays[0], bool), jnp.ones_like(arrays[0], jnp.int32)
  values, _ = jitted(*arrays, valid, lengths, form=form, **options)
  return float(values[0])


def bank(toy, prefix, traces):
  return [toy.log_prob(t, len(prefix)) for t in traces], [toy.utility[t] for t in traces]


@pytest.mark.parametrize("seed", SEEDS)
def test_mass_of_a_full_bank_is_the_value_and_of_a_partial_one_is_below(seed):
  toy = Toy(seed)
  for prefix in toy.states():
    traces = toy.completions(prefix)
    log_p, utilities = bank(toy, prefix, traces)
    uniform = np.full(len(traces), -np.log(len(traces)))
    assert estimate(log_p, utilities, uniform) == pytest.approx(toy.value(prefix), abs=1e-5)
    partial = estimate(log_p[1:], utilities[1:], np.full(len(traces) - 1, -np.log(len(traces) - 1)))
    missing = np.exp(log_p[0]) * utilities[0]
    assert partial == pytest.approx(toy.value(prefix) - missing, abs=1e-5)
    assert partial < toy.value(prefix)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("draws", [1, 2])
def test_importance_sampling_is_unbiased_where_the_proposal_covers(seed, draws):
  toy, proposal = Toy(seed), Toy(seed + 100)
  for prefix in toy.states()[:3]:
    traces = toy.completions(prefix)
    log_p, utilities = map(np.array, bank(toy, prefix, traces))
    log_q = np.array([proposal.log_prob(t, len(prefix)) for t in traces])
    expected = 0.0
    truncated = 0.0
    for picked in itertools.product(range(len(traces)), repeat=draws):
      picked = list(picked)
      probability = np.exp(log_q[picked].sum())
      one = estimate(log_p[picked], utilities[picked], log_q[picked])
      capped = estimate(log_p[picked], utilities[picked], log_q[picked], form="truncated", max_weight=1.0)
      assert capped <= one + 1e-6
      expected += probability * one
      truncated += probability * capped
    assert expected == pytest.approx(toy.value(prefix), abs=1e-4)
    assert truncated < toy.value(prefix)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_proposal_that_does_not_cover_is_conservative(seed):
  toy = Toy(seed)
  for prefix in toy.states()[:3]:
    traces = toy.completions(prefix)
    log_p, utilities = map(np.array, bank(toy, prefix, traces))
    q = np.full(len(traces) - 1, 1 / (len(traces) - 1))
    expected = sum(
      q[n] * estimate(log_p[n + 1 : n + 2], utilities[n + 1 : n + 2], np.log(q[n : n + 1])) for n in range(len(q))
    )
    assert expected == pytest.approx(toy.value(prefix) - np.exp(log_p[0]) * utilities[0], abs=1e-5)
    assert expected < toy.value(prefix)


@pytest.mark.parametrize("seed", SEEDS)
def test_self_normalised_needs_the_failures(seed):
  toy = Toy(seed, zero_share=0.5)
  traces = toy.completions(())
  log_p, utilities = map(np.array, bank(toy, (), traces))
  zeros = np.zeros(len(traces))
  assert 0 < (utilities == 0).sum() < len(traces)
  assert estimate(log_p, utilities, zeros, form="self_normalised") == pytest.approx(toy.value(()), abs=1e-5)
  useful = utilities > 0
  biased = estimate(log_p[useful], utilities[useful], zeros[useful], form="self_normalised")
  assert biased > toy.value(()) + 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_exact_values_redistribute_without_drift(seed):
  """sum r = R - v(s_0) for every trace, and E[r_k | s_k] = 0: credit is earned, not handed out."""
  toy = Toy(seed)
  drift = {}
  for trace in toy.completions(()):
    values = jnp.array([toy.value(trace[:t]) for t in range(len(trace))] + [99.0] * (LENGTH - len(trace)), jnp.float32)
    rewards = np.asarray(redistribute(values, jnp.float32(toy.utility[trace]), jnp.int32(len(trace))))
    assert rewards.sum() == pytest.approx(toy.utility[trace] - toy.value(()), abs=1e-5)
    for t in range(len(trace)):
      weight = np.exp(toy.log_prob(trace, t))
      drift[trace[:t]] = drift.get(trace[:t], 0.0) + weight * rewards[t]
  assert len(drift) > 3
  assert all(abs(total) < 1e-5 for total in drift.values())


def test_forms_in_numbers():
  # Two completions of likelihood 0.5 and 0.2 under proposals 0.25 and 0.4: weights 2 and 0.5, utilities 1 and 0.4.
  log_p, log_q, utilities = np.log([0.5, 0.2]), np.log([0.25, 0.4]), [1.0, 0.4]
  assert estimate(log_p, utilities, log_q) == pytest.approx((2 * 1 + 0.5 * 0.4) / 2)
  assert estimate(log_p, utilities, log_q, form="truncated") == pytest.approx((1 * 1 + 0.5 * 0.4) / 2)
  assert estimate(log_p, utilities, log_q, form="self_normalised") == pytest.approx(2.2 / 2.5)
  arrays = [jnp.asarray(x, jnp.float32)[None] for x in (log_p, utilities, log_q)]
  lengths = jnp.array([[2, 1]])
  values, ess = estimate_values(*arrays, jnp.ones((1, 2), bool), lengths, form="length_normalised")
  assert float(values[0]) == pytest.approx((2**0.5 * 1 + 0.5 * 0.4) / 2)
  assert float(ess[0]) == pytest.approx((2**0.5 + 0.5) ** 2 / (2 + 0.25))


def test_long_completions_do_not_underflow():
  log_p, log_q = np.array([-2000.0, -2001.0]), np.array([-2000.5, -2000.5])
  assert estimate(log_p, [1.0, 1.0], log_q) == pytest.approx((np.exp(0.5) + np.exp(-0.5)) / 2)


def test_empty_places_are_ignored_under_jit_and_vmap():
  nan = jnp.nan
  log_p = jnp.array([[[jnp.log(0.5), nan], [nan, nan]], [[jnp.log(0.25), jnp.log(0.75)], [0.0, 0.0]]])
  zeros = jnp.zeros((2, 2, 2))
  valid = jnp.array([[[True, False], [False, False]], [[True, True], [True, True]]])
  utilities = jnp.where(valid, 1.0, nan)
  args = (log_p, utilities, jnp.where(valid, zeros, nan), valid, jnp.ones((2, 2, 2), jnp.int32))
  values, ess = jax.jit(jax.vmap(estimate_values))(*args)
  np.testing.assert_allclose(values, [[0.5, 0.0], [0.5, 1.0]], atol=1e-6)
  np.testing.assert_allclose(ess, [[1.0, 0.0], [1 / 0.625, 2.0]], atol=1e-5)
  for row in range(2):
    np.testing.assert_allclose(estimate_values(*(x[row] for x in args))[0], values[row], atol=1e-6)


@pytest.mark.parametrize("form", ["plain", "truncated", "self_normalised", "length_normalised"])
def test_no_likelihood_at_all_is_zero_not_nan(form):
  log_p = jnp.full((1, 2), -jnp.inf)
  ones = jnp.ones((1, 2))
  values, ess = estimate_values(log_p, ones, 0 * ones, ones > 0, ones.astype(int), form=form)
  assert float(values[0]) == 0.0 and float(ess[0]) == 0.0


def test_bad_options_are_named():
  one = jnp.zeros((1, 1))
  args = (one, one, one, one > -1, jnp.ones((1, 1), jnp.int32))
  with pytest.raises(ValueError, match="did you mean 'plain'"):
    estimate_values(*args, form="plan")
  with pytest.raises(ValueError, match="max_weight=0"):
    estimate_values(*args, max_weight=0)
