"""Calibrated values in training: a trace's own return never enters them, and what was learnt is resumed."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from helpers import run, saved_params, untimed

from rredcot_jax.credit import calibrated
from rredcot_jax.ops import values

B, K, GROUP = 6, 4, 2


def case(seed=0):
  rng = np.random.default_rng(seed)
  log_p = rng.normal(-6, 3, (B, K)).astype(np.float32)
  features = rng.random((B, K, 1)).astype(np.float32)
  mask = np.arange(K) < rng.integers(1, K + 1, B)[:, None]
  return log_p, features, rng.integers(0, 2, B).astype(np.float32), mask


def step(pairs, log_p, features, returns, mask):
  return jax.jit(calibrated.calibrated_values, static_argnames="group_size")(
    pairs, log_p, features, returns, mask, group_size=GROUP
  )


def test_the_first_batch_is_calibrated_by_its_other_groups_alone():
  log_p, features, returns, mask = case()
  found, _ = step(calibrated.no_pairs(50), log_p, features, returns, mask)
  expected = values.cross_fit(log_p, features, returns, mask, group_size=GROUP)
  np.testing.assert_allclose(np.asarray(found)[mask], np.asarray(expected)[mask], rtol=1e-4)
  assert np.ptp(np.asarray(found)[mask]) > 0.05


def test_earlier_batches_count_as_other_groups():
  old, new = case(1), case(2)
  _, pairs = step(calibrated.no_pairs(50), *old)
  found, _ = step(pairs, *new)
  expected = values.cross_fit(*(np.concatenate(both) for both in zip(new, old)), group_size=GROUP)[:B]
  np.testing.assert_allclose(np.asarray(found)[new[3]], np.asarray(expected)[new[3]], rtol=1e-3)
  alone, _ = step(calibrated.no_pairs(50), *new)
  assert np.abs(np.asarray(found) - alone)[new[3]].max() > 0.02


def test_no_return_of_a_traces_own_group_enters_its_values():
  _, pairs = step(calibrated.no_pairs(50), *case(1))
  log_p, features, returns, mask = case(2)
  found, _ = step(pairs, log_p, features, returns, mask)
  for changed in ([1 - returns[2], returns[3]], returns[3:1:-1], [np.nan, 0.5]):
    other = returns.copy()
    other[2:4] = changed
    after, kept = step(pairs, log_p, features, other, mask)
    np.testing.assert_array_equal(after[2:4], found[2:4])
    np.testing.assert_array_equal(np.asarray(kept.used)[2 * K : 3 * K], mask[2] & np.isfinite(other[2]))
  other[:2] = 1 - returns[:2]
  assert np.abs(np.asarray(step(pairs, log_p, features, other, mask)[0] - found))[2:4][mask[2:4]].max() > 1e-3


def test_the_newest_pairs_are_kept():
  _, pairs = step(calibrated.no_pairs(B * K + 5), *case(1))
  log_p, _, returns, mask = case(2)
  _, pairs = step(pairs, *case(2))
  np.testing.assert_array_equal(pairs.log_p, np.append(log_p.ravel(), case(1)[0].ravel()[:5]))
  np.testing.assert_array_equal(pairs.returns[: B * K], np.repeat(returns, K))
  np.testing.assert_array_equal(pairs.used, np.append(mask.ravel(), case(1)[3].ravel()[:5]))
  # A window that is smaller than a batch keeps a part of the batch.
  _, few = step(calibrated.no_pairs(3), log_p, *case(2)[1:])
  np.testing.assert_array_equal(few.log_p, log_p.ravel()[:3])


def test_what_is_masked_is_not_read():
  log_p, features, returns, mask = case()
  found, _ = step(calibrated.no_pairs(9), log_p, features, returns, mask)
  dirty = np.where(mask, log_p, -np.inf), np.where(mask[..., None], features, 1e6)
  other, _ = step(calibrated.no_pairs(9), *dirty, returns, mask)
  np.testing.assert_array_equal(np.asarray(other)[mask], np.asarray(found)[mask])


def test_a_run_resumes_with_its_pairs_bit_for_bit(tmp_path):
  config = tiny_config.get_config("grpo")
  config.initial_params, config.tokenizer.path = "", "chain"
  config.model.update({"width": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "mlp_width": 16})
  config.rollout.max_tokens, config.num_steps, config.evaluation.num_prompts = 16, 4, 4
  config.evaluation.samples, config.evaluation.rows = 1, 4
  config.credit.update({"source": "calibrated", "mode": "difference", "bank": "answer"})
  config.credit.options.window = 300
  whole = untimed(run(config, tmp_path / "whole"))
  shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
  shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "4")
  between, _ = saved_params(tmp_path / "resumed", 2, config)
  assert untimed(run(config, tmp_path / "resumed")) == whole
  (ours, data), (theirs, expected) = (saved_params(tmp_path / name, 4, config) for name in ("resumed", "whole"))
  assert data == expected
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  # The pairs are in the checkpoint, and more of them after more steps.
  assert 0 < between.learnt.used.sum() < ours.learnt.used.sum() <= 300
  assert np.asarray(ours.learnt.log_p)[np.asarray(ours.learnt.used)].max() < 0


def test_what_has_no_meaning_is_refused():
  with pytest.raises(ValueError, match=r"credit.form='power' with credit.source='calibrated'"):
    calibrated.Calibrated.check("difference", calibrated.source.BankOptions(form="power"), {})
  with pytest.raises(ValueError, match=r"credit.options.window=0 must be at least 1"):
    calibrated.Calibrated(calibrated.source.Setting(None, None, None, 2, {}), window=0)
  assert jnp.isfinite(calibrated.no_pairs(2).log_p).all()
