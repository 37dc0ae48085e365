"""One process of several that run the tiny configuration together; started by distributed_test.py.

    python tests/process_run.py WORKDIR COORDINATOR COUNT INDEX [SIGNAL STEP]

With SIGNAL (KILL or TERM) it sends that to itself inside the STEP-th step of this start, after its rollout.
"""

import os
import pathlib
import signal
import sys

import tiny_config
import train

from rredcot_jax import distributed, evaluation


def main() -> None:
  workdir, coordinator, count, index, *fate = sys.argv[1:]
  if fate:
    original, calls = evaluation.returns_of, 0

    def counted(*args):
      nonlocal calls
      calls += 1
      if calls == int(fate[1]):
        os.kill(os.getpid(), getattr(signal, f"SIG{fate[0]}"))
      return original(*args)

    evaluation.returns_of = counted
  config = tiny_config.get_config()
  distributed.start(
    coordinator=coordinator, num_processes=int(count), process_id=int(index), heartbeat_seconds=HEARTBEAT_SECONDS
  )
  with distributed.StopNotice() as notice, distributed.stops_with_the_others("the same command"):
    train.claim_workdir(pathlib.Path(workdir), config, "test", resume=True)
    finished = train.run(config, pathlib.Path(workdir), notice=notice)
  print("finished" if finished else f"told to stop: {notice.reason!r}")


HEARTBEAT_SECONDS = 10

if __name__ == "__main__":
  main()
