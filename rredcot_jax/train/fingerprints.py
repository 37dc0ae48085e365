"""Hashes of what a configuration only names: files, corpus rows, templates and code.

A run, its checkpoints and its evaluations hold them, so that other contents under the same names are noticed.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

CODE = ("code", "own code")  # The fingerprints of programs: this package's, and those that a configuration names.
_NAMED = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*")  # "package.module:Name".


def of_files(paths: Iterable[str | os.PathLike]) -> str:
  """A hash of the contents of files, whatever they are called and wherever they lie.

  Args:
    paths: files, and directories: all files under one, in the order of their names there.

  Returns:
    32 hexadecimal digits of a SHA-256; files are read in pieces of a megabyte.

  Raises:
    FileNotFoundError: if a path is not there.
  """
  whole = hashlib.sha256()
  for path in map(pathlib.Path, paths):
    inside = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    for each in inside:
      name = str(each.relative_to(path)) if path.is_dir() else ""
      with open(each, "rb") as file:
        whole.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
  return whole.hexdigest()[:32]


def of_values(values: Iterable[Any]) -> str:
  """A hash of JSON values in their order (rows of a corpus, a template), one at a time in memory."""
  whole = hashlib.sha256()
  for value in values:
    whole.update(json.dumps(value, sort_keys=True).encode() + b"\n")
  return whole.hexdigest()[:32]


@functools.cache
def of_code() -> str:
  """A hash of this package's Python files, which says whether two hosts run the same code."""
  return _of_package(pathlib.Path(__file__).parent.parent)


def of_own_code(config: ConfigDict) -> str:
  """A hash of the packages that a configuration names as "package.module:Name"; "" where it names none.

  Of a package all Python files count, and of a module that lies in no package its one file.
  """
  named = sorted(
    {text.partition(".")[0].partition(":")[0] for text in _texts(config.to_dict()) if _NAMED.fullmatch(text)}
  )
  found = {}
  for name in named:
    with contextlib.suppress(ImportError, ValueError):  # What is refused elsewhere.
      spec = importlib.util.find_spec(name)
      for folder in (spec.submodule_search_locations or ()) if spec else ():
        found[name] = _of_package(pathlib.Path(folder))
      if spec and not spec.submodule_search_locations and spec.origin and os.path.isfile(spec.origin):
        found[name] = of_files([spec.origin])
  found.pop("rredcot_jax", None)  # "code" has it.
  return of_values([found]) if found else ""


def _texts(tree: Any) -> Iterator[str]:
  """All strings in a nest of mappings and lists."""
  if isinstance(tree, str):
    yield tree
  elif isinstance(tree, Mapping | list | tuple):
    for value in tree.values() if isinstance(tree, Mapping) else tree:
      yield from _texts(value)


def _of_package(package: pathlib.Path) -> str:
  whole = hashlib.sha256()
  for path in sorted(package.rglob("*.py")):
    whole.update(f"{path.relative_to(package)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
  return whole.hexdigest()[:32]


def check(held: Mapping[str, str], now: Mapping[str, str], *, where: str) -> None:
  """Compares the hashes that a run was begun with to those of this start.

  Changed code is only a warning, because it may be intended for the rest of the run.

  Raises:
    ValueError: naming what else has changed. A hash that only one side has is not compared.
  """
  changed = [name for name in sorted(held.keys() & now.keys()) if held[name] != now[name]]
  for name in [name for name in changed if name in CODE]:
    changed.remove(name)
    logging.warning(
      "the %s has changed since %s was written (%s then, %s now): what follows may differ from an uninterrupted run.",
      name, where, held[name][:8], now[name][:8],
    )  # fmt: skip
  if changed:
    raise ValueError(
      f"{where} was made from other contents: {', '.join(changed)}. The names in the configuration are the same and "
      "what they lead to is not. Put the former contents back, or choose another --workdir."
    )
