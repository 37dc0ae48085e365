"""docs/tutorial.md, block after block: what it asserts must hold, and what it prints must be there."""

import pathlib
import re

import jax
import pytest

TUTORIAL = pathlib.Path(__file__).parent.parent / "docs" / "tutorial.md"


@pytest.fixture
def one_device(monkeypatch):
  """A reader's laptop: the four fake devices of the other tests would split the group."""
  one = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *args: one)
  monkeypatch.chdir(TUTORIAL.parent.parent)


def test_the_tutorial_runs_as_written(one_device, capsys):
  blocks = re.findall(r"```python\n(.*?)```", TUTORIAL.read_text(encoding="utf-8"), re.S)
  with jax.numpy_rank_promotion("allow"):  # As a reader's interpreter has it.
    scope: dict = {}
    for number, block in enumerate(blocks):
      exec(compile(block, f"docs/tutorial.md, block {number + 1}", "exec"), scope)
  assert len(blocks) >= 9 and 0 < scope["returns"].mean() < 1
  shown = capsys.readouterr().out
  assert "reference answer" in shown and "r_k" in shown
  # The failed trace's most negative reward falls on its first wrong line, as the text claims.
  record = scope["record"]
  assert min(range(len(record["rewards"])), key=record["rewards"].__getitem__) == record["first_wrong_segment"]
