"""evaluate.py: votes, figures, resume bit for bit, refusals, the command line."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import evaluate
import jax
import numpy as np
import pytest
import tiny_config
from helpers import full_disk

from rredcot_jax.data import verifiers
from rredcot_jax.model import sampling
from rredcot_jax.train import evaluation
from rredcot_jax.train import workdir as workdir_lib
from rredcot_jax.train.experiment import Experiment

SAMPLES = 3  # With 6 prompts and 8 rows: three batches, the last filled up.


def tiny():
  config = tiny_config.get_config()
  config.evaluation.num_prompts = 6
  config.evaluation.rows = 8
  return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """An uninterrupted evaluation: (figures, output)."""
  output = tmp_path_factory.mktemp("evaluations") / "whole.json"
  return evaluate.run(tiny(), None, samples=SAMPLES, output=output), output


def traces_of(output):
  return output.with_name(output.name + ".traces.jsonl")


# ---- Votes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("text", "answer"),
  [
    ("thought</think> 42 ", "42"),
    ("thought</think>So it is $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
    ("\\boxed{1} thought</think>2", "2"),
    ("\\boxed{1} and no end", "1"),
    ("thought</think>", None),
    ("thought", None),
    ("", None),
  ],
)
def test_answer_of(text, answer):
  assert verifiers.answer_of(text) == answer


@pytest.mark.parametrize(
  "alike",
  [
    ("1,234", "1234.0", "$1234$", "1234.", "+1234"),
    ("0", "-0", "0.00", "\N{MINUS SIGN}0"),
    ("\\left( 2, 4 \\right)", "(2,4)", "$(2, 4)$", "(2,\\,4)"),
    ("\\dfrac{1}{2}", "\\frac{1}{2}", "\\tfrac{1} {2}"),
  ],
)
def test_answers_that_are_plainly_the_same_are_one_vote(alike):
  assert len({evaluation.vote_of(answer) for answer in alike}) == 1


def test_other_answers_are_other_votes():
  different = (
    "1", "-1", "10", "1e40", "1" + "0" * 39 + "1", "1" + "0" * 39 + "2", "x", "X", "2x", "(2,4)", "[2,4]",
    "\\leftarrow", "arrow", "\\frac{1}{2}", "12",
  )  # fmt: skip
  assert len({evaluation.vote_of(answer) for answer in different}) == len(different)
  assert evaluation.vote_of(None) is None


def test_votes_are_numbered_and_silence_is_none():
  judged = [evaluation.Judged(0, i, answer, 0.0, 1, False) for i, answer in enumerate(["7", None, "8", "7.0", None])]
  assert evaluation.votes_of(judged).tolist() == [0, -1, 1, 0, -1]


# ---- Figures -----------------------------------------------------------------------------


def test_figures_by_hand():
  answers = [["5", "5.0", "6", "5"], ["7", "8", "8", None]]
  rewards = [[1.0, 1.0, 0.0, 1.0], [1.0, 0.5, 0.0, 0.0]]  # 0.5 is no full mark.
  judged = [
    evaluation.Judged(p, s, answers[p][s], rewards[p][s], length=10 * (p + 1), truncated=answers[p][s] is None)
    for p in range(2)
    for s in range(4)
  ]
  figures = evaluate.summarise(judged, num_prompts=2, samples=4)
  assert list(figures["k"]) == ["1", "2", "4"]
  means = {k: (row["pass"], row["maj"]) for k, row in figures["k"].items()}
  # Two of the four: the first prompt loses one of two ties with "6"; the second wins with 7 and silence, and shares
  # with each 8.
  assert means["1"] == (0.5, 0.5)
  assert means["2"] == (0.75, round((3 / 4 + (1 + 0.5 + 0.5) / 6) / 2, 6))
  assert means["4"] == (1.0, 0.5)
  # Prompts 3/4 and 1/4 right: their mean's error is half the distance.
  assert (figures["k"]["1"]["pass_se"], figures["k"]["4"]["pass_se"]) == (0.25, 0.0)
  for k, row in figures["k"].items():
    for name in ("pass", "maj"):
      low, high = row[f"{name}_interval"]
      assert low <= row[name] <= high and (low < high or k == "4")
  assert (figures["length"], figures["truncated"], figures["answered"]) == (15.0, 0.125, 0.875)


def test_only_powers_of_two_are_reported():
  judged = [evaluation.Judged(p, s, "1", 1.0, 1, False) for p in range(2) for s in range(7)]
  assert list(evaluate.summarise(judged, 2, 7)["k"]) == ["1", "2", "4"]


def test_traces_are_every_sample_of_every_prompt_as_judged(whole):
  figures, output = whole
  header, *lines = [json.loads(line) for line in traces_of(output).read_text().splitlines()]
  assert header["settings"]["params"] == "chain/warm_start.safetensors" and header["settings"]["samples"] == SAMPLES
  assert [(line["prompt"], line["sample"]) for line in lines] == [(p, s) for p in range(6) for s in range(SAMPLES)]
  task = Experiment(tiny()).held_out
  for line in lines:
    assert line["reward"] == float(line["answer"] == task[line["prompt"]].answer)
    assert 1 <= line["length"] <= 56 and line["truncated"] == (line["answer"] is None)
  rewards = np.array([line["reward"] for line in lines])
  assert 0 < rewards.mean() < 1
  assert figures["k"]["1"]["pass"] == figures["k"]["1"]["maj"] == pytest.approx(rewards.mean(), abs=1e-6)
  assert len({line["length"] for line in lines}) > 1
  saved = json.loads(output.read_text())
  assert saved.pop("settings") == header["settings"] and saved == figures


def test_train_evaluates_the_same_traces(whole):
  """With the key that experiments/train.py gives it, `evaluation.evaluate` has the figures of evaluate.py."""
  config = tiny()
  experiment = Experiment(config)
  start_key, eval_key = jax.random.split(jax.random.key(config.seed))
  params = experiment.start_params(start_key)
  result = evaluation.evaluate(
    params, experiment.model, experiment.held_out, experiment.codec, experiment.mesh, eval_key, num_prompts=6,
    samples=SAMPLES, rows=8, max_prompt_tokens=config.rollout.max_prompt_tokens, **experiment.sampling_options,
  )  # fmt: skip
  figures, _ = whole
  assert result["eval/pass@1"] == pytest.approx(figures["k"]["1"]["pass"], abs=1e-6)
  assert result["eval/length"] == pytest.approx(figures["length"], abs=0.01)
  assert result["eval/truncated"] == pytest.approx(figures["truncated"], abs=1e-6)


def test_batches_of_one_prompt_are_drawn_apart():
  """Sixteen samples of a prompt in two batches: the second does not repeat the first."""
  experiment = Experiment(tiny())
  start_key, eval_key = jax.random.split(jax.random.key(0))
  first, second = evaluation.judged_batches(
    experiment.start_params(start_key), experiment.model, experiment.held_out, experiment.codec, experiment.mesh,
    eval_key, num_prompts=1, samples=16, rows=8, max_prompt_tokens=18, **experiment.sampling_options,
  )  # fmt: skip
  assert [one.sample for one in (*first, *second)] == list(range(16))
  drawn = lambda batch: [(one.answer, one.length) for one in batch]
  assert drawn(first) != drawn(second)


def test_pass_at_k_is_of_a_prompts_samples_and_needs_full_rewards(monkeypatch):
  rewards = [[1.0, 1.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
  judged = [
    evaluation.Judged(p, s, "1", reward, length=1 + s, truncated=s == 0)
    for p, row in enumerate(rewards)
    for s, reward in enumerate(row)
  ]
  monkeypatch.setattr(evaluation, "judged_batches", lambda *args, **options: iter([judged[:5], judged[5:]]))
  found = evaluation.evaluate(None, None, None, None, None, None, num_prompts=3, samples=4)
  error = lambda x: np.std(x, ddof=1) / np.sqrt(3)
  assert found == {
    "eval/pass@1": pytest.approx(1 / 4), "eval/pass@1_se": pytest.approx(error([0.5, 0, 0.25])),
    "eval/pass@4": pytest.approx(2 / 3), "eval/pass@4_se": pytest.approx(error([1, 0, 1])), "eval/length": 2.5,
    "eval/truncated": 0.25,
  }  # fmt: skip


def test_traces_are_sampled_in_the_layout_of_rollouts(whole, tmp_path, monkeypatch):
  """In bfloat16 as well: what is sampled with are parameters rounded and placed as in training."""
  config, seen = tiny(), set()
  config.mesh.data, config.mesh.fsdp, config.rollout_mesh.data, config.rollout_mesh.tensor = 1, 4, 2, 2
  sample = sampling.sample

  def noted(params, *args, **kwargs):
    gate = params["blocks"]["gate"]
    seen.add((gate.sharding.spec[2], gate.dtype.name))
    return sample(params, *args, **kwargs)

  monkeypatch.setattr(sampling, "sample", noted)
  assert evaluate.run(config, None, samples=SAMPLES, output=tmp_path / "laid_out.json") == whole[0]
  assert seen == {("tensor", "float32")}
  config.compute.dtype = "bfloat16"
  evaluate.run(config, None, samples=SAMPLES, output=tmp_path / "rounded.json")
  assert seen == {("tensor", "float32"), ("tensor", "bfloat16")}


# ---- Resume ------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("kept", "batches"),
  [(0.0, 3), (0.01, 3), (0.4, 3), (0.75, 2), (0.97, 1), (1.0, 0)],
  ids=["nothing", "half a header", "half a batch", "one batch", "two batches", "all"],
)
def test_an_interrupted_evaluation_goes_on_and_ends_alike(whole, tmp_path, monkeypatch, kept, batches):
  figures, finished = whole
  content = traces_of(finished).read_bytes()
  output = tmp_path / finished.name
  traces_of(output).write_bytes(content[: int(kept * len(content))])
  calls = []
  sample = sampling.sample
  monkeypatch.setattr(sampling, "sample", lambda *args, **kwargs: calls.append(1) or sample(*args, **kwargs))
  assert evaluate.run(tiny(), None, samples=SAMPLES, output=output) == figures
  assert len(calls) == batches
  assert traces_of(output).read_bytes() == content and output.read_bytes() == finished.read_bytes()


def test_each_batch_is_on_disk_before_the_next_is_sampled(whole, tmp_path, monkeypatch):
  _, finished = whole
  output = tmp_path / "killed.json"
  sample, on_disk = sampling.sample, []

  def watched(*args, **kwargs):
    on_disk.append(traces_of(output).read_bytes().splitlines())
    return sample(*args, **kwargs)

  monkeypatch.setattr(sampling, "sample", watched)
  evaluate.run(tiny(), None, samples=SAMPLES, output=output)
  lines = traces_of(finished).read_bytes().splitlines()
  assert on_disk == [lines[:1], lines[:9], lines[:17]]


def test_what_fills_the_last_batch_up_is_left_out(whole, tmp_path, monkeypatch):
  _, finished = whole
  output = tmp_path / finished.name
  lines = traces_of(finished).read_text().splitlines(keepends=True)
  traces_of(output).write_text("".join(lines[:17]))
  sample, rollouts = sampling.sample, []

  def watched(*args, **kwargs):
    rollout, cache = sample(*args, **kwargs)
    rollouts.append(jax.device_get(rollout))
    return rollout, cache

  monkeypatch.setattr(sampling, "sample", watched)
  evaluate.run(tiny(), None, samples=SAMPLES, output=output)
  (last,) = rollouts
  answers = list(map(verifiers.answer_of, Experiment(tiny()).codec.responses(last)))
  assert [json.loads(line)["answer"] for line in lines[17:]] == answers[:2]
  # The token that ends a trace is one of its tokens.
  assert [json.loads(line)["length"] for line in lines[17:]] == last.mask.sum(axis=1)[:2].tolist()
  assert len(set(answers)) > 1  # All eight rows are of one prompt.


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("seed", 1, r"seed \(0 there, 1 here\)"),
    ("rollout.temperature", 0.5, r"rollout.temperature \(1.0 there, 0.5 here\)"),
    ("rollout.max_tokens", 40, r"rollout.max_tokens \(56 there, 40 here\)"),
    ("evaluation.rows", 16, r"rows \(8 there, 16 here\)"),
    ("evaluation.num_prompts", 5, r"num_prompts \(6 there, 5 here\)"),
    ("task.options.num_steps", 7, r"task.num_steps \(8 there, 7 here\)"),
  ],
)
def test_another_evaluation_is_refused_and_left_as_it_is(whole, tmp_path, key, value, message):
  _, finished = whole
  output = tmp_path / finished.name
  content = traces_of(finished).read_bytes()
  traces_of(output).write_bytes(content)
  config = tiny()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=message):
    evaluate.run(config, None, samples=SAMPLES, output=output)
  assert traces_of(output).read_bytes() == content and not output.exists()


def test_a_newer_checkpoint_is_another_evaluation(tmp_path):
  settings = {"params": "runs/mine", "step": 20, "num_prompts": 2, "samples": 1, "rows": 2}
  assert evaluate.claim_traces(tmp_path / "traces", settings) == []
  assert evaluate.claim_traces(tmp_path / "traces", settings) == []
  with pytest.raises(ValueError, match=r"step \(20 there, 40 here\). Choose another --output"):
    evaluate.claim_traces(tmp_path / "traces", settings | {"step": 40})


def test_two_evaluations_do_not_write_to_one_output(whole, tmp_path):
  output = tmp_path / whole[1].name
  code = "import sys; from rredcot_jax.train import workdir\nwith workdir.alone(sys.argv[1]): print(); input()"
  other = subprocess.Popen([sys.executable, "-c", code, output], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  try:
    assert other.stdout.readline() == b"\n"
    with pytest.raises(ValueError, match=r"whole\.json is being written by another process: .* another --output"):
      evaluate.run(tiny(), None, samples=SAMPLES, output=output)
    assert not output.exists() and not traces_of(output).exists()
  finally:
    other.kill()
    other.communicate()
  traces_of(output).write_bytes(traces_of(whole[1]).read_bytes())
  assert evaluate.run(tiny(), None, samples=SAMPLES, output=output) == whole[0]


@pytest.mark.parametrize("line", [0, 1, 5])
@pytest.mark.parametrize("text", ["", "{}", "[1]", "null", '{"settings": 5}', "{", "\udc80"])
def test_a_file_that_is_no_evaluation_is_named_and_left_alone(whole, tmp_path, line, text):
  output = tmp_path / whole[1].name
  lines = traces_of(whole[1]).read_text().splitlines()
  lines[line] = text
  written = ("\n".join(lines) + "\n").encode(errors="surrogateescape")
  traces_of(output).write_bytes(written)
  with pytest.raises(ValueError, match=rf"traces\.jsonl, line {line + 1}: this is no line of an evaluation"):
    evaluate.run(tiny(), None, samples=SAMPLES, output=output)
  assert traces_of(output).read_bytes() == written


def test_a_full_disk_is_named_and_the_evaluation_goes_on_with_room(whole, tmp_path):
  figures, finished = whole
  output, size = tmp_path / finished.name, traces_of(finished).stat().st_size
  with full_disk(size - 100), pytest.raises(workdir_lib.WriteFailed, match=r"traces\.jsonl could not be .*Make room"):
    evaluate.run(tiny(), None, samples=SAMPLES, output=output)
  assert traces_of(output).read_bytes() == b"".join(traces_of(finished).read_bytes().splitlines(True)[:17])
  with full_disk(100), pytest.raises(workdir_lib.WriteFailed, match="could not be written"):
    evaluate.run(tiny(), None, samples=SAMPLES, output=output)
  assert evaluate.run(tiny(), None, samples=SAMPLES, output=output) == figures
  assert traces_of(output).read_bytes() == traces_of(finished).read_bytes()


# ---- Refusals and the command line -------------------------------------------------------


@pytest.mark.parametrize("place", ["", "gs://bucket/results.json"])
def test_an_output_that_is_no_file_is_refused_before_anything_is_sampled(tmp_path, monkeypatch, place):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=r"a file on a disk, and is a URL|is a directory, and a file is written there"):
    evaluate.run(tiny(), None, samples=1, output=pathlib.Path(place or tmp_path))
  assert not list(tmp_path.iterdir())


def test_what_cannot_be_evaluated_is_said(tmp_path):
  config, output = tiny(), tmp_path / "results.json"
  with pytest.raises(ValueError, match="no work directory of experiments/train"):
    evaluate.run(config, tmp_path / "nowhere", samples=1, output=output)
  assert not (tmp_path / "nowhere").exists()
  workdir_lib.claim(tmp_path / "run", config, "test").close()
  with pytest.raises(ValueError, match="holds no checkpoint yet"):
    evaluate.run(config, tmp_path / "run", samples=1, output=output)
  config.model.num_layers = 3
  with pytest.raises(ValueError, match=r"num_layers \(4 there, 3 here\)"):
    evaluate.run(config, tmp_path / "run", samples=1, output=output)
  config = tiny()
  config.initial_params = ""
  with pytest.raises(ValueError, match="starts at random"):
    evaluate.run(config, None, samples=1, output=output)
  config.evaluation.num_prompts = 1
  with pytest.raises(ValueError, match="must be at least 2"):
    evaluate.run(config, None, samples=1, output=output)
  assert not output.exists()


def test_first_must_begin_a_batch():
  experiment = Experiment(tiny())
  batches = evaluation.judged_batches(
    None, None, experiment.held_out, None, None, None, num_prompts=6, samples=3, rows=8, first=4,
    max_prompt_tokens=18, **experiment.sampling_options,
  )  # fmt: skip
  with pytest.raises(ValueError, match=r"first=4 must be a multiple of evaluation.rows=8"):
    next(batches)


@pytest.mark.parametrize("prompts", [0, 11])
def test_prompts_must_be_there(prompts):
  config = tiny()
  config.task.options.size = 10
  experiment = Experiment(config)
  batches = evaluation.judged_batches(
    None, None, experiment.held_out, None, None, None, num_prompts=prompts, samples=3, rows=8, max_prompt_tokens=18,
    **experiment.sampling_options,
  )  # fmt: skip
  with pytest.raises(ValueError, match=rf"evaluation\.num_prompts={prompts} must lie in \[1, 10\]"):
    next(batches)


def test_the_command_prints_a_table_and_ends_with_json(whole, tmp_path):
  figures, finished = whole
  output = tmp_path / finished.name
  traces_of(output).write_bytes(traces_of(finished).read_bytes())
  command = [sys.executable, evaluate.__file__, f"--config={tiny_config.__file__}", f"--samples={SAMPLES}"]
  command += [f"--output={output}", "--config.evaluation.num_prompts=6", "--config.evaluation.rows=8"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  *table, last = done.stdout.strip().splitlines()
  assert json.loads(last) == figures == {k: v for k, v in json.loads(output.read_text()).items() if k != "settings"}
  rows = [line.split() for line in table[1 : 1 + len(figures["k"])]]
  for (k, of_k), row in zip(figures["k"].items(), rows, strict=True):
    assert row[0] == k and row[1] == f"{100 * of_k['pass']:.1f}%" and row[4] == f"{100 * of_k['maj']:.1f}%"
    low, high = of_k["maj_interval"]
    assert row[5:] == [f"[{100 * low:.1f},", f"{100 * high:.1f}]"]
  error = 100 * figures["k"]["1"]["pass_se"]
  assert f"standard error of {error:.1f} over 6 prompts x 3 samples" in table[-1]


def test_a_judged_trace_survives_json():
  one = evaluation.Judged(3, 1, "\\boxed{\ud800\u2028", 0.25, 7, True)
  assert evaluation.Judged(**json.loads(json.dumps(dataclasses.asdict(one)))) == one
