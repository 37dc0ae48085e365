r"""Whether an answer is the reference answer: equal in value, of the same kind, and as simple.

Values are compared exactly where both are fractions, and else to 50 digits, at random
values of the symbols (J. T. Schwartz, Fast probabilistic algorithms for verification
of polynomial identities, JACM 1980). The random values follow from a hash of the two
texts, so that the comparison is repeatable and no answer can be made for them.

Kinds are compared in their own way: equations by their sides, inequalities, intervals
and unions as pieces of the line, tuples and matrices in order, sets and lists in any
order. Text that is no mathematics is equal to the same text alone.
"""

import hashlib
import itertools
import math
import random
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

from rredcot_jax.data.mathematics import expressions, forms, latex, parts, values
from rredcot_jax.data.mathematics.expressions import Node, UnreadableError

SIGNIFICANT_DIGITS = 6  # Of a decimal, to answer a number that it rounds.
_POINTS = 4  # Values of the symbols at which two expressions are compared.
_TRIES = 12
# Of the symbols at one point after another: |x| is x at positive points, and ln x is not real at others.
_SIGNS = ((1,), (-1,), (-1, 1))
_MAX_ITEMS = 32  # Of a list, set, tuple or matrix.


def equal(gold: str, answer: str, *, any_form: bool = False) -> bool:
  """Whether `answer` is the reference answer `gold`, both LaTeX or plain text.

  Args:
    gold, answer: of bounded length; see `expressions.read`.
    any_form: whether an answer that equals the reference need not be as simple; see `forms`.
  """
  if same_text(gold, answer):
    return True
  try:
    reference = expressions.read(gold)
    divided = reference.kind == "list"  # Then `100,200` is two numbers in the answer, too.
    response = expressions.read(answer, symbols=forms.symbols_of(reference), separate=divided)
  except UnreadableError:
    return False
  seed = hashlib.blake2b(f"{gold}\0{answer}".encode(errors="replace")).digest()
  try:
    return _Comparison(seed, any_form).answers(reference, response)
  except values.UndefinedError:
    return False


def same_text(gold: str, answer: str) -> bool:
  """Whether two texts are the same up to white space, looks, and, for words, case and brackets."""
  gold, answer = _plain(gold), _plain(answer)
  if gold == answer:
    return True
  gold, answer = gold.strip("().*"), answer.strip("().*")
  if not gold.isalpha():
    return False
  # `No` is `no` and `EVEN` is `even`, but `AB` and `ab` are products of other symbols.
  if gold.casefold() != answer.casefold():
    return False
  return gold == answer or len(gold) > 3 or gold[1:] == answer[1:] != "" or gold.casefold() in ("yes", "no")


def _plain(text: str) -> str:
  text = re.sub(r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", latex.to_latex(text))
  text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text)
  # Between two digits it stays, because `39 1` is not 391.
  text = re.sub(r"(?:\s|\\[,;:! ]|~|\\q?quad(?![A-Za-z]))+", " ", text)
  return re.sub(r"(?<!\d) | (?!\d)", "", text).strip("$").removesuffix(".")


class _Piece(NamedTuple):
  """An interval of real numbers, or a point x as [x, x]."""

  low: Node
  high: Node
  brackets: str


class _Comparison:
  """One comparison: its random numbers, its budget, and whether forms count."""

  def __init__(self, seed: bytes, any_form: bool):
    self._random = random.Random(seed)
    self._any_form = any_form
    self._budget = values.Budget()
    self._values: list[dict[str, Any]] = [{} for _ in range(_TRIES)]

  # Kinds.

  def answers(self, gold: Node, answer: Node) -> bool:
    """Whether `answer` is `gold`, whatever kinds of nodes they are."""
    gold, answer = parts.with_items(gold), parts.with_items(answer)
    if gold.kind in self._kinds:
      return self._kinds[gold.kind](self, gold, answer)
    if answer.kind == "relation":
      value = parts.named_value(answer, self._same_value)
      return value is not None and self.answers(gold, value)
    return self._quantities(gold, answer)

  def _list(self, gold: Node, answer: Node) -> bool:
    if answer.kind in ("list", "set"):
      # `x < 1 and x > 2` is no number, and `x < 1 or x > 2` is nearly all of them.
      if {gold.name, answer.name} == {"and", "or"} and any(
        part.kind == "relation" and part.name != "=" for part in gold.args
      ):
        return False
      return self._unordered(gold.args, parts.without_names(gold, answer).args, self.answers)
    if gold.name == "or" and self._on_the_line(gold, answer):
      return True
    # `(1, 2, 3)` for `1, 2, 3`, if the order is the same.
    return answer.kind == "bracket" and answer.name == "()" and self._ordered(gold.args, answer.args)

  def _set(self, gold: Node, answer: Node) -> bool:
    if answer.kind == "list":
      answer = parts.without_names(gold, answer)
    elif answer.kind == "relation" and answer.name == "in" and parts.name_of(answer.args[0]):
      answer = answer.args[1]
    elif answer.kind != "set" and len(gold.args) == 1:
      return self.answers(gold.args[0], answer)
    return answer.kind in ("set", "list") and self._unordered(gold.args, answer.args, self.answers)

  def _bracket(self, gold: Node, answer: Node) -> bool:
    if answer.kind == "product" and len(answer.args) == 2 and answer.args[0].kind == "symbol":
      answer = answer.args[1]  # P(3, 4) is the point (3, 4).
    if answer.kind == "bracket":
      return answer.name == gold.name and self._ordered(gold.args, answer.args)
    if gold.name == "()" and answer.kind == "matrix" and all(len(row.args) == 1 for row in answer.args):
      return self._ordered(gold.args, [row.args[0] for row in answer.args])
    if gold.name == "()" and answer.kind == "list":
      return self._ordered(gold.args, parts.coordinates(answer))
    if answer.kind == "relation" and answer.name == "=":
      value = parts.named_value(answer, self._same_value)
      return value is not None and self._bracket(gold, value)
    return self._on_the_line(gold, answer)

  def _matrix(self, gold: Node, answer: Node) -> bool:
    if answer.kind == "bracket" and answer.name == "()" and all(len(row.args) == 1 for row in gold.args):
      return self._ordered([row.args[0] for row in gold.args], answer.args)
    if answer.kind != "matrix" or len(gold.args) != len(answer.args):
      return False
    return all(self._ordered(ours.args, theirs.args) for ours, theirs in zip(gold.args, answer.args, strict=True))

  def _ratio_of_numbers(self, gold: Node, answer: Node) -> bool:
    return answer.kind == "ratio" and self._ordered(gold.args, answer.args)

  def _based(self, gold: Node, answer: Node) -> bool:
    """The same digits, with or without the base."""
    plain = expressions.is_integer(answer) and str(answer.value) == gold.name.partition("_")[0]
    return plain or (answer.kind == "based" and answer.name == gold.name)

  def _ordered(self, gold: Sequence[Node], answer: Sequence[Node]) -> bool:
    if len(gold) != len(answer) or len(gold) > _MAX_ITEMS:
      return False
    return all(map(self.answers, gold, answer))

  def _unordered(self, gold: Sequence[Any], answer: Sequence[Any], same: Any) -> bool:
    """Whether the items can be paired. Equality of values is transitive, so the first partner will do."""
    if len(gold) != len(answer) or len(gold) > _MAX_ITEMS:
      return False
    rest = list(answer)
    for item in gold:
      partner = next((i for i, other in enumerate(rest) if same(item, other)), None)
      if partner is None:
        return False
      del rest[partner]
    return True

  # Equations and inequalities.

  def _relation(self, gold: Node, answer: Node) -> bool:
    if gold.name != "=" and self._on_the_line(gold, answer):
      return True
    if gold.name in ("=", "in") and len(gold.args) == 2 and parts.name_of(gold.args[0]):
      if answer.kind != "relation":
        return self.answers(gold.args[1], answer)
      # The same name has to stand on one side of the answer.
      sides = answer.args if parts.name_of(answer.args[0]) else answer.args[::-1]
      return (
        answer.name == gold.name
        and parts.name_of(sides[0]) == parts.name_of(gold.args[0])
        and self.answers(gold.args[1], sides[1])
      )
    if answer.kind != "relation" or len(gold.args) != 2 or len(answer.args) != 2:
      return False
    return any(self._sides(gold, turned) for turned in (answer, parts.turned(answer)) if turned.name == gold.name)

  def _sides(self, gold: Node, answer: Node) -> bool:
    """Whether left - right is the same up to a factor, which has to be positive for an inequality."""
    ours, theirs = (Node("sum", (side.args[0], Node("negative", (side.args[1],)))) for side in (gold, answer))
    if any(part.kind in parts.NO_VALUES for part in (*ours.walk(), *theirs.walk())):
      return False
    if not self._any_form and not self._sides_as_simple(gold, answer):
      return False
    ratio = self._ratio(ours, theirs)
    return ratio is not None and (
      gold.name == "=" or (values.context().im(ratio) == 0 and values.context().re(ratio) > 0)
    )

  def _sides_as_simple(self, gold: Node, answer: Node) -> bool:
    zeros = [sum(values.exact(side) == 0 for side in node.args) for node in (gold, answer)]
    if zeros[0] != zeros[1] or bool(parts.name_of(answer.args[0])) != bool(parts.name_of(gold.args[0])):
      return False
    shared = [math.gcd(*(forms.content(side).numerator for side in node.args)) for node in (gold, answer)]
    if shared[1] > max(1, shared[0]) and not zeros[0]:
      return False
    joined = [Node("row", node.args) for node in (gold, answer)]
    return not forms.work_left(joined[1], joined[0], equal=self._same_value)

  def _ratio(self, ours: Node, theirs: Node) -> Any:
    """theirs / ours, if that is the same at all points, else None."""
    ratio = None
    for point in self._points(ours, theirs):
      try:
        left, right = self._evaluate(ours, point), self._evaluate(theirs, point)
      except values.UndefinedError:
        return None
      if left == 0 or right == 0 or (ratio is not None and not values.close(ratio, right / left)):
        return None
      ratio = right / left
    return ratio

  # Pieces of the line.

  def _on_the_line(self, gold: Node, answer: Node) -> bool:
    """Whether both are sets of real numbers with the same pieces, of one variable if both name it."""
    names = {parts.variable_of(gold), parts.variable_of(answer)} - {""}
    ours, theirs = self._pieces(gold), self._pieces(answer)
    if ours is None or theirs is None or len(names) > 1:
      return False
    return self._unordered(ours, theirs, self._same_piece)

  def _pieces(self, node: Node) -> list[_Piece] | None:
    """The intervals and points of a set of numbers, in the order in which they are written; None for all else."""
    if node.kind == "reals":
      return [_Piece(parts.INFINITY_BELOW, parts.INFINITY, "()")]
    if node.kind == "set":
      return [_Piece(item, item, "[]") for item in node.args]
    if node.kind == "bracket" and len(node.args) == 2:
      return [_Piece(node.args[0], node.args[1], node.name)]
    if node.kind == "relation":
      return self._pieces_of_relation(node)
    if node.kind == "union" or (node.kind == "list" and node.name == "or"):
      joined: list[_Piece] = []
      for arg in node.args:
        pieces = self._pieces(arg)
        if pieces is None:
          return None
        joined += pieces
      return joined
    if node.kind == "difference" and node.args[0].kind == "reals" and node.args[1].kind == "set":
      return self._without_points(node.args[1].args)
    return None

  def _pieces_of_relation(self, node: Node) -> list[_Piece] | None:
    if node.name == "in":
      return self._pieces(node.args[1]) if parts.name_of(node.args[0]) else None
    if node.name == "!=" and parts.name_of(node.args[0]):
      return self._without_points(node.args[1:])
    if node.name[0] == ">" if len(node.args) > 2 else not parts.name_of(node.args[0]):
      node = parts.turned(node)
    signs = node.name.split()
    if len(signs) == 1 and parts.name_of(node.args[0]) and signs[0] in ("<", "<=", ">", ">="):
      bound = node.args[1]
      if signs[0][0] == "<":
        return [_Piece(parts.INFINITY_BELOW, bound, "(]" if signs[0] == "<=" else "()")]
      return [_Piece(bound, parts.INFINITY, "[)" if signs[0] == ">=" else "()")]
    if len(signs) == 2 and parts.name_of(node.args[1]) and all(sign in ("<", "<=") for sign in signs):
      return [_Piece(node.args[0], node.args[2], ("(", "[")[signs[0] == "<="] + (")", "]")[signs[1] == "<="])]
    return None

  def _without_points(self, points: Sequence[Node]) -> list[_Piece] | None:
    if len(points) > _MAX_ITEMS or any(point.kind in parts.CONTAINERS or forms.symbols_of(point) for point in points):
      return None
    try:
      sorted_points = sorted(points, key=lambda point: values.context().re(self._evaluate(point, {})))
    except values.UndefinedError:
      return None
    bounds = [parts.INFINITY_BELOW, *sorted_points, parts.INFINITY]
    return [_Piece(low, high, "()") for low, high in itertools.pairwise(bounds)]

  def _same_piece(self, gold: _Piece, answer: _Piece) -> bool:
    return (
      gold.brackets == answer.brackets and self.answers(gold.low, answer.low) and self.answers(gold.high, answer.high)
    )

  # Values.

  def _quantities(self, gold: Node, answer: Node) -> bool:
    """Values with or without units: a unit may be left out or added, but not changed."""
    (gold, ours), (answer, theirs) = parts.unit_of(gold), parts.unit_of(answer)
    if ours and theirs and ours != theirs:
      return False
    if gold.kind in parts.CONTAINERS or answer.kind in parts.CONTAINERS:
      return False
    if "infinity" in (parts.constant_of(gold), parts.constant_of(answer)):
      return gold == answer
    if gold.name == "scientific" and expressions.power_of_ten(answer) is not None:
      answer = Node("number", name="scientific", value=values.exact(answer) or Fraction(0), digits=1)
    if not self._any_form and forms.work_left(answer, gold, equal=self._same_value):
      return False
    return self._same_number(gold, answer)

  def _same_number(self, gold: Node, answer: Node) -> bool:
    """Equal values; or one is a decimal of at least `SIGNIFICANT_DIGITS` digits that the other rounds to.

    A fraction answers a decimal only if the decimal shows its period: 22/7 is not what 3.142857 asks for.
    """
    exact = values.exact(gold), values.exact(answer)
    if None not in exact and exact[0] == exact[1]:
      return True
    decimals = sorted((node for node in (gold, answer) if parts.digits_of(node)), key=parts.digits_of)
    if decimals and not forms.symbols_of(gold):
      other, digits = answer if decimals[0] is gold else gold, parts.digits_of(decimals[0])
      if exact[1] is not None and not parts.digits_of(answer) and not values.shows_period(exact[1], digits):
        return False
      return digits >= SIGNIFICANT_DIGITS and self._rounds_to(other, decimals[0])
    return None in exact and self._same_value(gold, answer)

  def _rounds_to(self, node: Node, decimal: Node) -> bool:
    value = values.exact(node)
    if value is None:
      value = values.as_fraction(self._evaluate(node, {}))
    return value is not None and values.rounds_to(value, values.exact(decimal) or Fraction(0), parts.digits_of(decimal))

  def _same_value(self, gold: Node, answer: Node) -> bool:
    """Whether two expressions have the same value wherever the first has one."""
    exact = values.exact(gold), values.exact(answer)
    if None not in exact:
      return exact[0] == exact[1]
    points = self._points(gold, answer)
    try:
      return bool(points) and all(values.close(self._evaluate(gold, p), self._evaluate(answer, p)) for p in points)
    except values.UndefinedError:
      return False

  def _points(self, gold: Node, answer: Node) -> list[dict[str, Any]]:
    """Values of the symbols at which `gold` has a value, real ones of it before others."""
    names = sorted(forms.symbols_of(gold) | forms.symbols_of(answer))
    if not names:
      return [{}]
    real: list[dict[str, Any]] = []
    other: list[dict[str, Any]] = []
    for number, point in enumerate(self._values):
      for name in names:
        if name not in point:
          point[name] = self._draw(_SIGNS[number % len(_SIGNS)])
      try:
        value = self._evaluate(gold, point)
      except values.UndefinedError:
        continue
      (real if values.context().im(value) == 0 else other).append(point)
      if len(real) == _POINTS:
        return real
    return (real or other)[:_POINTS]

  def _draw(self, signs: Sequence[int]) -> Any:
    """Random to the last digit, of absolute value in [1/4, 4)."""
    drawn = values.context().mpf(self._random.getrandbits(200)) / (1 << 200)
    return self._random.choice(signs) * values.context().mpf(4) ** (2 * drawn - 1)

  def _evaluate(self, node: Node, point: dict[str, Any]) -> Any:
    return values.evaluate(node, point, self._budget)

  _kinds: ClassVar[dict[str, Callable[["_Comparison", Node, Node], bool]]] = {
    "list": _list,
    "set": _set,
    "bracket": _bracket,
    "matrix": _matrix,
    "ratio": _ratio_of_numbers,
    "based": _based,
    "relation": _relation,
    "union": _on_the_line,
    "difference": _on_the_line,
    "reals": _on_the_line,
  }
