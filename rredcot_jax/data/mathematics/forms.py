r"""Whether an answer is as simple as the reference answer: what is left to do in it.

A policy that is asked to compute, simplify, factor or solve could hand the question
back, since the question equals its answer. So an answer may not hold work that the
reference does not hold. The work is counted by kind (`work_left`): numbers that could
be added or multiplied, fractions that could be reduced, roots that could be drawn,
like terms that could be collected, functions that could be evaluated, and so on.

Two kinds are not only limited but must be there as often as in the reference, where
that has symbols: products of sums (factored against expanded, a completed square) and
denominators with symbols (one fraction against partial fractions). A reference that
is written as a product of primes wants a product of primes.

What this cannot see: whether a conversion between forms that are equally simple was
the question. `\frac{3}{8}` answers 0.375, `4500` answers 4.5e3, and `\sqrt{p}` answers
p^{1/2}, though each could be the question itself.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction

from rredcot_jax.data.mathematics.expressions import Node, is_integer

# An answer is no simplification of the reference if its tree has more than this many times its nodes, and some.
_LONGER, _LONGER_BY = 2, 8
_PRIMES_BELOW = 1_000  # Trial division of radicands ends here.
_MAX_RADICAND_BITS = 4_096  # A larger one counts as reducible.

# Kinds of work of which a reference with symbols wants exactly as much as it has.
_WANTED = frozenset(("product of sums", "denominator"))


def work_left(answer: Node, gold: Node, *, equal: Callable[[Node, Node], bool]) -> str:
  """What is left to do in `answer` that is not left in `gold`; "" if it is as simple.

  Args:
    answer, gold: expressions (see `Node`), without relations, lists, sets and units.
    equal: whether two expressions have the same value; for arguments of functions.
  """
  if not symbols_of(answer) <= symbols_of(gold):
    return "symbols that the reference does not have"
  if _size(answer) > _LONGER * _size(gold) + _LONGER_BY:
    return "far longer than the reference"
  if _is_factorization(gold) and not _is_factorization(answer):
    return "not a product of primes"
  in_answer, in_gold = work(answer), work(gold)
  for kind, count in in_answer.items():
    if count > in_gold[kind]:
      return kind
  if symbols_of(gold):
    for kind in _WANTED:
      if in_answer[kind] != in_gold[kind]:
        return f"{kind} missing"
    if in_gold.keys() & _WANTED and _is_one_term(answer) != _is_one_term(gold):
      return "terms to combine or to divide"
  return "" if _calls_match(answer, gold, equal) else "other arguments of a function"


def _is_one_term(node: Node) -> bool:
  return _unsigned(node).kind != "sum"


def symbols_of(node: Node) -> frozenset[str]:
  return frozenset(part.name for part in node.walk() if part.kind == "symbol")


def work(node: Node) -> Counter[str]:
  """How often each kind of work is left to do in an expression."""
  found: Counter[str] = Counter()
  for part in node.walk():
    kinds = _WORK.get(part.kind)
    if kinds is not None:
      found.update(kinds(part))
  found["degree of denominators"] = _degree_of_denominators(node)
  return +found


def _size(node: Node) -> int:
  return sum(1 for _ in node.walk())


# ---------------------------------------------------------------------------
# Work by kind of node. Each yields a kind once for every time that it occurs.
# ---------------------------------------------------------------------------


def _in_number(node: Node) -> Iterator[str]:
  if node.name == "unreduced":
    yield "reducible fraction"


def _in_negative(node: Node) -> Iterator[str]:
  if _is_negative(node.args[0]):
    yield "double sign"
  if node.args[0].kind == "sum":
    yield "negated sum"


def _in_sum(node: Node) -> Iterator[str]:
  keys = Counter(_coefficient(term)[1] for term in node.args)
  for count in keys.values():
    yield from ["like terms"] * (count - 1)
  for term in node.args:
    if _coefficient(term)[0] == 0:
      yield "term of zero"
    if any(part.kind == "sum" for part in _arithmetic(term)):
      yield "nested sum"
    if term.kind == "negative" and _is_negative(term.args[0]):
      yield "double sign"


def _in_product(node: Node) -> Iterator[str]:
  numbers = [factor for factor in node.args if abs(_coefficient(factor)[0]) != 1]
  yield from ["numbers to multiply"] * (len(numbers) - 1)
  for factor in node.args:
    if _unsigned(factor).kind == "number" and _unsigned(factor).value == 1:
      yield "factor of one"
  for factor in node.args[1:]:
    if _is_negative(factor):
      yield "double sign"
  if _coefficient(node)[0] == 0:
    yield "factor of zero"
  yield from _repeated_factors(node)
  yield from ["fractions to multiply"] * (sum(factor.kind == "quotient" for factor in node.args) - 1)
  yield from _sums_in_product(node)


def _repeated_factors(node: Node) -> Iterator[str]:
  """Powers of one base and roots of one index that could be joined, above and below fraction bars."""
  factors = [factor for factor in _factors(node) if factor.kind != "number"]
  bases = Counter(_structure(factor.args[0] if factor.kind == "power" else factor) for factor in factors)
  for count in bases.values():
    yield from ["powers to multiply"] * (count - 1)
  roots = Counter(_structure(factor.args[1]) for factor in factors if factor.kind == "root")
  for count in roots.values():
    yield from ["roots to multiply"] * (count - 1)


def _sums_in_product(node: Node) -> Iterator[str]:
  """Products of sums: what could be expanded, and what in it could still be factored."""
  for factor in node.args:
    bracket = _unsigned(factor)
    if bracket.kind != "sum":
      continue
    others = [other for other in node.args if other is not factor]
    scaled = all(not symbols_of(other) and _key(other) == "" for other in others)
    # (1/2)(x+1) is (x+1)/2, and 2(1+sqrt(3)) is as simple as 2+2 sqrt(3).
    if scaled and (not symbols_of(bracket) or all(_coefficient(other)[0].denominator > 1 for other in others)):
      continue
    yield "product of sums"
    if not symbols_of(bracket):
      yield "product with a constant sum"
    yield from _common_factors(bracket)


def _common_factors(bracket: Node) -> Iterator[str]:
  if content(bracket).numerator > 1:
    yield "common factor"
  shared = frozenset.intersection(*(_symbol_factors(term) for term in bracket.args))
  yield from ["common factor"] * len(shared)


def _in_quotient(node: Node) -> Iterator[str]:
  above, below = node.args
  if _is_decimal(above) or _is_decimal(below):
    yield "fraction of decimals"
  contents = content(above), content(below)
  if math.gcd(contents[0].numerator, contents[1].numerator) > 1 or _unsigned(below).value == 1:
    yield "reducible fraction"
  if _coefficient(above)[0] == 0:
    yield "factor of zero"
  if _is_negative(below):
    yield "double sign"
  if any(part.kind == "quotient" for arg in node.args for part in _arithmetic(arg)):
    yield "nested fraction"
  if symbols_of(below):
    yield "denominator"
  elif _key(below):
    yield "constant in a denominator"
  yield from _repeated_factors(node)
  if any(part.kind == "root" or _is_fractional_power(part) or _is_i(part) for part in _arithmetic(below)):
    yield "root in a denominator"


def _in_power(node: Node) -> Iterator[str]:
  base, exponent = node.args
  size, rest = _coefficient(exponent)
  if base.kind == "number" and base.value in (0, 1):
    yield "number to a power"
  if rest:
    if base.kind == "sum":
      yield "product of sums"
    if not symbols_of(exponent):
      yield "exponent to evaluate"
    return
  if size in (0, 1):
    yield "exponent of zero or one"
  if base.kind == "constant" and base.name == "e":
    if size < 0:
      yield "constant in a denominator"
    return
  if _key(base) == "" or _is_i(base):
    yield "number to a power"
  if size < 0:
    yield "negative exponent"
    if symbols_of(base):
      yield "denominator"
  if size.denominator > 1:
    yield "fractional exponent"
    if size < 0:
      yield "root in a denominator"
  if base.kind == "sum":
    yield from ["product of sums"] * (min(abs(size.numerator), 99) if size.denominator == 1 else 1)
    yield from _common_factors(base)
  elif base.kind in ("product", "quotient", "power", "root") or (base.kind == "negative" and _key(base)):
    yield "power of a product or a power"


def _in_root(node: Node) -> Iterator[str]:
  radicand, index = node.args
  if not is_integer(index) or not 2 <= index.value <= 100:
    yield "reducible root"
    return
  n = int(index.value)
  size, rest = _coefficient(radicand) if radicand.kind != "sum" else (content(radicand), "sum")
  of_exponential = radicand.kind == "power" and radicand.args[0] == Node("constant", name="e")
  if _has_power(size, n, whole=rest == "") or any(power >= n for power in _symbol_powers(radicand)) or of_exponential:
    yield "reducible root"
  if any(part.kind == "quotient" for part in _arithmetic(radicand)):
    yield "root of a fraction"
  if any(part.kind == "root" for part in _arithmetic(radicand)):
    yield "nested root"


def _in_call(node: Node) -> Iterator[str]:
  # `\log_2 3` and `\ln 3` are functions of one family.
  yield "logarithm" if node.name in ("ln", "log") else f"function {node.name}"


_WORK: dict[str, Callable[[Node], Iterator[str]]] = {
  "number": _in_number,
  "negative": _in_negative,
  "sum": _in_sum,
  "product": _in_product,
  "quotient": _in_quotient,
  "power": _in_power,
  "root": _in_root,
  "call": _in_call,
}


# ---------------------------------------------------------------------------
# Functions.
# ---------------------------------------------------------------------------


def _calls_match(answer: Node, gold: Node, equal: Callable[[Node, Node], bool]) -> bool:
  """Whether each function is applied to what the reference applies it to, or to a number no larger than there."""
  for call in _calls(answer):
    candidates = [other for other in _calls(gold) if other.name == call.name]
    if not candidates and call.name in ("ln", "log"):
      candidates = [other for other in _calls(gold) if other.name in ("ln", "log")]
      if not symbols_of(call):
        continue
    if not any(all(map(equal, call.args, other.args)) for other in candidates) and not (
      _height(call) and (_height(call) <= max(map(_height, candidates)) or (call is answer and call.name == "ln"))
    ):
      return False
  return True


def _calls(node: Node) -> list[Node]:
  return [part for part in node.walk() if part.kind == "call"]


def _height(call: Node) -> int:
  """The largest numerator or denominator in the arguments, if they are literal fractions; else 0."""
  if any(_key(arg) != "" for arg in call.args):
    return 0
  values = [_coefficient(arg)[0] for arg in call.args]
  return max(max(abs(value.numerator), value.denominator) for value in values)


# ---------------------------------------------------------------------------
# Parts of expressions.
# ---------------------------------------------------------------------------


def _unsigned(node: Node) -> Node:
  return node.args[0] if node.kind == "negative" else node


def _is_negative(node: Node) -> bool:
  """Whether a minus sign comes first."""
  return node.kind == "negative" or (node.kind in ("product", "quotient") and _is_negative(node.args[0]))


def _is_i(node: Node) -> bool:
  return node.kind == "constant" and node.name == "i"


def _is_decimal(node: Node) -> bool:
  node = _unsigned(node)
  return node.kind == "number" and node.value.denominator > 1


def _is_fractional_power(node: Node) -> bool:
  return node.kind == "power" and _key(node.args[1]) == "" and _coefficient(node.args[1])[0].denominator > 1


def _arithmetic(node: Node) -> Iterator[Node]:
  """This node and those below it that are joined to it by sums, products, quotients and signs."""
  yield node
  if node.kind in ("sum", "negative", "product", "quotient"):
    for arg in node.args:
      yield from _arithmetic(arg)


def _coefficient(node: Node) -> tuple[Fraction, str]:
  """The literal number that a term begins with, and a key that is the same for like terms; "" for numbers."""
  if node.kind == "number":
    return node.value, ""
  if node.kind == "negative":
    size, key = _coefficient(node.args[0])
    return -size, key
  if node.kind == "product":
    parts = [_coefficient(factor) for factor in node.args]
    return math.prod((size for size, _ in parts), start=Fraction(1)), "*".join(sorted(key for _, key in parts if key))
  if node.kind == "quotient":
    (above, key), (below, divisor) = map(_coefficient, node.args)
    return above / (below or 1), f"{key}/{divisor}" if divisor else key
  return Fraction(1), _structure(node)


def _key(node: Node) -> str:
  return _coefficient(node)[1]


def _structure(node: Node) -> str:
  """A text that is the same for expressions that differ in the order of terms and factors alone."""
  if node.kind in ("number", "product", "quotient", "negative"):
    size, key = _coefficient(node)
    return f"({size.numerator:x}/{size.denominator:x}){key}"  # Decimal digits would take quadratic time.
  parts = [_structure(arg) for arg in node.args]
  return f"{node.kind}:{node.name}({','.join(sorted(parts) if node.kind == 'sum' else parts)})"


def _factors(node: Node) -> Iterator[Node]:
  """What a product or quotient is made of, above and below fraction bars, without signs."""
  if node.kind in ("product", "quotient", "negative"):
    for arg in node.args:
      yield from _factors(arg)
  else:
    yield node


def content(node: Node) -> Fraction:
  """The greatest common divisor of the terms' coefficients, by absolute value."""
  terms = node.args if node.kind == "sum" else (node,)
  sizes = [abs(_coefficient(term)[0]) for term in terms]
  above, below = math.gcd(*(size.numerator for size in sizes)), math.lcm(*(size.denominator for size in sizes))
  return Fraction(above or 1, below)


def _symbol_factors(term: Node) -> frozenset[str]:
  """The symbols that a term is a multiple of."""
  term = _unsigned(term)
  if term.kind == "quotient":
    return _symbol_factors(term.args[0])
  factors = term.args if term.kind == "product" else (term,)
  bases = (factor.args[0] if factor.kind == "power" else factor for factor in map(_unsigned, factors))
  return frozenset(base.name for base in bases if base.kind == "symbol")


def _symbol_powers(radicand: Node) -> list[Fraction]:
  """The literal powers of symbols and constants that a product, or one factor, is made of."""
  factors = radicand.args if radicand.kind == "product" else (radicand,)
  powers = [factor.args[1] for factor in factors if factor.kind == "power"]
  return [_coefficient(power)[0] for power in powers if _key(power) == ""]


def _degree(node: Node) -> Fraction:
  """An upper bound of the degree in all symbols together."""
  if node.kind == "symbol":
    return Fraction(1)
  degrees = [_degree(arg) for arg in node.args]
  if node.kind == "power":
    size, rest = _coefficient(node.args[1])
    return degrees[0] * abs(size) if not rest else degrees[0]
  if node.kind == "product":
    return sum(degrees, Fraction(0))
  return max(degrees, default=Fraction(0))


def _degree_of_denominators(node: Node) -> int:
  total = sum((_degree(part.args[1]) for part in node.walk() if part.kind == "quotient"), Fraction(0))
  for part in node.walk():
    if part.kind == "power" and _key(part.args[1]) == "" and _coefficient(part.args[1])[0] < 0:
      total += _degree(part)
  return math.ceil(total)


def _has_power(size: Fraction, n: int, *, whole: bool) -> bool:
  """Whether something comes out of the n-th root of `size` (`whole`: the radicand is nothing else)."""
  if size <= 0 or size.denominator > 1 or (whole and size == 1) or size.numerator.bit_length() > _MAX_RADICAND_BITS:
    return True
  rest = size.numerator
  counts = []
  for prime in range(2, _PRIMES_BELOW):  # Composite numbers do not divide what is left.
    count = _multiplicity(rest, prime)
    if count >= n:
      return True
    counts.append(count)
    rest //= prime**count
  divisors = [k for k in range(2, n + 1) if n % k == 0]
  if rest > 1:
    return any(_is_perfect(rest, k) and (k == n or not any(count % k for count in counts)) for k in divisors)
  # The fourth root of 4 is the root of 2.
  return whole and any(all(count % k == 0 for count in counts) for k in divisors if any(counts))


def _multiplicity(value: int, prime: int) -> int:
  """How often `prime` divides `value`, at most as often as `value` has bits."""
  bits = value.bit_length()
  return next((count for count in range(bits) if value % prime ** (count + 1)), bits)


def _is_perfect(value: int, k: int) -> bool:
  """Whether `value` is the k-th power of an integer."""
  root = 0
  for bit in reversed(range(value.bit_length() // k + 1)):  # The largest root, bit by bit.
    if (root | 1 << bit) ** k <= value:
      root |= 1 << bit
  return bool(root**k == value)


def _is_factorization(node: Node) -> bool:
  """Whether a number is written as a product of two or more primes or powers of primes."""
  return node.kind == "product" and all(map(_is_prime_power, node.args))


def _is_prime_power(node: Node) -> bool:
  base = node.args[0] if node.kind == "power" and is_integer(node.args[1]) else node
  if not is_integer(base) or not 2 <= base.value < _PRIMES_BELOW**2:
    return False
  value = int(base.value)
  return all(value % divisor for divisor in range(2, math.isqrt(value) + 1))
