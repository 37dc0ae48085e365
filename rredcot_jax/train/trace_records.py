"""One trace with its credit as plain JSON values, as the report reads it."""

from typing import Any

import numpy as np

from rredcot_jax.data import tasks
from rredcot_jax.data.encoding import Codec
from rredcot_jax.ops import types


def trace_record(
  step: int,
  task: tasks.Task,
  codec: Codec,
  example: tasks.Example,
  rollout: types.Rollout,
  segments: types.Segments,
  credit: types.Credit,
  return_: float,
) -> dict[str, Any]:
  """The record of one trace; fields of one row, on the host."""
  length, num_segments = int(rollout.mask.sum()), int(segments.num_segments)
  starts = np.asarray(segments.starts)[:num_segments]  # On the host: a slice on a device compiles for each number.
  texts = [codec.decode([token]) for token in rollout.tokens[:length].tolist()]
  assert rollout.entropy is not None  # The sampler records it.
  wrong = None
  line = tasks.first_wrong_step(task, example, "".join(texts))
  if line is not None:
    # The line's first token; a line ends with its newline token.
    ends = [t + 1 for t, text in enumerate(texts) if text.endswith("\n")]
    wrong = int(segments.segment_ids[ends[line - 1] if line else 0])
  return {
    "step": step,
    "prompt": example.question,
    "tokens": texts,
    "segment_ids": segments.segment_ids[:length].tolist(),
    "values": credit.values[: num_segments + 1].tolist(),
    "rewards": credit.rewards[:num_segments].tolist(),
    "advantages": credit.advantages[:length].tolist(),
    "entropies": rollout.entropy[starts].tolist(),
    "return": float(return_),
    "answer": example.answer,
    "first_wrong_segment": wrong,
  }
