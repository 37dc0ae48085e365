"""experiments/train.py on a small configuration, which this file also is; for processes_test.py and faults_test.py.

    python tests/process_run.py (FATE PLACE COUNT | - - -) --config tests/process_run.py --workdir WORKDIR ...

When it comes to PLACE (see PLACES) for the COUNT-th time of this start, it sends itself a signal where FATE is
KILL, TERM or STOP; where FATE is FULL its disk is full from then on; where FATE is FAIL it raises an error;
where FATE is WAIT it says so and waits.
"""

import functools
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time

import tiny_config
import train
from absl import app
from helpers import reward_of_length
from ml_collections import ConfigDict

from rredcot_jax.data import judging
from rredcot_jax.data.chain import Chain
from rredcot_jax.train import checkpoint, evaluation, experiment, metrics

ROOT = pathlib.Path(__file__).parent.parent
HEARTBEAT_SECONDS = 30  # JAX aborts a process whose others are starved for so long.

# Where a fate meets a run: what is called there, and whether the fate comes before it.
PLACES = {
  "start": (experiment.Experiment, "start_params", True),
  "evaluation": (evaluation, "evaluate", True),
  "evaluated": (evaluation, "evaluate", False),
  "rollout": (judging, "returns_of", True),
  "update": (metrics.MetricsWriter, "write", True),  # Dispatched, and not yet waited for.
  "save": (checkpoint.Checkpointer, "save", False),  # It goes on in the background.
  "seal": (checkpoint.Checkpointer, "_seal", True),  # Written, and without its name; process 0.
  "last save": (checkpoint.Checkpointer, "wait", True),
  "report": (train.page, "write_report", True),
}


def get_config() -> ConfigDict:
  """A policy from random weights, small enough to compile fast, whose heads split over four devices."""
  config = tiny_config.get_config()
  config.initial_params, config.tokenizer.path = "", "chain"
  config.loss.kl, config.loss.kl_coefficient = "off", 0.0
  config.optimizer.learning_rate, config.optimizer.warmup_steps = 3e-3, 1  # So that every step moves the next one.
  config.model.update({"width": 16, "num_layers": 1, "num_heads": 4, "num_kv_heads": 4, "head_dim": 4, "mlp_width": 16})
  config.rollout.max_tokens, config.rollout.prompts_per_step, config.rollout.group_size = 12, 4, 2
  config.evaluation.num_prompts, config.evaluation.samples, config.evaluation.rows = 3, 2, 4
  config.distributed.heartbeat_seconds = HEARTBEAT_SECONDS
  return config


def meet_at(place, count, fate, replace=setattr):
  """Has `fate` called when a run comes to `place` for the `count`-th time."""
  owner, name, before = PLACES[place]
  original, calls = getattr(owner, name), 0

  @functools.wraps(original)
  def counted(*args, **options):
    nonlocal calls
    calls += 1
    if before and calls == count:
      fate()
    result = original(*args, **options)
    if not before and calls == count:
      fate()
    return result

  replace(owner, name, counted)


def full_disk() -> None:
  """No file of this process may grow beyond 500 bytes; what it prints goes through another one."""
  printer = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
  for stream in (1, 2):
    os.dup2(printer.stdin.fileno(), stream)
  resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def fail() -> None:
  raise RuntimeError("this process fails")


def wait() -> None:
  print("waiting to be told", flush=True)
  sys.stdin.readline()


FATES = {
  "FULL": full_disk,
  "FAIL": fail,
  "WAIT": wait,
  **{name: functools.partial(signal.raise_signal, getattr(signal, f"SIG{name}")) for name in ("KILL", "TERM", "STOP")},
}


def main() -> None:
  fate, place, count = (sys.argv.pop(1) for _ in range(3))
  Chain.reward = reward_of_length
  if fate != "-":
    meet_at(place, int(count), FATES[fate])
  app.run(train.main)


# ---- Started by tests ------------------------------------------------------------------------


def free_port() -> int:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def environment_of(directory, devices):
  """For a run of so many devices; what is compiled is kept in the directory."""
  return os.environ | {
    "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=4", f"device_count={devices}"),
    "PYTHONPATH": f"{ROOT}:{ROOT / 'experiments'}:{ROOT / 'tests'}",
    "JAX_COMPILATION_CACHE_DIR": str(directory / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "PYTHONUNBUFFERED": "1",
  }


class Started:
  """A process of a run, and what it prints."""

  def __init__(self, workdir, fate, flags, *, devices=2, environment=None, prefix=()):
    script = str(ROOT / "tests" / "process_run.py")
    self.output = tempfile.TemporaryFile("w+")
    self.process = subprocess.Popen(
      [*prefix, sys.executable, script, *fate, "--config", script, f"--workdir={workdir}", *flags],
      env=environment_of(pathlib.Path(workdir).parent, devices) | (environment or {}),
      stdin=subprocess.PIPE, stdout=self.output, stderr=subprocess.STDOUT,
    )  # fmt: skip
    self.ended_at = None

  @property
  def text(self):
    self.output.seek(0)
    return self.output.read()

  @property
  def status(self):
    return self.process.returncode

  def poll(self):
    if self.ended_at is None and self.process.poll() is not None:
      self.ended_at = time.monotonic()
    return self.ended_at is not None

  def end(self):
    self.process.kill()
    self.process.communicate()


def wait_for(condition, seconds=240):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, "nothing came"
    time.sleep(0.05)


NO_FATE = ("-", "-", "-")


def run_processes(workdir, fates, changes, *, each=None, ids=None, **options):
  """Runs len(fates) processes of two devices to their ends.

  Args:
    workdir, changes: of the run.
    fates: (fate, place, count) of each.
    each: of each, options of `Started` that differ ("flags" are added).
    ids: of the processes; None is 0, 1, ...
    **options: of `Started`, for all.

  Returns:
    Of each: exit status, all that it printed, seconds after the first end.
  """
  flags = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={len(fates)}"]
  flags += [f"--config.{name}={value}" for name, value in changes.items()]
  all_started = []
  try:
    for index, fate in enumerate(fates):
      own = dict((each or [{}] * len(fates))[index])
      process_id = index if ids is None else ids[index]
      own_flags = [*flags, f"--process_id={process_id}", *own.pop("flags", ())]
      all_started.append(Started(own.pop("workdir", workdir), fate, own_flags, **options, **own))
    wait_for(lambda: all([one.poll() for one in all_started]), 300)
  finally:
    for one in all_started:
      one.end()
  first = min(one.ended_at for one in all_started)
  return [(one.status, one.text, one.ended_at - first) for one in all_started]


if __name__ == "__main__":
  main()
