"""Sources by name: what is built in, one of the user's own, options that are not there, and what a batch holds."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_config

from rredcot_jax.credit import attention, attribution, source, sources
from rredcot_jax.train import validation
from rredcot_jax.train.experiment import Experiment


class Last(source.Source):
  """All credit to the last segment: what a module of the user's holds."""

  modes = ("signed",)

  def __init__(self, setting, *, strength=1.0):
    super().__init__(setting)
    self.strength = strength

  def assign(self, batch):
    last = np.arange(batch.segments.ends.shape[1]) == np.asarray(batch.segments.num_segments)[:, None] - 1
    return source.Found(rewards=self.strength * last.astype(np.float32))


NO_SOURCE = "neither a class nor a source"


def config_with(name, mode, **options):
  config = tiny_config.get_config("grpo")
  config.credit.update({"source": name, "mode": mode, "bank": "answer"})
  for option, value in options.items():
    config.credit.options[option] = value
  return config


def test_every_named_class_of_the_package_is_built_in():
  assert set(sources.SOURCES) == {
    "scoring", "monte_carlo", "leave_one_out", "gradient_x_input", "integrated_gradients", "attention",
    "attention_rollout", "value_head", "calibrated",
  }  # fmt: skip
  for name, kind in sources.SOURCES.items():
    assert sources.source_class(name) is kind and kind.name == name
    assert set(kind.needs) <= {"bank", "cache", "state", "verifier"}
  attributions = {name for name, kind in sources.SOURCES.items() if issubclass(kind, attribution.Attribution)}
  assert len(attributions) == 5
  assert not any(sources.SOURCES[name].estimates_values for name in attributions)
  assert all(sources.SOURCES[name].estimates_values for name in sources.SOURCES.keys() - attributions)


def test_a_class_without_a_name_of_its_own_is_not_built_in(monkeypatch):
  nameless = type("Nameless", (attention.Attention,), {})
  monkeypatch.setattr(attention, "Nameless", nameless, raising=False)
  assert sources._built_in() == sources.SOURCES


def test_a_class_of_ones_own_is_found_given_its_options_and_held_to_its_modes():
  experiment = Experiment(config_with("sources_test:Last", "signed", strength=3.0))
  assert type(experiment.source).__name__ == "Last" and experiment.source.strength == 3.0
  assert experiment.source.setting is experiment.setting
  with pytest.raises(ValueError, match=r"its credit has no meaning as 'difference'; set credit\.mode='signed'"):
    validation.validate(config_with("sources_test:Last", "difference"))


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("leave_one", "did you mean 'leave_one_out'"),
    ("scorring", "did you mean 'scoring'"),
    ("sources_test:Lst", "Lst"),
    ("no_such_module:Source", "no_such_module"),
    ("sources_test:NO_SOURCE", "'sources_test:NO_SOURCE' is a str and must be a callable"),
    ("collections:Counter", "is no subclass of rredcot_jax.credit.source.Source"),
  ],
)
def test_what_is_no_source_is_named(name, message):
  with pytest.raises(ValueError, match=message):
    sources.source_class(name)


@pytest.mark.parametrize(
  ("name", "mode", "options", "message"),
  [
    ("monte_carlo", "signed", {"sample": 3}, "credit.options of 'monte_carlo'.*'sample'.*did you mean 'samples'"),
    ("scoring", "signed", {"samples": 3}, r"credit\.options\.samples: credit\.source='scoring' has no options"),
    ("monte_carlo", "signed", {"samples": 0}, r"credit\.options\.samples=0 must be at least 1"),
    ("monte_carlo", "signed", {"workers": 0}, r"credit\.options\.workers=0 must be at least 1"),
    ("integrated_gradients", "signed", {"steps": 0}, r"credit\.options\.steps=0 must be at least 1"),
    ("value_head", "difference", {"decay": 1.5}, r"credit\.options\.decay=1\.5 must be in \[0, 1\]"),
    ("value_head", "difference", {"updates_per_rollout": 0}, r"credit\.options\.updates_per_rollout=0 must be at"),
    ("value_head", "difference", {"learning_rate": 0.0}, r"credit\.options\.learning_rate=0\.0 must be a finite"),
    ("sources_test:Last", "signed", {"strenght": 1.0}, "did you mean 'strength'"),
  ],
)
def test_options_that_a_source_does_not_take_are_named(name, mode, options, message):
  config = config_with(name, mode, **options)
  with pytest.raises(ValueError, match=message):
    _ = Experiment(config).source


def test_options_reach_the_source():
  monte_carlo = Experiment(config_with("monte_carlo", "signed", samples=5, workers=2)).source
  assert (monte_carlo._samples, monte_carlo._workers) == (5, 2)
  head = Experiment(config_with("value_head", "difference", initial_value=0.25, decay=0.5)).source
  assert float(head.init_state().head.bias) == 0.25 and head._decay == 0.5


def test_a_bank_holds_what_its_options_say():
  config = config_with("scoring", "signed")
  config.credit.update({"bank": "rollouts", "max_completion_tokens": 9, "form": "truncated", "fallback": "solution"})
  config.credit.update({"scored": "body", "chunk_size": 3})
  setting = Experiment(config).setting
  expected = source.BankOptions("rollouts", max_tokens=9, form="truncated", scored="body", fallback="solution")
  assert setting.bank == expected and setting.chunk_size == 3 and setting.temperature == 1.0
  config.credit.chunk_size = 0
  assert Experiment(config).setting.chunk_size is None


def test_continuations_end_and_are_sampled_as_traces_are():
  setting = Experiment(config_with("monte_carlo", "signed")).setting
  codec = dataclasses.replace(setting.codec, end_ids=(3, 5))
  setting = dataclasses.replace(setting, codec=codec, sampling={"max_tokens": 7, "temperature": 0.5, "top_k": 2})
  expected = {"max_tokens": 7, "temperature": 0.5, "top_k": 2, "eos_id": (3, 5), "pad_id": codec.pad_id}
  assert setting.generation == expected and setting.temperature == 0.5


def test_a_batch_reads_its_rows_once(monkeypatch):
  fetched = []
  device_get = jax.device_get
  monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(tree) or device_get(tree))
  whole = source.Batch({}, None, "rollout", "segments", np.zeros(4), [None] * 4, None)
  assert whole.rows.tolist() == [0, 1, 2, 3]
  assert (whole.rollout_here, whole.segments_here, whole.rollout_here) == ("rollout", "segments", "rollout")
  assert fetched == [("rollout", "segments")]
  # Of several processes each reads its own rows, which are on the host already.
  share = dataclasses.replace(whole, here=np.array([2, 3]), on_host=("my rollout", "my segments"))
  assert share.rows.tolist() == [2, 3] and share.rollout_here == "my rollout" and share.segments_here == "my segments"
  assert len(fetched) == 1
