"""The examples run, train, and credit tokens of a trace differently; the one for Tunix is in tunix_test.py."""

import ast
import json
import pathlib
import sys

import jax
import minimal_grpo
import numpy as np
import pytest

import rredcot_jax

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def trained():
  return minimal_grpo.train(steps=3)


def test_the_minimal_trainer_moves_every_parameter(trained):
  before, after = (jax.tree.leaves(tree) for tree in (minimal_grpo.START, trained[0]))
  assert len(before) == len(after) > 10
  assert all(np.abs(old - new).max() > 1e-6 for old, new in zip(before, after))


def test_its_advantages_differ_within_a_trace_and_are_what_the_return_leaves(trained):
  _, _, mask, advantages = trained
  mask, advantages = np.asarray(mask), np.asarray(advantages)
  assert np.all(advantages[~mask] == 0)
  spread = [np.ptp(row[real]) for row, real in zip(advantages, mask)]
  assert np.max(spread) > 0.05 and np.mean(np.array(spread) > 1e-4) > 0.1


def test_the_minimal_trainer_says_what_it_has_learnt(monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["minimal_grpo.py", "--steps", "2"])
  minimal_grpo.main()
  figures = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert figures.keys() == {"first_reward", "last_reward", "steps", "seconds"} and figures["steps"] == 2
  assert 0 < figures["first_reward"] < 0.5


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_uses_the_public_library_alone(path):
  tree = ast.parse(path.read_text(encoding="utf-8"))
  names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
  names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
  ours = {name for name in names if name.split(".")[0] == "rredcot_jax"}
  assert "rredcot_jax" in ours and ours <= {"rredcot_jax", f"rredcot_jax.integrations.{path.stem.split('_')[0]}"}
  used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "rr"}
  assert used <= set(rredcot_jax.__all__)
