"""A file is the old one or the new one, whole, and nothing lies beside it."""

import os
import stat

import pytest
import safetensors.numpy

from rredcot_jax.report import files


@pytest.fixture
def path(tmp_path):
  path = tmp_path / "file.json"
  path.write_bytes(b"old")
  return path


def test_content_replaces_the_file_and_nothing_lies_beside_it(path):
  files.write_whole(path, "a\r\nb\n\u00e9")
  assert path.read_bytes() == b"a\r\nb\n\xc3\xa9"
  files.write_whole(str(path), b"\xff")
  assert path.read_bytes() == b"\xff" and os.listdir(path.parent) == ["file.json"]
  files.write_whole(path.parent / "new", "")
  assert sorted(os.listdir(path.parent)) == ["file.json", "new"]


def test_what_is_no_file_is_not_replaced(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "link").symlink_to("nowhere")
  (tmp_path / "folder").mkdir()
  (tmp_path / "file").touch()
  (tmp_path / "to file").symlink_to("file")
  (tmp_path / "device").symlink_to("/dev/null")
  for name in ("pipe", "link", "folder", "device"):
    with pytest.raises(ValueError, match=rf"{name} is a .*, and a file is written there: choose another path"):
      files.write_whole(tmp_path / name, "new")
  with pytest.raises(ValueError, match="file is a file, and a directory is written there"):
    files.check_target(tmp_path / "file", directory=True)
  for name in ("file", "to file", "new"):
    files.write_whole(tmp_path / name, "new")
  for name in ("folder", "nothing yet"):
    files.check_target(tmp_path / name, directory=True)
  assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode) and not any(path.suffix for path in tmp_path.iterdir())


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_the_old_file_alone(path, raised):
  with pytest.raises(raised), files.replacing(path) as temporary:
    temporary.write_bytes(b"half of the ne")
    raise raised
  assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file.json"]


def test_text_that_has_no_bytes_leaves_the_old_file_alone(path):
  with pytest.raises(UnicodeEncodeError):
    files.write_whole(path, "\ud800")
  assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file.json"]


def test_an_error_of_the_disk_leaves_the_old_file_alone(path, monkeypatch):
  def full(*_):
    raise OSError("no space left")

  for name in ("fsync", "replace"):
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
      patch.setattr(files.os, name, full)
      files.write_whole(path, "new")
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file.json"]
  with pytest.raises(FileNotFoundError):
    files.write_whole(path.parent / "nowhere" / "file.json", "new")


def test_the_content_is_on_the_disk_before_the_file_has_its_name(path, monkeypatch):
  calls = []
  fsync, replace = os.fsync, os.replace
  monkeypatch.setattr(files.os, "fsync", lambda fd: (calls.append(("fsync", os.fstat(fd).st_size)), fsync(fd)))
  monkeypatch.setattr(files.os, "replace", lambda a, b: (calls.append(("replace", str(b))), replace(a, b)))
  with files.replacing(path) as temporary, open(temporary, "wb") as file:
    file.write(b"12345")
    assert path.read_bytes() == b"old"  # Until the block ends.
  assert calls == [("fsync", 5), ("replace", str(path))]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_permission_bits_are_those_of_a_new_file(path, mask):
  path.chmod(0o600)
  before = os.umask(mask)
  try:
    files.write_whole(path, "new")
    with files.replacing(path.parent / "tensors") as temporary:
      safetensors.numpy.save_file({}, temporary)  # Leaves a file of its own, for the user alone.
  finally:
    os.umask(before)
  for made in path.parent.iterdir():
    assert stat.S_IMODE(made.stat().st_mode) == 0o666 & ~mask


def test_long_names_fit(tmp_path):
  name = "n" * 255  # The longest that common file systems take.
  files.write_whole(tmp_path / name, "new")
  assert os.listdir(tmp_path) == [name]
