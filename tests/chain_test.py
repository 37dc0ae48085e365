"""The embedded task: its arithmetic, its teacher, its luck, its splits."""

import numpy as np
import pytest

from rredcot_jax.data import chain
from rredcot_jax.data.encoding import Codec
from rredcot_jax.model.tokenizer import load_tokenizer
from rredcot_jax.train import initial


def test_the_docstrings_example():
  example = chain.make_example(3, ["+4", "*7", "-2"])
  assert example.question == "3+4*7-2"
  assert example.steps == ("3+4=7\n", "7*7=9\n", "9-2=7\n") and example.answer == "7"


def test_every_operation_is_a_bijection_modulo_ten():
  assert len(chain.OPERATIONS) == 21
  for operation in chain.OPERATIONS:
    assert sorted(chain.apply_operation(value, operation) for value in range(10)) == list(range(10))


def test_examples_repeat_and_splits_are_disjoint():
  train, held_out = chain.Chain(split="train", num_steps=2), chain.Chain(split="eval", num_steps=2)
  assert train[5] == chain.Chain(split="train", num_steps=2)[5]
  assert not {train[i].question for i in range(400)} & {held_out[i].question for i in range(400)}


@pytest.mark.parametrize(
  ("text", "step"),
  [
    ("3+4=7\n7*7=9\n9-2=7\n</think>7", None),
    ("3+4=8\n8*7=6\n6-2=4\n</think>4", 0),
    ("3+4=7\n7*7=8\n8-2=6\n</think>6", 1),
    ("3+4=7\n</think>7", None),  # Left early: no step is wrong.
    ("3+4=7\n7*7=9\n9-2=7\n7+1=8\n</think>8", 3),
    ("\n\n</think>", 0),
    ("3+4=7\n7*", None),  # Cut off inside a line.
  ],
)
def test_first_wrong_step(text, step):
  assert chain.first_wrong_step(chain.make_example(3, ["+4", "*7", "-2"]), text) == step


def test_lucky_rate_is_exact():
  def enumerate_(steps, e):
    right, wrong_once = 0.0, 0.0
    for pattern in np.ndindex(*(10,) * steps):  # The deviation each step adds; 0 is a correct step.
      p = np.prod([1 - e if d == 0 else e / 9 for d in pattern])
      if any(pattern):
        wrong_once += p
        right += p * (sum(pattern) % 10 == 0)
    return right / wrong_once

  for steps, e in ((1, 0.3), (2, 0.1), (4, 0.2)):
    assert chain.lucky_rate(steps, e) == pytest.approx(enumerate_(steps, e), abs=1e-12)
  assert chain.lucky_rate(8, 0.08) == pytest.approx(0.02909, abs=1e-5)
  with pytest.raises(ValueError, match="wrong_share=0"):
    chain.lucky_rate(3, 0)


def test_teacher_errs_and_leaves_early_as_often_as_told():
  task = chain.Chain(split="train")
  rng = np.random.default_rng(0)
  early = first_wrong = full = 0
  for i in range(2000):
    text = chain.teacher_trace(task[i], rng, wrong_share=0.1, early_share=0.2)
    thought, _, answer = text.partition("</think>")
    value = int(task[i].question[0]) if not thought else int(thought[-2])
    for step in task[i].steps[thought.count("\n") :]:
      value = chain.apply_operation(value, step.partition("=")[0][1:])
    assert answer == str(value)  # The teacher always answers by what it wrote.
    early += thought.count("\n") < 8
    if thought.count("\n") == 8:
      full += 1
      first_wrong += not text.startswith(task[i].steps[0])
  assert early / 2000 == pytest.approx(0.2, abs=4 * (0.16 / 2000) ** 0.5)
  assert first_wrong / full == pytest.approx(0.1, abs=4 * (0.09 / full) ** 0.5)


def test_reward_reads_the_last_answer_alone():
  task = chain.Chain(split="eval")
  example = chain.make_example(3, ["+4"])
  assert task.reward(example, "nonsense</think>7") == 1.0
  assert [task.reward(example, text) for text in ("7", "</think>77", "</think>7</think>8", "</think>")] == [0.0] * 4


def test_tokenizer_is_one_token_a_character():
  tokenizer = load_tokenizer(initial.locate("chain"))
  example = chain.make_example(3, ["+4", "*7"])
  ids = Codec(tokenizer).prompt_ids(example)
  assert len(ids) == 6 and Codec(tokenizer).decode(ids) == "3+4*7<think>"
  assert [Codec(tokenizer).decode(step) for step in Codec(tokenizer).solution_ids(example)] == list(example.steps)
  assert [len(step) for step in Codec(tokenizer).solution_ids(example)] == [6, 6]


def test_bad_options_are_named():
  with pytest.raises(ValueError, match="size=0 yields no prompt"):
    chain.Chain(split="train", size=0)
  with pytest.raises(ValueError, match="num_steps=0"):
    chain.Chain(split="train", num_steps=0)
  with pytest.raises(ValueError, match="did you mean 'train'"):
    chain.Chain(split="trein")
  with pytest.raises(IndexError, match="outside"):
    chain.Chain(split="train", size=2)[2]
