"""The public operations import with little else, and work as the README says."""

import ast
import dataclasses
import importlib
import inspect
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


# ---- Every public name is documented and tested ------------------------------------------------


def sections(docstring):
  """The sections of a docstring by their heading; what stands before the first is under ""."""
  heads = re.split(r"^(Args|Returns|Raises):\n", docstring, flags=re.M)
  return {"": heads[0], **dict(zip(heads[1::2], heads[2::2]))}


def undocumented(name, value):
  """What the docstring of a public name lacks, as text."""
  found = sections(inspect.getdoc(value) or "")
  lacks = [] if found[""].strip() else ["a first sentence"]
  if isinstance(value, type):
    # A type says of each field what it holds, in a comment behind it.
    fields = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else value._fields
    source = inspect.getsource(value)
    return lacks + [field for field in fields if not re.search(rf"^ +{field}: [^#]+# *\S", source, re.M)]
  signature = inspect.signature(value)
  lacks += [one for one in signature.parameters if not re.search(rf"\b{one}\b", found.get("Args", ""))]
  returns = signature.return_annotation
  assert returns is not inspect.Signature.empty, f"{name} does not say what it returns"
  return lacks + (["Returns"] if returns not in (None, "None") and not found.get("Returns", "").strip() else [])


@pytest.mark.parametrize("name", rredcot_jax.__all__)
def test_every_public_name_says_what_it_takes_and_returns(name):
  assert not undocumented(name, getattr(rredcot_jax, name))


def test_what_is_undocumented_is_noticed():
  def one(x: int, y: int) -> int:
    """Adds.

    Args:
      x: an int.
    """
    return x + y

  @dataclasses.dataclass
  class Two:
    """Two fields."""

    first: int  # Documented.
    second: int

  assert undocumented("one", one) == ["y", "Returns"] and undocumented("Two", Two) == ["second"]


def names_called_in(path):
  """The public names that a test file calls, or passes to a call, under whatever name it imports them."""
  tree = ast.parse(path.read_text(encoding="utf-8"))
  objects = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      objects |= {one.asname or one.name: rredcot_jax for one in node.names if one.name == "rredcot_jax"}
    elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[:2] == ["rredcot_jax", "ops"]:
      source = importlib.import_module(node.module)
      for one in node.names:
        inner = f"{node.module}.{one.name}"
        is_module = not hasattr(source, one.name) or isinstance(getattr(source, one.name), types.ModuleType)
        objects[one.asname or one.name] = importlib.import_module(inner) if is_module else getattr(source, one.name)
  for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
    for part in (call.func, *call.args, *(keyword.value for keyword in call.keywords)):
      value = None
      if isinstance(part, ast.Name):
        value = objects.get(part.id)
      elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
        value = getattr(objects.get(part.value.id), part.attr, None)
      yield from (name for name in rredcot_jax.__all__ if value is getattr(rredcot_jax, name))


def test_every_public_name_is_called_in_a_test():
  tested = {name for path in (ROOT / "tests").glob("*_test.py") for name in names_called_in(path)}
  assert set(rredcot_jax.__all__) - tested == set()


def test_the_types_are_what_functions_take_and_return(readme_scope):
  scope, seen = readme_scope, []
  assert isinstance(scope["tables"], rredcot_jax.VocabTables) and isinstance(scope["segments"], rredcot_jax.Segments)
  assert isinstance(rredcot_jax.exit_table(["a", "b"], "ab"), rredcot_jax.ExitTable)
  returns, values = scope["returns"], scope["values"]
  credit = rredcot_jax.credit_from_values(values, scope["segments"], returns, group_size=2, mode="difference")
  assert isinstance(credit, rredcot_jax.Credit)
  np.testing.assert_allclose(credit.advantages, scope["advantages"], atol=1e-6)

  def form(evidence):
    seen.append(isinstance(evidence, rredcot_jax.Evidence))
    return evidence.utilities[:, 0], evidence.log_ratio

  ones = np.ones((2, 1), np.float32)
  rredcot_jax.estimate_values(-ones, ones, 0 * ones, ones > 0, np.ones((2, 1), np.int32), form=form)
  assert seen == [True]


def test_the_version_is_said_in_one_place_and_types_are_shipped():
  setup = (ROOT / "setup.py").read_text(encoding="utf-8")
  assert re.fullmatch(r"\d+\.\d+\.\d+", rredcot_jax.__version__)
  assert rredcot_jax.__version__ not in setup and "__version__" in setup
  assert "py.typed" in setup and (ROOT / "rredcot_jax" / "py.typed").is_file()


@pytest.fixture(scope="module")
def readme_scope():
  """The names that the README's snippet makes."""
  scope: dict = {}
  exec(readme_snippet(), scope)
  return scope


def test_the_readmes_snippet_gives_what_it_says(readme_scope):
  numbers = stated(readme_snippet())
  assert {"rewards", "advantages"} <= numbers.keys()
  for name, expected in numbers.items():
    np.testing.assert_allclose(readme_scope[name], expected, atol=1e-6, err_msg=f"README.md says otherwise of {name}")


@pytest.mark.parametrize("name", ["rewards", "advantages"])
def test_a_wrong_number_in_the_readme_is_noticed(name, readme_scope):
  snippet = readme_snippet()
  spoilt = re.sub(rf"^(# {name}\s+\[\[)[-\d.]+", r"\g<1>9.9", snippet, flags=re.M)
  assert spoilt != snippet
  with pytest.raises(AssertionError):
    np.testing.assert_allclose(readme_scope[name], stated(spoilt)[name], atol=1e-6)


def test_the_readmes_snippet_runs_with_nothing_else_installed(tmp_path):
  script = tmp_path / "snippet.py"
  script.write_text(readme_snippet())
  done = run_alone(f"exec(open({str(script)!r}).read())")
  assert done.returncode == 0, done.stderr
