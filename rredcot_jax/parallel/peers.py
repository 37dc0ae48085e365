"""Connections between the processes of one run, which meet before JAX starts, compare facts and notice a lost process.

JAX's own start-up aborts a process when another one is missing, comes twice or differs. It says neither
which process nor why. So the processes meet first, at the coordinator's address. Process 0 listens, and the
others connect and say who they are. The connections stay open. They carry texts of a few kilobytes, on which
all processes must agree, and never arrays. All texts go through process 0. The kernel closes a connection when
its process dies, and its keepalive probes notice a network that is cut.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_GREETING = b"rredcot-jax peers 1\n"  # What process 0 says first; another program at this address says something else.
_LONGEST_LINE = 8 << 20
_RETRY_SECONDS = 0.3
_NOTE_SECONDS = 10.0  # Between two messages that name the processes waited for.
_TELL_SECONDS = 10.0  # How long process 0, when it refuses, waits for processes that have not been told.


class Lost(RuntimeError):
  """Another process of this run has ended, failed, or cannot be reached any more."""


class Refused(ValueError):
  """The processes of this run cannot go on together; all of them raise it with the same message."""


@dataclasses.dataclass
class _Link:
  """One connection, read by the thread of `Peers` alone."""

  socket: socket.socket
  process: int
  unread: bytes = b""
  leaving: bool = False  # It has said that it ends normally.

  def __post_init__(self) -> None:
    self._sending = threading.Lock()

  def send(self, message: Mapping[str, Any]) -> None:
    """Sends a line. An error is ignored, because the thread that reads notices a closed connection."""
    with self._sending, contextlib.suppress(OSError):
      self.socket.sendall(_line(message))


class Peers:
  """The other processes of this run, from the moment that all of them have met; see `meet`."""

  def __init__(self, me: int, count: int, sockets: Mapping[int, socket.socket], heartbeat_seconds: float):
    self.me, self.count = me, count
    self.lost = ""  # Why another process is considered lost.
    self._links = {process: _Link(one, process) for process, one in sockets.items()}
    self._turn = 0
    self._news = threading.Condition()
    self._said: dict[int, dict[int, tuple[str, str]]] = {}  # By turn and process: the subject and the text.
    self._answers: dict[int, tuple[bool, str]] = {}
    self._when_lost: Callable[[str], None] | None = None
    for link in self._links.values():
      _keep_alive(link.socket, heartbeat_seconds)
    threading.Thread(target=self._read, daemon=True, name="peers").start()

  # ---- What all must agree on ----------------------------------------------------------------

  def consult(self, about: str, text: str, answer: Callable[[list[str]], str], *, seconds: float | None) -> str:
    """Every process sends a text, process 0 answers, and all of them return the answer.

    Args:
      about: the subject, the same on every process. Errors name it where a process does not come.
      text: this process's.
      answer: called on process 0 alone, with the texts in the order of the processes.
      seconds: how long process 0 waits for all of them; None waits until one is lost.

    Raises:
      Refused: if `answer` raises a ValueError, if a process does not come in time, or if one
        asks about something else.
      Lost: if one is lost meanwhile.
    """
    self._turn += 1
    turn = self._turn
    if self.me:
      self._links[0].send({"say": turn, "about": about, "text": text})
      with self._news:
        # Process 0 measures the time. This process waits a little longer for its answer.
        self._wait(lambda: turn in self._answers, None if seconds is None else seconds + 2 * _TELL_SECONDS, about)
        good, told = self._answers.pop(turn)
    else:
      good, told = self._answer(turn, about, text, answer, seconds)
      for link in self._links.values():
        link.send({"answer": turn, "good": good, "text": told})
    if not good:
      raise Refused(told)
    return told

  def _answer(
    self, turn: int, about: str, text: str, answer: Callable[[list[str]], str], seconds: float | None
  ) -> tuple[bool, str]:
    with self._news:
      said = self._said.setdefault(turn, {})
      said[0] = (about, text)
      try:
        self._wait(lambda: len(said) == self.count, seconds, about, said)
      except ValueError as error:
        return False, str(error)
      finally:
        del self._said[turn]
    for process, (other, _) in sorted(said.items()):
      if other != about:
        return False, f"process {process} has come to {other!r} where process 0 has come to {about!r}: {_ALIKE}"
    try:
      return True, answer([said[process][1] for process in range(self.count)])
    except ValueError as error:
      return False, str(error)

  def _wait(
    self, over: Callable[[], bool], seconds: float | None, about: str, said: Mapping[int, Any] | None = None
  ) -> None:
    """Waits, with `_news` held, until it is `over`."""
    began = time.monotonic()
    noted = began + _NOTE_SECONDS
    while not over():
      if self.lost:
        raise Lost(self.lost)
      now = time.monotonic()
      missing = "process 0" if said is None else _names(set(range(self.count)) - set(said))
      left = [link.process for link in self._links.values() if link.leaving and link.process not in (said or ())]
      if left:
        raise Lost(f"{_names(left)} of {self.count} left where the others came to {about!r}")
      if seconds is not None and now > began + seconds:
        raise Refused(f"{missing} of {self.count} did not come to {about!r} within {seconds:g} s: {_ALIKE}")
      if said is not None and now > noted:
        noted = now + _NOTE_SECONDS
        note(f"waiting for {missing} of {self.count} ({about})")
      self._news.wait(0.5)

  # ---- Loss ----------------------------------------------------------------------------------

  def when_lost(self, handler: Callable[[str], None] | None) -> None:
    """Calls `handler` with the reason, from another thread, when a process is lost, or now if one is lost already."""
    with self._news:
      self._when_lost = handler
      lost = self.lost
    if lost and handler is not None:
      handler(lost)

  def wait_for_loss(self, seconds: float) -> str:
    """Why another process is considered lost, if that is known within `seconds`; else ""."""
    with self._news:
      self._news.wait_for(lambda: self.lost, seconds)
      return self.lost

  def fail(self, reason: str) -> None:
    """Tells the others that this process fails, and why."""
    with self._news:
      self._when_lost = None
    for link in self._links.values():
      link.send({"failed": f"process {self.me} of {self.count} failed: {reason}"})

  def leave(self, seconds: float = 0.0) -> None:
    """Says that this process ends normally, which is not a loss, and waits for the others to say so too."""
    with self._news:
      self._when_lost = None
    for link in self._links.values():
      link.send({"leaving": True})
    with self._news:
      self._news.wait_for(lambda: self.lost or all(link.leaving for link in self._links.values()), seconds)

  def _lose(self, reason: str) -> None:
    with self._news:
      if self.lost:
        return
      self.lost = reason
      handler = self._when_lost
      self._news.notify_all()
    if not self.me:
      for link in self._links.values():
        link.send({"failed": reason})
    if handler is not None:
      handler(reason)

  # ---- The thread that reads -----------------------------------------------------------------

  def _read(self) -> None:
    with selectors.DefaultSelector() as selector:
      for link in self._links.values():
        selector.register(link.socket, selectors.EVENT_READ, link)
      while selector.get_map():
        for key, _ in selector.select():
          link = key.data
          received, why = b"", "it has ended"
          try:
            received = link.socket.recv(1 << 16)
            self._take(link, received)
          except OSError as error:
            why = f"the connection to it broke: {error.strerror}"
          except _UNREADABLE:
            received, why = b"", "it sent a message that cannot be read"
          if received:
            continue
          selector.unregister(link.socket)
          if not link.leaving:
            self._lose(f"process {link.process} of {self.count} is lost ({why})")

  def _take(self, link: _Link, received: bytes) -> None:
    *lines, link.unread = (link.unread + received).split(b"\n")
    for line in lines:
      message = json.loads(line)
      if "say" in message:
        with self._news:
          self._said.setdefault(message["say"], {})[link.process] = (message["about"], message["text"])
          self._news.notify_all()
      elif "answer" in message:
        with self._news:
          self._answers[message["answer"]] = (message["good"], message["text"])
          self._news.notify_all()
      elif "failed" in message:
        self._lose(message["failed"])
      elif "leaving" in message:
        with self._news:
          link.leaving = True
          self._news.notify_all()


# What reading a message can raise, whoever wrote it.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
_LONGER = "RREDCOT_START_SECONDS sets a longer time."
_ALIKE = "start all processes alike, with the same program and the same flags but --process_id."


# ---- Meeting ---------------------------------------------------------------------------------


def meet(
  coordinator: str, count: int, me: int, *, seconds: float, heartbeat_seconds: float, refusal: str = ""
) -> Peers:
  """Waits until all processes of a run are there.

  Args:
    coordinator: "host:port" where process 0 listens; the port is free again when this returns.
    count, me: n >= 2, and which of 0 .. n - 1 this process is.
    seconds: how long to wait for all of them.
    heartbeat_seconds: a machine that cannot be reached is considered lost within this time.
    refusal: why this process will not take part; the others are told.

  Raises:
    Refused: naming the processes that did not come, an id given twice or out of range, another
      number of processes, or a process that refuses and why; on every process that was reached.
    ValueError: if the address is in use, if no process answers, or with `refusal`.
  """
  host, port = _address(coordinator)
  if not refusal and not 0 <= me < count:
    refusal = f"process_id={me} is none of 0 to {count - 1}, the ids of {count} processes."
  if refusal:
    note(refusal)
  hello = {"process": me, "count": count, "refusal": refusal, "where": f"{socket.gethostname()}, pid {os.getpid()}"}
  if me == 0:
    sockets = _listen(host, port, hello, seconds)
  else:
    sockets = {0: _connect(host, port, hello, seconds)}
  return Peers(me, count, sockets, heartbeat_seconds)


def _address(coordinator: str) -> tuple[str, int]:
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
    raise ValueError(f"the coordinator {coordinator!r} must be host:port, the address of process 0.")
  return host.strip("[]"), int(port)


def _listen(host: str, port: int, hello: Mapping[str, Any], seconds: float) -> dict[int, socket.socket]:
  """Process 0's side of `meet`: a connection to every other process."""
  with _bound(host, port) as listener:
    meeting = _Meeting(hello)
    began = time.monotonic()
    noted, told = began + _NOTE_SECONDS, 0.0
    while meeting.missing:
      now = time.monotonic()
      if meeting.error:  # Processes that come later are told too.
        told = told or now + _TELL_SECONDS
        if now > told:
          break
      elif now > began + seconds:
        meeting.error = (
          f"{_names(meeting.missing)} of {meeting.count} did not come to {host}:{port} within {seconds:g} s. "
          f"Process 0 waited on {hello['where']}: see what the missing ones say, and that they reach this address. "
          f"{_LONGER}"
        )
        break
      if now > noted:
        noted = now + _NOTE_SECONDS
        note(f"waiting for {_names(meeting.missing)} of {meeting.count} at {host}:{port}")
      meeting.wait(listener)
  return meeting.close()


class _Meeting:
  """Who has come to process 0 so far."""

  def __init__(self, hello: Mapping[str, Any]):
    self.count = hello["count"]
    self.error = f"process 0 refuses to start: {hello['refusal']}" if hello["refusal"] else ""
    self._where = {0: hello["where"]}
    self._come: dict[int, socket.socket] = {}
    self._others: list[socket.socket] = []  # Those that are refused.
    self._unread: dict[socket.socket, bytes] = {}  # Those that have not said who they are.

  @property
  def missing(self) -> set[int]:
    return set(range(self.count)) - set(self._where)

  def wait(self, listener: socket.socket) -> None:
    """Reads what arrives within half a second."""
    with selectors.DefaultSelector() as selector:
      for watched in (listener, *self._unread, *self._come.values()):
        selector.register(watched, selectors.EVENT_READ)
      ready: list[Any] = [key.fileobj for key, _ in selector.select(0.5)]
    for one in ready:
      if one is listener:
        self._accept(listener)
      elif one in self._unread:
        self._hear(one)
      else:  # A process sends nothing before all have come, so it has ended. It may come again.
        process = next(process for process, other in self._come.items() if other is one)
        del self._come[process], self._where[process]
        one.close()

  def _accept(self, listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
      one, _ = listener.accept()
      one.settimeout(_TELL_SECONDS)
      one.sendall(_GREETING)
      self._unread[one] = b""

  def _hear(self, one: socket.socket) -> None:
    try:
      received = one.recv(1 << 16)
    except OSError:
      received = b""
    line = self._unread.pop(one) + received
    if received and b"\n" not in line and len(line) < 1 << 16:
      self._unread[one] = line
      return
    try:
      hello = json.loads(line)
      self._greet(one, int(hello["process"]), int(hello["count"]), str(hello["refusal"]), str(hello["where"]))
    except _UNREADABLE:  # Not a process of this run: a health check, or a port scanner.
      one.close()

  def _greet(self, one: socket.socket, process: int, count: int, refusal: str, where: str) -> None:
    error = ""
    if refusal:
      error = f"process {process} ({where}) refuses to start: {refusal}"
    elif count != self.count:
      error = f"process {process} ({where}) says that there are {count} processes, and process 0 says {self.count}."
    elif process in self._where:
      error = f"two processes say that they are process {process}: {self._where[process]}, and {where}."
    self.error = self.error or error
    if error:
      self._others.append(one)
    else:
      self._come[process] = one
    self._where.setdefault(process, where)

  def close(self) -> dict[int, socket.socket]:
    """Tells all of them whether they start."""
    for one in (*self._come.values(), *self._others):
      with contextlib.suppress(OSError):
        one.sendall(_line({"error": self.error}))
    for one in self._unread:
      one.close()
    if self.error:
      for one in (*self._come.values(), *self._others):
        _finish(one)
      raise Refused(self.error)
    return self._come


def _connect(host: str, port: int, hello: Mapping[str, Any], seconds: float) -> socket.socket:
  """The other processes' side of `meet`: a connection to process 0."""
  deadline = time.monotonic() + seconds
  found = "nothing answers"
  while time.monotonic() < deadline:
    try:
      one = socket.create_connection((host, port), timeout=min(5.0, seconds))
    except OSError as error:
      found = f"nothing answers: {error.strerror or error}"
      time.sleep(_RETRY_SECONDS)
      continue
    try:
      one.sendall(_line(hello))
      greeting = _read_line(one, 5.0, len(_GREETING))
      if greeting == _GREETING:
        return _verdict(one, hello, host, port, seconds)
      found = "something else than process 0 of this program answers" if greeting else "the connection is closed"
    except OSError as error:
      found = f"the connection broke: {error.strerror or error}"
    one.close()
    time.sleep(_RETRY_SECONDS)
  raise ValueError(
    hello["refusal"]
    or f"process {hello['process']} of {hello['count']} did not find process 0 at {host}:{port} within {seconds:g} s "
    f"({found}). Process 0 must run there, and this machine must reach it. {_LONGER}"
  )


def _verdict(one: socket.socket, hello: Mapping[str, Any], host: str, port: int, seconds: float) -> socket.socket:
  """The connection, when process 0 says that all have come.

  Raises:
    OSError: if process 0 has ended. It may be that of an earlier start, so the caller tries again.
    Refused: if process 0 says that they do not start.
  """
  # Process 0 measures the time. It began before this process reached it.
  line = _read_line(one, seconds + 2 * _TELL_SECONDS, 1 << 16)
  if not line.endswith(b"\n"):
    raise OSError(0, f"process 0 at {host}:{port} has ended")
  error = json.loads(line)["error"]
  if error:
    one.close()
    raise Refused(hello["refusal"] or error)
  return one


def _bound(host: str, port: int) -> socket.socket:
  """A listening socket on every interface, as JAX's coordinator will be.

  Raises:
    ValueError: if the port is in use.
  """
  six = socket.has_dualstack_ipv6()
  try:
    return socket.create_server(
      ("", port), family=socket.AF_INET6 if six else socket.AF_INET, dualstack_ipv6=six, backlog=1024, reuse_port=False
    )
  except OSError as error:
    raise ValueError(
      f"process 0 cannot listen on port {port} of {socket.gethostname()} ({error.strerror}): another run, or another "
      f"program, has it. Give all processes another port than that of --coordinator={host}:{port}."
    ) from error


def _read_line(one: socket.socket, seconds: float, most: int) -> bytes:
  """Bytes up to the end of a line, `most` bytes, the other side's close, or the end of the time."""
  line, deadline = b"", time.monotonic() + seconds
  while not line.endswith(b"\n") and len(line) < most:
    one.settimeout(max(deadline - time.monotonic(), 0.01))
    try:
      received = one.recv(1)  # One byte at a time, because what follows the line is read by others.
    except TimeoutError:
      break
    if not received:
      break
    line += received
  return line


def _finish(one: socket.socket) -> None:
  """Closes a connection when the other side has, so that the port is free for the next start."""
  with contextlib.suppress(OSError):
    one.shutdown(socket.SHUT_WR)
    _read_line(one, 1.0, 1 << 16)
  one.close()


def _keep_alive(one: socket.socket, heartbeat_seconds: float) -> None:
  """Lets the kernel probe the other machine, so that it is known to be cut off after 0.4 heartbeats.

  JAX sends a heartbeat twice in `heartbeat_seconds`, so it aborts after 0.5 of them at the earliest.
  """
  one.settimeout(heartbeat_seconds)
  one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
  for name, value in (
    ("TCP_KEEPIDLE", heartbeat_seconds / 10),
    ("TCP_KEEPINTVL", heartbeat_seconds / 10),
    ("TCP_KEEPCNT", 3),
    ("TCP_USER_TIMEOUT", 400 * heartbeat_seconds),  # Milliseconds, for what was sent and not received.
  ):
    if hasattr(socket, name):
      one.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), max(int(value), 1))


def _line(message: Mapping[str, Any]) -> bytes:
  line = json.dumps(message).encode() + b"\n"
  if len(line) > _LONGEST_LINE:
    raise ValueError(f"a message of {len(line)} bytes between processes is longer than {_LONGEST_LINE}.")
  return line


def _names(processes: set[int] | Sequence[int]) -> str:
  """ "process 1" or "processes 1, 2 and 5"; of very many, the first ten."""
  numbers = [str(process) for process in sorted(processes)]
  if len(numbers) > 10:
    numbers = [*numbers[:10], f"{len(numbers) - 10} more"]
  if len(numbers) == 1:
    return f"process {numbers[0]}"
  return f"processes {', '.join(numbers[:-1])} and {numbers[-1]}"


def note(text: str) -> None:
  """Prints to stderr, where it can: a process whose log is on a full disk must end all the same."""
  with contextlib.suppress(OSError, ValueError):
    print(text, file=sys.stderr, flush=True)
