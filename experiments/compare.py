"""The training comparison: every method of configs/chain_comparison.py over several seeds, one table, curves, a page.

    python experiments/compare.py --workdir runs/comparison --seeds 1,2,3,4,5
    python experiments/compare.py --workdir runs/comparison --seeds 1,2,3,4,5 --methods grpo,rredcot-suffix-difference
    python experiments/compare.py --workdir runs/rates --seeds 0 --rates 1e-4,2e-4,3e-4,4e-4     (the tuning)

The same command continues an interrupted comparison. Finished runs are not touched. Methods and
seeds may come in several calls, because the figures are of all finished runs in the directory.
It writes comparison.json, comparison.html and PNG figures there. The last line is one JSON
object. With --rates, every method runs at every rate and is evaluated at its end alone. The JSON
object then holds the final accuracies and each method's best rate.
"""

import json
import pathlib
import time
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict

from rredcot_jax.model import decoder
from rredcot_jax.ops.names import check_option
from rredcot_jax.report import comparison, files, page, records
from rredcot_jax.train import differences, launch, loop, validation
from rredcot_jax.train import workdir as workdir_lib
from rredcot_jax.train.experiment import Experiment

FILE = flags.DEFINE_string("comparison", "configs/chain_comparison.py", "A file with METHODS and get_config(arg).")
SEEDS = flags.DEFINE_list("seeds", ["1", "2", "3", "4", "5"], "Seeds to run.")
METHODS = flags.DEFINE_list("methods", [], "Which methods to run, by name; all if empty.")
RATES = flags.DEFINE_list("rates", [], "Learning rates to try instead of the configured ones.")


def main(_: Any) -> None:
  began = time.perf_counter()
  root = pathlib.Path(launch.WORKDIR.value)
  module = launch.load_file(FILE.value)
  for name in METHODS.value:
    check_option("methods", name, tuple(module.METHODS))
  chosen = METHODS.value or list(module.METHODS)
  for seed in map(int, SEEDS.value):
    for name in chosen:
      for rate in RATES.value or [None]:
        config, workdir = make_run(module, name, seed, rate, root)
        if not finished(workdir, config):
          path = f"{FILE.value}:{module.METHODS[name]}"
          overrides = f" --config.seed={seed} --config.optimizer.learning_rate={config.optimizer.learning_rate}"
          command = f"python experiments/train.py --config {path}{overrides} --workdir {workdir}"
          prints = Experiment(config).fingerprints()
          with workdir_lib.claim(workdir, config, command, fingerprints=prints) as claim:
            loop.run(config, workdir, claim=claim)
  if RATES.value:
    figures: dict[str, Any] = tuned(module, chosen, root)
  else:
    figures = write_figures(module, root)
  print(json.dumps(figures | {"seconds": round(time.perf_counter() - began, 1)}))


def make_run(
  module: Any, name: str, seed: int, rate: str | None, root: pathlib.Path
) -> tuple[ConfigDict, pathlib.Path]:
  """The configuration of one run and its work directory."""
  config = module.get_config(module.METHODS[name])
  config.seed = seed
  workdir = root / f"{name}-{seed}"
  if rate is not None:
    config.optimizer.learning_rate = float(rate)
    config.evaluation.every = config.num_steps
    workdir = root / f"{name}-{rate}-{seed}"
  validation.validate(config)
  return config, workdir


def finished(workdir: pathlib.Path, config: ConfigDict) -> bool:
  """Whether the run has its last evaluation.

  Raises:
    ValueError: if the directory holds a run of another configuration.
  """
  if not (workdir / "metrics.jsonl").is_file():
    return False
  differing = differences.run_differences(workdir_lib.read(workdir)["config"], json.loads(json.dumps(config.to_dict())))
  if differing:
    raise ValueError(
      f"{workdir} holds a run of another configuration: {', '.join(differing)}. Choose another --workdir."
    )
  try:
    lines = records.read_metrics(workdir / "metrics.jsonl")
  except ValueError:  # Killed before its first evaluation.
    return False
  return any(line["step"] == config.num_steps and "eval/pass@1" in line for line in lines)


def tuned(module: Any, names: list[str], root: pathlib.Path) -> dict[str, Any]:
  """Final accuracies by method and rate, and each method's best rate; means over the seeds run."""
  accuracy: dict[str, dict[str, float]] = {}
  for name in names:
    for rate in RATES.value:
      of_seeds = [comparison.read_run(make_run(module, name, int(seed), rate, root)[1]) for seed in SEEDS.value]
      accuracy.setdefault(name, {})[rate] = comparison.mean_interval([run.accuracy[-1] for run in of_seeds])["mean"]
  best = {name: max(by_rate, key=by_rate.__getitem__) for name, by_rate in accuracy.items()}
  return {"final_accuracy": accuracy, "best_rate": best, "seeds": SEEDS.value}


def write_figures(module: Any, root: pathlib.Path) -> dict[str, Any]:
  """Figures of all finished runs in `root`: comparison.json, the PNGs and the page; returns the headline ones."""
  runs: dict[str, dict[int, comparison.Run]] = {}
  first: dict[str, pathlib.Path] = {}
  for name in module.METHODS:
    for workdir in sorted(root.glob(f"{name}-*")):
      seed = workdir.name.removeprefix(f"{name}-")
      if seed.isdigit() and finished(workdir, make_run(module, name, int(seed), None, root)[0]):
        runs.setdefault(name, {})[int(seed)] = comparison.read_run(workdir)
        first.setdefault(name, workdir)
  config = module.get_config(module.METHODS["grpo"])
  num_params = decoder.num_params(Experiment(config).model)
  figures = comparison.compare(runs, num_params)
  rates = {name: module.get_config(module.METHODS[name]).optimizer.learning_rate for name in runs}
  figures |= {
    "learning_rates": rates,
    "flops": "2 x parameters x token-forwards, of sampling, credit and updates; a backward pass counts as two",
  }
  files.write_whole(root / "comparison.json", json.dumps(figures, indent=1))

  ours = [name for name in runs if name.startswith("rredcot")]
  others = [name for name in runs if name not in ours and name != "grpo"]
  panels = {"RREDCoT by bank and credit": ours, "Other sources of credit": [ours[0], *others] if ours else others}
  drawn = {
    "summary": comparison.summary_figure(figures),
    "rollout_tokens": comparison.curves_figure(figures, "rollout_tokens", panels),
    "flops": comparison.curves_figure(figures, "flops", panels),
  }
  for name, figure in drawn.items():
    figure.savefig(root / f"comparison_{name}.png", dpi=120)
  captions = {
    "summary": "Left: each method's rollout tokens to the accuracy at which GRPO ended on the same seed. Dashed: half.",
    "rollout_tokens": "Mean over seeds; band: 95% interval of the mean. Dotted: where GRPO ended.",
    "flops": f"The same against operations: {figures['flops']}.",
  }
  table = [row(name, figures) for name in runs]
  page.write_report(
    {name: path for name, path in first.items() if name in ("grpo", *ours[:1], "monte_carlo-difference")},
    root / "comparison.html", title=f"Sources of credit on {config.task.name}, {len(figures['seeds'])} seeds",
    summary=table, figures=[(captions[name], figure) for name, figure in drawn.items()],
  )  # fmt: skip
  comparison.print_table(table)
  print(f"\nreport  {root / 'comparison.html'}")
  names = (
    "rollouts_to_grpo_accuracy_over_grpo", "reached", "rollouts_to_grpo_accuracy_over_grpo_of_mean_curve",
    "flops_to_grpo_accuracy_over_grpo", "final_accuracy", "seeds",
  )  # fmt: skip
  return {name: figures[name] for name in names}


def row(name: str, figures: dict[str, Any]) -> dict[str, str]:
  """One line of the table."""
  final, ratio = figures["final_accuracy"][name], figures["rollouts_to_grpo_accuracy_over_grpo"][name]
  flops, costs = figures["flops_to_grpo_accuracy_over_grpo"][name], figures["costs_a_step"][name]
  # The interval of a few seeds may go below 0 or above 1.
  ends = None if final["low"] is None else (100 * max(final["low"], 0), 100 * min(final["high"], 1))
  interval = "" if ends is None else f" ({ends[0]:.1f} to {ends[1]:.1f})"
  number = lambda x, form: "–" if x is None else format(x, form)
  return {
    "method": name,
    "rate": f"{figures['learning_rates'][name]:.1e}",
    "final accuracy (95%)": f"{100 * final['mean']:.1f}%{interval}",
    "rollouts over GRPO's": number(ratio, ".2f"),
    "of the mean curve": number(figures["rollouts_to_grpo_accuracy_over_grpo_of_mean_curve"][name], ".2f"),
    "reached": figures["reached"][name],
    "FLOPs over GRPO's": number(flops, ".2f"),
    "step time over GRPO's": f"{figures['step_seconds_over_grpo'][name]:.2f}",
    "generated tokens a step": f"{costs.get('generated_tokens', 0):,.0f}",
    "credit token-forwards a step": f"{costs.get('token_forwards', 0):,.0f}",
    "effective samples": number(costs.get("effective_sample_size"), ".2f"),
  }


if __name__ == "__main__":
  flags.mark_flag_as_required("workdir")
  logging.set_verbosity(logging.WARNING)
  app.run(main)
