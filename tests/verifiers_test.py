import concurrent.futures
import json
import pathlib
import subprocess
import sys
import time
import tracemalloc

import pytest
from helpers import HOSTILE, MEGABYTE
from hypothesis import given, settings
from hypothesis import strategies as st

from rredcot_jax.data import verifiers


@pytest.mark.parametrize(
  "text, expected",
  [
    ("1 + 1 = 2\n</think> 2 \n", "2"),
    ("</think>1</think>2", "2"),
    ("</think>2</think>", None),
    ("</think> \n ", None),
    ("the thought was never left: 2", None),
    ("", None),
    ("</think>" + "x" * verifiers.MAX_ANSWER_CHARS, "x" * verifiers.MAX_ANSWER_CHARS),
    ("</think>" + "x" * (verifiers.MAX_ANSWER_CHARS + 1), None),
    ("</think>two\nlines", "two\nlines"),
  ],
)
def test_final_answer_is_what_follows_the_last_close(text, expected):
  assert verifiers.final_answer(text) == expected


def test_exact_match_reads_the_answer_and_not_the_thought():
  assert verifiers.exact_match("wrong\n</think> 42\n", "42") == 1.0
  assert verifiers.exact_match("</think>42", " 42 ") == 1.0
  assert verifiers.exact_match("42</think>41", "42") == 0.0
  assert verifiers.exact_match("42", "42") == 0.0
  assert verifiers.exact_match("</think>", "") == 0.0


@pytest.mark.parametrize(
  "response, answer",
  [
    ("42", "42"),
    ("42.", "42"),
    ("42.0", "42"),
    ("+42", "42"),
    ("-42", "-42.00"),
    ("1,234,567.5", "1234567.5"),
    ("$1,234", "1234"),
    ("-$5", "-5"),
    ("50%", "50"),
    ("50%.", "50"),
    (".5", "0.5"),
    ("1e3", "1000"),
    ("007", "7"),
    ("\N{EN DASH}5", "-5"),
    ("\N{MINUS SIGN}5", "-5"),
    ("\N{EURO SIGN}5", "5"),
    ("5." + "0" * (verifiers.MAX_NUMBER_CHARS - 2), "5"),
  ],
)
def test_numeric_match_accepts_the_ways_to_write_a_number(response, answer):
  assert verifiers.numeric_match("</think>" + response, answer) == 1.0


@pytest.mark.parametrize(
  "response, answer",
  [
    ("-42", "42"),
    ("42", "4"),
    ("1,23", "123"),
    ("12,345,6", "123456"),
    ("1.2.3", "1.2"),
    ("42 43", "42"),
    ("x = 42", "42"),
    ("4\u0662", "42"),
    ("1_000", "1000"),
    ("0x2a", "42"),
    ("$", "0"),
    ("e5", "0"),
    (".", "0"),
    ("%", "0"),
    ("0.30000000000000004", "0.3"),
    ("5." + "0" * (verifiers.MAX_NUMBER_CHARS - 1), "5"),
    ("42", "no number"),
    ("no number", "no number"),
  ],
)
def test_numeric_match_rejects_everything_else(response, answer):
  assert verifiers.numeric_match("</think>" + response, answer) == 0.0


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("match", [verifiers.exact_match, verifiers.numeric_match])
def test_hostile_text_is_wrong_and_quickly_so(match, name):
  for text in (HOSTILE[name], "</think>" + HOSTILE[name], "</think>42" + HOSTILE[name]):
    start = time.process_time()
    assert match(text, "42") == 0.0
    assert time.process_time() - start < 1.0


@given(st.text())
def test_any_text_gets_a_verdict(text):
  for response in (text, "</think>" + text):
    assert verifiers.exact_match(response, "42") in (0.0, 1.0)
    assert verifiers.numeric_match(response, "42") in (0.0, 1.0)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_grouping_does_not_change_a_number(number):
  assert verifiers.numeric_match(f"</think>{number:,}", f"{number}") == 1.0
  assert verifiers.numeric_match(f"</think>{number + 1:,}", f"{number}") == 0.0


# ---------------------------------------------------------------------------
# Boxes, the format, composites.
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
  "text, expected",
  [
    (r"so \boxed{2}", "2"),
    (r"so $\boxed{ \frac{1}{2} }$.", r"\frac{1}{2}"),
    (r"\boxed{1} or rather \boxed{2}", "2"),
    (r"\boxed{1} or rather \fbox {2}", "2"),
    (r"\boxed{\boxed{3}}", "3"),
    (r"\boxed{a \text{ b {c} }}", r"a \text{ b {c} }"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\{1, 2)}", r"\{1, 2)"),
    (r"\boxed{1\\}", r"1\\"),
    (r"} \boxed{1} {", "1"),
    (r"\boxed{1} and \boxed{2", "1"),
    (r"\boxed{1}</think>\boxed{2}", "2"),
    (r"\boxed{1}</think>2", None),
    (r"\boxed{1} {\boxed{}}", None),
    (r"\boxed{1} \boxed{ }", None),
    (r"\boxed{2", None),
    (r"\boxed 2", None),
    (r"\boxed\{2\}", None),
    ("boxed{2}", None),
    ("{2}", None),
    ("", None),
    (r"\boxed{" + "x" * verifiers.MAX_ANSWER_CHARS + "}", "x" * verifiers.MAX_ANSWER_CHARS),
    (r"\boxed{1}\boxed{" + "x" * (verifiers.MAX_ANSWER_CHARS + 1) + "}", None),
  ],
)
def test_boxed_answer_is_what_the_last_balanced_box_holds(text, expected):
  assert verifiers.boxed_answer(text) == expected
  assert verifiers.gold_answer_from_solution(text) == expected


@pytest.mark.parametrize("opening", ["{", "\\boxed{", "\\fbox {", "\\boxed", "\\", "\\boxed ", "}", "{}"])
def test_boxes_are_read_in_linear_time(opening):
  text = opening * (MEGABYTE // len(opening))
  start = time.process_time()
  assert verifiers.boxed_answer(text) is None
  assert verifiers.boxed_answer(text + "}" * MEGABYTE) is None
  assert time.process_time() - start < 5.0


@pytest.mark.parametrize(
  "text, expected",
  [
    ("thought</think>2", 1.0),
    ("<think>thought</think>2", 1.0),
    (" \n<think>thought</think> \\boxed{2}", 1.0),
    ("</think>2", 1.0),
    ("2", 0.0),
    ("thought</think> \n", 0.0),
    ("thought</think>1</think>2", 0.0),
    ("<think><think>thought</think>2", 0.0),
    ("thought <think>more</think>2", 0.0),
    ("thought</think>2<think>", 0.0),
    ("thought</think>" + "2" * (verifiers.MAX_ANSWER_CHARS + 1), 0.0),
    ("", 0.0),
  ],
)
def test_format_reward_wants_one_close_and_an_answer(text, expected):
  assert verifiers.format_reward(text) == expected


def test_composite_weighs_the_match_against_the_format():
  def reward(text, weight):
    return verifiers.composite(text, "2", match=verifiers.exact_match, format_weight=weight)

  assert reward("</think>2", 0.25) == 1.0
  assert reward("</think>1", 0.25) == 0.25
  assert reward("</think></think>2", 0.25) == 0.75
  assert reward("1", 0.25) == 0.0
  assert reward("</think>1", 0.0) == 0.0


@pytest.mark.parametrize("weight", [-0.1, 1.0, 2.0, float("nan")])
def test_composite_refuses_weights_outside_the_unit_interval(weight):
  with pytest.raises(ValueError, match="format_weight"):
    verifiers.composite("</think>2", "2", match=verifiers.exact_match, format_weight=weight)


def test_verifiers_are_found_by_name():
  assert {name: match("</think>2.0", "2") for name, match in verifiers.VERIFIERS.items()} == {
    "exact": 0.0,
    "numeric": 1.0,
    "math": 1.0,
  }


# ---------------------------------------------------------------------------
# Mathematics. What is read, equal and simple enough is in mathematics_test.py.
# ---------------------------------------------------------------------------

THIRD = r"\frac{1}{3}"
PAIRS = [json.loads(line) for line in (pathlib.Path(__file__).parent / "data/verifiers/pairs.jsonl").open()]
# As measured by benchmarks/verifiers.py.
MOST_FALSE_POSITIVES, MOST_FALSE_NEGATIVES = 0, 9


def boxed(answer):
  return rf"thought</think>So \boxed{{{answer}}}."


def test_no_more_pairs_are_misjudged_than_were_measured():
  assert min(sum(pair["kind"] == kind for pair in PAIRS) for kind in ("adversarial", "honest")) >= 300
  wrong = [p for p in PAIRS if verifiers.math_match(boxed(p["answer"]), p["gold"]) != (p["kind"] == "honest")]
  false_positives = [pair for pair in wrong if pair["kind"] == "adversarial"]
  assert len(false_positives) <= MOST_FALSE_POSITIVES, false_positives
  assert len(wrong) - len(false_positives) <= MOST_FALSE_NEGATIVES, wrong


@pytest.mark.parametrize(
  "answer, gold",
  [
    (r"17\cdot 23", "391"),
    ("x^2-4", "(x-2)(x+2)"),
    ("(x-2)(x+2)", "x^2-4"),
    (r"\sqrt{117}", r"3\sqrt{13}"),
    ("2x=10", "x=5"),
    ("|x|<2", "(-2,2)"),
    (r"\sin\frac{\pi}{6}", r"\frac{1}{2}"),
  ],
)
def test_the_question_handed_back_pays_only_where_any_form_does(answer, gold):
  assert verifiers.math_match(boxed(answer), gold) == 0.0
  assert verifiers.math_match(boxed(answer), gold, any_form=True) == (
    0.0 if "<" in answer or answer == "2x=10" else 1.0
  )
  assert verifiers.math_match(boxed(gold), gold) == 1.0


@pytest.mark.parametrize(
  "text, expected",
  [
    (rf"\boxed{{{THIRD}}}", 1.0),
    (rf"\boxed{{2}} no: \boxed{{{THIRD}}}", 1.0),
    (rf"\boxed{{{THIRD}}} no: \boxed{{2}}", 0.0),
    (rf"\boxed{{{THIRD}}}</think>2", 0.0),
    (rf"\boxed{{{THIRD}}}</think>", 0.0),
    (r"\boxed{2}</think>The answer is $\frac{1}{3}$.", 1.0),
    (r"</think>$\frac{1}{3}$", 1.0),
    (r"</think>\(\frac{1}{3}\)", 1.0),
    (rf"</think>{THIRD}", 1.0),
    (rf"{THIRD}", 0.0),
    (rf"</think>\boxed{{{THIRD}", 0.0),
    (rf"</think>{THIRD} \boxed{{}}", 0.0),
    (rf"</think>The answer is ${THIRD}$, \boxed{{}}", 0.0),
    (rf"</think>\fbox{{ ${THIRD}$", 0.0),
    (r"</think>$2$ or $\frac{1}{3}$", 0.0),
    (r"</think>$\frac{1}{3}$ or $2$", 0.0),
    (r"</think>Since $x>0$, $x=\frac{1}{3}$.", 1.0),
    (r"</think>It is $\frac{1}{3}$, not $2$.", 0.0),
  ],
)
def test_math_match_reads_the_box_and_else_the_final_answer(text, expected):
  assert verifiers.math_match(text, THIRD) == expected


@pytest.mark.parametrize(
  "text, expected",
  [
    ("42", "42"),
    ("$42$", "42"),
    ("**42**", "42"),
    (r"\[ 42 \]", "42"),
    ("$$42$$", "42"),
    ("The final answer is: 42", "42"),
    ("Answer: **42**", "42"),
    ("the answer", "the answer"),
    (r"\$5", r"\$5"),
    ("$5", "$5"),
    ("$1$ and $2$", "1 , 2"),
    ("$1$, $2$ or $3$", "1 , 2 or 3"),
    ("with $a$: $1$ or $2$", "1 or 2"),
    ("they are $1$, $2$", "1 , 2"),
    ("as $a$, $1$", "1"),
    ("$5$ cm", r"5\text{ cm}"),
    ("so $5$ cm", "5"),
    ("first $1$ then $2$.", "2"),
  ],
)
def test_the_mathematics_of_an_answer(text, expected):
  assert verifiers.mathematics_of(text) == expected


@pytest.mark.parametrize(
  "missing", [None, "", " ", "</think>", "\ud800", "None", "null", "\\boxed{}", "\N{COMBINING ACUTE ACCENT}"]
)
@pytest.mark.parametrize("match", [verifiers.exact_match, verifiers.numeric_match, verifiers.math_match])
def test_no_answer_and_no_gold_answer_match_nothing_and_never_raise(match, missing):
  assert match(missing, "5") == 0.0
  assert match("</think>5", missing) == 0.0
  assert match(missing, missing) in (0.0, 1.0)
  assert verifiers.format_reward(missing) == 0.0
  assert verifiers.final_answer(missing) is None
  assert verifiers.composite(missing, "5", match=match, format_weight=0.5) == 0.0


HOSTILE_MATH = {
  "power": "9**9**9**9",
  "latex power": "9^{9^{9^{9}}}",
  "powers in brackets": "((((9^{999})^{999})^{999})^{999})",
  "factorials": "9!!!!!!",
  "many factorials": "999!" * 250,
  "many powers of ten": "10^{999}" * 120,
  "root of zero": r"\sqrt{0x}+\sqrt{0\cdot 7x}",
  "root of digits": r"\sqrt{" + "9" * 1000 + "}",
  "root of a product": r"\sqrt{" + r"9e999\cdot " * 90 + "1}",
  "matrix": r"\operatorname{zeros}(100000,100000)",
  "nested": r"\frac{" * 100_000,
  "nested within bounds": r"\frac{1}{" * 100 + "x" + "}" * 100,
  "boxes": r"\boxed{" * 100_000,
  "braces": "{" * MEGABYTE,
  "brackets": "(" * 400 + "1" + ")" * 400,
  "brackets within bounds": "(" * 18 + "+x".join(["x"] * 200) + ")" * 18,
  "roots": r"\sqrt" * 200 + "2",
  "functions": r"\ln" * 300 + "x",
  "slashes": "1/" * 500 + "1",
  "minuses": "-" * 900 + "1",
  "expansion": "(x+y+z)^{500}",
  "list": ",".join(["x+1"] * 200),
  "list within bounds": ",".join([r"\sin x"] * 32),
  "unions": r"\cup".join(["(1,2)"] * 100),
  "halves": "\N{VULGAR FRACTION ONE HALF}" * 1000,
  "tower": r"+e^{e^{e^{x}}}" * 70,
  "exponent": "1e999999999",
  "dollars": "$" * MEGABYTE,
  "open dollars": "$\\(" * 340,
  "null": "\0" * 10,
  "megabyte of null": "\0" * MEGABYTE,
  "surrogates": "\ud800" * 10,
  "code": "__import__('os').getpid()",
  "empty": "",
}


@pytest.mark.parametrize("name", HOSTILE_MATH)
def test_hostile_mathematics_is_wrong_in_bounded_time_and_memory(name):
  hostile = HOSTILE_MATH[name]
  for gold in (THIRD, r"\sin x+\ln y", "(1,2)", "x,y"):
    start = time.process_time()
    assert verifiers.math_match(boxed(hostile), gold) == 0.0
    assert verifiers.math_match(boxed(gold), hostile) == 0.0
    assert time.process_time() - start < 5.0
  tracemalloc.start()
  verifiers.math_match(boxed(hostile), "x")
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 16 * MEGABYTE + 64 * len(hostile)


_WATCHED = r"""
import sys
from rredcot_jax.data import verifiers
from verifiers_test import HOSTILE_MATH, PAIRS, boxed

verifiers.math_match(boxed("\\sin x+0.333333"), "\\ln x+1")  # Whatever is imported late is imported now.
seen = []
sys.addaudithook(lambda event, args: seen.append(event))
for text in [*HOSTILE_MATH.values(), *(pair["answer"] for pair in PAIRS)]:
  verifiers.math_match(boxed(text), "\\frac{1}{3}")
  verifiers.math_match(boxed(text), "\\sin x")
print(sorted(set(seen) - {"array.__new__", "builtins.id"}))
"""


def test_no_answer_is_compiled_run_or_lets_anything_be_opened_or_started():
  tests = pathlib.Path(__file__).parent
  result = subprocess.run(
    [sys.executable, "-c", _WATCHED], capture_output=True, text=True, timeout=300, cwd=tests, check=False
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout.splitlines()[-1] == "[]"


def test_threads_get_the_verdicts_of_their_own_answers():
  expected = [float(i % 3 == 0) for i in range(200)]

  def verdict(i):
    value = f"{i}\\sqrt{{2}}+\\ln{{{i + 2}}}" if expected[i] else f"{i}\\sqrt{{3}}+\\ln{{{i + 2}}}"
    return verifiers.math_match(boxed(value), f"\\ln({i + 2})+\\sqrt{{2}}\\cdot {i}")

  with concurrent.futures.ThreadPoolExecutor(6) as pool:
    assert list(pool.map(verdict, range(2, 200))) == expected[2:]


_TEXT = st.text() | st.text(alphabet="0123456789xy+-*/^_=<>()[]{}|\\$%,.;:!&° ")


@given(_TEXT, _TEXT)
def test_any_text_gets_a_verdict_of_every_kind(text, answer):
  for response in (text, "</think>" + text, rf"\boxed{{{text}}}"):
    assert verifiers.math_match(response, answer) in (0.0, 1.0)
    assert verifiers.math_match(response, answer, any_form=True) in (0.0, 1.0)
    assert verifiers.format_reward(response) in (0.0, 1.0)
    assert 0.0 <= verifiers.composite(response, answer, match=verifiers.math_match, format_weight=0.1) <= 1.0


@given(_TEXT.filter(str.strip))
def test_a_gold_answer_matches_itself(text):
  text = text.strip()
  if verifiers.mathematics_of(text) and "\\boxed" not in text and "</think>" not in text:
    assert verifiers.math_match("</think>" + text, text) == 1.0


_PIECES = (
  r"1 2.5 0.333333 9e999 10^{999} 999! x y e i + - * / = , ( ) [ ] { } \{ \} | ^ _ \ \\ & < : ! ' ° ½ ² \frac \sqrt"
  r" \sin \ln \log_ \binom \text{cm} \% $ \pm \cup \setminus \mathbb{R} \in \infty \pi \begin{pmatrix} \end{pmatrix} f("
).split()
_PIECES += [" ", "\n", "\0", "\ud800", " or ", "1,234"]
_GOLDS = [THIRD, r"\sin x+\ln y", "(1,2)", "x=5", r"\{1,2\}", r"x>2", "5\\text{ cm}", "(x+1)(x-2)", r"\pm 2", "3:4"]


@settings(max_examples=200)
@given(
  st.lists(st.sampled_from(_PIECES), min_size=1, max_size=30).map("".join), st.sampled_from(_GOLDS), st.integers(1, 300)
)
def test_any_mathematics_gets_a_verdict_soon(text, gold, times):
  start = time.process_time()
  for answer in (text, (text * times)[: verifiers.MAX_ANSWER_CHARS]):
    assert verifiers.math_match(boxed(answer), gold) in (0.0, 1.0)
    assert verifiers.math_match(boxed(gold), answer) in (0.0, 1.0)
  assert time.process_time() - start < 10.0
