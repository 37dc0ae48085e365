"""Names of options: what is built in, and what a user brings as "package.module:Name".

Wherever something can be chosen by name (a segmentation, a bank, a source of credit, a
task), the choice is resolved here, so that a choice of the user's own needs no change of
this package.
"""

import difflib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any


def check_option(name: str, value: str, options: Sequence[str]) -> None:
  """Raises ValueError naming `value` and the nearest of `options` unless it is one.

  Args:
    name: of the option, for the error.
    value: what was asked for.
    options: what there is; at least one.
  """
  if value not in options:
    raise ValueError(f"{name}={value!r} is unknown; {_offer(value, options)}.")


def resolve(kind: str, name: Any, builtin: Mapping[str, Any]) -> Any:
  """What `name` stands for.

  | name                  | result                                                            |
  | --------------------- | ----------------------------------------------------------------- |
  | a key of `builtin`    | its value                                                         |
  | "package.module:Name" | `Name` of that module, which is imported: its code is run         |
  | a callable or class   | itself                                                            |

  Args:
    kind: of the option, such as "segmentation.method", for errors.
    name: what was asked for.
    builtin: what is built in, by name; callables.

  Returns:
    A callable.

  Raises:
    ValueError: naming the value and the nearest built-in name, or what failed in the import.
  """
  if not isinstance(name, str):
    if callable(name):
      return name
    raise ValueError(f'{kind}={name!r} is a {type(name).__name__}; pass a name, "package.module:Name" or a callable.')
  if name in builtin:
    return builtin[name]
  module_name, colon, attribute = name.partition(":")
  if not colon:
    raise ValueError(f'{kind}={name!r} is unknown; {_offer(name, tuple(builtin))}, or "package.module:Name".')
  if not attribute.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
    raise ValueError(f'{kind}={name!r} has a colon and is not of the form "package.module:Name".')
  try:
    module = importlib.import_module(module_name)
  except Exception as error:  # Importing runs the user's code, which may raise anything.
    raise ValueError(
      f"{kind}={name!r}: importing {module_name!r} failed with {type(error).__name__}: {error}. "
      "Is it installed, or its folder in PYTHONPATH?"
    ) from error
  if not hasattr(module, attribute):
    near = difflib.get_close_matches(attribute, dir(module), n=1)
    raise ValueError(
      f"{kind}={name!r}: the module {module_name!r} has no {attribute!r}"
      + (f"; did you mean {near[0]!r}?" if near else ".")
    )
  found = getattr(module, attribute)
  if not callable(found):
    raise ValueError(f"{kind}={name!r} is a {type(found).__name__} and must be a callable.")
  return found


def label(name: Any) -> str:
  """`name` as errors call it: the string itself, or a callable's own name."""
  return name if isinstance(name, str) else getattr(name, "__name__", type(name).__name__)


def _offer(value: Any, options: Sequence[str]) -> str:
  near = difflib.get_close_matches(str(value), options, n=1, cutoff=0.0)
  return f"did you mean {near[0]!r}? Options: {', '.join(options)}"
