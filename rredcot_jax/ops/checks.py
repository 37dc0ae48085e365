"""Checks of arguments: shapes and types always, values only where they are concrete.

Under `jit`, `vmap` and `grad` an array has a shape and a type but no values yet. What a
function says it does with bad values there is in its own docstring.

Reading concrete values waits for the device that computes them. Inside a compiled
program these checks cost nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rredcot_jax.ops import types

_KINDS = {float: (jnp.floating, "floating"), int: (jnp.integer, "integer"), bool: (jnp.bool_, "boolean")}


def check_array(name: str, x: Any, axes: str, kind: type) -> None:
  """Raises ValueError unless `x` is an array of this rank and type.

  Args:
    name: of the argument, for the error.
    x: the argument. A Python number is an array of rank 0.
    axes: names of the axes with a space between them, such as "B T"; "" for rank 0.
    kind: float, int or bool.
  """
  expected = f"[{', '.join(axes.split())}]"
  if isinstance(x, (list, tuple)):
    raise ValueError(f"{name} is a {type(x).__name__} and must be an array {expected}: pass jnp.asarray({name}).")
  if not hasattr(x, "shape") and not isinstance(x, (bool, int, float)):
    raise ValueError(f"{name} is a {type(x).__name__} and must be an array {expected}.")
  rank = len(axes.split())
  if np.ndim(x) != rank:
    hint = "; vmap the call over a batch" if np.ndim(x) == rank + 1 else ""
    raise ValueError(f"{name} has shape {np.shape(x)} and must be {expected}, of rank {rank}{hint}.")
  family, word = _KINDS[kind]
  dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
  if not jnp.issubdtype(dtype, family):
    fix = {float: f"jnp.asarray({name}, jnp.float32)", int: f"{name}.astype(jnp.int32)", bool: f"{name} != 0"}[kind]
    raise ValueError(f"{name} is {dtype} and must be {word}: pass {fix}.")


def check_shape(name: str, x: Any, shape: tuple[int | None, ...], like: str) -> None:
  """Raises ValueError unless `x` has this shape; None allows any size, `like` says whose shape it is."""
  if len(np.shape(x)) != len(shape) or any(b is not None and a != b for a, b in zip(np.shape(x), shape)):
    expected = str(tuple("any" if size is None else size for size in shape)).replace("'", "")
    raise ValueError(f"{name} has shape {np.shape(x)} and must have {expected}, as {like} does.")


def concrete(x: Any) -> np.ndarray | None:
  """`x` on the host, or None while it is traced or partly on other processes' devices."""
  if isinstance(x, jax.core.Tracer):
    return None
  if isinstance(x, jax.Array):
    return np.asarray(jax.device_get(x)) if x.is_fully_addressable else None
  return np.asarray(x)


def check_number(name: str, x: Any, good: Callable[[Any], Any], must: str) -> None:
  """Raises ValueError if the number `x` is concrete and not `good`; `must` says what it must be and why."""
  value = concrete(x)
  if value is not None and not good(value):
    raise ValueError(f"{name}={value.item()!r} must {must}")


def check_values(
  name: str, x: Any, good: Callable[[np.ndarray], np.ndarray], must: str, *, where: Any | None = None
) -> None:
  """Raises ValueError naming the first place at which `x` is concrete and not `good`.

  Args:
    name: of the argument, for the error.
    x: the argument.
    good: `x` -> a boolean for each element.
    must: what an element must be, and the fix.
    where: boolean, broadcast to `x`: the places that count; all where None.
  """
  values, counted = concrete(x), concrete(True if where is None else where)
  if values is None or counted is None:
    return
  # An element that does not count may hold anything.
  bad = np.argwhere(np.broadcast_to(counted, values.shape) & ~good(values))
  if len(bad):
    place = tuple(int(i) for i in bad[0])
    index = f"[{', '.join(map(str, place))}]" if place else ""
    raise ValueError(f"{name}{index} = {values[place].item()!r} must {must}")


def check_segments(segments: types.Segments, axes: str = "") -> None:
  """Raises ValueError unless these are `Segments` with the leading axes `axes`, such as "B".

  Where the ids are concrete they must lie in [-1, K) and not decrease over the trace's tokens.
  """
  check_array("segments.ends", segments.ends, f"{axes} K", int)
  check_array("segments.segment_ids", segments.segment_ids, f"{axes} T", int)
  check_array("segments.num_segments", segments.num_segments, axes, int)
  k_max = segments.ends.shape[-1]
  ids = concrete(segments.segment_ids)
  if not k_max:
    raise ValueError("segments.ends has room for no segment: K must be at least 1.")
  must = f"lie in [0, {k_max}]: segments.ends has room for {k_max} segments."
  check_values("segments.num_segments", segments.num_segments, lambda n: (n >= 0) & (n <= k_max), must)
  if ids is None:
    return
  must = f"lie in [-1, {k_max}): -1 is padding, and segments.ends has room for {k_max} segments."
  check_values("segments.segment_ids", ids, lambda x: (x >= -1) & (x < k_max), must)
  highest_before = np.maximum.accumulate(ids, axis=-1)
  must = "not be less than the id of an earlier token: segments are consecutive."
  check_values("segments.segment_ids", ids, lambda x: (x < 0) | (x == highest_before), must)


def at_least_float32(x: Any) -> jax.Array:
  """Half precision as float32, because sums in it lose digits; wider types as they are."""
  return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))
