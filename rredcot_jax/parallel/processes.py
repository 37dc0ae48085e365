"""Several processes as one program: start-up, whose rows are whose, agreement, loss, and being told to stop.

Every process runs the same script on the same configuration. JAX makes one mesh of
all their devices. Work on the host (questions, verifiers, banks) is divided by rows: a
process handles the rows whose shards its devices hold, as numpy arrays of those rows
alone. Rewards, and whether a process was told to stop, are gathered for all processes.
With one process nothing is exchanged.
"""

import contextlib
import dataclasses
import functools
import json
import os
import platform
import signal
import threading
import traceback
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jaxlib
import numpy as np
from jax.experimental import multihost_utils

from rredcot_jax.parallel import peers, sharding

LOST = 75  # Exit status of a process that lost another one. A new start may succeed.
START_SECONDS = 60.0  # How long the processes wait for each other, unless RREDCOT_START_SECONDS is set.

_peers: peers.Peers | None = None  # The others, once `start` has met them.

# ---- Start-up --------------------------------------------------------------------------------


def start(
  *,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  detect: bool = False,
  heartbeat_seconds: int = 100,
  seconds: float | None = None,
  facts: Mapping[str, Any] | None = None,
  check: Callable[[], object] = lambda: None,
) -> None:
  """Joins the other processes of this run, if it has any. Call it before anything else uses a device.

  Arguments that are not given are read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID (or JOB_COMPLETION_INDEX, which an indexed Kubernetes job sets). Without the
  first two, JAX finds the processes if `detect` is set, or if SLURM, Open MPI or GKE name
  several tasks or TPU hosts. Otherwise the run has one process and nothing is started.

  The processes meet before JAX starts (see `peers.meet`), because JAX aborts where one is
  missing or comes twice. Then they compare their `facts`.

  Args:
    coordinator: "host:port" of process 0.
    num_processes, process_id: n, and i in [0, n).
    detect: let JAX find the others, as on the hosts of a TPU pod.
    heartbeat_seconds: a process that is silent for so long is considered dead, and the others stop.
    seconds: how long to wait for all of them; None is `start_seconds`.
    facts: what must be the same on all of them, by name: JSON values, dicts of them are
      compared key by key. The versions of JAX and Python are added.
    check: raises ValueError where this process must not start; the others are told why.

  Raises:
    ValueError: if only a part is known, naming what is missing; if processes are missing, come
      twice or differ, naming them, on all of them; and what `check` raises.
  """
  global _peers
  seconds = start_seconds() if seconds is None else seconds
  found = _find(coordinator, num_processes, process_id, detect=detect, seconds=seconds)
  if found is None:
    check()
    return
  refusal: ValueError | None = None
  try:
    check()
  except ValueError as error:
    refusal = error
  try:
    met = peers.meet(
      found.coordinator, found.num_processes, found.process_id, seconds=seconds, heartbeat_seconds=heartbeat_seconds,
      refusal=str(refusal or ""),
    )  # fmt: skip
  except ValueError:
    if refusal is not None:
      raise refusal from None
    raise
  _peers = met
  versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "python": platform.python_version()}
  check_same("what they are started with", {"version": versions, **(facts or {})}, seconds=seconds)
  # JAX would handle SIGTERM itself. `StopNotice` handles it, with one process and with many.
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    found.coordinator,
    found.num_processes,
    found.process_id,
    found.local_device_ids,
    cluster_detection_method="deactivate",
    initialization_timeout=int(max(seconds, START_SECONDS)),
    heartbeat_timeout_seconds=heartbeat_seconds,
    # Shutdown is bounded by the heartbeat timeout.
    shutdown_timeout_seconds=heartbeat_seconds,
  )


@dataclasses.dataclass(frozen=True)
class _Found:
  """Where the others are, and which of them this process is."""

  coordinator: str
  num_processes: int
  process_id: int
  local_device_ids: Sequence[int] | None = None  # Of a machine with several processes, as SLURM has it.


def _find(
  coordinator: str | None, num_processes: int | None, process_id: int | None, *, detect: bool, seconds: float
) -> _Found | None:
  """The other processes, found as `start` describes; None where there is one process."""
  coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or None
  num_processes = _number(num_processes, "JAX_NUM_PROCESSES")
  process_id = _number(process_id, "JAX_PROCESS_ID")
  if num_processes == 1:
    return None
  if coordinator is None and num_processes is None:
    return _detect(process_id, seconds) if detect or _tasks_in_environment() > 1 else None
  # An indexed Kubernetes job sets it in every pod, also where JAX finds the other processes.
  process_id = _number(process_id, "JOB_COMPLETION_INDEX")
  known = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
  missing = [name for name, value in known.items() if value is None]
  if coordinator is None or num_processes is None or process_id is None:
    raise ValueError(
      f"several processes need {' and '.join(missing)} too: give the flags --coordinator=host:port --num_processes=N "
      "--process_id=I, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."
    )
  return _Found(coordinator, num_processes, process_id)


def _detect(process_id: int | None, seconds: float) -> _Found | None:
  from jax._src import clusters  # JAX has no public name for the clusters that it can detect.

  coordinator, count, me, local_device_ids = clusters.ClusterEnv.auto_detect_unset_distributed_params(
    None, None, process_id, None, None, int(seconds)
  )
  if coordinator is None or count is None or me is None:
    raise ValueError(
      "no other processes are found: --distributed works on TPU hosts, under SLURM, Open MPI and GKE. Elsewhere give "
      "--coordinator=host:port --num_processes=N --process_id=I."
    )
  return None if count == 1 else _Found(coordinator, count, me, local_device_ids)


def start_seconds() -> float:
  """How long the processes of a run wait for each other: RREDCOT_START_SECONDS, or a minute."""
  text = os.environ.get("RREDCOT_START_SECONDS", "")
  if text and not (text.isdecimal() and int(text) > 0):
    raise ValueError(f"the environment variable RREDCOT_START_SECONDS={text!r} must be a number of seconds from 1 on.")
  return float(text or START_SECONDS)


def _number(given: int | None, name: str) -> int | None:
  text = os.environ.get(name, "")
  if given is not None or not text:
    return given
  if not text.isdecimal():
    raise ValueError(f"the environment variable {name}={text!r} must be a number from 0 on.")
  return int(text)


def _tasks_in_environment() -> int:
  """Processes that SLURM's srun, Open MPI or GKE's TPU webhook have started, by their variables; 1 without them."""
  counts = [os.environ.get(name, "") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
  hosts = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(","))
  return max([hosts, *(int(count) for count in counts if count.isdecimal())])


# ---- Agreement -------------------------------------------------------------------------------


def is_main() -> bool:
  """Whether this process writes metrics, traces, reports and what is printed: process 0 does."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Returns when every process has come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def on_all(value: bool) -> bool:
  """Whether the argument is true on every process."""
  return value if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.int32(value)).all())


def from_main(value: bool) -> bool:
  """The value of process 0, on every process."""
  return value if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def check_same(what: str, facts: Mapping[str, Any], *, seconds: float | None = None) -> None:
  """Compares facts among all processes.

  Args:
    what: the facts together, for the message.
    facts: JSON values by name; dicts of them are compared key by key.
    seconds: how long to wait for all processes to come here; None is `start_seconds`.

  Raises:
    ValueError: on every process, naming what is not the same on all of them or who did not come.
  """
  if _peers is None:
    return

  def compare(texts: list[str]) -> str:
    all_facts = [_flat(json.loads(text)) for text in texts]
    differing = []
    for name in sorted(set().union(*all_facts)):
      first = all_facts[0].get(name)
      other = next((i for i, one in enumerate(all_facts) if one.get(name) != first), None)
      if other is not None:
        theirs = all_facts[other].get(name)
        differing.append(f"{name} ({_short(first)} on process 0, {_short(theirs)} on process {other})")
    if differing:
      raise ValueError(
        f"the {len(texts)} processes of this run differ in {what}: {', '.join(differing[:20])}. Start all of them "
        "alike."
      )
    return ""

  _peers.consult(what, json.dumps(facts, sort_keys=True), compare, seconds=seconds or start_seconds())


def on_main(what: str, function: Callable[[], Any], *, seconds: float | None = None) -> Any:
  """Calls `function` on process 0 alone and returns what it returned, a JSON value, on all of them.

  Args:
    what: for the message where a process does not come here.
    function: a ValueError that it raises is raised on all of them.
    seconds: how long to wait for all processes to come here; None is `start_seconds`.
  """
  if _peers is None:
    return function()
  answer = lambda texts: json.dumps(function())
  return json.loads(_peers.consult(what, "", answer, seconds=seconds or start_seconds()))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
  return flat


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:60]}..."


# ---- Loss ------------------------------------------------------------------------------------

# Words in the errors of JAX, Gloo, NCCL and the coordination service about another process that has ended. Errors of
# this process itself (out of memory, a program that does not compile) have none of them.
_LOSS = (
  "Gloo", "gloo", "NCCL", "Connection closed", "Connection reset", "Socket closed", "Broken pipe", "heartbeat",
  "task died", "UNAVAILABLE", "CoordinationService", "coordination service", "remote process exited",
  "Barrier timed out",
)  # fmt: skip


def is_loss(error: BaseException | None) -> bool:
  """Whether an error, or one that caused it, says that another process of this run has ended."""
  if _peers is None and jax.process_count() == 1:
    return False
  while error is not None:
    if isinstance(error, peers.Lost):
      return True
    if isinstance(error, jax.errors.JaxRuntimeError) and any(words in str(error) for words in _LOSS):
      return True
    error = error.__cause__ or error.__context__
  return False


@contextlib.contextmanager
def stops_with_the_others(command: str) -> Iterator[None]:
  """Ends this process, with a message, when another one is lost or fails, or when it fails itself.

  A normal end would wait for the other processes. So this process ends at once, with status
  `LOST`, or 1 where the failure is its own. The others are told why. A lost process is
  noticed at any time, also while this process waits for it in a step or a save.

  Args:
    command: resumes the run.
  """
  if _peers is None:
    yield
    return
  _peers.when_lost(functools.partial(_end_lost, command))
  try:
    yield
  except SystemExit:
    _peers.leave()
    raise
  except peers.Refused as error:
    peers.note(f"{_me()} stops: {error}")
    _peers.leave(seconds=3.0)  # JAX aborts a process that still reads from one that has ended.
    os._exit(1)
  except BaseException as error:
    if isinstance(error, jax.errors.JaxRuntimeError) or is_loss(error):
      # This error may be caused by a failure of another process, whose message is still on its way.
      lost = _peers.wait_for_loss(3.0)
      if lost or is_loss(error):
        _end_lost(command, lost or f"another process is lost ({_first_line(error)})")
    _peers.fail(_first_line(error))
    peers.note(f"{traceback.format_exc()}{_me()} stops, and the others with it.")
    os._exit(1)
  else:
    _peers.leave()


_ending = threading.Lock()  # Taken once, by the thread that ends this process.


def _end_lost(command: str, reason: str) -> None:
  with _ending:
    peers.note(
      f"{_me()} stops because another process of the run was lost: {reason}. Start all of them again, and they go on "
      f"from the last checkpoint:\n  {command}"
    )
    os._exit(LOST)


def _me() -> str:
  assert _peers is not None
  return f"process {_peers.me} of {_peers.count}"


def _first_line(error: BaseException) -> str:
  return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]


# ---- Whose rows are whose --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rows:
  """A batch's rows as this process sees them."""

  count: int  # B, of the whole batch.
  here: np.ndarray  # [b] int, sorted: the rows whose shards this process's devices hold.
  judged: np.ndarray  # int, sorted places in `here`: together the processes judge every row exactly once.
  judges: np.ndarray  # [B] int, the process that judges each row.
  around: np.ndarray  # [a] int, sorted: all rows of the groups that have a row in `here`.
  split: bool  # Whether any group has rows in several processes; the same on all of them.

  def gather(self, rows: Sequence[int], *columns: Sequence[float], flag: bool = False) -> tuple[np.ndarray, bool]:
    """The results of every process for its rows, in one exchange.

    Args:
      rows: of this process and no other. A row of no process gets 0.
      *columns: each with one number for each of `rows`.
      flag: of this process.

    Returns:
      [columns, B] float32, the same on every process, and whether any of them raised its flag.
    """
    # 0 where another process judges, so that sums are exact.
    mine = np.zeros((len(columns), self.count + 1), np.float32)
    mine[:, list(rows)] = columns
    mine[:, -1] = flag
    if jax.process_count() > 1:
      mine = multihost_utils.process_allgather(mine).sum(axis=0)
    return mine[:, :-1], bool((mine[:, -1] > 0).any())

  def with_groups(self, tree: Any) -> Any:
    """Host arrays [b, ...] of the rows `here`, as arrays [a, ...] of the rows `around`.

    It serves what is made from a whole group's traces. Where every group lies in one process
    the arrays are returned unchanged and nothing is exchanged. Otherwise every process must
    call it, and each briefly holds the traces of all processes.
    """
    if not self.split:
      return tree
    most = int(np.bincount(self.judges).max())
    pad = lambda x: np.concatenate([x[self.judged], np.zeros((most - len(self.judged), *x.shape[1:]), x.dtype)])
    gathered = multihost_utils.process_allgather(jax.tree.map(pad, tree))
    # Where each row stands among those that its process judges, which it sends in order.
    places = np.array([np.sum(self.judges[:row] == self.judges[row]) for row in self.around], int)
    take = lambda x, like: np.asarray(x)[self.judges[self.around], places].astype(like.dtype)
    return jax.tree.map(take, gathered, tree)

  def without_groups(self, tree: Any) -> Any:
    """Host arrays [a, ...] of the rows `around`, as arrays [b, ...] of the rows `here`."""
    places = np.searchsorted(self.around, self.here)
    return jax.tree.map(lambda x: x[places], tree) if self.split else tree


def rows_of(mesh: jax.sharding.Mesh, count: int, *, group_size: int = 1, pad: bool = False) -> Rows:
  """Divides a batch of `count` rows, split over the mesh's data axes, among the processes.

  Several processes hold the same row where a mesh axis of the model spans hosts. Each of them
  has the row in `here`, and rows are judged by them in turn.

  Args:
    mesh: that the rows are split over.
    count: B.
    group_size: rows of a prompt, which stand together; a group may lie in several processes.
    pad: round `count` up to what splits over the mesh; the caller fills the rows at the end.

  Raises:
    ValueError: if the rows do not split over the mesh, or do not make groups.
  """
  if pad:
    parts = sharding.row_parts(mesh)
    count = -(-count // parts) * parts
  sharding.check_rows(mesh, count)
  if count % group_size:
    raise ValueError(f"{count} rows do not make groups of {group_size}.")
  owners: list[list[int]] = [[] for _ in range(count)]
  device: Any
  for device, (rows,) in sharding.batch(mesh).devices_indices_map((count,)).items():
    for row in range(*rows.indices(count)):
      owners[row].append(device.process_index)
  distinct = [sorted(set(processes)) for processes in owners]
  me = jax.process_index()
  here = np.array([row for row in range(count) if me in distinct[row]], int)
  judges = np.array([processes[row % len(processes)] for row, processes in enumerate(distinct)], int)
  groups = np.unique(here // group_size)
  return Rows(
    count=count,
    here=here,
    judged=np.flatnonzero(judges[here] == me),
    judges=judges,
    around=(groups[:, None] * group_size + np.arange(group_size)).reshape(-1),
    split=any(distinct[row] != distinct[row // group_size * group_size] for row in range(count)),
  )


def every_row(count: int) -> Rows:
  """A batch of `count` rows that one process holds and judges alone."""
  rows = np.arange(count)
  return Rows(count=count, here=rows, judged=rows, judges=np.zeros(count, int), around=rows, split=False)


def to_host(mesh: jax.sharding.Mesh | None, tree: Any) -> Any:
  """Device arrays [B, ...] as numpy arrays of the rows that are `here`; all rows where there is one process.

  Raises:
    ValueError: of several processes, without the mesh that the rows are split over.
  """
  if jax.process_count() == 1:
    return jax.device_get(tree)
  if mesh is None:
    raise ValueError(f"rows shared out among {jax.process_count()} processes need the mesh that they are split over.")

  def shards(x: jax.Array) -> list:
    by_row = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return [by_row[start] for start in sorted(by_row)]

  parts = jax.tree.map(shards, jax.device_put(tree, sharding.batch(mesh)))
  jax.tree.map(lambda part: part.copy_to_host_async(), parts)
  return jax.tree.map(np.concatenate, parts, is_leaf=lambda x: isinstance(x, list))


def whole(tree: Any) -> Any:
  """Device arrays as numpy arrays of every row, on every process."""
  return jax.device_get(tree) if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


# ---- Being told to stop ----------------------------------------------------------------------

_METADATA = "/computeMetadata/v1/instance/"
# Answers of a Google Cloud machine's metadata server when the machine is about to be stopped.
_NOTICES = {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE", "preempted": "TRUE"}
_POLL_SECONDS = 5.0


class Stopped(Exception):
  """Some process of this run was told to stop; every process raises it at the same place."""


class StopNotice:
  """Whether this process was told to stop: by SIGTERM, or by Google Cloud's notice of maintenance or preemption.

  TPU VMs get SIGTERM when they are shut down, pods when GKE drains their node, and jobs when
  SLURM's time limit ends. The notice is read from the metadata server, a minute or less
  before the machine stops. The server is asked on TPU hosts and where GCE_METADATA_HOST is
  set. This is a context manager: the former signal handler is restored at its end.
  """

  def __init__(self) -> None:
    self.reason = ""
    self._over = threading.Event()
    self._former: Any = None

  @property
  def given(self) -> bool:
    return bool(self.reason)

  def __enter__(self) -> "StopNotice":
    if threading.current_thread() is threading.main_thread():
      self._former = signal.signal(signal.SIGTERM, lambda *_: self._give("SIGTERM"))
    host = os.environ.get("GCE_METADATA_HOST", "")
    if host or jax.default_backend() == "tpu":
      address = f"http://{host or 'metadata.google.internal'}{_METADATA}"
      threading.Thread(target=self._watch, args=(address,), daemon=True, name="maintenance").start()
    return self

  def __exit__(self, *_: object) -> None:
    self._over.set()
    if self._former is not None:
      signal.signal(signal.SIGTERM, self._former)

  def _give(self, reason: str) -> None:
    self.reason = self.reason or reason

  def _watch(self, address: str) -> None:
    while not self._over.wait(_POLL_SECONDS):
      for name, notice in _NOTICES.items():
        request = urllib.request.Request(address + name, headers={"Metadata-Flavor": "Google"})
        try:
          with urllib.request.urlopen(request, timeout=_POLL_SECONDS) as answer:
            text = answer.read(100).decode(errors="replace").strip()
        except OSError:  # No such server, or no answer now. SIGTERM will come later.
          continue
        if text == notice:
          self._give(f"{name} {text}")
