r"""An answer's text, LaTeX or plain, becomes tokens. Linear time.

Characters beyond ASCII that stand for mathematics (minus signs, dashes, `x²`, `½`,
`√`, `π`, `≤`, `°`) become the LaTeX that means the same. Commands that change looks
alone are dropped. Digits in groups of three become one number:

- `1{,}234`, `1,\!234`, `1\,234` and `1.234.567` everywhere;
- `1,234` and `1 234` outside brackets, unless the caller says that commas divide.
"""

import dataclasses
import re

_DASHES = "\N{MINUS SIGN}\N{EN DASH}\N{EM DASH}\N{FIGURE DASH}\N{SMALL HYPHEN-MINUS}\N{HYPHEN}\N{NON-BREAKING HYPHEN}"
_SIGNS = {
  "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "•": r"\cdot ", "∗": "*",
  "÷": "/", "⁄": "/", "∕": "/", "±": r"\pm ", "∓": r"\mp ",
  "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
  "∞": r"\infty ", "√": r"\sqrt ", "∛": r"\sqrt[3] ", "∪": r"\cup ", "∖": r"\setminus ", "∈": r"\in ",
  "ℝ": r"\mathbb{R}", "∠": " ", "′": "'", "’": "'", "\N{MICRO SIGN}": r"\mu ",
  "\N{THIN SPACE}": r"\,", "\N{NARROW NO-BREAK SPACE}": r"\,", "\N{NO-BREAK SPACE}": r"\,",
  **dict.fromkeys(_DASHES, "-"),
}  # fmt: skip
GREEK = (
  "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi omega "
  "Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega"
).split()
_GREEK_LETTERS = "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΥΦΨΩ"
_VULGAR = "½1/2 ⅓1/3 ⅔2/3 ¼1/4 ¾3/4 ⅕1/5 ⅖2/5 ⅗3/5 ⅘4/5 ⅙1/6 ⅚5/6 ⅛1/8 ⅜3/8 ⅝5/8 ⅞7/8 ⅐1/7 ⅑1/9".split()

_CHARACTERS = {ord(character): latex for character, latex in _SIGNS.items()}
_CHARACTERS |= {ord(letter): f"\\{name} " for letter, name in zip(_GREEK_LETTERS, GREEK, strict=True)}
_CHARACTERS |= {ord(entry[0]): f"\\frac{{{entry[1]}}}{{{entry[3]}}}" for entry in _VULGAR}
_CHARACTERS |= {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # Full-width forms of ASCII.

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_LOOKS = re.compile(
  r"\\(?:left|right|middle|[bB]igg?[lr]?|displaystyle|textstyle|limits|angle|triangle|therefore|rm)(?![A-Za-z])\.?"
)
_COLOUR = re.compile(r"\\(?:text)?color\s*\{[A-Za-z]{1,20}\}")
_OVER = re.compile(r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}")
_DEGREE = re.compile(r"(?:\{\s*\})?\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])")
_PRIMES = re.compile(r"\^\s*(?:\{\s*(?:\\prime\s*)+\}|\\prime(?![A-Za-z]))")
_HALF_DAY = re.compile(r"(?<![A-Za-z])([apAP])\.\s*[mM]\.?(?![A-Za-z])")
_TIMES_TEN = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)")


def to_latex(text: str) -> str:
  """`text` in ASCII and `°`, without commands that change looks alone."""
  text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda match: "^{" + match[0].translate(_SUPERSCRIPTS) + "}", text)
  text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda match: "_{" + match[0].translate(_SUBSCRIPTS) + "}", text)
  text = text.translate(_CHARACTERS)
  text = _DEGREE.sub("°", _HALF_DAY.sub(r"\1m", text))
  text = _PRIMES.sub(lambda match: "'" * match[0].count("prime"), text)
  text = _OVER.sub(r"\\frac{\1}{\2}", _COLOUR.sub(" ", _LOOKS.sub(" ", text)))
  text = text.replace(r"\|", r"\Vert ").replace(r"\lvert", "|").replace(r"\rvert", "|")
  return _TIMES_TEN.sub(r" \\times ", text).replace("**", "^")


# ---------------------------------------------------------------------------

_EXPONENT = r"(?:[eE][+-]?\d{1,4}(?![\dA-Za-z.]))?"
PLAIN_NUMBER = rf"(?:\d+(?:\.\d*)?|\.\d+){_EXPONENT}"
REPEATING = r"\d*\.\d*\\overline\s*\{\d+\}"
# Digits in threes, between which stands what can be nothing but a separator.
_GROUPS = rf"\d{{1,3}}(?:(?:\{{,\}}|,\\!|\\[,;:! ]|~)\s*\d{{3}})+(?!\d)(?:\.\d+)?{_EXPONENT}"
_DOTTED = r"[1-9]\d{0,2}(?:\.\d{3}){2,}(?![\d.])"
# The same with separators that inside brackets divide items.
_OPEN_GROUPS = re.compile(rf"[1-9]\d{{0,2}}(?:(?:,\d{{3}})+|(?:\ \d{{3}})+)(?!\d)(?:\.\d+)?{_EXPONENT}", re.ASCII)

_TEXT_COMMANDS = "text(?:bf|it|rm|normal|sf)?|mbox|hbox|math(?:rm|bf|sf|it|cal|bb)|boldsymbol|bm|operatorname\\*?"
_TOKEN = re.compile(
  rf"""
  (?P<space>(?:\s|\\[,;:!>\ ]|~|\\q?quad(?![A-Za-z]))+)
  |(?P<groups>{_GROUPS}|{_DOTTED})
  |(?P<number>{REPEATING}|{PLAIN_NUMBER})
  |\\(?P<text>{_TEXT_COMMANDS})\s*\{{(?P<content>[^{{}}]*)\}}
  |\\(?P<edge>begin|end)\s*\{{(?P<environment>[a-z*]+)\}}(?:\s*\{{[lcr|]+\}})?
  |(?P<currency>\\\$|\\pounds(?![A-Za-z])|\\euro(?![A-Za-z])|[€£¥₹¢$])
  |\\(?P<command>[A-Za-z]+|[{{}}%\\])
  |(?P<word>[A-Za-z]+)
  |(?P<sign><=|>=|!=|:=|.)
  """,
  re.VERBOSE | re.DOTALL | re.ASCII,
)

_CURRENCIES = {
  "\\$": "dollar", "$": "dollar", "\\euro": "euro", "€": "euro", "\\pounds": "pound sterling", "£": "pound sterling",
  "¥": "yen", "₹": "rupee", "¢": "cent",
}  # fmt: skip
# Commands that read as signs.
_AS_SIGNS = {
  "cdot": "*", "times": "*", "ast": "*", "div": "/", "colon": ":", "vert": "|", "mid": "mid", "lbrack": "[",
  "rbrack": "]", "lbrace": "{{", "rbrace": "}}", "prime": "'", "{": "{{", "}": "}}", "%": "%", "\\": "\\\\",
  "lt": "<", "gt": ">", "le": "<=", "leq": "<=", "leqslant": "<=", "ge": ">=", "geq": ">=", "geqslant": ">=",
  "ne": "!=", "neq": "!=", "in": "in", "approx": "~", "simeq": "~", "cup": "cup", "setminus": "setminus",
  "backslash": "setminus", "pm": "pm", "mp": "mp",
}  # fmt: skip
_ALIASES = {
  "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "infty": "infinity",
  "inf": "infinity", "varphi": "phi", "vartheta": "theta", "varepsilon": "epsilon", "lg": "log", "asin": "arcsin",
  "acos": "arccos", "atan": "arctan",
}  # fmt: skip
FUNCTIONS = frozenset(
  "sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh ln log exp".split()
)  # fmt: skip
# Words that need no backslash to be commands. `sec` stands for seconds.
_COMMAND_WORDS = FUNCTIONS - {"sec"} | {"asin", "acos", "atan", "lg", "pi", "sqrt", "inf", "infty", "infinity"}
_CONNECTIVES = ("and", "or")


@dataclasses.dataclass(frozen=True)
class Token:
  """A token's kind, its text, and whether white space stands before it.

  Kinds: "number"; "symbol" (one letter); "word" (letters without a backslash);
  "letters" (letters that are symbols side by side); "command"; "sign"; "text" (what
  `\\text{}` holds); "currency"; "begin" and "end" (of an environment); "stop".
  Brackets that are set braces have the text `{{` or `}}`.
  """

  kind: str
  text: str
  spaced: bool = False


STOP = Token("stop", "")


def tokens_of(latex: str, *, separate: bool) -> list[Token]:
  """The tokens of what `to_latex` gives. `separate`: every bare comma divides items, none groups digits."""
  tokens: list[Token] = []
  position, depth, spaced = 0, 0, False
  while position < len(latex):
    grouped = None if depth or separate else _OPEN_GROUPS.match(latex, position)
    if grouped is not None:
      tokens.append(Token("number", re.sub("[, ]", "", grouped[0]), spaced))
      position, spaced = grouped.end(), False
      continue
    match = _TOKEN.match(latex, position)
    assert match is not None  # The last alternative matches any character.
    position = match.end()
    if match["space"]:
      spaced = True
      continue
    token = _token(match, spaced)
    spaced = False
    depth += {"(": 1, "[": 1, "{{": 1, "langle": 1, ")": -1, "]": -1, "}}": -1, "rangle": -1}.get(token.text, 0)
    tokens.append(token)
  return tokens


def _token(match: re.Match[str], spaced: bool) -> Token:
  if match["groups"]:
    dotted = re.fullmatch(_DOTTED, match["groups"])
    return Token("number", re.sub(r"[.]" if dotted else r"\{,\}|,\\!|\\[,;:! ]|~|\s", "", match["groups"]), spaced)
  if match["number"]:
    return Token("number", match["number"], spaced)
  if match["text"]:
    return _text_token(match["text"], match["content"].replace("~", " "), spaced)
  if match["edge"]:
    return Token(match["edge"], match["environment"], spaced)
  if match["currency"]:
    return Token("currency", _CURRENCIES[match["currency"]], spaced)
  if match["command"]:
    name = match["command"]
    return Token("sign", _AS_SIGNS[name], spaced) if name in _AS_SIGNS else _command(name, spaced)
  if match["word"]:
    return _word_token(match["word"], spaced)
  return Token("sign", "=" if match["sign"] == ":=" else match["sign"], spaced)


def _command(name: str, spaced: bool) -> Token:
  return Token("command", _ALIASES.get(name, name), spaced)


def _text_token(command: str, content: str, spaced: bool) -> Token:
  words = content.strip()
  if command == "mathbb":
    return Token("command", "reals" if words == "R" else "mathbb", spaced)
  if words in _COMMAND_WORDS or (command.startswith("operatorname") and words in FUNCTIONS):
    return _command(words, spaced)
  if re.fullmatch(PLAIN_NUMBER, words, re.ASCII):
    return Token("number", words, spaced)
  if len(content) == 1 and content.isalpha() and not command.startswith(("text", "mbox", "hbox")):
    return Token("symbol", content, True)  # As a unit it needs no space before it.
  connective = words.lower().strip(" ,.")
  return Token("sign", connective, spaced) if connective in _CONNECTIVES else Token("text", words, spaced)


def _word_token(word: str, spaced: bool) -> Token:
  if word.lower() in _CONNECTIVES:
    return Token("sign", word.lower(), spaced)
  if word in _COMMAND_WORDS:
    return _command(word, spaced)
  return Token("symbol" if len(word) == 1 else "word", word, spaced)
