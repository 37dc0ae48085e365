"""Work directories: which paths are one, what one holds, and what is said where it cannot be used or written."""

import errno
import json
import logging
import os

import pytest
import tiny_config
from helpers import begin, claim

from rredcot_jax.train import lease, workdir

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
  begin(tmp_path, metrics=[0], checkpoints=[2])
  (tmp_path / "config.json").unlink()
  for what in (r"metrics\.jsonl and checkpoints", "checkpoints"):
    with pytest.raises(ValueError, match=rf"holds {what} but no config\.json, which says whose they are"):
      claim(tmp_path)
    (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
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


def test_a_run_that_goes_on_without_checkpoints_may_have_none(tmp_path):
  config = tiny_config.get_config()
  config.num_steps, config.checkpoint.on_failure = 6, "continue"
  workdir.claim(tmp_path, config, "python train.py").close()
  (tmp_path / "checkpoints").mkdir()
  (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(6)))
  workdir.claim(tmp_path, config, "python train.py").close()
  (tmp_path / "checkpoints").rmdir()
  with pytest.raises(ValueError, match="has metrics to step 5 and no checkpoint"):
    workdir.claim(tmp_path, config, "python train.py")


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


@pytest.mark.parametrize("prints", [None, [], "x", {"code": 5, "train": None}])
def test_fingerprints_that_are_none_are_read_as_text(tmp_path, prints):
  begin(tmp_path, metrics=[0], checkpoints=[2])
  held = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(held | {"fingerprints": prints}))
  assert workdir.read(tmp_path)["fingerprints"] in ({}, {"code": "5", "train": "None"})
  claim(tmp_path, fingerprints={"code": "6"}).close()


def test_a_file_too_large_is_not_read(tmp_path, monkeypatch):
  monkeypatch.setattr(lease, "LEASE_SECONDS", 0.2)
  begin(tmp_path)
  for name in ("config.json", "run.lease"):
    with open(tmp_path / name, "ab") as file:
      file.truncate(2**40)  # A hole, which takes no room.
  with pytest.raises(ValueError, match=r"config\.json is not readable: it has \d+ bytes, and at most 16777216"):
    claim(tmp_path)


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
