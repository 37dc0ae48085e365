"""Names of options: what they resolve to, and what is said where they do not."""

import sys
import types

import pytest

from rredcot_jax.ops import names


def first():
  return 1


def second():
  return 2


BUILTIN = {"first": first, "second": second}


@pytest.fixture
def module(monkeypatch):
  """A module of the user's own, and one whose code fails."""
  mine = types.ModuleType("users_module")
  mine.rule, mine.number = second, 3
  monkeypatch.setitem(sys.modules, "users_module", mine)


def test_an_option_that_there_is_passes():
  names.check_option("mode", "signed", ("signed", "magnitude"))


def test_an_option_that_there_is_not_is_named_with_the_nearest():
  with pytest.raises(ValueError, match=r"^mode='sign' is unknown; did you mean 'signed'\? Options: signed, magnitude"):
    names.check_option("mode", "sign", ("signed", "magnitude"))


def test_a_built_in_name_a_path_and_a_callable_resolve(module):
  assert names.resolve("rule", "first", BUILTIN) is first
  assert names.resolve("rule", "users_module:rule", BUILTIN) is second
  assert names.resolve("rule", second, BUILTIN) is second
  assert names.resolve("rule", dict, BUILTIN) is dict
  assert names.resolve("rule", "collections:OrderedDict", BUILTIN).__name__ == "OrderedDict"


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("frist", r"rule='frist' is unknown; did you mean 'first'\? Options: first, second, or \"package.module:Name\""),
    ("no_such_module:f", "rule='no_such_module:f': importing 'no_such_module' failed with ModuleNotFoundError"),
    ("users_module.sub:f", "importing 'users_module.sub' failed with ModuleNotFoundError"),
    ("users_module:rul", r"the module 'users_module' has no 'rul'; did you mean 'rule'\?"),
    ("users_module:zzzzz", r"the module 'users_module' has no 'zzzzz'\.$"),
    ("users_module:number", "rule='users_module:number' is a int and must be a callable"),
    ("users_module:", "not of the form"),
    (":rule", "not of the form"),
    (".relative:rule", "not of the form"),
    ("users_module:rule()", "not of the form"),
    ("users_module:rule.sub", "not of the form"),
    (3, "rule=3 is a int; pass a name"),
    (None, "rule=None is a NoneType; pass a name"),
  ],
)
def test_what_cannot_be_resolved_says_why(module, name, message):
  with pytest.raises(ValueError, match=message):
    names.resolve("rule", name, BUILTIN)


def test_an_error_in_the_users_module_is_told(tmp_path, monkeypatch):
  (tmp_path / "fails_when_imported.py").write_text("raise RuntimeError('no disk')\n")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ValueError, match="failed with RuntimeError: no disk") as info:
    names.resolve("rule", "fails_when_imported:f", BUILTIN)
  assert isinstance(info.value.__cause__, RuntimeError)


def test_labels_of_names_and_callables():
  assert names.label("newline") == "newline"
  assert names.label(first) == "first"
  assert names.label(__import__("functools").partial(first)) == "partial"
