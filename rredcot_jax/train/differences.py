"""What differs between two configurations, by name."""

from collections.abc import Mapping
from typing import Any

from rredcot_jax.report.text import shorten, visible
from rredcot_jax.train.config import default_config


def differences(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
  """What differs between two nested dicts, each as "a.b (1 there, 2 here)"."""
  there, here = _flatten(held), _flatten(wanted)
  return [
    f"{visible(shorten(name, 200))} ({_shown(there.get(name))} there, {_shown(here.get(name))} here)"
    for name in sorted(there.keys() | here.keys())
    if there.get(name) != here.get(name)
  ]


def _shown(value: Any) -> str:
  return shorten(repr(value), 200)


# Keys that do not change what a run computes, but for the order of float32 sums.
_LAYOUT = ("mesh.", "rollout_mesh.", "distributed.", "checkpoint.", "tracker")


def run_differences(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
  """As `differences`, between a run's stored configuration and one to resume it with.

  A key that an older run does not have is assumed to have its default. Keys of the layout
  (mesh, rollout_mesh, distributed, checkpoint) and the tracker may change.
  """
  flat = _flatten(default_config().to_dict()) | _flatten(held)
  kept = lambda tree: {name: value for name, value in tree.items() if not name.startswith(_LAYOUT)}
  return differences(kept(flat), kept(_flatten(wanted)))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
  return flat
