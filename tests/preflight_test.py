"""What is checked before a run: references that earn 1, and prompts that fit."""

import dataclasses

import numpy as np
import pytest

from rredcot_jax.data import verifiers
from rredcot_jax.data.chain import Chain
from rredcot_jax.data.encoding import Codec, Layout
from rredcot_jax.data.tasks import Example
from rredcot_jax.model.tokenizer import load_tokenizer
from rredcot_jax.train import initial, preflight


class Sums:
  """Questions of 3, 5, 7, ... tokens."""

  name = "sums"

  def __init__(self, size, answer="0"):
    self._size, self._answer = size, answer

  def __len__(self):
    return self._size

  def __getitem__(self, index):
    return Example("0" + "+0" * (index + 1), (), self._answer)

  def reward(self, example, text):
    return verifiers.exact_match(text, "0")


@pytest.fixture(scope="module")
def codec():
  return Codec(load_tokenizer(initial.locate("chain")))


def test_references_that_earn_one_pass(codec):
  preflight.check_references(Chain(split="train"), codec)
  preflight.check_references(Sums(3), codec)


def test_a_reference_that_its_own_verifier_refuses_is_named(codec):
  with pytest.raises(ValueError, match=r"example 0 of task 'sums'.*earns 0\.0 and not 1.*'</think>7'.*answer is '7'"):
    preflight.check_references(Sums(3, answer="7"), codec)


def test_a_reference_that_no_policy_could_write_is_named(codec):
  newline = codec.tokenizer.encode("\n", add_special_tokens=False)[0]
  early = dataclasses.replace(codec, end_ids=(codec.eos_id, newline))
  with pytest.raises(
    ValueError, match=rf"example 0 of task 'chain': its reference holds the token '\\n', id {newline}, "
  ):
    preflight.check_references(Chain(split="train"), early)


def test_a_layout_that_the_verifier_does_not_read_is_named(codec):
  wrong = dataclasses.replace(codec, layout=Layout(answer="=%s"))
  with pytest.raises(ValueError, match=r"'</think>=0'"):
    preflight.check_references(Sums(3), wrong)


def test_a_task_without_references_passes(codec):
  preflight.check_references(Sums(3, answer=""), codec)


# The marker that opens the thought is a token too.
def test_prompts_that_fit_need_no_choice(codec):
  assert preflight.usable_prompts(Sums(3), codec, 8, "refuse") is None
  assert preflight.usable_prompts(Sums(3), codec, 8, "skip") is None


def test_a_prompt_that_does_not_fit_is_named_or_left_out(codec):
  with pytest.raises(
    ValueError, match=r"2 of 4 prompts of task 'sums'.*=7 .*longest has 10, example 3: '0\+0\+0\+0\+0'"
  ):
    preflight.usable_prompts(Sums(4), codec, 7, "refuse")
  np.testing.assert_array_equal(preflight.usable_prompts(Sums(4), codec, 7, "skip"), [0, 1])


def test_no_prompt_that_fits_is_refused(codec):
  with pytest.raises(ValueError, match="none is left"):
    preflight.usable_prompts(Sums(4), codec, 3, "skip")


def test_a_held_out_prompt_that_does_not_fit_is_named_if_it_is_evaluated(codec):
  preflight.check_held_out(Sums(4), codec, 8, 3)
  preflight.check_held_out(Sums(3), codec, 8, 9)
  with pytest.raises(ValueError, match=r"1 of 4 prompts.*longest has 10, example 3.*Held-out prompts are not left out"):
    preflight.check_held_out(Sums(4), codec, 8, 4)


def test_a_long_task_is_sampled_to_its_ends_unless_prompts_are_skipped(codec, monkeypatch):
  monkeypatch.setattr(preflight, "_ALL_PROMPTS", 5)
  monkeypatch.setattr(preflight, "_SAMPLED_PROMPTS", 2)
  # The longest prompt is the last one, which is always measured.
  with pytest.raises(ValueError, match="1 of 2 prompts"):
    preflight.usable_prompts(Sums(6), codec, 7, "refuse")
  np.testing.assert_array_equal(preflight.usable_prompts(Sums(6), codec, 7, "skip"), [0, 1])
