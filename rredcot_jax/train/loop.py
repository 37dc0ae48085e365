"""The training loop: prompts -> rollouts -> credit -> update, then evaluation and checkpoint.

A work directory that holds a checkpoint of the same configuration is resumed, and then repeats the
uninterrupted run bit for bit: all randomness is a function of the seed, the step and the row.
"""

import dataclasses
import math
import pathlib
import time
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from rredcot_jax.credit.source import Batch
from rredcot_jax.data import batching, judging, tasks
from rredcot_jax.data.encoding import Codec
from rredcot_jax.ops import composition, losses, types
from rredcot_jax.parallel import processes, sharding
from rredcot_jax.report import live
from rredcot_jax.train import checkpoint, evaluation, lease, metrics, preflight, trace_records, tracking
from rredcot_jax.train.experiment import Experiment


def run(
  config: ConfigDict,
  workdir: pathlib.Path,
  *,
  notice: processes.StopNotice | None = None,
  claim: lease.Claim | None = None,
) -> bool:
  """The whole of training; see the module's docstring.

  Args:
    config: as `train.config.default_config` lays it out.
    workdir: claimed by `workdir.claim`.
    notice: tells a run to stop.
    claim: the result of `workdir.claim`; it is checked before each step.

  Returns:
    True if the run came to its end. False if any process was told to stop; everything is saved then.
  """
  tracker = config.tracker if processes.is_main() else "none"
  with (
    live.View(workdir.name, shown=processes.is_main()) as view,
    tracking.opened(tracker, workdir, config.to_dict()) as tracked,
  ):
    finished = _train(config, workdir, view, tracked, notice=notice, claim=claim)
    if tracked is not None:
      tracked.close(in_haste=not finished)
  return finished


def _train(
  config: ConfigDict,
  workdir: pathlib.Path,
  view: live.View,
  tracker: tracking.Tracker | None,
  *,
  notice: processes.StopNotice | None,
  claim: lease.Claim | None,
) -> bool:
  """`run`, given what shows it and who else gets its metrics."""
  # ---- Task, tokenizer, model, layout ------------------------------------------------------
  experiment = Experiment(config)
  task, codec, group_size = experiment.train_task, experiment.codec, config.rollout.group_size
  mesh, rollout_mesh = experiment.mesh, experiment.rollout_mesh
  rows = experiment.rows
  sharding.check_split(experiment.abstract_params_state)
  policy_key, eval_key, credit_key = jax.random.split(jax.random.key(config.seed), 3)
  preflight.check_references(task, codec)
  preflight.check_references(experiment.held_out, codec)
  differing = preflight.differing_pieces(task, codec)
  if differing and processes.is_main():
    logging.warning("%s", differing)
  room = config.rollout.max_prompt_tokens
  preflight.check_held_out(experiment.held_out, codec, room, config.evaluation.num_prompts)
  usable = preflight.usable_prompts(task, codec, room, config.rollout.overlong)
  prompts = batching.prompt_iterator(task, config.rollout.prompts_per_step, config.seed, usable)

  # ---- State on the mesh: the newest checkpoint's, or the start ----------------------------
  saver = checkpoint.Checkpointer(
    workdir / "checkpoints", on_failure=config.checkpoint.on_failure,
    fingerprints=None if claim is None else claim.fingerprints,
  )  # fmt: skip
  restored = saver.restore_latest(experiment.abstract_state)
  # A restart reads the checkpoint alone, unless the KL term compares with the starting policy.
  kl_params = experiment.start_params(policy_key) if config.loss.kl != "off" else None
  first, rollout_tokens = 0, 0
  if restored is not None:
    first, state, data = restored
    prompts.set_state(data["prompts"])
    rollout_tokens = data["rollout_tokens"]
    say(f"resumed from step {first} of {config.num_steps} in {workdir}")
  else:
    # The state is a copy, because it is donated to every update.
    start_params = experiment.start_params(policy_key) if kl_params is None else kl_params
    state = jax.jit(experiment.init_state, out_shardings=experiment.placement)(start_params)
    del start_params

  # ---- Compiled steps ----------------------------------------------------------------------
  rollouts, updates, rule = experiment.rollout_steps, experiment.update_steps, experiment.rule
  assign = sharding.on(rollout_mesh, experiment.assigner)
  assign_uniform = sharding.on(rollout_mesh, experiment.assigner.uniform)

  # ---- Metrics -----------------------------------------------------------------------------
  resume_step = first if restored is not None else -1
  writer = metrics.MetricsWriter(workdir, resume_step=resume_step, writes=processes.is_main(), tracker=tracker)
  if processes.is_main():
    metrics.drop_lines_after(workdir / "traces.jsonl", resume_step)

  def evaluate_at(step: int) -> bool:
    """False if the run was told to stop meanwhile."""
    try:
      # The same key at every evaluation: the same noise for every policy.
      result = evaluation.evaluate(
        rollouts.params(state.params), experiment.model, experiment.held_out, codec, rollout_mesh, eval_key,
        num_prompts=config.evaluation.num_prompts, samples=config.evaluation.samples, rows=config.evaluation.rows,
        max_prompt_tokens=config.rollout.max_prompt_tokens, notice=notice, **experiment.sampling_options,
      )  # fmt: skip
    except processes.Stopped:
      return False
    writer.write(step, result | {"train/rollout_tokens": rollout_tokens})
    return True

  def note(lines: list[dict]) -> None:
    view.show(check_finite(lines, workdir, recent, skipped=config.loss.non_finite == "skip"))

  def save_at(step: int, dealt: dict) -> None:
    # Metrics first, because a resumed run relies on the lines before its checkpoint.
    note(writer.flush())
    saver.save(step, state, {"prompts": dealt, "rollout_tokens": rollout_tokens})

  view.begin(step=first, total=config.num_steps, tokens=rollout_tokens)
  recent: dict[int, Any] = {}  # The last two steps' batches, because metrics arrive a step late.
  stopped = needs_evaluation(config, workdir, first, restored is not None) and not evaluate_at(first)
  if stopped:
    save_at(first, prompts.get_state())

  # ---- The loop ----------------------------------------------------------------------------
  for step in range(first, first if stopped else config.num_steps):
    began = time.perf_counter()
    saver.check()
    if claim is not None:
      claim.check()

    # ---- Prompts -> rollouts -> returns ----------------------------------------------------
    position, dealt = prompts.get_state(), next(prompts)
    examples = [task[int(dealt[row // group_size])] for row in rows.here]
    prompt_arrays = batching.prompt_arrays(codec, examples, config.rollout.max_prompt_tokens)
    policy = rollouts.params(state.params)
    placed_prompts = sharding.put_batch(rollout_mesh, prompt_arrays)
    rollout, cache = rollouts.sample(policy, *placed_prompts, jax.random.fold_in(policy_key, step))
    segments = rollouts.segment(rollout)
    on_host = processes.to_host(rollout_mesh, (rollout, segments))
    judged = [examples[place] for place in rows.judged]
    judged_rollout = jax.tree.map(lambda x: x[rows.judged], on_host[0])
    rewards: Any = judging.returns_of(task, codec, judged, judged_rollout)
    told = notice is not None and notice.given
    lengths = judged_rollout.mask.sum(axis=1)
    (returns, lengths), stopped = rows.gather(rows.here[rows.judged], rewards, lengths, flag=told)
    if stopped:
      # This rollout is dropped, and the state is still that of the last step boundary.
      save_at(step, position)
      break

    # ---- Returns -> credit -----------------------------------------------------------------
    credit_began = time.perf_counter()
    if rule.redistributes:
      assigned = assign(Batch(
        policy, cache, rollout, segments, returns, examples, jax.random.fold_in(credit_key, step), state=state.learnt,
        here=rows.here, share=rows, on_host=on_host,
      ))  # fmt: skip
    else:
      assigned = assign_uniform(rollout.mask, returns)
    state = dataclasses.replace(state, learnt=assigned.state)
    # The host would wait for it at the next rollout anyway. Waiting here measures the cost of credit. The devices
    # are idle for the milliseconds until the update is dispatched.
    jax.block_until_ready(assigned.advantages)
    credit_seconds = time.perf_counter() - credit_began

    # ---- Credit -> update ------------------------------------------------------------------
    zero_variance = np.asarray(composition.zero_variance(returns, group_size=group_size))
    batch = train_batch(config, mesh, rollout, assigned.advantages, zero_variance)
    if kl_params is not None:
      batch = dataclasses.replace(batch, reference_log_probs=updates.log_probs(kl_params, batch))
    recent = {step: recent.get(step), step + 1: batch}
    del policy, cache  # The update needs their memory.
    for _ in range(config.loss.updates_per_rollout):
      state, update_metrics = updates.update(state, batch, int(lengths.max()))

    # ---- Metrics, a step late --------------------------------------------------------------
    now = {f"train/{name}": value for name, value in update_metrics.items()}
    now |= {f"credit/{name}": value for name, value in assigned.metrics.items()}
    now |= host_metrics(rollout, segments, returns, lengths, zero_variance)
    now |= {"train/token_forwards": token_forwards(config, rollout, lengths) + assigned.metrics["token_forwards"]}
    rollout_tokens += int(lengths.sum())
    now |= {"train/rollout_tokens": rollout_tokens, "train/credit_seconds": credit_seconds}
    now |= {"train/step_seconds": time.perf_counter() - began}
    note(writer.write(step + 1, now))

    # ---- Evaluate, then checkpoint, then advance -------------------------------------------
    done = step + 1
    last = done == config.num_steps
    if last or done % config.evaluation.every == 0:
      note(writer.flush())
      # Traces first, because a run that is told to stop evaluates after it has been resumed, and has no rollout then.
      write_traces(workdir, done, task, codec, dealt, rollout, segments, assigned.credit, returns, config)
      stopped = not evaluate_at(done)
    if last or stopped or done % config.checkpoint.every == 0:
      save_at(done, prompts.get_state())
    if stopped:
      break
  saver.wait()
  saver.close()
  writer.close()
  return not stopped


def needs_evaluation(config: ConfigDict, workdir: pathlib.Path, step: int, resumed: bool) -> bool:
  """Whether to evaluate the state at the start of this run. A run may have been stopped before it did."""
  due = step % config.evaluation.every == 0 or step == config.num_steps
  if due and resumed and processes.is_main():
    due = not metrics.is_evaluated(workdir / "metrics.jsonl", step)
  return processes.from_main(due)


def say(text: str) -> None:
  if processes.is_main():
    print(text, flush=True)


def train_batch(
  config: ConfigDict, mesh: Any, rollout: types.Rollout, token_advantages: Any, zero_variance: np.ndarray
) -> types.TrainBatch:
  loss_mask = losses.loss_mask(
    rollout.mask, rollout.truncated, zero_variance, mask_truncated=config.loss.mask_truncated,
    filter_zero_variance=False,
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
  """Metrics of rollouts, over all processes, on devices; those of credit and of the update are made elsewhere."""
  assert rollout.truncated is not None  # The sampler records it.
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


def check_finite(lines: list[dict], workdir: pathlib.Path, recent: dict[int, Any], *, skipped: bool) -> list[dict]:
  """Passes metric lines on; saves the batch of a step whose loss is not finite, and stops the run unless it is skipped.

  Raises:
    FloatingPointError: naming the step and the file that its batch is saved in.
  """
  for line in lines:
    if math.isfinite(line.get("train/loss", 0.0)) and math.isfinite(line.get("train/gradient_norm", 0.0)):
      continue
    path = workdir / f"nan_batch_{line['step']}.npz"
    batch = processes.whole(recent[line["step"]])
    kept = f"the batch is saved in {path}"
    if processes.is_main():
      try:
        np.savez(path, **{f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)})
      except OSError as error:  # A full disk must not hide the loss.
        kept = f"the batch could not be saved in {path} ({error.strerror or error})"
    message = f"the loss of step {line['step']} is not finite; {kept}"
    if not skipped:
      raise FloatingPointError(
        f"{message} and the last checkpoint is untouched. Lower optimizer.learning_rate or look at the batch; "
        "with loss.non_finite=skip the run goes on without such steps."
      )
    logging.warning("%s, and the step is skipped: parameters and optimizer are as before.", message)
  return lines


def write_traces(
  workdir: pathlib.Path, step: int, task: tasks.Task, codec: Codec, dealt: np.ndarray, rollout: types.Rollout,
  segments: types.Segments, credits: types.Credit | None, returns: np.ndarray, config: ConfigDict,
) -> None:  # fmt: skip
  """Appends a few traces with their credit, for the report; nothing for plain GRPO."""
  if credits is None:
    return
  chosen = np.linspace(0, len(returns) - 1, config.num_traces).astype(int)
  rows = processes.whole(jax.tree.map(lambda x: x[chosen], (rollout, segments, credits)))
  if not processes.is_main():
    return
  records = []
  for place, row in enumerate(chosen):
    traced, cut, credited = jax.tree.map(lambda x: x[place], rows)  # noqa: B023
    example = task[int(dealt[row // config.rollout.group_size])]
    records.append(trace_records.trace_record(step, task, codec, example, traced, cut, credited, returns[row]))
  metrics.append_lines(workdir / "traces.jsonl", records)
