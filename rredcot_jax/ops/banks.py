"""examples, rollouts -> the bank B_x: how a trace might go on and end, for every state.

A completion is c = (exit, u, y): tokens that leave the thought, an optional
solution, the answer with its end-of-sequence token. Six banks [C]:

  answer     exit + answer
  solution   exit + reference solution + answer
  solutions  exit + each of several reference solutions + answer, log q = -log N
  suffix     the rest of the reference from where the state stands: after j whole
             lines and i tokens of the next, the reference from token i of step j on;
             nothing once another answer is stated. For tasks whose thought follows the reference
  rollouts   what the group's own traces wrote after the same segment
             number, with their sampling log-probabilities as log q; no reference
  own        what the group's own traces wrote after their thought, from the exit on: each
             different one once, with its return, log q = -log N; no reference

With log q = -log N the plain value of N completions is the mass sum_n p(c_n | s) zeta_n.

A state that has begun to leave its thought (`Segments.after_exit`) gets no completion that
leaves it once more: there `suffix` and `rollouts` alone go on from what is written.

The newline that an exit may begin with ("\\n</think>") is not doubled: where a state's last
token holds a newline, the tokens that the exit begins with and that hold one are left out.
This needs `newlines`, and an exit whose newlines are tokens of their own.

A bank is a function of `BankInputs` that yields places:

    def bank(inputs: BankInputs) -> Iterable[Place]

The built-in ones are the functions of this file that `BANKS` lists; one of the user's own
is passed itself, or as "package.module:function". It yields no more than
`inputs.bank_size` places for a state, for rows of `inputs.rows` and states of
`inputs.states(row)`; a place that is too long is left out and counted.

Runs on the host, in numpy, on token ids alone.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rredcot_jax.ops import names
from rredcot_jax.ops.types import Completions, Rollout, Segments

SCORED = ("all", "body", "answer")


@dataclasses.dataclass(frozen=True)
class Reference:
  """Token ids of one example's reference, each piece encoded on its own."""

  steps: Sequence[Sequence[int]]  # Of the solution; [] where the source has none.
  exit: Sequence[
    int
  ]  # Leaves the thought, newlines before and after the marker included; [] where there is no thought.
  answer: Sequence[int]  # The answer in its template, and the end-of-sequence token.
  solutions: Sequence[Sequence[Sequence[int]]] = ()  # Further solutions with the same answer, each like `steps`.
  aligned: bool = True  # Whether a thought follows `steps` line by line, which `suffix` needs.


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


class Place(NamedTuple):
  """One completion of one state."""

  row: int
  state: int
  tokens: Sequence[int] | np.ndarray  # At least one id.
  utility: float = 1.0  # zeta_n >= 0.
  log_q: float = 0.0  # Nats.
  exit: tuple[int, int] | None = None  # Which of its tokens leave the thought, [first, after); None where unknown.
  answer: int | None = None  # Where its answer begins; None where unknown.


@dataclasses.dataclass(frozen=True)
class BankInputs:
  """What a bank may read, on the host; rows of a prompt's group stand together."""

  references: Sequence[Reference] | None  # B of them.
  rollout: Rollout | None  # Fields [B, ...].
  segments: Segments | None  # Fields [B, ...].
  returns: np.ndarray | None  # [B] float.
  newlines: np.ndarray | None  # [V] int, newline characters in each token.
  group_size: int | None
  bank_size: int  # Most completions of a state.
  max_tokens: int  # S; longer completions will be left out.
  with_failures: bool  # Completions of utility 0 are wanted too.
  rows: Sequence[int]  # To be filled.
  shared: bool  # All states of a row have the same completions, which are those of state 0.
  bank: str  # The bank's name, for errors.

  def read(self, field: str) -> Any:
    """The field of that name.

    Raises:
      ValueError: naming the bank, if it was not given.
    """
    value = getattr(self, field)
    if value is None:
      raise ValueError(f"bank={self.bank!r} reads {field}, which is None: pass make_bank(..., {field}=...).")
    return value

  def recorded(self, field: str) -> np.ndarray:
    """[B, ...], what the rollout has of that name.

    Raises:
      ValueError: naming the bank, if the rollout was not given, or not with this field.
    """
    value = getattr(self.read("rollout"), field)
    if value is None:
      raise ValueError(f"bank={self.bank!r} reads rollout.{field}, which is None: make the Rollout with {field}=...")
    return np.asarray(value)

  def states(self, row: int) -> range:
    """The states to fill."""
    return range(1) if self.shared else range(int(np.asarray(self.read("segments").num_segments)[row]))

  def written(self, row: int, state: int) -> np.ndarray:
    """The trace's tokens before a state."""
    return self.tokens[row, : self.starts[row, state]]

  def after_exit(self, row: int, state: int) -> bool:
    """Whether the state has begun to leave its thought."""
    return not self.shared and bool(self._after_exit[row, state])

  def ends_line(self, row: int, state: int) -> bool:
    """Whether the last token before a state, of the prompt for state 0, holds a newline; False where not known."""
    if self.newlines is None or self.shared:
      return False
    last = self.written(row, state)[-1:]
    if not len(last):
      rollout = self.read("rollout")
      last = np.asarray(rollout.prompt_tokens)[row, -1:][np.asarray(rollout.prompt_mask)[row, -1:]]
    return bool(_holds_newline(last, self.newlines).any())

  def exit_newlines(self, row: int) -> int:
    """How many tokens of the reference's exit are left out where a state ends in a newline; 0 where not known."""
    if self.references is None or self.newlines is None:
      return 0
    return leading_newlines(self.references[row].exit, self.newlines)

  def group(self, row: int) -> list[int]:
    """The rows of the same prompt: the row itself, then its neighbours in turn, so that no trace always comes last."""
    size = self.read("group_size")
    first = row // size * size
    return [first + (row - first + i) % size for i in range(size)]

  @functools.cached_property
  def tokens(self) -> np.ndarray:
    """[B, T] int, of the traces."""
    return np.asarray(self.read("rollout").tokens)

  @functools.cached_property
  def lengths(self) -> np.ndarray:
    """[B] int, of the traces."""
    return np.asarray(self.read("rollout").mask).sum(axis=1)

  @functools.cached_property
  def starts(self) -> np.ndarray:
    """[B, K] int, where states are."""
    return np.asarray(self.read("segments").starts)

  @functools.cached_property
  def _after_exit(self) -> np.ndarray:
    return np.asarray(self.read("segments").after_exit)


BankFunction = Callable[[BankInputs], Iterable[Place]]


# ---- Banks -----------------------------------------------------------------------------------


def answer(inputs: BankInputs) -> Iterator[Place]:
  """The exit and the reference answer."""
  yield from _after_thought(inputs, lambda reference: [[]])


def solution(inputs: BankInputs) -> Iterator[Place]:
  """The exit, the reference solution and the answer."""
  _need_solutions(inputs)
  yield from _after_thought(inputs, lambda reference: _solutions_of(reference)[:1])


def solutions(inputs: BankInputs) -> Iterator[Place]:
  """The exit, each different reference solution and the answer; log q = -log N, N the solutions put in."""
  _need_solutions(inputs)
  yield from _after_thought(inputs, _solutions_of)


def suffix(inputs: BankInputs) -> Iterator[Place]:
  """The rest of the reference from where each state stands."""
  references = _need_solutions(inputs)
  inputs.read("newlines")
  if not all(reference.aligned for reference in references):
    raise ValueError(
      f"bank={inputs.bank!r} goes on with the reference line by line, and this task's thoughts do not follow it: "
      "use 'solution', 'answer', 'own' or 'rollouts'."
    )
  for row in inputs.rows:
    exit_size = len(references[row].exit) - inputs.exit_newlines(row)
    for k in inputs.states(row):
      rest = _rest(references[row], inputs, row, k)
      if rest is None:
        continue
      thought, leave, goal = rest
      # The reference does not leave its thought in the way that this trace did.
      if inputs.after_exit(row, k) and (thought or len(leave) >= max(exit_size, 1)):
        continue
      if thought or leave or goal:
        first, after = len(thought), len(thought) + len(leave)
        yield Place(row, k, [*thought, *leave, *goal], exit=(first, after), answer=after)


def rollouts(inputs: BankInputs) -> Iterator[Place]:
  """Suffixes of each group's own traces.

  A state k averages over the G_k traces of the group that have a segment k, as
  if all were in the bank: failures contribute 0 without being scored, so the
  utilities of those put in carry the factor (successes at k) / G_k. A suffix whose
  trace had stated something else of an answer than this one is a failure here. Traces
  whose return is not finite are not counted.
  """
  returns, mask = inputs.read("returns"), np.asarray(inputs.read("rollout").mask)
  log_probs, known = inputs.recorded("sampler_log_probs"), np.isfinite(returns)
  # log q of the suffix from each place on, as a reversed running sum; in float32 its error would grow with T.
  log_q = np.cumsum(np.where(mask, log_probs, 0.0)[:, ::-1], axis=1, dtype=np.float64)[:, ::-1]
  members = {j for row in inputs.rows for j in inputs.group(row)}
  stated = {j: [_stated_at(inputs, j, k) for k in inputs.states(j)] for j in members}
  for row in inputs.rows:
    for k in inputs.states(row):
      present = [j for j in inputs.group(row) if k < len(stated[j]) and known[j]]
      alike = [j for j in present if stated[j][k] == stated[row][k]]
      chosen = [j for j in alike if inputs.with_failures or returns[j] > 0]
      fits = [j for j in chosen if inputs.lengths[j] - inputs.starts[j, k] <= inputs.max_tokens]
      # A success that does not fit counts as a failure would: conservative, and counted.
      share = len(fits) / max(len(present), 1)
      for j in (*fits[: inputs.bank_size], *(j for j in chosen if j not in fits)):
        start = inputs.starts[j, k]
        ids = inputs.tokens[j, start : inputs.lengths[j]]
        yield Place(row, k, ids, float(returns[j]) * share, float(log_q[j, start]))


def own(inputs: BankInputs) -> Iterator[Place]:
  """What the group's traces wrote from their exit to their end, each different one once.

  Its utility is the mean return of the traces that wrote it. Successes come first;
  failures are put in where `with_failures` asks for them. log q = -log N, N those put in.
  Traces without an exit, truncated ones, and those whose return is not finite have nothing to
  offer. The newlines before the marker are the thought's: where a state needs them, they are
  those of the reference's exit.
  """
  returns, segments = inputs.read("returns"), inputs.read("segments")
  if segments.thought_end is None or segments.solution_start is None:
    raise ValueError(
      f"bank={inputs.bank!r} reads where traces leave their thought: cut them with segment(..., exit_table=...)."
    )
  left, solution_start = np.asarray(segments.thought_end), np.asarray(segments.solution_start)
  ended = (left < inputs.lengths) & ~inputs.recorded("truncated") & np.isfinite(returns)
  for row in inputs.rows:
    newlines = inputs.references[row].exit[: inputs.exit_newlines(row)] if inputs.references is not None else []
    found: dict[bytes, list[int]] = {}
    for j in inputs.group(row):
      if ended[j]:
        found.setdefault(inputs.tokens[j, left[j] : inputs.lengths[j]].tobytes(), []).append(j)
    endings = []
    for rows in found.values():
      j, worth = rows[0], float(np.mean([returns[j] for j in rows]))
      if worth > 0 or inputs.with_failures:
        ids = np.array([*newlines, *inputs.tokens[j, left[j] : inputs.lengths[j]]], np.int32)
        endings.append((ids, worth, len(newlines) + int(solution_start[j] - left[j])))
    endings.sort(key=lambda ending: ending[1] <= 0)
    yield from _of_thought(inputs, row, endings, len(newlines), None)


def _nothing(inputs: BankInputs) -> Iterator[Place]:
  """Leaves rows empty, so that the caller sees them and gives them uniform credit."""
  del inputs
  yield from ()


_REFERENCE: Mapping[str, BankFunction] = {f.__name__: f for f in (answer, solution, solutions, suffix)}
_BANKS: Mapping[str, BankFunction] = {**_REFERENCE, **{f.__name__: f for f in (rollouts, own)}}
_FALLBACKS: Mapping[str, BankFunction] = {"uniform": _nothing, **_REFERENCE}
BANKS, FALLBACKS = tuple(_BANKS), tuple(_FALLBACKS)

# One completion a state, whatever bank_size is.
_SINGLE = (answer, solution, suffix, _nothing)
# The same completions for every state, but for newlines and for states after the exit.
_ALIKE = (answer, solution, solutions, _nothing)


def num_completions(bank: str | BankFunction, fallback: str | BankFunction, bank_size: int) -> int:
  """N, the completions that a state has room for: 1 where both banks hold one, else `bank_size`."""
  both = (names.resolve("bank", bank, _BANKS), names.resolve("fallback", fallback, _FALLBACKS))
  return 1 if set(both) <= set(_SINGLE) else bank_size


# ---- Making a bank ---------------------------------------------------------------------------


def make_bank(
  name: str | BankFunction,
  references: Sequence[Reference] | None,
  rollout: Rollout | None = None,
  segments: Segments | None = None,
  returns: np.ndarray | None = None,
  newlines: np.ndarray | None = None,
  *,
  max_tokens: int,
  group_size: int | None = None,
  bank_size: int = 1,
  scored: str = "all",
  fallback: str | BankFunction = "uniform",
  with_failures: bool = False,
) -> Bank:
  """The bank called `name` for a batch of traces.

  Args:
    name: one of `BANKS`, "package.module:function", or a function; see this module's docstring.
    references: B of them; None for rollouts and own, which may read the newlines of their exit.
    rollout: fields [B, ...], on the host. Read by suffix, rollouts (`sampler_log_probs` too) and
      own (`truncated` too), and where an exit begins with a newline.
    segments: fields [B, ...], on the host. Without them there is one set of completions a
      row, for whatever state (K = 1). Read by suffix, rollouts and own, and where states lie
      after the exit or an exit begins with a newline.
    returns: [B] float, the verifier's rewards; read by rollouts and own.
    newlines: [V] int, newline characters in each token; read by suffix. Without it an exit
      keeps its newlines at every state.
    max_tokens: S >= 1; a longer completion is left out and counted.
    group_size: rows of a prompt stand together; read by rollouts and own.
    bank_size: N >= 1 of solutions, rollouts, own and banks of the user's; the other reference
      banks have N = 1.
    scored: which tokens' log-probabilities count. "all"; "body", all but the exit, so that
      values are those of a policy made to leave now; "answer", those of the answer alone.
      rollouts know "all" only, because their log q is that of all tokens; own does not know
      where its answers begin.
    fallback: for rows whose bank has nothing of positive utility: one of `FALLBACKS`, where
      "uniform" leaves them empty for the caller to see; or a bank of the user's.
    with_failures: put completions of utility 0 in too, where the traces have them (the
      self-normalised form needs them).

  Returns:
    Bank whose completions have K = 1 where all states of a row share them: for answer, solution
    and solutions as long as no state is told apart by its newlines or by an exit
    (`Segments.thought_end` is None). Otherwise K is that of `segments`.

  Raises:
    ValueError: on unknown names, a bank that reads what is not given or that the references
      cannot fill, numbers below 1, arrays of unequal B, rows that do not make groups of
      `group_size`, and places that are no completions.
  """
  bank = names.resolve("bank", name, _BANKS)
  names.check_option("scored", scored, SCORED)
  spare = names.resolve("fallback", fallback, _FALLBACKS)
  for what, number in (("max_tokens", max_tokens), ("bank_size", bank_size), ("group_size", group_size)):
    if number is not None and number < 1:
      raise ValueError(f"{what}={number} must be at least 1.")
  batch = _batch_size(references, rollout, segments, returns)
  if group_size is not None and batch % group_size:
    raise ValueError(f"{batch} traces do not make groups of {group_size}.")
  newlines = None if newlines is None else _checked_newlines(newlines)
  alike = bank in _ALIKE and spare in _ALIKE and not _tells_states_apart(references, segments, newlines)
  shared = segments is None or alike
  inputs = BankInputs(
    references=references, rollout=rollout, segments=segments, returns=None if returns is None else np.asarray(returns),
    newlines=newlines, group_size=group_size, bank_size=bank_size, max_tokens=max_tokens, with_failures=with_failures,
    rows=range(batch), shared=shared, bank=names.label(name),
  )  # fmt: skip
  n = num_completions(name, fallback, bank_size)
  builder = _Builder(batch, 1 if segments is None or shared else np.shape(segments.ends)[1], n, max_tokens, scored)
  builder.fill(bank(inputs), inputs)
  empty = ~builder.useful()
  builder.clear(empty)
  spare_inputs = dataclasses.replace(inputs, rows=np.flatnonzero(empty).tolist(), bank=names.label(fallback))
  builder.fill(spare(spare_inputs), spare_inputs)
  return Bank(completions=builder.completions(), fallback=empty, num_dropped=builder.num_dropped)


def leading_newlines(ids: Sequence[int], newlines: np.ndarray) -> int:
  """How many of the first tokens of `ids` hold a newline; 0 where all do, so that something is always left."""
  holds = _holds_newline(np.asarray(ids, int), newlines)
  return 0 if holds.all() else int(np.argmin(holds))


def _batch_size(
  references: Sequence[Reference] | None, rollout: Rollout | None, segments: Segments | None, returns: Any
) -> int:
  sizes = {
    "references": None if references is None else len(references),
    "rollout.tokens": None if rollout is None else len(rollout.tokens),
    "segments.ends": None if segments is None else len(segments.ends),
    "returns": None if returns is None else len(returns),
  }
  given = {name: size for name, size in sizes.items() if size is not None}
  if not given:
    raise ValueError("make_bank was given neither references nor a rollout, so there is nothing to make a bank of.")
  if len(set(given.values())) > 1:
    raise ValueError(f"rows differ: {', '.join(f'{name} has {size}' for name, size in given.items())}.")
  return next(iter(given.values()))


def _checked_newlines(newlines: np.ndarray) -> np.ndarray:
  newlines = np.asarray(newlines)
  if newlines.ndim != 1 or newlines.dtype.kind not in "iu":
    raise ValueError(
      f"newlines is {newlines.dtype}{list(newlines.shape)} and must be integer [V], as VocabTables has it."
    )
  return newlines


def _tells_states_apart(
  references: Sequence[Reference] | None, segments: Segments | None, newlines: np.ndarray | None
) -> bool:
  """Whether what leaves the thought depends on the state."""
  if segments is None or segments.thought_end is not None:
    return segments is not None
  return newlines is not None and any(leading_newlines(reference.exit, newlines) for reference in references or ())


class _Builder:
  """Padded arrays being filled, one completion a place."""

  def __init__(self, batch: int, k_max: int, n: int, max_tokens: int, scored: str):
    self.max_tokens, self.num_dropped, self._scored = max_tokens, 0, scored
    self.tokens = np.zeros((batch, k_max, n, max_tokens), np.int32)
    self.lengths = np.zeros((batch, k_max, n), np.int32)
    self.scored = np.zeros((batch, k_max, n, max_tokens), bool)
    self.utilities = np.zeros((batch, k_max, n), np.float32)
    self.log_q = np.zeros((batch, k_max, n), np.float32)

  def fill(self, places: Iterable[Place], inputs: BankInputs) -> None:
    """Puts each place after those that its state has; leaves out and counts what is too long."""
    taken = np.zeros(self.lengths.shape[:2], int)
    for place in places:
      size = self._checked_size(place, inputs)
      if size > self.max_tokens:
        self.num_dropped += 1
        continue
      at = (place.row, place.state, taken[place.row, place.state])
      if at[-1] >= self.lengths.shape[2]:
        raise ValueError(
          f"bank={inputs.bank!r} gave row {place.row}, state {place.state} more than {self.lengths.shape[2]} "
          "completions; raise bank_size."
        )
      taken[place.row, place.state] += 1
      self.tokens[at][:size], self.lengths[at] = place.tokens, size
      self.scored[at][:size] = self._counted(place, size, inputs)
      self.utilities[at], self.log_q[at] = place.utility, place.log_q

  def _checked_size(self, place: Place, inputs: BankInputs) -> int:
    where = f"bank={inputs.bank!r}, row {place.row}, state {place.state}"
    if not (0 <= place.row < self.lengths.shape[0] and 0 <= place.state < self.lengths.shape[1]):
      raise ValueError(f"{where}: there is no such state in {self.lengths.shape[0]} rows of {self.lengths.shape[1]}.")
    ids = np.asarray(place.tokens)
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
      raise ValueError(f"{where}: tokens={place.tokens!r} must be at least one token id.")
    if not (place.utility >= 0 and math.isfinite(place.utility)) or not math.isfinite(place.log_q):
      raise ValueError(
        f"{where}: utility={place.utility} must be finite and >= 0, and log_q={place.log_q} finite. "
        "Shift rewards that can be negative before banks are made of them."
      )
    return len(ids)

  def _counted(self, place: Place, size: int, inputs: BankInputs) -> np.ndarray:
    """[size] bool, the tokens whose log-probability counts."""
    t = np.arange(size)
    if self._scored == "all":
      return np.ones(size, bool)
    if self._scored == "body" and place.exit is not None:
      return np.asarray((t < place.exit[0]) | (t >= place.exit[1]))
    if self._scored == "answer" and place.answer is not None:
      return np.asarray(t >= place.answer)
    part = {"body": "exit is", "answer": "answer begins"}[self._scored]
    raise ValueError(
      f"scored={self._scored!r} needs to know where a completion's {part}, which bank={inputs.bank!r} does not say: "
      "use scored='all'."
    )

  def useful(self) -> np.ndarray:
    """[B] bool, rows with a completion of positive utility."""
    return np.any(self.utilities > 0, axis=(1, 2))

  def clear(self, rows: np.ndarray) -> None:
    """Empties every place of these rows, [B] bool."""
    for array in (self.tokens, self.lengths, self.scored, self.utilities, self.log_q):
      array[rows] = 0

  def completions(self) -> Completions:
    """What has been filled, [B, K, N, ...]."""
    return Completions(
      tokens=self.tokens,
      mask=np.arange(self.max_tokens) < self.lengths[..., None],
      scored=self.scored,
      utilities=self.utilities,
      log_q=self.log_q,
      valid=self.lengths > 0,
    )


# ---- References ------------------------------------------------------------------------------


def _need_solutions(inputs: BankInputs) -> Sequence[Reference]:
  references: Sequence[Reference] = inputs.read("references")
  if not all(_solutions_of(reference) for reference in references):
    raise ValueError(
      f"bank={inputs.bank!r} needs reference solutions and this task has none: use 'answer', 'own' or 'rollouts'."
    )
  return references


def _solutions_of(reference: Reference) -> list[list[int]]:
  """The different solutions of a reference, `steps` first; those without tokens left out."""
  flat = [[*itertools.chain(*steps)] for steps in (reference.steps, *reference.solutions)]
  return [ids for i, ids in enumerate(flat) if ids and ids not in flat[:i]]


def _after_thought(inputs: BankInputs, bodies_of: Callable[[Reference], list[list[int]]]) -> Iterator[Place]:
  """Exit, each body and answer at every state of the thought."""
  for row in inputs.rows:
    reference = inputs.read("references")[row]
    endings = [
      (np.array([*reference.exit, *body, *reference.answer], np.int32), 1.0, len(reference.exit))
      for body in bodies_of(reference)
    ]
    yield from _of_thought(inputs, row, endings, inputs.exit_newlines(row), len(reference.answer))


def _of_thought(
  inputs: BankInputs, row: int, endings: list[tuple[np.ndarray, float, int]], num_newlines: int, answer: int | None
) -> Iterator[Place]:
  """The first `bank_size` endings that fit, at every state of the thought, with log q = -log N.

  Args:
    inputs: of the bank.
    row: whose states.
    endings: ids from the exit on, the utility, and the tokens of the exit.
    num_newlines: tokens that an ending begins with and that are left out where a state ends in a newline.
    answer: tokens of the answer, that an ending ends with; None where unknown.
  """
  # The same N at every state, so endings count with their newlines.
  kept = [ending for ending in endings if 0 < len(ending[0]) <= inputs.max_tokens][: inputs.bank_size]
  dropped = [ending for ending in endings if len(ending[0]) > inputs.max_tokens]
  for k in inputs.states(row):
    if inputs.after_exit(row, k):
      continue
    skip = num_newlines if inputs.ends_line(row, k) else 0
    for ids, utility, exit_size in kept:
      size = len(ids) - skip
      yield Place(
        row, k, ids[skip:], utility, -math.log(len(kept)), exit=(0, exit_size - skip),
        answer=None if answer is None else size - answer,
      )  # fmt: skip
    for ids, utility, _ in dropped:
      yield Place(row, k, ids, utility)


_Parts = tuple[list[int], list[int], list[int]]  # What is left of the thought, of the exit and of the answer.


def _rest(reference: Reference, inputs: BankInputs, row: int, state: int) -> _Parts | None:
  """The rest of the reference from where a state stands; None if nothing of it is left that could still be right."""
  newlines, prefix = inputs.read("newlines"), inputs.written(row, state)
  written, goal = prefix.tolist(), list(reference.answer)
  bare = list(reference.exit)[inputs.exit_newlines(row) :]

  def leave(before: Sequence[int]) -> list[int]:
    """The exit after some tokens of the thought."""
    return bare if _holds_newline(np.array(before[-1:]), newlines).any() else list(reference.exit)

  steps = [*itertools.chain(*reference.steps)]
  parts = (steps, leave(steps), goal)
  if written == [*itertools.chain(*parts)][: len(written)]:
    return _without_first(parts, len(written))
  stated = _stated(prefix, bare)
  if stated is not None:
    return ([], [], goal[len(stated) :]) if stated == goal[: len(stated)] else None
  for size in range(len(bare) - 1, 0, -1):  # Cut inside an exit of several tokens.
    if written[-size:] == bare[:size] and not _holds_newline(np.array(bare[:1]), newlines).any():
      return [], bare[size:], goal
  ends = _holds_newline(prefix, newlines)
  # Blank lines belong to the line before them: a run of newlines ends one line, and none where nothing was written.
  done = int(np.count_nonzero(ends[1:] & ~ends[:-1]))
  offset, run = _since_last(ends), _since_last(~ends)
  if done >= len(reference.steps):
    begun = written[len(written) - offset :]
    if reference.exit or not begun:
      return [], leave(written), goal  # What may be written there is a line more than the reference has.
    return ([], [], goal[offset:]) if begun == goal[:offset] else None  # Without an exit it is the answer.
  thought = [*reference.steps[done][offset:], *itertools.chain(*reference.steps[done + 1 :])]
  if run and done:
    before = list(reference.steps[done - 1])
    blank = _since_last(~_holds_newline(np.array(before, int), newlines))
    thought = [*before[len(before) - blank :][run:], *thought]  # Blank lines not written yet.
  return thought, leave(thought or written), goal


def _without_first(parts: _Parts, count: int) -> _Parts:
  """`parts` less their first `count` tokens."""
  thought, leave, goal = parts
  to_leave = max(count - len(thought), 0)
  return thought[count:], leave[to_leave:], goal[max(to_leave - len(leave), 0) :]


def _holds_newline(tokens: np.ndarray, newlines: np.ndarray) -> np.ndarray:
  """[T] bool, tokens with a newline in them; ids that the tokenizer does not know have none."""
  known = (tokens >= 0) & (tokens < len(newlines))
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


def _stated_at(inputs: BankInputs, row: int, state: int) -> list[int] | None:
  """What a trace has stated of its answer at a state, the exit included where it is known; None in the thought."""
  thought_end = inputs.read("segments").thought_end
  if thought_end is not None:
    left = np.asarray(thought_end)[row]
    return inputs.written(row, state)[left:].tolist() if inputs.after_exit(row, state) else None
  return None if inputs.references is None else _stated(inputs.written(row, state), inputs.references[row].exit)
