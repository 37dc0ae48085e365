"""Placement by name, and the two updates on every kind of mesh against one device."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import IN_CHUNKS, UPDATE_MODEL, UPDATES, make_batch, make_state
from jax.sharding import PartitionSpec as P

from rredcot_jax.cost import hlo
from rredcot_jax.model import decoder, sampling, scoring
from rredcot_jax.ops import types
from rredcot_jax.parallel import sharding
from rredcot_jax.train import train_step

MESHES = [
  {"data": 2, "fsdp": 2},
  {"data": 1, "fsdp": 2, "tensor": 2},
  {"data": 1, "fsdp": 2, "sequence": 2},
]


@functools.cache
def alone(name):
  """The update on one device."""
  return jax.jit(UPDATES[name])(make_state(), make_batch())


@pytest.mark.parametrize("axes", MESHES)
@pytest.mark.parametrize("name", UPDATES)
def test_an_update_on_a_mesh_equals_one_device(name, axes):
  mesh = sharding.make_mesh(**axes)
  state = make_state()
  placement = sharding.infer(mesh, state)
  update = sharding.on(
    mesh,
    jax.jit(
      UPDATES[name],
      in_shardings=(placement, sharding.batch(mesh)),
      out_shardings=(placement, sharding.replicated(mesh)),
    ),
  )
  together, metrics = update(jax.device_put(state, placement), sharding.put_batch(mesh, make_batch()))
  expected, expected_metrics = alone(name)
  assert len(together.params["blocks"]["query"].sharding.device_set) == 4
  assert together.params["blocks"]["query"].addressable_shards[0].data.size < state.params["blocks"]["query"].size
  moved = jax.tree.map(lambda new, old: float(jnp.abs(new - old).max()), expected.params, state.params)
  assert min(moved["embedding"], moved["head"], *moved["blocks"].values()) > 1e-5
  for ours, theirs in zip(jax.tree.leaves((together, metrics)), jax.tree.leaves((expected, expected_metrics))):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("axes", MESHES)
def test_the_head_is_gathered_once_whatever_the_number_of_chunks(axes):
  mesh = sharding.make_mesh(**axes)
  state, batch = make_state(), sharding.put_batch(mesh, make_batch())
  placement = sharding.infer(mesh, state)

  def sent(chunk):
    """Bytes a device sends in an update."""
    update = functools.partial(UPDATES["policy"], config=IN_CHUNKS[chunk])
    with sharding.use(mesh):
      step = jax.jit(update, in_shardings=(placement, sharding.batch(mesh)), out_shardings=(placement, None))
      counts = hlo.count(step.lower(state, batch).compile().as_text())
    return sum(counts.collective_bytes.values())

  assert abs(sent(1) - sent(4)) < UPDATE_MODEL.vocab_size * UPDATE_MODEL.width * 4, (sent(1), sent(4))


def test_parameters_and_their_moments_are_placed_by_name():
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2)
  state = jax.eval_shape(
    lambda: train_step.init_state(decoder.init(UPDATE_MODEL, jax.random.key(0)), optax.adamw(1e-3))
  )
  placed = sharding.infer(mesh, state)
  for tree in (placed.params, placed.opt_state[0].mu, placed.opt_state[0].nu):
    blocks = {name: leaf.spec for name, leaf in tree["blocks"].items()}
    assert tree["embedding"].spec == tree["head"].spec == P("tensor", "fsdp")
    assert blocks["query"] == blocks["key"] == blocks["value"] == P(None, "fsdp", "tensor", None)
    assert blocks["out"] == P(None, "tensor", None, "fsdp")
    assert blocks["gate"] == blocks["up"] == P(None, "fsdp", "tensor")
    assert blocks["down"] == P(None, "tensor", "fsdp")
    assert blocks["query_bias"] == blocks["mlp_norm"] == tree["final_norm"].spec == P()
  assert placed.step.spec == placed.opt_state[0].count.spec == P()


def test_an_axis_that_does_not_divide_is_left_out():
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=4)
  leaf = jax.ShapeDtypeStruct((2, 16, 2, 4), jnp.float32)  # Two key heads, four devices.
  assert sharding.infer(mesh, {"key": leaf, "query": leaf})["key"].spec == P(None, "fsdp", None, None)
  # Two columns of a layer split in two, and not in four.
  mesh = sharding.make_mesh(data=1, fsdp=2, sequence=2)
  narrow, wide = (jax.ShapeDtypeStruct((1, width, 4), jnp.float32) for width in (2, 4))
  assert sharding.infer(mesh, {"gate": narrow})["gate"].spec == P(None, "fsdp", "tensor")
  assert sharding.infer(mesh, {"gate": wide})["gate"].spec == P(None, ("fsdp", "sequence"), "tensor")


def test_batches_and_caches_split_their_rows():
  mesh = sharding.make_mesh(data=2, fsdp=2)
  rows = sharding.put_batch(mesh, np.arange(8.0).reshape(4, 2))
  assert [shard.data.shape for shard in rows.addressable_shards] == [(1, 2)] * 4
  np.testing.assert_array_equal(rows, np.arange(8.0).reshape(4, 2))
  shape = (2, 4, 2, 6, 4)
  assert shard_shapes(jax.device_put(np.zeros(shape), sharding.cache(mesh, shape))) == {(2, 1, 2, 6, 4)}
  mesh = sharding.make_mesh(data=1, tensor=2, sequence=2)
  assert shard_shapes(jax.device_put(np.zeros(shape), sharding.cache(mesh, shape))) == {(2, 4, 1, 3, 4)}


@pytest.mark.parametrize("rows", [3, 6])
def test_a_batch_that_does_not_divide_is_refused(rows):
  mesh = sharding.make_mesh(data=2, fsdp=2)
  with pytest.raises(ValueError, match=f"a batch of {rows} rows does not split over 4"):
    sharding.put_batch(mesh, {"tokens": np.zeros((rows, 2))})


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1}, {"fsdp": 3}, {"tensor": 8}])
def test_a_mesh_that_does_not_cover_the_devices_is_refused(axes):
  with pytest.raises(ValueError, match="devices and there are 4"):
    sharding.make_mesh(**axes)


def test_data_takes_the_devices_that_are_left():
  assert dict(sharding.make_mesh(fsdp=2).shape) == {"data": 2, "fsdp": 2, "tensor": 1, "sequence": 1}


def test_parameters_split_over_the_sequence_axis_too():
  mesh = sharding.make_mesh(data=1, fsdp=2, sequence=2)
  placed = sharding.infer(mesh, jax.eval_shape(lambda: decoder.init(UPDATE_MODEL, jax.random.key(0))))
  assert placed["blocks"]["gate"].spec == P(None, ("fsdp", "sequence"), "tensor")
  assert placed["embedding"].spec == P("tensor", ("fsdp", "sequence"))


def test_a_layout_has_the_same_devices_in_the_same_order():
  mesh = sharding.make_mesh(data=2, fsdp=2)
  other = sharding.relayout(mesh, data=-1, tensor=2)
  assert dict(other.shape) == {"data": 2, "fsdp": 1, "tensor": 2, "sequence": 1}
  assert list(other.devices.flat) == list(mesh.devices.flat)
  assert sharding.relayout(mesh, data=0) is mesh
  with pytest.raises(ValueError, match="needs 8 devices and there are 4"):
    sharding.relayout(mesh, data=8)


def shard_shapes(array):
  return {shard.data.shape for shard in array.addressable_shards}


def test_constraints_need_no_mesh_and_leave_out_what_does_not_divide():
  x = jnp.zeros((4, 6, 3))
  assert sharding.constrain(x, "rows", "tokens", "heads") is x
  mesh = sharding.make_mesh(data=1, fsdp=2, sequence=2)
  with sharding.use(mesh):
    placed = jax.jit(lambda x: sharding.constrain(x, "rows", "gathered_heads", "tokens"))(x)
    assert shard_shapes(placed) == {(2, 3, 3)}  # Three tokens do not split in two.
    assert shard_shapes(jax.jit(lambda x: sharding.constrain(x, "rows", "tokens", None))(x)) == {(2, 3, 3)}
    assert sharding.parts("rows") == sharding.parts("gathered_heads") == 2
  assert sharding.parts("rows") == 1 and sharding.platform() == "cpu"


@pytest.mark.parametrize(
  ("device", "expected"),
  [
    ({"device_kind": "cpu"}, "cpu"), ({"device_kind": "TPU v5p"}, "tpu"),
    ({"device_kind": "NVIDIA H100 80GB HBM3"}, "gpu"), ({"device_kind": "", "platform": "rocm"}, "gpu"),
  ],
)  # fmt: skip
def test_the_platform_is_that_of_the_mesh_whatever_jax_says_of_it(monkeypatch, device, expected):
  mesh = SimpleNamespace(abstract_device=SimpleNamespace(**device))
  monkeypatch.setattr(sharding, "_current", lambda: mesh)
  assert sharding.platform() == expected


@pytest.mark.parametrize("dimension", ["heads", "gathered_heads", "words"])
def test_heads_and_words_split_over_the_tensor_axis(dimension):
  with sharding.use(sharding.make_mesh(data=1, tensor=4)):
    assert shard_shapes(jax.jit(lambda x: sharding.constrain(x, None, dimension))(jnp.zeros((3, 8)))) == {(3, 2)}
    assert sharding.parts(dimension) == 4 and sharding.parts("rows") == 1


def test_parameters_are_constrained_by_name():
  params = {"gate": jnp.zeros((1, 4, 8)), "final_norm": jnp.zeros(4)}
  assert sharding.constrain_params(params) is params
  with sharding.use(sharding.make_mesh(data=1, fsdp=2, tensor=2)):
    placed = jax.jit(sharding.constrain_params)(params)
  assert shard_shapes(placed["gate"]) == {(1, 2, 4)} and shard_shapes(placed["final_norm"]) == {(4,)}


ROLLOUT_MESHES = [
  {"data": 1, "tensor": 2, "sequence": 2},
  {"data": 2, "sequence": 2},
  {"data": 1, "fsdp": 2, "tensor": 2},
]


@functools.cache
def rolled_out(axes):
  """Sampling and scoring of two rows of a bank on a mesh, or on one device without one."""
  params = make_state().params
  prompt_mask = np.arange(3) >= np.array([0, 2, 1, 0])[:, None]
  prompts = np.random.default_rng(1).integers(2, 16, (4, 3)).astype(np.int32)
  ends = np.array([[2, 5, 9]] * 4, np.int32)
  segments = types.Segments(ends=ends, segment_ids=ends, num_segments=np.full(4, 3), num_merged=np.zeros(4, int))
  tokens = np.random.default_rng(2).integers(2, 16, (4, 3, 2, 4)).astype(np.int32)
  ones = np.ones(tokens.shape[:3], np.float32)
  bank = types.Completions(tokens, tokens > 0, tokens > 0, utilities=ones, log_q=0 * ones, valid=ones > 0)
  mesh = None if axes is None else sharding.relayout(sharding.make_mesh(fsdp=4), **dict(axes))
  if mesh is not None:
    params = jax.jit(lambda x: x, out_shardings=sharding.infer(mesh, params))(params)
    assert len(params["blocks"]["query"].sharding.device_set) == 4
    prompts, prompt_mask, segments, bank = sharding.put_batch(mesh, (prompts, prompt_mask, segments, bank))
  with sharding.use(mesh):
    rollout, cache = sampling.sample(
      params, UPDATE_MODEL, prompts, prompt_mask, jax.random.key(0), max_tokens=9, eos_id=-1, pad_id=0
    )
    score = functools.partial(scoring.score_with_cache, config=UPDATE_MODEL, temperature=1.0, chunk_size=3)
    scores = jax.jit(score)(params, cache=cache, rollout=rollout, segments=segments, completions=bank)
  return rollout, scores, cache.key.addressable_shards[0].data.shape


@pytest.mark.parametrize("axes", ROLLOUT_MESHES)
def test_sampling_and_scoring_on_sharded_parameters_equal_one_device(axes):
  rollout, scores, shape = rolled_out(tuple(axes.items()))
  expected, expected_scores, whole = rolled_out(None)
  np.testing.assert_array_equal(rollout.tokens, expected.tokens)
  np.testing.assert_allclose(rollout.log_probs, expected.log_probs, atol=1e-5)
  np.testing.assert_allclose(scores, expected_scores, atol=1e-4)
  # Each device has a quarter of the keys: of rows, key heads and columns.
  sizes = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1} | axes
  assert shape == (
    2, 4 // (sizes["data"] * sizes["fsdp"]), 2 // sizes["tensor"], whole[3] // sizes["sequence"], 4,
  )  # fmt: skip
