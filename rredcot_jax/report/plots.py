"""Figures about runs and traces, and figures as parts of a page."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rredcot_jax.report import records, style
from rredcot_jax.report.text import one_line, wrap

if TYPE_CHECKING:  # matplotlib is loaded by the functions that draw, not by whoever imports this module
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

MAX_ROWS = 40  # segments in credit_figure
SMOOTHING = 0.04  # of a run's length, the window of the smoothed curves
_MAX_POINTS = 1000  # drawn of one curve

# title, x key, y key, y label, what smooths it (None: an evaluation, drawn with its standard error)
PANELS: tuple[tuple[str, str, str, str, Callable | None], ...] = (
  ("Training reward", "step", "train/reward", "mean reward of the rollouts", np.mean),
  ("Evaluation, by step", "step", "eval/pass@1", "pass@1 ± 1 s.e.", None),
  ("Evaluation, by rollout tokens", "train/rollout_tokens", "eval/pass@1", "pass@1 ± 1 s.e.", None),
  ("Entropy", "step", "train/entropy", "nats per token", np.mean),
  ("Length", "step", "train/length", "tokens per trace", np.mean),
  # The median: a step that compiles would drag a mean for a whole window.
  ("Time", "step", "train/step_seconds", "seconds per step (log)", np.median),
)


# ---- Curves ------------------------------------------------------------------------------


def curves(metrics: Mapping[str, Sequence[Mapping]]) -> list[tuple[str, "Figure | None"]]:
  """A figure for each of PANELS, small enough for a phone, with its title; None where no run logged it.

  Args:
    metrics: run name -> lines as `records.read_metrics` reads them; a run's colour is that of its place.
  """
  return [(panel[0], _panel(metrics, *panel[1:])) for panel in PANELS]


def _panel(
  metrics: Mapping[str, Sequence[Mapping]], x_key: str, y_key: str, label: str, average: Callable | None
) -> "Figure | None":
  from matplotlib.figure import Figure
  from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

  drawn = [series(rows, x_key, y_key, f"{y_key}_se") for rows in metrics.values()]
  if not any(len(points) for points in drawn):
    return None
  with style.context():
    figure = Figure(figsize=(3.4, 2.3), layout="constrained")
    ax = figure.subplots()
    ax.set(xlabel=x_key.removeprefix("train/").replace("_", " "), ylabel=label)
    ax.margins(x=0.02)
    for i, points in enumerate(drawn):
      _draw_run(ax, points, average, i)
    if y_key == "train/step_seconds":
      ax.set_yscale("log")
      ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
    if x_key != "step":
      ax.xaxis.set_major_formatter(EngFormatter(sep=""))
  return figure


def series(rows: Sequence[Mapping], *keys: str) -> np.ndarray:
  """[n, len(keys)]: a row for each step that has finite keys[0] and keys[1]; the others are NaN if missing.

  A resumed run logs some steps twice: the later line counts.
  """
  points = {}
  for row in rows:
    values = [records.number(row.get(key)) for key in keys]
    step = records.number(row.get("step"))
    if math.isfinite(values[0]) and math.isfinite(values[1]) and math.isfinite(step):
      points[step] = values
  return np.array([points[step] for step in sorted(points)]).reshape(-1, len(keys))


def _smoothed(y: np.ndarray, average: Callable) -> np.ndarray:
  half = int(SMOOTHING * len(y) / 2)
  stride = math.ceil(len(y) / _MAX_POINTS)
  return np.array([average(y[max(0, i - half) : i + half + 1]) for i in range(0, len(y), stride)])


def _draw_run(ax: "Axes", points: np.ndarray, average: Callable | None, index: int) -> None:
  if not len(points):
    return
  colors = style.RUN_COLORS
  color, dash = colors[index % len(colors)], style.RUN_DASHES[index // len(colors) % len(style.RUN_DASHES)]
  x, y, error = points.T
  dot = "o" if average is None or len(x) == 1 else ""
  if average is None:
    ax.fill_between(x, y - error, y + error, color=color, alpha=0.16, linewidth=0)
  else:
    stride = math.ceil(len(x) / _MAX_POINTS)
    x, raw, y = x[::stride], y[::stride], _smoothed(y, average)
    ax.plot(x, raw, color=color, linestyle=dash, alpha=0.28, linewidth=0.7)
  ax.plot(x, y, color=color, linestyle=dash, linewidth=1.5, marker=dot, markersize=3)


# ---- One trace ---------------------------------------------------------------------------


def value_limits(trace: records.Trace) -> tuple[float, float]:
  """The range of v that a picture of a trace shows: [0, 1] and all finite values, with a margin of 6%."""
  finite = [v for v in [*trace.values, trace.return_] if math.isfinite(v)]
  low, high = min([0.0, *finite]), max([1.0, *finite])
  return low - 0.06 * (high - low), high + 0.06 * (high - low)


def credit_figure(record: Mapping) -> "Figure":
  """One trace as a picture 9 inches wide: segments as tinted rows, r_k at their right, v(s_k) beside them.

  States lie on the lines between rows, so the value curve runs down along the text. Shows at most MAX_ROWS
  segments. Raises ValueError as `records.parse_trace` does.

  Args:
    record: a line of traces.jsonl.
  """
  from matplotlib.figure import Figure

  trace = records.parse_trace(record)
  shown, scale = trace.segments[:MAX_ROWS], trace.peak
  rows = [wrap(segment.text, 44 if segment.first_wrong else 64, 3) for segment in shown]
  edges = np.cumsum([0.0, *(len(lines) + 0.55 for lines in rows)])
  line: dict[str, Any] = dict(color=style.INK, clip_on=False)
  with style.context():
    figure = Figure(figsize=(9, 1.25 + 0.19 * edges[-1]), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3.2, 1))
    for segment, lines, top, bottom in zip(shown, rows, edges, edges[1:]):
      for ax in (left, right):
        color = style.hexadecimal(style.tint(segment.reward, scale))
        ax.axhspan(top, bottom, facecolor=color, edgecolor=style.PAGE, linewidth=1, zorder=0)
        if segment.first_wrong:
          ax.axhspan(top, bottom, fill=False, edgecolor=style.WRONG, linewidth=1.4, zorder=3)
      _draw_text(left, segment, lines, (top + bottom) / 2)
    right.plot(trace.values[: len(edges)], edges, linewidth=1.3, marker="o", markersize=3.5, zorder=4, **line)
    if len(shown) == len(trace.segments):
      right.plot(trace.return_, edges[-1], marker="D", markersize=6, zorder=5, **line)
    _label_rows(left, right, trace, edges)
  return figure


def _draw_text(ax: "Axes", segment: records.Segment, lines: list[str], middle: float) -> None:
  # parse_math: a model's dollar signs are dollars, not formulas.
  look: dict[str, Any] = {"va": "center", "fontsize": 8.5, "family": "monospace", "parse_math": False}
  ax.text(0.012, middle, "\n".join(lines), linespacing=1.3, **look)
  ax.text(0.988, middle, f"{segment.reward:+.3f}", ha="right", **look)
  if segment.first_wrong:
    box = {"facecolor": style.WRONG, "edgecolor": "none", "pad": 2.5}
    ax.text(0.88, middle, "first wrong step", ha="right", va="center", color=style.PAGE, fontsize=8, bbox=box)


def _label_rows(left: "Axes", right: "Axes", trace: records.Trace, edges: np.ndarray) -> None:
  hidden = len(trace.segments) + 1 - len(edges)
  answer = f"{trace.verdict}, reference answer {one_line(trace.answer, 24)}"
  more = f"; {hidden} more segments" if hidden else ""
  title = f"{one_line(trace.prompt, 70)}\n{answer}{more}"
  left.set_title(title, parse_math=False, fontsize=8.5, family="monospace", linespacing=1.5)
  left.set(xlim=(0, 1), ylim=(max(edges[-1], 0.1), 0), xticks=[], ylabel="segment k")
  left.set_yticks((edges[1:] + edges[:-1]) / 2, [str(k) for k in range(len(edges) - 1)])
  left.text(0.988, 1.015, "reward $r_k$", transform=left.transAxes, ha="right")
  right.set(xlim=value_limits(trace), xlabel=f"state value $v(s_k)$; ◆ R = {trace.return_:.3g}")
  right.locator_params(axis="x", nbins=3, steps=[1, 5, 10])
  right.tick_params(labelleft=False)
  for ax in (left, right):
    ax.grid(False)
    ax.tick_params(axis="y", length=0)
    ax.spines[:].set_visible(False)


# ---- In a page ---------------------------------------------------------------------------


def svg(figure: "Figure", prefix: str) -> str:
  """The figure as an inline <svg> in the colours of the page, light or dark, on its background.

  Args:
    figure: any.
    prefix: begins its ids, so that they are those of no other figure of the page.
  """
  buffer = io.StringIO()
  with style.context():
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
  text = buffer.getvalue()

  def in_page(tag: re.Match) -> str:
    # Tags alone: text may hold what looks like a colour or an id.
    found = re.sub(r'(?<=^<g) id="\w+_\d+"', "", tag[0])
    found = re.sub(r'(?<= id=")|(?<=url\(#)|(?<=href="#)', prefix, found)
    return re.sub(r"#[0-9a-f]{6}(?=[;\"])", lambda color: _property(color[0]), found)

  return re.sub(r"<[^>]*>", in_page, text[text.index("<svg") :])


def _property(color: str) -> str:
  name = style.OF_FIGURES.get(color)
  return f"var(--{name})" if name else color
