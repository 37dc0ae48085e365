"""examples, rollouts -> the bank B_x: how a trace might go on and end, for every state.

A completion is c = (exit, u, y): tokens that leave the thought, an optional
solution, the answer with its end-of-sequence token. Four banks [C]:

  answer    exit + answer
  solution  exit + reference solution + answer
  suffix    the rest of the reference from where the state stands: after j whole
            lines and i tokens of the next, the reference from token i of step j on;
            nothing once another answer is stated
  rollouts  what the group's own successful traces wrote after the same segment
            number, with their sampling log-probabilities as log q; no reference

Runs on the host, in numpy, on token ids alone.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rredcot_jax.ops.types import Completions, Rollout, Segments, check_option

REFERENCE_BANKS = ("answer", "solution", "suffix")
BANKS = (*REFERENCE_BANKS, "rollouts")
FALLBACKS = ("uniform", *REFERENCE_BANKS)


@dataclasses.dataclass(frozen=True)
class Reference:
  """Token ids of one example's reference, each piece encoded on its own."""

  steps: Sequence[Sequence[int]]  # [] where the source has no solution.
  exit: Sequence[int]  # Leaves the thought.
  answer: Sequence[int]  # The answer and the end-of-sequence token.


@dataclasses.dataclass(frozen=True)
class Bank:
  """The completions of a batch, and what had to be left out of them."""

  completions: Completions  # numpy, fields [B, K or 1, N, ...].
  fallback: np.ndarray  # [B] bool, rows whose own bank held nothing useful.
  num_dropped: int  # Completions longer than max_tokens: left out, never cut.

  @property
  def uniform_rows(self) -> np.ndarray:
    """[B] bool, rows that no bank could fill: they get uniform credit."""
    return self.fallback & ~self.completions.valid.any(axis=(1, 2))


def make_bank(
  name: str,
  references: Sequence[Reference],
  rollout: Rollout,
  segments: Segments,
  returns: np.ndarray,
  newlines: np.ndarray,
  *,
  group_size: int,
  bank_size: int,
  max_tokens: int,
  force_exit: bool = False,
  fallback: str = "uniform",
  with_failures: bool = False,
) -> Bank:
  """The bank called `name` for a batch of traces.

  Args:
    name: one of `BANKS`.
    references: B of them.
    rollout: fields [B, ...], on the host.
    segments: fields [B, ...], on the host.
    returns: [B] float, the verifier's rewards; used by rollouts.
    newlines: [V] int, newline characters in each token; used by suffix.
    group_size: rows of a prompt stand together; used by rollouts.
    bank_size: N of the rollouts bank; reference banks have N = 1.
    max_tokens: S; a longer completion is left out and counted.
    force_exit: do not score the exit tokens that answer and solution begin
      with: values are then those of a policy made to answer now.
    fallback: for rows whose rollouts bank is empty (no success in the group):
      a reference bank, or "uniform" to leave it empty for the caller to see.
    with_failures: put failed rollouts in too, with utility 0 (the
      self-normalised form needs them).

  Raises:
    ValueError: on unknown names, a bank that the references cannot fill, max_tokens or
      bank_size below 1, or rows that do not make groups of `group_size`.
  """
  check_option("bank", name, BANKS)
  check_option("fallback", fallback, FALLBACKS)
  if max_tokens < 1 or bank_size < 1:
    raise ValueError(f"max_tokens={max_tokens} and bank_size={bank_size} must be at least 1.")
  needed = fallback if name == "rollouts" else name
  if needed in ("solution", "suffix") and not all(reference.steps for reference in references):
    raise ValueError(f"bank {needed!r} needs reference solutions and this task has none: use 'answer' or 'rollouts'.")
  batch = len(references)
  if name == "rollouts":
    k_max, n = np.shape(segments.ends)[1], bank_size
  else:
    k_max, n = (np.shape(segments.ends)[1] if name == "suffix" else 1), 1
  builder = _Builder(batch, k_max, n, max_tokens)
  empty = np.zeros(batch, bool)
  if name == "rollouts":
    empty = _add_rollouts(builder, references, rollout, segments, returns, group_size, with_failures)
  if needed != "uniform":
    rows = np.flatnonzero(empty) if name == "rollouts" else np.arange(batch)
    _add_references(builder, needed, references, rows, rollout, segments, newlines, force_exit)
  return Bank(completions=builder.completions(), fallback=empty, num_dropped=builder.num_dropped)


class _Builder:
  """Padded arrays being filled, one completion a place."""

  def __init__(self, batch: int, k_max: int, n: int, max_tokens: int):
    self.max_tokens, self.num_dropped = max_tokens, 0
    self.tokens = np.zeros((batch, k_max, n, max_tokens), np.int32)
    self.lengths = np.zeros((batch, k_max, n), np.int32)
    self.unscored = np.zeros((batch, k_max, n), np.int32)
    self.utilities = np.zeros((batch, k_max, n), np.float32)
    self.log_q = np.zeros((batch, k_max, n), np.float32)

  def add(
    self, row: int, k: int, n: int, ids: Sequence[int], utility: float, log_q: float = 0.0, unscored: int = 0
  ) -> bool:
    """Puts a completion in its place; False if it is too long, which is counted."""
    if len(ids) > self.max_tokens:
      self.num_dropped += 1
      return False
    self.tokens[row, k, n, : len(ids)] = ids
    self.lengths[row, k, n] = len(ids)
    self.unscored[row, k, n] = unscored
    self.utilities[row, k, n], self.log_q[row, k, n] = utility, log_q
    return True

  def clear(self, row: int) -> None:
    """Empties every place of a row."""
    for array in (self.tokens, self.lengths, self.unscored, self.utilities, self.log_q):
      array[row] = 0

  def completions(self) -> Completions:
    place = np.arange(self.max_tokens)
    mask = place < self.lengths[..., None]
    return Completions(
      tokens=self.tokens,
      mask=mask,
      scored=mask & (place >= self.unscored[..., None]),
      utilities=self.utilities,
      log_q=self.log_q,
      valid=self.lengths > 0,
    )


def _add_references(
  builder: _Builder,
  name: str,
  references: Sequence[Reference],
  rows: np.ndarray,
  rollout: Rollout,
  segments: Segments,
  newlines: np.ndarray,
  force_exit: bool,
) -> None:
  k_max = builder.tokens.shape[1]
  starts, num_segments = np.asarray(segments.starts), np.asarray(segments.num_segments)
  tokens = np.asarray(rollout.tokens)
  for row in rows:
    reference = references[row]
    if name == "suffix":
      for k in range(num_segments[row]):
        ids = _suffix(reference, tokens[row, : starts[row, k]], newlines)
        if ids:
          builder.add(row, k, 0, ids, 1.0)
      continue
    solution = [token for step in reference.steps for token in step] if name == "solution" else []
    ids = [*reference.exit, *solution, *reference.answer]
    for k in range(k_max):
      builder.add(row, k, 0, ids, 1.0, unscored=len(reference.exit) if force_exit else 0)


def _suffix(reference: Reference, prefix: np.ndarray, newlines: np.ndarray) -> list[int]:
  """The rest of the reference from where `prefix` stands; [] if nothing of it is left that could still be right."""
  written, ending = prefix.tolist(), [*reference.exit, *reference.answer]
  whole = [*(token for step in reference.steps for token in step), *ending]
  if written == whole[: len(written)]:
    return whole[len(written) :]
  stated = _stated(prefix, reference.exit)
  if stated is not None:
    answer = list(reference.answer)
    return answer[len(stated) :] if stated == answer[: len(stated)] else []
  for size in range(len(reference.exit) - 1, 0, -1):  # Cut inside an exit of several tokens.
    begun = list(reference.exit[:size])
    if written[-size:] == begun and not _ends_line(np.array(begun), newlines).any():
      return ending[size:]

  ends = _ends_line(prefix, newlines)
  # Blank lines belong to the line before them: a run of newlines ends one line, and none where nothing was written.
  done = int(np.count_nonzero(ends[1:] & ~ends[:-1]))
  offset, run = _since_last(ends), _since_last(~ends)
  if done >= len(reference.steps):
    begun = written[len(written) - offset :]
    if reference.exit or not begun:
      return ending  # What may be written there is a line more than the reference has.
    return ending[offset:] if begun == ending[:offset] else []  # Without an exit it is the answer.
  rest = [*reference.steps[done][offset:], *(token for step in reference.steps[done + 1 :] for token in step), *ending]
  if not (run and done):
    return rest
  before = list(reference.steps[done - 1])
  blank = _since_last(~_ends_line(np.array(before, int), newlines))
  return [*before[len(before) - blank :][run:], *rest]  # Blank lines not written yet.


def _ends_line(tokens: np.ndarray, newlines: np.ndarray) -> np.ndarray:
  """[T] bool, tokens with a newline in them; ids that the tokenizer does not know have none."""
  known = tokens < len(newlines)
  return known & (newlines[np.where(known, tokens, 0)] > 0)


def _since_last(flags: np.ndarray) -> int:
  """Places after the last True."""
  places = np.flatnonzero(flags)
  return len(flags) - (int(places[-1]) + 1 if len(places) else 0)


def _stated(prefix: np.ndarray, exit_ids: Sequence[int]) -> list[int] | None:
  """The tokens after the first exit, or None if there is none."""
  size = len(exit_ids)
  if not size or len(prefix) < size:
    return None
  windows = np.lib.stride_tricks.sliding_window_view(prefix, size)
  hits = np.flatnonzero((windows == np.asarray(exit_ids)).all(axis=1))
  return prefix[hits[0] + size :].tolist() if len(hits) else None


def _add_rollouts(
  builder: _Builder,
  references: Sequence[Reference],
  rollout: Rollout,
  segments: Segments,
  returns: np.ndarray,
  group_size: int,
  with_failures: bool,
) -> np.ndarray:
  """Suffixes of each group's own traces; returns [B] bool, rows that got none.

  A state k averages over the G_k traces of the group that have a segment k, as
  if all were in the bank: failures contribute 0 without being scored, so the
  utilities of those put in carry the factor (successes at k) / G_k. A suffix whose
  trace had stated something else of an answer than this one is a failure here.
  """
  batch, _, n, _ = builder.tokens.shape
  if batch % group_size:
    raise ValueError(f"{batch} traces do not make groups of {group_size}.")
  tokens, log_probs = np.asarray(rollout.tokens), np.asarray(rollout.log_probs)
  lengths = np.asarray(rollout.mask).sum(axis=1)
  starts, num_segments = np.asarray(segments.starts), np.asarray(segments.num_segments)
  returns = np.asarray(returns)
  # log q of the suffix from each place on, as a reversed running sum; in float32 its error would grow with T.
  log_q = np.cumsum(np.where(rollout.mask, log_probs, 0.0)[:, ::-1], axis=1, dtype=np.float64)[:, ::-1]
  stated = [
    [_stated(tokens[row, : starts[row, k]], references[row].exit) for k in range(num_segments[row])]
    for row in range(batch)
  ]
  empty = np.zeros(batch, bool)
  for row in range(batch):
    first = row // group_size * group_size
    # A trace's own suffix comes first, then its neighbours in turn, so that no trace is always left out.
    group = [first + (row - first + i) % group_size for i in range(group_size)]
    for k in range(num_segments[row]):
      present = [j for j in group if k < num_segments[j]]
      alike = [j for j in present if stated[j][k] == stated[row][k]]
      chosen = [j for j in alike if with_failures or returns[j] > 0]
      fitting = [j for j in chosen if lengths[j] - starts[j, k] <= builder.max_tokens]
      # A success that does not fit counts as a failure would: conservative, and counted.
      builder.num_dropped += len(chosen) - len(fitting)
      share = len(fitting) / len(present)
      for place, j in enumerate(fitting[:n]):
        ids = tokens[j, starts[j, k] : lengths[j]].tolist()
        builder.add(row, k, place, ids, float(returns[j]) * share, float(log_q[j, starts[j, k]]))
    empty[row] = not (builder.utilities[row] > 0).any()
    if empty[row]:
      builder.clear(row)
  return empty
