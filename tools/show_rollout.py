"""Prints rollouts of one prompt in the terminal, each segment with its credit.

    python tools/show_rollout.py --config configs/demo.py:rredcot
    python tools/show_rollout.py --config configs/demo.py:rredcot --workdir runs/demo/rredcot-0 --index 7
    python tools/show_rollout.py --config configs/demo.py:rredcot --picture docs/credit.png

Without --workdir the configuration's initial parameters are used. One group is
sampled; the correct and the wrong traces shown are the first of each.
"""

import pathlib
import sys
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from rredcot_jax.credit import assignment
from rredcot_jax.data import batching, judging, tasks
from rredcot_jax.model import decoder
from rredcot_jax.parallel import sharding
from rredcot_jax.report import page
from rredcot_jax.train import checkpoint, initial, trace_records, train_step
from rredcot_jax.train import config as config_lib

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment; its credit.mode must not be uniform.")
WORKDIR = flags.DEFINE_string("workdir", None, "Take the parameters from this run's newest checkpoint.")
INDEX = flags.DEFINE_integer("index", 0, "Which held-out prompt.", lower_bound=0)
COUNT = flags.DEFINE_integer("count", 2, "Traces shown.", lower_bound=1)
PICTURE = flags.DEFINE_string("picture", None, "Also write the last trace shown as this PNG or SVG.")


def main(_: Any) -> None:
  config = CONFIG.value
  config_lib.validate(config)
  rule = config_lib.credit_rule(config)
  if not rule.redistributes:
    raise app.UsageError("credit.mode='uniform' redistributes nothing: show a configuration such as configs/demo.py")
  if rule.learns_values:
    raise app.UsageError("credit.source='value_head': a run's critic is not restored here; its report shows its credit")
  task = tasks.make_task(**config_lib.task_options(config, "eval"))
  tokenizer = task.tokenizer
  model = config_lib.model_config(config, len(tokenizer))
  mesh, rollout_mesh = config_lib.meshes(config)

  # ---- Parameters --------------------------------------------------------------------------
  optimizer = train_step.make_optimizer(**config_lib.optimizer_options(config))
  abstract = jax.eval_shape(lambda: train_step.init_state(decoder.init(model, jax.random.key(0)), optimizer))
  placement = sharding.infer(mesh, abstract)
  if WORKDIR.value:
    step, params = checkpoint.restore_run(pathlib.Path(WORKDIR.value), model, mesh, vocab_size=len(tokenizer))
  elif config.initial_params:
    step, params = 0, initial.start_params(config.initial_params, model, mesh, jax.random.key(config.seed))
  else:
    raise app.UsageError("this configuration starts at random: give --workdir of a trained run")

  # ---- One group, credited -----------------------------------------------------------------
  example = task[INDEX.value]
  examples = [example] * config.rollout.group_size
  prompts = batching.prompt_arrays(task, examples, config.rollout.max_prompt_tokens)
  steps = train_step.compile_steps(
    model, optimizer, placement, mesh, temperature=rule.temperature, eos_id=tokenizer.eos_token_id,
    segmentation_options=config_lib.segmentation_options(config), loss_options=config_lib.loss_options(config),
    sampling_options=config_lib.sampling_options(
      config, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id
    ),
    rollout_mesh=rollout_mesh,
  )  # fmt: skip
  policy = steps.rollout_params(params)
  rollout, cache = steps.sample(policy, *sharding.put_batch(rollout_mesh, prompts), jax.random.key(config.seed))
  tables = batching.vocab_tables(tokenizer)
  segments = steps.segment(rollout, tables)
  host, host_segments = jax.device_get((rollout, segments))
  returns = judging.returns_of(task, examples, host)
  assigner = assignment.Assigner(task, model, rollout_mesh, **config_lib.assigner_options(config))
  assigned = sharding.on(rollout_mesh, assigner)(
    policy, None, cache, rollout, segments, returns, jax.random.key(config.seed),
    on_host=host, segments_on_host=host_segments, examples=examples,
  )  # fmt: skip
  credits = jax.device_get(assigned.credit)

  # ---- Show --------------------------------------------------------------------------------
  rows = []
  for i, return_ in enumerate(returns):
    one = jax.tree.map(lambda x, i=i: x[i], (host, host_segments, credits))
    rows.append(trace_records.trace_record(step, task, example, *one, return_))
  rows.sort(key=lambda trace: trace["return"], reverse=True)
  shown = rows if COUNT.value >= len(rows) else [*rows[: COUNT.value - 1], rows[-1]]
  for trace in shown:
    print(page.render_terminal(trace, color=sys.stdout.isatty()))
    print()
  if PICTURE.value:
    page.credit_figure(shown[-1]).savefig(PICTURE.value, dpi=110)


if __name__ == "__main__":
  flags.mark_flags_as_required(["config"])
  logging.set_verbosity(logging.WARNING)
  app.run(main)
