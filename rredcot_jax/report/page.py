"""What a run did, for people: its curves, and the credit each piece of reasoning received.

Reads the work directories of runs (config.json, metrics.jsonl, traces.jsonl) and writes one HTML file that
opens anywhere, offline. A trace is text that a model wrote, hence untrusted: it reaches the page escaped, and
the terminal without its control characters.
"""

import dataclasses
import html
import io
import itertools
import json
import math
import os
import re
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # matplotlib is loaded by the functions that draw, not by whoever imports this module
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

MAX_TOKENS = 4000  # of a trace, shown
MAX_CHARACTERS = 4000  # of a prompt or an answer, shown
MAX_ROWS = 40  # segments in credit_figure
TRACES_PER_RUN = 6

_POSITIVE, _NEGATIVE, _UNKNOWN = (107, 174, 214), (244, 148, 84), (236, 236, 236)
_WRONG = "#b3261e"
_RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")  # Okabe and Ito
_RUN_DASHES = ("-", "--", ":", "-.")
_VALUE_LINE: dict[str, Any] = dict(color="#1b1b1f", linewidth=1.3, marker="o", markersize=3.5, clip_on=False, zorder=4)
_RETURN_MARK: dict[str, Any] = dict(color="#1b1b1f", marker="D", markersize=6, clip_on=False, zorder=5)
_SMOOTHING = 0.04  # of a run's length, the window of the smoothed curves
_MAX_POINTS = 1000  # drawn of one curve

# title, y key, y label, what smooths it (None: an evaluation, drawn with its standard error)
_PANELS: tuple[tuple[str, str, str, str, Callable | None], ...] = (
  ("Training reward", "step", "train/reward", "mean reward of the rollouts", np.mean),
  ("Evaluation, by step", "step", "eval/pass@1", "pass@1 ± 1 s.e.", None),
  ("Evaluation, by rollout tokens", "train/rollout_tokens", "eval/pass@1", "pass@1 ± 1 s.e.", None),
  ("Entropy", "step", "train/entropy", "nats per token", np.mean),
  ("Length", "step", "train/length", "tokens per trace", np.mean),
  # The median: a step that compiles would drag a mean for a whole window.
  ("Time", "step", "train/step_seconds", "seconds per step (log)", np.median),
)

_STYLE = {
  "svg.fonttype": "none",
  "svg.hashsalt": "rredcot_jax",
  "font.size": 8,
  "text.color": "#1b1b1f",
  "axes.edgecolor": "#9a9aa2",
  "axes.labelcolor": "#45454d",
  "axes.titlesize": 8.5,
  "axes.titleweight": "bold",
  "axes.titlelocation": "left",
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": "#ececf0",
  "grid.linewidth": 0.7,
  "xtick.color": "#9a9aa2",
  "ytick.color": "#9a9aa2",
  "xtick.labelcolor": "#45454d",
  "ytick.labelcolor": "#45454d",
}

_CSS = """
:root { --ink: #1b1b1f; --soft: #5c5c66; --line: #e2e2e8; --wrong: #b3261e;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1000px; padding: 32px 24px 64px; background: #fff; color: var(--ink);
  font: 15px/1.5 var(--sans); -webkit-print-color-adjust: exact; print-color-adjust: exact; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 12px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 28px 0 8px; overflow-wrap: anywhere; }
.note, figcaption { color: var(--soft); font-size: 13px; margin: 4px 0 12px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 28px 6px 0; text-align: left; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; font-size: 13px; vertical-align: bottom; }
.number { text-align: right; }
.swatch { display: inline-block; width: 22px; height: 0; border-top: 3px solid; margin: 0 7px 4px 0; }
.run { display: inline-block; margin-right: 22px; overflow-wrap: anywhere; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: var(--sans) !important; }
article { margin: 0 0 30px; padding-left: 14px; border-left: 3px solid var(--line); }
.facts { font-size: 13px; color: var(--soft); margin: 0 0 6px; font-variant-numeric: tabular-nums; }
.facts > span { margin-right: 16px; white-space: nowrap; }
.facts > .answer { white-space: normal; overflow-wrap: anywhere; }
sub { line-height: 0; }
.facts b { color: var(--ink); font-weight: 600; }
.prompt, .trace, pre { font: 13px/1.75 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere;
  margin: 0 0 8px; tab-size: 4; overflow-x: hidden; }
.prompt::before { content: "prompt"; font: 11px var(--sans); margin-right: 10px; opacity: .8; }
.prompt { color: var(--soft); line-height: 1.5; max-height: 12em; overflow-y: auto; }
.trace { border: 1px solid var(--line); border-radius: 4px; padding: 8px 10px; max-height: 44em;
  overflow-y: auto; }
.segment { padding: 2px 3px; border-radius: 2px; unicode-bidi: isolate;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.segment.wrong { outline: 2px solid var(--wrong); }
.credit, .flag, .newline { user-select: none; -webkit-user-select: none; font-family: var(--sans); }
.credit { display: inline-block; min-width: 4.4em; padding: 0 .7em 0 0; text-align: right; font-size: 10px;
  color: #3c3c44; font-variant-numeric: tabular-nums; }
.flag { background: var(--wrong); color: #fff; font-size: 10px; font-weight: 600; padding: 1px 5px;
  margin-right: 6px; border-radius: 2px; }
.newline { opacity: .35; }
.control { background: #33333a; color: #fff; border-radius: 2px; padding: 0 2px; font-size: .85em; }
.scale { display: flex; align-items: center; gap: 8px; font-size: 12px; color: var(--soft); margin: 0 0 14px;
  font-variant-numeric: tabular-nums; }
.scale i { display: block; width: 220px; height: 10px; border: 1px solid var(--line); }
details { margin: 8px 0; border: 1px solid var(--line); border-radius: 4px; padding: 8px 12px; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
details pre { line-height: 1.45; font-size: 12px; margin: 10px 0 0; }
"""


@dataclasses.dataclass(frozen=True)
class Segment:
  """Segment k of a trace: its tokens, r_k, v(s_k) and v(s_{k+1}), the mean A_t over its tokens."""

  index: int
  start: int
  tokens: tuple[str, ...]
  reward: float
  before: float
  after: float
  advantage: float
  first_wrong: bool

  @property
  def text(self) -> str:
    return "".join(self.tokens)


# ---------------------------------------------------------------------------------------------- reading


def read_metrics(path: str | os.PathLike) -> list[dict]:
  """The lines of a metrics.jsonl, in file order; a half-written last line is left out.

  Raises FileNotFoundError where there is no such file and ValueError where it holds no complete line; both
  name the file. Any other line that is not a JSON object is left out with a warning.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"no metrics at {path}: is it the work directory of a run?")
  rows = _read_json_lines(path)
  if not rows:
    raise ValueError(f"{path} holds no complete line yet: the run logged nothing")
  return rows


def read_traces(path: str | os.PathLike) -> list[dict]:
  """The lines of a traces.jsonl, read as `read_metrics` reads; [] where there is no such file."""
  path = Path(path)
  return _read_json_lines(path) if path.is_file() else []


def _read_json_lines(path: Path) -> list[dict]:
  # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
  lines = path.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")
  rows = []
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
    except ValueError:
      row = None
    if isinstance(row, dict):
      rows.append(row)
    elif line.strip() and number < len(lines):
      warnings.warn(f"{path}:{number} is not a JSON object; left out", stacklevel=3)
  return rows


def trace_segments(trace: Mapping) -> list[Segment]:
  """A trace's segments in order. Raises ValueError where the lengths of its fields disagree."""
  tokens, ids, rewards, values = (trace[name] for name in ("tokens", "segment_ids", "rewards", "values"))
  advantages = trace.get("advantages") or [math.nan] * len(tokens)
  sizes = (len(tokens), len(ids), len(advantages), len(values), len(rewards))
  if len(set(sizes[:3])) > 1 or len(values) != len(rewards) + 1 or max(ids, default=-1) >= len(rewards):
    raise ValueError(
      f"trace at step {trace.get('step')} does not fit together: {sizes[0]} tokens, {sizes[1]} segment_ids up"
      f" to {max(ids, default=-1)}, {sizes[2]} advantages, {sizes[3]} values, {sizes[4]} rewards"
    )
  places: list[list[int]] = [[] for _ in rewards]
  for t, k in enumerate(ids):
    if k >= 0:  # -1 is padding
      places[k].append(t)
  segments, start = [], 0
  for k, inside in enumerate(places):
    mean = math.fsum(advantages[t] for t in inside) / len(inside) if inside else math.nan
    words = tuple(tokens[t] for t in inside)
    wrong = k == trace.get("first_wrong_segment")
    segments.append(Segment(k, start, words, rewards[k], values[k], values[k + 1], mean, wrong))
    start += len(inside)
  return segments


# ------------------------------------------------------------------------------------- text and colours


def visible(text: str) -> str:
  r"""`text` with control, bidi, zero-width, surrogate and unassigned characters as codes: \x1b, \u202e.

  Newlines and tabs stay.
  """
  return "".join(_code(character) or character for character in text)


def tint(reward: float, scale: float) -> tuple[int, int, int]:
  """sRGB background for r_k: white at 0, blue at +scale, orange at -scale, linear between; grey for NaN."""
  if not math.isfinite(reward):
    return _UNKNOWN
  weight = min(abs(reward) / scale, 1.0) if scale > 0 else 0.0
  end = _POSITIVE if reward > 0 else _NEGATIVE
  red, green, blue = (round(255 + weight * (channel - 255)) for channel in end)
  return red, green, blue


def _code(character: str) -> str:
  if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
    return ""
  point = ord(character)
  return f"\\x{point:02x}" if point < 0x100 else f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}"


def text_html(text: Any) -> str:
  """Untrusted text as HTML content; never for an attribute, which takes `_attribute`."""

  def one(character: str) -> str:
    if code := _code(character):
      return f'<span class="control">{code}</span>'
    return '<span class="newline">↵</span>\n' if character == "\n" else html.escape(character, quote=True)

  return "".join(map(one, str(text)))


def _attribute(text: Any) -> str:
  return html.escape(visible(str(text)), quote=True)


def _hex(color: tuple[int, int, int]) -> str:
  return "#{:02x}{:02x}{:02x}".format(*color)


def _shorten(text: Any, limit: int = MAX_CHARACTERS) -> str:
  text = str(text)
  return text if len(text) <= limit else f"{text[:limit]} … {len(text) - limit} more characters"


def _scale(traces: Sequence[Mapping]) -> float:
  """The largest finite |r_k|: one scale for traces shown together, so that their tints compare."""
  return max((abs(r) for trace in traces for r in trace["rewards"] if math.isfinite(r)), default=0.0)


def _verdict(trace: Mapping) -> str:
  return "correct" if trace["return"] >= 1 else "wrong" if trace["return"] <= 0 else "partly right"


# ------------------------------------------------------------------------------------------ the HTML file


def write_report(
  runs: Mapping[str, Path],
  path: Path,
  *,
  title: str,
  summary: Sequence[Mapping] | None = None,
  figures: Sequence[tuple[str, "Figure"]] = (),
) -> None:
  """Writes one self-contained HTML file about `runs` (name -> work directory) to `path`, atomically.

  Args:
    runs: shown in this order; a run's colour is the same in every panel.
    path: replaced in one step, so that a reader never sees half a report; folders are made.
    title: the page's heading.
    summary: rows of a table, columns in the order in which keys first appear.
    figures: captions and figures shown below it.

  Raises FileNotFoundError or ValueError, naming the file, where a run has no metrics, a broken config.json or
  a trace whose fields disagree.
  """
  metrics = {name: read_metrics(Path(run) / "metrics.jsonl") for name, run in runs.items()}
  parts = [f"<h1>{text_html(title)}</h1>"]
  if summary:
    parts.append(f"<h2>Summary</h2>{table_html(summary)}")
  parts += [
    f"<figure>{_svg(figure)}<figcaption>{text_html(caption)}</figcaption></figure>" for caption, figure in figures
  ]
  parts.append(f"<h2>Training</h2>{_training_html(metrics)}<h2>Credit on traces</h2>")
  parts += [_traces_html(name, Path(run) / "traces.jsonl") for name, run in runs.items()]
  parts.append("<h2>Configuration</h2>")
  parts += [_config_html(name, Path(run) / "config.json") for name, run in runs.items()]
  write_page(path, title=title, parts=parts)


def write_page(path: Path, *, title: str, parts: Sequence[str]) -> None:
  """Writes `parts`, HTML that holds nothing unescaped, as one self-contained page, atomically."""
  page = (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    # No script and no load of any kind, should an escape ever be missed.
    '<meta http-equiv="Content-Security-Policy" content="'
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>{_attribute(title)}</title><style>{_CSS}</style></head>\n<body>\n"
    + "\n".join(parts)
    + "\n</body></html>\n"
  )
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    temporary.write_text(page, encoding="utf-8", newline="\n")
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def table_html(rows: Sequence[Mapping]) -> str:
  """Rows as an HTML table, columns in the order in which keys first appear; cells may hold any text."""
  columns = list(dict.fromkeys(key for row in rows for key in row))
  numeric = {key: all(_is_number(row[key]) for row in rows if row.get(key) is not None) for key in columns}

  def line(tag: str, cells: Mapping[str, str]) -> str:
    inside = (
      f'<{tag} class="{"number" if numeric[key] else "text"}">{text_html(cells[key])}</{tag}>' for key in columns
    )
    return f"<tr>{''.join(inside)}</tr>"

  head = line("th", {key: key for key in columns})
  body = "".join(line("td", {key: _format(row.get(key)) for key in columns}) for row in rows)
  return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _format(value: Any) -> str:
  if value is None:
    return "–"
  if not _is_number(value):
    return str(value)
  return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _training_html(metrics: Mapping[str, list[dict]]) -> str:
  names = "".join(f'<span class="run">{_swatch(i)}{text_html(name)}</span>' for i, name in enumerate(metrics))
  lost = {
    name: sum(_is_number(value) and not math.isfinite(value) for row in rows for value in row.values())
    for name, rows in metrics.items()
  }
  listed = ", ".join(f"{text_html(name)} ({count})" for name, count in lost.items() if count)
  return (
    f'<p class="runs">{names}</p><figure role="img" aria-label="Training curves">{_svg(_curves(metrics))}'
    "<figcaption>Faint: logged values. Line: running mean (of the time per step: running median) over"
    f" {_SMOOTHING:.0%} of the run. Band: one standard error either side of an evaluation."
    f"{f' Not finite, so not drawn: {listed}.' if listed else ''}</figcaption></figure>"
  )


def _swatch(index: int) -> str:
  style = ("solid", "dashed", "dotted", "dashed")[index // len(_RUN_COLORS) % 4]
  color = _RUN_COLORS[index % len(_RUN_COLORS)]
  return f'<span class="swatch" style="border-top-style:{style};border-top-color:{color}"></span>'


def _traces_html(name: str, path: Path) -> str:
  traces = read_traces(path)
  if not traces:
    return f'<h3>{text_html(name)}</h3><p class="note">no traces</p>'
  try:
    chosen = _choose(traces)
    scale = _scale(chosen)
    articles = "".join(_trace_html(trace, scale) for trace in chosen)
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path} holds a broken trace: {error!r}") from error
  gradient = f"linear-gradient(to right, {_hex(_NEGATIVE)}, #fff, {_hex(_POSITIVE)})"
  return (
    f'<h3>{text_html(name)}</h3><div class="scale"><span>redistributed reward r<sub>k</sub></span>'
    f'<span>{-scale:+.3f}</span><i style="background:{gradient}"></i><span>{scale:+.3f}</span>'
    f"<span>white is 0; one scale for this run</span></div>{articles}"
  )


def _choose(traces: Sequence[Mapping], limit: int = TRACES_PER_RUN) -> list[Mapping]:
  """The latest traces, half of them wrong where there are so many of both; latest first."""
  latest = sorted(traces, key=lambda trace: -trace["step"])
  right = [trace for trace in latest if trace["return"] >= 0.5]
  wrong = [trace for trace in latest if not trace["return"] >= 0.5]
  mixed = [trace for pair in itertools.zip_longest(wrong, right) for trace in pair if trace is not None]
  return sorted(mixed[:limit], key=lambda trace: -trace["step"])


def _trace_html(trace: Mapping, scale: float) -> str:
  segments = trace_segments(trace)
  spans, room = [], MAX_TOKENS
  for segment in segments:
    if room <= 0:
      break
    spans.append(_segment_html(segment, scale, room))
    room -= len(segment.tokens)
  hidden = len(trace["tokens"]) - MAX_TOKENS
  if hidden > 0:
    spans.append(f'<span class="note"> … {hidden:,} more tokens</span>')
  wrong = trace.get("first_wrong_segment")
  facts = (
    f"<span>step <b>{text_html(trace['step'])}</b></span>"
    f"<span><b>{_verdict(trace)}</b>, R = {trace['return']:.3g}</span>"
    f"<span>v(s<sub>0</sub>) = {trace['values'][0]:.3f}</span>"
    f"<span>Σ r<sub>k</sub> = {math.fsum(trace['rewards']):+.3f}</span>"
    f"<span>{len(trace['tokens']):,} tokens in {len(segments)} segments</span>"
    f"{f'<span>first wrong: segment {text_html(wrong)}</span>' if wrong is not None else ''}"
    f'<span class="answer">reference answer <b>{text_html(_shorten(trace["answer"], 200))}</b></span>'
  )
  return (
    f'<article><p class="facts">{facts}</p><div class="prompt">{text_html(_shorten(trace["prompt"]))}</div>'
    f'<div class="trace">{"".join(spans)}</div><figure role="img" aria-label="State values along the trace">'
    f"{_svg(_value_curve(trace, scale))}</figure></article>"
  )


def _segment_html(segment: Segment, scale: float, room: int) -> str:
  tip = (
    f"segment {segment.index}: r = {segment.reward:+.4f}, v {segment.before:.4f} → {segment.after:.4f},"
    f" {len(segment.tokens)} tokens, mean advantage {segment.advantage:+.4f}"
  )
  flag = '<span class="flag">first wrong step</span>' if segment.first_wrong else ""
  inside = text_html("".join(segment.tokens[:room]))
  body = inside.removesuffix("\n")  # its last line end goes outside: an outline would run into the next line
  return (
    f'<span class="segment{" wrong" if segment.first_wrong else ""}" title="{_attribute(tip)}"'
    f' style="background:{_hex(tint(segment.reward, scale))}">'
    f'<span class="credit">{segment.reward:+.3f}</span>{flag}{body}</span>{inside[len(body) :]}'
  )


def _config_html(name: str, path: Path) -> str:
  if not path.is_file():
    return f'<details><summary>{text_html(name)}</summary><p class="note">no config.json</p></details>'
  try:
    config = json.loads(path.read_text(encoding="utf-8"))
    command, settings = config.get("command", ""), config.get("config", {})
  except (ValueError, AttributeError) as error:
    raise ValueError(f"{path} is not a JSON object with command and config: {error}") from error
  body = json.dumps(settings, indent=2, ensure_ascii=False)
  # Split, so that the line ends of the dump do not get the mark that line ends in text get.
  lines = "\n".join(text_html(line) for line in [f"$ {command}", "", *body.split("\n")])
  return f"<details><summary>{text_html(name)}</summary><pre>{lines}</pre></details>"


# ---------------------------------------------------------------------------------------------- figures


def style() -> AbstractContextManager[None]:
  """Our look whatever the reader's matplotlibrc says, so that a report is the same bytes everywhere."""
  import matplotlib.style

  return matplotlib.style.context(["default", _STYLE])


def _svg(figure: "Figure") -> str:
  """The figure as an inline <svg>: no prologue, no metadata, no numbered ids (they would repeat)."""
  buffer = io.StringIO()
  with style():
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
  text = buffer.getvalue()
  return re.sub(r'<g id="\w+_\d+">', "<g>", text[text.index("<svg") :])


def _series(rows: Sequence[Mapping], *keys: str) -> np.ndarray:
  """[n, len(keys)]: a row for each step that has finite keys[0] and keys[1]; the others are NaN if missing.

  A resumed run logs some steps twice: the later line counts.
  """
  points = {}
  for row in rows:
    values = [float(row[key]) if _is_number(row.get(key)) else math.nan for key in keys]
    if math.isfinite(values[0]) and math.isfinite(values[1]) and _is_number(row.get("step")):
      points[row["step"]] = values
  return np.array([points[step] for step in sorted(points)]).reshape(-1, len(keys))


def _smoothed(y: np.ndarray, average: Callable) -> np.ndarray:
  half = int(_SMOOTHING * len(y) / 2)
  stride = math.ceil(len(y) / _MAX_POINTS)
  return np.array([average(y[max(0, i - half) : i + half + 1]) for i in range(0, len(y), stride)])


def _curves(metrics: Mapping[str, list[dict]]) -> "Figure":
  from matplotlib.figure import Figure
  from matplotlib.layout_engine import ConstrainedLayoutEngine
  from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

  with style():
    figure = Figure(figsize=(10, 5.4), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.08))
    axes = figure.subplots(2, 3)
    axes[0, 2].sharey(axes[0, 1])
    for ax, (title, x_key, y_key, label, average) in zip(axes.flat, _PANELS):
      ax.set(title=title, xlabel=x_key.removeprefix("train/").replace("_", " "), ylabel=label)
      ax.margins(x=0.02)
      for i, rows in enumerate(metrics.values()):
        _draw_run(ax, _series(rows, x_key, y_key, f"{y_key}_se"), average, i)
      if not ax.lines:
        ax.text(0.5, 0.5, "not logged", transform=ax.transAxes, ha="center", color="#7a7a83")
        ax.tick_params(length=0, labelleft=False, labelbottom=False)
      elif y_key == "train/step_seconds":
        ax.set_yscale("log")
        ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
      if x_key != "step":
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
  return figure


def _draw_run(ax: "Axes", series: np.ndarray, average: Callable | None, index: int) -> None:
  if not len(series):
    return
  color, dash = _RUN_COLORS[index % len(_RUN_COLORS)], _RUN_DASHES[index // len(_RUN_COLORS) % 4]
  x, y, error = series.T
  dot = "o" if average is None or len(x) == 1 else ""
  if average is None:
    ax.fill_between(x, y - error, y + error, color=color, alpha=0.16, linewidth=0)
  else:
    stride = math.ceil(len(x) / _MAX_POINTS)
    x, raw, y = x[::stride], y[::stride], _smoothed(y, average)
    ax.plot(x, raw, color=color, linestyle=dash, alpha=0.28, linewidth=0.7)
  ax.plot(x, y, color=color, linestyle=dash, linewidth=1.5, marker=dot, markersize=3)


def _value_limits(trace: Mapping) -> tuple[float, float]:
  finite = [v for v in [*trace["values"], trace["return"]] if math.isfinite(v)]
  low, high = min([0.0, *finite]), max([1.0, *finite])
  return low - 0.06 * (high - low), high + 0.06 * (high - low)


def _value_curve(trace: Mapping, scale: float) -> "Figure":
  """v(s_0) .. v(s_K) over the tokens, the segments behind it in the tint of their text."""
  from matplotlib.figure import Figure

  segments = trace_segments(trace)
  ends = [0, *(segment.start + len(segment.tokens) for segment in segments)]
  with style():
    figure = Figure(figsize=(10, 1.9), layout="constrained")
    ax = figure.subplots()
    for segment, end in zip(segments, ends[1:]):
      color = _hex(tint(segment.reward, scale))
      ax.axvspan(segment.start, end, facecolor=color, edgecolor="#d2d2d8", linewidth=0.5, zorder=0)
      if segment.first_wrong:
        ax.axvspan(segment.start, end, fill=False, edgecolor=_WRONG, linewidth=1.3, zorder=3)
        middle, top = (segment.start + end) / 2, ax.get_xaxis_transform()
        ax.text(middle, 1.03, "first wrong step", transform=top, ha="center", color=_WRONG, fontsize=7.5)
    ax.plot(ends, trace["values"], **_VALUE_LINE)
    ax.plot(ends[-1], trace["return"], **_RETURN_MARK)
    last = (ends[-1], trace["return"])
    ax.annotate(f"R = {trace['return']:.3g}", last, (9, 0), textcoords="offset points", va="center")
    ax.set(xlabel="tokens of the trace", ylabel="state value v(s)")
    ax.set(xlim=(0, max(ends[-1], 1)), ylim=_value_limits(trace))
    ax.locator_params(axis="y", nbins=3, steps=[1, 5, 10])
    ax.grid(False)
  return figure


def credit_figure(trace: Mapping) -> "Figure":
  """One trace as a picture 9 inches wide: segments as tinted rows, r_k at their right, v(s_k) beside them.

  States lie on the lines between rows, so the value curve runs down along the text. Shows at most MAX_ROWS
  segments. Raises ValueError as `trace_segments` does.
  """
  from matplotlib.figure import Figure

  segments = trace_segments(trace)
  shown, scale = segments[:MAX_ROWS], _scale([trace])
  rows = [_wrap(segment.text, 44 if segment.first_wrong else 64, 3) for segment in shown]
  edges = np.cumsum([0.0, *(len(lines) + 0.55 for lines in rows)])
  with style():
    figure = Figure(figsize=(9, 1.25 + 0.19 * edges[-1]), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3.2, 1))
    for segment, lines, top, bottom in zip(shown, rows, edges, edges[1:]):
      for ax in (left, right):
        color = _hex(tint(segment.reward, scale))
        ax.axhspan(top, bottom, facecolor=color, edgecolor="#ffffff", linewidth=1, zorder=0)
        if segment.first_wrong:
          ax.axhspan(top, bottom, fill=False, edgecolor=_WRONG, linewidth=1.4, zorder=3)
      _draw_text(left, segment, lines, (top + bottom) / 2)
    right.plot(trace["values"][: len(edges)], edges, **_VALUE_LINE)
    if len(shown) == len(segments):
      right.plot(trace["return"], edges[-1], **_RETURN_MARK)
    _label_rows(left, right, trace, edges)
  return figure


def _draw_text(ax: "Axes", segment: Segment, lines: list[str], middle: float) -> None:
  # parse_math: a model's dollar signs are dollars, not formulas.
  style: dict[str, Any] = {"va": "center", "fontsize": 8.5, "family": "monospace", "parse_math": False}
  ax.text(0.012, middle, "\n".join(lines), linespacing=1.3, **style)
  ax.text(0.988, middle, f"{segment.reward:+.3f}", ha="right", **style)
  if segment.first_wrong:
    box = {"facecolor": _WRONG, "edgecolor": "none", "pad": 2.5}
    ax.text(0.88, middle, "first wrong step", ha="right", va="center", color="#ffffff", fontsize=8, bbox=box)


def _label_rows(left: "Axes", right: "Axes", trace: Mapping, edges: np.ndarray) -> None:
  hidden = len(trace["rewards"]) + 1 - len(edges)
  answer = f"{_verdict(trace)}, reference answer {one_line(trace['answer'], 24)}"
  more = f"; {hidden} more segments" if hidden else ""
  title = f"{one_line(trace['prompt'], 70)}\n{answer}{more}"
  left.set_title(title, parse_math=False, fontsize=8.5, family="monospace", linespacing=1.5)
  left.set(xlim=(0, 1), ylim=(max(edges[-1], 0.1), 0), xticks=[], ylabel="segment k")
  left.set_yticks((edges[1:] + edges[:-1]) / 2, [str(k) for k in range(len(edges) - 1)])
  left.text(0.988, 1.015, "reward $r_k$", transform=left.transAxes, ha="right")
  right.set(xlim=_value_limits(trace), xlabel=f"state value $v(s_k)$; ◆ R = {trace['return']:.3g}")
  right.locator_params(axis="x", nbins=3, steps=[1, 5, 10])
  right.tick_params(labelleft=False)
  for ax in (left, right):
    ax.grid(False)
    ax.tick_params(axis="y", length=0)
    ax.spines[:].set_visible(False)


# --------------------------------------------------------------------------------------------- terminal


def render_terminal(trace: Mapping, *, color: bool) -> str:
  """One trace as lines of text: k, r_k, a bar, v(s_k) → v(s_{k+1}), the segment; tinted if `color`.

  The only escape sequences in the result are our own tints. Raises ValueError as `trace_segments` does.
  """
  scale, room = _scale([trace]), MAX_TOKENS
  lines = [
    f"step {trace['step']}: {_verdict(trace)}, R = {trace['return']:.3g},"
    f" reference answer {one_line(trace['answer'], 60)}",
    *(f"  {line}" for line in _wrap(_shorten(trace["prompt"]), 100, 40)),
    "",
    f"    k      r_k  {'-     0     +':13}  {'v before, after':15}  segment",
  ]
  for segment in trace_segments(trace):
    if room > 0:
      lines += _terminal_lines(segment, scale, room, color)
      room -= len(segment.tokens)
  if len(trace["tokens"]) > MAX_TOKENS:
    lines.append(f"... {len(trace['tokens']) - MAX_TOKENS:,} more tokens")
  return "\n".join(lines) + "\n"


def _terminal_lines(segment: Segment, scale: float, room: int, color: bool) -> list[str]:
  size = round(6 * min(abs(segment.reward) / scale, 1)) if scale > 0 and math.isfinite(segment.reward) else 0
  bar = f"{'█' * size:>6}│      " if segment.reward < 0 else f"      │{'█' * size:<6}"
  head = f"  {segment.index:>3}  {segment.reward:+.3f}  {bar}  {segment.before:6.3f} → {segment.after:6.3f}  "
  red, green, blue = tint(segment.reward, scale)
  on, off = (f"\x1b[48;2;{red};{green};{blue}m\x1b[38;2;27;27;31m", "\x1b[0m") if color else ("", "")
  text = _wrap("".join(segment.tokens[:room]), 64, MAX_TOKENS)
  lines = [f"{head if i == 0 else ' ' * len(head)}{on}{line}{off}" for i, line in enumerate(text)]
  if segment.first_wrong:
    lines = ["> first wrong step", f">{lines[0][1:]}", *lines[1:]]
  return lines


def _wrap(text: Any, width: int, limit: int) -> list[str]:
  """`text` made visible, as 1 to `limit` lines of at most `width` characters; its own line ends become ↵."""
  pieces = visible(str(text)).replace("\n", "↵\n").removesuffix("\n").split("\n")
  wrapper = textwrap.TextWrapper(
    width, tabsize=4, replace_whitespace=False, drop_whitespace=False, break_on_hyphens=False
  )
  lines = [line for piece in pieces for line in wrapper.wrap(piece) or [""]]
  return lines if len(lines) <= limit else [*lines[: limit - 1], f"{lines[limit - 1][: width - 2].rstrip()} …"]


def one_line(text: Any, width: int) -> str:
  """`text` made visible in at most `width` characters of one line."""
  return _wrap(" ".join(str(text).split()), width, 1)[0]
