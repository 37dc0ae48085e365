"""What a run did, for people: its curves, and the credit each piece of reasoning received, in one HTML file.

Reads the work directories of runs (config.json, metrics.jsonl, traces.jsonl) and writes one file that opens
anywhere, offline. A trace is text that a model wrote, hence untrusted: templates escape all they are given and
show control characters as codes, and the page's policy lets no script run but the one that belongs to it.
"""

import base64
import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup, escape

from rredcot_jax.report import files, plots, records, style
from rredcot_jax.report.text import code, is_hidden, shorten, visible

if TYPE_CHECKING:
  from matplotlib.figure import Figure

_PACKAGE = "rredcot_jax.report"
TRACES_PER_RUN = 12
PROMPTS_COMPARED = 4  # shown side by side, where several runs have traces of them
RUNS_COMPARED = 4
MAX_NAME = 300  # characters of a run's name, a title or a caption, shown
MAX_PROMPT = 4000  # of a prompt, a table's cell or an answer
MAX_CHARACTERS = 150_000  # of a trace or a configuration
FOLDED_FROM = 4000  # characters of a trace: a longer one shows the beginnings of its segments, to be unfolded
OPEN_UP_TO = 40  # segments: more are behind a line that opens
_FOLDED_PROMPT = 600  # characters: a longer prompt is folded as a segment is
_HEAD = 160  # most characters of what is folded that stay in view


# ---- Pages -------------------------------------------------------------------------------


def write_report(
  runs: Mapping[str, Path],
  path: str | os.PathLike,
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
  metrics = {name: records.read_metrics(Path(run) / "metrics.jsonl") for name, run in runs.items()}
  traces = {name: records.distinct_traces(Path(run) / "traces.jsonl") for name, run in runs.items()}
  number = itertools.count()
  drawn = lambda figure: Markup(plots.svg(figure, f"figure-{next(number)}-"))
  write_page(
    path,
    "report.html",
    title=title,
    summary=summary,
    figures=[(caption, drawn(figure)) for caption, figure in figures],
    names=list(runs),
    curves=[(name, figure and drawn(figure)) for name, figure in plots.curves(metrics)],
    smoothing=plots.SMOOTHING,
    lost={name: count for name, rows in metrics.items() if (count := _not_finite(rows))},
    credited=[_credited(place, name, Path(run), traces[name]) for place, (name, run) in enumerate(runs.items())],
    compared=_compared(traces),
    configs=[(name, _config(Path(run) / "config.json")) for name, run in runs.items()],
  )


def write_page(path: str | os.PathLike, template: str, *, title: str, package: str = _PACKAGE, **values: Any) -> None:
  """Writes a template that extends frame.html as one self-contained page, atomically; folders are made.

  Every value that a template prints is escaped and its control characters are shown as codes, unless it is
  `markupsafe.Markup`. Templates have the macros of parts.html for tables and traces.

  Args:
    path: replaced in one step.
    template: the name of a file in the folder "templates" of `package`.
    package: of the template; its other files may be included as well, and this package's.
    title: of the page.
    values: the template's other variables.
  """
  page = _environment(package).get_template(template).render(title=title, **values)
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_whole(path, page)


@functools.cache
def _environment(package: str) -> jinja2.Environment:
  environment = jinja2.Environment(
    loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name) for name in dict.fromkeys((package, _PACKAGE))]),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=lambda value: value if hasattr(value, "__html__") else visible(value),
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {"marked": marked, "short": shorten, "cell": _cell}
  environment.globals |= {
    "table": _table,
    "properties": style.PROPERTIES,
    "tints": style.TINTS,
    "swatch": _swatch,
    "MAX_NAME": MAX_NAME,
    "MAX_PROMPT": MAX_PROMPT,
    "MAX_CHARACTERS": MAX_CHARACTERS,
  }
  script = jinja2.PackageLoader(_PACKAGE).get_source(environment, "report.js")[0]
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  environment.globals |= {"script": Markup(script), "script_hash": f"sha256-{digest}"}
  return environment


# ---- Text and numbers --------------------------------------------------------------------


def marked(text: Any) -> Markup:
  """Untrusted text as HTML content: control characters and line ends as marks that are not selected with it."""
  parts = []
  for kind, run in itertools.groupby(str(text), key=_kind):
    characters = "".join(run)
    if kind == "control":
      parts.append(f'<span class="control">{"".join(map(code, characters))}</span>')
    elif kind == "newline":
      parts.append('<span class="newline">↵</span>\n' * len(characters))
    else:
      parts.append(str(escape(characters)))
  return Markup("".join(parts))


def _kind(character: str) -> str:
  return "newline" if character == "\n" else "control" if is_hidden(character) else ""


def _cell(value: Any) -> str:
  """A table's cell: "–" for None, numbers in 4 digits, any other thing as text."""
  if value is None:
    return "–"
  if not records.is_number(value):
    return shorten(value, MAX_PROMPT)
  return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _table(rows: Sequence[Mapping]) -> dict[str, Any]:
  """Columns in the order in which keys first appear, whether each holds numbers alone, and the cells by row."""
  columns = list(dict.fromkeys(key for row in rows for key in row))
  numeric = [all(records.is_number(row[key]) for row in rows if row.get(key) is not None) for key in columns]
  return {"columns": list(zip(columns, numeric)), "rows": [[row.get(key) for key in columns] for row in rows]}


def _swatch(index: int) -> str:
  """The CSS of a line in a run's colour and dashes."""
  size = len(style.RUN_COLORS)
  dash = ("solid", "dashed", "dotted", "dashed")[index // size % len(style.RUN_DASHES)]
  return f"border-top: 3px {dash} var(--run-{index % size})"


def _not_finite(rows: Sequence[Mapping]) -> int:
  values = (value for row in rows for value in row.values() if records.is_number(value))
  return sum(not math.isfinite(records.number(value)) for value in values)


# ---- Configurations ----------------------------------------------------------------------


def _config(path: Path) -> str | None:
  """The command and the settings of a run, as text; None where there is no config.json."""
  read = records.read_config(path)
  if read is None:
    return None
  command, settings = read
  return shorten(f"$ {command}\n\n{json.dumps(settings, indent=2, ensure_ascii=False)}", MAX_CHARACTERS)


def _why_no_credit(workdir: Path) -> str:
  read = records.read_config(workdir / "config.json")
  settings = read[1] if read else None
  credit = settings.get("credit") if isinstance(settings, dict) else None
  if isinstance(credit, dict) and credit.get("mode") == "uniform":
    return (
      "This run gave every token of a trace the same advantage (credit.mode is 'uniform', which is GRPO), "
      "so no segment has credit of its own to show."
    )
  if (workdir / "traces.jsonl").is_file():
    return "traces.jsonl holds no complete line yet, so there is no credit to show."
  return "This run has written no traces.jsonl so far: it logs a few traces whenever it evaluates the policy."


# ---- Traces ------------------------------------------------------------------------------


def _credited(place: int, name: str, workdir: Path, traces: Sequence[records.Trace]) -> dict[str, Any]:
  """What the section on a run's traces shows; `place` is the run's on the page."""
  if not traces:
    return {"name": name, "traces": [], "why": _why_no_credit(workdir)}
  chosen = records.most_informative(traces, TRACES_PER_RUN)
  scale = records.scale_of(chosen)
  return {
    "name": name,
    "scale": scale,
    "distinct": len(traces),
    "logged": sum(trace.copies for trace in traces),
    "traces": [_trace(f"trace-{place}-{number}", trace, scale) for number, trace in enumerate(chosen)],
  }


def _compared(traces: Mapping[str, Sequence[records.Trace]]) -> list[list[tuple[str, dict[str, Any]]]]:
  """For some prompts that several runs have traces of: each run's name and its latest trace, of equal steps the one
  with the largest |r|. Prompts on which the runs disagree come first, then those with the largest |r|."""
  groups: dict[str, dict[str, records.Trace]] = {}
  for name, found in traces.items():
    for trace in sorted(found, key=lambda one: (records.number(one.step), one.peak)):
      groups.setdefault(trace.prompt, {})[name] = trace
  several = [list(group.items())[:RUNS_COMPARED] for group in groups.values() if len(group) > 1]
  order = lambda group: (len({one.verdict for _, one in group}) == 1, -max(one.peak for _, one in group))
  chosen = sorted(several, key=order)[:PROMPTS_COMPARED]
  scale = records.scale_of([trace for group in chosen for _, trace in group])
  return [
    [(name, _trace(f"same-{place}-{number}", trace, scale)) for number, (name, trace) in enumerate(group)]
    for place, group in enumerate(chosen)
  ]


def _trace(anchor: str, trace: records.Trace, scale: float) -> dict[str, Any]:
  shown, left_out = records.shown_segments(trace, MAX_CHARACTERS)
  folded = sum(len(text) for _, text in shown) > FOLDED_FROM
  wrong = [segment.index for segment in trace.segments if segment.first_wrong]
  prompt = shorten(trace.prompt, MAX_PROMPT)
  fold = _fold(prompt) if len(prompt) > _FOLDED_PROMPT else len(prompt)
  return {
    "anchor": anchor,
    "trace": trace,
    "prompt_head": prompt[:fold],
    "prompt_rest": prompt[fold:],
    "total": sum(segment.reward for segment in trace.segments),
    "first_wrong": wrong[0] if wrong else None,
    "segments": [_segment(segment, text, scale, folded) for segment, text in shown],
    "left_out": left_out,
    "open": len(shown) <= OPEN_UP_TO,
    "folded": folded,
    "curve": _curve(trace, [segment for segment, _ in shown], scale),
  }


def _segment(segment: records.Segment, text: str, scale: float, folded: bool) -> dict[str, Any]:
  place = _fold(text) if folded else len(text)
  return {"segment": segment, **_tint(segment, scale), "head": text[:place], "rest": text[place:]}


def _tint(segment: records.Segment, scale: float) -> dict[str, Any]:
  kind = "positive" if segment.reward > 0 else "negative" if segment.reward < 0 else "zero"
  kind = kind if math.isfinite(segment.reward) else "unknown"
  return {"kind": kind, "weight": round(style.weight(segment.reward, scale), 3)}


def _fold(text: str) -> int:
  """Where to fold a text: behind its first line, or behind a word where that is longer than _HEAD."""
  if len(text) <= _HEAD:
    return len(text)
  line = text.find("\n", 0, _HEAD) + 1
  return line or text.rfind(" ", _HEAD // 2, _HEAD) + 1 or _HEAD


def _curve(trace: records.Trace, segments: Sequence[records.Segment], scale: float) -> dict[str, Any]:
  """v(s_0) .. v(s_K) over the tokens in percent of the picture, the segments behind it in the tint of their text."""
  low, high = plots.value_limits(trace)
  width = max(segments[-1].end, 1) if segments else 1
  x = lambda token: round(100 * token / width, 2)
  y = lambda value: round(100 * (high - value) / (high - low), 2)
  places = [0, *(segment.end for segment in segments)]
  points = [(x(token), y(value)) for token, value in zip(places, trace.values) if math.isfinite(value)]
  return {
    "bars": [
      {"x": x(segment.start), "width": round(x(segment.end) - x(segment.start), 2), **_tint(segment, scale)}
      | {"first_wrong": segment.first_wrong}
      for segment in segments
      if segment.end > segment.start
    ],
    "line": " ".join(f"{a},{b}" for a, b in points),
    "ticks": [(value, y(value)) for value in (0, 1)],
    "end": y(trace.return_) if math.isfinite(trace.return_) and len(segments) == len(trace.segments) else None,
    "tokens": width,
  }
