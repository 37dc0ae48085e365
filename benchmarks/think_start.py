"""How the warm start of `think` writes: what its training was meant to teach, measured on sampled held-out traces.

    python benchmarks/think_start.py
    python benchmarks/think_start.py --config configs/think.py:grpo --config.initial_params=PATH --prompts 1024

The last line is one JSON object: accuracy, the shares of `data.think.habits`, and their standard errors where they
are shares of traces. `teacher` holds the same figures of the teacher's own traces.
"""

import jax
import machine
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from rredcot_jax.data import batching, judging, think
from rredcot_jax.model import sampling
from rredcot_jax.train.experiment import Experiment

CONFIG = config_flags.DEFINE_config_file("config", "configs/think.py:grpo", "The policy and the task.")
PROMPTS = flags.DEFINE_integer("prompts", 1024, "Held-out questions, one trace each.", lower_bound=1)
ROWS = flags.DEFINE_integer("rows", 256, "Traces sampled at once.", lower_bound=1)


def main(_) -> None:
  experiment = Experiment(CONFIG.value)
  task, codec, setting = experiment.held_out, experiment.codec, experiment.setting_of(experiment.held_out)
  key = jax.random.key(CONFIG.value.seed)
  params = experiment.start_params(key)
  examples, texts, returns = [task[i] for i in range(PROMPTS.value)], [], []
  for first in range(0, len(examples), ROWS.value):
    some = examples[first : first + ROWS.value]
    prompts = batching.prompt_arrays(codec, some, CONFIG.value.rollout.max_prompt_tokens)
    batch_key = jax.random.fold_in(key, first)
    rollout = jax.device_get(sampling.sample(params, setting.model, *prompts, batch_key, **setting.generation)[0])
    texts += codec.responses(rollout)
    returns += judging.returns_of(task, codec, some, rollout).tolist()
  rng = np.random.default_rng(CONFIG.value.seed)
  taught = [codec.response(codec.trace_ids(task.teacher_trace(example, rng))) for example in examples]
  for example, text in list(zip(examples, texts))[:3]:
    print(f"{example.question}\n{text}\n")
  accuracy = float(np.mean(returns))
  error = (accuracy * (1 - accuracy) / len(returns)) ** 0.5
  figures = {"accuracy": accuracy, "accuracy_error": error, **think.habits(examples, texts)}
  machine.report(figures | {"teacher": think.habits(examples, taught), "prompts": len(returns)})


if __name__ == "__main__":
  logging.set_verbosity(logging.WARNING)
  app.run(main)
