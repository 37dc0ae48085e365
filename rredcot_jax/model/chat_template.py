"""Renders a chat template, which may come from anywhere, in a process of its own with bounded time, memory and output.

A template is a program. Jinja's sandbox keeps it away from Python's internals, but bounds neither time nor
memory. Nested loops can run for ever, and one multiplication can make a text of gigabytes. So the template
runs in a child process that imports jinja2 alone. The child's time, memory and result are limited.

The language is transformers': the same options, extensions, filters and globals as in
`transformers.utils.chat_template_utils`. Three things differ, so that a prompt is the same in every run.
`strftime_now` tells the time of `NOW`, and the filter `random` and the global `lipsum` are not there.
"""

import datetime
import functools
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# The date that templates are given. It is the one that Llama 3's templates use by default.
NOW = datetime.datetime(2024, 7, 26)
SECONDS, MEGABYTES, MOST_CHARACTERS = 10, 512, 2**20  # Seconds of processor time.
_PATIENCE = 12  # How many times as long the clock may run, because a busy machine is no fault of the template.


def render(template: str, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any]) -> str:
  """The text of `messages`, up to where the assistant speaks.

  Args:
    template: Jinja source of at most `MOST_CHARACTERS`.
    messages: what the template reads as `messages`, such as {"role": "user", "content": "2 + 2?"}.
    variables: what else it may read, such as the names of special tokens.

  Raises:
    ValueError: with a part of a sentence, such as "it is not done after 10 seconds". It may quote what the
      template itself says, so the caller shortens it and escapes it.
  """
  if len(template) > MOST_CHARACTERS:
    raise ValueError(f"it is {len(template)} characters long, more than {MOST_CHARACTERS}")
  given = {"template": template, "messages": list(messages), "variables": dict(variables), "seconds": SECONDS}
  return _in_child(json.dumps(given), SECONDS)


@functools.lru_cache(maxsize=64)
def _in_child(given: str, seconds: int) -> str:
  not_done = f"it is not done after {seconds} seconds"
  # -P keeps this file's folder off the search path, because modules there share names with other packages.
  command = [sys.executable, "-P", "-X", "utf8", __file__]
  try:
    timeout = _PATIENCE * seconds
    done = subprocess.run(command, input=given.encode(), capture_output=True, timeout=timeout, check=False)
  except subprocess.TimeoutExpired:
    raise ValueError(not_done) from None
  if done.returncode == -signal.SIGXCPU:
    raise ValueError(not_done)
  try:
    answer = json.loads(done.stdout)
  except ValueError:  # It was ended from outside, by the limit on processor time or on memory.
    raise ValueError(
      f"its process ended with status {done.returncode}: it needs more than {seconds} seconds or {MEGABYTES} megabytes"
    ) from None
  if "error" in answer:
    raise ValueError(answer["error"])
  return str(answer["text"])


# ---- The child -------------------------------------------------------------------------------


def _answer(given: Mapping[str, Any]) -> dict[str, str]:
  """What the child writes: the text, or what went wrong."""
  try:
    template = _environment().from_string(given["template"])
    context = {"tools": None, "documents": None, "add_generation_prompt": True, **given["variables"]}
    pieces, size = [], 0
    for piece in template.generate(messages=given["messages"], **context):
      pieces.append(piece)
      size += len(piece)
      if size > MOST_CHARACTERS:
        return {"error": f"it writes more than {MOST_CHARACTERS} characters"}
    return {"text": "".join(pieces)}
  except MemoryError:
    return {"error": f"it needs more than {MEGABYTES} megabytes"}
  except Exception as error:  # Of any type, because a template can make Python raise any of them.
    return {"error": f"{type(error).__name__}: {str(error)[:1000]}"}


def _environment() -> Any:
  """transformers' environment for chat templates, without what changes from run to run."""
  import jinja2
  import jinja2.ext
  import jinja2.nodes
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """{% generation %}, which marks what the assistant wrote: here only its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
      line = next(parser.stream).lineno
      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      return jinja2.nodes.CallBlock(self.call_method(self._content.__name__), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> str:
      return str(caller())

  class Namespace(jinja2.utils.Namespace):
    """A namespace without Python's own attributes, so that a template cannot reach them."""

    def __init__(*args: Any, **kwargs: Any) -> None:
      self, *rest = args
      attributes = dict(*rest, **kwargs)
      for name in attributes:
        check(name)
      jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
      check(name)
      super().__setitem__(name, value)

  def check(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
      raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the name {name!r}")

  def refuse(message: Any) -> None:
    raise jinja2.exceptions.TemplateError(message)

  def to_json(x: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
  )
  environment.filters["tojson"] = to_json
  environment.globals |= {
    "raise_exception": refuse,
    "strftime_now": NOW.strftime,
    "dict": lambda *args, **kwargs: dict(*args, **kwargs),
    "namespace": Namespace,
  }
  del environment.filters["random"], environment.globals["lipsum"]
  return environment


def _limit(seconds: int) -> None:
  """Bounds this process. Where the system cannot, its time is bounded by the parent alone."""
  try:
    import resource
  except ImportError:
    return
  for name, most in (("CPU", seconds), ("AS", MEGABYTES * 2**20), ("FSIZE", 0), ("CORE", 0)):
    try:
      resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most + (name == "CPU")))
    except (AttributeError, ValueError, OSError):
      continue


if __name__ == "__main__":
  given = json.loads(sys.stdin.buffer.read())
  _limit(given["seconds"])
  sys.stdout.write(json.dumps(_answer(given)))
