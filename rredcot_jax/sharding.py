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
  """Places host arrays [B, ...] with their leading axis split.

  Raises:
    ValueError: if B is not a multiple of the data axes' size.
  """
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  for leaf in jax.tree.leaves(tree):
    if leaf.shape[0] % parts:
      raise ValueError(
        f"a batch of {leaf.shape[0]} rows does not split over {parts} devices: change "
        "rollout.prompts_per_step, rollout.group_size or the mesh."
      )
  return jax.device_put(tree, batch(mesh))
