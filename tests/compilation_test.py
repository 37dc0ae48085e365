"""Nothing is compiled in a loop after its warm-up, whatever the example."""

import importlib.util
import pathlib

import jax
import pytest
import train

from rredcot_jax.train import config as config_lib
from rredcot_jax.train import metrics, train_step

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
