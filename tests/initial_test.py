"""The parameters that a run starts from: every door, and what does not fit."""

import dataclasses
import json
import pathlib
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rredcot_jax.model import decoder, export
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.parallel import sharding
from rredcot_jax.train import initial

MODEL = ModelConfig(vocab_size=11, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24)
KEY = jax.random.key(3)


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_every_door_gives_the_same_parameters(tmp_path):
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2)
  params = initial.start_params("", MODEL, mesh, KEY)
  same(params, decoder.init(MODEL, KEY))
  export.save(MODEL, params, tmp_path / "directory")
  initial.save_params(params, tmp_path / "file.safetensors")
  for path in (tmp_path / "directory", tmp_path / "file.safetensors"):
    loaded = initial.start_params(str(path), MODEL, mesh, KEY)
    same(loaded, params)
    assert loaded["blocks"]["query"].sharding == params["blocks"]["query"].sharding
    assert len(loaded["blocks"]["query"].sharding.device_set) == 4


def test_another_model_is_named_field_by_field(tmp_path):
  export.save(MODEL, decoder.init(MODEL, KEY), tmp_path)
  other = dataclasses.replace(MODEL, width=32, rope_theta=7.0)
  with pytest.raises(ValueError, match=r"width \(16 there, 32 configured\), rope_theta \(10000.0 there, 7.0 "):
    initial.start_params(str(tmp_path), other, sharding.make_mesh(), KEY)


def test_nothing_at_the_path_is_said():
  with pytest.raises(FileNotFoundError, match="no parameters at"):
    initial.start_params("nowhere/model", MODEL, sharding.make_mesh(), KEY)


def test_half_written_parameters_are_named(tmp_path):
  path = tmp_path / "half.safetensors"
  initial.save_params({"a": np.ones((4, 4), np.float32)}, path)
  wrong = {"a": jax.ShapeDtypeStruct((4, 5), np.float32)}
  with pytest.raises(ValueError, match=r"tensor 'a' is \(4, 4\) and the model needs \(4, 5\)"):
    initial.load_params(path, wrong)
  with pytest.raises(ValueError, match="no tensor 'b'"):
    initial.load_params(path, {"b": wrong["a"]})
  path.write_bytes(path.read_bytes()[:-8])
  with pytest.raises(ValueError, match=r"half\.safetensors is not a whole safetensors file"):
    initial.load_params(path, wrong)
  with pytest.raises(FileNotFoundError, match="nowhere"):
    initial.load_params("nowhere.safetensors", wrong)


def test_parameters_in_the_file_stay_until_new_ones_are_whole(tmp_path, monkeypatch):
  path = tmp_path / "a.safetensors"
  initial.save_params({"a": np.ones(3, np.float32)}, path)

  def full(tensors, where):
    pathlib.Path(where).write_bytes(b"half")
    raise OSError("No space left on device")

  monkeypatch.setattr(safetensors.numpy, "save_file", full)
  with pytest.raises(OSError, match="No space left"):
    initial.save_params({"a": np.zeros(3, np.float32)}, path)
  # A file may hold another type than the model's.
  for dtype in (np.float32, np.float16):
    found = initial.load_params(path, {"a": jax.ShapeDtypeStruct((3,), dtype)})["a"]
    assert found.dtype == dtype and (found == 1).all()
  assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


def tensors_file(names, pad=0):
  """A safetensors file of empty tensors; `pad` spaces follow its header."""
  tensor = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
  header = json.dumps(dict.fromkeys(names, tensor)) + " " * pad
  return struct.pack("<Q", len(header)) + header.encode()


def test_a_file_of_unbounded_cost_is_refused_before_it_is_read(tmp_path):
  path, wanted = tmp_path / "large.safetensors", {"a": jax.ShapeDtypeStruct((4, 5), np.float32)}
  path.write_bytes(tensors_file(["a"], pad=2**24))
  with pytest.raises(ValueError, match=r"large\.safetensors: its header has \d+ bytes; at most 16777216"):
    initial.load_params(path, wanted)
  path.write_bytes(tensors_file([f"\x1b[31m{i}" for i in range(10_000)]))
  with pytest.raises(ValueError, match=r"no tensor 'a'; it holds \\x1b\[31m0, .* more characters") as caught:
    initial.load_params(path, wanted)
  assert str(caught.value).isprintable() and len(str(caught.value)) < 1_000


def test_a_name_is_a_path_first_and_what_the_package_ships_else(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  shipped = initial.locate("chain/warm_start.safetensors")
  assert shipped.is_file() and shipped.parent.parent.name == "assets"
  (tmp_path / "chain").mkdir()
  (tmp_path / "chain" / "warm_start.safetensors").touch()
  assert initial.locate("chain/warm_start.safetensors") == pathlib.Path("chain/warm_start.safetensors")
  assert initial.locate("chain/other") == pathlib.Path("chain/other")
  assert initial.locate("/chain") == pathlib.Path("/chain")


def test_parameters_take_the_type_that_is_asked_for(tmp_path):
  initial.save_params(decoder.init(MODEL, KEY), tmp_path / "file.safetensors")
  export.save(MODEL, decoder.init(MODEL, KEY), tmp_path / "directory")
  for path in ("", str(tmp_path / "file.safetensors"), str(tmp_path / "directory")):
    params = initial.start_params(path, MODEL, sharding.make_mesh(), KEY, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
