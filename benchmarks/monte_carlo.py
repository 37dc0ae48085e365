"""Values by generation beside values by scoring: token-forwards and wall time, in one run.

    python benchmarks/monte_carlo.py
    python benchmarks/monte_carlo.py --width 64 --layers 2 --vocabulary 512 --tokens 128   # A look, in seconds.

Both value the K = 16 states of one trace of T = 512 tokens whose keys and values are in the
cache. Monte Carlo takes k = 9 continuations a state (VinePPO's number), and scoring takes one
completion of S = 16 tokens a state. The weights are random, of SmolLM2-135M's size, in
float32. The end of sequence is never sampled, so a continuation fills the room that its
state leaves. This is the most that k = 9 can cost. A policy that ends its traces earlier
pays less. Neither the verifier nor the trace is run.

Generation may be timed in part, for `--timed_samples` of the k continuations a state. Every
step of the loop costs the same, because its shapes are static. The whole is then the time of
a step times the number of steps that k continuations take on the same slots, which is
counted. The result is labelled "extrapolated". By default 3 of 9 are timed, which is 512 steps of 48
slots and 6.6 TFLOP in matrix products. We assume 20 to 40 GFLOP/s for decoding on two CPU
cores. Then this takes 3 to 6 minutes, and all 9 (896 steps) take 5 to 10. The slots hold 1.1 GB
of keys and values. Compiling is not timed. Scoring is timed `--repetitions` times before and
after, and the median is taken.

A table has the same ratio of token-forwards up to T = 4096, by counting alone:

    scoring       sum over states of N S
    Monte Carlo   sum over states of k (T - start)

The last line is {"token_forwards_ratio": .., "wall_ratio": .., "wall_ratio_is": "measured" or
"extrapolated", ..., "machine": ..}, Monte Carlo over scoring.
"""

import argparse
import dataclasses
import heapq
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np

from rredcot_jax.model import continuations, decoder, scoring
from rredcot_jax.model.config import SIZES, ModelConfig
from rredcot_jax.ops import types

_PROMPT, _LENGTHS = 64, (256, 512, 1024, 2048, 4096)


def model_of(args: argparse.Namespace) -> ModelConfig:
  """SmolLM2-135M's sizes, or smaller ones of the same kind."""
  config = SIZES["SmolLM2-135M"]
  if args.width:
    heads = max(args.width // config.head_dim, 1)
    config = dataclasses.replace(config, width=args.width, num_heads=heads, num_kv_heads=1, mlp_width=3 * args.width)
  changes = {"num_layers": args.layers, "vocab_size": args.vocabulary}
  return dataclasses.replace(config, **{name: value for name, value in changes.items() if value})


def trace_of(config: ModelConfig, t: int, states: int) -> tuple[types.Rollout, types.Segments]:
  """One trace of `t` tokens in `states` equal segments."""
  rng = np.random.default_rng(0)
  ids = lambda *shape: jnp.asarray(rng.integers(0, config.vocab_size, shape), jnp.int32)
  zeros = jnp.zeros((1, t), jnp.float32)
  rollout = types.Rollout(
    prompt_tokens=ids(1, _PROMPT), prompt_mask=jnp.ones((1, _PROMPT), bool), tokens=ids(1, t),
    mask=jnp.ones((1, t), bool), log_probs=zeros, sampler_log_probs=zeros, entropy=zeros, truncated=jnp.ones(1, bool),
  )  # fmt: skip
  ends = jnp.arange(1, states + 1, dtype=jnp.int32)[None] * t // states
  ids_of_segments = jnp.asarray(np.searchsorted(np.asarray(ends)[0], np.arange(t), side="right"), jnp.int32)[None]
  segments = types.Segments(
    ends=ends, segment_ids=ids_of_segments, num_segments=jnp.array([states]), num_merged=jnp.array([0])
  )
  return rollout, segments


def bank_of(config: ModelConfig, states: int, completion: int) -> types.Completions:
  """One completion a state."""
  shape = (1, states, 1, completion)
  tokens = jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, shape), jnp.int32)
  yes, one = jnp.ones(shape, bool), jnp.ones(shape[:3], jnp.float32)
  return types.Completions(tokens=tokens, mask=yes, scored=yes, utilities=one, log_q=0 * one, valid=one > 0)


def counted(t: int, states: int, k: int, completion: int) -> tuple[int, int]:
  """Token-forwards of Monte Carlo and of scoring, by counting."""
  starts = [state * t // states for state in range(states)]
  return k * sum(t - start for start in starts), states * completion


def steps_of(t: int, states: int, k: int, slots: int) -> int:
  """Steps that generation's loop takes if nothing ends early: each slot takes the next continuation when it is free."""
  free = [0] * min(slots, states * k)
  for state in range(states):
    for _ in range(k):
      heapq.heapreplace(free, free[0] + t - state * t // states)
  return max(free)


def seconds(function: Callable[[], Any]) -> float:
  began = time.perf_counter()
  jax.block_until_ready(function())
  return time.perf_counter() - began


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tokens", type=int, default=512, help="T, the trace's length and its room")
  parser.add_argument("--states", type=int, default=16, help="K")
  parser.add_argument("--samples", type=int, default=9, help="k, continuations a state")
  parser.add_argument("--completion", type=int, default=16, help="S, tokens of a scored completion")
  parser.add_argument("--timed_samples", type=int, default=3, help="of the k, how many are timed; 0 is all")
  parser.add_argument("--slots", type=int, default=48, help="continuations run at once")
  parser.add_argument("--repetitions", type=int, default=3, help="of scoring, before and after the generation")
  parser.add_argument("--width", type=int, default=0, help="a smaller model's width; 0 is SmolLM2-135M's")
  parser.add_argument("--layers", type=int, default=0, help="its layers")
  parser.add_argument("--vocabulary", type=int, default=0, help="its vocabulary")
  args = parser.parse_args()
  config = model_of(args)
  timed = min(args.timed_samples or args.samples, args.samples)
  params = decoder.init(config, jax.random.key(0))
  rollout, segments = trace_of(config, args.tokens, args.states)
  bank = bank_of(config, args.states, args.completion)
  columns = [jnp.concatenate(pair, axis=1) for pair in (
    (rollout.prompt_tokens, rollout.tokens), (rollout.prompt_mask, rollout.mask))]  # fmt: skip
  _, cache = jax.jit(lambda params: decoder.forward(params, config, *columns))(params)

  def generate(segments: types.Segments) -> tuple[continuations.Continuations, jax.Array]:
    return continuations.generate_from_states(
      params, config, cache, rollout, segments, jax.random.key(1), k=timed, max_tokens=args.tokens, eos_id=-1,
      pad_id=0, chunk_size=args.slots,
    )  # fmt: skip

  scores = jax.jit(
    lambda params, cache: scoring.score_with_cache(params, config, cache, rollout, segments, bank, temperature=1.0)
  )
  score = lambda: scores(params, cache)
  # Compiles both. Without states the loop of generation ends before it begins.
  jax.block_until_ready((score(), generate(dataclasses.replace(segments, num_segments=jnp.array([0])))))

  times = [seconds(score) for _ in range(args.repetitions)]
  began = time.perf_counter()
  drawn, steps = jax.device_get(generate(segments))
  generation = time.perf_counter() - began
  times += [seconds(score) for _ in range(args.repetitions)]
  scoring_seconds = statistics.median(times)

  by_generation, by_scoring = counted(args.tokens, args.states, args.samples, args.completion)
  generated, steps = int(drawn.lengths.sum()), int(steps)
  expected = steps_of(args.tokens, args.states, timed, args.slots)
  if generated * args.samples != by_generation * timed or steps != expected:
    raise AssertionError(f"{timed} samples took {generated} tokens in {steps} steps; by counting {expected} steps.")
  slots = min(args.slots, timed * args.states)
  if slots != min(args.slots, args.samples * args.states):
    raise SystemExit(f"--timed_samples {timed} fill {slots} of --slots {args.slots}: time more samples or use fewer.")
  all_steps = steps_of(args.tokens, args.states, args.samples, args.slots)
  whole = generation * all_steps / steps
  kind = "measured" if timed == args.samples else "extrapolated"
  print(f"{decoder.num_params(config) / 1e6:.1f} M parameters, T={args.tokens}, K={args.states}, k={args.samples}")
  print(
    f"Monte Carlo: {timed} of {args.samples} samples a state in {generation:.2f} s: {generated} tokens in {steps} "
    f"steps of {slots} slots, {1e3 * generation / steps:.1f} ms each"
  )
  print(
    f"  all {args.samples}: {by_generation} tokens in {all_steps} steps, {whole:.2f} s ({kind}), "
    f"{all_steps * slots / by_generation:.2f} token-forwards run for each"
  )
  print(f"scoring: {scoring_seconds:.3f} s (from {min(times):.3f} to {max(times):.3f}), {by_scoring} token-forwards")
  print(f"token-forwards of Monte Carlo over scoring, by counting, K={args.states}, k={args.samples}:")
  table = {}
  for t in _LENGTHS:
    ours, theirs = counted(t, args.states, args.samples, args.completion)
    table[str(t)] = round(ours / theirs, 1)
    print(f"  T={t:5d}  {ours:7d} / {theirs}  = {table[str(t)]}")
  figures = {
    "token_forwards_ratio": round(by_generation / by_scoring, 2),
    "wall_ratio": round(whole / scoring_seconds, 2),
    "wall_ratio_is": kind,
    "timed_samples": timed,
    "computed_token_forwards_ratio": round(all_steps * slots / by_scoring, 2),
    "generated_tokens": generated,
    "generation_seconds": round(generation, 3),
    "scoring_seconds": round(scoring_seconds, 4),
    "token_forwards_ratio_by_length": table,
  }
  machine.report(figures)


if __name__ == "__main__":
  main()
