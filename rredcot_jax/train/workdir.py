"""The directory of a run: whose it is, and what it holds."""

import json
import pathlib
from typing import Any

from ml_collections import ConfigDict

from rredcot_jax.parallel import processes
from rredcot_jax.report import files
from rredcot_jax.train import differences

FORMAT = 1  # Of config.json and of checkpoints; another one is refused.


def read(workdir: pathlib.Path) -> dict[str, Any]:
  """The config.json of a run.

  Raises:
    ValueError: if the directory is none of a run.
  """
  path = workdir / "config.json"
  if not path.is_file():
    raise ValueError(f"{workdir} is no work directory of experiments/train.py: it has no config.json.")
  return dict(json.loads(path.read_text(encoding="utf-8")))


def claim(workdir: pathlib.Path, config: ConfigDict, command: str, *, resume: bool) -> None:
  """Writes the configuration into a new work directory, or checks that it is that run's.

  Raises:
    ValueError: if the directory holds a run of another configuration (the keys
      that differ are named), or any run when `resume` is off.
  """
  path = workdir / "config.json"
  wanted = json.loads(json.dumps(config.to_dict()))
  processes.check_same("their configuration", json.dumps(wanted, sort_keys=True))
  exists = path.exists()
  # Nobody writes before everybody has looked.
  processes.barrier("looked at the work directory")
  if exists:
    differing = differences.run_differences(json.loads(path.read_text(encoding="utf-8"))["config"], wanted)
    if differing:
      raise ValueError(
        f"{workdir} holds a run of another configuration: {', '.join(differing)}. Choose another --workdir."
      )
    if not resume:
      raise ValueError(f"{workdir} holds a run and --noresume was given: choose another --workdir or remove it.")
    return
  if processes.is_main():
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, json.dumps({"command": command, "config": wanted}, indent=1))
