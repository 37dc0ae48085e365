"""What goes wrong when the public operations are called wrongly: a ValueError that names the argument and the fix.

Shapes and types are refused eagerly, under jit and under vmap. Values can be read only where they are
concrete: under jit they must do no harm.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rredcot_jax as rr

K, N, T, S, P = 3, 2, 6, 2, 2
F32 = jnp.float32


def segments():
  return rr.Segments(
    ends=jnp.array([2, 4, 6]), segment_ids=jnp.array([0, 0, 1, 1, 2, 2]), num_segments=jnp.int32(3),
    num_merged=jnp.int32(0),
  )  # fmt: skip


def rows(tree, count=2):
  return jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * count), tree)


def bank():
  used = jnp.ones((K, N, S), bool)
  ones = jnp.ones((K, N))
  return rr.Completions(jnp.ones((K, N, S), jnp.int32), used, used, ones, 0 * ones, ones > 0)


def rollout():
  used, floats = jnp.ones(T, bool), jnp.zeros(T)
  return rr.Rollout(
    prompt_tokens=jnp.ones(P, jnp.int32), prompt_mask=jnp.ones(P, bool), tokens=jnp.ones(T, jnp.int32), mask=used,
    log_probs=floats, sampler_log_probs=floats, entropy=floats, truncated=jnp.bool_(False),
  )  # fmt: skip


def train_batch():
  ids, used, floats = jnp.ones((2, T), jnp.int32), jnp.ones((2, T), bool), jnp.zeros((2, T))
  return rr.TrainBatch(ids, used, ids, used, used, floats, floats, floats, floats)


def causal(params, tokens, positions, mask):
  del params, positions
  return jnp.broadcast_to(jnp.float32(0.0), (*tokens.shape, 5)) + 0.0 * jnp.any(mask)


# Every operation with arguments that it takes.
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
  "estimate_values": (
    rr.estimate_values,
    dict(log_p=jnp.full((K, N), -1.0), utilities=jnp.ones((K, N)), log_q=jnp.zeros((K, N)),
         valid=jnp.ones((K, N), bool), lengths=jnp.ones((K, N), int)),
  ),
  "state_values": (rr.state_values, dict(values=jnp.zeros(K), return_=F32(1), num_segments=jnp.int32(3))),
  "redistribute": (rr.redistribute, dict(values=jnp.zeros(K), return_=F32(1), num_segments=jnp.int32(3))),
  "group_advantages": (rr.group_advantages, dict(returns=jnp.array([0.0, 1.0, 1.0]))),
  "zero_variance": (rr.zero_variance, dict(returns=jnp.array([0.0, 1.0, 1.0]))),
  "sigma": (rr.sigma, dict(rewards=jnp.ones(K), group_advantage=F32(1), segments=segments())),
  "token_advantages": (rr.token_advantages, dict(rewards=jnp.ones(K), group_advantage=F32(1), segments=segments())),
  "generalised_advantages": (
    lambda **x: rr.generalised_advantages(**x, decay=0.9),
    dict(values=jnp.zeros(T), return_=F32(1), mask=jnp.ones(T, bool)),
  ),
  "calibrate": (rr.calibrate, dict(log_p=jnp.zeros(K), coefficients=jnp.zeros(2))),
  "fit_calibration": (
    rr.fit_calibration,
    dict(log_p=jnp.zeros((2, K)), features=jnp.zeros((2, K, 1)), returns=jnp.array([0.0, 1.0]),
         mask=jnp.ones((2, K), bool)),
  ),
  "credit_from_values": (
    lambda **x: rr.credit_from_values(**x, group_size=2, mode="signed"),
    dict(values=jnp.zeros((2, K)), segments=rows(segments()), returns=jnp.array([0.0, 1.0]), uniform_rows=None),
  ),
  "credit_from_log_probs": (
    lambda **x: rr.credit_from_log_probs(**x, group_size=2, mode="signed"),
    dict(log_p=jnp.full((2, K, N), -1.0), bank=rows(bank()), segments=rows(segments()), returns=jnp.array([0.0, 1.0])),
  ),
  "score_generic": (
    lambda **x: rr.score_generic(causal, None, **x, temperature=1.0),
    dict(rollout=rows(rollout()), segments=rows(segments()), completions=rows(bank())),
  ),
  "score_tree": (
    lambda **x: rr.score_tree(causal, None, **x, temperature=1.0),
    dict(rollout=rows(rollout()), segments=rows(segments()), completions=rows(bank())),
  ),
  "policy_loss": (
    lambda **x: rr.policy_loss(**x, loss="grpo", kl="k3", importance="token")[0],
    dict(log_probs=jnp.zeros((2, T)), batch=train_batch()),
  ),
  "loss_mask": (
    lambda **x: rr.loss_mask(**x, mask_truncated=True, filter_zero_variance=True),
    dict(mask=jnp.ones((2, T), bool), truncated=jnp.zeros(2, bool), zero_variance=jnp.zeros(2, bool)),
  ),
}  # fmt: skip


def changed(name, argument, change):
  """The arguments of a call with one of them changed; "segments.ends" is a field of an argument."""
  function, arguments = CALLS[name]
  whole, _, field = argument.partition(".")
  old = arguments[whole]
  new = dataclasses.replace(old, **{field: change(getattr(old, field))}) if field else change(old)
  return function, arguments | {whole: new}


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_are_right_before_they_are_spoilt(name):
  function, arguments = CALLS[name]
  eager = function(**arguments)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(eager))
  jax.tree.map(np.testing.assert_allclose, jax.jit(function)(**arguments), eager)


extra_axis = lambda x: jnp.asarray(x)[None]
whole_number = lambda x: jnp.asarray(x).astype(jnp.int32)
real_number = lambda x: x.astype(jnp.float32)
as_list = lambda x: [*x]
first_axis_0 = lambda x: x[:0]
one_short = lambda x: x[:-1]

STATIC = [
  # Wrong ranks.
  ("estimate_values", "log_p", extra_axis, r"log_p has shape \(1, 3, 2\) and must be \[K, N\], of rank 2; vmap"),
  ("estimate_values", "valid", lambda x: x[0], r"valid has shape \(2,\) and must be \[K, N\]"),
  ("redistribute", "values", extra_axis, r"values has shape \(1, 3\) and must be \[K\], of rank 1; vmap"),
  ("state_values", "return_", extra_axis, r"return_ has shape \(1,\) and must be \[\]"),
  ("redistribute", "num_segments", extra_axis, r"num_segments has shape \(1,\) and must be \[\]"),
  ("group_advantages", "returns", extra_axis, r"returns has shape \(1, 3\) and must be \[G\].*vmap"),
  ("zero_variance", "returns", extra_axis, r"returns has shape \(1, 3\)"),
  ("sigma", "rewards", extra_axis, r"rewards has shape \(1, 3\) and must be \[K\]"),
  ("token_advantages", "group_advantage", extra_axis, r"group_advantage has shape \(1,\)"),
  ("token_advantages", "segments.segment_ids", extra_axis, r"segment_ids has shape \(1, 6\) and must be \[T\]"),
  ("generalised_advantages", "values", extra_axis, r"values has shape \(1, 6\) and must be \[T\]"),
  ("credit_from_values", "values", lambda x: x[0], r"values has shape \(3,\) and must be \[B, K\]"),
  ("credit_from_values", "segments.ends", lambda x: x[0], r"segments.ends has shape \(3,\) and must be \[B, K\]"),
  ("credit_from_log_probs", "log_p", lambda x: x[..., 0], r"log_p has shape \(2, 3\) and must be \[B, K, N\]"),
  ("credit_from_log_probs", "returns", extra_axis, r"returns has shape \(1, 2\) and must be \[B\]"),
  ("score_tree", "rollout.tokens", lambda x: x[0], r"rollout.tokens has shape \(6,\) and must be \[B, T\]"),
  ("score_generic", "completions.tokens", lambda x: x[:, 0], r"completions.tokens has shape .* \[B, K, N, S\]"),
  ("policy_loss", "log_probs", lambda x: x[0], r"log_probs has shape \(6,\) and must be \[B, T\]"),
  ("policy_loss", "batch.advantages", lambda x: x[:, 0], r"advantages has shape \(2,\) and must be \[B, T\]"),
  ("loss_mask", "truncated", extra_axis, r"truncated has shape \(1, 2\) and must be \[B\]"),
  # Shapes that do not belong together.
  ("estimate_values", "utilities", one_short, r"utilities has shape \(2, 2\) and must have \(3, 2\), as log_p"),
  ("estimate_values", "lengths", lambda x: x[:, :1], r"lengths has shape \(3, 1\) and must have \(3, 2\)"),
  ("sigma", "rewards", one_short, r"rewards has shape \(2,\) and must have \(3,\), as segments.ends does"),
  ("generalised_advantages", "mask", one_short, r"mask has shape \(5,\) and must have \(6,\), as values does"),
  ("calibrate", "coefficients", one_short, r"coefficients has shape \(1,\) and must have \(2,\)"),
  ("fit_calibration", "features", one_short, r"features has shape \(1, 3, 1\) and must have \(2, 3, any\)"),
  ("fit_calibration", "returns", one_short, r"returns has shape \(1,\) and must have \(2,\)"),
  ("credit_from_values", "returns", one_short, "group_size=2 does not divide the 1 traces"),
  ("credit_from_values", "values", lambda x: x[:, :-1], r"values has shape \(2, 2\) and must have \(2, 3\)"),
  ("credit_from_log_probs", "log_p", lambda x: x[..., :1], r"utilities has shape .* and must have \(2, 3, 1\)"),
  ("credit_from_log_probs", "log_p", lambda x: x[:, :-1], r"log_p has shape \(2, 2, 2\) and must have \(2, 3, any\)"),
  ("score_tree", "rollout.tokens", lambda x: x[:, :-1], r"rollout.tokens has shape \(2, 5\) and must have \(2, 6\)"),
  ("score_tree", "completions.scored", lambda x: x[..., :1], r"completions.scored has shape \(2, 3, 2, 1\)"),
  ("policy_loss", "batch.old_log_probs", lambda x: x[:, :1], r"old_log_probs has shape \(2, 1\) and must have"),
  ("policy_loss", "batch.sampler_log_probs", lambda x: x[:, :1], r"sampler_log_probs has shape \(2, 1\)"),
  ("loss_mask", "zero_variance", one_short, r"zero_variance has shape \(1,\) .* as the traces of mask"),
  # Integers for floats, floats for integers and for masks.
  ("redistribute", "return_", whole_number, r"return_ is int32 and must be floating: pass jnp.asarray\(return_"),
  ("state_values", "values", whole_number, "values is int32 and must be floating"),
  ("group_advantages", "returns", whole_number, "returns is int32 and must be floating"),
  ("sigma", "rewards", whole_number, "rewards is int32 and must be floating"),
  ("token_advantages", "group_advantage", whole_number, "group_advantage is int32 and must be floating"),
  ("generalised_advantages", "return_", whole_number, "return_ is int32 and must be floating"),
  ("credit_from_values", "returns", whole_number, "returns is int32 and must be floating"),
  ("credit_from_log_probs", "returns", whole_number, "returns is int32 and must be floating"),
  ("estimate_values", "log_p", whole_number, "log_p is int32 and must be floating"),
  ("estimate_values", "lengths", real_number, r"lengths is float32 and must be integer: pass lengths.astype"),
  ("estimate_values", "valid", real_number, "valid is float32 and must be boolean: pass valid != 0"),
  ("redistribute", "num_segments", real_number, "num_segments is float32 and must be integer"),
  ("sigma", "segments.segment_ids", real_number, "segments.segment_ids is float32 and must be integer"),
  ("score_generic", "rollout.tokens", real_number, "rollout.tokens is float32 and must be integer"),
  ("score_tree", "rollout.prompt_tokens", real_number, "rollout.prompt_tokens is float32 and must be integer"),
  ("score_tree", "completions.tokens", real_number, "completions.tokens is float32 and must be integer"),
  ("score_tree", "rollout.prompt_mask", real_number, "rollout.prompt_mask is float32 and must be boolean"),
  ("policy_loss", "batch.loss_mask", real_number, "loss_mask is float32 and must be boolean"),
  ("policy_loss", "log_probs", whole_number, "log_probs is int32 and must be floating"),
  ("loss_mask", "mask", real_number, "mask is float32 and must be boolean"),
  ("generalised_advantages", "mask", real_number, "mask is float32 and must be boolean"),
  # Lists for arrays.
  ("estimate_values", "log_p", as_list, r"log_p is a list and must be an array \[K, N\]: pass jnp.asarray\(log_p\)"),
  ("redistribute", "values", as_list, r"values is a list and must be an array \[K\]: pass jnp.asarray\(values\)"),
  ("group_advantages", "returns", as_list, "returns is a list"),
  ("sigma", "rewards", as_list, "rewards is a list"),
  ("credit_from_values", "returns", as_list, "returns is a list"),
  ("credit_from_log_probs", "log_p", as_list, "log_p is a list"),
  ("policy_loss", "log_probs", as_list, "log_probs is a list"),
  # Nothing at all.
  ("redistribute", "values", first_axis_0, r"values has shape \(0,\): there must be room for at least one state"),
  ("group_advantages", "returns", first_axis_0, "A group of 0 has no group-relative advantage"),
  ("group_advantages", "returns", lambda x: x[:1], "A group of 1 has no group-relative advantage"),
]  # fmt: skip


@pytest.mark.parametrize("name, argument, change, message", STATIC)
def test_shapes_and_types_are_refused_everywhere(name, argument, change, message):
  function, arguments = changed(name, argument, change)
  positional = lambda values: function(**dict(zip(arguments, values)))
  values = tuple(arguments.values())
  with pytest.raises(ValueError, match=message):
    positional(values)
  with pytest.raises(ValueError, match=message):
    jax.jit(positional)(values)
  with pytest.raises(ValueError, match=message):
    jax.vmap(positional)(rows(values))
  with pytest.raises(ValueError, match=message):
    jax.jit(jax.vmap(positional))(rows(values))


@pytest.mark.parametrize("shape", [(0, N), (K, 0)])
def test_no_states_and_no_completions_are_refused(shape):
  zeros = jnp.zeros(shape)
  arguments = (zeros, zeros, zeros, zeros > 0, zeros.astype(int))
  for call in (rr.estimate_values, jax.jit(rr.estimate_values)):
    with pytest.raises(ValueError, match=r"log_p has shape .* at least one state \(K\) and one completion \(N\)"):
      call(*arguments)
  nothing = jax.tree.map(lambda x: x[..., :0] if x.ndim == 1 else x, segments())
  nothing = dataclasses.replace(nothing, segment_ids=segments().segment_ids)
  with pytest.raises(ValueError, match="room for no segment: K must be at least 1"):
    rr.sigma(jnp.zeros(0), 1.0, nothing)
  empty = jax.tree.map(lambda x: x[:, :, :0], rows(bank()))
  with pytest.raises(ValueError, match=r"completions.tokens has shape \(2, 3, 0, 2\)"):
    rr.score_tree(causal, None, rows(rollout()), rows(segments()), empty, temperature=1.0)


put = lambda *place, to: lambda x: x.at[place].set(to)
VALUES = [
  ("estimate_values", "utilities", put(1, 1, to=-1.0), r"utilities\[1, 1\] = -1.0 must be finite and >= 0"),
  ("estimate_values", "utilities", put(1, 1, to=jnp.nan), r"utilities\[1, 1\] = nan must be finite and >= 0"),
  ("estimate_values", "utilities", put(1, 1, to=jnp.inf), r"utilities\[1, 1\] = inf must be finite and >= 0"),
  ("estimate_values", "log_q", put(2, 0, to=jnp.nan), r"log_q\[2, 0\] = nan must be finite"),
  ("estimate_values", "log_p", put(0, 1, to=0.75), r"log_p\[0, 1\] = 0.75 must be <= 0"),
  ("credit_from_log_probs", "bank.utilities", put(1, 2, 0, to=-2.0), r"utilities\[1, 2, 0\] = -2.0 must be finite"),
  ("credit_from_log_probs", "log_p", put(1, 2, 0, to=0.5), r"log_p\[1, 2, 0\] = 0.5 must be <= 0"),
  ("redistribute", "num_segments", lambda x: x + 1, r"num_segments=4 must lie in \[0, 3\]"),
  ("state_values", "num_segments", lambda x: x - 4, r"num_segments=-1 must lie in \[0, 3\]"),
  ("credit_from_values", "segments.num_segments", put(1, to=9), r"segments.num_segments\[1\] = 9 must lie in \[0, 3\]"),
  ("sigma", "segments.segment_ids", put(3, to=0), r"segment_ids\[3\] = 0 must not be less than the id of an earlier"),
  ("token_advantages", "segments.segment_ids", put(5, to=3), r"segments.segment_ids\[5\] = 3 must lie in \[-1, 3\)"),
  ("token_advantages", "segments.segment_ids", put(0, to=-2), r"segments.segment_ids\[0\] = -2 must lie in \[-1, 3\)"),
  ("credit_from_values", "segments.segment_ids", put(1, 4, to=0), r"segments.segment_ids\[1, 4\] = 0 must not be less"),
  ("fit_calibration", "returns", put(0, to=2.0), r"returns\[0\] = 2.0 must lie in \[0, 1\]"),
  ("score_generic", "rollout.prompt_mask", put(1, to=False), r"rollout.prompt_mask\[1\] is all False"),
  ("score_tree", "rollout.prompt_mask", put(1, to=False), r"rollout.prompt_mask\[1\] is all False"),
]  # fmt: skip


@pytest.mark.parametrize("name, argument, change, message", VALUES)
def test_values_are_refused_where_they_can_be_read_and_harmless_elsewhere(name, argument, change, message):
  function, arguments = changed(name, argument, change)
  with pytest.raises(ValueError, match=message):
    function(**arguments)
  host = jax.tree.map(np.asarray, arguments)
  with pytest.raises(ValueError, match=message):
    function(**host)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.jit(function)(**arguments)))


def test_padding_in_a_trace_is_no_decreasing_id():
  ids = jnp.array([-1, 0, -1, 1, 2, -1])
  rr.sigma(jnp.ones(K), 1.0, dataclasses.replace(segments(), segment_ids=ids))


@pytest.mark.parametrize("temperature", [0, 0.0, -0.5, float("nan")])
@pytest.mark.parametrize("score", [rr.score_generic, rr.score_tree])
def test_a_temperature_must_be_positive(score, temperature):
  arguments = (rows(rollout()), rows(segments()), rows(bank()))
  with pytest.raises(ValueError, match=f"temperature={temperature} must be > 0"):
    score(causal, None, *arguments, temperature=temperature)
