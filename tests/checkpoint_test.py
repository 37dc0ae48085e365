"""The parameters that a run starts from: every door, and what does not fit."""

import dataclasses

import jax
import numpy as np
import pytest

from rredcot_jax.model import decoder, huggingface
from rredcot_jax.model.config import SIZES, ModelConfig
from rredcot_jax.parallel import sharding
from rredcot_jax.train import config as config_lib
from rredcot_jax.train import initial

MODEL = ModelConfig(vocab_size=11, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24)
KEY = jax.random.key(0)


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_every_door_gives_the_same_parameters(tmp_path):
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2)
  params = initial.start_params("", MODEL, mesh, KEY)
  same(params, decoder.init(MODEL, KEY))
  huggingface.save(MODEL, params, tmp_path / "directory")
  initial.save_params(params, tmp_path / "file.safetensors")
  for path in (tmp_path / "directory", tmp_path / "file.safetensors"):
    loaded = initial.start_params(str(path), MODEL, mesh, KEY)
    same(loaded, params)
    assert loaded["blocks"]["query"].sharding == params["blocks"]["query"].sharding
    assert len(loaded["blocks"]["query"].sharding.device_set) == 4


def test_another_model_is_named_field_by_field(tmp_path):
  huggingface.save(MODEL, decoder.init(MODEL, KEY), tmp_path)
  other = dataclasses.replace(MODEL, width=32, rope_theta=7.0)
  with pytest.raises(ValueError, match=r"width \(16 there, 32 configured\), rope_theta \(10000.0 there, 7.0 "):
    initial.start_params(str(tmp_path), other, sharding.make_mesh(), KEY)


def test_nothing_at_the_path_is_said():
  with pytest.raises(FileNotFoundError, match="no parameters at"):
    initial.start_params("nowhere/model", MODEL, sharding.make_mesh(), KEY)


@pytest.mark.parametrize("name", SIZES)
def test_a_model_known_by_name_passes_through_the_configuration(name):
  config = config_lib.default_config()
  config_lib.set_model(config, "Llama-3.2-1B")  # What another model left behind must not stay.
  config_lib.set_model(config, name)
  assert config_lib.model_config(config, 11) == SIZES[name]


def test_models_that_are_not_known_or_do_not_fit_are_named():
  config = config_lib.default_config()
  with pytest.raises(ValueError, match="Qwen3-4B"):
    config_lib.set_model(config, "Qwen3-4b")
  config_lib.set_model(config, "SmolLM2-135M")
  with pytest.raises(ValueError, match="the tokenizer has 50000 words and the model 49152"):
    config_lib.model_config(config, 50_000)
  config.rollout.max_tokens = 8192
  with pytest.raises(ValueError, match=r"= 8216 is more than model\.max_positions=8192"):
    config_lib.validate(config)
  config.rollout.max_tokens, config.mesh.sequence = 8000, 16
  with pytest.raises(ValueError, match=r"mesh\.sequence=16 does not divide .* = 8024: .* Add 8 to one of them"):
    config_lib.validate(config)
