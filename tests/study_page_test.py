"""The study's pictures draw the figures they are given, and its page shows every text as text."""

import base64
import copy
import json
import math
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from report_cases import BREAKOUT, HOSTILE, RAW_CONTROLS, SCRIPT, SHOWN

from rredcot_jax.report import style
from rredcot_jax.study import agreement
from rredcot_jax.study import page as study_page

METHODS = ("rredcot_suffix", "monte_carlo", "grpo")


def table(values, **changes):
  """A table of value quality: every measure of a method is its value, give or take 0.1."""
  around = lambda x: [None] * 3 if x is None else [x, x - 0.1, x + 0.1]
  quality = {name: dict.fromkeys(agreement.MEASURES, around(x)) for name, x in values.items()}
  return {"n": 40, "ceiling": {"split_half": 0.8, "reliability": 0.9, "ceiling": 0.95}, "methods": quality} | changes


@pytest.fixture
def result():
  empty = table({}, n=0, ceiling=None)
  by_decile = {f"decile {d}": empty for d in range(10)}
  by_decile["decile 2"] = table({"rredcot_suffix": 0.3, "monte_carlo": 0.1})
  by_decile["decile 7"] = table({"rredcot_suffix": 0.9})
  shares = {"rredcot_suffix": [0.75, 0.5, 1.0], "grpo": [0.25, None, None]}
  located = {"traces": 12, "methods": shares, "chance": [0.2, 0.1, 0.3]}
  nowhere = {"traces": 0, "methods": {}, "chance": None}
  ratios = {"useful_ratio": [0.5, 0.25, 1.0], "cosine": [0.1, None, None]}
  fixed = {"grpo": {"useful_ratio": [1.0, 1.0, 1.0]}, "rredcot_suffix:difference": ratios}
  keys = ("variance_ratio", "own_ratio", "useful_ratio", "useful_ratio_at_equal_compute", "cosine", "cosine_of_means")
  fixed = {name: {key: row.get(key) for key in keys} for name, row in fixed.items()}
  price = {"forward_tokens": 1000.0, "generated_tokens": 234.0, "flops": 5e9, "seconds": 0.25, "covered_states": 0.875}
  return {
    "spearman_difference": dict.fromkeys(METHODS),
    "error_localisation_is": "first wrong step",
    "command": HOSTILE,
    "traces": 8,
    "prompts": 2,
    "accuracy": 0.25,
    "states": 14,
    "truth": {"samples": 4, "generated_tokens": 45678, "seconds": 1234.5, "standard_error": 0.178},
    "value_quality": {
      "differences": {"all": table({"rredcot_suffix": 0.8, "monte_carlo": -0.4, "grpo": None}), **by_decile},
      "values": {"all": table({"monte_carlo": 0.6})},
    },
    "calibration": {"rredcot_suffix": [[0.1, 0.2, 5], [0.8, 0.7, 5]], "monte_carlo": [[0.5, 0.5, 10]]},
    "ranking": {"pairs": 17, "methods": {"monte_carlo": [0.7, 0.6, 0.8]}},
    "localisation": {"first wrong step": located, "largest drop of the truth": nowhere},
    "gradient_variance": {
      "groups": 2, "prompts": 3, "unbiased": "monte_carlo:difference", "fixed prompts": fixed,
      "across prompts": {"grpo": {"useful_ratio": 1.0}},
    },
    "segmentation": {
      "uniform": {
        "segments": 3.0, "tokens_a_segment": 3.75, "merged_cuts": 0.0, "cost": {"rredcot_suffix": price},
        "differences": table({"rredcot_suffix": 0.6}), "localisation": located,
      },
    },
    "cost": {
      "rredcot_suffix": price, "monte_carlo": price | {"flops": 5e11, "seconds": 2.0}, "grpo": price | {"flops": 0.0},
    },
    "records": [{
      "prompt": HOSTILE, "answer": "$_^$", "return": 0.0, "segments": ["$x\n", "\x1b[31m", "end"], "wrong": 1,
      "rewards": {"ground_truth": [0.5, -1.0, None], "rredcot_suffix": [0.1, math.nan, -0.2]},
    }],
  }  # fmt: skip


# ---- Pictures ----------------------------------------------------------------------------


def bars_of(ax):
  """label -> (length, interval or None) of horizontal bars, or the text in the place of one."""
  names = {tick: text.get_text() for tick, text in zip(ax.get_yticks(), ax.get_yticklabels())}
  level = [line for line in ax.lines if len(line.get_xdata()) == 2 and len(set(line.get_ydata())) == 1]
  whiskers = {line.get_ydata()[0]: list(line.get_xdata()) for line in level}
  found = {names[place]: text.get_text() for text in ax.texts if (place := text.get_position()[1]) in names}
  for patch in ax.patches:
    place = round(patch.get_y() + patch.get_height() / 2)
    found[names[place]] = (patch.get_width(), whiskers.get(place))
  return found


def test_the_summary_draws_agreement_localisation_and_variance(result):
  a, b, c, d = study_page.summary_figure(result).axes
  assert bars_of(a) == {
    "RREDCoT: suffix": (0.8, [pytest.approx(0.7), pytest.approx(0.9)]),
    "Monte Carlo": (-0.4, [-0.5, pytest.approx(-0.3)]),
    "GRPO": "not measurable",
  }
  assert [line.get_xdata()[0] for line in a.lines if line.get_linestyle() == "--"] == [0.95]
  drawn = {line.get_label(): line.get_xydata().tolist() for line in b.lines}
  near = lambda points: [pytest.approx(point) for point in points]
  assert drawn["RREDCoT: suffix"] == near([[0.25, 0.3], [0.75, 0.9]]) and drawn["Monte Carlo"] == near([[0.25, 0.1]])
  assert drawn["noise ceiling"] == near([[0.25, 0.95], [0.75, 0.95]])
  assert bars_of(c) == {"RREDCoT: suffix": (75, [50, 100]), "GRPO": (25, None)}
  assert [line.get_xdata()[0] for line in c.lines if line.get_linestyle() == "--"] == [20]
  assert c.get_xlabel() == "% of 12 failed traces" and c.get_title(loc="left").endswith("first wrong step")
  dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in d.lines if line.get_marker() == "o"]
  assert dots == [(1.0, 0), (0.5, 1)] and d.get_xscale() == "log"
  assert [line.get_xdata()[0] for line in d.lines if line.get_linestyle() == "--"] == [1]  # GRPO.


def test_a_summary_without_a_ceiling_deciles_or_gradients_says_so(result):
  differences = result["value_quality"]["differences"]
  differences["all"] = table({"rredcot_suffix": 0.8}, ceiling=None)
  differences |= {f"decile {d}": table({}) for d in range(10)}
  a, b, _, d = study_page.summary_figure(result | {"gradient_variance": None}).axes
  assert not [line for line in a.lines if line.get_linestyle() == "--"] and not d.axison
  assert [text.get_text() for text in b.texts] == ["too few segments in every tenth"]


def test_calibration_cost_and_segmentation_draw_their_figures(result):
  first, second = study_page.calibration_figure(result).axes
  assert first.lines[1].get_xydata().tolist() == [[0.1, 0.2], [0.8, 0.7]] and first.get_title() == ""
  assert second.lines[1].get_xydata().tolist() == [[0.5, 0.5]]
  operations, seconds = study_page.cost_figure(result).axes
  dots = lambda ax: [tuple(line.get_xydata()[0]) for line in ax.lines if len(line.get_xdata()) == 1]
  # A method without operations or without an agreement has no price of its quality.
  assert dots(operations) == [(pytest.approx(5), 0.8), (pytest.approx(500), -0.4)] and dots(seconds) == [
    (0.25, 0.8),
    (2, -0.4),
  ]
  left, right = study_page.segmentation_figure(result).axes
  widths = lambda ax: [patch.get_width() for patch in ax.patches if math.isfinite(patch.get_width())]
  assert widths(left) == [0.6] and widths(right) == [75] and right.get_visible()
  assert left.get_yticklabels()[0].get_text() == "uniform (K = 3.0, 3.8 tokens)"


def test_what_was_not_measured_has_no_picture(result):
  assert study_page.calibration_figure(result | {"calibration": {}}) is None
  assert study_page.cost_figure(result | {"cost": {}}) is None
  assert study_page.segmentation_figure(result | {"segmentation": {}}) is None


def test_a_traces_picture_tints_each_method_by_its_own_largest(result):
  (ax,) = study_page.trace_figure(result["records"][0]).axes
  hexes = {(p.get_x(), p.get_y()): matplotlib.colors.to_hex(p.get_facecolor()) for p in ax.patches}
  tint = lambda reward, scale: style.hexadecimal(style.tint(reward, scale))
  assert hexes == {
    (0, 0): tint(0.5, 1.0), (0, 1): tint(-1.0, 1.0), (1, 0): tint(0.1, 0.2), (1, 2): tint(-0.2, 0.2),
  }  # fmt: skip
  assert [text.get_text() for text in ax.texts] == ["+0.50", "-1.00", "+0.10", "-0.20"]
  assert np.array_equal(ax.lines[0].get_xydata(), [[0, 1], [2, 1], [2, 2], [0, 2], [0, 1]])
  assert [text.get_text() for text in ax.get_yticklabels()] == ["$x", "\\x1b[31m", "end"]
  assert "trace wrong" in ax.get_xlabel() and not re.search(RAW_CONTROLS, ax.get_xlabel())
  right = study_page.trace_figure(result["records"][0] | {"return": 1.0, "wrong": -1}).axes[0]
  assert "trace right" in right.get_xlabel() and not right.lines


# ---- The page ----------------------------------------------------------------------------


class Page(HTMLParser):
  def __init__(self, text):
    super().__init__()
    self.elements, self.text, self._style = [], "", False
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))
    self._style = tag == "style"

  def handle_endtag(self, tag):
    self._style = False

  def handle_data(self, data):
    self.text += "" if self._style else data


@pytest.fixture
def written(result, tmp_path):
  study_page.write(tmp_path, copy.deepcopy(result), title=HOSTILE, config=HOSTILE)
  return Page((tmp_path / "study.html").read_text(encoding="utf-8"))


def test_texts_stay_text_and_no_script_is_allowed(written, tmp_path):
  assert {tag for tag, _ in written.elements} <= {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "span", "div", "figure", "figcaption", "img"),
    *("table", "thead", "tbody", "tr", "th", "td", "details", "summary", "pre"),
  }
  assert not [name for _, attributes in written.elements for name in attributes if name.startswith("on")]
  # The title twice, the command, the configuration.
  assert written.text.count(SCRIPT + BREAKOUT + SHOWN) == 4
  assert not re.search(RAW_CONTROLS, (tmp_path / "study.html").read_text(encoding="utf-8"))
  (policy,) = [a["content"] for tag, a in written.elements if "http-equiv" in a]
  assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def test_pictures_of_the_page_are_the_files_beside_it(written, tmp_path):
  images = [a["src"] for tag, a in written.elements if tag == "img"]
  names = ("summary", "calibration", "cost", "segmentation", "trace_0")
  for source, name in zip(images, names, strict=True):
    data = (tmp_path / "figures" / f"{name}.png").read_bytes()
    assert source == f"data:image/png;base64,{base64.b64encode(data).decode()}" and data.startswith(b"\x89PNG")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "study.html", "study.json"]
  assert len(list((tmp_path / "figures").iterdir())) == 5


def test_the_pages_figures_are_those_of_the_study(written, result, tmp_path):
  stored = json.loads((tmp_path / "study.json").read_text())
  assert stored["accuracy"] == 0.25 and stored["records"][0]["rewards"]["rredcot_suffix"] == [0.1, None, -0.2]
  for shown in (
    "8 traces of 2 prompts, 25.0% right. Ground truth: 4 rollouts of each of 14 distinct states, 45,678 tokens in",
    "Redistributed rewards r: all, n = 40; split half 0.800, reliability 0.900, ceiling 0.950",
    "RREDCoT: suffix" + 5 * "0.800 (0.700 to 0.900)" + "Monte Carlo" + 5 * "-0.400 (-0.500 to -0.300)" + "GRPO–––––",
    "17 pairs",
    "Monte Carlo0.700 (0.600 to 0.800)",
    "first wrong step: 12 failed traces",
    "RREDCoT: suffix0.750 (0.500 to 1.000)GRPO0.250chance0.200 (0.100 to 0.300)",
    "3 prompts, 2 groups each; the policy gradient is that of Monte Carlo, difference",
    "RREDCoT: suffix, difference––0.500 (0.250 to 1.000)–0.100–",
    # Cut by, K, tokens a segment, merged, method, its Spearman and share, forward tokens, seconds.
    "uniform33.750RREDCoT: suffix0.600 (0.500 to 0.700)0.750 (0.500 to 1.000)12340.25",
    "Monte Carlo100023450020.875",
  ):
    assert shown in written.text
  assert "largest drop" not in written.text and "decile 3" not in written.text  # Nothing to show of them.


def test_a_study_of_nothing_is_a_page(result, tmp_path):
  nothing = {
    "ranking": {"pairs": 0, "methods": {}},
    "gradient_variance": None,
    "segmentation": {},
    "cost": {},
    "calibration": {},
  }
  study_page.write(tmp_path, result | nothing | {"records": []}, title="t", config="c")
  found = Page((tmp_path / "study.html").read_text(encoding="utf-8"))
  assert len([tag for tag, _ in found.elements if tag == "img"]) == 1 and "d. Gradient variance" not in found.text
  assert "Credit on traces" not in found.text and "0 pairs" in found.text
