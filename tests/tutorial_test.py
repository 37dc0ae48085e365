"""docs/tutorial.md and docs/thinking.md, block after block: what they assert must hold, and print must be there."""

import json
import pathlib
import re

import jax
import make_notebook
import pytest

TUTORIAL = pathlib.Path(__file__).parent.parent / "docs" / "tutorial.md"
NOTEBOOK = TUTORIAL.with_suffix(".ipynb")


@pytest.fixture
def one_device(monkeypatch):
  """A reader's laptop: the four fake devices of the other tests would split the group."""
  one = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda *args: one)
  monkeypatch.chdir(TUTORIAL.parent.parent)


def run_blocks(page: pathlib.Path, at_least: int) -> dict:
  """Runs a page's blocks one after the other; what they define."""
  blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
  assert len(blocks) >= at_least
  scope: dict = {}
  with jax.numpy_rank_promotion("allow"):  # As a reader's interpreter has it.
    for number, block in enumerate(blocks):
      exec(compile(block, f"docs/{page.name}, block {number + 1}", "exec"), scope)
  return scope


def test_the_tutorial_runs_as_written(one_device, capsys):
  scope = run_blocks(TUTORIAL, at_least=9)
  assert 0 < scope["returns"].mean() < 1
  shown = capsys.readouterr().out
  assert "reference answer" in shown and "r_k" in shown
  # The failed trace's most negative reward falls on its first wrong line, as the text claims.
  record = scope["record"]
  rollout, segments, row = scope["rollout"], scope["segments"], scope["row"]
  cuts = [int(t) for t in segments.starts[row][: int(segments.num_segments[row])]]
  assert record["entropies"] == pytest.approx([float(rollout.entropy[row, t]) for t in cuts])
  assert min(range(len(record["rewards"])), key=record["rewards"].__getitem__) == record["first_wrong_segment"]


def test_the_thinking_trace_runs_as_written(one_device, capsys):
  scope = run_blocks(TUTORIAL.with_name("thinking.md"), at_least=6)
  row, last, segments = scope["row"], scope["last"], scope["segments"]
  # Every state has the three references, the one before the exit too; there is none behind it.
  assert scope["bank"].valid[row].sum(axis=-1).tolist() == [3] * (last + 1) + [0] * (11 - last)
  assert abs(float(scope["credit"].rewards[row].sum() - (0 - scope["calibrated"][row, 0]))) < 1e-5
  # The blame falls on the line that the task calls the first wrong one, as the text claims.
  example, text = scope["examples"][row], scope["codec"].responses(scope["on_host"])[row]
  wrong = scope["task"].first_wrong_step(example, text)
  assert int(scope["credit"].rewards[row, : last + 1].argmin()) == wrong and int(segments.num_segments[row]) == last + 1
  assert capsys.readouterr().out.count("</think>") >= 4


def test_the_notebook_has_the_tutorials_cells_and_their_outputs():
  """Its code is run by the test above, because it is the page's."""
  cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
  held = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
  assert held == make_notebook.cells_of(TUTORIAL.read_text(encoding="utf-8")), "run make notebook"
  assert len({cell["id"] for cell in cells}) == len(cells)
  code = [cell for cell in cells if cell["cell_type"] == "code"]
  assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
  outputs = [output for cell in code for output in cell["outputs"]]
  assert [output["output_type"] for output in outputs] == ["stream", "display_data"]
  assert "first wrong step" in "".join(outputs[0]["text"]) and outputs[1]["data"]["image/png"].startswith("iVBOR")


def test_cells_are_run_as_a_notebook_runs_them():
  scope = {}
  page = "# One\n\n```python\nx = 2\nprint(x)\n```\ntext\n```python\nx + 1\n```\n"
  cells = make_notebook.notebook_of(page)["cells"]
  assert [cell["cell_type"] for cell in cells] == ["markdown", "code", "markdown", "code"]
  assert cells[1]["outputs"] == [{"output_type": "stream", "name": "stdout", "text": ["2\n"]}]
  assert cells[3]["outputs"] == [{"output_type": "display_data", "metadata": {}, "data": {"text/plain": ["3"]}}]
  with pytest.raises(ZeroDivisionError):
    make_notebook.outputs_of("1 / 0", scope, "cell")
