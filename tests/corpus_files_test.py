"""The files of a corpus: shards that are no whole split, and files whose cost is bounded."""

import pytest
from helpers import write_parquet

from rredcot_jax.data import corpus_files, datasets


def write_shards(directory, names):
  (directory / "gsm8k").mkdir(exist_ok=True)
  for name in names:
    (directory / "gsm8k" / name).write_text("{}\n")


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"], r"lacks 1 of its 3 shards: -00001-of-00003"),
    (["train-00000-of-00001.jsonl", "train-00000-of-00002.jsonl"], r"several numberings: -of-00001 and -of-00002"),
    (["train-00000-of-00001.jsonl", "train-1.jsonl"], r"several numberings: -of-00001 and another numbering"),
    (
      ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "train-0-of-2.jsonl"],
      r"has more than once 1 of its 2 shards: -00000-of-00002",
    ),
    (["train-00000-of-00001-1a2b.jsonl", "train-00000-of-00001-3c4d.jsonl"], r"has more than once 1 of its 1 shards"),
    (["train-00000-of-00002-1a2b.jsonl"], r"lacks 1 of its 2 shards: -00001-of-00002"),
    (["train-00000-of-00001.jsonl", "train-00001-of-00001.jsonl"], r"beyond the last of 1 of its 1 shards: -00001"),
    (["train-00000-of-00000.jsonl"], r"beyond the last of 1 of its 0 shards"),
    (["train-00000-of-999999999999.jsonl"], r"beyond the last of 1 of its 999999999999 shards"),
    (["train-1.jsonl", "train-3.jsonl"], r"lacks 1 of its 3 shards: -00002"),
    (["train-0.jsonl", "train-2.jsonl"], r"lacks 1 of its 3 shards: -00001"),
    (["train-0.jsonl", "train-00.jsonl"], r"has more than once 1 of its 1 shards"),
  ],
)
def test_shards_that_are_no_whole_split_are_refused_by_name(tmp_path, names, message):
  write_shards(tmp_path, names)
  with pytest.raises(ValueError, match=message):
    corpus_files.source_files(tmp_path, "gsm8k", "train")


def test_names_of_files_can_be_shown(tmp_path):
  (tmp_path / "math").mkdir()
  for name in ("train-0\x1b[2J.jsonl", "x\x1b[2J", "y" * 200, "z" * 200, "w" * 200):
    (tmp_path / "math" / name).write_text("{}")
  with pytest.raises(FileNotFoundError, match=r"which holds .*\\x1b\[2J") as caught:
    corpus_files.source_files(tmp_path, "math", "train")
  assert str(caught.value).isprintable() and len(str(caught.value)) < 1_000


@pytest.mark.parametrize("solution", ["x" * 10**5, ["x" * 10**5]])
def test_a_text_that_is_stored_once_for_many_rows_is_bounded(tmp_path, monkeypatch, solution):
  monkeypatch.setattr(corpus_files, "_MOST_UNPACKED", 10**6)
  rows = [{"problem": f"{i}", "solution": solution, "answer": i} for i in range(30)]
  write_parquet(tmp_path / "math/test.parquet", rows)
  assert (tmp_path / "math/test.parquet").stat().st_size < 10**4
  with pytest.raises(ValueError, match=r"test\.parquet, row 10: the rows up to here hold more than 1000000 characters"):
    datasets.Dataset("math", split="eval", data_dir=tmp_path)
  monkeypatch.setattr(corpus_files, "_MOST_UNPACKED", 10**7)
  assert datasets.Dataset("math", split="eval", data_dir=tmp_path)[29].answer == "29"


def test_all_shards_come_in_order(tmp_path):
  for split, form, numbers in (
    ("train", "-{:05d}-of-00012", range(12)), ("test", "-{}-of-12", range(12)), ("a", "-{}", range(1, 12)),
    ("b", "-{}-of-2-1a", range(2)), ("c", "-{}", (2024, 2026)),
  ):  # fmt: skip
    names = [f"{split}{form.format(i)}.jsonl" for i in numbers]
    write_shards(tmp_path, reversed(names))
    assert [path.name for path in corpus_files.source_files(tmp_path, "gsm8k", split)] == names


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(corpus_files, "_MOST_ROW_BYTES", 100)
  path = tmp_path / "train.jsonl"
  path.write_text('{"a": 1}\n{"a": "' + "x" * 200 + '"}\n')
  with pytest.raises(ValueError, match=r"line 2: the row has more than 100 bytes"):
    list(corpus_files._jsonl_rows(path))


def test_a_mark_of_the_byte_order_is_no_part_of_the_first_row(tmp_path):
  path = tmp_path / "train.jsonl"
  path.write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8-sig")
  assert [row.fields for row in corpus_files._jsonl_rows(path)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("name", ["question", "dotted.name", "list"])
def test_large_parquet_rows_are_held_a_few_at_a_time(tmp_path, monkeypatch, name):
  import pyarrow
  import pyarrow.parquet

  path = tmp_path / "train.parquet"
  text = lambda i: str(i) + "x" * 10_000
  rows = [{name: [text(i)] if name == "list" else text(i), "other": "y"} for i in range(64)]
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="none", use_dictionary=False)
  monkeypatch.setattr(corpus_files, "_BATCH_BYTES", 50_000)
  asked, batch_rows = [], corpus_files._batch_rows
  monkeypatch.setattr(corpus_files, "_batch_rows", lambda *args: asked.append(batch_rows(*args)) or asked[-1])
  for column in (name, "other"):
    read = [row.fields for row in corpus_files._parquet_rows(path, [column])]
    assert read == [{column: row[column]} for row in rows]
  assert asked[0] in (4, 5) and asked[1] == 1024
  monkeypatch.setattr(corpus_files, "_MOST_GROUP_BYTES", 1000)
  with pytest.raises(ValueError, match="row group 0 unpacks to"):
    list(corpus_files._parquet_rows(path, [name]))
