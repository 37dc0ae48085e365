"""Scores from any model: by hand, and one forward over a tree of completions against every prefix run again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rredcot_jax.ops import scoring, types

B, P, T, K, N, S, V = 3, 4, 9, 4, 2, 5, 11
TEMPERATURE = 0.7


# ---- Models ----------------------------------------------------------------------------------


def causal(mask):
  """[M, C, C] bool of a row's real tokens [M, C]: what a model without a tree's mask does."""
  return jnp.logical_and(mask[:, None], jnp.tril(jnp.ones((mask.shape[1],) * 2, bool))[None])


def bag(params, tokens, positions, mask):
  """Logits of the sum over what is attended to: one place too many or too few shows."""
  turns = jnp.cos(params["frequencies"][None, None] * (1.0 + positions[..., None]))
  return jnp.einsum("mij,mjd,vd->miv", mask.astype(jnp.float32), params["embedding"][tokens] * turns, params["head"])


@functools.cache
def bag_params():
  keys = jax.random.split(jax.random.key(0), 2)
  width = 8
  return {
    "embedding": 0.5 * jax.random.normal(keys[0], (V, width)),
    "head": jax.random.normal(keys[1], (V, width)),
    "frequencies": jnp.arange(1.0, width + 1),
  }


@functools.cache
def decoder_models():
  """Our decoder's parameters, the decoder with attention under any mask, and as it is."""
  pytest.importorskip("flax", reason="flax is not installed: the operations do not need it, the decoder does")
  import helpers

  from rredcot_jax.model import decoder

  config = helpers.FAMILIES["qwen3"]

  def tree_decoder(params, tokens, positions, mask):
    def attend(query, key, value, carry, layer):
      groups = config.num_heads // config.num_kv_heads
      key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
      scores = jnp.einsum("mihd,mjhd->mhij", query, key) / np.sqrt(config.head_dim)
      weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
      return jnp.einsum("mhij,mjhd->mihd", weights, value), carry, None

    return decoder.logits(params, decoder._run(params, config, tokens, positions, attend, None)[0])

  def plain_decoder(params, tokens, positions, mask):
    del positions  # Our decoder counts them from the mask.
    return decoder.logits(params, decoder.forward(params, config, tokens, mask)[0])

  return helpers.params_of(config), tree_decoder, plain_decoder


def model_named(name):
  """Parameters, a model under a tree's mask, the same under a row's."""
  if name == "decoder":
    return decoder_models()
  return bag_params(), bag, lambda params, t, p, m: bag(params, t, p, causal(m))


# ---- Rows ------------------------------------------------------------------------------------


@functools.cache
def case():
  """Prompts padded on the left, traces of 9, 5 and 1 tokens cut in 4, 2 and 1 places, completions of 1 to 5 tokens."""
  rng = np.random.default_rng(0)
  prompt_mask = np.arange(P) >= np.array([0, 3, 1])[:, None]
  lengths = np.array([9, 5, 1])
  mask = np.arange(T) < lengths[:, None]
  ends = np.array([[2, 3, 7, 9], [4, 5, 5, 5], [1, 1, 1, 1]], np.int32)
  number = np.array([4, 2, 1], np.int32)
  ids = np.stack([np.searchsorted(e[:n], np.arange(T), side="right") for e, n in zip(ends, number)])
  floats = np.zeros((B, T), np.float32)
  draw = lambda *shape: rng.integers(0, V, shape).astype(np.int32)  # Also where there is padding.
  rollout = types.Rollout(
    prompt_tokens=draw(B, P), prompt_mask=prompt_mask, tokens=draw(B, T), mask=mask, log_probs=floats,
    sampler_log_probs=floats, entropy=floats, truncated=np.zeros(B, bool),
  )  # fmt: skip
  segments = types.Segments(
    ends=ends, segment_ids=np.where(mask, ids, -1).astype(np.int32), num_segments=number, num_merged=0 * number
  )
  completion_mask = np.arange(S) < rng.integers(1, S + 1, (B, K, N))[..., None]
  completions = types.Completions(
    tokens=draw(B, K, N, S), mask=completion_mask,
    scored=completion_mask & (np.arange(S) >= rng.integers(0, 2, (B, K, N))[..., None]),
    utilities=np.ones((B, K, N), np.float32), log_q=np.zeros((B, K, N), np.float32), valid=rng.random((B, K, N)) < 0.8,
  )  # fmt: skip
  return jax.tree.map(jnp.asarray, (rollout, segments, completions))


def tree(name, rows, **options):
  params, model, _ = model_named(name)
  return scoring.score_tree(model, params, *rows, temperature=TEMPERATURE, **options)


def generic(name, rows):
  params, _, model = model_named(name)
  return scoring.score_generic(model, params, *rows, temperature=TEMPERATURE)


def by_hand(rows):
  """Each completion's log-probability under the bag of tokens, one token at a time in float64."""
  rollout, segments, bank = jax.tree.map(np.asarray, rows)
  params = jax.tree.map(np.float64, bag_params())
  starts = np.asarray(segments.starts)
  result = np.zeros((B, K, N))
  for b, k, n in np.ndindex(B, K, N):
    if k >= segments.num_segments[b] or not bank.valid[b, k, n]:
      continue
    seen = [*rollout.prompt_tokens[b][rollout.prompt_mask[b]], *rollout.tokens[b, : starts[b, k]]]
    for token, counts in zip(bank.tokens[b, k, n][bank.mask[b, k, n]], bank.scored[b, k, n]):
      x = sum(params["embedding"][t] * np.cos(params["frequencies"] * (1 + i)) for i, t in enumerate(seen))
      logits = params["head"] @ x / TEMPERATURE
      result[b, k, n] += counts * (logits[token] - np.log(np.exp(logits).sum()))
      seen.append(token)
  return result


def test_both_scores_are_those_by_hand():
  rows = case()
  expected = by_hand(rows)
  assert (expected < -1).sum() > 8 and (expected == 0).sum() > 8
  np.testing.assert_allclose(generic("bag", rows), expected, atol=1e-4)
  np.testing.assert_allclose(tree("bag", rows), expected, atol=1e-4)


@pytest.mark.parametrize(
  "name, chunk_size", [*(("bag", size) for size in (None, 1, 3, 8, 100)), ("decoder", None), ("decoder", 3)]
)
def test_a_tree_equals_every_prefix_run_again(name, chunk_size):
  rows = case()
  expected = generic(name, rows)
  scored = jax.jit(functools.partial(tree, name, chunk_size=chunk_size))(rows)
  assert scored.shape == (B, K, N) and scored.dtype == jnp.float32
  np.testing.assert_allclose(scored, expected, atol=1e-5)


def test_one_bank_for_all_states():
  rollout, segments, bank = case()
  one = jax.tree.map(lambda x: x[:, :1], bank)
  spread = jax.tree.map(lambda x: jnp.broadcast_to(x[:, :1], x.shape), bank)
  for score in (tree, generic):
    np.testing.assert_allclose(
      score("bag", (rollout, segments, one)), score("bag", (rollout, segments, spread)), atol=1e-5
    )


def test_a_rollout_of_tokens_and_masks_is_enough():
  rollout, segments, completions = case()
  bare = types.Rollout(rollout.prompt_tokens, rollout.prompt_mask, rollout.tokens, rollout.mask)
  params, _, plain = model_named("bag")
  expected = tree("bag", case())
  np.testing.assert_array_equal(tree("bag", (bare, segments, completions)), expected)
  again = scoring.score_generic(plain, params, bare, segments, completions, temperature=TEMPERATURE)
  np.testing.assert_allclose(again, expected, atol=1e-5)


def test_completions_of_one_token_need_no_branch():
  rollout, segments, bank = case()
  cut = lambda x: x[..., :1] if x.ndim == 4 else x
  short = jax.tree.map(cut, bank)
  short = dataclasses.replace(short, scored=short.mask)
  rows = (rollout, segments, short)
  lengths = []

  def model(params, tokens, positions, mask):
    lengths.append(tokens.shape[1])
    return bag(params, tokens, positions, mask)

  found = scoring.score_tree(model, bag_params(), *rows, temperature=TEMPERATURE)
  np.testing.assert_allclose(found, by_hand(rows), atol=1e-4)
  assert lengths == [P + T]


def test_the_mask_and_the_positions_of_a_tree():
  """A prompt of one real token and one of padding, a trace of two, two branches of two tokens cut at 0 and 1."""
  mask = jnp.array([[False, True, True, True]])
  found, positions = scoring._tree(mask, jnp.array([[2, 3]]), 2)
  expected = [
    [1, 0, 0, 0, 0, 0, 0, 0],
    [0, 1, 0, 0, 0, 0, 0, 0],
    [0, 1, 1, 0, 0, 0, 0, 0],
    [0, 1, 1, 1, 0, 0, 0, 0],
    [0, 1, 0, 0, 1, 0, 0, 0],
    [0, 1, 0, 0, 1, 1, 0, 0],
    [0, 1, 1, 0, 0, 0, 1, 0],
    [0, 1, 1, 0, 0, 0, 1, 1],
  ]
  np.testing.assert_array_equal(found[0].astype(int), expected)
  np.testing.assert_array_equal(positions[0], [0, 0, 1, 2, 1, 2, 2, 3])


def test_neither_neighbours_nor_padding_reach_a_score():
  rollout, segments, bank = case()
  before = np.asarray(tree("bag", (rollout, segments, bank)))
  # Another completion of the same state, a token behind the cut, another row, and everything masked.
  other = dataclasses.replace(bank, tokens=bank.tokens.at[0, 1, 0].add(1).at[1].add(1) % V)
  other = dataclasses.replace(other, tokens=jnp.where(bank.mask, other.tokens, 3))
  later = dataclasses.replace(
    rollout,
    tokens=jnp.where(rollout.mask, rollout.tokens, 7).at[0, 3:].add(1) % V,
    prompt_tokens=jnp.where(rollout.prompt_mask, rollout.prompt_tokens, 5),
  )
  after = np.asarray(tree("bag", (later, segments, other)))
  # Row 0: states 0, 1 and 2 are cut before token 3.
  kept = np.ones((B, K, N), bool)
  kept[0, 1, 0] = kept[0, 3] = kept[1] = False
  np.testing.assert_allclose(after[kept], before[kept], atol=1e-6)
  changed = np.asarray(bank.valid & segments.mask[..., None]) & ~kept
  assert (np.abs(after - before)[changed] > 1e-3).any()


def test_no_gradient_flows():
  params, model, plain = model_named("bag")
  for score, apply in ((scoring.score_tree, model), (scoring.score_generic, plain)):
    total = lambda p, score=score, apply=apply: jnp.sum(score(apply, p, *case(), temperature=1.0))
    for gradient in jax.tree.leaves(jax.grad(total)(params)):
      np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("score", [tree, generic])
def test_what_sampling_refuses_is_refused(score, monkeypatch):
  rollout, segments, bank = case()
  for temperature in (0.0, -1.0):
    monkeypatch.setattr("ops_scoring_test.TEMPERATURE", temperature)
    with pytest.raises(ValueError, match=f"temperature={temperature} must be > 0"):
      score("bag", (rollout, segments, bank))
  monkeypatch.undo()
  empty = dataclasses.replace(rollout, prompt_mask=rollout.prompt_mask.at[2].set(False))
  with pytest.raises(ValueError, match=r"prompt_mask\[2\] is all False"):
    score("bag", (empty, segments, bank))
  none = dataclasses.replace(
    rollout, prompt_tokens=rollout.prompt_tokens[:, :0], prompt_mask=rollout.prompt_mask[:, :0]
  )
  with pytest.raises(ValueError, match="prompt_tokens has no column"):
    score("bag", (none, segments, bank))


def test_bad_chunks_are_named():
  with pytest.raises(ValueError, match="chunk_size=0 must be at least 1"):
    tree("bag", case(), chunk_size=0)


def test_positions_count_real_tokens():
  mask = jnp.array([[False, False, True, True, True, False], [True] * 6])
  np.testing.assert_array_equal(scoring.positions_of(mask), [[0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5]])
