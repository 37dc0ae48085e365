"""Nothing is compiled in a loop after its warm-up, whatever the example."""

import pathlib

import pytest
from helpers import compilations, run

from rredcot_jax.train import launch, train_step

ROOT = pathlib.Path(__file__).parent.parent
SMALL = {"width": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "mlp_width": 24}
EXAMPLES = (
  "demo", "demo_llm", "gsm_symbolic_tiny", "smollm2_gsm_symbolic", "qwen3_4b_numina_math",
)  # fmt: skip
STEPS, WARM_UP = 6, 2


def shrunk(name, cache_dir):
  """The example with its own task, credit, precision and layout, and a model and batches for four CPU devices."""
  config = launch.load_file(ROOT / "configs" / f"{name}.py").get_config()
  config.model.update(SMALL | {"vocab_size": 0, "max_positions": 0})
  config.initial_params = config.warm_start.initial_params = ""
  config.tokenizer.path = "chain" if config.task.name == "chain" else "gsm_symbolic"
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
def test_nothing_is_compiled_after_the_warm_up_steps(name, tmp_path):
  config = shrunk(name, tmp_path / "cache")
  with compilations() as compiled:
    run(config, tmp_path / "run")
  steps = [step for step, name in compiled if name in ("sample", "policy_update", "<lambda>")]
  assert len(steps) >= 3 and max(steps) < WARM_UP  # In buckets of length the update has no name of its own.
  # Every kind of step is warm after the first evaluation and checkpoint inside the loop, which follow step 2's line.
  assert [name for step, name in compiled if step > WARM_UP] == []


def test_buckets_hold_their_traces():
  assert train_step.bucket_lengths(56, 1) == [56]
  assert train_step.bucket_lengths(56, 4) == [14, 28, 42, 56]
  assert train_step.bucket_lengths(2, 4) == [1, 2]
