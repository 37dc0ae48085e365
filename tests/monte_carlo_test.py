"""Values by generation: each continuation against the sampler, the values against exact enumeration."""

import dataclasses
import functools
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rredcot_jax.credit import monte_carlo
from rredcot_jax.model import continuations, decoder, sampling, scoring
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.ops import advantages, redistribution, types
from rredcot_jax.parallel import sharding

CONFIG = ModelConfig(
  vocab_size=13, width=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, mlp_width=32, qk_norm=True,
  tied_embeddings=False,
)  # fmt: skip
# Larger blocks than at the start of training, so that greedy traces do not repeat one token.
PARAMS = decoder.init(CONFIG, jax.random.key(6))
PARAMS["blocks"] = jax.tree.map(lambda x: 1.5 * x, PARAMS["blocks"])
B, P, T, K, N, EOS, PAD = 4, 5, 12, 4, 3, 1, 0
# The second prompt is one token, so that its state 0 continues an empty cache.
PROMPT_MASK = np.arange(P) >= np.array([0, 4, 2, 1])[:, None]
PROMPTS = np.where(PROMPT_MASK, np.random.default_rng(0).integers(2, 13, (B, P)), PAD).astype(np.int32)
OPTIONS = {"max_tokens": T, "eos_id": EOS, "pad_id": PAD}


def segments_at(cuts, mask):
  """Segments opened at 0 and at `cuts`, as far as each trace goes."""
  lengths = np.asarray(mask).sum(axis=1)
  ends = np.minimum([*cuts, T], lengths[:, None]).astype(np.int32)
  num = np.where(lengths > 0, 1 + (np.array(cuts) < lengths[:, None]).sum(axis=1), 0).astype(np.int32)
  ids = np.where(mask, np.searchsorted(cuts, np.arange(T), side="right"), -1).astype(np.int32)
  return types.Segments(ends=ends, segment_ids=ids, num_segments=num, num_merged=np.zeros_like(num))


@functools.cache
def case(seed=1, **options):
  """Sampled traces of different lengths, with the sampler's cache."""
  rollout, cache = sampling.sample(PARAMS, CONFIG, PROMPTS, PROMPT_MASK, jax.random.key(seed), **OPTIONS, **options)
  segments = segments_at([2, 4, 7], rollout.mask)
  return cache, rollout, jax.tree.map(jnp.asarray, segments)


def generate(cache, rollout, segments, *, k=N, **options):
  return continuations.generate_from_states(
    PARAMS, CONFIG, cache, rollout, segments, jax.random.key(7), k=k, **OPTIONS | options
  )


def states(segments):
  """(row, state, start) of every state that exists."""
  for row, num in enumerate(np.asarray(segments.num_segments)):
    for state in range(num):
      yield row, state, int(segments.starts[row, state])


def test_the_case_is_ragged():
  _, rollout, segments = case()
  lengths = np.asarray(rollout.mask).sum(axis=1)
  assert len(set(lengths.tolist())) > 2 and set(np.asarray(rollout.truncated).tolist()) == {True, False}
  assert len(set(np.asarray(segments.num_segments).tolist())) > 1


@pytest.mark.parametrize(
  "options", [{}, {"temperature": 0.7, "top_k": 10, "top_p": 0.9}, {"max_tokens": T + 3}, {"eos_id": (EOS, 3, 4)}]
)
def test_a_continuation_is_what_the_sampler_draws_from_its_prefix(options):
  """Token by token, with the same keys: cut, positions, cache, ending and room are the sampler's."""
  cache, rollout, segments = case()
  drawn, _ = generate(cache, rollout, segments, chunk_size=5, **options)
  limit = options.get("max_tokens", T)
  for row, state, start in states(segments):
    # The sampler has more room than the state leaves, so that one program does; what it wrote past that is cut.
    prefix, mask = np.zeros((N, P + T), np.int32), np.zeros((N, P + T), bool)
    prefix[:, T - start :] = np.concatenate([PROMPTS[row], rollout.tokens[row, :start]])
    mask[:, T - start :] = np.concatenate([PROMPT_MASK[row], np.ones(start, bool)])
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), row), state)
    alone = jax.device_get(sampling.sample(PARAMS, CONFIG, prefix, mask, key, **OPTIONS | options)[0])
    room = np.arange(limit) < limit - start
    here = jax.tree.map(lambda x: x[row, state], drawn)  # noqa: B023
    np.testing.assert_array_equal(here.mask, alone.mask & room)
    np.testing.assert_array_equal(here.tokens, np.where(room, alone.tokens, PAD))
    np.testing.assert_array_equal(
      here.truncated, ~np.any(np.isin(alone.tokens, options.get("eos_id", EOS)) & room, axis=1)
    )
    np.testing.assert_allclose(here.sampler_log_probs, np.where(room, alone.sampler_log_probs, 0), atol=1e-4)
  exist = np.asarray(segments.mask)
  assert exist.sum() > 8 and len(set(np.asarray(drawn.truncated)[exist].ravel().tolist())) == 2


def test_greedy_continuations_are_the_traces_own_suffixes():
  cache, rollout, segments = case(top_k=1)
  lengths = np.asarray(rollout.mask).sum(axis=1).tolist()
  assert len(set(lengths)) > 2 and all(len(set(row)) > 2 for row in np.asarray(rollout.tokens).tolist())
  drawn, _ = generate(cache, rollout, segments, k=2, top_k=1, chunk_size=3)
  for row, state, start in states(segments):
    own = np.asarray(rollout.tokens[row])[start : int(rollout.mask[row].sum())]
    for sample in range(2):
      np.testing.assert_array_equal(np.asarray(drawn.tokens[row, state, sample])[: len(own)], own)
      assert int(drawn.lengths[row, state, sample]) == len(own)
      assert bool(drawn.truncated[row, state, sample]) == bool(rollout.truncated[row])
  np.testing.assert_allclose(drawn.sampler_log_probs, 0.0, atol=1e-6)  # One token is left to draw.


def test_recorded_log_probs_are_those_of_forwarding_again():
  cache, rollout, segments = case()
  drawn, _ = jax.device_get(generate(cache, rollout, segments, temperature=0.8))
  rows, tokens, mask, recorded = [], [], [], []
  for row, state, start in states(segments):
    for sample in range(N):
      here = jax.tree.map(lambda x: x[row, state, sample], drawn)  # noqa: B023
      rows.append(row)
      tokens.append(np.concatenate([rollout.tokens[row, :start], here.tokens[: T - start]]))
      mask.append(np.arange(T) < start + here.lengths)
      recorded.append(np.concatenate([np.full(start, np.nan, np.float32), here.sampler_log_probs[: T - start]]))
  spliced = types.Rollout(
    prompt_tokens=PROMPTS[rows], prompt_mask=PROMPT_MASK[rows], tokens=np.array(tokens), mask=np.array(mask),
    log_probs=None, sampler_log_probs=None, entropy=None, truncated=None,
  )  # fmt: skip
  again, _ = scoring.trace_log_probs(PARAMS, CONFIG, spliced, temperature=0.8)
  recorded = np.array(recorded)
  own = ~np.isnan(recorded)
  assert (recorded[own] < -1).sum() > 50
  np.testing.assert_allclose(recorded[own], np.asarray(again)[own], atol=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_slots_change_nothing_but_the_steps(chunk_size):
  together, few = generate(*case())
  drawn, steps = generate(*case(), chunk_size=chunk_size)
  np.testing.assert_array_equal(drawn.tokens, together.tokens)
  np.testing.assert_array_equal(drawn.lengths, together.lengths)
  np.testing.assert_array_equal(drawn.truncated, together.truncated)
  np.testing.assert_allclose(drawn.sampler_log_probs, together.sampler_log_probs, atol=1e-5)
  by_row = np.asarray(drawn.lengths).sum(axis=(1, 2))
  if chunk_size == 1:
    assert int(steps) == by_row.max()  # A slot is never idle while its row's queue is not empty.
  assert int(few) <= int(steps) <= -(-by_row.max() // chunk_size) + T


def test_rows_do_not_see_their_neighbours():
  cache, rollout, segments = case()
  whole, _ = generate(cache, rollout, segments, chunk_size=3)
  # Row 0 gets another trace, cut elsewhere and with fewer states.
  noisy = dataclasses.replace(rollout, tokens=rollout.tokens.at[0].set(5), mask=rollout.mask.at[0].set(True))
  recut = dataclasses.replace(
    segments, ends=segments.ends.at[0].set(jnp.array([1, T, T, T])), num_segments=segments.num_segments.at[0].set(2)
  )
  noise = jax.tree.map(lambda x: x.at[:, 0].add(1.0), cache)
  other, _ = generate(noise, noisy, recut, chunk_size=3)
  np.testing.assert_array_equal(other.tokens[1:], whole.tokens[1:])
  np.testing.assert_array_equal(other.lengths[1:], whole.lengths[1:])
  assert not np.array_equal(other.tokens[0], whole.tokens[0])


def test_what_stands_behind_a_cut_is_never_read():
  cache, rollout, segments = case()
  whole, _ = generate(cache, rollout, segments)
  # The column of a state's last prefix token is run again, so even that one may hold anything for the state's branches.
  start = 4
  garbage = jax.tree.map(lambda x: x.at[:, :, :, P + start - 1 :].set(99.0), cache)
  other, _ = generate(garbage, dataclasses.replace(rollout, tokens=rollout.tokens.at[:, start:].set(7)), segments)
  exists = np.asarray(segments.num_segments) > 2
  assert exists.any()
  np.testing.assert_array_equal(other.tokens[:, :2], whole.tokens[:, :2])
  np.testing.assert_array_equal(other.tokens[exists, 2], whole.tokens[exists, 2])


def test_states_that_do_not_exist_are_not_run():
  cache, rollout, segments = case()
  rollout = dataclasses.replace(rollout, mask=rollout.mask.at[2].set(False))  # An empty trace.
  segments = jax.tree.map(jnp.asarray, segments_at([2, 4, 7], rollout.mask))
  assert int(segments.num_segments[2]) == 0
  drawn, _ = generate(cache, rollout, segments, chunk_size=4)
  missing = ~np.asarray(segments.mask)
  assert missing.sum() > K
  np.testing.assert_array_equal(np.asarray(drawn.lengths)[missing], 0)
  np.testing.assert_array_equal(np.asarray(drawn.tokens)[missing], PAD)
  np.testing.assert_array_equal(np.asarray(drawn.truncated)[missing], False)
  assert (np.asarray(drawn.lengths)[~missing] > 0).all()
  nothing = dataclasses.replace(segments, num_segments=jnp.zeros(B, jnp.int32))
  assert int(generate(cache, rollout, nothing, chunk_size=4)[1]) == 0


def test_later_samples_go_on_where_earlier_ones_stopped():
  at_once, _ = generate(*case(), k=5)
  first, _ = generate(*case(), k=2)
  rest, _ = generate(*case(), k=3, first_sample=2, chunk_size=4)
  np.testing.assert_array_equal(np.concatenate([first.tokens, rest.tokens], axis=2), at_once.tokens)
  # Samples of a state differ, and so do states of equal prefix length in different rows.
  assert len({row.tobytes() for row in np.asarray(at_once.tokens[0, 0])}) == 5


def test_sharded_over_four_devices_equals_one():
  cache, rollout, segments = case()
  alone, steps = generate(cache, rollout, segments, chunk_size=3)
  mesh = sharding.make_mesh()
  assert mesh.size == 4
  placed = sharding.put_batch(mesh, (rollout, segments))
  sharded, together = generate(jax.device_put(cache, sharding.cache(mesh, cache.key.shape)), *placed, chunk_size=3)
  assert len(sharded.tokens.sharding.device_set) == 4 and not sharded.tokens.is_fully_replicated
  np.testing.assert_array_equal(sharded.tokens, alone.tokens)
  np.testing.assert_allclose(sharded.sampler_log_probs, alone.sampler_log_probs, atol=1e-5)
  assert int(steps) == int(together)


# ---- Values, against enumeration ---------------------------------------------------------

TINY = ModelConfig(
  vocab_size=4, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24, tied_embeddings=False
)
TINY_T, SAMPLES, GROUP = 3, 2048, 8


@functools.cache
def tiny():
  """A policy over {EOS, 1, 2, 3} and two traces, of at most 3 tokens."""
  params = decoder.init(TINY, jax.random.key(5))
  prompts, mask = np.array([[0, 2], [3, 1]], np.int32), np.array([[False, True], [True, True]])
  tokens = np.array([[2, 3, 1], [1, 0, 0]], np.int32)
  trace_mask = np.array([[True, True, True], [True, True, False]])
  rollout = types.Rollout(
    prompt_tokens=prompts, prompt_mask=mask, tokens=tokens, mask=trace_mask, log_probs=np.zeros((2, 3), np.float32),
    sampler_log_probs=np.zeros((2, 3), np.float32), entropy=np.zeros((2, 3), np.float32),
    truncated=np.array([True, False]),
  )  # fmt: skip
  segments = types.Segments(
    ends=np.array([[1, 2, 3], [1, 2, 2]], np.int32), segment_ids=np.array([[0, 1, 2], [0, 1, -1]], np.int32),
    num_segments=np.array([3, 2], np.int32), num_merged=np.zeros(2, np.int32),
  )  # fmt: skip
  _, cache = decoder.forward(params, TINY, np.concatenate([prompts, tokens], 1), np.concatenate([mask, trace_mask], 1))
  return params, cache, *jax.tree.map(jnp.asarray, (rollout, segments))


def verdict(row, trace):
  """An arbitrary rule for success, the row's own."""
  return float((sum(trace) + len(trace) + row) % 3 == 0)


def judge(traces):
  return [verdict(row, trace) for row, trace in traces]


@functools.cache
def continuations_of(row, prefix):
  """Every way to go on from `prefix` with its probability, by one forward pass over all of them."""
  params, _, rollout, _ = tiny()
  room = TINY_T - len(prefix)
  ends = [
    c for n in range(1, room + 1) for c in itertools.product(range(4), repeat=n)
    if 0 not in c[:-1] and (c[-1] == 0 or n == room)
  ]  # fmt: skip
  lengths = np.array([len(prefix) + len(c) for c in ends])
  mask = np.arange(TINY_T) < lengths[:, None]
  tokens = np.array([(*prefix, *c, *[0] * (room - len(c))) for c in ends], np.int32)
  batch = types.Rollout(
    prompt_tokens=np.repeat(rollout.prompt_tokens[row : row + 1], len(ends), 0),
    prompt_mask=np.repeat(rollout.prompt_mask[row : row + 1], len(ends), 0),
    tokens=tokens, mask=mask, log_probs=None, sampler_log_probs=None, entropy=None, truncated=None,
  )  # fmt: skip
  log_probs, _ = scoring.trace_log_probs(params, TINY, batch, temperature=1.0)
  return {c: float(p) for c, p in zip(ends, np.exp(np.asarray(log_probs, np.float64)[:, len(prefix) :].sum(axis=1)))}


def exact_value(row, prefix):
  ways = continuations_of(row, prefix)
  assert sum(ways.values()) == pytest.approx(1.0, abs=1e-5)
  return sum(p * verdict(row, (*prefix, *c)) for c, p in ways.items())


TINY_OPTIONS = {"max_tokens": TINY_T, "eos_id": 0, "pad_id": 0}
TINY_RETURNS = np.array([verdict(0, (2, 3, 1)), verdict(1, (1, 0))], np.float32)


def estimate(*, k, judge=judge, **options):
  params, *rest = tiny()
  return monte_carlo.values_by_generation(
    params, TINY, *rest, TINY_RETURNS, jax.random.key(3), judge, k=k, **TINY_OPTIONS | options
  )


@functools.cache
def many():
  return estimate(k=SAMPLES, samples_per_round=SAMPLES // 2, chunk_size=256)


def tiny_states():
  _, _, rollout, segments = tiny()
  for row, state, start in states(segments):
    yield row, state, tuple(np.asarray(rollout.tokens[row])[:start].tolist())


def test_values_are_unbiased_with_binomial_variance():
  result, exact = many(), []
  for row, state, prefix in tiny_states():
    v = exact_value(row, prefix)
    exact.append(v)
    error = np.sqrt(v * (1 - v) / SAMPLES)
    assert abs(result.state_values[row, state] - v) < 4 * error
    assert result.standard_errors[row, state] == pytest.approx(error, rel=0.1)
    # Means of groups of k: dependent samples would show here and not in the mean.
    means = result.rewards[row, state].reshape(-1, GROUP).mean(axis=1)
    assert means.var(ddof=1) * GROUP / (v * (1 - v)) == pytest.approx(1, abs=4.5 * np.sqrt(2 * GROUP / SAMPLES))
  assert len(exact) == 5 and 0.05 < min(exact) < max(exact) < 0.95 and max(exact) - min(exact) > 0.1


def test_samples_of_different_states_are_independent():
  rewards = many().rewards[0]
  assert np.abs(np.corrcoef(rewards) - np.eye(3)).max() < 4 / np.sqrt(SAMPLES)


def test_whole_continuations_follow_the_policys_distribution():
  params, *rest = tiny()
  drawn, _ = continuations.generate_from_states(
    params, TINY, *rest, jax.random.key(3), k=SAMPLES, chunk_size=256, **TINY_OPTIONS
  )
  for row, state, prefix in tiny_states():
    ways = continuations_of(row, prefix)
    lengths = np.asarray(drawn.lengths[row, state])
    seen = [tuple(tokens[:n]) for tokens, n in zip(np.asarray(drawn.tokens[row, state]).tolist(), lengths)]
    assert set(seen) <= set(ways)
    counts, expected = np.array([seen.count(c) for c in ways]), SAMPLES * np.array(list(ways.values()))
    rare = expected < 5
    counts, expected = (np.append(x[~rare], x[rare].sum() + 1e-9) for x in (counts, expected))
    freedom = len(counts) - 1
    assert freedom >= 2 and ((counts - expected) ** 2 / expected).sum() < freedom + 4.5 * np.sqrt(2 * freedom)


# ---- The host's part ---------------------------------------------------------------------


def test_values_do_not_depend_on_rounds_workers_or_slots():
  plain = estimate(k=6)
  for options in ({"samples_per_round": 4}, {"samples_per_round": 2, "workers": 3}):
    other = estimate(k=6, **options)
    np.testing.assert_array_equal(other.rewards, plain.rewards)
    assert other.generated_tokens == plain.generated_tokens and other.judged == plain.judged
  first, later = estimate(k=2), estimate(k=4, first_sample=2, samples_per_round=2)
  resumed = first.joined(later)
  np.testing.assert_array_equal(resumed.rewards, plain.rewards)
  np.testing.assert_array_equal(resumed.values, plain.values)
  assert resumed.generated_tokens == plain.generated_tokens and resumed.num_samples == 6
  for cost in ("computed_tokens", "judged", "generation_seconds", "seconds"):
    assert getattr(resumed, cost) == getattr(first, cost) + getattr(later, cost) > getattr(later, cost) > 0


def test_terminal_values_are_the_returns_and_missing_states_are_masked():
  result = estimate(k=6)
  assert result.values.shape == result.standard_errors.shape == (2, 4)
  np.testing.assert_array_equal(result.values[[0, 1, 1], [3, 2, 3]], TINY_RETURNS[[0, 1, 1]])
  np.testing.assert_array_equal(result.standard_errors[[0, 1, 1], [3, 2, 3]], 0.0)
  assert np.isnan(result.rewards[1, 2]).all() and np.isfinite(result.rewards[result.exists]).all()
  assert result.state_values[1, 2] == 0 and result.successes[1, 2] == 0
  np.testing.assert_allclose(result.successes[0] / 6, result.values[0, :3], rtol=1e-6)
  assert np.isnan(estimate(k=1).standard_errors[0, 0])


def test_errors_and_successes_by_hand():
  rewards = np.array([[[1.0, 0.5, 0.0, 0.0]], [[1.0, 1.0, 1.0, 0.0]]], np.float32)
  result = monte_carlo.MonteCarloValues(rewards, np.zeros(2, np.float32), np.ones(2, np.int32), 0, 0, 0, 0.0, 0.0)
  np.testing.assert_allclose(result.standard_errors[:, 0], rewards[:, 0].std(axis=1, ddof=1) / 2, rtol=1e-6)
  assert result.successes.tolist() == [[1], [3]]  # A part of the reward is no success.


def test_the_cost_of_a_round_is_its_steps_by_the_slots_of_all_rows():
  params, *rest = tiny()
  _, steps = continuations.generate_from_states(
    params, TINY, *rest, jax.random.key(3), k=2, chunk_size=4, **TINY_OPTIONS
  )
  assert estimate(k=2, chunk_size=4).computed_tokens == int(steps) * 2 * 4


def test_values_redistribute_to_vineppo_advantages():
  _, _, _, segments = tiny()
  result = estimate(k=6)
  rewards = jax.vmap(redistribution.redistribute)(result.state_values, TINY_RETURNS, segments.num_segments)
  np.testing.assert_allclose(rewards.sum(axis=1), TINY_RETURNS - result.values[:, 0], atol=1e-6)
  to_tokens = functools.partial(advantages.token_advantages, mode="difference")
  tokens = jax.vmap(to_tokens)(rewards, TINY_RETURNS, segments)
  np.testing.assert_allclose(tokens, np.diff(result.values) * np.asarray(segments.mask), atol=1e-6)


def test_the_judge_sees_each_whole_trace_once():
  asked, lock = [], threading.Lock()

  def remember(traces):
    with lock:
      asked.extend(traces)
    return judge(traces)

  result = estimate(k=16, judge=remember, samples_per_round=4, workers=2)
  assert len(asked) == len(set(asked)) == result.judged
  possible = {(row, (*prefix, *c)) for row, _, prefix in tiny_states() for c in continuations_of(row, prefix)}
  assert set(asked) <= possible
  assert any(len(trace) == 3 and trace[-1] != 0 for _, trace in asked)
  drawn, _ = continuations.generate_from_states(tiny()[0], TINY, *tiny()[1:], jax.random.key(3), k=16, **TINY_OPTIONS)
  assert result.generated_tokens == int(drawn.lengths.sum()) <= result.computed_tokens
  assert 0 < result.generation_seconds <= result.seconds
  for row, state, prefix in tiny_states():
    for sample in range(16):
      ids = np.asarray(drawn.tokens[row, state, sample])[: int(drawn.lengths[row, state, sample])]
      assert result.rewards[row, state, sample] == verdict(row, (*prefix, *ids.tolist()))


def test_no_gradient_reaches_the_policy():
  params, *rest = tiny()

  def log_prob(params):
    drawn, _ = continuations.generate_from_states(params, TINY, *rest, jax.random.key(3), k=2, **TINY_OPTIONS)
    return drawn.sampler_log_probs.sum()

  assert all(not leaf.any() for leaf in jax.tree.leaves(jax.grad(log_prob)(params)))


def test_compiled_equals_eager():
  params, *rest = tiny()
  draw = lambda: continuations.generate_from_states(params, TINY, *rest, jax.random.key(3), k=2, **TINY_OPTIONS)
  compiled, steps = draw()
  with jax.disable_jit():
    eager, eager_steps = draw()
  np.testing.assert_array_equal(compiled.tokens, eager.tokens)
  np.testing.assert_array_equal(compiled.lengths, eager.lengths)
  np.testing.assert_allclose(compiled.sampler_log_probs, eager.sampler_log_probs, atol=1e-4)
  assert int(steps) == int(eager_steps)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"k": 0}, "k=0"),
    ({"k": 1, "workers": 0}, "workers=0"),
    ({"k": 1, "first_sample": -1}, "first_sample=-1"),
    ({"k": 1, "chunk_size": 0}, "chunk_size=0"),
    ({"k": 1, "max_tokens": 2}, "max_tokens=2"),
    ({"k": 1, "judge": lambda traces: [0.0]}, "the judge was asked for"),
    ({"k": 1, "judge": lambda traces: [np.nan] * len(traces)}, "the judge was asked for"),
  ],
)
def test_bad_options_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    estimate(**options)


def test_estimates_of_other_traces_are_not_joined():
  result = estimate(k=2)
  with pytest.raises(ValueError, match="cannot be joined"):
    result.joined(dataclasses.replace(result, returns=1 - result.returns))
