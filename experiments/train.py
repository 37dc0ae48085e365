"""Trains a policy: prompts -> rollouts -> credit -> update, from a config to a report.

    python experiments/train.py --config configs/demo.py:rredcot --workdir runs/rredcot

A work directory that holds a checkpoint of the same configuration is resumed,
and then repeats the uninterrupted run bit for bit: all randomness is a function
of the seed, the step and the row. Writes config.json, metrics.jsonl,
tensorboard/, traces.jsonl, checkpoints/ and report.html there.
"""

import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from rredcot_jax import (
  checkpoint,
  completions,
  credit,
  evaluation,
  losses,
  metrics,
  report,
  sampling,
  sharding,
  tasks,
  train_step,
  types,
)
from rredcot_jax import config as config_lib
from rredcot_jax.model import decoder
from rredcot_jax.tasks import batching

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything of this run is written.")
RESUME = flags.DEFINE_bool("resume", True, "Resume the run that the work directory holds.")


def main(_: Any) -> None:
  config, workdir = CONFIG.value, pathlib.Path(WORKDIR.value)
  config_lib.validate(config)
  claim_workdir(workdir, config, " ".join(["python", *sys.argv]), resume=RESUME.value)
  run(config, workdir)
  report.write_report({workdir.name: workdir}, workdir / "report.html", title=f"Run {workdir.name}", summary=None)
  print(f"report: {workdir / 'report.html'}")


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
  """The whole of training; see the module's docstring."""
  # ---- Task, tokenizer, model --------------------------------------------------------------
  train_task = tasks.make_task(**config_lib.task_options(config, "train"))
  held_out = tasks.make_task(**config_lib.task_options(config, "eval"))
  tokenizer = train_task.tokenizer
  model = config_lib.model_config(config, len(tokenizer))
  tables = batching.vocab_tables(tokenizer)
  rule = config_lib.credit_rule(config)
  policy_key, eval_key = jax.random.split(jax.random.key(config.seed))

  # ---- State on the mesh -------------------------------------------------------------------
  mesh = sharding.make_mesh(**config.mesh)
  optimizer = train_step.make_optimizer(**config_lib.optimizer_options(config))
  abstract = jax.eval_shape(lambda: train_step.init_state(decoder.init(model, policy_key), optimizer))
  placement = sharding.infer(mesh, abstract)
  abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placement)
  start_params = checkpoint.start_params(config.initial_params, model, mesh, policy_key)
  # The reference is a copy: the state is donated to every update.
  reference = jax.tree.map(lambda x: x.copy(), start_params) if config.loss.kl != "off" else None
  state = jax.jit(lambda p: train_step.init_state(p, optimizer), out_shardings=placement)(start_params)

  # ---- Compiled steps ----------------------------------------------------------------------
  steps = train_step.compile_steps(
    model, optimizer, placement, mesh, rule=rule, eos_id=tokenizer.eos_token_id,
    segmentation_options=config_lib.segmentation_options(config), loss_options=config_lib.loss_options(config),
  )  # fmt: skip

  # ---- Resume ------------------------------------------------------------------------------
  prompts = batching.prompt_iterator(train_task, config.rollout.prompts_per_step, config.seed)
  saver = checkpoint.Checkpointer(workdir / "checkpoints", keep=config.checkpoint.keep)
  restored = saver.restore_latest(abstract)
  first = 0
  if restored is not None:
    first, state, data = restored
    prompts.set_state(data["prompts"])
    rollout_tokens = data["rollout_tokens"]
    print(f"resumed from step {first} of {config.num_steps} in {workdir}", flush=True)
  else:
    rollout_tokens = 0
  writer = metrics.MetricsWriter(workdir, resume_step=first if restored is not None else -1)
  metrics.drop_lines_after(workdir / "traces.jsonl", first if restored is not None else -1)

  def evaluate_at(step: int) -> None:
    # The same key at every evaluation: the same noise for every policy.
    result = evaluation.evaluate(
      state.params, model, held_out, mesh, eval_key, num_prompts=config.evaluation.num_prompts,
      samples=config.evaluation.samples, rows=config.evaluation.rows, **rollout_options(config),
    )  # fmt: skip
    writer.write(step, result | {"train/rollout_tokens": rollout_tokens})

  if restored is None:
    evaluate_at(0)

  # ---- The loop ----------------------------------------------------------------------------
  recent: dict[int, types.TrainBatch] = {}  # The last two: metrics arrive a step late.
  progress = tqdm(range(first, config.num_steps), initial=first, total=config.num_steps, desc=workdir.name)
  for step in progress:
    began = time.perf_counter()

    # ---- Prompts -> rollouts -> returns ----------------------------------------------------
    examples = [train_task[int(i)] for i in next(prompts) for _ in range(config.rollout.group_size)]
    prompt_arrays = batching.prompt_arrays(train_task, examples, config.rollout.max_prompt_tokens)
    rollout, cache = sampling.sample(
      state.params, model, *sharding.put_batch(mesh, prompt_arrays), jax.random.fold_in(policy_key, step),
      max_tokens=config.rollout.max_tokens, temperature=config.rollout.temperature, top_k=config.rollout.top_k,
      top_p=config.rollout.top_p, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
    )  # fmt: skip
    segments = steps.segment(rollout, tables)
    on_host = jax.device_get(rollout)
    returns = evaluation.returns_of(train_task, examples, on_host)

    # ---- Returns -> credit -----------------------------------------------------------------
    credit_began = time.perf_counter()
    bank = None
    if rule.needs_values:
      bank = completions.make_bank(
        config.credit.bank, batching.references(train_task, examples), on_host, jax.device_get(segments), returns,
        tables.newlines, **config_lib.bank_options(config),
      )  # fmt: skip
      placed = sharding.put_batch(mesh, (bank.completions, returns, bank.uniform_rows))
      credits = steps.assign(state.params, cache, rollout, segments, *placed)
      token_advantages = credits.advantages
    else:
      credits = None
      token_advantages = steps.assign(on_host.mask, returns)
    jax.block_until_ready(token_advantages)
    credit_seconds = time.perf_counter() - credit_began

    # ---- Credit -> update ------------------------------------------------------------------
    zero_variance = np.asarray(credit.zero_variance(returns, rule))
    batch = train_batch(config, mesh, rollout, token_advantages, zero_variance)
    if reference is not None:
      batch = batch.replace(reference_log_probs=steps.reference(reference, batch))
    recent = {step: recent.get(step), step + 1: batch}
    for _ in range(config.loss.updates_per_rollout):
      state, update_metrics = steps.update(state, batch)

    # ---- Metrics, a step late --------------------------------------------------------------
    rollout_tokens += int(on_host.mask.sum())
    now = {f"train/{name}": value for name, value in update_metrics.items()}
    now |= host_metrics(on_host, segments, returns, zero_variance, bank, credits)
    now |= {"train/rollout_tokens": rollout_tokens, "train/credit_seconds": credit_seconds}
    now |= {"train/step_seconds": time.perf_counter() - began}
    show(progress, stop_on_nan(writer.write(step + 1, now), workdir, recent))

    # ---- Evaluate, then checkpoint, then advance -------------------------------------------
    done = step + 1
    last = done == config.num_steps
    if last or done % config.evaluation.every == 0:
      show(progress, stop_on_nan(writer.flush(), workdir, recent))
      evaluate_at(done)
      write_traces(workdir, done, train_task, examples, on_host, segments, credits, returns, config.num_traces)
    if last or done % config.checkpoint.every == 0:
      # Metrics first: a checkpoint vouches for every line before it.
      stop_on_nan(writer.flush(), workdir, recent)
      saver.save(done, state, {"prompts": prompts.get_state(), "rollout_tokens": rollout_tokens})
  saver.wait()
  saver.close()
  writer.close()


def claim_workdir(workdir: pathlib.Path, config: ConfigDict, command: str, *, resume: bool) -> None:
  """Writes the configuration into a new work directory, or checks that it is that run's.

  Raises:
    ValueError: if the directory holds a run of another configuration (the keys
      that differ are named), or any run when `resume` is off.
  """
  path = workdir / "config.json"
  wanted = json.loads(json.dumps(config.to_dict()))
  if path.exists():
    differing = config_lib.differences(json.loads(path.read_text(encoding="utf-8"))["config"], wanted)
    if differing:
      raise ValueError(
        f"{workdir} holds a run of another configuration: {', '.join(differing)}. Choose another --workdir."
      )
    if not resume:
      raise ValueError(f"{workdir} holds a run and --noresume was given: choose another --workdir or remove it.")
    return
  workdir.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name("config.json.tmp")
  temporary.write_text(json.dumps({"command": command, "config": wanted}, indent=1), encoding="utf-8")
  os.replace(temporary, path)


def rollout_options(config: ConfigDict) -> dict[str, Any]:
  names = ("max_prompt_tokens", "max_tokens", "temperature", "top_k", "top_p")
  return {name: config.rollout[name] for name in names}


def train_batch(
  config: ConfigDict, mesh: Any, rollout: types.Rollout, token_advantages: Any, zero_variance: np.ndarray
) -> types.TrainBatch:
  loss_mask = losses.loss_mask(
    rollout.mask, rollout.truncated, zero_variance, mask_truncated=config.loss.mask_truncated,
    filter_zero_variance=config.loss.filter_zero_variance,
  )  # fmt: skip
  batch = types.TrainBatch(
    prompt_tokens=rollout.prompt_tokens, prompt_mask=rollout.prompt_mask, tokens=rollout.tokens, mask=rollout.mask,
    loss_mask=loss_mask, old_log_probs=rollout.log_probs, reference_log_probs=rollout.log_probs,
    advantages=token_advantages,
  )  # fmt: skip
  return sharding.put_batch(mesh, batch)


def host_metrics(
  rollout: types.Rollout,
  segments: types.Segments,
  returns: np.ndarray,
  zero_variance: np.ndarray,
  bank: Any,
  credits: Any,
) -> dict[str, Any]:
  """What is counted beside the update's own metrics."""
  result = {
    "train/reward": returns.mean(),
    "train/length": rollout.mask.sum(axis=1).mean(),
    "train/truncated": rollout.truncated.mean(),
    "train/zero_variance_groups": zero_variance.mean(),
    "train/segments": segments.num_segments.mean(),
    "train/merged_cuts": segments.num_merged.sum(),
  }
  if bank is not None:
    exists = np.asarray(segments.mask)
    ess = np.asarray(credits.effective_sample_size)
    result |= {
      "credit/fallback_rows": bank.fallback.mean(),
      "credit/dropped_completions": bank.num_dropped,
      "credit/covered_states": (ess > 0)[exists].mean(),
      "credit/effective_sample_size": ess[exists].mean(),
      "credit/initial_value": np.asarray(credits.values)[:, 0].mean(),
    }
  return result


def stop_on_nan(lines: list[dict], workdir: pathlib.Path, recent: dict[int, types.TrainBatch]) -> list[dict]:
  """Passes metric lines on; stops the run at the first loss that is not finite.

  Raises:
    FloatingPointError: naming the step and the file that its batch is saved in.
  """
  for line in lines:
    if not math.isfinite(line.get("train/loss", 0.0)) or not math.isfinite(line.get("train/gradient_norm", 0.0)):
      path = workdir / f"nan_batch_{line['step']}.npz"
      batch = recent[line["step"]]
      fields = {f.name: np.asarray(getattr(batch, f.name)) for f in dataclasses.fields(batch)}
      np.savez(path, **fields)
      raise FloatingPointError(
        f"the loss of step {line['step']} is not finite; the batch is saved in {path} and the last checkpoint is "
        "untouched. Lower optimizer.learning_rate or look at the batch."
      )
  return lines


def show(progress: tqdm, lines: list[dict]) -> None:
  for line in lines:
    if "train/reward" in line:
      progress.set_postfix(reward=f"{line['train/reward']:.2f}", refresh=False)


def write_traces(
  workdir: pathlib.Path, step: int, task: tasks.Task, examples: list, rollout: types.Rollout, segments: types.Segments,
  credits: types.Credit | None, returns: np.ndarray, num_traces: int,
) -> None:  # fmt: skip
  """Appends a few traces with their credit, for the report; nothing for plain GRPO."""
  if credits is None:
    return
  rows = jax.device_get((rollout, segments, credits))
  with open(workdir / "traces.jsonl", "a", encoding="utf-8") as file:
    for row in np.linspace(0, len(examples) - 1, num_traces).astype(int):
      one = jax.tree.map(lambda x: x[row], rows)  # noqa: B023
      file.write(json.dumps(evaluation.trace_record(step, task, examples[row], *one, returns[row])) + "\n")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  logging.set_verbosity(logging.WARNING)
  app.run(main)
