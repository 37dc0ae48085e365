"""pass@k and maj@k with confidence intervals over any task, from a checkpoint of ours or of others.

    python experiments/evaluate.py --config configs/demo.py --workdir runs/demo/rredcot-0 --output results.json
    python experiments/evaluate.py --config configs/qwen3_4b_numina_math.py:eval=aime --samples 64 --output aime.json
    python experiments/evaluate.py --config configs/demo_llm.py --config.initial_params=model.gguf --output gguf.json

With --workdir the newest checkpoint of that run is evaluated, otherwise the checkpoint
that `initial_params` names. The prompts are the first `evaluation.num_prompts` held-out
ones. For greedy decoding use `--config.rollout.top_k=1`.

pass@k is the unbiased estimate from all samples, so pass@1 is the mean over all samples.
maj@k is the probability that the most frequent answer of k samples is right
(`statistics.maj_at_k`). Standard errors are over prompts. Intervals are 95% bootstrap
intervals over prompts (`statistics.bootstrap_interval`). Both include the noise of sampling.

Every judged batch is appended to `<output>.traces.jsonl`. The same command continues an
interrupted evaluation and ends with the figures of an uninterrupted one. All randomness
depends on the seed and on a batch's first trace, with the key of train.py's evaluations.
So the same samples and rows repeat a run's figures. Another `evaluation.rows` draws other
traces. One evaluation at a time writes to an output. The last line is one JSON object.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict
from tqdm import tqdm

from rredcot_jax.parallel import processes
from rredcot_jax.report import files, statistics
from rredcot_jax.train import differences, evaluation, launch, metrics, validation
from rredcot_jax.train import workdir as workdir_lib
from rredcot_jax.train.experiment import Experiment

SAMPLES = flags.DEFINE_integer("samples", 16, "Traces a prompt.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "The JSON file to write.")


def main(_: Any) -> None:
  config, workdir = launch.CONFIG.value, launch.WORKDIR.value
  validation.validate(config)
  launch.join_processes(config)
  figures = run(config, workdir and pathlib.Path(workdir), samples=SAMPLES.value, output=pathlib.Path(OUTPUT.value))
  if processes.is_main():
    print_table(figures)
    print(json.dumps(figures))


def run(config: ConfigDict, workdir: pathlib.Path | None, *, samples: int, output: pathlib.Path) -> dict[str, Any]:
  """Evaluates, resuming what `output` has begun, and writes the figures; see the module's docstring."""
  # ---- Task, model, parameters -------------------------------------------------------------
  experiment = Experiment(config)
  num_prompts, rows = config.evaluation.num_prompts, config.evaluation.rows
  if num_prompts < 2:
    raise ValueError(f"evaluation.num_prompts={num_prompts} must be at least 2: intervals are over prompts.")
  start_key, eval_key = jax.random.split(jax.random.key(config.seed))
  if workdir is not None:
    step, params = experiment.restore_params(workdir)
  elif config.initial_params:
    step, params = 0, experiment.start_params(start_key)
  else:
    raise ValueError("this configuration starts at random: give --workdir of a run, or set initial_params.")
  params = experiment.rollout_steps.params(params)

  # ---- Traces ------------------------------------------------------------------------------
  settings = {
    "params": str(workdir or config.initial_params),
    "step": step,
    "task": experiment.task_options("eval"),
    "contents": {name: digest for name, digest in experiment.fingerprints(("eval",)).items() if name != "code"},
    "num_prompts": num_prompts,
    "samples": samples,
    "rows": rows,
    "seed": config.seed,
    "rollout": {"max_prompt_tokens": config.rollout.max_prompt_tokens, **experiment.sampling_options},
  }
  traces = output.with_name(output.name + ".traces.jsonl")
  with contextlib.ExitStack() as held:
    processes.on_main(f"taking {output}", lambda: held.enter_context(workdir_lib.alone(output)))
    judged = claim_traces(traces, settings)
    batches = evaluation.judged_batches(
      params, experiment.model, experiment.held_out, experiment.codec, experiment.rollout_mesh, eval_key,
      num_prompts=num_prompts, samples=samples, rows=rows, first=len(judged), **settings["rollout"],
    )  # fmt: skip
    # All processes hold every judgement; the first one writes them.
    total = num_prompts * samples
    with tqdm(initial=len(judged), total=total, desc="traces", disable=not processes.is_main()) as progress:
      for batch in batches:
        if processes.is_main():
          metrics.append_lines(traces, map(dataclasses.asdict, batch))
        judged += batch
        progress.update(len(batch))

    # ---- Figures ---------------------------------------------------------------------------
    figures = summarise(judged, num_prompts, samples)
    if processes.is_main():
      with workdir_lib.writing(output):
        files.write_whole(output, json.dumps({"settings": settings, **figures}, indent=1) + "\n")
  return figures


def claim_traces(path: pathlib.Path, settings: dict[str, Any]) -> list[evaluation.Judged]:
  """The whole batches that an interrupted evaluation left, after which the file may be appended to.

  A line that was cut off is dropped from the file, and so is a batch that is not whole. A file
  that does not exist is begun.

  Raises:
    ValueError: if the file holds an evaluation of other settings, naming what differs, or
      something else, naming the line.
    WriteFailed: if the file cannot be written.
  """
  header = json.dumps({"settings": settings})
  judged: list[evaluation.Judged] = []
  text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
  lines = text.split("\n")[:-1]  # The text after the last newline was cut off.
  if lines:
    number = 0
    try:
      there = dict(json.loads(lines[0])["settings"])
      for number in range(1, len(lines)):
        judged.append(evaluation.Judged(**json.loads(lines[number])))
    except (ValueError, TypeError, KeyError) as error:
      raise ValueError(
        f"{path}, line {number + 1}: this is no line of an evaluation. Remove the file, or choose another --output."
      ) from error
    differing = differences.differences(there, json.loads(header)["settings"])
    if differing:
      raise ValueError(f"{path} holds another evaluation: {', '.join(differing)}. Choose another --output.")
    if len(judged) < settings["num_prompts"] * settings["samples"]:
      judged = judged[: len(judged) // settings["rows"] * settings["rows"]]
  kept = [header, *lines[1 : 1 + len(judged)]]
  # No process writes before all have read.
  processes.barrier("read the traces")
  if processes.is_main():
    with workdir_lib.writing(path):
      files.write_whole(path, "".join(line + "\n" for line in kept))
  return judged


def summarise(judged: Sequence[evaluation.Judged], num_prompts: int, samples: int) -> dict[str, Any]:
  """Every figure of a finished evaluation, as plain JSON values; traces in the order they were made."""
  correct = evaluation.is_correct(judged).reshape(num_prompts, samples)
  votes = evaluation.votes_of(judged).reshape(num_prompts, samples)
  ks = [2**i for i in range(samples.bit_length())]
  columns = {
    "pass": [statistics.pass_at_k(correct.sum(axis=1), samples, k) for k in ks],
    "maj": [statistics.maj_at_k(votes, correct, k) for k in ks],
  }
  of_k: dict[str, Any] = {str(k): {} for k in ks}
  for name, values in columns.items():
    by_prompt = np.stack(values, axis=1)
    ends = statistics.bootstrap_interval(by_prompt)
    for i, k in enumerate(ks):
      mean, error = statistics.mean_and_error(by_prompt[:, i])
      interval = [round(float(end), 6) for end in ends[:, i]]
      of_k[str(k)] |= {name: round(mean, 6), f"{name}_se": round(error, 6), f"{name}_interval": interval}
  return {
    "prompts": num_prompts,
    "samples": samples,
    "k": of_k,
    "length": round(float(np.mean([one.length for one in judged])), 2),
    "truncated": round(float(np.mean([one.truncated for one in judged])), 6),
    "answered": round(float(np.mean([one.answer is not None for one in judged])), 6),
  }


def print_table(figures: dict[str, Any]) -> None:
  """Prints the figures as a table."""
  show = lambda row, name: "{:6.1f}% [{:.1f}, {:.1f}]".format(*(100 * x for x in (row[name], *row[f"{name}_interval"])))
  print(f"\n{'k':>4}  {'pass@k [95%]':<24}{'maj@k [95%]'}")
  for k, row in figures["k"].items():
    print(f"{k:>4}  {show(row, 'pass'):<24}{show(row, 'maj')}")
  one = figures["k"]["1"]
  print(
    f"\npass@1 {100 * one['pass']:.1f}% with a standard error of {100 * one['pass_se']:.1f} over "
    f"{figures['prompts']} prompts x {figures['samples']} samples, {figures['length']:.1f} tokens on average, "
    f"{100 * figures['truncated']:.1f}% truncated, {100 * figures['answered']:.1f}% answered"
  )


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "output"])
  logging.set_verbosity(logging.WARNING)
  app.run(main)
