"""A model's tokenizer: where it lies, whether it is the checkpoint's, what ends a trace, and text to ids with it.

The files may come from anywhere. Whatever is wrong with them ends in an error that names the file.
"""

import copy
import json
import logging
import math
import pathlib
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
import transformers

from rredcot_jax.model import chat_template
from rredcot_jax.model.source import MOST, check_size, read_json, refusing
from rredcot_jax.report import text as text_lib

_FILES = ("tokenizer.json", "tokenizer_config.json")
# The most bytes read of each file. The largest vocabularies in use have half of that.
_MOST_BYTES = {
  "tokenizer.json": 2**26,
  "tokenizer_config.json": 2**24,
  "added_tokens.json": 2**24,
  "special_tokens_map.json": 2**20,
  "chat_template.jinja": 2**20,
}
GENERATION = "generation_config.json"
_MOST_GROWTH = 1024  # Characters that a normalizer may write for one.
_SHOWN = 3  # Differing tokens that an error lists.

# Of each tokenizer that puts a space before every text, a copy that does not; None of the others.
_WITHOUT_PREFIX: weakref.WeakKeyDictionary[Any, tokenizers.Tokenizer | None] = weakref.WeakKeyDictionary()


# ---- Files -----------------------------------------------------------------------------------


def load_tokenizer(path: str | pathlib.Path, *, chat: bool = True) -> transformers.PreTrainedTokenizerFast:
  """Loads a tokenizer from a local directory in Hugging Face's format, or from a GGUF file; never a hub.

  Args:
    path: the directory or `.gguf` file.
    chat: whether its chat template, if it has one, is to wrap the question.

  Raises:
    FileNotFoundError: naming the file that is missing.
    ValueError: naming the file that is damaged or too large, or if the tokenizer has no end-of-sequence token.
  """
  path = pathlib.Path(path)
  if path.suffix == ".gguf":
    from rredcot_jax.model import gguf

    tokenizer = gguf.GgufFile(path).tokenizer()
    tokenizer.name_or_path = str(path)
  else:
    tokenizer = _from_directory(path)
  if tokenizer.eos_token_id is None:
    raise ValueError(f"The tokenizer in {str(path)!r} names no eos_token; answers could not end.")
  if tokenizer.pad_token_id is None:  # Any id can fill padding, because masks mark it.
    tokenizer.pad_token = tokenizer.eos_token
  _check_use(tokenizer, path)
  if not chat:
    tokenizer.chat_template = None
  elif tokenizer.chat_template is not None:
    with refusing(f"The chat template of the tokenizer in {str(path)!r} cannot be used"):
      tokenizer.chat_template = tokenizer.get_chat_template()  # Of several, the one called "default".
      if not isinstance(tokenizer.chat_template, str):
        raise ValueError(f"it is no text but {tokenizer.chat_template!r:.80}.")
  return tokenizer


def find(checkpoint: str | pathlib.Path) -> pathlib.Path | None:
  """The tokenizer that lies beside a checkpoint; None where there is none.

  Args:
    checkpoint: a directory, a `.gguf` file (which carries its own), or a file of parameters, whose folder is meant.
  """
  path = pathlib.Path(checkpoint)
  if path.suffix == ".gguf":
    return path
  return _folder(path) if all((_folder(path) / name).is_file() for name in _FILES) else None


def num_ids(tokenizer: transformers.PreTrainedTokenizerFast) -> int:
  """The highest id of the vocabulary and 1 more: the rows that a table of embeddings needs.

  It is above `len(tokenizer)` where the vocabulary leaves ids out.
  """
  return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_fits(
  tokenizer: transformers.PreTrainedTokenizerFast, checkpoint: str | pathlib.Path, vocab_size: int
) -> None:
  """Refuses a tokenizer that is not the checkpoint's, because ids mean other tokens in another model.

  Where no tokenizer lies beside the checkpoint, only the number of ids can be compared, which is logged.

  Args:
    tokenizer: the one that is to be used.
    checkpoint: see `find`.
    vocab_size: rows of the checkpoint's table of embeddings. There may be more of them than ids.

  Raises:
    ValueError: naming both, and the first ids that stand for other tokens.
  """
  own, name = find(checkpoint), tokenizer.name_or_path or "given"
  if own is not None and pathlib.Path(name).resolve() != own.resolve():
    ours, theirs = (_by_id(one) for one in (tokenizer, load_tokenizer(own)))
    differing = [i for i in sorted(ours.keys() | theirs.keys()) if ours.get(i) != theirs.get(i)]
    if differing:
      shown = (f"id {i} is {_quoted(ours.get(i))} here and {_quoted(theirs.get(i))} there" for i in differing[:_SHOWN])
      raise ValueError(
        f"the tokenizer {name!r} is not that of the checkpoint {str(checkpoint)!r}, which is {str(own)!r}: of their "
        f"ids {len(differing)} differ; {', '.join(shown)}. Use the checkpoint's own."
      )
  if num_ids(tokenizer) > vocab_size:
    raise ValueError(
      f"the tokenizer {name!r} has {num_ids(tokenizer)} ids and the checkpoint {str(checkpoint)!r} has embeddings of "
      f"{vocab_size}: it is not the checkpoint's" + ("." if own else ", beside which no tokenizer lies.")
    )
  if own is None:
    logging.warning(
      "no tokenizer lies beside the checkpoint %r: whether %r is the one that it was trained with is not known.",
      str(checkpoint), name,
    )  # fmt: skip


def end_ids(tokenizer: transformers.PreTrainedTokenizerFast, checkpoint: str | pathlib.Path) -> tuple[int, ...]:
  """All ids that end a trace, the tokenizer's end-of-sequence token first.

  The others are those of the checkpoint's generation_config.json, or those that a GGUF file calls
  end of sequence and end of turn. A chat model often ends its turn with another token than a plain text.

  Args:
    tokenizer: the model's.
    checkpoint: see `find`.

  Raises:
    ValueError: naming the file and the value that is no id of the tokenizer.
  """
  path = pathlib.Path(checkpoint)
  if path.suffix == ".gguf":
    from rredcot_jax.model import gguf

    more: Sequence[Any] = gguf.GgufFile(path).end_ids()
  else:
    path = _folder(path) / GENERATION
    more = generation_ends(path) if path.is_file() else ()
  size = num_ids(tokenizer)
  for i in more:
    if i >= size:
      raise ValueError(f"{path}: the end token {i} is none of the tokenizer's {size} ids.")
  return tuple(dict.fromkeys((int(tokenizer.eos_token_id), *more)))


def generation_ends(path: pathlib.Path) -> tuple[int, ...]:
  """The ids that a generation_config.json says end a text, in its order.

  Raises:
    ValueError: naming the file and the value, if it is neither an id nor a list of ids.
  """
  value = read_json(path).get("eos_token_id")
  ids = value if isinstance(value, list) else [] if value is None else [value]
  for i in ids:
    if type(i) is not int or not 0 <= i < MOST:
      raise ValueError(f"{path}: eos_token_id={value!r:.80} must be an id or a list of ids.")
  return tuple(ids)


def _from_directory(path: pathlib.Path) -> transformers.PreTrainedTokenizerFast:
  for name in _FILES:
    if not (path / name).is_file():
      raise FileNotFoundError(f"No tokenizer in {str(path)!r}: the file {name!r} is missing there.")
  for name, most in _MOST_BYTES.items():
    if (path / name).is_file():
      check_size(path / name, most)
  config = read_json(path / "tokenizer_config.json", most=_MOST_BYTES["tokenizer_config.json"])
  with refusing(f"{path / 'tokenizer.json'} is damaged"):
    known = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab(with_added_tokens=True)
  with refusing(f"{path / 'tokenizer_config.json'} does not fit the tokenizer beside it"):
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
    stated = {str(added["content"]) for added in config.get("added_tokens_decoder", {}).values()}
    unknown = sorted(tokenizer.get_vocab().keys() - known.keys() - stated)
    # transformers gives such a token a new id, which the model does not have.
    if unknown:
      raise ValueError(f"it names the token {_quoted(unknown[0])}, which tokenizer.json does not have.")
  return tokenizer


def _check_use(tokenizer: transformers.PreTrainedTokenizerFast, path: pathlib.Path) -> None:
  """Uses the tokenizer once, because some damage shows only then."""
  with refusing(f"The tokenizer in {str(path)!r} is damaged"):
    size = num_ids(tokenizer)
    if size > MOST:
      raise ValueError(f"its highest id is {size - 1}; at most {MOST} ids are supported.")
    normalizer = tokenizer.backend_tokenizer.normalizer
    growth = 1 if normalizer is None else _growth(json.loads(normalizer.__getstate__()))
    if growth > _MOST_GROWTH:
      raise ValueError(f"its normalizer may write {growth} characters for one; at most {_MOST_GROWTH} are supported.")
    ids = tokenizer.encode("a b\n1")
    if any(not 0 <= i < size for i in ids):
      raise ValueError(f"it writes the id {max(ids)} and has {size}.")
    tokenizer.decode(ids)
    tokens: dict[int, str] = {}
    for token, i in tokenizer.get_vocab().items():
      if tokens.setdefault(i, token) != token:
        raise ValueError(f"the tokens {_quoted(tokens[i])} and {_quoted(token)} have one id, {i}.")


def _growth(state: Mapping[str, Any]) -> int:
  """How many characters the replacements of a normalizer may write for one, if each reads what the others wrote."""
  if state["type"] == "Sequence":
    return math.prod(_growth(one) for one in state["normalizers"])
  return max(1, len(state["content"])) if state["type"] == "Replace" else 1


def _folder(path: pathlib.Path) -> pathlib.Path:
  return path if path.is_dir() else path.parent


def _by_id(tokenizer: transformers.PreTrainedTokenizerFast) -> dict[int, str]:
  return {i: token for token, i in tokenizer.get_vocab().items()}


def _quoted(token: str | None) -> str:
  return "no token" if token is None else repr(text_lib.shorten(token, 40))


# ---- Text to ids -----------------------------------------------------------------------------


def encode_piece(
  tokenizer: transformers.PreTrainedTokenizerFast, text: str, *, special: bool = False, begins: bool = False
) -> list[int]:
  """The ids that `text` adds in the middle of a text.

  Some tokenizers (Llama 2's, and others made by SentencePiece) put a space before everything they
  encode. That is right only for a whole text. It is left out here, so that pieces can be encoded one
  by one and their ids joined. Tokens are not merged across the ends of pieces.

  Args:
    tokenizer: the model's. No token is added to it after the first call.
    text: any text.
    special: whether special tokens written in `text` become the tokens of these names; not for untrusted text.
    begins: whether `text` begins a whole text, so that the space belongs to it.

  Returns:
    The ids, without those that the tokenizer puts around a whole text.

  Raises:
    ValueError: naming the tokenizer and the text, if it cannot be encoded.
  """
  if tokenizer not in _WITHOUT_PREFIX:
    _WITHOUT_PREFIX[tokenizer] = _without_prefix(tokenizer.backend_tokenizer)
  backend = None if begins else _WITHOUT_PREFIX[tokenizer]
  # A regular expression of the tokenizer can give up in a panic on one text and not on another.
  with refusing(f"the tokenizer {tokenizer.name_or_path or 'given'!r} cannot encode {text[:40]!r}"):
    if backend is None:
      return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not special))
    backend.encode_special_tokens = not special
    return list(backend.encode(text, add_special_tokens=False).ids)


def _without_prefix(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer | None:
  """A copy that puts no space before a text, and neither cuts nor pads; None if the tokenizer puts none."""
  changed: dict[str, Any] = {}
  for part, kinds in (("normalizer", tokenizers.normalizers), ("pre_tokenizer", tokenizers.pre_tokenizers)):
    component = getattr(backend, part)
    state = None if component is None else json.loads(component.__getstate__())
    plain = None if state is None else _plain(state)
    if plain != state:
      changed[part] = None if plain is None else kinds.Sequence([])
      if plain is not None:
        changed[part].__setstate__(json.dumps(plain).encode())
  if not changed:
    return None
  backend = copy.deepcopy(backend)
  for part, component in changed.items():
    setattr(backend, part, component)
  backend.no_truncation()
  backend.no_padding()
  return backend


def _plain(state: dict[str, Any]) -> dict[str, Any] | None:
  """The description of a normalizer or a pre-tokenizer that puts no space before a text; None if nothing is left."""
  kind = state["type"]
  if kind == "Prepend":
    return None
  if kind == "Metaspace":
    return state | {"prepend_scheme": "never"}
  if kind == "ByteLevel" and "add_prefix_space" in state:
    return state | {"add_prefix_space": False}
  for name in ("normalizers", "pretokenizers"):
    if name in state:
      return state | {name: [plain for plain in map(_plain, state[name]) if plain is not None]}
  return state


def render_chat(tokenizer: transformers.PreTrainedTokenizerFast, messages: Sequence[Mapping[str, str]]) -> str:
  """The text of `messages` in the tokenizer's chat template, up to where the assistant speaks.

  The template is a program from the checkpoint. It runs in a process of its own, with bounded time, memory and
  output, and is told a fixed date: see chat_template.py.

  Args:
    tokenizer: one that has a chat template.
    messages: such as [{"role": "user", "content": "2 + 2?"}].

  Raises:
    ValueError: naming the tokenizer and what is wrong with its template.
  """
  variables = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
  name = tokenizer.name_or_path or "given"
  with refusing(f"the chat template of the tokenizer {name!r} cannot be used (tokenizer.chat=False does without)"):
    template = tokenizer.chat_template
    if not isinstance(template, str):
      raise ValueError("there is none")
    return chat_template.render(template, messages, variables)
