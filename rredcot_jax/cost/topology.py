"""The devices of TPU slices that are not there."""

import importlib.util
import os
from typing import Any

from jax.experimental import topologies

# Of libtpu, which must not look for a TPU of this machine. Describing a topology and compiling for it need none.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
}


def is_known() -> bool:
  """Whether libtpu is installed, which describes topologies."""
  return importlib.util.find_spec("libtpu") is not None


def devices_of(topology: str, *, slices: int = 1) -> Any:
  """The devices of `slices` slices of a topology such as "v5p:2x2x4", each with its place and its process.

  Raises:
    ImportError: if libtpu is not installed.
  """
  if not is_known():
    raise ImportError("libtpu is not installed: pip install -e '.[experiments,tpu-compile]'")
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  several = {"num_slices": slices} if slices > 1 else {}
  return topologies.get_topology_desc(platform="tpu", topology_name=topology, **several).devices
