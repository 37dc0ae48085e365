"""Prefix-shared scoring beside re-running every prefix.

    python benchmarks/scoring.py

Target: at least 4 times faster at T = 512, K = 16 states, N = 1 completion of S = 16
tokens. The peer runs every prefix with its completion again, padded to T + S, as a
program with static shapes does. Like ours, it computes logits for the completion's places
alone. Ours includes running the trace once, which the sampler has already done inside a
training step. The weights are random: 6 layers, width 256, 7 M parameters, vocabulary
4096. A second, stronger peer runs every prefix at its exact length, with one compiled
program a length whose compilation is not counted. All are timed in turn in one process.
Figures are median ratios.

The last line is {"speedup": {T: ratio}, "max_abs_error": difference of log-probabilities,
"speedup_over_unpadded": {T: ratio}, "machine": ..}; the error is the largest against either
peer and `scoring.score_generic`.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np

from rredcot_jax.model import decoder, scoring
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.ops import types

CONFIG = ModelConfig(vocab_size=4096, width=256, num_layers=6, num_heads=8, num_kv_heads=4, head_dim=32, mlp_width=1024)
PROMPT, STATES, LENGTH = 16, 16, 16


def make_case(t: int) -> tuple[types.Rollout, types.Segments, types.Completions]:
  rng = np.random.default_rng(t)
  ids = lambda *shape: jnp.asarray(rng.integers(0, CONFIG.vocab_size, shape), jnp.int32)
  yes = lambda *shape: jnp.ones(shape, bool)
  zeros = jnp.zeros((1, t), jnp.float32)
  rollout = types.Rollout(
    prompt_tokens=ids(1, PROMPT), prompt_mask=yes(1, PROMPT), tokens=ids(1, t), mask=yes(1, t), log_probs=zeros,
    sampler_log_probs=zeros, entropy=zeros, truncated=jnp.zeros(1, bool),
  )  # fmt: skip
  ends = jnp.arange(1, STATES + 1, dtype=jnp.int32)[None] * (t // STATES)
  segments = types.Segments(
    ends=ends, segment_ids=jnp.zeros((1, t), jnp.int32), num_segments=jnp.array([STATES]), num_merged=jnp.array([0])
  )
  shape = (1, STATES, 1, LENGTH)
  completions = types.Completions(
    tokens=ids(*shape), mask=yes(*shape), scored=yes(*shape), utilities=jnp.ones(shape[:3]),
    log_q=jnp.zeros(shape[:3]), valid=yes(*shape[:3]),
  )  # fmt: skip
  return rollout, segments, completions


@jax.jit
def shared(params: Any, rollout: Any, segments: Any, completions: Any) -> jax.Array:
  tokens = jnp.concatenate([rollout.prompt_tokens, rollout.tokens], axis=1)
  mask = jnp.concatenate([rollout.prompt_mask, rollout.mask], axis=1)
  _, cache = decoder.forward(params, CONFIG, tokens, mask)
  return scoring.score_with_cache(params, CONFIG, cache, rollout, segments, completions, temperature=1.0)


@jax.jit
def forward_again(params: Any, rollout: Any, segments: Any, completions: Any) -> jax.Array:
  """Every prefix and its completion in one padded batch; logits at the completion's places alone."""
  trace = jnp.concatenate([rollout.prompt_tokens[0], rollout.tokens[0]])
  bank = completions.tokens[0, :, 0]
  cuts = PROMPT + segments.starts[0]
  column = jnp.arange(trace.shape[0] + LENGTH)[None]
  offset = jnp.clip(column - cuts[:, None], 0, LENGTH - 1)
  prefix = jnp.broadcast_to(jnp.pad(trace, (0, LENGTH))[None], (STATES, column.shape[1]))
  tokens = jnp.where(column < cuts[:, None], prefix, jnp.take_along_axis(bank, offset, axis=1))
  mask = column < cuts[:, None] + LENGTH
  hidden, _ = decoder.forward(params, CONFIG, tokens, mask)
  places = cuts[:, None] - 1 + jnp.arange(LENGTH)[None]
  hidden = jnp.take_along_axis(hidden, places[:, :, None], axis=1)
  log_probs = jax.nn.log_softmax(decoder.logits(params, hidden), axis=-1)
  return jnp.take_along_axis(log_probs, bank[:, :, None], axis=-1)[..., 0].sum(axis=1)[None, :, None]


@jax.jit
def forward_one(params: Any, tokens: jax.Array) -> jax.Array:
  """Log-probability of the last LENGTH tokens of one sequence [1, C] without padding."""
  inputs, targets = tokens[:, :-1], tokens[:, -LENGTH:]
  hidden, _ = decoder.forward(params, CONFIG, inputs, jnp.ones(inputs.shape, bool))
  log_probs = jax.nn.log_softmax(decoder.logits(params, hidden[:, -LENGTH:]), axis=-1)
  return jnp.take_along_axis(log_probs, targets[:, :, None], axis=-1).sum()


def forward_unpadded(params: Any, sequences: list[jax.Array]) -> jax.Array:
  return jnp.stack([forward_one(params, tokens) for tokens in sequences])[None, :, None]


def sequences_of(rollout: Any, segments: Any, completions: Any) -> list[jax.Array]:
  """Each prefix with its completion, at its own length."""
  trace = np.concatenate([rollout.prompt_tokens, rollout.tokens], axis=1)
  bank = np.asarray(completions.tokens)
  cuts = PROMPT + np.asarray(segments.starts)[0]
  return [jnp.asarray(np.concatenate([trace[:, :cut], bank[:, k, 0]], axis=1)) for k, cut in enumerate(cuts)]


@jax.jit
def generic(params: Any, rollout: Any, segments: Any, completions: Any) -> jax.Array:
  apply = lambda params, tokens, _, mask: decoder.logits(params, decoder.forward(params, CONFIG, tokens, mask)[0])
  return scoring.score_generic(apply, params, rollout, segments, completions, temperature=1.0)


def seconds(function: Callable[..., jax.Array], *args: Any) -> float:
  began = time.perf_counter()
  jax.block_until_ready(function(*args))
  return time.perf_counter() - began


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--repetitions", type=int, default=7)
  repetitions = parser.parse_args().repetitions
  params = decoder.init(CONFIG, jax.random.key(0))
  speedup, over_unpadded, error = {}, {}, 0.0
  for t in (256, 512, 1024):
    case = make_case(t)
    sequences = sequences_of(*case)
    ours = shared(params, *case)
    for peer in (forward_again(params, *case), forward_unpadded(params, sequences), generic(params, *case)):
      error = max(error, float(jnp.max(jnp.abs(ours - peer))))
    times = np.array(
      [
        (
          seconds(forward_again, params, *case),
          seconds(forward_unpadded, params, sequences),
          seconds(shared, params, *case),
        )
        for _ in range(repetitions)
      ]
    )
    padded, unpadded = times[:, 0] / times[:, 2], times[:, 1] / times[:, 2]
    speedup[str(t)] = round(float(np.median(padded)), 2)
    over_unpadded[str(t)] = round(float(np.median(unpadded)), 2)
    again, exact, once = 1e3 * np.median(times, axis=0)
    print(
      f"T={t:5d}  padded {again:6.0f} ms  unpadded {exact:6.0f} ms  shared {once:5.0f} ms  "
      f"speedup {speedup[str(t)]:5.2f} (from {padded.min():.2f} to {padded.max():.2f}), "
      f"over unpadded {over_unpadded[str(t)]:5.2f} (from {unpadded.min():.2f} to {unpadded.max():.2f})",
      flush=True,
    )
  machine.report({"speedup": speedup, "max_abs_error": error, "speedup_over_unpadded": over_unpadded})


if __name__ == "__main__":
  main()
