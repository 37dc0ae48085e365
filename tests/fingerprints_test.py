"""Hashes of what a run is made from: contents count, and not the places where they lie."""

import logging
import re

import pytest
import tiny_config
from helpers import begin

from rredcot_jax.train import fingerprints


def test_hashes_are_of_contents_and_not_of_places(tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  for folder in (one, two):
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a").write_bytes(b"a" * 3_000_000)
    (folder / "b").write_bytes(b"b")
  same = fingerprints.of_files([one])
  assert re.fullmatch("[0-9a-f]{32}", same) and fingerprints.of_files([str(two)]) == same
  assert fingerprints.of_files([one / "b"]) == fingerprints.of_files([two / "b"]) != same
  assert fingerprints.of_files([one, two]) != same
  (two / "b").rename(two.parent / "alone")  # The name of a file that is given by itself does not count.
  assert fingerprints.of_files([two.parent / "alone"]) == fingerprints.of_files([one / "b"])
  (two / "a").mkdir()
  (two.parent / "alone").rename(two / "a" / "b")  # Within a directory the place counts.
  assert fingerprints.of_files([two]) != same
  (two / "a" / "b").rename(two / "b")
  assert fingerprints.of_files([two]) == same
  (two / "b").rename(two / "c")  # Within a directory names count.
  assert fingerprints.of_files([two]) != same
  data = bytearray((one / "deep" / "a").read_bytes())
  data[1_500_000] ^= 1
  (one / "deep" / "a").write_bytes(data)
  assert fingerprints.of_files([one]) != same
  with pytest.raises(FileNotFoundError, match="nowhere"):
    fingerprints.of_files([tmp_path / "nowhere"])


def test_packages_that_a_configuration_names_are_code_too(tmp_path, monkeypatch, caplog):
  (tmp_path / "my_package").mkdir()
  for name in ("my_package/verifiers.py", "my_package/other.py", "my_module.py"):
    (tmp_path / name).write_text("1\n")
  monkeypatch.syspath_prepend(tmp_path)
  config = tiny_config.get_config()
  assert fingerprints.of_own_code(config) == ""
  config.credit.form = "rredcot_jax.ops.values:plain"  # Which "code" has.
  config.task.options.matcher = "no_such_package.verifiers:last_word"
  assert fingerprints.of_own_code(config) == ""
  hashes = []
  for name in ("my_package.verifiers:last_word", "my_module:last_word"):
    config.task.options.matcher = name
    hashes.append(fingerprints.of_own_code(config))
  for changed, same in (("my_package/other.py", False), ("my_package/notes.txt", True), ("my_module.py", True)):
    (tmp_path / changed).write_text("2\n")
    config.task.options.matcher = "my_package.verifiers:last_word"
    now = fingerprints.of_own_code(config)
    assert (now == hashes[0]) == same
    hashes[0] = now
  config.task.options.matcher = "my_module:last_word"
  assert fingerprints.of_own_code(config) not in ("", hashes[1])
  begin(tmp_path / "run", metrics=[0])
  with caplog.at_level(logging.WARNING):
    fingerprints.check({"own code": "1" * 32}, {"own code": "2" * 32}, where="it")
  assert "the own code has changed since it was written (11111111 then, 22222222 now)" in caplog.text


def test_hashes_of_values_know_order_and_borders():
  hashes = {
    fingerprints.of_values(values)
    for values in ([], ["ab"], ["a", "b"], ["b", "a"], [{"x": 1, "y": 2}], ["a"], [1, 2], [12])
  }
  assert len(hashes) == 8
  assert fingerprints.of_values(iter([{"x": 1, "y": 2}])) == fingerprints.of_values([{"y": 2, "x": 1}])


def test_the_hash_of_the_code_changes_with_a_line_of_it(tmp_path, monkeypatch):
  package = tmp_path / "package"
  (package / "train").mkdir(parents=True)
  for name in ("a.py", "train/workdir.py"):
    (package / name).write_text("1\n")
  monkeypatch.setattr(fingerprints, "__file__", str(package / "train" / "fingerprints.py"))
  hash_of_code = fingerprints.of_code.__wrapped__
  first = hash_of_code()
  (package / "notes.txt").write_text("no code")
  assert hash_of_code() == first
  (package / "a.py").write_text("2\n")
  assert hash_of_code() != first
