"""The container of a GGUF file: its metadata, and where each tensor lies, with every count and length bounded.

The `gguf` library has a reader too, which is not used, for two reasons. It keeps an object of a hundred bytes for
each member of an array, so a file of 8 MB can take 900 MB of memory. It trusts the counts and lengths in a file.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import dataclasses
import math
import pathlib
import struct
import sys
from typing import Any

import gguf
import numpy as np

from rredcot_jax.model.source import MOST_LAYERS

# All arrays of a file together hold at most that many values. A vocabulary of 262144 tokens takes four times its size.
_MOST_VALUES = 2**21
_MOST_FIELDS, _MOST_TENSORS = 10_000, 16 * MOST_LAYERS
_MOST_NAME, _MOST_TEXT = 2**16, 2**24  # Bytes.
_MOST_AXES = 4

_SCALARS = {
  gguf.GGUFValueType.UINT8: "B",
  gguf.GGUFValueType.INT8: "b",
  gguf.GGUFValueType.UINT16: "H",
  gguf.GGUFValueType.INT16: "h",
  gguf.GGUFValueType.UINT32: "I",
  gguf.GGUFValueType.INT32: "i",
  gguf.GGUFValueType.FLOAT32: "f",
  gguf.GGUFValueType.BOOL: "?",
  gguf.GGUFValueType.UINT64: "Q",
  gguf.GGUFValueType.INT64: "q",
  gguf.GGUFValueType.FLOAT64: "d",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor as it is stored; its data is mapped, not read."""

  name: str
  kind: gguf.GGMLQuantizationType
  shape: tuple[int, ...]  # As numpy has it, the last axis contiguous.
  data: np.ndarray  # uint8, the last axis in bytes.


def read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """The metadata and the tensors of a file, both by name.

  Raises:
    ValueError: of what is wrong and with which field or tensor, without the path.
  """
  data = np.memmap(path, np.uint8, mode="r")
  cursor = _Cursor(data)
  if cursor.take(4) != b"GGUF":
    raise ValueError("it does not begin with 'GGUF'.")
  version = cursor.number("I")
  if version & 0xFFFF == 0 or sys.byteorder != "little":
    raise ValueError("it is of the other byte order than this machine or than GGUF's usual one: not supported.")
  if version not in (2, 3):
    raise ValueError(f"its version {version} is not supported: 2 and 3 are.")
  num_tensors, num_fields = cursor.number("Q"), cursor.number("Q")
  for count, most, what in ((num_tensors, _MOST_TENSORS, "tensors"), (num_fields, _MOST_FIELDS, "metadata fields")):
    if count > most:
      raise ValueError(f"it has {count} {what}; at most {most} are read.")
  fields: dict[str, Any] = {}
  for _ in range(num_fields):
    name = cursor.text("the name of a metadata field", _MOST_NAME)
    if name in fields:
      raise ValueError(f"the metadata field {name!r} is there twice.")
    fields[name] = cursor.value(f"the metadata field {name!r}")
  return fields, _tensors(cursor, num_tensors, fields)


def _tensors(cursor: "_Cursor", count: int, fields: dict[str, Any]) -> dict[str, Tensor]:
  alignment = fields.get("general.alignment", 32)
  if type(alignment) is not int or not 0 < alignment < 2**31 or alignment & (alignment - 1):
    raise ValueError(f"general.alignment={alignment!r:.80} is not a power of two.")
  stated = [_stated_tensor(cursor) for _ in range(count)]
  base = -(-cursor.at // alignment) * alignment
  found: dict[str, Tensor] = {}
  end, last = 0, ""
  for name, kind, shape, offset in sorted(stated, key=lambda tensor: tensor[3]):
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if name in found:
      raise ValueError(f"the tensor {name!r} is there twice.")
    if shape[-1] % block:
      raise ValueError(f"the tensor {name!r} has rows of {shape[-1]}, no multiple of {kind.name}'s {block}.")
    stored = (*shape[:-1], shape[-1] // block * block_bytes)
    if offset < end:
      raise ValueError(f"the tensors {last!r} and {name!r} overlap.")
    end, last = offset + math.prod(stored), name
    if base + end > cursor.data.size:
      raise ValueError(f"it ends early, at {cursor.data.size} bytes, within the tensor {name!r}.")
    found[name] = Tensor(name, kind, shape, cursor.data[base + offset : base + end].reshape(stored))
  return found


def _stated_tensor(cursor: "_Cursor") -> tuple[str, gguf.GGMLQuantizationType, tuple[int, ...], int]:
  name = cursor.text("the name of a tensor", _MOST_NAME)
  axes = cursor.number("I")
  if not 1 <= axes <= _MOST_AXES:
    raise ValueError(f"the tensor {name!r} has {axes} axes; 1 to {_MOST_AXES} are read.")
  shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
  kind, offset = cursor.number("I"), cursor.number("Q")
  try:
    return name, gguf.GGMLQuantizationType(kind), shape, offset
  except ValueError as error:
    raise ValueError(f"the tensor {name!r} has the quantisation {kind}, which is not known.") from error


class _Cursor:
  """Reads one value after the other, and raises where the file ends early."""

  def __init__(self, data: np.ndarray):
    self.data, self.at = data, 0
    self._view = data.data
    self._values = 0  # Members of arrays so far.

  def take(self, count: int) -> bytes:
    if count > len(self._view) - self.at:
      raise ValueError(f"it ends early, at {len(self._view)} bytes.")
    self.at += count
    return bytes(self._view[self.at - count : self.at])

  def number(self, code: str) -> Any:
    code = "<" + code
    return struct.unpack(code, self.take(struct.calcsize(code)))[0]

  def text(self, what: str, most: int) -> str:
    size = self.number("Q")
    if size > most:
      raise ValueError(f"{what} is a text of {size} bytes; at most {most} are read.")
    try:
      return self.take(size).decode()
    except UnicodeDecodeError as error:
      raise ValueError(f"{what} is no UTF-8 text: {error}") from error

  def value(self, what: str) -> Any:
    kind = self.number("I")
    if kind != gguf.GGUFValueType.ARRAY:
      return self._one(kind, what)
    kind, count = self.number("I"), self.number("Q")
    self._values += count
    if self._values > _MOST_VALUES:
      raise ValueError(f"{what} is an array of {count} values; all arrays together may have {_MOST_VALUES}.")
    if kind == gguf.GGUFValueType.STRING:
      return [self.text(what, _MOST_TEXT) for _ in range(count)]
    code = f"<{count}{_code(kind, what)}"
    return list(struct.unpack(code, self.take(struct.calcsize(code))))

  def _one(self, kind: int, what: str) -> Any:
    return self.text(what, _MOST_TEXT) if kind == gguf.GGUFValueType.STRING else self.number(_code(kind, what))


def _code(kind: int, what: str) -> str:
  if kind not in tuple(_SCALARS):
    raise ValueError(f"{what} is of the type {kind}, which is not read here.")
  return _SCALARS[gguf.GGUFValueType(kind)]
