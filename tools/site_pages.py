"""What the site's pages take from elsewhere, so that a text exists once. MkDocs calls `on_page_markdown` (mkdocs.yml).

<!-- README: In your own trainer -->    the section of the README under that heading
<!-- README: "**Corpora.**" -->         its paragraph that begins so
<!-- API -->                            every public name, by the module that it is from
"""

import ast
import pathlib
import posixpath
import re
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
_README = re.compile(r"^<!-- README: (.+?) -->$", re.M)
_LINK = re.compile(r"\[([^]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
  """The page's Markdown with what it asks for in its place."""
  here = posixpath.dirname(page.file.src_uri)
  markdown = _README.sub(lambda match: relinked(readme_part(match[1]), here), markdown)
  return markdown.replace("<!-- API -->", api())


def readme_part(name: str) -> str:
  """A section of the README without its heading, or a paragraph.

  Raises:
    ValueError: if it is not there exactly once.
  """
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  if name[0] == name[-1] == '"':
    found = [part for part in text.split("\n\n") if part.startswith(name[1:-1])]
  else:
    found = re.findall(rf"^## {re.escape(name)}\n(.*?)(?=^## |\Z)", text, re.S | re.M)
  if len(found) != 1:
    raise ValueError(f"README.md has {len(found)} parts {name!r}: a page of the site shows one.")
  return found[0].strip("\n")


def relinked(markdown: str, here: str) -> str:
  """The README's links as seen from a page in the folder `here` of docs/; files that are no page lose their link."""

  def link(match: re.Match) -> str:
    text, target, anchor = match[1], match[2], match[3] or ""
    if not target.startswith("docs/"):
      return text
    return f"[{text}]({posixpath.relpath(target.removeprefix('docs/'), here or '.')}{anchor})"

  return _LINK.sub(link, markdown)


def api() -> str:
  """A heading for each module and an entry for each public name, in the order of rredcot_jax/__init__.py."""
  tree = ast.parse((ROOT / "rredcot_jax" / "__init__.py").read_text(encoding="utf-8"))
  parts = [ast.get_docstring(tree) or ""]
  for node in tree.body:
    if isinstance(node, ast.ImportFrom) and node.module is not None:
      module = ROOT.joinpath(*node.module.split(".")).with_suffix(".py")
      about = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
      parts.append(f"## {module.stem.capitalize()}\n\n{about}")
      parts += [_entry(alias.name, node.module) for alias in node.names]
  return "\n\n".join(parts)


def _entry(name: str, module: str) -> str:
  # A type says what its fields hold in the comments behind them, so its source is shown.
  options = "\n    options: {show_source: true, members: false}" if name[0].isupper() else ""
  return f"::: {module}.{name}{options}"
