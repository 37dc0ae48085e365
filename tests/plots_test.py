"""What numbers say is what is drawn, in colours that follow the page."""

import io
import math
import re

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from report_cases import make_trace

from rredcot_jax.report import plots, records, style

# ---- Colours -----------------------------------------------------------------------------


def test_tint_golden():
  white, blue, orange = (255, 255, 255), (107, 174, 214), (244, 148, 84)
  assert style.tint(0.0, 2.0) == white and style.tint(0.0, 0.0) == white
  assert style.tint(2.0, 2.0) == blue and style.tint(7.0, 2.0) == blue
  assert style.tint(-2.0, 2.0) == orange and style.tint(-7.0, 2.0) == orange
  assert style.tint(1.0, 2.0) == (181, 214, 234) and style.tint(-0.5, 2.0) == (252, 228, 212)
  assert style.tint(math.nan, 2.0) == style.tint(math.inf, 2.0) == (236, 236, 236)
  assert style.hexadecimal((1, 16, 255)) == "#0110ff"


def luminance(color):
  """Relative luminance (WCAG 2) of "#rrggbb" or an sRGB triple."""
  channels = [int(color[i : i + 2], 16) for i in (1, 3, 5)] if isinstance(color, str) else color
  linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in channels)]
  return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(one, other):
  low, high = sorted((luminance(one), luminance(other)))
  return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_is_legible_on_every_tint_light_and_dark(scheme):
  of = {name: colors[scheme] for name, colors in style.PROPERTIES.items()}
  for tint in (*(colors[scheme] for colors in style.TINTS.values()), of["page"]):
    assert contrast(of["ink"], tint) >= 4.5
  assert contrast(of["soft"], of["page"]) >= 4.5 and contrast(of["wrong"], of["page"]) >= 4.5
  for i in range(len(style.RUN_COLORS)):
    assert contrast(of[f"run-{i}"], of["page"]) >= 1.9  # Okabe and Ito's lightest on white; dark ones have more.


def cone_responses(color, missing):
  """Linear RGB of a colour as dichromats see it (Vienot, Brettel and Mollon 1999), protan or deutan."""
  linear = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(color) / 255])
  red = {"protan": (0.11238, 0.88762), "deutan": (0.29275, 0.70725)}[missing]
  green = red
  blue = {"protan": (0.00401, -0.00401, 1.0), "deutan": (-0.02234, 0.02234, 1.0)}[missing]
  return np.array([np.dot(red, linear[:2]), np.dot(green, linear[:2]), np.dot(blue, linear)])


@pytest.mark.parametrize("missing", ["protan", "deutan"])
@pytest.mark.parametrize("scheme", [0, 1])
def test_signs_differ_for_people_who_confuse_red_and_green(missing, scheme):
  positive, negative = (cone_responses(style.TINTS[sign][scheme], missing) for sign in ("positive", "negative"))
  # Blue against yellow is what they keep: the two ends lie on opposite sides of grey.
  assert positive[2] > 1.5 * positive[0] and negative[0] > 1.5 * negative[2]


# ---- Curves ------------------------------------------------------------------------------


def test_resumed_run_counts_the_later_line_of_a_step():
  rows = [{"step": 2, "y": 9.0}, {"step": 1, "y": math.nan}, {"step": 0, "y": 1.0}, {"step": 2, "y": 3.0}]
  assert plots.series(rows, "step", "y").tolist() == [[0.0, 1.0], [2.0, 3.0]]


def test_a_series_has_numbers_alone():
  rows = [{"step": s, "y": y, "e": 0.5} for s, y in enumerate(["1", None, True, [1], 10**400, -math.inf, 7])]
  assert plots.series(rows, "step", "y", "e").tolist() == [[6.0, 7.0, 0.5]]
  assert plots.series([{"step": "a", "x": 1, "y": 1}, {"x": 1, "y": 1}], "x", "y").shape == (0, 2)
  third = plots.series([{"step": 1, "y": 2}], "step", "y", "e")
  assert third[0, :2].tolist() == [1.0, 2.0] and math.isnan(third[0, 2])


def figures_of(metrics):
  return dict(plots.curves(metrics))


def test_curves_draw_what_was_logged_and_nothing_else():
  rows = [{"step": s, "train/reward": s / 10, "train/rollout_tokens": 100 * s} for s in range(4)]
  rows += [{"step": s, "eval/pass@1": 0.2 * s, "eval/pass@1_se": 0.1, "train/rollout_tokens": 100 * s} for s in (1, 3)]
  figures = figures_of({"a": rows, "b": rows[:2]})
  assert [name for name, figure in figures.items() if figure is None] == ["Entropy", "Length", "Time"]
  raw, smooth, raw_b, smooth_b = figures["Training reward"].axes[0].lines
  for line, size in ((raw, 4), (smooth, 4), (raw_b, 2), (smooth_b, 2)):
    np.testing.assert_allclose(line.get_xydata(), [(s, s / 10) for s in range(size)])
  assert [line.get_color() for line in (raw, smooth_b)] == list(style.RUN_COLORS[:2])
  for name, scale in (("Evaluation, by step", 1), ("Evaluation, by rollout tokens", 100)):
    ax = figures[name].axes[0]
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [(scale, 0.2), (3 * scale, 0.6)])
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.1) and band[:, 1].max() == pytest.approx(0.7)
  assert "rollout tokens" in figures["Evaluation, by rollout tokens"].axes[0].get_xlabel()


def test_curves_are_smoothed_over_their_window_and_a_slow_step_does_not_drag_the_time():
  size = 200  # The window is 4% of it: 4 steps either side.
  rows = [
    {"step": s, "train/entropy": float(s == 100), "train/step_seconds": 50.0 if s == 100 else 2.0} for s in range(size)
  ]
  figures = figures_of({"a": rows})
  smooth = figures["Entropy"].axes[0].lines[1].get_ydata()
  assert smooth[100] == pytest.approx(1 / 9) and smooth[96] == smooth[104] and smooth[95] == smooth[105] == 0
  time = figures["Time"].axes[0]
  assert set(time.lines[1].get_ydata()) == {2.0} and time.get_yscale() == "log"


def test_long_runs_are_thinned():
  rows = [{"step": s, "train/reward": 0.5} for s in range(5000)]
  assert all(len(line.get_xdata()) == 1000 for line in figures_of({"a": rows})["Training reward"].axes[0].lines)


def test_runs_beyond_the_colours_have_other_dashes():
  rows = [{"step": s, "train/reward": 0.5} for s in range(2)]
  lines = figures_of({str(i): rows for i in range(9)})["Training reward"].axes[0].lines[1::2]
  looks = [(line.get_color(), line.get_linestyle()) for line in lines]
  assert len(set(looks)) == 9 and looks[7] == (style.RUN_COLORS[0], "--")


# ---- One trace ---------------------------------------------------------------------------


def test_value_limits_hold_every_value():
  limits = plots.value_limits(
    records.parse_trace(make_trace(values=[-1.0, math.nan, math.inf, 0.0], **{"return": 3.0}))
  )
  assert limits == pytest.approx((-1.24, 3.24))


def test_credit_figure_draws_the_values_and_leaves_dollars_alone():
  trace = make_trace(tokens=[r"$\nosuchcommand$ $5 "] * 8, prompt="$x", answer="$_^$")
  figure = plots.credit_figure(trace)
  figure.savefig(io.BytesIO(), format="png", dpi=50)  # a formula that does not parse would raise
  left, right = figure.axes
  texts = [text.get_text() for text in left.texts]
  assert [text for text in texts if re.fullmatch(r"[+-]\d\.\d{3}", text)] == ["+0.250", "-0.750", "+0.000"]
  assert texts.count("first wrong step") == 1
  assert np.array_equal(right.lines[0].get_xdata(), trace["values"])
  # The states lie on the lines between rows, the return on the last of them.
  edges = right.lines[0].get_ydata()
  assert np.array_equal(right.lines[1].get_xydata(), [[0.0, edges[-1]]])
  assert np.allclose((edges[1:] + edges[:-1]) / 2, left.get_yticks())
  faces = [matplotlib.colors.to_hex(patch.get_facecolor()) for patch in right.patches if patch.get_fill()]
  assert faces == ["#cee4f1", "#f49454", "#ffffff"]
  for ax in (left, right):  # The second segment, the first wrong one, has an outline.
    (outline,) = [patch for patch in ax.patches if not patch.get_fill()]
    assert [outline.get_y(), outline.get_y() + outline.get_height()] == pytest.approx(edges[1:3])
  assert figure.get_size_inches()[0] == 9


def test_credit_figure_is_bounded_and_says_so():
  size = plots.MAX_ROWS + 5
  rows = dict(
    tokens=["x" * 10**5] * size, segment_ids=list(range(size)), rewards=[0.0] * size, values=[0.0] * (size + 1)
  )
  left, right = plots.credit_figure(make_trace(advantages=None, prompt="p" * 10**6, **rows)).axes
  assert "; 5 more segments" in left.get_title(loc="left") and len(left.get_title(loc="left")) < 200
  assert len(right.lines) == 1 and len(right.lines[0].get_xdata()) == plots.MAX_ROWS + 1
  assert max(len(text.get_text()) for text in left.texts) < 300


def test_control_characters_are_drawn_as_codes():
  figure = plots.credit_figure(make_trace(tokens=["\x1b[31m\u202e"] * 8, prompt="\x07", answer="\x9b"))
  drawn = [text.get_text() for text in figure.axes[0].texts] + [figure.axes[0].get_title(loc="left")]
  assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", "".join(drawn)) and "\\x1b[31m\\u202e" in drawn[0]


# ---- In a page ---------------------------------------------------------------------------


def hostile_figure():
  figure = Figure(figsize=(2, 2))
  ax = figure.subplots()
  ax.plot([0, 1], [0, 1], color=style.RUN_COLORS[0], marker="o")
  ax.plot([0, 1], [1, 0], color="#123456")
  ax.text(0.5, 0.5, '</svg><script>x</script> style="fill: #0072b2" id="a" url(#b)', color=style.INK)
  return figure


def test_svg_takes_the_colours_of_the_page_and_leaves_text_alone():
  drawn = plots.svg(hostile_figure(), "one-")
  assert drawn.startswith("<svg") and "<script" not in drawn
  assert "var(--run-0)" in drawn and "var(--ink)" in drawn and "#123456" in drawn
  tags = re.findall(r"<[^>]*>", drawn)
  assert not [tag for tag in tags if any(f"{color};" in tag or f'{color}"' in tag for color in style.OF_FIGURES)]
  assert '&lt;/svg&gt;&lt;script&gt;x&lt;/script&gt; style="fill: #0072b2" id="a" url(#b)' in drawn
  assert "fill: #ffffff" not in drawn and "fill: var(--page)" not in drawn  # Nothing behind the axes.


def test_svg_ids_are_a_figures_own():
  ids = {}
  for prefix in ("one-", "two-"):
    tags = "".join(re.findall(r"<[^>]*>", plots.svg(hostile_figure(), prefix)))
    ids[prefix] = set(re.findall(r'(?<= id=")[^"]+', tags))
    referred = set(re.findall(r'(?:url\(#|href="#)([^")]+)', tags))
    assert referred and referred <= ids[prefix]
  assert not ids["one-"] & ids["two-"]


def test_svg_is_the_same_whatever_matplotlibrc_says():
  draw = lambda: plots.svg(
    figures_of({"a": [{"step": s, "train/reward": 0.1 * s} for s in range(9)]})["Training reward"], ""
  )
  first = draw()
  with matplotlib.rc_context({"font.size": 23, "axes.grid": False, "svg.hashsalt": "other", "axes.facecolor": "red"}):
    assert draw() == first
