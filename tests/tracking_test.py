"""A tracker gets what a run measured, and whatever it does the run goes on and says what the tracker lacks."""

import json
import logging
import math
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import tiny_config

from rredcot_jax.train import differences, loop, metrics, tracking, validation
from rredcot_jax.train.config import default_config

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = {"seed": 3, "loss": {"name": "grpo"}}

# Stands for wandb and for trackio: notes each call, and misbehaves as STUB_FAULT says.
STUB = """
import json, os, sys, time
assert not [path for path in sys.path if path.endswith("rredcot_jax/train")], "our modules hide others"

def note(name, args, options):
  with open(os.environ["STUB_CALLS"], "a") as file:
    file.write(json.dumps([name, args, options]) + "\\n")
  fault, _, place = os.environ.get("STUB_FAULT", "").partition(" ")
  if place != name:
    return
  if fault == "raise":
    raise RuntimeError("no\\nnetwork \\x1b[31m")
  if fault == "hang":
    time.sleep(1000)
  if fault == "die":
    os._exit(3)
  if fault == "ask":
    print("login?", input())

def init(*args, **options):
  print("noise of the tracker")
  note("init", args, options)

def log(*args, **options): note("log", args, options)
def define_metric(*args, **options): note("define_metric", args, options)
def finish(*args, **options): note("finish", args, options)
"""


@pytest.fixture(autouse=True)
def stubs(tmp_path, monkeypatch):
  """Both packages as stubs, for this process and for those that it starts."""
  folder = tmp_path / "stubs"
  folder.mkdir()
  for name in ("wandb", "trackio"):
    (folder / f"{name}.py").write_text(STUB)
  monkeypatch.syspath_prepend(folder)
  monkeypatch.setenv("PYTHONPATH", str(folder))
  monkeypatch.setenv("STUB_CALLS", str(tmp_path / "calls"))
  for name in ("STUB_FAULT", "WANDB_PROJECT", "TRACKIO_PROJECT"):
    monkeypatch.delenv(name, raising=False)


def calls(tmp_path):
  if not (tmp_path / "calls").exists():
    return []
  return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


def logged(tmp_path):
  return [args[0] for name, args, _ in calls(tmp_path) if name == "log"]


def run_of(tmp_path, *steps, tracker="wandb", workdir="first"):
  """A run that measured `steps`; returns its lines of metrics.jsonl and its tracker."""
  (tmp_path / workdir).mkdir(exist_ok=True)
  with tracking.opened(tracker, tmp_path / workdir, CONFIG) as opened:
    writer = metrics.MetricsWriter(tmp_path / workdir, resume_step=-1, tracker=opened)
    for step in steps:
      writer.write(step, {"train/loss": 0.5, "train/length": 7.0, "train/kl": math.nan})
    writer.close()
  lines = [json.loads(line) for line in (tmp_path / workdir / "metrics.jsonl").read_text().splitlines()]
  return lines, opened


def test_wandb_gets_each_step_under_trls_names_over_the_steps(tmp_path):
  lines, tracker = run_of(tmp_path, 1, 2)
  (_, _, begun), (_, axis, by), *_, last = calls(tmp_path)
  assert (begun["project"], begun["name"], begun["resume"], begun["config"]) == (
    "rredcot-jax",
    "first",
    "allow",
    CONFIG,
  )
  assert (axis, by) == (["*"], {"step_metric": "train/global_step"})
  assert logged(tmp_path) == [
    {"train/loss": 0.5, "train/completions/mean_length": 7.0, "train/global_step": step} for step in (1, 2)
  ]
  assert last[0] == "finish" and tracker.num_lost == 0
  # metrics.jsonl keeps our names, and what is not finite.
  assert lines[0].keys() == {"step", "train/loss", "train/length", "train/kl"}
  assert "noise of the tracker" in (tmp_path / "first" / "tracker.log").read_text()


def test_trackio_gets_the_same_with_its_step(tmp_path, monkeypatch):
  monkeypatch.setenv("TRACKIO_PROJECT", "mine")
  run_of(tmp_path, 4, tracker="trackio")
  (_, _, begun), (name, args, options), (last, _, _) = calls(tmp_path)
  assert begun["project"] == "mine" and re.fullmatch(r"first-[0-9a-f]{8}", begun["name"])
  assert (name, options, last) == ("log", {"step": 4}, "finish")
  assert args == [{"train/loss": 0.5, "train/completions/mean_length": 7.0, "train/global_step": 4}]


@pytest.mark.parametrize(("tracker", "key"), [("wandb", "id"), ("trackio", "name")])
def test_a_resumed_run_goes_on_and_another_directory_is_another_run(tmp_path, tracker, key):
  for workdir in ("first", "first", "other"):
    run_of(tmp_path, 1, tracker=tracker, workdir=workdir)
  one, two, other = (options[key] for name, _, options in calls(tmp_path) if name == "init")
  assert one == two != other


def test_names_of_cispos_clips_stay_ours():
  values = {"train/clip_fraction_low": 0.1, "train/gradient_norm": 1.0}
  assert tracking.names_of(values, loss="dapo") == {"train/clip_ratio/low_mean": 0.1, "train/grad_norm": 1.0}
  assert tracking.names_of(values, loss="cispo") == {"train/clip_fraction_low": 0.1, "train/grad_norm": 1.0}


def test_the_table_in_the_docs_has_the_same_names():
  page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
  names = page[page.index("## Names") : page.index("These look alike")]
  rows = re.findall(r"^\| `([\w/@]+)` \| `([\w/]+)` \|", names, re.M)
  assert {ours: theirs for ours, theirs in rows if ours != theirs} == tracking.TRL_NAMES
  assert len(rows) == len(dict(rows))


# ---- A tracker that fails --------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch):
  monkeypatch.setattr(tracking, "_CLOSE_SECONDS", 3.0)
  monkeypatch.setattr(tracking, "_STOP_SECONDS", 0.5)
  monkeypatch.setattr(tracking, "_SILENT_SECONDS", 0.2)


def test_each_step_that_it_refuses_is_counted_and_the_first_is_said(tmp_path, monkeypatch, caplog):
  monkeypatch.setenv("STUB_FAULT", "raise log")
  with caplog.at_level(logging.WARNING):
    _, tracker = run_of(tmp_path, 1, 2, 3)
  assert tracker.num_lost == 3 and len(logged(tmp_path)) == 3
  assert caplog.text.count("the tracker wandb failed (RuntimeError: no network \\x1b[31m)") == 1
  assert "lacks 3 steps" in caplog.text and "\x1b" not in caplog.text
  assert calls(tmp_path)[-1][0] == "finish"


@pytest.mark.parametrize(
  ("fault", "said"),
  [
    ("raise init", r"failed \(RuntimeError: no network"),
    ("die log", "has ended by itself"),
    ("ask init", r"failed \(EOFError"),  # It is not answered.
  ],
)
def test_one_that_ends_early_costs_the_rest(tmp_path, monkeypatch, caplog, fault, said):
  monkeypatch.setenv("STUB_FAULT", fault)
  (tmp_path / "first").mkdir()
  with caplog.at_level(logging.WARNING), tracking.opened("wandb", tmp_path / "first", CONFIG) as tracker:
    tracker.add(1, {"x": 1.0})
    end = time.monotonic() + 60
    while tracker._process is not None and time.monotonic() < end:
      tracker._listen(0.1)
    assert tracker.num_lost == 1
    writer = metrics.MetricsWriter(tmp_path / "first", resume_step=-1, tracker=tracker)
    writer.write(2, {"x": 1.0})
    assert writer.flush() == [{"step": 2, "x": 1.0, "train/tracker_lost": 2.0}]
  assert re.search(said, caplog.text) and "lacks 2 steps" in caplog.text
  assert caplog.text.count("The run goes on") == 1


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_one_that_hangs_is_left_behind(tmp_path, monkeypatch, caplog, impatient, place):
  monkeypatch.setenv("STUB_FAULT", f"hang {place}")
  (tmp_path / "first").mkdir()
  with caplog.at_level(logging.WARNING):
    with tracking.opened("trackio", tmp_path / "first", CONFIG) as tracker:
      began = time.monotonic()
      for step in range(200):  # Many more bytes than a pipe holds.
        tracker.add(step, {f"metric {i}": 1.0 for i in range(100)})
      assert time.monotonic() - began < 20
      time.sleep(0.3)
      tracker.add(200, {"x": 1.0})
      silent = "has not answered" in caplog.text
      while place == "finish" and tracker._answered < 201:
        tracker._listen(1.0)
      process, closing = tracker._process, time.monotonic()
    assert time.monotonic() - closing < 30
  assert process.poll() == -signal.SIGKILL
  assert tracker.num_lost == (0 if place == "finish" else 201)
  if place == "log":
    assert silent
  assert "did not end within" in caplog.text or silent


def test_a_run_that_fails_or_is_told_to_stop_waits_less(tmp_path, monkeypatch, caplog, impatient):
  monkeypatch.setattr(tracking, "_CLOSE_SECONDS", 100.0)
  monkeypatch.setenv("STUB_FAULT", "hang init")
  (tmp_path / "first").mkdir()
  began = time.monotonic()
  with caplog.at_level(logging.WARNING):
    with pytest.raises(FloatingPointError), tracking.opened("wandb", tmp_path / "first", CONFIG) as tracker:
      tracker.add(1, {"x": 1.0})
      raise FloatingPointError
    with tracking.opened("wandb", tmp_path / "first", CONFIG) as tracker:
      tracker.add(1, {"x": 1.0})
      tracker.close(in_haste=True)
  assert time.monotonic() - began < 20
  assert tracker.num_lost == 1 and caplog.text.count("lacks 1 steps") == 2


def test_what_waits_is_bounded_and_what_is_left_out_is_counted(tmp_path, monkeypatch, impatient):
  monkeypatch.setattr(tracking, "_MOST_WAITING", 10_000)
  monkeypatch.setenv("STUB_FAULT", "hang init")
  (tmp_path / "first").mkdir()
  with tracking.opened("wandb", tmp_path / "first", CONFIG) as tracker:
    for step in range(2000):
      tracker.add(step, {f"metric {i}": 1.0 for i in range(10)})
    assert 100 < tracker.num_lost < 2000 and len(tracker._waiting) < 12_000
  assert tracker.num_lost == 2000


def test_a_folder_that_cannot_be_written_costs_the_tracker_alone(tmp_path, caplog):
  with caplog.at_level(logging.WARNING), tracking.opened("wandb", tmp_path / "missing", CONFIG) as tracker:
    tracker.add(1, {"x": 1.0})
  assert tracker.num_lost == 1 and "cannot be started (No such file or directory)" in caplog.text


def test_the_tracker_of_a_run_that_was_killed_ends_its_record(tmp_path):
  code = (
    "import os, pathlib, signal, sys\nfrom rredcot_jax.train import tracking\n"
    f"tracker = tracking.Tracker('wandb', pathlib.Path(sys.argv[1]), {CONFIG})\n"
    "tracker.add(1, {'x': 1.0})\nos.kill(os.getpid(), signal.SIGKILL)"
  )
  environment = {
    "PYTHONPATH": f"{tmp_path / 'stubs'}:{ROOT}",
    "STUB_CALLS": str(tmp_path / "calls"),
    "PATH": "/usr/bin",
  }
  done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, cwd=tmp_path)
  assert done.returncode == -signal.SIGKILL
  end = time.monotonic() + 60
  while time.monotonic() < end and [name for name, *_ in calls(tmp_path)][-1:] != ["finish"]:
    time.sleep(0.05)
  assert [name for name, *_ in calls(tmp_path)] == ["init", "define_metric", "log", "finish"]


# ---- The option ------------------------------------------------------------------------------


def test_a_package_that_is_missing_is_refused_before_anything_is_written(tmp_path, monkeypatch):
  config = tiny_config.get_config()
  config.tracker = "wandb"
  validation.validate(config)  # The stub is there.
  (tmp_path / "stubs" / "wandb.py").unlink()
  for folder in (None, tmp_path / "stubs" / "wandb"):  # W&B leaves such a folder, which is no package.
    if folder is not None:
      folder.mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match=r"tracker='wandb' needs the package wandb.*pip install '\.\[wandb\]'"):
      validation.validate(config)


def test_a_run_may_be_resumed_with_another_tracker():
  held, wanted = default_config().to_dict(), default_config().to_dict() | {"tracker": "wandb"}
  assert not differences.run_differences(held, wanted)
  assert differences.run_differences(held, wanted | {"seed": 1}) == ["seed (0 there, 1 here)"]


def test_a_run_whose_tracker_refuses_everything_ends_as_without_one(tmp_path, monkeypatch):
  monkeypatch.setenv("STUB_FAULT", "raise log")
  config = default_config()
  config.tokenizer.path = "chain"
  config.num_steps = 2
  config.model.update({"width": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "mlp_width": 16})
  config.rollout.update({"prompts_per_step": 2, "group_size": 2, "max_prompt_tokens": 18, "max_tokens": 16})
  config.evaluation.update({"num_prompts": 2, "samples": 2, "rows": 4})
  config.tracker = "trackio"
  (tmp_path / "run").mkdir()
  assert loop.run(config, tmp_path / "run")
  lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [0, 1, 2, 2]
  sent = logged(tmp_path)
  assert [one["train/global_step"] for one in sent] == [0, 1, 2, 2]
  assert sent[1]["train/grad_norm"] == lines[1]["train/gradient_norm"]
  assert "eval/completions/mean_length" in sent[0] and sent[0]["eval/pass@1"] == lines[0]["eval/pass@1"]
