"""Writes the tokenizers of the embedded tasks, in Hugging Face's format: one token a character, or a word of `think`.

python tools/make_task_tokenizers.py
"""

import re
from collections.abc import Sequence

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from rredcot_jax.data import think
from rredcot_jax.data.encoding import THINK_CLOSE, THINK_OPEN
from rredcot_jax.train import initial

SPECIAL = ("<pad>", "<eos>", "<unk>", THINK_OPEN, THINK_CLOSE)


def main() -> None:
  write("chain", characters="0123456789+-*=\n", words=())
  write("think", characters="0123456789+-*=\n ", words=think.WORDS)


def write(name: str, *, characters: str, words: Sequence[str]) -> None:
  """Writes the tokenizer of `characters` and `words` to rredcot_jax/assets/<name>."""
  vocabulary = {token: i for i, token in enumerate([*SPECIAL, *characters, *words])}
  tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
  pattern = "|".join([*map(re.escape, sorted(words, key=len, reverse=True)), r"[\s\S]"])
  tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
  tokenizer.decoder = decoders.Fuse()
  tokenizer.add_special_tokens(list(SPECIAL))
  directory = initial.ASSETS / name
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    pad_token="<pad>",
    eos_token="<eos>",
    unk_token="<unk>",
    additional_special_tokens=[THINK_OPEN, THINK_CLOSE],
  ).save_pretrained(str(directory))
  print(f"{len(vocabulary)} tokens in {directory}")


if __name__ == "__main__":
  main()
