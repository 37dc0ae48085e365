"""What compiled programs cost: memory, arithmetic and traffic, read from XLA's own text.

XLA's cost analysis counts the body of a loop once, and layers, chunks, microbatches and decoding
steps are loops. Here the compiled text is walked from its entry, and a loop's body counts as
often as it runs. That number is XLA's note, or the bound in the loop's condition. So sampling
counts as if no row ended early. All numbers are of one chip, because the text is one device's
program.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU chip by its published peak numbers (cloud.google.com/tpu/docs)."""

  hbm: float  # Bytes.
  flops: float  # bfloat16, a second.
  hbm_bandwidth: float  # Bytes a second.
  ici_bandwidth: float  # Bytes a second, all links of a chip together.


# By the name before the colon of a topology.
CHIPS = {
  "v4": Chip(32 * 2**30, 275e12, 1.228e12, 300e9),
  "v5e": Chip(16 * 2**30, 197e12, 0.819e12, 200e9),
  "v5p": Chip(95 * 2**30, 459e12, 2.765e12, 600e9),
  "v6e": Chip(32 * 2**30, 918e12, 1.640e12, 448e9),
}

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_BYTES: dict[str, float] = {
  "pred": 1,
  "s8": 1,
  "u8": 1,
  "s16": 2,
  "u16": 2,
  "bf16": 2,
  "f16": 2,
  "s32": 4,
  "u32": 4,
  "f32": 4,
}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8, "s4": 0.5, "u4": 0.5, "f8e4m3fn": 1, "f8e5m2": 1}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Counts:
  """Of one chip, loops counted as often as they run."""

  flops: float = 0.0  # Products of matrices, and of the Pallas attention kernels.
  kernel_flops: float = 0.0  # Those of the kernels alone: half of a causal square.
  collective_bytes: Mapping[str, float] = dataclasses.field(default_factory=dict)  # Sent, by kind.
  collective_calls: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def plus(self, other: "Counts", times: float = 1.0) -> "Counts":
    def add(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
      return {kind: ours.get(kind, 0.0) + times * theirs.get(kind, 0.0) for kind in [*ours, *theirs]}

    return Counts(
      self.flops + times * other.flops,
      self.kernel_flops + times * other.kernel_flops,
      add(self.collective_bytes, other.collective_bytes),
      add(self.collective_calls, other.collective_calls),
    )


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  opcode: str
  shapes: list[tuple[str, tuple[int, ...]]]  # Of its result, flat.
  operands: list[str]
  text: str  # What follows the opcode.
  root: bool  # Its computation's result.


def count(text: str) -> Counts:
  """Walks a compiled module's text, `compiled.as_text()`."""
  computations, entry = _parse(text)
  shapes = {one.name: one.shapes for body in computations.values() for one in body}
  partitions = re.search(r"\bnum_partitions=(\d+)", text)
  devices = int(partitions.group(1)) if partitions else 1
  again = _written_again(computations)

  @functools.cache
  def of(name: str) -> Counts:
    total = Counts()
    for one in computations[name]:
      total = total if one.name in again else total.plus(_own(one, shapes, devices))
      called = _CALLED.findall(one.text)
      for branches in _BRANCHES.findall(one.text):
        called += [branch.strip().lstrip("%") for branch in branches.split(",")]
      trips = _trips(one, computations) if one.opcode == "while" else 1
      for inner in called:
        # A reduction's or a scatter's combiner holds nothing that is counted.
        if inner in computations:
          total = total.plus(of(inner), trips)
    return total

  return of(entry)


def _written_again(computations: Mapping[str, list[_Instruction]]) -> set[str]:
  """Collectives, by name, that repeat another one: a TPU's text has a copy in each fusion that runs beside it."""
  seen: set[str] = set()
  again: set[str] = set()
  for one in (one for body in computations.values() for one in body):
    chained = re.search(r"channel_id=(\d+),.*chain_id=", one.text)
    if chained and chained.group(1) in seen:
      again.add(one.name)
    elif chained:
      seen.add(chained.group(1))
  return again


def _trips(loop: _Instruction, computations: Mapping[str, list[_Instruction]]) -> int:
  """How often a loop's body runs at most: by XLA's note, or the bound that its condition compares with."""
  if known := _TRIPS.search(loop.text):
    return int(known.group(1))
  condition, body = (re.search(rf"{name}=%?([\w.\-]+)", loop.text) for name in ("condition", "body"))
  assert condition is not None and body is not None, loop.text

  def bounds(name: str) -> list[int]:
    found = [_constant(one) for one in computations[name] if one.opcode == "constant"]
    for one in computations[name]:
      for inner in _CALLED.findall(one.text):
        found += bounds(inner) if inner in computations else []
    return found

  bound = max(bounds(condition.group(1)), default=1)
  return -(-bound // _step(computations, condition.group(1), body.group(1)))


def _constant(one: _Instruction) -> int:
  value = re.match(r"(\d+)\)", one.text)
  return int(value.group(1)) if value and one.shapes[0][0] in ("s32", "u32", "s64") else 0


def _step(computations: Mapping[str, list[_Instruction]], condition: str, body: str) -> int:
  """The step of the counter in a loop's condition. It may be 2, because XLA unrolls some loops."""
  places = [
    int(index) for one in computations[condition] if one.opcode == "get-tuple-element"
    for index in re.findall(r"index=(\d+)", one.text)
  ]  # fmt: skip
  result = next(one for one in computations[body] if one.root)
  if not places or result.opcode != "tuple":
    return 1

  def grown(name: str, within: str) -> int:
    """The constants that are added to a parameter on the way to the value `name`."""
    one = next((one for one in computations[within] if one.name == name), None)
    if one is None or one.opcode in ("get-tuple-element", "parameter", "constant"):
      return _constant(one) if one is not None and one.opcode == "constant" else 0
    if one.opcode == "fusion":
      inner = _CALLED.findall(one.text)[0]
      root = next(each for each in computations[inner] if each.root)
      return grown(root.name, inner) + max((grown(each, within) for each in one.operands), default=0)
    if one.opcode in ("add", "copy", "bitcast", "convert"):
      return sum(grown(each, within) for each in one.operands)
    return 0

  return max(max(grown(result.operands[place], body) for place in places), 1)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  computations: dict[str, list[_Instruction]] = {}
  entry = current = ""
  for line in text.splitlines():
    if opened := _COMPUTATION.match(line):
      current = opened.group(2)
      computations[current] = []
      entry = current if opened.group(1) else entry
    elif current and (found := _INSTRUCTION.match(line)):
      root, name, rest = found.groups()
      end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
      shapes = [(kind, tuple(int(d) for d in dims.split(",") if d)) for kind, dims in _SHAPE.findall(rest[:end])]
      opcode, _, arguments = rest[end:].strip().partition("(")
      inside = arguments[: _closing("(" + arguments) - 1]
      operands = re.findall(r"%([\w.\-]+)", inside)
      computations[current].append(_Instruction(name, opcode, shapes, operands, arguments, bool(root)))
  return computations, entry


def _closing(text: str) -> int:
  depth = 0
  for place, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      return place
  return len(text)


def _own(one: _Instruction, shapes: Mapping[str, list[tuple[str, tuple[int, ...]]]], devices: int) -> Counts:
  if one.opcode == "dot":
    return Counts(flops=_dot_flops(one, shapes))
  if one.opcode == "convolution":
    return Counts(flops=_convolution_flops(one, shapes))
  if one.opcode == "custom-call" and "splash" in one.name:
    flops = _splash_flops(one, shapes)
    return Counts(flops=flops, kernel_flops=flops)
  kind = one.opcode.removesuffix("-start")
  if kind not in COLLECTIVES:
    return Counts()
  size = sum(_size(shape) for name in one.operands for shape in shapes.get(name, []))
  group = 1 if kind == "collective-permute" else _group_size(one.text, devices)
  sent = {
    "all-gather": size * (group - 1),
    "reduce-scatter": size * (group - 1) / group,
    "all-reduce": 2 * size * (group - 1) / group,
    "all-to-all": size * (group - 1) / group,
    "collective-permute": size,
  }[kind]
  return Counts(collective_bytes={kind: sent}, collective_calls={kind: 1.0})


def _size(shape: tuple[str, tuple[int, ...]]) -> float:
  return _BYTES.get(shape[0], 0) * math.prod(shape[1])


def _group_size(text: str, devices: int) -> int:
  """Devices of a collective's group.

  Raises:
    ValueError: on a way of writing groups that is not known.
  """
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
    return max(len(listed.group(1).split(",")), 1)
  if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
    return int(counted.group(2))
  if meshed := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\)\))? \{([^}]*)\}", text):
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", meshed.group(1))}
    return math.prod(sizes[name] for name in re.findall(r"'([^']+)'", meshed.group(2)))
  if "replica_groups={}" in text:
    return devices
  raise ValueError(f"the groups of this collective are written in a way that is not known: {text[:300]}")


def _dot_flops(one: _Instruction, shapes: Mapping[str, list[tuple[str, tuple[int, ...]]]]) -> float:
  left = shapes[one.operands[0]][0][1]
  contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.text)
  dims = [int(d) for d in contracted.group(1).split(",") if d] if contracted else []
  return 2.0 * math.prod(one.shapes[0][1]) * math.prod(left[d] for d in dims)


def _convolution_flops(one: _Instruction, shapes: Mapping[str, list[tuple[str, tuple[int, ...]]]]) -> float:
  """Products of a convolution. A TPU's matrix product may be one whose window is padding but for one place."""
  left, kernel, out = shapes[one.operands[0]][0][1], shapes[one.operands[1]][0][1], one.shapes[0][1]
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.text)
  assert labels is not None, one.text
  of_left, of_kernel, of_out = labels.groups()
  window = re.search(r"window=\{([^}]*)\}", one.text)
  given = dict(part.split("=") for part in window.group(1).split()) if window else {}
  spatial = [label for label in of_out if label.isdigit()]
  each = lambda name, default: given[name].split("x") if name in given else [default] * len(spatial)
  pairs = 1
  for place, label in enumerate(sorted(spatial)):
    before = int(each("pad", "0_0")[place].split("_")[0])
    stride, spread, gap = (int(each(name, "1")[place]) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    at = np.arange(out[of_out.index(label)])[:, None] * stride - before
    at = at + np.arange(kernel[of_kernel.index(label)])[None] * gap
    inside = (at >= 0) & (at <= (left[of_left.index(label)] - 1) * spread) & (at % spread == 0)
    pairs *= int(inside.sum())
  return 2.0 * pairs * out[of_out.index("b")] * out[of_out.index("f")] * kernel[of_kernel.index("i")]


def _splash_flops(one: _Instruction, shapes: Mapping[str, list[tuple[str, tuple[int, ...]]]]) -> float:
  """Matrix products over half of a causal square: 2 in the forward pass, 3 for dq, 4 for dk and dv."""
  products = 3 if "_dq_" in one.name else 4 if "_dkv_" in one.name else 2
  arrays = [shape for name in one.operands for _, shape in shapes.get(name, []) if len(shape) >= 3]
  *rows, length, width = max(arrays, key=math.prod)
  return products * 2.0 * math.prod(rows) * width * length * length / 2


def memory(compiled: Any) -> dict[str, int]:
  """Bytes a chip of a compiled program: arguments, outputs without those that reuse an argument, temporaries, sum."""
  found = compiled.memory_analysis()
  arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
  outputs = found.output_size_in_bytes - found.alias_size_in_bytes
  peak = arguments + outputs + temporaries + found.generated_code_size_in_bytes
  return {"arguments": arguments, "outputs": outputs, "temporaries": temporaries, "peak": peak}


def floors(counts: Counts, hbm_bytes: float, chip: Chip) -> dict[str, float]:
  """Seconds that each resource needs at its peak; a step takes at least the largest."""
  return {
    "compute": counts.flops / chip.flops,
    "memory": hbm_bytes / chip.hbm_bandwidth,
    "network": float(np.sum(list(counts.collective_bytes.values()))) / chip.ici_bandwidth,
  }
