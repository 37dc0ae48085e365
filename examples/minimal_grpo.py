"""GRPO with RREDCoT's credit in a trainer of one file, which shares nothing with this package's own.

    python examples/minimal_grpo.py

The model is a transformer of one layer that has seen nothing. A prompt is two digits below 5. A response is up to six
tokens; it is right if it ends with the sum of the digits modulo 5 and the end token. What comes before is free.
Lines of a response are its segments. `credit_of` is all that this trainer needs of the library for its advantages.

The last line is one JSON object: the mean reward of the first and of the last five steps, steps, and seconds.
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import rredcot_jax as rr

VOCABULARY = ["0", "1", "2", "3", "4", "\n", "<eos>"]
EOS = VOCABULARY.index("<eos>")
QUESTIONS = np.array([(a, b) for a in range(5) for b in range(5)], np.int32)
PROMPT, LENGTH, GROUP = 2, 6, 8
TABLES = rr.vocab_tables(VOCABULARY, keywords=[])


# ---- The model and its sampler: any would do ----------------------------------------------------


class Model(nnx.Module):
  """tokens [M, L], positions [M, L], mask [M, L, L] of who attends to whom -> logits [M, L, V]."""

  def __init__(self, rngs: nnx.Rngs, width: int = 64):
    self.tokens = nnx.Embed(len(VOCABULARY), width, rngs=rngs)
    self.positions = nnx.Embed(PROMPT + LENGTH + 1, width, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
    self.norms = nnx.List([nnx.RMSNorm(width, rngs=rngs) for _ in range(3)])
    self.hidden, self.out = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)
    self.head = nnx.Linear(width, len(VOCABULARY), kernel_init=nnx.initializers.normal(0.02), rngs=rngs)

  def __call__(self, tokens, positions, mask):
    x = self.tokens(tokens) + self.positions(positions)
    x = x + self.attention(self.norms[0](x), mask=mask[:, None])
    x = x + self.out(nnx.gelu(self.hidden(self.norms[1](x))))
    return self.head(self.norms[2](x))


GRAPH, START = nnx.split(Model(nnx.Rngs(0)))


def apply(params, tokens, positions, mask):
  return nnx.merge(GRAPH, params)(tokens, positions, mask)


def predictions(params, tokens):
  """Log-probabilities [B, LENGTH, V] of what may stand at each place of a response."""
  rows, columns = tokens.shape
  positions = jnp.broadcast_to(jnp.arange(columns), (rows, columns))
  causal = jnp.broadcast_to(jnp.tril(jnp.ones((columns, columns), bool)), (rows, columns, columns))
  return jax.nn.log_softmax(apply(params, tokens, positions, causal))[:, PROMPT - 1 : -1]


@jax.jit
def sample(params, prompts, key):
  """Responses [B, LENGTH] and the log-probabilities of their tokens."""

  def draw(tokens, t):
    log_probs = predictions(params, tokens)[:, t]
    drawn = jax.random.categorical(jax.random.fold_in(key, t), log_probs)
    return tokens.at[:, PROMPT + t].set(drawn), jnp.take_along_axis(log_probs, drawn[:, None], axis=1)[:, 0]

  tokens = jnp.concatenate([prompts, jnp.zeros((len(prompts), LENGTH), jnp.int32)], axis=1)
  tokens, log_probs = jax.lax.scan(draw, tokens, jnp.arange(LENGTH))
  return tokens[:, PROMPT:], log_probs.T


def judge(questions, responses, mask):
  """[B] float32 rewards."""
  last = np.asarray(mask).sum(axis=1) - 1
  rows = np.arange(len(last))
  ends = np.asarray(responses)[rows, last] == EOS
  right = np.asarray(responses)[rows, np.maximum(last - 1, 0)] == questions.sum(axis=1) % 5
  return (ends & right & (last > 0)).astype(np.float32)


# ---- Credit: four calls of the library ----------------------------------------------------------

cut = jax.jit(jax.vmap(functools.partial(rr.segment, tables=TABLES, method="newline", k_max=4, eos_ids=EOS)))
score = jax.jit(functools.partial(rr.score_tree, apply, temperature=1.0))
credit = jax.jit(functools.partial(rr.credit_from_log_probs, group_size=GROUP, mode="difference"))


def credit_of(params, rollout, questions, returns):
  """A_t [B, LENGTH] of each token: what its line changed in the model's own chance to end with the right answer."""
  segments = cut(rollout.tokens, rollout.mask)
  references = [rr.Reference(steps=[], exit=[], answer=[int(a + b) % 5, EOS]) for a, b in questions]
  bank = rr.make_bank("answer", references, max_tokens=2).completions
  log_p = score(params, rollout, segments, bank)
  return credit(log_p, bank, segments, returns).advantages


# ---- The trainer --------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="optimizer")
def update(params, moments, batch, optimizer):
  def loss_of(params):
    every = predictions(params, jnp.concatenate([batch.prompt_tokens, batch.tokens], axis=1))
    chosen = jnp.take_along_axis(every, batch.tokens[..., None], axis=-1)[..., 0]
    return rr.policy_loss(chosen, batch, loss="grpo")[0]

  steps, moments = optimizer.update(jax.grad(loss_of)(params), moments)
  return optax.apply_updates(params, steps), moments


def train(steps, learning_rate=3e-3):
  """The last parameters, the mean reward of each step, and the last step's mask and advantages [B, LENGTH]."""
  optimizer = optax.adam(learning_rate)
  params, moments, rewards = START, optimizer.init(START), []
  questions = np.repeat(QUESTIONS, GROUP, axis=0)  # Rows of a group stand together.
  for step in range(steps):
    tokens, log_probs = sample(params, questions, jax.random.fold_in(jax.random.key(0), step))
    mask, prompt_mask = rr.prefix_mask(tokens, EOS), jnp.ones(questions.shape, bool)
    returns = judge(questions, tokens, mask)
    rollout = rr.Rollout(prompt_tokens=questions, prompt_mask=prompt_mask, tokens=tokens, mask=mask)
    advantages = credit_of(params, rollout, questions, returns)
    batch = rr.TrainBatch(
      prompt_tokens=questions, prompt_mask=prompt_mask, tokens=tokens, mask=mask, loss_mask=mask,
      old_log_probs=log_probs, reference_log_probs=log_probs, advantages=advantages,
    )  # fmt: skip
    params, moments = update(params, moments, batch, optimizer)
    rewards.append(float(returns.mean()))
    if step % 20 == 0:
      print(f"step {step:3d}: mean reward {rewards[-1]:.3f}", flush=True)
  return params, rewards, mask, advantages


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--steps", type=int, default=100, help="policy updates, each on 25 questions x 8 responses")
  steps = parser.parse_args().steps
  began = time.perf_counter()
  _, rewards, _, _ = train(steps)
  ends = {"first_reward": np.mean(rewards[:5]), "last_reward": np.mean(rewards[-5:])}
  print(f"mean reward of the first and last five steps: {ends['first_reward']:.3f}, {ends['last_reward']:.3f}")
  figures = {name: round(float(value), 3) for name, value in ends.items()}
  print(json.dumps({**figures, "steps": steps, "seconds": round(time.perf_counter() - began, 1)}))


if __name__ == "__main__":
  main()
