"""The credit study: what each way of crediting the segments of a trace is worth, and what it costs.

    python experiments/credit_study.py --config configs/chain_study.py --workdir runs/chain-study

It samples traces, values their states by many rollouts (the ground truth), credits the traces with
every method, and compares. It writes study.html, study.json and figures there. The last line is
the headline as one JSON object. The same command continues an interrupted study: ground truth is
kept round by round, and gradients when all are done. The protocol is section 9 of docs/method.md.
"""

import dataclasses
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict
from tqdm import tqdm

from rredcot_jax.cost import flops
from rredcot_jax.data import batching, judging
from rredcot_jax.data.encoding import Codec
from rredcot_jax.model import sampling
from rredcot_jax.ops import segmentation
from rredcot_jax.ops.names import check_option
from rredcot_jax.report import files
from rredcot_jax.study import estimators, gradients, ground_truth, tables
from rredcot_jax.study import page as study_page
from rredcot_jax.train import launch, validation
from rredcot_jax.train import workdir as workdir_lib
from rredcot_jax.train.experiment import Experiment

# Independent streams of one seed, because the truth must not share samples with the estimates that it judges.
_TRACES, _TRUTH, _ESTIMATES, _GRADIENTS = range(4)


def main(_: Any) -> None:
  config, workdir, command = launch.CONFIG.value, pathlib.Path(launch.WORKDIR.value), launch.command()
  validate(config)
  prints = Experiment(config).fingerprints(("eval",))
  with workdir_lib.claim(workdir, config, command, fingerprints=prints):
    print(json.dumps(run(config, workdir, command)))


def run(config: ConfigDict, workdir: pathlib.Path, command: str) -> dict[str, Any]:
  """The whole study; returns its headline."""
  began = time.perf_counter()
  options = config.study
  # ---- Policy and task ---------------------------------------------------------------------
  experiment = Experiment(config)
  task, codec = experiment.held_out, experiment.codec
  keys = [jax.random.fold_in(jax.random.key(config.seed), stream) for stream in range(4)]
  engine = make_engine(experiment, experiment.start_params(keys[_TRACES]))

  # ---- Traces ------------------------------------------------------------------------------
  size = config.rollout.group_size
  prompts = np.repeat(np.arange(options.num_prompts), size)
  traces = sample_traces(config, engine, [task[int(i)] for i in prompts], keys[_TRACES])
  traces = cut(config, engine, traces, config.segmentation.method)
  valued = np.flatnonzero(np.arange(len(prompts)) % size < options.truth_traces)
  few = options.segmentation_prompts * size
  recut = {name: cut(config, engine, traces.rows(np.arange(few)), name) for name in options.segmentations}
  print(
    f"{len(prompts)} traces of {options.num_prompts} prompts, {traces.returns.mean():.1%} right, "
    f"{traces.num_segments.mean():.1f} segments each", flush=True,
  )  # fmt: skip

  # ---- Ground truth ------------------------------------------------------------------------
  states = ground_truth.States()
  state_of = states.of_segments(traces, prompts, valued)
  few_valued = np.flatnonzero((np.arange(few) % size) < options.segmentation_traces)
  states_of = {name: states.of_segments(other, prompts, few_valued) for name, other in recut.items()}
  print(f"{len(states.rows)} distinct states, {options.truth_samples} rollouts each", flush=True)
  truth = ground_truth.measure(
    engine, traces, states, keys[_TRUTH], workdir / "truth", samples=options.truth_samples,
    samples_per_round=options.samples_per_round, rows_at_once=options.rows_at_once, slots=options.slots,
  )  # fmt: skip
  evidence = tables.evidence_of(traces, state_of, prompts, ground_truth.answer_stated(task, codec, traces))

  # ---- Every method's credit ---------------------------------------------------------------
  credit_of = functools.partial(
    tables.credit_in_chunks, engine, key=keys[_ESTIMATES], rows_at_once=options.rows_at_once
  )
  estimates = {name: credit_of(name, traces) for name in tqdm(options.methods, desc="methods")}

  # ---- a. Value quality --------------------------------------------------------------------
  resamples = options.resamples
  quality = tables.value_quality(evidence, truth, estimates, resamples=resamples)

  # ---- b. Ranking of continuations of one state --------------------------------------------
  ranking = tables.ranking(evidence, truth, estimates, resamples=resamples)

  # ---- c. Error localisation ---------------------------------------------------------------
  wrong = ground_truth.first_wrong_segments(task, codec, traces)
  known = bool((wrong >= 0).any())
  rewards = {name: estimate.rewards for name, estimate in estimates.items()}
  drops = tables.largest_drops(evidence, truth)
  localise = functools.partial(tables.localisation, resamples=resamples)
  localisation = {
    "first wrong step": localise(wrong, traces.num_segments, prompts, rewards),
    "largest drop of the truth": localise(drops, traces.num_segments, prompts, rewards),
    "first wrong step, by the truth itself": localise(
      np.where(evidence.mask.any(axis=1), wrong, -1), traces.num_segments, prompts,
      {"ground_truth": evidence.differences(truth.values)},
    ),
  }  # fmt: skip

  # ---- e. Segmentation ---------------------------------------------------------------------
  main_few = traces.rows(np.arange(few))
  cuts = {
    config.segmentation.method: (main_few, np.where(np.isin(np.arange(few), few_valued)[:, None], state_of[:few], -1))
  }
  cuts |= {name: (recut[name], states_of[name]) for name in recut}
  segmentations = {
    name: of_segmentation(config, task, codec, other, places, prompts[:few], truth, credit_of)
    for name, (other, places) in tqdm(cuts.items(), desc="segmentations")
  }

  # ---- f. Cost ---------------------------------------------------------------------------
  costs = {name: tables.cost(estimate, len(prompts)) for name, estimate in estimates.items()}

  # ---- Everything so far -------------------------------------------------------------------
  located = localisation["first wrong step" if known else "largest drop of the truth"]
  result = {
    "spearman_difference": point(quality["differences"]["all"]["methods"], "spearman"),
    "error_localisation": point(located["methods"]),
    "gradient_variance_over_grpo": {},
    "spearman_difference_interval": interval(quality["differences"]["all"]["methods"], "spearman"),
    "error_localisation_interval": interval(located["methods"]),
    "gradient_variance_over_grpo_interval": {},
    "error_localisation_is": "first wrong step" if known else "largest drop of the truth",
    "command": command,
    "traces": len(prompts),
    "prompts": options.num_prompts,
    "accuracy": float(traces.returns.mean()),
    "states": len(states.rows),
    "truth": {
      "samples": options.truth_samples,
      "generated_tokens": truth.generated_tokens,
      "seconds": truth.seconds,
      "standard_error": float(truth.standard_errors.mean()),
    },
    "value_quality": quality,
    "calibration": {
      name: tables.calibration_curve(evidence, evidence.spread(truth.values), e.values)
      for name, e in estimates.items()
      if e.values is not None
    },
    "ranking": ranking,
    "localisation": localisation,
    "gradient_variance": None,
    "segmentation": segmentations,
    "cost": costs,
    "records": trace_records(codec, traces, evidence, truth, estimates, wrong if known else drops),
  }
  title = f"Credit study: {task.name}"
  write = functools.partial(study_page.write, workdir, title=title, config=config.to_json_best_effort())
  write(result)

  # ---- d. Gradient variance ----------------------------------------------------------------
  if options.gradient_prompts:
    moments = gradient_moments(config, engine, task, keys[_GRADIENTS], workdir / "gradients.npz")
    variance = tables.gradient_variance(
      moments,
      step_flops=step_flops(engine, traces, costs, moments.names),
      resamples=resamples,
    )
    result |= {
      "gradient_variance": variance,
      "gradient_variance_over_grpo": point(variance["fixed prompts"], "useful_ratio"),
      "gradient_variance_over_grpo_interval": interval(variance["fixed prompts"], "useful_ratio"),
    }
    write(result)
  return {
    **{name: result[name] for name in ("spearman_difference", "error_localisation", "gradient_variance_over_grpo")},
    "noise_ceiling": quality["differences"]["all"]["ceiling"],
    "error_localisation_is": result["error_localisation_is"],
    "workdir": str(workdir),
    "seconds": round(time.perf_counter() - began, 1),
  }


def validate(config: ConfigDict) -> None:
  """Checks the study's own options; see `config.validate` for the rest."""
  validation.validate(config)
  options, size = config.study, config.rollout.group_size
  for name in ("methods", "segmentation_estimators"):
    for method in options[name]:
      check_option(f"study.{name}", method, estimators.METHODS)
  for method in options.segmentations:
    check_option("study.segmentations", method, segmentation.METHODS)
  total = options.num_prompts * size
  if options.rows_at_once % size or total % min(options.rows_at_once, total):
    raise ValueError(
      f"study.rows_at_once={options.rows_at_once} must be a multiple of rollout.group_size={size} and divide "
      f"study.num_prompts * rollout.group_size={total}."
    )
  if config.rollout_mesh.data:
    raise ValueError(
      f"rollout_mesh.data={config.rollout_mesh.data}: a study samples, scores and takes gradients in one layout, "
      "config.mesh; leave rollout_mesh.data at 0."
    )
  if options.segmentation_prompts > options.num_prompts:
    raise ValueError(f"study.segmentation_prompts={options.segmentation_prompts} exceeds {options.num_prompts}.")
  if options.gradient_prompts and options.gradient_groups % options.groups_at_once:
    raise ValueError(
      f"study.gradient_groups={options.gradient_groups} must be a multiple of groups_at_once={options.groups_at_once}."
    )


def make_engine(experiment: Experiment, params: Any) -> estimators.Estimators:
  """The methods, bound to the policy and to what is held out."""
  config, task, codec = experiment.config, experiment.held_out, experiment.codec
  options = config.study
  references = [codec.reference(task[i]) for i in range(max(options.num_prompts, options.gradient_prompts))]
  # The study runs in one process and uses one layout.
  setting = dataclasses.replace(experiment.setting_of(task), mesh=None)
  return estimators.Estimators(
    params, setting, estimators.completion_rooms(references, config.rollout.max_tokens),
    {
      "monte_carlo": {"samples": options.monte_carlo_samples},
      "integrated_gradients": {"steps": options.integration_steps},
    },
  )  # fmt: skip


def sample_traces(config: ConfigDict, engine: estimators.Estimators, examples: list, key: jax.Array):
  """Traces of `examples`, not cut yet."""
  setting = engine.setting
  prompts = batching.prompt_arrays(setting.codec, examples, config.rollout.max_prompt_tokens)
  rollout, cache = sampling.sample(engine.params, setting.model, *prompts, key, **setting.generation)
  returns = judging.returns_of(setting.task, setting.codec, examples, jax.device_get(rollout))
  return estimators.Traces(rollout, cache, None, returns, examples)


@functools.cache
def cutter(codec: Codec, method: str, options: tuple):
  """Cuts a batch of traces by `method`, jitted."""
  one = functools.partial(
    segmentation.segment, tables=codec.tables, method=method, eos_ids=codec.end_ids, exit_table=codec.exit_table,
    **dict(options),
  )  # fmt: skip
  return jax.jit(jax.vmap(lambda r: one(r.tokens, r.mask, log_probs=r.log_probs, entropy=r.entropy)))


def cut(config: ConfigDict, engine: estimators.Estimators, traces, method: str) -> estimators.Traces:
  """The traces with segments by `method`."""
  options = tuple((k, v) for k, v in config.segmentation.to_dict().items() if k != "method")
  segments = cutter(engine.setting.codec, method, options)(traces.rollout)
  return estimators.Traces(traces.rollout, traces.cache, segments, traces.returns, traces.examples)


def gradient_moments(config, engine, task, key, path: pathlib.Path) -> tables.Moments:
  """Inner products of gradients over resampled rollouts of fixed prompts; read from `path` if it is there."""
  options, size = config.study, config.rollout.group_size
  names = list(options.gradient_estimators)
  if path.exists():
    with np.load(path) as file:
      return tables.Moments(names, file["same_group"], file["of_sums"], file["of_all"], int(file["groups"]))
  methods = {spec.partition(":")[0] for spec in names} - {"grpo"}
  add_groups = jax.jit(
    lambda params, rollout, weights, total: gradients.add_groups(
      params, engine.setting.model, rollout, weights, total, temperature=config.rollout.temperature, part="all"
    ),
    donate_argnums=3,
  )
  same_group, of_sums, of_all = [], [], 0.0
  for prompt in tqdm(range(options.gradient_prompts), desc="gradients"):
    batches = []
    for first in range(0, options.gradient_groups, options.groups_at_once):
      batch_key = jax.random.fold_in(jax.random.fold_in(key, prompt), first)
      traces = sample_traces(config, engine, [task[prompt]] * (options.groups_at_once * size), batch_key)
      traces = cut(config, engine, traces, config.segmentation.method)
      credit_key = jax.random.fold_in(batch_key, 1)
      batches.append((traces, {name: engine.credit(name, traces, credit_key) for name in sorted(methods)}))
    products, total = tables.prompt_moments(engine, names, batches, part="all", add_groups=add_groups)
    same_group.append(products)
    of_sums.append(np.asarray(total @ total.T, np.float64))
    of_all = of_all + total
  moments = tables.Moments(
    names, np.stack(same_group), np.stack(of_sums), np.asarray(of_all @ of_all.T, np.float64), options.gradient_groups
  )
  with files.replacing(path) as temporary, open(temporary, "wb") as file:  # A killed study leaves no half of it.
    np.savez(file, same_group=moments.same_group, of_sums=moments.of_sums, of_all=moments.of_all, groups=moments.groups)
  return moments


def step_flops(engine, traces, costs, names) -> dict[str, float]:
  """Operations a trace of a training step with each estimator: sampling, credit, and the gradient of all parameters."""
  generated = float(np.asarray(traces.rollout.mask).sum(axis=1).mean())
  one = jax.tree.map(lambda x: x[:1], traces.rollout)

  def loss(params):
    return jnp.sum(gradients.scoring.trace_log_probs(params, engine.setting.model, one, temperature=1.0)[0])

  base = generated * engine.decode_flops(traces) + flops.count(jax.grad(loss), engine.params)
  return {name: base + costs.get(name.partition(":")[0], {"flops": 0.0})["flops"] for name in names}


def of_segmentation(config, task, codec, traces, state_of, prompts, truth, credit_of) -> dict[str, Any]:
  """Value quality, size and cost of one way to cut."""
  evidence = tables.evidence_of(traces, state_of, prompts, np.zeros(state_of.shape, bool))
  estimates = {name: credit_of(name, traces) for name in config.study.segmentation_estimators}
  segments = jax.device_get(traces.segments)
  lengths = np.asarray(segments.lengths)[np.asarray(segments.mask)]
  resamples = config.study.resamples
  quality = tables.value_quality(evidence, truth, estimates, resamples=resamples)
  rewards = {name: estimate.rewards for name, estimate in estimates.items()}
  return {
    "segments": float(segments.num_segments.mean()),
    "tokens_a_segment": float(lengths.mean()),
    "merged_cuts": float(segments.num_merged.mean()),
    "values": quality["values"]["all"],
    "differences": quality["differences"]["all"],
    "localisation": tables.localisation(
      ground_truth.first_wrong_segments(task, codec, traces),
      traces.num_segments,
      prompts,
      rewards,
      resamples=resamples,
    ),
    "cost": {name: tables.cost(estimate, len(prompts)) for name, estimate in estimates.items()},
  }


def trace_records(codec, traces, evidence, truth, estimates, blamed, count: int = 4) -> list[dict[str, Any]]:
  """A few traces with every method's credit beside the truth's, failed ones first."""
  rewards, values = evidence.differences(truth.values), evidence.spread(truth.values)
  rows = [row for row in np.flatnonzero(evidence.mask.any(axis=1)) if blamed[row] >= 0]
  rows += [row for row in np.flatnonzero(evidence.mask.any(axis=1)) if row not in rows]
  records = []
  for row in sorted(rows[: 4 * count : 4] or rows[:1]):
    tokens, ids = np.asarray(traces.rollout.tokens[row]), np.asarray(traces.segments.segment_ids[row])
    n = int(traces.num_segments[row])
    records.append({
      "prompt": traces.examples[row].question,
      "answer": traces.examples[row].answer,
      "return": float(traces.returns[row]),
      "segments": [codec.decode(tokens[ids == k].tolist()) for k in range(n)],
      "wrong": int(blamed[row]),
      "true_values": values[row, :n].tolist(),
      "rewards": {"ground_truth": rewards[row, :n].tolist()}
      | {name: estimate.rewards[row, :n].tolist() for name, estimate in estimates.items()},
    })  # fmt: skip
  return records


def point(methods: dict[str, Any], measure: str | None = None) -> dict[str, float | None]:
  return {name: (row[measure] if measure else row)[0] for name, row in methods.items()}


def interval(methods: dict[str, Any], measure: str | None = None) -> dict[str, list]:
  return {name: (row[measure] if measure else row)[1:] for name, row in methods.items()}


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  logging.set_verbosity(logging.WARNING)
  app.run(main)
