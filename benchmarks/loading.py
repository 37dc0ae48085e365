"""Host memory that loading a checkpoint takes beside the parameters themselves.

    python benchmarks/loading.py

It writes a random 1 GB checkpoint in shards of 100 MB, and loads it in a process of its
own. It reads the peak of that process's anonymous memory, because mapped shards belong to
the page cache. On CPU the parameters are in host memory, so they are subtracted, and so is
the memory that the process held before. The last line is one JSON object.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import threading

import jax
import machine
import numpy as np
from absl import app, flags

from rredcot_jax.model import decoder, export, huggingface
from rredcot_jax.model.config import SIZES

LOAD = flags.DEFINE_string("load", "", "Internal: the directory that the measured process loads.")
_SHARD_BYTES = 100 * 10**6


def main(_) -> None:
  if LOAD.value:
    print(json.dumps(measure(LOAD.value)))
    return
  config = dataclasses.replace(SIZES["SmolLM2-360M"], num_layers=20)
  with tempfile.TemporaryDirectory() as directory:
    params = jax.tree.map(np.asarray, decoder.init(config, jax.random.key(0)))
    export.save(config, params, directory, shard_bytes=_SHARD_BYTES)
    largest = max(path.stat().st_size for path in pathlib.Path(directory).glob("*.safetensors"))
    command = [sys.executable, __file__, "--load", directory]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
  held = json.loads(output.splitlines()[-1])
  print(f"parameters {held['parameters'] / 1e6:.0f} MB, largest shard {largest / 1e6:.0f} MB")
  print(f"peak beside the parameters {held['extra'] / 1e6:.0f} MB")
  figures = {"extra_over_largest_shard": round(held["extra"] / largest, 3), **held, "largest_shard": largest}
  machine.report(figures)


def measure(directory: str) -> dict[str, int]:
  """Bytes: the parameters, and the peak that loading held beside them."""
  jax.block_until_ready(jax.numpy.zeros(1))
  before, peak, done = anonymous(), 0, threading.Event()

  def watch() -> None:
    nonlocal peak
    while not done.wait(0.002):
      peak = max(peak, anonymous())

  watcher = threading.Thread(target=watch)
  watcher.start()
  _, params = huggingface.load(directory)
  jax.block_until_ready(params)
  done.set()
  watcher.join()
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  return {"parameters": size, "extra": max(peak, anonymous()) - before - size}


def anonymous() -> int:
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith("RssAnon:"):
      return int(line.split()[1]) * 1024
  raise SystemExit("this benchmark reads /proc/self/status, which is Linux's.")


if __name__ == "__main__":
  app.run(main)
