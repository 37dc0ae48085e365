"""Who holds a work directory: one run at a time, whatever locks the filesystem has."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers import begin, claim

from rredcot_jax.train import lease as lease_lib

HOLDER = """
import sys, time
sys.path[:0] = {path!r}
import tiny_config
from rredcot_jax.train import lease, workdir
lease._BEAT_SECONDS = 0.1
with workdir.claim({workdir!r}, tiny_config.get_config(), "python first.py"):
  print("held", flush=True)
  sys.stdin.readline()
"""


@pytest.fixture
def held(tmp_path):
  """A work directory that another process holds."""
  process = subprocess.Popen(
    [sys.executable, "-c", HOLDER.format(path=sys.path, workdir=str(tmp_path))],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  assert process.stdout.readline() == "held\n"
  yield tmp_path, process
  process.kill()
  process.communicate()


IN_USE = (
  r"is in use by a run on \S+, pid %d \(python first.py\). Wait for its end, stop it, or choose another --workdir"
)


@pytest.mark.parametrize("locks", [True, False])
def test_a_second_run_is_refused_while_the_first_lives_and_not_after_a_kill(held, monkeypatch, locks):
  path, process = held
  if not locks:  # As on filesystems that have none.
    monkeypatch.setattr(lease_lib.fcntl, "lockf", without_locks)
  for _ in range(2):  # Looking does not take the lock away from its holder.
    with pytest.raises(ValueError, match=IN_USE % process.pid):
      claim(path)
  if locks:  # The lock alone keeps others out, too.
    lease = (path / "run.lease").read_bytes()
    (path / "run.lease").unlink()
    with pytest.raises(ValueError, match="is in use by"):
      claim(path)
    (path / "run.lease").write_bytes(lease)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert (path / "run.lease").exists()
  began = time.monotonic()
  claim(path).close()
  assert time.monotonic() - began < 5  # It is known at once that a process of this machine is dead.
  assert not (path / "run.lease").exists()


HOSTILE = "\x1b[2J\u202e" + "x" * 10_000


def test_what_a_directory_says_can_be_shown(tmp_path):
  begin(tmp_path, metrics=[0], checkpoints=[2])
  held = json.loads((tmp_path / "config.json").read_text())
  for changes in ({"version": HOSTILE, "format": 2}, {"config": held["config"] | {HOSTILE: HOSTILE}}):
    (tmp_path / "config.json").write_text(json.dumps(held | changes))
    with pytest.raises(ValueError, match=r"\\x1b\[2J\\u202ex") as caught:
      claim(tmp_path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 12_000
  me = lease_lib._me()
  (tmp_path / "run.lease").write_text(json.dumps(me | {"host": HOSTILE, "command": HOSTILE}))
  with pytest.raises(ValueError, match=r"in use by a run on \\x1b\[2J\\u202ex") as caught:
    claim(tmp_path)
  assert str(caught.value).isprintable() and len(str(caught.value)) < 1_000


@pytest.mark.parametrize(
  "lease", ["", "[]", "null", "{", "\0" * 8192, '{"pid": "x"}', "[" * 60_000, "9" * 60_000, HOSTILE]
)
def test_a_lease_that_is_none_keeps_nobody_out(tmp_path, monkeypatch, lease):
  monkeypatch.setattr(lease_lib, "LEASE_SECONDS", 0.2)
  begin(tmp_path)
  (tmp_path / "run.lease").write_text(lease)
  claim(tmp_path).close()


def test_a_process_that_got_the_number_of_a_dead_holder_keeps_nobody_out(tmp_path):
  begin(tmp_path)
  me = lease_lib._me()
  (tmp_path / "run.lease").write_text(json.dumps(me | {"started": str(int(me["started"]) - 1), "command": "old.py"}))
  claim(tmp_path).close()


def test_a_process_that_nobody_has_waited_for_has_ended():
  process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
  assert lease_lib._started(process.pid) is not None
  process.stdin.close()
  os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # It stays in the kernel's table.
  assert lease_lib._started(process.pid) is None
  process.wait()


def without_locks(*_):
  raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_run_that_has_ended_leaves_the_directory_to_the_next(held):
  path, process = held
  process.communicate("\n")
  assert process.returncode == 0
  claim(path).close()


@pytest.mark.parametrize("alive", [True, False])
def test_a_holder_on_another_machine_is_watched_for_a_sign_of_life(tmp_path, monkeypatch, capsys, alive):
  """Its locks do not reach here: all that is seen of it is its lease."""
  monkeypatch.setattr(lease_lib, "_BEAT_SECONDS", 0.1)
  monkeypatch.setattr(lease_lib, "LEASE_SECONDS", 1.0)
  begin(tmp_path)
  record = {"host": "far", "pid": 7, "boot": "another", "command": "python far.py", "token": "theirs"}
  beat, over = 0, threading.Event()

  def renew():
    nonlocal beat
    beat += 1
    (tmp_path / "run.lease").write_text(json.dumps(record | {"beat": beat}))

  def live():
    while not over.wait(0.3):
      renew()

  renew()
  living = threading.Thread(target=live)
  if alive:
    living.start()
    with pytest.raises(ValueError, match=r"in use by a run on far, pid 7 \(python far.py\)"):
      claim(tmp_path)
    over.set()
    living.join()
    assert json.loads((tmp_path / "run.lease").read_text())["token"] == "theirs"
  else:
    began = time.monotonic()
    claim(tmp_path).close()
    assert time.monotonic() - began > 0.9
  assert "was held by a run on far, pid 7 (python far.py): watching for 1 s" in capsys.readouterr().out


@pytest.mark.parametrize("other", [{"namespace": "pid:[1]"}, {"boot": "another"}, {"boot": "", "namespace": ""}])
def test_a_process_number_says_nothing_of_another_container_or_where_there_is_no_proc(tmp_path, monkeypatch, other):
  monkeypatch.setattr(lease_lib, "LEASE_SECONDS", 0.3)
  begin(tmp_path)
  me = lease_lib._me()
  if other.get("boot") == "":  # Neither machine has it.
    monkeypatch.setattr(lease_lib, "_me", lambda: me | other)
  (tmp_path / "run.lease").write_text(json.dumps(me | {"host": "far", "pid": 2**22 + 1, "command": "x"} | other))
  began = time.monotonic()
  claim(tmp_path).close()
  assert time.monotonic() - began > 0.29


@pytest.mark.parametrize("how", ["removed", "taken"])
def test_a_run_hears_that_its_directory_was_removed_or_taken(tmp_path, monkeypatch, how):
  monkeypatch.setattr(lease_lib, "_BEAT_SECONDS", 0.05)
  with claim(tmp_path / "run") as mine:
    time.sleep(0.3)
    mine.check()
    if how == "removed":
      (tmp_path / "run").rename(tmp_path / "gone")
    theirs = json.dumps(lease_lib._me() | {"command": "x", "token": "theirs", "host": "far", "pid": 7})
    deadline = time.monotonic() + 20
    with pytest.raises(
      lease_lib.ClaimLost, match="removed, or moved away" if how == "removed" else "taken by a run on far"
    ):
      while time.monotonic() < deadline:
        if how == "taken":  # Again and again, because a beat that has just read its own lease still writes it.
          (tmp_path / "run" / "run.lease").write_text(theirs)
        mine.check()
        time.sleep(0.01)
  # What is the other's is left to it.
  assert how == "removed" or json.loads((tmp_path / "run" / "run.lease").read_text())["token"] == "theirs"


def test_a_lease_replaces_a_longer_one_and_is_renewed_when_it_reads_as_half_written(tmp_path, monkeypatch):
  monkeypatch.setattr(lease_lib, "_BEAT_SECONDS", 0.05)
  begin(tmp_path)
  former = lease_lib._me() | {"pid": 2**22 + 1, "command": "x" * 1000, "host": "y" * 200}
  (tmp_path / "run.lease").write_text(json.dumps(former))
  with claim(tmp_path) as mine:
    assert lease_lib.read(tmp_path)["token"] == mine.token
    size = (tmp_path / "run.lease").stat().st_size
    (tmp_path / "run.lease").write_text("{")
    deadline = time.monotonic() + 20
    while (lease_lib.read(tmp_path) or {}).get("token") != mine.token:
      mine.check()
      assert time.monotonic() < deadline
      time.sleep(0.01)
    # Its length never changes, so that a full disk has room for it.
    assert (tmp_path / "run.lease").stat().st_size == size


def test_one_process_may_claim_its_own_directory_again(tmp_path):
  first, second = claim(tmp_path), claim(tmp_path)
  time.sleep(0.01)
  second.check()
  first.close()  # Of no effect any more.
  assert (tmp_path / "run.lease").exists()
  second.close()
  assert not (tmp_path / "run.lease").exists()
