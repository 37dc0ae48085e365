"""Trains a policy: prompts -> rollouts -> credit -> update, from a config to a report.

    python experiments/train.py --config configs/demo.py:rredcot --workdir runs/rredcot

A work directory that holds a checkpoint of the same configuration is resumed,
and then repeats the uninterrupted run bit for bit: all randomness is a function
of the seed, the step and the row. Writes config.json, metrics.jsonl,
tensorboard/, traces.jsonl, checkpoints/ and page.html there.
"""

import dataclasses
import json
import math
import pathlib
import shlex
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from rredcot_jax.credit import assignment, rules
from rredcot_jax.data import batching, judging, tasks
from rredcot_jax.model import decoder
from rredcot_jax.ops import losses, types
from rredcot_jax.parallel import processes, sharding
from rredcot_jax.report import files, page
from rredcot_jax.train import checkpoint, evaluation, initial, metrics, trace_records, train_step
from rredcot_jax.train import config as config_lib

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything of this run is written.")
RESUME = flags.DEFINE_bool("resume", True, "Resume the run that the work directory holds.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Find the other processes of this run by itself, on a TPU pod.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, where they are not found.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes this run has.", lower_bound=1)
STOPPED_STATUS = flags.DEFINE_integer("stopped_status", 0, "Exit status of a run that was told to stop, and saved.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.", lower_bound=0)


def main(_: Any) -> None:
  config, workdir = CONFIG.value, pathlib.Path(WORKDIR.value)
  config_lib.validate(config)
  command = " ".join(["python", *map(shlex.quote, sys.argv)])
  join_processes(config)
  with processes.StopNotice() as notice, processes.stops_with_the_others(command):
    claim_workdir(workdir, config, command, resume=RESUME.value)
    finished = run(config, workdir, notice=notice)
  if not finished:
    say(f"told to stop ({notice.reason or 'another process was'}): saved. Resume with\n  {command}")
    sys.exit(STOPPED_STATUS.value)
  if processes.is_main():
    page.write_report({workdir.name: workdir}, workdir / "page.html", title=f"Run {workdir.name}", summary=None)
    print(f"report: {workdir / 'page.html'}")


def join_processes(config: ConfigDict) -> None:
  """Starts what connects this process with the others that the flags or the environment name."""
  processes.start(
    coordinator=COORDINATOR.value, num_processes=NUM_PROCESSES.value, process_id=PROCESS_ID.value,
    detect=DISTRIBUTED.value, heartbeat_seconds=config.distributed.heartbeat_seconds,
  )  # fmt: skip


def run(config: ConfigDict, workdir: pathlib.Path, *, notice: processes.StopNotice | None = None) -> bool:
  """The whole of training; see the module's docstring.

  Returns:
    Whether it came to its end; else `notice` was given, to any process, and all is saved.
  """
  # ---- Task, tokenizer, model --------------------------------------------------------------
  train_task = tasks.make_task(**config_lib.task_options(config, "train"))
  held_out = tasks.make_task(**config_lib.task_options(config, "eval"))
  tokenizer = train_task.tokenizer
  model = config_lib.model_config(config, len(tokenizer))
  tables = batching.vocab_tables(tokenizer)
  rule = config_lib.credit_rule(config)
  policy_key, eval_key, credit_key = jax.random.split(jax.random.key(config.seed), 3)

  # ---- State on the mesh -------------------------------------------------------------------
  mesh, rollout_mesh = config_lib.meshes(config)
  group_size = config.rollout.group_size
  rows = processes.rows_of(rollout_mesh, config.rollout.prompts_per_step * group_size, group_size=group_size)
  optimizer = train_step.make_optimizer(**config_lib.optimizer_options(config))
  critic = config_lib.init_critic(config, model.width)
  abstract = jax.eval_shape(lambda: train_step.init_state(decoder.init(model, policy_key), optimizer, critic))
  placement = sharding.infer(mesh, abstract)
  abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placement)
  start_params = initial.start_params(config.initial_params, model, mesh, policy_key)
  # The reference is a copy: the state is donated to every update.
  reference = jax.tree.map(lambda x: x.copy(), start_params) if config.loss.kl != "off" else None
  state = jax.jit(lambda p: train_step.init_state(p, optimizer, critic), out_shardings=placement)(start_params)

  # ---- Compiled steps ----------------------------------------------------------------------
  steps = train_step.compile_steps(
    model, optimizer, placement, mesh, temperature=rule.temperature, eos_id=tokenizer.eos_token_id,
    segmentation_options=config_lib.segmentation_options(config), loss_options=config_lib.loss_options(config),
    sampling_options=config_lib.sampling_options(
      config, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id
    ),
    rollout_mesh=rollout_mesh, microbatches=config.compute.microbatches, length_buckets=config.compute.length_buckets,
    skip_non_finite=config.loss.non_finite == "skip",
  )  # fmt: skip
  assigner = assignment.Assigner(train_task, model, rollout_mesh, **config_lib.assigner_options(config))
  assign = sharding.on(rollout_mesh, assigner)

  # ---- Resume ------------------------------------------------------------------------------
  prompts = batching.prompt_iterator(train_task, config.rollout.prompts_per_step, config.seed)
  saver = checkpoint.Checkpointer(
    workdir / "checkpoints", keep=config.checkpoint.keep, on_failure=config.checkpoint.on_failure
  )
  restored = saver.restore_latest(abstract)
  first, rollout_tokens = 0, 0
  if restored is not None:
    first, state, data = restored
    prompts.set_state(data["prompts"])
    rollout_tokens = data["rollout_tokens"]
    say(f"resumed from step {first} of {config.num_steps} in {workdir}")
  writer = metrics.MetricsWriter(workdir, resume_step=first if restored is not None else -1, writes=processes.is_main())
  if processes.is_main():
    metrics.drop_lines_after(workdir / "traces.jsonl", first if restored is not None else -1)

  def evaluate_at(step: int) -> bool:
    """False if the run was told to stop meanwhile."""
    try:
      # The same key at every evaluation: the same noise for every policy.
      result = evaluation.evaluate(
        steps.rollout_params(state.params), model, held_out, rollout_mesh, eval_key,
        num_prompts=config.evaluation.num_prompts, samples=config.evaluation.samples, rows=config.evaluation.rows,
        notice=notice, **rollout_options(config),
      )  # fmt: skip
    except processes.Stopped:
      return False
    writer.write(step, result | {"train/rollout_tokens": rollout_tokens})
    return True

  finite = lambda lines: check_finite(lines, workdir, recent, skipped=config.loss.non_finite == "skip")

  def save_at(step: int, dealt: dict) -> None:
    # Metrics first: a checkpoint vouches for every line before it.
    finite(writer.flush())
    saver.save(step, state, {"prompts": dealt, "rollout_tokens": rollout_tokens})

  recent: dict[int, types.TrainBatch] = {}  # The last two: metrics arrive a step late.
  stopped = needs_evaluation(config, workdir, first, restored is not None) and not evaluate_at(first)
  if stopped:
    save_at(first, prompts.get_state())

  # ---- The loop ----------------------------------------------------------------------------
  progress = tqdm(
    range(first, first if stopped else config.num_steps), initial=first, total=config.num_steps, desc=workdir.name,
    disable=not processes.is_main(),
  )  # fmt: skip
  for step in progress:
    began = time.perf_counter()
    saver.check()

    # ---- Prompts -> rollouts -> returns ----------------------------------------------------
    position, dealt = prompts.get_state(), next(prompts)
    examples = [train_task[int(dealt[row // group_size])] for row in rows.here]
    prompt_arrays = batching.prompt_arrays(train_task, examples, config.rollout.max_prompt_tokens)
    policy = steps.rollout_params(state.params)
    placed_prompts = sharding.put_batch(rollout_mesh, prompt_arrays)
    rollout, cache = steps.sample(policy, *placed_prompts, jax.random.fold_in(policy_key, step))
    segments = steps.segment(rollout, tables)
    on_host, segments_on_host = processes.to_host(rollout_mesh, (rollout, segments))
    judged = [examples[place] for place in rows.judged]
    rewards = judging.returns_of(train_task, judged, jax.tree.map(lambda x: x[rows.judged], on_host))
    told = notice is not None and notice.given
    lengths = on_host.mask[rows.judged].sum(axis=1)
    (returns, lengths), stopped = rows.gather(rows.here[rows.judged], rewards, lengths, flag=told)
    if stopped:
      # This rollout is given up: the state is still the one of the last boundary.
      save_at(step, position)
      break

    # ---- Returns -> credit -----------------------------------------------------------------
    credit_began = time.perf_counter()
    assigned = assign(
      policy, state.critic, cache, rollout, segments, returns, jax.random.fold_in(credit_key, step),
      on_host=on_host, segments_on_host=segments_on_host, examples=examples, here=rows.here,
    )  # fmt: skip
    state = dataclasses.replace(state, critic=assigned.critic)
    # The host would wait for it at the next rollout anyway; here it tells what credit costs. The devices lose the
    # milliseconds until the update is dispatched.
    jax.block_until_ready(assigned.advantages)
    credit_seconds = time.perf_counter() - credit_began

    # ---- Credit -> update ------------------------------------------------------------------
    zero_variance = np.asarray(rules.zero_variance(returns, rule))
    batch = train_batch(config, mesh, rollout, assigned.advantages, zero_variance)
    if reference is not None:
      batch = batch.replace(reference_log_probs=steps.reference(reference, batch))
    recent = {step: recent.get(step), step + 1: batch}
    del policy, cache  # The update wants their memory.
    for _ in range(config.loss.updates_per_rollout):
      state, update_metrics = steps.update(state, batch, int(lengths.max()))

    # ---- Metrics, a step late --------------------------------------------------------------
    now = {f"train/{name}": value for name, value in update_metrics.items()}
    now |= {f"credit/{name}": value for name, value in assigned.metrics.items()}
    now |= host_metrics(rollout, segments, returns, lengths, zero_variance)
    now |= {"train/token_forwards": token_forwards(config, rollout, lengths) + assigned.metrics["token_forwards"]}
    rollout_tokens += int(lengths.sum())
    now |= {"train/rollout_tokens": rollout_tokens, "train/credit_seconds": credit_seconds}
    now |= {"train/step_seconds": time.perf_counter() - began}
    show(progress, finite(writer.write(step + 1, now)))

    # ---- Evaluate, then checkpoint, then advance -------------------------------------------
    done = step + 1
    last = done == config.num_steps
    if last or done % config.evaluation.every == 0:
      show(progress, finite(writer.flush()))
      # Traces first: a run that is told to stop evaluates after it has been resumed, and has no rollout then.
      write_traces(workdir, done, train_task, dealt, rollout, segments, assigned.credit, returns, config)
      stopped = not evaluate_at(done)
    if last or stopped or done % config.checkpoint.every == 0:
      save_at(done, prompts.get_state())
    if stopped:
      break
  saver.wait()
  saver.close()
  writer.close()
  return not stopped


def claim_workdir(workdir: pathlib.Path, config: ConfigDict, command: str, *, resume: bool) -> None:
  """Writes the configuration into a new work directory, or checks that it is that run's.

  Raises:
    ValueError: if the directory holds a run of another configuration (the keys
      that differ are named), or any run when `resume` is off.
  """
  path = workdir / "config.json"
  wanted = json.loads(json.dumps(config.to_dict()))
  processes.check_same("their configuration", json.dumps(wanted, sort_keys=True))
  exists = path.exists()
  # Nobody writes before everybody has looked.
  processes.barrier("looked at the work directory")
  if exists:
    differing = config_lib.run_differences(json.loads(path.read_text(encoding="utf-8"))["config"], wanted)
    if differing:
      raise ValueError(
        f"{workdir} holds a run of another configuration: {', '.join(differing)}. Choose another --workdir."
      )
    if not resume:
      raise ValueError(f"{workdir} holds a run and --noresume was given: choose another --workdir or remove it.")
    return
  if processes.is_main():
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_whole(path, json.dumps({"command": command, "config": wanted}, indent=1))


def needs_evaluation(config: ConfigDict, workdir: pathlib.Path, step: int, resumed: bool) -> bool:
  """Whether the state at the start of this run is to be evaluated; a run told to stop may have saved before it did."""
  due = step % config.evaluation.every == 0 or step == config.num_steps
  if due and resumed and processes.is_main():
    lines = page.read_metrics(workdir / "metrics.jsonl")
    due = not any(line["step"] == step and "eval/pass@1" in line for line in lines)
  return processes.from_main(due)


def say(text: str) -> None:
  if processes.is_main():
    print(text, flush=True)


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
  lengths: np.ndarray,
  zero_variance: np.ndarray,
) -> dict[str, Any]:
  """What is counted beside the update's own metrics and the credit's, over all processes; on devices."""
  return {
    "train/reward": returns.mean(),
    "train/length": lengths.mean(),
    "train/truncated": rollout.truncated.mean(),
    "train/zero_variance_groups": zero_variance.mean(),
    "train/segments": segments.num_segments.mean(),
    "train/merged_cuts": segments.num_merged.sum(),
  }


def token_forwards(config: ConfigDict, rollout: types.Rollout, lengths: np.ndarray) -> int:
  """Tokens that a step runs forward, credit left out and padding included; a backward pass counts as two."""
  rows, prompt = rollout.prompt_tokens.shape
  # Every row is run until the longest trace has ended.
  sampled = prompt + int(lengths.max())
  passes = 3 * config.loss.updates_per_rollout + (config.loss.kl != "off")
  return rows * (sampled + passes * (prompt + rollout.tokens.shape[1]))


def check_finite(
  lines: list[dict], workdir: pathlib.Path, recent: dict[int, types.TrainBatch], *, skipped: bool
) -> list[dict]:
  """Passes metric lines on; saves the batch of a step whose loss is not finite, and stops the run unless it is skipped.

  Raises:
    FloatingPointError: naming the step and the file that its batch is saved in.
  """
  for line in lines:
    if math.isfinite(line.get("train/loss", 0.0)) and math.isfinite(line.get("train/gradient_norm", 0.0)):
      continue
    path = workdir / f"nan_batch_{line['step']}.npz"
    batch = processes.whole(recent[line["step"]])
    if processes.is_main():
      np.savez(path, **{f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)})
    message = f"the loss of step {line['step']} is not finite; the batch is saved in {path}"
    if not skipped:
      raise FloatingPointError(
        f"{message} and the last checkpoint is untouched. Lower optimizer.learning_rate or look at the batch; "
        "with loss.non_finite=skip the run goes on without such steps."
      )
    logging.warning("%s, and the step is skipped: parameters and optimizer are as before.", message)
  return lines


def show(progress: tqdm, lines: list[dict]) -> None:
  for line in lines:
    if "train/reward" in line:
      progress.set_postfix(reward=f"{line['train/reward']:.2f}", refresh=False)


def write_traces(
  workdir: pathlib.Path, step: int, task: tasks.Task, dealt: np.ndarray, rollout: types.Rollout,
  segments: types.Segments, credits: types.Credit | None, returns: np.ndarray, config: ConfigDict,
) -> None:  # fmt: skip
  """Appends a few traces with their credit, for the report; nothing for plain GRPO."""
  if credits is None:
    return
  chosen = np.linspace(0, len(returns) - 1, config.num_traces).astype(int)
  rows = processes.whole(jax.tree.map(lambda x: x[chosen], (rollout, segments, credits)))
  if not processes.is_main():
    return
  with open(workdir / "traces.jsonl", "a", encoding="utf-8") as file:
    for place, row in enumerate(chosen):
      one = jax.tree.map(lambda x: x[place], rows)  # noqa: B023
      example = task[int(dealt[row // config.rollout.group_size])]
      file.write(json.dumps(trace_records.trace_record(step, task, example, *one, returns[row])) + "\n")


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  logging.set_verbosity(logging.WARNING)
  app.run(main)
