"""Supervised warm start: trains a model on a task's corpus and writes its parameters.

    python experiments/warm_start.py --config configs/demo.py --output rredcot_jax/assets/chain_warm_start.safetensors

For `chain` the corpus is the sloppy teacher's, for other tasks the reference
solutions. Ends by printing the sampled accuracy on held-out prompts, as one
JSON object on the last line.
"""

import functools
import json

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags
from tqdm import tqdm

from rredcot_jax import checkpoint, evaluation, sharding, tasks, train_step
from rredcot_jax import config as config_lib
from rredcot_jax.model import decoder
from rredcot_jax.tasks import batching

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
OUTPUT = flags.DEFINE_string("output", None, "The safetensors file to write.")


def main(_) -> None:
  config = CONFIG.value
  start = config.warm_start
  task = tasks.make_task(config.task.name, split="train", **config.task.options)
  held_out = tasks.make_task(config.task.name, split="eval", **config.task.options)
  model = config_lib.model_config(config, len(task.tokenizer))

  # ---- State -------------------------------------------------------------------------------
  optimizer = train_step.make_optimizer(
    learning_rate=start.learning_rate, warmup_steps=start.num_steps // 20, decay_steps=start.num_steps,
    weight_decay=config.optimizer.weight_decay, max_grad_norm=config.optimizer.max_grad_norm,
  )  # fmt: skip
  state = train_step.init_state(decoder.init(model, jax.random.key(config.seed)), optimizer)
  update = jax.jit(functools.partial(train_step.supervised_update, config=model, optimizer=optimizer), donate_argnums=0)

  # ---- Supervised updates ------------------------------------------------------------------
  progress = tqdm(range(start.num_steps), desc="warm start", mininterval=1.0)
  for step in progress:
    state, metrics = update(
      state,
      batching.supervised_batch(
        task, np.random.default_rng([config.seed, step]), batch_size=start.batch_size,
        max_prompt_tokens=config.rollout.max_prompt_tokens, max_tokens=config.rollout.max_tokens,
        wrong_share=start.wrong_share, early_share=start.early_share,
      ),
    )  # fmt: skip
    if step % 50 == 0:
      progress.set_postfix(loss=f"{float(metrics['loss']):.3f}")

  # ---- Write and check ---------------------------------------------------------------------
  checkpoint.save_params(state.params, OUTPUT.value)
  rollout = config.rollout
  result = evaluation.evaluate(
    state.params, model, held_out, sharding.make_mesh(), jax.random.key(config.seed),
    num_prompts=config.evaluation.num_prompts, samples=config.evaluation.samples,
    rows=config.evaluation.rows, max_prompt_tokens=rollout.max_prompt_tokens,
    max_tokens=rollout.max_tokens, temperature=rollout.temperature, top_k=rollout.top_k, top_p=rollout.top_p,
  )  # fmt: skip
  print(json.dumps({"output": OUTPUT.value, "loss": float(metrics["loss"]), **result}))


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "output"])
  app.run(main)
