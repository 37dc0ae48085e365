"""Metrics of a run: JSON lines, TensorBoard and a tracker, fetched a step late.

Fetching a step's metrics waits for that step. So they are fetched after the next step
has been dispatched, and the device is not idle meanwhile. The thread that trains writes
them, because an error of a background thread would not be seen. A tracker has a process of its own (`tracking.py`).
"""

import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import tensorboardX.event_file_writer
import tensorboardX.proto.event_pb2 as event_pb2
import tensorboardX.proto.summary_pb2 as summary_pb2

from rredcot_jax.report import files
from rredcot_jax.train import tracking
from rredcot_jax.train import workdir as workdir_lib


class MetricsWriter:
  """Appends to `metrics.jsonl` (and TensorBoard) in a work directory, and hands over to a tracker."""

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    resume_step: int,
    writes: bool = True,
    tracker: tracking.Tracker | None = None,
  ):
    """Opens the files, and drops lines of steps after `resume_step`, which will be run again.

    With `writes` off it only reads the metrics, because one of several processes writes. The caller closes the tracker.

    Raises:
      WriteFailed: if `metrics.jsonl` cannot be written.
    """
    self._path = pathlib.Path(workdir) / "metrics.jsonl"
    self._writes = writes
    self._tracker = tracker if writes else None
    self._board = _Board(pathlib.Path(workdir) / "tensorboard", resume_step + 1) if writes else None
    if writes:
      drop_lines_after(self._path, resume_step)
    self._pending: list[tuple[int, Mapping[str, Any]]] = []

  @property
  def num_lost_events(self) -> int:
    """The number of steps missing in TensorBoard, because it could not be written."""
    return self._board.num_lost if self._board is not None else 0

  def write(self, step: int, metrics: Mapping[str, Any]) -> list[dict]:
    """Takes the metrics of `step` and writes those taken before it; returns the lines written."""
    written = self.flush()
    self._pending.append((step, metrics))
    return written

  def flush(self) -> list[dict]:
    """Writes everything taken so far, durably; returns the lines.

    If TensorBoard or the tracker did not take all, a line says how many steps it lacks.

    Raises:
      WriteFailed: if `metrics.jsonl` cannot be written; it ends with its last whole line then.
    """
    pending, self._pending = self._pending, []
    lines = []
    for step, metrics in pending:
      values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
      if self._board is not None:
        self._board.add(step, values)
        if self._board.num_lost:
          values["train/tensorboard_lost"] = float(self._board.num_lost)
      if self._tracker is not None:
        self._tracker.add(step, values)
        if self._tracker.num_lost:
          values["train/tracker_lost"] = float(self._tracker.num_lost)
      lines.append({"step": step, **values})
    if lines and self._writes:
      append_lines(self._path, lines)
    return lines

  def close(self) -> None:
    self.flush()
    if self._board is not None:
      self._board.close()


class _Board:
  """Scalars for TensorBoard. After an error it warns, writes no more, and counts the steps that are missing."""

  def __init__(self, directory: pathlib.Path, purge_step: int):
    self.num_lost = 0
    self._writer: Any = None
    try:
      directory.mkdir(parents=True, exist_ok=True)
      self._writer = tensorboardX.event_file_writer.EventsWriter(str(directory / "events"))
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._writer.write_event(event_pb2.Event(step=purge_step, wall_time=time.time(), session_log=start))
      self._writer.flush()
    except OSError as error:
      self._give_up(error)

  def add(self, step: int, values: Mapping[str, float]) -> None:
    scalars = [
      summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in values.items() if math.isfinite(value)
    ]
    if self._writer is None:
      self.num_lost += 1
      return
    try:
      event = event_pb2.Event(step=step, wall_time=time.time(), summary=summary_pb2.Summary(value=scalars))
      self._writer.write_event(event)
      self._writer.flush()
    except OSError as error:
      self.num_lost += 1
      self._give_up(error)

  def close(self) -> None:
    if self._writer is not None:
      try:
        self._writer.close()
      except OSError as error:
        self._give_up(error)

  def _give_up(self, error: OSError) -> None:
    self._writer = None
    logging.warning(
      "TensorBoard's events cannot be written (%s) and are left out until the run is resumed; metrics.jsonl has all.",
      error.strerror or error,
    )  # fmt: skip


def append_lines(path: str | os.PathLike, records: Iterable[Mapping[str, Any]]) -> None:
  """Appends records to a JSON-lines file, durably, all of them or none.

  Raises:
    WriteFailed: if they cannot be written; the file is then as it was.
  """
  data = "".join(json.dumps(record) + "\n" for record in records).encode()
  with workdir_lib.writing(path):
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
      size = os.fstat(descriptor).st_size
      try:
        rest = memoryview(data)
        while rest:
          rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
      except OSError:
        os.ftruncate(descriptor, size)
        raise
    finally:
      os.close(descriptor)


def drop_lines_after(path: str | os.PathLike, step: int) -> None:
  """Rewrites a JSON-lines file, whole, without lines whose `step` is later or that are half-written.

  Raises:
    WriteFailed: if it cannot be written; the file is then as it was.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return
  kept, damaged = [], 0
  with workdir_lib.writing(path):
    text = path.read_text(encoding="utf-8", errors="replace")
  lines = text.split("\n")
  for number, line in enumerate(lines, start=1):
    try:
      if json.loads(line)["step"] <= step:
        kept.append(line + "\n")
    except (ValueError, KeyError, TypeError, RecursionError):
      damaged += number < len(lines)  # The last one may be half of a line, or empty.
  if damaged:
    logging.warning("%s: %d damaged lines are left out, the others kept.", path, damaged)
  if "".join(kept) != text:
    with workdir_lib.writing(path):
      files.write_whole(path, "".join(kept))


def is_evaluated(path: str | os.PathLike, step: int) -> bool:
  """Whether a metrics.jsonl has the evaluation of `step`; False where the file is missing or has no whole line."""
  try:
    text = pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
  except FileNotFoundError:
    return False
  for line in text.split("\n"):
    try:
      values = json.loads(line)
      if values["step"] == step and "eval/pass@1" in values:
        return True
    except (ValueError, KeyError, TypeError, RecursionError):
      continue
  return False
