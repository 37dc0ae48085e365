"""Answers that the mathematical verifier pays or refuses wrongly, beside math-verify called directly.

    make peers && .venv/bin/python benchmarks/verifiers.py

It reads pairs (answer, gold) from tests/data/verifiers/pairs.jsonl. An adversarial answer
should be refused: the question as its own answer, a near miss, two answers at once, another
unit. An honest answer should be accepted: the gold answer in another spelling. It counts by
category the false positives (adversarial and accepted) and the false negatives (honest and
refused). math-verify parses both texts between dollar signs, with its defaults. The last
line is one JSON object.
"""

import dataclasses
import json
import logging
import pathlib
import time
from collections import Counter
from collections.abc import Callable, Sequence

import machine
import math_verify
from absl import app

from rredcot_jax.data import verifiers

PAIRS = pathlib.Path(__file__).parent.parent / "tests" / "data" / "verifiers" / "pairs.jsonl"


@dataclasses.dataclass(frozen=True)
class Pair:
  """An answer, the gold answer, and whether the answer should be paid."""

  batch: int  # 1 and 2 were written one after the other; the verifier was mended after each.
  kind: str  # "adversarial" or "honest".
  category: str
  answer: str
  gold: str


@dataclasses.dataclass(frozen=True)
class Verdicts:
  """What a verifier got wrong, by category, and how long it took."""

  false_positives: Counter[str]
  false_negatives: Counter[str]
  milliseconds: float  # Mean of one pair.


def main(_) -> None:
  logging.disable(logging.CRITICAL)  # math-verify reports every text that it cannot parse.
  pairs = [Pair(**json.loads(line)) for line in PAIRS.read_text().splitlines()]
  ours, theirs = verdicts(pairs, ours_equal), verdicts(pairs, math_verify_equal)
  print_table(pairs, ours, theirs)
  figures = {
    "ours_false_positives": ours.false_positives.total(),
    "ours_false_negatives": ours.false_negatives.total(),
    "math_verify_false_positives": theirs.false_positives.total(),
    "math_verify_false_negatives": theirs.false_negatives.total(),
    "pairs": len(pairs),
    "processor": machine.describe()["processor"],
  }
  print(json.dumps(figures))


def ours_equal(gold: str, answer: str) -> bool:
  return verifiers.math_match(f"\\boxed{{{answer}}}", gold) == 1.0


def math_verify_equal(gold: str, answer: str) -> bool:
  return math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(f"${answer}$"))


def verdicts(pairs: Sequence[Pair], equal: Callable[[str, str], bool]) -> Verdicts:
  false_positives: Counter[str] = Counter()
  false_negatives: Counter[str] = Counter()
  start = time.perf_counter()
  for pair in pairs:
    paid = equal(pair.gold, pair.answer)
    if paid and pair.kind == "adversarial":
      false_positives[pair.category] += 1
    elif not paid and pair.kind == "honest":
      false_negatives[pair.category] += 1
  return Verdicts(false_positives, false_negatives, 1e3 * (time.perf_counter() - start) / len(pairs))


def print_table(pairs: Sequence[Pair], ours: Verdicts, theirs: Verdicts) -> None:
  adversarial = Counter(pair.category for pair in pairs if pair.kind == "adversarial")
  honest = Counter(pair.category for pair in pairs if pair.kind == "honest")
  print("| category | adversarial | paid by ours | by math-verify | honest | refused by ours | by math-verify |")
  print("| --- | --- | --- | --- | --- | --- | --- |")
  for category in [*adversarial, "all"]:
    counts = (adversarial, ours.false_positives, theirs.false_positives, honest, ours.false_negatives)
    row = [count.total() if category == "all" else count[category] for count in (*counts, theirs.false_negatives)]
    print(f"| {category} | {' | '.join(map(str, row))} |")
  print(f"\nms a pair: ours {ours.milliseconds:.1f}, math-verify {theirs.milliseconds:.1f}")


if __name__ == "__main__":
  app.run(main)
