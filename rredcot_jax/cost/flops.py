"""Floating-point operations of a JAX function, loops counted as often as they run.

XLA's cost analysis counts the body of a loop once, however often it runs, and our layers are a
loop. So the operations are counted on the jaxpr. Matrix products count exactly, arithmetic and
reductions count one an element, and data movement counts nothing. On a program without loops
the count agrees with XLA's (tests/flops_test.py).
"""

import math
from collections.abc import Callable
from typing import Any

import jax

_ELEMENTWISE = frozenset({
  "add", "add_any", "sub", "mul", "div", "max", "min", "neg", "abs", "sign", "exp", "exp2", "log", "log1p", "expm1",
  "tanh", "logistic", "rsqrt", "sqrt", "square", "pow", "integer_pow", "sin", "cos", "cumsum", "cumlogsumexp", "erf",
})  # fmt: skip
_REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin"})


def count(function: Callable[..., Any], *args: Any) -> float:
  """Operations of `function(*args)`.

  Args:
    function: traced, not run.
    *args: arrays or `jax.ShapeDtypeStruct`s.

  Returns:
    A number of operations. The body of a `while_loop` counts once, because tracing does not
    know how often it runs. Of a conditional's branches the most expensive counts.
  """
  return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _of_jaxpr(jaxpr: Any) -> float:
  return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> float:
  name, parameters = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = parameters["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
  if name in _ELEMENTWISE:
    return float(math.prod(equation.outvars[0].aval.shape))
  if name in _REDUCTIONS:
    return float(math.prod(equation.invars[0].aval.shape))
  if name == "while":
    return _of_jaxpr(parameters["body_jaxpr"].jaxpr)
  if name == "cond":
    return max(_of_jaxpr(branch.jaxpr) for branch in parameters["branches"])
  times = parameters["length"] if name == "scan" else 1
  inner = (parameters.get(key) for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"))
  return times * sum(_of_jaxpr(getattr(x, "jaxpr", x)) for x in inner if x is not None)
