"""Where a checkpoint's tensors and metadata come from, whatever its format, and how much of them is read at most.

A checkpoint may come from anywhere. Its sizes, counts and lengths are bounded before anything is allocated.
"""

import contextlib
import json
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import safetensors

from rredcot_jax.report import text

# Far above any model. Small enough that a forged config cannot fill the memory before the tensors are checked.
MOST, MOST_LAYERS = 2**24, 10_000
_MOST_JSON = 2**20  # Bytes of a config.json; those of models have a few thousand.
# A header of safetensors has about a hundred bytes for each tensor.
_MOST_HEADER = 2**24

_T = TypeVar("_T")


def check_size(path: pathlib.Path, most: int) -> None:
  """Refuses a file of more than `most` bytes, before it is read."""
  size = path.stat().st_size
  if size > most:
    raise ValueError(f"{path} has {size} bytes; at most {most} are read of such a file.")


def read_json(path: pathlib.Path, *, most: int = _MOST_JSON) -> dict[str, Any]:
  """The JSON object in a file of at most `most` bytes.

  Raises:
    ValueError: naming the file, if it is larger, cannot be read, or holds something else.
  """
  with refusing(f"{path} is not readable JSON"):
    check_size(path, most)
    value = json.loads(path.read_text(encoding="utf-8"))
  if not isinstance(value, dict):
    raise ValueError(f"{path} holds no JSON object.")
  return value


def open_safetensors(path: pathlib.Path) -> Any:
  """A safetensors file, mapped, not read; its `keys`, `get_slice` and `get_tensor` are numpy's.

  Raises:
    ValueError: naming the file, if its header is larger than that of any model, or if it is damaged.
  """
  with path.open("rb") as file:
    start = file.read(8)
  header = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
  if _MOST_HEADER < header <= path.stat().st_size:
    raise ValueError(f"{path}: its header has {header} bytes; at most {_MOST_HEADER} are read.")
  with refusing(f"{path} is not a whole safetensors file"):
    return safetensors.safe_open(path, framework="numpy")


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
  """Turns any error that a library raises within into a ValueError of `what` and the shortened reason.

  This includes the panics of libraries written in Rust. They are not an `Exception`, so they are known by name.
  """
  try:
    yield
  except BaseException as error:
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
      reason = str(error) or type(error).__name__
      raise ValueError(f"{what}: {text.visible(text.shorten(reason, 300))}") from error
    raise


class Source(Protocol):
  """Where tensors come from, by their Hugging Face names."""

  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    """The tensors that are there, each with its shape; no data is read."""
    ...

  def file(self, name: str) -> pathlib.Path:
    """The file that holds a tensor, or should hold it; for messages."""
    ...

  def read(self, name: str) -> np.ndarray:
    """One tensor, as transformers would hold it."""
    ...


class Fields:
  """A checkpoint's metadata, checked as it is read: an error names the file and the field."""

  def __init__(self, path: pathlib.Path, values: Mapping[str, Any]):
    """`values` by name; null counts as absent."""
    self.path = path
    self.values = {name: value for name, value in values.items() if value is not None}

  def __getitem__(self, name: str) -> Any:
    if name not in self.values:
      raise ValueError(f"{self.path} has no {name!r}.")
    return self.values[name]

  def integer(self, name: str, default: int | None = None, *, most: int = MOST) -> int:
    """A whole number in [1, most], or the default where there is none."""
    if default is not None and name not in self.values:
      return default
    value = self[name]
    if type(value) is not int or not 1 <= value <= most:  # `type`, because a bool is an int in Python.
      raise ValueError(f"{self.path}: {name}={value!r:.80} must be a whole number from 1 to {most}.")
    return value

  def number(self, name: str, default: float | None = None) -> float:
    """A finite number above 0, or the default where there is none."""
    if default is not None and name not in self.values:
      return default
    value = self[name]
    if type(value) not in (int, float) or not 0 < value < 1e30:
      raise ValueError(f"{self.path}: {name}={value!r:.80} must be a finite number above 0.")
    return float(value)

  def build(self, kind: type[_T], /, **values: Any) -> _T:
    """`kind(**values)`; its ValueErrors are raised again with the file's name."""
    try:
      return kind(**values)
    except ValueError as error:
      raise ValueError(f"{self.path}: {error}") from error
