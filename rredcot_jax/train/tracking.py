"""Metrics to Weights & Biases or trackio, through a process of their own.

A tracker is another service, which may fail, hang, or ask a question that nobody answers. So
its package runs in a child process (`tracker_process.py`), and the process that trains never waits for
it before the run has ended. What the tracker did not take is counted, and said once.
"""

import contextlib
import importlib.util
import json
import logging
import math
import os
import pathlib
import secrets
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any

from rredcot_jax.report import files
from rredcot_jax.report.text import one_line

TRACKERS = ("none", "wandb", "trackio")

# Our name of a metric -> TRL's GRPOTrainer's, where both are the same quantity; docs/metrics.md has the table.
TRL_NAMES: Mapping[str, str] = {
  "train/gradient_norm": "train/grad_norm",
  "train/length": "train/completions/mean_length",
  "train/truncated": "train/completions/clipped_ratio",
  "train/zero_variance_groups": "train/frac_reward_zero_std",
  "train/clip_fraction_low": "train/clip_ratio/low_mean",
  "train/clip_fraction_high": "train/clip_ratio/high_mean",
  "train/step_seconds": "train/step_time",
  "eval/length": "eval/completions/mean_length",
  "eval/truncated": "eval/completions/clipped_ratio",
}
STEP = "train/global_step"  # The horizontal axis, as transformers calls it.

_MOST_WAITING = 8 << 20  # Bytes of metrics that the tracker has not read yet; a step has about 2 kB.
_SILENT_SECONDS = 60.0  # A tracker that has not answered for so long is named.
_CLOSE_SECONDS = 60.0  # What the end of a run waits for its tracker.
_STOP_SECONDS = 5.0  # What a run waits that was told to stop or has failed, because its machine may go.
_PROCESS = pathlib.Path(__file__).with_name("tracker_process.py")


def check_installed(tracker: str) -> None:
  """Checks that the package of a tracker is there.

  Raises:
    ValueError: naming what to install.
  """
  if tracker == "none":
    return
  spec = importlib.util.find_spec(tracker)
  # W&B leaves a folder "wandb" where it runs, and Python takes any folder for a package without an __init__.py.
  if spec is None or spec.origin is None:
    raise ValueError(
      f"tracker={tracker!r} needs the package {tracker}, which is not installed: run pip install '.[{tracker}]', or "
      "set tracker='none' (metrics.jsonl and TensorBoard are written in any case)."
    )


def names_of(values: Mapping[str, float], *, loss: str) -> dict[str, float]:
  """`values` under the names that trackers get. cispo keeps our names for its clips, because TRL counts others."""
  ours = ("train/clip_fraction_low", "train/clip_fraction_high") if loss == "cispo" else ()
  return {name if name in ours else TRL_NAMES.get(name, name): value for name, value in values.items()}


@contextlib.contextmanager
def opened(tracker: str, workdir: pathlib.Path, config: Mapping[str, Any]) -> Iterator["Tracker | None"]:
  """The tracker of a run, closed at the end whatever happens; None for "none".

  Args:
    tracker: one of TRACKERS.
    workdir: the run's; the folder's name is the run's name, and `tracker.json` in it keeps its identity.
    config: the run's whole configuration.
  """
  if tracker == "none":
    yield None
    return
  opened = Tracker(tracker, workdir, config)
  try:
    yield opened
  except BaseException:
    opened.close(in_haste=True)
    raise
  opened.close()


class Tracker:
  """Sends lines of metrics to a tracker. Nothing here raises or waits, but for `close`."""

  def __init__(self, name: str, workdir: pathlib.Path, config: Mapping[str, Any]):
    self._name, self._loss = name, config["loss"]["name"]
    self._waiting = bytearray()  # Bytes for the process, which it cannot take yet.
    self._answers = b""  # The part of a line that it has said so far.
    self._sent = self._answered = self._lost = 0  # Steps.
    self._heard = time.monotonic()
    self._warned = self._closed = False
    self._log = workdir / "tracker.log"
    self._process: subprocess.Popen | None = None
    try:
      run = {"tracker": name, "id": _identity(workdir), "name": workdir.name, "dir": str(workdir), "config": config}
      # What the package prints goes to a file, so that it does not mix with the run's own lines.
      with open(self._log, "ab") as log:
        self._process = subprocess.Popen(
          # -P: modules beside the script do not hide others of the same name.
          [sys.executable, "-P", str(_PROCESS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
          start_new_session=True,  # Control-C is for the run, which ends its tracker itself.
        )  # fmt: skip
      for descriptor in self._descriptors():
        os.set_blocking(descriptor, False)
      self._put(run)
    except OSError as error:
      self._give_up(f"cannot be started ({error.strerror or error})")

  @property
  def num_lost(self) -> int:
    """The number of steps that the tracker is known to lack."""
    return self._lost

  def add(self, step: int, values: Mapping[str, float]) -> None:
    """Hands over the finite metrics of a step."""
    self._listen()
    if self._process is None or len(self._waiting) > _MOST_WAITING:
      self._lost += 1
      return
    finite = {name: value for name, value in names_of(values, loss=self._loss).items() if math.isfinite(value)}
    now = time.monotonic()
    if self._sent == self._answered:
      self._heard = now
    elif now - self._heard > _SILENT_SECONDS:
      self._warn(f"has not answered for {_SILENT_SECONDS:.0f} s")
    self._sent += 1
    self._put({"step": step, "values": finite | {STEP: step}})

  def close(self, *, in_haste: bool = False) -> None:
    """Ends the tracker's run, and says how many steps it lacks; the second time it does nothing.

    Args:
      in_haste: waits 5 s for it and not 60 s, and then stops it.
    """
    if self._closed:
      return
    self._closed = True
    seconds = _STOP_SECONDS if in_haste else _CLOSE_SECONDS
    deadline = time.monotonic() + seconds
    while self._waiting and self._process is not None and time.monotonic() < deadline:
      self._listen(deadline - time.monotonic())
    process, self._process = self._process, None
    if process is not None:
      assert process.stdin is not None and process.stdout is not None
      _close(process.stdin)
      try:
        process.wait(max(deadline - time.monotonic(), 0.0))
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        self._warn(f"did not end within {seconds:.0f} s and was stopped")
      self._hear(process.stdout.read() or b"")
      _close(process.stdout)
      self._lost += self._sent - self._answered
    if self._lost:
      logging.warning("the tracker %s lacks %d steps of this run; metrics.jsonl has all.", self._name, self._lost)

  def _descriptors(self) -> tuple[int, int]:
    """Of what the process says, and of what is said to it."""
    assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
    return self._process.stdout.fileno(), self._process.stdin.fileno()

  def _put(self, message: Mapping[str, Any]) -> None:
    self._waiting += json.dumps(message).encode() + b"\n"
    self._listen()

  def _listen(self, seconds: float = 0.0) -> None:
    """Sends what the process can take now and reads what it says; waits for one of both, `seconds` at most."""
    if self._process is None:
      return
    source, sink = self._descriptors()
    with selectors.DefaultSelector() as selector:
      selector.register(source, selectors.EVENT_READ)
      if self._waiting:
        selector.register(sink, selectors.EVENT_WRITE)
      ready = {key.fd for key, _ in selector.select(max(seconds, 0.0))}
    try:
      if source in ready:
        said = os.read(source, 1 << 16)
        self._hear(said)
        if not said:
          self._give_up("has ended by itself")
          return
      if sink in ready:
        del self._waiting[: os.write(sink, self._waiting)]
    except BlockingIOError:
      pass
    except OSError as error:
      self._give_up(f"cannot be reached ({error.strerror or error})")

  def _hear(self, said: bytes) -> None:
    """Reads answers, a line each: "+" for a step taken, "-" and the reason for one that was not, "!" for the start."""
    *lines, self._answers = (self._answers + said).split(b"\n")
    for line in lines:
      self._heard = time.monotonic()
      self._answered += line[:1] in (b"+", b"-")
      self._lost += line[:1] == b"-"
      if line[:1] != b"+":
        self._warn(f"failed ({line[1:].decode(errors='replace')})")

  def _give_up(self, why: str) -> None:
    process, self._process = self._process, None
    self._lost += self._sent - self._answered
    self._waiting.clear()
    self._warn(why)
    if process is not None:
      process.kill()
      process.wait()
      _close(process.stdin)
      _close(process.stdout)

  def _warn(self, what: str) -> None:
    """Says the first trouble alone; `close` says what it cost."""
    if not self._warned:
      self._warned = True
      logging.warning(
        "the tracker %s %s. The run goes on, metrics.jsonl and TensorBoard have all; %s has what the tracker printed.",
        self._name, one_line(what, 300), self._log,
      )  # fmt: skip


def _close(stream: IO[bytes] | None) -> None:
  if stream is not None:
    with contextlib.suppress(OSError):  # It flushes to a process that is gone.
      stream.close()


def _identity(workdir: pathlib.Path) -> str:
  """The identity of the run in `workdir`, which a resumed run keeps, so that the tracker goes on with its curves."""
  path = workdir / "tracker.json"
  with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
    return str(json.loads(path.read_text(encoding="utf-8"))["id"])
  identity = secrets.token_hex(4)
  files.write_whole(path, json.dumps({"id": identity}))
  return identity
