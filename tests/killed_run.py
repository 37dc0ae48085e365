"""A run that is killed (signal 9) again and again, beside the same run left alone; started by faults_test.py.

    python tests/killed_run.py DIRECTORY KILLS SEED

Runs DIRECTORY/whole to its end, then DIRECTORY/killed: each of its lives but the last ends at a moment drawn at random,
by the clock (which is most often while it starts, restores or compiles), in a step, or in the write of a checkpoint.
Prints the moments as JSON. Every life is forked from this process, which has imported everything and started nothing,
and finds what earlier ones compiled in a cache on disk.
"""

import json
import math
import os
import pathlib
import random
import select
import signal
import sys
import time

import tiny_config
from helpers import reward_of_length
from ml_collections import ConfigDict

from rredcot_jax.data import judging
from rredcot_jax.data.chain import Chain
from rredcot_jax.train import checkpoint, loop, workdir


def get_config(kills: int) -> ConfigDict:
  """Steps of a few milliseconds that still go through scoring, update and checkpoint, and enough of them."""
  config = tiny_config.get_config("rredcot")
  config.initial_params, config.tokenizer.path = "", "chain"
  config.model.update({"width": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "mlp_width": 16})
  config.loss.kl, config.loss.kl_coefficient = "off", 0.0
  config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-2, 1  # So that every step moves the next one.
  config.rollout.max_tokens, config.rollout.prompts_per_step, config.rollout.group_size = 8, 2, 2
  config.evaluation.num_prompts, config.evaluation.samples, config.evaluation.rows = 2, 2, 4
  config.checkpoint.every = 1
  config.num_steps = 2 * kills + 4
  config.evaluation.every = config.num_steps // 2
  return config


def live(directory: pathlib.Path, config: ConfigDict, events: int, most: float) -> None:
  """Runs or resumes `directory`; writes a byte to `events` in each step ("s") and when a save goes on behind ("c").

  In step number `most` it waits for its end, so that a machine too busy to kill it in time does not let it finish.
  """
  steps = 0

  def announced(original, letter):
    def call(*args):
      nonlocal steps
      result = original(*args)
      os.write(events, letter)
      steps += letter == b"s"
      if steps >= most:
        signal.pause()
      return result

    return call

  judging.returns_of = announced(judging.returns_of, b"s")
  checkpoint.Checkpointer.save = announced(checkpoint.Checkpointer.save, b"c")
  Chain.reward = reward_of_length
  with workdir.claim(directory, config, "test") as claim:
    loop.run(config, directory, claim=claim)


def life(directory: pathlib.Path, config: ConfigDict, kill: tuple[str, int, float] | None) -> tuple[int, float]:
  """Forks a life and kills it.

  Args:
    directory, config: of its run.
    kill: (kind of event, count, seconds): so long after that event; ("", 0, seconds): so long after
      its birth, though not later than in its third step; None lets it come to its end.

  Returns:
    Its exit status (minus the signal), and the seconds to its second step.
  """
  born, (reading, writing) = time.monotonic(), os.pipe()
  child = os.fork()
  if not child:
    os.close(reading)
    log = os.open(directory.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
      live(directory, config, writing, 3 if kill else math.inf)
    except BaseException:
      sys.excepthook(*sys.exc_info())
      os._exit(1)
    os._exit(0)
  os.close(writing)
  kind, count, seconds = kill or ("", 0, math.inf)
  seen, second_step, deadline = "", math.nan, born + seconds if not kind else math.inf
  while time.monotonic() < deadline:
    if select.select([reading], [], [], min(deadline - time.monotonic(), 1.0))[0]:
      byte = os.read(reading, 1).decode()
      if not byte:  # It has ended by itself.
        break
      seen += byte
      if seen.count("s") == 2 and math.isnan(second_step):
        second_step = time.monotonic() - born
      if kill and (seen.count("s") == 3 or (kind and seen.count(kind) == count)):
        deadline = time.monotonic() + (seconds if kind else 0)
        kill, kind = None, ""
  if math.isfinite(deadline):
    os.kill(child, signal.SIGKILL)
  os.close(reading)
  return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), second_step


def main() -> None:
  directory, kills, draw = pathlib.Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
  config = get_config(kills)
  status, second_step = life(directory / "whole", config, None)
  killed, statuses, moments, half_written = directory / "killed", [status], [], 0
  for number in range(kills):
    # By the clock: what is compiled by now is not compiled again, so that half of the time suffices.
    kind, count = (("c", draw.randint(1, 2)), ("s", draw.randint(1, 2)), ("", 0))[number % 3]
    moments.append((kind, count, draw.uniform(0, 0.03 if kind else second_step / 2)))
    statuses.append(life(killed, config, moments[-1])[0])
    half_written += len([*(killed / "checkpoints").glob("*tmp*")])
  statuses.append(life(killed, config, None)[0])
  print(json.dumps({"statuses": statuses, "moments": moments, "half_written": half_written}))


if __name__ == "__main__":
  main()
