"""Verifiers: response text -> a reward in [0, 1], as pure functions of text.

The text comes from a model that is trained to please these functions, so they
read nothing but the final answer, evaluate nothing, and take time linear in
the text's length whatever it holds.
"""

import decimal
import re

from rredcot_jax.tasks import THINK_CLOSE

MAX_ANSWER_CHARS = 1024  # A longer final answer is no answer.
MAX_NUMBER_CHARS = 64  # A longer number is no number.

# Groups of thousands or plain digits, a fraction, and an exponent of at most four digits. Each character can be
# matched in one way only, so there is nothing to backtrack into.
_NUMBER = re.compile(
  r"(?P<sign>[+-]?)\$?(?P<whole>\d{1,3}(?:,\d{3})+|\d+)?(?P<rest>(?:\.\d+)?(?:[eE][+-]?\d{1,4})?)%?", re.ASCII
)


def final_answer(text: str) -> str | None:
  """What stands after the last `</think>`, stripped of white space.

  Returns:
    None if the thought was never left, if nothing follows, or if what follows
    is longer than `MAX_ANSWER_CHARS`.
  """
  start = text.rfind(THINK_CLOSE)
  if start < 0:
    return None
  answer = text[start + len(THINK_CLOSE) :].strip()
  return answer if 0 < len(answer) <= MAX_ANSWER_CHARS else None


def exact_match(text: str, answer: str) -> float:
  """1.0 if the response's final answer is `answer`, up to white space around it; else 0.0."""
  return float(final_answer(text) == answer.strip())


def numeric_match(text: str, answer: str) -> float:
  """1.0 if the response's final answer is the number `answer`; else 0.0.

  The whole final answer must be one number: `-1,234.50`, `$5`, `50%`, `1e3` and
  `42.` are read, `x = 42` is not. Numbers are compared exactly, as decimals; a
  percent sign is dropped, not divided by. An `answer` that is no number matches
  nothing.
  """
  response = final_answer(text)
  if response is None:
    return 0.0
  number = _parse_number(response)
  return float(number is not None and number == _parse_number(answer))


def _parse_number(text: str) -> decimal.Decimal | None:
  text = text.strip()
  if len(text) > MAX_NUMBER_CHARS:
    return None
  match = _NUMBER.fullmatch(text.removesuffix("."))
  if match is None or not (match["whole"] or match["rest"].startswith(".")):
    return None
  return decimal.Decimal(match["sign"] + (match["whole"] or "0").replace(",", "") + match["rest"])
