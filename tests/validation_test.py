"""Configurations that no run may begin with, each named with its fix."""

import math
import re

import pytest
import tiny_config

from rredcot_jax.train import config as config_lib
from rredcot_jax.train import validation


def config_with(**options):
  config = tiny_config.get_config()
  config.update_from_flattened_dict(options)
  return config


def refused(options, message):
  with pytest.raises(ValueError, match=message):
    validation.validate(config_with(**options))


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("credit.bank", "sufix", "did you mean 'suffix'"),
    ("credit.mode", "diference", "did you mean 'difference'"),
    ("segmentation.method", "newlines", "did you mean 'newline'"),
    ("loss.name", "grp", "did you mean 'grpo'"),
    ("rollout.group_size", 1, "group_size=1 must be a whole number of at least 2"),
    ("num_steps", 0, "num_steps=0"),
    ("num_steps", True, "num_steps=True must be a whole number"),
    ("rollout.temperature", 0.0, "temperature=0.0 must be a finite number, above 0"),
    ("rollout.top_p", 1.1, "top_p=1.1 must be a finite number, above 0 and at most 1"),
    ("credit.floor", -0.1, "floor=-0.1 must be a finite number, at least 0 and at most 1"),
    ("credit.source", "my_package:Source", "my_package"),
    ("response.exit", " \n", "must hold more than white space"),
    ("response.answer", "%s and %s", "must hold '%s' once"),
  ],
)
def test_bad_option_is_named(key, value, message):
  refused({key: value}, message)


@pytest.mark.parametrize("name", validation._CHOICES)
def test_every_choice_is_checked_and_the_nearest_offered(name):
  first = validation._CHOICES[name][0][0]
  refused({name: first + "x"}, rf"{name}='{first}x' .*did you mean '{first}'")


@pytest.mark.parametrize("name", validation._WHOLE)
def test_every_count_has_a_least_and_a_most(name):
  least, most = validation._WHOLE[name]
  for wrong in (least - 1, most + 1):
    refused({name: wrong}, rf"{name}={wrong} must be a whole number of at least {least} and at most {most}")


@pytest.mark.parametrize("name", validation._NUMBERS)
def test_every_number_is_finite_and_in_its_range(name):
  low, high, closed = validation._NUMBERS[name]
  for wrong in (math.nan, math.inf, -math.inf, math.nextafter(low, -math.inf), math.nextafter(high, math.inf)):
    refused({name: wrong}, re.escape(f"{name}={wrong!r} must be a finite number"))
  if not closed:
    refused({name: low}, rf"{name}={low!r} must be a finite number, above {low:g}")


def leaves(tree, prefix=""):
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from leaves(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def test_no_number_and_no_choice_of_the_schema_is_left_unchecked():
  # RopeScaling checks its own; the others are texts that are anything, or names that another place resolves.
  elsewhere = ("model.rope_scaling.", "task.name", "evaluation.task.name", "credit.source")
  texts = ("tokenizer.path", "initial_params", "warm_start.initial_params", "response.exit", "response.answer")
  checked = {*validation._CHOICES, *validation._WHOLE, *validation._NUMBERS, *texts}
  for name, value in leaves(config_lib.default_config().to_dict()):
    assert isinstance(value, bool) or name in checked or name.startswith(elsewhere), name


@pytest.mark.parametrize("value", [math.nan, [1.0, math.inf], {"deeper": -math.inf}])
def test_options_of_classes_are_finite(value):
  """A NaN is not itself, so that a run with one could never be resumed."""
  for section in ("task", "credit"):
    config = tiny_config.get_config()
    config[section].options.mine = value
    with pytest.raises(ValueError, match=rf"{section}\.options\.mine.*must be a finite number"):
      validation.validate(config)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"mesh.data": -1, "mesh.fsdp": -1}, "mesh has more than one axis of -1"),
    ({"mesh.tensor": 0}, r"mesh\.tensor=0 must be at least 1"),
    ({"rollout_mesh.tensor": 0}, r"rollout_mesh\.tensor=0 must be at least 1"),
    ({"mesh.sequence": 4}, r"mesh\.sequence=4 does not divide .* = 74: .* Add 2 to one of them"),
    ({"model.max_positions": 73}, r"= 74 is more than model\.max_positions=73"),
    ({"compute.microbatches": 3}, "microbatches=3 does not divide the 16 rollouts of a step"),
    ({"loss.dual_clip": 1.0}, r"dual_clip=1\.0 must be above 1"),
    ({"loss.dual_clip": 3.0, "loss.name": "cispo"}, "cispo has no clipped objective"),
    ({"loss.kl": "off"}, r"kl_coefficient=0\.001 with loss\.kl='off' is read by nothing"),
    ({"advantages.baseline": "none"}, r"set advantages\.scale='none'"),
  ],
)
def test_keys_that_contradict_each_other_are_refused(options, message):
  refused(options, message)


# ---- Credit ------------------------------------------------------------------------------

ATTRIBUTION = {"credit.bank": "answer"}


def credit(source, mode, **options):
  return {"credit.source": source, "credit.mode": mode} | options


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"credit.source": "monte_karlo"}, "did you mean 'monte_carlo'"),
    (credit("value_head", "signed"), r"set credit\.mode='difference'"),
    (credit("attention", "signed"), r"set credit\.mode='magnitude'"),
    (credit("attention_rollout", "difference"), r"set credit\.mode='magnitude'"),
    (credit("gradient_x_input", "difference", **ATTRIBUTION), r"set credit\.options\.space='probability'"),
    (credit("integrated_gradients", "difference", **ATTRIBUTION), r"set credit\.options\.space='probability'"),
    (
      credit("leave_one_out", "difference", **ATTRIBUTION, **{"credit.options.space": "log"}),
      r"set credit\.options\.space='probability'",
    ),
    (credit("leave_one_out", "signed", **{"credit.bank": "suffix"}), r"set credit\.bank='answer'"),
    (credit("leave_one_out", "signed", **ATTRIBUTION, **{"credit.options.space": "logs"}), "did you mean 'log'"),
    ({"credit.state_baseline": False, "credit.mode": "signed"}, "has a baseline to leave out"),
    (
      credit("leave_one_out", "difference", **ATTRIBUTION, **{"credit.state_baseline": False}),
      "has a baseline to leave out",
    ),
    ({"credit.form": "self_normalised", "credit.bank": "suffix"}, "needs completions of zero utility"),
  ],
)
def test_illegitimate_combinations_are_refused(options, message):
  config = tiny_config.get_config()
  for name, value in options.items():
    if name.startswith("credit.options."):
      config.credit.options[name.rpartition(".")[2]] = value
    else:
      config.update_from_flattened_dict({name: value})
  with pytest.raises(ValueError, match=message):
    validation.validate(config)


def test_what_uniform_credit_does_not_read_is_not_refused():
  config = tiny_config.get_config("grpo")
  config.credit.update({"source": "value_head", "bank": "suffix"})
  validation.validate(config)
