"""Text that a model, a file or a user wrote, made safe to show: control characters as codes, sizes bounded."""

import textwrap
import unicodedata
from typing import Any


def is_hidden(character: str) -> bool:
  """Whether a character is a control, bidi, zero-width, surrogate, private or unassigned one; not "\\n", "\\t"."""
  return not (character.isprintable() or character in "\n\t" or unicodedata.category(character) == "Zs")


def code(character: str) -> str:
  r"""The escape that stands for a character: \x1b, \u202e, \U000e0041."""
  point = ord(character)
  return f"\\x{point:02x}" if point < 0x100 else f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}"


def visible(text: Any) -> str:
  """`str(text)` with every hidden character as its code; newlines and tabs stay."""
  text = str(text)
  if text.isprintable():
    return text
  return "".join(code(character) if is_hidden(character) else character for character in text)


def shorten(text: Any, limit: int) -> str:
  """The first `limit` characters of `str(text)`, and how many more there are."""
  text = str(text)
  return text if len(text) <= limit else f"{text[:limit]} … {len(text) - limit:,} more characters"


def wrap(text: Any, width: int, limit: int) -> list[str]:
  """`text` made visible, as 1 to `limit` lines of at most `width` characters; its own line ends become ↵.

  What does not fit is left out and the last line ends in …, in time that does not grow with what is left out.
  """
  head = str(text)[: width * limit + 1]  # A line shows at most `width` characters, and none is dropped.
  pieces = visible(head).replace("\n", "↵\n").removesuffix("\n").split("\n")
  wrapper = textwrap.TextWrapper(
    width, tabsize=4, replace_whitespace=False, drop_whitespace=False, break_on_hyphens=False
  )
  lines = [line for piece in pieces for line in wrapper.wrap(piece) or [""]]
  return lines if len(lines) <= limit else [*lines[: limit - 1], f"{lines[limit - 1][: width - 2].rstrip()} …"]


def one_line(text: Any, width: int) -> str:
  """`text` made visible in at most `width` characters of one line, runs of white space as one space."""
  text = str(text)
  head = text[: 20 * width]
  line = " ".join(head.split())
  return wrap(line if head == text else f"{line} …", width, 1)[0]
