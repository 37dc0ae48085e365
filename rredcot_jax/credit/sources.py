"""The sources of credit that are built in, by name: every class with a `name` in a module of this package."""

import importlib
import pkgutil

import rredcot_jax.credit
from rredcot_jax.credit.source import Source
from rredcot_jax.ops import names


def _built_in() -> dict[str, type[Source]]:
  found = {}
  for module_info in pkgutil.iter_modules(rredcot_jax.credit.__path__):
    if module_info.name == "sources":
      continue
    module = importlib.import_module(f"rredcot_jax.credit.{module_info.name}")
    for value in vars(module).values():
      if isinstance(value, type) and issubclass(value, Source) and "name" in vars(value):
        found[value.name] = value
  return found


SOURCES = _built_in()


def source_class(name: str) -> type[Source]:
  """The class that `credit.source` names.

  Raises:
    ValueError: naming the nearest built-in source, or what is missing in the user's module.
  """
  found = names.resolve("credit.source", name, SOURCES)
  if not (isinstance(found, type) and issubclass(found, Source)):
    raise ValueError(f"credit.source={name!r} is {found!r}, which is no subclass of rredcot_jax.credit.source.Source.")
  return found
