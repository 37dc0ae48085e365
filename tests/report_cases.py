"""A trace and a run as files hold them, and text that tries to leave them; for the tests of the report."""

import json
import math

SCRIPT = "<script>alert(1)</script>"
BREAKOUT = "\"'><img src=x onerror=alert(2)> & "
CONTROLS = "nul \x00 bidi \u202e esc \x1b[31m\x1b]0;title\x07 c1 \x9b31m surrogate \ud800 "
SHOWN = "nul \\x00 bidi \\u202e esc \\x1b[31m\\x1b]0;title\\x07 c1 \\x9b31m surrogate \\ud800 "
HOSTILE = SCRIPT + BREAKOUT + CONTROLS
RAW_CONTROLS = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
MEGABYTE = 1 << 20


def make_trace(**changes):
  """Two lines and an answer; the second line is the first wrong one."""
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


def make_long_trace(num_segments, tokens_a_segment, word="word ", **changes):
  """Segments of `word`, each ended by a line end, that share a reward of 0.5."""
  ids = [k for k in range(num_segments) for _ in range(tokens_a_segment)]
  return make_trace(
    tokens=[word if (t + 1) % tokens_a_segment else "\n" for t in range(len(ids))],
    segment_ids=ids,
    advantages=[0.0] * len(ids),
    rewards=[0.5 / num_segments] * num_segments,
    values=[0.5 + 0.5 * k / num_segments for k in range(num_segments + 1)],
    first_wrong_segment=None,
    **{"return": 1.0} | changes,
  )


def make_run(folder, *, traces=None, evaluations=True, config=None, command="train.py"):
  """The work directory of a run of 20 steps that logged no entropy, length or time."""
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
    (folder / "config.json").write_text(json.dumps({"command": command, "config": config}))
  return folder
