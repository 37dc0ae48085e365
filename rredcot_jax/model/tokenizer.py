"""A model's tokenizer, from its checkpoint."""

import pathlib

import transformers

_FILES = ("tokenizer.json", "tokenizer_config.json")


def load_tokenizer(path: str | pathlib.Path, *, chat: bool = True) -> transformers.PreTrainedTokenizerFast:
  """Loads a tokenizer from a local directory in Hugging Face's format, or from a GGUF file; never a hub.

  Args:
    path: the directory or `.gguf` file.
    chat: whether its chat template, if it has one, is to wrap the question.

  Raises:
    FileNotFoundError: naming the file that is missing.
    ValueError: if the tokenizer has no end-of-sequence token.
  """
  path = pathlib.Path(path)
  if path.suffix == ".gguf":
    from rredcot_jax.model import gguf

    tokenizer = gguf.GgufFile(path).tokenizer()
  else:
    for name in _FILES:
      if not (path / name).is_file():
        raise FileNotFoundError(f"No tokenizer in {str(path)!r}: the file {name!r} is missing there.")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
  if tokenizer.eos_token_id is None:
    raise ValueError(f"The tokenizer in {str(path)!r} names no eos_token; answers could not end.")
  if tokenizer.pad_token_id is None:  # Masks say what padding is; the id only fills the place.
    tokenizer.pad_token = tokenizer.eos_token
  if not chat:
    tokenizer.chat_template = None
  return tokenizer
