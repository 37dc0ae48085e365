"""Files of a run as they are found: half-written, hostile, repeated; and which traces say most."""

import json
import math
import re
import time

import pytest
from report_cases import CONTROLS, HOSTILE, MEGABYTE, RAW_CONTROLS, make_long_trace, make_trace

from rredcot_jax.report import records

# ---- Files -------------------------------------------------------------------------------


def test_half_written_last_line_is_skipped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  # Neither U+2028 nor a carriage return ends a line.
  path.write_bytes('{"step": 0, "a": NaN}\n\n{"step": 1,\r"note": "\u2028"}\n{"step": 2, "tra'.encode())
  assert [row["step"] for row in records.read_metrics(path)] == [0, 1]
  path.write_text('{"step": 0}\n{"step": 1, {"step": 2}\n[3]\n{"step": 4}\n')
  with pytest.warns(UserWarning) as warned:
    assert [row["step"] for row in records.read_metrics(path)] == [0, 4]
  assert [re.search(r"metrics\.jsonl:(\d) ", str(one.message))[1] for one in warned] == ["2", "3"]


def test_lines_that_are_no_json_for_this_machine_are_skipped(tmp_path):
  path = tmp_path / "traces.jsonl"
  deep, long = "[" * MEGABYTE, f'{{"step": {"9" * 5000}}}'
  path.write_bytes(f'{deep}\n{long}\n{{"step": 1}}\n'.encode() + b'{"step": "\xff"}\n')
  with pytest.warns(UserWarning, match="left out"):
    assert list(records.read_traces(path)) == [{"step": 1}, {"step": "\ufffd"}]


def test_missing_or_empty_metrics_name_the_file(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"nowhere/metrics\.jsonl"):
    records.read_metrics(tmp_path / "nowhere" / "metrics.jsonl")
  (tmp_path / "metrics.jsonl").write_text('{"step')
  with pytest.raises(ValueError, match=r"metrics\.jsonl holds no complete line"):
    records.read_metrics(tmp_path / "metrics.jsonl")
  assert list(records.read_traces(tmp_path / "traces.jsonl")) == []
  assert records.read_config(tmp_path / "config.json") is None


def test_configurations_are_read_or_named(tmp_path):
  path = tmp_path / "config.json"
  path.write_text('{"command": "train.py", "config": {"seed": 1}}')
  assert records.read_config(path) == ("train.py", {"seed": 1})
  path.write_text("{}")
  assert records.read_config(path) == ("", {})
  for broken in ("[]", "{", "[" * MEGABYTE):
    path.write_text(broken)
    with pytest.raises(ValueError, match=r"config\.json is not a JSON object"):
      records.read_config(path)


# ---- One trace ---------------------------------------------------------------------------


def test_a_trace_by_hand():
  trace = records.parse_trace(make_trace())
  assert [segment.text for segment in trace.segments] == ["3 + 4 = 7\n", "7 - 5 = 9\n", "answer: 9"]
  second = trace.segments[1]
  assert (second.index, second.start, second.end, second.first_wrong) == (1, 3, 6, True)
  assert (second.reward, second.before, second.after, second.advantage) == (-0.75, 0.75, 0.0, -1.5)
  assert [segment.first_wrong for segment in trace.segments] == [False, True, False]
  assert trace.text == "3 + 4 = 7\n7 - 5 = 9\nanswer: 9"
  assert (trace.peak, trace.length, trace.is_right, trace.verdict) == (0.75, 8, False, "wrong")
  uneven = records.parse_trace(make_trace(advantages=[0.0, 0.0, 3.0, *[0.0] * 5]))
  assert uneven.segments[0].advantage == 1.0


@pytest.mark.parametrize(
  ("return_", "verdict", "right"),
  [
    (1, "correct", True),
    (2.0, "correct", True),
    (0.5, "partly right", True),
    (0.49, "partly right", False),
    (0, "wrong", False),
    (-1, "wrong", False),
    (None, "not judged", False),
  ],
)
def test_verdicts(return_, verdict, right):
  trace = records.parse_trace(make_trace(**{"return": return_}))
  assert trace.verdict == verdict and trace.is_right == right


def test_padding_belongs_to_no_segment():
  trace = records.parse_trace(make_trace(segment_ids=[0, 0, 0, 1, 1, 1, 2, -1]))
  assert [segment.text for segment in trace.segments] == ["3 + 4 = 7\n", "7 - 5 = 9\n", "answer"]
  assert trace.segments[2].end == 7 and trace.length == 8


def test_absent_numbers_are_nan_and_hostile_ones_do_not_raise():
  trace = records.parse_trace(make_trace(rewards=[None, math.nan, -math.inf], advantages=None))
  assert all(math.isnan(segment.advantage) for segment in trace.segments)
  assert math.isnan(trace.segments[0].reward) and trace.peak == 0.0
  assert math.isnan(records.parse_trace(make_trace(rewards=[10**400, 0, 0])).segments[0].reward)
  mixed = [math.inf, -math.inf, 1e308, 1e308, 1e308, 1e308, 0, 0]
  assert math.isnan(records.parse_trace(make_trace(advantages=mixed)).segments[0].advantage)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"segment_ids": [0, 0, 0, 1, 1, 1, 2, 3]}, "step 40 does not fit together.*segment_ids up to 3"),
    ({"rewards": [1.0]}, "does not fit together"),
    ({"values": [0.0] * 3}, "does not fit together"),
    ({"advantages": [1.0]}, "does not fit together"),
    ({"tokens": ["a"]}, "does not fit together"),
    ({"tokens": 8}, "needs a list for tokens, not 8"),
    ({"tokens": [1] * 8}, "needs strings for tokens"),
    ({"segment_ids": ["0"] * 8}, "integers for segment_ids"),
    ({"segment_ids": [True] * 8}, "integers for segment_ids"),
    ({"rewards": ["a", 0, 0]}, "needs a number in rewards, not 'a'"),
    ({"values": [[], 0, 0, 0]}, r"needs a number in values, not \[\]"),
    ({"return": HOSTILE}, "needs a number in return"),
  ],
)
def test_what_does_not_fit_is_named(change, message):
  with pytest.raises(ValueError, match=message):
    records.parse_trace(make_trace(**change))


@pytest.mark.parametrize("name", ["step", "prompt", "answer", "return", "tokens", "segment_ids", "rewards", "values"])
def test_a_missing_field_is_named(name):
  trace = make_trace()
  del trace[name]
  with pytest.raises(ValueError, match=f"no field '{name}'"):
    records.parse_trace(trace)


def test_errors_show_no_control_characters_and_stay_short(tmp_path):
  path = tmp_path / "traces.jsonl"
  for change in ({"step": CONTROLS * 1000, "values": []}, {"return": CONTROLS * 1000}, {"tokens": CONTROLS * 1000}):
    path.write_text(json.dumps(make_trace()) + "\n" + json.dumps(make_trace(**change)) + "\n")
    with pytest.raises(ValueError, match=r"traces\.jsonl, trace 2: ") as raised:
      records.distinct_traces(path)
    assert not re.search(RAW_CONTROLS, str(raised.value)) and len(str(raised.value)) < 600


# ---- Which traces ------------------------------------------------------------------------


def peak_of(reward, return_, **changes):
  return make_trace(rewards=[0.1, reward, 0.0], **{"return": return_}, **changes)


def test_a_trace_logged_again_is_counted_and_not_repeated(tmp_path):
  path = tmp_path / "traces.jsonl"
  other = make_trace(tokens=["8 + 4", *make_trace()["tokens"][1:]])
  # The same text at another step, or to another prompt, has other credit.
  lines = [make_trace(), other, make_trace(), make_trace(step=41), make_trace(), make_trace(prompt="4 + 4")]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  found = records.distinct_traces(path)
  assert [(trace.step, trace.prompt[0], trace.text[0], trace.copies) for trace in found] == [
    (40, "3", "3", 3), (40, "3", "8", 1), (41, "3", "3", 1), (40, "4", "3", 1),
  ]  # fmt: skip


def test_the_most_informative_come_first():
  cases = [(0.2, 1.0, 5), (-0.9, 1.0, 5), (-0.9004, 0.0, 5), (0.9, 0.0, 7), (0.9, 0.0, "7"), (0.1, 0.0, 9)]
  traces = [records.parse_trace(peak_of(reward, return_, step=step)) for reward, return_, step in cases]
  chosen = records.most_informative(traces, 6)
  # |r| as printed, in 3 digits; of equal ones wrong before right, then the latest step, a step that is no number last.
  assert [traces.index(trace) for trace in chosen] == [3, 2, 4, 1, 0, 5]


def test_half_of_the_chosen_are_wrong_where_there_are_so_many():
  make = lambda reward, return_: records.parse_trace(peak_of(reward, return_))
  wrong, right = [make(0.5 + i / 100, 0.0) for i in range(9)], [make(0.2 + i / 100, 1.0) for i in range(9)]
  of = lambda traces, limit: [
    (round(trace.peak, 2), trace.return_) for trace in records.most_informative(traces, limit)
  ]
  assert of(wrong + right, 4) == [(0.58, 0), (0.57, 0), (0.28, 1), (0.27, 1)]
  assert of(wrong[:1] + right, 4) == [(0.5, 0), (0.28, 1), (0.27, 1), (0.26, 1)]
  assert of(right, 3) == [(0.28, 1), (0.27, 1), (0.26, 1)] and of([], 3) == []


@pytest.mark.parametrize("step", [10**400, math.nan, None, {"a": 1}, HOSTILE, True])
def test_steps_that_are_no_numbers_are_ordered_last(step):
  strange, ours = (records.parse_trace(make_trace(step=s)) for s in (step, 1))
  assert records.most_informative([strange, ours], 2) == [ours, strange]


def test_one_scale_for_traces_shown_together():
  traces = [records.parse_trace(peak_of(r, 0.0)) for r in (0.2, -0.8, math.nan)]
  assert records.scale_of(traces) == 0.8 and records.scale_of([]) == 0.0


# ---- Bounds ------------------------------------------------------------------------------


def test_what_is_left_out_is_counted():
  trace = records.parse_trace(make_trace())
  texts = [segment.text for segment in trace.segments]
  assert records.shown_segments(trace, 29) == (list(zip(trace.segments, texts)), "")
  shown, left_out = records.shown_segments(trace, 13)
  assert [text for _, text in shown] == ["3 + 4 = 7\n", "7 -", ""] and left_out == "16 more characters"
  many = records.parse_trace(make_long_trace(records.MAX_SEGMENTS + 3, 2, "ab"))
  shown, left_out = records.shown_segments(many, 10**6)
  assert len(shown) == records.MAX_SEGMENTS and left_out == "9 more characters and 3 more segments"


def test_megabyte_tokens_are_read_in_bounded_time(tmp_path):
  path = tmp_path / "traces.jsonl"
  path.write_text(json.dumps(make_trace(tokens=["\x1b" * MEGABYTE] * 8)) + "\n")
  began = time.perf_counter()
  (trace,) = records.distinct_traces(path)
  assert sum(len(text) for _, text in records.shown_segments(trace, 1000)[0]) == 1000
  assert time.perf_counter() - began < 10


@pytest.mark.parametrize(
  ("rewards", "expected"),
  [([0.5, 0.0, 0.0], 1.0), ([0.25, -0.25, 0.0], 0.5), ([0.0, 0.0, 0.0], 0.0), ([1e308, 1e308, math.nan], 0.5)],
)
def test_concentration_is_1_where_one_segment_has_all_credit(rewards, expected):
  assert records.parse_trace(make_trace(rewards=rewards)).concentration == pytest.approx(expected)


def test_entropies_are_read_and_must_fit():
  trace = records.parse_trace(make_trace(entropies=[0.5, None, 1.0]))
  assert [trace.segments[k].entropy for k in (0, 2)] == [0.5, 1.0] and math.isnan(trace.segments[1].entropy)
  assert all(math.isnan(segment.entropy) for segment in records.parse_trace(make_trace()).segments)
  with pytest.raises(ValueError, match="does not fit together: 2 entropies, 3 rewards"):
    records.parse_trace(make_trace(entropies=[0.5, 1.0]))
