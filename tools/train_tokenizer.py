"""Trains the small tokenizer that the package ships for gsm_symbolic.

  python tools/train_tokenizer.py

This takes under a minute and writes rredcot_jax/assets/gsm_symbolic/ again, byte for
byte. The tokenizer is a byte-level BPE over questions, solutions and answers of the train
split. Every text round-trips. Each digit is a token. A newline is a token of its own, so
that segments can be cut at it.
"""

import argparse
import pathlib
from collections.abc import Iterator

import reasoning_gym as library
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rredcot_jax.data import reasoning_gym as task
from rredcot_jax.data.encoding import THINK_CLOSE, THINK_OPEN
from rredcot_jax.train import initial

PAD = "<pad>"
EOS = "<eos>"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--dataset", default="gsm_symbolic")
  parser.add_argument("--examples", type=int, default=20_000, help="items generated, both splits together")
  parser.add_argument("--vocab_size", type=int, default=1024)
  parser.add_argument("--output", type=pathlib.Path, default=initial.ASSETS / "gsm_symbolic")
  args = parser.parse_args()

  tokenizer = train(texts(args.dataset, args.examples), args.vocab_size)
  args.output.mkdir(parents=True, exist_ok=True)
  tokenizer.save_pretrained(str(args.output))
  print(f"{len(tokenizer)} tokens in {args.output}")


def texts(dataset: str, examples: int) -> Iterator[str]:
  """The train split's questions, steps and answers, each a text of its own."""
  for entry in library.create_dataset(dataset, seed=0, size=examples):
    if task.split_of(entry["question"]) == "train":
      yield entry["question"]
      yield from task.solution_steps(entry)
      yield entry["answer"]


def train(corpus: Iterator[str], vocab_size: int) -> transformers.PreTrainedTokenizerFast:
  """A byte-level BPE in which newlines and digits stand alone."""
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split("\n", behavior="isolated"),
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  bpe.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[PAD, EOS, THINK_OPEN, THINK_CLOSE],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  bpe.train_from_iterator(corpus, trainer)
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=bpe,
    pad_token=PAD,
    eos_token=EOS,
    extra_special_tokens=[THINK_OPEN, THINK_CLOSE],
    clean_up_tokenization_spaces=False,
  )


if __name__ == "__main__":
  main()
