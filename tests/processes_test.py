"""Two processes of two devices equal one of four, also across a kill, a SIGTERM and another process count."""

import http.server
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from typing import NamedTuple

import jax
import numpy as np
import process_run
import pytest
import train
from helpers import run, saved_params, untimed

from rredcot_jax.data.chain import Chain
from rredcot_jax.parallel import processes, sharding
from rredcot_jax.report import records

ROOT = pathlib.Path(__file__).parent.parent
# To float32 reassociation: sums over devices are taken in another order.
CLOSE = {"rel": 1e-4, "abs": 1e-5}


class NoticeAt:
  """A notice that is given from the `count`-th look on."""

  reason = "test"

  def __init__(self, count):
    self._looks_left = count

  @property
  def given(self):
    self._looks_left -= 1
    return self._looks_left <= 0


def run_processes(workdir, fates, changes):
  """Runs len(fates) processes to their ends: exit status, all they printed, seconds after the first end, of each."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    coordinator = f"127.0.0.1:{free.getsockname()[1]}"
  script = str(ROOT / "tests" / "process_run.py")
  flags = ["--config", script, "--workdir", str(workdir), "--coordinator", coordinator, f"--num_processes={len(fates)}"]
  flags += [f"--config.{name}={value}" for name, value in changes.items()]
  environment = os.environ | {
    "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=2"),
    "PYTHONPATH": f"{ROOT}:{ROOT / 'experiments'}",
    "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
  }
  outputs = [tempfile.TemporaryFile("w+") for _ in fates]
  processes = [
    subprocess.Popen(
      [sys.executable, script, *fate, *flags, f"--process_id={index}"],
      env=environment,
      stdout=output,
      stderr=subprocess.STDOUT,
    )
    for index, (fate, output) in enumerate(zip(fates, outputs))
  ]
  ended: dict[int, float] = {}
  try:
    limit = time.monotonic() + 240
    while len(ended) < len(processes) and time.monotonic() < limit:
      now = time.monotonic()
      ended |= {i: now for i, process in enumerate(processes) if i not in ended and process.poll() is not None}
      time.sleep(0.05)
  finally:
    for process in processes:
      process.kill()
      process.wait()
  texts = []
  for output in outputs:
    output.seek(0)
    texts.append(output.read())
  return [(p.returncode, text, ended[i] - min(ended.values())) for i, (p, text) in enumerate(zip(processes, texts))]


def saved_steps(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def test_two_processes_equal_one_across_a_kill_a_sigterm_and_other_layouts(tmp_path, monkeypatch):
  monkeypatch.setattr(Chain, "reward", process_run.reward)
  config = process_run.get_config()
  uninterrupted, workdir = run(config, tmp_path / "whole"), tmp_path / "chained"

  # One process of four devices is told to stop in its second step: saved at the boundary before.
  train.claim_workdir(workdir, config, "test", resume=True)
  assert not train.run(config, workdir, notice=NoticeAt(4))  # Looks: two batches of evaluation, step 1, step 2.
  assert saved_steps(workdir) == [1]

  # Two processes of two devices go on, parameters split over both; one is killed in step 4, after step 2 was saved.
  ends = run_processes(workdir, [("-", "-"), ("KILL", "3")], {"mesh.data": 1, "mesh.fsdp": 4})
  assert ends[1][0] == -signal.SIGKILL, ends[1][1][-3000:]
  status, text, seconds = ends[0]
  assert status == processes.LOST and "another process of the run was lost" in text, text[-3000:]
  assert "resumed from step 1" in text
  assert seconds < process_run.HEARTBEAT_SECONDS

  # Both again, heads split over both so that both hold every row, until one gets SIGTERM: both save and end well.
  ends = run_processes(workdir, [("-", "-"), ("TERM", "2")], {"mesh.data": 1, "mesh.tensor": 4})
  assert [status for status, _, _ in ends] == [0, 0], ends
  assert "resumed from step 2" in ends[0][1] and "told to stop (another process was): saved. Resume with" in ends[0][1]
  assert f"--workdir {workdir}" in ends[0][1].splitlines()[-1]  # The command that resumes it.
  assert "resumed from" not in ends[1][1] and "told to stop" not in ends[1][1]  # Process 0 alone speaks.
  assert saved_steps(workdir)[-1] == 3

  # The disk of one is full when step 4 is saved: it says so and ends at once, the other when JAX misses it.
  ends = run_processes(workdir, [("-", "-"), ("FULL", "1")], {"mesh.data": 4, "distributed.heartbeat_seconds": 10})
  (status, text, seconds), (own_status, own_text, _) = ends
  assert own_status == 1 and "checkpoint 4 could not be written by process 1 (File too large)" in own_text, own_text
  assert status == processes.LOST or (status == -signal.SIGABRT and "another task died" in text), text[-3000:]
  assert seconds < process_run.HEARTBEAT_SECONDS and saved_steps(workdir)[-1] == 3

  # One process of four devices brings it to its end.
  run(config, workdir)
  lines = check_same_run(workdir, uninterrupted, config)
  assert len({line["train/reward"] for line in lines if "train/reward" in line} - {0.0, 1.0}) > 1
  (_, data), (_, their_data) = (saved_params(path, 6, config) for path in (workdir, uninterrupted))
  assert data == their_data


def test_monte_carlo_values_are_shared_out_among_processes(tmp_path, monkeypatch):
  monkeypatch.setattr(Chain, "reward", process_run.reward)
  config = process_run.get_config()
  changes = {"num_steps": 2, "credit.source": "monte_carlo", "credit.monte_carlo.samples": 2}
  config.update_from_flattened_dict(changes)
  alone = run(config, tmp_path / "alone")
  # The first process holds rows 0 to 3 alone; then both hold all rows, and take turns at judging.
  for name, axes in {"rows": {"mesh.data": 4}, "heads": {"mesh.data": 1, "mesh.tensor": 4}}.items():
    ends = run_processes(tmp_path / name, [("-", "-")] * 2, changes | axes)
    assert [status for status, _, _ in ends] == [0, 0], ends
    lines = check_same_run(tmp_path / name, alone, config)
    assert all(line["credit/verifier_calls"] > 8 for line in lines if "train/reward" in line)


def check_same_run(workdir, expected_workdir, config):
  """The lines of metrics of two finished runs that agree, in parameters and traces too."""
  lines, expected = untimed(workdir), untimed(expected_workdir)
  assert [line["step"] for line in lines] == [line["step"] for line in expected]
  for ours, theirs in zip(lines, expected):
    assert ours == pytest.approx(theirs, **CLOSE)
  (ours, _), (theirs, _) = (saved_params(path, config.num_steps, config) for path in (workdir, expected_workdir))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours.params, theirs.params)
  traces, expected = (records.read_traces(path / "traces.jsonl") for path in (workdir, expected_workdir))
  assert [trace["tokens"] for trace in traces] == [trace["tokens"] for trace in expected]
  return lines


# ---- Start-up --------------------------------------------------------------------------------


KNOWN = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4"}


@pytest.mark.parametrize(
  ("given", "environment", "expected"),
  [
    ({}, {}, None),
    ({"num_processes": 1}, {}, None),
    ({}, {"SLURM_STEP_NUM_TASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ({"coordinator": "a:1", "num_processes": 2, "process_id": 0}, {}, ("a:1", 2, 0)),
    ({"process_id": 0}, KNOWN | {"JAX_PROCESS_ID": "3"}, ("a:1", 4, 0)),
    ({}, KNOWN | {"JOB_COMPLETION_INDEX": "3"}, ("a:1", 4, 3)),
    ({"detect": True}, {}, (None, None, None)),
    ({}, {"SLURM_STEP_NUM_TASKS": "2"}, (None, None, None)),
    ({}, {"OMPI_COMM_WORLD_SIZE": "8"}, (None, None, None)),
    ({}, {"TPU_WORKER_HOSTNAMES": "a,b"}, (None, None, None)),
  ],
)  # fmt: skip
def test_processes_are_found_by_flags_and_environment(monkeypatch, given, environment, expected):
  calls = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: calls.append(args))
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  processes.start(**given)
  assert calls == ([] if expected is None else [expected])


def test_half_known_processes_are_refused(monkeypatch):
  with pytest.raises(ValueError, match="need num_processes and process_id too"):
    processes.start(coordinator="a:1")
  with pytest.raises(ValueError, match="need coordinator and process_id too"):
    processes.start(num_processes=2)
  monkeypatch.setenv("JAX_PROCESS_ID", "first")
  with pytest.raises(ValueError, match="JAX_PROCESS_ID='first' must be a number"):
    processes.start(num_processes=2)


# ---- Whose rows are whose --------------------------------------------------------------------


class FakeDevice(NamedTuple):
  process_index: int
  number: int


def rows_of_process(monkeypatch, index, owners, **options):
  """`rows_of` 8 rows on process `index`, where owners[i] are the processes that hold the i-th part of them."""
  each = 8 // len(owners)
  held = {
    FakeDevice(owner, part): (slice(part * each, (part + 1) * each),)
    for part, holders in enumerate(owners)
    for owner in holders
  }
  batch = types.SimpleNamespace(devices_indices_map=lambda shape: held)
  monkeypatch.setattr(sharding, "batch", lambda mesh: batch)
  monkeypatch.setattr(jax, "process_index", lambda: index)
  return processes.rows_of(sharding.make_mesh(), 8, **options)


@pytest.mark.parametrize(
  "owners",
  [
    [[0], [0], [1], [1]],
    [[0], [1], [1], [0]],  # Devices may lie in any order.
    [[0, 1], [0, 1]],  # An axis of the model over both.
    [[0, 1], [2, 3], [0, 1], [2, 3]],
  ],
)
def test_every_row_is_judged_once_by_a_process_that_holds_it(monkeypatch, owners):
  processes = {owner for holders in owners for owner in holders}
  shares = {i: rows_of_process(monkeypatch, i, owners, group_size=2) for i in processes}
  for i, share in shares.items():
    assert share.here.tolist() == [row for row in range(8) if i in owners[row * len(owners) // 8]]
    assert 8 // len(processes) == len(share.judged)
  assert sorted(np.concatenate([share.here[share.judged] for share in shares.values()])) == list(range(8))


def test_a_group_in_two_processes_is_refused(monkeypatch):
  with pytest.raises(ValueError, match="the group of rows 0 to 3 lies in several processes"):
    rows_of_process(monkeypatch, 0, [[0], [1], [0], [1]], group_size=4)


def test_one_process_holds_and_judges_all():
  share = processes.rows_of(sharding.make_mesh(), 8, group_size=4)
  assert share.here.tolist() == share.judged.tolist() == list(range(8))
  (numbers, others), flag = share.gather([1, 3], [0.5, 2.0], [7, 8], flag=True)
  assert numbers.tolist() == [0, 0.5, 0, 2, 0, 0, 0, 0] and others[3] == 8 and flag
  with pytest.raises(ValueError, match="a batch of 6 rows does not split over 4"):
    processes.rows_of(sharding.make_mesh(), 6)


# ---- Being told to stop ----------------------------------------------------------------------


def test_sigterm_is_noticed_and_the_former_handler_comes_back():
  before = signal.getsignal(signal.SIGTERM)
  with processes.StopNotice() as notice:
    assert not notice.given
    signal.raise_signal(signal.SIGTERM)
    assert notice.given and notice.reason == "SIGTERM"
  assert signal.getsignal(signal.SIGTERM) is before


def test_a_maintenance_notice_is_read_from_the_metadata_server(monkeypatch):
  answers = {"maintenance-event": "NONE", "preempted": "FALSE"}

  class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      known = self.headers["Metadata-Flavor"] == "Google" and self.path.startswith("/computeMetadata/v1/instance/")
      self.send_response(200 if known else 403)
      self.end_headers()
      self.wfile.write(answers[self.path.rpartition("/")[2]].encode())

    def log_message(self, *args):
      pass

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
  monkeypatch.setattr(processes, "_POLL_SECONDS", 0.02)
  with processes.StopNotice() as notice:
    time.sleep(0.2)
    assert not notice.given
    answers["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    limit = time.monotonic() + 20
    while not notice.given and time.monotonic() < limit:
      time.sleep(0.02)
  server.shutdown()
  assert notice.reason == "maintenance-event TERMINATE_ON_HOST_MAINTENANCE"
