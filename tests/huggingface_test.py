"""Checkpoints in and out: what is read is what was written, and what cannot be read is refused by name."""

import itertools
import json
import pathlib
import struct
import sys

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers
from helpers import assert_equal_trees, checkpoint_maker, tensors_of
from hypothesis import strategies as st

from rredcot_jax.data import tasks
from rredcot_jax.model import decoder, export, huggingface, huggingface_format
from rredcot_jax.model.config import SIZES, ModelConfig, RopeScaling
from rredcot_jax.model.tokenizer import end_ids, load_tokenizer
from rredcot_jax.parallel import sharding

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tools"))
import make_parity_goldens as cases

CHAIN_TOKENIZER = pathlib.Path(tasks.__file__).parent.parent / "assets" / "chain"


@pytest.fixture
def make(tmp_path):
  return checkpoint_maker(tmp_path)


# ---- Directories -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases.CASES)
def test_what_is_saved_is_what_was_loaded(name, make, tmp_path):
  config, params = huggingface.load(make(name))
  saved = tmp_path / "saved"
  export.save(config, params, saved, shard_bytes=10_000)
  written, weights = tensors_of(saved), tensors_of(make(name))
  assert len(list(saved.glob("*.safetensors"))) > 3 and set(written) == set(weights)
  for tensor, array in weights.items():
    np.testing.assert_array_equal(written[tensor], array, err_msg=tensor)
  again, params_again = huggingface.load(saved)
  assert again == config
  assert_equal_trees(params_again, params)
  shapes = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


def test_shards_are_filled_up_to_their_room(make, tmp_path):
  config, params = huggingface.load(make("qwen3"))
  sizes = {name: array.nbytes for name, array in tensors_of(make("qwen3")).items()}
  room = 2 * max(sizes.values())
  export.save(config, params, tmp_path / "saved", shard_bytes=room)
  index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == sum(sizes.values())
  held = {}
  for name, file in index["weight_map"].items():
    held.setdefault(file, []).append(sizes[name])
  shards = [held[file] for file in sorted(held)]
  assert len(shards) > 2 and max(map(sum, shards)) <= room
  assert all(sum(one) + following[0] > room for one, following in itertools.pairwise(shards))


def test_a_save_replaces_what_lies_there_and_is_none_before_its_end(make, monkeypatch):
  directory = make("llama")
  config, params = huggingface.load(directory)
  other = jax.tree.map(lambda x: x + 1, params)
  export.save(config, other, directory)  # Beside a model.safetensors, which would be read first.
  assert_equal_trees(huggingface.load(directory)[1], other)

  def interrupted(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(safetensors.numpy, "save_file", interrupted)
  with pytest.raises(KeyboardInterrupt):
    export.save(config, params, directory, shard_bytes=10_000)
  with pytest.raises(FileNotFoundError, match="no weights in"):
    huggingface.load(directory)


@pytest.mark.parametrize("name", cases.CASES)
def test_transformers_reads_our_config_as_its_own(name, make, tmp_path):
  source = make(name)
  export.save(*huggingface.load(source), tmp_path / "saved")
  theirs, ours = (transformers.AutoConfig.from_pretrained(path) for path in (source, tmp_path / "saved"))
  for field in ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps",
                "num_attention_heads", "num_key_value_heads", "tie_word_embeddings", "max_position_embeddings",
                "architectures", "hidden_act"):  # fmt: skip
    assert getattr(ours, field) == getattr(theirs, field), field
  default = lambda rope: {name: value for name, value in rope.items() if name != "type"}
  if name == "llama-yarn":  # Ours writes the defaults out.
    theirs.rope_parameters |= {"beta_fast": 32.0, "beta_slow": 1.0}
  assert default(ours.rope_parameters) == default(theirs.rope_parameters)


@pytest.mark.peers
@pytest.mark.parametrize("name", cases.CASES)
def test_to_transformers_and_back(name, make, tmp_path):
  source = make(name)
  config, params = huggingface.load(source)
  cases.torch_model(source).save_pretrained(tmp_path / "theirs")
  assert "rope_parameters" in json.loads((tmp_path / "theirs" / "config.json").read_text())
  read, theirs = huggingface.load(tmp_path / "theirs")
  assert read.rope_scaling == config.rope_scaling and read == config
  assert_equal_trees(theirs, params)
  export.save(config, params, tmp_path / "ours", shard_bytes=10_000)
  expected, found = (cases.torch_model(path).state_dict() for path in (source, tmp_path / "ours"))
  assert set(found) == set(expected)
  for tensor, array in expected.items():
    np.testing.assert_array_equal(found[tensor], array, err_msg=tensor)


def test_both_spellings_of_rope_mean_the_same(make):
  new = huggingface.load_config(make("qwen2-yarn"))
  options = dict(cases.CASES["qwen2-yarn"]["rope_parameters"])
  theta = options.pop("rope_theta")
  old = make("qwen2-yarn", rope_parameters=..., rope_theta=theta, rope_scaling=options)
  assert huggingface.load_config(old) == new
  assert new.rope_theta == 2e4 and new.rope_scaling == RopeScaling("yarn", 4.0, 512, 1.0, 4.0, 8.0, 2.0, 1.3)
  # The context is the model's own where yarn's options do not say.
  del options["original_max_position_embeddings"]
  assert huggingface.load_config(make("qwen2-yarn", rope_parameters=..., rope_scaling=options)).rope_scaling == (
    new.rope_scaling
  )


def test_of_two_spellings_of_rope_the_older_counts_as_in_transformers(make):
  other = {"type": "yarn", "factor": 3.0, "original_max_position_embeddings": 64}
  both = make("qwen2-yarn", rope_scaling=other)
  theirs = transformers.AutoConfig.from_pretrained(both).rope_parameters
  assert theirs["factor"] == 3.0 and cases.CASES["qwen2-yarn"]["rope_parameters"]["factor"] == 4.0
  assert huggingface.load_config(both).rope_scaling == RopeScaling("yarn", 3.0, 64)


@pytest.mark.parametrize("kind", huggingface_format.ARCHITECTURES)
def test_a_missing_field_means_what_transformers_takes_for_it(kind, tmp_path):
  sizes = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
  sizes |= {"intermediate_size": 96, "num_key_value_heads": 2, "model_type": kind, "use_sliding_window": False}
  (tmp_path / "config.json").write_text(json.dumps(sizes))
  ours = huggingface_format.parse_config(tmp_path / "config.json")
  theirs = transformers.AutoConfig.from_pretrained(tmp_path)
  assert (ours.norm_epsilon, ours.tied_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
  assert ours.head_dim == (getattr(theirs, "head_dim", None) or 64 // 4) == (128 if kind == "qwen3" else 16)
  assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.rope_scaling is None
  assert ours.max_positions == 0  # Not known, so nothing is refused for its length.


# What the fields that matter are in the published files.
PUBLISHED = {
  "DeepSeek-R1-Distill-Qwen-1.5B": {
    "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 1536, "intermediate_size": 8960,
    "max_position_embeddings": 131072, "max_window_layers": 21, "num_attention_heads": 12, "num_hidden_layers": 28,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000, "sliding_window": 4096,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_mrope": False, "use_sliding_window": False,
    "vocab_size": 151936,
  },
  "Qwen3-0.6B": {
    "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "num_attention_heads": 16,
    "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
    "vocab_size": 151936,
  },
  "Llama-3.2-1B": {
    "model_type": "llama", "attention_bias": False, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
    "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
  },
  "SmolLM2-135M": {
    "model_type": "llama", "attention_bias": False, "hidden_act": "silu", "hidden_size": 576,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
    "tie_word_embeddings": True, "vocab_size": 49152,
  },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_the_sizes_known_by_name(name, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
  assert huggingface_format.parse_config(tmp_path / "config.json") == SIZES[name]


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    ("llama", {"model_type": "mistral"}, "model_type='mistral'"),
    ("llama", {"model_type": ["llama"]}, "model_type=.'llama'."),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("llama", {"attention_bias": True}, "attention_bias=True"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config="),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("llama", {"sliding_window": 128}, "sliding_window=128"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("qwen3", {"layer_types": 2}, "layer_types"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE type 'linear'"),
    ("llama", {"rope_scaling": {"rope_type": {}, "factor": 2.0}}, "RoPE type {}"),
    ("llama", {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
    ("llama", {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}}, "mscale=0.7"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncate=False"),
    ("llama", {"rope_scaling": {"type": "yarn"}}, "'factor'"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor >= 1"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": "4"}}, "factor='4'"),
    ("llama", {"rope_scaling": {"type": "llama3", "factor": 2.0}}, "low_freq_factor"),
    ("llama", {"rope_scaling": "yarn"}, "RoPE options 'yarn'"),
    ("llama", {"rope_theta": 0}, "rope_theta=0"),
    ("llama", {"rope_theta": float("nan")}, "rope_theta=nan"),
    ("llama", {"hidden_size": ...}, "no 'hidden_size'"),
    ("llama", {"hidden_size": "32"}, "hidden_size='32'"),
    ("llama", {"hidden_size": 32.0}, "hidden_size=32.0"),
    ("llama", {"hidden_size": True}, "hidden_size=True"),
    ("llama", {"hidden_size": 10**30}, "hidden_size=1000"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers=0"),
    ("llama", {"vocab_size": -1}, "vocab_size=-1"),
    ("llama", {"num_key_value_heads": 3}, "num_kv_heads=3"),
    ("llama", {"head_dim": 7}, "head_dim=7"),
    ("llama", {"head_dim": ..., "hidden_size": 33}, "hidden_size=33"),
    ("qwen2", {"num_key_value_heads": ...}, "no 'num_key_value_heads'"),
    ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps='small'"),
    ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings='false'"),
    ("llama", {"max_position_embeddings": [512]}, "max_position_embeddings=.512."),
  ],
)
def test_what_the_decoder_does_not_cover_is_named(name, changes, message, make):
  directory = make(name, **changes)
  with pytest.raises(ValueError, match=message) as caught:
    huggingface.load(directory)
  assert str(directory / "config.json") in str(caught.value)


junk = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["yarn", "llama3"]),
  lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "factor", "rope_theta"]), inner),
  max_leaves=4,
)


@hypothesis.given(st.sampled_from(sorted(cases.CASES["qwen2-yarn"] | {"rope_scaling": 0, "layer_types": 0})), junk)
@hypothesis.settings(max_examples=300)
def test_any_value_of_any_field_is_taken_or_refused(tmp_path_factory, field, value):
  path = tmp_path_factory.getbasetemp() / "config.json"
  path.write_text(json.dumps(cases.CASES["qwen2-yarn"] | {field: value}))
  try:
    assert isinstance(huggingface_format.parse_config(path), ModelConfig)
  except ValueError as error:
    assert str(path) in str(error)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", "[" * 100_000, '{"hidden_size": ' + "9" * 5000 + "}"])
def test_a_config_that_is_no_json_object_is_named(text, tmp_path):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError, match=r"config\.json"):
    huggingface.load(tmp_path)


def test_a_forged_config_allocates_nothing(make):
  with pytest.raises(ValueError, match="and the config says"):
    huggingface.load(make(hidden_size=2**24, intermediate_size=2**24, num_hidden_layers=2))


NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (lambda t: t.pop(NAME), f"{NAME}' is missing"),
    (lambda t: t.update({NAME: t[NAME].T.copy()}), rf"{NAME}' is \(48, 32\) and the config says \(32, 48\)"),
    (lambda t: t.update({NAME: t[NAME].astype(np.int8)}), f"{NAME}' is stored as I8"),
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(32)}), "q_proj.bias' has no place"),
    (lambda t: t.update({"model.layers.2.mlp.down_proj.weight": t[NAME]}), "layers.2.mlp.down_proj.weight' has no"),
    (lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}), "lm_head.weight' differs"),
    (lambda t: t.update({"lm_head.weight": np.ones((3, 3))}), r"lm_head.weight' is \(3, 3\)"),
  ],
)
def test_a_wrong_tensor_is_named(edit, message, make):
  directory = make("llama", edit)
  with pytest.raises(ValueError, match=message) as caught:
    huggingface.load(directory)
  assert str(directory) in str(caught.value)


def test_an_untied_model_needs_its_head(make):
  with pytest.raises(ValueError, match=r"lm_head.weight' is missing \(1 of"):
    huggingface.load(make("qwen2", tie_word_embeddings=False))


def test_what_says_nothing_new_is_left_out(make):
  def edit(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

  config, params = huggingface.load(make("llama", edit))
  assert config.tied_embeddings and "head" not in params
  assert_equal_trees(params, huggingface.load(make("llama"))[1])


@pytest.fixture
def sharded(make, tmp_path):
  """A saved directory of several shards."""
  export.save(*huggingface.load(make("qwen3")), tmp_path / "sharded", shard_bytes=10_000)
  return tmp_path / "sharded"


def shard_of(directory):
  """One in the middle."""
  return sorted(directory.glob("model-*.safetensors"))[2]


def test_one_whole_file_counts_before_an_index_as_in_transformers(make):
  directory = make("llama")
  config, params = huggingface.load(directory)
  (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
  again, params_again = huggingface.load(directory)
  assert again == config
  assert_equal_trees(params_again, params)


def test_missing_files_are_named(sharded, tmp_path):
  for path, message in ((tmp_path / "none", "no checkpoint at"), (tmp_path, "config.json"), ("x.gguf", "x.gguf")):
    with pytest.raises(FileNotFoundError, match=message):
      huggingface.load(path)
  shard = shard_of(sharded)
  shard.unlink()
  with pytest.raises(FileNotFoundError, match=rf"index.json names the shard '{shard.name}'"):
    huggingface.load(sharded)
  (sharded / "model.safetensors.index.json").unlink()  # As an interrupted save leaves it.
  with pytest.raises(FileNotFoundError, match="no weights in"):
    huggingface.load(sharded)


def test_a_tensor_that_is_not_where_the_index_says_is_named(sharded):
  shard = shard_of(sharded)
  tensors = safetensors.numpy.load_file(shard)
  name = sorted(tensors)[0]
  index = sharded / "model.safetensors.index.json"
  placed = json.loads(index.read_text())["weight_map"]
  other = next(tensor for tensor, file in placed.items() if file != shard.name)
  swapped = {name: placed[other], other: shard.name}
  index.write_text(json.dumps({"weight_map": swapped | {t: f for t, f in placed.items() if t not in swapped}}))
  with pytest.raises(ValueError, match=rf"{placed[other]}: tensor '{name}' is missing, though"):
    huggingface.load(sharded)
  index.write_text(json.dumps({"weight_map": placed}))
  del tensors[name]
  safetensors.numpy.save_file(tensors, shard)
  with pytest.raises(ValueError, match=rf"{shard.name}: tensor '{name}' is missing"):
    huggingface.load(sharded)


@pytest.mark.parametrize("placed", [{}, [], None, {"a": 1}, {"a": ""}, {"a": ".."}, {"a": "../x"}, {"a": "/etc/x"},
                                    {"a": "\x1b[2J.safetensors"}])  # fmt: skip
def test_an_index_names_files_beside_it(placed, sharded):
  (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
  with pytest.raises(ValueError, match=r"index\.json: 'weight_map'"):
    huggingface.load(sharded)


@pytest.mark.parametrize("kept", [0, 5, 200, 0.5, -1])
def test_a_truncated_shard_is_named(kept, sharded):
  shard = shard_of(sharded)
  data = shard.read_bytes()
  shard.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
  with pytest.raises(ValueError, match=rf"{shard.name} is not a whole safetensors file"):
    huggingface.load(sharded)


def safetensors_file(header, size=0):
  """A safetensors file of a header as text and `size` bytes of zeros."""
  return struct.pack("<Q", len(header)) + header.encode() + b"\0" * size


def stated(begin, end, shape=(2,)):
  return json.dumps({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]})


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (safetensors_file(f'{{"a": {stated(0, 8)}, "a": {stated(8, 16)}}}', 16), "is not a whole safetensors file"),
    (safetensors_file(f'{{"a": {stated(0, 8)}, "b": {stated(4, 12)}}}', 12), "is not a whole safetensors file"),
    (safetensors_file(f'{{"a": {stated(0, 8)}, "b": {stated(12, 20)}}}', 20), "is not a whole safetensors file"),
    (safetensors_file(f'{{"a": {stated(0, 8, (2**40, 2**40))}}}', 8), "is not a whole safetensors file"),
    (safetensors_file("[" * 10_000), "is not a whole safetensors file"),
    (safetensors_file(" " * (2**24 + 1)), "its header has 16777217 bytes; at most 16777216"),
  ],
)
def test_a_forged_shard_is_named(data, message, sharded):
  shard = shard_of(sharded)
  shard.write_bytes(data)
  with pytest.raises(ValueError, match=rf"{shard.name}:? {message}"):
    huggingface.load(sharded)


def test_a_checkpoint_of_a_million_tensors_is_refused_before_they_are_looked_at(sharded, monkeypatch):
  names = sum(len(safetensors.numpy.load_file(path)) for path in sharded.glob("*.safetensors"))
  monkeypatch.setattr(huggingface, "_MOST_TENSORS", names)
  huggingface.load(sharded)
  monkeypatch.setattr(huggingface, "_MOST_TENSORS", names - 1)
  with pytest.raises(ValueError, match=f"safetensors: the checkpoint has more than {names - 1} tensors"):
    huggingface.load(sharded)


def test_an_index_names_no_more_files_than_can_be_open(sharded, monkeypatch):
  shards = len(list(sharded.glob("*.safetensors")))
  monkeypatch.setattr(huggingface, "_MOST_SHARDS", shards)
  huggingface.load(sharded)
  monkeypatch.setattr(huggingface, "_MOST_SHARDS", shards - 1)
  with pytest.raises(ValueError, match=rf"index\.json names {shards} files; at most {shards - 1}"):
    huggingface.load(sharded)


def test_a_tensor_in_two_shards_is_named(sharded):
  first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
  tensors = safetensors.numpy.load_file(first)
  safetensors.numpy.save_file(tensors | safetensors.numpy.load_file(second), second)
  with pytest.raises(ValueError, match=rf"{second.name}: tensor '{sorted(tensors)[0]}' is also in '{first.name}'"):
    huggingface.load(sharded)


@pytest.mark.parametrize(("name", "most"), [("config.json", 2**20), ("model.safetensors.index.json", 2**25)])
def test_a_json_file_too_large_is_not_read(name, most, sharded):
  with (sharded / name).open("a") as file:
    file.truncate(most + 1)
  with pytest.raises(ValueError, match=rf"{name} has {most + 1} bytes; at most {most} are read"):
    huggingface.load(sharded)


def test_storage_and_memory_have_their_own_types(make, tmp_path):
  config, params = huggingface.load(make("qwen2"))
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  export.save(config, rounded, tmp_path / "bf16")
  assert {array.dtype.name for array in tensors_of(tmp_path / "bf16").values()} == {"bfloat16"}
  assert json.loads((tmp_path / "bf16" / "config.json").read_text())["torch_dtype"] == "bfloat16"
  assert_equal_trees(huggingface.load(tmp_path / "bf16")[1], jax.tree.map(lambda x: x.astype(jnp.float32), rounded))
  assert_equal_trees(huggingface.load(tmp_path / "bf16", dtype=jnp.bfloat16)[1], rounded)
  assert_equal_trees(huggingface.load(make("qwen2"), dtype=jnp.bfloat16)[1], rounded)


@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"data": 2, "tensor": 2}])
def test_a_mesh_of_four_holds_the_same(axes, make, tmp_path):
  source = make("qwen2-untied")
  config, params = huggingface.load(source)
  mesh = sharding.make_mesh(**{"data": 1, **axes})
  placed = huggingface.load(source, mesh=mesh)[1]
  assert_equal_trees(placed, params)
  wanted = sharding.infer(mesh, params)
  jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim) or pytest.fail(f"{place}"), placed, wanted)
  assert not placed["blocks"]["gate"].sharding.is_fully_replicated
  export.save(config, placed, tmp_path / "saved")
  assert_equal_trees(huggingface.load(tmp_path / "saved")[1], params)


def ends_of(directory):
  return json.loads((directory / "generation_config.json").read_text())["eos_token_id"]


def test_every_token_that_ends_a_text_is_kept(make, tmp_path):
  source = make("qwen2")
  model = huggingface.load(source)
  tokenizer = load_tokenizer(CHAIN_TOKENIZER)
  save = lambda name, **options: export.save(*model, tmp_path / name, **options)
  save("none")
  assert not (tmp_path / "none" / "generation_config.json").exists()
  save("own", tokenizer=tokenizer)
  save("more", tokenizer=tokenizer, end_ids=(1, 3))
  save("ids", end_ids=(3,))
  assert (ends_of(tmp_path / "own"), ends_of(tmp_path / "more"), ends_of(tmp_path / "ids")) == (1, [1, 3], 3)
  (source / "generation_config.json").write_text('{"eos_token_id": [4, 1], "top_p": 0.9, "pad_token_id": 7}')
  save("all", tokenizer=tokenizer, companions=source, end_ids=(3,))
  read = transformers.GenerationConfig.from_pretrained(tmp_path / "all")
  assert (read.eos_token_id, read.top_p, read.pad_token_id) == ([1, 4, 3], 0.9, 7)
  assert end_ids(load_tokenizer(tmp_path / "all"), tmp_path / "all") == (1, 4, 3)


def test_companions_are_taken_over_but_for_the_dtype(make, tmp_path):
  source = make("llama", torch_dtype="bfloat16", dtype="bfloat16", bos_token_id=7)
  (source / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
  (source / "chat_template.jinja").write_text("{{ messages }}")
  config, params = huggingface.load(source)
  export.save(config, params, tmp_path / "saved", companions=source)
  assert (tmp_path / "saved" / "chat_template.jinja").read_text() == "{{ messages }}"
  saved = json.loads((tmp_path / "saved" / "config.json").read_text())
  # Else transformers would round float32 tensors to what the original was stored in.
  assert (saved["bos_token_id"], saved["torch_dtype"]) == (7, "float32") and "dtype" not in saved
  assert ends_of(tmp_path / "saved") == [2, 3]
  export.save(config, params, source, companions=source)  # Over itself.
  assert_equal_trees(huggingface.load(source)[1], params)
  with pytest.raises(ValueError, match=r"config\.json describes another model"):
    export.save(config, params, tmp_path / "other", companions=make("qwen2"))
  assert not (tmp_path / "other").exists()


def test_the_tokenizers_special_tokens_go_into_the_config(make, tmp_path):
  tokenizer = load_tokenizer(CHAIN_TOKENIZER)
  export.save(*huggingface.load(make("qwen2")), tmp_path / "saved", tokenizer=tokenizer)
  read = transformers.AutoConfig.from_pretrained(tmp_path / "saved")
  assert (read.eos_token_id, read.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
  assert load_tokenizer(tmp_path / "saved").get_vocab() == tokenizer.get_vocab()


def test_a_model_of_no_architecture_is_refused(tmp_path):
  config = ModelConfig(11, 8, 1, 2, 1, 4, 8, qkv_bias=True, qk_norm=True)
  with pytest.raises(ValueError, match="both qk_norm and qkv_bias"):
    export.save(config, decoder.init(config, jax.random.key(0)), tmp_path)
