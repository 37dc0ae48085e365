"""docs/extending.md: each of its parts is added from outside the package, as the page says, and trains."""

import json
import pathlib
import re
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from rredcot_jax.credit.source import Batch
from rredcot_jax.data import batching
from rredcot_jax.model import sampling
from rredcot_jax.parallel import sharding
from rredcot_jax.train import loop
from rredcot_jax.train.config import default_config
from rredcot_jax.train.experiment import Experiment

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "extending.md"
SECTIONS = {
  title: re.findall(r"```python\n(.*?)```", text, re.S)
  for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.S | re.M)
}
_MOST_LINES = 30


@pytest.fixture(autouse=True)
def my_project(tmp_path, monkeypatch):
  """The page's files in a package of the user's own, and `data/my_corpus` beside it."""
  for block in (block for blocks in SECTIONS.values() for block in blocks):
    first, _, _ = block.partition("\n")
    if first.startswith("# "):
      path = tmp_path / first.removeprefix("# ")
      path.parent.mkdir(exist_ok=True)
      path.write_text(block, encoding="utf-8")
  rows = [{"prompt": f"{i}+{i}", "worked": f"{i}+{i}={2 * i}\n", "final": str(2 * i)} for i in range(5)]
  corpus = tmp_path / "data" / "my_corpus"
  corpus.mkdir(parents=True)
  for split in ("train", "test"):
    kept = [row for i, row in enumerate(rows) if (i == 4) == (split == "test")]
    (corpus / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.chdir(tmp_path)
  yield
  for name in [name for name in sys.modules if name.split(".")[0] == "my_project"]:
    del sys.modules[name]


def config_with(*titles: str) -> ConfigDict:
  """A run of a step of a tiny random policy, changed as the sections say."""
  config = default_config()
  config.tokenizer.path = "chain"
  config.num_steps = 1
  config.model.update({"width": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "mlp_width": 16})
  config.rollout.update({"prompts_per_step": 2, "group_size": 2, "max_prompt_tokens": 20, "max_tokens": 24})
  config.segmentation.update({"k_max": 3})
  config.evaluation.update({"num_prompts": 1, "samples": 2, "rows": 4})
  for title in titles:
    for block in SECTIONS[title]:
      if not block.startswith("# "):
        exec(block, {"config": config})
  return config


@pytest.mark.parametrize("title", SECTIONS)
def test_each_part_takes_under_thirty_lines(title):
  assert sum(len(block.strip().split("\n")) for block in SECTIONS[title]) < _MOST_LINES


def metrics_of(workdir: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_source_a_task_and_a_segmentation_train_together(tmp_path, monkeypatch):
  config = config_with("A source of credit", "A task", "A segmentation")
  rollouts, sample = [], sampling.sample

  def watched(*args, **kwargs):
    rollout, cache = sample(*args, **kwargs)
    rollouts.append(jax.device_get(rollout))
    return rollout, cache

  monkeypatch.setattr(sampling, "sample", watched)
  assert loop.run(config, tmp_path / "run")
  step = next(line for line in metrics_of(tmp_path / "run") if "train/loss" in line)
  assert np.isfinite(step["train/loss"])
  # The traces of the step, between those of two evaluations, are cut as the page says.
  _, rollout, _ = rollouts
  counts = Experiment(config).rollout_steps.segment(jax.tree.map(jax.numpy.asarray, rollout)).num_segments
  assert step["train/segments"] == pytest.approx(float(np.mean(counts))) and step["train/segments"] > 1


def test_the_source_gives_the_last_segment_its_strength_and_nothing_to_the_others(tmp_path):
  experiment = Experiment(config_with("A source of credit", "A task", "A segmentation"))
  batch = sampled(experiment)
  credit = experiment.assigner(batch).credit
  rewards, last = np.array(credit.rewards), np.asarray(batch.segments.num_segments) - 1
  rows = np.arange(len(last))
  assert rewards[rows, last] == pytest.approx(0.5 * batch.returns)
  rewards[rows, last] = 0
  assert not rewards.any()
  exits = np.asarray(batch.segments.thought_end)[:, None]
  cuts = np.asarray(batch.segments.starts)
  assert ((cuts % 10 == 0) | (cuts == exits))[np.asarray(batch.segments.mask)].all() and (cuts > 0).any()


def test_a_corpus_is_read_by_its_field_names_and_judged_by_the_users_verifier():
  experiment = Experiment(config_with("A corpus", "A verifier"))
  example = experiment.train_task[0]
  assert (example.question, example.steps, example.answer) == ("0+0", ("0+0=0\n",), "0")
  assert experiment.train_task.reward(example, "</think>it is 0.") == 1.0
  assert experiment.train_task.reward(example, "</think>it is 1.") == 0.0
  assert len(experiment.train_task) == 4 and experiment.held_out[0].question == "4+4"


def test_a_value_form_changes_the_values_as_it_says():
  values = {}
  for titles in ((), ("A value form",)):
    config = config_with("A task", *titles)
    config.credit.mode = "difference"
    experiment = Experiment(config)
    values[titles] = np.asarray(experiment.source.assign(sampled(experiment)).values)
  plain, rooted = values[()], values[("A value form",)]
  exists = plain > 0
  assert exists.any()
  np.testing.assert_allclose(rooted[exists], np.sqrt(plain[exists]), rtol=1e-4)


def test_a_bank_gives_each_state_its_completions():
  config = config_with("A task", "A bank")
  config.credit.mode = "difference"
  experiment = Experiment(config)
  batch = sampled(experiment)
  bank = experiment.setting.make_bank(batch).completions
  expected = [experiment.codec.answer_ids(example) for example in batch.examples]
  exists = np.asarray(batch.segments.mask)
  assert (bank.valid[..., 0] == exists).all()
  for row, ids in enumerate(expected):
    assert bank.tokens[row, 0, 0, : len(ids)].tolist() == ids
  assert np.isfinite(np.asarray(experiment.assigner(batch).advantages)).all()


def sampled(experiment: Experiment) -> Batch:
  """A batch of traces of a random policy, with returns that differ."""
  config, key = experiment.config, jax.random.key(0)
  rows = config.rollout.prompts_per_step * config.rollout.group_size
  examples = [experiment.train_task[row // config.rollout.group_size] for row in range(rows)]
  prompts = batching.prompt_arrays(experiment.codec, examples, config.rollout.max_prompt_tokens)
  params = experiment.rollout_steps.params(experiment.start_params(key))
  rollout, cache = experiment.rollout_steps.sample(params, *sharding.put_batch(experiment.rollout_mesh, prompts), key)
  segments = experiment.rollout_steps.segment(rollout)
  returns = np.array([1.0, 0.0] * (rows // 2), np.float32)
  return Batch(params, cache, rollout, segments, returns, examples, key)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"task.name": "my_project.tasks:Summs"}, "has no 'Summs'"),
    ({"task.name": "my_projekt.tasks:Sums"}, "No module named 'my_projekt'"),
    ({"credit.source": "my_project.tasks:Sums", "credit.mode": "difference"}, "no subclass of"),
    ({"credit.source": "scorring"}, "did you mean 'scoring'"),
    ({"segmentation.method": "my_project.cuts:none"}, "'none'"),
    ({"credit.form": "plane"}, "did you mean 'plain'"),
  ],
)
def test_a_name_that_leads_nowhere_is_refused_by_name(change, message):
  config = config_with()
  config.update_from_flattened_dict(change)
  with pytest.raises(ValueError, match=message):
    _ = Experiment(config).train_task


def test_an_option_that_a_source_does_not_have_is_refused():
  config = config_with("A source of credit", "A task")
  config.credit.options.strenght = 1.0
  with pytest.raises(ValueError, match="did you mean 'strength'"):
    _ = Experiment(config).source
