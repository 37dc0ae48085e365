"""Tunix's GRPO with RREDCoT's credit, on the CPU: a tiny Qwen3 of random weights learns to add.

    pip install 'rredcot-jax[tunix]'
    python examples/tunix_grpo.py

A prompt is two digits below 5, such as "3+4=". A response is up to six characters, and is right if the last one is
their sum modulo 5. Lines are segments. The bank is the right digit. (Tunix trains no end token, so none is asked for.)
The last line is one JSON object: the mean reward of the first and of the last five steps, steps, and seconds.
"""

import argparse
import functools
import json
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.rl import rl_cluster as clusters
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

import rredcot_jax as rr
from rredcot_jax.integrations.tunix import RREDCoTLearner

VOCABULARY = "_$01234+=\n"  # The first is padding, the second the end.
PAD, EOS = 0, 1
QUESTIONS = [(a, b) for a in range(5) for b in range(5)]
LENGTH, GROUP = 6, 8


class Characters:
  """A tokenizer as Tunix needs it: a token for each character."""

  def encode(self, text: str) -> list[int]:
    return [VOCABULARY.index(character) for character in text]

  def decode(self, ids: list[int]) -> str:
    return "".join(VOCABULARY[i] for i in ids)

  def bos_id(self) -> int:
    return PAD  # There is none. Tunix puts it before a prompt, and takes it for padding.

  def eos_id(self) -> int:
    return EOS

  def pad_id(self) -> int:
    return PAD


def tiny_qwen3(seed: int = 0) -> qwen3.Qwen3:
  config = qwen3.ModelConfig(
    num_layers=2, vocab_size=len(VOCABULARY), embed_dim=64, hidden_dim=256, num_heads=4, head_dim=16, num_kv_heads=2,
    rope_theta=1_000_000, norm_eps=1e-6, use_tied_embedding=False,
  )  # fmt: skip
  model = qwen3.Qwen3(config, rngs=nnx.Rngs(seed))
  # Tunix makes the weights of the MLPs 0, where no gradient would move them.
  draw = nnx.initializers.lecun_normal()
  for n, layer in enumerate(model.layers):
    for m, part in enumerate((layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)):
      part.kernel.value = draw(jax.random.fold_in(jax.random.key(seed), 3 * n + m), part.kernel.value.shape)
  return model


def reward(prompts, completions, answer, **_) -> list[float]:
  """1 where a response ends with the right digit."""
  return [float(text.endswith(str(digit))) for text, digit in zip(completions, answer)]


def references(batch) -> list[rr.Reference]:
  return [rr.Reference(steps=[], exit=[], answer=[VOCABULARY.index(str(digit))]) for digit in batch["answer"]]


def make_learner(steps: int, reward_fn=reward, **config) -> RREDCoTLearner:
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
  cluster = clusters.RLCluster(
    actor=tiny_qwen3(),
    tokenizer=Characters(),
    cluster_config=clusters.ClusterConfig(
      role_to_mesh=dict.fromkeys((clusters.Role.ACTOR, clusters.Role.REFERENCE, clusters.Role.ROLLOUT), mesh),
      training_config=clusters.RLTrainingConfig(
        actor_optimizer=optax.adam(5e-4), eval_every_n_steps=10**9, max_steps=steps
      ),
      rollout_config=base_rollout.RolloutConfig(
        max_tokens_to_generate=LENGTH, max_prompt_length=8, kv_cache_size=32, temperature=1.0
      ),
    ),
  )
  cut = functools.partial(rr.segment, tables=rr.vocab_tables(VOCABULARY, keywords=[]), method="newline", k_max=4)
  return RREDCoTLearner(
    cluster,
    grpo_learner.GRPOConfig(num_generations=GROUP, beta=0.0, **config),
    reward_fn,
    references=references,
    cut=cut,
    bank={"name": "answer", "max_tokens": 2},
    credit={"mode": "difference"},
  )


def data(steps: int):
  """Columns of a batch are arrays, because Tunix repeats their rows for a group."""
  prompts, answers = [f"{a}+{b}=" for a, b in QUESTIONS], [(a + b) % 5 for a, b in QUESTIONS]
  for _ in range(steps):
    yield {"prompts": np.array(prompts), "answer": np.array(answers)}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--steps", type=int, default=80, help="policy updates, each on 25 questions x 8 responses")
  steps = parser.parse_args().steps
  began, rewards = time.perf_counter(), []

  def watched(prompts, completions, **columns) -> list[float]:
    found = reward(prompts, completions, **columns)
    rewards.append(float(np.mean(found)))
    if len(rewards) % 10 == 1:
      print(f"step {len(rewards) - 1:3d}: mean reward {rewards[-1]:.3f}", flush=True)
    return found

  make_learner(steps, watched).train(data(steps))
  figures = {"first_reward": np.mean(rewards[:5]), "last_reward": np.mean(rewards[-5:])}
  figures = {name: round(float(value), 3) for name, value in figures.items()}
  print(json.dumps({**figures, "steps": len(rewards), "seconds": round(time.perf_counter() - began, 1)}))


if __name__ == "__main__":
  main()
