"""What scoring's memory grows with: the compiler's temporaries for traces of T tokens, K states, N completions, chunks.

    python benchmarks/scoring_memory.py

Claim: temporaries grow with T + chunk and not with K N S. The figures are XLA's memory
analysis of `scoring.score_with_cache`, compiled for this platform. Nothing is run. The
model has two layers of width 256, 8 heads and a vocabulary of 8192, in bfloat16. There is
one trace, and completions have S = 64 tokens. The cache is an argument, which grows with
T, and is not counted. The memory of all branches at once (chunk 0) is shown beside it. The
last line is one JSON object.
"""

import functools

import jax
import jax.numpy as jnp
import machine

from rredcot_jax.model import decoder, scoring
from rredcot_jax.model.config import Compute, ModelConfig
from rredcot_jax.ops import types

CONFIG = ModelConfig(
  vocab_size=8192, width=256, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=32, mlp_width=1024,
  compute=Compute(dtype="bfloat16"),
)  # fmt: skip
PROMPT, S = 64, 64


def temporaries(t: int, states: int, completions: int, chunk: int) -> int:
  """Bytes of temporaries."""
  array = lambda dtype, *shape: jax.ShapeDtypeStruct((1, *shape), dtype)
  rollout = types.Rollout(
    prompt_tokens=array(jnp.int32, PROMPT), prompt_mask=array(bool, PROMPT), tokens=array(jnp.int32, t),
    mask=array(bool, t), log_probs=array(jnp.float32, t),
    sampler_log_probs=array(jnp.float32, t), entropy=array(jnp.float32, t), truncated=array(bool),
  )  # fmt: skip
  segments = types.Segments(
    ends=array(jnp.int32, states), segment_ids=array(jnp.int32, t), num_segments=array(jnp.int32),
    num_merged=array(jnp.int32),
  )  # fmt: skip
  each = (states, completions)
  bank = types.Completions(
    tokens=array(jnp.int32, *each, S), mask=array(bool, *each, S), scored=array(bool, *each, S),
    utilities=array(jnp.float32, *each), log_q=array(jnp.float32, *each), valid=array(bool, *each),
  )  # fmt: skip
  column = jax.ShapeDtypeStruct((2, 1, CONFIG.num_kv_heads, PROMPT + t, CONFIG.head_dim), jnp.bfloat16)
  params = jax.eval_shape(lambda: decoder.rounded(decoder.init(CONFIG, jax.random.key(0)), CONFIG))
  score = functools.partial(scoring.score_with_cache, config=CONFIG, temperature=1.0, chunk_size=chunk or None)
  lowered = jax.jit(score).lower(
    params, cache=decoder.Cache(key=column, value=column), rollout=rollout, segments=segments, completions=bank
  )
  return lowered.compile().memory_analysis().temp_size_in_bytes


def main() -> None:
  figures: dict[str, dict[str, float]] = {"by_length": {}, "by_branches": {}, "by_chunk": {}}
  mib = lambda *case: round(temporaries(*case) / 2**20, 1)
  for t in (1024, 4096, 16384, 32768):
    figures["by_length"][str(t)] = mib(t, 32, 1, 8)
    print(f"T={t:6d}  K=32 N=1 chunk=8: {figures['by_length'][str(t)]:8.1f} MiB", flush=True)
  for k, n in ((8, 1), (32, 1), (32, 8)):
    figures["by_branches"][str(k * n)] = mib(16384, k, n, 8)
    print(f"T= 16384  K={k} N={n} chunk=8: {figures['by_branches'][str(k * n)]:8.1f} MiB", flush=True)
  for chunk in (4, 16, 64, 0):
    figures["by_chunk"][str(chunk)] = mib(16384, 32, 8, chunk)
    print(f"T= 16384  K=32 N=8 chunk={chunk or 'all'}: {figures['by_chunk'][str(chunk)]:8.1f} MiB", flush=True)
  machine.report({"temporaries_mib": figures})


if __name__ == "__main__":
  main()
