"""Verifiers: response text -> a reward in [0, 1], as pure functions of text.

The text comes from a model that is trained to please these functions, so they
read nothing but the final answer, evaluate nothing, and take bounded time and
memory whatever it holds: linear time in the text's length, and at most
`JUDGE_SECONDS` and `JUDGE_BYTES` more where mathematics must be compared.

Mathematics is compared by the math-verify library, which cannot be trusted with
such text in this process. A *judge* is a worker process that has imported the
library and answers one question, "does this answer equal that gold answer?", by
forking a child that is killed after `JUDGE_SECONDS`. The judge itself reads no
answer, so it outlives them all: a row of hostile answers costs `JUDGE_SECONDS`
each and never a new start, no verdict depends on the answers before it, and
only a judge, which has one thread and no jax, ever forks.
"""

import atexit
import decimal
import gc
import importlib.util
import inspect
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from rredcot_jax.data.encoding import THINK_CLOSE, THINK_OPEN

MAX_ANSWER_CHARS = 1024  # A longer final answer is no answer.
MAX_NUMBER_CHARS = 64  # A longer number is no number.
MAX_NESTING = 32  # An answer with more brackets inside one another is no mathematics.

JUDGE_SECONDS = 0.8  # Of wall time for one comparison; start-up is not counted.
JUDGE_BYTES = 2 << 30  # Of address space.
START_SECONDS = 120.0  # A judge that needs longer to start, 0.5 s on an idle machine, is broken.
MAX_JUDGES = max(1, min(8, os.cpu_count() or 1))  # As many comparisons run at once, if threads ask for them.

# Groups of thousands or plain digits, a fraction, and an exponent of at most four digits. Each character can be
# matched in one way only, so there is nothing to backtrack into.
_NUMBER = re.compile(
  r"(?P<sign>[+-]?)\$?(?P<whole>\d{1,3}(?:,\d{3})+|\d+)?(?P<rest>(?:\.\d+)?(?:[eE][+-]?\d{1,4})?)%?", re.ASCII
)
_BOX_COMMANDS = ("\\boxed", "\\fbox")
# A box's opening, an escaped character (of which `\{` and `\}` are no brackets of LaTeX), or a brace.
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def final_answer(text: str) -> str | None:
  """What stands after the last `</think>`, stripped of white space.

  Returns:
    None if the thought was never left, if nothing follows, or if what follows
    is longer than `MAX_ANSWER_CHARS`.
  """
  start = text.rfind(THINK_CLOSE)
  if start < 0:
    return None
  return _bounded(text[start + len(THINK_CLOSE) :])


def boxed_answer(text: str) -> str | None:
  r"""What the last balanced `\boxed{...}` or `\fbox{...}` holds, stripped of white space.

  Read after the last `</think>`, or in the whole text if there is none: models
  that are not trained to think mark the answer with a box only. The last box is
  the one that opens last, so of two nested ones the inner.

  Returns:
    None if there is no balanced box, or if the last one is empty or longer than
    `MAX_ANSWER_CHARS`.
  """
  start = text.rfind(THINK_CLOSE)
  last = (-1, -1)  # Where the content starts and ends.
  opened: list[int] = []  # Where each open brace's content starts; negated where it is no box.
  for match in _BRACES.finditer(text, 0 if start < 0 else start + len(THINK_CLOSE)):
    token = match[0]
    if token == "}":
      if opened:
        last = max(last, (opened.pop(), match.start()))
    elif token == "{":
      opened.append(-match.end())
    elif token.endswith("{") and len(token) > 2:
      opened.append(match.end())
  return _bounded(text[last[0] : last[1]]) if last[0] >= 0 else None


def answer_of(text: str) -> str | None:
  """What a response answers, whoever judges it: its last box's content or, without a box, its final answer."""
  boxed = boxed_answer(text)
  return final_answer(text) if boxed is None else boxed


def gold_answer_from_solution(solution: str) -> str | None:
  r"""The gold answer of a reference solution: what its last `\boxed{...}` holds, or None; see `boxed_answer`."""
  return boxed_answer(solution)


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
  number = parse_number(response)
  return float(number is not None and number == parse_number(answer))


def math_match(text: str, answer: str) -> float:
  r"""1.0 if the response's answer is mathematically equal to `answer`; else 0.0.

  The response's answer is what its last box holds (`boxed_answer`) or, without
  any box, its final answer. Both it and `answer` are LaTeX, bare or between
  dollar signs; a plain number or formula is LaTeX too. Of a final answer in
  prose, only what stands between dollar signs, `\(..\)` or `\[..\]` is read.

  Equal texts and equal numbers (as `numeric_match` reads them) are equal,
  unequal integers are not; all else is as math-verify has it by default:
  `x = 5` answers 5, `0.333333` answers 1/3, `50\%` answers both 0.5 and 50, units
  are dropped, sets have no order and tuples do. An answer that cannot be read,
  that nests deeper than `MAX_NESTING`, or whose comparison needs more than
  `JUDGE_SECONDS` or `JUDGE_BYTES`, matches nothing.

  Safe to call from threads; up to `MAX_JUDGES` comparisons then run at once. The
  first comparison of a process waits for a judge to start.

  Raises:
    ImportError: if math-verify is not installed.
    RuntimeError, OSError: if a judge cannot be started on this machine. None of
      these depends on `text`.
  """
  if importlib.util.find_spec("math_verify") is None:
    raise ImportError("Mathematical answers are compared by math-verify: pip install math-verify")
  response, gold = boxed_answer(text), _bounded(answer)
  if response is None:
    response = final_answer(text)
    if response is not None and any(command in response for command in _BOX_COMMANDS):
      return 0.0  # A box there is, but none that can be read.
  if response is None or gold is None:
    return 0.0

  response, gold = without_dollars(response), without_dollars(gold)
  if not response or not gold:
    return 0.0
  if response == gold:
    return 1.0
  numbers = parse_number(response), parse_number(gold)
  if None not in numbers:
    if numbers[0] == numbers[1]:
      return 1.0
    if all(number == number.to_integral_value() for number in numbers if number is not None):
      return 0.0  # Most wrong answers end here, without the library.
  if max(_nesting(response), _nesting(gold)) > MAX_NESTING:
    return 0.0
  return float(_JUDGES.equal(gold, response))


def format_reward(text: str) -> float:
  """1.0 if the thought is left exactly once, and for an answer; else 0.0.

  That is: one `</think>`, a final answer after it (see `final_answer`), and no
  `<think>` but one at the very start: prompts open the thought, some models
  repeat that.
  """
  rest = text.lstrip().removeprefix(THINK_OPEN)
  return float(THINK_OPEN not in rest and text.count(THINK_CLOSE) == 1 and final_answer(text) is not None)


def composite(text: str, answer: str, *, match: Callable[[str, str], float], format_weight: float) -> float:
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
  return (1.0 - format_weight) * match(text, answer) + format_weight * format_reward(text)


VERIFIERS: dict[str, Callable[[str, str], float]] = {
  "exact": exact_match,
  "numeric": numeric_match,
  "math": math_match,
}


def _bounded(text: str) -> str | None:
  """`text` stripped of white space; None if nothing or more than `MAX_ANSWER_CHARS` is left."""
  text = text.strip()
  return text if 0 < len(text) <= MAX_ANSWER_CHARS else None


def parse_number(text: str) -> decimal.Decimal | None:
  text = text.strip()
  if len(text) > MAX_NUMBER_CHARS:
    return None
  match = _NUMBER.fullmatch(text.removesuffix("."))
  if match is None or not (match["whole"] or match["rest"].startswith(".")):
    return None
  return decimal.Decimal(match["sign"] + (match["whole"] or "0").replace(",", "") + match["rest"])


def without_dollars(text: str) -> str:
  """`text` with an ASCII minus, without currency signs and without the dollar signs around all of it."""
  text = text.replace("\N{MINUS SIGN}", "-").replace("\\$", "").strip().removesuffix(".")
  inside = text.strip("$").strip().removesuffix(".")
  return text if "$" in inside else inside  # `$1$ and $2$` stays as it is.


def _nesting(text: str) -> int:
  deepest = depth = 0
  for character in text:
    if character in "{([":
      depth += 1
      deepest = max(deepest, depth)
    elif character in "})]":
      depth -= 1
  return deepest


# ---------------------------------------------------------------------------
# What runs in a judge's process: the source of the functions below is sent to it, because importing this module would
# import jax there. They use only the modules in `_JUDGE_IMPORTS`, each other, and what they import themselves.
#
# What math-verify 0.9.0 evaluates, read in its source and watched with an audit hook:
# - `ExprExtractionConfig` hands text to sympy's `parse_expr`, which calls `eval`. It is not used: answers are LaTeX.
# - `LatexExtractionConfig` goes through latex2sympy2_extended (1.11), an ANTLR grammar that builds sympy's objects
#   from names and numbers. But each number it meets goes to `sympy.Number(text)`, which is `sympify(text)`, which is
#   `eval` again. The grammar lets only digits through to there; `_prepare` puts a reader of numbers in its place all
#   the same.
# - Comparing compiles text that sympy generates from its own objects: arithmetic of monomials (from a count of
#   variables, so it is let through), and `lambdify` (from an expression, to find roots of polynomials of degree five
#   and more; sympy goes on without).
# Since a list like this one ages, `_refuse` enforces it: in the child that reads an answer, all code must come from a
# file.
# ---------------------------------------------------------------------------

_JUDGE_IMPORTS = "import gc, json, os, resource, signal, sys, traceback"


def _refuse(event: str, args: tuple[Any, ...]) -> None:
  """Audit hook: allows to import and to read files, and refuses all else, above all code that is made from text."""
  if event in ("compile", "exec"):
    filename = args[1] if event == "compile" else args[0].co_filename
    if isinstance(filename, str) and not (filename.startswith("<") and not filename.startswith("<frozen ")):
      return
    caller = sys._getframe(1).f_code.co_filename
    if caller.endswith("/sympy/polys/monomials.py"):
      return
  elif event == "open":
    if not args[2] & (os.O_WRONLY | os.O_RDWR):
      return
  elif event.startswith(("object.", "code.", "builtins.id", "array.")):
    return
  elif event in ("import", "marshal.loads", "os.listdir", "os.scandir", "sys._getframe", "sys.unraisablehook"):
    return
  raise PermissionError(f"An answer led to the event {event!r}.")


def _equal(gold: str, answer: str) -> bool:
  """Whether math-verify holds `answer` for equal to `gold`, both LaTeX. Any time and any memory."""
  import math_verify

  # The box comes first, so that text around it cannot pass for one of the anchors ("the final answer is") that the
  # library looks for.
  configs = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]
  delimiters = ("$", "\\(", "\\[")

  def read(text: str) -> list[Any]:
    latex = text if any(delimiter in text for delimiter in delimiters) else "\\boxed{" + text + "}"
    return math_verify.parse(latex, configs, parsing_timeout=None)

  # Not symmetric: the gold answer's form decides whether an equation stands for its right-hand side.
  return bool(math_verify.verify(read(gold), read(answer), timeout_seconds=None))


def _prepare() -> None:
  """Imports math-verify, takes `eval` out of its reading of numbers, and fills the caches of its parser."""
  import sympy
  import sympy.integrals.manualintegrate  # Its data classes are made from text, which a child that imports it may not.

  evaluating = sympy.Number.__new__

  def new(cls: type, *args: Any) -> Any:
    if cls is sympy.Number and len(args) == 1 and isinstance(args[0], str):
      return sympy.Integer(int(args[0])) if args[0].isdecimal() else sympy.Float(args[0])
    return evaluating(cls, *args)

  sympy.Number.__new__ = new

  # What the parser learns from one text makes the next one of its kind ten times as fast, and a child starts with what
  # its judge has learnt.
  for gold, answer in (
    ("\\frac{1}{2}", "0.25"),
    ("x=5", "3+2"),
    ("(1,2)", "[1, 2)"),
    ("\\{1,2\\}", "2, 1, 3"),
    ("50\\%", "0.4"),
    ("(x+1)^2", "x^2+2x-1"),
    ("\\frac{\\sqrt{2}}{2}", "-\\frac{1}{\\sqrt{3}}"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&5\\end{pmatrix}"),
    ("\\text{(A)}", "\\text{north}"),
    ("2\\pi r^2", "3.14159"),
    ("1<x\\le 2", "(1,\\infty)"),
    ("[1,2]\\cup(3,4)", "\\mathbb{R}"),
    ("y=2x+1", "y-2x=2"),
    ("\\sin^2 x+\\log_2 8", "e^{i\\pi}"),
    ("3\\pm\\sqrt{2}", "\\binom{5}{2}-10!+\\frac{x+y}{z}"),
    ("\\sum_{i=1}^{3} i", "\\int_0^1 x^2 dx"),
  ):
    _equal(gold, answer)


def _serve(
  fd: int, seconds: float, memory: int, prepare: Callable[[], None], equal: Callable[[str, str], bool]
) -> None:
  """The judge: says b"ready" or what went wrong, then answers pairs (gold, answer) until its client is gone.

  Args:
    fd: the socket to the client.
    seconds: the wall time one answer may take.
    memory: the address space, in bytes, one answer may take.
    prepare: run once.
    equal: run once for each pair, in a process of its own.
  """
  from multiprocessing import connection

  client = connection.Connection(fd)
  try:
    for limit, value in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0)):
      hard = resource.getrlimit(limit)[1]
      value = value if hard == resource.RLIM_INFINITY else min(value, hard)
      resource.setrlimit(limit, (value, value))
    # The kernel must end a child whose time is up: a handler in Python would wait for the library's C code.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    sys.setrecursionlimit(10_000)  # The grammar takes some twenty calls for a pair of brackets.
    prepare()
    gc.collect()
    gc.freeze()
  except BaseException:
    client.send_bytes(traceback.format_exc().encode(errors="replace"))
    return
  client.send_bytes(b"ready")

  while True:
    try:
      request = client.recv_bytes()
    except (EOFError, OSError):
      return
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
      try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        sys.addaudithook(_refuse)
        os.write(write, b"1" if equal(*json.loads(request)) else b"0")
      finally:
        os._exit(0)  # An error is no verdict, which is a wrong answer.
    os.close(write)
    verdict = os.read(read, 1)  # Nothing, if the child dies.
    os.close(read)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    client.send_bytes(b"1" if verdict == b"1" else b"0")


# ---------------------------------------------------------------------------
# What runs in this process.
# ---------------------------------------------------------------------------


class _Judge:
  """A judge's process, for one thread at a time.

  Raises, when made:
    RuntimeError: if the process does not start, with its traceback.
  """

  def __init__(
    self,
    *,
    prepare: Callable[[], None] = _prepare,
    equal: Callable[[str, str], bool] = _equal,
    seconds: float = JUDGE_SECONDS,
    memory: int = JUDGE_BYTES,
  ):
    self._seconds = seconds
    self._connection, theirs = multiprocessing.Pipe()
    fd = theirs.fileno()
    source = _source(
      (_refuse, prepare, equal, _serve), f"_serve({fd}, {seconds}, {memory}, {prepare.__name__}, {equal.__name__})"
    )
    with theirs:
      self._process = subprocess.Popen(
        [sys.executable, "-P", "-c", source],  # -P: a file called sympy.py where the run was started is not sympy.
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONHASHSEED": "0"},  # Sympy orders by hash: one verdict per pair, in every run.
        pass_fds=(fd,),
        start_new_session=True,  # Ctrl-C is for the client. The judge ends when the client's end of the socket closes.
      )
    try:
      message = self._receive(START_SECONDS)
    except (EOFError, OSError) as error:
      message = repr(error).encode()
    except BaseException:
      self.close()
      raise
    if message != b"ready":
      self.close()
      raise RuntimeError(f"The process that compares answers did not start: {message.decode()}")

  def equal(self, gold: str, answer: str) -> bool:
    """Whether they are equal; False too if that took too long or too much memory.

    Raises:
      EOFError, OSError: if the judge itself is gone or stuck; it must be closed.
    """
    self._connection.send_bytes(json.dumps([gold, answer]).encode())
    return self._receive(self._seconds + 10.0) == b"1"  # The rest is for a busy machine.

  def close(self) -> None:
    self._connection.close()
    self._process.kill()
    self._process.wait()

  def _receive(self, seconds: float) -> bytes:
    if not self._connection.poll(seconds):
      raise TimeoutError(f"No word from a judge in {seconds} s.")
    return self._connection.recv_bytes()


class _Judges:
  """Judges that are started when they are needed and kept, at most `MAX_JUDGES`. Safe to use from threads."""

  def __init__(self) -> None:
    self.forget()

  def forget(self) -> None:
    """Starts over. For a fork's child, which shares its parent's judges and must not talk to them."""
    self._idle: list[_Judge] = []
    self._slots = threading.BoundedSemaphore(MAX_JUDGES)

  def equal(self, gold: str, answer: str) -> bool:
    """Whether `answer` equals `gold`; False too if that cannot be told within the bounds."""
    with self._slots:
      try:
        judge = self._idle.pop()
      except IndexError:
        judge = self._start()
      for attempt in range(2):
        try:
          verdict = judge.equal(gold, answer)
        except (EOFError, OSError):
          # Judges read no answer, so it was not the answer that ended this one; but no answer is worth a third.
          judge.close()
          if attempt == 0:
            judge = self._start()
        except BaseException:
          judge.close()  # Its reply is still to come and must not pass for the next one's.
          raise
        else:
          self._idle.append(judge)
          return verdict
    return False

  def close(self) -> None:
    while self._idle:
      self._idle.pop().close()

  def _start(self) -> _Judge:
    judge = _Judge()
    # Another version of the libraries might evaluate where this one does not; all answers would be refused.
    try:
      works = any(judge.equal("\\frac{1}{2}", "0.5 \\text{ cm}") for _ in range(3))
    except (EOFError, OSError):
      works = False
    if not works:
      judge.close()
      raise RuntimeError("The process that compares answers is broken: to it, 1/2 does not equal 0.5.")
    return judge


def _source(functions: tuple[Callable[..., Any], ...], call: str) -> str:
  """A program that defines `functions` and makes the `call`."""
  parts = ["from __future__ import annotations", _JUDGE_IMPORTS, *map(inspect.getsource, functions), call]
  return "\n".join(parts)


_JUDGES = _Judges()
atexit.register(_JUDGES.close)
os.register_at_fork(after_in_child=_JUDGES.forget)
