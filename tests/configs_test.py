"""Every file under configs/ loads and names a real model; one whole pass from a checkpoint to an evaluation."""

import importlib.util
import inspect
import itertools
import json
import pathlib
import re

import evaluate
import jax
import numpy as np
import pytest
import transformers

from rredcot_jax.data import chain, datasets, reasoning_gym, think
from rredcot_jax.model import decoder, export, huggingface, sampling
from rredcot_jax.model.config import SIZES, ModelConfig
from rredcot_jax.model.tokenizer import load_tokenizer
from rredcot_jax.report import records
from rredcot_jax.study import estimators
from rredcot_jax.train import config as config_lib
from rredcot_jax.train import initial, loop, preflight, train_step, validation
from rredcot_jax.train import workdir as workdir_lib
from rredcot_jax.train.experiment import Experiment, credit_rule, loss_options, optimizer_options

ROOT = pathlib.Path(__file__).parent.parent
FILES = {path.stem: path for path in sorted((ROOT / "configs").glob("*.py"))}

# As published, of each model's own checkpoint.
NUM_PARAMS = {
  "SmolLM2-135M": 134_515_008,
  "SmolLM2-360M": 361_821_120,
  "SmolLM2-1.7B": 1_711_376_384,
  "Qwen2.5-0.5B": 494_032_768,
  "Qwen2.5-1.5B": 1_543_714_304,
  "Qwen2.5-7B": 7_615_616_512,
  "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
  "DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
  "Qwen3-0.6B": 596_049_920,
  "Qwen3-1.7B": 1_720_574_976,
  "Qwen3-4B": 4_022_468_096,
  "Qwen3-8B": 8_190_735_360,
  "Llama-3.2-1B": 1_235_814_400,
  "Llama-3.2-3B": 3_212_749_824,
}
# The models that configurations name; the others draw a small one at random or ship it.
MODELS = {
  "demo_llm": "SmolLM2-135M",
  "smollm2_gsm_symbolic": "SmolLM2-135M",
  "smollm2_study": "SmolLM2-135M",
  "qwen3_4b_numina_math": "Qwen3-4B",
  "r1_distill_1p5b_open_rs": "DeepSeek-R1-Distill-Qwen-1.5B",
}


def load(name):
  spec = importlib.util.spec_from_file_location(name, FILES[name])
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def documented_options(name):
  """The options that the docstring of a file's `get_config` promises, the default first."""
  text = inspect.getdoc(load(name).get_config).partition("Options:")[2]
  return {option: tuple(re.split(r",\s*", values)) for option, values in re.findall(r"(\w+)\s+\(([^)]*)\)", text)}


def configs(name):
  """(arg, config) of every combination of documented values."""
  options, compared = documented_options(name), getattr(load(name), "METHODS", None)
  if isinstance(compared, dict):  # Some combinations have no meaning: those that are compared.
    yield from ((arg, load(name).get_config(arg)) for arg in compared.values())
    return
  for values in itertools.product(*options.values()):
    arg = ",".join(f"{option}={value}" for option, value in zip(options, values))
    yield arg, load(name).get_config(arg)


# ---- The files ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_known_models_have_the_published_number_of_parameters(name):
  assert decoder.num_params(SIZES[name]) == NUM_PARAMS[name]


@pytest.mark.parametrize("name", FILES)
def test_the_documented_options_are_the_options(name, monkeypatch):
  seen = []
  original = config_lib.options_of
  monkeypatch.setattr(config_lib, "options_of", lambda arg, allowed: seen.append(allowed) or original(arg, allowed))
  load(name).get_config()
  (allowed,) = seen
  documented = documented_options(name)
  assert {option: set(values) for option, values in allowed.items()} == {o: set(v) for o, v in documented.items()}
  assert {option: values[0] for option, values in allowed.items()} == {o: v[0] for o, v in documented.items()}
  with pytest.raises(ValueError, match="no-such-value"):
    load(name).get_config("no-such-value")


@pytest.mark.parametrize("name", FILES)
def test_every_option_makes_a_valid_configuration(name):
  banks, modes = set(), set()
  for arg, config in configs(name):
    validation.validate(config)
    credit_rule(config), validation.bank_options(config), loss_options(config), optimizer_options(config)
    if "method=rredcot" in arg:
      modes.add(config.credit.mode)
      banks.add(config.credit.bank)
      assert f"bank={config.credit.bank}" in arg
    else:
      method = arg.partition("method=")[2].partition(",")[0]
      assert (config.credit.mode == "uniform") == (method in ("", "grpo", "reinforce"))
    # What a mesh splits must divide.
    parts = abs(config.mesh.data) * config.mesh.fsdp
    assert (
      config.rollout.prompts_per_step * config.rollout.group_size % parts == 0 and config.evaluation.rows % parts == 0
    )
  assert "uniform" not in modes and banks == set(documented_options(name).get("bank", ()))


@pytest.mark.parametrize("name", FILES)
def test_tasks_know_their_options(name):
  kinds = {
    "chain": chain.Chain,
    "think": think.Think,
    "dataset": datasets.Dataset,
    "reasoning_gym": reasoning_gym.ReasoningGym,
  }
  for _, config in configs(name):
    for split in ("train", "eval"):
      options = Experiment(config).task_options(split)
      kind, _, corpus = options.pop("name").partition("/")
      inspect.signature(kinds[kind]).bind(*([corpus] if corpus else []), **options)
      if kind == "dataset":
        assert corpus in datasets.SCHEMAS and (split == "eval" or datasets.SCHEMAS[corpus].train_file)


@pytest.mark.parametrize("name", ["demo", "think", "chain_comparison"])
def test_the_room_of_a_completion_is_that_of_the_longest(name):
  compared = set()
  for arg, config in configs(name):
    bank = config.credit.bank
    if "method=rredcot" not in arg or bank in compared:
      continue
    compared.add(bank)
    experiment = Experiment(config)
    references = [experiment.codec.reference(experiment.train_task[i]) for i in range(50)]
    rooms = estimators.completion_rooms(references, config.rollout.max_tokens)
    assert config.credit.max_completion_tokens == rooms[bank]
  assert len(compared) >= 4


def test_the_comparison_is_at_equal_rollouts_and_only_action_value_has_no_baseline():
  for arg, config in configs("chain_comparison"):
    assert config.rollout.prompts_per_step * config.rollout.group_size == 16
    assert config.credit.state_baseline == ("action_value" not in arg)
    mode = arg.partition("mode=")[2] or "uniform"
    assert config.credit.mode == ("difference" if mode == "action_value" else mode)
    assert (config.advantages.baseline == "none") == (arg == "method=reinforce")


def test_each_method_of_the_demo_has_the_rate_that_was_best_for_it():
  rates = {method: load("demo").get_config(method).optimizer.learning_rate for method in ("rredcot", "grpo")}
  assert rates == {"rredcot": 3e-4, "grpo": 2e-4}  # docs/results.md


@pytest.mark.parametrize("name", MODELS)
def test_models_are_the_ones_they_are_named_after(name):
  for _, config in configs(name):
    model = Experiment(config).model
    assert model.sizes() == SIZES[MODELS[name]].sizes()
    assert decoder.num_params(model) == NUM_PARAMS[MODELS[name]]
  assert all(config.model.vocab_size == 0 for other in FILES.keys() - MODELS for _, config in configs(other))


@pytest.mark.parametrize("name", ["smollm2_gsm_symbolic", "qwen3_4b_numina_math", "r1_distill_1p5b_open_rs"])
def test_docstrings_figures_are_the_configurations(name):
  text = load(name).__doc__
  config = load(name).get_config()
  model = SIZES[MODELS[name]]
  rows = config.rollout.prompts_per_step * config.rollout.group_size
  columns = config.rollout.max_prompt_tokens + config.rollout.max_tokens
  itemsize = 2 if config.compute.dtype == "bfloat16" else 4
  per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * itemsize
  assert f"{NUM_PARAMS[MODELS[name]]:,} parameters" in text
  line = next(line for line in text.splitlines() if "keys and values" in line)
  assert f"{per_token:,} bytes x {columns:,} tokens x {rows} rows" in line
  assert f"{per_token * columns * rows / 1e9:.1f} GB" in line
  moments = next(line for line in text.splitlines() if "moments" in line)
  assert f"{3 * 4 * NUM_PARAMS[MODELS[name]] / 1e9:.1f} GB" in moments
  assert "Not run by us" in text


@pytest.mark.parametrize("name", ["qwen3_4b_numina_math", "r1_distill_1p5b_open_rs"])
def test_credit_of_the_papers_settings_is_the_papers_where_it_is_known(name):
  config = load(name).get_config()
  held = {key: config.credit[key] for key in ("bank", "bank_size", "scored", "initial_value", "mode", "form")}
  assert held == {
    "bank": "solutions", "bank_size": 1, "scored": "body", "initial_value": "first_segment", "mode": "signed",
    "form": "length_normalised",
  }  # fmt: skip
  assert (config.segmentation.method, config.segmentation.after_exit) == ("hybrid", "one")
  assert load(name).get_config("bank=rollouts").credit.bank_size == 4


@pytest.mark.parametrize("benchmark", ["math500", "amc23", "minerva", "aime"])
@pytest.mark.parametrize("name", ["qwen3_4b_numina_math", "r1_distill_1p5b_open_rs"])
def test_the_chosen_benchmark_is_what_is_held_out(name, benchmark):
  config = load(name).get_config(f"eval={benchmark}")
  options = Experiment(config).task_options
  assert options("eval")["name"] == f"dataset/{benchmark}"
  assert options("train")["name"] != f"dataset/{benchmark}"
  prompt = {options(split)["instruction"] for split in ("train", "eval")}
  assert len(prompt) == 1 and "\\boxed{}" in prompt.pop()


# ---- A checkpoint in Hugging Face's format, through training, into an evaluation ---------

GROUP = 2
TRACE_TOKENS = 24


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """One step of training from a random checkpoint: (config, workdir, what was seen on the way)."""
  root = tmp_path_factory.mktemp("pass")
  tokenizer = load_tokenizer(initial.locate("gsm_symbolic"))
  sizes = {"width": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "mlp_width": 64}
  model = ModelConfig(vocab_size=len(tokenizer), **sizes)
  export.save(model, decoder.init(model, jax.random.key(3)), root / "start", tokenizer=tokenizer)

  config = config_lib.default_config()
  config.model.update(sizes)
  config.initial_params = str(root / "start")
  config.task.name = "dataset/gsm8k"
  config.task.options.update(
    data_dir=str(ROOT / "tests" / "data"), cache_dir=str(root / "cache"), matcher="numeric",
    instruction="Answer with a number.",
  )  # fmt: skip
  config.num_steps = 1
  config.optimizer.warmup_steps = 0
  config.optimizer.learning_rate = 0.02
  config.rollout.prompts_per_step = 4
  config.rollout.group_size = GROUP
  config.rollout.max_prompt_tokens = 96
  config.rollout.max_tokens = TRACE_TOKENS
  config.segmentation.method = "uniform"
  config.segmentation.k_max = 4
  config.credit.mode = "difference"
  config.credit.bank = "answer"
  config.credit.form = "length_normalised"  # A random model's plain values are too small for one step to show.
  config.credit.max_completion_tokens = 16
  config.evaluation.num_prompts = 4
  config.evaluation.samples = 2
  config.evaluation.rows = 8
  validation.validate(config)

  seen = {"rollouts": [], "batches": [], "decoded": set(), "encoded": []}
  with pytest.MonkeyPatch.context() as patch:
    watch(patch, seen)
    # What is checked before a run decodes references, which are encoded for the banks.
    patch.setattr(preflight, "check_references", lambda *_: None)
    patch.setattr(preflight, "differing_pieces", lambda *_: None)
    with workdir_lib.claim(root / "run", config, "test", resume=True):
      loop.run(config, root / "run")
  return config, root / "run", seen


def watch(patch, seen):
  """Notes what is sampled, decoded, encoded and trained on."""
  sample, compile_updates = sampling.sample, train_step.compile_updates
  tokenizer = transformers.PreTrainedTokenizerFast
  decode, encode, call = tokenizer.decode, tokenizer.encode, tokenizer.__call__

  def noting_sample(*args, **kwargs):
    rollout, cache = sample(*args, **kwargs)
    seen["rollouts"].append(jax.device_get(rollout))
    return rollout, cache

  def noting_steps(*args, **kwargs):
    steps = compile_updates(*args, **kwargs)
    return steps._replace(update=lambda state, batch, *rest: note_batch(batch) or steps.update(state, batch, *rest))

  def note_batch(batch):
    seen["batches"].append(jax.device_get(batch))

  def noting_decode(self, ids, *args, **kwargs):
    text = decode(self, ids, *args, **kwargs)
    if len(ids) > 1:  # Not the vocabulary, token by token, which segmentation's tables are made from.
      seen["decoded"].add(text)
    return text

  patch.setattr(sampling, "sample", noting_sample)
  patch.setattr(train_step, "compile_updates", noting_steps)
  patch.setattr(tokenizer, "decode", noting_decode)
  patch.setattr(tokenizer, "encode", lambda self, t, *a, **k: seen["encoded"].append(t) or encode(self, t, *a, **k))
  patch.setattr(tokenizer, "__call__", lambda self, t, *a, **k: seen["encoded"].append(t) or call(self, t, *a, **k))


def test_training_on_a_users_checkpoint_and_corpus(trained):
  config, workdir, seen = trained
  lines = records.read_metrics(workdir / "metrics.jsonl")
  (step,) = [line for line in lines if "train/loss" in line]
  assert [line["step"] for line in lines if "eval/pass@1" in line] == [0, 1]
  assert np.isfinite(step["train/loss"]) and step["train/gradient_norm"] > 0
  # The answer bank gives even the random model's states values, and its traces credit.
  assert step["credit/covered_states"] == 1.0 and 0 < step["credit/initial_value"] < 1
  assert step["credit/dropped_completions"] == 0
  (batch,) = seen["batches"]
  assert np.abs(batch.advantages[batch.mask]).max() > 0
  experiment = Experiment(config)
  task, codec = experiment.train_task, experiment.codec
  prompts = {codec.decode(row[kept]) for row, kept in zip(batch.prompt_tokens, batch.prompt_mask)}
  assert prompts <= {f"{example.question}<think>" for example in task} and len(prompts) == 4
  assert all("\nAnswer with a number.<think>" in prompt for prompt in prompts)


def test_evaluating_what_was_trained(trained, tmp_path, monkeypatch):
  config, workdir, seen = trained
  before, _, after = seen["rollouts"]
  again = {"rollouts": [], "batches": [], "decoded": set(), "encoded": []}
  watch(monkeypatch, again)
  figures = evaluate.run(config, workdir, samples=2, output=tmp_path / "results.json")
  last = records.read_metrics(workdir / "metrics.jsonl")[-1]
  assert last["step"] == 1
  # The same key, samples and rows: the traces of the run's own last evaluation, and not of its first.
  (rollout,) = again["rollouts"]
  np.testing.assert_array_equal(rollout.tokens, after.tokens)
  assert (rollout.tokens != before.tokens).any()
  assert figures["k"]["1"]["pass"] == last["eval/pass@1"] and figures["k"]["2"]["pass"] == last["eval/pass@2"]
  assert figures["length"] == pytest.approx(last["eval/length"], abs=0.01)
  assert figures["truncated"] == pytest.approx(last["eval/truncated"], abs=1e-6)
  settings = json.loads((tmp_path / "results.json").read_text())["settings"]
  assert settings["params"] == str(workdir) and settings["step"] == 1
  assert settings["task"]["split"] == "eval" and settings["task"]["name"] == "dataset/gsm8k"


def test_evaluate_restores_the_run_and_not_its_start(trained):
  config, workdir, _ = trained
  _, start = huggingface.load(config.initial_params)
  step, params = Experiment(config).restore_params(workdir)
  assert step == 1
  moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), start, params)
  # One step of Adam moves what has a gradient by the learning rate.
  assert all(x == pytest.approx(config.optimizer.learning_rate, rel=0.1) for x in jax.tree.leaves(moved))


def test_the_ids_trained_on_are_the_ids_sampled(trained):
  """Tokens in, tokens out: decoding a trace and encoding it again would train on other actions than were taken."""
  config, _, seen = trained
  # Evaluation, the training step, evaluation.
  rollout, (batch,) = seen["rollouts"][1], seen["batches"]
  assert rollout.tokens.shape == (4 * GROUP, TRACE_TOKENS)
  for name in ("prompt_tokens", "prompt_mask", "tokens", "mask"):
    np.testing.assert_array_equal(getattr(batch, name), getattr(rollout, name))
  np.testing.assert_array_equal(batch.old_log_probs, rollout.log_probs)
  # The test can fail: this policy writes what the tokenizer would not.
  codec = Experiment(config).codec
  rows = [row[kept].tolist() for row, kept in zip(rollout.tokens, rollout.mask)]
  again = [codec.tokenizer.encode(codec.decode(row), add_special_tokens=False) for row in rows]
  assert all(row != other for row, other in zip(rows, again))


def test_nothing_decoded_is_encoded_again(trained):
  *_, seen = trained
  assert len(seen["decoded"]) >= 3 * 8 and len(seen["encoded"]) > 8
  for text in filter(None, map(str.strip, seen["encoded"])):
    if len(text) > 8:  # A shorter piece of a reference may stand in a random trace by chance.
      assert not any(text in decoded for decoded in seen["decoded"]), text
