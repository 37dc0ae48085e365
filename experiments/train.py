"""Trains a policy: prompts -> rollouts -> credit -> update, from a config to a report.

    python experiments/train.py --config configs/demo.py:rredcot --workdir runs/rredcot

If the work directory holds a checkpoint of the same configuration, the run is resumed, and
repeats the uninterrupted run bit for bit. It writes config.json, metrics.jsonl, tensorboard/,
traces.jsonl, checkpoints/ and report.html there, and tells a tracker if one is configured. The loop is
rredcot_jax/train/loop.py.
"""

import sys
from typing import Any

from absl import app, flags, logging

from rredcot_jax.parallel import processes
from rredcot_jax.report import page
from rredcot_jax.train import launch, loop, validation
from rredcot_jax.train import workdir as workdir_lib
from rredcot_jax.train.experiment import Experiment

RESUME = flags.DEFINE_bool("resume", True, "Resume the run that the work directory holds.")
STOPPED_STATUS = flags.DEFINE_integer("stopped_status", 0, "Exit status of a run that was told to stop, and saved.")


def main(_: Any) -> None:
  config, command = launch.CONFIG.value, launch.command()
  workdir = workdir_lib.check_path(launch.WORKDIR.value)
  launch.join_processes(config, workdir, lambda: validation.validate(config))
  with processes.StopNotice() as notice, processes.stops_with_the_others(command):
    # What a configuration names is made before anything is written, so that what is refused leaves nothing behind.
    fingerprints = Experiment(config).fingerprints()
    with workdir_lib.claim(workdir, config, command, resume=RESUME.value, fingerprints=fingerprints) as claim:
      finished = loop.run(config, workdir, notice=notice, claim=claim)
  if not finished:
    loop.say(f"told to stop ({notice.reason or 'another process was'}): saved. Resume with\n  {command}")
    sys.exit(STOPPED_STATUS.value)
  if processes.is_main():
    with workdir_lib.writing(workdir / "report.html"):
      page.write_report({workdir.name: workdir}, workdir / "report.html", title=f"Run {workdir.name}", summary=None)
    print(f"report: {workdir / 'report.html'}")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  logging.set_verbosity(logging.WARNING)
  app.run(main)
