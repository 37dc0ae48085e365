"""What a run is doing now: a table that is drawn again in place on a terminal, and plain lines everywhere else.

It shows numbers, and names made safe by `report.text`. Text that a model wrote never comes here.
"""

import contextlib
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

import absl.logging
import rich.console
import rich.live
import rich.progress_bar
import rich.table
import rich.text

from rredcot_jax.report.text import one_line

_LINE_SECONDS = 10.0  # At least so long between two plain lines of steps.
_LABEL = 22  # Characters.


class View(contextlib.AbstractContextManager):
  """Shows the metric lines of one run; a context manager, so that the terminal is as before when the run ends.

  with View("first") as view:
    view.begin(step=0, total=100, tokens=0)
    view.show([{"step": 1, "train/reward": 0.5}])
  """

  def __init__(self, name: str, *, shown: bool = True, file: TextIO | None = None):
    """Shows nothing before `begin`.

    Args:
      name: of the run.
      shown: off where another process of the run shows it.
      file: standard error if None. A terminal gets the table.
    """
    self._name, self._shown = one_line(name, 60), shown
    self._file = sys.stderr if file is None else file
    self._console = _Console(file=self._file, highlight=False, markup=False, emoji=False)
    self._in_place = self._console.is_interactive and self._file.isatty()
    self._live: rich.live.Live | None = None
    self._moved: list[tuple[logging.StreamHandler, Any]] = []
    self._values: dict[str, float] = {}  # The newest of each metric.
    self._step = self._total = 0
    self._evaluated: int | None = None
    self._tokens = self._rate = math.nan
    self._began: tuple[float, int] | None = None  # When the first of the steps timed here was shown, and which it was.
    self._printed = -math.inf

  def begin(self, *, step: int, total: int, tokens: float) -> None:
    """Begins to show a run that has made `step` of `total` steps and sampled `tokens` tokens."""
    self._step, self._total, self._tokens = step, total, tokens
    if self._shown and self._in_place:
      self._live = rich.live.Live(self._table(), console=self._console, auto_refresh=False)
      self._live.start(refresh=True)
      # Loggers hold the stream that they were made with: what they wrote there would be drawn over.
      for handler in _stream_handlers():
        if handler.stream is self._file:
          self._moved.append((handler, handler.setStream(sys.stderr)))

  def show(self, lines: Iterable[Mapping[str, Any]]) -> None:
    """Shows lines of metrics.jsonl, in their order."""
    for line in lines:
      self._take(line)
      due = "eval/pass@1" in line or time.monotonic() - self._printed >= _LINE_SECONDS
      if self._shown and not self._in_place and due:
        self._printed = time.monotonic()
        with self._as_long_as_there_is_a_reader():
          print(self.plain(), file=self._file, flush=True)
    if self._live is not None:
      with self._as_long_as_there_is_a_reader():
        self._live.update(self._table(), refresh=True)

  def plain(self) -> str:
    """The newest metrics as one line."""
    shown = "  ".join(f"{name} {value}" for name, value in self._rows() if value != "-")
    return f"{self._name}: step {self._step}/{self._total}  {shown}"

  def __exit__(self, *_: Any) -> None:
    for handler, stream in self._moved:
      handler.setStream(stream)
    self._moved.clear()
    if self._live is not None:
      self._live.stop()
      self._live = None

  @contextlib.contextmanager
  def _as_long_as_there_is_a_reader(self) -> Iterator[None]:
    """Shows no more after an error of the stream: a terminal that is closed must not end the run."""
    try:
      yield
    except (OSError, ValueError):  # ValueError: the stream is closed.
      self._shown, self._console.quiet = False, True

  def _take(self, line: Mapping[str, Any]) -> None:
    self._step = max(self._step, int(line["step"]))
    self._values |= {name: float(value) for name, value in line.items() if name != "step"}
    if "eval/pass@1" in line:
      self._evaluated = int(line["step"])
    if "train/step_seconds" in line:
      tokens = self._values.get("train/rollout_tokens", math.nan)
      self._rate, self._tokens = (tokens - self._tokens) / line["train/step_seconds"], tokens
      # The first step compiles, so time is counted from its end.
      self._began = self._began or (time.monotonic(), self._step)

  def _seconds_left(self) -> float:
    if self._step >= self._total:
      return 0.0
    if self._began is None or self._step == self._began[1]:
      return math.nan
    seconds, steps = time.monotonic() - self._began[0], self._step - self._began[1]
    return seconds / steps * (self._total - self._step)

  def _rows(self) -> list[tuple[str, str]]:
    """What is shown, in its order; "-" where the run has not said it."""
    get = lambda name: self._values.get(name, math.nan)
    accuracy = _percent(get("eval/pass@1"))
    if self._evaluated is not None:
      accuracy += f" ± {100 * get('eval/pass@1_se'):.1f} (step {self._evaluated})"
    return [
      ("accuracy", accuracy),
      ("reward", _number(get("train/reward"), "{:.3f}")),
      ("KL", _number(get("train/kl"), "{:.2g}")),
      ("entropy", _number(get("train/entropy"), "{:.3f}")),
      ("equal rewards in group", _percent(get("train/zero_variance_groups"))),
      ("states with a value", _percent(get("credit/covered_states"))),
      ("samples a value", _number(get("credit/effective_sample_size"), "{:.2f}")),
      ("v(s_0)", _number(get("credit/initial_value"), "{:.3f}")),
      ("|A|", _number(get("train/advantage_mean_abs"), "{:.3f}")),
      ("tokens/s", _number(self._rate, "{:,.0f}")),
      ("left", _duration(self._seconds_left())),
    ]

  def _table(self) -> rich.table.Table:
    table = rich.table.Table.grid(padding=(0, 2))
    table.add_column(min_width=_LABEL, no_wrap=True)
    table.add_column(no_wrap=True)
    bar = rich.progress_bar.ProgressBar(total=max(self._total, 1), completed=self._step, width=40)
    table.add_row(rich.text.Text(self._name, style="bold", overflow="ellipsis"), bar)
    table.add_row("step", rich.text.Text(f"{self._step} of {self._total}"))
    for name, value in self._rows():
      table.add_row(rich.text.Text(name), rich.text.Text(value))
    return table


class _Console(rich.console.Console):
  """One that falls silent when nobody reads it any more; rich's ends the program."""

  def on_broken_pipe(self) -> None:
    self.quiet = True


def _stream_handlers() -> list[logging.StreamHandler]:
  handlers: list[Any] = [*logging.root.handlers, absl.logging.get_absl_handler().python_handler]
  return [handler for handler in handlers if isinstance(handler, logging.StreamHandler)]


def _number(value: float, form: str) -> str:
  return form.format(value) if math.isfinite(value) else "-"


def _percent(value: float) -> str:
  return _number(100 * value, "{:.1f}%")


def _duration(seconds: float) -> str:
  """Seconds in two units at most; "-" for NaN."""
  if not math.isfinite(seconds):
    return "-"
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
