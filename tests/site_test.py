"""The site of the documentation: every page is listed, what it takes from elsewhere is there, and no text is twice."""

import pathlib
import re
from types import SimpleNamespace

import pytest
import site_pages
import yaml

import rredcot_jax

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def made(path):
  """A page as the site shows it."""
  page = SimpleNamespace(file=SimpleNamespace(src_uri=path.relative_to(ROOT / "docs").as_posix()))
  return site_pages.on_page_markdown(path.read_text(encoding="utf-8"), page=page)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_to_files_of_the_documentation(path):
  text = made(path)
  assert "<!-- README" not in text and "<!-- API" not in text
  without_code = re.sub(r"^```.*?^```|^    .*?$|`[^`]*`", "", text, flags=re.S | re.M)
  for target in re.findall(r"\]\(([^)#\s]+)", without_code):
    assert re.match("https?:", target) or (path.parent / target).resolve().is_relative_to(ROOT / "docs"), target
    assert re.match("https?:", target) or (path.parent / target).is_file(), f"{path.name} links to {target}"


def test_the_sites_contents_list_every_page_once():
  # The tags of MkDocs' own, such as !ENV, are not used.
  nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
  listed = re.findall(r"[\w/]+\.md", repr(nav))
  assert sorted(listed) == [path.relative_to(ROOT / "docs").as_posix() for path in PAGES]


def test_the_api_has_every_public_name_once():
  names = re.findall(r"^::: rredcot_jax\.ops\.\w+\.(\w+)$", site_pages.api(), re.M)
  assert sorted(names) == sorted(rredcot_jax.__all__)


def test_parts_of_the_readme_are_found_and_their_links_turned():
  part = site_pages.readme_part("Experiments")
  assert part.startswith("Use `.venv/bin/python`") and "## " not in part
  assert site_pages.readme_part('"**Corpora.**"').startswith("**Corpora.** Put the files")
  assert "(../extending.md)" in site_pages.relinked(part, "start")
  assert site_pages.relinked("[a](docs/b.md#c) [d](LICENSE) [e](#f) [g](https://h)", "") == (
    "[a](b.md#c) d [e](#f) [g](https://h)"
  )


@pytest.mark.parametrize("name", ["Experimants", '"**Nothing such**"', '"  "'])
def test_a_part_that_is_not_there_once_is_an_error(name):
  with pytest.raises(ValueError, match=re.escape(f"parts {name!r}")):
    site_pages.readme_part(name)


def test_no_paragraph_exists_in_two_places():
  found = {}
  for path in [ROOT / "README.md", *PAGES]:
    text = path.read_text(encoding="utf-8")
    for part in {" ".join(part.split()) for part in text.split("\n\n") if len(part) > 200}:
      found.setdefault(part, []).append(path.name)
  assert not {part: names for part, names in found.items() if len(names) > 1}
