r"""Reads an answer, written in LaTeX or as plain text, into a tree. Evaluates nothing.

The reader knows a fixed grammar: numbers, symbols, the usual operations and
functions, equations and inequalities, lists, sets, tuples, intervals, unions,
matrices, and a unit beside a value. Text outside this grammar raises
`UnreadableError`, so that no answer is half understood. Names, numbers and text
are only ever compared; none is looked up or run as code.

Cost: time is linear in the length of the text, up to a small factor. Tokens are
bounded by `MAX_TOKENS`, and the depth of the tree by `MAX_NESTING`, so recursion over
it is safe.

Each text has one reading:

- `1,234` outside brackets is a number; `1, 2`, `(1,234)` and `\{1,234\}` hold two items.
- `1\frac{1}{2}` and `1 1/2` are mixed numbers, 3/2.
- `0.1\overline{6}` is 1/6.
- `4.5e33` and `4.5\times 10^{33}` are the same number.
- `1/2x` is (1/2) x; `\frac12` is 1/2; `2^10` is 1024; `2^3^2` is not read.
- `\sin 2x/3` is (sin 2x) / 3. A `\log` without a base has the base 10.
- A percent or degree sign is a unit: `50\%` is 50, never 1/2. Only in the argument
  of a function `30^\circ` is pi/6.
- `e` and `i` are the constants.
"""

import dataclasses
import re
from collections.abc import Collection, Iterator
from fractions import Fraction

from rredcot_jax.data.mathematics import latex
from rredcot_jax.data.mathematics.latex import STOP, Token

MAX_TOKENS = 512
MAX_NESTING = 20  # Brackets, fractions, roots, exponents and functions inside one another.
MAX_EXPONENT = 999  # Of ten, in a number.
_MAX_QUOTIENTS = 4  # Slashes in one product.


class UnreadableError(ValueError):
  """The text is outside the grammar."""


@dataclasses.dataclass(frozen=True)
class Node:
  """One operation and what it is applied to.

  kind        args                     name
  ----------  -----------------------  ---------------------------------------
  number      ()                       "integer", "decimal", "repeating", "mixed", "unreduced" (a mixed number that
                                       is not in lowest terms) or "scientific"
  symbol      ()                       the symbol, with its subscript and primes
  constant    ()                       "pi", "e", "i" or "infinity"
  sum         two or more terms
  negative    (a,)
  product     two or more factors
  quotient    (a, b)
  power       (base, exponent)
  root        (radicand, index)
  call        the arguments            a name in `latex.FUNCTIONS`, where log has (argument, base); or "abs", "floor",
                                       "ceil", "factorial", "binomial"
  degrees     (a,)
  plusminus   (a, b)
  relation    two or more sides        the signs between them, joined by spaces
  list        two or more items        ",", "or" or "and"
  set         the elements
  bracket     two or more items        "()", "[)", "(]" or "[]"
  union       two or more sets
  difference  (a, b)
  reals       ()
  matrix      its rows, of kind "row"
  ratio       two or more numbers
  quantity    (a,)                     the unit
  based       ()                       digits and base, "1011_2"
  """

  kind: str
  args: tuple["Node", ...] = ()
  name: str = ""
  value: Fraction = Fraction(0)  # Of a number.
  digits: int = 0  # Significant ones, of a number that is written with a decimal point or an exponent; else 0.

  def walk(self) -> Iterator["Node"]:
    """This node and all below it."""
    yield self
    for arg in self.args:
      yield from arg.walk()


def integer(value: int) -> Node:
  return Node("number", name="integer", value=Fraction(value))


def read(text: str, *, symbols: Collection[str] = (), separate: bool = False) -> Node:
  """The tree of an answer.

  Args:
    text: LaTeX or plain text.
    symbols: names that stand for symbols even where they could be units, such as
      the `m` in `5 m`: those of the reference answer.
    separate: whether every bare comma between digits divides items.

  Raises:
    UnreadableError: if the text is outside the grammar or nests too deep.
  """
  text = latex.to_latex(text).rstrip().removesuffix(".")
  tokens = latex.tokens_of(text, separate=separate)
  if len(tokens) > MAX_TOKENS:
    raise UnreadableError(f"The text has more than {MAX_TOKENS} tokens.")
  parser = _Parser(tokens, symbols)
  node = parser.answer()
  if parser.peek() is not STOP:
    raise UnreadableError(f"{parser.peek().text[:20]!r} is not expected.")
  return node


# ---------------------------------------------------------------------------
# Units.
# ---------------------------------------------------------------------------

# Short words that stand for units behind a value. Words of four letters and more always do.
_SHORT_UNITS = frozenset(
  """
  cm mm km nm dm ft in yd mi kg mg lb lbs oz ml mL kL dL hr hrs min sec ms ns mph kph rpm deg rad Hz kHz MHz GHz kW MW
  kJ MJ eV keV MeV GeV kPa Pa atm mol kN amu sq cu day pm am USD pts
  """.split()
)
_LETTER_UNITS = frozenset("m s g h N J W V A K C F L".split())
# Words that change or hedge the value that they follow.
_NO_UNITS = frozenset(
  """
  and or not no nor but if than to of plus minus times over divided by squared cubed hundred thousand million billion
  trillion dozen score half halves third thirds quarter quarters choose factorial negative except about approximately
  roughly around maybe perhaps wrong false incorrect unknown more less either else otherwise base mod modulo log root
  roots sqrt power is are equals equal was because since so the answer
  """.split()
)
_MAX_UNIT_WORDS = 4
_UNIT_WORD = re.compile(r"[A-Za-z]+\.?|[%°/*]|\^-?[1-9]")


class _Parser:
  """Recursive descent. Every recursion passes through `_base` or `_function`, which count its depth."""

  def __init__(self, tokens: list[Token], symbols: Collection[str]):
    self._tokens = tokens
    self._symbols = symbols
    self._position = 0
    self._depth = 0
    self._bars = 0  # Absolute values that are open, in the innermost bracket.
    self._functions = 0  # Functions whose arguments are being read.

  def peek(self, ahead: int = 0) -> Token:
    place = self._position + ahead
    return self._tokens[place] if place < len(self._tokens) else STOP

  def _next(self) -> Token:
    token = self.peek()
    if token is STOP:
      raise UnreadableError("The text ends too early.")
    self._position += 1
    return token

  def _is(self, *texts: str) -> bool:
    token = self.peek()
    return token.kind in ("sign", "command") and token.text in texts

  def _skip(self, *texts: str) -> str:
    """Takes the next token if it is one of `texts`; what it was, or ""."""
    return self._next().text if self._is(*texts) else ""

  def _expect(self, text: str) -> None:
    if not self._skip(text):
      raise UnreadableError(f"{text!r} is missing before {self.peek().text[:20]!r}.")

  # Lists, relations, sets.

  def answer(self) -> Node:
    """items, perhaps behind a sign whose left side is missing."""
    self._skip("=", "~")
    return self.items()

  def items(self) -> Node:
    """item (("," | ";" | "and" | "or") item)*"""
    items, joints = [self._item()], set()
    while joint := self._skip(",", ";", "and", "or"):
      joints.add(joint)
      if joint in (",", ";"):
        joints.add(self._skip("and", "or"))  # `1, 2, and 3`.
      items.append(self._item())
    if len(items) == 1:
      return items[0]
    return Node("list", tuple(items), "or" if "or" in joints else "and" if "and" in joints else ",")

  def _item(self) -> Node:
    """union (sign union)*, or numbers with colons between them."""
    sides, signs = [self._union()], []
    while self._is("=", "<", ">", "<=", ">=", "!=", "in", "~"):
      signs.append(self._next().text)
      sides.append(self._union())
    if signs:
      return Node("relation", tuple(sides), " ".join(signs))
    while self._skip(":"):
      sides.append(self._union())
    return Node("ratio", tuple(sides)) if len(sides) > 1 else sides[0]

  def _union(self) -> Node:
    parts = [self._quantity()]
    while self._skip("cup"):
      parts.append(self._quantity())
    node = Node("union", tuple(parts)) if len(parts) > 1 else parts[0]
    return Node("difference", (node, self._quantity())) if self._skip("setminus") else node

  def _quantity(self) -> Node:
    """A value and the unit before or behind it."""
    sign = self._skip("-") if self.peek(1).kind == "currency" else ""
    prefix = self._next().text if self.peek().kind == "currency" else ""
    node = self._sum()
    unit = self._unit(node)
    if prefix and unit not in ("", prefix):
      raise UnreadableError("A value has two units.")
    node = Node("negative", (node,)) if sign else node
    return Node("quantity", (node,), prefix or unit) if prefix or unit else node

  def _unit(self, node: Node) -> str:
    """The unit behind a value, or "".

    Raises:
      UnreadableError: if the words behind the value are too many, or may change it.
    """
    words: list[str] = []
    while True:
      if self._is("%", "°") or self.peek().kind in ("text", "currency") or self._unit_word(node, first=not words):
        words += re.findall(r"\^-?\d+|[A-Za-z]+\.?|\S", self._next().text)
      elif words and self._is("/", "*") and self.peek(1).kind in ("text", "word", "symbol"):
        words.append(self._next().text)
      elif words and self._is("^"):
        words.append(self._power_of_unit())
      else:
        break
    if not all(_UNIT_WORD.fullmatch(word) for word in words) or len(words) > 2 * _MAX_UNIT_WORDS:
      raise UnreadableError("The text behind the value is no unit.")
    plain = [word.lower().strip(".") for word in words if word[0].isalpha()]
    if len(plain) > _MAX_UNIT_WORDS or not _NO_UNITS.isdisjoint(plain[:1] if "per" in plain else plain):
      raise UnreadableError("The words behind the value may change it.")
    return " ".join(words)

  def _unit_word(self, node: Node, *, first: bool) -> bool:
    """Whether a word or letter without a backslash comes next that is a unit, or part of one."""
    token = self.peek()
    if token.kind == "symbol":
      return self._unit_letter(token, node) if first else True
    if token.kind != "word":
      return False
    if len(token.text) > 3 or not first:
      return True
    return token.text in _SHORT_UNITS and not all(letter in self._symbols for letter in token.text)

  def _unit_letter(self, token: Token, node: Node) -> bool:
    """Whether the letter stands, behind a space, between a plain number and the end of its item."""
    if not (token.spaced and token.text in _LETTER_UNITS - set(self._symbols) and _is_literal(node)):
      return False
    ahead = 1
    if self.peek(ahead).text == "^":
      ahead += 4 if self.peek(ahead + 1).text == "{" else 2
    if self.peek(ahead).text == "/":
      return self.peek(ahead + 1).kind in ("text", "word", "symbol")
    return self.peek(ahead) is STOP or self.peek(ahead).text in (",", ";", ")", "]", "}}", "and", "or")

  def _power_of_unit(self) -> str:
    self._expect("^")
    braces = bool(self._skip("{"))
    power = "^" + self._skip("-") + self._next().text
    if braces:
      self._expect("}")
    return power

  # Sums and products.

  def _sum(self) -> Node:
    """[sign] product (sign product)*"""
    sign = self._skip("-", "+")
    if self._is("-", "+"):
      raise UnreadableError("Two signs stand side by side.")
    terms = [self._plusminus(integer(0)) if self._is("pm", "mp") else self._product()]
    terms = [Node("negative", (terms[0],))] if sign == "-" else terms
    while self._is("+", "-", "pm", "mp"):
      if self._is("pm", "mp"):
        terms = [self._plusminus(_joined("sum", terms))]
        continue
      sign, term = self._next().text, self._product()
      terms.append(Node("negative", (term,)) if sign == "-" else term)
    return _joined("sum", terms)

  def _plusminus(self, left: Node) -> Node:
    sign, right = self._next().text, self._product()
    return Node("plusminus", (left, Node("negative", (right,)) if sign == "mp" else right))

  def _product(self) -> Node:
    factors, quotients = [self._factor()], 0
    while True:
      if self._skip("*"):
        self._append(factors, self._signed(), explicit=True)
      elif self._skip("/"):
        quotients += 1
        if quotients > _MAX_QUOTIENTS:
          raise UnreadableError("There are too many slashes in one product.")
        factors = [Node("quotient", (_joined("product", factors), self._signed()))]
      elif self._starts_factor(factors):
        self._append(factors, self._factor(), explicit=False)
      else:
        return _joined("product", factors)

  def _append(self, factors: list[Node], factor: Node, *, explicit: bool) -> None:
    """Puts a factor behind the others: as one of them, or as part of a number that it makes with the last."""
    last = factors[-1]
    number = _scientific(last, factor) if explicit else None
    if not explicit and is_integer(last) and factor.kind == "quotient" and all(map(is_integer, factor.args)):
      number = _mixed(last, factor)
    if number is not None:
      factors[-1] = number
      return
    if not explicit and factor.kind == "number":
      raise UnreadableError("A number stands behind a factor.")
    factors.append(factor)

  def _starts_factor(self, factors: list[Node]) -> bool:
    token = self.peek()
    if token.kind == "sign":
      return token.text in ("(", "[", "{", "{{") or (token.text == "|" and not self._bars)
    if token.kind in ("symbol", "word"):
      return not self._unit_word(_joined("product", factors), first=True)
    return token.kind in ("number", "letters", "begin") or (
      token.kind == "command" and token.text not in ("rfloor", "rceil", "rangle", "choose")
    )

  def _signed(self) -> Node:
    """At most one sign, then a factor."""
    sign = self._skip("-", "+")
    if self._is("-", "+"):
      raise UnreadableError("Two signs stand side by side.")
    factor = self._factor()
    return Node("negative", (factor,)) if sign == "-" else factor

  def _factor(self) -> Node:
    """base ["!"] ["^" exponent], a mixed number, or a function and its argument."""
    if self.peek().kind == "command" and self.peek().text in latex.FUNCTIONS:
      return self._function()
    mixed = self._plain_mixed()
    if mixed is not None:
      return mixed
    node = self._base()
    if self._skip("!"):
      node = Node("call", (node,), "factorial")
    if self._functions and self._skip("°"):
      node = Node("degrees", (node,))
    if self._skip("^"):
      node = Node("power", (node, self._script()))
    if self._is("!", "^"):
      raise UnreadableError("A factorial or a power of a power needs brackets.")
    return node

  def _function(self) -> Node:
    self._deeper()
    name = self._next().text
    base = exponent = None
    if name == "log" and self._skip("_"):
      base = self._argument()
    if self._skip("^"):
      exponent = self._script()
    self._functions += 1
    argument = self._argument() if self._is("(", "{", "[") else self._bare_argument()
    self._functions -= 1
    self._depth -= 1
    if exponent == Node("negative", (integer(1),)) and name in ("sin", "cos", "tan", "cot"):
      return Node("call", (argument,), "arc" + name)
    node = _call(name, argument, base)
    return node if exponent is None else Node("power", (node, exponent))

  def _bare_argument(self) -> Node:
    """A product of factors without functions, brackets and signs of operations."""
    factors = [self._signed()]
    while self._starts_factor(factors) and not self._is("(", "[", "{{", *latex.FUNCTIONS):
      self._append(factors, self._factor(), explicit=False)
    return _joined("product", factors)

  def _plain_mixed(self) -> Node | None:
    """`1 1/2`, where a space divides two integers."""
    tokens = [self.peek(i) for i in range(4)]
    integers = all(tokens[i].kind == "number" and tokens[i].text.isdecimal() for i in (0, 1, 3))
    if not (integers and tokens[1].spaced and tokens[2].text == "/"):
      return None
    self._position += 4
    whole, above, below = (integer(int(tokens[i].text)) for i in (0, 1, 3))
    return _mixed(whole, Node("quotient", (above, below)))

  # What cannot be taken apart.

  def _deeper(self) -> None:
    self._depth += 1
    if self._depth > MAX_NESTING:
      raise UnreadableError(f"The text nests deeper than {MAX_NESTING}.")

  def _base(self) -> Node:
    self._deeper()
    token = self._next()
    if token.kind == "number":
      node = self._number(token)
    elif token.kind in ("symbol", "word", "letters"):
      node = self._symbol(token)
    elif token.kind == "command":
      node = self._command(token.text)
    elif token.kind == "begin":
      node = self._matrix(token.text)
    elif token.kind == "text" and self._is("=", "~"):
      node = Node("symbol", name=token.text)
    elif token.kind == "sign" and token.text in ("(", "[", "{", "{{", "|"):
      node = self._group(token.text)
    else:
      raise UnreadableError(f"{token.text[:20]!r} is not expected.")
    self._depth -= 1
    return node

  def _number(self, token: Token) -> Node:
    if token.text.isdecimal() and self._skip("_"):
      return Node("based", name=f"{token.text}_{self._raw_script()}")
    return _number_of(token.text)

  def _symbol(self, token: Token) -> Node:
    """One letter, with its subscript, primes and arguments; the rest of a word is put back."""
    name = token.text
    if token.kind in ("word", "letters"):
      if len(name) > 3:
        raise UnreadableError(f"{name[:20]!r} is a word.")
      self._position -= 1
      self._tokens[self._position] = Token("letters" if len(name) > 2 else "symbol", name[1:])
      name = name[0]
    if self._skip("_"):
      name += "_" + self._raw_script()
    while self._skip("'"):
      name += "'"
    name += self._arguments(name)
    return Node("constant", name=name) if name in ("e", "i") else Node("symbol", name=name)

  def _arguments(self, name: str) -> str:
    """The text of what a function such as f is applied to, which is part of its name; "" for other symbols.

    `P(3)` is read so too: a number in brackets behind a letter is no factor.
    """
    texts = [self.peek(i).text for i in range(5)]
    inverse = texts == ["^", "{", "-", "1", "}"] and self.peek(5).text == "("
    if not (name[0] in "fghFGH" and (inverse or texts[0] == "(")):
      if not (texts[0] == "(" and self.peek(1).kind == "number" and texts[2] == ")"):
        return ""
      inverse = False
    self._position += 5 if inverse else 0
    taken, depth = ["^-1"] if inverse else [], 0
    while True:
      token = self._next()
      taken.append(token.text)
      depth += {"(": 1, ")": -1}.get(token.text, 0)
      if not depth:
        return "".join(taken)

  def _command(self, name: str) -> Node:
    if name == "frac":
      return Node("quotient", (self._argument(), self._argument()))
    if name == "binom":
      return Node("call", (self._argument(), self._argument()), "binomial")
    if name == "sqrt":
      index = integer(2)
      if self._skip("["):
        index = self._sum()
        self._expect("]")
      return Node("root", (self._argument(), index))
    if name in ("lfloor", "lceil"):
      inside = self._sum()
      self._expect("r" + name[1:])
      return Node("call", (inside,), name[1:])
    if name == "langle":
      inside = self.items()
      self._expect("rangle")
      return Node("bracket", inside.args, "()") if inside.kind == "list" else inside
    if name in ("pi", "infinity"):
      return Node("constant", name=name)
    if name == "reals":
      return Node("reals")
    if name in ("emptyset", "varnothing"):
      return Node("set")
    if name in ("bar", "hat", "vec", "dot", "ddot", "tilde", "overline", "overrightarrow", "boldsymbol"):
      return self._symbol(Token("symbol", f"{name} {self._raw_script()}"))
    if name in latex.GREEK or name in ("ell", "hbar", "odot"):
      return self._symbol(Token("symbol", name))
    raise UnreadableError(f"The command {name[:20]!r} is not known.")

  def _argument(self) -> Node:
    """What a command is applied to: a group, one digit, or one letter or command."""
    token = self.peek()
    if self._is("{", "(", "["):
      return self._group(self._next().text)
    if token.kind == "number" and len(token.text) > 1 and token.text.isdecimal():
      self._tokens[self._position] = Token("number", token.text[1:])
      return integer(int(token.text[0]))
    return self._base()

  def _script(self) -> Node:
    """An exponent: a group, or a number or symbol with or without a sign."""
    if self._is("{"):
      return self._group(self._next().text)
    sign, node = self._skip("-"), self._base()
    return Node("negative", (node,)) if sign else node

  def _raw_script(self) -> str:
    """The text of a subscript, or of what an accent stands over."""
    if not self._skip("{"):
      token = self._next()
      if token.kind not in ("number", "symbol", "word", "letters", "command", "text"):
        raise UnreadableError("A subscript is missing.")
      return token.text
    words = []
    while not self._skip("}"):
      token = self._next()
      if token.text in ("{", "{{", "}}"):
        raise UnreadableError("A subscript holds no groups.")
      words.append(token.text)
    return "".join(words)

  def _group(self, opening: str) -> Node:
    if opening == "|":
      self._bars += 1
      inside = self._sum()
      self._bars -= 1
      self._expect("|")
      return Node("call", (inside,), "abs")
    bars, self._bars = self._bars, 0
    node = self._set() if opening == "{{" else self._bracket(opening)
    self._bars = bars
    return node

  def _bracket(self, opening: str) -> Node:
    """What stands before the closing bracket: a value, a tuple or an interval; a set for plain braces."""
    inside = self.items()
    if opening == "{" and self._skip("choose"):
      inside = Node("call", (inside, self.items()), "binomial")
    closing = self._next().text
    if inside.kind == "list" and inside.name == ",":
      if opening == "{" and closing == "}":
        return Node("set", inside.args)
      if opening in "([" and closing in (")", "]"):
        return Node("bracket", inside.args, opening + closing)
    if inside.kind == "list" or opening + closing not in ("()", "[]", "{}"):
      raise UnreadableError("The brackets do not fit what they hold.")
    return inside

  def _set(self) -> Node:
    r"""`\{1, 2\}`, `\{\}`, or `\{x : x > 1\}`, which is its condition."""
    if self._skip("}}"):
      return Node("set")
    if self.peek().kind == "symbol" and self.peek(1).text in ("|", "mid", ":"):
      self._position += 2
      inside = self.items()
      conditions = inside.args if inside.kind == "list" else (inside,)
      if any(condition.kind != "relation" for condition in conditions):
        raise UnreadableError("A set's condition is no relation.")
    else:
      inside = self.items()
      inside = Node("set", inside.args if inside.kind == "list" else (inside,))
    self._expect("}}")
    return inside

  def _matrix(self, environment: str) -> Node:
    if environment not in ("pmatrix", "bmatrix", "matrix", "array"):
      raise UnreadableError(f"The environment {environment[:20]!r} is not known.")
    rows: list[list[Node]] = [[]]
    while self.peek().kind != "end":
      rows[-1].append(self._sum())
      if self._skip("\\\\"):
        if self.peek().kind != "end":
          rows.append([])
      elif not self._skip("&") and self.peek().kind != "end":
        raise UnreadableError("A matrix has no such entry.")
    if self._next().text != environment or not rows[0] or len({len(row) for row in rows}) != 1:
      raise UnreadableError("The matrix is not complete.")
    return Node("matrix", tuple(Node("row", tuple(row)) for row in rows))


# ---------------------------------------------------------------------------
# Numbers.
# ---------------------------------------------------------------------------


def _number_of(text: str) -> Node:
  """Digits with a decimal point and an exponent or repeating digits, each of which may be missing."""
  if "overline" in text:
    whole, once, repeating = re.fullmatch(r"(\d*)\.(\d*)\D+(\d+)\}", text).groups()  # type: ignore[union-attr]
    fraction = Fraction(int(once or 0)) + Fraction(int(repeating), 10 ** len(repeating) - 1)
    return Node("number", name="repeating", value=int(whole or 0) + fraction / 10 ** len(once))
  mantissa, _, exponent = text.lower().partition("e")
  if abs(int(exponent or 0)) > MAX_EXPONENT:
    raise UnreadableError("The exponent is too large.")
  whole, _, rest = mantissa.partition(".")
  value = Fraction(int(whole + rest), 10 ** len(rest)) * Fraction(10) ** int(exponent or 0)
  if not exponent and not rest:
    return integer(int(whole))
  return Node("number", name="scientific" if exponent else "decimal", value=value, digits=_significant(whole + rest))


def _significant(digits: str) -> int:
  return max(1, len(digits.lstrip("0")))


def is_integer(node: Node) -> bool:
  return node.kind == "number" and node.name == "integer"


def _is_literal(node: Node) -> bool:
  return node.kind == "number" or (node.kind == "negative" and node.args[0].kind == "number")


def _scientific(mantissa: Node, power: Node) -> Node | None:
  r"""`4.5 \times 10^{33}` as one number, if that is what the two factors are."""
  if mantissa.kind == "negative":
    number = _scientific(mantissa.args[0], power)
    return None if number is None else Node("negative", (number,))
  if mantissa.kind != "number" or mantissa.name not in ("integer", "decimal") or not 1 <= mantissa.value < 10:
    return None
  exponent = power_of_ten(power)
  if exponent in (None, 0):
    return None
  value = mantissa.value * Fraction(10) ** exponent
  return Node("number", name="scientific", value=value, digits=mantissa.digits or 1)


def power_of_ten(node: Node) -> int | None:
  """n if the node is written as 10^n with an integer n, else None."""
  if node.kind != "power" or node.args[0] != integer(10):
    return None
  exponent, sign = node.args[1], 1
  if exponent.kind == "negative":
    exponent, sign = exponent.args[0], -1
  return sign * int(exponent.value) if is_integer(exponent) and exponent.value <= MAX_EXPONENT else None


def _mixed(whole: Node, part: Node) -> Node:
  above, below = (arg.value for arg in part.args)
  if not 0 < above < below or whole.value == 0:
    raise UnreadableError("A number stands before a fraction that is not between 0 and 1.")
  fraction = above / below
  name = "mixed" if fraction.denominator == below else "unreduced"
  return Node("number", name=name, value=whole.value + fraction)


def _joined(kind: str, nodes: list[Node]) -> Node:
  return Node(kind, tuple(nodes)) if len(nodes) > 1 else nodes[0]


def _call(name: str, argument: Node, base: Node | None) -> Node:
  e = Node("constant", name="e")
  if name == "exp":
    return Node("power", (e, argument))
  if name != "log":
    return Node("call", (argument,), name)
  return Node("call", (argument,), "ln") if base == e else Node("call", (argument, base or integer(10)), "log")
