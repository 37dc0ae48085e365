"""Attributions against numpy, against brute force, and against exact value differences."""

import dataclasses
import functools
import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FAMILIES, params_of, plain

from rredcot_jax import token_advantages
from rredcot_jax.credit import attention, attribution, input_gradients, leave_one_out, source
from rredcot_jax.credit.sources import SOURCES
from rredcot_jax.model import decoder
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.ops import banks, types

CONFIG = dataclasses.replace(FAMILIES["qwen3"], vocab_size=23)  # Untied: a row of the table is an input alone.
B, P, T, K, S = 4, 4, 9, 4, 4
EOS, EXIT = 0, (20, 21)
TEMPERATURE = 0.8
PROMPTS = (4, 2, 3, 1)
TRACES = (  # Exit in the middle; none; none, truncated, with pieces of one; exit first.
  (5, 6, 7, 8, 9, 20, 21, 10, EOS),
  (4, 5, 6, 7, 8, EOS),
  (5, 6, 20, 7, 21, 8, 9, 10, 20),
  (20, 21, 5, EOS),
)
THOUGHTS = (5, 5, 9, 0)
ENDS = ((2, 4, 7, 9), (3, 6, 6, 6), (1, 4, 6, 9), (2, 4, 4, 4))
NUM_SEGMENTS = (4, 2, 4, 2)
ENDINGS = ((20, 21, 11, EOS), (20, 21, EOS), (20, 21, 12, EOS), (20, 21, 13, EOS))
UNSCORED = (0, 0, 2, 0)


def pad(rows, width, left=False):
  tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
  for b, row in enumerate(rows):
    place = slice(width - len(row), None) if left else slice(0, len(row))
    tokens[b, place], mask[b, place] = row, True
  return tokens, mask


def traces_of(prompts, traces, ends, num_segments, endings, truncated, unscored):
  batch = len(traces)
  prompt_tokens, prompt_mask = pad(prompts, max(map(len, prompts)), left=True)
  tokens, mask = pad(traces, max(map(len, traces)))
  ids = [np.searchsorted(e[:n], np.arange(tokens.shape[1]), side="right") for e, n in zip(ends, num_segments)]
  rollout = types.Rollout(
    prompt_tokens=prompt_tokens,
    prompt_mask=prompt_mask,
    tokens=tokens,
    mask=mask,
    log_probs=np.zeros(tokens.shape, np.float32),
    sampler_log_probs=np.zeros(tokens.shape, np.float32),
    entropy=np.zeros(tokens.shape, np.float32),
    truncated=np.array(truncated),
  )
  segments = types.Segments(
    ends=np.array(ends, np.int32),
    segment_ids=np.where(mask, np.stack(ids), -1).astype(np.int32),
    num_segments=np.array(num_segments, np.int32),
    num_merged=np.zeros(batch, np.int32),
  )
  answer, answer_mask = pad(endings, max(map(len, endings)))
  scored = answer_mask & (np.arange(answer.shape[1]) >= np.array(unscored)[:, None])
  completions = types.Completions(
    tokens=answer[:, None, None],
    mask=answer_mask[:, None, None],
    scored=scored[:, None, None],
    utilities=np.ones((batch, 1, 1), np.float32),
    log_q=np.zeros((batch, 1, 1), np.float32),
    valid=np.ones((batch, 1, 1), bool),
  )
  return jax.tree.map(jnp.asarray, (rollout, segments, completions))


@functools.cache
def case():
  prompts = [tuple(range(19 - n, 19)) for n in PROMPTS]
  return params_of(CONFIG), *traces_of(
    prompts, TRACES, ENDS, NUM_SEGMENTS, ENDINGS, [False, False, True, False], UNSCORED
  )


# Each with the options that it takes beside a likelihood's temperature.
FUNCTIONS = {
  "leave_one_out": (leave_one_out.leave_one_out, {"temperature", "space", "chunk_size"}),
  "gradient_x_input": (input_gradients.gradient_x_input, {"temperature", "space"}),
  "integrated_gradients": (input_gradients.integrated_gradients, {"temperature", "space", "steps"}),
  "attention": (attention.attention, {"chunk_size"}),
  "attention_rollout": (attention.attention_rollout, {"chunk_size"}),
}


def ask_eagerly(name, *trace, config=CONFIG, exit_ids=EXIT, temperature=TEMPERATURE, **options):
  params, rollout, segments, completions = trace or case()
  function, takes = FUNCTIONS[name]
  if "temperature" in takes:
    options["temperature"] = temperature
  return function(params, config, rollout, segments, completions, exit_ids=exit_ids, **options)


ask = jax.jit(ask_eagerly, static_argnames=("name", "config", "exit_ids", "space", "chunk_size", "steps"))


@functools.cache
def credit(name, **options):
  return np.asarray(ask(name, *case(), **options))


def context(b, without=None):
  """Prompt and thought of row b as a list of ids, the tokens of a segment left out."""
  _, rollout, segments, _ = case()
  prompt = np.asarray(rollout.prompt_tokens[b])[np.asarray(rollout.prompt_mask[b])]
  kept = [t for t in range(THOUGHTS[b]) if int(segments.segment_ids[b, t]) != without]
  return [*prompt.tolist(), *(TRACES[b][t] for t in kept)]


def log_likelihood(params, ids, ending, unscored, temperature=TEMPERATURE):
  """log p(ending | ids) in float64, one unpadded sequence."""
  logits = plain(params, CONFIG, np.array([*ids, *ending])) / temperature
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return sum(log_probs[len(ids) - 1 + i, ending[i]] for i in range(unscored, len(ending)))


def with_embeddings(change):
  """The parameters with another table of embeddings, float64 on the host."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), case()[0])
  return {**params, "embedding": change(params["embedding"].copy())}


def thought_tokens(b, k):
  return [t for t in range(THOUGHTS[b]) if int(case()[2].segment_ids[b, t]) == k]


def test_the_thought_ends_at_the_first_whole_exit_or_before_the_end_of_sequence():
  rollout = case()[1]
  np.testing.assert_array_equal(attribution.thought_lengths(rollout, EXIT), THOUGHTS)
  np.testing.assert_array_equal(attribution.thought_lengths(rollout, ()), [8, 5, 9, 3])
  np.testing.assert_array_equal(attribution.thought_lengths(rollout, tuple(range(T + 1))), [8, 5, 9, 3])
  whole = dataclasses.replace(rollout, truncated=jnp.ones(B, bool))
  np.testing.assert_array_equal(attribution.thought_lengths(whole, EXIT), [5, 6, 9, 0])
  # Two exits: the first. An exit that only padding would complete: none.
  twice = dataclasses.replace(rollout, tokens=rollout.tokens.at[0, :2].set(jnp.array(EXIT)))
  assert int(attribution.thought_lengths(twice, EXIT)[0]) == 0
  tail = dataclasses.replace(whole, tokens=whole.tokens.at[1, 5:7].set(jnp.array(EXIT)))
  assert int(attribution.thought_lengths(tail, EXIT)[1]) == 6


def test_an_exit_that_segments_know_is_the_thoughts_end_however_it_is_spelled():
  _, rollout, segments, completions = case()
  lengths = np.asarray(rollout.mask).sum(axis=1)
  exits = np.array(
    [t if t < n and TRACES[b][t : t + 2] == EXIT else n for b, (t, n) in enumerate(zip(THOUGHTS, lengths))]
  )
  known = dataclasses.replace(segments, thought_end=jnp.asarray(exits))
  same, plain = (attribution.lay_out(rollout, x, completions, jnp.array(EXIT)) for x in (known, segments))
  jax.tree.map(np.testing.assert_array_equal, same, plain)
  other = attribution.lay_out(rollout, known, completions, jnp.array([17, 18, 19]))  # Not as the traces spell it.
  jax.tree.map(np.testing.assert_array_equal, other, plain)


def test_of_the_completions_of_all_states_the_last_of_the_thought_is_explained():
  _, _, segments, completions = case()
  rng = np.random.default_rng(0)
  each = jax.tree.map(lambda x: rng.integers(0, 9, (B, K, *x.shape[2:])), jax.device_get(completions))
  starts, num_segments = np.asarray(segments.starts), np.asarray(segments.num_segments)
  left = np.array([starts[b, n - 1] if n > 1 else 99 for b, n in enumerate(num_segments)])
  cut = dataclasses.replace(
    segments, thought_end=left - (np.arange(B) % 2)
  )  # Before the last segment, or within the one before.
  last = [max(int(n) - 1 - (b % 2 and n > 1), 0) for b, n in enumerate(num_segments)]
  found = attribution.after_thought(each, cut)
  for b in range(B):
    jax.tree.map(lambda ours, all_: np.testing.assert_array_equal(ours[b, 0], all_[b, last[b]]), found, each)  # noqa: B023
  assert attribution.after_thought(completions, cut) is completions  # One for all states.


@pytest.mark.parametrize("space", attribution.SPACES)
def test_leave_one_out_is_a_shorter_thought_tokenised_again(space):
  params = case()[0]
  unit = np.exp if space == "probability" else lambda x: x
  ours = credit("leave_one_out", space=space)
  compared = 0
  for b in range(B):
    whole = unit(log_likelihood(params, context(b), ENDINGS[b], UNSCORED[b]))
    for k in range(K):
      if not thought_tokens(b, k):
        assert ours[b, k] == 0
        continue
      shorter = context(b, without=k)
      assert len(shorter) < len(context(b))
      expected = whole - unit(log_likelihood(params, shorter, ENDINGS[b], UNSCORED[b]))
      unit_of_row = 1 if space == "log" else whole
      assert ours[b, k] == pytest.approx(expected, rel=1e-3, abs=1e-4 * unit_of_row)
      compared += abs(expected) > 1e-2 * unit_of_row
  assert compared >= 7


def test_spaces_of_leave_one_out_rank_alike():
  log, probability = credit("leave_one_out", space="log"), credit("leave_one_out", space="probability")
  for b in range(3):
    some = [k for k in range(K) if thought_tokens(b, k)]
    np.testing.assert_array_equal(np.argsort(log[b, some]), np.argsort(probability[b, some]))
    whole = np.exp(log_likelihood(case()[0], context(b), ENDINGS[b], UNSCORED[b]))
    np.testing.assert_allclose(probability[b, some], whole * -np.expm1(-log[b, some]), rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("space", attribution.SPACES)
def test_gradient_x_input_is_the_derivative_of_scaling_a_segment(space):
  ours = credit("gradient_x_input", space=space)
  unit = np.exp if space == "probability" else lambda x: x
  step = 1e-4
  for b in range(2):  # Their tokens are all different, so that an embedding's row is one input.
    for k in range(K):
      ids = [TRACES[b][t] for t in thought_tokens(b, k)]

      def scaled(factor, ids=ids):
        def change(table):
          table[ids] *= factor
          return table

        return change

      moved = [
        unit(log_likelihood(with_embeddings(scaled(1 + h)), context(b), ENDINGS[b], UNSCORED[b])) for h in (step, -step)
      ]
      assert ours[b, k] == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=1e-3, abs=1e-6)
  assert np.abs(ours[:2]).max() > (1e-2 if space == "log" else 1e-6)


def test_gradient_x_input_in_probability_is_p_times_that_in_log():
  likelihood = np.exp([log_likelihood(case()[0], context(b), ENDINGS[b], UNSCORED[b]) for b in range(B)])
  log, probability = credit("gradient_x_input", space="log"), credit("gradient_x_input", space="probability")
  np.testing.assert_allclose(probability, likelihood[:, None] * log, rtol=1e-3, atol=1e-9)


@functools.cache
def token_integrals(steps):
  params, rollout, segments, completions = case()
  layout = attribution.lay_out(rollout, segments, completions, EXIT)
  integrate = jax.jit(input_gradients._token_integrated_gradients, static_argnums=(1, 4, 5))
  return np.asarray(integrate(params, CONFIG, layout, TEMPERATURE, "log", steps), np.float64)


def test_integrated_gradients_are_complete():
  def gain(b):
    def blank(table):
      table[context(b)] = table.mean(axis=0)
      return table

    whole = log_likelihood(case()[0], context(b), ENDINGS[b], UNSCORED[b])
    return whole - log_likelihood(with_embeddings(blank), context(b), ENDINGS[b], UNSCORED[b])

  gaps = {steps: max(abs(token_integrals(steps)[b].sum() - gain(b)) for b in range(2)) for steps in (2, 16, 64)}
  assert abs(gain(0)) > 0.1 and abs(gain(1)) > 0.1
  assert gaps[64] < 1e-3 < 1e-1 < gaps[2]
  assert gaps[64] < gaps[16] < gaps[2]


def test_integrated_gradients_are_summed_over_a_segments_thought():
  tokens, ours = token_integrals(64), credit("integrated_gradients", steps=64)
  np.testing.assert_array_equal(tokens[:, P + T :], 0)
  assert np.abs(tokens[0, :P]).min() > 1e-4  # The prompt has its share, and no segment gets it.
  for b in range(B):
    expected = [tokens[b, [P + t for t in thought_tokens(b, k)]].sum() for k in range(K)]
    np.testing.assert_allclose(ours[b], expected, atol=1e-5)


def numpy_attention(params, config, tokens):
  """[L, C, C] head-averaged weights of one unpadded sequence, softmax written out; Llama without extras."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  norm = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale
  half, size = config.head_dim // 2, len(tokens)
  angle = np.arange(size)[:, None] * config.rope_theta ** (-np.arange(half) / half)
  turn = lambda x: np.concatenate(
    [
      x[:, :half] * np.cos(angle) - x[:, half:] * np.sin(angle),
      x[:, half:] * np.cos(angle) + x[:, :half] * np.sin(angle),
    ],
    axis=1,
  )
  x, layers = p["embedding"][tokens], []
  for layer in range(config.num_layers):
    block = {name: value[layer] for name, value in p["blocks"].items()}
    y, mixed, heads = norm(x, block["attention_norm"]), 0.0, []
    for head in range(config.num_heads):
      shared = head // (config.num_heads // config.num_kv_heads)
      scores = turn(y @ block["query"][:, head]) @ turn(y @ block["key"][:, shared]).T / config.head_dim**0.5
      weights = np.where(np.tril(np.ones((size, size))) > 0, np.exp(scores), 0)
      heads.append(weights / weights.sum(axis=1, keepdims=True))
      mixed = mixed + heads[-1] @ (y @ block["value"][:, shared]) @ block["out"][head]
    x = x + mixed
    y = norm(x, block["mlp_norm"])
    gate = y @ block["gate"]
    x = x + (gate / (1 + np.exp(-gate)) * (y @ block["up"])) @ block["down"]
    layers.append(np.mean(heads, axis=0))
  return np.stack(layers)


@functools.cache
def llama_case():
  config = dataclasses.replace(FAMILIES["llama"], vocab_size=23)
  return config, (params_of(config), *case()[1:])


def test_attention_weights_equal_a_numpy_softmax_padded_on_either_side():
  config, (params, *_) = llama_case()
  tokens = np.random.default_rng(3).integers(0, 23, 7)
  expected = numpy_attention(params, config, tokens)
  for left in (0, 2):
    padded = np.pad(tokens, (left, 2 - left), constant_values=5)[None].astype(np.int32)
    mask = ((np.arange(9) >= left) & (np.arange(9) < left + 7))[None]
    weights = np.asarray(decoder.attention_weights(params, config, padded, mask))
    assert weights.shape == (config.num_layers, 1, 9, 9)
    np.testing.assert_allclose(weights[:, 0, left : left + 7, left : left + 7], expected, atol=1e-5)
    np.testing.assert_allclose(weights.sum(-1)[:, mask], 1, atol=1e-6)
    np.testing.assert_array_equal(weights[:, 0, ~mask[0]], 0)
    np.testing.assert_array_equal(weights[:, 0][:, mask[0]][:, :, ~mask[0]], 0)


@pytest.mark.parametrize("name", ["attention", "attention_rollout"])
def test_attention_credit_equals_explicit_matrix_products(name):
  config, trace = llama_case()
  ours = np.asarray(ask(name, *trace, config=config))
  for b in range(B):
    ids = context(b)
    weights = numpy_attention(trace[0], config, [*ids, *ENDINGS[b]])
    matrix = weights[-1]
    if name == "attention_rollout":
      matrix = np.eye(len(matrix))
      for layer in weights:
        matrix = (0.5 * layer + 0.5 * np.eye(len(matrix))) @ matrix
      np.testing.assert_allclose(matrix.sum(axis=1), 1)
    per_token = matrix[len(ids) + UNSCORED[b] :].mean(axis=0)
    prompt = PROMPTS[b]
    expected = [sum(per_token[prompt + t] for t in thought_tokens(b, k)) for k in range(K)]
    np.testing.assert_allclose(ours[b], expected, atol=1e-5)
  assert (ours >= 0).all() and (ours.sum(axis=1) < 1).all() and ours[0, :3].min() > 0.01


@pytest.mark.parametrize("name", FUNCTIONS)
def test_credit_is_float32_and_0_where_nothing_was_thought(name):
  ours = credit(name)
  assert ours.shape == (B, K) and ours.dtype == np.float32 and np.isfinite(ours).all()
  thought = np.array([[bool(thought_tokens(b, k)) for k in range(K)] for b in range(B)])
  assert thought.tolist() == [[True, True, True, False], [True, True, False, False], [True] * 4, [False] * 4]
  np.testing.assert_array_equal(ours[~thought], 0)
  assert (ours[thought] != 0).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_equals_eager(name):
  options = {"steps": 4} if name == "integrated_gradients" else {}
  np.testing.assert_allclose(ask_eagerly(name, **options), credit(name, **options), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_do_not_see_their_neighbours_nor_padding(name):
  params, rollout, segments, completions = case()
  one = lambda tree: jax.tree.map(lambda x: x[1:2], tree)
  alone = ask(name, params, one(rollout), one(segments), one(completions))
  np.testing.assert_allclose(alone[0], credit(name)[1], rtol=1e-3, atol=1e-6)
  garbage = (
    dataclasses.replace(
      rollout,
      tokens=jnp.where(rollout.mask, rollout.tokens, 7),
      prompt_tokens=jnp.where(rollout.prompt_mask, rollout.prompt_tokens, 8),
    ),
    segments,
    dataclasses.replace(completions, tokens=jnp.where(completions.mask, completions.tokens, 9)),
  )
  np.testing.assert_allclose(ask(name, params, *garbage), credit(name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_follows_the_thought_does_not_matter(name):
  params, rollout, segments, completions = case()
  other = dataclasses.replace(rollout, tokens=rollout.tokens.at[0, 7].set(3))
  assert rollout.tokens[0, 7] != 3 and rollout.mask[0, 7]
  np.testing.assert_array_equal(ask(name, params, other, segments, completions)[0], credit(name)[0])


@pytest.mark.parametrize(
  ("name", "chunk_size"),
  [("leave_one_out", 1), ("leave_one_out", 3), ("leave_one_out", 99), ("attention", 3), ("attention_rollout", 1)],
)
def test_chunks_change_nothing(name, chunk_size):
  np.testing.assert_allclose(credit(name, chunk_size=chunk_size), credit(name), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_row_without_a_completion_has_no_credit(name):
  params, rollout, segments, completions = case()
  empty = dataclasses.replace(
    completions,
    valid=completions.valid.at[0].set(False),
    mask=completions.mask.at[0].set(False),
    scored=completions.scored.at[0].set(False),
  )
  ours = np.asarray(ask(name, params, rollout, segments, empty))
  np.testing.assert_array_equal(ours[0], 0)
  np.testing.assert_allclose(ours[1:], credit(name)[1:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["leave_one_out", "gradient_x_input", "attention_rollout"])
def test_no_gradient_reaches_the_policy(name):
  gradient = jax.grad(lambda p: ask(name, p, *case()[1:]).sum())(case()[0])
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_credit_trains_through_the_advantages(name):
  _, rollout, segments, _ = case()
  spread = jax.vmap(functools.partial(token_advantages, mode="magnitude"))
  tokens = np.asarray(spread(jnp.asarray(credit(name)), jnp.full(B, 2.0), segments))
  mask = np.asarray(rollout.mask)
  np.testing.assert_array_equal(tokens[~mask], 0)
  np.testing.assert_allclose(tokens.sum(axis=1), 2 * mask.sum(axis=1), rtol=1e-5)
  np.testing.assert_allclose(tokens[3, :4], 2.0)  # No thought, no credit: GRPO.
  assert len(set(tokens[2].tolist())) == 4


def test_bad_options_are_named():
  params, rollout, segments, completions = case()
  for name, (_, takes) in FUNCTIONS.items():
    if "space" in takes:
      with pytest.raises(ValueError, match="did you mean 'log'"):
        ask_eagerly(name, space="logs")
    if "chunk_size" in takes:
      with pytest.raises(ValueError, match="chunk_size=0"):
        ask_eagerly(name, chunk_size=0)
  with pytest.raises(ValueError, match="steps=0"):
    ask_eagerly("integrated_gradients", steps=0)
  two = jax.tree.map(lambda x: jnp.concatenate([x, x], axis=2), completions)
  for name in FUNCTIONS:
    with pytest.raises(ValueError, match="have 2 for each of 1 states"):
      ask_eagerly(name, params, rollout, segments, two)


def test_every_attribution_is_a_source():
  built_in = {name for name, kind in SOURCES.items() if issubclass(kind, attribution.Attribution)}
  assert built_in == set(FUNCTIONS)
  # A space is an option where there is a likelihood to measure, and there alone.
  spaces = {name for name in built_in if SOURCES[name].default_space is not None}
  assert spaces == {name for name, (_, takes) in FUNCTIONS.items() if "space" in takes}
  # A source without options has the space that its function has.
  for name in spaces:
    kind, (function, _) = SOURCES[name], FUNCTIONS[name]
    defaults = [inspect.signature(one).parameters["space"].default for one in (kind.__init__, function)]
    assert defaults == [kind.default_space] * 2


def test_the_base_class_says_what_a_method_has_to_have():
  with pytest.raises(TypeError, match=r"abstract.*attribute.*forward_passes"):
    attribution.Attribution(setting_of())


def setting_of(make_bank=None, chunk_size=None):
  """As much of `source.Setting` as an attribution reads."""
  return SimpleNamespace(
    model=CONFIG, temperature=TEMPERATURE, chunk_size=chunk_size, make_bank=make_bank, put=lambda tree: tree,
    codec=SimpleNamespace(exit_ids=list(EXIT)),
  )  # fmt: skip


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("leave_one_out", {"space": "log"}), ("leave_one_out", {}), ("gradient_x_input", {"space": "probability"}),
    ("integrated_gradients", {"space": "probability", "steps": 3}), ("attention", {}), ("attention_rollout", {}),
  ],
)  # fmt: skip
def test_a_source_gives_the_credit_of_its_function_with_its_options(name, options):
  """Of the last completion of each thought, among those of all states; a row without one has no sample behind it."""
  params, rollout, segments, completions = case()
  segments = dataclasses.replace(segments, thought_end=jnp.asarray([5, 5, 9, 0]))
  last = np.maximum((np.asarray(segments.mask) & ~np.asarray(segments.after_exit)).sum(axis=1) - 1, 0)
  assert last.max() > 1
  own = (np.arange(K) == last[:, None])[:, :, None]
  each = jax.tree.map(
    lambda x: np.where(own.reshape(B, K, *[1] * (x.ndim - 2)), x, x[::-1]), jax.device_get(completions)
  )
  each = dataclasses.replace(each, valid=each.valid & (np.arange(B) != 1)[:, None, None])
  fallback = np.array([False, True, False, False])
  bank = banks.Bank(each, fallback, 0)
  method = SOURCES[name](setting_of(make_bank=lambda batch: bank), **options)
  batch = source.Batch(params, None, rollout, segments, np.zeros(B, np.float32), [None] * B, None)
  found = method.assign(batch)
  expected = np.where((np.arange(B) == 1)[:, None], 0, credit(name, **options))
  np.testing.assert_allclose(found.rewards, expected, rtol=1e-3, atol=1e-6)
  assert (np.asarray(found.rewards)[[0, 2]] != 0).any(axis=1).all()
  np.testing.assert_array_equal(found.sample_sizes, np.asarray(segments.mask) & (np.arange(B) != 1)[:, None])
  np.testing.assert_array_equal(found.uniform_rows, bank.uniform_rows)


# A language model small enough to enumerate: a Markov chain in which every state's value is known.
#
#   q -> a1 1/2, b1 1/2;  a1 -> a2 0.9, b2 0.1;  b1 -> a2 0.2, b2 0.8;  a2 -> exit 0.8, else gives up;  b2 -> exit 0.3
#   v(a2) = 0.8, v(b2) = 0.3, v(a1) = 0.75, v(b1) = 0.4, v(q) = 0.575, after the exit the answer is right.
Q, A1, B1, A2, B2, LEAVE, RIGHT = range(1, 8)
VALUES = {Q: 0.575, A1: 0.75, B1: 0.4, A2: 0.8, B2: 0.3}
CHAIN = {
  EOS: {EOS: 1.0}, Q: {A1: 0.5, B1: 0.5}, A1: {A2: 0.9, B2: 0.1}, B1: {A2: 0.2, B2: 0.8},
  A2: {LEAVE: 0.8, EOS: 0.2}, B2: {LEAVE: 0.3, EOS: 0.7}, LEAVE: {RIGHT: 1.0}, RIGHT: {EOS: 1.0},
}  # fmt: skip
TOY = ModelConfig(
  vocab_size=8, width=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=4, tied_embeddings=False
)
PAIRS = [(A1, A2), (A1, B2), (B1, A2), (B1, B2)]


@functools.cache
def toy():
  """The chain as a decoder: layers add nothing and attend uniformly; the head reads log p off one-hot inputs."""
  table = np.full((8, 8), 1e-7)
  for token, following in CHAIN.items():
    for next_token, probability in following.items():
      table[token, next_token] = probability
  params = decoder.init(TOY, jax.random.key(0))
  silent = {name: jnp.zeros_like(params["blocks"][name]) for name in ("query", "key", "out", "down")}
  params = {
    **params,
    "blocks": {**params["blocks"], **silent},
    "embedding": jnp.eye(8) * 8**0.5,
    "head": jnp.asarray(np.log(table).T / 8**0.5, jnp.float32),
  }
  traces = [(first, second, LEAVE, RIGHT, EOS) for first, second in PAIRS]
  trace = traces_of([(Q,)] * 4, traces, [(1, 2, 5)] * 4, [3] * 4, [(LEAVE, RIGHT, EOS)] * 4, [False] * 4, [0] * 4)
  return params, *trace


def toy_credit(name, **options):
  """[4, 2] credit of the two thought segments, a row for each of PAIRS."""
  credit = np.asarray(ask(name, *toy(), config=TOY, exit_ids=(LEAVE,), temperature=1.0, **options))
  np.testing.assert_array_equal(credit[:, 2], 0)
  return credit[:, :2]


def expectation(per_pair, first=None):
  """E[credit], given the first token or over all."""
  weights = np.array([CHAIN[Q][a] * CHAIN[a][b] * (first in (None, a)) for a, b in PAIRS])
  return weights @ per_pair / weights.sum()


def test_the_toys_values_are_exact():
  for state, value in VALUES.items():
    if state in (A2, B2):
      assert value == CHAIN[state][LEAVE]
    else:
      assert value == pytest.approx(sum(p * VALUES[token] for token, p in CHAIN[state].items()))
  exact = np.array([[VALUES[a] - VALUES[Q], VALUES[b] - VALUES[a]] for a, b in PAIRS])
  np.testing.assert_allclose(expectation(exact), 0, atol=1e-12)
  assert expectation(exact, first=A1)[0] == pytest.approx(0.175)


def test_leave_one_out_is_not_an_unbiased_estimate_of_value_differences():
  """It sees no effect of a segment through the next, and credits the last with everything."""
  ours = toy_credit("leave_one_out")
  np.testing.assert_allclose(ours, [[0, 0.8], [0, 0.3], [0, 0.8], [0, 0.3]], atol=1e-5)
  # The first step truly moves the value by +-0.175; whatever comes after it, it gets nothing.
  assert expectation(ours, first=A1)[0] == pytest.approx(0.0, abs=1e-5)
  assert expectation(ours, first=B1)[0] == pytest.approx(0.0, abs=1e-5)
  # The second has no expected effect, E[v(s_2) - v(s_1)] = 0, and gets v(s_1): biased up by 0.75 and 0.4. Where it
  # was the mistake (a1 to b2, truly -0.45) it is praised with +0.3.
  assert expectation(ours, first=A1)[1] == pytest.approx(0.75, abs=1e-5)
  assert expectation(ours, first=B1)[1] == pytest.approx(0.4, abs=1e-5)
  assert expectation(ours)[1] == pytest.approx(0.575, abs=1e-5)
  assert ours[1, 1] == pytest.approx(0.3, abs=1e-5) and VALUES[B2] - VALUES[A1] == pytest.approx(-0.45)


def test_gradients_of_the_toy_see_its_last_token_alone():
  # RMSNorm does not see the scale of an input that nothing was added to.
  np.testing.assert_allclose(toy_credit("gradient_x_input"), 0, atol=1e-4)
  params = toy()[0]
  blank = np.asarray(params["head"], np.float64).sum(axis=1)  # The mean of one-hot inputs is all ones once normalised.
  blank = blank[LEAVE] - np.log(np.exp(blank).sum())
  ours = toy_credit("integrated_gradients", steps=128)
  expected = np.array([[0, np.log(CHAIN[b][LEAVE]) - blank] for _, b in PAIRS])
  np.testing.assert_allclose(ours, expected, atol=1e-3)
  assert expectation(ours)[1] > 1  # Against 0 of the exact differences.


def test_attention_of_the_toy_counts_tokens():
  # Uniform attention: the completion's three rows see 4, 5 and 6 tokens. Right and wrong steps get the same.
  np.testing.assert_allclose(toy_credit("attention"), (1 / 4 + 1 / 5 + 1 / 6) / 3, atol=1e-6)


def test_attention_rollout_by_hand():
  params, rollout, segments, completions = toy()
  short = jax.tree.map(lambda x: x[..., :1] if x.ndim == 4 else x, completions)
  ours = ask("attention_rollout", params, rollout, segments, short, config=TOY, exit_ids=(LEAVE,), temperature=1.0)
  # M = (A + I) / 2 with uniform A; its last row is [1/8, 1/8, 1/8, 5/8], and the two layers' product has there
  first = 1 / 8 * 3 / 4 + 1 / 8 * 1 / 6 + 5 / 8 * 1 / 8  # from columns 1 of rows 1, 2 and 3,
  second = 1 / 8 * 2 / 3 + 5 / 8 * 1 / 8  # and from columns 2 of rows 2 and 3.
  np.testing.assert_allclose(ours, np.tile([first, second, 0], (4, 1)), atol=1e-6)
