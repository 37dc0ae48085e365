"""Where arrays live: the only file that names mesh axes.

Axes: `data` (replicas of the parameters), `fsdp` (parameters split, gathered
when used), `tensor` (heads and MLP width split). Batches are split over
`data` and `fsdp` together. Parameters are placed by rules on their names.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

_BATCH_AXES = ("data", "fsdp")

# By the last name of a parameter's path; block parameters carry a leading layer axis.
_RULES = {
  "embedding": P("tensor", "fsdp"),
  "head": P("tensor", "fsdp"),
  "query": P(None, "fsdp", "tensor", None),
  "key": P(None, "fsdp", "tensor", None),
  "value": P(None, "fsdp", "tensor", None),
  "out": P(None, "tensor", None, "fsdp"),
  "gate": P(None, "fsdp", "tensor"),
  "up": P(None, "fsdp", "tensor"),
  "down": P(None, "tensor", "fsdp"),
}


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
  """The mesh over all devices; `data=-1` takes the devices that are left.

  Raises:
    ValueError: if the axes do not multiply to the number of devices.
  """
  devices = jax.devices()
  if data == -1:
    data = max(len(devices) // (fsdp * tensor), 1)
  if data * fsdp * tensor != len(devices):
    raise ValueError(
      f"mesh data={data} x fsdp={fsdp} x tensor={tensor} needs {data * fsdp * tensor} devices "
      f"and there are {len(devices)}."
    )
  return Mesh(np.asarray(devices).reshape(data, fsdp, tensor), ("data", "fsdp", "tensor"))


def infer(mesh: Mesh, tree: Any) -> Any:
  """A NamedSharding for each leaf of a state, from the names on its path.

  An axis that does not divide its dimension is left out, so that any size runs;
  leaves without a rule (norms, step counters) are replicated.
  """

  def place(path: tuple, leaf: Any) -> NamedSharding:
    names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
    spec = next((_RULES[name] for name in reversed(names) if name in _RULES), P())
    if len(spec) != len(leaf.shape):
      return NamedSharding(mesh, P())
    fits = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(spec, leaf.shape)]
    return NamedSharding(mesh, P(*fits))

  return jax.tree_util.tree_map_with_path(place, tree)


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, P())


def batch(mesh: Mesh) -> NamedSharding:
  """The leading axis split over the data axes."""
  return NamedSharding(mesh, P(_BATCH_AXES))


def cache(mesh: Mesh) -> NamedSharding:
  """A KV cache [L, B, KV, C, D], rows split as batches are."""
  return NamedSharding(mesh, P(None, _BATCH_AXES))


def put_batch(mesh: Mesh, tree: Any) -> Any:
  """Places arrays [B, ...] with their leading axis split.

  Of several processes each gives host arrays of its own rows, as `distributed.Rows.here`
  numbers them; arrays that already lie on the devices of all are moved where need be.

  Raises:
    ValueError: if B is not a multiple of the data axes' size.
  """
  place = batch(mesh)
  if place.is_fully_addressable:
    for leaf in jax.tree.leaves(tree):
      check_rows(mesh, leaf.shape[0])
    return jax.device_put(tree, place)
  parts = _parts(mesh)
  indices: Any = place.addressable_devices_indices_map((parts,)).values()
  here = sorted({part.start or 0 for (part,) in indices})

  def put(leaf: Any) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      return jax.device_put(leaf, place)
    each = leaf.shape[0] // len(here)
    shape = (each * parts, *leaf.shape[1:])
    leaf = np.asarray(leaf)

    def rows(index: Any) -> np.ndarray:
      first = here.index((index[0].start or 0) // each) * each
      return leaf[first : first + each]

    return jax.make_array_from_callback(shape, place, rows)

  return jax.tree.map(put, tree)


def check_rows(mesh: Mesh, count: int) -> None:
  """Raises ValueError if a batch of `count` rows does not split over the data axes."""
  if count % _parts(mesh):
    raise ValueError(
      f"a batch of {count} rows does not split over {_parts(mesh)} devices: change "
      "rollout.prompts_per_step, rollout.group_size or the mesh."
    )


def put_state(placement: Any, tree: Any) -> Any:
  """Places a tree of host arrays, the same on every process, as `infer` says."""
  if all(place.is_fully_addressable for place in jax.tree.leaves(placement)):
    return jax.device_put(tree, placement)

  def put(leaf: Any, place: NamedSharding) -> jax.Array:
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, place, lambda index: leaf[index])

  return jax.tree.map(put, tree, placement)


def _parts(mesh: Mesh) -> int:
  return int(np.prod([mesh.shape[axis] for axis in _BATCH_AXES]))
