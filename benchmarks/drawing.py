"""The cost of drawing a token: `sampling.draw` (two random numbers) beside `jax.random.categorical` (one a word).

    python benchmarks/drawing.py

Both draw one token a row from the same normalised log-probabilities, jitted and vmapped over the rows
with a key each, as the sampler does. The two take turns, and each time is the median over the turns.
Ends with one JSON object: milliseconds of each and their ratio, and the machine.
"""

import statistics
import time

import jax
import machine
from absl import app, flags

from rredcot_jax.model import sampling

TURNS = flags.DEFINE_integer("turns", 30, "Times that each is run.")
_ROWS = (16, 64)
_WORDS = (32, 4096, 49152, 151936)  # The chain task's, a small one, SmolLM2's and Qwen's.


def main(_) -> None:
  cases = [measure(rows, words, TURNS.value) for words in _WORDS for rows in _ROWS]
  for case in cases:
    print(
      f"{case['rows']:3} rows of {case['words']:6} words: draw {case['draw_ms']:.3f} ms, "
      f"categorical {case['categorical_ms']:.3f} ms, categorical / draw {case['ratio']:.2f}"
    )
  machine.report({"cases": cases})


def measure(rows: int, words: int, turns: int) -> dict[str, float]:
  """Median milliseconds of each way to draw `rows` tokens, in turns."""
  logits = 3 * jax.random.normal(jax.random.key(0), (rows, words))
  log_probs = jax.block_until_ready(jax.nn.log_softmax(logits, axis=-1))
  keys = jax.random.split(jax.random.key(1), rows)
  ways = {"draw": jax.jit(jax.vmap(sampling.draw)), "categorical": jax.jit(jax.vmap(jax.random.categorical))}
  times: dict[str, list[float]] = {name: [] for name in ways}
  for turn in range(turns + 1):
    for name, way in ways.items():
      start = time.perf_counter()
      jax.block_until_ready(way(keys, log_probs))
      if turn:  # The first compiles.
        times[name].append(time.perf_counter() - start)
  median = {f"{name}_ms": round(1e3 * statistics.median(values), 4) for name, values in times.items()}
  ratio = round(median["categorical_ms"] / median["draw_ms"], 2)
  return {"rows": rows, "words": words, **median, "ratio": ratio}


if __name__ == "__main__":
  app.run(main)
