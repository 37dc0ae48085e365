"""Metrics of a run: lines that survive a kill and a full disk, nothing written twice, no writer that fails unseen."""

import json
import logging
import os
import re
import time

import numpy as np
import pytest
from helpers import full_disk
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from rredcot_jax.train import metrics
from rredcot_jax.train.workdir import WriteFailed


def read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_of_a_lost_future_and_half_lines_are_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "x": 1.0}\n{"step": 2, "x": 2.0}\n{"step": 3, "x"')
  writer = metrics.MetricsWriter(tmp_path, resume_step=1)
  assert writer.write(2, {"x": 5.0}) == []  # A step late.
  assert writer.write(3, {"x": np.nan}) == [{"step": 2, "x": 5.0}]
  assert [line["step"] for line in read(path)] == [1, 2]
  writer.close()
  lines = read(path)
  assert [line["x"] for line in lines[:2]] == [1.0, 5.0] and np.isnan(lines[2]["x"])


def test_a_damaged_line_is_counted_and_the_others_kept(tmp_path, caplog):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"stxp": 2}\nxx\n{"step": 3}\n{"step": 4}')
  with caplog.at_level(logging.WARNING):
    metrics.drop_lines_after(path, 4)
  assert [line["step"] for line in read(path)] == [1, 3, 4]  # The last lacks its line end alone.
  assert "2 damaged lines are left out" in caplog.text
  caplog.clear()
  path.write_text('{"step": 1}\n{"st')
  metrics.drop_lines_after(path, 4)
  assert read(path) == [{"step": 1}] and not caplog.records


def test_a_file_without_anything_to_drop_is_not_written_again(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n')
  before = path.stat().st_ino
  metrics.drop_lines_after(path, 1)
  assert path.stat().st_ino == before


@pytest.mark.parametrize(
  ("text", "evaluated"),
  [
    (None, False),
    ("", False),
    ('{"step": 3, "eval/pass@1"', False),
    ('{"step": 3, "train/loss": 0.5}\n', False),
    ('{"step": 2, "eval/pass@1": 0.5}\n', False),
    ('x\n[]\n{"step": 3, "eval/pass@1": 0.5}\n{"st', True),
  ],
)
def test_whether_a_step_is_evaluated_is_known_without_a_whole_line_too(tmp_path, text, evaluated):
  if text is not None:
    (tmp_path / "metrics.jsonl").write_text(text)
  assert metrics.is_evaluated(tmp_path / "metrics.jsonl", 3) == evaluated


# ---- TensorBoard -----------------------------------------------------------------------------


def events_of(workdir):
  """Events of all files, by the format's description: length, its checksum, data, its checksum."""
  events = []
  for path in sorted((workdir / "tensorboard").iterdir()):
    data = path.read_bytes()
    while data:
      size = int.from_bytes(data[:8], "little")
      event, checksum = data[12 : 12 + size], int.from_bytes(data[12 + size : 16 + size], "little")
      assert checksum == masked_crc32c(event)
      events.append(event_pb2.Event.FromString(event))
      data = data[16 + size :]
  return events


def test_tensorboard_gets_finite_scalars_and_is_told_what_is_void(tmp_path):
  began = time.time()
  writer = metrics.MetricsWriter(tmp_path, resume_step=4)
  writer.write(5, {"loss": 0.5, "nothing": np.nan})
  writer.write(6, {"loss": 0.25})
  writer.close()
  head, start, *events = events_of(tmp_path)
  assert head.file_version == "brain.Event:2"
  # What a killed run wrote of step 5 and later is void.
  assert (start.step, start.session_log.status) == (5, event_pb2.SessionLog.START)
  found = [(event.step, [(value.tag, value.simple_value) for value in event.summary.value]) for event in events]
  assert found == [(5, [("loss", 0.5)]), (6, [("loss", 0.25)])]
  assert all(began <= event.wall_time <= time.time() for event in events)


def test_of_several_processes_one_writes(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, resume_step=-1, writes=False)
  writer.write(1, {"x": 1.0})
  assert writer.flush() == [{"step": 1, "x": 1.0}]
  writer.close()
  assert not list(tmp_path.iterdir())


# ---- A full disk -----------------------------------------------------------------------------


def test_metrics_that_cannot_be_written_stop_the_run_and_leave_whole_lines(tmp_path):
  (tmp_path / "checkpoints" / "7").mkdir(parents=True)
  writer = metrics.MetricsWriter(tmp_path, resume_step=-1)
  writer.write(8, {"x": 1.0})
  writer.flush()
  size = (tmp_path / "metrics.jsonl").stat().st_size
  writer.write(9, {"x": 2.0})
  message = r"metrics\.jsonl could not be written \(File too large\); checkpoint 7 is untouched\. Make room in"
  with full_disk(size + 5), pytest.raises(WriteFailed, match=message):  # 5 bytes of the line would fit.
    writer.flush()
  assert read(tmp_path / "metrics.jsonl") == [{"step": 8, "x": 1.0}]
  writer.write(9, {"x": 2.0})
  writer.close()  # There is room again.
  assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [8, 9]


def test_a_directory_in_the_place_of_the_file_is_named(tmp_path):
  (tmp_path / "metrics.jsonl").mkdir()
  with pytest.raises(WriteFailed, match=r"metrics\.jsonl could not be written \(Is a directory\)"):
    metrics.MetricsWriter(tmp_path, resume_step=-1)


@pytest.mark.parametrize("full_from_the_start", [True, False])
def test_tensorboard_that_cannot_be_written_is_given_up_and_counted(tmp_path, caplog, monkeypatch, full_from_the_start):
  monkeypatch.setattr(metrics, "append_lines", lambda path, lines: written.extend(lines))
  written = []
  with full_disk(10) if full_from_the_start else full_disk(10_000), caplog.at_level(logging.WARNING):
    writer = metrics.MetricsWriter(tmp_path, resume_step=-1)
    began = time.monotonic()
    for step in range(400):  # Many more than any queue holds.
      writer.write(step, {"x": float(step), "y": 1.0})
    writer.close()
    assert time.monotonic() - began < 20
  assert [line["step"] for line in written] == list(range(400))
  assert caplog.text.count("TensorBoard's events cannot be written (File too large)") == 1
  lost = writer.num_lost_events
  assert lost == 400 if full_from_the_start else 100 < lost < 399
  assert written[-1]["train/tensorboard_lost"] == lost
  assert sum("train/tensorboard_lost" in line for line in written) == lost
  if not full_from_the_start:
    assert "train/tensorboard_lost" not in written[0]


def test_traces_are_appended_all_or_none(tmp_path):
  path = tmp_path / "traces.jsonl"
  metrics.append_lines(path, [{"step": 1, "text": "ü\u2028"}])
  before = path.read_bytes()
  with (
    full_disk(len(before) + 30),
    pytest.raises(WriteFailed, match=r"traces\.jsonl could not be written \(File too large\)"),
  ):
    metrics.append_lines(path, [{"step": 2}, {"step": 2, "text": "x" * 100}])
  assert path.read_bytes() == before
  metrics.append_lines(path, [{"step": 2}])
  assert [line["step"] for line in read(path)] == [1, 2]


def test_what_is_written_is_on_the_disk_before_it_is_counted_on(tmp_path, monkeypatch):
  synced, fsync = [], os.fsync
  monkeypatch.setattr(
    os, "fsync", lambda descriptor: (synced.append(os.readlink(f"/proc/self/fd/{descriptor}")), fsync(descriptor))
  )
  metrics.append_lines(tmp_path / "a.jsonl", [{"step": 1}])
  (tmp_path / "a.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
  metrics.drop_lines_after(tmp_path / "a.jsonl", 1)
  assert synced[0] == str(tmp_path / "a.jsonl") and any(re.search(r"a\.jsonl.*tmp", name) for name in synced[1:])
