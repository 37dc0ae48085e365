"""What a directory held when it was written: the size and SHA-256 of every file, to be compared before it is read."""

import concurrent.futures
import hashlib
import json
import os
import pathlib

from rredcot_jax.report import files
from rredcot_jax.report.text import shorten, visible

NAME = "MANIFEST.json"
_FORMAT = 1
_THREADS = 4  # Threads help, because hashing and reading release Python's lock.
_CHUNK = 1 << 20

# Orbax writes the time into these two after the manifest is written. Nothing else in them changes.
_STAMPED, _STAMP = "_CHECKPOINT_METADATA", "commit_timestamp_nsecs"
_NOT_COVERED = (NAME, "commit_success.txt")


def write(directory: str | os.PathLike) -> None:
  """Syncs every file under `directory` to the disk, and writes their sizes and hashes beside them last.

  Raises:
    OSError: if the disk refuses.
  """
  directory = pathlib.Path(directory)
  names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
  names = [name for name in names if name not in _NOT_COVERED]
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    entries = dict(zip(names, pool.map(lambda name: _entry(directory, name, durable=True), names)))
  files.write_whole(directory / NAME, json.dumps({"format": _FORMAT, "files": entries}, indent=0))
  for folder in (directory, *(path for path in directory.rglob("*") if path.is_dir())):
    sync_directory(folder)


def exists(directory: str | os.PathLike) -> bool:
  return (pathlib.Path(directory) / NAME).is_file()


def damage(directory: str | os.PathLike, *, part: int = 0, parts: int = 1) -> str:
  """The first difference from what was written, naming the file; "" where nothing differs.

  Args:
    directory: one that has a manifest.
    part, parts: read only every `parts`-th file, from number `part` on, where several processes share the work.
  """
  directory = pathlib.Path(directory)
  try:
    held = json.loads((directory / NAME).read_text(encoding="utf-8"))
    if held["format"] != _FORMAT:
      return f"{NAME} has the format {held['format']!r:.80}, not {_FORMAT}"
    entries = {str(name): (int(size), str(digest)) for name, (size, digest) in held["files"].items()}
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    return f"{NAME} is not readable ({type(error).__name__})"
  if not entries:
    return f"{NAME} names no files"
  if any(pathlib.PurePath(name).is_absolute() or ".." in pathlib.PurePath(name).parts for name in entries):
    return f"{NAME} names files outside of its directory"

  shown = lambda name: visible(shorten(name, 200))

  def compare(name: str) -> str:
    try:
      size, digest = _entry(directory, name)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
      return f"{shown(name)} is not readable ({type(error).__name__})"
    if size != entries[name][0]:
      return f"{shown(name)} has {size} bytes and was written with {entries[name][0]}"
    return "" if digest == entries[name][1] else f"{shown(name)} holds other bytes than were written"

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return next(filter(None, pool.map(compare, sorted(entries)[part::parts])), "")


def sync_directory(directory: str | os.PathLike) -> None:
  """Syncs the names in a directory to the disk, where the system can."""
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError:  # Some shared filesystems refuse it for directories.
    pass
  finally:
    os.close(descriptor)


def _entry(directory: pathlib.Path, name: str, *, durable: bool = False) -> tuple[int, str]:
  """Size and hash of one file; ValueError if a stamped file is no JSON."""
  path, digest, size = directory / name, hashlib.sha256(), 0
  if not path.is_file():  # Opening a pipe would never end.
    raise FileNotFoundError(name)
  with open(path, "rb") as file:
    if durable:
      os.fsync(file.fileno())
    if name == _STAMPED:
      stamped = json.loads(file.read())
      stamped.pop(_STAMP, None)
      data = json.dumps(stamped, sort_keys=True).encode()
      return len(data), hashlib.sha256(data).hexdigest()
    while chunk := file.read(_CHUNK):
      digest.update(chunk)
      size += len(chunk)
  return size, digest.hexdigest()
