"""One process of several that run a small configuration together; started by distributed_test.py.

    python tests/process_run.py WORKDIR AXES COORDINATOR COUNT INDEX [SIGNAL STEP]

AXES is the mesh as JSON. With SIGNAL (KILL or TERM) it sends that to itself in the STEP-th step of this start, after
its rollout.
"""

import json
import os
import pathlib
import signal
import sys

import tiny_config
import train
from ml_collections import ConfigDict

from rredcot_jax import distributed, evaluation
from rredcot_jax.tasks.chain import Chain

HEARTBEAT_SECONDS = 10


def get_config(**axes: int) -> ConfigDict:
  """A policy from random weights, small enough to compile fast, whose heads split over four devices."""
  config = tiny_config.get_config()
  config.initial_params = ""
  config.model.update({"width": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "head_dim": 4, "mlp_width": 16})
  config.rollout.max_tokens, config.rollout.prompts_per_step, config.rollout.group_size = 12, 4, 2
  config.evaluation.num_prompts, config.evaluation.samples, config.evaluation.rows = 3, 2, 4
  config.mesh.update(axes)
  return config


def reward(self: Chain, example: object, text: str) -> float:
  """In place of the verifier, which would give random weights nothing."""
  return float(len(text) % 3 == 0)


def main() -> None:
  workdir, axes, coordinator, count, index, *fate = sys.argv[1:]
  Chain.reward = reward
  if fate:
    original, calls = evaluation.returns_of, 0

    def counted(*args):
      nonlocal calls
      calls += 1
      if calls == int(fate[1]):
        os.kill(os.getpid(), getattr(signal, f"SIG{fate[0]}"))
      return original(*args)

    evaluation.returns_of = counted
  config = get_config(**json.loads(axes))
  distributed.start(
    coordinator=coordinator, num_processes=int(count), process_id=int(index), heartbeat_seconds=HEARTBEAT_SECONDS
  )
  with distributed.StopNotice() as notice, distributed.stops_with_the_others("the same command"):
    train.claim_workdir(pathlib.Path(workdir), config, "test", resume=True)
    finished = train.run(config, pathlib.Path(workdir), notice=notice)
  print("finished" if finished else f"told to stop: {notice.reason!r}")


if __name__ == "__main__":
  main()
