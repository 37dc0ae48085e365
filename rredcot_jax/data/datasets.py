"""Corpora on local disk as tasks: rows of (question, solution, answer), as JSONL or Parquet.

Files. Nothing is downloaded. The files of a corpus lie where the user put them,
as `<data_dir>/<dataset>/<file split>.jsonl` or `.parquet`, or as numbered shards
such as `train-00000-of-00005.parquet`. `SCHEMAS` has the field names. They are
written once, as ArrayRecord, by a TFDS builder into a cache whose key holds a
hash of their contents, so that a changed file is a new cache; the cache may be
deleted at any time that no run uses it. TensorFlow is not needed.

References. A solution field that is a list of texts holds several reference
solutions, at most 256. Where answers are derived, one that ends in another answer than the
first is left out. With `group_questions` the rows of one question are one
example with a reference solution from each.

Splits. "train" and "eval" never share a question, up to white space:
  - a corpus with files for both: "eval" is all of `eval_file`; "train" is
    `train_file` without the questions that are also in `eval_file`;
  - a corpus with one file (`train_file == eval_file`): a hash of its question
    sends every row to train (three in four) or to eval, as in `reasoning_gym`;
  - a benchmark: "eval" is all of `eval_file` and there is no "train", unless the
    user names a `train_file`.
Nothing keeps a question of one corpus out of another corpus.

Rows. One that cannot be read is an error that names the file and the row, never
a row less. A row without an answer, or with a gold answer that its own matcher
gives no full marks, so that no policy could be right, is one too; some corpora
hold proofs, and `skip_without_answer` leaves such rows out, counted.
"""

import contextlib
import dataclasses
import decimal
import hashlib
import io
import json
import logging
import math
import operator
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from absl import logging as absl_logging
from tensorflow_datasets.core import shuffle as tfds_shuffle

from rredcot_jax.data import corpus_files, verifiers
from rredcot_jax.data.encoding import THINK_CLOSE
from rredcot_jax.data.reasoning_gym import split_of
from rredcot_jax.data.tasks import Example
from rredcot_jax.ops import names
from rredcot_jax.report.text import shorten, visible

SPLITS = ("train", "eval")

_CALCULATOR = re.compile(r"<<[^<>\n]*>>")  # GSM8K's annotations, as in `48/2 = <<48/2=24>>24`.
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_MOST_SOLUTIONS = 256  # Of a question; all of them are encoded whenever a bank is made.
_DERIVED = ("####", "boxed")  # Where the answer of a row without an answer field stands in its solution.


@dataclasses.dataclass(frozen=True)
class Schema:
  """Where the rows of a corpus hold what a task needs.

  Of several names of one field, the first whose value is not null is read.
  """

  question: tuple[str, ...]
  solution: tuple[str, ...]
  answer: tuple[str, ...] = ()
  derive: str | None = None  # The answer of a row without an answer field: the solution's last "####" or "boxed".
  solution_optional: bool = False  # Whether rows without a solution are examples without steps, not errors.
  train_file: str | None = "train"  # None in a benchmark, which has no split to train on.
  eval_file: str = "test"

  @classmethod
  def of_fields(cls, fields: Mapping[str, Any]) -> "Schema":
    """The schema of a corpus of one's own.

    Args:
      fields: `question`, `solution` and perhaps `answer`: the name of a field, or several of which the
        first that is not null is read; and perhaps `derive`, `solution_optional`, `train_file` and
        `eval_file`, as above.

    Raises:
      ValueError: on an unknown or missing entry.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    for name in fields:
      names.check_option("task.options.fields", name, known)
    for name in ("question", "solution"):
      if name not in fields:
        raise ValueError(f"task.options.fields has no {name!r}: give the name of the field that holds it.")
    if fields.get("derive") not in (None, *_DERIVED):
      names.check_option("task.options.fields.derive", str(fields["derive"]), _DERIVED)
    if not fields.get("answer") and not fields.get("derive"):
      raise ValueError("task.options.fields has neither 'answer' nor 'derive': rows would have no answer.")
    several = lambda value: (value,) if isinstance(value, str) else tuple(value)
    held: dict[str, Any] = {
      name: several(x) if name in ("question", "solution", "answer") else x for name, x in fields.items()
    }
    return cls(**held)


SCHEMAS: Mapping[str, Schema] = {
  # openai/gsm8k. The field `answer` holds the solution and, in its last line, `#### 42`.
  "gsm8k": Schema(question=("question",), solution=("answer",), derive="####"),
  # hendrycks/competition_math and its copies: problem, level, type, solution.
  "math": Schema(question=("problem",), solution=("solution",), answer=("answer",), derive="boxed"),
  # HuggingFaceH4/MATH-500: problem, solution, answer, subject, level, unique_id.
  "math500": Schema(question=("problem",), solution=("solution",), answer=("answer",), derive="boxed", train_file=None),
  # AI-MO/NuminaMath-CoT: source, problem, solution, messages.
  "numina_math_cot": Schema(question=("problem",), solution=("solution",), derive="boxed"),
  # knoveleng/open-rs: problem, solution, answer, level; one file.
  "open_rs": Schema(
    question=("problem",), solution=("solution",), answer=("answer",), derive="boxed", eval_file="train"
  ),
  # AI-MO/aimo-validation-aime and HuggingFaceH4/aime_2024; Maxwell-Jia/AIME_2024 with capitals.
  "aime": Schema(
    question=("problem", "Problem", "question"),
    solution=("solution", "Solution"),
    answer=("answer", "Answer"),
    solution_optional=True,
    train_file=None,
  ),
  # math-ai/amc23 and AI-MO/aimo-validation-amc, whose answers are floats.
  "amc23": Schema(
    question=("question", "problem"),
    solution=("solution",),
    answer=("answer",),
    solution_optional=True,
    train_file=None,
  ),
  # math-ai/minervamath (question, answer) and knoveleng/Minerva-Math (problem, solution).
  "minerva": Schema(
    question=("problem", "question"),
    solution=("solution",),
    answer=("answer",),
    derive="boxed",
    solution_optional=True,
    train_file=None,
  ),
}


class RowWithoutAnswerError(ValueError):
  """A row that can be read and has no answer that a policy could be rewarded for."""


class Dataset:
  """One split of a corpus on local disk.

  Args:
    dataset: a name in `SCHEMAS`, such as "gsm8k", or any name together with `fields`.
    split: "train" or "eval"; see the module's docstring for the files behind them.
    data_dir: the directory that holds `<dataset>/<file split>.jsonl` or `.parquet`.
    fields: where the rows of a corpus of one's own hold what a task needs, see `Schema.of_fields`; None for a
      corpus in `SCHEMAS`.
    train_file, eval_file: file splits, as in "train" for `train.jsonl`, instead of the
      schema's. The same name twice divides that file between the two splits.
    matcher: what compares a final answer with the gold one: a name in `verifiers.VERIFIERS` ("math", "numeric",
      "exact"), or "package.module:function" of one's own, (response, gold answer) -> reward in [0, 1].
    format_weight: share of the reward that is paid for the form of a response; see
      `verifiers.composite`.
    skip_without_answer: leaves rows without a usable answer out, logging how many,
      instead of raising.
    group_questions: makes one example of all rows of a question, up to white space, with a reference
      solution from each; the first row's answer counts, and a row whose answer the matcher does not
      accept for it is left out. Its `source` is the first row's.
    aligned: whether the model was trained to think as the reference solutions are written, line by line.
    limit: at most so many examples, the first in the file's order; None for all.
    cache_dir: where the ArrayRecord files go; `<data_dir>/.tfds` if None.
    instruction: what is asked for beside the question, such as "Put your final answer
      within \\boxed{}."; a line of its own after every question, "" for none.

  Attributes:
    counts: rows read for this split, `without_answer`, in the `other_split`, and, with `group_questions`,
      rows `grouped` into an earlier one and of an `other_answer`.
    max_solutions: the most reference solutions of an example.

  Raises:
    FileNotFoundError: naming what was looked for and what is there.
    ImportError: on a Parquet file where pyarrow is missing.
    ValueError: on an unknown name (the nearest is offered), on a row that cannot be
      read, naming file and row, and on a split that yields no prompt.
  """

  def __init__(
    self,
    dataset: str,
    *,
    split: str,
    data_dir: str | pathlib.Path = "data",
    fields: Mapping[str, Any] | None = None,
    train_file: str | None = None,
    eval_file: str | None = None,
    matcher: str = "math",
    format_weight: float = 0.0,
    skip_without_answer: bool = False,
    group_questions: bool = False,
    aligned: bool = False,
    limit: int | None = None,
    cache_dir: str | pathlib.Path | None = None,
    instruction: str = "",
  ):
    if limit is not None and limit < 1:
      raise ValueError(f"limit={limit} of {dataset!r} makes a task that yields no prompt.")
    if not 0.0 <= format_weight < 1.0:
      raise ValueError(f"format_weight={format_weight} of {dataset!r} is outside [0, 1).")
    builder = prepare(
      dataset,
      split=split,
      data_dir=data_dir,
      fields=fields,
      train_file=train_file,
      eval_file=eval_file,
      matcher=matcher,
      skip_without_answer=skip_without_answer,
      group_questions=group_questions,
      cache_dir=cache_dir,
    )
    self.name = f"dataset/{dataset}"
    self.aligned = aligned
    self.fingerprint: str = builder.builder_config.name.rpartition("-")[2]  # Of the files' contents.
    self.counts: dict[str, int] = dict(builder.info.metadata)
    self.max_solutions: int = self.counts.pop("max_solutions")
    self._match = names.resolve("task.options.matcher", matcher, verifiers.VERIFIERS)
    self._format_weight = format_weight
    self._after_question = f"\n{instruction}" if instruction else ""
    self._source: Sequence[Mapping[str, bytes]] = builder.as_data_source(split=split)
    self._size = len(self._source) if limit is None else min(limit, len(self._source))
    if self.counts["without_answer"]:
      # At every start and not only when the cache is made: a resumed run should say it too.
      logging.getLogger(__name__).warning(
        "%s: %d of %d rows behind split %r are left out, having no usable answer.",
        *(self.name, self.counts["without_answer"], self.counts["rows"], split),
      )

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index: int) -> Example:
    """The example at `index`, a function of (files, split, index) and the options alone.

    Its `entry` is `{"source": "train.jsonl, line 3"}`.

    Raises:
      IndexError: unless 0 <= index < len(self).
    """
    index = operator.index(index)
    if not 0 <= index < self._size:
      raise IndexError(f"Example {index} of {self.name}, which has {self._size}.")
    record = {name: value.decode() for name, value in self._source[index].items()}
    first, *others = map(solution_steps, json.loads(record["solutions"]))
    question = record["question"] + self._after_question
    return Example(question, first, record["answer"], {"source": record["source"]}, tuple(others))

  def reward(self, example: Example, text: str) -> float:
    """See `Task.reward`."""
    return verifiers.composite(text, example.answer, match=self._match, format_weight=self._format_weight)


def solution_steps(solution: str) -> tuple[str, ...]:
  """A reference solution's steps, one a line, () if it is blank.

  A step ends with its newline and the blank lines after it; the last one is given
  a newline if it has none. "".join(steps) is the solution.
  """
  steps: list[str] = []
  blank = ""
  for line in _LINE.findall(solution if solution.endswith("\n") else solution + "\n"):
    if line.strip():
      steps.append(blank + line)
      blank = ""
    elif steps:
      steps[-1] += line
    else:
      blank += line
  return tuple(steps)


# ---- Rows --------------------------------------------------------------------------------


def _parse(schema: Schema, row: corpus_files.Row, match: Callable[[str, str], float]) -> dict[str, Any]:
  """The texts of a row: question, solutions (at least one, which may be ""), answer and source.

  Raises:
    RowWithoutAnswerError: if it has none, or one that `match` does not accept as itself.
    ValueError: if a field is missing or is no text.
  """
  question = _question(schema, row)
  same = lambda answer, gold: match(THINK_CLOSE + answer, gold) == 1.0
  solutions, answer = _solutions(schema, row), _answer(schema, row)
  if not answer and schema.derive == "####":
    parts = [_marked_answer(row, _CALCULATOR.sub("", solution)) for solution in solutions]
    answer = parts[0][1]
    solutions = [parts[0][0], *(solution for solution, other in parts[1:] if same(other, answer))]
  elif not answer and schema.derive == "boxed":
    answer, *others = (verifiers.gold_answer_from_solution(solution) or "" for solution in solutions)
    solutions = [solutions[0], *(s for s, other in zip(solutions[1:], others) if not other or same(other, answer))]
    if not answer:
      raise RowWithoutAnswerError(f"{row}: the row has no answer: its solution has no \\boxed{{...}}.")
  elif not answer:
    raise RowWithoutAnswerError(
      f"{row}: the row has no answer: no value in a field {_either(schema.answer)}; its fields are {_fields(row)}."
    )
  if not same(answer, answer):
    raise RowWithoutAnswerError(
      f"{row}: the row has no answer that can be rewarded: the matcher rejects its gold answer {answer[:80]!r}."
    )
  return {"question": question, "solutions": solutions, "answer": answer, "source": f"{row.path.name}, {row.where}"}


def _question(schema: Schema, row: corpus_files.Row) -> str:
  question = _text(row, schema.question)
  if question is None:
    raise ValueError(_missing(row, schema.question))
  if not question.strip():
    raise ValueError(f"{row}: the question, field {_either(schema.question)}, is empty.")
  return question


def _solutions(schema: Schema, row: corpus_files.Row) -> list[str]:
  """The reference solutions of a row, the first one first; [""] where there is none and none is needed."""
  name = next((name for name in schema.solution if row.fields.get(name) is not None), "")
  held = row.fields.get(name)
  if isinstance(held, list):
    if len(held) > _MOST_SOLUTIONS:
      raise ValueError(f"{row}: field {name!r} holds {len(held)} solutions, and the most is {_MOST_SOLUTIONS}.")
    found = [_text(dataclasses.replace(row, fields={name: one}), (name,)) for one in held]
    if None in found:
      raise ValueError(f"{row}: field {name!r} holds a null among its solutions.")
    solutions = [one for one in found if one]
  else:
    text = _text(row, schema.solution)
    solutions = [] if text is None else [text]
  if not solutions and not schema.solution_optional:
    raise ValueError(_missing(row, schema.solution))
  return solutions or [""]


def _answer(schema: Schema, row: corpus_files.Row) -> str:
  return (_text(row, schema.answer, numbers=True) or "").strip()


def _marked_answer(row: corpus_files.Row, solution: str) -> tuple[str, str]:
  """Splits GSM8K's last line, `#### 42`, off."""
  body, mark, answer = solution.rpartition("####")
  answer = answer.strip()
  if not mark or not answer or "\n" in answer or (body and not body.endswith("\n")):
    raise RowWithoutAnswerError(f"{row}: the row has no answer: its solution has no last line '#### <answer>'.")
  return body, answer


def _text(row: corpus_files.Row, names: Sequence[str], *, numbers: bool = False) -> str | None:
  """The text in the first of the fields that is not null, None where all are."""
  for name in names:
    value = row.fields.get(name)
    if value is None:
      continue
    if numbers and isinstance(value, int) and not isinstance(value, bool):
      return str(value)
    if numbers and isinstance(value, float | decimal.Decimal):
      if not math.isfinite(value):
        raise ValueError(f"{row}: field {name!r} is {value}, which is no answer.")
      return str(int(value)) if value == int(value) else str(value)
    if not isinstance(value, str):
      raise ValueError(f"{row}: field {name!r} is no text: {value!r:.80}.")
    try:
      value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair.
      raise ValueError(f"{row}: field {name!r} is no Unicode text: {error.reason}.") from error
    return value
  return None


def _missing(row: corpus_files.Row, names: Sequence[str]) -> str:
  return f"{row}: no value in a field {_either(names)}; its fields are {_fields(row)}."


def _fields(row: corpus_files.Row) -> str:
  return visible(shorten(", ".join(row.present), 200)) or "none"


def _either(names: Sequence[str]) -> str:
  return " or ".join(map(repr, names))


def _key(question: str) -> str:
  """What makes two questions the same one when splits are made."""
  return " ".join(question.split())


# ---- The builder -------------------------------------------------------------------------


@dataclasses.dataclass(eq=False, kw_only=True)
class CorpusConfig(tfds.core.BuilderConfig):
  """Everything that the contents of one cache depend on; `name` holds a hash of it."""

  schema: Schema
  split: str
  files: tuple[str, ...]
  held_out: tuple[str, ...]  # Files whose questions are left out.
  divide: bool  # Whether a row is in only if its hash says `split`.
  matcher: str
  skip_without_answer: bool
  group_questions: bool


class Corpus(tfds.core.GeneratorBasedBuilder):
  """One split of a corpus, in the order of its files: question, solutions (a JSON list), answer, source."""

  # Raise it whenever a row would be read otherwise than before: caches of other versions are not used.
  VERSION = tfds.core.Version("2.0.0")

  # No checksums, as nothing is downloaded. TFDS would look for their file with a package that it does not install.
  url_infos: ClassVar[dict[str, Any]] = {}

  def _info(self) -> tfds.core.DatasetInfo:
    fields = ("question", "solutions", "answer", "source")
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict({name: tfds.features.Text() for name in fields}),
      metadata=tfds.core.MetadataDict(),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing is downloaded.
    return {self.builder_config.split: self._generate_examples()}

  def _generate_examples(self):
    config: CorpusConfig = self.builder_config
    schema = config.schema
    match = names.resolve("task.options.matcher", config.matcher, verifiers.VERIFIERS)
    columns = {*schema.question, *schema.solution, *schema.answer}
    held_out = {_key(_question(schema, row)) for row in corpus_files.rows(config.held_out, set(schema.question))}
    counts = {"rows": 0, "without_answer": 0, "other_split": 0}
    grouped: dict[str, dict[str, Any]] = {}
    if config.group_questions:
      counts |= {"grouped": 0, "other_answer": 0}
    most = 0
    for number, row in enumerate(corpus_files.rows(config.files, columns)):
      counts["rows"] += 1
      key = _key(_question(schema, row))
      if key in held_out or (config.divide and split_of(key) != config.split):
        counts["other_split"] += 1
        continue
      try:
        record = _parse(schema, row, match)
      except RowWithoutAnswerError:
        if not config.skip_without_answer:
          raise
        counts["without_answer"] += 1
        continue
      most = max(most, len(record["solutions"]))
      if not config.group_questions:
        yield number, _stored(record)
      elif key not in grouped:
        grouped[key] = record
      elif match(THINK_CLOSE + record["answer"], grouped[key]["answer"]) != 1.0:
        counts["other_answer"] += 1
      else:
        counts["grouped"] += 1
        known = grouped[key]["solutions"]
        known += [one for one in record["solutions"] if one not in known]
        del known[_MOST_SOLUTIONS:]
    for number, record in enumerate(grouped.values()):
      most = max(most, len(record["solutions"]))
      yield number, _stored(record)
    self.info.metadata.update(counts, max_solutions=most)
    if counts["rows"] == counts["without_answer"] + counts["other_split"]:
      raise ValueError(
        f"A task that yields no prompt for split {config.split!r}: of {counts['rows']} rows in "
        f"{', '.join(config.files)}, {counts['without_answer']} have no usable answer and {counts['other_split']} "
        "belong to the other split."
      )


def _stored(record: Mapping[str, Any]) -> dict[str, str]:
  return {**record, "solutions": json.dumps(record["solutions"])}


def prepare(
  dataset: str,
  *,
  split: str,
  data_dir: str | pathlib.Path,
  fields: Mapping[str, Any] | None = None,
  train_file: str | None = None,
  eval_file: str | None = None,
  matcher: str = "math",
  skip_without_answer: bool = False,
  group_questions: bool = False,
  cache_dir: str | pathlib.Path | None = None,
) -> Corpus:
  """The TFDS builder of one split, its cache written; `as_data_source(split=split)` reads it.

  Killed half-way, or run by several processes at once, it leaves no half cache: TFDS
  writes into a directory of its own and renames it, and the first to do so wins.

  Args and raises: see `Dataset`.
  """
  if fields is None:
    names.check_option("dataset", dataset, tuple(SCHEMAS))
  names.check_option("split", split, SPLITS)
  names.resolve("task.options.matcher", matcher, verifiers.VERIFIERS)
  schema = SCHEMAS[dataset] if fields is None else Schema.of_fields(fields)
  train_file, eval_file = train_file or schema.train_file, eval_file or schema.eval_file
  file_split = train_file if split == "train" else eval_file
  if file_split is None:
    raise ValueError(
      f"The corpus {dataset!r} is a benchmark and has no split to train on; "
      f"train_file={eval_file!r} would divide its file between train and eval."
    )
  divide = train_file == eval_file
  held_out = split == "train" and not divide
  config = CorpusConfig(
    name="",
    schema=schema,
    split=split,
    files=_paths(data_dir, dataset, file_split),
    held_out=_paths(data_dir, dataset, eval_file) if held_out else (),
    divide=divide,
    matcher=matcher,
    skip_without_answer=skip_without_answer,
    group_questions=group_questions,
  )
  config.name = f"{dataset}-{split}-{_fingerprint(config)}"
  cache = pathlib.Path(data_dir) / ".tfds" if cache_dir is None else pathlib.Path(cache_dir)

  with _quiet_tfds(), _without_spilling():
    builder = Corpus(data_dir=cache, config=config)
    if not builder.data_path.exists():
      try:
        builder.download_and_prepare(
          file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
      except OSError:
        # The rename fails where another process has put the same contents in the meantime.
        if not builder.data_path.exists():
          raise
      builder = Corpus(data_dir=cache, config=config)
  return builder


def _paths(data_dir: str | pathlib.Path, dataset: str, file_split: str) -> tuple[str, ...]:
  return tuple(os.fspath(path) for path in corpus_files.source_files(data_dir, dataset, file_split))


def _fingerprint(config: CorpusConfig) -> str:
  """A hash of the files' names and contents and of how they are read; not of where they lie."""
  digest = hashlib.blake2b(digest_size=8)
  read = (
    config.schema,
    config.split,
    config.divide,
    config.matcher,
    config.skip_without_answer,
    config.group_questions,
  )
  digest.update(repr(read).encode())
  for role, paths in (("files", config.files), ("held_out", config.held_out)):
    for path in paths:
      with open(path, "rb") as file:
        contents = hashlib.file_digest(file, "blake2b").hexdigest()
      digest.update(repr((role, os.path.basename(path), contents)).encode())
  return digest.hexdigest()


@contextlib.contextmanager
def _without_spilling() -> Iterator[None]:
  """Lets TFDS hold a whole split in memory while its cache is written.

  Beyond 1,000 MB it would write pieces to disk with TensorFlow, which is not installed. So preparing a corpus takes
  about as much memory as its text; reading it takes none.
  """
  former = tfds_shuffle.MAX_MEM_BUFFER_SIZE
  tfds_shuffle.MAX_MEM_BUFFER_SIZE = 2**62
  try:
    yield
  finally:
    tfds_shuffle.MAX_MEM_BUFFER_SIZE = former


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
  """Without the progress bars, the prints and the absl warnings that tell a user nothing here."""
  tfds.disable_progress_bar()
  verbosity = absl_logging.get_verbosity()
  absl_logging.set_verbosity(absl_logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    absl_logging.set_verbosity(verbosity)
