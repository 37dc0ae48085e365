"""The public operations import without the experiments' dependencies, and work as the README says."""

import pathlib
import re
import subprocess
import sys

README = pathlib.Path(__file__).parent.parent / "README.md"
HEAVY = ("transformers", "tokenizers", "ml_collections", "grain", "reasoning_gym", "tensorboardX", "matplotlib")
HEAVY += ("flax", "optax", "orbax", "scipy", "safetensors")


def test_import_needs_jax_chex_and_numpy_only():
  code = f"import sys, rredcot_jax as rr; assert rr.__all__; print([m for m in {HEAVY} if m in sys.modules])"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"


def test_the_readmes_snippet_gives_what_it_says():
  snippet = re.search(r"```python\n(.*?)```", README.read_text(), re.S).group(1)
  scope = {}
  exec(snippet, scope)
  assert scope["rewards"].round(4).tolist() == [
    [float(x) for x in row] for row in scope["jnp"].array([[0.1, 0.3, 0.1], [-0.4, 0.0, -0.1]]).round(4)
  ]
  # The blame of the failed trace is on its first segment, four parts of five.
  assert scope["advantages"][1, 0] < 4 * scope["advantages"][1, 5] * 0.99 < 0
