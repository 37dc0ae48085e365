"""Examples as padded arrays: where the padding goes, what the masks say, and whose traces are imitated."""

import dataclasses

import numpy as np
import pytest

from rredcot_jax.data import batching, tasks
from rredcot_jax.data.encoding import Codec
from rredcot_jax.model.tokenizer import load_tokenizer
from rredcot_jax.train import initial


@pytest.fixture(scope="module")
def codec():
  return Codec(load_tokenizer(initial.locate("chain")))


def test_padding_goes_to_the_side_that_is_asked_for():
  tokens, mask = batching.pad([[1, 2], [], [3, 4, 5]], 3, side="left", pad_id=9, what="prompt")
  np.testing.assert_array_equal(tokens, [[9, 1, 2], [9, 9, 9], [3, 4, 5]])
  np.testing.assert_array_equal(mask, [[False, True, True], [False] * 3, [True] * 3])
  tokens, mask = batching.pad([[1, 2], [], [3, 4, 5]], 3, side="right", pad_id=9, what="trace")
  np.testing.assert_array_equal(tokens, [[1, 2, 9], [9, 9, 9], [3, 4, 5]])
  np.testing.assert_array_equal(mask, [[True, True, False], [False] * 3, [True] * 3])
  assert tokens.dtype == np.int32 and mask.dtype == bool
  with pytest.raises(ValueError, match="trace 1 has 4 tokens and the room is 3: raise that limit"):
    batching.pad([[1], [1, 2, 3, 4]], 3, side="right", pad_id=9, what="trace")


class WithoutTeacher:
  """The questions of `chain`, of which each has only its reference."""

  def __init__(self):
    self._chain = tasks.make_task("chain", split="train", num_steps=2)

  def __len__(self):
    return 5

  def __getitem__(self, index):
    return self._chain[index]


class WithTeacher(WithoutTeacher):
  def teacher_trace(self, example, rng):
    return tasks.Trace((f"{rng.integers(1, 2)}",), example.answer)


@pytest.mark.parametrize("task", [WithoutTeacher(), WithTeacher()])
def test_a_supervised_batch_holds_the_teachers_traces_or_else_the_references(task, codec):
  batch = batching.supervised_batch(
    task, codec, np.random.default_rng(0), batch_size=6, max_prompt_tokens=9, max_tokens=20
  )
  drawn = np.random.default_rng(0).integers(5, size=6)
  assert len(set(drawn)) > 1
  for row, index in enumerate(drawn):
    example = task[int(index)]
    trace = tasks.Trace(("1",), example.answer) if isinstance(task, WithTeacher) else example
    wanted = codec.trace_ids(tasks.Trace(trace.steps, trace.answer))
    prompt = codec.prompt_ids(example)
    np.testing.assert_array_equal(batch.tokens[row], wanted + [codec.pad_id] * (20 - len(wanted)))
    np.testing.assert_array_equal(batch.prompt_tokens[row], [codec.pad_id] * (9 - len(prompt)) + prompt)
    np.testing.assert_array_equal(batch.mask[row], np.arange(20) < len(wanted))
    np.testing.assert_array_equal(batch.prompt_mask[row], np.arange(9) >= 9 - len(prompt))
  # The loss counts every token of a trace and no padding; the rest is not read.
  np.testing.assert_array_equal(batch.loss_mask, batch.mask)
  unread = dataclasses.asdict(batch)
  assert all(not unread[name].any() for name in ("old_log_probs", "reference_log_probs", "advantages"))
