"""Work directories: who holds one, what it holds, and what is said where it cannot be used or written."""

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny_config

from rredcot_jax.train import workdir


def claim(path, **options):
  config = tiny_config.get_config()
  config.num_steps = options.pop("num_steps", 6)
  return workdir.claim(path, config, "python train.py", **options)


def begin(path, *, metrics=(), checkpoints=()):
  """A work directory that a run has left; without metrics and checkpoints, one that was refused at its start."""
  claim(path).close()
  (path / "metrics.jsonl").write_text("".join(json.dumps({"step": step, "x": 1.0}) + "\n" for step in metrics))
  for step in checkpoints:
    (path / "checkpoints" / str(step)).mkdir(parents=True)
  return path


# ---- Paths -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("", "--workdir is empty: give a directory"),
    ("  ", "--workdir is empty"),
    ("gs://bucket/run", "is a URL.*mount the bucket"),
    ("s3:/bucket/run", "is a URL"),
    ("runs/sweep[1]", r"has '\[' '\]', which the checkpoint library reads as a pattern"),
    ("runs/a*b", r"has '\*'"),
    ("runs/what?", r"has '\?'"),
    ("runs\\first", "has '"),
    ("runs/a\nb", r"has '\\n'"),
    (__file__, "is a file"),
    (f"{__file__}/run", r"workdir_test\.py is a file, or a link to nothing"),
  ],
)
def test_a_path_that_is_no_work_directory_is_refused_before_anything_is_written(tmp_path, monkeypatch, path, message):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=message):
    claim(path)
  assert not list(tmp_path.iterdir())


def test_a_link_to_nothing_and_a_name_too_long_are_said(tmp_path):
  (tmp_path / "loop").symlink_to("loop")
  (tmp_path / "dangling").symlink_to("nowhere")
  for name in ("loop", "dangling", "dangling/run"):
    with pytest.raises(ValueError, match="is a file, or a link to nothing"):
      claim(tmp_path / name)
  with pytest.raises(workdir.WriteFailed, match=r"\(File name too long\); .*Choose a shorter path than"):
    claim(tmp_path / ("x" * 300) / "run")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "loop"]


def test_the_directory_above_counts_too_and_home_is_found(tmp_path, monkeypatch):
  (tmp_path / "a[0]").mkdir()
  monkeypatch.chdir(tmp_path / "a[0]")
  with pytest.raises(ValueError, match=r"a\[0\]/run' has '\[' '\]'"):
    claim("run")
  monkeypatch.setenv("HOME", str(tmp_path))
  assert workdir.check_path("~/run") == tmp_path / "run"
  assert workdir.check_path(str(tmp_path / "a b, ü:{1}")) == tmp_path / "a b, ü:{1}"


# ---- What a directory holds ------------------------------------------------------------------


def test_a_new_directory_says_whose_it_is_and_is_taken_up_again(tmp_path):
  prints = {"corpus": "c", "code": "x"}
  with claim(tmp_path / "new" / "run", fingerprints=prints) as mine:
    assert mine.fingerprints == prints
    held = workdir.read(tmp_path / "new" / "run")
  assert held["format"] == workdir.FORMAT and held["command"] == "python train.py" and held["fingerprints"] == prints
  assert held["version"] == workdir.version() != "unknown"
  assert held["config"] == json.loads(json.dumps(tiny_config.get_config().to_dict()))
  before = (tmp_path / "new" / "run" / "config.json").read_bytes()
  claim(tmp_path / "new" / "run", fingerprints=prints).close()
  assert (tmp_path / "new" / "run" / "config.json").read_bytes() == before


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "config.json is empty, and no checkpoint is there: remove the directory and start again"),
    ('{"format": 1, "config": {"a', "config.json is cut off or damaged .* and no checkpoint is there"),
    ('["config"]', "config.json is another program's"),
    ("[" * 100_000, "config.json is cut off or damaged"),
    ('{"name": "their-package", "config": "x"}', "config.json is another program's"),
    ('{"command": "", "config": {}}', "another version of this program .format None, version unknown; this is format"),
    ('{"command": "", "config": {}, "format": 2, "version": "9"}', "format 2, version 9; this is format 1"),
    ("\ud800", "config.json is not readable"),
  ],
)  # fmt: skip
def test_a_config_that_is_none_is_named_and_left_alone(tmp_path, text, message):
  (tmp_path / "config.json").write_bytes(text.encode(errors="surrogatepass"))
  with pytest.raises(ValueError, match=message):
    claim(tmp_path)
  assert (tmp_path / "config.json").read_bytes() == text.encode(errors="surrogatepass")
  (tmp_path / "checkpoints" / "3").mkdir(parents=True)
  if "no checkpoint" in message:
    with pytest.raises(ValueError, match="and checkpoints are there: put the file back from a copy"):
      claim(tmp_path)


def test_what_lacks_its_config_is_refused(tmp_path):
  begin(tmp_path, metrics=[0])
  (tmp_path / "config.json").unlink()
  with pytest.raises(ValueError, match=r"holds metrics\.jsonl but no config\.json, which says whose they are"):
    claim(tmp_path)
  with pytest.raises(ValueError, match=r"is no work directory of experiments/train\.py"):
    workdir.read(tmp_path)


def test_another_configuration_or_noresume_is_refused(tmp_path):
  begin(tmp_path, metrics=[0], checkpoints=[2])
  with pytest.raises(ValueError, match=r"another configuration: num_steps \(6 there, 7 here\)"):
    claim(tmp_path, num_steps=7)
  with pytest.raises(ValueError, match="noresume"):
    claim(tmp_path, resume=False)
  claim(tmp_path).close()


def test_a_start_that_was_refused_does_not_keep_the_corrected_command_out(tmp_path):
  begin(tmp_path)
  (tmp_path / "checkpoints").mkdir()
  (tmp_path / "tensorboard").mkdir()
  for name in ("metrics.jsonl", "tensorboard/events"):
    (tmp_path / name).touch()
  (tmp_path / "traces.jsonl").symlink_to("nowhere")
  claim(tmp_path, num_steps=7, fingerprints={"train": "1"}).close()
  assert workdir.read(tmp_path)["config"]["num_steps"] == 7
  claim(tmp_path, num_steps=7, resume=False, fingerprints={"train": "2"}).close()
  assert workdir.read(tmp_path)["fingerprints"] == {"train": "2"}


@pytest.mark.parametrize(
  "left", ["metrics.jsonl", "traces.jsonl", "checkpoints/2/x", "checkpoints/damaged-2/x", "truth/a"]
)
def test_what_a_run_has_made_keeps_another_configuration_out(tmp_path, left):
  begin(tmp_path)
  (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
  (tmp_path / left).write_text("{")
  before = (tmp_path / "config.json").read_bytes()
  with pytest.raises(ValueError, match=r"another configuration: num_steps \(6 there, 7 here\)"):
    claim(tmp_path, num_steps=7)
  assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize(
  ("metrics", "checkpoints", "lost"),
  [
    ([], None, False),  # Killed before anything.
    ([0, 1], [], False),  # Killed before the first save: there every 2 steps.
    ([0, 1, 2, 3, 4], [], False),  # Killed in the first save, which is noticed at the second.
    ([0, 1, 2, 3, 4, 5], [], True),
    ([0, 1], None, True),  # The directory is made before the first line.
    ([0, 1, 2, 3, 4, 5], [4], False),
  ],
)
def test_checkpoints_that_are_gone_do_not_begin_the_run_again(tmp_path, metrics, checkpoints, lost):
  begin(tmp_path, metrics=metrics, checkpoints=checkpoints or ())
  if checkpoints is not None:
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
  if lost:
    with pytest.raises(
      ValueError, match=rf"has metrics to step {metrics[-1]} and no checkpoint: .* removed or emptied"
    ):
      claim(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()  # As the message says.
  claim(tmp_path).close()


# ---- What it is made from --------------------------------------------------------------------


def test_other_contents_under_the_same_names_are_refused(tmp_path, caplog):
  claim(tmp_path, fingerprints={"corpus": "1", "start": "2", "code": "3"}).close()
  (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(ValueError, match=r"made from other contents: corpus, start\. The names in the configuration"):
    claim(tmp_path, fingerprints={"corpus": "x", "start": "y", "code": "3"})
  claim(tmp_path, fingerprints={"corpus": "1", "template": "new"}).close()
  assert not caplog.records
  with caplog.at_level(logging.WARNING):
    claim(tmp_path, fingerprints={"corpus": "1", "start": "2", "code": "4"}).close()
  assert "the code has changed since the run in" in caplog.text


def test_hashes_are_of_contents_and_not_of_places(tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  for folder in (one, two):
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a").write_bytes(b"a" * 3_000_000)
    (folder / "b").write_bytes(b"b")
  same = workdir.hash_of_files([one])
  assert re.fullmatch("[0-9a-f]{32}", same) and workdir.hash_of_files([str(two)]) == same
  assert workdir.hash_of_files([one / "b"]) == workdir.hash_of_files([two / "b"]) != same
  assert workdir.hash_of_files([one, two]) != same
  (two / "b").rename(two / "c")  # Within a directory names count.
  assert workdir.hash_of_files([two]) != same
  data = bytearray((one / "deep" / "a").read_bytes())
  data[1_500_000] ^= 1
  (one / "deep" / "a").write_bytes(data)
  assert workdir.hash_of_files([one]) != same
  with pytest.raises(FileNotFoundError, match="nowhere"):
    workdir.hash_of_files([tmp_path / "nowhere"])


def test_packages_that_a_configuration_names_are_code_too(tmp_path, monkeypatch, caplog):
  (tmp_path / "my_package").mkdir()
  for name in ("my_package/verifiers.py", "my_package/other.py", "my_module.py"):
    (tmp_path / name).write_text("1\n")
  monkeypatch.syspath_prepend(tmp_path)
  config = tiny_config.get_config()
  assert workdir.hash_of_own_code(config) == ""
  config.credit.form = "rredcot_jax.ops.values:plain"  # Which "code" has.
  config.task.options.matcher = "no_such_package.verifiers:last_word"
  assert workdir.hash_of_own_code(config) == ""
  hashes = []
  for name in ("my_package.verifiers:last_word", "my_module:last_word"):
    config.task.options.matcher = name
    hashes.append(workdir.hash_of_own_code(config))
  for changed, same in (("my_package/other.py", False), ("my_package/notes.txt", True), ("my_module.py", True)):
    (tmp_path / changed).write_text("2\n")
    config.task.options.matcher = "my_package.verifiers:last_word"
    now = workdir.hash_of_own_code(config)
    assert (now == hashes[0]) == same
    hashes[0] = now
  config.task.options.matcher = "my_module:last_word"
  assert workdir.hash_of_own_code(config) not in ("", hashes[1])
  begin(tmp_path / "run", metrics=[0])
  with caplog.at_level(logging.WARNING):
    workdir.check_fingerprints({"own code": "1" * 32}, {"own code": "2" * 32}, where="it")
  assert "the own code has changed since it was written (11111111 then, 22222222 now)" in caplog.text


def test_hashes_of_values_know_order_and_borders():
  hashes = {
    workdir.hash_of_values(values) for values in ([], ["ab"], ["a", "b"], ["b", "a"], [{"x": 1, "y": 2}], ["a"])
  }
  assert len(hashes) == 6
  assert workdir.hash_of_values(iter([{"x": 1, "y": 2}])) == workdir.hash_of_values([{"y": 2, "x": 1}])


def test_the_hash_of_the_code_changes_with_a_line_of_it(tmp_path, monkeypatch):
  package = tmp_path / "package"
  (package / "train").mkdir(parents=True)
  for name in ("a.py", "train/workdir.py"):
    (package / name).write_text("1\n")
  monkeypatch.setattr(workdir, "__file__", str(package / "train" / "workdir.py"))
  hash_of_code = workdir.hash_of_code.__wrapped__
  first = hash_of_code()
  (package / "notes.txt").write_text("no code")
  assert hash_of_code() == first
  (package / "a.py").write_text("2\n")
  assert hash_of_code() != first


# ---- Who holds it ----------------------------------------------------------------------------

HOLDER = """
import sys, time
sys.path[:0] = {path!r}
import tiny_config
from rredcot_jax.train import workdir
workdir._BEAT_SECONDS = 0.1
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
    monkeypatch.setattr(workdir.fcntl, "lockf", without_locks)
  for _ in range(2):  # Looking does not take the lock away from its holder.
    with pytest.raises(ValueError, match=IN_USE % process.pid):
      claim(path)
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
  me = workdir._me()
  (tmp_path / "run.lease").write_text(json.dumps(me | {"host": HOSTILE, "command": HOSTILE}))
  with pytest.raises(ValueError, match=r"in use by a run on \\x1b\[2J\\u202ex") as caught:
    claim(tmp_path)
  assert str(caught.value).isprintable() and len(str(caught.value)) < 1_000


@pytest.mark.parametrize(
  "lease", ["", "[]", "null", "{", "\0" * 8192, '{"pid": "x"}', "[" * 60_000, "9" * 60_000, HOSTILE]
)
def test_a_lease_that_is_none_keeps_nobody_out(tmp_path, monkeypatch, lease):
  monkeypatch.setattr(workdir, "_LEASE_SECONDS", 0.2)
  begin(tmp_path)
  (tmp_path / "run.lease").write_text(lease)
  claim(tmp_path).close()


@pytest.mark.parametrize("prints", [None, [], "x", {"code": 5, "train": None}])
def test_fingerprints_that_are_none_are_read_as_text(tmp_path, prints):
  begin(tmp_path, metrics=[0], checkpoints=[2])
  held = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(held | {"fingerprints": prints}))
  assert workdir.read(tmp_path)["fingerprints"] in ({}, {"code": "5", "train": "None"})
  claim(tmp_path, fingerprints={"code": "6"}).close()


def test_a_file_too_large_is_not_read(tmp_path, monkeypatch):
  monkeypatch.setattr(workdir, "_LEASE_SECONDS", 0.2)
  begin(tmp_path)
  for name in ("config.json", "run.lease"):
    with open(tmp_path / name, "ab") as file:
      file.truncate(2**40)  # A hole, which takes no room.
  with pytest.raises(ValueError, match=r"config\.json is not readable: it has \d+ bytes, and at most 16777216"):
    claim(tmp_path)


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
  monkeypatch.setattr(workdir, "_BEAT_SECONDS", 0.1)
  monkeypatch.setattr(workdir, "_LEASE_SECONDS", 1.0)
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


@pytest.mark.parametrize("how", ["removed", "taken"])
def test_a_run_hears_that_its_directory_was_removed_or_taken(tmp_path, monkeypatch, how):
  monkeypatch.setattr(workdir, "_BEAT_SECONDS", 0.05)
  with claim(tmp_path / "run") as mine:
    time.sleep(0.3)
    mine.check()
    if how == "removed":
      (tmp_path / "run").rename(tmp_path / "gone")
    else:
      lease = json.loads((tmp_path / "run" / "run.lease").read_text())
      (tmp_path / "run" / "run.lease").write_text(json.dumps(lease | {"token": "theirs", "host": "far", "pid": 7}))
    deadline = time.monotonic() + 20
    with pytest.raises(
      workdir.ClaimLost, match="removed, or moved away" if how == "removed" else "taken by a run on far"
    ):
      while time.monotonic() < deadline:
        mine.check()
        time.sleep(0.01)
  # What is the other's is left to it.
  assert how == "removed" or json.loads((tmp_path / "run" / "run.lease").read_text())["token"] == "theirs"


def test_one_process_may_claim_its_own_directory_again(tmp_path):
  first, second = claim(tmp_path), claim(tmp_path)
  time.sleep(0.01)
  second.check()
  first.close()  # Of no effect any more.
  assert (tmp_path / "run.lease").exists()
  second.close()
  assert not (tmp_path / "run.lease").exists()


# ---- What cannot be written ------------------------------------------------------------------


@pytest.mark.parametrize(
  ("number", "what_to_do"),
  [
    (errno.ENOSPC, "Make room in"),
    (errno.EDQUOT, "Make room in"),
    (errno.EFBIG, "Make room in"),
    (errno.EACCES, "Make .* writable for this user"),
    (errno.EROFS, "Make .* writable for this user"),
    (errno.EIO, "Look after the storage of"),
  ],
)
def test_what_cannot_be_written_says_what_to_do(tmp_path, number, what_to_do):
  message = rf"metrics\.jsonl could not be written \({os.strerror(number)}\); there is no checkpoint yet\. {what_to_do}"
  with pytest.raises(workdir.WriteFailed, match=message), workdir.writing(tmp_path / "metrics.jsonl"):
    raise OSError(number, os.strerror(number))
  for name in ("8", "12", "9.orbax-checkpoint-tmp", "damaged-40"):
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
  with pytest.raises(workdir.WriteFailed, match="checkpoint 12 is untouched"), workdir.writing(tmp_path / "x"):
    raise OSError(number, os.strerror(number))
  with pytest.raises(KeyError), workdir.writing(tmp_path / "x"):
    raise KeyError  # Nothing else is touched.
