"""Metrics of a run: JSON lines and TensorBoard, fetched a step late; pass@k.

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
import numpy as np
import tensorboardX


class MetricsWriter:
  """Appends to `metrics.jsonl` (and TensorBoard) in a work directory."""

  def __init__(self, workdir: str | os.PathLike, *, resume_step: int):
    """Opens the files; lines of steps after `resume_step` belong to a lost future and are dropped."""
    self._path = pathlib.Path(workdir) / "metrics.jsonl"
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
      self._file.write(json.dumps(lines[-1]) + "\n")
      for name, value in values.items():
        if math.isfinite(value):
          self._board.add_scalar(name, value, step)
    self._file.flush()
    if lines:
      os.fsync(self._file.fileno())
    return lines

  def close(self) -> None:
    self.flush()
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
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text("".join(kept), encoding="utf-8")
  os.replace(temporary, path)


def pass_at_k(num_correct: np.ndarray, num_samples: int, k: int) -> np.ndarray:
  """Unbiased pass@k of each prompt (arXiv 2107.03374): 1 - C(n - c, k) / C(n, k).

  Args:
    num_correct: [B] int in [0, n].
    num_samples: n.
    k: in [1, n].

  Returns:
    [B] float64 in [0, 1].
  """
  if not 1 <= k <= num_samples:
    raise ValueError(f"pass@{k} needs 1 <= k <= {num_samples} samples a prompt.")
  total = math.comb(num_samples, k)
  return np.array([1.0 - math.comb(num_samples - int(c), k) / total for c in num_correct])


def mean_and_error(x: np.ndarray) -> tuple[float, float]:
  """Mean and its standard error over the leading axis; the error of one value is NaN."""
  x = np.asarray(x, np.float64)
  error = x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
  return float(x.mean()), float(error)
