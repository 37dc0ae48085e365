"""What differs between two configurations, by name."""

from collections.abc import Mapping
from typing import Any

from rredcot_jax.train.config import default_config


def differences(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
  """What differs between two nested dicts, each as "a.b (1 there, 2 here)"."""
  there, here = _flatten(held), _flatten(wanted)
  return [
    f"{name} ({there.get(name)!r} there, {here.get(name)!r} here)"
    for name in sorted(there.keys() | here.keys())
    if there.get(name) != here.get(name)
  ]


# How a run is laid out and looked after, not what it computes; another layout agrees to float32 reassociation.
_LAYOUT = ("mesh.", "rollout_mesh.", "distributed.", "checkpoint.")


def run_differences(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
  """As `differences`, between a run's stored configuration and one to resume it with.

  A key that the run does not have, being older, is taken to have its default; keys of
  the layout (mesh, distributed, checkpoint) may change.
  """
  flat = _flatten(default_config().to_dict()) | _flatten(held)
  kept = lambda tree: {name: value for name, value in tree.items() if not name.startswith(_LAYOUT)}
  return differences(kept(flat), kept(_flatten(wanted)))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
  return flat
