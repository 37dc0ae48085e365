"""Compiles a configuration's training step for TPUs that are not there, and says whether it fits and what it costs.

    pip install -e '.[experiments,tpu-compile]'
    python tools/tpu_compile.py --config configs/qwen3_4b_numina_math.py --topology v5p:2x2x4
    python tools/tpu_compile.py --config configs/demo.py:rredcot --topology v5e:2x2 --config.mesh.fsdp=4 --search

libtpu compiles sampling, scoring and the update on this machine's CPU for the topology
named, placed by the configuration's meshes. **Nothing runs.** Memory is what the compiler
allocates. Arithmetic and collectives are read from the compiled text, with every loop
counted as often as it runs. Sampling counts as if no trace ended early. The floor of the
time is that of the busiest of three resources at its published peak. A real step takes
longer.

While sampling and scoring run, the train state stays on the chip, and is added to their
memory. `--search` looks for the largest batch, in doublings of rollout.prompts_per_step.
For that batch it looks for the remat policy that computes least again, with the fewest
microbatches. The last line is one JSON object. The exit status is 1 if something does not
fit.
"""

import json
import os
import re
import sys
import time
from typing import Any

# Before jax is imported, because it must not look for a TPU. Compiling needs none.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from rredcot_jax.cost import hlo, topology
from rredcot_jax.ops.names import check_option
from rredcot_jax.parallel import sharding
from rredcot_jax.train import programs as programs_lib
from rredcot_jax.train.experiment import Experiment

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.")
TOPOLOGY = flags.DEFINE_string("topology", "v5p:2x2x4", "Generation and shape of the slice, such as v5e:8x8.")
SLICES = flags.DEFINE_integer(
  "slices", 1, "How many of them; mesh.data goes over the network between them.", lower_bound=1
)
PROGRAMS = flags.DEFINE_list("programs", ["sample", "score", "update"], "Which to compile.")
SEARCH = flags.DEFINE_bool("search", False, "Find the largest batch and the cheapest remat policy that fit.")


def main(_: Any) -> None:
  config = CONFIG.value
  check_option("generation of --topology", TOPOLOGY.value.split(":")[0], tuple(hlo.CHIPS))
  try:
    devices = topology.devices_of(TOPOLOGY.value, slices=SLICES.value)
  except ImportError as error:
    raise SystemExit(error) from None
  ask(config, devices)
  if SEARCH.value:
    found = search(config, devices)
    if found is None:
      print(json.dumps({"topology": TOPOLOGY.value, "fits": False}))
      sys.exit(1)
    config = found
  result = compile_all(config, devices, PROGRAMS.value)
  result = {"topology": TOPOLOGY.value, "slices": SLICES.value, "chips": len(devices), **settings(config), **result}
  show(result)
  print(json.dumps(result))
  sys.exit(0 if result["fits"] else 1)


def ask(config: ConfigDict, devices: Any) -> None:
  """What a run asks at its start. A layout that the pod would refuse is refused before anything is compiled.

  Raises:
    ValueError: see `Experiment.rows` and `sharding.check_split`.
  """
  experiment = Experiment(config, devices=devices)
  rows = experiment.rows
  sharding.check_split(experiment.abstract_params_state)
  hosts = len({device.process_index for device in devices})
  print(
    f"{rows.count} rows on {len(devices)} chips of {hosts} hosts; groups lie in {'several' if rows.split else 'one'}"
  )


def settings(config: ConfigDict) -> dict[str, Any]:
  axes = lambda mesh: {axis: mesh[axis] for axis in sharding.AXES}
  return {
    "rows": config.rollout.prompts_per_step * config.rollout.group_size,
    "tokens": [config.rollout.max_prompt_tokens, config.rollout.max_tokens],
    "mesh": axes(config.mesh),
    "rollout_mesh": axes(config.rollout_mesh) if config.rollout_mesh.data else "as mesh",
    "compute": config.compute.to_dict(),
  }


def compile_all(config: ConfigDict, devices: Any, names: list[str]) -> dict[str, Any]:
  """Compiles the programs; a dict of plain numbers, bytes and FLOPs a chip."""
  chip = hlo.CHIPS[TOPOLOGY.value.split(":")[0]]
  experiment = Experiment(config, devices=devices)
  resident = sharding.bytes_a_device(experiment.abstract_params_state)
  programs = programs_lib.programs(experiment)
  result: dict[str, Any] = {"hbm": chip.hbm, "train_state": resident, "programs": {}}
  for name in (name for name in programs if name in names):
    beside = 0 if name == "update" else resident
    began = time.perf_counter()
    try:
      compiled = programs[name]().compile()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      result["programs"][name] = {"fits": False, "needs": needed(str(error)), "resident": beside}
      continue
    seconds = time.perf_counter() - began
    counts = hlo.count(compiled.as_text())
    once = compiled.cost_analysis() or {}
    memory = hlo.memory(compiled)
    # XLA counts bytes and arithmetic of a loop's body once. Bytes are scaled by the ratio of the two counts of
    # arithmetic.
    products = counts.flops - counts.kernel_flops
    traffic = once.get("bytes accessed", 0.0) * max(products / max(once.get("flops", 0.0), 1.0), 1.0)
    if name == "sample":
      # Sampling's loop is too unlike its prefill for that. Every token reads all parameters and the whole cache.
      traffic = config.rollout.max_tokens * (memory["arguments"] + memory["outputs"])
    result["programs"][name] = {
      "fits": memory["peak"] + beside <= chip.hbm,
      **memory,
      "resident": beside,
      "flops": counts.flops,
      "kernel_flops": counts.kernel_flops,
      "flops_xla_counts_once": once.get("flops", 0.0),
      "hbm_bytes": traffic,
      "collective_bytes": dict(counts.collective_bytes),
      "collective_calls": dict(counts.collective_calls),
      "floor_seconds": hlo.floors(counts, traffic, chip),
      "compile_seconds": round(seconds, 1),
    }
  result["fits"] = all(program["fits"] for program in result["programs"].values())
  return result


def needed(message: str) -> str:
  """The memory that the compiler reports for a program."""
  found = re.search(r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", message)
  return "{} of temporaries, of {} in all".format(*found.groups()) if found else message.splitlines()[0][:200]


def show(result: dict[str, Any]) -> None:
  gib = lambda size: f"{size / 2**30:.2f}"
  print(f"{result['topology']}, {result['chips']} chips of {gib(result['hbm'])} GiB; {result['rows']} rows")
  print(f"{'a chip':26s}" + "".join(f"{name:>20s}" for name in result["programs"]))
  done = [program if "peak" in program else None for program in result["programs"].values()]

  def row(title: str, value: Any) -> None:
    print(f"{title:26s}" + "".join(f"{value(one) if one else '-':>20s}" for one in done))

  for name in ("arguments", "outputs", "temporaries", "peak", "resident"):
    row(f"{name}, GiB", lambda one, name=name: gib(one[name]))
  print(f"{'fits':26s}" + "".join(f"{'yes' if p['fits'] else 'NO':>20s}" for p in result["programs"].values()))
  for name, program in result["programs"].items():
    if "needs" in program:
      print(f"  {name} needs {program['needs']}")
  row("TFLOP", lambda one: f"{one['flops'] / 1e12:.3g}")
  row("  of them in kernels", lambda one: f"{one['kernel_flops'] / 1e12:.3g}")
  row("HBM traffic, GB (rough)", lambda one: f"{one['hbm_bytes'] / 1e9:.3g}")
  row("FLOP a byte", lambda one: f"{one['flops'] / max(one['hbm_bytes'], 1):.3g}")
  for kind in hlo.COLLECTIVES:
    if any(one and one["collective_calls"].get(kind) for one in done):
      row(
        f"{kind}, GB (calls)",
        lambda one, kind=kind: (
          f"{one['collective_bytes'].get(kind, 0) / 1e9:.3g} ({one['collective_calls'].get(kind, 0):.0f})"
        ),
      )
  for resource in ("compute", "memory", "network"):
    row(f"floor by {resource}, s", lambda one, resource=resource: f"{one['floor_seconds'][resource]:.3g}")
  row("compiled in, s", lambda one: f"{one['compile_seconds']:.1f}")


def search(config: ConfigDict, devices: Any) -> ConfigDict | None:
  """The configuration with the largest batch that fits and the cheapest remat policy and microbatches for it."""
  mesh = Experiment(config, devices=devices).mesh

  def fits(names: list[str], changes: dict[str, Any]) -> bool:
    result = compile_all(changed(config, changes), devices, names)
    print(f"  {', '.join(names)} with {changes}: {'fits' if result['fits'] else 'does not fit'}", flush=True)
    return result["fits"]

  found = programs_lib.search(
    fits, config.rollout.prompts_per_step, group_size=config.rollout.group_size,
    row_parts=mesh.shape["data"] * mesh.shape["fsdp"],
  )  # fmt: skip
  return None if found is None else changed(config, found)


def changed(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
  config = ConfigDict(config.to_dict())
  config.rollout.prompts_per_step = changes.get("prompts", config.rollout.prompts_per_step)
  config.compute.remat = changes.get("remat", config.compute.remat)
  config.compute.microbatches = changes.get("microbatches", config.compute.microbatches)
  return config


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main)
