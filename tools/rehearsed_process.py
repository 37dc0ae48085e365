"""One process of a rehearsal: experiments/train.py as it is, with its devices in the order of a pod; see rehearse.py.

    RREDCOT_REHEARSAL=PLAN.json python tools/rehearsed_process.py --config tools/rehearsed_process.py --workdir ...

Beside the order of devices, it changes nothing of the run. It notes what this process holds, and tells itself
to stop where the plan says so.
"""

import faulthandler
import functools
import json
import os
import pathlib
import resource
import runpy
import signal
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rredcot_jax.data import judging
from rredcot_jax.parallel import processes, sharding
from rredcot_jax.train import checkpoint

TRAIN = pathlib.Path(__file__).parent.parent / "experiments" / "train.py"


def plan() -> dict[str, Any]:
  return json.loads(pathlib.Path(os.environ["RREDCOT_REHEARSAL"]).read_text())


def get_config() -> ConfigDict:
  """The rehearsed configuration."""
  return ConfigDict(plan()["config"])


def main() -> None:
  faulthandler.register(signal.SIGUSR1, all_threads=True)  # A rehearsal that waits for too long asks where.
  chosen, held = plan(), {}
  order_devices(chosen["order"])
  note_what_is_held(held)
  if chosen["stop_in_rollout"]:
    stop_in_rollout(chosen["stop_in_rollout"], chosen["stopping_process"])
  try:
    runpy.run_path(str(TRAIN), run_name="__main__")
  finally:
    held["process"], held["peak_host_bytes"] = (
      jax.process_index(),
      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    pathlib.Path(chosen["directory"], f"held-{chosen['start']}-{jax.process_index()}.json").write_text(json.dumps(held))


def order_devices(order: list[int]) -> None:
  """Has every mesh take the devices in `order`: the places of `jax.devices()` along the flat mesh."""
  plain = sharding.make_mesh

  def make_mesh(*, devices: Any = None, **axes: int) -> Mesh:
    devices = jax.devices() if devices is None else devices
    return plain(**axes, devices=[devices[place] for place in order])

  sharding.make_mesh = make_mesh


def note_what_is_held(held: dict[str, Any]) -> None:
  """Notes the shares of rows, and at every save the bytes of the state and of all arrays on each device here."""
  rows_of, save = processes.rows_of, checkpoint.Checkpointer.save

  @functools.wraps(rows_of)
  def noting_rows(mesh: Mesh, count: int, **options: Any) -> processes.Rows:
    rows = rows_of(mesh, count, **options)
    name = "evaluation" if options.get("pad") else "step"
    held[name] = {
      "rows": count, "filled_up_to": rows.count, "here": len(rows.here), "judged": len(rows.judged),
      "around": len(rows.around), "groups_in_several_processes": bool(rows.split),
    }  # fmt: skip
    return rows

  @functools.wraps(save)
  def noting_save(self: Any, step: int, state: Any, data: Any) -> Any:
    leaves = [leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)]
    held["state_bytes"] = bytes_of_devices(leaves)
    held["live_bytes"] = bytes_of_devices(jax.live_arrays())
    held["state_bytes_in_all"] = sum(leaf.nbytes for leaf in leaves)
    held["saved"] = [*held.get("saved", []), step]
    return save(self, step, state, data)

  processes.rows_of, checkpoint.Checkpointer.save = noting_rows, noting_save


def bytes_of_devices(arrays: list[jax.Array]) -> int:
  """Bytes on the local device that holds most."""
  places = {device: place for place, device in enumerate(jax.local_devices())}
  held = np.zeros(len(places), int)
  for array in arrays:
    for shard in array.addressable_shards:
      held[places[shard.device]] += shard.data.nbytes
  return int(held.max())


def stop_in_rollout(count: int, process: int) -> None:
  """Gives `process` a SIGTERM, as a machine that is to be stopped does, when it judges its `count`-th rollout."""
  returns_of, calls = judging.returns_of, 0

  @functools.wraps(returns_of)
  def told(*args: Any) -> Any:
    nonlocal calls
    calls += 1
    if calls == count and jax.process_index() == process:
      signal.raise_signal(signal.SIGTERM)
    return returns_of(*args)

  judging.returns_of = told


if __name__ == "__main__":
  main()
