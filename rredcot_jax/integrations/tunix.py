"""A GRPO learner for Tunix (google-tunix 0.1.7) whose token advantages are RREDCoT's (arXiv 2606.06475).

Sampling, rewards, the reference model, the loss and the update are Tunix's. The model that sampled scores the
completions, in one forward pass over each trace and its branches (`scoring.score_tree`). docs/start/trainer.md says how
to use it, and lists what Tunix 0.1.7 does that is easily missed. `examples/tunix_grpo.py` trains with it.
"""

import dataclasses
import functools
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import tunix
from flax import nnx
from tunix.rl import rl_cluster as clusters
from tunix.rl.grpo import grpo_learner

import rredcot_jax as rr

SUPPORTED = "0.1.7"
if tunix.__version__ != SUPPORTED:
  raise ImportError(
    f"google-tunix {tunix.__version__} is installed. This learner works with {SUPPORTED} alone, because it overrides "
    f"methods that are not public: pip install google-tunix=={SUPPORTED}"
  )

# Those that attend to what a mask [B, L, L] says, whatever the columns. Gemma's window counts columns.
MODELS = ("qwen2", "qwen3", "llama3")
_ROPE_THETA = 1_000_000


def apply(params: tuple[Any, Any], tokens: chex.Array, positions: chex.Array, mask: chex.Array) -> chex.Array:
  """Logits [M, L, V] of a Tunix model: `scoring.ApplyTree` with `params = nnx.split(model)`."""
  graph, state = params
  return nnx.merge(graph, state)(tokens, positions, None, mask)[0]


def rollout_of(example: Any) -> rr.Rollout:
  """The traces of a Tunix `TrainExample`, each whole up to the last token that its mask counts.

  Args:
    example: of a `GRPOLearner`; prompts [B, P] padded on the left, completions [B, T] on the right.

  Returns:
    Rollout with fields [B, ...]: prompts and tokens with their masks, and `truncated`, True where no room is left.
  """
  counted = jnp.asarray(example.completion_mask, bool)
  mask = jnp.flip(jnp.cumsum(jnp.flip(counted, axis=1), axis=1), axis=1) > 0
  return rr.Rollout(
    prompt_tokens=example.prompt_ids, prompt_mask=example.prompt_mask, tokens=example.completion_ids, mask=mask,
    truncated=mask[:, -1],
  )  # fmt: skip


class RREDCoTLearner(grpo_learner.GRPOLearner):
  """Tunix's `GRPOLearner` with `advantages` [B, T] of `composition.credit_from_log_probs` in the place of its [B].

  Args:
    rl_cluster, algo_config, reward_fns, metric_fns, data_shuffle_seed: of `GRPOLearner`. The sum of the rewards is the
      return R. `metric_fns` are given Tunix's own advantages [B].
    references: called with a batch of the data set, in which every row is there `num_generations` times; gives a
      `Reference` for each of its rows.
    cut: tokens [T], mask [T] -> Segments: `segmentation.segment` with the options of a method that reads tokens alone.
    bank: `name`, `max_tokens` and other options of `banks.make_bank`. `rollouts` raises, because Tunix does not keep
      the log-probabilities of what it sampled.
    credit: `mode` and other options of `composition.credit_from_log_probs`. With a sigma mode the deviation of a
      group is that of `ddof`: ours is 0, Tunix's own is 1.
    chunk_size: of `scoring.score_tree`.

  Raises:
    ValueError: for a model of another family than `MODELS`, and for options of Tunix under which scores would be wrong.
  """

  def __init__(
    self,
    rl_cluster: clusters.RLCluster,
    algo_config: grpo_learner.GRPOConfig,
    reward_fns: Any,
    *,
    references: Callable[[Mapping[str, Any]], Sequence[rr.Reference]],
    cut: Callable[[chex.Array, chex.Array], rr.Segments],
    bank: Mapping[str, Any],
    credit: Mapping[str, Any],
    chunk_size: int | None = None,
    metric_fns: Any = None,
    data_shuffle_seed: int | None = None,
  ):
    _check(rl_cluster)
    super().__init__(rl_cluster, algo_config, reward_fns, metric_fns, data_shuffle_seed)
    self._references, self._bank, self._credit = references, dict(bank), dict(credit)
    self._cut = jax.jit(jax.vmap(cut))
    self._score = jax.jit(functools.partial(rr.score_tree, apply, chunk_size=chunk_size))
    seed = rl_cluster.get_rollout_config(clusters.Mode.TRAIN).seed
    self._key = jax.random.PRNGKey(seed or 0) if seed is None or isinstance(seed, int) else seed
    self._local = threading.local()  # Tunix samples for training in one thread and for evaluation in another.

  def _compute_rewards(self, *args: Any, **kwargs: Any) -> np.ndarray:
    self._local.returns = super()._compute_rewards(*args, **kwargs)
    return self._local.returns

  def _generate_and_compute_advantage(self, training_input: Any, mode: Any = clusters.Mode.TRAIN) -> Any:
    training = mode == clusters.Mode.TRAIN
    step = self._iter_steps if training else self._eval_iter_steps
    config = self.rl_cluster.get_rollout_config(mode)
    config.seed = jax.random.fold_in(jax.random.fold_in(self._key, step), int(training))
    example = super()._generate_and_compute_advantage(training_input, mode)
    return dataclasses.replace(example, advantages=self._advantages(example, training_input, config.temperature, mode))

  def _advantages(self, example: Any, batch: Mapping[str, Any], temperature: float, mode: Any) -> chex.Array:
    """A_t [B, T] float32; what could not be scored is counted in Tunix's metrics."""
    rollout, group_size = rollout_of(example), self.algo_config.num_generations
    returns = jnp.asarray(self._local.returns, jnp.float32)
    segments = self._cut(rollout.tokens, rollout.mask)
    of_host = dict(zip(("rollout", "segments", "returns"), jax.device_get((rollout, segments, returns))))
    bank = rr.make_bank(references=self._references(batch), **of_host, group_size=group_size, **self._bank)
    size = group_size * (self._compute_logps_micro_batch_size or len(returns))
    with self.rl_cluster._get_mesh_and_logical_axis_rules_cm(clusters.Role.ROLLOUT):
      params = nnx.split(self.rl_cluster.rollout.model())
      part = lambda first: jax.tree.map(lambda x: x[first : first + size], (rollout, segments, bank.completions))
      log_p = [self._score(params, *part(i), temperature=temperature) for i in range(0, len(returns), size)]
    credit = rr.credit_from_log_probs(
      jnp.concatenate(log_p), bank.completions, segments, returns, group_size=group_size,
      uniform_rows=bank.uniform_rows, **self._credit,
    )  # fmt: skip
    pads = rollout.mask & ~jnp.asarray(example.completion_mask, bool)
    counts = {"dropped_completions": bank.num_dropped, "uniform_rows": bank.uniform_rows, "sampled_pads": pads}
    self.rl_cluster.buffer_metrics({f"rredcot/{k}": (float(np.sum(x)), np.sum) for k, x in counts.items()}, mode=mode)
    return credit.advantages


def _check(cluster: clusters.RLCluster) -> None:
  """Raises ValueError where scores would be wrong; warns where the model is not what its config says."""
  model, config = cluster.rollout.model(), cluster.cluster_config
  families = [
    name for name in MODELS for kind in type(model).__mro__ if kind.__module__ == f"tunix.models.{name}.model"
  ]
  if not families:
    raise ValueError(
      f"the model that samples is a {type(model).__name__}, and must be one of tunix.models {', '.join(MODELS)}: they "
      "attend to what a mask of queries by keys allows, wherever it stands."
    )
  flash = getattr(model.config, "use_flash_attention", False)
  for name, is_set, why in (
    ("use_flash_attention", flash, "that kernel does not read the mask of a tree"),
    ("max_seq_token_per_tpu", config.training_config.max_seq_token_per_tpu, "packing takes one advantage for a trace"),
    ("offload_to_cpu", config.offload_to_cpu, "the model is needed for scoring after it has sampled"),
  ):
    if is_set:
      raise ValueError(f"{name}={is_set} cannot be used with RREDCoT's credit, because {why}: unset it.")
  if families[0] != "qwen2" and model.config.rope_theta != _ROPE_THETA:
    warnings.warn(
      f"Tunix's {families[0]} computes with rope_theta={_ROPE_THETA} and ignores the {model.config.rope_theta} of its "
      "config: a checkpoint trained with that number is another model here.",
      stacklevel=3,
    )
