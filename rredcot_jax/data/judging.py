"""The verifier over a batch of traces."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rredcot_jax.data.encoding import Codec
from rredcot_jax.data.tasks import Example, Task
from rredcot_jax.ops import types

# (row, token ids of a whole trace, its end-of-sequence token included if it has one) -> rewards.
Judge = Callable[[Sequence[tuple[int, tuple[int, ...]]]], Sequence[float]]


def returns_of(task: Task, codec: Codec, examples: Sequence[Example], rollout: types.Rollout) -> np.ndarray:
  """[B] float32 rewards of the verifier; example i belongs to trace i. The rollout is on the host."""
  texts = codec.responses(rollout)
  return np.array([task.reward(example, text) for example, text in zip(examples, texts, strict=True)], np.float32)


def judge_of(task: Task, codec: Codec, examples: Sequence[Example] | Mapping[int, Example]) -> Judge:
  """The verifier as `monte_carlo.values_by_generation` asks it: (row, token ids) of whole traces -> rewards."""

  def judge(traces: Sequence[tuple[int, tuple[int, ...]]]) -> list[float]:
    return [task.reward(examples[row], codec.response(ids)) for row, ids in traces]

  return judge
