import concurrent.futures
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import time
from unittest import mock

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
    start = time.perf_counter()
    assert match(text, "42") == 0.0
    assert time.perf_counter() - start < 1.0


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
  start = time.perf_counter()
  assert verifiers.boxed_answer(text) is None
  assert verifiers.boxed_answer(text + "}" * MEGABYTE) is None
  assert time.perf_counter() - start < 5.0


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
# Mathematics.
# ---------------------------------------------------------------------------

THIRD = r"\frac{1}{3}"
HOSTILE_MATH = {
  "power": "9**9**9**9",
  "latex power": "9^{9^{9^{9}}}",
  "factorials": "9!!!!!!",
  "matrix": r"\operatorname{zeros}(100000,100000)",
  "nested": r"\frac{" * 100_000,
  "boxes": r"\boxed{" * 100_000,
  "braces": "{" * MEGABYTE,
  "brackets": "(" * 400 + "1" + ")" * 400,
  "brackets within bounds": "(" * 30 + "1" + ")" * 30,
  "roots": r"\sqrt" * 200 + "2",
  "minuses": "-" * 900 + "1",
  "expansion": "(x+y+z)^{500}",
  "exponent": "1e999999999",
  "dollars": "$" * MEGABYTE,
  "null": "\0" * 10,
  "megabyte of null": "\0" * MEGABYTE,
  "surrogates": "\ud800" * 10,
  "code": "__import__('os').getpid()",
  "empty": "",
}


@pytest.fixture
def judge_pid():
  """The process id of the judge that the next call in this thread will use."""
  assert verifiers.math_match(r"\boxed{0.333333333}", THIRD) == 1.0
  return verifiers._JUDGES._idle[-1]._process.pid


@pytest.fixture
def no_judge(monkeypatch):
  def equal(gold, answer):
    raise AssertionError(f"The library was asked about {answer[:50]!r}.")

  monkeypatch.setattr(verifiers._JUDGES, "equal", equal)


@pytest.mark.parametrize(
  "response, answer",
  [
    ("0.5", r"\frac{1}{2}"),
    (r"\dfrac{1}{2}", r"\frac{1}{2}"),
    (r"\frac12", "1/2"),
    ("1/2", "0.5"),
    (r"1\frac{1}{2}", "1.5"),
    ("0.333333", THIRD),
    (r"\sqrt{117}", r"3\sqrt{13}"),
    (r"\frac{1}{\sqrt2}", r"\frac{\sqrt{2}}{2}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("x = 5", "5"),
    ("5", "x=5"),
    ("x = 3^2", "9"),
    (r"5\text{ cm}", "5"),
    ("5", r"5\text{ cm}"),
    (r"90^\circ", "90"),
    ("1,234", "1234"),
    ("1{,}234", "1234"),
    (r"1,\!234", "1234"),
    (r"\$5", "5"),
    ("\N{MINUS SIGN}5", "-5"),
    ("\N{MINUS SIGN}\\frac{1}{2}", "-0.5"),
    (r"50\%", "0.5"),
    (r"50\%", "50"),
    (r"\left(1, 2\right)", "(1,2)"),
    (r"[0,\infty)", r"\left[0, \infty\right)"),
    (r"\{2,1\}", r"\{1,2\}"),
    ("3, 1, 2", "1,2,3"),
    (r"[3,4]\cup[1,2]", r"[1,2]\cup[3,4]"),
    (r"3+\sqrt2, 3-\sqrt2", r"3\pm\sqrt{2}"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    ("$0.5$", r"$\frac{1}{2}$"),
    (r"\int_0^1 x^2 dx", r"\frac{1}{3}"),
  ],
)
def test_math_match_accepts_what_is_equal(response, answer):
  assert verifiers.math_match(rf"thought</think>So \boxed{{{response}}}.", answer) == 1.0
  assert verifiers.math_match(f"thought</think>{response}", answer) == 1.0


@pytest.mark.parametrize(
  "response, answer",
  [
    ("2", "3"),
    ("-5", "5"),
    ("0.33", THIRD),
    ("0.25", r"\frac{1}{2}"),
    ("(2,1)", "(1,2)"),
    ("(0,1)", "[0,1)"),
    ("1,2", "1,2,3"),
    ("1,2,3,4", "3"),
    ("x^2+1", "(x+1)^2"),
    ("y=5", "x=5"),
    ("1", "2x+z=1"),  # Though `2x+z=1` answers 1: the gold answer goes first.
    (r"\text{north}", r"\text{south}"),
    ("no mathematics", "5"),
    ("5", "no mathematics"),
    ("5", ""),
    ("5", "1" * (verifiers.MAX_ANSWER_CHARS + 1)),
  ],
)
def test_math_match_rejects_what_is_not(response, answer):
  assert verifiers.math_match(rf"thought</think>So \boxed{{{response}}}.", answer) == 0.0


@pytest.mark.parametrize(
  "text, expected",
  [
    (rf"\boxed{{{THIRD}}}", 1.0),
    (rf"\boxed{{2}} no: \boxed{{{THIRD}}}", 1.0),
    (rf"\boxed{{{THIRD}}} no: \boxed{{2}}", 0.0),
    (rf"\boxed{{{THIRD}}}</think>2", 0.0),
    (r"\boxed{2}</think>The answer is $\frac{2}{6}$.", 1.0),
    (r"</think>$\frac{2}{6}$", 1.0),
    (r"</think>\(\frac{2}{6}\)", 1.0),
    (rf"{THIRD}", 0.0),
    (rf"</think>\boxed{{{THIRD}", 0.0),
    (rf"</think>{THIRD} \boxed{{}}", 0.0),
  ],
)
def test_math_match_reads_the_box_and_else_the_final_answer(text, expected):
  assert verifiers.math_match(text, THIRD) == expected


def test_equal_texts_and_plain_numbers_do_not_need_the_library(no_judge):
  assert verifiers.math_match(rf"\boxed{{{THIRD}}}", THIRD) == 1.0
  assert verifiers.math_match(rf"\boxed{{${THIRD}$}}", THIRD) == 1.0
  assert verifiers.math_match(r"\boxed{1,234.50}", "1234.5") == 1.0
  assert verifiers.math_match(r"\boxed{1234}", "1235") == 0.0
  assert verifiers.math_match(r"\boxed{" + "(" * 33 + "1" + ")" * 33 + "}", "2") == 0.0
  with pytest.raises(AssertionError, match="was asked"):
    verifiers.math_match(r"\boxed{0.5}", r"\frac{1}{2}")


@pytest.mark.parametrize("name", HOSTILE_MATH)
def test_hostile_mathematics_is_wrong_and_the_next_answer_is_right(name, judge_pid):
  hostile = HOSTILE_MATH[name]
  start = time.perf_counter()
  assert verifiers.math_match(rf"</think>\boxed{{{hostile}}}", THIRD) == 0.0
  assert time.perf_counter() - start < 5.0
  start = time.perf_counter()
  assert verifiers.math_match(r"</think>\boxed{0.333333333}", THIRD) == 1.0
  assert time.perf_counter() - start < 5.0
  assert verifiers._JUDGES._idle[-1]._process.pid == judge_pid  # Nothing had to start again.


def test_a_hostile_gold_answer_is_bounded_too(judge_pid):
  assert verifiers.math_match(r"\boxed{\frac{1}{2}}", "9^{9^{9^{9}}}") == 0.0
  assert verifiers.math_match(r"\boxed{\frac{1}{2}}", "{" * MEGABYTE) == 0.0


def _nothing():
  pass


def _misbehave(gold, answer):
  """Does what `gold` says; True if nothing stops it."""
  if gold == "hang":
    while True:
      pass
  elif gold == "hang in C":
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    9**9**9
  elif gold == "allocate":
    return len(bytearray(int(answer))) == int(answer)
  elif gold == "abort":
    os.abort()
  elif gold == "raise":
    raise RuntimeError(answer)
  elif gold == "eval":
    eval(answer)
  elif gold == "exec":
    exec(answer)
  elif gold == "compile":
    compile(answer, "<string>", "eval")
  elif gold == "system":
    os.system(answer)
  elif gold == "write":
    open(answer, "w").close()
  elif gold == "read":
    open(answer).close()
  return True


@pytest.fixture(scope="module")
def misbehaving():
  judge = verifiers._Judge(prepare=_nothing, equal=_misbehave, seconds=0.5, memory=1 << 30)
  yield judge
  judge.close()


@pytest.mark.parametrize(
  "gold, answer, verdict",
  [
    ("be good", "", True),
    ("hang", "", False),
    ("hang in C", "", False),
    ("allocate", str(1 << 20), True),
    ("allocate", str(1 << 30), False),
    ("abort", "", False),
    ("raise", "", False),
    ("eval", "1", False),
    ("exec", "1", False),
    ("compile", "1", False),
    ("system", "true", False),
    ("read", "/dev/null", True),
    ("write", "/dev/null", False),
  ],
)
def test_a_judge_outlives_whatever_an_answer_does(misbehaving, gold, answer, verdict):
  start = time.perf_counter()
  assert misbehaving.equal(gold, answer) == verdict
  assert time.perf_counter() - start < 5.0
  assert misbehaving.equal("be good", "") is True


def test_the_real_judge_has_the_memory_bound(judge_pid):
  limits = pathlib.Path(f"/proc/{judge_pid}/limits").read_text().splitlines()
  space = next(line for line in limits if line.startswith("Max address space")).split()
  assert space[3:5] == [str(verifiers.JUDGE_BYTES)] * 2


_EVALUATED = r"""
evaluated = []
sys.addaudithook(lambda event, args: evaluated.append(str(args[0])) if event == "compile" else None)
_equal("48151623", "48151623.5")
_equal("\\frac{48151623}{2}", "48151623e3")
_equal("48,151623\\%", "48,151,623")
_equal("48151623", "__import__('os').system('touch 48151623')")
_equal("x=48151623", "\\operatorname{__import__('os').system}(48151623)")
print(sum("48" in text or "__import__" in text for text in evaluated))
"""


@pytest.mark.parametrize("prepared", [True, False])
def test_the_library_evaluates_no_text_once_it_is_prepared(prepared, tmp_path):
  functions = (verifiers._equal, verifiers._prepare)
  program = verifiers._source(functions, ("_prepare()" if prepared else "") + _EVALUATED)
  result = subprocess.run(
    [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120, cwd=tmp_path
  )
  # Unprepared it does, which shows that this test can tell. Where a new version no longer does: `_prepare` can go.
  assert (int(result.stdout) == 0) == prepared
  assert not list(tmp_path.iterdir())


def test_code_in_an_answer_is_not_run(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for code in ("__import__('os').system('touch X')", "open('X','w')", r"\operatorname{open}('X','w')"):
    assert verifiers.math_match(rf"\boxed{{{code}}}", "5") == 0.0
  assert not list(tmp_path.iterdir())


def test_a_judge_that_is_killed_from_outside_costs_no_answer(judge_pid):
  os.kill(judge_pid, signal.SIGKILL)
  assert verifiers.math_match(r"\boxed{0.5}", r"\frac{1}{2}") == 1.0
  assert verifiers._JUDGES._idle[-1]._process.pid != judge_pid


def _fail():
  raise OSError("no such library")


def test_a_judge_that_cannot_start_says_why():
  with pytest.raises(RuntimeError, match="no such library"):
    verifiers._Judge(prepare=_fail)


def test_a_judge_ends_with_its_client():
  judge = verifiers._Judge(prepare=_nothing, equal=_misbehave)
  judge._connection.close()
  assert judge._process.wait(timeout=10) == 0


_RUN = r"""
import os
from rredcot_jax.tasks import verifiers
assert verifiers.math_match(r"\boxed{0.5}", r"\frac{1}{2}") == 1.0
pid = verifiers._JUDGES._idle[0]._process.pid
child = os.fork()
if child == 0:
  ok = not verifiers._JUDGES._idle and verifiers.math_match(r"\boxed{0.5}", r"\frac{1}{2}") == 1.0
  verifiers._JUDGES.close()
  os._exit(0 if ok else 1)
assert os.waitpid(child, 0)[1] == 0
assert verifiers.math_match(r"\boxed{0.25}", r"\frac{1}{4}") == 1.0
assert verifiers._JUDGES._idle[0]._process.pid == pid
print(pid, *("jaxlib" in open(f"/proc/{process}/maps").read() for process in ("self", pid)))
"""


def test_a_run_ends_and_takes_its_judges_along_and_forks_get_their_own():
  root = pathlib.Path(verifiers.__file__).parents[2]
  result = subprocess.run([sys.executable, "-c", _RUN], capture_output=True, text=True, timeout=120, cwd=root)
  assert result.returncode == 0, result.stderr
  pid, *has_jax = result.stdout.split()
  assert has_jax == ["True", "False"]  # The run's own process has, its judge has not.
  assert not pathlib.Path(f"/proc/{pid}").exists()


def test_math_verify_is_asked_for_by_name_where_it_is_missing(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ImportError, match="pip install math-verify"):
    verifiers.math_match(r"\boxed{2}", "2")


def test_threads_get_the_verdicts_of_their_own_answers():
  expected = [float(i % 3 == 0) for i in range(48)]

  def verdict(i):
    response = f"{2 * i + 1}.50" if expected[i] else ("9^{9^{9^{9}}}" if i == 7 else f"{i}.25")
    return verifiers.math_match(rf"\boxed{{x={response}}}", rf"\frac{{{4 * i + 3}}}{{2}}")

  with concurrent.futures.ThreadPoolExecutor(6) as pool:
    assert list(pool.map(verdict, range(48))) == expected
  assert len(verifiers._JUDGES._idle) <= verifiers.MAX_JUDGES


@given(st.text(), st.text())
def test_any_text_gets_a_verdict_of_every_kind(text, answer):
  with mock.patch.object(verifiers._JUDGES, "equal", return_value=False):
    for response in (text, "</think>" + text, rf"\boxed{{{text}}}"):
      assert verifiers.math_match(response, answer) in (0.0, 1.0)
      assert verifiers.format_reward(response) in (0.0, 1.0)
      assert 0.0 <= verifiers.composite(response, answer, match=verifiers.math_match, format_weight=0.1) <= 1.0


_PIECES = ("1", "2.5", "x", "+", "-", "/", "=", ",", "(", ")", "[", "]", "{", "}", r"\frac", r"\sqrt", "^", "_", "\\")
_PIECES += (
  r"\text",
  r"\%",
  "$",
  "\0",
  "\ud800",
  "\n",
  r"\begin{pmatrix}",
  r"\end{pmatrix}",
  r"\left",
  "<",
  r"\pi",
  " ",
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(_PIECES), min_size=1, max_size=12).map("".join))
def test_the_judge_has_a_verdict_on_any_text(text):
  pids = [judge._process.pid for judge in verifiers._JUDGES._idle]
  assert verifiers._JUDGES.equal(THIRD, text) in (True, False)
  assert verifiers._JUDGES.equal(text, THIRD) in (True, False)
  assert not pids or [judge._process.pid for judge in verifiers._JUDGES._idle] == pids
