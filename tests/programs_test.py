"""The programs of a training step compiled for TPUs that are not there, and the largest batch that fits."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from rredcot_jax.model.config import REMATS
from rredcot_jax.train import programs

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize(
  ("room", "expected"),
  [
    (7, None),  # Not even the first batch.
    (100, {"prompts": 4, "remat": "attention", "microbatches": 4}),
    (300, {"prompts": 8, "remat": "dots", "microbatches": 8}),
  ],
)
def test_the_search_takes_the_largest_batch_then_the_cheapest_policy(room, expected):
  """A made-up memory: sampling's grows with the batch, the update's with a microbatch and what a policy keeps."""
  kept = {"none": 1000, "dots": 140, "attention": 50, "full": 10}

  def fits(names, changes):
    if "update" not in names:
      return changes["prompts"] * 20 <= room
    return changes["prompts"] * 4 / changes["microbatches"] / 2 * kept[changes["remat"]] <= room

  assert programs.search(fits, 2, group_size=4, row_parts=4) == expected
  assert set(programs.REMATS_BY_COST) == set(REMATS)


@pytest.mark.peers
def test_a_step_compiles_for_tpus_that_are_not_there():
  command = [
    sys.executable, "tools/tpu_compile.py", "--config", "tests/tiny_config.py", "--topology", "v5e:2x2",
    "--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.rollout_mesh.data=2", "--config.rollout_mesh.tensor=2",
    "--config.compute.dtype=bfloat16", "--config.compute.log_prob_chunk=28", "--config.model.num_layers=2",
    "--config.model.head_dim=128", "--config.credit.bank=answer", "--config.credit.max_completion_tokens=8",
  ]  # fmt: skip
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
  ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
  assert ran.returncode == 0, ran.stderr[-2000:]
  result = json.loads(ran.stdout.splitlines()[-1])
  assert result["fits"] and result["chips"] == 4
  for name, program in result["programs"].items():
    assert 0 < program["arguments"] < program["peak"] + program["resident"] < result["hbm"], name
    assert program["flops"] > program["flops_xla_counts_once"] > 0
    assert np.isfinite(list(program["floor_seconds"].values())).all()
  # Parameters are gathered for the update, attention is the Pallas kernel.
  assert result["programs"]["update"]["collective_bytes"]["all-gather"] > 0
  assert result["programs"]["update"]["kernel_flops"] > 0
