"""Metrics: pass@k by enumeration, lines that survive a kill, nothing written twice."""

import itertools
import json

import numpy as np
import pytest

from rredcot_jax import metrics


@pytest.mark.parametrize(("n", "k"), [(4, 1), (4, 2), (5, 3), (4, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_success(n, k):
  for correct in range(n + 1):
    samples = [True] * correct + [False] * (n - correct)
    subsets = list(itertools.combinations(samples, k))
    expected = sum(any(subset) for subset in subsets) / len(subsets)
    assert metrics.pass_at_k(np.array([correct]), n, k)[0] == pytest.approx(expected, abs=1e-12)
  with pytest.raises(ValueError, match=f"pass@{n + 1}"):
    metrics.pass_at_k(np.array([0]), n, n + 1)


def test_standard_error():
  assert metrics.mean_and_error(np.array([1.0, 0.0, 1.0, 0.0])) == (0.5, pytest.approx((1 / 3) ** 0.5 / 2))


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
