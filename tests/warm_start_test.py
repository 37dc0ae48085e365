"""experiments/warm_start.py: what it writes, and which runs may write there."""

import json
import subprocess
import sys

import jax
import process_run
import pytest

from rredcot_jax.train import initial, workdir
from rredcot_jax.train.experiment import Experiment

CHANGES = {
  "task.options.num_steps": 2, "rollout.max_tokens": 24, "warm_start.num_steps": 11, "warm_start.batch_size": 4,
}  # fmt: skip


@pytest.fixture
def output(tmp_path):
  """A place to write to, beside parameters to start from."""
  (tmp_path / "base").mkdir()
  params = Experiment(process_run.get_config()).start_params(jax.random.key(1))
  initial.save_params(params, tmp_path / "base" / "a.safetensors")
  return tmp_path / "out"


def changes_of(output):
  return CHANGES | {"warm_start.initial_params": str(output.parent / "base" / "a.safetensors")}


def call(output, **changes):
  """(status, standard output, standard error) of the script."""
  flags = [f"--config.{name}={value}" for name, value in (changes_of(output) | changes).items()]
  script, config = process_run.ROOT / "experiments" / "warm_start.py", process_run.ROOT / "tests" / "process_run.py"
  done = subprocess.run(
    [sys.executable, script, "--config", config, "--output", output, *flags],
    env=process_run.environment_of(output.parent, devices=1), capture_output=True, text=True, check=False,
  )  # fmt: skip
  return done.returncode, done.stdout, done.stderr


def test_it_writes_a_checkpoint_and_its_figures_and_leaves_nothing_else(output):
  status, printed, errors = call(output)
  assert status == 0, errors[-3000:]
  figures = json.loads(printed.splitlines()[-1])
  assert figures == json.loads(output.with_name("out.json").read_text())
  assert figures.keys() >= {"eval/pass@1", "before/eval/pass@1"}
  assert sorted(path.name for path in output.parent.iterdir()) == ["base", "cache", "out", "out.json"]


def test_a_second_one_and_one_of_another_configuration_are_refused(output):
  config = process_run.get_config()
  config.update_from_flattened_dict(changes_of(output))
  with workdir.claim(output.with_name("out.checkpoints"), config, "python first.py"):
    status, _, errors = call(output)
  assert status == 1
  assert r"out.checkpoints is in use by a run on" in errors and "choose another --output" in errors, errors[-3000:]
  (output.with_name("out.checkpoints") / "checkpoints" / "10").mkdir(parents=True)
  status, _, errors = call(output, **{"warm_start.learning_rate": 0.5})
  assert status == 1 and "another configuration: warm_start.learning_rate (0.002 there, 0.5 here)" in errors
  assert not output.exists()
