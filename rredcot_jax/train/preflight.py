"""What is checked of a task and a tokenizer together, before a run writes or samples anything."""

import numpy as np
from absl import logging

from rredcot_jax.data.encoding import Codec
from rredcot_jax.data.tasks import Task, Trace

OVERLONG = ("refuse", "skip")

_REFERENCES = 8  # Examples whose references are judged.
_ALL_PROMPTS, _SAMPLED_PROMPTS = 20_000, 2_000  # Of a task of more than the first, only the second are measured.
_SHOWN = 200  # Characters of a text in an error.


def check_references(task: Task, codec: Codec) -> None:
  """Judges the references that banks score and warm starts imitate. Encoded and decoded, each must get reward 1.

  If a tokenizer changes the exit, the verifier does not find it, and every reward of the run would be 0.

  Args:
    task: its first examples are asked. One whose answer is "" has no reference.
    codec: the model's.

  Raises:
    ValueError: naming the example, the decoded text and its reward, or a token in it that ends a trace.
  """
  for index in range(min(_REFERENCES, len(task))):
    example = task[index]
    if not example.answer:
      continue
    ids = codec.trace_ids(Trace(example.steps, example.answer))
    early = next((token for token in ids[:-1] if token in codec.end_ids), None)
    if early is not None:
      raise ValueError(
        f"example {index} of task {task.name!r}: its reference holds the token {codec.decode([early])!r}, id {early}, "
        "which ends a trace, so that the policy could not write it. Check eos_token_id in the generation_config.json "
        "beside the tokenizer, and whether the tokenizer is the model's."
      )
    text = codec.response(ids)
    reward = task.reward(example, text)
    if reward != 1.0:
      raise ValueError(
        f"example {index} of task {task.name!r}: its reference, encoded and decoded again, earns {reward} and not 1. "
        f"It reads {text[-_SHOWN:]!r} and the answer is {example.answer[:_SHOWN]!r}. Check response.exit, "
        "response.answer, the task's verifier, and whether the tokenizer is the model's."
      )


def differing_pieces(task: Task, codec: Codec) -> str | None:
  """The first difference between the tokenizer's ids of a whole reference and those of its pieces.

  A piece is encoded on its own, so that its boundary is a token position. A tokenizer that merges characters over
  that boundary, such as ".\\n", would write other ids there, and the policy gives its own spelling more probability.

  Returns:
    A sentence that shows both spellings where the first reference differs, or None.
  """
  example = task[0]
  if not example.answer:
    return None
  ours = codec.trace_ids(Trace(example.steps, example.answer))[:-1]
  whole = "".join(example.steps) + codec.layout.exit + codec.layout.write(example.answer)
  theirs = codec.tokenizer.encode(whole, add_special_tokens=False)
  if theirs == ours:
    return None
  same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
  show = lambda ids: [codec.decode([token]) for token in ids[max(same - 2, 0) : same + 4]]
  return (
    f"the pieces of a reference of task {task.name!r} are encoded as {show(ours)} where the tokenizer would write "
    f"{show(theirs)}: such completions are scored a little too low."
  )


def check_held_out(task: Task, codec: Codec, width: int, count: int) -> None:
  """Refuses a held-out task of whose first `count` prompts one has more than `width` tokens.

  Raises:
    ValueError: naming the longest prompt.
  """
  _, found = _overlong(task, codec, width, np.arange(min(count, len(task))))
  if found:
    raise ValueError(f"{found}. Held-out prompts are not left out: raise the limit.")


def usable_prompts(task: Task, codec: Codec, width: int, overlong: str) -> np.ndarray | None:
  """Which examples have a prompt of at most `width` tokens.

  Args:
    task: of more than 20,000 examples, 2,000 are measured, spread evenly, unless the others are to be skipped.
    codec: the model's.
    width: `rollout.max_prompt_tokens`.
    overlong: one of `OVERLONG`: "refuse" raises if there is a longer one, "skip" leaves it out, counted.

  Returns:
    [N] int, the indices that fit, or None where all do.

  Raises:
    ValueError: naming the longest prompt that does not fit and how many there are, or that none fits.
  """
  total = len(task)
  count = total if overlong == "skip" or total <= _ALL_PROMPTS else _SAMPLED_PROMPTS
  measured = np.unique(np.linspace(0, total - 1, count).astype(int))
  too_long, found = _overlong(task, codec, width, measured)
  if not found:
    return None
  if overlong == "refuse":
    raise ValueError(f"{found}. Raise the limit, or set rollout.overlong='skip' to leave such prompts out.")
  if len(too_long) == total:
    raise ValueError(f"{found}: none is left. Raise the limit.")
  logging.warning("%s. They are left out.", found)
  return np.setdiff1d(measured, too_long)


def _overlong(task: Task, codec: Codec, width: int, measured: np.ndarray) -> tuple[np.ndarray, str]:
  """Which of the `measured` examples have a longer prompt than `width`, and a sentence about them; "" for none."""
  lengths = np.array([len(codec.prompt_ids(task[int(index)])) for index in measured])
  too_long = measured[lengths > width]
  if not len(too_long):
    return too_long, ""
  longest = int(measured[int(lengths.argmax())])
  return too_long, (
    f"{len(too_long)} of {len(measured)} prompts of task {task.name!r} have more than rollout.max_prompt_tokens="
    f"{width} tokens; the longest has {lengths.max()}, example {longest}: {task[longest].question[:_SHOWN]!r}"
  )
