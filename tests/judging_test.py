"""The verifier over a batch: whose example a trace is judged by, and what of it the verifier reads."""

from types import SimpleNamespace

import numpy as np

from rredcot_jax.data import judging, tasks
from rredcot_jax.data.chain import make_example
from rredcot_jax.data.encoding import Codec
from rredcot_jax.model.tokenizer import load_tokenizer
from rredcot_jax.train import initial

EXAMPLES = [make_example(3, ["+4"]), make_example(2, ["+4"]), make_example(1, ["+4"])]  # Answers 7, 6 and 5.


class Seen:
  """Rewards a trace that ends with the answer of its example, and notes every text."""

  def __init__(self):
    self.texts = []

  def reward(self, example, text):
    self.texts.append(text)
    return tasks.make_task("chain", split="eval").reward(example, text) / 2


def traces(codec):
  """Each example's reference, without and with the end, which no verifier reads."""
  return [codec.trace_ids(tasks.Trace(one.steps, one.answer))[: None if i else -1] for i, one in enumerate(EXAMPLES)]


TEXTS = ["3+4=7\n</think>7", "2+4=6\n</think>6", "1+4=5\n</think>5"]


def test_each_trace_is_judged_by_its_own_example():
  codec, task = Codec(load_tokenizer(initial.locate("chain"))), Seen()
  ids = traces(codec)
  size = max(map(len, ids))
  tokens = np.array([one + [codec.tokenizer.get_vocab()["1"]] * (size - len(one)) for one in ids])
  mask = np.arange(size) < np.array(list(map(len, ids)))[:, None]
  rollout = SimpleNamespace(tokens=tokens, mask=mask)
  found = judging.returns_of(task, codec, EXAMPLES, rollout)
  assert found.dtype == np.float32 and found.tolist() == [0.5, 0.5, 0.5] and task.texts == TEXTS
  assert judging.returns_of(task, codec, EXAMPLES[::-1], rollout).tolist() == [0, 0.5, 0]


def test_a_judge_is_asked_about_rows():
  codec, task = Codec(load_tokenizer(initial.locate("chain"))), Seen()
  ids = [tuple(one) for one in traces(codec)]
  judge = judging.judge_of(task, codec, EXAMPLES)
  assert judge([(2, ids[2]), (0, ids[0]), (1, ids[2]), (1, ids[1])]) == [0.5, 0.5, 0, 0.5]
  assert task.texts == [TEXTS[2], TEXTS[0], TEXTS[2], TEXTS[1]]
  # Of several processes, each has only the examples of its own rows.
  assert judging.judge_of(task, codec, {5: EXAMPLES[1]})([(5, ids[1])]) == [0.5]
