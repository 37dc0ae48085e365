"""Prints rollouts of one prompt in the terminal, each segment with its credit.

    python tools/show_rollout.py --config configs/demo.py:rredcot
    python tools/show_rollout.py --config configs/demo.py:rredcot --workdir runs/demo/rredcot-0 --index 7
    python tools/show_rollout.py --config configs/demo.py:rredcot --picture docs/credit.png

Without --workdir the configuration's initial parameters are used. One group is
sampled. The first correct and the first wrong traces are shown.
"""

import pathlib
import sys
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from rredcot_jax.credit.assigner import Assigner
from rredcot_jax.credit.source import Batch
from rredcot_jax.data import batching, judging
from rredcot_jax.parallel import sharding
from rredcot_jax.report import files, plots, terminal
from rredcot_jax.train import trace_records
from rredcot_jax.train.experiment import Experiment, make_source

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment; its credit.mode must not be uniform.")
WORKDIR = flags.DEFINE_string("workdir", None, "Take the parameters from this run's newest checkpoint.")
INDEX = flags.DEFINE_integer("index", 0, "Which held-out prompt.", lower_bound=0)
COUNT = flags.DEFINE_integer("count", 2, "Traces shown.", lower_bound=1)
PICTURE = flags.DEFINE_string("picture", None, "Also write the last trace shown as this PNG or SVG.")


def main(_: Any) -> None:
  config = CONFIG.value
  if PICTURE.value:
    files.check_target(PICTURE.value)
  experiment = Experiment(config)
  rule, task, codec, mesh = experiment.rule, experiment.held_out, experiment.codec, experiment.rollout_mesh
  if not rule.redistributes:
    raise app.UsageError("credit.mode='uniform' redistributes nothing: show a configuration such as configs/demo.py")
  setting = experiment.setting_of(task)
  source = make_source(config, setting)
  if "state" in source.needs:
    raise app.UsageError(
      f"credit.source={config.credit.source!r}: what a run has learnt is not restored here; its report shows its credit"
    )

  # ---- Parameters --------------------------------------------------------------------------
  key = jax.random.key(config.seed)
  if WORKDIR.value:
    step, params = experiment.restore_params(pathlib.Path(WORKDIR.value))
  elif config.initial_params:
    step, params = 0, experiment.start_params(key)
  else:
    raise app.UsageError("this configuration starts at random: give --workdir of a trained run")

  # ---- One group, credited -----------------------------------------------------------------
  example = task[INDEX.value]
  examples = [example] * config.rollout.group_size
  prompts = sharding.put_batch(mesh, batching.prompt_arrays(codec, examples, config.rollout.max_prompt_tokens))
  rollouts = experiment.rollout_steps
  policy = rollouts.params(params)
  rollout, cache = rollouts.sample(policy, *prompts, key)
  segments = rollouts.segment(rollout)
  host, host_segments = jax.device_get((rollout, segments))
  returns = judging.returns_of(task, codec, examples, host)
  assign = sharding.on(mesh, Assigner(setting, rule, source))
  assigned = assign(Batch(policy, cache, rollout, segments, returns, examples, key, on_host=(host, host_segments)))
  credits = jax.device_get(assigned.credit)

  # ---- Show --------------------------------------------------------------------------------
  rows = []
  for i, return_ in enumerate(returns):
    one = jax.tree.map(lambda x, i=i: x[i], (host, host_segments, credits))
    rows.append(trace_records.trace_record(step, task, codec, example, *one, return_))
  rows.sort(key=lambda trace: trace["return"], reverse=True)
  shown = rows if COUNT.value >= len(rows) else [*rows[: COUNT.value - 1], rows[-1]]
  for trace in shown:
    print(terminal.render_terminal(trace, color=sys.stdout.isatty()))
    print()
  if PICTURE.value:
    plots.credit_figure(shown[-1]).savefig(PICTURE.value, dpi=110)


if __name__ == "__main__":
  flags.mark_flags_as_required(["config"])
  logging.set_verbosity(logging.WARNING)
  app.run(main)
