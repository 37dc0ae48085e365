"""The credit study for people: study.json, PNG figures, and one self-contained page.

Texts of traces come from a model, so they are not trusted. The page escapes them. Figures show control characters
as codes and render no formulas.
"""

import base64
import io
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rredcot_jax.report import files, page, style
from rredcot_jax.report.text import one_line
from rredcot_jax.study import agreement

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

# What a method is called in figures, and the colour of its kind.
_KINDS = (
  ("rredcot", "#0072B2"), ("monte_carlo", "#009E73"), ("ground_truth", "#1b1b1f"), ("grpo", "#7a7a83"),
  ("random", "#b9b9c2"), ("", "#D55E00"),
)  # fmt: skip
_LINES = (  # Drawn over position, if they were run.
  ("rredcot_suffix", "#0072B2", "-"), ("rredcot_answer_forced", "#56B4E9", "-"), ("rredcot_rollouts", "#0072B2", ":"),
  ("monte_carlo", "#009E73", "-"), ("leave_one_out", "#D55E00", "-"), ("gradient_x_input", "#E69F00", "--"),
  ("integrated_gradients", "#E69F00", ":"), ("attention", "#CC79A7", "-"),
)  # fmt: skip
_GUIDE = "#9a9aa2"


def write(workdir: pathlib.Path, result: Mapping[str, Any], *, title: str, config: str) -> None:
  """Writes study.json, figures/*.png and study.html into `workdir`, each whole or not at all.

  Args:
    workdir: made if it is not there.
    result: what experiments/credit_study.py puts together, of JSON values.
    title: of the page.
    config: the configuration as text.
  """
  from rredcot_jax.study import tables

  (workdir / "figures").mkdir(parents=True, exist_ok=True)
  text = json.dumps(tables.jsonable(result), indent=1, allow_nan=False)
  files.write_whole(workdir / "study.json", text)
  result = json.loads(text)
  figures = []
  for name, caption, draw in (
    ("summary", "Intervals: 95%, bootstrap over prompts. Dashed: what a perfect estimator could reach against "
     "this truth (a), chance (c), GRPO (d).", summary_figure),
    ("calibration", "Bins of equally many states; the diagonal is a calibrated value.", calibration_figure),
    ("cost", "Wall time of crediting a trace, compiling not counted.", cost_figure),
    ("segmentation", "Each way to cut, by how many segments it leaves.", segmentation_figure),
  ):  # fmt: skip
    figure = draw(result)
    if figure is not None:
      figures.append((name, _save(figure, workdir / "figures" / f"{name}.png"), caption))
  page.write_page(
    workdir / "study.html",
    "study.html",
    package="rredcot_jax.study",
    title=title,
    result=result,
    figures=figures,
    sections=_sections(result),
    traces=[
      _save(trace_figure(one), workdir / "figures" / f"trace_{i}.png") for i, one in enumerate(result["records"])
    ],
    config=config,
  )


# ---- Figures -----------------------------------------------------------------------------


def summary_figure(result: Mapping[str, Any]) -> "Figure":
  """Rank correlation, by position, error localisation and gradient variance, 9 inches wide."""
  from matplotlib.figure import Figure

  names = list(result["spearman_difference"])
  with style.context():
    figure = Figure(figsize=(9, 7.6), layout="constrained")
    # Subfigures, so that the long labels of one panel do not narrow another.
    panels: Any = figure.subfigures(2, 2)
    a, b, c, d = (one.subplots() for one in panels.flat)
    differences = result["value_quality"]["differences"]["all"]
    _bars(a, names, {n: differences["methods"].get(n, {}).get("spearman") for n in names})
    ceiling = (differences["ceiling"] or {}).get("ceiling")
    if ceiling:
      a.axvline(ceiling, color=_GUIDE, linestyle="--", linewidth=1)
      a.text(ceiling, len(names) - 0.6, "noise ceiling ", ha="right", color="#5c5c66", fontsize=7)
    a.set(title="(a) Agreement of rewards with the truth", xlabel="Spearman's rank correlation")
    _by_position(b, result)
    what = result["error_localisation_is"]
    located = result["localisation"][what]
    _bars(c, list(located["methods"]), {n: _percent(x) for n, x in located["methods"].items()})
    if located["chance"]:
      c.axvline(100 * located["chance"][0], color=_GUIDE, linestyle="--", linewidth=1)
    c.set(title=f"(c) Lowest reward on the {what}", xlabel=f"% of {located['traces']} failed traces", xlim=(0, 100))
    variance = result["gradient_variance"]
    if variance:
      rows = variance["fixed prompts"]
      _bars(d, list(rows), {n: row["useful_ratio"] for n, row in rows.items()}, log=True)
      d.axvline(1, color=_GUIDE, linestyle="--", linewidth=1)
      d.set(title="(d) Gradient variance per signal", xlabel="over GRPO's, at equal rollouts (log scale)")
    else:
      d.set_axis_off()
  return figure


def _percent(figure: Sequence[float | None] | None) -> list[float | None] | None:
  return None if figure is None else [None if x is None else 100 * x for x in figure]


def _color(name: str) -> str:
  return next(color for kind, color in _KINDS if name.startswith(kind))


def label(name: str) -> str:
  """A method's name as figures print it."""
  text = name.removeprefix("rredcot_").replace("_", " ").replace(":", ", ")
  text = text.replace("grpo", "GRPO").replace("monte carlo", "Monte Carlo")
  return f"RREDCoT: {text}" if name.startswith("rredcot") else text


def _bars(ax: "Axes", names: Sequence[str], figures: Mapping[str, Any], *, log: bool = False) -> None:
  """Horizontal bars with intervals, in one order for all panels, so that panels can be compared."""
  places = range(len(names))
  for y, name in zip(places, names):
    value = figures.get(name)
    if value is None or value[0] is None:
      ax.text(0.02, y, "not measurable", transform=ax.get_yaxis_transform(), va="center", fontsize=7, color="#7a7a83")
      continue
    if log:
      ax.plot(value[0], y, marker="o", markersize=5, color=_color(name))
    else:
      ax.barh(y, value[0], color=_color(name), height=0.66)
    if value[1] is not None and value[2] is not None:
      ax.plot(value[1:], [y, y], color="#1b1b1f" if not log else _color(name), linewidth=1.1)
  if log:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 30 * low else (1,)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
  ax.set_yticks(places, [label(name) for name in names], fontsize=7)
  ax.set_ylim(len(names) - 0.4, -0.9)
  ax.tick_params(axis="y", length=0)
  ax.grid(axis="y", visible=False)


def _by_position(ax: "Axes", result: Mapping[str, Any]) -> None:
  tables = result["value_quality"]["differences"]
  deciles = [d for d in range(10) if tables[f"decile {d}"]["methods"]]
  for name, color, dash in _LINES:
    rows = [tables[f"decile {d}"]["methods"].get(name) for d in deciles]
    points = [
      (d / 10 + 0.05, row["spearman"][0]) for d, row in zip(deciles, rows) if row and row["spearman"][0] is not None
    ]
    if points:
      ax.plot(*zip(*points), color=color, linestyle=dash, marker="o", markersize=3, linewidth=1.3, label=label(name))
  ceilings = [
    (d / 10 + 0.05, tables[f"decile {d}"]["ceiling"]["ceiling"]) for d in deciles if tables[f"decile {d}"]["ceiling"]
  ]
  ceilings = [point for point in ceilings if point[1] is not None]
  if ceilings:
    ax.plot(*zip(*ceilings), color=_GUIDE, linestyle="--", linewidth=1, label="noise ceiling")
  ax.axhline(0, color=_GUIDE, linewidth=0.7)
  ax.set(title="(b) The same, by position", xlabel="where the segment begins, share of the trace", xlim=(0, 1))
  ax.set(ylabel="Spearman's rank correlation", ylim=(-1.02, 1.02))
  if not deciles:
    ax.text(0.5, 0.7, "too few segments in every tenth", transform=ax.transAxes, ha="center", color="#7a7a83")
  else:
    ax.figure.legend(fontsize=6.5, ncols=3, frameon=False, loc="outside lower center")


def calibration_figure(result: Mapping[str, Any]) -> "Figure | None":
  """The mean truth against the mean estimate, one panel for each method."""
  from matplotlib.figure import Figure

  curves = result["calibration"]
  if not curves:
    return None
  columns = min(len(curves), 4)
  rows = math.ceil(len(curves) / columns)
  with style.context():
    figure = Figure(figsize=(9, 2.35 * rows + 0.2), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for ax in axes.flat[len(curves) :]:
      ax.set_visible(False)
    for i, (ax, (name, curve)) in enumerate(zip(axes.flat, curves.items())):
      x, y, _ = np.array(curve, float).T
      ax.plot([0, 1], [0, 1], color=_GUIDE, linewidth=0.8, linestyle="--")
      ax.plot(x, y, color=_color(name), marker="o", markersize=3.5, linewidth=1.2)
      ax.set(xlim=(-0.03, max(1.03, 1.05 * x.max())), ylim=(-0.03, 1.03))
      ax.set_title(label(name), fontsize=7, fontweight="normal")
      ax.set_xlabel("estimated value", fontsize=7.5)
      if i % columns == 0:
        ax.set_ylabel("true value")
  return figure


def cost_figure(result: Mapping[str, Any]) -> "Figure | None":
  """Agreement against operations a trace."""
  from matplotlib.figure import Figure

  rows = result["value_quality"]["differences"]["all"]["methods"]
  priced = [
    n for n in result["cost"] if result["cost"][n]["flops"] > 0 and n in rows and rows[n]["spearman"][0] is not None
  ]
  if not priced:
    return None
  with style.context():
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for ax, key, unit in zip(
      figure.subplots(1, 2, sharey=True), ("flops", "seconds"), ("GFLOP a trace", "seconds a trace")
    ):
      scale = 1e-9 if key == "flops" else 1.0
      for number, name in enumerate(priced, start=1):
        value, low, high = rows[name]["spearman"]
        x = scale * result["cost"][name][key]
        ax.plot(x, value, marker="o", markersize=5, color=_color(name))
        if low is not None:
          ax.plot([x, x], [low, high], color=_color(name), linewidth=1)
        ax.annotate(str(number), (x, value), (4, 4), textcoords="offset points", fontsize=7.5)
        if key == "seconds":
          ax.plot([], [], marker="o", linestyle="", markersize=4, color=_color(name), label=f"{number} {label(name)}")
      ax.set_xscale("log")
      ax.set(xlabel=f"{unit} (log scale)")
    figure.axes[0].set_ylabel("Spearman's rank correlation\nof rewards with the truth")
    figure.legend(loc="outside right center", fontsize=7, frameon=False)
  return figure


def segmentation_figure(result: Mapping[str, Any]) -> "Figure | None":
  """Agreement and localisation of each way to cut."""
  from matplotlib.figure import Figure

  rows = result["segmentation"]
  methods = [m for m in next(iter(rows.values()), {"cost": {}})["cost"]]
  if not methods:
    return None
  names = list(rows)
  with style.context():
    figure = Figure(figsize=(9, 0.9 + 0.42 * len(names) + 0.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    height = 0.8 / len(methods)
    shades = {m: color for m, color, _ in _LINES}
    for i, method in enumerate(methods):
      color = shades.get(method, _color(method))
      for y, name in enumerate(names):
        place = y - 0.4 + height * (i + 0.5)
        agree = rows[name]["differences"]["methods"].get(method, {}).get("spearman")
        found = _percent(rows[name]["localisation"]["methods"].get(method))
        for ax, value in ((left, agree), (right, found)):
          if value and value[0] is not None:
            ax.barh(place, value[0], height=height * 0.9, color=color)
            if value[1] is not None:
              ax.plot(value[1:], [place, place], color="#1b1b1f", linewidth=0.9)
      left.barh(np.nan, np.nan, color=color, label=label(method))
    ticks = [
      f"{name} (K = {rows[name]['segments']:.1f}, {rows[name]['tokens_a_segment']:.1f} tokens)" for name in names
    ]
    left.set_yticks(range(len(names)), ticks)
    left.set_ylim(len(names) - 0.5, -0.5)
    left.set(xlabel="Spearman's rank correlation of rewards", title="Agreement with the truth")
    right.set(xlabel="% of failed traces", title="Most negative reward on the first wrong step", xlim=(0, 100))
    if not any(row["localisation"]["traces"] for row in rows.values()):
      right.set_visible(False)
    for ax in (left, right):
      ax.grid(axis="y", visible=False)
      ax.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=4, fontsize=7, frameon=False)
  return figure


def trace_figure(trace: Mapping[str, Any]) -> "Figure":
  """One trace: a row for each segment, a column for each method, tinted relative to the column's largest reward."""
  from matplotlib.figure import Figure

  methods = list(trace["rewards"])
  texts = [one_line(text, 36) for text in trace["segments"]]
  with style.context():
    figure = Figure(figsize=(9, 1.75 + 0.24 * len(texts)), layout="constrained")
    ax = figure.subplots()
    for column, name in enumerate(methods):
      rewards = trace["rewards"][name]
      finite = [abs(r) for r in rewards if r is not None and math.isfinite(r)]
      for row, reward in enumerate(rewards):
        if reward is None or not math.isfinite(reward):
          continue
        color = [x / 255 for x in style.tint(reward, max(finite))]
        ax.add_patch(_square(column, row, color))
        small = f"{reward:+.2f}" if abs(reward) < 10 else f"{reward:+.0f}"
        ax.text(column + 0.5, row + 0.5, small, ha="center", va="center", fontsize=6)
    if trace["wrong"] >= 0:
      ax.plot(
        [0, len(methods), len(methods), 0, 0],
        np.array([0, 0, 1, 1, 0]) + trace["wrong"],
        color="#b3261e",
        linewidth=1.3,
      )
    ax.set(xlim=(0, len(methods)), ylim=(len(texts), 0))
    ax.set_xticks(np.arange(len(methods)) + 0.5, [label(n) for n in methods], rotation=38, ha="left", fontsize=6.5)
    ax.xaxis.tick_top()
    ax.set_yticks(np.arange(len(texts)) + 0.5, texts, family="monospace", fontsize=7, parse_math=False)
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    answer = one_line(trace["answer"], 20)
    outcome = f"reference answer {answer}, trace {'right' if trace['return'] >= 1 else 'wrong'}"
    ax.set_xlabel(
      f"{one_line(trace['prompt'], 90)}   {outcome}",
      fontsize=7, parse_math=False,
    )  # fmt: skip
  return figure


def _square(column: int, row: int, color: Sequence[float]) -> Any:
  from matplotlib.patches import Rectangle

  return Rectangle((column, row), 1, 1, facecolor=color, edgecolor="#ffffff", linewidth=1)


def _save(figure: "Figure", path: pathlib.Path) -> str:
  """Writes the figure as PNG, and returns it as a data URL."""
  buffer = io.BytesIO()
  with style.context():
    figure.savefig(buffer, format="png", dpi=130)
  files.write_whole(path, buffer.getvalue())
  return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---- Tables ------------------------------------------------------------------------------


def cell(figure: Sequence[float | None] | None, digits: int = 3) -> str | None:
  """A figure with its interval as a table prints it."""
  if not figure or figure[0] is None:
    return None
  ends = (
    f" ({figure[1]:.{digits}f} to {figure[2]:.{digits}f})" if figure[1] is not None and figure[2] is not None else ""
  )
  return f"{figure[0]:.{digits}f}{ends}"


def _sections(result: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The page's sections of tables: each a heading, a note and tables, each a caption, its rows and whether it is open.

  A table whose caption is None cannot be folded.
  """
  return [
    {"heading": "a. Value quality", "note": "", "tables": _value_tables(result)},
    {
      "heading": "b. Ranking of continuations of one state",
      "note": f"{result['ranking']['pairs']} pairs",
      "tables": [(None, _figure_rows("ordered as the truth", result["ranking"]["methods"]), True)],
    },
    {"heading": "c. Error localisation", "note": "", "tables": _localisation_tables(result)},
    *([_variance_section(result["gradient_variance"])] if result["gradient_variance"] else []),
    {"heading": "e. Segmentation", "note": "", "tables": [(None, _segmentation_rows(result), True)]},
    {"heading": "f. Cost of crediting a trace", "note": "", "tables": [(None, _cost_rows(result), True)]},
  ]


def _figure_rows(column: str, figures: Mapping[str, Any]) -> list[dict[str, Any]]:
  return [{"method": label(name), column: cell(figure)} for name, figure in figures.items()]


def _value_tables(result: Mapping[str, Any]) -> list[tuple]:
  tables = []
  for what, title in (("differences", "Redistributed rewards r"), ("values", "State values v")):
    for subset, table in result["value_quality"][what].items():
      ceiling = table["ceiling"] or {}
      note = ", ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in ceiling.items() if value is not None)
      rows = [
        {"method": label(n), **{m.replace("_", " "): cell(row[m]) for m in agreement.MEASURES}}
        for n, row in table["methods"].items()
      ]
      counted = f"{title}: {subset}, n = {table['n']}"
      tables.append((f"{counted}; {note}" if note else counted, rows, subset == "all"))
  return tables


def _localisation_tables(result: Mapping[str, Any]) -> list[tuple]:
  return [
    (
      f"{name}: {table['traces']} failed traces",
      _figure_rows("share", table["methods"] | {"chance": table["chance"]}),
      True,
    )
    for name, table in result["localisation"].items()
    if table["methods"]
  ]


def _variance_section(variance: Mapping[str, Any]) -> dict[str, Any]:
  keys = ("variance_ratio", "own_ratio", "useful_ratio", "useful_ratio_at_equal_compute", "cosine", "cosine_of_means")
  rows = lambda table, show: [
    {"method": label(n), **{key.replace("_", " "): show(row[key]) for key in keys if key in row}}
    for n, row in table.items()
  ]
  return {
    "heading": "d. Gradient variance",
    "note": (
      f"{variance['prompts']} prompts, {variance['groups']} groups each; "
      f"the policy gradient is that of {label(variance['unbiased'])}"
    ),
    "tables": [
      ("at fixed prompts", rows(variance["fixed prompts"], cell), True),
      ("across prompts", rows(variance["across prompts"], lambda x: x), True),
    ],
  }


def _segmentation_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
  rows = []
  for name, table in result["segmentation"].items():
    for method, price in table["cost"].items():
      quality = table["differences"]["methods"].get(method, {})
      rows.append({
        "cut by": name, "K": table["segments"], "tokens a segment": table["tokens_a_segment"],
        "merged": table["merged_cuts"],
        "method": label(method), "Spearman of r": cell(quality.get("spearman")),
        "first wrong step": cell(table["localisation"]["methods"].get(method)),
        "forward tokens": price["forward_tokens"] + price["generated_tokens"], "seconds a trace": price["seconds"],
      })  # fmt: skip
  return rows


def _cost_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
  return [
    {"method": label(n), "forward tokens": p["forward_tokens"], "generated tokens": p["generated_tokens"],
     "GFLOP": p["flops"] / 1e9, "seconds": p["seconds"], "states with a value behind them": p["covered_states"]}
    for n, p in result["cost"].items()
  ]  # fmt: skip
