"""A rehearsal of a pod on this machine: what is shrunk, what is refused, and one whole small run of real processes."""

import json
import math
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import process_run
import pytest

from rredcot_jax.cost import topology
from rredcot_jax.parallel import sharding
from rredcot_jax.train import launch
from rredcot_jax.train.experiment import Experiment

ROOT = pathlib.Path(__file__).parent.parent


def rehearse(*words, status=0):
  paths = [str(ROOT), str(ROOT / "experiments"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "XLA_FLAGS": ""}
  command = [sys.executable, "tools/rehearse.py", *words]
  ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
  assert ran.returncode == status, ran.stdout[-3000:] + ran.stderr[-2000:]
  return json.loads(ran.stdout.splitlines()[-1]), ran.stdout


@pytest.mark.faults  # `make rehearse` does the same with every configuration.
def test_two_processes_make_a_step_stop_and_go_on():
  found, text = rehearse(
    "--config=tests/process_run.py", "--hosts=2", "--devices_per_host=2", "--config.mesh.data=1", "--config.mesh.fsdp=4"
  )
  assert found["ok"] and found["order"] == "plain"
  first, second = found["starts"]
  assert (first["steps"], second["steps"]) == ([1], [1, 2]) and second["evaluations"] == [0, 2]
  for start in (first, second):
    assert [held["process"] for held in start["processes"]] == [0, 1]
    # 8 rows over 4 devices of 2 processes, and a state of which every device holds about a quarter.
    assert [held["step"]["here"] for held in start["processes"]] == [4, 4]
    for held in start["processes"]:
      assert 0.25 < held["state_bytes"] / held["state_bytes_in_all"] < 0.35
  # Meshes, rows, groups, bank and model are as they were.
  assert "made small: checkpoint.every 2 -> 1, num_steps 6 -> 2\n" in text


def test_what_a_run_would_refuse_is_refused():
  found, text = rehearse("--config=tests/process_run.py", "--hosts=1", "--devices_per_host=3", status=1)
  assert not found["ok"] and "a batch of 8 rows does not split over 3 devices" in text


@pytest.mark.peers
def test_devices_lie_on_processes_as_on_the_topology():
  found, _ = rehearse(
    "--config=tests/process_run.py", "--hosts=2", "--devices_per_host=4", "--topology=v5p:2x2x2",
    "--config.mesh.data=8",
  )  # fmt: skip
  assert found["ok"] and "[0, 1, 0, 1, 0, 1, 0, 1]" in found["order"]
  # A group of two has a row in each process.
  assert all(held["step"]["groups_in_several_processes"] for held in found["starts"][0]["processes"])


@pytest.fixture(scope="module")
def tool():
  return launch.load_file(ROOT / "tools" / "rehearse.py")


RECIPES = {
  "v5p:2x2x4": ({}, 16),
  "v5e:8x8": (
    {"mesh.fsdp": 16, "mesh.sequence": 4, "rollout_mesh.data": 16, "rollout_mesh.tensor": 4},
    64,
  ),
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_small_sizes_divide_where_the_real_ones_do(tool, tmp_path, recipe):
  config = launch.load_file(ROOT / "configs" / "qwen3_4b_numina_math.py").get_config()
  changes, chips = RECIPES[recipe]
  config.update_from_flattened_dict(changes)
  small = tool.made_small(config, chips, tmp_path)
  for name in ("mesh", "rollout_mesh"):
    axes = tool.sizes_of(config, name, chips)
    for parts in {
      math.prod(axes[axis] for axis in some)
      for some in (("fsdp",), ("fsdp", "sequence"), ("tensor",), ("tensor", "sequence"))
    }:
      for size in ("width", "num_heads", "num_kv_heads", "mlp_width", "vocab_size"):
        assert (config.model[size] % parts == 0) == (small.model[size] % parts == 0), (parts, size)
  for name in ("mesh", "rollout_mesh", "loss", "advantages"):
    assert small[name].to_dict() == config[name].to_dict()
  for name in ("prompts_per_step", "group_size"):
    assert small.rollout[name] == config.rollout[name]
  assert small.evaluation.rows == config.evaluation.rows and small.compute.dtype == config.compute.dtype
  made = Experiment(small)
  assert len(made.held_out) >= small.evaluation.num_prompts and made.train_task.counts["without_answer"] > 0
  assert made.model.qk_norm and made.codec.layout.exit == "\n</think>\n\n"


# ---- What is asked at a start ----------------------------------------------------------------


def test_a_state_that_the_mesh_does_not_divide_is_refused():
  config = process_run.get_config()
  config.mesh.update({"data": 1, "fsdp": 4})
  sharding.check_split(Experiment(config).abstract_params_state)
  config.model.update({"width": 18})  # Of heads of 4: the width alone is split over fsdp.
  with pytest.raises(ValueError, match=r"4\.0 times the .* MiB of an even split, mostly of .*Choose mesh\.fsdp"):
    sharding.check_split(Experiment(config).abstract_params_state)
  config.mesh.update({"data": 4, "fsdp": 1})  # Replicas are meant to hold all.
  sharding.check_split(Experiment(config).abstract_params_state)


@pytest.mark.parametrize(
  "changes", [{"mesh.data": 1, "mesh.fsdp": 4, "rollout_mesh.data": 2, "rollout_mesh.tensor": 2}]
)
def test_rows_must_split_over_both_layouts(changes):
  config = process_run.get_config()
  config.update_from_flattened_dict(changes)
  assert Experiment(config).rows.count == 8
  config.rollout.prompts_per_step = 1  # Two rows: enough for rollouts, and not for the update.
  with pytest.raises(ValueError, match="a batch of 2 rows does not split over 4 devices"):
    Experiment(config).rows  # noqa: B018


class Chip(types.SimpleNamespace):
  """A TPU's chip as `mesh_utils` looks at it."""

  __hash__ = object.__hash__


def chips_of(slices):
  """Slices of 2 x 2 chips, each a process."""
  chip = lambda at, x, y: Chip(
    platform="tpu", device_kind="TPU v5 lite", slice_index=at, process_index=at, id=100 * at + 2 * y + x,
    coords=(x, y, 0), core_on_chip=0,
  )  # fmt: skip
  return [chip(at, x, y) for at in range(slices) for y in range(2) for x in range(2)]


def test_data_alone_goes_over_the_network_between_slices(monkeypatch):
  # JAX's own mesh takes only devices of its own.
  monkeypatch.setattr(sharding, "Mesh", lambda devices, axes: types.SimpleNamespace(devices=devices, size=devices.size))
  mesh = sharding.make_mesh(data=4, fsdp=2, devices=chips_of(2))
  of_slice = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
  assert of_slice[:, :, 0, 0].tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
  with pytest.raises(ValueError, match=r"mesh\.data=1 is not a multiple of the 2 slices.*the 4 chips of a slice"):
    sharding.make_mesh(data=1, fsdp=8, devices=chips_of(2))
  with pytest.raises(ValueError, match=r"rollout_mesh\.data=1 is not a multiple of the 2 slices"):
    sharding.relayout(mesh, data=1, tensor=8)
  assert sharding.relayout(mesh, data=2, tensor=4).devices.shape == (2, 1, 4, 1)
  assert sharding.make_mesh(data=1, fsdp=4, devices=chips_of(1)).devices.shape == (1, 4, 1, 1)
  assert sharding.make_mesh(data=1, fsdp=4).devices.tolist() == np.array(jax.devices()).reshape(1, 4, 1, 1).tolist()


@pytest.mark.peers
def test_slices_that_are_not_there_are_joined_by_data():
  devices = topology.devices_of("v5e:4x4", slices=2)
  mesh = sharding.make_mesh(data=2, fsdp=16, devices=devices)
  assert [[chip.slice_index for chip in row] for row in mesh.devices[:, :, 0, 0]] == [[0] * 16, [1] * 16]
