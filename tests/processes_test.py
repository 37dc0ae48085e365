"""Two processes of two devices equal one of four, also across kills, signals, a full disk and another process count."""

import dataclasses
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import types
from typing import NamedTuple

import jax
import numpy as np
import process_run
import pytest
from helpers import check_moved, reward_of_length, run, saved_params, untimed
from process_run import NO_FATE, ROOT, free_port, run_processes

from rredcot_jax.data.chain import Chain
from rredcot_jax.parallel import peers, processes, sharding
from rredcot_jax.report import records
from rredcot_jax.train import evaluation, experiment, loop, workdir

# To float32 reassociation: sums over devices are taken in another order.
CLOSE = {"rel": 1e-4, "abs": 1e-5}


class NoticeAt:
  """A notice that is given from the `count`-th look on."""

  reason = "test"

  def __init__(self, count):
    self._looks_left = count

  @property
  def given(self):
    self._looks_left -= 1
    return self._looks_left <= 0


def saved_steps(directory):
  return sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit())


def check_same_run(directory, expected_directory, config):
  """The lines of metrics of two finished runs that agree, in parameters and traces too, and have learnt something."""
  check_moved(expected_directory, config)
  lines, expected = untimed(directory), untimed(expected_directory)
  assert [line["step"] for line in lines] == [line["step"] for line in expected]
  for ours, theirs in zip(lines, expected):
    assert ours == pytest.approx(theirs, **CLOSE)
  (ours, data), (theirs, their_data) = (
    saved_params(path, config.num_steps, config) for path in (directory, expected_directory)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours.params, theirs.params)
  assert data == their_data
  traces, expected = (list(records.read_traces(path / "traces.jsonl")) for path in (directory, expected_directory))
  assert traces and [trace["tokens"] for trace in traces] == [trace["tokens"] for trace in expected]
  return lines


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The run that every other one here is compared with: one process of four devices, uninterrupted."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Chain, "reward", reward_of_length)
    return run(process_run.get_config(), tmp_path_factory.mktemp("whole") / "run")


def test_two_processes_go_on_after_a_kill_as_one_uninterrupted_process(tmp_path, whole):
  directory = tmp_path / "run"
  # One is killed in step 4, after step 2 was saved; parameters are split over both.
  ends = run_processes(directory, [NO_FATE, ("KILL", "rollout", "4")], {"mesh.data": 1, "mesh.fsdp": 4})
  assert ends[1][0] == -signal.SIGKILL, ends[1][1][-3000:]
  status, text, seconds = ends[0]
  assert status == processes.LOST, text[-3000:]
  assert "another process of the run was lost: process 1 of 2 is lost (it has ended)" in text
  assert f"--workdir={directory}" in text.splitlines()[-1]  # The command that resumes it.
  assert seconds < process_run.HEARTBEAT_SECONDS / 2  # It did not wait for a heartbeat.
  assert saved_steps(directory) == [2]
  ends = run_processes(directory, [NO_FATE] * 2, {"mesh.data": 1, "mesh.fsdp": 4})
  assert [status for status, _, _ in ends] == [0, 0], ends
  assert "resumed from step 2" in ends[0][1]
  check_same_run(directory, whole, process_run.get_config())


@pytest.mark.faults
def test_other_layouts_signals_and_a_full_disk_on_the_way_change_nothing(tmp_path, whole, monkeypatch):
  monkeypatch.setattr(Chain, "reward", reward_of_length)
  config, directory = process_run.get_config(), tmp_path / "chained"

  # One process of four devices is told to stop in its second step: saved at the boundary before.
  with workdir.claim(directory, config, "test"):
    assert not loop.run(config, directory, notice=NoticeAt(4))  # Looks: two batches of evaluation, step 1, step 2.
  assert saved_steps(directory) == [1]

  # Two processes of two devices go on; one is killed in step 4, after step 2 was saved.
  ends = run_processes(directory, [NO_FATE, ("KILL", "rollout", "3")], {"mesh.data": 1, "mesh.fsdp": 4})
  assert (ends[0][0], ends[1][0]) == (processes.LOST, -signal.SIGKILL), ends
  assert "resumed from step 1" in ends[0][1]

  # Both again, heads split over both so that both hold every row, until one gets SIGTERM: both save and end well.
  ends = run_processes(directory, [NO_FATE, ("TERM", "rollout", "2")], {"mesh.data": 1, "mesh.tensor": 4})
  assert [status for status, _, _ in ends] == [0, 0], ends
  assert "resumed from step 2" in ends[0][1] and "told to stop (another process was): saved. Resume with" in ends[0][1]
  assert f"--workdir={directory}" in ends[0][1].splitlines()[-1]
  assert "resumed from" not in ends[1][1] and "told to stop" not in ends[1][1]  # Process 0 alone speaks.
  assert saved_steps(directory)[-1] == 3

  # The disk of one is full when step 4 is saved: it says so and ends, and the other one says why.
  ends = run_processes(directory, [NO_FATE, ("FULL", "rollout", "1")], {"mesh.data": 4})
  (status, text, seconds), (own_status, own_text, _) = ends
  failed = "checkpoint 4 could not be written by process 1 (File too large)"
  assert own_status == 1 and failed in own_text and "Make room in" in own_text, own_text
  assert status == processes.LOST and f"process 1 of 2 failed: SaveFailed: {failed}" in text, text[-3000:]
  assert seconds < process_run.HEARTBEAT_SECONDS / 2 and saved_steps(directory)[-1] == 3

  # One process of four devices brings it to its end.
  run(config, directory)
  check_same_run(directory, whole, config)


@pytest.mark.faults
@pytest.mark.parametrize(("victim", "place"), [(1, "save"), (0, "save"), (0, "seal"), (1, "update"), (0, "evaluation")])
def test_a_process_killed_in_a_save_is_lost_and_not_a_full_disk(tmp_path, whole, victim, place):
  directory = tmp_path / "run"
  fates = [("KILL", place, "2") if me == victim else NO_FATE for me in range(2)]
  ends = run_processes(directory, fates, {"mesh.data": 1, "mesh.fsdp": 4})
  status, text, seconds = ends[1 - victim]
  assert ends[victim][0] == -signal.SIGKILL, ends[victim][1][-3000:]
  assert status == processes.LOST, text[-3000:]
  assert f"process {victim} of 2 is lost (it has ended)" in text and "Make room" not in text, text[-3000:]
  assert seconds < process_run.HEARTBEAT_SECONDS / 2
  ends = run_processes(directory, [NO_FATE] * 2, {"mesh.data": 1, "mesh.fsdp": 4})
  assert [status for status, _, _ in ends] == [0, 0], ends
  assert "cannot be read" not in ends[0][1] and "not verified" not in ends[0][1]
  check_same_run(directory, whole, process_run.get_config())


@pytest.mark.faults
def test_monte_carlo_values_are_shared_out_among_processes(tmp_path, monkeypatch):
  monkeypatch.setattr(Chain, "reward", reward_of_length)
  config = process_run.get_config()
  changes = {"num_steps": 2, "credit.source": "monte_carlo"}
  config.update_from_flattened_dict(changes)
  alone = run(config, tmp_path / "alone")
  # The first process holds rows 0 to 3 alone; then both hold all rows, and take turns at judging.
  for name, axes in {"rows": {"mesh.data": 4}, "heads": {"mesh.data": 1, "mesh.tensor": 4}}.items():
    ends = run_processes(tmp_path / name, [NO_FATE] * 2, changes | axes)
    assert [status for status, _, _ in ends] == [0, 0], ends
    lines = check_same_run(tmp_path / name, alone, config)
    assert all(line["credit/verifier_calls"] > 8 for line in lines if "train/reward" in line)


@pytest.mark.faults
def test_a_group_in_two_processes_is_credited_as_in_one(tmp_path, monkeypatch):
  """One prompt of eight traces over four devices: banks are made from traces that the other process holds."""
  monkeypatch.setattr(Chain, "reward", reward_of_length)
  config = process_run.get_config()
  changes = {
    "num_steps": 3, "rollout.prompts_per_step": 1, "rollout.group_size": 8, "credit.bank": "rollouts",
    "evaluation.rows": 2,  # Fewer than devices: filled up.
  }  # fmt: skip
  config.update_from_flattened_dict(changes)
  alone = run(config, tmp_path / "alone")
  ends = run_processes(tmp_path / "two", [NO_FATE] * 2, changes | {"mesh.data": 4})
  assert [status for status, _, _ in ends] == [0, 0], ends
  lines = [line for line in check_same_run(tmp_path / "two", alone, config) if "train/reward" in line]
  # The bank held something, which differs from group to group.
  assert (
    len({line["credit/effective_sample_size"] for line in lines}) > 1
    and min(line["credit/covered_states"] for line in lines) > 0
  )


# ---- Start-up --------------------------------------------------------------------------------


KNOWN = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4"}
SLURM = {
  "SLURM_JOB_ID": "5", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2",
  "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
}  # fmt: skip
OPEN_MPI = {
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "8",
  "OMPI_COMM_WORLD_RANK": "6", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}  # fmt: skip


@pytest.fixture
def alone(monkeypatch):
  """What `start` does to this process ends with the test."""
  monkeypatch.setattr(processes, "_peers", None)
  monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: None)


@pytest.mark.parametrize(
  ("given", "environment", "expected"),
  [
    ({}, {}, None),
    ({"num_processes": 1}, {}, None),
    ({"num_processes": 1, "coordinator": "a:1", "process_id": 0}, {}, None),
    ({}, {"SLURM_STEP_NUM_TASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ({"coordinator": "a:1", "num_processes": 2, "process_id": 0}, {}, ("a:1", 2, 0)),
    ({"process_id": 0}, KNOWN | {"JAX_PROCESS_ID": "3"}, ("a:1", 4, 0)),
    ({}, KNOWN | {"JOB_COMPLETION_INDEX": "3"}, ("a:1", 4, 3)),
    ({}, KNOWN | {"JOB_COMPLETION_INDEX": "3", "JAX_PROCESS_ID": "2"}, ("a:1", 4, 2)),
    ({}, SLURM, ("node3:61445", 2, 1)),
    # A job of Kubernetes that runs SLURM, say: where JAX finds the others it numbers them too.
    ({}, SLURM | {"JOB_COMPLETION_INDEX": "0"}, ("node3:61445", 2, 1)),
    ({}, OPEN_MPI, ("10.96.0.1:62624", 8, 6)),
  ],
)
def test_processes_are_found_by_flags_and_environment(alone, monkeypatch, given, environment, expected):
  met, started = [], []

  def meet(*args, **_):
    met.append(args)
    return peers.Peers(0, 1, {}, 30)

  monkeypatch.setattr(peers, "meet", meet)
  monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: started.append(args[:3]))
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  processes.start(**given)
  assert met == started == ([] if expected is None else [expected])


@pytest.mark.parametrize("given", [{"detect": True}, {}])
def test_a_pod_of_tpu_hosts_is_found_as_jax_finds_it(alone, monkeypatch, given):
  from jax._src import clusters

  def detect(*known):
    assert known[:3] == (None, None, None)  # JOB_COMPLETION_INDEX is none of JAX's numbers.
    return "worker-0:8476", 2, 1, None

  met = []
  monkeypatch.setattr(clusters.ClusterEnv, "auto_detect_unset_distributed_params", detect)
  monkeypatch.setattr(peers, "meet", lambda *args, **_: met.append(args) or peers.Peers(0, 1, {}, 30))
  monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
  if not given:
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
  processes.start(**given)
  assert met == [("worker-0:8476", 2, 1)]


def test_half_known_processes_are_refused(alone, monkeypatch):
  with pytest.raises(ValueError, match="need num_processes and process_id too"):
    processes.start(coordinator="a:1")
  with pytest.raises(ValueError, match="need coordinator and process_id too"):
    processes.start(num_processes=2)
  with pytest.raises(ValueError, match="no other processes are found: --distributed works on TPU hosts"):
    processes.start(detect=True)
  monkeypatch.setenv("JAX_PROCESS_ID", "first")
  with pytest.raises(ValueError, match="JAX_PROCESS_ID='first' must be a number"):
    processes.start(num_processes=2)
  monkeypatch.setenv("RREDCOT_START_SECONDS", "soon")
  with pytest.raises(ValueError, match="RREDCOT_START_SECONDS='soon' must be a number of seconds"):
    processes.start(num_processes=2)


def test_one_process_is_checked_and_agrees_with_itself(alone):
  def check():
    raise ValueError("k_max=0")

  with pytest.raises(ValueError, match="k_max=0"):
    processes.start(check=check)
  processes.start(facts={"code": "x"})
  processes.check_same("anything", {"code": "x"})
  assert processes.on_main("anything", lambda: {"a": [1]}) == {"a": [1]}
  with processes.stops_with_the_others("again"):
    assert not processes.is_loss(jax.errors.JaxRuntimeError("UNAVAILABLE: Connection reset"))


class TwoPeers:
  """Process 0 of two, of which the other one says `theirs`."""

  me, count = 0, 2

  def __init__(self, theirs):
    self.theirs = theirs

  def consult(self, about, text, answer, *, seconds):
    return answer([text, json.dumps(self.theirs)])


@pytest.mark.parametrize(
  ("ours", "theirs", "differing"),
  [
    ({"config": {"a": {"b": 1, "c": 2}}}, {"config": {"a": {"b": 1, "c": 3}}}, r"config\.a\.c \(2 on process 0, 3 on"),
    (
      {"code": "x", "workdir": "r"},
      {"code": "y", "workdir": "s"},
      r"code \('x' .*, 'y' .*workdir \('r' .*, 's' on process 1",
    ),
    ({"a": None}, {}, None),  # What one does not have is nothing.
    ({"a": 0}, {}, r"a \(0 on process 0, None on process 1\)"),
    ({"a": [1, 2]}, {"a": [1, 2]}, None),
    ({"a": "x" * 1000}, {"a": "y" * 1000}, r"a \('x{59}\.\.\. on process 0"),
  ],
)
def test_what_differs_between_processes_is_named_key_by_key(monkeypatch, ours, theirs, differing):
  monkeypatch.setattr(processes, "_peers", TwoPeers(theirs))
  if differing is None:
    processes.check_same("it", ours)
  else:
    with pytest.raises(
      ValueError, match=f"the 2 processes of this run differ in it: {differing}.*Start all of them alike"
    ):
      processes.check_same("it", ours)


@pytest.mark.parametrize(
  ("error", "lost"),
  [
    (jax.errors.JaxRuntimeError("UNKNOWN: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:5"), True),
    (jax.errors.JaxRuntimeError("INTERNAL: NCCL operation ncclAllReduce failed: remote process exited"), True),
    (jax.errors.JaxRuntimeError("UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats)"), True),
    (peers.Lost("process 1 of 2 is lost"), True),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 68719476736 bytes."), False),
    (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Executable expected parameter 0 of size 8"), False),
    (OSError(28, "No space left on device"), False),
    (ValueError("UNAVAILABLE"), False),
  ],
)
def test_a_loss_is_told_from_a_failure_of_this_process(monkeypatch, error, lost):
  monkeypatch.setattr(processes, "_peers", TwoPeers({}))
  assert processes.is_loss(error) == lost
  wrapped = TimeoutError("Timed out while waiting for async_write_complete barrier.")
  wrapped.__cause__ = error
  assert processes.is_loss(wrapped) == lost


# ---- Mistakes at the start, as they are made: by two commands --------------------------------

SOON = {"RREDCOT_START_SECONDS": "15"}


def changed_code(directory):
  """A copy of the package in which one comment differs."""
  shutil.copytree(ROOT / "rredcot_jax", directory / "rredcot_jax", ignore=shutil.ignore_patterns("__pycache__"))
  with open(directory / "rredcot_jax" / "ops" / "banks.py", "a") as file:
    file.write("# Another version.\n")
  return f"{directory}:{ROOT / 'experiments'}:{ROOT / 'tests'}"


def mistakes(case, directory):
  """Options of `run_processes` that make a mistake, what all say of it."""
  if case == "configuration":
    flags = ["--config.optimizer.learning_rate=0.5"]
    return {
      "each": [{}, {"flags": flags}]
    }, r"config\.optimizer\.learning_rate \(0\.003 on process 0, 0\.5 on process 1\)"
  if case == "work directory":
    elsewhere = {"workdir": directory / "elsewhere"}
    return {"each": [{}, elsewhere]}, r"workdir \('.*/run' on process 0, '.*/elsewhere' on process 1\)"
  if case == "code":
    return {"each": [{}, {"environment": {"PYTHONPATH": changed_code(directory)} | SOON}]}, r"code \('\w+' on process 0"
  if case == "refused configuration":
    refused = r"num_steps=0 must be"
    return {"each": [{}, {"flags": ["--config.num_steps=0"]}]}, refused
  if case == "refused on the first":
    return {"each": [{"flags": ["--config.num_steps=0"]}, {}]}, r"num_steps=0 must be"
  if case == "twice":
    return {"ids": [0, 1, 1]}, r"two processes say that they are process 1: \S+, pid \d+, and \S+, pid \d+"
  if case == "out of range":
    return {"ids": [0, 2]}, r"process_id=2 is none of 0 to 1, the ids of 2 processes"
  raise KeyError(case)


CASES = [
  "configuration", "work directory", "code", "refused configuration", "refused on the first", "twice", "out of range",
]  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("case", CASES)
def test_a_mistake_at_the_start_is_named_by_all_within_seconds(tmp_path, case):
  options, message = mistakes(case, tmp_path)
  began = time.monotonic()
  options = {"environment": SOON} | options
  if case == "code":
    options.pop("environment")
    options["each"][0] = {"environment": SOON}
  ends = run_processes(tmp_path / "run", [NO_FATE] * len(options.get("ids", [0, 1])), {}, **options)
  assert time.monotonic() - began < 60
  for status, text, _ in ends:
    assert status == 1 and re.search(message, text), text[-3000:]
    assert "Terminating process because the JAX distributed service" not in text  # JAX has not aborted it.
  assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.faults
def test_one_that_does_not_come_is_named_and_a_port_in_use(tmp_path):
  port = free_port()
  flags = [f"--coordinator=127.0.0.1:{port}", "--num_processes=3"]
  each = {"environment": {"RREDCOT_START_SECONDS": "8"}}
  started = [process_run.Started(tmp_path / "run", NO_FATE, [*flags, f"--process_id={i}"], **each) for i in (0, 2)]
  process_run.wait_for(lambda: all([one.poll() for one in started]))
  for one in started:
    assert one.status == 1 and "process 1 of 3 did not come to 127.0.0.1" in one.text, one.text[-3000:]
  with socket.create_server(("", port)):
    (one,) = [process_run.Started(tmp_path / "run", NO_FATE, [*flags, "--process_id=0"], **each)]
    process_run.wait_for(one.poll)
  assert one.status == 1 and f"process 0 cannot listen on port {port}" in one.text, one.text[-3000:]
  assert not (tmp_path / "run").exists()


@pytest.mark.faults
def test_a_work_directory_that_is_not_shared_is_noticed(tmp_path):
  """The same path on two hosts, of which each has its own disk there: process 1 sees a tmpfs."""
  private = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {tmp_path / "runs"} && exec "$@"', "sh"]
  (tmp_path / "runs").mkdir()
  if subprocess.run([*private, "true"], capture_output=True, check=False).returncode:
    pytest.skip("mount namespaces are not permitted here")
  ends = run_processes(tmp_path / "runs" / "run", [NO_FATE] * 2, {}, each=[{}, {"prefix": private}])
  for status, text, _ in ends:
    assert status == 1 and "which must be on storage that all of them share: run.lease" in text, text[-3000:]


# ---- Two hosts, one of which is cut off ------------------------------------------------------


class Hosts:
  """Two hosts with a cable between them: network namespaces, each with its own address for the machine's name."""

  def __init__(self, directory):
    self.names = [f"rredcot-{os.getpid()}-{me}" for me in range(2)]
    self.addresses, self.prefixes = ["10.77.0.1", "10.77.0.2"], []
    self._ends = [f"rr{os.getpid() % 10**6}-{me}" for me in range(2)]
    self._far_end = ["-n", self.names[1], "link", "set", self._ends[1]]
    for me, name in enumerate(self.names):
      (directory / f"hosts-{me}").write_text(f"127.0.0.1 localhost\n{self.addresses[me]} {socket.gethostname()}\n")
      with_hosts = f'mount --bind {directory / f"hosts-{me}"} /etc/hosts && exec "$@"'
      self.prefixes.append(["ip", "netns", "exec", name, "sh", "-c", with_hosts, "sh"])

  def set_up(self):
    for name in self.names:
      self._ip("netns", "add", name)
    self._ip("link", "add", self._ends[0], "type", "veth", "peer", "name", self._ends[1])
    for name, end, address in zip(self.names, self._ends, self.addresses):
      self._ip("link", "set", end, "netns", name)
      self._ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
      for link in (end, "lo"):
        self._ip("-n", name, "link", "set", link, "up")

  def _ip(self, *words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
      raise PermissionError(done.stderr.strip())

  def cut(self):
    self._ip(*self._far_end, "down")

  def mend(self):
    self._ip(*self._far_end, "up")

  def remove(self):
    for name in self.names:
      subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.fixture
def hosts(tmp_path):
  hosts = Hosts(tmp_path)
  try:
    hosts.set_up()
    yield hosts
  except (PermissionError, FileNotFoundError) as error:
    pytest.skip(f"network namespaces are not permitted here: {error}")
  finally:
    hosts.remove()


@pytest.mark.faults
@pytest.mark.parametrize("place", ["update", "save"])
def test_a_host_cut_off_ends_both_within_the_heartbeat_and_the_run_goes_on(tmp_path, whole, hosts, place):
  directory = tmp_path / "run"
  flags = ["--num_processes=2", "--config.mesh.data=1", "--config.mesh.fsdp=4"]

  def started(fates):
    flags_now = [f"--coordinator={hosts.addresses[0]}:{free_port()}", *flags]
    return [
      process_run.Started(directory, fate, [*flags_now, f"--process_id={me}"], prefix=hosts.prefixes[me])
      for me, fate in enumerate(fates)
    ]

  both = started([NO_FATE, ("WAIT", place, "2")])
  try:
    process_run.wait_for(lambda: "waiting to be told" in both[1].text or any(one.poll() for one in both))
    hosts.cut()
    cut_at = time.monotonic()
    process_run.wait_for(lambda: all([one.poll() for one in both]))
  finally:
    for one in both:
      one.end()
  for me, one in enumerate(both):
    assert one.status == processes.LOST, one.text[-3000:]
    assert f"process {1 - me} of 2 is lost (the connection to it broke: Connection timed out)" in one.text, one.text
    assert one.ended_at - cut_at < process_run.HEARTBEAT_SECONDS
  hosts.mend()
  both = started([NO_FATE, NO_FATE])
  try:
    process_run.wait_for(lambda: all([one.poll() for one in both]))
  finally:
    for one in both:
      one.end()
  assert [one.status for one in both] == [0, 0], both[0].text[-3000:]
  assert "cannot be read" not in both[0].text
  check_same_run(directory, whole, process_run.get_config())


# ---- Whose rows are whose --------------------------------------------------------------------


class FakeDevice(NamedTuple):
  process_index: int
  number: int


def rows_of_process(monkeypatch, index, owners, **options):
  """`rows_of` 8 rows on process `index`, where owners[i] are the processes that hold the i-th part of them."""
  each = 8 // len(owners)
  held = {
    FakeDevice(owner, part): (slice(part * each, (part + 1) * each),)
    for part, holders in enumerate(owners)
    for owner in holders
  }
  batch = types.SimpleNamespace(devices_indices_map=lambda shape: held)
  monkeypatch.setattr(sharding, "batch", lambda mesh: batch)
  monkeypatch.setattr(jax, "process_index", lambda: index)
  return processes.rows_of(sharding.make_mesh(), 8, **options)


@pytest.mark.parametrize(
  "owners",
  [
    [[0], [0], [1], [1]],
    [[0], [1], [1], [0]],  # Devices may lie in any order.
    [[0, 1], [0, 1]],  # An axis of the model over both.
    [[0, 1], [2, 3], [0, 1], [2, 3]],
  ],
)
def test_every_row_is_judged_once_by_a_process_that_holds_it(monkeypatch, owners):
  processes = {owner for holders in owners for owner in holders}
  shares = {i: rows_of_process(monkeypatch, i, owners, group_size=2) for i in processes}
  for i, share in shares.items():
    assert share.here.tolist() == [row for row in range(8) if i in owners[row * len(owners) // 8]]
    assert 8 // len(processes) == len(share.judged)
  assert sorted(np.concatenate([share.here[share.judged] for share in shares.values()])) == list(range(8))


@pytest.mark.parametrize("owners", [[[0], [1], [0], [1]], [[0, 1], [1, 2], [2, 0], [0]], [[0], [0], [1], [1]]])
def test_a_group_in_several_processes_finds_its_traces(monkeypatch, owners):
  processes_ = sorted({owner for holders in owners for owner in holders})
  shares = {i: rows_of_process(monkeypatch, i, owners, group_size=4) for i in processes_}
  whole = {"tokens": np.arange(24, dtype=np.int16).reshape(8, 3), "mask": np.arange(8) % 3 == 0}
  sent = []  # What each process gives to the exchange, and then the exchange gives to each.

  def allgather(tree):
    sent.append(tree)
    raise InterruptedError

  monkeypatch.setattr(processes.multihost_utils, "process_allgather", allgather)
  of = lambda tree, rows: jax.tree.map(lambda x: x[rows], tree)
  for i in processes_:
    if shares[i].split:
      with pytest.raises(InterruptedError):
        shares[i].with_groups(of(whole, shares[i].here))
  monkeypatch.setattr(
    processes.multihost_utils, "process_allgather", lambda tree: jax.tree.map(lambda *each: np.stack(each), *sent)
  )
  for share in shares.values():
    groups = sorted({row // 4 for row in share.here.tolist()})
    assert share.around.tolist() == [row for group in groups for row in range(4 * group, 4 * group + 4)]
    assert share.split == (owners != [[0], [0], [1], [1]])
    around = share.with_groups(of(whole, share.here))
    jax.tree.map(np.testing.assert_array_equal, around, of(whole, share.around))
    assert around["tokens"].dtype == np.int16
    jax.tree.map(np.testing.assert_array_equal, share.without_groups(around), of(whole, share.here))


def test_rows_are_filled_up_where_that_is_asked_for():
  share = processes.rows_of(sharding.make_mesh(), 6, pad=True)
  assert share.count == 8 and share.here.tolist() == list(range(8))
  assert processes.rows_of(sharding.make_mesh(), 1, pad=True).count == 4
  with pytest.raises(ValueError, match="8 rows do not make groups of 3"):
    processes.rows_of(sharding.make_mesh(), 8, group_size=3)


def test_one_process_holds_and_judges_all():
  share = processes.rows_of(sharding.make_mesh(), 8, group_size=4)
  assert share.here.tolist() == share.judged.tolist() == list(range(8))
  (numbers, others), flag = share.gather([1, 3], [0.5, 2.0], [7, 8], flag=True)
  assert numbers.tolist() == [0, 0.5, 0, 2, 0, 0, 0, 0] and others[3] == 8 and flag
  with pytest.raises(ValueError, match="a batch of 6 rows does not split over 4"):
    processes.rows_of(sharding.make_mesh(), 6)
  mine, every = processes.rows_of(sharding.make_mesh(), 8, group_size=4), processes.every_row(8)
  for field in dataclasses.fields(processes.Rows):
    np.testing.assert_array_equal(getattr(mine, field.name), getattr(every, field.name))


def test_an_evaluation_of_fewer_rows_than_devices_draws_the_traces_of_one_device():
  config = process_run.get_config()

  def judged(devices):
    parts = experiment.Experiment(config, devices=devices)
    return list(
      evaluation.judged_batches(
        parts.start_params(jax.random.key(0)), parts.model, parts.held_out, parts.codec, parts.rollout_mesh,
        jax.random.key(1), num_prompts=5, samples=1, rows=3, max_prompt_tokens=config.rollout.max_prompt_tokens,
        **parts.sampling_options,
      )
    )  # fmt: skip

  filled, alone = judged(jax.devices()), judged(jax.devices()[:1])
  assert [len(batch) for batch in filled] == [3, 2] and filled == alone
  assert len({one.length for batch in filled for one in batch}) > 1


# ---- Being told to stop ----------------------------------------------------------------------


def test_sigterm_is_noticed_and_the_former_handler_comes_back():
  before = signal.getsignal(signal.SIGTERM)
  with processes.StopNotice() as notice:
    assert not notice.given
    signal.raise_signal(signal.SIGTERM)
    assert notice.given and notice.reason == "SIGTERM"
  assert signal.getsignal(signal.SIGTERM) is before


def test_a_maintenance_notice_is_read_from_the_metadata_server(monkeypatch):
  answers = {"maintenance-event": "NONE", "preempted": "FALSE"}

  class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      known = self.headers["Metadata-Flavor"] == "Google" and self.path.startswith("/computeMetadata/v1/instance/")
      self.send_response(200 if known else 403)
      self.end_headers()
      self.wfile.write(answers[self.path.rpartition("/")[2]].encode())

    def log_message(self, *args):
      pass

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
  monkeypatch.setattr(processes, "_POLL_SECONDS", 0.02)
  with processes.StopNotice() as notice:
    time.sleep(0.2)
    assert not notice.given
    answers["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    limit = time.monotonic() + 20
    while not notice.given and time.monotonic() < limit:
      time.sleep(0.02)
  server.shutdown()
  assert notice.reason == "maintenance-event TERMINATE_ON_HOST_MAINTENANCE"
