"""What a model wrote stays text, what numbers say is what is drawn, the same run gives the same bytes."""

import io
import json
import math
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest

from rredcot_jax.report import page as report

SCRIPT = "<script>alert(1)</script>"
BREAKOUT = "\"'><img src=x onerror=alert(2)> & "
CONTROLS = "nul \x00 bidi \u202e esc \x1b[31m\x1b]0;title\x07 c1 \x9b31m surrogate \ud800 "
HOSTILE = SCRIPT + BREAKOUT + CONTROLS
SHOWN = "nul \\x00 bidi \\u202e esc \\x1b[31m\\x1b]0;title\\x07 c1 \\x9b31m surrogate \\ud800 "
TAGS = {
  *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "span", "b", "i", "sub", "div"),
  *(
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "article",
    "figure",
    "figcaption",
    "details",
    "summary",
    "pre",
  ),
  *("svg", "g", "path", "use", "defs", "text", "tspan", "clippath", "rect"),
}


def make_trace(**changes):
  trace = {
    "step": 40,
    "prompt": "3 + 4 - 5 =\n",
    "tokens": ["3 + 4", " = 7", "\n", "7 - 5", " = 9", "\n", "answer", ": 9"],
    "segment_ids": [0, 0, 0, 1, 1, 1, 2, 2],
    "values": [0.5, 0.75, 0.0, 0.0],
    "rewards": [0.25, -0.75, 0.0],
    "advantages": [0.5, 0.5, 0.5, -1.5, -1.5, -1.5, 0.0, 0.0],
    "return": 0.0,
    "answer": "2",
    "first_wrong_segment": 1,
  }
  return trace | changes


def make_run(folder, *, traces=None, evaluations=True, config=None):
  folder.mkdir()
  lines = [
    {"step": s, "train/reward": 0.3 + s / 100, "train/rollout_tokens": 900 * s, "train/loss": math.nan}
    for s in range(20)
  ]
  if evaluations:
    lines += [{"step": 10, "eval/pass@1": 0.4, "eval/pass@1_se": 0.02, "train/rollout_tokens": 9000}]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  if traces is not None:
    (folder / "traces.jsonl").write_text("".join(json.dumps(trace) + "\n" for trace in traces))
  if config is not None:
    (folder / "config.json").write_text(json.dumps({"command": f"train.py {HOSTILE}", "config": config}))
  return folder


class Page(HTMLParser):
  """The page as a browser reads it: its tags with their attributes, and its text outside <style>."""

  def __init__(self, path):
    super().__init__()
    self.elements, self.text, self._in_style, self.source = [], "", False, path.read_text(encoding="utf-8")
    self.feed(self.source)
    self.close()

  def handle_starttag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))
    self._in_style = tag == "style"

  def handle_endtag(self, tag):
    self._in_style = False

  def handle_data(self, data):
    self.text += "" if self._in_style else data

  def of_class(self, name):
    return [attributes for _, attributes in self.elements if name in attributes.get("class", "").split()]


def write(tmp_path, runs, title="title", summary=None):
  report.write_report(runs, tmp_path / "out" / "report.html", title=title, summary=summary)
  return Page(tmp_path / "out" / "report.html")


@pytest.fixture
def hostile_page(tmp_path):
  trace = make_trace(tokens=[HOSTILE] * 8, prompt=HOSTILE, answer=HOSTILE)
  run = make_run(tmp_path / "a", traces=[trace], config={HOSTILE: [HOSTILE]})
  return write(tmp_path, {HOSTILE: run}, HOSTILE, [{"run": HOSTILE, HOSTILE: 0.5}])


def test_hostile_text_makes_no_markup(hostile_page):
  assert {tag for tag, _ in hostile_page.elements} <= TAGS
  for _, attributes in hostile_page.elements:
    assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcdoc", "formaction")]


def test_hostile_text_is_shown_whole(hostile_page):
  # The title twice; the run in the table, the legend, the caption, over its traces and its configuration; a
  # column; the command; 8 tokens, the prompt, the answer.
  assert hostile_page.text.count(SCRIPT + BREAKOUT + SHOWN) == 2 + 5 + 1 + 1 + 10
  assert hostile_page.text.count(SCRIPT) == 19 + 2  # and, escaped once more as JSON, a setting and its value
  assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", hostile_page.source)


def test_the_page_loads_nothing(hostile_page):
  for tag, attributes in hostile_page.elements:
    for name, value in attributes.items():
      assert "//" not in value or name.startswith("xmlns"), (tag, name, value)
      assert not name.endswith("href") or value.startswith("#"), (tag, name, value)
      assert "url(" not in value.replace("url(#", ""), (tag, name, value)
  assert "url(" not in report._CSS and "@import" not in report._CSS
  policies = [attributes["content"] for _, attributes in hostile_page.elements if "http-equiv" in attributes]
  assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_same_runs_give_the_same_bytes_whatever_matplotlibrc_says(tmp_path):
  runs = {"grpo": make_run(tmp_path / "a", traces=[make_trace()])}
  first = write(tmp_path, runs).source
  with matplotlib.rc_context({"font.size": 23, "axes.grid": False, "svg.hashsalt": "other", "axes.facecolor": "red"}):
    assert write(tmp_path, runs).source == first
  assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_a_failed_report_leaves_the_old_one(tmp_path, monkeypatch):
  good = write(tmp_path, {"a": make_run(tmp_path / "a")}).source
  broken = make_run(tmp_path / "b", traces=[make_trace(rewards=[1.0])])
  with pytest.raises(ValueError, match=r"b/traces\.jsonl.*does not fit together"):
    write(tmp_path, {"b": broken})
  assert (tmp_path / "out" / "report.html").read_text() == good

  def full_disk(*_):
    raise OSError("no space left")

  monkeypatch.setattr(report.os, "replace", full_disk)
  with pytest.raises(OSError, match="no space left"):
    write(tmp_path, {"c": make_run(tmp_path / "c")}, "another title")
  assert [path.read_text() for path in (tmp_path / "out").iterdir()] == [good]


def test_half_written_last_line_is_skipped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 0, "a": NaN}\n{"step": 1, "note": "\u2028"}\n{"step": 2, "tra')
  assert [row["step"] for row in report.read_metrics(path)] == [0, 1]
  path.write_text('{"step": 0}\n{"step": 1, {"step": 2}\n{"step": 3}\n')
  with pytest.warns(UserWarning, match=r"metrics\.jsonl:2 "):
    assert [row["step"] for row in report.read_metrics(path)] == [0, 3]


def test_missing_or_empty_metrics_name_the_file(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"nowhere/metrics\.jsonl"):
    report.write_report({"a": tmp_path / "nowhere"}, tmp_path / "r.html", title="", summary=None)
  (tmp_path / "metrics.jsonl").write_text('{"step')
  with pytest.raises(ValueError, match=r"metrics\.jsonl holds no complete line"):
    report.read_metrics(tmp_path / "metrics.jsonl")
  assert report.read_traces(tmp_path / "traces.jsonl") == []


def test_resumed_run_counts_the_later_line_of_a_step():
  rows = [{"step": 2, "y": 9.0}, {"step": 1, "y": math.nan}, {"step": 0, "y": 1.0}, {"step": 2, "y": 3.0}]
  assert report._series(rows, "step", "y").tolist() == [[0.0, 1.0], [2.0, 3.0]]


def test_runs_without_traces_or_evaluations_render(tmp_path):
  bare = write(tmp_path, {"a": make_run(tmp_path / "a", evaluations=False)})
  assert "no traces" in bare.text and "no config.json" in bare.text
  # Both evaluation panels, entropy, length and time; the reward is logged.
  assert bare.text.count("not logged") == 5
  full = write(tmp_path, {"b": make_run(tmp_path / "b", traces=[make_trace()])})
  assert "no traces" not in full.text and full.text.count("not logged") == 3
  assert "Not finite, so not drawn: b (20)." in full.text


def test_tint_golden():
  white, blue, orange = (255, 255, 255), (107, 174, 214), (244, 148, 84)
  assert report.tint(0.0, 2.0) == white and report.tint(0.0, 0.0) == white
  assert report.tint(2.0, 2.0) == blue and report.tint(7.0, 2.0) == blue
  assert report.tint(-2.0, 2.0) == orange and report.tint(-7.0, 2.0) == orange
  assert report.tint(1.0, 2.0) == (181, 214, 234) and report.tint(-0.5, 2.0) == (252, 228, 212)
  assert report.tint(math.nan, 2.0) == (236, 236, 236)


def test_each_segment_has_its_tint_and_numbers(tmp_path):
  page = write(tmp_path, {"a": make_run(tmp_path / "a", traces=[make_trace()])})
  tints = [attributes["style"] for attributes in page.of_class("segment")]
  assert tints == ["background:#cee4f1", "background:#f49454", "background:#ffffff"]
  assert page.of_class("segment")[1]["title"] == (
    "segment 1: r = -0.7500, v 0.7500 → 0.0000, 3 tokens, mean advantage -1.5000"
  )
  assert "+0.2503 + 4 = 7↵\n" in page.text


@pytest.mark.parametrize("wrong, count", [(1, 1), (None, 0)])
def test_first_wrong_step_is_marked_once(tmp_path, wrong, count):
  trace = make_trace(first_wrong_segment=wrong)
  page = write(tmp_path, {"a": make_run(tmp_path / "a", traces=[trace])})
  marked = [attributes["title"][:10] for attributes in page.of_class("wrong")]
  assert marked == ["segment 1:"] * count and len(page.of_class("flag")) == count
  assert page.text.count("first wrong step") == 2 * count  # on the text and on the value curve
  terminal = report.render_terminal(trace, color=False)
  assert terminal.count("first wrong step") == count
  assert len(re.findall(r"^>   1  -0\.750", terminal, re.MULTILINE)) == count
  labels = [text.get_text() for text in report.credit_figure(trace).axes[0].texts]
  assert labels.count("first wrong step") == count


def test_chosen_traces_are_the_latest_of_both_kinds():
  traces = [make_trace(step=s, answer=i, **{"return": float(i)}) for s in range(9) for i in (0, 1, 1, 1)]
  chosen = [(trace["step"], trace["return"]) for trace in report._choose(traces)]
  assert chosen == [(8, 0.0), (8, 1.0), (8, 1.0), (8, 1.0), (7, 0.0), (6, 0.0)]


def test_huge_traces_are_bounded(tmp_path):
  size = report.MAX_TOKENS + 123
  words = {"tokens": [f"w{t} " for t in range(size)], "segment_ids": [t // 1500 for t in range(size)]}
  trace = make_trace(advantages=[0.0] * size, **words)
  page = write(tmp_path, {"a": make_run(tmp_path / "a", traces=[trace])})
  for text in (page.text, report.render_terminal(trace, color=False)):
    assert "w3999 " in text and "w4000" not in text and "123 more tokens" in text


def test_terminal_neutralises_escapes_and_colour_changes_only_colour():
  trace = make_trace(tokens=[CONTROLS] * 8, prompt=HOSTILE, answer=HOSTILE)
  plain, tinted = (report.render_terminal(trace, color=color) for color in (False, True))
  assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800]", plain) and "\\x1b[31m" in plain
  assert re.sub(r"\x1b\[(48;2;\d+;\d+;\d+|38;2;27;27;31|0)m", "", tinted) == plain != tinted


def test_terminal_rows_golden():
  rows = report.render_terminal(make_trace(), color=False).splitlines()
  assert rows[4:] == [
    "    0  +0.250        │██       0.500 →  0.750  3 + 4 = 7↵",
    "> first wrong step",
    ">   1  -0.750  ██████│         0.750 →  0.000  7 - 5 = 9↵",
    "    2  +0.000        │         0.000 →  0.000  answer: 9",
  ]


def test_credit_figure_draws_the_values_and_leaves_dollars_alone():
  trace = make_trace(tokens=[r"$\nosuchcommand$ $5 "] * 8, prompt="$x", answer="$_^$")
  figure = report.credit_figure(trace)
  figure.savefig(io.BytesIO(), format="png", dpi=50)  # a formula that does not parse would raise
  texts = [text.get_text() for text in figure.axes[0].texts]
  assert [text for text in texts if re.fullmatch(r"[+-]\d\.\d{3}", text)] == ["+0.250", "-0.750", "+0.000"]
  assert np.array_equal(figure.axes[1].lines[0].get_xdata(), trace["values"])
  assert figure.get_size_inches()[0] == 9


def test_empty_trace_renders(tmp_path):
  nothing = {"tokens": [], "segment_ids": [], "advantages": [], "rewards": [], "values": [0.0]}
  trace = make_trace(first_wrong_segment=None, **nothing)
  assert "0 tokens in 0 segments" in write(tmp_path, {"a": make_run(tmp_path / "a", traces=[trace])}).text
  report.credit_figure(trace).savefig(io.BytesIO(), format="png", dpi=50)
  assert report.render_terminal(trace, color=True).startswith("step 40: wrong")


def test_padding_belongs_to_no_segment():
  trace = make_trace(segment_ids=[0, 0, 0, 1, 1, 1, 2, -1])
  assert [segment.text for segment in report.trace_segments(trace)] == [
    "3 + 4 = 7\n",
    "7 - 5 = 9\n",
    "answer",
  ]
  with pytest.raises(ValueError, match="step 40 does not fit together"):
    report.trace_segments(make_trace(segment_ids=[0, 0, 0, 1, 1, 1, 2, 3]))


def test_summary_keeps_key_order_and_fills_gaps(tmp_path):
  rows = [{"run": "a", "accuracy": 0.29312, "tokens": 1234567}, {"run": "b", "overhead": 1.5}]
  text = write(tmp_path, {"a": make_run(tmp_path / "a")}, summary=rows).text
  assert "runaccuracytokensoverheada0.29311,234,567–b––1.5" in text
