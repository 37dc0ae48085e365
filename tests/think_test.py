"""The task `think`: its references, its teacher, and what a thought says."""

import numpy as np
import pytest

from rredcot_jax.data import think
from rredcot_jax.data.chain import Chain
from rredcot_jax.data.encoding import Codec, Layout
from rredcot_jax.data.tasks import Example
from rredcot_jax.data.think import Teacher, Think, read_thought
from rredcot_jax.model.tokenizer import load_tokenizer
from rredcot_jax.train import initial, preflight

# 3-6=7, 7+9=6, 6*7=2.
EXAMPLE = Example("3-6+9*7", ("3-6=7\n", "7+9=6\n", "6*7=2\n"), "2")
PERFECT = {"wrong": 0.0, "doubt": 0.0, "filler": 0.0, "early": 0.0, "direct": 0.0}


@pytest.fixture(scope="module")
def codec():
  return Codec(load_tokenizer(initial.locate("think")), layout=Layout(answer="Answer %s"))


def test_the_references_are_the_true_solution_in_each_style():
  values, operations = (3, 7, 6, 2), ("-6", "+9", "*7")
  assert think.solution(values, operations, "lines") == EXAMPLE.steps
  assert think.solution(values, operations, "short") == ("-6 gives 7\n", "+9 gives 6\n", "*7 gives 2\n")
  assert think.solution(values, operations, "chained") == ("3-6=7", "+9=6", "*7=2\n")
  example = Think(split="train", num_steps=3)[5]
  assert len(example.solutions) == 2 and "".join(example.solutions[1]).count("=") == 3


def test_questions_are_those_of_chain_and_splits_are_disjoint():
  ours, theirs = Think(split="train", num_steps=6), Chain(split="train", num_steps=6)
  assert [ours[i].question for i in range(5)] == [theirs[i].question for i in range(5)]
  held_out = Think(split="eval", num_steps=2)
  assert not {held_out[i].question for i in range(50)} & {
    Think(split="train", num_steps=2)[i].question for i in range(50)
  }


def test_the_words_are_tokens_and_every_reference_earns_one(codec):
  ids = codec.tokenizer.encode("Wait Let me check So Now  gives  is Answer Hmm", add_special_tokens=False)
  assert [codec.decode([i]) for i in ids if codec.decode([i]) in think.WORDS] == [
    "Wait", "Let me", " check ", "So", "Now ", " gives ", " is ", "Answer ", "Hmm",
  ]  # fmt: skip
  preflight.check_references(Think(split="train"), codec)


def test_the_reward_is_of_the_last_answer_behind_the_thought():
  task = Think(split="train")
  assert task.reward(EXAMPLE, "</think>3-6=7\nAnswer 2") == 1.0
  assert task.reward(EXAMPLE, "Answer 2</think>Answer 3") == 0.0
  for text in ("Answer 2", "</think>2", "</think>Answer 2\n", "</think>Answer 22", "</think>Answer ", ""):
    assert task.reward(EXAMPLE, text) == 0.0


def test_a_teacher_that_never_errs_is_right_and_says_every_step():
  task, rng = Think(split="train", **PERFECT), np.random.default_rng(0)
  for i in range(50):
    example = task[i]
    trace = task.teacher_trace(example, rng)
    reading = read_thought(example, "".join(trace.steps))
    assert trace.answer == example.answer and "".join(trace.solution)
    assert reading.clean and reading.covered == 6 and reading.culprit is None


def test_the_teachers_rates_are_what_its_traces_show():
  task, rng = Think(split="train"), np.random.default_rng(1)
  lines, right = [], []
  for i in range(800):
    example = task[i]
    trace = task.teacher_trace(example, rng)
    text = "".join(trace.steps)
    reading = read_thought(example, text)
    right.append(trace.answer == example.answer)
    lines += text.split("\n")[:-1]
    assert not text.startswith(("Wait", "Let me"))
    # The solution copies what the thought last said.
    if trace.solution and reading.clean:
      digits = [int(step.rstrip("\n")[-1]) for step in trace.solution]
      assert all(said in (None, digit) for said, digit in zip(reading.values, digits))
  share = lambda word: sum(line.startswith(word) for line in lines) / len(lines)
  assert 0.03 < share("Hmm") < 0.08
  assert 0.05 < share("Wait") + share("Let me") < 0.2
  assert 0.5 < np.mean(right) < 0.6
  assert Teacher().notice > 3 * Teacher().doubt


@pytest.mark.parametrize(
  ("thought", "values", "culprit", "covered", "clean"),
  [
    ("3-6=7\n7+9=6\n6*7=2\n", [7, 6, 2], None, 3, True),
    ("So 3-6 gives 7\nNow 7+9 is 6\n", [7, 6, None], None, 2, True),
    ("3-6=7+9=6\n", [7, 6, None], None, 2, True),
    ("Hmm\n3-6=8\n", [8, None, None], 1, 1, True),
    # Wrong, carried on, and noticed one line later: what was built on it is to be said anew.
    ("3-6=8\n8+9=7\nWait 3-6=7\n", [7, None, None], None, 1, True),
    ("3-6=8\nWait 3-6=7\n7+9=6\n", [7, 6, None], None, 2, True),
    # A right line said again changes nothing.
    ("3-6=7\n7+9=6\nLet me check 3-6=7\n", [7, 6, None], None, 2, True),
    # Said again, wrongly: the blame is on the line in which it became wrong.
    ("3-6=7\nWait 3-6=8\n8+9=7\n", [8, 7, None], 1, 2, True),
    # Two mistakes: the first of them that stands.
    ("3-6=8\n8+9=1\n", [8, 1, None], 0, 2, True),
    ("what?\n3-6=7\n", [7, None, None], None, 1, False),
    ("3-6=7\n9+9=8\n", [7, None, None], None, 1, False),
    ("3-6=7\n7+9=", [7, None, None], None, 1, True),
    ("", [None, None, None], None, 0, True),
  ],
)
def test_what_a_thought_says(thought, values, culprit, covered, clean):
  reading = read_thought(EXAMPLE, thought)
  assert (reading.values, reading.culprit, reading.covered, reading.clean) == (values, culprit, covered, clean)
  task = Think(split="train")
  assert task.first_wrong_step(EXAMPLE, thought + "</think>9") == culprit
  assert task.answer_stated(EXAMPLE, thought) == (covered == 3)


def test_a_trace_is_thought_exit_solution_answer_and_end(codec):
  task = Think(split="train", **PERFECT)
  trace = task.teacher_trace(task[0], np.random.default_rng(0))
  ids = codec.trace_ids(trace)
  assert ids[-1] == codec.eos_id and ids.count(codec.exit_ids[0]) == 1
  text = codec.response(ids)
  assert text == "".join(trace.steps) + "</think>" + "".join(trace.solution) + f"Answer {trace.answer}"


def test_habits_by_hand():
  exit = "</think>"
  texts = [
    # A slip, noticed in the next line; every line readable; a solution that copies all.
    "3-6=8\nWait 3-6=7\n7+9=6\n6*7=2\n" + exit + "3-6=7\n7+9=6\n6*7=2\nAnswer 2",
    # A slip that is not noticed, a right line said again, and a solution with one step of three not copied.
    "3-6=7\nLet me check 3-6=7\n7+9=5\n5*7=5\n" + exit + "-6 gives 7\n+9 gives 6\n*7 gives 5\nAnswer 5",
    # A thought that cannot be read, and no solution.
    "what?\n" + exit + "Answer 2",
    # No exit.
    "3-6=7\n",
  ]
  found = think.habits([EXAMPLE] * 4, texts)
  assert found["readable"] == 2 / 4 and found["solved"] == 2 / 4
  assert found["copied"] == 5 / 6
  # Lines not said again: 3 + 3 of the first two, 1 of the last. Slips are 3-6=8 and 7+9=5.
  assert found["noticed_wrong"] == 1 / 2 and found["noticed_right"] == 1 / 5
  assert found["thought_lines"] == (4 + 4 + 1 + 1) / 4
  # The teacher is what it says of itself.
  task, rng = Think(split="train"), np.random.default_rng(3)
  examples = [task[i] for i in range(400)]
  traces = [task.teacher_trace(example, rng) for example in examples]
  answer = lambda trace: "".join(trace.solution) + f"Answer {trace.answer}"
  taught = think.habits(examples, ["".join(trace.steps) + exit + answer(trace) for trace in traces])
  assert taught["readable"] > 0.99 and taught["copied"] > 0.99 and 0.85 < taught["solved"] < 0.95
  assert taught["noticed_wrong"] > 4 * taught["noticed_right"] > 0
  assert all(np.isnan(think.habits([], [])[name]) for name in ("readable", "copied", "noticed_wrong"))
