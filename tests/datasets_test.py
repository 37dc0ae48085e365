import dataclasses
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers import write_parquet
from hypothesis import given
from hypothesis import strategies as st

from rredcot_jax.data import batching, datasets, tasks, verifiers
from rredcot_jax.data.encoding import Codec
from rredcot_jax.model.tokenizer import load_tokenizer
from rredcot_jax.train import initial

DATA = pathlib.Path(__file__).parent / "data"
DIVIDED = {"train_file": "test"}  # Divides a benchmark's file, so that it has a split to train on.


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> pathlib.Path:
  return tmp_path_factory.mktemp("cache")


@pytest.fixture
def sample(cache):
  """Makes a split of a sample in tests/data."""

  def make(dataset, split="eval", **options):
    return tasks.make_task(f"dataset/{dataset}", split=split, data_dir=DATA, cache_dir=cache, **options)

  return make


@pytest.fixture
def corpus(tmp_path):
  """Writes rows to a file of a corpus in `tmp_path` and returns a function that makes a split of it."""

  def write(dataset, rows, file="test.jsonl"):
    path = tmp_path / dataset / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return lambda split="eval", **options: datasets.Dataset(dataset, split=split, data_dir=tmp_path, **options)

  return write


def question(i, **fields):
  return {"question": f"What is {i} plus 1?", "answer": i + 1, **fields}


# ---- Schemas -----------------------------------------------------------------------------

GOLDENS = {
  ("gsm8k", "train", 2): (
    "It is 3 degrees and falls by 7 degrees. How cold is it then?",
    ("3-7 = -4 degrees.\n\n", "That is below zero.\n"),
    "-4",
  ),
  ("gsm8k", "eval", 2): (
    "Tom has 20 coins and spends a quarter of them. How many are left?",
    ("He spends 20/4 = 5 coins.\n", "So 20-5 = 15 are left.\n"),
    "15",
  ),
  ("math", "train", 1): (
    "Solve $x^2 = 9$ for the negative root.",
    ("The roots are $\\boxed{3}$ and $-3$; the negative one is $\\boxed{-3}$.\n",),
    "-3",
  ),
  ("math", "eval", 3): (
    "What is $\\sin 30^\\circ$?",
    ("Half of the side: $\\boxed{\\frac{1}{2}}$.\n",),
    "\\frac{1}{2}",
  ),
  ("math500", "eval", 1): (
    "Give the midpoint of $(0,2)$ and $(4,6)$.",
    ("Averages of both: $\\left( 2, 4 \\right)$,\n", "so $\\boxed{\\left( 2, 4 \\right)}$.\n"),
    "\\left( 2, 4 \\right)",
  ),
  ("numina_math_cot", "eval", 1): (
    "Find $f(2)$ for $f(x) = x^3 - 1$.",
    ("$f(2) = 8 - 1$\n\n", "Thus $\\boxed{7}$.\n"),
    "7",
  ),
  ("open_rs", "train", 0): (
    "What is the least prime above $20$?",
    ("$21 = 3\\cdot 7$, $22 = 2 \\cdot 11$.\n", "So it is $\\boxed{23}$.\n"),
    "23",
  ),
  ("aime", "eval", 0): (
    "How many integers from $1$ to $100$ are divisible by $3$ or by $5$?",
    ("$33 + 20 - 6 = 47$.\n\n", "$\\boxed{047}$\n"),
    "047",
  ),
  ("aime", "eval", 2): (
    "A square and its half have total area $96$. Find the area of the square.",
    ("$\\frac{3}{2}A = 96$, so $A = 64$.\n",),
    "64",
  ),
  ("amc23", "eval", 0): ("A cyclist rides $9$ km in $20$ minutes. How many km per hour is that?", (), "27"),
  ("amc23", "eval", 1): ("What is $\\frac{1}{4}$ of $5$, as a decimal?", (), "1.25"),
  ("minerva", "eval", 1): (
    "What is the derivative of $t^3$?",
    ("Lower the power:\n", "\\[\n", "\\boxed{3t^2}\n", "\\]\n"),
    "3t^2",
  ),
  ("minerva", "eval", 3): ("How many electrons has a neutral helium atom?", (), "2"),
}


def test_every_schema_has_a_golden():
  assert {dataset for dataset, _, _ in GOLDENS} == set(datasets.SCHEMAS)


@pytest.mark.parametrize("dataset, split, index", GOLDENS)
def test_golden_examples(sample, dataset, split, index):
  example = sample(dataset, split)[index]
  assert (example.question, example.steps, example.answer) == GOLDENS[dataset, split, index]


@pytest.mark.parametrize("dataset", datasets.SCHEMAS)
def test_gold_answers_earn_one_and_others_nothing(sample, dataset):
  task = sample(dataset)
  assert len(list(task)) == len(task) > 1
  assert task.name == f"dataset/{dataset}"
  for example in task:
    thought = "".join(example.steps)
    assert task.reward(example, f"{thought}</think>{example.answer}") == 1.0
    assert task.reward(example, f"{thought}</think>\\boxed{{{example.answer}}}") == 1.0
    assert task.reward(example, f"{thought}</think>-{example.answer}1") == 0.0
    assert task.reward(example, example.answer) == 0.0  # The thought was never left.
    assert all(step.strip() and step.endswith("\n") for step in example.steps)


def test_calculator_annotations_and_the_answers_line_are_no_steps(sample):
  for split in datasets.SPLITS:
    for example in sample("gsm8k", split):
      assert example.steps and not any(mark in "".join(example.steps) for mark in ("<<", ">>", "####"))


@pytest.mark.parametrize(
  "solution, steps",
  [
    ("", ()),
    (" \n\n", ()),
    ("a\nb", ("a\n", "b\n")),
    ("\n\na\n \nb\n\n", ("\n\na\n \n", "b\n\n")),
    ("a\r\nb\u2028c", ("a\r\n", "b\u2028c\n")),
  ],
)
def test_steps_are_lines(solution, steps):
  assert datasets.solution_steps(solution) == steps


@given(st.text("a \n"))
def test_steps_join_to_the_solution(solution):
  steps = datasets.solution_steps(solution)
  whole = solution if solution.endswith("\n") else solution + "\n"
  assert "".join(steps) == (whole if solution.strip() else "")
  assert all(step.strip() and step.endswith("\n") for step in steps)


@pytest.mark.parametrize(
  "value, answer",
  [(7, "7"), (7.0, "7"), (-0.5, "-0.5"), (10**30, str(10**30)), (1e22, str(10**22)), (" 7 ", "7"), ("7.0", "7.0")],
)
def test_numbers_as_answers(corpus, value, answer):
  assert corpus("amc23", [question(0, answer=value)])()[0].answer == answer


def test_solutions_are_no_thoughts_unless_it_is_said(sample):
  assert [sample("gsm8k", **options).aligned for options in ({}, {"aligned": True})] == [False, True]


def test_matchers_and_the_format_share_reach_the_reward(corpus):
  make = corpus("amc23", [question(0, answer="1/2")])
  exact, mathematical = make(matcher="exact"), make(matcher="math")
  assert exact.reward(exact[0], "</think>\\frac{1}{2}") == 0.0 and exact.reward(exact[0], "</think>1/2") == 1.0
  assert mathematical.reward(mathematical[0], "</think>\\frac{1}{2}") == 1.0
  with pytest.raises(ValueError, match=r"line 1: the row has no answer that can be rewarded: .* '1/2'"):
    make(matcher="numeric")

  formed = make(format_weight=0.25)
  for text in ("a</think>1/2", "a</think>3", "a</think>\\boxed{3}", "3"):
    expected = verifiers.composite(text, "1/2", match=verifiers.math_match, format_weight=0.25)
    assert formed.reward(formed[0], text) == expected


# ---- Splits ------------------------------------------------------------------------------


def questions(task):
  return {" ".join(example.question.split()) for example in task}


@pytest.mark.parametrize(
  "dataset, options",
  [
    ("gsm8k", {}),
    ("math", {}),
    ("numina_math_cot", {"skip_without_answer": True}),
    ("open_rs", {}),
    ("math500", DIVIDED),
  ],
)
def test_no_eval_question_is_in_train(sample, dataset, options):
  train, held_out = (sample(dataset, split, **options) for split in datasets.SPLITS)
  assert questions(train) and questions(held_out)
  assert not questions(train) & questions(held_out)
  # What is in a file is in a split, but for what the other one has.
  for task in (train, held_out):
    assert task.counts["rows"] == len(task) + task.counts["without_answer"] + task.counts["other_split"]


def test_a_train_question_that_is_held_out_is_dropped(sample):
  train, held_out = sample("gsm8k", "train"), sample("gsm8k", "eval")
  assert train.counts == {"rows": 5, "without_answer": 0, "other_split": 1}
  assert len(held_out) == 4 and any(q.startswith("Ida") for q in questions(held_out))


def test_one_file_is_divided_three_to_one(corpus):
  make = corpus("open_rs", [{"problem": f"p {i}", "solution": "", "answer": i} for i in range(400)], "train.jsonl")
  train, held_out = questions(make("train")), questions(make("eval"))
  assert not train & held_out and train | held_out == {f"p {i}" for i in range(400)}
  assert 60 < len(held_out) < 140


def test_a_benchmark_has_no_train_split(sample):
  with pytest.raises(ValueError, match=r"'aime' is a benchmark.*train_file='test' would divide"):
    sample("aime", "train")


def test_examples_are_a_function_of_the_index(sample):
  whole, short = sample("gsm8k"), sample("gsm8k", limit=2)
  assert [short[i] for i in reversed(range(2))] == [whole[i] for i in reversed(range(2))]
  assert [e.entry["source"] for e in whole] == [f"test.jsonl, line {i}" for i in (1, 2, 3, 4)]
  assert len(sample("gsm8k", limit=1000)) == 4
  for index in (-1, 4):
    with pytest.raises(IndexError, match=f"Example {index} of dataset/gsm8k, which has 4"):
      whole[index]


# ---- Errors ------------------------------------------------------------------------------

GOOD = {"problem": "p", "solution": "so \\boxed{1}"}
WRONG_ROWS = {
  "broken JSON": ("math", b'{"problem": "p", \n', ["this is no line of JSON"]),
  "no UTF-8": ("math", b'{"problem": "\xff"}\n', ["this is no line of JSON", "utf-8"]),
  "nested too deep": ("math", b"[" * 100_000 + b"\n", ["this is no line of JSON"]),
  "no object": ("math", b"[1]\n", ["is a list"]),
  "no question": ("math", {"question": "p", "solution": "s"}, ["'problem'", "its fields are question, solution"]),
  "null question": ("math", {"problem": None, "solution": "s"}, ["'problem'"]),
  "empty question": ("math", {"problem": " \n", "solution": "s"}, ["'problem'", "is empty"]),
  "question of numbers": ("math", {"problem": [1], "solution": "s"}, ["'problem'", "no text: [1]"]),
  "half a surrogate pair": ("math", b'{"problem": "\\ud800", "solution": "s"}\n', ["'problem'", "surrogates"]),
  "no solution": ("math", {"problem": "p", "level": 1}, ["'solution'", "its fields are problem, level"]),
  "nothing boxed": ("math", {"problem": "p", "solution": "s"}, ["no answer", "\\boxed"]),
  "nothing in the box": ("math", {"problem": "p", "solution": "\\boxed{ }"}, ["no answer", "\\boxed"]),
  "unfinished box": ("math", {"problem": "p", "solution": "\\boxed{1"}, ["no answer", "\\boxed"]),
  "no last line": ("gsm8k", {"question": "q", "answer": "It is 4."}, ["no answer", "#### <answer>"]),
  "nothing after the mark": ("gsm8k", {"question": "q", "answer": "a\n#### "}, ["no answer", "#### <answer>"]),
  "mark before the last line": ("gsm8k", {"question": "q", "answer": "#### 4\na"}, ["no answer", "#### <answer>"]),
  "mark within the last line": ("gsm8k", {"question": "q", "answer": "a\nb #### 4"}, ["no answer", "#### <answer>"]),
  "no answer": ("aime", {"problem": "p", "key": 1}, ["'answer' or 'Answer'", "its fields are problem, key"]),
  "hostile fields": ("aime", {"\x1b[2J" + "x" * 9999: "p"}, ["its fields are \\x1b[2Jxx", "more characters"]),
  "null answer": ("aime", {"problem": "p", "answer": None}, ["no answer", "'answer' or 'Answer'"]),
  "answer not a number": ("aime", {"problem": "p", "answer": float("nan")}, ["'answer' is nan"]),
  "answer of truth": ("aime", {"problem": "p", "answer": True}, ["'answer'", "no text: True"]),
  "answer too long": ("aime", {"problem": "p", "answer": "x" * 2000}, ["no answer that can be rewarded", "'xxx"]),
  "answer with a marker": ("aime", {"problem": "p", "answer": "</think>"}, ["no answer that can be rewarded"]),
}


@pytest.mark.parametrize("kind", WRONG_ROWS)
def test_a_wrong_row_is_an_error_that_names_file_and_line(tmp_path, corpus, kind):
  dataset, row, parts = WRONG_ROWS[kind]
  good = {"question": "q", "answer": "a\n#### 1"} if dataset == "gsm8k" else {**GOOD, "answer": 1}
  make = corpus(dataset, [good, b"\n", row])  # A blank line counts as a line and is no row.
  with pytest.raises(ValueError) as raised:
    make()
  for part in (f"{tmp_path / dataset / 'test.jsonl'}, line 3: ", *parts):
    assert part in str(raised.value)
  assert len(str(raised.value)) < 500
  left = [path for path in (tmp_path / ".tfds").rglob("*") if path.is_file()]
  assert not left


def test_rows_without_an_answer_may_be_skipped_and_are_counted(sample, caplog):
  with pytest.raises(ValueError, match=r"train\.jsonl, line 2: the row has no answer"):
    sample("numina_math_cot", "train")
  for _ in ("written", "from the cache"):
    with caplog.at_level(logging.WARNING):
      task = sample("numina_math_cot", "train", skip_without_answer=True)
    assert [example.answer for example in task] == ["7", "8", "\\textbf{(A)}"]
    assert task.counts == {"rows": 5, "without_answer": 2, "other_split": 0}
    assert "2 of 5 rows behind split 'train' are left out" in caplog.text
    caplog.clear()


def test_skipping_leaves_no_other_row_out(corpus):
  with pytest.raises(ValueError, match="line 2: the question, field 'problem', is empty"):
    corpus("math", [GOOD, {**GOOD, "problem": ""}])(skip_without_answer=True)


@pytest.mark.parametrize("rows", [[], [{**GOOD, "solution": "no box"}]])
def test_a_split_without_examples_is_an_error(corpus, rows):
  with pytest.raises(ValueError, match=f"yields no prompt for split 'eval': of {len(rows)} rows in .*test.jsonl"):
    corpus("math", rows)(skip_without_answer=True)


def test_a_missing_file_is_named_with_what_is_there(tmp_path, corpus):
  with pytest.raises(FileNotFoundError, match=r"'math': looked for test\.jsonl or test\.parquet.*does not exist"):
    datasets.Dataset("math", split="eval", data_dir=tmp_path)
  make = corpus("math", [{**GOOD, "problem": f"p{i}"} for i in range(20)], "train.jsonl")
  with pytest.raises(FileNotFoundError, match=r"looked for test\.jsonl.*which holds train\.jsonl.*eval_file"):
    make("train")  # What is held out must be known.
  assert len(make("train", eval_file="train")) + len(make("eval", eval_file="train")) == 20


def test_options_are_checked(sample):
  for options, message in (
    ({"dataset": "gsm9k"}, "did you mean 'gsm8k'"),
    ({"split": "test"}, "split='test' is unknown"),
    ({"matcher": "maths"}, "did you mean 'math'"),
    ({"limit": 0}, "yields no prompt"),
    ({"format_weight": 1.5}, "format_weight"),
  ):
    with pytest.raises(ValueError, match=message):
      sample(**{"dataset": "gsm8k", **options})
  with pytest.raises(ValueError, match="did you mean 'dataset/gsm8k'"):
    tasks.make_task("datasets/gsm8k", split="train")


def test_an_instruction_follows_every_question_and_changes_nothing_else(sample):
  instruction = "Put your final answer within \\boxed{}."
  for split in datasets.SPLITS:
    plain, asked = sample("gsm8k", split), sample("gsm8k", split, instruction=instruction)
    assert [e.question for e in asked] == [f"{e.question}\n{instruction}" for e in plain]
    assert [dataclasses.replace(e, question="") for e in asked] == [dataclasses.replace(e, question="") for e in plain]


def test_the_chat_template_wraps_the_question_unless_told_not_to(sample, tmp_path):
  tokenizer = load_tokenizer(initial.locate("gsm_symbolic"))
  tokenizer.chat_template = "{{ 'Asked: ' + messages[0]['content'] + ' Reply: ' }}"
  tokenizer.save_pretrained(tmp_path)
  texts = {}
  for chat in (True, False):
    codec = Codec(load_tokenizer(tmp_path), chat=chat)
    texts[chat] = codec.decode(codec.prompt_ids(sample("gsm8k")[0]))
  question = sample("gsm8k")[0].question
  assert texts == {True: f"Asked: {question} Reply: <think>", False: f"{question}<think>"}
  default = Codec(load_tokenizer(tmp_path))
  assert default.decode(default.prompt_ids(sample("gsm8k")[0])) == texts[True]


# ---- Files -------------------------------------------------------------------------------


def test_only_the_files_of_a_split_are_read(corpus):
  make = corpus("amc23", [question(0)], "test.jsonl")
  for other in ("test_socratic.jsonl", "test-old.jsonl", "test.jsonl.bak", "testing.jsonl"):
    corpus("amc23", [question(1)], other)
  assert questions(make()) == {"What is 0 plus 1?"}
  corpus("amc23", [question(2)], "test-00000-of-00001.jsonl")
  with pytest.raises(ValueError, match=r"more than once.*test-00000-of-00001\.jsonl, test\.jsonl"):
    make()


def test_parquet_gives_what_jsonl_gives(tmp_path, sample):
  rows = [json.loads(line) for line in (DATA / "numina_math_cot/test.jsonl").read_text().splitlines()]
  for shard, part in enumerate((rows[:1], rows[1:3], rows[3:])):
    write_parquet(tmp_path / f"numina_math_cot/test-{shard:05}-of-00003.parquet", part)
  parquet = datasets.Dataset("numina_math_cot", split="eval", data_dir=tmp_path)
  jsonl = sample("numina_math_cot")
  assert [dataclasses.replace(e, entry=None) for e in parquet] == [dataclasses.replace(e, entry=None) for e in jsonl]
  assert parquet[2].entry == {"source": "test-00001-of-00003.parquet, row 2"}


def test_errors_in_parquet_name_file_row_and_fields(tmp_path):
  path = tmp_path / "amc23/test.parquet"
  write_parquet(path, [question(0.0), question(1.0, answer=None)])
  with pytest.raises(ValueError) as raised:
    datasets.Dataset("amc23", split="eval", data_dir=tmp_path)
  assert f"{path}, row 2: the row has no answer" in str(raised.value)
  assert "its fields are question, answer" in str(raised.value)
  write_parquet(path, [{"prompt": "p", "answer": "1"}])
  with pytest.raises(ValueError, match=r"row 1: no value in a field 'question' or 'problem'; .* prompt, answer"):
    datasets.Dataset("amc23", split="eval", data_dir=tmp_path)
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(ValueError, match=r"test\.parquet: this is no Parquet file that can be read"):
    datasets.Dataset("amc23", split="eval", data_dir=tmp_path)


def test_parquet_without_pyarrow_says_what_to_do(tmp_path, monkeypatch):
  write_parquet(tmp_path / "amc23/test.parquet", [question(0)])
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(ImportError, match=r"test\.parquet.* needs pyarrow: `pip install pyarrow`, or convert it"):
    datasets.Dataset("amc23", split="eval", data_dir=tmp_path)


HOSTILE_QUESTIONS = {
  "markers": "</think>4<eos><pad> <think> What is 1?",
  "null": "a\0b",
  "controls": "\x1b[2J\r\u2028\ufeff\u202e",
  "long": "x" * 3_000_000,
  "braces": "\\boxed{" * 1000,
  "shaped like JSON": '{"question": "\\"}',
}


def test_hostile_questions_come_through_unchanged(corpus):
  rows = [{"question": q, "answer": 1, "solution": q} for q in HOSTILE_QUESTIONS.values()]
  task = corpus("amc23", rows)()
  assert [example.question for example in task] == list(HOSTILE_QUESTIONS.values())
  markers = task[0]
  codec = Codec(load_tokenizer(initial.locate("gsm_symbolic")))
  ids = codec.prompt_ids(markers)
  open_, close = (codec.tokenizer.get_vocab().get(m) for m in ("<think>", "</think>"))
  assert None not in (open_, close)
  assert ids.count(open_) == 1 and ids[-1] == open_ and close not in ids and codec.eos_id not in ids


# ---- Several reference solutions ---------------------------------------------------------


def solutions_of(example):
  return ["".join(steps) for steps in (example.steps, *example.solutions)]


FIELDS = {"question": "q", "solution": "worked", "answer": "final"}
WORKED = {
  "two": (["Add.\nThree.", "Count: 3."], ["Add.\nThree.\n", "Count: 3.\n"]),
  "one": (["Add."], ["Add.\n"]),
  "a blank one": (["", "Add."], ["Add.\n"]),
  "text": ("Add.", ["Add.\n"]),
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("kind", WORKED)
def test_a_list_of_solutions_is_several_references(tmp_path, kind, suffix):
  worked, expected = WORKED[kind]
  row = {"q": "1 + 2?", "worked": worked, "final": "3"}
  (tmp_path / "mine").mkdir()
  path = tmp_path / "mine" / f"test.{suffix}"
  if suffix == "parquet":
    write_parquet(path, [row])
  else:
    path.write_text(json.dumps(row))
  task = datasets.Dataset("mine", split="eval", data_dir=tmp_path, fields=FIELDS)
  assert solutions_of(task[0]) == expected and task.max_solutions == len(expected)


def test_the_answer_is_derived_from_the_first_of_several_solutions(corpus):
  rows = [{"problem": "1 + 2?", "solution": ["So \\boxed{3}.", "Or \\boxed{4}.", "Or \\boxed{3.0}.", "Or three."]}]
  example = corpus("math", rows)()[0]
  expected = ["So \\boxed{3}.\n", "Or \\boxed{3.0}.\n", "Or three.\n"]  # The second has another answer.
  assert (example.answer, solutions_of(example)) == ("3", expected)
  answers = ["a <<1+2=3>>\n#### 3", "b\n#### 3.0", "c\n#### 4"]
  example = corpus("gsm8k", [{"question": "1 + 2?", "answer": answers}])()[0]
  assert (example.answer, solutions_of(example)) == ("3", ["a \n", "b\n"])


@pytest.mark.parametrize(
  ("worked", "message"),
  [
    ([], "no value in a field 'worked'"),
    ([None], "holds a null"),
    (["a", 3], "is no text: 3"),
    ([["a"]], "is no text"),
    (["a"] * 257, "holds 257 solutions, and the most is 256"),
  ],
)
def test_a_wrong_list_of_solutions_is_an_error_that_names_file_and_line(corpus, worked, message):
  make = corpus("mine", [{"q": "1 + 2?", "worked": worked, "final": "3"}])
  with pytest.raises(ValueError, match=f"test.jsonl, line 1: .*{message}"):
    make(fields=FIELDS)


def test_no_more_solutions_are_grouped_than_a_row_may_hold(corpus):
  make = corpus("mine", [{"q": "1 + 2?", "worked": [f"{i}.{j}" for j in range(100)], "final": "3"} for i in range(4)])
  task = make(fields=FIELDS, group_questions=True)
  assert task.max_solutions == 256 and solutions_of(task[0])[-1] == "2.55\n"


def test_rows_of_one_question_are_one_example_if_asked(corpus):
  row = lambda q, worked, final="3": {"q": q, "worked": worked, "final": final}
  rows = [
    row("1 + 2?", "a"), row("2 + 2?", "b", "4"), row("1  +\n2?", "c"), row("1 + 2?", "a"), row("1 + 2?", "d", "4"),
    row("1 + 2?", ["e", "c"], "3.0"),
  ]  # fmt: skip
  make = corpus("mine", rows)
  apart, task = make(fields=FIELDS), make(fields=FIELDS, group_questions=True)
  assert len(apart) == 6 and apart.max_solutions == 2
  assert [solutions_of(task[i]) for i in range(len(task))] == [["a\n", "c\n", "e\n"], ["b\n"]]
  assert [example.answer for example in task] == ["3", "4"] and task.max_solutions == 3
  assert task[0].entry == {"source": "test.jsonl, line 1"}
  assert task.counts == {"rows": 6, "without_answer": 0, "other_split": 0, "grouped": 3, "other_answer": 1}
  assert task.fingerprint != apart.fingerprint


# ---- The cache ---------------------------------------------------------------------------


def written(directory):
  return sorted(path for path in directory.rglob("dataset_info.json"))


def test_the_cache_is_used_again_and_follows_the_files(tmp_path, corpus):
  make = corpus("amc23", [question(0)])
  assert questions(make()) == {"What is 0 plus 1?"}
  cache = tmp_path / ".tfds"
  (first,) = written(cache)
  before = first.stat().st_mtime_ns
  make(), make(limit=1)
  assert written(cache) == [first] and first.stat().st_mtime_ns == before

  stat = (tmp_path / "amc23/test.jsonl").stat()
  make = corpus("amc23", [question(5)])  # As long as the other; made equally old, too.
  os.utime(tmp_path / "amc23/test.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
  assert questions(make()) == {"What is 5 plus 1?"}
  assert len(written(cache)) == 2

  moved = tmp_path / "elsewhere"
  shutil.copytree(tmp_path / "amc23", moved / "amc23")
  task = datasets.Dataset("amc23", split="eval", data_dir=moved, cache_dir=cache)
  assert questions(task) == {"What is 5 plus 1?"} and len(written(cache)) == 2


def test_a_change_in_what_is_held_out_changes_train(corpus):
  rows = [{"problem": f"p{i}", "solution": "\\boxed{1}"} for i in range(3)]
  make = corpus("math", rows, "train.jsonl")
  corpus("math", rows[:1], "test.jsonl")
  assert questions(make("train")) == {"p1", "p2"}
  corpus("math", rows[1:2], "test.jsonl")
  assert questions(make("train")) == {"p0", "p2"}


def test_tfds_reads_the_cache_as_a_data_source(cache, sample, capfd):
  builder = datasets.prepare("gsm8k", split="eval", data_dir=DATA, cache_dir=cache)
  source = tfds.data_source(
    "corpus", split="eval", data_dir=cache, download=False, builder_kwargs={"config": builder.builder_config}
  )
  assert [row["question"].decode() for row in source] == [example.question for example in sample("gsm8k")]
  assert "tensorflow" not in sys.modules
  assert capfd.readouterr().out == ""


def test_two_processes_may_prepare_at_once(tmp_path, corpus, monkeypatch):
  make = corpus("amc23", [question(i) for i in range(5)])
  parse, others = datasets._parse, []

  def parse_while_another_prepares(*args):
    if not others:
      others.append(None)
      others[0] = make()
    return parse(*args)

  monkeypatch.setattr(datasets, "_parse", parse_while_another_prepares)
  mine = make()
  assert list(mine) == list(others[0]) and len(mine) == 5 and mine.counts == others[0].counts
  assert len(written(tmp_path)) == 1 and not list(tmp_path.rglob("incomplete*"))


def test_a_process_killed_half_way_leaves_no_half_cache(tmp_path, corpus):
  make = corpus("amc23", [question(i) for i in range(5)])
  script = f"""
import os
from rredcot_jax.data import datasets
parse = datasets._parse
datasets._parse = lambda schema, row, match: os._exit(9) if row.where == "line 4" else parse(schema, row, match)
datasets.Dataset("amc23", split="eval", data_dir={str(tmp_path)!r})
"""
  root = pathlib.Path(__file__).parent.parent
  assert subprocess.run([sys.executable, "-c", script], cwd=root).returncode == 9
  assert list(tmp_path.rglob("incomplete*")) and not written(tmp_path)
  assert len(make()) == 5


# ---- The loader --------------------------------------------------------------------------


def deal(task, steps, *, seed=0, batch_size=8, state=None):
  """The batches of `steps` steps, and the state after them as a checkpoint carries it."""
  loader = batching.prompt_iterator(task, batch_size, seed)
  if state is not None:
    loader.set_state(state)
  return [next(loader).tolist() for _ in range(steps)], json.loads(json.dumps(loader.get_state()))


@pytest.fixture
def numbers(corpus):
  return corpus("amc23", [question(i) for i in range(20)])()


def test_each_epoch_is_shuffled_anew(numbers):
  batches, _ = deal(numbers, 12)
  dealt = [i for batch in batches for i in batch]
  for epoch in range(4):  # Batches of 8 do not divide epochs of 20.
    assert sorted(dealt[20 * epoch : 20 * epoch + 20]) == list(range(20))
  assert dealt[:20] != dealt[20:40]
  assert deal(numbers, 12, seed=1)[0] != batches


def test_a_restored_loader_goes_on(numbers):
  whole, _ = deal(numbers, 12)
  first, state = deal(numbers, 5)
  rest, _ = deal(numbers, 7, state=state)
  assert first + rest == whole


def test_a_batch_must_fit_the_task(numbers):
  with pytest.raises(ValueError, match="yields 20 prompts and a step needs 40"):
    batching.prompt_iterator(numbers, 40, 0)


def test_a_corpus_larger_than_tfds_buffer_is_prepared_without_tensorflow(tmp_path, monkeypatch):
  from tensorflow_datasets.core import shuffle

  monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 100)
  (tmp_path / "mine").mkdir()
  rows = [{"q": f"{i} plus 0?", "s": f"It is {i}.", "a": str(i)} for i in range(40)]
  for split in ("train", "test"):
    (tmp_path / "mine" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  fields = {"question": "q", "solution": "s", "answer": "a"}
  task = datasets.Dataset("mine", split="eval", data_dir=tmp_path, fields=fields, matcher="exact")
  assert len(task) == 40 and task[7].answer == "7"
  assert shuffle.MAX_MEM_BUFFER_SIZE == 100


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"question": "q", "solution": "s"}, "neither 'answer' nor 'derive'"),
    ({"question": "q", "answer": "a"}, "has no 'solution'"),
    ({"question": "q", "solution": "s", "answr": "a"}, "did you mean 'answer'"),
    ({"question": "q", "solution": "s", "derive": "box"}, "did you mean 'boxed'"),
  ],
)
def test_field_names_that_make_no_schema_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    datasets.Schema.of_fields(fields)


def test_only_the_given_examples_are_dealt(numbers):
  loader = batching.prompt_iterator(numbers, 4, 0, np.array([1, 3, 5, 7]))
  assert sorted(next(loader).tolist()) == [1, 3, 5, 7]
