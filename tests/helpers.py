"""What several test files share: hostile texts, a small decoder and its numpy twin, updates to compare, short runs."""

import contextlib
import dataclasses
import functools
import json
import resource

import jax
import numpy as np
import optax
import pytest
import tiny_config

from rredcot_jax.model import decoder
from rredcot_jax.model.config import Compute, ModelConfig
from rredcot_jax.ops import losses, types
from rredcot_jax.report import records
from rredcot_jax.train import checkpoint, loop, metrics, train_step, validation
from rredcot_jax.train import workdir as workdir_lib
from rredcot_jax.train.experiment import Experiment

# ---- Hostile texts ---------------------------------------------------------------------------

MEGABYTE = 1 << 20
HOSTILE = {
  "braces": "{" * MEGABYTE,
  "nested": "[" * MEGABYTE + "]" * MEGABYTE,
  "power": "9**9**9**9",
  "null": "\0" * MEGABYTE,
  "closes": "</think>" * (MEGABYTE // 8),
  "almost closes": "</think" * (MEGABYTE // 7),
  "digits": "9" * MEGABYTE,
  "commas": "1," * MEGABYTE,
  "exponent": "1e999999999",
  "negative exponent": "1e-999999999",
  "spaces": " " * MEGABYTE + "x",
  "surrogates": "\ud800" * 100,
  "code": "__import__('os').getpid()",
  "not a number": "sNaN",
  "infinity": "inf",
}

# ---- A small decoder, and the same in numpy -------------------------------------------------

LLAMA = ModelConfig(vocab_size=11, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24)
FAMILIES = {
  "llama": LLAMA,
  "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, rope_theta=1e6),
  "qwen3": dataclasses.replace(LLAMA, qk_norm=True, head_dim=6, tied_embeddings=False),
}


def params_of(config, seed=0):
  """Random parameters in which norms and biases are not their trivial selves."""
  params = decoder.init(config, jax.random.key(seed))
  keys = iter(jax.random.split(jax.random.key(seed + 1), 100))
  return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), params)


def plain(params, config, tokens):
  """One unpadded sequence, head by head, in numpy float64."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  norm = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale
  half = config.head_dim // 2
  angle = np.arange(len(tokens))[:, None] * config.rope_theta ** (-np.arange(half) / half)

  def turn(x):
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1)

  x = p["embedding"][tokens]
  for layer in range(config.num_layers):
    block = {name: value[layer] for name, value in p["blocks"].items()}
    y, mixed = norm(x, block["attention_norm"]), 0.0

    def project(name, head, y=y, block=block):
      out = y @ block[name][:, head] + (block[f"{name}_bias"][head] if config.qkv_bias else 0)
      return norm(out, block[f"{name}_norm"]) if config.qk_norm and name != "value" else out

    for head in range(config.num_heads):
      group = head // (config.num_heads // config.num_kv_heads)
      scores = turn(project("query", head)) @ turn(project("key", group)).T / np.sqrt(config.head_dim)
      scores[np.triu_indices(len(tokens), 1)] = -np.inf
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      weights /= weights.sum(-1, keepdims=True)
      mixed = mixed + weights @ project("value", group) @ block["out"][head]
    x = x + mixed
    y = norm(x, block["mlp_norm"])
    gate = y @ block["gate"]
    x = x + (gate / (1 + np.exp(-gate)) * (y @ block["up"])) @ block["down"]
  return norm(x, p["final_norm"]) @ p["embedding" if config.tied_embeddings else "head"].T


# ---- Updates ---------------------------------------------------------------------------------

UPDATE_MODEL = ModelConfig(
  vocab_size=16, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24, qkv_bias=True,
  tied_embeddings=False,
)  # fmt: skip
# Plain descent: Adam divides by the gradient's size, which would blow rounding up to the step's.
DESCENT = optax.sgd(0.1, momentum=0.9)


@functools.cache
def make_state():
  return train_step.init_state(decoder.init(UPDATE_MODEL, jax.random.key(0)), DESCENT)


def make_batch():
  rng = np.random.default_rng(0)
  prompt_mask = np.arange(3) >= np.array([0, 2, 1, 0])[:, None]
  mask = np.arange(6) < np.array([6, 2, 5, 3])[:, None]
  noise = lambda: rng.normal(size=(4, 6)).astype(np.float32) * mask
  return types.TrainBatch(
    prompt_tokens=rng.integers(0, 16, (4, 3)).astype(np.int32),
    prompt_mask=prompt_mask,
    tokens=rng.integers(0, 16, (4, 6)).astype(np.int32),
    mask=mask,
    loss_mask=mask & (np.arange(6) != 1),
    old_log_probs=-2.5 * mask + 0.1 * noise(),
    reference_log_probs=-2.5 * mask + 0.1 * noise(),
    advantages=noise(),
  )


UPDATES = {
  "supervised": functools.partial(train_step.supervised_update, config=UPDATE_MODEL, optimizer=DESCENT),
  "policy": functools.partial(
    train_step.policy_update,
    config=UPDATE_MODEL,
    optimizer=DESCENT,
    temperature=0.8,
    loss=functools.partial(losses.policy_loss, loss="dapo", kl="k3", kl_coefficient=0.1),
  ),
}
IN_CHUNKS = {chunk: dataclasses.replace(UPDATE_MODEL, compute=Compute(log_prob_chunk=chunk)) for chunk in (1, 2, 4)}
UPDATES["policy in chunks"] = functools.partial(UPDATES["policy"], config=IN_CHUNKS[4])  # The last of them is padded.


# ---- Short runs ------------------------------------------------------------------------------


def run(config, workdir):
  validation.validate(config)
  with workdir_lib.claim(workdir, config, "test") as claim:
    assert loop.run(config, workdir, claim=claim)
  return workdir


def untimed(workdir):
  lines = records.read_metrics(workdir / "metrics.jsonl")
  return [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in lines]


def saved_params(workdir, step, config=None):
  saver = checkpoint.Checkpointer(workdir / "checkpoints", writes=False)
  at, state, data = saver.restore_latest(Experiment(config or tiny_config.get_config()).abstract_state)
  saver.close()
  assert at == step
  return jax.device_get(state), data


@contextlib.contextmanager
def compilations():
  """The programs that XLA compiles meanwhile, as (the last step whose line was written, name); -1 before any."""
  compiled, last, write = [], -1, metrics.MetricsWriter.write

  def noting(self, step, values):
    nonlocal last
    last = step
    return write(self, step, values)

  def note(event, seconds, fun_name="", **_):
    if event == "/jax/core/compile/backend_compile_duration":
      compiled.append((last, fun_name.removeprefix("jit(").removesuffix(")")))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(metrics.MetricsWriter, "write", noting)
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
      yield compiled
    finally:
      jax.monitoring.unregister_event_duration_listener(note)


# ---- Faults ----------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(limit=20_000):
  """No file may grow beyond `limit` bytes: writes fail as on a full disk, without being root."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def reward_of_length(self, example, text):
  """In place of the verifier, which would give random weights nothing, so that nothing would move."""
  return float(len(text) % 3 == 0)


def check_moved(workdir, config):
  """Asserts that a run has learnt something: without this, equal parameters may be those that it began with."""
  lines = [line for line in untimed(workdir) if "train/reward" in line]
  assert len({line["train/reward"] for line in lines}) > 1
  assert sum(line["train/gradient_norm"] > 0 for line in lines) > len(lines) / 2
  state, _ = saved_params(workdir, config.num_steps, config)
  start = Experiment(config).start_params(jax.random.split(jax.random.key(config.seed), 3)[0])
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, jax.device_get(start))
  assert all(jax.tree.leaves(moved)), moved


# ---- Work directories ------------------------------------------------------------------------


def claim(path, **options):
  """Claims a work directory for a run of six steps."""
  config = tiny_config.get_config()
  config.num_steps = options.pop("num_steps", 6)
  return workdir_lib.claim(path, config, "python train.py", **options)


def begin(path, *, metrics=(), checkpoints=()):
  """A work directory that a run has left; without metrics and checkpoints, one that was refused at its start."""
  claim(path).close()
  (path / "metrics.jsonl").write_text("".join(json.dumps({"step": step, "x": 1.0}) + "\n" for step in metrics))
  for step in checkpoints:
    (path / "checkpoints" / str(step)).mkdir(parents=True)
  return path


def write_parquet(path, rows):
  """Writes rows as a Parquet file, with its directory."""
  import pyarrow
  import pyarrow.parquet

  path.parent.mkdir(exist_ok=True)
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


# ---- Checkpoints of others -------------------------------------------------------------------


def checkpoint_maker(tmp_path):
  """What writes a case's directory, its config.json changed, its tensors edited."""
  import make_parity_goldens as cases
  import safetensors.numpy

  def write(name="llama", edit=None, **changes):
    directory = tmp_path / f"checkpoint{len(list(tmp_path.iterdir()))}"
    directory.mkdir()
    cases.write_case(name, directory)
    config = {key: value for key, value in (cases.CASES[name] | changes).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))
    if edit:
      tensors = safetensors.numpy.load_file(directory / "model.safetensors")
      edit(tensors)
      safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory

  return write


def assert_equal_trees(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)
  assert jax.tree.map(lambda x: x.dtype, left) == jax.tree.map(lambda x: x.dtype, right)


def tensors_of(directory):
  """All tensors of a directory, whatever its shards."""
  import safetensors.numpy

  files = sorted(directory.glob("*.safetensors"))
  return {name: array for file in files for name, array in safetensors.numpy.load_file(file).items()}
