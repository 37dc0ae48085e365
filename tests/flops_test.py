"""Operations of jaxprs, counted by hand and by XLA."""

import jax
import jax.numpy as jnp
import pytest

from rredcot_jax.cost import flops

SQUARE = jnp.ones((16, 16))
PRODUCT = 2 * 16**3


def times(x, n):
  return jax.lax.scan(lambda c, _: (c @ c, None), x, length=n)[0]


@pytest.mark.parametrize(
  ("function", "shapes", "expected"),
  [
    (lambda x, y: jnp.einsum("bij,bjk->bik", x, y), [(2, 3, 5), (2, 5, 7)], 2 * 2 * 3 * 5 * 7),
    (lambda x, y: jnp.einsum("ij,j->i", x, y), [(3, 5), (5,)], 2 * 3 * 5),
    (lambda x: jnp.exp(x) + x, [(3, 5)], 2 * 15),
    (lambda x: x.sum(axis=0), [(3, 5)], 15),
    (lambda x: jnp.argmax(x, axis=1), [(3, 5)], 15),
    (lambda x: x.T.reshape(5, 3)[::-1], [(3, 5)], 0),
    (jax.jit(lambda x: x @ x), [(4, 4)], 2 * 4**3),
  ],
)
def test_products_and_elements_are_counted_and_movement_is_not(function, shapes, expected):
  assert flops.count(function, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)) == expected


def test_without_loops_xla_counts_the_same():
  x = jnp.ones((32, 48))
  once = lambda x: jax.nn.softmax(x @ x.T)
  analysis = jax.jit(once).lower(x).compile().cost_analysis()
  assert flops.count(once, x) == pytest.approx(analysis["flops"], rel=0.05)


def test_a_loop_counts_as_often_as_it_runs():
  assert flops.count(lambda x: times(x, 7), SQUARE) == 7 * PRODUCT
  nested = lambda x: jax.lax.scan(lambda c, _: (times(c, 3), None), x, length=2)[0]
  assert flops.count(nested, SQUARE) == 2 * 3 * PRODUCT
  # Backwards each product is two.
  gradient = jax.grad(lambda x: times(x, 7).sum())
  assert flops.count(gradient, SQUARE) == pytest.approx(3 * 7 * PRODUCT, rel=0.02)


def test_the_body_of_a_loop_of_unknown_length_counts_once():
  until = lambda x: jax.lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c @ c, x)
  assert flops.count(until, SQUARE) == PRODUCT


def test_of_branches_the_longest_counts():
  either = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: times(x, 3), lambda x: x @ x, x)
  assert flops.count(either, SQUARE) == 3 * PRODUCT


def test_what_is_computed_again_counts_again():
  forgetful = jax.grad(jax.checkpoint(lambda x: (x @ x @ x).sum()))
  assert flops.count(forgetful, SQUARE) - flops.count(jax.grad(lambda x: (x @ x @ x).sum()), SQUARE) >= PRODUCT
