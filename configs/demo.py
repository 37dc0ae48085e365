"""`make demo`: reinforcement learning of a 1 M-parameter reasoner on `chain`."""
from rredcot_jax.config import default_config


def get_config(arg: str = "rredcot"):
  config = default_config()
  return config
