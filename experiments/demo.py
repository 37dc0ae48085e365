"""`make demo`: plain GRPO, then RREDCoT, from one warm start, with one table and one report.

    python experiments/demo.py --workdir runs/demo             (about 2 minutes on 2 cores)
    python experiments/demo.py --workdir runs/demo --seeds 5    (`make demo-seeds`)
    python experiments/demo.py --workdir runs/demo-llm --grpo configs/demo_llm.py:grpo \
        --rredcot configs/demo_llm.py:rredcot                     (the last part of `make demo-llm`)

For each seed both methods get the same prompts in the same order. The same command
continues an interrupted demo. The last line is one JSON object with every figure.
"""

import json
import pathlib
import time
from typing import Any

import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from rredcot_jax.report import comparison, page, statistics
from rredcot_jax.train import launch, loop, validation
from rredcot_jax.train import workdir as workdir_lib
from rredcot_jax.train.experiment import Experiment

GRPO = config_flags.DEFINE_config_file("grpo", "configs/demo.py:grpo", "The baseline.", lock_config=True)
RREDCOT = config_flags.DEFINE_config_file("rredcot", "configs/demo.py:rredcot", "The method.", lock_config=True)
SEEDS = flags.DEFINE_integer("seeds", 1, "Seeds run: 0 to seeds - 1.", lower_bound=1)


def main(_: Any) -> None:
  began = time.perf_counter()
  root = pathlib.Path(launch.WORKDIR.value)
  runs: dict[str, list[pathlib.Path]] = {"GRPO": [], "RREDCoT": []}
  for seed in range(SEEDS.value):
    for name, base in (("GRPO", GRPO.value), ("RREDCoT", RREDCOT.value)):
      config = ConfigDict(base.to_dict())
      config.seed = seed
      validation.validate(config)
      workdir = root / f"{name.lower()}-{seed}"
      file = config_flags.get_config_filename(flags.FLAGS[name.lower()])
      command = f"python experiments/train.py --config {file} --config.seed={seed}"
      prints = Experiment(config).fingerprints()
      with workdir_lib.claim(workdir, config, f"{command} --workdir {workdir}", fingerprints=prints) as claim:
        loop.run(config, workdir, claim=claim)
      runs[name].append(workdir)

  results = {name: [comparison.read_run(path) for path in paths] for name, paths in runs.items()}
  figures = compare(results["GRPO"], results["RREDCoT"])
  table = [row(name, results[name], figures) for name in runs]
  page.write_report(
    {name: paths[0] for name, paths in runs.items()}, root / "report.html",
    title=f"GRPO and RREDCoT on {RREDCOT.value.task.name}, seed 0", summary=table,
  )  # fmt: skip
  comparison.print_table(table)
  tokens = figures["tokens_to_grpo_accuracy_over_grpo"]
  reached = [x for x in tokens if x is not None]
  learnt = sum(after > before for before, after in zip(figures["accuracy_before"], figures["accuracy_grpo"]))
  print(
    f"\nGRPO ended better than it began in {learnt} of {len(tokens)} runs; "
    f"RREDCoT reached where it ended in {len(reached)} of those"
    + (f", with {np.mean(reached):.2f} of GRPO's rollout tokens." if reached else ".")
  )
  print(f"report       {root / 'report.html'}")
  print(f"checkpoints  {runs['RREDCoT'][0] / 'checkpoints'}")
  print(f"metrics      {runs['RREDCoT'][0] / 'metrics.jsonl'}")
  print(json.dumps(figures | {"seconds": round(time.perf_counter() - began, 1)}))


def compare(grpo: list[comparison.Run], rredcot: list[comparison.Run]) -> dict[str, Any]:
  """Every figure of the comparison, a list entry for each seed."""
  ratios = []
  for base, ours in zip(grpo, rredcot, strict=True):
    # Targets that GRPO already met at step 0 are ignored.
    learnt = base.accuracy[-1] > base.accuracy[0]
    needed = comparison.spent_to_reach(ours.tokens, ours.accuracy, base.accuracy[-1]) if learnt else None
    ratios.append(None if needed is None else round(needed / base.tokens[-1], 4))
  return {
    "accuracy_before": [round(run.accuracy[0], 4) for run in grpo],
    "accuracy_grpo": [round(run.accuracy[-1], 4) for run in grpo],
    "accuracy_rredcot": [round(run.accuracy[-1], 4) for run in rredcot],
    "standard_error_rredcot": [round(run.error[-1], 4) for run in rredcot],
    "tokens_to_grpo_accuracy_over_grpo": ratios,
    "step_seconds_over_grpo": [
      round(ours.step_seconds / base.step_seconds, 3) for base, ours in zip(grpo, rredcot, strict=True)
    ],
  }


def row(name: str, runs: list[comparison.Run], figures: dict[str, Any]) -> dict[str, str]:
  """One line of the closing table: means and standard errors, over seeds or, with one seed, over held-out prompts."""

  def mean(place: int) -> str:
    value, error = statistics.mean_and_error(np.array([run.accuracy[place] for run in runs]))
    return f"{100 * value:.1f}% ± {100 * (error if len(runs) > 1 else runs[0].error[place]):.1f}"

  overhead = "1.00 (baseline)" if name == "GRPO" else f"{np.mean(figures['step_seconds_over_grpo']):.2f}"
  return {
    "run": name,
    "accuracy before": mean(0),
    "accuracy after": mean(-1),
    "rollout tokens": f"{np.mean([run.tokens[-1] for run in runs]):,.0f}",
    "seconds a step": f"{np.mean([run.step_seconds for run in runs]):.2f}",
    "step time over GRPO": overhead,
  }


if __name__ == "__main__":
  flags.mark_flag_as_required("workdir")
  logging.set_verbosity(logging.WARNING)
  app.run(main)
