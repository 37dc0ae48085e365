"""What the terminal shows of a trace: its rows, and no escape sequence but our own."""

import re
import time

import pytest
from report_cases import CONTROLS, HOSTILE, MEGABYTE, RAW_CONTROLS, make_long_trace, make_trace

from rredcot_jax.report import terminal


def test_rows_golden():
  rows = terminal.render_terminal(make_trace(), color=False).splitlines()
  assert rows == [
    "step 40: wrong, R = 0, reference answer 2",
    "  3 + 4 - 5 =↵",
    "",
    "    k      r_k  -     0     +  v before, after  segment",
    "    0  +0.250        │██       0.500 →  0.750  3 + 4 = 7↵",
    "> first wrong step",
    ">   1  -0.750  ██████│         0.750 →  0.000  7 - 5 = 9↵",
    "    2  +0.000        │         0.000 →  0.000  answer: 9",
  ]


def test_the_first_wrong_step_is_marked_once():
  for wrong, count in ((1, 1), (None, 0)):
    shown = terminal.render_terminal(make_trace(first_wrong_segment=wrong), color=False)
    assert shown.count("first wrong step") == count
    assert len(re.findall(r"^>   1  -0\.750", shown, re.MULTILINE)) == count


def test_a_long_segment_goes_on_below_its_text():
  rows = terminal.render_terminal(make_trace(tokens=["x" * 100, *[""] * 7]), color=False).splitlines()[4:6]
  assert rows[0].endswith("  " + "x" * 64) and rows[1] == " " * rows[0].index("x") + "x" * 36


@pytest.mark.parametrize("field", ["step", "prompt", "answer", "tokens"])
def test_escapes_are_neutralised_wherever_they_stand(field):
  value = [HOSTILE] * 8 if field == "tokens" else CONTROLS
  plain, tinted = (terminal.render_terminal(make_trace(**{field: value}), color=color) for color in (False, True))
  assert not re.search(RAW_CONTROLS, plain) and "\t" not in plain
  assert re.sub(r"\x1b\[(48;2;\d+;\d+;\d+|38;2;27;27;31|0)m", "", tinted) == plain != tinted
  assert "nul \\x00 bidi \\u202e" in plain


def test_tints_are_those_of_the_rewards():
  shown = terminal.render_terminal(make_trace(), color=True)
  # Each row ends its own tint.
  tints = re.findall(r"\x1b\[48;2;(\d+;\d+;\d+)m\x1b\[38;2;27;27;31m[^\x1b\n]*\x1b\[0m$", shown, re.MULTILINE)
  assert tints == ["206;228;241", "244;148;84", "255;255;255"]


def test_an_empty_trace_renders():
  nothing = {"tokens": [], "segment_ids": [], "advantages": [], "rewards": [], "values": [0.0]}
  shown = terminal.render_terminal(make_trace(first_wrong_segment=None, **nothing), color=True)
  assert shown.startswith("step 40: wrong") and len(shown.splitlines()) == 4


def test_huge_traces_are_bounded_and_say_so():
  trace = make_long_trace(30, 300)
  shown = terminal.render_terminal(trace, color=False)
  letters = shown.count("word ")
  assert letters == pytest.approx(terminal.MAX_CHARACTERS / 5, rel=0.05)
  assert f"... {30 * (299 * 5 + 1) - terminal.MAX_CHARACTERS:,} more characters" in shown


@pytest.mark.parametrize("character", ["x", "\x1b", "\n", " "])
def test_megabyte_fields_take_bounded_space_and_time(character):
  big = character * MEGABYTE
  began = time.perf_counter()
  trace = make_trace(tokens=[big] * 8, prompt=big, answer=big, step=big)
  assert len(terminal.render_terminal(trace, color=True)) < 3 * MEGABYTE
  assert time.perf_counter() - began < 10
