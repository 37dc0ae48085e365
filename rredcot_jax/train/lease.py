"""Who may write in a work directory: a lock of the kernel, and a lease for filesystems whose locks do not reach far.

Process 0 locks `run.lock`, and the kernel releases the lock however the process ends. On some filesystems locks do
not reach other machines, so process 0 also renews `run.lease` every few seconds.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from rredcot_jax.report.text import shorten, visible

LEASE_SECONDS = 30.0  # A holder on another machine that has not renewed its lease for so long is considered dead.
_BEAT_SECONDS = 5.0
_MOST_LEASE = 2**16  # Bytes read of run.lease.


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
      holder = read(self._path)
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
  descriptor, held = try_lock(workdir / "run.lock")
  if not held:
    os.close(descriptor)
    raise _in_use(workdir, read(workdir))
  return descriptor


def try_lock(path: str | os.PathLike) -> tuple[int, bool]:
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
  former = read(workdir)
  if former is None:
    return
  me = _me()
  if me["boot"] and all(former.get(name) == me[name] for name in ("boot", "namespace")):
    started = _started(former.get("pid"))
    if started is not None and started == former.get("started"):
      raise _in_use(workdir, former)
    return
  # Its holder is on another machine or in another container, where locks may not reach. So the lease is watched.
  print(f"{workdir} was held by {_describe(former)}: watching for {LEASE_SECONDS:g} s whether it is alive.", flush=True)
  deadline = time.monotonic() + LEASE_SECONDS
  while time.monotonic() < deadline:
    time.sleep(min(_BEAT_SECONDS, 1.0) / 2)
    now = read(workdir)
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


def read(workdir: pathlib.Path) -> dict[str, Any] | None:
  """What run.lease says; None where there is none, {} while it is being written."""
  try:
    with open(workdir / "run.lease", "rb") as file:
      held = json.loads(file.read(_MOST_LEASE))
    return held if isinstance(held, dict) else {}
  except FileNotFoundError:
    return None
  except (OSError, ValueError, RecursionError):
    return {}
