"""Metrics of a run: JSON lines and TensorBoard, fetched a step late.

Fetching a step's metrics waits for that step, so they are fetched when the
next step has been dispatched: the device is never idle for them.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import tensorboardX

from rredcot_jax.report import files


class MetricsWriter:
  """Appends to `metrics.jsonl` (and TensorBoard) in a work directory."""

  def __init__(self, workdir: str | os.PathLike, *, resume_step: int, writes: bool = True):
    """Opens the files; lines of steps after `resume_step` belong to a lost future and are dropped.

    With `writes` off it only reads the metrics: of several processes, one writes.
    """
    self._path = pathlib.Path(workdir) / "metrics.jsonl"
    self._writes = writes
    if writes:
      drop_lines_after(self._path, resume_step)
      self._file = open(self._path, "a", encoding="utf-8")
      self._board = tensorboardX.SummaryWriter(
        str(pathlib.Path(workdir) / "tensorboard"), purge_step=resume_step + 1, flush_secs=30
      )
    self._pending: list[tuple[int, Mapping[str, Any]]] = []

  def write(self, step: int, metrics: Mapping[str, Any]) -> list[dict]:
    """Takes the metrics of `step` and writes those taken before it; returns the lines written."""
    written = self.flush()
    self._pending.append((step, metrics))
    return written

  def flush(self) -> list[dict]:
    """Writes everything taken so far, durably; returns the lines."""
    pending, self._pending = self._pending, []
    lines = []
    for step, metrics in pending:
      values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
      lines.append({"step": step, **values})
      if not self._writes:
        continue
      self._file.write(json.dumps(lines[-1]) + "\n")
      for name, value in values.items():
        if math.isfinite(value):
          self._board.add_scalar(name, value, step)
    if lines and self._writes:
      self._file.flush()
      os.fsync(self._file.fileno())
    return lines

  def close(self) -> None:
    self.flush()
    if self._writes:
      self._file.close()
      self._board.close()


def drop_lines_after(path: str | os.PathLike, step: int) -> None:
  """Rewrites a JSON-lines file, atomically, without lines whose `step` is later or that are half-written."""
  path = pathlib.Path(path)
  if not path.exists():
    return
  kept = []
  for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
    try:
      if json.loads(line)["step"] <= step:
        kept.append(line + "\n")
    except (ValueError, KeyError, TypeError):
      continue
  files.write_whole(path, "".join(kept))
