"""experiments/train.py on a small configuration, which this file also is; started by processes_test.py.

    python tests/process_run.py (FATE STEP | - -) --config tests/process_run.py --workdir WORKDIR ...

In the STEP-th step of this start, after its rollout, it sends itself a signal where FATE is KILL or TERM;
where FATE is FULL its disk is full from then on.
"""

import os
import resource
import signal
import subprocess
import sys

import tiny_config
import train
from absl import app
from ml_collections import ConfigDict

from rredcot_jax.data import judging
from rredcot_jax.data.chain import Chain

HEARTBEAT_SECONDS = 30  # JAX aborts a process whose others are starved for so long.


def get_config() -> ConfigDict:
  """A policy from random weights, small enough to compile fast, whose heads split over four devices."""
  config = tiny_config.get_config()
  config.initial_params, config.loss.kl = "", "off"
  config.model.update({"width": 16, "num_layers": 1, "num_heads": 4, "num_kv_heads": 4, "head_dim": 4, "mlp_width": 16})
  config.rollout.max_tokens, config.rollout.prompts_per_step, config.rollout.group_size = 12, 4, 2
  config.evaluation.num_prompts, config.evaluation.samples, config.evaluation.rows = 3, 2, 4
  config.distributed.heartbeat_seconds = HEARTBEAT_SECONDS
  return config


def reward(self: Chain, example: object, text: str) -> float:
  """In place of the verifier, which would give random weights nothing."""
  return float(len(text) % 3 == 0)


def full_disk() -> None:
  """No file of this process may grow beyond 500 bytes; what it prints goes through another one."""
  printer = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
  for stream in (1, 2):
    os.dup2(printer.stdin.fileno(), stream)
  resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def main() -> None:
  name, step = sys.argv.pop(1), sys.argv.pop(1)
  Chain.reward = reward
  original, calls = judging.returns_of, 0

  def counted(*args):
    nonlocal calls
    calls += 1
    if str(calls) == step:
      full_disk() if name == "FULL" else os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
    return original(*args)

  judging.returns_of = counted
  app.run(train.main)


if __name__ == "__main__":
  main()
