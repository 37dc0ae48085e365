"""The schema: every key is set by somebody, a misspelt one is answered with the nearest, models are known by name."""

import ast
import dataclasses
import functools
import pathlib

import pytest

from rredcot_jax.model.config import SIZES, ModelConfig, RopeScaling
from rredcot_jax.train import config as config_lib
from rredcot_jax.train.experiment import model_config

ROOT = pathlib.Path(__file__).parent.parent


def leaves(tree, prefix=""):
  for name, value in tree.items():
    if isinstance(value, dict) and value:
      yield from leaves(value, f"{prefix}{name}.")
    elif not isinstance(value, dict):
      yield prefix + name


def schema():
  config = config_lib.default_config()
  config_lib.add_study(config)
  return list(leaves(config.to_dict()))


def dotted(node):
  """`config.a.b` -> ["config", "a", "b"]; [] for anything else."""
  names = []
  while isinstance(node, ast.Attribute):
    names.append(node.attr)
    node = node.value
  return [node.id, *reversed(names)] if isinstance(node, ast.Name) else []


def keys_set_in(path):
  """The dotted names that a file assigns, updates or overrides, as far as its text tells.

  `config.a.b = 1`, `study.b = 1`, `config.a.update(b=1)` or `({"b": 1})`, `{"a.b": 1}` or `("a.b", 1)`, and the
  command line's `--config.a.b=1`. Names that stand for a part of the configuration lose their first name.
  """
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Assign | ast.AugAssign):
      targets = node.targets if isinstance(node, ast.Assign) else [node.target]
      for target in (one for t in targets for one in (t.elts if isinstance(t, ast.Tuple) else [t])):
        found.add(".".join(dotted(target)[1:]))
        if dotted(target)[:1] == ["study"]:
          found.add(".".join(dotted(target)))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "update":
      section = ".".join(dotted(node.func.value)[1:])
      given = [keyword.arg for keyword in node.keywords]
      for argument in node.args:
        found_in = [one for one in ast.walk(argument) if isinstance(one, ast.Dict)]
        given += [key.value for one in found_in for key in one.keys if isinstance(key, ast.Constant)]
      found |= {f"{section}.{name}" for name in given}
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
      found.add(node.value.removeprefix("--config.").partition("=")[0])
  return found


@functools.cache
def keys_set():
  folders = ("configs", "benchmarks", "tests")
  # What is only ever refused is set by nobody.
  left_out = {pathlib.Path(__file__).name, "validation_test.py"}
  files = [path for folder in folders for path in (ROOT / folder).glob("*.py") if path.name not in left_out]
  return set.union(*map(keys_set_in, files))


@pytest.mark.parametrize("key", [key for key in schema() if not key.startswith("model.")])
def test_every_key_is_set_by_somebody(key):
  assert key in keys_set(), f"config.{key} is set by no configuration, benchmark or test: make it a function's default."


def test_the_model_section_is_what_a_model_is_made_of():
  names = lambda kind: {field.name for field in dataclasses.fields(kind)}
  config = config_lib.default_config()
  assert set(config.model) == names(ModelConfig) - {"compute"}
  assert set(config.model.rope_scaling) == names(RopeScaling)


def test_the_default_is_grpo_as_published_and_nothing_else_is_on():
  config = config_lib.default_config()
  assert config.rollout.to_dict().items() >= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}.items()
  assert config.advantages.to_dict() == {"baseline": "mean", "scale": "std"} and config.credit.mode == "uniform"
  assert config.credit.floor == 0 and config.credit.state_baseline and config.credit.initial_value == "baseline"
  assert config.loss.to_dict() == {
    "name": "grpo", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 0.0, "kl": "off", "kl_coefficient": 0.0,
    "mask_truncated": False, "non_finite": "stop", "updates_per_rollout": 1,
  }  # fmt: skip
  assert config.optimizer.weight_decay == 0 and config.compute.dtype == "float32"


def test_unknown_key_offers_the_nearest():
  config = config_lib.default_config()
  with pytest.raises((AttributeError, KeyError), match='Did you mean "learning_rate"'):
    config.optimizer.learning_rat = 1.0
  config_lib.add_study(config)
  with pytest.raises((AttributeError, KeyError), match='Did you mean "truth_samples"'):
    config.study.truth_sample = 1


def test_options_of_classes_take_any_key_with_and_without_a_study():
  config = config_lib.default_config()
  for _ in range(2):
    config.task.options.mine = config.credit.options.mine = config.evaluation.task.options.mine = 1
    config_lib.add_study(config)


@pytest.mark.parametrize("name", SIZES)
def test_a_model_known_by_name_passes_through_the_configuration(name):
  config = config_lib.default_config()
  config_lib.set_model(config, "Llama-3.2-1B")  # What another model left behind must not stay.
  config_lib.set_model(config, name)
  assert model_config(config, 11) == SIZES[name]


def test_a_model_that_is_not_known_is_answered_with_the_nearest():
  with pytest.raises(ValueError, match="did you mean 'Qwen3-4B'"):
    config_lib.set_model(config_lib.default_config(), "Qwen3-4b")


def test_the_tokenizers_vocabulary_serves_where_none_is_configured():
  config = config_lib.default_config()
  assert model_config(config, 11).vocab_size == 11
  config.model.vocab_size = 12
  assert model_config(config, 11).vocab_size == 12


def test_options_of_an_argument():
  allowed = {"method": ("a", "b"), "bank": ("c", "d")}
  read = lambda arg: config_lib.options_of(arg, allowed)
  assert read("") == {"method": "a", "bank": "c"}
  assert read("b") == read("method=b") == {"method": "b", "bank": "c"}
  assert read("bank=d") == {"method": "a", "bank": "d"}
  assert read("b,bank=d") == read("bank=d,method=b") == {"method": "b", "bank": "d"}
  for wrong, message in (
    ("e", "method='e' is unknown"), ("b,d", "'d'"), ("bnk=d", "did you mean 'bank'"), ("bank=dd", "did you mean 'd'"),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=message):
      read(wrong)
