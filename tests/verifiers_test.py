import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rredcot_jax.tasks import verifiers

MEGABYTE = 1 << 20
HOSTILE = {
  "braces": "{" * MEGABYTE,
  "nested": "[" * MEGABYTE + "]" * MEGABYTE,
  "power": "9**9**9**9",
  "null": "\0" * MEGABYTE,
  "closes": "</think>" * (MEGABYTE // 8),
  "almost closes": "</think" * (MEGABYTE // 7),
  "digits": "9" * MEGABYTE,
  "commas": "1," * MEGABYTE,
  "exponent": "1e999999999",
  "negative exponent": "1e-999999999",
  "spaces": " " * MEGABYTE + "x",
  "surrogates": "\ud800" * 100,
  "code": "__import__('os').getpid()",
  "not a number": "sNaN",
  "infinity": "inf",
}


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
