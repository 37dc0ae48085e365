"""The verifier over a batch of traces."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rredcot_jax.data import encoding, tasks
from rredcot_jax.ops import types

# (row, token ids of a whole trace, its end-of-sequence token included if it has one) -> rewards.
Judge = Callable[[Sequence[tuple[int, tuple[int, ...]]]], Sequence[float]]


def trace_texts(task: tasks.Task, rollout: types.Rollout) -> list[str]:
  """The text of each trace without its end-of-sequence token; for verifiers and reports only."""
  tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
  keep = mask & (tokens != task.tokenizer.eos_token_id)
  return [encoding.decode(task.tokenizer, row[kept].tolist()) for row, kept in zip(tokens, keep)]


def returns_of(task: tasks.Task, examples: Sequence[tasks.Example], rollout: types.Rollout) -> np.ndarray:
  """[B] float32 rewards of the verifier; example i belongs to trace i."""
  texts = trace_texts(task, rollout)
  return np.array([task.reward(example, text) for example, text in zip(examples, texts, strict=True)], np.float32)


def judge_of(task: tasks.Task, examples: Sequence[tasks.Example] | Mapping[int, tasks.Example]) -> Judge:
  """The verifier as `monte_carlo.values_by_generation` asks it: (row, token ids) of whole traces -> rewards."""
  ends = task.tokenizer.eos_token_id

  def judge(traces: Sequence[tuple[int, tuple[int, ...]]]) -> list[float]:
    kept = [(row, [token for token in ids if token != ends]) for row, ids in traces]
    return [task.reward(examples[row], encoding.decode(task.tokenizer, ids)) for row, ids in kept]

  return judge
