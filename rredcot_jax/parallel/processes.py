"""Several processes as one program: start-up, whose rows are whose, agreement, and being told to stop.

Every process runs the same script on the same configuration; JAX makes one mesh of
all their devices. Work on the host (questions, verifiers, banks) is shared out by
rows: a process handles the rows whose shards its devices hold, as numpy arrays of
those rows alone, and what every process must know (rewards, whether one of them was
told to stop) is gathered. With one process all of this is the identity.
"""

import contextlib
import dataclasses
import hashlib
import os
import signal
import sys
import threading
import traceback
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rredcot_jax.parallel import sharding

LOST = 75  # Exit status of a process that lost another one: worth trying again.

# ---- Start-up --------------------------------------------------------------------------------


def start(
  *,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  detect: bool = False,
  heartbeat_seconds: int = 100,
) -> None:
  """Joins the other processes of this run, if it has any; before anything else touches a device.

  What is not given is read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID (or JOB_COMPLETION_INDEX, which an indexed Kubernetes job sets). Without
  them, where `detect` is set or SLURM, Open MPI or GKE name several tasks or TPU hosts,
  JAX finds the rest by itself. Else the run has one process and nothing is started.

  Args:
    coordinator: "host:port" of process 0.
    num_processes, process_id: n, and i in [0, n).
    detect: let JAX find the others, as on the hosts of a TPU pod.
    heartbeat_seconds: a process silent for so long is taken for dead, and the others stop.

  Raises:
    ValueError: if only a part is known, naming what is missing.
  """
  coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or None
  num_processes = _number(num_processes, "JAX_NUM_PROCESSES")
  process_id = _number(process_id, "JAX_PROCESS_ID", "JOB_COMPLETION_INDEX")
  known = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
  explicit = coordinator is not None or num_processes is not None
  missing = [name for name, value in known.items() if value is None]
  if explicit and missing:
    if num_processes == 1:
      return
    raise ValueError(
      f"several processes need {' and '.join(missing)} too: give the flags --coordinator=host:port --num_processes=N "
      "--process_id=I, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."
    )
  if not (explicit or detect or _tasks_in_environment() > 1):
    return
  # JAX would take SIGTERM for itself; `StopNotice` does, with one process as with many.
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    coordinator,
    num_processes,
    process_id,
    cluster_detection_method="deactivate" if explicit else None,
    heartbeat_timeout_seconds=heartbeat_seconds,
    # Whoever waits for a dead process to leave in good order waits no longer than for its heartbeat.
    shutdown_timeout_seconds=heartbeat_seconds,
  )


def _number(given: int | None, *names: str) -> int | None:
  if given is not None:
    return given
  for name in names:
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
      raise ValueError(f"the environment variable {name}={text!r} must be a number from 0 on.")
    if text:
      return int(text)
  return None


def _tasks_in_environment() -> int:
  """Processes that SLURM's srun, Open MPI or GKE's TPU webhook have started, by their variables; 1 without them."""
  counts = [os.environ.get(name, "") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
  hosts = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(","))
  return max([hosts, *(int(count) for count in counts if count.isdecimal())])


def is_main() -> bool:
  """Whether this process writes metrics, traces, reports and what is printed: process 0 does."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Returns when every process has come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def on_all(value: bool) -> bool:
  """Whether it is so on every process."""
  return value if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.int32(value)).all())


def from_main(value: bool) -> bool:
  """What process 0 says."""
  return value if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def check_same(what: str, text: str) -> None:
  """Compares a text among all processes.

  Raises:
    ValueError: on every process, if it is not the same on all of them.
  """
  if jax.process_count() == 1:
    return
  digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32)
  if (multihost_utils.process_allgather(digest) != digest).any():
    raise ValueError(f"the {jax.process_count()} processes of this run differ in {what}: start all of them alike.")


@contextlib.contextmanager
def stops_with_the_others(command: str) -> Iterator[None]:
  """Ends this process of several, with a message, when another one is lost or it fails itself.

  What it was waiting for together with a lost one raises an error. Leaving in good
  order would wait for the others once more, so this process leaves at once: with status
  `LOST`, or 1 where the failure is its own.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    print(
      f"process {jax.process_index()} of {jax.process_count()} stops: another process of the run was lost, or the "
      f"connection to it ({reason}). Start all of them again, and they go on from the last checkpoint:\n  {command}",
      file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(LOST)
  except Exception:
    if jax.process_count() == 1:
      raise
    traceback.print_exc()
    me = jax.process_index()
    print(f"process {me} of {jax.process_count()} stops, and the others with it.", file=sys.stderr, flush=True)
    os._exit(1)


# ---- Whose rows are whose --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rows:
  """A batch's rows as this process sees them."""

  count: int  # B, of the whole batch.
  here: np.ndarray  # [b] int, sorted: the rows whose shards this process's devices hold.
  judged: np.ndarray  # int, sorted places in `here`: together the processes judge every row exactly once.

  def gather(self, rows: Sequence[int], *columns: Sequence[float], flag: bool = False) -> tuple[np.ndarray, bool]:
    """What every process found for its rows, in one exchange.

    Args:
      rows: of this process and no other; a row that is nobody's gets 0.
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


def rows_of(mesh: jax.sharding.Mesh, count: int, *, group_size: int = 1) -> Rows:
  """Shares out a batch of `count` rows, split over the mesh's data axes.

  Where several processes hold a row (an axis of the model that spans hosts) each has
  it in `here`, and they take turns at judging.

  Raises:
    ValueError: if the rows do not split over the mesh, or if a group of `group_size`
      consecutive rows does not lie within one process, which compares its traces.
  """
  sharding.check_rows(mesh, count)
  owners: list[list[int]] = [[] for _ in range(count)]
  device: Any
  for device, (rows,) in sharding.batch(mesh).devices_indices_map((count,)).items():
    for row in range(*rows.indices(count)):
      owners[row].append(device.process_index)
  distinct = [sorted(set(processes)) for processes in owners]
  for first in range(0, count, group_size):
    if any(distinct[row] != distinct[first] for row in range(first, min(first + group_size, count))):
      raise ValueError(
        f"the group of rows {first} to {first + group_size - 1} lies in several processes: make "
        f"rollout.prompts_per_step a multiple of the {jax.process_count()} processes, or change the mesh."
      )
  me = jax.process_index()
  here = np.array([row for row in range(count) if me in distinct[row]], int)
  turns = [distinct[row][row % len(distinct[row])] for row in here]
  return Rows(count=count, here=here, judged=np.flatnonzero(np.array(turns, int) == me))


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
# What the metadata server of a Google Cloud machine answers when the machine is about to be taken away.
_NOTICES = {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE", "preempted": "TRUE"}
_POLL_SECONDS = 5.0


class Stopped(Exception):
  """Some process of this run was told to stop; every process raises it at the same place."""


class StopNotice:
  """Whether this process was told to stop: by SIGTERM, or by Google Cloud's notice of maintenance or preemption.

  SIGTERM is what TPU VMs get when they are shut down, pods when GKE drains their node,
  and jobs when SLURM takes their time away. The notice is read from the metadata
  server, a minute or less before; it is asked on TPU hosts and where GCE_METADATA_HOST
  is set. A context manager: the former handler comes back on leaving.
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
        except OSError:  # No such server, or not now: SIGTERM is still to come.
          continue
        if text == notice:
          self._give(f"{name} {text}")
