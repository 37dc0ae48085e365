"""Two processes of two devices equal one of four, also across a kill, a SIGTERM and another process count."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import process_run
import pytest
import tiny_config
import train
from train_test import run, saved_params, untimed

from rredcot_jax import distributed

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


def run_processes(workdir, fates):
  """Runs len(fates) processes to their ends: exit status, all they printed, seconds after the first end, of each."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    coordinator = f"127.0.0.1:{free.getsockname()[1]}"
  environment = os.environ | {
    "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=2"),
    "PYTHONPATH": f"{ROOT}:{ROOT / 'experiments'}",
    "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
  }
  command = [sys.executable, str(ROOT / "tests" / "process_run.py"), str(workdir), coordinator, str(len(fates))]
  outputs = [tempfile.TemporaryFile("w+") for _ in fates]
  processes = [
    subprocess.Popen([*command, str(index), *fate], env=environment, stdout=output, stderr=subprocess.STDOUT)
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


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  return run(tiny_config.get_config(), tmp_path_factory.mktemp("pods") / "whole")


def test_two_processes_equal_one_across_a_kill_a_sigterm_and_other_process_counts(uninterrupted):
  workdir = uninterrupted.parent / "chained"

  # One process of four devices is told to stop in its second step: saved at the boundary before.
  config = tiny_config.get_config()
  train.claim_workdir(workdir, config, "test", resume=True)
  assert not train.run(config, workdir, notice=NoticeAt(3))  # Looks: the first evaluation, step 1, step 2.
  assert saved_steps(workdir) == [1]

  # Two processes of two devices go on; one is killed in step 4. Steps 2 and 3 were theirs, and step 2 was saved.
  ends = run_processes(workdir, [(), ("KILL", "3")])
  assert ends[1][0] == -signal.SIGKILL, ends[1][1][-3000:]
  status, text, seconds = ends[0]
  assert status == distributed.LOST and "another process of the run was lost" in text, text[-3000:]
  assert seconds < 3 * process_run.HEARTBEAT_SECONDS

  # Both again, until one of them gets SIGTERM: both save at the same boundary and end well.
  ends = run_processes(workdir, [(), ("TERM", "2")])
  for status, text, _ in ends:
    assert status == 0 and "told to stop" in text, text[-3000:]
  assert "resumed from step 2" in ends[0][1] and "resumed from" not in ends[1][1]  # Process 0 alone speaks.
  assert "'SIGTERM'" in ends[1][1] and "''" in ends[0][1]
  assert saved_steps(workdir)[-1] == 3

  # One process of four devices brings it to its end.
  run(config, workdir)
  lines, expected = untimed(workdir), untimed(uninterrupted)
  assert [line["step"] for line in lines] == [line["step"] for line in expected]
  for ours, theirs in zip(lines, expected):
    assert ours == pytest.approx(theirs, **CLOSE)
  (ours, data), (theirs, their_data) = saved_params(workdir, 6), saved_params(uninterrupted, 6)
  assert data == their_data
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours.params, theirs.params)
  assert (workdir / "traces.jsonl").read_text().count("\n") == 4
