"""The method as pure functions of arrays. Imports jax, chex and numpy alone."""
