"""The comparison's figures by hand, what its pictures draw, and the scripts that make it."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import compare
import numpy as np
import pytest

from rredcot_jax.report import comparison
from rredcot_jax.train import validation
from rredcot_jax.train import workdir as workdir_lib

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
  assert run.accuracy == [0.1, 0.2, 0.3] and run.error == [0.01] * 3
  # The first steps compile: neither the medians nor the means hold them.
  assert run.step_seconds == 2.0 and run.credit_seconds == 1.0
  assert run.costs == {"credit_seconds": 1.0, "generated_tokens": 7}


def test_the_warm_up_is_left_out_of_times_and_costs(tmp_path):
  path = tmp_path / "metrics.jsonl"
  lines = [{"step": 0, "eval/pass@1": 0, "eval/pass@1_se": 0, "train/rollout_tokens": 0}]
  for step in range(1, 7):
    seconds = 100.0 if step < 4 else float(step)
    lines.append({"step": step, "train/step_seconds": seconds, "train/credit_seconds": seconds})
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  run = comparison.read_run(tmp_path)
  assert run.step_seconds == run.credit_seconds == 5.0 and run.costs == {"credit_seconds": 5.0}


def test_operations_of_a_run_that_did_not_log_them_are_unknown(tmp_path):
  write_run(tmp_path / "run", [0.1, 0.2, 0.3])
  path = tmp_path / "run" / "metrics.jsonl"
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  del next(line for line in lines if line["step"] == 7)["train/token_forwards"]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  run = comparison.read_run(tmp_path / "run")
  assert run.token_forwards[:2] == [0, 50] and math.isnan(run.token_forwards[2])


def test_what_was_spent_when_a_goal_was_first_reached():
  spent, accuracy = [0, 100, 200, 300], [0.2, 0.6, 0.4, 0.8]
  assert comparison.spent_to_reach(spent, accuracy, 0.2) == 0
  assert comparison.spent_to_reach(spent, accuracy, 0.4) == pytest.approx(50)
  assert comparison.spent_to_reach(spent, accuracy, 0.6) == 100
  assert comparison.spent_to_reach(spent, accuracy, 0.7) == pytest.approx(275)
  assert comparison.spent_to_reach(spent, accuracy, 0.9) is None


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


def test_an_accuracy_that_was_there_before_training_is_none_that_was_reached(tmp_path):
  runs = {
    "grpo": {1: write_run(tmp_path / "g", [0.6, 0.5, 0.6])},
    "ours": {1: write_run(tmp_path / "o", [0.6, 0.7, 0.8])},
  }
  found = comparison.compare(runs, num_params=1)
  assert found["reached"] == {"grpo": "0 of 1", "ours": "0 of 1"}
  assert found["per_seed"]["ours"][1]["rollouts_over_grpo"] is None


def test_times_are_over_the_baselines_and_curves_end_with_the_shortest_run(tmp_path):
  base, ours = write_run(tmp_path / "g", [0.1, 0.2, 0.3]), write_run(tmp_path / "o", [0.1, 0.2, 0.3])
  slow = dataclasses.replace(ours, step_seconds=6.0)
  cut = dataclasses.replace(
    ours, steps=[0, 5], tokens=[0, 500], token_forwards=[0, 50], accuracy=[0.1, 0.4], error=[0, 0]
  )
  found = comparison.compare({"grpo": {1: base, 2: base}, "ours": {1: slow, 2: cut}}, num_params=1)
  assert found["step_seconds_over_grpo"] == {"grpo": 1.0, "ours": 2.0}  # The median of 3 and 1.
  assert found["curves"]["ours"]["steps"] == [0, 5] and found["curves"]["ours"]["accuracy"] == [0.1, 0.3]


def test_a_comparison_needs_its_baseline(tmp_path):
  with pytest.raises(ValueError, match="no finished run of 'grpo'"):
    comparison.compare({"ours": {1: write_run(tmp_path / "o", [0.1, 0.2, 0.3])}}, num_params=1)


def test_accuracies_costs_and_times_by_hand(figures):
  # Of the two seeds that the baseline has; the third would make the mean 0.9 as well, so the interval tells.
  assert figures["final_accuracy"]["ours"] == {"mean": 0.9, "low": 0.9, "high": 0.9}
  half = 12.7062 * 0.1  # Differences 0.1 and 0.3: s / sqrt(2) = 0.1.
  over = figures["final_accuracy_over_grpo"]["ours"]
  assert (over["mean"], over["low"], over["high"]) == pytest.approx((0.2, 0.2 - half, 0.2 + half), abs=1e-4)
  assert figures["step_seconds_over_grpo"]["ours"] == 1.0
  assert figures["costs_a_step"]["ours"] == {"credit_seconds": 1.0, "generated_tokens": 7.0}
  interval = figures["rollouts_to_grpo_accuracy_over_grpo_interval"]
  assert interval["ours"]["low"] == pytest.approx(0.5625 - 12.7062 * 0.0625, abs=1e-4) and interval["never"] is None


@pytest.mark.parametrize(("size", "quantile"), [(2, 12.7062), (3, 4.3027), (5, 2.7764), (11, 2.2281), (31, 2.0423)])
def test_the_interval_is_students(size, quantile):
  """Quantiles from a printed table of Student's distribution, 97.5%."""
  values = [0.2 + 0.1 * (-1) ** i for i in range(size)]
  half = quantile * np.std(values, ddof=1) / math.sqrt(size)
  interval = comparison.mean_interval(values)
  assert interval["mean"] == pytest.approx(np.mean(values), abs=6e-5)
  assert interval["low"] == pytest.approx(np.mean(values) - half, abs=1e-4)
  assert interval["high"] == pytest.approx(np.mean(values) + half, abs=1e-4)


def test_one_seed_has_no_interval_and_equal_ones_an_empty_one():
  assert comparison.mean_interval([0.5]) == {"mean": 0.5, "low": None, "high": None}
  assert comparison.mean_interval([0.5] * 3) == {"mean": 0.5, "low": 0.5, "high": 0.5}


@pytest.mark.parametrize(("x_key", "scale"), [("rollout_tokens", 1e3), ("flops", 1e12)])
def test_curves_are_the_mean_curves(figures, x_key, scale):
  axes = comparison.curves_figure(figures, x_key, {"ours": ["ours", "absent"], "others": ["never"]}).axes
  for ax, names in zip(axes, (["grpo", "ours"], ["grpo", "never"])):
    assert [text.get_text() for text in ax.get_legend().get_texts()] == names
    curves = [line for line in ax.lines if line.get_label() in names]
    for line, name in zip(curves, names, strict=True):
      curve = figures["curves"][name]
      # What has spent nothing has no place on a logarithmic axis.
      points = [(x / scale, 100 * y) for x, y in zip(curve[x_key], curve["accuracy"]) if x or x_key != "flops"]
      np.testing.assert_allclose(line.get_xydata(), points)
    assert ax.lines[-1].get_ydata()[0] == pytest.approx(70)  # Where GRPO ended, over its seeds.
    assert ax.get_xscale() == ("log" if x_key == "flops" else "linear") and ax.get_xlabel()
  assert [ax.get_title() for ax in axes] == ["ours", "others"] and "%" in axes[0].get_ylabel()
  band = axes[0].collections[1].get_paths()[0].vertices[:, 1]
  assert band.min() >= 0 and band.max() <= 100  # Two seeds' intervals leave what an accuracy can be.


def test_the_summary_draws_every_seed_and_the_means(figures):
  left, right = comparison.summary_figure(figures).axes
  assert [tick.get_text() for tick in left.get_yticklabels()] == ["never", "ours", "grpo"]
  dots = {line.get_ydata()[0]: sorted(line.get_xdata()) for line in left.lines if line.get_marker() == "o"}
  assert dots == {0: [1.0], 1: [0.5, 0.625], 2: pytest.approx([1 / 3, 1.0], abs=1e-4)}
  bars = {line.get_ydata()[0]: line.get_xdata()[0] for line in left.lines if line.get_marker() == "|"}
  assert bars == pytest.approx({0: 1.0, 1: 0.5625, 2: 2 / 3}, abs=1e-4)
  assert [(text.get_text(), text.get_position()[1]) for text in left.texts] == [("1 of 2 reached it", 0)]
  means = [container.lines[0].get_xydata()[0].tolist() for container in right.containers]
  ends = [container.lines[2][0].get_segments()[0][:, 0] for container in right.containers]
  expected = [(0, 100), (90, 90), (0, 100)]  # Two seeds that differ leave what an accuracy can be.
  np.testing.assert_allclose(ends, expected, atol=1e-9)
  assert means == [[pytest.approx(55), 0], [pytest.approx(90), 1], [pytest.approx(70), 2]]
  assert left.get_xlabel() and right.get_xlabel()


def test_a_table_is_aligned_and_shows_control_characters_as_codes(capsys):
  comparison.print_table([{"run": "a", "x": "12"}, {"run": "\x1b[31mlong\u202e", "x": "3"}])
  lines = capsys.readouterr().out.splitlines()
  assert lines == ["", f"{'run':18}  x ", f"{'a':18}  12", "\\x1b[31mlong\\u202e  3 "]


def chain_comparison():
  spec = importlib.util.spec_from_file_location("chain_comparison", ROOT / "configs" / "chain_comparison.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_a_run_killed_before_its_first_evaluation_is_not_finished(tmp_path):
  config, workdir = compare.make_run(chain_comparison(), "grpo", 1, None, tmp_path)
  assert not compare.finished(workdir, config)
  workdir_lib.claim(workdir, config, "test", resume=True)
  (workdir / "checkpoints" / "60").mkdir(parents=True)
  for written, done in (("", False), ('{"step": 0, "eval/pa', False), ('{"step": 60, "eval/pass@1": 0.5}\n', True)):
    (workdir / "metrics.jsonl").write_text(written)
    assert compare.finished(workdir, config) == done


def test_every_method_of_the_comparison_is_a_valid_configuration():
  module = chain_comparison()
  rollouts = set()
  for name, arg in module.METHODS.items():
    config = module.get_config(arg)
    validation.validate(config)
    assert name in ("grpo", "reinforce") or config.credit.mode != "uniform"
    rollouts.add((config.num_steps, config.rollout.prompts_per_step * config.rollout.group_size))
  assert len(rollouts) == 1  # Equal rollouts.
  assert set(module.SETTINGS) == set(module.METHODS)


DEMO = """
import json, pathlib, sys
import demo
from rredcot_jax.report import comparison
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
