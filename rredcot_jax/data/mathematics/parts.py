r"""What answers are made of beside expressions: names before a value, units behind it, two values in one.

x = 5, P(A) = 1/2, |AB| = 900       a name and a value
5 cm, $5, 45°                       a value and a unit
3 \pm \sqrt{2}                      two values
"""

import re
from collections.abc import Callable

from rredcot_jax.data.mathematics import expressions
from rredcot_jax.data.mathematics.expressions import Node

CONTAINERS = frozenset("relation list set bracket union difference reals matrix row ratio based".split())
NO_VALUES = CONTAINERS | {"quantity", "plusminus"}

INFINITY = Node("constant", name="infinity")
INFINITY_BELOW = Node("negative", (INFINITY,))
_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}


def turned(relation: Node) -> Node:
  """`b > a` for `a < b`."""
  signs = [_TURNED.get(sign, sign) for sign in reversed(relation.name.split())]
  return Node("relation", relation.args[::-1], " ".join(signs))


def name_of(node: Node) -> str:
  """The name of a symbol, of a product of symbols such as P A for P(A), or of a length |AB|; "" for all else."""
  if node.kind == "symbol":
    return node.name
  if node.kind == "call" and node.name == "abs" and name_of(node.args[0]):
    return f"|{name_of(node.args[0])}|"
  if node.kind == "product" and len(node.args) <= 4 and all(arg.kind == "symbol" for arg in node.args):
    return " ".join(arg.name for arg in node.args)
  return ""


def variable_of(node: Node) -> str:
  """The variable of an inequality or of `x in S`; "" where there is none."""
  relations = (part for part in node.walk() if part.kind == "relation")
  return next((name_of(side) for relation in relations for side in relation.args if name_of(side)), "")


def named_value(answer: Node, same_value: Callable[[Node, Node], bool]) -> Node | None:
  r"""What stands behind the last sign of `x = 5`, `P(A) = \frac12`, `2 + 3 = 5` or `x = \frac13 \approx 0.33`.

  None if the sides before it are no name and are not equal to it.
  """
  sides, signs = list(answer.args), answer.name.split()
  if signs[-1] == "~" and (len(sides) > 2 or not name_of(sides[0])):
    sides, signs = sides[:-1], signs[:-1]
  if any(sign not in ("=", "~") for sign in signs):
    return None
  value = sides[-1]
  named = name_of(sides[0]) or (sides[0].kind == "bracket" and all(map(name_of, sides[0].args)))
  before = sides[1:-1] if named else sides[:-1]
  if before and any(part.kind in NO_VALUES for side in sides for part in side.walk()):
    return None
  return value if all(same_value(value, side) for side in before) else None


def coordinates(answer: Node) -> tuple[Node, ...]:
  """`1, 2` for `x = 1, y = 2`, whose names are in the alphabet's order; else the items as they are."""
  if any(item.kind != "relation" or item.name != "=" for item in answer.args):
    return answer.args
  names = [name_of(item.args[0]) for item in answer.args]
  return tuple(item.args[1] for item in answer.args) if all(names) and names == sorted(set(names)) else ()


def without_names(gold: Node, answer: Node) -> Node:
  """`1, 2` for `x = 1, x = 2` or `x = 1, 2`, if the reference has no names."""
  if any(item.kind == "relation" for item in gold.args):
    return answer
  names = {name_of(item.args[0]) for item in answer.args if item.kind == "relation" and item.name == "="}
  if len(names) != 1 or "" in names:
    return answer
  items = (item.args[1] if item.kind == "relation" and item.name == "=" else item for item in answer.args)
  return Node("list", tuple(items), ",")


def with_items(node: Node) -> Node:
  r"""`3 + a, 3 - a` for `3 \pm a`, also in lists and sets and behind `x =`."""
  if node.kind == "relation" and node.name == "=" and name_of(node.args[0]):
    sides = with_items(node.args[1])
    if sides.kind == "list" and node.args[1].kind != "list":
      return Node("list", tuple(Node("relation", (node.args[0], side), "=") for side in sides.args), ",")
  elif node.kind == "plusminus":
    return Node("list", _both(node), ",")
  elif node.kind in ("quotient", "product", "quantity") and any(arg.kind == "plusminus" for arg in node.args):
    return Node("list", _both(node), ",")
  elif node.kind in ("list", "set"):
    items = [with_items(item) for item in node.args]
    flat = [part for item in items for part in (item.args if item.kind == "list" else (item,))]
    return Node(node.kind, tuple(flat), node.name)
  return node


def _both(node: Node) -> tuple[Node, ...]:
  """The two values of an expression with one plus-minus sign in it."""
  if node.kind == "plusminus":
    left, right = node.args
    if left == expressions.integer(0):
      return right, Node("negative", (right,))
    terms = left.args if left.kind == "sum" else (left,)
    return Node("sum", (*terms, right)), Node("sum", (*terms, Node("negative", (right,))))
  place = next(i for i, arg in enumerate(node.args) if arg.kind == "plusminus")
  variants = _both(node.args[place])
  return tuple(
    Node(node.kind, (*node.args[:place], variant, *node.args[place + 1 :]), node.name) for variant in variants
  )


def constant_of(node: Node) -> str:
  """The name of a constant, with or without a sign, such as "infinity"; "" for all else."""
  return node.args[0].name if node.kind == "negative" else node.name if node.kind == "constant" else ""


def digits_of(node: Node) -> int:
  """Significant digits of a literal decimal; 0 for all else, which is exact."""
  node = node.args[0] if node.kind == "negative" else node
  return node.digits if node.kind == "number" else 0


_UNIT_NAMES = {
  "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "kilometer": "km", "kilometre": "km",
  "meter": "m", "metre": "m", "inche": "in", "inch": "in", "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi",
  "gram": "g", "kilogram": "kg", "pound": "lb", "lb": "lb", "ounce": "oz", "second": "s", "sec": "s", "minute": "min",
  "hour": "h", "hr": "h", "liter": "L", "litre": "L", "l": "L", "°": "degree", "deg": "degree", "percent": "%",
  "percentage": "%", "radian": "rad", "usd": "dollar", "newton": "N", "joule": "J", "watt": "W", "volt": "V",
  "cents": "cent", "per": "/", "mph": "mi / h", "kph": "km / h", "kmh": "km / h",
}  # fmt: skip


def unit_of(node: Node) -> tuple[Node, str]:
  """A value and its unit in one spelling; "" without a unit."""
  if node.kind != "quantity":
    return node, ""
  words = []
  for word in node.name.replace("square ", "sq ").replace("cubic ", "cu ").split():
    singular = word.rstrip(".")
    if len(singular) > 2 and singular.endswith("s"):
      singular = singular[:-1]
    words.append(_UNIT_NAMES.get(singular, _UNIT_NAMES.get(singular.lower(), singular)))
  text = " ".join(words)
  text = re.sub(r"\bsq (\S+)", r"\1 ^2", text)
  return node.args[0], re.sub(r"\bcu (\S+)", r"\1 ^3", text)
