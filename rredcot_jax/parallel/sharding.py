"""Where arrays live: the only file that names mesh axes.

Axes: `data` (replicas of the parameters), `fsdp` (parameters split, gathered
when used), `tensor` (heads, MLP width and vocabulary split), `sequence` (the
tokens of a row split; parameters are split over it as over `fsdp`). Batches are
split over `data` and `fsdp` together. Parameters are placed by rules on their
names. Everything else is placed by the meaning of its dimensions: other files
say "rows" or "heads", and never name an axis.

Sampling and training may want different layouts. A layout is a mesh: `relayout`
splits the same devices in the same order into axes of other sizes, and one jitted
identity with the other mesh's `infer` as its output moves parameters over.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor", "sequence")
_BATCH_AXES = ("data", "fsdp")
_SPLIT = ("fsdp", "sequence")  # What a parameter's width is split over.

# By the last name of a parameter's path. Block parameters have a leading layer axis.
_RULES = {
  "embedding": P("tensor", _SPLIT),
  "head": P("tensor", _SPLIT),
  "query": P(None, _SPLIT, "tensor", None),
  "key": P(None, _SPLIT, "tensor", None),
  "value": P(None, _SPLIT, "tensor", None),
  "out": P(None, "tensor", None, _SPLIT),
  "gate": P(None, _SPLIT, "tensor"),
  "up": P(None, _SPLIT, "tensor"),
  "down": P(None, "tensor", _SPLIT),
}

# Key and value heads are often fewer than `tensor` and then whole on several devices, which costs less than this.
_MOST_OVER_IDEAL = 1.5

# The meaning of a dimension of an activation or a cache, and the axes that split it.
_DIMENSIONS: dict[str | None, tuple[str, ...]] = {
  None: (),
  "rows": _BATCH_AXES,
  "tokens": ("sequence",),  # Of a whole sequence, the columns of a cache, or the branches of a row.
  "heads": ("tensor",),
  "gathered_heads": ("tensor", "sequence"),  # Where each head needs the whole sequence.
  "words": ("tensor",),  # Of the vocabulary.
}


def make_mesh(
  *, data: int = -1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
  """The mesh over all devices; `data=-1` takes the devices that are left.

  Args:
    data, fsdp, tensor, sequence: sizes of the axes.
    devices: those of a machine that is not there, to compile for; None is `jax.devices()`.

  Several TPU slices are joined by a slow network. `data` alone goes over it, because gradients are
  summed over `data` once a step, and the other axes communicate in every layer.

  Raises:
    ValueError: if the axes do not multiply to the number of devices, or if `data` is not a multiple
      of the number of slices.
  """
  devices = jax.devices() if devices is None else devices
  shape = _axis_sizes(len(devices), data, fsdp, tensor, sequence)
  if devices[0].platform != "tpu":
    return Mesh(np.asarray(devices).reshape(shape), AXES)
  slices = _check_slices("mesh", devices, shape[0])
  # Neighbours in the mesh are neighbours in the torus where the sizes of both allow it.
  within: Any = mesh_utils.create_hybrid_device_mesh if slices > 1 else mesh_utils.create_device_mesh
  sizes = [(shape[0] // slices, *shape[1:]), (slices, 1, 1, 1)] if slices > 1 else [shape]
  return Mesh(within(*sizes, devices=devices, allow_split_physical_axes=True), AXES)


def relayout(mesh: Mesh, *, data: int = -1, fsdp: int = 1, tensor: int = 1, sequence: int = 1) -> Mesh:
  """The same devices in the same order as axes of other sizes; `data=0` keeps the mesh as it is.

  Raises:
    ValueError: as `make_mesh` does.
  """
  if data == 0:
    return mesh
  shape = _axis_sizes(mesh.size, data, fsdp, tensor, sequence)
  _check_slices("rollout_mesh", mesh.devices.flat, shape[0])
  return Mesh(mesh.devices.reshape(shape), AXES)


def _check_slices(name: str, devices: Iterable[Any], data: int) -> int:
  """The number of TPU slices; raises ValueError if an axis other than `data` would cross from one to another."""
  # On a GPU JAX sets `slice_index` too. There the user orders the machines.
  indices = [getattr(device, "slice_index", None) for device in devices if device.platform == "tpu"]
  slices = max(len(set(indices)), 1)
  if data % slices:
    raise ValueError(
      f"{name}.data={data} is not a multiple of the {slices} slices: only `data` goes over the network between slices. "
      f"Set {name}.data to a multiple of {slices}, so that the other axes lie within the {len(indices) // slices} "
      "chips of a slice."
    )
  return slices


def _axis_sizes(total: int, data: int, fsdp: int, tensor: int, sequence: int) -> tuple[int, int, int, int]:
  others = fsdp * tensor * sequence
  if data == -1:
    data = max(total // others, 1)
  if data * others != total:
    raise ValueError(
      f"mesh data={data} x fsdp={fsdp} x tensor={tensor} x sequence={sequence} needs {data * others} devices "
      f"and there are {total}."
    )
  return data, fsdp, tensor, sequence


def infer(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
  """A NamedSharding for each leaf of a state, from the names on its path.

  An axis that does not divide its dimension is left out, so that any size runs;
  leaves without a rule (norms, step counters) are replicated.
  """

  def place(path: tuple, leaf: Any) -> NamedSharding:
    names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
    spec = next((_RULES[name] for name in reversed(names) if name in _RULES), P())
    if len(spec) != len(leaf.shape):
      return NamedSharding(mesh, P())
    axes = [axis if isinstance(axis, tuple) else (axis,) if axis else () for axis in spec]
    return NamedSharding(mesh, P(*(_fitting(mesh, a, size) for a, size in zip(axes, leaf.shape))))

  return jax.tree_util.tree_map_with_path(place, tree)


def _fitting(mesh: Mesh | AbstractMesh, axes: tuple[str, ...], size: int) -> str | tuple[str, ...] | None:
  """The axes, in order, whose sizes together divide `size`; a second axis of size 1 is not named."""
  chosen: list[str] = []
  parts = 1
  for axis in axes:
    if size % (parts * mesh.shape[axis]) == 0 and (not chosen or mesh.shape[axis] > 1):
      chosen.append(axis)
      parts *= mesh.shape[axis]
  return None if not chosen else chosen[0] if len(chosen) == 1 else tuple(chosen)


def bytes_a_device(tree: Any) -> int:
  """Bytes that one device holds of arrays, or of abstract arrays with their placement."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def check_split(tree: Any) -> None:
  """Refuses a layout in which most of a state is whole on devices that should hold a part.

  An axis that does not divide a dimension is left out, which is right for a small array. Where it
  happens to most of a state, `fsdp` saves no memory.

  Args:
    tree: abstract arrays with the placement of `infer`.

  Raises:
    ValueError: if a device holds more than `_MOST_OVER_IDEAL` times the bytes of an even split, naming both
      and the parameter that takes most of it.
  """
  held: dict[str, list[float]] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
    name = next((name for name in reversed(names) if name in _RULES), None)
    if name is None or len(_RULES[name]) != len(leaf.shape):
      continue
    mesh = leaf.sharding.mesh
    parts = math.prod(mesh.shape[axis] for axis in AXES if axis != "data")
    mine, ideal = held.setdefault(name, [0.0, 0.0])
    held[name] = [mine + bytes_a_device(leaf), ideal + math.prod(leaf.shape) * leaf.dtype.itemsize / parts]
    sizes = {axis: mesh.shape[axis] for axis in AXES}
  mine, ideal = (sum(values) for values in zip(*held.values()))
  if mine > _MOST_OVER_IDEAL * ideal:
    worst = max(held, key=lambda name: held[name][0] - held[name][1])
    raise ValueError(
      f"the mesh {sizes} does not divide the model: a device would hold {mine / 2**20:.1f} MiB of the train state, "
      f"{mine / ideal:.1f} times the {ideal / 2**20:.1f} MiB of an even split, mostly of {worst!r}. Choose mesh.fsdp x "
      "mesh.sequence that divides model.width, and mesh.tensor that divides model.num_kv_heads, model.mlp_width and "
      "the vocabulary."
    )


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, P())


def batch(mesh: Mesh) -> NamedSharding:
  """The leading axis split over the data axes."""
  return NamedSharding(mesh, P(_BATCH_AXES))


def cache(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
  """A KV cache of `shape` [L, B, KV, C, D]: rows split as batches are, key heads and columns where they divide."""
  return NamedSharding(mesh, _spec(mesh, (None, "rows", "heads", "tokens", None), shape))


def put_batch(mesh: Mesh, tree: Any) -> Any:
  """Places arrays [B, ...] with their leading axis split.

  Of several processes each gives host arrays of its own rows, as `processes.Rows.here`
  numbers them; arrays that already lie on the devices of all are moved where need be.

  Raises:
    ValueError: if B is not a multiple of the data axes' size.
  """
  place = batch(mesh)
  if place.is_fully_addressable:
    for leaf in jax.tree.leaves(tree):
      check_rows(mesh, leaf.shape[0])
    return jax.device_put(tree, place)
  parts = row_parts(mesh)
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
  if count % row_parts(mesh):
    raise ValueError(
      f"a batch of {count} rows does not split over {row_parts(mesh)} devices: change "
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


def row_parts(mesh: Mesh | AbstractMesh) -> int:
  """Into how many pieces the rows of a batch are split."""
  return int(np.prod([mesh.shape[axis] for axis in _BATCH_AXES]))


def use(mesh: Mesh | None) -> contextlib.AbstractContextManager:
  """Code within places its intermediate results on `mesh`; None leaves that to the compiler."""
  return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def on(mesh: Mesh | None, function: Callable[..., Any]) -> Callable[..., Any]:
  """`function` called within `use(mesh)`."""

  def call(*args: Any, **kwargs: Any) -> Any:
    with use(mesh):
      return function(*args, **kwargs)

  return call


def constrain(x: jax.Array, *dimensions: str | None) -> jax.Array:
  """`x` split by what its dimensions are (see `_DIMENSIONS`); itself where no mesh is in use.

  An axis that does not divide its dimension is left out. None is a dimension that is not split.
  """
  mesh = _current()
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _spec(mesh, dimensions, x.shape)))


def constrain_params(tree: Any) -> Any:
  """A tree of parameters, or of their gradients, placed by name; itself where no mesh is in use."""
  mesh = _current()
  if mesh is None:
    return tree
  return jax.lax.with_sharding_constraint(tree, infer(mesh, tree))


def parts(dimension: str) -> int:
  """Into how many pieces a dimension is split in the mesh in use, if it divides; 1 without one."""
  mesh = _current()
  return 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in _DIMENSIONS[dimension]]))


def each_part(
  function: Callable[..., jax.Array],
  args: Sequence[jax.Array],
  dimensions: Sequence[Sequence[str | None]],
  out: Sequence[str | None],
) -> jax.Array:
  """`function` on each device's part of `args`, for kernels that the compiler cannot split; the whole without a mesh.

  The parts are independent: `function` of the parts is the part of `function`.

  Args:
    function: of arrays, to an array of the first argument's shape.
    args: whole arrays.
    dimensions: of each argument, see `constrain`.
    out: of the result.
  """
  mesh = _current()
  if mesh is None:
    return function(*args)
  specs = tuple(_spec(mesh, names, x.shape) for names, x in zip(dimensions, args))
  out_spec = _spec(mesh, out, args[0].shape)
  return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_spec, check_vma=False)(*args)


def by_tokens(function: Callable[..., Any], shared: jax.Array, *args: jax.Array) -> Any:
  """`function(shared, *args)` on each device's rows and tokens of `args`, with the whole of `shared` there.

  It is for loops in which every round reads `shared`. The parameter is gathered once, and its
  gradient is summed over the devices once. The compiler alone would do both in every round.
  A `tensor` axis is left to the compiler.

  Args:
    function: of `shared` and arrays [B, T, ...], to a tree of arrays [B, T, ...]; tokens are independent.
    shared: a parameter.
    args: arrays [B, T, ...]; they are left whole along a dimension that does not divide.
  """
  mesh = _current()
  if mesh is None:
    return function(shared, *args)
  several = [tuple(axis for axis in _DIMENSIONS[name] if mesh.shape[axis] > 1) for name in ("rows", "tokens")]
  split = tuple(
    axes if size % int(np.prod([mesh.shape[axis] for axis in axes])) == 0 else ()
    for axes, size in zip(several, args[0].shape)
  )
  manual = tuple(axis for axes in split for axis in axes)  # In one order, so that every process makes the same program.

  def of_part(shared: jax.Array, *args: jax.Array) -> Any:
    # Each device has its own copy from here on. The gradient of this line is the sum over devices, outside of any loop.
    return function(jax.lax.pcast(shared, manual, to="varying"), *args)

  if not manual:
    return function(shared, *args)
  in_specs = (P(), *[P(*split)] * len(args))
  return jax.shard_map(of_part, mesh=mesh, in_specs=in_specs, out_specs=P(*split), axis_names=set(manual))(
    shared, *args
  )


def platform() -> str:
  """The platform that is compiled for: "cpu", "gpu" or "tpu", of the mesh in use or of this process."""
  mesh = _current()
  device = None if mesh is None else mesh.abstract_device
  if device is None:
    name = jax.default_backend()
  else:
    # jax 0.10 knows the kind alone: "cpu", "TPU v5p", "NVIDIA H100 80GB HBM3".
    kind = device.device_kind.lower()
    name = getattr(device, "platform", "") or ("tpu" if kind.startswith("tpu") else "cpu" if kind == "cpu" else "gpu")
  return "gpu" if name in ("cuda", "rocm") else name


def _current() -> AbstractMesh | None:
  mesh = jax.sharding.get_abstract_mesh()
  # Inside `each_part` all axes are manual, and nothing is left to place.
  return None if mesh.empty or len(mesh.manual_axes) == len(AXES) else mesh


def _spec(mesh: Mesh | AbstractMesh, dimensions: Sequence[str | None], shape: Sequence[int]) -> P:
  # Inside `by_tokens` rows and tokens are split already.
  placed = set(AXES) - set(mesh.manual_axes if isinstance(mesh, AbstractMesh) else ())
  axes = [tuple(axis for axis in _DIMENSIONS[name] if axis in placed) for name in dimensions]
  return P(*(_fitting(mesh, each, size) for each, size in zip(axes, shape, strict=True)))
