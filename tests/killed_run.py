"""Runs the tiny configuration and kills itself (signal 9) at a chosen moment; started by train_test.py.

    python tests/killed_run.py WORKDIR (step|checkpoint) COUNT

step: inside the COUNT-th update, after the rollout. checkpoint: while the COUNT-th checkpoint is being written.
"""

import os
import pathlib
import signal
import sys

import tiny_config
import train

from rredcot_jax import checkpoint, evaluation


def main() -> None:
  workdir, moment, count = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
  owner, name = (evaluation, "returns_of") if moment == "step" else (checkpoint.Checkpointer, "save")
  original = getattr(owner, name)
  calls = 0

  def counted(*args, **kwargs):
    nonlocal calls
    result = original(*args, **kwargs)
    calls += 1
    if calls == count:
      # A save returns while its write goes on in the background.
      os.kill(os.getpid(), signal.SIGKILL)
    return result

  setattr(owner, name, counted)
  config = tiny_config.get_config()
  train.claim_workdir(workdir, config, "test", resume=True)
  train.run(config, workdir)


if __name__ == "__main__":
  main()
