"""Supervised warm start: trains a model on a task's corpus and writes its parameters.

    python experiments/warm_start.py --config configs/demo.py --output rredcot_jax/assets/chain/warm_start.safetensors
    python experiments/warm_start.py --config configs/demo_llm.py --output runs/demo-llm/start

The corpus is the text of the task's teacher, or the reference solutions of a task without
a teacher. An output named `*.safetensors` is one file in our format, written once, at the
end. Any other output is a directory in Hugging Face's format. A start from a checkpoint
saves its progress in `<output>.checkpoints`, so that the same command continues after an
interruption. One run at a time holds that directory, and another configuration or other
contents are refused there. A start at random begins anew. The last line is one JSON object
with the sampled accuracy on held-out prompts. If it started from a checkpoint, the object
also has that checkpoint's accuracy.
"""

import functools
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from tqdm import tqdm

from rredcot_jax.data import batching
from rredcot_jax.model import export
from rredcot_jax.parallel import sharding
from rredcot_jax.report import files
from rredcot_jax.train import checkpoint, evaluation, initial, launch, lease, preflight, train_step
from rredcot_jax.train import workdir as workdir_lib
from rredcot_jax.train.experiment import Experiment

OUTPUT = flags.DEFINE_string("output", None, "The safetensors file or directory to write.")

_CHECKPOINT_EVERY = 10


def main(_) -> None:
  config, output = launch.CONFIG.value, pathlib.Path(OUTPUT.value)
  figures_path = output.with_name(output.name + ".json")
  if output.exists() and figures_path.exists():
    print(figures_path.read_text(encoding="utf-8"))
    return
  files.check_target(output, directory=output.suffix != ".safetensors")
  experiment = Experiment(config)
  try:
    progress_path = workdir_lib.check_path(output.with_name(output.name + ".checkpoints"))
    fingerprints = experiment.fingerprints(["train"], start=config.warm_start.initial_params)
    claim = workdir_lib.claim(progress_path, config, launch.command(), fingerprints=fingerprints)
  except ValueError as error:
    raise ValueError(str(error).replace("--workdir", "--output")) from error
  with claim:
    figures = warm_start(experiment, output, progress_path / "checkpoints", claim)
  if output.suffix != ".safetensors":
    figures_path.write_text(json.dumps(figures), encoding="utf-8")
  shutil.rmtree(progress_path)
  print(json.dumps(figures))


def warm_start(
  experiment: Experiment, output: pathlib.Path, checkpoints: pathlib.Path, claim: lease.Claim
) -> dict[str, Any]:
  """Trains, writes the parameters to `output`, and returns the figures that are printed.

  Args:
    experiment: of the configuration.
    output: see the module's docstring.
    checkpoints: the directory of the progress.
    claim: of the directory that holds it; it is checked before each save.
  """
  config = experiment.config
  start, rollout = config.warm_start, config.rollout
  task, codec, model, mesh = experiment.train_task, experiment.codec, experiment.model, experiment.mesh
  preflight.check_references(task, codec)

  # ---- State -------------------------------------------------------------------------------
  optimizer = train_step.make_optimizer(
    learning_rate=start.learning_rate, warmup_steps=start.num_steps // 20, decay_steps=start.num_steps,
    weight_decay=config.optimizer.weight_decay, max_grad_norm=config.optimizer.max_grad_norm,
  )  # fmt: skip
  params = experiment.start_params(jax.random.key(config.seed), start.initial_params)
  state = jax.jit(lambda p: train_step.init_state(p, optimizer))(params)
  update = jax.jit(functools.partial(train_step.supervised_update, config=model, optimizer=optimizer), donate_argnums=0)
  saver = checkpoint.Checkpointer(checkpoints, fingerprints=claim.fingerprints)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)

  def accuracy(params) -> dict[str, float]:
    return evaluation.evaluate(
      params, model, experiment.held_out, codec, mesh, jax.random.key(config.seed),
      num_prompts=config.evaluation.num_prompts, samples=config.evaluation.samples, rows=config.evaluation.rows,
      max_prompt_tokens=rollout.max_prompt_tokens, **experiment.sampling_options,
    )  # fmt: skip

  # ---- Resume ------------------------------------------------------------------------------
  restored = saver.restore_latest(abstract)
  if restored is None:
    first, before = 0, accuracy(params) if start.initial_params else {}
  else:
    first, state, before = restored
    print(f"resumed from step {first} of {start.num_steps}", flush=True)
  del params

  # ---- Supervised updates ------------------------------------------------------------------
  progress = tqdm(range(first, start.num_steps), initial=first, total=start.num_steps, desc="warm start")
  for step in progress:
    batch = batching.supervised_batch(
      task, codec, np.random.default_rng([config.seed, step]), batch_size=start.batch_size,
      max_prompt_tokens=rollout.max_prompt_tokens, max_tokens=rollout.max_tokens,
    )  # fmt: skip
    state, metrics = update(state, sharding.put_batch(mesh, batch))
    if start.initial_params and (step + 1) % _CHECKPOINT_EVERY == 0:
      claim.check()
      saver.save(step + 1, state, before)
    if start.initial_params or step % 50 == 0:
      progress.set_postfix(loss=f"{float(metrics['loss']):.3f}")

  # ---- Write and check ---------------------------------------------------------------------
  if output.suffix == ".safetensors":
    initial.save_params(state.params, output)
  else:
    export.save(model, state.params, output, tokenizer=codec.tokenizer, end_ids=codec.end_ids)
  figures = {"output": str(output), **accuracy(state.params)}
  figures |= {f"before/{name}": value for name, value in before.items()}
  saver.close()
  return figures


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "output"])
  logging.set_verbosity(logging.WARNING)
  app.run(main)
