"""A configuration as objects: the task, the model, the meshes, the compiled steps and the source of credit.

Every script and tool builds one `Experiment` and takes from it what it needs. Each part is made when
it is first asked for, so that a tool which only samples makes no optimizer.
"""

import dataclasses
import functools
import inspect
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from absl import logging
from ml_collections import ConfigDict

from rredcot_jax.credit import source
from rredcot_jax.credit.assigner import Assigner, Rule
from rredcot_jax.credit.sources import source_class
from rredcot_jax.data import tasks
from rredcot_jax.data.encoding import Codec, Layout
from rredcot_jax.model import decoder, tokenizer
from rredcot_jax.model.config import Compute, ModelConfig, RopeScaling
from rredcot_jax.ops.names import check_option
from rredcot_jax.parallel import processes, sharding
from rredcot_jax.train import checkpoint, differences, fingerprints, initial, train_step, validation
from rredcot_jax.train import config as config_lib
from rredcot_jax.train import workdir as workdir_lib


class Experiment:
  """The parts of a configuration; see the module's docstring."""

  def __init__(self, config: ConfigDict, *, devices: Sequence[Any] | None = None):
    """Checks `config`, and makes nothing yet.

    Args:
      config: as `train.config.default_config` lays it out.
      devices: of the meshes; None is all.

    Raises:
      ValueError: see `validation.validate`.
    """
    validation.validate(config)
    self.config, self._devices = config, devices

  # ---- Task and text -----------------------------------------------------------------------

  @functools.cached_property
  def codec(self) -> Codec:
    """The model's tokenizer.

    Raises:
      ValueError: if there is none, or if it is not the checkpoint's.
    """
    options = self.config.tokenizer
    # A warm start writes initial_params. Before it has run, the checkpoint that it starts from is used.
    starts = [path for path in (self.config.initial_params, self.config.warm_start.initial_params) if path]
    beside = (tokenizer.find(initial.locate(start)) for start in starts)
    path = initial.locate(options.path) if options.path else next(filter(None, beside), None)
    if path is None:
      raise ValueError(
        f"there is no tokenizer beside initial_params={self.config.initial_params!r}: set tokenizer.path to a "
        "directory with tokenizer.json, to a .gguf file, or to a name under rredcot_jax/assets."
      )
    loaded = tokenizer.load_tokenizer(path)
    wanted = self.config.model.vocab_size
    if wanted and len(loaded) > wanted:
      raise ValueError(
        f"the tokenizer in {str(path)!r} has {len(loaded)} ids and config.model.vocab_size is {wanted}: they do not "
        "belong together."
      )
    for start in starts if options.path else ():
      tokenizer.check_fits(loaded, initial.locate(start), wanted or len(loaded))
    layout = Layout(**{name: text for name, text in self.config.response.to_dict().items() if text})
    return Codec(loaded, chat=options.chat, layout=layout, end_ids=tokenizer.end_ids(loaded, path))

  @functools.cached_property
  def train_task(self) -> tasks.Task:
    """The training split."""
    return tasks.make_task(**self.task_options("train"))

  @functools.cached_property
  def held_out(self) -> tasks.Task:
    """What is held out."""
    return tasks.make_task(**self.task_options("eval"))

  def task_options(self, split: str) -> dict[str, Any]:
    """Keyword arguments of `tasks.make_task` for "train" or "eval"."""
    config = self.config
    task = config.evaluation.task if split == "eval" and config.evaluation.task.name else config.task
    return {"name": task.name, "split": split, **task.options.to_dict()}

  def fingerprints(self, splits: Sequence[str] = ("train", "eval"), *, start: str | None = None) -> dict[str, str]:
    """Hashes of what a run is made from, by name: a path in the configuration does not say what lies there.

    "code", "own code" (packages that the configuration names), "tokenizer" (with its chat template), "ends"
    (the ids that end a trace), "start" (the starting parameters), and "train" and "eval" (the rows of a task
    that has a `fingerprint`). What there is none of is left out.

    Args:
      splits: whose rows are hashed.
      start: the path of the starting parameters; None is `initial_params`.
    """
    start = self.config.initial_params if start is None else start
    prints = {"code": fingerprints.of_code(), **self._text_fingerprints}
    own_code = fingerprints.of_own_code(self.config)
    if own_code:
      prints["own code"] = own_code
    if start:
      prints["start"] = fingerprints.of_files([initial.locate(start)])
    for split in splits:
      task = self.train_task if split == "train" else self.held_out
      if hasattr(task, "fingerprint"):
        prints[split] = task.fingerprint
    return prints

  @property
  def _text_fingerprints(self) -> dict[str, str]:
    """Of the tokenizer and of what ends a trace."""
    loaded = self.codec.tokenizer
    described = [loaded.backend_tokenizer.to_str(), loaded.chat_template if self.codec.chat else None]
    hash_of = fingerprints.of_values
    return {"tokenizer": hash_of(described), "ends": hash_of(self.codec.end_ids)}

  # ---- Model and meshes --------------------------------------------------------------------

  @functools.cached_property
  def model(self) -> ModelConfig:
    """The decoder's sizes, with the tokenizer's vocabulary where the configuration names none."""
    return model_config(self.config, self.config.model.vocab_size or self.codec.vocab_size)

  @functools.cached_property
  def mesh(self) -> jax.sharding.Mesh:
    """The layout of training."""
    return sharding.make_mesh(**self.config.mesh, devices=self._devices)

  @functools.cached_property
  def rollout_mesh(self) -> jax.sharding.Mesh:
    """The layout of rollouts: that of training where `rollout_mesh` says nothing."""
    return sharding.relayout(self.mesh, **self.config.rollout_mesh)

  @functools.cached_property
  def rows(self) -> processes.Rows:
    """The rows of a step as this process sees them.

    Raises:
      ValueError: if they do not split over the layout of training or over that of rollouts.
    """
    prompts, group_size = self.config.rollout.prompts_per_step, self.config.rollout.group_size
    sharding.check_rows(self.mesh, prompts * group_size)
    return processes.rows_of(self.rollout_mesh, prompts * group_size, group_size=group_size)

  # ---- Training ----------------------------------------------------------------------------

  @functools.cached_property
  def optimizer(self) -> optax.GradientTransformation:
    """AdamW with the configured schedule."""
    return train_step.make_optimizer(**optimizer_options(self.config))

  def init_state(self, params: Any) -> train_step.TrainState:
    """The train state before the first update."""
    learnt = None if self.source is None else self.source.init_state()
    return train_step.init_state(params, self.optimizer, learnt)

  @functools.cached_property
  def abstract_state(self) -> train_step.TrainState:
    """The train state's shapes and dtypes, each with its placement."""
    return self._abstract(self.init_state)

  @functools.cached_property
  def abstract_params_state(self) -> train_step.TrainState:
    """`abstract_state` without what the source of credit learns, so that no task is made."""
    return self._abstract(lambda params: train_step.init_state(params, self.optimizer))

  def _abstract(self, init_state: Callable[[Any], train_step.TrainState]) -> train_step.TrainState:
    shapes = jax.eval_shape(lambda: init_state(decoder.init(self.model, jax.random.key(0))))
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(place, shapes, sharding.infer(self.mesh, shapes))

  @property
  def placement(self) -> Any:
    """The train state's shardings."""
    return jax.tree.map(lambda x: x.sharding, self.abstract_state)

  def start_params(self, key: jax.Array, path: str | None = None) -> Any:
    """The parameters that `initial_params` names (or `path`), placed on the mesh."""
    path = self.config.initial_params if path is None else path
    return initial.start_params(path, self.model, self.mesh, key)

  def restore_params(self, workdir: pathlib.Path) -> tuple[int, Any]:
    """The newest checkpoint of the run in `workdir`: its step, and its parameters on this experiment's mesh.

    Raises:
      ValueError: if there is none, or if its model is not this one, naming the sizes that differ.
    """
    read = workdir_lib.read(workdir)
    held, begun_with = ConfigDict(read["config"]), read.get("fingerprints", {})
    config_lib.fill_in(held, config_lib.default_config())
    changed = [name for name, now in self._text_fingerprints.items() if begun_with.get(name, now) != now]
    if changed:
      logging.warning(
        "changed since the run in %s was trained: %s. Its ids may mean other tokens here.",
        workdir,
        " and ".join(changed),
      )
    held.mesh, held.rollout_mesh = self.config.mesh, self.config.rollout_mesh
    try:
      trained = Experiment(held, devices=self._devices)
    except (KeyError, AttributeError, TypeError) as error:
      raise ValueError(f"the config.json of {workdir} is not that of a run of this version: {error}") from error
    differing = differences.differences(trained.model.sizes(), self.model.sizes())
    if differing:
      raise ValueError(f"the run in {workdir} trained another model than config.model says: {', '.join(differing)}.")
    saver = checkpoint.Checkpointer(workdir / "checkpoints", writes=False)
    restored = saver.restore_latest(trained.abstract_state)
    saver.close()
    if restored is None:
      raise ValueError(f"{workdir} holds no checkpoint yet.")
    return restored[0], restored[1].params

  @functools.cached_property
  def rollout_steps(self) -> train_step.RolloutSteps:
    """The compiled arrows from parameters to segments."""
    return train_step.compile_rollouts(
      self.model, self.mesh, self.rollout_mesh, self.codec, segmentation_options=self.config.segmentation.to_dict(),
      sampling_options=self.sampling_options,
    )  # fmt: skip

  @functools.cached_property
  def update_steps(self) -> train_step.UpdateSteps:
    """The compiled arrows from credited traces to the next state."""
    config = self.config
    return train_step.compile_updates(
      self.model, self.optimizer, self.placement, self.mesh, temperature=config.rollout.temperature,
      loss_options=loss_options(config), microbatches=config.compute.microbatches,
      length_buckets=config.compute.length_buckets, skip_non_finite=config.loss.non_finite == "skip",
    )  # fmt: skip

  # ---- Rollouts and credit -----------------------------------------------------------------

  @property
  def sampling_options(self) -> dict[str, Any]:
    """max_tokens, temperature, top_k and top_p of a rollout."""
    return sampling_options(self.config)

  @property
  def generation_options(self) -> dict[str, Any]:
    """Keyword arguments of `sampling.sample`."""
    return self.sampling_options | {"eos_id": self.codec.end_ids, "pad_id": self.codec.pad_id}

  @functools.cached_property
  def setting(self) -> source.Setting:
    """What sources of credit are bound to."""
    return self.setting_of(self.train_task)

  def setting_of(self, task: tasks.Task) -> source.Setting:
    """`setting` with another task's verifier."""
    return source.Setting(
      model=self.model, task=task, codec=self.codec, group_size=self.config.rollout.group_size,
      sampling=self.sampling_options, bank=validation.bank_options(self.config),
      chunk_size=self.config.credit.chunk_size or None, mesh=self.rollout_mesh,
    )  # fmt: skip

  @functools.cached_property
  def rule(self) -> Rule:
    """How credit becomes advantages."""
    return credit_rule(self.config)

  @functools.cached_property
  def source(self) -> source.Source | None:
    """Where credit comes from; None for GRPO's."""
    return make_source(self.config, self.setting) if self.rule.redistributes else None

  @functools.cached_property
  def assigner(self) -> Assigner:
    """The configured source with the configured rule."""
    return Assigner(self.setting, self.rule, self.source)


def make_source(config: ConfigDict, setting: source.Setting) -> source.Source:
  """The configured source, bound to `setting`.

  Raises:
    ValueError: naming an option that its class does not have, or that it refuses.
  """
  found, options = source_class(config.credit.source), config.credit.options.to_dict()
  known = [name for name in inspect.signature(found.__init__).parameters if name not in ("self", "setting")]
  for name in options:
    if not known:
      raise ValueError(f"credit.options.{name}: credit.source={config.credit.source!r} has no options.")
    check_option(f"credit.options of {config.credit.source!r}", name, known)
  return found(setting, **options)


def model_config(config: ConfigDict, vocab_size: int) -> ModelConfig:
  """The decoder's sizes; `vocab_size` is used where the configuration has none of its own."""
  sizes = config.model.to_dict()
  scaling = sizes.pop("rope_scaling")
  sizes["vocab_size"] = sizes["vocab_size"] or vocab_size
  compute = Compute(**{field.name: config.compute[field.name] for field in dataclasses.fields(Compute)})
  return ModelConfig(
    rope_scaling=None if scaling["kind"] == "none" else RopeScaling(**scaling), compute=compute, **sizes
  )


def credit_rule(config: ConfigDict) -> Rule:
  """How credit becomes advantages."""
  return Rule(
    group_size=config.rollout.group_size, mode=config.credit.mode, initial_value=config.credit.initial_value,
    state_baseline=config.credit.state_baseline, floor=config.credit.floor, baseline=config.advantages.baseline,
    advantage_scale=config.advantages.scale,
  )  # fmt: skip


def sampling_options(config: ConfigDict) -> dict[str, Any]:
  """max_tokens, temperature, top_k and top_p of a rollout."""
  return {name: config.rollout[name] for name in ("max_tokens", "temperature", "top_k", "top_p")}


def optimizer_options(config: ConfigDict) -> dict[str, Any]:
  """Keyword arguments of `train_step.make_optimizer`."""
  options: dict[str, Any] = config.optimizer.to_dict()
  updates = config.num_steps * config.loss.updates_per_rollout
  return {"decay_steps": updates if options.pop("cosine") else None, **options}


def loss_options(config: ConfigDict) -> Mapping[str, Any]:
  """Keyword arguments of `losses.policy_loss`."""
  return {
    "loss": config.loss.name,
    "dual_clip": config.loss.dual_clip or None,
    "max_length": config.rollout.max_tokens,
    **{name: config.loss[name] for name in ("clip_low", "clip_high", "kl", "kl_coefficient")},
  }
