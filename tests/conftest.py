"""Four fake CPU devices, no silent rank promotion, deterministic property tests."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
# Tests spend their time compiling, not running.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("deterministic", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("deterministic")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_end_with_their_module():
  """Kept to the end, the programs of all modules take several gigabytes."""
  yield
  jax.clear_caches()
