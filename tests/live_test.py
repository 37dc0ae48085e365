"""The live view: a table in a terminal, plain lines elsewhere, nothing lost, nothing unescaped, no run ended by it."""

import io
import logging
import re
import sys

import pytest

from rredcot_jax.report import live

EVALUATED = {"step": 0, "eval/pass@1": 0.46, "eval/pass@1_se": 0.012, "eval/length": 50.0}


def step(number, **more):
  return {"step": number, "train/reward": 0.5, "train/entropy": 0.1, "train/rollout_tokens": 100.0 * number,
          "train/step_seconds": 0.5} | more  # fmt: skip


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def clock(monkeypatch):
  """The view's clock, which stands still until it is moved."""
  now = [1000.0]
  monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
  return now


def test_a_file_gets_a_line_at_each_evaluation_and_at_most_one_in_ten_seconds(clock):
  file = io.StringIO()
  with live.View("first", file=file) as view:
    view.begin(step=0, total=10, tokens=0)
    view.show([EVALUATED])
    for number in range(1, 6):
      clock[0] += 4
      view.show([step(number)])
    view.show([EVALUATED | {"step": 5, "eval/pass@1": 0.5}])
  lines = file.getvalue().splitlines()
  assert [re.search(r"step (\d+)/10", line)[1] for line in lines] == ["0", "3", "5"]
  assert "\x1b" not in file.getvalue() and "\r" not in file.getvalue()
  assert lines[0] == "first: step 0/10  accuracy 46.0% ± 1.2 (step 0)"
  assert "reward 0.500  entropy 0.100" in lines[1] and "KL" not in lines[1]
  # Two steps since the first one took 8 s; seven are left.
  assert lines[1].endswith("tokens/s 200  left 28 s")


def test_credit_is_shown(clock):
  view = live.View("first", shown=False)
  view.begin(step=0, total=4, tokens=0)
  credit = {"credit/covered_states": 0.93, "credit/effective_sample_size": 3.25, "credit/initial_value": 0.45}
  view.show([step(1, **credit, **{"train/kl": 0.00123, "train/zero_variance_groups": 0.25})])
  text = view.plain()
  for part in ("KL 0.0012", "equal rewards in group 25.0%", "states with a value 93.0%", "samples a value 3.25"):
    assert part in text
  assert "v(s_0) 0.450" in text and "left" not in text  # One step says nothing about the time.


def test_tokens_a_second_of_a_resumed_run_leave_out_what_was_sampled_before(clock):
  view = live.View("first", shown=False)
  view.begin(step=8, total=10, tokens=800)
  view.show([step(9)])
  assert "tokens/s 200" in view.plain()


def test_a_terminal_gets_a_table_in_place_and_its_cursor_back(clock):
  file = Terminal()
  with live.View("first", file=file) as view:
    view.begin(step=0, total=10, tokens=0)
    view.show([EVALUATED])
    view.show([step(1, **{"train/reward": float("nan")})])
    assert "\x1b[?25l" in file.getvalue()
  text = file.getvalue()
  assert text.count("accuracy") == 4 and "46.0% ± 1.2 (step 0)" in text
  assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
  assert re.search(r"reward +-", text), "a number that is none is not shown as one"


def test_the_terminal_is_given_back_after_an_error(clock):
  file, before = Terminal(), sys.stderr
  with pytest.raises(FloatingPointError), live.View("first", file=file) as view:
    view.begin(step=0, total=10, tokens=0)
    raise FloatingPointError
  assert "\x1b[?25h" in file.getvalue() and sys.stderr is before


def test_warnings_are_not_drawn_over(clock):
  file = Terminal()
  handler = logging.StreamHandler(file)
  logging.root.addHandler(handler)
  try:
    with live.View("first", file=file) as view:
      view.begin(step=0, total=10, tokens=0)
      before = len(file.getvalue())
      logging.warning("a disk is full")
      said = file.getvalue()[before:]
      view.show([step(1)])
  finally:
    logging.root.removeHandler(handler)
  assert handler.stream is file
  # The table is removed before the warning and drawn again below it.
  assert re.search(r"\x1b\[2K.*a disk is full\n.*accuracy", said, re.S)


def test_names_are_escaped_and_marked_up_by_nobody(clock):
  for file in (io.StringIO(), Terminal()):
    with live.View("[red]\x1b]0;title\x07\u202ename", file=file) as view:
      view.begin(step=0, total=2, tokens=0)
      view.show([EVALUATED])
    assert "[red]\\x1b]0;title\\x07\\u202ename" in file.getvalue()
    assert "\x1b]0" not in file.getvalue() and "\u202e" not in file.getvalue()


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
@pytest.mark.parametrize("error", [BrokenPipeError, OSError(5, "Input/output error"), ValueError("closed file")])
def test_a_stream_that_breaks_ends_the_view_and_not_the_run(clock, kind, error):
  class Broken(kind):
    broken = False

    def write(self, text):
      if self.broken:
        raise error
      return super().write(text)

  file, before = Broken(), sys.stderr
  with live.View("first", file=file) as view:
    view.begin(step=0, total=10, tokens=0)
    view.show([EVALUATED])
    file.broken = True
    for number in range(1, 4):
      clock[0] += 100
      view.show([step(number)])
  assert sys.stderr is before


def test_another_process_shows_nothing(clock):
  file = Terminal()
  with live.View("first", shown=False, file=file) as view:
    view.begin(step=0, total=10, tokens=0)
    view.show([EVALUATED])
  assert file.getvalue() == ""


@pytest.mark.parametrize(
  ("seconds", "text"),
  [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7265, "2 h 1 min"), (float("nan"), "-")],
)
def test_durations(seconds, text):
  assert live._duration(seconds) == text
