import dataclasses
import os
import pathlib
import subprocess
import sys
import time

import pytest
import tokenizers
import transformers
from helpers import HOSTILE
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from rredcot_jax.data import encoding, reasoning_gym, tasks
from rredcot_jax.data.encoding import Codec
from rredcot_jax.model.tokenizer import load_tokenizer
from rredcot_jax.train import initial

GSM = "reasoning_gym/gsm_symbolic"
SPECIAL_TEXT = "<think></think><pad><eos></think"


@pytest.fixture(scope="module")
def train() -> tasks.Task:
  return tasks.make_task(GSM, split="train", size=300)


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
  return load_tokenizer(initial.locate("gsm_symbolic"))


def test_golden_example(train):
  # Changes with the library's generators (0.1.25 here) and with `split_of`; update it for no other reason.
  example = train[27]
  assert example.question == (
    "A kid has 16 marbles. His cousin has 2 fewer marbles than he has. How many marbles do they have together? "
    "Give the result as your final answer. Do not include units."
  )
  assert example.steps == (
    "His cousin has 16 - 2 = 14 marbles.\n",
    "Together, they have 16 + 14 = 30 marbles.\n",
  )
  assert example.answer == "30"


def test_steps_join_to_the_reference_solution(train):
  for example in train:
    solution, _, last = example.entry["metadata"]["answer_cot"].rpartition("\n")
    assert "".join(example.steps) == solution + "\n"
    assert last.startswith("####") and float(last[4:]) == float(example.answer)
    assert all(step.strip() and step.endswith("\n") for step in example.steps)


def test_blank_lines_belong_to_the_step_before():
  entry = {"metadata": {"answer_cot": "Let us see:\n\n1. a\n   b\n\n\nSo.\n\n#### 3"}}
  assert reasoning_gym.solution_steps(entry) == ("Let us see:\n\n", "1. a\n", "   b\n\n\n", "So.\n\n")
  assert reasoning_gym.solution_steps({"metadata": {}}) == ()
  with pytest.raises(ValueError, match="no line '#### <answer>'"):
    reasoning_gym.solution_steps({"metadata": {"answer_cot": "a\nb"}})


def test_examples_depend_on_seed_split_and_index_alone(train):
  again = tasks.make_task(GSM, split="train", size=17)
  assert [again[i] for i in reversed(range(17))] == [train[i] for i in reversed(range(17))]
  other = tasks.make_task(GSM, split="train", size=17, seed=1)
  assert not {other[i].question for i in range(17)} & {train[i].question for i in range(17)}


def test_questions_do_not_change_with_the_hash_seed(train):
  script = f"from rredcot_jax.data import tasks; print(tasks.make_task({GSM!r}, split='train', size=9)[8].question)"
  root = pathlib.Path(__file__).parent.parent
  environment = {**os.environ, "PYTHONHASHSEED": "123"}
  printed = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, check=True)
  assert printed.stdout.decode().strip() == train[8].question


# Seeds that lie close together, and a data set with few distinct questions, are where splits by seed overlap.
@pytest.mark.parametrize("dataset, size", [("gsm_symbolic", 300), ("chain_sum", 100), ("count_bits", 100)])
def test_no_eval_question_is_in_train(dataset, size):
  def questions(split, seed):
    task = reasoning_gym.ReasoningGym(dataset, split=split, size=size, seed=seed)
    return {task[i].question for i in range(size)}

  train = questions("train", 0) | questions("train", 1)
  assert len(train) > size
  assert not train & (questions("eval", 0) | questions("eval", 1))


def test_iteration_ends(train):
  assert len(list(train)) == len(train) == 300
  for index in (-1, 300):
    with pytest.raises(IndexError):
      train[index]


def test_gold_answers_earn_one_and_others_nothing(train):
  for example in train:
    assert train.reward(example, "".join(example.steps) + f"</think>{example.answer}") == 1.0
    assert train.reward(example, "".join(example.steps) + f"</think>{float(example.answer) + 1}") == 0.0
    assert train.reward(example, "".join(example.steps) + example.answer) == 0.0


def test_scorers_differ_where_documented():
  def score(response, **options):
    task = reasoning_gym.ReasoningGym("gsm_symbolic", split="train", size=1, **options)
    return task.reward(dataclasses.replace(task[0], answer="5", entry={"answer": "5"}), "</think>" + response)

  assert score("6") == 0.0 and score("6", partial_credit=True) == 0.01
  assert score("-5") == 0.0 and score("5 or 7") == 0.0 and score("5 7", partial_credit=True) == 0.0
  assert score("5.0", scorer="numeric") == 1.0 and score("5.0", scorer="exact") == 0.0


def guarded(dataset, **options):
  task = reasoning_gym.ReasoningGym(dataset, split="train", size=100, **options)
  return task, lambda example, answer: task.reward(example, "</think>" + answer)


def test_guards_pay_every_gold_answer():
  for dataset in ("gsm_symbolic", "knights_knaves", "word_sorting"):
    task, score = guarded(dataset)
    assert all(score(example, example.answer) == 1.0 for example in task)


def test_knights_and_knaves_are_told_in_plain_clauses_or_not_at_all():
  task, score = guarded("knights_knaves")
  for example in (task[0], task[1], task[2]):
    gold = example.answer
    clauses = [clause.removeprefix("and ") for clause in gold.rstrip(".").split(", ")]
    for right in (gold, gold.lower(), gold.rstrip("."), " and ".join(reversed(clauses)), ",  ".join(clauses)):
      assert score(example, right) == 1.0, right
    # What the library's scorer pays in full: words that it does not know.
    for wrong in (
      f"it is false that {gold}",
      gold.replace(" is ", " said that nobody is ", 1).replace("nobody is", "is not nobody is"),
      f"not: {gold}",
      gold + " or not",
      f"{gold} {gold}",
      clauses[0],
    ):
      assert score(example, wrong) == 0.0, wrong


def test_word_sorting_wants_all_words_and_no_more():
  task, score = guarded("word_sorting")
  example = task[0]
  assert task._library.score_answer(example.answer + ", more", example.entry) == 1.0
  assert score(example, example.answer + ", more") == 0.0
  assert score(example, example.answer.replace(", ", ",")) == 1.0


def test_a_longer_answer_that_holds_the_right_one_earns_nothing():
  for dataset in ("count_bits", "chain_sum"):
    strict = reasoning_gym.ReasoningGym(dataset, split="train", size=1)
    partial = reasoning_gym.ReasoningGym(dataset, split="train", size=1, partial_credit=True)
    response = f"</think>{strict[0].answer}7"
    assert strict.reward(strict[0], response) == 0.0
    assert 0.0 < partial.reward(partial[0], response) < 1.0


@pytest.mark.parametrize("dataset", ["gsm_symbolic", "chain_sum", "sudoku", "knights_knaves", "bitwise_arithmetic"])
def test_hostile_text_is_wrong_and_quickly_so(dataset):
  task = reasoning_gym.ReasoningGym(dataset, split="train", size=1)
  example = task[0]
  for text in HOSTILE.values():
    for response in (text, "</think>" + text):
      start = time.perf_counter()
      assert task.reward(example, response) == 0.0
      assert time.perf_counter() - start < 1.0


def test_scorer_that_raises_means_wrong():
  task = reasoning_gym.ReasoningGym("gsm_symbolic", split="train", size=1)
  assert task.reward(dataclasses.replace(task[0], entry=None), "</think>5") == 0.0


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -1.0, 1.5])
def test_scores_outside_the_unit_interval_are_not_passed_on(score, monkeypatch):
  task = reasoning_gym.ReasoningGym("gsm_symbolic", split="train", size=1, partial_credit=True)
  example = task[0]
  monkeypatch.setattr(task._library, "score_answer", lambda answer, entry: score)
  assert task.reward(example, "</think>5") == 0.0


@pytest.mark.parametrize(
  "dataset, why",
  [
    ("binary_matrix", "evaluates the answer as Python"),
    ("countdown", "sympy"),
    ("coin_flip", "takes hours"),
    ("game_of_life_halting", "any answer"),
    ("word_ladder", "PYTHONHASHSEED"),
    ("rush_hour", "has not been read"),
  ],
)
def test_unsafe_data_sets_are_refused_by_name(dataset, why):
  with pytest.raises(ValueError, match=f"'{dataset}' of reasoning_gym is refused.*{why}"):
    tasks.make_task(f"reasoning_gym/{dataset}", split="train")


def test_unknown_names_are_answered_with_the_nearest_valid_one():
  with pytest.raises(ValueError, match="did you mean 'gsm_symbolic'"):
    tasks.make_task("reasoning_gym/gsm_symbolik", split="train")
  with pytest.raises(ValueError, match="did you mean 'chain'"):
    tasks.make_task("chian", split="train")
  with pytest.raises(ValueError, match="did you mean 'reasoning_gym/gsm_symbolic'"):
    tasks.make_task("gsm_symbolic", split="train")
  with pytest.raises(ValueError, match="did you mean 'eval'"):
    tasks.make_task(GSM, split="val")
  with pytest.raises(ValueError, match="did you mean 'numeric'"):
    tasks.make_task(GSM, split="train", scorer="number")
  with pytest.raises(ValueError, match="did you mean 'max_terms'"):
    tasks.make_task("reasoning_gym/chain_sum", split="train", options={"max_term": 3})


def test_options_reach_the_library():
  task = tasks.make_task("reasoning_gym/chain_sum", split="eval", options={"min_terms": 2, "max_terms": 2})
  assert task[0].question.count("+") + task[0].question.count("-") == 1
  assert task[0].steps == ()
  with pytest.raises(ValueError, match="reasoning_gym refuses"):
    tasks.make_task("reasoning_gym/chain_sum", split="eval", options={"min_terms": 3, "max_terms": 2})


def test_empty_task_is_refused(monkeypatch):
  with pytest.raises(ValueError, match="a task that yields no prompt"):
    tasks.make_task(GSM, split="train", size=0)
  monkeypatch.setattr(reasoning_gym, "split_of", lambda question: "train")
  with pytest.raises(ValueError, match="a task that yields no prompt for split 'eval'"):
    tasks.make_task(GSM, split="eval")


def test_tokenizer_loads_offline_in_both_ways(tokenizer):
  automatic = transformers.AutoTokenizer.from_pretrained(str(initial.locate("gsm_symbolic")), local_files_only=True)
  assert automatic.get_vocab() == tokenizer.get_vocab()
  assert len(tokenizer) == 1024
  assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<pad>", "<eos>", "<think>", "</think>"]
  assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_missing_tokenizer_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"'tokenizer\.json' is missing"):
    load_tokenizer(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(FileNotFoundError, match=r"'tokenizer_config\.json' is missing"):
    load_tokenizer(str(tmp_path))


def test_layout_of_a_trace(train, tokenizer):
  example = train[0]
  assert Codec(tokenizer).exit_ids == [3]
  assert Codec(tokenizer).prompt_ids(example)[-1] == 2
  assert Codec(tokenizer).decode(Codec(tokenizer).prompt_ids(example)) == example.question + "<think>"
  steps = Codec(tokenizer).solution_ids(example)
  assert tuple(Codec(tokenizer).decode(ids) for ids in steps) == example.steps
  assert Codec(tokenizer).answer_ids(example)[-1] == 1
  trace = [token for step in steps for token in step] + Codec(tokenizer).exit_ids + Codec(tokenizer).answer_ids(example)
  assert train.reward(example, Codec(tokenizer).decode(trace[:-1])) == 1.0


@pytest.mark.parametrize(
  "text",
  [
    "",
    "a\n\nb\n",
    "  lead",
    "x \n \t\r\n y ",
    "\u65e5\u672c \U0001f642 e\u0301 \u0663\u00bd",
    "\0",
    SPECIAL_TEXT,
  ],
)
def test_every_text_round_trips(tokenizer, text):
  assert_round_trip(tokenizer, text)


@given(st.text())
def test_any_text_round_trips(tokenizer, text):
  assert_round_trip(tokenizer, text)


def assert_round_trip(tokenizer, text):
  example = tasks.Example(question=text, steps=(text,), answer=text)
  ids = Codec(tokenizer).prompt_ids(example)[:-1]
  assert Codec(tokenizer).decode(ids) == text
  assert Codec(tokenizer).solution_ids(example) == [ids]
  assert Codec(tokenizer).answer_ids(example)[:-1] == ids
  assert not set(ids) & set(tokenizer.all_special_ids)


def test_special_tokens_in_a_question_stay_text(tokenizer):
  ids = tokenizer.encode(SPECIAL_TEXT)
  assert {0, 1, 2, 3} < set(ids)  # What a plain `encode` would let a question do.
  example = tasks.Example(question=SPECIAL_TEXT, steps=(), answer="")
  assert Codec(tokenizer).prompt_ids(example).count(2) == 1
  assert not {0, 1, 3} & set(Codec(tokenizer).prompt_ids(example))


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
  vocabulary = {character: i for i, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def test_markers_that_a_tokenizer_does_not_call_special_stay_text_too():
  ordinary = byte_tokenizer()
  ordinary.add_tokens([transformers.AddedToken(m, special=False) for m in (encoding.THINK_OPEN, encoding.THINK_CLOSE)])
  marker = ordinary.convert_tokens_to_ids(encoding.THINK_CLOSE)
  assert marker in ordinary.encode(SPECIAL_TEXT, split_special_tokens=True)
  example = tasks.Example(question=SPECIAL_TEXT, steps=(SPECIAL_TEXT,), answer=SPECIAL_TEXT)
  assert Codec(ordinary).exit_ids == [marker]
  assert marker not in Codec(ordinary).prompt_ids(example) + Codec(ordinary).answer_ids(example)
  assert Codec(ordinary).decode(Codec(ordinary).solution_ids(example)[0]) == SPECIAL_TEXT


def test_markers_that_a_vocabulary_lacks_are_spelled_out():
  spelled = byte_tokenizer()
  assert Codec(spelled).decode(Codec(spelled).exit_ids) == "</think>"


def test_token_texts_cover_the_vocabulary(tokenizer):
  texts = Codec(tokenizer).token_texts()
  assert len(texts) == len(tokenizer)
  assert texts[:4] == ["<pad>", "<eos>", "<think>", "</think>"]
  assert [text for text in texts if "\n" in text] == ["\n"]
  assert not [text for text in texts if len(text) > 1 and any(c.isdigit() for c in text)]
  assert texts[tokenizer.encode("é")[0]] == "\ufffd"  # Half a character.
  assert " the" in texts


def test_decode_leaves_out_what_is_no_token(tokenizer):
  assert Codec(tokenizer).decode([3, -1, 1024, 2**70, 3]) == "</think></think>"
  assert Codec(tokenizer).decode(tokenizer.encode("é")[:1]) == "\ufffd"


def test_templates_choose_what_is_asked():
  task = tasks.make_task(GSM, split="eval", size=20, templates=(43, 10))
  boys, ages = (
    sum(words in example.question for example in task) for words in ("toys do they have", "How old is")
  )  # fmt: skip
  others = [e.question for e in task if "do they have together" not in e.question and "How old is" not in e.question]
  assert others == [] and ages > 0 and boys < 20
  longer = tasks.make_task(GSM, split="eval", size=25, templates=(43, 10))
  assert [e.question for e in task] == [longer[i].question for i in range(20)]


@pytest.mark.parametrize(
  ("name", "templates", "message"),
  [(GSM, (43, 1000), "Template 1000"), ("reasoning_gym/chain_sum", (1,), "has no templates")],
)
def test_templates_that_are_not_there_are_named(name, templates, message):
  with pytest.raises(ValueError, match=message):
    tasks.make_task(name, split="train", size=5, templates=templates)
