"""The page of a run: what a model wrote stays text, sizes are bounded, what says most comes first, same bytes again."""

import base64
import hashlib
import math
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser

import jinja2
import matplotlib
import pytest
from markupsafe import Markup
from matplotlib.figure import Figure
from report_cases import (
  BREAKOUT,
  HOSTILE,
  MEGABYTE,
  RAW_CONTROLS,
  SCRIPT,
  SHOWN,
  make_long_trace,
  make_run,
  make_trace,
)

from rredcot_jax.report import page, style

TAGS = {
  *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "span", "b", "i", "sub", "div", "section"),
  *("table", "thead", "tbody", "tr", "th", "td", "article", "figure", "figcaption", "details", "summary", "pre"),
  *("a", "ol", "li", "form", "label", "select", "option", "button", "output", "script"),
  *("svg", "g", "path", "use", "defs", "text", "tspan", "clippath", "rect", "polyline"),
}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; {}base-uri 'none'; form-action 'none'"


class Page(HTMLParser):
  """The page as a browser reads it: its tags with their attributes, and its text outside <style> and <script>."""

  def __init__(self, path):
    super().__init__()
    self.elements, self.text, self.scripts, self._inside, self.source = [], "", [], "", path.read_text(encoding="utf-8")
    self.feed(self.source)
    self.close()

  def handle_starttag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))
    self._inside = tag

  def handle_endtag(self, tag):
    self._inside = ""

  def handle_data(self, data):
    if self._inside == "script":
      self.scripts.append(data)
    elif self._inside != "style":
      self.text += data

  def of_class(self, name):
    return [attributes for _, attributes in self.elements if name in attributes.get("class", "").split()]

  def of_tag(self, name):
    return [attributes for tag, attributes in self.elements if tag == name]


def write(tmp_path, runs, title="title", **options):
  page.write_report(runs, tmp_path / "out" / "report.html", title=title, **options)
  return Page(tmp_path / "out" / "report.html")


def write_traces(tmp_path, *traces, **options):
  return write(tmp_path, {"a": make_run(tmp_path / "a", traces=traces, **options)})


# ---- Hostile text ------------------------------------------------------------------------


@pytest.fixture
def hostile_page(tmp_path):
  trace = make_trace(tokens=[HOSTILE] * 8, prompt=HOSTILE, answer=HOSTILE)
  run = make_run(tmp_path / "a", traces=[trace], config={HOSTILE: [HOSTILE]}, command=f"train.py {HOSTILE}")
  figures = [(HOSTILE, Figure())]
  return write(tmp_path, {HOSTILE: run}, HOSTILE, summary=[{"run": HOSTILE, HOSTILE: 0.5}], figures=figures)


def no_markup(shown):
  """Nothing of a page is anything but what our templates write."""
  assert {tag for tag, _ in shown.elements} <= TAGS
  assert len(shown.of_tag("script")) == 1 and "alert" not in shown.scripts[0]
  for _, attributes in shown.elements:
    assert attributes.get("href", "#").startswith("#")
    assert not [
      name for name in attributes if name.startswith("on") or name in ("src", "srcdoc", "formaction", "action")
    ]
  assert not re.search(RAW_CONTROLS, shown.source)


def test_hostile_text_makes_no_markup(hostile_page):
  no_markup(hostile_page)


def test_hostile_text_is_shown_whole(hostile_page):
  # The title twice; the run in the table, the legend, the note on what is not finite, over its traces and over its
  # configuration; a column; a caption; the command; 8 tokens, the prompt, the answer.
  assert hostile_page.text.count(SCRIPT + BREAKOUT + SHOWN) == 2 + 5 + 1 + 1 + 1 + 10
  assert hostile_page.text.count(SCRIPT) == 20 + 2  # and, escaped once more as JSON, a setting and its value


@pytest.mark.parametrize(
  ("step", "shown"),
  [
    ("<img src=x onerror=alert(3)>", "step <img src=x onerror=alert(3)>"),
    ("\x1b]0;title\x07\u202e 9", "step \\x1b]0;title\\x07\\u202e 9"),
    ('"><script>alert(3)</script>', 'step "><script>alert(3)</script>'),
    (["<b>", None], "step ['<b>', None]"),
    ("9" * MEGABYTE, f"step {'9' * 60} … {MEGABYTE - 60:,} more characters"),
  ],
)
def test_a_step_that_is_no_number_is_text(tmp_path, step, shown):
  found = write_traces(tmp_path, make_trace(step=step), make_trace(step=41))
  no_markup(found)
  assert shown in found.text and found.text.index("step 41") < found.text.index(shown)


def test_a_runs_name_is_text_wherever_it_stands(tmp_path):
  name = '</title></style></script><svg onload="alert(4)">&amp;<!--'
  run = make_run(tmp_path / "a", traces=[make_trace()], config={})
  found = write(tmp_path, {name: run, name + "2": make_run(tmp_path / "b")}, name, summary=[{"run": name}])
  no_markup(found)
  assert found.text.count(name) == 2 + 1 + 4 + 4 and len(found.of_tag("svg")) == 3 + 1  # Panels, and the values.


def test_settings_are_text_whatever_their_json(tmp_path):
  for i, config in enumerate((None, [SCRIPT], {"credit": SCRIPT}, {"credit": {"mode": [SCRIPT]}}, 3)):
    found = write(tmp_path, {"a": make_run(tmp_path / str(i), config=config)})
    no_markup(found)
    assert found.text.count(SCRIPT) == ("script" in str(config))


@pytest.mark.parametrize("character", ["x", "\x1b", "\n", "<", "\U000e0041", "\u0301"])
def test_megabyte_tokens_take_bounded_space_and_time(tmp_path, character):
  big = character * MEGABYTE
  run = make_run(tmp_path / "a", traces=[make_trace(tokens=[big] * 8, prompt=big, answer=big)], config=big, command=big)
  began = time.perf_counter()
  page.write_report({big: run}, tmp_path / "report.html", title=big)
  assert time.perf_counter() - began < 30
  source = (tmp_path / "report.html").read_text(encoding="utf-8")
  # A trace, a configuration and shorter ones: a character is at most 10 in the page, a line end with its mark 31.
  assert len(source) < 31 * (page.MAX_CHARACTERS + page.MAX_PROMPT) + 10 * page.MAX_CHARACTERS + 100_000
  assert f"{8 * MEGABYTE - page.MAX_CHARACTERS:,} more characters" in source


def test_many_segments_are_bounded_and_say_so(tmp_path):
  found = write_traces(tmp_path, make_long_trace(5000, 2, "ab"))
  assert len(found.of_class("segment")) == 512 and "13,464 more characters and 4,488 more segments" in found.text
  assert "5000 segments" in found.text and not found.of_class("return")  # The curve does not reach the return.


# ---- A page that needs nothing -----------------------------------------------------------


def test_the_page_loads_nothing_and_runs_its_own_script_alone(hostile_page):
  for tag, attributes in hostile_page.elements:
    for name, value in attributes.items():
      value = value or ""
      assert "//" not in value or name.startswith("xmlns"), (tag, name, value)
      assert not name.endswith("href") or value.startswith("#"), (tag, name, value)
      assert "url(" not in value.replace("url(#", ""), (tag, name, value)
  sheet = re.search("<style>(.*?)</style>", hostile_page.source, re.DOTALL)[1]
  assert "url(" not in sheet and "@import" not in sheet
  digest = base64.b64encode(hashlib.sha256("".join(hostile_page.scripts).encode()).digest()).decode()
  policies = [attributes["content"] for attributes in hostile_page.of_tag("meta") if "http-equiv" in attributes]
  assert policies == [POLICY.format(f"script-src 'sha256-{digest}'; ")]
  assert hostile_page.source.index("http-equiv") < hostile_page.source.index("<title")


def test_templates_escape_what_they_are_not_told_to(tmp_path, monkeypatch):
  """A template that forgets every filter still lets nothing through, and one that asks for nothing gets no script."""
  environment = page._environment(page._PACKAGE)
  templates = {
    "careless.html": '{% extends "frame.html" %}{% block content %}<p id="{{ x }}">{{ x }}</p>{% endblock %}'
  }
  loader = jinja2.ChoiceLoader([jinja2.DictLoader(templates), environment.loader])
  monkeypatch.setattr(page, "_environment", lambda _: environment.overlay(loader=loader))
  page.write_page(tmp_path / "p.html", "careless.html", title=HOSTILE, x=HOSTILE)
  found = Page(tmp_path / "p.html")
  assert {tag for tag, _ in found.elements} <= TAGS - {"script"} and not re.search(RAW_CONTROLS, found.source)
  assert found.text.count(SCRIPT + BREAKOUT + SHOWN) == 3
  assert [a["content"] for a in found.of_tag("meta") if "http-equiv" in a] == [POLICY.format("")]
  page.write_page(tmp_path / "p.html", "careless.html", title="", x=Markup("<b>x</b>"))
  assert ("b", {}) in Page(tmp_path / "p.html").elements
  with pytest.raises(jinja2.UndefinedError, match="'x' is undefined"):
    page.write_page(tmp_path / "p.html", "careless.html", title="")


def test_light_and_dark_have_every_colour_and_figures_follow(hostile_page):
  sheet = re.search("<style>(.*?)</style>", hostile_page.source, re.DOTALL)[1]
  light, dark = sheet.split("@media (prefers-color-scheme: dark)", 1)
  for name, colors in style.PROPERTIES.items():
    assert f"--{name}: {colors[0]};" in light and f"--{name}: {colors[1]};" in dark
  for name, tints in style.TINTS.items():
    assert f"--{name}: {' '.join(map(str, tints[0]))};" in light
    assert f"--{name}: {' '.join(map(str, tints[1]))};" in dark
  used = set(re.findall(r"var\(--([\w-]+)\)", hostile_page.source))
  assert used <= {*style.PROPERTIES, *style.TINTS, "sans", "mono", "tint", "w"}
  assert {"width=device-width, initial-scale=1", "light dark"} <= {
    a.get("content") for a in hostile_page.of_tag("meta")
  }


def test_same_runs_give_the_same_bytes_whatever_matplotlibrc_says(tmp_path):
  runs = {"grpo": make_run(tmp_path / "a", traces=[make_trace()])}
  first = write(tmp_path, runs).source
  with matplotlib.rc_context({"font.size": 23, "axes.grid": False, "svg.hashsalt": "other", "axes.facecolor": "red"}):
    assert write(tmp_path, runs).source == first
  assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_a_failed_report_leaves_the_old_one(tmp_path, monkeypatch):
  good = write(tmp_path, {"a": make_run(tmp_path / "a")}).source
  broken = make_run(tmp_path / "b", traces=[make_trace(rewards=[1.0])])
  with pytest.raises(ValueError, match=r"b/traces\.jsonl, trace 1: .*does not fit together"):
    write(tmp_path, {"b": broken})
  (tmp_path / "a" / "config.json").write_text("[]")
  with pytest.raises(ValueError, match=r"a/config\.json is not a JSON object"):
    write(tmp_path, {"a": tmp_path / "a"})
  assert [path.read_text() for path in (tmp_path / "out").iterdir()] == [good]

  def full_disk(*_):
    raise OSError("no space left")

  monkeypatch.setattr(page.files.os, "replace", full_disk)
  with pytest.raises(OSError, match="no space left"):
    write(tmp_path, {"c": make_run(tmp_path / "c")}, "another title")
  assert [path.read_text() for path in (tmp_path / "out").iterdir()] == [good]


def test_the_browser_runs_the_script_under_the_policy(tmp_path):
  browser = shutil.which("chromium") or shutil.which("google-chrome")
  if browser is None:
    pytest.skip("no chromium is installed")
  traces = [make_trace(step=SCRIPT), make_trace(step=2, **{"return": 1.0}), make_trace(step=3, prompt=HOSTILE)]
  write_traces(tmp_path, *traces)
  flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
  flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
  command = [browser, *flags, (tmp_path / "out" / "report.html").as_uri()]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
  assert "<output>3 of 3 traces</output>" in done.stdout
  assert re.search(r'<form class="controls"(?![^>]* hidden)', done.stdout)


# ---- Traces ------------------------------------------------------------------------------


def test_each_segment_has_its_tint_and_numbers(tmp_path):
  found = write_traces(tmp_path, make_trace(rewards=[0.25, -0.75, math.nan]))
  rows = found.of_class("segment")
  assert [row["class"].split()[1] for row in rows] == ["positive", "negative", "unknown"]
  assert [row["style"] for row in rows] == ["--w:0.333", "--w:1.0", "--w:0.0"]
  numbers = re.findall(r"v \S+ → \S+, r = \S+, mean advantage \S+, \d+ tokens", found.text)
  assert numbers == [
    "v 0.500 → 0.750, r = +0.2500, mean advantage +0.5000, 3 tokens",
    "v 0.750 → 0.000, r = -0.7500, mean advantage -1.5000, 3 tokens",
    "v 0.000 → 0.000, r = +nan, mean advantage +0.0000, 2 tokens",
  ]
  assert "0+0.2503 + 4 = 7↵v 0.500" in found.text and "lowers v -0.750+0.750 raises v" in found.text
  assert "Σ rk = +nan" in found.text and "largest |rk| = 0.750" in found.text and "v(s0) = 0.500" in found.text
  # Every row can be reached by keyboard, its numbers with it.
  assert len(found.of_tag("summary")) == 3 + 1 + 1  # The rows, their fold, the configuration.


def test_the_value_curve_is_what_the_values_say(tmp_path):
  found = write_traces(tmp_path, make_trace())
  # From -0.06 to 1.06, downwards; 3, 6 and 8 of 8 tokens.
  assert found.of_tag("polyline")[0]["points"] == "0.0,50.0 37.5,27.68 75.0,94.64 100.0,94.64"
  bars = [(a["x"], a["width"], a["class"]) for a in found.of_tag("rect") if "--w" in a.get("style", "")]
  assert bars == [("0.0", "37.5", "positive"), ("37.5", "37.5", "negative wrong"), ("75.0", "25.0", "zero")]
  assert found.of_class("return")[0]["style"] == "top:94.64%" and "R = 0" in found.text
  holes = write(tmp_path, {"b": make_run(tmp_path / "b", traces=[make_trace(values=[0.5, None, 0.0, math.nan])])})
  assert holes.of_tag("polyline")[0]["points"] == "0.0,50.0 75.0,94.64"


@pytest.mark.parametrize("wrong, count", [(1, 1), (None, 0)])
def test_first_wrong_step_is_marked_once(tmp_path, wrong, count):
  found = write_traces(tmp_path, make_trace(first_wrong_segment=wrong))
  assert [a["class"] for a in found.of_class("segment") if "wrong" in a["class"]] == ["segment negative wrong"] * count
  assert len(found.of_class("flag")) == count == found.text.count("first wrong step")
  assert found.text.count("first wrong: segment 1") == count


def test_traces_come_by_what_they_say_each_once(tmp_path):
  make = lambda step, reward, return_: make_trace(step=step, rewards=[0.1, reward, 0.0], **{"return": return_})
  traces = [make(1, 0.2, 1.0), make(2, 0.5, 1.0), make(3, -0.5, 0.0), make(4, 0.9, 1.0), make(4, 0.9, 1.0)]
  found = write_traces(tmp_path, *traces)
  assert re.findall(r"step (\d+)", found.text) == ["4", "3", "2", "1"]
  assert found.text.count("logged 2 times") == 1 and "4 of 4 different traces (5 logged)" in found.text
  articles = found.of_tag("article")
  assert [a["data-right"] for a in articles] == ["1", "0", "1", "1"]
  assert [(a["data-peak"], a["data-return"], a["data-length"]) for a in articles][:2] == [
    ("0.9", "1.0", "8"), ("0.5", "0.0", "8"),
  ]  # fmt: skip


def test_each_trace_and_segment_has_an_address(tmp_path):
  found = write_traces(tmp_path, make_trace(), make_trace(step=41))
  ids = [a["id"] for _, a in found.elements if a.get("id", "").startswith("trace")]
  assert ids == [f"trace-0-{i}{part}" for i in (0, 1) for part in ("", "-k0", "-k1", "-k2")]
  assert [a["href"] for a in found.of_class("link")] == ["#trace-0-0", "#trace-0-1"]


def test_the_same_prompt_is_compared_run_by_run(tmp_path):
  def run(name, *traces):
    return make_run(tmp_path / name, traces=[make_trace(**trace) for trace in traces])

  right, large = {"return": 1.0}, {"rewards": [0.25, -0.9, 0.0]}
  runs = {
    "a": run("a", {"prompt": "agreed", **large}, {"prompt": "differ", "step": 1, **right}, {"prompt": "alone"}),
    "b": run("b", {"prompt": "agreed", **large}, {"prompt": "differ", "step": 3}, {"prompt": "differ", "step": 2}),
  }
  found = write(tmp_path, runs)
  shown = found.text[found.text.index("The same prompt, run by run") : found.text.index("Configuration")]
  assert re.findall(r"prompt(agreed|differ|alone)", shown) == ["differ", "differ", "agreed", "agreed"]
  assert re.findall(r"step (\d+)", shown) == ["1", "3", "40", "40"] and re.findall(r"\b[ab]\b", shown)
  assert len(found.of_class("pair")) == 2
  only = write(tmp_path, {"a": tmp_path / "a"})
  assert "run by run" not in only.text and not only.of_class("pair")
  no_markup(found)


def test_as_many_comparisons_as_a_page_can_hold(tmp_path):
  traces = [make_trace(prompt=f"prompt {i}") for i in range(9)]
  found = write(tmp_path, {name: make_run(tmp_path / name, traces=traces) for name in "abcdef"})
  assert len(found.of_class("pair")) == page.PROMPTS_COMPARED
  ids = [a["id"] for _, a in found.elements if "id" in a]
  assert len(ids) == len(set(ids))
  assert sum(re.fullmatch(r"same-\d-\d", one) is not None for one in ids) == page.PROMPTS_COMPARED * page.RUNS_COMPARED


def test_the_entropy_at_a_cut_is_shown_where_the_run_said_it(tmp_path):
  assert "entropy at its cut" not in write_traces(tmp_path, make_trace()).text
  found = write(tmp_path, {"b": make_run(tmp_path / "b", traces=[make_trace(entropies=[0.25, None, 1.5])])})
  assert found.text.count("entropy at its cut") == 2
  assert "3 tokens, entropy at its cut 0.250" in found.text and "2 tokens, entropy at its cut 1.500" in found.text


def test_so_many_traces_and_no_more(tmp_path):
  traces = [make_trace(step=step, **{"return": float(step % 2)}) for step in range(40)]
  found = write_traces(tmp_path, *traces)
  assert len(found.of_tag("article")) == page.TRACES_PER_RUN == 12
  assert [a["data-right"] for a in found.of_tag("article")] == ["0"] * 6 + ["1"] * 6
  assert "12 of 40 different traces (40 logged)" in found.text


def test_a_run_without_credit_says_why(tmp_path):
  uniform = {"credit": {"mode": "uniform"}}
  cases = {
    "grpo": ({"config": uniform}, "gave every token of a trace the same advantage"),
    "new": ({"config": {"credit": {"mode": "difference"}}}, "has written no traces.jsonl so far"),
    "empty": ({"traces": []}, "traces.jsonl holds no complete line yet"),
  }
  for name, (options, reason) in cases.items():
    found = write(tmp_path, {name: make_run(tmp_path / name, **options)})
    assert reason in found.text and not found.of_tag("article") and "Point at a segment" not in found.text
  both = {"grpo": tmp_path / "grpo", "ours": make_run(tmp_path / "ours", traces=[make_trace()])}
  found = write(tmp_path, both)
  assert found.text.count("same advantage") == 1 and len(found.of_tag("article")) == 1


def test_long_traces_are_folded_by_segment_and_lose_nothing(tmp_path):
  short, long = make_long_trace(3, 30), make_long_trace(50, 500, step=41)
  found = write_traces(tmp_path, long)
  rest = found.of_class("rest")
  assert len(rest) == 50 and len(found.of_class("more")) == 50 and "50 segments, long ones folded" in found.text
  assert found.text.count("word ") == 50 * 499
  assert not [a for tag, a in found.elements if tag == "details" and "open" in a]  # Many rows, so not in view at once.
  # Folded behind a word: 160 characters are 32 words.
  assert found.text.count("word  … 2,336 more characters") == 50
  plain = write(tmp_path, {"b": make_run(tmp_path / "b", traces=[short])})
  assert not plain.of_class("rest") and len([a for a in plain.of_tag("details") if "open" in a]) == 1


@pytest.mark.parametrize(
  ("text", "head"),
  [
    ("a" * 160, "a" * 160),
    ("a" * 161, "a" * 160),
    ("one\n" + "a" * 200, "one\n"),
    ("a" * 100 + " " + "b" * 100, "a" * 100 + " "),
    ("a " + "b" * 200, "a " + "b" * 158),
  ],
)
def test_folds_are_behind_a_line_or_a_word(text, head):
  assert text[: page._fold(text)] == head


def test_long_prompts_are_folded(tmp_path):
  found = write_traces(tmp_path, make_trace(prompt="why " * 400))
  assert found.text.count("why ") == 400 and "1,440 more characters" in found.text
  assert [tag for tag, a in found.elements if a.get("class") == "prompt"] == ["details"]


def test_empty_trace_renders(tmp_path):
  nothing = {"tokens": [], "segment_ids": [], "advantages": [], "rewards": [], "values": [0.0]}
  found = write_traces(tmp_path, make_trace(first_wrong_segment=None, **nothing))
  assert "0 tokens in 0 segments" in found.text


# ---- The rest of the page ----------------------------------------------------------------


def test_runs_without_evaluations_or_configuration_render(tmp_path):
  bare = write(tmp_path, {"a": make_run(tmp_path / "a", evaluations=False)})
  # Both evaluation panels, entropy, length and time; the reward is logged.
  assert bare.text.count("not logged") == 5 and len(bare.of_tag("svg")) == 1 and "no config.json" in bare.text
  full = write(tmp_path, {"b": make_run(tmp_path / "b"), "c": make_run(tmp_path / "c")})
  assert full.text.count("not logged") == 3 and len(full.of_tag("svg")) == 3
  assert "Not finite, so not drawn: b (20), c (20)." in full.text
  assert [a["style"] for a in full.of_class("swatch")] == [f"border-top: 3px solid var(--run-{i})" for i in (0, 1)]


def test_summary_keeps_key_order_and_fills_gaps(tmp_path):
  rows = [{"run": "a", "accuracy": 0.29312, "tokens": 1234567}, {"run": "b", "overhead": 1.5, "tokens": 12345.6}]
  found = write(tmp_path, {"a": make_run(tmp_path / "a")}, summary=rows)
  assert "runaccuracytokensoverheada0.29311,234,567–b–12,3461.5" in found.text
  cells = [a["class"] for tag, a in found.elements if tag in ("th", "td")]
  assert cells == ["text", "number", "number", "number"] * 3
  assert len(found.of_class("scroll")) == 1  # A wide table scrolls within itself.


def test_a_column_is_numeric_only_where_all_of_it_is():
  table = page._table([{"x": 1, "y": 2.0}, {"x": "one", "y": None}, {"x": True}])
  assert table == {"columns": [("x", False), ("y", True)], "rows": [[1, 2.0], ["one", None], [True, None]]}


def test_wide_figures_scroll_within_themselves(tmp_path):
  found = write(tmp_path, {"a": make_run(tmp_path / "a")}, figures=[("one <b>", Figure()), ("two", Figure())])
  assert len(found.of_class("scroll")) == 2 and "one <b>" in found.text and len(found.of_tag("svg")) == 3 + 2
  ids = [a["id"] for _, a in found.elements if "id" in a]
  assert len(ids) == len(set(ids))
