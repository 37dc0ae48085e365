"""RREDCoT: state values from the likelihood of completions, without generating anything.

    segments, bank -> log p(c | s) -> v(s) -> r

See `model.scoring` for the scores and `ops.values` for the values.
"""

from collections.abc import Mapping
from typing import Any

import chex
import jax

from rredcot_jax.cost import flops
from rredcot_jax.credit import source
from rredcot_jax.model import decoder, scoring
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.ops import composition, types

WITH_FAILURES = ("rollouts", "own")  # Banks that can hold completions of zero utility.


def bank_values(
  params: decoder.Params,
  model: ModelConfig,
  cache: decoder.Cache,
  rollout: types.Rollout,
  segments: types.Segments,
  bank: types.Completions,
  returns: chex.Array,
  *,
  temperature: float,
  form: str,
  chunk_size: int | None,
) -> tuple[chex.Array, chex.Array]:
  """v(s_k) of every state from a bank of completions, and the effective sample sizes behind them.

  Args:
    params, model, cache: the policy that sampled, and the traces' keys and values.
    rollout, segments, bank: fields [B, ...].
    returns: [B] float32; see `composition.values_from_log_probs`.
    temperature: that the traces were sampled at.
    form: of `values.estimate_values`.
    chunk_size: branches of a trace scored at once; None is all.

  Returns:
    [B, K] float32 each.
  """
  log_p = scoring.score_with_cache(
    params, model, cache, rollout, segments, bank, temperature=temperature, chunk_size=chunk_size
  )
  return composition.values_from_log_probs(log_p, bank, segments, returns, form=form)


class Likelihood(source.Source):
  """Values of states by scoring a bank of completions after each (arXiv 2606.06475)."""

  name = "scoring"
  needs = frozenset({"bank", "cache"})
  estimates_values = True

  def __init__(self, setting: source.Setting):
    super().__init__(setting)
    self._estimate = jax.jit(self._values)

  @classmethod
  def check(cls, mode: str, bank: source.BankOptions, options: Mapping[str, Any]) -> None:
    """See `Source.check`."""
    super().check(mode, bank, options)
    if bank.form == "self_normalised" and bank.name not in WITH_FAILURES:
      raise ValueError(
        f"credit.form='self_normalised' with credit.bank={bank.name!r} gives every state the same value: "
        f"it needs completions of zero utility, which {' and '.join(map(repr, WITH_FAILURES))} have."
      )

  def _values(
    self,
    params: decoder.Params,
    cache: decoder.Cache,
    rollout: types.Rollout,
    segments: types.Segments,
    bank: types.Completions,
    returns: chex.Array,
  ) -> tuple[chex.Array, chex.Array]:
    setting = self.setting
    return bank_values(
      params, setting.model, cache, rollout, segments, bank, returns, temperature=setting.temperature,
      form=setting.bank.form, chunk_size=setting.chunk_size,
    )  # fmt: skip

  def _run(
    self, batch: source.Batch, bank: types.Completions, returns: chex.Array
  ) -> tuple[chex.Array, chex.Array, Any]:
    """Values and sample sizes [B, K] of a batch on devices, and what has been learnt from it."""
    return *self._estimate(batch.params, batch.cache, batch.rollout, batch.segments, bank, returns), None

  def assign(self, batch: source.Batch) -> source.Found:
    """See `Source.assign`."""
    bank = self.setting.make_bank(batch)
    placed = (bank.completions, bank.uniform_rows, batch.returns[batch.rows])
    completions, uniform_rows, returns = self.setting.put(placed)
    estimated, sizes, state = self._run(batch, completions, returns)
    batch_size, states = batch.segments.ends.shape
    _, _, n, s = completions.tokens.shape
    return source.Found(
      values=estimated,
      sample_sizes=sizes,
      uniform_rows=uniform_rows,
      state=state,
      token_forwards=batch_size * states * n * s,
      metrics=source.bank_metrics(self.setting, bank),
    )

  def count_flops(self, batch: source.Batch) -> float:
    """See `Source.count_flops`."""
    completions = self.setting.make_bank(batch).completions
    traces = (batch.cache, batch.rollout, batch.segments)
    return flops.count(self._values, batch.params, *traces, completions, batch.returns)
