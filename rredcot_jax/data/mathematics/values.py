"""What an expression is worth: an exact fraction, or 50 digits at given values of its symbols.

Bounded: every operation takes bounded time, because precision is fixed and numbers,
exponents and arguments beyond a size count as undefined; a `Budget` bounds how many
operations one comparison may take.
"""

import math
import threading
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import mpmath

from rredcot_jax.data.mathematics.expressions import Node

_MAX_BITS = 20_000  # Of a number's size, exact or not.
_MAX_FACTORIAL = 1_000
_MAX_ANGLE_BITS = 64  # Of what a function is applied to.

DIGITS = 50
_TOLERANCE = mpmath.mpf(10) ** -30  # Relative; what 50 digits leave after some cancellation.
MAX_OPERATIONS = 10_000

_OF_THREAD = threading.local()


def context() -> Any:
  """mpmath at `DIGITS` digits. One for each thread, because mpmath changes its precision while it works."""
  if not hasattr(_OF_THREAD, "context"):
    _OF_THREAD.context = mpmath.MPContext()
    _OF_THREAD.context.dps = DIGITS
  return _OF_THREAD.context


class UndefinedError(ArithmeticError):
  """The expression has no value there, or none within the bounds."""


class Budget:
  """Operations left to one comparison."""

  def __init__(self, operations: int = MAX_OPERATIONS):
    self.left = operations

  def spend(self) -> None:
    """
    Raises:
      UndefinedError: if nothing is left.
    """
    self.left -= 1
    if self.left < 0:
      raise UndefinedError("The comparison needs too many operations.")


def exact(node: Node) -> Fraction | None:
  """The value as a fraction, if it is built from literal numbers by + - * /, integer powers, factorials and binomials.

  None also if a numerator or denominator on the way is longer than `_MAX_BITS`, or on a division by zero.
  """
  if node.kind == "number":
    return node.value
  if node.kind not in ("sum", "negative", "product", "quotient", "power", "call"):
    return None
  args = []
  for arg in node.args:
    value = exact(arg)
    if value is None:
      return None
    args.append(value)
  return _exact_operation(node, args)


def _exact_operation(node: Node, args: list[Fraction]) -> Fraction | None:
  if node.kind in ("sum", "product"):
    result: Fraction | None = args[0]
    for arg in args[1:]:
      if result is None:
        return None
      result = _bounded(result + arg if node.kind == "sum" else result * arg)
    return result
  if node.kind == "negative":
    return -args[0]
  if node.kind == "quotient":
    return _bounded(args[0] / args[1]) if args[1] else None
  if node.kind == "power":
    return _exact_power(*args)
  counts = all(arg.denominator == 1 and 0 <= arg <= _MAX_FACTORIAL for arg in args)
  if node.name == "factorial" and counts:
    return Fraction(math.factorial(int(args[0])))
  if node.name == "binomial" and counts:
    return Fraction(math.comb(int(args[0]), int(args[1])))
  return None


def _bounded(value: Fraction) -> Fraction | None:
  return value if max(abs(value.numerator), value.denominator).bit_length() <= _MAX_BITS else None


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
  if exponent.denominator != 1 or (base == 0 and exponent <= 0):
    return None
  bits = max(abs(base.numerator), base.denominator).bit_length()
  return base ** int(exponent) if bits * abs(exponent) <= _MAX_BITS else None


def evaluate(node: Node, values: Mapping[str, Any], budget: Budget) -> Any:
  """The value of `node` to about 50 digits, a number of `context()`.

  Args:
    node: an expression without relations, lists, sets and units.
    values: a number for each symbol.
    budget: pays one for every node.

  Raises:
    UndefinedError: where it has no value within the bounds.
  """
  budget.spend()
  if node.kind == "number":
    return context().mpf(node.value.numerator) / node.value.denominator
  if node.kind == "symbol":
    return values[node.name]
  if node.kind == "constant":
    constants = {"pi": context().pi, "e": context().e, "i": context().j}
    if node.name not in constants:
      raise UndefinedError("Infinity is no number.")
    return +constants[node.name]
  args = [evaluate(arg, values, budget) for arg in node.args]
  try:
    result = _operation(node, args)
  except (ArithmeticError, ValueError, TypeError, NotImplementedError) as error:
    raise UndefinedError(str(error)) from error
  if not context().isfinite(result) or _bits(result) > _MAX_BITS:
    raise UndefinedError("The value is infinite or too large.")
  return result


def _operation(node: Node, args: list[Any]) -> Any:
  if node.kind == "sum":
    return context().fsum(args)
  if node.kind == "negative":
    return -args[0]
  if node.kind == "product":
    return context().fprod(args)
  if node.kind == "quotient":
    return args[0] / args[1]
  if node.kind == "power":
    return _power(*args)
  if node.kind == "root":
    return _root(*args)
  if node.kind == "degrees":
    return args[0] * context().pi / 180
  if node.kind == "call":
    return _call(node.name, args)
  raise UndefinedError(f"A {node.kind} is no number.")


def _bits(value: Any) -> int:
  """The size of log2 |value|; 0 for 0."""
  return 0 if value == 0 else abs(int(context().mag(value)))


def _power(base: Any, exponent: Any) -> Any:
  if base == 0:
    if context().re(exponent) > 0:
      return context().mpf(0)
    raise UndefinedError("Zero has no such power.")
  # |log2 of the result| is about |exponent log2 base|; for large exponents mpmath would take as many digits.
  if abs(exponent) * max(1, abs(context().log(base))) > _MAX_BITS:
    raise UndefinedError("The power is too large.")
  return context().power(base, exponent)


def _root(radicand: Any, index: Any) -> Any:
  """The real root where there is one, else the principal one."""
  if not (context().isint(index) and 2 <= index <= 1000):
    raise UndefinedError("A root needs an index of at least 2.")
  if context().im(radicand) == 0 and context().re(radicand) < 0 and int(index) % 2:
    return -context().root(-radicand, int(index))
  return context().root(radicand, int(index))


def _call(name: str, args: list[Any]) -> Any:
  if any(_bits(arg) > _MAX_ANGLE_BITS and arg != 0 for arg in args) and name not in ("abs", "ln", "log"):
    raise UndefinedError("The argument is too large or too small.")
  if name in ("ln", "log"):
    logarithm = context().log(args[0])
    return logarithm if name == "ln" else logarithm / context().log(args[1])
  if name == "abs":
    return abs(args[0])
  if name in ("floor", "ceil"):
    return getattr(context(), name)(args[0])
  if name in ("factorial", "binomial"):
    if any(context().im(arg) != 0 or abs(arg) > _MAX_FACTORIAL for arg in args):
      raise UndefinedError("The argument is too large.")
    return getattr(context(), name)(*args)
  return getattr(context(), _INVERSES.get(name, name))(args[0])


_INVERSES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot"}


def close(left: Any, right: Any) -> bool:
  """Whether two values are the same up to what 50 digits lose."""
  return abs(left - right) <= _TOLERANCE * max(abs(left), abs(right), _TOLERANCE)


def as_fraction(value: Any) -> Fraction | None:
  """A real value of `evaluate` as a fraction, to its last digit; None for a complex one."""
  return Fraction(str(context().re(value))) if context().im(value) == 0 else None


def rounds_to(value: Fraction, decimal: Fraction, digits: int) -> bool:
  """Whether `value`, rounded or cut off to so many significant digits, is `decimal`; False for a decimal of 0."""
  if decimal == 0:
    return False
  unit = Fraction(10) ** (_magnitude(decimal) - digits + 1)
  distance = value - decimal
  return abs(distance) <= unit / 2 or (0 < distance < unit if decimal > 0 else -unit < distance < 0)


def shows_period(value: Fraction, digits: int) -> bool:
  """Whether `digits` significant digits of a fraction show the period of its expansion twice.

  Then they are a spelling of the fraction, as 0.333333 is of 1/3. Otherwise they may be those of a number nearby.
  False for 0.
  """
  if value == 0:
    return False
  scaled = value / Fraction(10) ** _magnitude(value)  # One digit before the point.
  rest, before = scaled.denominator, 0  # Digits after the point before the period.
  while (shared := math.gcd(rest, 10)) > 1:
    rest, before = rest // shared, before + 1
  # The period is the least n with 10^n = 1 modulo `rest`.
  remainder, period = 10 % rest, 1
  while remainder != 1 % rest and before + 2 * period <= digits:
    remainder, period = 10 * remainder % rest, period + 1
  return before + 2 * period <= digits


def _magnitude(value: Fraction) -> int:
  """The largest n with 10^n <= |value|, for a value other than 0."""
  power = len(str(abs(value.numerator))) - len(str(value.denominator))
  return power if abs(value) >= Fraction(10) ** power else power - 1
