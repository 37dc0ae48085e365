"""Verifiers: response text -> a reward in [0, 1], as pure functions of text.

The text comes from a model that is trained to please these functions. So they read
the final answer alone, run none of it as code, ask for no other process, and take
bounded time and memory whatever it holds: linear time in the text's length, and for
mathematics about a second more at worst (`mathematics.values.MAX_OPERATIONS`).

An earlier version asked the math-verify library whether two answers are equal, in
processes of its own, because that library evaluates text. It was replaced, because it
accepts an unevaluated question as its own answer and reads one answer in several ways;
benchmarks/verifiers.py compares the two.
"""

import decimal
import itertools
import re
from collections.abc import Callable

from rredcot_jax.data.encoding import THINK_CLOSE, THINK_OPEN
from rredcot_jax.data.mathematics import equality

MAX_ANSWER_CHARS = 1024  # A longer final answer is no answer.
MAX_NUMBER_CHARS = 64  # A longer number is no number.

# Groups of thousands or plain digits, a fraction, and an exponent of at most four digits. Each character can be
# matched in one way only, so there is nothing to backtrack into.
_NUMBER = re.compile(
  r"(?P<sign>[+-]?)[$€£¥₹]?(?P<whole>\d{1,3}(?:,\d{3})+|\d+)?(?P<rest>(?:\.\d+)?(?:[eE][+-]?\d{1,4})?)%?", re.ASCII
)
_BOX_COMMANDS = ("\\boxed", "\\fbox")
# A box's opening, an escaped character (of which `\{` and `\}` are no brackets of LaTeX), or a brace.
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_DASHES = str.maketrans("\N{MINUS SIGN}\N{EN DASH}\N{EM DASH}\N{FIGURE DASH}", "----")


# ---------------------------------------------------------------------------
# Where the answer stands.
# ---------------------------------------------------------------------------


def after_thought(text: str | None) -> str | None:
  """What stands after the last exit from the thought; None without one. All verifiers find the answer's text here."""
  _, found, rest = (text or "").rpartition(THINK_CLOSE)
  return rest if found else None


def final_answer(text: str | None) -> str | None:
  """What stands after the thought, stripped of white space.

  Returns:
    None if the thought was never left, if nothing follows, or if what follows
    is longer than `MAX_ANSWER_CHARS`.
  """
  return _bounded(after_thought(text))


def boxed_answer(text: str | None) -> str | None:
  r"""What the last balanced `\boxed{...}` or `\fbox{...}` holds, stripped of white space.

  Read after the thought, or in the whole text if it is never left: models that
  are not trained to think mark the answer with a box only. The last box is the one
  that opens last, so of two nested ones the inner.

  Returns:
    None if there is no balanced box, or if the last one is empty or longer than
    `MAX_ANSWER_CHARS`.
  """
  rest = after_thought(text)
  rest = (text or "") if rest is None else rest
  last = (-1, -1)  # Where the content starts and ends.
  opened: list[int] = []  # Where each open brace's content starts; negated where it is no box.
  for match in _BRACES.finditer(rest):
    token = match[0]
    if token == "}":
      if opened:
        last = max(last, (opened.pop(), match.start()))
    elif token == "{":
      opened.append(-match.end())
    elif token.endswith("{") and len(token) > 2:
      opened.append(match.end())
  return _bounded(rest[last[0] : last[1]]) if last[0] >= 0 else None


def answer_of(text: str | None) -> str | None:
  """What a response answers, whoever judges it: its last box's content or, without a box, its final answer."""
  boxed = boxed_answer(text)
  return final_answer(text) if boxed is None else boxed


def gold_answer_from_solution(solution: str) -> str | None:
  r"""The gold answer of a reference solution: what its last `\boxed{...}` holds, or None; see `boxed_answer`."""
  return boxed_answer(solution)


# ---------------------------------------------------------------------------
# Whether it is the right one.
# ---------------------------------------------------------------------------


def exact_match(text: str | None, answer: str | None) -> float:
  """1.0 if the response's final answer is `answer`, up to white space around it; else 0.0."""
  response = final_answer(text)
  return float(response is not None and response == (answer or "").strip())


def numeric_match(text: str | None, answer: str | None) -> float:
  """1.0 if the response's final answer is the number `answer`; else 0.0.

  The whole final answer must be one number: `-1,234.50`, `$5`, `50%`, `1e3` and
  `42.` are read, `x = 42` is not. Numbers are compared exactly, as decimals; a
  percent sign is dropped, not divided by. An `answer` that is no number matches
  nothing.
  """
  response = final_answer(text)
  if response is None or answer is None:
    return 0.0
  number = parse_number(response)
  return float(number is not None and number == parse_number(answer))


def math_match(text: str | None, answer: str | None, *, any_form: bool = False) -> float:
  r"""1.0 if the response's answer is mathematically equal to `answer` and as simple as it; else 0.0.

  The response's answer is what its last box holds (`boxed_answer`) or, without
  any box, its final answer. Both it and `answer` are LaTeX, bare or between
  dollar signs; plain text is read too. Of prose with mathematics in it, the last
  piece between dollar signs, `\(..\)` or `\[..\]` is read.

  - Form (`mathematics.forms`): an answer may hold no work that the reference does not
    hold. For 391, `17\cdot 23` pays nothing; a number, a reduced fraction, a mixed
    number or scientific notation pays. A factored reference wants factors, an expanded
    one none.
  - Value (`mathematics.equality`): exact, except that a decimal of at least six
    significant digits answers the numbers that it rounds: `0.333333` answers 1/3. A fraction
    answers a decimal that shows its period twice: 1/3 answers 0.333333, and 22/7 does not
    answer 3.142857.
  - Units: `5\text{ cm}`, `45^\circ` and `$5` answer 5, and 5 answers them, but `5\text{ m}`
    does not answer 5 cm. A percent sign is such a unit: `50\%` answers 50 and never 0.5,
    because corpora that ask for a percentage write 50.
  - Sets and lists have no order, tuples do; `x = 5` answers 5.

  An answer that cannot be read (`mathematics.expressions`) matches its own text alone.

  Args:
    text: the response.
    answer: the gold answer.
    any_form: accepts an equal answer that is not as simple. A policy that is asked to
      compute, simplify or factor can then be paid for handing the question back.
  """
  response = boxed_answer(text)
  if response is None:
    response = final_answer(text)
    if response is not None and any(command in response for command in _BOX_COMMANDS):
      return 0.0  # A box there is, but none that can be read.
  gold = _bounded(answer)
  if response is None or gold is None:
    return 0.0
  response, gold = mathematics_of(response), mathematics_of(gold)
  return float(bool(response) and bool(gold) and equality.equal(gold, response, any_form=any_form))


def format_reward(text: str | None) -> float:
  """1.0 if the thought is left exactly once, and for an answer; else 0.0.

  That is: one `</think>`, a final answer after it (see `final_answer`), and no
  `<think>` but one at the very start: prompts open the thought, some models
  repeat that.
  """
  text = text or ""
  rest = text.lstrip().removeprefix(THINK_OPEN)
  return float(THINK_OPEN not in rest and text.count(THINK_CLOSE) == 1 and final_answer(text) is not None)


def composite(text: str | None, answer: str, *, match: Callable[[str, str], float], format_weight: float) -> float:
  """(1 - format_weight) * match(text, answer) + format_weight * format_reward(text), in [0, 1].

  Args:
    text: the response.
    answer: the gold answer.
    match: one of `VERIFIERS`, or any function to [0, 1].
    format_weight: in [0, 1).

  Raises:
    ValueError: if `format_weight` is outside [0, 1).
  """
  if not 0.0 <= format_weight < 1.0:
    raise ValueError(f"format_weight must be in [0, 1), not {format_weight!r}.")
  return (1.0 - format_weight) * match(text or "", answer) + format_weight * format_reward(text)


VERIFIERS: dict[str, Callable[[str, str], float]] = {
  "exact": exact_match,
  "numeric": numeric_match,
  "math": math_match,
}


# ---------------------------------------------------------------------------
# The text of an answer.
# ---------------------------------------------------------------------------

# Mathematics in text. A dollar sign behind a backslash is a currency.
_PIECE = re.compile(r"(?<!\\)\$\$(.+?)(?<!\\)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_INTRODUCTION = re.compile(
  r"(?:\\text\s*\{\s*)?(?:(?:so|thus|therefore|hence),? )?(?:the )?(?:final )?answer(?: is)?\s*[:=]?(?:\s*\}|\s)\s*",
  re.IGNORECASE,
)
_JOINT = re.compile(r"\s*(?:,|;|,?\s*(?:and|or))\s*", re.IGNORECASE)
_LIST_AHEAD = re.compile(r"(?:\b(?:is|are|be)|[:=])$", re.IGNORECASE)
_UNIT_BEHIND = re.compile(r"\s*[A-Za-z%°][A-Za-z%°/^0-9 ]*\.?\s*")


def mathematics_of(text: str) -> str:
  r"""The mathematics in an answer: the text without dollar signs, emphasis and an introduction such as "The answer is".

  Pieces between dollar signs, `\(..\)` or `\[..\]` that end the text and are joined by
  "and" or "or", or by commas behind "are" or a colon, are one list. Words behind a
  single piece may be its unit. Of other text with such pieces, the last one is read.
  """
  text = text.strip().strip("*").strip()
  introduction = _INTRODUCTION.match(text)
  text = text[introduction.end() :].strip("* ") if introduction else text
  pieces = list(_PIECE.finditer(text))
  if not pieces:
    return text.strip()
  contents = [next(filter(None, piece.groups())).strip() for piece in pieces]
  between = [text[left.end() : right.start()] for left, right in itertools.pairwise(pieces)]
  first = next((i for i in range(len(between), 0, -1) if not _JOINT.fullmatch(between[i - 1])), 0)
  before = text[: pieces[first].start()].strip()
  if first < len(between) and (not before or _LIST_AHEAD.search(before) or between[-1].strip(" ,")):
    joints = [" or " if "or" in words else " , " for words in between[first:]]
    return contents[first] + "".join(joint + content for joint, content in zip(joints, contents[first + 1 :]))
  behind = text[pieces[-1].end() :]
  if len(pieces) == 1 and not text[: pieces[0].start()].strip() and _UNIT_BEHIND.fullmatch(behind):
    return contents[0] + r"\text{ " + behind.strip(" .") + "}"
  return contents[-1]


def parse_number(text: str) -> decimal.Decimal | None:
  """The number that `text` is, exactly; None if it is none. See `numeric_match`."""
  text = text.strip().translate(_DASHES)
  if len(text) > MAX_NUMBER_CHARS:
    return None
  match = _NUMBER.fullmatch(text.removesuffix("."))
  if match is None or not (match["whole"] or match["rest"].startswith(".")):
    return None
  return decimal.Decimal(match["sign"] + (match["whole"] or "0").replace(",", "") + match["rest"])


def without_dollars(text: str) -> str:
  """`text` with an ASCII minus, without currency signs and without the dollar signs around all of it."""
  text = text.translate(_DASHES).replace("\\$", "").strip().removesuffix(".")
  inside = text.strip("$").strip().removesuffix(".")
  return text if "$" in inside else inside  # `$1$ and $2$` stays as it is.


def _bounded(text: str | None) -> str | None:
  """`text` stripped of white space; None if nothing or more than `MAX_ANSWER_CHARS` is left."""
  text = (text or "").strip()
  return text if 0 < len(text) <= MAX_ANSWER_CHARS else None
