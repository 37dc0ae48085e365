"""RREDCoT with calibrated values: what a likelihood is worth as a probability of success, learnt from earlier traces.

    v(s) = sigmoid(a + b log p(s) + c log(1 + tokens of the trace before s))     [C]

The raw likelihood of a few references is far below the value of a state where other solutions are
right too. The pairs (state, return of its trace) of the run have v(s) as their conditional mean, so a
logistic regression on them estimates it (`ops.values.fit_calibration`). The pairs are those of the last batches,
kept in the train state, and of the other groups of this batch. A trace's own group never enters
its values, so a value stays a function of the state. Nothing is generated.

What is biased: one sigmoid for all states is a model, and the older pairs are of older policies.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rredcot_jax.credit import likelihood, source
from rredcot_jax.model import decoder, scoring
from rredcot_jax.ops import composition, types, values
from rredcot_jax.parallel import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
  """The newest pairs (state, return of its trace), newest first; part of the train state."""

  log_p: chex.Array  # [W] float32, nats.
  features: chex.Array  # [W, 1] float32.
  returns: chex.Array  # [W] float32.
  used: chex.Array  # [W] bool, False where there is none yet.


def features_of(segments: types.Segments) -> chex.Array:
  """[..., K, 1] float32, log(1 + tokens of the trace before the state)."""
  return jnp.log1p(segments.starts.astype(jnp.float32))[..., None]


def no_pairs(window: int) -> Pairs:
  """Room for `window` pairs."""
  zeros = jnp.zeros(window, jnp.float32)
  return Pairs(zeros, zeros[:, None], zeros, jnp.zeros(window, bool))


def calibrated_values(
  pairs: Pairs, log_p: chex.Array, features: chex.Array, returns: chex.Array, mask: chex.Array, *, group_size: int
) -> tuple[chex.Array, Pairs]:
  """Values of a batch by a fit on earlier pairs and on its other groups, and the pairs for the next batch.

  Args:
    pairs: of earlier batches; [W].
    log_p, features, returns, mask: [B, K], [B, K, 1], [B], [B, K]; see `values.cross_fit`.
    group_size: static.

  Returns:
    [B, K] float32 in [0, 1], and Pairs.
  """
  batch, states = log_p.shape
  now = Pairs(
    log_p.reshape(-1), features.reshape(-1, 1), jnp.repeat(returns.astype(jnp.float32), states),
    jnp.logical_and(mask, jnp.isfinite(returns)[:, None]).reshape(-1),
  )  # fmt: skip
  both = jax.tree.map(lambda new, old: jnp.concatenate([new, old]), now, pairs)
  block = group_size * states
  group_of = jnp.arange(both.used.shape[0]) // block  # The earlier pairs are of groups that are not valued here.

  def of_group(group: chex.Array) -> chex.Array:
    others = jnp.logical_and(both.used, group_of != group)
    coefficients = values.fit_calibration(both.log_p[:, None], both.features[:, None], both.returns, others[:, None])
    take = lambda x: jax.lax.dynamic_slice_in_dim(x, group * block, block)
    return values.calibrate(take(both.log_p), coefficients, take(both.features))

  fitted = jax.lax.map(of_group, jnp.arange(batch // group_size))
  return fitted.reshape(batch, states), jax.tree.map(lambda x: x[: pairs.used.shape[0]], both)


class Calibrated(likelihood.Likelihood):
  """Values of states by scoring a bank, calibrated with the returns of other traces."""

  name = "calibrated"
  needs = frozenset({"bank", "cache", "state"})

  def __init__(self, setting: source.Setting, *, window: int = 2048):
    """
    Args:
      setting: see `source.Setting`.
      window: pairs (state, return) of earlier batches that are kept.
    """
    super().__init__(setting)
    if window < 1:
      raise ValueError(f"credit.options.window={window} must be at least 1: it is a number of pairs that are kept.")
    self._window = window
    replicated = None if setting.mesh is None else sharding.replicated(setting.mesh)
    self._with_pairs = jax.jit(self._calibrated, out_shardings=(None, None, replicated))

  @classmethod
  def check(cls, mode: str, bank: source.BankOptions, options: Mapping[str, Any]) -> None:
    """See `Source.check`."""
    super().check(mode, bank, options)
    if bank.form != "plain":
      raise ValueError(
        f"credit.form={bank.form!r} with credit.source='calibrated': it calibrates the plain likelihood; "
        "set credit.form='plain'."
      )

  def init_state(self) -> Pairs:
    """Room for pairs, without any."""
    return no_pairs(self._window)

  def _calibrated(
    self,
    params: decoder.Params,
    pairs: Pairs,
    cache: decoder.Cache,
    rollout: types.Rollout,
    segments: types.Segments,
    bank: types.Completions,
    returns: chex.Array,
  ) -> tuple[chex.Array, chex.Array, Pairs]:
    setting = self.setting
    log_p = scoring.score_with_cache(
      params, setting.model, cache, rollout, segments, bank, temperature=setting.temperature,
      chunk_size=setting.chunk_size,
    )  # fmt: skip
    of_states = jax.vmap(values.log_likelihoods)(log_p, bank.utilities, bank.log_q, bank.valid)
    scored = jnp.logical_and(segments.mask, jnp.any(bank.valid, axis=-1))
    fitted, kept = calibrated_values(
      pairs, of_states, features_of(segments), returns, scored, group_size=setting.group_size
    )
    plain, sizes = composition.values_from_log_probs(log_p, bank, segments, returns)
    return jnp.where(scored, fitted, plain), sizes, kept

  def _run(
    self, batch: source.Batch, bank: types.Completions, returns: chex.Array
  ) -> tuple[chex.Array, chex.Array, Pairs]:
    if batch.state is None:
      raise ValueError("credit.source='calibrated' needs its pairs of earlier batches, which live in the train state.")
    return self._with_pairs(batch.params, batch.state, batch.cache, batch.rollout, batch.segments, bank, returns)
