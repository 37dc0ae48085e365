"""Runs a configuration on this machine as it would run on a pod, made small; says what each process held.

    python tools/rehearse.py --config configs/qwen3_4b_numina_math.py --hosts 4 --devices_per_host 4 \
        --topology v5p:2x2x4
    python tools/rehearse.py --config configs/demo.py --hosts 2 --devices_per_host 2

It starts `--hosts` processes of `--devices_per_host` fake CPU devices each, all running experiments/train.py.
Meshes, rows, groups, banks, segmentation, microbatches, length buckets, the evaluation's rows and the loss are the
configuration's own. The model and the lengths are made small. What a mesh axis divides in the real sizes it also
divides in the small ones, and what it does not divide stays undivided. Corpora and checkpoints that
the configuration names are replaced by stand-ins in the same format. Nothing is learnt here: weights are random.

A first start makes one step, saves, and is stopped by SIGTERM in the rollout of the second. A second start
resumes, makes the second step, evaluates, saves and ends.

With `--topology`, the devices of the mesh lie on the processes as on that slice. JAX takes this order from
libtpu, which `pip install -e '.[tpu-compile]'` brings. Without libtpu the order is the plain one, process after
process, and that is said. `--hosts` may be a divisor of the slice's hosts: each process then stands for several.

`--workdir` names a new directory that is kept, with what each process printed. The last line is one JSON object.
The exit status is 1 if the run was refused or failed.
"""

import json
import math
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

# Before jax is imported: this process runs nothing on a device.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from absl import app, flags
from ml_collections import ConfigDict

from rredcot_jax.cost import topology
from rredcot_jax.data import datasets
from rredcot_jax.model import decoder, export
from rredcot_jax.model.tokenizer import load_tokenizer
from rredcot_jax.parallel import sharding
from rredcot_jax.train import initial, launch
from rredcot_jax.train.experiment import Experiment

HOSTS = flags.DEFINE_integer("hosts", 1, "Processes.", lower_bound=1)
DEVICES = flags.DEFINE_integer("devices_per_host", 1, "Fake CPU devices of each process.", lower_bound=1)
TOPOLOGY = flags.DEFINE_string("topology", "", "Of the slice whose order of devices is taken, such as v5p:2x2x4.")
SLICES = flags.DEFINE_integer("slices", 1, "How many of them.", lower_bound=1)

PROCESS = pathlib.Path(__file__).parent / "rehearsed_process.py"
ROOT = PROCESS.parent.parent
STEPS = 2
PROMPT, ROOM, COMPLETION, STATES = 256, 64, 64, 8  # The most of tokens and segments.
TOKENIZER = "gsm_symbolic"  # Under rredcot_jax/assets.
START_SECONDS, LIMIT_SECONDS = 300, 900
# Compiling is most of the work.
FAST_COMPILING = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def main(_: Any) -> None:
  config, chips = launch.CONFIG.value, HOSTS.value * DEVICES.value
  result = {"config": config_name(), "hosts": HOSTS.value, "devices_per_host": DEVICES.value,
            "topology": TOPOLOGY.value, "slices": SLICES.value}  # fmt: skip
  directory = pathlib.Path(launch.WORKDIR.value or tempfile.mkdtemp(prefix="rehearsal-"))
  if launch.WORKDIR.value:
    directory.mkdir(parents=True)
  began = time.perf_counter()
  try:
    order, result["order"] = device_order(config, chips)
    small = made_small(config, chips, directory)
    print(describe(config, small), flush=True)
    starts = [start(directory, small, order, stops=stops) for stops in (True, False)]
    result |= {"ok": True, "starts": starts}
    show(starts)
  except ValueError as error:
    print(f"{error}\nREFUSED OR FAILED", flush=True)
    result |= {"ok": False, "error": str(error).splitlines()[0]}
  finally:
    if not launch.WORKDIR.value:
      shutil.rmtree(directory)
  result |= {"seconds": round(time.perf_counter() - began, 1), "processor": processor()}
  print(json.dumps(result))
  sys.exit(0 if result["ok"] else 1)


# ---- The order of devices ----------------------------------------------------------------


def device_order(config: ConfigDict, chips: int) -> tuple[list[int], str]:
  """Places of `jax.devices()` of the rehearsal along the flat mesh, and how they were found.

  The real configuration's layout is asked here, on the devices of the topology, as tools/tpu_compile.py does.

  Raises:
    ValueError: if the topology has another number of chips, or refuses the configuration.
  """
  if not TOPOLOGY.value or not topology.is_known():
    if TOPOLOGY.value:
      print(
        f"libtpu is not installed: the order of devices is the PLAIN one, not that of {TOPOLOGY.value}.", flush=True
      )
    return list(range(chips)), "plain"
  devices = topology.devices_of(TOPOLOGY.value, slices=SLICES.value)
  hosts = sorted({device.process_index for device in devices})
  if len(devices) != chips or len(hosts) % HOSTS.value:
    raise ValueError(
      f"{TOPOLOGY.value} x {SLICES.value} has {len(devices)} chips of {len(hosts)} hosts, and --hosts={HOSTS.value} "
      f"--devices_per_host={DEVICES.value} makes {chips} chips: give --hosts={len(hosts)} (or a divisor of it) and "
      "--devices_per_host so that both make the same number."
    )
  experiment = Experiment(config, devices=devices)
  sharding.check_rows(experiment.mesh, config.rollout.prompts_per_step * config.rollout.group_size)
  sharding.check_rows(experiment.rollout_mesh, config.rollout.prompts_per_step * config.rollout.group_size)
  if config.model.vocab_size:
    sharding.check_split(experiment.abstract_params_state)
  by_host = sorted(devices, key=lambda device: (device.process_index, device.id))
  places = {id(device): place for place, device in enumerate(by_host)}
  order = [places[id(device)] for device in experiment.mesh.devices.flat]
  return order, f"of {TOPOLOGY.value}: processes {[place // DEVICES.value for place in order]} along the mesh"


# ---- Small sizes -------------------------------------------------------------------------


def made_small(config: ConfigDict, chips: int, directory: pathlib.Path) -> ConfigDict:
  """The configuration to rehearse, with its stand-ins written to `directory`."""
  small = ConfigDict(config.to_dict())
  small.unlock()
  small.num_steps, small.checkpoint.every = STEPS, 1
  small.evaluation.num_prompts = min(
    config.evaluation.num_prompts, config.evaluation.rows // config.evaluation.samples + 1
  )
  make_lengths_small(small, config, chips)
  for task in (small.task, small.evaluation.task):
    kind, _, corpus = task.name.partition("/")
    if kind == "dataset":
      write_corpus(directory / "data", corpus, task.options, small.evaluation.num_prompts)
      task.options.data_dir = str(directory / "data")
  needs_start = small.initial_params and not initial.locate(small.initial_params).exists()
  if config.model.vocab_size or needs_start:
    write_start(small, config, chips, directory / "start")
  return small


def make_lengths_small(small: ConfigDict, config: ConfigDict, chips: int) -> None:
  rollout, credit = small.rollout, small.credit
  rollout.max_prompt_tokens = min(config.rollout.max_prompt_tokens, PROMPT)
  rollout.max_tokens = min(config.rollout.max_tokens, ROOM)
  # As many pieces as before, and the sequence axis divides both sums or neither.
  sequence = sizes_of(config, "mesh", chips)["sequence"]
  sum_of = lambda one: one.rollout.max_prompt_tokens + one.rollout.max_tokens
  while math.gcd(sum_of(small), sequence) != math.gcd(sum_of(config), sequence):
    rollout.max_tokens += 1
  ratio = rollout.max_tokens / config.rollout.max_tokens
  small.compute.log_prob_chunk = math.ceil(config.compute.log_prob_chunk * ratio)
  if config.segmentation.k_max > STATES:
    before = config.segmentation.k_max
    fits = (k for k in range(STATES, before) if math.gcd(k, sequence) == math.gcd(before, sequence))
    small.segmentation.k_max = next(fits, before)
  credit.chunk_size = math.ceil(config.credit.chunk_size * small.segmentation.k_max / config.segmentation.k_max)
  credit.max_completion_tokens = min(config.credit.max_completion_tokens, COMPLETION)


def write_start(small: ConfigDict, config: ConfigDict, chips: int, path: pathlib.Path) -> None:
  """Random weights of a small model of the same architecture, in Hugging Face's format, with a tokenizer."""
  tokenizer = load_tokenizer(initial.locate(TOKENIZER))
  both = [sizes_of(config, name, chips) for name in ("mesh", "rollout_mesh")]
  parts = math.lcm(*(axes["fsdp"] * axes["tensor"] * axes["sequence"] for axes in both)) * 4
  model, real = small.model, config.model
  # gcd(size, n) is divided by a part of n exactly where `size` is.
  for name in ("width", "num_heads", "num_kv_heads", "mlp_width"):
    model[name] = math.gcd(real[name], parts)
  model.num_layers, model.head_dim, model.max_positions = 2, 4, 0
  if real.vocab_size:
    model.vocab_size = next(
      n for n in range(len(tokenizer), 2**20) if math.gcd(n, parts) == math.gcd(real.vocab_size, parts)
    )
  else:
    model.vocab_size = len(tokenizer)
  small.initial_params, small.tokenizer.path, small.tokenizer.chat = str(path), "", False
  made = Experiment(small).model
  export.save(made, decoder.init(made, jax.random.key(0)), path, tokenizer=tokenizer)


def sizes_of(config: ConfigDict, name: str, chips: int) -> dict[str, int]:
  """The sizes of a mesh's axes, with what -1 and a `data` of 0 stand for."""
  axes = config[name].to_dict()
  if name == "rollout_mesh" and axes["data"] == 0:
    return sizes_of(config, "mesh", chips)
  rest = chips // math.prod(size for size in axes.values() if size != -1)
  return {axis: rest if size == -1 else size for axis, size in axes.items()}


def write_corpus(data_dir: pathlib.Path, corpus: str, options: ConfigDict, prompts: int) -> None:
  """Additions as questions, in the fields and files of the corpus; some are proofs where those are to be left out."""
  schema = datasets.SCHEMAS.get(corpus) or datasets.Schema.of_fields(options.fields)
  names = {options.get("train_file") or schema.train_file, options.get("eval_file") or schema.eval_file} - {None}
  (data_dir / corpus).mkdir(parents=True, exist_ok=True)
  for place, name in enumerate(sorted(names)):
    lines = []
    for index in range(8 * prompts + 32):  # A file that is divided leaves a quarter of its rows to the evaluation.
      a, b = 1000 * place + index, index % 7
      proof = options.get("skip_without_answer", False) and index % 9 == 8
      answer = f"\n#### {a + b}" if schema.derive == "####" else "" if proof else f" It is \\boxed{{{a + b}}}."
      row = {
        schema.question[0]: f"What is {a} + {b}?",
        schema.solution[0]: f"We add {a} and {b}.\n\nThe sum is {a + b}.{answer}",
      }
      if schema.answer and not proof:
        row[schema.answer[0]] = str(a + b)
      lines.append(json.dumps(row) + "\n")
    (data_dir / corpus / f"{name}.jsonl").write_text("".join(lines))


def describe(config: ConfigDict, small: ConfigDict) -> str:
  before, after = config.to_dict(), small.to_dict()
  changed: list[str] = []

  def compare(path: str, old: Any, new: Any) -> None:
    if isinstance(new, dict):
      for name in new:
        compare(f"{path}.{name}" if path else name, old.get(name) if isinstance(old, dict) else None, new[name])
    elif old != new and "data_dir" not in path:
      changed.append(f"{path} {old} -> {new}")

  compare("", before, after)
  return "made small: " + ", ".join(changed)


# ---- Starts ------------------------------------------------------------------------------


def start(directory: pathlib.Path, config: ConfigDict, order: Sequence[int], *, stops: bool) -> dict[str, Any]:
  """Starts all processes and waits for their ends.

  Raises:
    ValueError: with what a process printed, if one does not end well or has not done what it should.
  """
  name = "first" if stops else "second"
  plan = {
    "config": config.to_dict(), "order": list(order), "directory": str(directory), "start": name,
    "stop_in_rollout": STEPS if stops else 0, "stopping_process": HOSTS.value - 1,
  }  # fmt: skip
  (directory / f"{name}.json").write_text(json.dumps(plan))
  # Without a compilation cache. JAX writes one on process 0 alone, and on CPU the others do not find their programs in
  # it. A resumed run in which process 0 had loaded its programs, and the others had compiled them, waited for ever.
  kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
  environment = kept | {
    "RREDCOT_REHEARSAL": str(directory / f"{name}.json"),
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES.value} {FAST_COMPILING}",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    "RREDCOT_START_SECONDS": str(START_SECONDS),
  }
  words = [sys.executable, str(PROCESS), f"--config={PROCESS}", f"--workdir={directory / 'run'}"]
  if HOSTS.value > 1:
    words += [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={HOSTS.value}"]
  began, started = time.perf_counter(), []
  outputs = [directory / f"{name}-{index}.txt" for index in range(HOSTS.value)]
  try:
    for index, output in enumerate(outputs):
      own = [f"--process_id={index}"] if HOSTS.value > 1 else []
      with output.open("w") as file:
        started.append(subprocess.Popen([*words, *own], env=environment, stdout=file, stderr=subprocess.STDOUT))
    statuses = [process.wait(max(LIMIT_SECONDS - (time.perf_counter() - began), 1)) for process in started]
  except subprocess.TimeoutExpired:
    for process in started:
      process.send_signal(signal.SIGUSR1)  # Each prints where it waits.
    time.sleep(5)
    raise ValueError(f"the {name} start has not ended in {LIMIT_SECONDS} s: {tail(outputs[0])}") from None
  finally:
    for process in started:
      process.kill()
      process.wait()
  # A process that lost another one has status 75. The one that failed says why.
  failed = [i for i, status in enumerate(statuses) if status] and max(
    range(HOSTS.value), key=lambda i: (statuses[i] not in (0, 75), statuses[i] != 0)
  )
  if any(statuses):
    raise ValueError(
      f"process {failed} of the {name} start ended with status {statuses[failed]}: {tail(outputs[failed])}"
    )
  said = outputs[0].read_text()
  expected = "told to stop" if stops else "resumed from step 1 of 2"
  if expected not in said:
    raise ValueError(f"the {name} start did not say {expected!r}: {tail(outputs[0])}")
  held = [json.loads((directory / f"held-{name}-{i}.json").read_text()) for i in range(HOSTS.value)]
  lines = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
  done = sorted({line["step"] for line in lines if "train/loss" in line})
  evaluated = sorted({line["step"] for line in lines if "eval/pass@1" in line})
  if (done, evaluated) != (([1], [0]) if stops else ([1, 2], [0, 2])):
    raise ValueError(f"the {name} start has steps {done} and evaluations {evaluated} in its metrics.")
  return {
    "start": name,
    "seconds": round(time.perf_counter() - began, 1),
    "steps": done,
    "evaluations": evaluated,
    "processes": held,
  }


def tail(path: pathlib.Path) -> str:
  lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
  errors = [line for line in lines if "Error: " in line or " stops: " in line]
  return "\n".join([*errors[:1], *lines[-25:]])


def free_port() -> int:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def show(starts: list[dict[str, Any]]) -> None:
  mib = lambda size: f"{size / 2**20:.2f}"
  for one in starts:
    print(f"{one['start']} start: {one['seconds']} s, steps {one['steps']}, evaluations {one['evaluations']}")
    print(
      "  process  rows of a step  judged  for banks  rows of evaluation  state, MiB a device  all arrays  host, MiB  "
      "saved"
    )
    for held in one["processes"]:
      step, evaluation = held["step"], held.get("evaluation", {})
      print(
        f"  {held['process']:7d}  {step['here']:5d} of {step['rows']:5d}  {step['judged']:6d}  {step['around']:9d}  "
        f"{evaluation.get('here', 0):9d} of {evaluation.get('filled_up_to', 0):5d}  {mib(held['state_bytes']):>19s}  "
        f"{mib(held['live_bytes']):>10s}  {held['peak_host_bytes'] / 2**20:9.0f}  {held['saved']}"
      )


def config_name() -> str:
  words = [word.removeprefix("--config=") for word in sys.argv if word.startswith("--config=")]
  return words[0] if words else sys.argv[sys.argv.index("--config") + 1]


def processor() -> str:
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return "unknown"
  return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main)
