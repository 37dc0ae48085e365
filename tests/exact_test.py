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
from rredcot_jax.credit import monte_carlo
from rredcot_jax.ops import banks, types
from rredcot_jax.ops.values import FORMS, calibrate, cross_fit, estimate_values, fit_calibration

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


jitted = jax.jit(estimate_values, static_argnames="form")


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
  assert estimate(log_p, utilities, log_q, form="power", exponent=3.0) == pytest.approx((8 * 1 + 0.125 * 0.4) / 2)
  assert estimate(log_p, utilities, log_q, form="power", exponent=1.0) == estimate(log_p, utilities, log_q)
  arrays = [jnp.asarray(x, jnp.float32)[None] for x in (log_p, utilities, log_q)]
  lengths = jnp.array([[2, 1]])
  values, ess = estimate_values(*arrays, jnp.ones((1, 2), bool), lengths, form="length_normalised")
  assert float(values[0]) == pytest.approx((2**0.5 * 1 + 0.5 * 0.4) / 2)
  assert float(ess[0]) == pytest.approx((2**0.5 + 0.5) ** 2 / (2 + 0.25))


def test_long_completions_do_not_underflow():
  log_p, log_q = np.array([-2000.0, -2001.0]), np.array([-2000.5, -2000.5])
  assert estimate(log_p, [1.0, 1.0], log_q) == pytest.approx((np.exp(0.5) + np.exp(-0.5)) / 2)


def test_ratios_of_tiny_weights_keep_their_digits():
  ones, lengths = jnp.ones((1, 3)), jnp.ones((1, 3), int)
  for log_p, log_q in ((-1000.0, 0.0), (0.0, -30.0)):
    args = (log_p * ones, jnp.array([[1.0, 0, 0]]), log_q * ones, ones > 0, lengths)
    values, ess = estimate_values(*args, form="self_normalised")
    np.testing.assert_allclose([values[0], ess[0]], [1 / 3, 3], rtol=1e-6)
  np.testing.assert_allclose(estimate_values(*args)[0], np.exp(30.0) / 3, rtol=1e-5)


def test_values_carry_no_gradient():
  ones, used = jnp.ones((2, 3)), jnp.ones((2, 3), bool)
  log_p = jnp.log(jnp.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]))
  total = lambda *x: sum(jnp.sum(y) for y in estimate_values(x[0], x[1], x[2], used, used.astype(int)))
  for gradient in jax.grad(total, argnums=(0, 1, 2))(log_p, ones, 0 * ones):
    np.testing.assert_array_equal(gradient, 0)


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


@pytest.mark.parametrize("form", FORMS)
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
    estimate_values(*args, form="truncated", max_weight=0)
  with pytest.raises(ValueError, match="exponent=-1"):
    estimate_values(*args, form="power", exponent=-1)


# ---- Monte Carlo, banks of rollouts and forms: expectations by enumeration ------------------


def monte_carlo_values(rewards, return_):
  """v(s_0) .. v(s_K) from rewards [K, N] of each state's continuations."""
  shape = np.shape(rewards)
  found = monte_carlo.MonteCarloValues(
    np.array(rewards, np.float32)[None], np.array([return_], np.float32), np.array([shape[0]]), 0, 0, 0, 0.0, 0.0
  )
  return found.values[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_monte_carlo_values_and_differences_are_unbiased_with_binomial_variance(seed):
  """Over all pairs of draws from two consecutive states: E v = v, Var v = Var R / 2, E r = r; no bias at any k."""
  toy = Toy(seed, zero_share=0.5)
  first, second = (), (1,)
  draws = [[(np.exp(toy.log_prob(t, len(s))), toy.utility[t]) for t in toy.completions(s)] for s in (first, second)]
  for k in (1, 2):
    mean, square = np.zeros(2), np.zeros(2)
    for state in range(2):
      for picked in itertools.product(draws[state], repeat=k):
        probability = np.prod([p for p, _ in picked])
        value = monte_carlo_values([[u for _, u in picked]], 0.0)[0]
        mean[state] += probability * value
        square[state] += probability * value**2
    exact = [toy.value(first), toy.value(second)]
    np.testing.assert_allclose(mean, exact, atol=1e-6)
    spread = [sum(p * u**2 for p, u in d) - v**2 for d, v in zip(draws, exact)]
    np.testing.assert_allclose(square - mean**2, np.array(spread) / k, atol=1e-6)
  # Differences are linear in independent values, so that they are unbiased as well, up to the observed end.
  trace = (1, EOS)
  expected = np.zeros(2)
  for (p, u), (q, w) in itertools.product(*draws):
    values = jnp.asarray(monte_carlo_values([[u], [w]], toy.utility[trace])[:2])
    expected += p * q * np.asarray(redistribute(values, jnp.float32(toy.utility[trace]), jnp.int32(2)))
  exact = [toy.value(second) - toy.value(first), toy.utility[trace] - toy.value(second)]
  np.testing.assert_allclose(expected, exact, atol=1e-6)


@pytest.mark.parametrize("bank_size", [2, 1])
def test_a_bank_of_the_groups_rollouts_is_unbiased_if_it_holds_every_success(bank_size):
  """Over all pairs of traces: E v(s_1) = v(s_1) where utilities survive splicing and all successes have a place.

  With fewer places a trace's own suffix, of weight 1, always has one: biased then, in no fixed direction.
  """
  toy = Toy(7)
  # By how many tokens are left: a completion keeps its utility after any prefix of the same length.
  utility = lambda trace: float(len(trace) != 3)
  expected, total = {}, {}
  for own, other in itertools.product(toy.completions(()), repeat=2):
    if len(own) < 2:
      continue
    value = bank_value(group_bank([own, other], utility, toy, bank_size), own[:1], toy)
    weight = np.exp(toy.log_prob(own, 0) + toy.log_prob(other, 0))
    expected[own[0]] = expected.get(own[0], 0.0) + weight * value
    total[own[0]] = total.get(own[0], 0.0) + weight
  assert set(expected) == {1, 2}
  for token, sum_ in expected.items():
    exact = sum(np.exp(toy.log_prob(t, 1)) * utility(t) for t in toy.completions((token,)))
    if bank_size == 2:
      assert sum_ / total[token] == pytest.approx(exact, abs=1e-4)
    else:
      assert sum_ / total[token] - exact == pytest.approx({1: 0.0098, 2: -0.0199}[token], abs=1e-3)


def group_bank(group, utility, toy, bank_size):
  """`banks.make_bank("rollouts")` of two traces, a segment a token."""
  size = LENGTH + 1
  tokens, mask, log_probs = np.zeros((2, size), np.int32), np.zeros((2, size), bool), np.zeros((2, size), np.float32)
  ends = np.zeros((2, LENGTH), np.int32)
  for row, trace in enumerate(group):
    tokens[row, : len(trace)], mask[row, : len(trace)] = trace, True
    log_probs[row, : len(trace)] = [np.log(toy.next[trace[:t]][trace[t]]) for t in range(len(trace))]
    ends[row] = np.minimum(np.arange(1, LENGTH + 1), len(trace))
  lengths = mask.sum(axis=1).astype(np.int32)
  rollout = types.Rollout(tokens[:, :1], mask[:, :1], tokens, mask, log_probs, log_probs, log_probs, np.zeros(2, bool))
  segments = types.Segments(ends, np.where(mask, np.arange(size), -1), lengths, np.zeros(2, np.int32))
  references = [banks.Reference((), (), (EOS,))] * 2
  returns = np.array([utility(trace) for trace in group], np.float32)
  return banks.make_bank(
    "rollouts", references, rollout, segments, returns, np.zeros(VOCAB, int), group_size=2, bank_size=bank_size,
    max_tokens=LENGTH,
  ).completions  # fmt: skip


def bank_value(bank, prefix, toy):
  """v of row 0's state 1, the bank's completions scored by the toy; 0 where the bank is empty."""
  valid = bank.valid[0, 1]
  if not valid.any():
    return 0.0
  ids = [row[m].tolist() for row, m in zip(bank.tokens[0, 1][valid], bank.mask[0, 1][valid])]
  log_p = [toy.log_prob((*prefix, *c), len(prefix)) for c in ids]
  return estimate(log_p, bank.utilities[0, 1][valid], bank.log_q[0, 1][valid])


@pytest.mark.parametrize("seed", SEEDS)
def test_length_normalisation_has_the_other_sign(seed):
  """One reference of L > 1 tokens: p <= v, as the reference is one way among others, and p^(1/L) > p, above v too."""
  toy, above = Toy(seed), 0
  for prefix in toy.states():
    if len(prefix) > 1:
      continue
    for trace in toy.completions(prefix):
      length = len(trace) - len(prefix)
      if length < 2:
        continue
      log_p = toy.log_prob(trace, len(prefix))
      arrays = [jnp.full((1, 1), x, jnp.float32) for x in (log_p, 1.0, 0.0)]
      values, _ = jitted(*arrays, jnp.ones((1, 1), bool), jnp.full((1, 1), length), form="length_normalised")
      assert float(values[0]) == pytest.approx(np.exp(log_p / length), rel=1e-5)
      assert float(values[0]) > np.exp(log_p)
      # The value where this reference alone is right is p itself.
      above += float(values[0]) > np.exp(log_p) + 1e-6
  assert above > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_power_is_above_plain_for_one_reference_and_below_the_value_for_drawn_completions(seed):
  """The two directions of its docstring, for an exponent of 1/2, by enumeration."""
  toy, proposal = Toy(seed), Toy(seed + 100)
  for prefix in toy.states()[:3]:
    traces = toy.completions(prefix)
    log_p = [toy.log_prob(t, len(prefix)) for t in traces]
    log_q = [proposal.log_prob(t, len(prefix)) for t in traces]
    for one in log_p:
      # Where this reference alone is right, the value is p itself.
      assert estimate([one], [1.0], [0.0], form="power") == pytest.approx(np.exp(one / 2), rel=1e-5)
      assert estimate([one], [1.0], [0.0], form="power") > np.exp(one) - 1e-6
    # All completions are worth 1, so that the value is 1.
    by_draw = [estimate([p], [1.0], [q], form="power") for p, q in zip(log_p, log_q)]
    expected = np.exp(log_q) @ np.array(by_draw)
    assert expected == pytest.approx(np.sum(np.exp((np.array(log_p) + log_q) / 2)), abs=1e-5)
    assert expected < 1 + 1e-5
    assert expected < 1 - 1e-3 or len(traces) == 1


def toy_pairs(seed):
  """States of the toy whose value is the probability p of one right way on: log p, log (1 - p) and p, [S] each."""
  toy = Toy(seed)
  p = [np.exp(toy.log_prob(t, len(s))) for s in toy.states() for t in toy.completions(s)]
  p = np.array([x for x in p if 0.01 < x < 0.99])
  return np.log(p), np.log1p(-p), p


@pytest.mark.parametrize("seed", SEEDS)
def test_calibration_is_exact_where_the_value_is_a_sigmoid_of_its_features(seed):
  """sigmoid(log p - log (1 - p)) = p: with the expected return of each state the fit finds a = 0, b = 1, c = -1."""
  log_p, other, exact = toy_pairs(seed)
  arrays = [jnp.asarray(x, jnp.float32)[:, None] for x in (log_p, other[:, None])]
  used = jnp.ones((len(exact), 1), bool)
  fit = jax.jit(fit_calibration, static_argnames="num_steps")
  found = fit(*arrays, jnp.asarray(exact, jnp.float32), used, ridge=1e-4, num_steps=20)
  np.testing.assert_allclose(found, [0.0, 1.0, -1.0], atol=0.02)
  np.testing.assert_allclose(calibrate(arrays[0][:, 0], found, arrays[1][:, 0]), exact, atol=2e-3)
  # Each state by a fit that has not seen it.
  others = cross_fit(*arrays, jnp.asarray(exact, jnp.float32), used, group_size=1, ridge=1e-4, num_steps=20)
  np.testing.assert_allclose(others[:, 0], exact, atol=1e-2)


@pytest.mark.parametrize("seed", SEEDS)
def test_calibration_keeps_the_mean_of_the_returns_that_it_was_fitted_to(seed):
  """The first condition of a logistic fit, sum v = sum R, up to the prior; plain likelihoods miss it by far."""
  log_p, _, exact = toy_pairs(seed)
  returns = jnp.asarray(exact**0.3, jnp.float32)  # A value that is no likelihood: there are other ways to be right.
  found = fit_calibration(jnp.asarray(log_p, jnp.float32)[:, None], None, returns, jnp.ones((len(exact), 1), bool))
  values = calibrate(jnp.asarray(log_p, jnp.float32), found)
  assert float(values.mean()) == pytest.approx(float(returns.mean()), abs=0.01)
  assert abs(exact.mean() - float(returns.mean())) > 0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_being_made_to_leave_is_a_value_of_another_policy(seed):
  """force_exit drops p(exit | s): of all answers after one exit token it gives v(s . exit), not v(s)."""
  toy = Toy(seed)
  exit_token, prefix = 2, (1,)
  after = toy.completions((*prefix, exit_token))
  log_p = [toy.log_prob(t, len(prefix)) for t in after]
  forced = [toy.log_prob(t, len(prefix) + 1) for t in after]
  utilities, log_q = [toy.utility[t] for t in after], np.full(len(after), -np.log(len(after)))
  leave = toy.next[prefix][exit_token]
  assert estimate(forced, utilities, log_q) == pytest.approx(toy.value((*prefix, exit_token)), abs=1e-5)
  assert estimate(log_p, utilities, log_q) == pytest.approx(leave * toy.value((*prefix, exit_token)), abs=1e-5)
  assert estimate(log_p, utilities, log_q) < toy.value(prefix)
