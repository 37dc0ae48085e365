"""A training step of SmolLM2-135M beside the same model in PyTorch, in one run.

    make peers && .venv/bin/python benchmarks/training_step.py

The step is forward, backward, clipping by global norm and an AdamW update on 4 x 512
tokens in float32. The loss is the cross-entropy over all but the first 8 tokens. Both
sides start from random weights of the same size. PyTorch runs transformers' model with
SDPA attention and the fused AdamW. They take turns, and the ratio is of their medians. The
last line is one JSON object.
"""

import functools
import statistics
import time

import jax
import machine
import numpy as np
import torch
import transformers
from absl import app, flags

from rredcot_jax.model import decoder
from rredcot_jax.model.config import SIZES
from rredcot_jax.ops import types
from rredcot_jax.train import train_step

ROUNDS = flags.DEFINE_integer("rounds", 5, "Steps timed on each side.")
THREADS = flags.DEFINE_integer("threads", 0, "PyTorch's threads; 0 is one a core.")
_ROWS, _PROMPT, _TOKENS = 4, 8, 504


def main(_) -> None:
  sizes = SIZES["SmolLM2-135M"]
  tokens = np.random.default_rng(0).integers(0, sizes.vocab_size, (_ROWS, _PROMPT + _TOKENS))
  ours, peer = jax_step(sizes, tokens), torch_step(sizes, tokens)
  ours(), peer()  # Compiles and allocates.
  seconds: dict[str, list[float]] = {"ours": [], "torch": []}
  for _ in range(ROUNDS.value):
    for name, step in (("ours", ours), ("torch", peer)):
      began = time.perf_counter()
      step()
      seconds[name].append(time.perf_counter() - began)
  median = {name: statistics.median(values) for name, values in seconds.items()}
  flops = 6 * decoder.num_params(sizes) * tokens.size
  print(f"a step of {tokens.size} tokens: ours {median['ours']:.2f} s, PyTorch {median['torch']:.2f} s")
  print(
    f"matrix products alone are {flops / 1e12:.2f} TFLOP a step: ours runs {flops / median['ours'] / 1e9:.0f} GFLOP/s"
  )
  figures = {name: round(value, 3) for name, value in median.items()}
  machine.report({"speedup": round(median["torch"] / median["ours"], 3), "seconds": figures})


def jax_step(sizes, tokens):
  optimizer = train_step.make_optimizer(
    learning_rate=1e-5, warmup_steps=1, decay_steps=None, weight_decay=0.01, max_grad_norm=1.0
  )
  update = jax.jit(functools.partial(train_step.supervised_update, config=sizes, optimizer=optimizer), donate_argnums=0)
  prompt, trace = tokens[:, :_PROMPT].astype(np.int32), tokens[:, _PROMPT:].astype(np.int32)
  zeros, ones = np.zeros(trace.shape, np.float32), np.ones(trace.shape, bool)
  batch = types.TrainBatch(
    prompt_tokens=prompt, prompt_mask=np.ones(prompt.shape, bool), tokens=trace, mask=ones, loss_mask=ones,
    old_log_probs=zeros, reference_log_probs=zeros, advantages=zeros,
  )  # fmt: skip
  state = train_step.init_state(decoder.init(sizes, jax.random.key(0)), optimizer)

  def step() -> None:
    nonlocal state
    state, metrics = update(state, batch)
    jax.block_until_ready((state, metrics))

  return step


def torch_step(sizes, tokens):
  torch.set_num_threads(THREADS.value or torch.get_num_threads())
  config = transformers.LlamaConfig(
    vocab_size=sizes.vocab_size, hidden_size=sizes.width, num_hidden_layers=sizes.num_layers,
    num_attention_heads=sizes.num_heads, num_key_value_heads=sizes.num_kv_heads, head_dim=sizes.head_dim,
    intermediate_size=sizes.mlp_width, rms_norm_eps=sizes.norm_epsilon, tie_word_embeddings=True, use_cache=False,
    rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
  )  # fmt: skip
  model = transformers.LlamaForCausalLM(config).train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
  ids = torch.tensor(tokens)

  def step() -> None:
    hidden = model.model(ids).last_hidden_state[:, _PROMPT - 1 : -1]
    logits = model.lm_head(hidden)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, _PROMPT:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()

  return step


if __name__ == "__main__":
  app.run(main)
