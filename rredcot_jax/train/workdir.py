"""A run's work directory: which run it holds, and the errors when it cannot be written.

`claim` is called before anything is written. One run at a time holds a directory (`lease.py`). `config.json` says
which run it is: its configuration, and hashes of its code and files (`fingerprints.py`).
"""

import contextlib
import errno
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from rredcot_jax.parallel import processes
from rredcot_jax.report import files
from rredcot_jax.report.text import shorten, visible
from rredcot_jax.train import differences, lease
from rredcot_jax.train import fingerprints as fingerprints_lib

FORMAT = 1  # Of config.json and what lies beside it.
_URL = r"[A-Za-z][A-Za-z0-9+.-]+:/"
_MOST_CONFIG = 2**24  # Bytes read of config.json.
_HOLDINGS = ("metrics.jsonl", "traces.jsonl", "checkpoints")  # What a run leaves, beside config.json.


# ---- Whether something can be written --------------------------------------------------------


class WriteFailed(RuntimeError):
  """A file of a run could not be written; what was there before is untouched."""


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
  """Turns the system's error while `path` is written into one that says what to do.

  Raises:
    WriteFailed: naming the file, the reason and the last checkpoint of its run.
  """
  try:
    yield
  except OSError as error:
    path = pathlib.Path(path)
    newest = newest_checkpoint(path.parent)
    kept = "there is no checkpoint yet" if newest is None else f"checkpoint {newest} is untouched"
    raise WriteFailed(
      f"{path} could not be written ({error.strerror or error}); {kept}. {advice(error, path.parent)} and run the same "
      "command again."
    ) from error


def advice(error: OSError, directory: str | os.PathLike) -> str:
  """What to do about an error of the operating system, as the beginning of a sentence."""
  if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
    return f"Make {directory} writable for this user"
  if error.errno == errno.ENAMETOOLONG:
    return f"Choose a shorter path than {shorten(directory, 80)}"
  if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
    return f"Make room in {directory} (space, quota, or the limit of ulimit -f)"
  return f"Look after the storage of {directory}"


def newest_checkpoint(workdir: str | os.PathLike) -> int | None:
  """The step of the newest complete checkpoint, by its name; None where there is none."""
  directory = pathlib.Path(workdir) / "checkpoints"
  try:
    return max((int(name) for name in os.listdir(directory) if name.isdecimal()), default=None)
  except OSError:
    return None


# ---- Which run a directory holds -------------------------------------------------------------


def version() -> str:
  """This package's version, as installed."""
  try:
    return importlib.metadata.version("rredcot-jax")
  except importlib.metadata.PackageNotFoundError:
    return "unknown"


def claim(
  workdir: str | os.PathLike,
  config: ConfigDict,
  command: str,
  *,
  resume: bool = True,
  fingerprints: Mapping[str, str] | None = None,
) -> lease.Claim:
  """Makes `workdir` this run's: a new one, or the one that it holds already.

  Every process of a run calls it; the first of them writes. Hold the result, as a context
  manager, until the run has ended.

  Args:
    workdir: a directory, made if need be; of several processes, on storage that all see.
    config: the whole configuration.
    command: the one that resumes the run.
    resume: off refuses a directory that holds a run.
    fingerprints: hashes of what the run is made from, by name, with "code" for the program itself.

  Raises:
    ValueError: on every process, saying what to do: if the path is none; if another run is
      there and alive; if config.json is damaged, missing, foreign or of another version; if the run
      there has another configuration (the keys that differ are named) or was made from other
      contents; if its checkpoints are gone.
    WriteFailed: if the directory cannot be written.
  """
  path = check_path(workdir)
  wanted = json.loads(json.dumps(config.to_dict()))
  prints = dict(fingerprints or {})
  processes.check_same("their configuration or contents", {"config": wanted, "fingerprints": prints})
  claimed = lease.Claim(path, command, holds=False)

  def on_main() -> str:
    nonlocal claimed
    with writing(path / "run.lease"):
      path.mkdir(parents=True, exist_ok=True)
      claimed = lease.Claim(path, command)
    _take_over(path, wanted, command, prints, resume=resume)
    return claimed.token

  try:
    token = processes.on_main(f"claiming {path}", on_main, seconds=lease.LEASE_SECONDS + processes.start_seconds())
    seen = {"run.lease": token if claimed.token else _seen(path, token)}
    what = f"the directory {path}, which must be on storage that all of them share"
    processes.check_same(what, seen, seconds=2 * lease.LEASE_SECONDS)
  except BaseException:
    claimed.close()
    raise
  claimed.fingerprints = prints
  return claimed


def check_path(workdir: str | os.PathLike) -> pathlib.Path:
  """The absolute path of a work directory.

  Raises:
    ValueError: if it is empty, a URL, no directory, or has characters that TensorStore and glob read as a pattern.
  """
  text = os.fspath(workdir)
  if not text.strip():
    raise ValueError("--workdir is empty: give a directory, such as --workdir=runs/first.")
  if re.match(_URL, text):
    raise ValueError(
      f"--workdir={text} is a URL, and a run is written to a directory: mount the bucket (Cloud Storage FUSE, or a "
      "shared disk) and give the mounted path."
    )
  path = pathlib.Path(os.path.expanduser(text)).absolute()  # The shell does not expand ~ in --workdir=~/runs.
  strange = sorted({character for character in str(path) if character in "[]*?\\" or not character.isprintable()})
  if strange:
    raise ValueError(
      f"--workdir={text!r}: the path {str(path)!r} has {' '.join(map(repr, strange))}, which the checkpoint library "
      "reads as a pattern, so that nothing saved there could be read again. Choose a path without them."
    )
  there = next((each for each in (path, *path.parents) if os.path.lexists(each)), path)
  if os.path.lexists(there) and not there.is_dir():
    raise ValueError(
      f"--workdir={text}: {there} is a file, or a link to nothing, and a run is written to a directory: choose another "
      "path."
    )
  return path


def read(workdir: str | os.PathLike) -> dict[str, Any]:
  """The config.json of a work directory: its `config`, `command`, `fingerprints` and `version`.

  Raises:
    ValueError: if there is none, or if it is damaged, foreign, or of another format.
  """
  path = pathlib.Path(workdir) / "config.json"
  try:
    if path.exists() and not path.is_file():
      raise ValueError("it is no file")
    if path.stat().st_size > _MOST_CONFIG:
      raise ValueError(f"it has {path.stat().st_size} bytes, and at most {_MOST_CONFIG} are read")
    text = path.read_text(encoding="utf-8")
  except FileNotFoundError:
    raise ValueError(f"{workdir} is no work directory of experiments/train.py: it has no config.json.") from None
  except (OSError, ValueError) as error:
    raise ValueError(f"{path} is not readable: {error}") from error
  try:
    held = json.loads(text)
  except (ValueError, RecursionError) as error:
    what = "is empty" if not text.strip() else f"is cut off or damaged ({error})"
    rest = "and no checkpoint is there: remove the directory and start again"
    if newest_checkpoint(workdir) is not None:
      rest = "and checkpoints are there: put the file back from a copy, or choose another --workdir"
    raise ValueError(f"{path} {what}, {rest}.") from error
  if not isinstance(held, dict) or not isinstance(held.get("config"), dict) or "command" not in held:
    raise ValueError(f"{path} is another program's: it has no configuration of a run. Choose another --workdir.")
  if held.get("format") != FORMAT:
    raise ValueError(
      f"{path} was written by another version of this program (format {held.get('format')!r}, version "
      f"{visible(held.get('version', 'unknown'))}; this is format {FORMAT}, version {version()}), and may mean other "
      "things by the same names. Go on with that version, or choose another --workdir."
    )
  prints = held.get("fingerprints")
  return held | {"fingerprints": {name: str(x) for name, x in prints.items()} if isinstance(prints, dict) else {}}


def _take_over(
  path: pathlib.Path, wanted: dict[str, Any], command: str, fingerprints: dict[str, str], *, resume: bool
) -> None:
  """Writes config.json into a new directory, or checks that the run there is this one."""

  def write_config() -> None:
    new = {
      "format": FORMAT, "version": version(), "command": command, "fingerprints": fingerprints, "config": wanted,
    }  # fmt: skip
    with writing(path / "config.json"):
      files.write_whole(path / "config.json", json.dumps(new, indent=1))

  if not (path / "config.json").exists():
    left = [name for name in _HOLDINGS if (path / name).exists()]
    if left:
      raise ValueError(
        f"{path} holds {' and '.join(left)} but no config.json, which says whose they are: put it back, remove them, "
        "or choose another --workdir."
      )
    write_config()
    return
  held = read(path)
  if not _is_begun(path):
    # A start that was refused after config.json had been written must not keep the corrected command out.
    write_config()
    return
  differing = differences.run_differences(held["config"], wanted)
  if differing:
    raise ValueError(f"{path} holds a run of another configuration: {', '.join(differing)}. Choose another --workdir.")
  if not resume:
    raise ValueError(f"{path} holds a run and --noresume was given: choose another --workdir or remove it.")
  fingerprints_lib.check(held.get("fingerprints", {}), fingerprints, where=f"the run in {path}")
  _check_checkpoints(path, wanted)


def _is_begun(path: pathlib.Path) -> bool:
  """Whether a directory with a config.json holds anything else that a run has made."""
  start = {"config.json", "run.lock", "run.lease", "tensorboard"}
  holds = lambda entry: any(entry.iterdir()) if entry.is_dir() else entry.exists() and entry.stat().st_size > 0
  return any(entry.name not in start and holds(entry) for entry in path.iterdir())


def _check_checkpoints(path: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Refuses to begin a run again, and to drop its metrics, because its checkpoints have been removed."""
  if newest_checkpoint(path) is not None:
    return
  last = _last_step(path / "metrics.jsonl")
  saving = config.get("checkpoint", {})
  # A run that is killed before its first save has metrics and an empty directory; a second one ends a failing run.
  enough = last is not None and last > 2 * saving.get("every", 0) and saving.get("on_failure") != "continue"
  if last is not None and (enough or not (path / "checkpoints").is_dir()):
    raise ValueError(
      f"{path} has metrics to step {last} and no checkpoint: {path / 'checkpoints'} has been removed or emptied. Put "
      f"it back; to begin the run again from its start, remove {path / 'metrics.jsonl'}; or choose another --workdir."
    )


def _last_step(path: pathlib.Path) -> int | None:
  last = None
  with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as lines:
    for line in lines:
      with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        last = int(json.loads(line)["step"])
  return last


def _seen(workdir: pathlib.Path, token: str) -> str | None:
  """The token in the directory, as a process other than the first sees it. Storage may show it some seconds late."""
  deadline = time.monotonic() + lease.LEASE_SECONDS
  while True:
    holder = lease.read(workdir) or {}
    if holder.get("token") == token or time.monotonic() > deadline:
      return holder.get("token")
    time.sleep(0.2)


# ---- One file instead of a directory ------------------------------------------------------------


@contextlib.contextmanager
def alone(path: str | os.PathLike) -> Iterator[None]:
  """Holds one file of results, whose folder is made, while it is written by a command that has no work directory.

  The lock is on `<path>.lock`, which stays. The kernel releases it however the process ends.

  Raises:
    ValueError: if another process holds it, or if `path` is a directory or a URL.
    WriteFailed: if the folder cannot be written.
  """
  if re.match(_URL, os.fspath(path)):
    raise ValueError(f"--output={os.fspath(path)} must be a file on a disk, and is a URL.")
  files.check_target(path)
  with writing(path):
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    descriptor, held = lease.try_lock(f"{os.fspath(path)}.lock")
  try:
    if not held:
      raise ValueError(f"{path} is being written by another process: wait for its end, or choose another --output.")
    yield
  finally:
    os.close(descriptor)
