"""Makes docs/tutorial.ipynb from docs/tutorial.md: runs its blocks in order and keeps what they print and show.

    JAX_PLATFORMS=cpu python tools/make_notebook.py        # or make notebook

The page is the source: change it, and run this again. tests/tutorial_test.py fails where the two differ.
"""

import ast
import base64
import contextlib
import io
import json
import pathlib
import re
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
_BLOCK = re.compile(r"^```python\n(.*?)\n```$", re.S | re.M)


def cells_of(page: str) -> list[tuple[str, str]]:
  """A page as pairs of "markdown" or "code" and the text of the cell."""
  parts = _BLOCK.split(page)
  kinds = ("markdown", "code")
  return [(kinds[i % 2], part.strip("\n")) for i, part in enumerate(parts) if part.strip()]


def outputs_of(source: str, scope: dict[str, Any], name: str) -> list[dict[str, Any]]:
  """Runs a code cell in `scope`; what it printed, and the value of its last line, as a notebook shows them."""
  tree = ast.parse(source)
  last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
  printed, value = io.StringIO(), None
  with contextlib.redirect_stdout(printed):
    exec(compile(tree, name, "exec"), scope)
    if isinstance(last, ast.Expr):
      value = eval(compile(ast.Expression(last.value), name, "eval"), scope)
  outputs = []
  if printed.getvalue():
    outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(printed.getvalue())})
  if value is not None:
    outputs.append({"output_type": "display_data", "metadata": {}, "data": _shown(value)})
  return outputs


def notebook_of(page: str) -> dict[str, Any]:
  """The notebook of a page, its blocks run in this process."""
  scope: dict[str, Any] = {}
  cells = []
  for number, (kind, source) in enumerate(cells_of(page)):
    cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": _lines(source)}
    if kind == "code":
      count = sum(one["cell_type"] == "code" for one in cells) + 1
      cell |= {"execution_count": count, "outputs": outputs_of(source, scope, f"block {count}")}
    cells.append(cell)
  kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
  return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def _shown(value: Any) -> dict[str, Any]:
  if hasattr(value, "savefig"):
    png = io.BytesIO()
    value.savefig(png, format="png", dpi=80, metadata={"Software": None})
    return {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": ["a figure"]}
  return {"text/plain": _lines(repr(value))}


def _lines(text: str) -> list[str]:
  return text.splitlines(keepends=True)


def main() -> None:
  sys.path.insert(0, str(ROOT))
  page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
  text = json.dumps(notebook_of(page), indent=1, ensure_ascii=False) + "\n"
  (ROOT / "docs" / "tutorial.ipynb").write_text(text, encoding="utf-8")


if __name__ == "__main__":
  main()
