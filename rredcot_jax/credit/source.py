"""What a source of credit is: one class that turns a batch of traces into credit for their segments.

    class MySource(source.Source):
      name = "mine"
      def __init__(self, setting, *, strength=1.0): ...
      def assign(self, batch): return source.Found(rewards=...)

A class with a `name` in a module of this package is built in. One of the user's own is named in a
config as `credit.source="my_package.my_module:MySource"`. The training loop, the credit study, the
tools and the benchmarks all use the same object. docs/extending.md shows one.
"""

import abc
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import chex
import jax
import numpy as np

from rredcot_jax.data.encoding import Codec
from rredcot_jax.data.tasks import Example, Task
from rredcot_jax.model import decoder
from rredcot_jax.model.config import ModelConfig
from rredcot_jax.ops import banks, types
from rredcot_jax.parallel import processes, sharding


@dataclasses.dataclass(frozen=True)
class BankOptions:
  """Which completions are scored, and how their log-probabilities become a value."""

  name: str = "answer"  # banks.BANKS, or "package.module:function".
  max_tokens: int = 64  # Room for a completion; longer ones are left out, and counted.
  form: str = "plain"  # values.FORMS, or "package.module:function".
  scored: str = "all"  # Which tokens count, banks.SCORED; "body" leaves out the exit.
  fallback: str = "uniform"  # For rows whose own bank is empty: banks.FALLBACKS.
  size: int = 4  # N, the most completions of a state, for banks that hold more than the reference.


@dataclasses.dataclass(frozen=True)
class Setting:
  """What a source is bound to, for a whole run."""

  model: ModelConfig
  task: Task
  codec: Codec
  group_size: int  # Rows of a prompt, which are consecutive.
  sampling: Mapping[str, Any]  # max_tokens, temperature, top_k and top_p that the traces are sampled with.
  bank: BankOptions = BankOptions()
  chunk_size: int | None = None  # Branches, deletions or slots of a trace run at once; None is all.
  mesh: jax.sharding.Mesh | None = None  # That rows are split over; needed where there are several processes.

  @property
  def temperature(self) -> float:
    return float(self.sampling["temperature"])

  @property
  def generation(self) -> dict[str, Any]:
    """Keyword arguments of `continuations.generate_from_states`."""
    return dict(self.sampling) | {"eos_id": self.codec.end_ids, "pad_id": self.codec.pad_id}

  @property
  def bank_size(self) -> int:
    """N: that of the options, or the most solutions that an example has where the bank holds nothing else."""
    alone = self.bank.name == "solutions" and self.bank.fallback in banks.FALLBACKS
    return min(self.bank.size, getattr(self.task, "max_solutions", self.bank.size)) if alone else self.bank.size

  def make_bank(self, batch: "Batch") -> banks.Bank:
    """The configured bank of this process's rows, on the host."""
    share = batch.share
    if share is None or not share.split:
      return self._bank(batch.examples, batch.rollout_here, batch.segments_here, batch.returns[batch.rows])
    # A group at a time, with its traces that other processes hold; the rows of a group have one example.
    example_of = dict(zip((share.here // self.group_size).tolist(), batch.examples))
    traces, segments = share.with_groups((batch.rollout_here, batch.segments_here))
    parts = []
    for first in range(0, len(share.around), self.group_size):
      rows = share.around[first : first + self.group_size]
      of_group = lambda tree, first=first: jax.tree.map(lambda x: x[first : first + self.group_size], tree)
      examples = [example_of[rows[0] // self.group_size]] * self.group_size
      made = self._bank(examples, of_group(traces), of_group(segments), batch.returns[rows])
      here = np.flatnonzero(np.isin(rows, share.here))
      # Completions that are left out are counted by the process that judges the group's first trace.
      dropped = made.num_dropped if share.judges[rows[0]] == jax.process_index() else 0
      completions = jax.tree.map(lambda x, here=here: x[here], made.completions)
      parts.append(banks.Bank(completions, made.fallback[here], dropped))
    join = lambda *each: np.concatenate(each)
    return banks.Bank(
      jax.tree.map(join, *(part.completions for part in parts)), join(*(part.fallback for part in parts)),
      sum(part.num_dropped for part in parts),
    )  # fmt: skip

  def _bank(
    self, examples: Sequence[Example], traces: types.Rollout, segments: types.Segments, returns: np.ndarray
  ) -> banks.Bank:
    aligned = bool(getattr(self.task, "aligned", False))
    references = [self.codec.reference(example, aligned=aligned) for example in examples]
    return banks.make_bank(
      self.bank.name, references, traces, segments, returns, self.codec.tables.newlines,
      group_size=self.group_size, bank_size=self.bank_size, max_tokens=self.bank.max_tokens,
      scored=self.bank.scored, fallback=self.bank.fallback, with_failures=self.bank.form == "self_normalised",
    )  # fmt: skip

  def put(self, tree: Any) -> Any:
    """Arrays of this process's rows, placed as rows are."""
    return tree if self.mesh is None else sharding.put_batch(self.mesh, tree)


@dataclasses.dataclass(frozen=True)
class Batch:
  """Traces to credit; fields [B, ...], the rows of a prompt's group consecutive."""

  params: decoder.Params  # The policy that sampled.
  cache: decoder.Cache  # The traces' keys and values, as the sampler leaves them.
  rollout: types.Rollout
  segments: types.Segments
  returns: np.ndarray  # [B] float32, the verifier's rewards, on the host.
  examples: Sequence[Example]  # This process's rows of them.
  key: chex.PRNGKey  # Of this batch; read by what draws.
  state: Any = None  # What the source has learnt so far; see `Source.init_state`.
  here: np.ndarray | None = None  # Which rows are this process's; None is all.
  share: processes.Rows | None = None  # How rows are shared out, where there are several processes.
  on_host: tuple[types.Rollout, types.Segments] | None = None  # This process's rows, where they are there already.

  @property
  def rows(self) -> np.ndarray:
    """[b] int, this process's rows."""
    return np.arange(len(self.returns)) if self.here is None else self.here

  @functools.cached_property
  def _on_host(self) -> tuple[types.Rollout, types.Segments]:
    return jax.device_get((self.rollout, self.segments)) if self.on_host is None else self.on_host

  @property
  def rollout_here(self) -> types.Rollout:
    """Fields [b, ...], on the host."""
    return self._on_host[0]

  @property
  def segments_here(self) -> types.Segments:
    """Fields [b, ...], on the host."""
    return self._on_host[1]


@dataclasses.dataclass(frozen=True)
class Found:
  """What a source says about a batch."""

  rewards: chex.Array | None = None  # [B, K] float32, r_k; made of `values` where it is None.
  values: chex.Array | None = None  # [B, K] float32, v(s_0) .. v(s_{K-1}); None where none are estimated.
  sample_sizes: chex.Array | None = None  # [B, K] float32, effective samples behind each; 1 where it is None.
  uniform_rows: chex.Array | None = None  # [B] bool, rows that get GRPO's uniform credit; none where it is None.
  advantages: chex.Array | None = None  # [B, T] float32, of a source that credits tokens itself.
  state: Any = None  # What it has learnt, this batch included.
  token_forwards: int = 0  # Tokens run forward, padding included; a backward pass counts as two.
  generated_tokens: int = 0  # Tokens sampled.
  flops: float | None = None  # Operations, where `Source.count_flops` was asked for.
  metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # Scalars of the source's own.


class Source(abc.ABC):
  """One way of crediting the segments of traces.

  Attributes:
    name: in configs and tables. A class without a name is not built in.
    modes: of `advantages.MODES`, those that its credit has a meaning for.
    needs: of "bank", "cache", "state" and "verifier", what `assign` reads.
    estimates_values: whether its rewards are differences of state values.
  """

  name: ClassVar[str]
  modes: ClassVar[tuple[str, ...]] = ("magnitude", "signed", "difference")
  needs: ClassVar[frozenset[str]] = frozenset()
  estimates_values: ClassVar[bool] = False

  def __init__(self, setting: Setting):
    self.setting = setting

  @classmethod
  def check(cls, mode: str, bank: BankOptions, options: Mapping[str, Any]) -> None:
    """Refuses a combination that has no meaning.

    Args:
      mode: of `advantages.MODES`, not "uniform".
      bank: as configured.
      options: keyword arguments of the constructor.

    Raises:
      ValueError: naming the keys of the configuration and the fix.
    """
    del bank, options
    if mode not in cls.modes:
      wrong = f"credit.mode={mode!r} with credit.source={getattr(cls, 'name', cls.__name__)!r}"
      raise ValueError(f"{wrong}: {cls.why_not(mode)}; set credit.mode={' or '.join(map(repr, cls.modes))}.")

  @classmethod
  def why_not(cls, mode: str) -> str:
    """Why its credit has no meaning in `mode`, for errors."""
    return f"its credit has no meaning as {mode!r}"

  def init_state(self) -> Any:
    """What the source has learnt before the first batch: a pytree that checkpoints carry; None if it learns nothing."""
    return None

  @abc.abstractmethod
  def assign(self, batch: Batch) -> Found:
    """The credit of one batch."""

  def count_flops(self, batch: Batch) -> float:
    """Operations that `assign` runs on this batch, generated tokens left out; 0 where nothing is run."""
    del batch
    return 0.0


def bank_metrics(setting: Setting, bank: banks.Bank) -> dict[str, Any]:
  """The share of rows that fell back and the number of completions left out, over all processes."""
  dropped = np.zeros(len(bank.fallback), np.int32)
  dropped[0] = bank.num_dropped  # Of this process's rows together.
  fallback, dropped = setting.put((bank.fallback, dropped))
  return {"fallback_rows": fallback.mean(), "dropped_completions": dropped.sum()}
