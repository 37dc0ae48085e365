"""The comparison's figures by hand, and the page and pictures it writes."""

import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import compare
import pytest
import train

from rredcot_jax.report import comparison
from rredcot_jax.train import config as config_lib

ROOT = pathlib.Path(__file__).parent.parent


def write_run(directory, accuracy, *, forwards=10.0):
  """A run of 10 steps a hundred rollout tokens each, evaluated every 5."""
  directory.mkdir(parents=True)
  lines = [{"step": 0, "eval/pass@1": accuracy[0], "eval/pass@1_se": 0.01, "train/rollout_tokens": 0}]
  for step in range(1, 11):
    lines.append({
      "step": step, "train/step_seconds": 2.0 if step > 3 else 50.0, "train/credit_seconds": 1.0,
      "train/rollout_tokens": 100 * step, "train/token_forwards": forwards, "credit/generated_tokens": 7,
    })  # fmt: skip
    if step % 5 == 0:
      lines.append({
        "step": step, "eval/pass@1": accuracy[step // 5], "eval/pass@1_se": 0.01, "train/rollout_tokens": 100 * step,
      })  # fmt: skip
  (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  (directory / "config.json").write_text(json.dumps({"command": "x", "config": {}}))
  return comparison.read_run(directory)


@pytest.fixture
def figures(tmp_path):
  runs = {
    "grpo": {1: write_run(tmp_path / "g1", [0.4, 0.6, 0.8]), 2: write_run(tmp_path / "g2", [0.4, 0.7, 0.6])},
    "ours": {
      1: write_run(tmp_path / "o1", [0.4, 0.8, 0.9], forwards=30.0),
      2: write_run(tmp_path / "o2", [0.4, 0.5, 0.9], forwards=30.0),
      3: write_run(tmp_path / "o3", [0.4, 0.9, 0.9]),  # A seed that the baseline has not finished.
    },
    "never": {1: write_run(tmp_path / "n1", [0.4, 0.4, 0.5]), 2: write_run(tmp_path / "n2", [0.4, 0.4, 0.6])},
  }
  return comparison.compare(runs, num_params=1000)


def test_a_run_is_read(tmp_path):
  run = write_run(tmp_path / "run", [0.1, 0.2, 0.3])
  assert run.steps == [0, 5, 10] and run.tokens == [0, 500, 1000] and run.token_forwards == [0, 50, 100]
  assert run.step_seconds == 2.0 and run.credit_seconds == 1.0 and run.costs["generated_tokens"] == 7


def test_ratios_by_hand(figures):
  ratio = figures["rollouts_to_grpo_accuracy_over_grpo"]
  # Seed 1 is at 0.8 after 500 of 1000 tokens; seed 2 at 0.6 a quarter of the way from 500 to 1000.
  assert figures["per_seed"]["ours"][1]["rollouts_over_grpo"] == 0.5
  assert figures["per_seed"]["ours"][2]["rollouts_over_grpo"] == 0.625
  assert ratio["ours"] == pytest.approx(0.5625, abs=1e-4) and figures["reached"]["ours"] == "2 of 2"
  assert figures["flops_to_grpo_accuracy_over_grpo"]["ours"] == pytest.approx(3 * 0.5625, abs=1e-3)
  # GRPO's own seed 2 was there before its end: between 0.4 and 0.7, two thirds of the first half.
  assert figures["per_seed"]["grpo"][2]["rollouts_over_grpo"] == pytest.approx(1 / 3, abs=1e-4)
  assert figures["per_seed"]["never"][1]["rollouts_over_grpo"] is None
  assert figures["reached"]["never"] == "1 of 2" and ratio["never"] == 1.0
  assert figures["seeds"] == [1, 2] and 3 not in figures["per_seed"]["ours"]
  # Mean curves: 0.4, 0.65, 0.9 against a goal of 0.7.
  assert figures["rollouts_to_grpo_accuracy_over_grpo_of_mean_curve"]["ours"] == pytest.approx(0.6, abs=1e-3)
  assert figures["rollouts_to_grpo_accuracy_over_grpo_of_mean_curve"]["never"] is None
  assert figures["curves"]["ours"]["flops"] == [0, 2 * 1000 * 150, 2 * 1000 * 300]
  json.loads(json.dumps(figures, allow_nan=False))


def test_the_interval_is_students():
  interval = comparison.mean_interval([0.1, 0.2, 0.3])
  half = 4.303 * 0.1 / math.sqrt(3)
  assert interval == {
    "mean": 0.2,
    "low": pytest.approx(0.2 - half, abs=1e-4),
    "high": pytest.approx(0.2 + half, abs=1e-4),
  }
  assert comparison.mean_interval([0.5]) == {"mean": 0.5, "low": None, "high": None}


def test_figures_are_drawn(figures):
  panels = {"ours": ["ours", "absent"], "others": ["never"]}
  for x_key in ("rollout_tokens", "flops"):
    axes = comparison.curves_figure(figures, x_key, panels).axes
    assert [len(ax.get_legend().get_texts()) for ax in axes] == [2, 2]
    assert all(ax.get_xlabel() for ax in axes) and "%" in axes[0].get_ylabel()
  left, right = comparison.summary_figure(figures).axes
  assert [tick.get_text() for tick in left.get_yticklabels()] == ["never", "ours", "grpo"]
  assert any("1 of 2 reached it" in text.get_text() for text in left.texts) and right.get_xlabel()


def chain_comparison():
  spec = importlib.util.spec_from_file_location("chain_comparison", ROOT / "configs" / "chain_comparison.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_a_run_killed_before_its_first_evaluation_is_not_finished(tmp_path):
  config, workdir = compare.make_run(chain_comparison(), "grpo", 1, None, tmp_path)
  assert not compare.finished(workdir, config)
  train.claim_workdir(workdir, config, "test", resume=True)
  for written, done in (("", False), ('{"step": 0, "eval/pa', False), ('{"step": 60, "eval/pass@1": 0.5}\n', True)):
    (workdir / "metrics.jsonl").write_text(written)
    assert compare.finished(workdir, config) == done


def test_every_method_of_the_comparison_is_a_valid_configuration():
  module = chain_comparison()
  rollouts = set()
  for name, arg in module.METHODS.items():
    config = module.get_config(arg)
    config_lib.validate(config)
    assert name in ("grpo", "reinforce") or config.credit.mode != "uniform"
    rollouts.add((config.num_steps, config.rollout.prompts_per_step * config.rollout.group_size))
  assert len(rollouts) == 1  # Equal rollouts.
  assert set(module.SETTINGS) == set(module.METHODS)


DEMO = """
import json, pathlib, sys
import demo
from rredcot_jax import comparison
grpo, ours = ([comparison.read_run(pathlib.Path(path))] for path in sys.argv[1:])
figures = demo.compare(grpo, ours)
print(json.dumps([figures, demo.row("GRPO", grpo, figures), demo.row("RREDCoT", ours, figures)]))
"""


def test_the_demos_table_by_hand(tmp_path):
  """In a process of its own: the demo and the comparison have flags of one name."""
  write_run(tmp_path / "grpo", [0.4, 0.6, 0.8])
  write_run(tmp_path / "rredcot", [0.4, 0.8, 0.9])
  command = [sys.executable, "-c", DEMO, str(tmp_path / "grpo"), str(tmp_path / "rredcot")]
  done = subprocess.run(command, cwd=ROOT / "experiments", capture_output=True, text=True, check=True)
  figures, grpo, ours = json.loads(done.stdout)
  assert figures["tokens_to_grpo_accuracy_over_grpo"] == [0.5] and figures["accuracy_rredcot"] == [0.9]
  assert grpo["accuracy after"] == "80.0% ± 1.0" and ours["accuracy before"] == "40.0% ± 1.0"
  assert grpo["rollout tokens"] == "1,000"
  assert ours["seconds a step"] == "2.00" and ours["step time over GRPO"] == "1.00"
