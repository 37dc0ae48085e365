"""The package as `pip install` brings it, without its checkout: started by `make test-package` with its own Python."""

import importlib.metadata
import importlib.resources
import importlib.util
import pathlib

import numpy as np

import rredcot_jax as rr

CHECKOUT = pathlib.Path(__file__).parent.parent


def main() -> None:
  installed = importlib.metadata.metadata("rredcot-jax")
  package = pathlib.Path(rr.__file__).parent
  assert CHECKOUT / "rredcot_jax" != package, f"{package} is the checkout: nothing that is installed was tried."
  assert importlib.util.find_spec("flax") is None, "flax is installed: the core must not need it."
  assert installed["Version"] == rr.__version__, (installed["Version"], rr.__version__)
  readme = (CHECKOUT / "README.md").read_text()
  assert readme.strip() in installed.json["description"], "README.md is not the description."
  assert (package / "py.typed").exists(), "py.typed is missing: type checkers would not read the annotations."
  # All of the package's files, templates and tokenizers among them.
  missing = [
    str(path.relative_to(CHECKOUT))
    for path in (CHECKOUT / "rredcot_jax").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts and not (package.parent / path.relative_to(CHECKOUT)).exists()
  ]
  assert not missing, f"not installed: {missing}; name them in package_data in setup.py."
  # Two right answers of four: (1 - 0.5) / 0.5.
  advantages = rr.group_advantages(np.array([1, 0, 0, 1], np.float32))
  np.testing.assert_allclose(advantages, [1, -1, -1, 1], atol=1e-5)
  print(f"rredcot-jax {rr.__version__} in {package}: advantages {advantages}")


if __name__ == "__main__":
  main()
