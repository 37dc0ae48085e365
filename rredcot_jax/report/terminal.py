"""One trace with its credit as lines of a terminal."""

from collections.abc import Mapping

from rredcot_jax.report import records, style
from rredcot_jax.report.text import one_line, shorten, wrap

MAX_CHARACTERS = 16_000  # of a trace's text, shown
_MAX_PROMPT = 4000


def render_terminal(record: Mapping, *, color: bool) -> str:
  """One trace as lines of text: k, r_k, a bar, v(s_k) → v(s_{k+1}), the segment; tinted if `color`.

  The only escape sequences in the result are our own tints: control characters of the trace are
  shown as codes. Raises ValueError as `records.parse_trace` does.

  Args:
    record: a line of traces.jsonl.
    color: whether the terminal shows 24-bit colours.
  """
  trace = records.parse_trace(record)
  shown, left_out = records.shown_segments(trace, MAX_CHARACTERS)
  lines = [
    f"step {one_line(trace.step, 30)}: {trace.verdict}, R = {trace.return_:.3g},"
    f" reference answer {one_line(trace.answer, 60)}",
    *(f"  {line}" for line in wrap(shorten(trace.prompt, _MAX_PROMPT), 100, 40)),
    "",
    f"    k      r_k  {'-     0     +':13}  {'v before, after':15}  segment",
  ]
  for segment, text in shown:
    lines += _segment_lines(segment, text, trace.peak, color)
  if left_out:
    lines.append(f"... {left_out}")
  return "\n".join(lines) + "\n"


def _segment_lines(segment: records.Segment, text: str, scale: float, color: bool) -> list[str]:
  size = round(6 * style.weight(segment.reward, scale))
  bar = f"{'█' * size:>6}│      " if segment.reward < 0 else f"      │{'█' * size:<6}"
  head = f"  {segment.index:>3}  {segment.reward:+.3f}  {bar}  {segment.before:6.3f} → {segment.after:6.3f}  "
  red, green, blue = style.tint(segment.reward, scale)
  on, off = (f"\x1b[48;2;{red};{green};{blue}m\x1b[38;2;27;27;31m", "\x1b[0m") if color else ("", "")
  rows = wrap(text, 64, MAX_CHARACTERS)
  lines = [f"{head if i == 0 else ' ' * len(head)}{on}{row}{off}" for i, row in enumerate(rows)]
  if segment.first_wrong:
    lines = ["> first wrong step", f">{lines[0][1:]}", *lines[1:]]
  return lines
