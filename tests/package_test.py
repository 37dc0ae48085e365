"""The public operations import with little else, and work as the README says."""

import ast
import pathlib
import re
import subprocess
import sys
import types

import numpy as np
import pytest

import rredcot_jax

ROOT = pathlib.Path(__file__).parent.parent
# Refuses every package but the standard library, ours, and what jax, chex and numpy have already imported.
FORBID = """
import sys
import jax, chex, numpy
names = {name.partition(".")[0] for name in sys.modules}
allowed = names | set(sys.stdlib_module_names) | {"rredcot_jax"}
class Forbid:
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] not in allowed:
      raise ImportError(f"{name} is not jax, chex, numpy or the standard library")
sys.meta_path.insert(0, Forbid())
"""


def run_alone(code, *paths):
  """Standard output of `code` in an interpreter of its own, after FORBID."""
  lines = "\n".join(f"sys.path.insert(0, {str(path)!r})" for path in (*paths, ROOT))
  command = [sys.executable, "-c", f"import sys\n{lines}\n{FORBID}\n{code}"]
  return subprocess.run(command, capture_output=True, text=True)


def readme_snippet():
  return re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S).group(1)


def stated(snippet):
  """The numbers of comments such as "# rewards  [[0.1, 0.2], [0, 1]]", by name."""
  found = re.findall(r"^# (\w+)\s+(\[\[.*?\]\])", snippet, re.M)
  return {name: np.array(ast.literal_eval(numbers)) for name, numbers in found}


def test_importing_needs_jax_chex_and_numpy_only():
  done = run_alone("import rredcot_jax as rr; [getattr(rr, name) for name in rr.__all__]; print(len(rr.__all__))")
  assert done.returncode == 0, done.stderr
  assert int(done.stdout) == len(rredcot_jax.__all__) > 40


@pytest.mark.parametrize("name", ["optax", "orbax.checkpoint", "scipy"])
def test_any_other_import_is_noticed(name, tmp_path):
  """The check above can fail: a package of ours that imports more does."""
  package = tmp_path / "rredcot_jax"
  package.mkdir()
  init = (ROOT / "rredcot_jax" / "__init__.py").read_text(encoding="utf-8")
  (package / "__init__.py").write_text(init.replace("\nfrom ", f"\nimport {name}\nfrom ", 1))
  (package / "ops").symlink_to(ROOT / "rredcot_jax" / "ops")
  code = f"import importlib\nsys.path.insert(0, {str(tmp_path)!r})\nimport rredcot_jax"
  done = run_alone(code)
  assert done.returncode and f"{name.partition('.')[0]} is not jax" in done.stderr.replace(name, name.partition(".")[0])


def test_importing_takes_less_than_half_a_second_more_than_jax():
  code = "began = time.process_time(); import rredcot_jax; print(time.process_time() - began)"
  command = [sys.executable, "-c", f"import sys, time, jax; sys.path.insert(0, {str(ROOT)!r}); {code}"]
  seconds = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(3)]
  assert min(seconds) < 0.5


def test_everything_public_is_listed_once_in_order():
  names = rredcot_jax.__all__
  assert list(names) == sorted(set(names))
  public = {
    name for name, value in vars(rredcot_jax).items() if name[0] != "_" and not isinstance(value, types.ModuleType)
  }
  assert public == set(names)
  mentioned = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", rredcot_jax.__doc__))
  assert mentioned <= set(names), "the docstring names what is not there"


def test_the_version_is_said_in_one_place_and_types_are_shipped():
  setup = (ROOT / "setup.py").read_text(encoding="utf-8")
  assert re.fullmatch(r"\d+\.\d+\.\d+", rredcot_jax.__version__)
  assert rredcot_jax.__version__ not in setup and "__version__" in setup
  assert "py.typed" in setup and (ROOT / "rredcot_jax" / "py.typed").is_file()


def test_the_readmes_snippet_gives_what_it_says():
  snippet = readme_snippet()
  scope = {}
  exec(snippet, scope)
  numbers = stated(snippet)
  assert {"rewards", "advantages"} <= numbers.keys()
  for name, expected in numbers.items():
    np.testing.assert_allclose(scope[name], expected, atol=1e-6, err_msg=f"README.md says otherwise of {name}")


@pytest.mark.parametrize("name", ["rewards", "advantages"])
def test_a_wrong_number_in_the_readme_is_noticed(name):
  snippet = readme_snippet()
  scope = {}
  exec(snippet, scope)
  spoilt = re.sub(rf"^(# {name}\s+\[\[)[-\d.]+", r"\g<1>9.9", snippet, flags=re.M)
  assert spoilt != snippet
  with pytest.raises(AssertionError):
    np.testing.assert_allclose(scope[name], stated(spoilt)[name], atol=1e-6)


def test_the_readmes_snippet_runs_with_nothing_else_installed(tmp_path):
  script = tmp_path / "snippet.py"
  script.write_text(readme_snippet())
  done = run_alone(f"exec(open({str(script)!r}).read())")
  assert done.returncode == 0, done.stderr
