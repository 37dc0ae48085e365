"""Nothing is compiled in a loop after its warm-up, whatever the example; and what a compiled program costs."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train

from rredcot_jax.cost import hlo
from rredcot_jax.data import datasets
from rredcot_jax.model.config import REMATS
from rredcot_jax.parallel import sharding
from rredcot_jax.train import config as config_lib
from rredcot_jax.train import metrics, programs, train_step

ROOT = pathlib.Path(__file__).parent.parent
SMALL = {"width": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "mlp_width": 24}
EXAMPLES = (
  "demo", "demo_llm", "gsm_symbolic_tiny", "smollm2_gsm_symbolic", "r1_distill_1p5b_open_rs", "qwen3_4b_numina_math",
)  # fmt: skip
STEPS, WARM_UP = 6, 2


def shrunk(name, cache_dir):
  """The example with its own task, credit, precision and layout, and a model and batches for four CPU devices."""
  spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  config.model.update(SMALL | {"vocab_size": 0, "max_positions": 0})
  config.initial_params = ""
  for task in (config.task, config.evaluation.task):
    if "tokenizer_dir" in task.options:
      task.options.tokenizer_dir = str(datasets.TOKENIZER_DIR)
    if "data_dir" in task.options:
      task.options.data_dir = str(ROOT / "tests" / "data")
      task.options.cache_dir = str(cache_dir)
    if "size" in task.options:
      task.options.size = 32
  config.num_steps = STEPS
  config.rollout.prompts_per_step, config.rollout.group_size = 2, 2
  config.rollout.max_prompt_tokens = max(config.rollout.max_prompt_tokens, 300) if config.task.name != "chain" else 18
  config.rollout.max_tokens = 24
  config.segmentation.k_max = 4
  config.credit.max_completion_tokens = 24
  config.credit.chunk_size = min(config.credit.chunk_size, 2)
  config.compute.log_prob_chunk = min(config.compute.log_prob_chunk, 10)
  config.compute.length_buckets = 2
  config.evaluation.every = config.checkpoint.every = 2
  config.evaluation.num_prompts = config.evaluation.samples = 2
  config.evaluation.rows = 4
  if config.mesh.fsdp > 1:
    config.mesh.fsdp = 4
    config.rollout_mesh.data = min(config.rollout_mesh.data, 4)
  return config


@pytest.mark.parametrize("name", EXAMPLES)
def test_nothing_is_compiled_after_the_warm_up_steps(name, tmp_path, monkeypatch):
  programs = []
  at_step = {}
  write = metrics.MetricsWriter.write

  def noting(self, step, values):
    at_step[step] = len(programs)
    return write(self, step, values)

  def count(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      programs.append(seconds)

  monkeypatch.setattr(metrics.MetricsWriter, "write", noting)
  jax.monitoring.register_event_duration_secs_listener(count)
  try:
    config = shrunk(name, tmp_path / "cache")
    config_lib.validate(config)
    train.claim_workdir(tmp_path / "run", config, "test", resume=True)
    train.run(config, tmp_path / "run")
  finally:
    jax.monitoring.unregister_event_duration_listener(count)
  assert max(at_step) == STEPS and at_step[1] > 0
  # Every kind of step is warm after the first evaluation and checkpoint inside the loop, which follow step 2's line.
  assert at_step[WARM_UP + 1] == at_step[STEPS], at_step


def test_buckets_hold_their_traces():
  assert train_step.bucket_lengths(56, 1) == [56]
  assert train_step.bucket_lengths(56, 4) == [14, 28, 42, 56]
  assert train_step.bucket_lengths(2, 4) == [1, 2]


def test_loops_count_as_often_as_they_run():
  def program(x, weights):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
    return jax.lax.fori_loop(0, 3, lambda _, x: x @ weights[0], x)

  shapes = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((7, 16, 16), jnp.float32)
  text = jax.jit(program).lower(*shapes).compile().as_text()
  assert hlo.count(text).flops == (7 + 3) * 2 * 8 * 16 * 16


def test_collectives_are_counted_by_what_a_device_sends():
  mesh = sharding.make_mesh(data=1, fsdp=4)
  whole = sharding.replicated(mesh)
  rows = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=sharding.batch(mesh))
  gather = jax.jit(lambda x: x, out_shardings=whole).lower(rows).compile().as_text()
  assert hlo.count(gather).collective_bytes == {"all-gather": 3 * 2 * 16 * 4}
  total = jax.jit(lambda x: x.sum(axis=0), out_shardings=whole).lower(rows).compile().as_text()
  counted = hlo.count(total)
  assert counted.collective_bytes == {"all-reduce": 2 * 16 * 4 * 3 / 4}
  assert counted.collective_calls == {"all-reduce": 1}


TPU_TEXT = """
%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[], bf16[8,128]) parameter(0)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %w = bf16[128,128]{1,0} constant({...})
  %y = bf16[8,128]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  %g = bf16[32,128]{1,0} all-gather(%y), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %t = (s32[], bf16[8,128]) tuple(%x, %y)
}

%condition (p.1: (s32[], bf16[8,128])) -> pred[] {
  %bound = s32[]{:T(128)} constant(36)
  %p.1 = (s32[], bf16[8,128]) parameter(0)
  %i = s32[] get-tuple-element(%p.1), index=0
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (a: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %a = (s32[], bf16[8,128]) parameter(0)
  ROOT %while = (s32[], bf16[8,128]) while(%a), condition=%condition, body=%body
}
"""


def test_a_tpus_text_has_convolutions_and_bounds_in_conditions():
  counted = hlo.count(TPU_TEXT)
  assert counted.flops == 36 * 2 * 8 * 128 * 128
  assert counted.collective_bytes == {"all-gather": 36 * 3 * 8 * 128 * 2}


@pytest.mark.parametrize(
  ("groups", "others"),
  [
    ("mesh['a'=2,'b'=4] {'b'}", 3),
    ("mesh['axis_0'=1,'axis_1'=16,'axis_2'=4], device_ids=([4,16]T(1,0)) {'axis_1'}", 15),
    ("[4,16]<=[64]", 15),
    ("[16,4]<=[4,16]T(1,0)", 3),
    ("{{0,1},{2,3}}", 1),
    ("{}", 63),  # All devices.
  ],
)
def test_groups_are_read_in_all_their_spellings(groups, others):
  text = "HloModule jit_f, num_partitions=64\n" + TPU_TEXT.replace("mesh['a'=2,'b'=4] {'b'}", groups)
  assert hlo.count(text).collective_bytes == {"all-gather": 36 * others * 8 * 128 * 2}


def test_a_collective_written_into_several_fusions_is_counted_once():
  gather = next(line for line in TPU_TEXT.splitlines() if "all-gather" in line)
  chained = gather + ', frontend_attributes={chain_id="13"}'
  steps = "\n".join(chained.replace("%g", f"%g{i}") for i in range(3))
  assert hlo.count(TPU_TEXT.replace(gather, steps)).collective_calls == {"all-gather": 36}
  assert hlo.count(TPU_TEXT.replace(gather, f"{gather}\n{gather}")).collective_calls == {"all-gather": 72}


def test_a_spelling_of_groups_that_is_not_known_is_not_guessed():
  with pytest.raises(ValueError, match="the groups of this collective are written in a way that is not known"):
    hlo.count(TPU_TEXT.replace("mesh['a'=2,'b'=4] {'b'}", "rings(2)"))


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


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: make peers")
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
