"""A run's work directory: who may write in it, which run it holds, and the errors when it cannot be written.

`claim` is called before anything is written. One run at a time holds a directory. Process 0 locks `run.lock`,
and the kernel releases the lock however the process ends. On some filesystems locks do not reach other machines,
so process 0 also renews `run.lease` every few seconds. `config.json` says which run the directory holds: its
configuration, and hashes of its code and files.
"""

import contextlib
import datetime
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from rredcot_jax.parallel import processes
from rredcot_jax.report import files
from rredcot_jax.report.text import shorten, visible
from rredcot_jax.train import differences

CODE = ("code", "own code")  # The fingerprints of programs: this package's, and those that a configuration names.
FORMAT = 1  # Of config.json and what lies beside it.
_BEAT_SECONDS = 5.0
_LEASE_SECONDS = 30.0  # A holder on another machine that has not renewed its lease for so long is considered dead.
_URL = r"[A-Za-z][A-Za-z0-9+.-]+:/"
_NAMED = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*")  # "package.module:Name".
_MOST_CONFIG, _MOST_LEASE = 2**24, 2**16  # Bytes read of config.json and of run.lease.
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


# ---- What a run is made from -----------------------------------------------------------------


def hash_of_files(paths: Iterable[str | os.PathLike]) -> str:
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


def hash_of_values(values: Iterable[Any]) -> str:
  """A hash of JSON values in their order (rows of a corpus, a template), one at a time in memory."""
  whole = hashlib.sha256()
  for value in values:
    whole.update(json.dumps(value, sort_keys=True).encode() + b"\n")
  return whole.hexdigest()[:32]


@functools.cache
def hash_of_code() -> str:
  """A hash of this package's Python files, which says whether two hosts run the same code."""
  return _hash_of_package(pathlib.Path(__file__).parent.parent)


def hash_of_own_code(config: ConfigDict) -> str:
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
        found[name] = _hash_of_package(pathlib.Path(folder))
      if spec and not spec.submodule_search_locations and spec.origin and os.path.isfile(spec.origin):
        found[name] = hash_of_files([spec.origin])
  found.pop("rredcot_jax", None)  # "code" has it.
  return hash_of_values([found]) if found else ""


def _texts(tree: Any) -> Iterator[str]:
  """All strings in a nest of mappings and lists."""
  if isinstance(tree, str):
    yield tree
  elif isinstance(tree, Mapping | list | tuple):
    for value in tree.values() if isinstance(tree, Mapping) else tree:
      yield from _texts(value)


def _hash_of_package(package: pathlib.Path) -> str:
  whole = hashlib.sha256()
  for path in sorted(package.rglob("*.py")):
    whole.update(f"{path.relative_to(package)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
  return whole.hexdigest()[:32]


def check_fingerprints(held: Mapping[str, str], now: Mapping[str, str], *, where: str) -> None:
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


def version() -> str:
  """This package's version, as installed."""
  try:
    return importlib.metadata.version("rredcot-jax")
  except importlib.metadata.PackageNotFoundError:
    return "unknown"


# ---- Which run a directory holds -------------------------------------------------------------


def claim(
  workdir: str | os.PathLike,
  config: ConfigDict,
  command: str,
  *,
  resume: bool = True,
  fingerprints: Mapping[str, str] | None = None,
) -> "Claim":
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
  claimed = Claim(path, command, holds=False)

  def on_main() -> str:
    nonlocal claimed
    with writing(path / "run.lease"):
      path.mkdir(parents=True, exist_ok=True)
      claimed = Claim(path, command)
    _take_over(path, wanted, command, prints, resume=resume)
    return claimed.token

  try:
    token = processes.on_main(f"claiming {path}", on_main, seconds=_LEASE_SECONDS + processes.start_seconds())
    seen = {"run.lease": token if claimed.token else _seen(path, token)}
    what = f"the directory {path}, which must be on storage that all of them share"
    processes.check_same(what, seen, seconds=2 * _LEASE_SECONDS)
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
  check_fingerprints(held.get("fingerprints", {}), fingerprints, where=f"the run in {path}")
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


# ---- Who may write in it ---------------------------------------------------------------------


@contextlib.contextmanager
def alone(path: str | os.PathLike) -> Iterator[None]:
  """Holds one file of results, whose folder is made, while it is written by a command that has no work directory.

  The lock is on `<path>.lock`, which stays. The kernel releases it however the process ends.

  Raises:
    ValueError: if another process holds it, or if `path` is a directory or a URL.
    WriteFailed: if the folder cannot be written.
  """
  if pathlib.Path(path).is_dir() or re.match(_URL, os.fspath(path)):
    raise ValueError(f"--output={os.fspath(path)} must be a file on a disk, and is a directory or a URL.")
  with writing(path):
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    descriptor, held = _try_lock(f"{os.fspath(path)}.lock")
  try:
    if not held:
      raise ValueError(f"{path} is being written by another process: wait for its end, or choose another --output.")
    yield
  finally:
    os.close(descriptor)


class ClaimLost(RuntimeError):
  """The work directory is another run's now, or has been removed."""


class Claim:
  """A work directory that this process writes in, until `close` or the end of the process."""

  def __init__(self, workdir: pathlib.Path, command: str, *, holds: bool = True):
    """Takes the directory, which must be there.

    Args:
      workdir: the directory.
      command: of this run, named to others who want the directory.
      holds: off for the other processes of a run, whose first one holds it.

    Raises:
      ValueError: if another run that is alive holds it, naming it.
      OSError: if the directory cannot be written.
    """
    self._path, self._lock, self._over = workdir, -1, threading.Event()
    self._lost = ""
    self.token = ""
    self.fingerprints: dict[str, str] = {}  # Of what the run is made from; for its checkpoints.
    if not holds:
      return
    if workdir in _held:  # Closing any descriptor of a locked file releases the lock.
      _held[workdir].close()
    self.token = secrets.token_hex(8)
    self._record = _me() | {"command": command[:1000], "token": self.token}
    self._lock = _locked(workdir)
    try:
      _watch_former(workdir)
      self._renew(0)
    except BaseException:
      os.close(self._lock)
      raise
    _held[workdir] = self
    threading.Thread(target=self._beat, daemon=True, name="lease").start()

  def check(self) -> None:
    """To be called before each step.

    Raises:
      ClaimLost: if the directory was taken by another run, or removed, meanwhile.
    """
    if self._lost:
      raise ClaimLost(self._lost)

  def close(self) -> None:
    """Releases the directory."""
    self._over.set()
    if self._lock < 0:
      return
    if not self._lost:
      (self._path / "run.lease").unlink(missing_ok=True)
    os.close(self._lock)
    self._lock = -1
    _held.pop(self._path, None)

  def __enter__(self) -> "Claim":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _renew(self, beat: int) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = json.dumps(self._record | {"beat": beat, "time": now})
    # It is written in place with a fixed length, so that a full disk has room for it.
    with open(os.open(self._path / "run.lease", os.O_WRONLY | os.O_CREAT, 0o644), "wb") as file:
      file.write(record.encode().ljust(8192))
      file.flush()
      os.fsync(file.fileno())

  def _beat(self) -> None:
    beat, warned = 0, False
    while not self._over.wait(_BEAT_SECONDS):
      beat += 1
      holder = _read_lease(self._path)
      if self._over.is_set():
        return
      if holder is None or holder.get("token", self.token) != self.token:
        whose = f"taken by {_describe(holder)}" if holder else "removed, or moved away"
        self._lost = f"the work directory {self._path} was {whose} while this run was writing in it."
        return
      try:
        self._renew(beat)
      except OSError as error:
        if not warned:
          logging.warning(
            "%s cannot be renewed (%s); the lock still holds the directory.", self._path / "run.lease", error
          )
        warned = True


_held: dict[pathlib.Path, Claim] = {}  # Of this process.


def _locked(workdir: pathlib.Path) -> int:
  """A descriptor of run.lock with the lock on it; without one where the filesystem has no locks."""
  descriptor, held = _try_lock(workdir / "run.lock")
  if not held:
    os.close(descriptor)
    raise _in_use(workdir, _read_lease(workdir))
  return descriptor


def _try_lock(path: str | os.PathLike) -> tuple[int, bool]:
  """A descriptor of a file, made if need be, and whether no other process has the lock on it."""
  # A POSIX lock, because forked children do not inherit it, and on NFS it holds for all machines.
  descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
  try:
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno in (errno.EACCES, errno.EAGAIN):
      return descriptor, False
    logging.warning("%s: this filesystem has no locks (%s): another process may write there too.", path, error.strerror)
  return descriptor, True


def _watch_former(workdir: pathlib.Path) -> None:
  """Returns when the holder of a former run's lease is known to be dead.

  Raises:
    ValueError: if its holder is alive.
  """
  former = _read_lease(workdir)
  if former is None:
    return
  me = _me()
  if me["boot"] and all(former.get(name) == me[name] for name in ("boot", "namespace")):
    started = _started(former.get("pid"))
    if started is not None and started == former.get("started"):
      raise _in_use(workdir, former)
    return
  # Its holder is on another machine or in another container, where locks may not reach. So the lease is watched.
  print(
    f"{workdir} was held by {_describe(former)}: watching for {_LEASE_SECONDS:g} s whether it is alive.", flush=True
  )
  deadline = time.monotonic() + _LEASE_SECONDS
  while time.monotonic() < deadline:
    time.sleep(min(_BEAT_SECONDS, 1.0) / 2)
    now = _read_lease(workdir)
    if now is None:
      return
    if now != former:
      raise _in_use(workdir, now)


def _in_use(workdir: pathlib.Path, holder: Mapping[str, Any] | None) -> ValueError:
  whose = "another process" if holder is None else _describe(holder)
  return ValueError(f"{workdir} is in use by {whose}. Wait for its end, stop it, or choose another --workdir.")


def _describe(holder: Mapping[str, Any]) -> str:
  host, pid, command = (visible(shorten(holder.get(name), 200)) for name in ("host", "pid", "command"))
  return f"a run on {host}, pid {pid} ({command})"


def _me() -> dict[str, Any]:
  """Which process of which machine this is."""
  boot = namespace = ""
  with contextlib.suppress(OSError):  # Linux alone has them.
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    namespace = os.readlink("/proc/self/ns/pid")
  pid = os.getpid()
  return {"host": socket.gethostname(), "pid": pid, "boot": boot, "namespace": namespace, "started": _started(pid)}


def _started(pid: Any) -> str | None:
  """When a process of this machine was started, in the kernel's ticks; None if it has ended."""
  try:
    # After the name, which may hold anything: the state, and 18 fields later the start.
    fields = (
      pathlib.Path(f"/proc/{int(pid)}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    )
  except (OSError, ValueError, TypeError):
    return None
  return None if fields[0] in ("Z", "X") else fields[19]


def _read_lease(workdir: pathlib.Path) -> dict[str, Any] | None:
  """What run.lease says; None where there is none, {} while it is being written."""
  try:
    with open(workdir / "run.lease", "rb") as file:
      held = json.loads(file.read(_MOST_LEASE))
    return held if isinstance(held, dict) else {}
  except FileNotFoundError:
    return None
  except (OSError, ValueError, RecursionError):
    return {}


def _seen(workdir: pathlib.Path, token: str) -> str | None:
  """The token in the directory, as a process other than the first sees it. Storage may show it some seconds late."""
  deadline = time.monotonic() + _LEASE_SECONDS
  while True:
    holder = _read_lease(workdir) or {}
    if holder.get("token") == token or time.monotonic() > deadline:
      return holder.get("token")
    time.sleep(0.2)
