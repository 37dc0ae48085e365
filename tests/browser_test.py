"""The report in a real browser, by clicking and typing: what a model wrote stays text, everything is reachable."""

import shutil
import time

import pytest
from report_cases import HOSTILE, SCRIPT, make_long_trace, make_run, make_trace

from rredcot_jax.report import page as page_lib

pytestmark = pytest.mark.peers

PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def browser():
  api = pytest.importorskip("playwright.sync_api")
  path = shutil.which("chromium") or shutil.which("google-chrome")
  if path is None:
    pytest.skip("no chromium is installed")
  with api.sync_playwright() as playwright:
    opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
  """Two runs with hostile text everywhere, one long trace, and prompts that both have."""
  folder = tmp_path_factory.mktemp("report")
  hostile = make_trace(step=7, tokens=[HOSTILE] * 8, prompt=HOSTILE, answer=HOSTILE, **{"return": 1.0})
  mild = make_trace(step=3, rewards=[0.3, -0.3, 0.3], prompt="both")
  runs = {
    "first " + SCRIPT: make_run(folder / "a", traces=[hostile, make_trace(step=2), mild]),
    "second": make_run(folder / "b", traces=[make_trace(step=5, prompt="both", **{"return": 1.0})]),
  }
  page_lib.write_report(runs, folder / "report.html", title=HOSTILE)
  return (folder / "report.html").as_uri()


@pytest.fixture
def opened(browser, report):
  """Opens the report; anything that it loads, says to the console or asks in a dialog is noted and fails the test."""
  pages, noted = [], []

  def open_page(address="", **options):
    tab = browser.new_page(**options)
    tab.on("dialog", lambda dialog: (noted.append(f"dialog {dialog.message}"), dialog.dismiss()))
    tab.on("pageerror", lambda error: noted.append(f"error {error}"))
    tab.on("console", lambda message: noted.append(f"console {message.text}"))
    tab.on("request", lambda request: noted.append(request.url) if not request.url.startswith("file:") else None)
    tab.goto((report if not address.startswith("file:") else "") + address)
    pages.append(tab)
    return tab

  yield open_page
  for tab in pages:
    tab.close()
  assert not noted


def steps(tab):
  return tab.locator(".traces article:visible").evaluate_all("list => list.map(a => a.querySelector('b').textContent)")


def focused(tab):
  return tab.evaluate("document.activeElement.closest('li, article')?.id ?? null")


def test_hostile_text_is_text(opened):
  tab = opened()
  assert SCRIPT in tab.locator("h1").inner_text() and SCRIPT in tab.locator("h3").first.inner_text()
  assert tab.locator("script").count() == 1 and tab.locator("img").count() == 0
  assert "\u202e" not in tab.content() and "\x1b" not in tab.content()


def test_traces_are_sorted_and_filtered(opened):
  tab = opened()
  assert steps(tab) == ["2", "7", "3", "5"] and tab.locator("output").inner_text() == "4 of 4 traces"
  tab.select_option("select[name=show]", "1")
  assert steps(tab) == ["7", "5"] and tab.locator("output").inner_text() == "2 of 4 traces"
  tab.select_option("select[name=show]", "all")
  tab.select_option("select[name=sort]", "concentration")
  assert steps(tab)[2] == "3"  # Its credit is spread evenly.


def test_a_segments_numbers_appear_by_mouse_and_by_keyboard(opened):
  tab = opened()
  row = tab.locator(".traces .segments > li").first
  numbers = row.locator(".numbers")
  opacity = lambda: numbers.evaluate("e => getComputedStyle(e).opacity")
  assert opacity() == "0"
  row.locator("summary").hover()
  assert opacity() == "1" and "v 0.500 → 0.750" in numbers.inner_text()
  tab.mouse.move(0, 0)
  row.locator("summary").focus()
  tab.keyboard.press("ArrowDown")
  assert focused(tab) == "trace-0-0-k1"
  assert tab.locator("#trace-0-0-k1 .numbers").evaluate("e => getComputedStyle(e).opacity") == "1"
  tab.keyboard.press("Enter")
  assert tab.locator("#trace-0-0-k1 > details").get_attribute("open") is not None


def test_j_and_k_go_from_trace_to_trace(opened):
  tab = opened()
  tab.keyboard.press("j")
  assert focused(tab) == "trace-0-0"
  tab.keyboard.press("j")
  assert focused(tab) == "trace-0-1" and tab.url.endswith("#trace-0-1")
  tab.keyboard.press("k")
  assert focused(tab) == "trace-0-0"


def test_an_address_leads_to_its_trace_and_segment(opened):
  tab = opened("#trace-0-1-k2")
  tab.wait_for_function("document.activeElement.closest('li')?.id === 'trace-0-1-k2'", timeout=5000)
  assert tab.locator("#trace-0-1-k2 > details").get_attribute("open") is not None
  assert tab.locator("#trace-0-1-k2").evaluate("e => e.getBoundingClientRect().top < innerHeight")
  tab.select_option("select[name=show]", "1")
  tab.evaluate("location.hash = '#trace-0-0'")  # Hidden: it is wrong.
  tab.wait_for_function("document.activeElement.closest('article')?.id === 'trace-0-0'")
  assert tab.locator("select[name=show]").input_value() == "all"


def test_runs_stand_side_by_side_and_below_each_other_on_a_phone(opened):
  left = lambda tab: tab.locator(".pair > div").evaluate_all("list => list.map(e => e.getBoundingClientRect().left)")
  wide, narrow = left(opened(viewport={"width": 1100, "height": 800})), left(opened(viewport=PHONE))
  assert wide[0] < wide[1] and narrow[0] == narrow[1]


def test_a_phone_scrolls_downwards_alone_and_curves_fill_it(opened):
  tab = opened(viewport=PHONE)
  assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
  assert tab.locator(".curve svg").first.evaluate("e => e.getBoundingClientRect().width") > 200


def test_colours_follow_the_readers_choice_of_light_or_dark(opened):
  background = lambda tab: tab.evaluate("getComputedStyle(document.body).backgroundColor")
  assert background(opened(color_scheme="light")) == "rgb(255, 255, 255)"
  assert background(opened(color_scheme="dark")) == "rgb(23, 23, 26)"


def test_a_trace_of_25000_tokens_answers_at_once(opened, tmp_path):
  trace = make_long_trace(400, 63)
  page_lib.write_report({"a": make_run(tmp_path / "a", traces=[trace])}, tmp_path / "long.html", title="long")
  began = time.monotonic()
  tab = opened((tmp_path / "long.html").as_uri())
  loaded = time.monotonic() - began
  # What the browser spends, however busy the machine is otherwise.
  spent = lambda what: tab.evaluate(f"(() => {{ const began = performance.now(); {what}; document.body.offsetHeight; "
                                    "return performance.now() - began; })()")  # fmt: skip
  opening = spent("document.querySelector('article > details:last-of-type').open = true")
  unfolding = spent("document.querySelector('[name=unfold]').click()")
  print(f"25,200 tokens: loaded {loaded:.2f} s, opened {opening:.0f} ms, all unfolded {unfolding:.0f} ms")
  assert tab.locator(".segments > li").count() == 400
  assert loaded < 20 and opening < 3000 and unfolding < 6000
