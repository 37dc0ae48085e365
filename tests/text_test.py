"""Text made safe: no hidden character is left, nothing else changes, sizes and times are bounded."""

import time
import unicodedata

import hypothesis
import hypothesis.strategies as st
import pytest
from report_cases import CONTROLS, MEGABYTE, SHOWN

from rredcot_jax.report import text

# Surrogates, unassigned, private and format characters too.
ANY = st.text(st.characters(codec=None, exclude_categories=()))


def test_visible_golden():
  assert text.visible(CONTROLS) == SHOWN
  assert text.visible("a\n\tb \u00a0\u3000\u00e9\u65e5") == "a\n\tb \u00a0\u3000\u00e9\u65e5"
  assert text.visible("a\r\x0b\x0c\x85") == "a\\x0d\\x0b\\x0c\\x85"
  assert text.visible("\u200b\u2028\U000e0041\ue000") == "\\u200b\\u2028\\U000e0041\\ue000"
  assert text.visible(40) == "40"


@hypothesis.given(ANY)
def test_visible_leaves_no_hidden_character_and_touches_no_other(raw):
  shown = text.visible(raw)
  hidden = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
  assert not [c for c in shown if unicodedata.category(c) in hidden and c not in "\n\t"]
  assert shown == "".join(
    c if c in "\n\t" or unicodedata.category(c) not in hidden else text.code(c) for c in raw
  )  # fmt: skip


def test_shorten_says_what_it_left_out():
  assert text.shorten("abc", 3) == "abc" and text.shorten("a" * 2003, 3) == "aaa … 2,000 more characters"


def test_wrap_golden():
  assert text.wrap("one two\nthree\n", 9, 9) == ["one two↵", "three↵"]
  assert text.wrap("", 9, 9) == [""] and text.wrap("a\n\nb", 9, 9) == ["a↵", "↵", "b"]
  assert text.wrap("abcdefghij" * 3, 10, 2) == ["abcdefghij", "abcdefgh …"]
  assert text.wrap("tab\tx", 20, 1) == ["tab x"] and text.wrap("esc \x1b", 20, 1) == ["esc \\x1b"]


@hypothesis.given(ANY, st.integers(4, 30), st.integers(1, 5))
def test_wrap_bounds_lines_and_widths_and_loses_nothing_in_silence(raw, width, limit):
  lines = text.wrap(raw, width, limit)
  assert 1 <= len(lines) <= limit and all(len(line) <= width for line in lines)
  everything = "".join(text.wrap(raw, width, 10**6))
  assert "".join(lines) == everything or lines[-1].endswith(" …")
  if "\t" not in raw:
    assert everything.replace("↵", "") == text.visible(raw.replace("↵", "")).replace("\n", "")


def test_one_line_golden():
  assert text.one_line(" a \n\t b ", 20) == "a b"
  assert text.one_line("abcdefghij", 6) == "abcd …" and text.one_line("abcdef", 6) == "abcdef"
  # What lies behind a long run of white space is not shown as if it were not there.
  assert text.one_line("a" + " " * 1000 + "b", 6) == "a …"


@pytest.mark.parametrize("character", ["a", " ", "\n", "\x1b", "\t", "\ud800"])
def test_a_megabyte_costs_no_more_than_what_is_shown(character):
  big = character * 4 * MEGABYTE
  began = time.perf_counter()
  assert len(text.wrap(big, 60, 4)) == 4
  assert len(text.one_line(big, 60)) <= 60
  assert len(text.shorten(big, 60)) < 100
  assert time.perf_counter() - began < 1
