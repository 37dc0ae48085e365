"""TRL's GRPO losses and their gradients on one ragged batch, for tests/losses_test.py.

    make peers
    .venv/bin/python tools/make_trl_goldens.py

This writes tests/data/trl/losses.npz. No model is run: `GRPOTrainer._compute_loss` is called on a
stub that has the attributes which it reads, and whose log-probabilities are a leaf of the graph. So
the arithmetic is TRL's own, with one exception. TRL computes the importance ratio between sampler and
trainer while it generates, so `importance_ratio` here repeats those lines.

Only the functions named after TRL need torch.
"""

import importlib.metadata
import importlib.util
import pathlib
import types
from typing import Any

import numpy as np

GOLDENS = pathlib.Path(__file__).parent.parent / "tests" / "data" / "trl" / "losses.npz"
VERSION = "1.16.0"
LENGTHS = (7, 1, 5, 8, 3, 6)
TOKENS, MAX_LENGTH, CAP = 8, 16, 1.25

_PPO = dict(epsilon_low=0.2, epsilon_high=0.28)
# TRL's options of each case, and ours for the same loss.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
  "grpo": (_PPO | dict(loss_type="grpo"), dict(loss="grpo", clip_low=0.2, clip_high=0.28)),
  "bnpo": (_PPO | dict(loss_type="bnpo"), dict(loss="dapo", clip_low=0.2, clip_high=0.28)),
  "dapo": (_PPO | dict(loss_type="dapo"), dict(loss="dapo", clip_low=0.2, clip_high=0.28)),
  "dr_grpo": (_PPO | dict(loss_type="dr_grpo"), dict(loss="dr_grpo", clip_low=0.2, clip_high=0.28)),
  "cispo": (dict(loss_type="cispo", epsilon_high=1.1), dict(loss="cispo", clip_low=1.0, clip_high=0.1)),
  "gspo": (
    dict(loss_type="grpo", importance_sampling_level="sequence", epsilon_low=0.03, epsilon_high=0.04),
    dict(loss="gspo", clip_low=0.03, clip_high=0.04),
  ),
}
for _name, (_theirs, _ours) in list(CASES.items()):
  CASES[f"{_name} kl"] = (_theirs | dict(beta=0.1), _ours | dict(kl="k3", kl_coefficient=0.1))
  if _name not in ("cispo", "gspo"):
    CASES[f"{_name} dual"] = (_theirs | dict(delta=1.4), _ours | dict(dual_clip=1.4))
  # GSPO with weights a token is another loss there: see the table in ops/losses.py.
  for _level in ("token", "sequence") if _name != "gspo" else ("sequence",):
    CASES[f"{_name} {_level} importance kl"] = (
      _theirs | dict(beta=0.1, importance=_level),
      _ours | dict(kl="k3", kl_coefficient=0.1, importance=_level, importance_cap=CAP),
    )


# ---- The batch: no torch -----------------------------------------------------------------------


def batch() -> dict[str, np.ndarray]:
  """Six traces, one with a hole; PCG64's raw stream is the same in all numpy versions."""
  raw = np.random.PCG64(20260601)
  draw = lambda *shape: (raw.random_raw(int(np.prod(shape))) >> np.uint64(11)).reshape(shape) * 2.0**-53
  shape = (len(LENGTHS), TOKENS)
  mask = np.arange(TOKENS) < np.array(LENGTHS)[:, None]
  mask[3, 2] = False
  old = -0.1 - 2 * draw(*shape)
  near = lambda spread: old + spread * (2 * draw(*shape) - 1)
  # One advantage a trace, because GSPO needs it. The other losses allow it.
  advantages = np.broadcast_to((3 * draw(len(LENGTHS), 1) - 1.5), shape)
  floats = dict(
    log_probs=near(0.6), old_log_probs=old, reference_log_probs=near(0.4), sampler_log_probs=near(0.3),
    advantages=advantages,
  )  # fmt: skip
  return {"mask": mask} | {name: x.astype(np.float32) for name, x in floats.items()}


def installed() -> str | None:
  """The version of TRL that is here with torch, or None."""
  if any(importlib.util.find_spec(name) is None for name in ("torch", "trl")):
    return None
  return importlib.metadata.version("trl")


def golden() -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Loss and gradient of each case, as kept."""
  with np.load(GOLDENS) as file:
    return {name: (file[f"{name}/loss"], file[f"{name}/gradient"]) for name in CASES}


# ---- TRL ---------------------------------------------------------------------------------------


def trl_loss(name: str) -> tuple[np.ndarray, np.ndarray]:
  """Loss [] and its gradient [B, T] with respect to the log-probabilities, by TRL."""
  import collections

  import torch
  from trl.trainer.grpo_trainer import GRPOTrainer

  options = dict(epsilon_low=0.2, beta=0.0, delta=None, importance_sampling_level="token", importance=None)
  options |= CASES[name][0]
  arrays = batch()
  tensors = {key: torch.from_numpy(value) for key, value in arrays.items()}
  log_probs = tensors["log_probs"].clone().requires_grad_(True)
  mask = tensors["mask"].float()
  scored = lambda *args, **kwargs: (log_probs, torch.zeros_like(log_probs), None)
  accelerator = types.SimpleNamespace(
    num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x, gather_for_metrics=lambda x: x
  )
  stub = types.SimpleNamespace(
    _get_per_token_logps_and_entropies=scored, aux_loss_enabled=False, top_entropy_quantile=1.0,
    off_policy_mask_threshold=None, importance_sampling_level=options["importance_sampling_level"],
    beta=options["beta"], loss_type=options["loss_type"], epsilon_low=options["epsilon_low"],
    epsilon_high=options["epsilon_high"], use_vllm=options["importance"] is not None,
    vllm_importance_sampling_correction=True, model=types.SimpleNamespace(training=True),
    current_gradient_accumulation_steps=1, max_completion_length=MAX_LENGTH, accelerator=accelerator,
    _entropy_bonus_enabled=False, _metrics={"train": collections.defaultdict(list)},
    args=types.SimpleNamespace(delta=options["delta"], use_bias_correction_kl=False, steps_per_generation=1),
  )  # fmt: skip
  ids = torch.zeros_like(mask, dtype=torch.long)
  inputs = dict(
    prompt_ids=ids[:, :1], prompt_mask=ids[:, :1] + 1, completion_ids=ids, completion_mask=mask,
    advantages=tensors["advantages"], old_per_token_logps=tensors["old_log_probs"],
    ref_per_token_logps=tensors["reference_log_probs"], num_items_in_batch=mask.sum(),
  )  # fmt: skip
  if options["importance"]:
    inputs["importance_sampling_ratio"] = importance_ratio(tensors, mask, options["importance"])
  loss = GRPOTrainer._compute_loss(stub, None, inputs)
  loss.backward()
  return loss.detach().numpy(), log_probs.grad.numpy()


def importance_ratio(tensors: dict[str, Any], mask: Any, level: str) -> Any:
  """TRL's modes token_truncate and sequence_truncate."""
  import torch

  difference = (tensors["old_log_probs"] - tensors["sampler_log_probs"]) * mask
  if level == "sequence":
    difference = difference.sum(dim=-1, keepdim=True)
  return torch.clamp(torch.exp(difference), max=CAP)


def main() -> None:
  if installed() is None:
    raise SystemExit("torch and trl are not installed here; the docstring says how.")
  kept: dict[str, np.ndarray] = {}
  for name in CASES:
    kept[f"{name}/loss"], kept[f"{name}/gradient"] = trl_loss(name)
  GOLDENS.parent.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(GOLDENS, **kept)
  print(f"TRL {installed()}: {len(CASES)} cases, {GOLDENS.stat().st_size} bytes in {GOLDENS}")


if __name__ == "__main__":
  main()
