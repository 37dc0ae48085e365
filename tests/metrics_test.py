"""Metrics of a run: lines that survive a kill, nothing written twice."""

import json

import numpy as np

from rredcot_jax.train import metrics


def test_lines_of_a_lost_future_and_half_lines_are_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "x": 1.0}\n{"step": 2, "x": 2.0}\n{"step": 3, "x"')
  writer = metrics.MetricsWriter(tmp_path, resume_step=1)
  assert writer.write(2, {"x": 5.0}) == []  # A step late.
  assert writer.write(3, {"x": np.nan}) == [{"step": 2, "x": 5.0}]
  assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
  writer.close()
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert [line["x"] for line in lines[:2]] == [1.0, 5.0] and np.isnan(lines[2]["x"])
