"""The flags that scripts share, and joining the other processes of a run."""

import importlib.util
import pathlib
import shlex
import sys
from collections.abc import Callable
from types import ModuleType

from absl import flags
from ml_collections import ConfigDict, config_flags

from rredcot_jax.parallel import processes
from rredcot_jax.train import fingerprints

CONFIG = config_flags.DEFINE_config_file("config", None, "The configuration.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The directory of the run.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Find the other processes of this run by itself, on a TPU pod.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, where they are not found.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes this run has.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.", lower_bound=0)


def join_processes(
  config: ConfigDict, workdir: pathlib.Path | None = None, check: Callable[[], object] = lambda: None
) -> None:
  """Connects this process with the others that the flags or the environment name.

  Args:
    config, workdir: of the run; the processes compare them, and their code.
    check: raises ValueError where this process must not start; the others are told.
  """
  facts = {"config": config.to_dict(), "workdir": str(workdir), "code": fingerprints.of_code()}
  processes.start(
    coordinator=COORDINATOR.value, num_processes=NUM_PROCESSES.value, process_id=PROCESS_ID.value,
    detect=DISTRIBUTED.value, heartbeat_seconds=config.distributed.heartbeat_seconds,
    facts=facts, check=check,
  )  # fmt: skip


def command() -> str:
  """The command that this process was started with."""
  return " ".join(["python", *map(shlex.quote, sys.argv)])


def load_file(path: str | pathlib.Path) -> ModuleType:
  """A Python file, such as one under configs/, as a module.

  Raises:
    FileNotFoundError: if it is not there.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"no file {str(path)!r}.")
  spec = importlib.util.spec_from_file_location(path.stem, path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
