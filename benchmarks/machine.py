"""The machine that a benchmark ran on, and the line that ends every benchmark."""

import json
import os
import pathlib
import platform
from typing import Any

import jax

# Those that change how fast float32 and bfloat16 arithmetic is, of x86 and of ARM.
_EXTENSIONS = (
  "sse4_2", "avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile",
  "amx_int8", "amx_bf16", "amx_fp16", "asimd", "bf16", "sve", "sve2",
)  # fmt: skip


def describe() -> dict[str, Any]:
  """Processor, its vector extensions, cores that this process may use, and what jax runs on.

  The processor's name and extensions are read from Linux's /proc/cpuinfo. Elsewhere the name is
  what Python knows, and the list of extensions is empty.
  """
  path = pathlib.Path("/proc/cpuinfo")
  lines = path.read_text().splitlines() if path.is_file() else []
  fields = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
  there = fields.get("flags", fields.get("Features", "")).split()
  devices = jax.devices()
  return {
    "processor": fields.get("model name", platform.processor() or platform.machine()),
    "extensions": [name for name in _EXTENSIONS if name in there],
    "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    "jax": jax.__version__,
    "device": devices[0].device_kind,
    "devices": len(devices),
  }


def report(figures: dict[str, Any]) -> None:
  """Prints a benchmark's last line: one JSON object of its figures and the machine."""
  print(json.dumps({**figures, "machine": describe()}))
