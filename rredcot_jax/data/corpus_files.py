"""The files of a corpus on local disk: which they are, and their rows, as JSONL or Parquet.

What a file may cost is bounded: bytes of a line, of a row group and of what it unpacks to. An error names the file and
the row.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from rredcot_jax.report.text import shorten, visible

_FORMATS = (".jsonl", ".parquet")
_MOST_ROW_BYTES = 64 * 2**20  # Of a line of JSONL.
_MOST_GROUP_BYTES = 4 * 2**30  # Of a row group of Parquet, unpacked.
_MOST_UNPACKED, _MOST_TIMES = 2**30, 100  # Characters of a Parquet file's rows, and how many times its own size.
_MOST_SHARDS = 100_000
_BATCH_BYTES = 32 * 2**20  # Of Parquet rows held at once.


def source_files(data_dir: str | pathlib.Path, dataset: str, file_split: str) -> tuple[pathlib.Path, ...]:
  """The files of one file split, shards in order: `train.jsonl`, or `train-00000-of-00005.parquet` and so on.

  Raises:
    FileNotFoundError: if there is none, naming what was looked for and what is there.
    ValueError: if it is there in more than one form, so that rows would count twice.
  """
  directory = pathlib.Path(data_dir) / dataset
  # Exactly so: `train_socratic.jsonl`, which comes with GSM8K, is another corpus.
  shard = re.compile(rf"{re.escape(file_split)}(?P<shard>-\d.*)?(?P<format>\.jsonl|\.parquet)")
  by_number = lambda name: [
    int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name, flags=re.ASCII)
  ]
  there = (path.name for path in directory.iterdir() if path.is_file()) if directory.is_dir() else ()
  names = sorted(there, key=by_number)
  found = [match for match in map(shard.fullmatch, names) if match and match[0].isprintable()]
  if not found:
    forms = " or ".join(f"{file_split}{f}" for f in _FORMATS)
    shown = visible(shorten(", ".join(names[:10]), 400))
    state = f"holds {shown or 'no file'}" if directory.is_dir() else "does not exist"
    raise FileNotFoundError(
      f"No file of the corpus {dataset!r}: looked for {forms}, or shards such as {file_split}-00000-of-00002.parquet, "
      f"in {directory}, which {state}. Other names: train_file and eval_file."
    )
  if len({(match["format"], match["shard"] is None) for match in found}) > 1:
    raise ValueError(
      f"The corpus {dataset!r} has its split {file_split!r} more than once in {directory}: "
      f"{', '.join(match[0] for match in found)}. Keep one form."
    )
  _check_shards(f"The corpus {dataset!r}, split {file_split!r} in {directory},", [match["shard"] for match in found])
  return tuple(directory / match[0] for match in found)


def _check_shards(what: str, shards: Sequence[str | None]) -> None:
  """Refuses numbered shards of which one is missing or there twice, or that are counted in two ways.

  Hugging Face's older names end in a hash, as in `-00000-of-00002-1a2b3c`. Plain numbers are counted from 0 or 1.
  """
  pattern = re.compile(r"-(\d+)-of-(\d+)(?:-[0-9a-f]+)?")
  numbered = [match for match in (pattern.fullmatch(shard or "") for shard in shards) if match]
  totals = sorted({int(match[2]) for match in numbered})
  if len(totals) > 1 or (numbered and len(numbered) < len(shards)):
    kinds = [f"-of-{total:05d}" for total in totals] + (["another numbering"] if len(numbered) < len(shards) else [])
    raise ValueError(f"{what} has shards of several numberings: {' and '.join(kinds)}. Keep one set of files.")
  plain = [match for match in (re.fullmatch(r"-(\d+)", shard or "") for shard in shards) if match]
  found = [int(match[1]) for match in numbered or (plain if len(plain) == len(shards) else [])]
  if not found or (not totals and min(found) > 1):  # `train-2024` is no count.
    return
  first = 0 if totals else min(found)
  total, form = (totals[0], f"-of-{totals[0]:05d}") if totals else (max(found) + 1 - first, "")
  wanted = range(first, first + total) if total <= _MOST_SHARDS else range(0)
  missing, more = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
  twice = sorted({index for index in found if found.count(index) > 1})
  for verb, indices in (("lacks", missing), ("has more than once", twice), ("has beyond the last of", more)):
    if indices:
      shown = ", ".join(f"-{index:05d}{form}" for index in indices[:5])
      raise ValueError(
        f"{what} {verb} {len(indices)} of its {total} shards: {shown}. Complete or clean up the download."
      )


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of a file."""

  path: pathlib.Path
  where: str  # "line 3" of a JSONL file, "row 3" of a Parquet file; both count from 1.
  fields: Mapping[str, Any]
  present: Collection[str]  # Names of all fields in the file's row, those that were not read included.

  def __str__(self) -> str:
    return f"{self.path}, {self.where}"


def rows(paths: Sequence[str], columns: Collection[str]) -> Iterator[Row]:
  """The rows of the files in turn; of Parquet files, `columns` alone are read."""
  for path in map(pathlib.Path, paths):
    yield from _parquet_rows(path, columns) if path.suffix == ".parquet" else _jsonl_rows(path)


def _jsonl_rows(path: pathlib.Path) -> Iterator[Row]:
  with path.open("rb") as file:
    for number, line in enumerate(iter(lambda: file.readline(_MOST_ROW_BYTES + 1), b""), 1):
      if len(line) > _MOST_ROW_BYTES:
        raise ValueError(f"{path}, line {number}: the row has more than {_MOST_ROW_BYTES} bytes.")
      if not line.strip():
        continue
      try:
        # Decoded here: given bytes, json guesses an encoding.
        fields = json.loads(line.decode("utf-8-sig"))
      except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: this is no line of JSON: {error}") from error
      if not isinstance(fields, dict):
        raise ValueError(f"{path}, line {number}: a row is an object of fields, and this is a {type(fields).__name__}.")
      yield Row(path, f"line {number}", fields, fields.keys())


def _parquet_rows(path: pathlib.Path, columns: Collection[str]) -> Iterator[Row]:
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise ImportError(
      f"{path} is a Parquet file, which needs pyarrow: `pip install pyarrow`, or convert it to JSONL."
    ) from error
  try:
    with pyarrow.parquet.ParquetFile(path) as whole:
      names = whole.schema_arrow.names
      stored = [whole.schema.column(i).path for i in range(len(whole.schema))]  # "a.list.element" of a list `a`.
    chosen = [name for name in names if name in columns]
    leaves = [path for path in stored if _column_of(path, names) in columns]
    # Text that is stored once for many rows stays so, until its row is made.
    with pyarrow.parquet.ParquetFile(path, read_dictionary=leaves) as file:
      number, size, most = 0, 0, max(_MOST_UNPACKED, _MOST_TIMES * path.stat().st_size)
      for batch in file.iter_batches(batch_size=_batch_rows(path, file.metadata, leaves), columns=chosen):
        held = dict(zip(chosen, batch.columns))
        for place in range(batch.num_rows):
          fields = {name: column[place].as_py() for name, column in held.items()}
          number += 1
          size += sum(map(_num_characters, fields.values()))
          if size > most:
            raise ValueError(
              f"{path}, row {number}: the rows up to here hold more than {most} characters, and the file has "
              f"{path.stat().st_size} bytes: one text is stored for many rows. Write a file without so many copies."
            )
          yield Row(path, f"row {number}", fields, names)
  except (pyarrow.ArrowException, OSError) as error:  # A damaged page is an OSError.
    raise ValueError(f"{path}: this is no Parquet file that can be read: {error}") from error


def _column_of(path: str, names: Collection[str]) -> str:
  """The column that a stored path belongs to: itself, or what comes before `.list.element`."""
  return path if path in names else path.partition(".")[0]


def _num_characters(value: Any) -> int:
  if isinstance(value, list):
    return sum(map(_num_characters, value))
  return len(value) if isinstance(value, str) else 0


def _batch_rows(path: pathlib.Path, metadata: Any, leaves: Collection[str]) -> int:
  """How many rows of a Parquet file to hold at once, so that their `leaves` take about `_BATCH_BYTES`.

  Raises:
    ValueError: if one row group is larger than `_MOST_GROUP_BYTES`, because it is unpacked as a whole.
  """
  total = 0
  for index in range(metadata.num_row_groups):
    group = metadata.row_group(index)
    parts = (group.column(i) for i in range(group.num_columns))
    size = sum(part.total_uncompressed_size for part in parts if part.path_in_schema in leaves)
    if size > _MOST_GROUP_BYTES:
      raise ValueError(
        f"{path}: row group {index} unpacks to {size} bytes and the most is {_MOST_GROUP_BYTES}: write the file with "
        "smaller row groups."
      )
    total += size
  return max(1, min(1024, _BATCH_BYTES * metadata.num_rows // max(total, 1)))
