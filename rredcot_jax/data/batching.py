"""Examples -> padded arrays of token ids, and the iterator that deals prompts.

The iterator is Grain's: shuffled anew each epoch from the seed, endless, and
its state is a small JSON object that a checkpoint carries.
"""

from collections.abc import Sequence

import grain
import numpy as np

from rredcot_jax.data import tasks
from rredcot_jax.data.encoding import Codec
from rredcot_jax.ops import types


def pad(rows: Sequence[Sequence[int]], width: int, *, side: str, pad_id: int, what: str) -> tuple:
  """Rows of ids as one array and its mask.

  Args:
    rows: B lists of ids, each at most `width` long.
    width: columns of the result.
    side: "left" or "right", where the padding goes.
    pad_id: what it is.
    what: names the rows in errors.

  Returns:
    [B, width] int32 and [B, width] bool.

  Raises:
    ValueError: if a row does not fit; nothing is cut off silently.
  """
  tokens = np.full((len(rows), width), pad_id, np.int32)
  mask = np.zeros((len(rows), width), bool)
  for i, row in enumerate(rows):
    if len(row) > width:
      raise ValueError(f"{what} {i} has {len(row)} tokens and the room is {width}: raise that limit in the config.")
    columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
    tokens[i, columns], mask[i, columns] = row, True
  return tokens, mask


def prompt_arrays(codec: Codec, examples: Sequence[tasks.Example], width: int) -> tuple:
  """Left-padded prompts: [B, width] int32 tokens and [B, width] bool mask."""
  rows = [codec.prompt_ids(example) for example in examples]
  return pad(rows, width, side="left", pad_id=codec.pad_id, what="prompt")


def prompt_iterator(
  task: tasks.Task, batch_size: int, seed: int, indices: np.ndarray | None = None
) -> grain.DatasetIterator:
  """Endless batches of example indices, each epoch shuffled anew.

  A step's batch is a function of (task, batch_size, seed) and of the step alone. Every
  process deals the whole of it, which costs nothing next to a step, and makes examples
  of its own rows. The iterator's state is the step, so that a run may go on with
  another number of processes.

  Args:
    task: what the indices are of.
    batch_size: of all processes together.
    seed: of the shuffling.
    indices: [N] int, the examples that are dealt; None is all.

  Raises:
    ValueError: if the task holds fewer examples than a batch.
  """
  size = len(task) if indices is None else len(indices)
  if size < batch_size:
    raise ValueError(
      f"task {task.name!r} yields {size} prompts and a step needs {batch_size}: "
      "lower rollout.prompts_per_step or enlarge the task."
    )
  dealt = grain.MapDataset.range(size) if indices is None else grain.MapDataset.source(indices)
  # Not endless: grain cannot count batches of one out of its own endless repetition.
  batches = dealt.shuffle(seed=seed).repeat(2**62 // size).batch(batch_size)
  return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def supervised_batch(
  task: tasks.Task,
  codec: Codec,
  rng: np.random.Generator,
  *,
  batch_size: int,
  max_prompt_tokens: int,
  max_tokens: int,
) -> types.TrainBatch:
  """Traces to imitate: those of the task's teacher if it has one, else the reference solutions.

  Args:
    task: where examples are drawn from, uniformly.
    codec: the model's.
    rng: all the randomness.
    batch_size: B.
    max_prompt_tokens, max_tokens: P and T.

  Returns:
    TrainBatch with numpy fields [B, ...]; what a supervised update does not read is 0.
  """
  examples = [task[int(i)] for i in rng.integers(len(task), size=batch_size)]
  teacher = tasks.teacher_of(task)
  traces = []
  for example in examples:
    trace = teacher(example, rng)
    traces.append(codec.trace_ids(trace))
  prompt_tokens, prompt_mask = prompt_arrays(codec, examples, max_prompt_tokens)
  tokens, mask = pad(traces, max_tokens, side="right", pad_id=codec.pad_id, what="trace")
  zeros = np.zeros(tokens.shape, np.float32)
  return types.TrainBatch(
    prompt_tokens=prompt_tokens,
    prompt_mask=prompt_mask,
    tokens=tokens,
    mask=mask,
    loss_mask=mask,
    old_log_probs=zeros,
    reference_log_probs=zeros,
    advantages=zeros,
  )
