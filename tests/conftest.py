"""Four fake CPU devices, no silent rank promotion, deterministic property tests, and a count of what is left out."""

import os
from importlib.metadata import version

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
# Tests spend their time compiling, not running.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib") < "0.11":  # They take half of all time to compile; later versions do not know the option.
  os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("deterministic", derandomize=True, deadline=None, max_examples=50)
# Where the same tests run a second time, with other versions of their dependencies.
hypothesis.settings.register_profile("quick", hypothesis.settings.get_profile("deterministic"), max_examples=10)
hypothesis.settings.load_profile("deterministic")


# Begun first, so that no process is left with one of them at the end. These take the longest, this one first.
LONGEST = (
  "train", "faults", "compilation", "processes", "assigner", "monte_carlo", "evaluate", "attribution", "sharding",
  "tutorial", "segmentation", "report", "decoder", "study", "tracking", "calibrated",
)  # fmt: skip


def pytest_collection_modifyitems(items):
  place = {f"{name}_test.py": number for number, name in enumerate(LONGEST)}
  items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_end_with_their_module():
  """Kept to the end, the programs of all modules take several gigabytes."""
  yield
  jax.clear_caches()


# ---- What was not run ------------------------------------------------------------------------

LEFT_OUT = pytest.StashKey[dict]()
# Where the tests with a marker run that pyproject.toml leaves out of the plain suite.
RUN_BY = {"peers": "make test-peers", "faults": "make faults"}


def pytest_configure(config):
  config.stash[LEFT_OUT] = dict.fromkeys(RUN_BY, 0)


def pytest_deselected(items):
  for item in items:
    for marker in RUN_BY:
      item.config.stash[LEFT_OUT][marker] += item.get_closest_marker(marker) is not None


def pytest_sessionfinish(session):
  if hasattr(session.config, "workeroutput"):  # A process of pytest-xdist's, each of which collects all tests.
    session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
  node.config.stash[LEFT_OUT].update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter, config):
  for marker, count in config.stash[LEFT_OUT].items():
    if count:
      terminalreporter.write_line(f"left out: {count} marked {marker!r}, which `{RUN_BY[marker]}` runs")
