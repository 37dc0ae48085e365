"""Writes the tokenizer of the embedded task: one token a character, in Hugging Face's format.

python tools/make_chain_tokenizer.py
"""

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from rredcot_jax.data import chain
from rredcot_jax.data.encoding import THINK_CLOSE, THINK_OPEN

SPECIAL = ("<pad>", "<eos>", "<unk>", THINK_OPEN, THINK_CLOSE)


def main() -> None:
  vocabulary = {token: i for i, token in enumerate([*SPECIAL, *"0123456789+-*=\n"])}
  tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
  tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
  tokenizer.decoder = decoders.Fuse()
  tokenizer.add_special_tokens(list(SPECIAL))
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    pad_token="<pad>",
    eos_token="<eos>",
    unk_token="<unk>",
    additional_special_tokens=[THINK_OPEN, THINK_CLOSE],
  ).save_pretrained(str(chain.TOKENIZER))
  print(f"{len(vocabulary)} tokens in {chain.TOKENIZER}")


if __name__ == "__main__":
  main()
