"""experiments/train.py on a small configuration, which this file also is; started by distributed_test.py.

    python tests/process_run.py (SIGNAL STEP | - -) --config tests/process_run.py --workdir WORKDIR ...

With SIGNAL (KILL or TERM) it sends that to itself in the STEP-th step of this start, after its rollout.
"""

import os
import signal
import sys

import tiny_config
import train
from absl import app
from ml_collections import ConfigDict

from rredcot_jax import evaluation
from rredcot_jax.tasks.chain import Chain

HEARTBEAT_SECONDS = 10


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


def main() -> None:
  name, step = sys.argv.pop(1), sys.argv.pop(1)
  Chain.reward = reward
  original, calls = evaluation.returns_of, 0

  def counted(*args):
    nonlocal calls
    calls += 1
    if str(calls) == step:
      os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
    return original(*args)

  evaluation.returns_of = counted
  app.run(train.main)


if __name__ == "__main__":
  main()
