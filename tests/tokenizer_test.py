"""A model's tokenizer: damage is named, another model's is refused, pieces add up to texts, templates are bounded."""

import copy
import json
import logging
import pathlib

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from rredcot_jax.data import tasks
from rredcot_jax.data.encoding import Codec
from rredcot_jax.model import chat_template, tokenizer

CHAIN = pathlib.Path(tasks.__file__).parent.parent / "assets" / "chain"
FILE, CONFIG = (json.loads((CHAIN / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json"))


@pytest.fixture
def write(tmp_path):
  """Writes a tokenizer's two files as objects, text or bytes; None is the chain task's own."""

  def write(file=None, config=None, name="tokenizer"):
    directory = tmp_path / name
    directory.mkdir(exist_ok=True)
    for path, given, own in (("tokenizer.json", file, FILE), ("tokenizer_config.json", config, CONFIG)):
      given = own if given is None else given
      data = given if isinstance(given, bytes) else (given if isinstance(given, str) else json.dumps(given)).encode()
      (directory / path).write_bytes(data)
    return directory

  return write


def changed(**changes):
  """The chain task's tokenizer.json with changes; a double underscore goes one level down."""
  file = copy.deepcopy(FILE)
  for path, value in changes.items():
    *parents, last = path.split("__")
    place = file
    for parent in parents:
      place = place[parent]
    place[last] = value
  return file


# ---- Damage ----------------------------------------------------------------------------------

VOCAB = FILE["model"]["vocab"]
BPE = {"type": "BPE", "vocab": {"a": 0, "<eos>": 1}}
TEMPLATE = {"type": "TemplateProcessing", "pair": [], "single": [{"SpecialToken": {"id": "<z>", "type_id": 0}}]}
DAMAGED_FILES = {
  "empty": "",
  "cut short": json.dumps(FILE)[:300],
  "null": "null",
  "a list": "[]",
  "nothing": {},
  "no UTF-8": b"\xff\xfe",
  "nested": "[" * 100_000,
  "no model": changed(model=None),
  "a model of another type": changed(model__type="Oracle"),
  "a model that is text": changed(model="BPE"),
  "no vocabulary": changed(model__vocab=None),
  "a vocabulary that is a list": changed(model__vocab=[1]),
  "an empty vocabulary": changed(model__vocab={}),
  "an id below 0": changed(model__vocab=VOCAB | {"z": -1}),
  "an id that is no integer": changed(model__vocab=VOCAB | {"z": 1.5}),
  "an id of 2^40": changed(model__vocab=VOCAB | {"z": 2**40}),
  "an id of 2^32 - 1": changed(model__vocab=VOCAB | {"z": 2**32 - 1}),
  "one id for two": changed(model__vocab=VOCAB | {"z": 0}),
  "added tokens that are null": changed(added_tokens=None),
  "added tokens that are text": changed(added_tokens=["a"]),
  "an unknown pre-tokenizer": changed(pre_tokenizer={"type": "Oracle"}),
  "a broken regular expression": changed(
    pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
  ),
  "a merge of an unknown token": changed(model=BPE | {"merges": ["a b"]}),
  "a merge of one token": changed(model=BPE | {"merges": ["a"]}),
  "merges that are text": changed(model=BPE | {"merges": "a b"}),
  "an unknown token that is unknown": changed(model=BPE | {"merges": [], "unk_token": "<u>"}),
  "a panic when it is read": changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
  "a normalizer that grows": changed(
    normalizer={
      "type": "Sequence",
      "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}] * 9,
    }
  ),
  "a panic when it is used": changed(post_processor=TEMPLATE | {"special_tokens": {}}),
  "an id that nothing has": changed(
    post_processor=TEMPLATE | {"special_tokens": {"<z>": {"id": "<z>", "ids": [4 * 10**9], "tokens": ["<z>"]}}}
  ),
}
DAMAGED_CONFIGS = {
  "empty": "",
  "null": "null",
  "a list": "[]",
  "a number": "1",
  "cut short": json.dumps(CONFIG)[:20],
  "nested": "[" * 100_000,
  "an end that is a number": CONFIG | {"eos_token": 5},
  "an end that is an object": CONFIG | {"eos_token": {"a": 1}},
  "an end that is unknown": CONFIG | {"eos_token": "<nope>"},
  "no end": CONFIG | {"eos_token": None},
  "padding that is unknown": CONFIG | {"pad_token": "<nope>"},
  "a length that is text": CONFIG | {"model_max_length": "x"},
  "added tokens that are text": CONFIG | {"added_tokens_decoder": {"x": 1}},
  "added tokens that are a list": CONFIG | {"added_tokens_decoder": [1]},
  "a side that is none": CONFIG | {"padding_side": "up"},
  "a template that is a number": CONFIG | {"chat_template": 5},
  "a template that is a list": CONFIG | {"chat_template": [1]},
  "templates without a default": CONFIG | {"chat_template": [{"name": "a", "template": "b"}]},
}


@pytest.mark.parametrize("kind", DAMAGED_FILES)
def test_a_damaged_tokenizer_is_named(kind, write):
  directory = write(file=DAMAGED_FILES[kind])
  with pytest.raises(ValueError, match="damaged") as caught:
    tokenizer.load_tokenizer(directory)
  assert str(directory) in str(caught.value) and len(str(caught.value)) < 600


def test_a_text_that_makes_a_tokenizer_panic_is_named_with_it(write):
  search = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
  directory = write(file=changed(pre_tokenizer=search))
  loaded = tokenizer.load_tokenizer(directory)
  tokenizer.encode_piece(loaded, "a")
  with pytest.raises(ValueError, match=r"cannot encode 'aaaaaaaa.*retry-limit-in-match") as caught:
    tokenizer.encode_piece(loaded, "a" * 5000 + "!")
  assert str(directory) in str(caught.value)


@pytest.mark.parametrize("kind", DAMAGED_CONFIGS)
def test_a_damaged_configuration_is_named(kind, write):
  directory = write(config=DAMAGED_CONFIGS[kind])
  with pytest.raises(ValueError, match="okenizer") as caught:
    tokenizer.load_tokenizer(directory)
  assert str(directory) in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("name", tokenizer._MOST_BYTES)
def test_a_file_too_large_is_not_read(name, write):
  directory = write()
  with (directory / name).open("ab") as file:
    file.truncate(tokenizer._MOST_BYTES[name] + 1)  # A hole: it takes no room on the disk.
  with pytest.raises(ValueError, match=rf"{name} has \d+ bytes; at most"):
    tokenizer.load_tokenizer(directory)


def test_a_missing_file_is_named(write):
  directory = write()
  (directory / "tokenizer_config.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"tokenizer_config\.json"):
    tokenizer.load_tokenizer(directory)


def test_what_is_said_of_damage_can_be_shown(write):
  directory = write(config=CONFIG | {"eos_token": "\x1b[31m\u202e" + "x" * 10_000})
  with pytest.raises(ValueError, match=r"\\x1b\[31m\\u202e") as caught:
    tokenizer.load_tokenizer(directory)
  assert str(caught.value).isprintable() and len(str(caught.value)) < 600


# ---- Of which model --------------------------------------------------------------------------


def test_a_tokenizer_is_found_beside_its_checkpoint(write, tmp_path):
  directory = write()
  assert tokenizer.find(directory) == directory == tokenizer.find(directory / "model.safetensors")
  assert tokenizer.find(tmp_path) is None and tokenizer.find(tmp_path / "model.safetensors") is None
  assert tokenizer.find(tmp_path / "model.gguf") == tmp_path / "model.gguf"
  (directory / "tokenizer.json").unlink()
  assert tokenizer.find(directory) is None


def test_another_models_tokenizer_is_refused_by_name(write):
  own, other = write(), write(file=changed(model__vocab=VOCAB | {"+": 16, "-": 15, "z": 20}), name="other")
  tokenizer.check_fits(tokenizer.load_tokenizer(own), own, 20)
  tokenizer.check_fits(tokenizer.load_tokenizer(own), own / "model.safetensors", 64)  # Rows to spare.
  tokenizer.check_fits(tokenizer.load_tokenizer(CHAIN), own, 20)  # The same in another place.
  for ours, theirs, shown in (
    (
      other,
      own,
      "id 15 is '-' here and '+' there, id 16 is '+' here and '-' there, id 20 is 'z' here and no token there",
    ),
    (
      own,
      other,
      "id 15 is '+' here and '-' there, id 16 is '-' here and '+' there, id 20 is no token here and 'z' there",
    ),
  ):
    with pytest.raises(ValueError, match="of their ids 3 differ") as caught:
      tokenizer.check_fits(tokenizer.load_tokenizer(ours), theirs, 64)
    assert shown in str(caught.value) and str(ours) in str(caught.value) and str(theirs) in str(caught.value)


def test_a_table_of_embeddings_has_a_row_for_every_id(write, tmp_path, caplog):
  loaded = tokenizer.load_tokenizer(write())
  alone = tmp_path / "alone" / "model.safetensors"
  alone.parent.mkdir()
  with pytest.raises(ValueError, match=r"has 20 ids and the checkpoint .* of 19: .* beside which no tokenizer lies"):
    tokenizer.check_fits(loaded, alone, 19)
  with caplog.at_level(logging.WARNING):
    tokenizer.check_fits(loaded, alone, 20)
  assert "no tokenizer lies beside the checkpoint" in caplog.text and str(alone) in caplog.text
  # The highest id counts, not how many there are.
  holed = tokenizer.load_tokenizer(write(file=changed(model__vocab=VOCAB | {"z": 30}), name="holed"))
  assert (len(holed), tokenizer.num_ids(holed)) == (21, 31)
  with pytest.raises(ValueError, match=r"has 31 ids and .* of 21: it is not the checkpoint's"):
    tokenizer.check_fits(holed, tmp_path / "holed", 21)


@pytest.mark.parametrize(
  ("stated", "expected"),
  [({}, (1,)), ({"eos_token_id": None}, (1,)), ({"eos_token_id": 1}, (1,)), ({"eos_token_id": 4}, (1, 4)),
   ({"eos_token_id": [4, 1, 0]}, (1, 4, 0))],
)  # fmt: skip
def test_every_stated_end_ends_a_trace(stated, expected, write):
  directory = write()
  loaded = tokenizer.load_tokenizer(directory)
  assert tokenizer.end_ids(loaded, directory) == (1,)
  (directory / "generation_config.json").write_text(json.dumps(stated))
  assert tokenizer.end_ids(loaded, directory) == tokenizer.end_ids(loaded, directory / "a.safetensors") == expected


@pytest.mark.parametrize("value", ["</s>", True, 1.0, -1, 2**40, [1, None], [[1]], {"a": 1}, 20, [1, 20]])
def test_an_end_that_is_no_id_is_named(value, write):
  directory = write()
  (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
  with pytest.raises(ValueError, match=r"generation_config\.json: (eos_token_id=|the end token 20 is none of)"):
    tokenizer.end_ids(tokenizer.load_tokenizer(directory), directory)


# ---- Pieces ----------------------------------------------------------------------------------


def sentence_piece(prefix):
  """As Llama 2's: words of characters, spaces as a mark that `prefix` puts before every text, bytes for the rest."""
  words = ["▁", *"abcde", "ab", "▁ab", "cd", "▁cd", "▁a"]
  vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words])}
  merges = [("a", "b"), ("▁", "ab"), ("c", "d"), ("▁", "cd"), ("▁", "a")]
  fast = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
  if prefix == "normalizer":
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
  else:
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
  fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
  return fast


def byte_level(add_prefix_space):
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {token: i for i, token in enumerate(["</s>", *alphabet, "ab", "Ġab", "cd", "Ġcd"])}
  fast = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b"), ("Ġ", "ab"), ("c", "d"), ("Ġ", "cd")]))
  fast.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)]
  )
  fast.decoder = decoders.ByteLevel()
  return fast


def word_level():
  fast = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, **{c: i + 1 for i, c in enumerate("abcde \n")}}, "</s>"))
  fast.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
  fast.decoder = decoders.Fuse()
  return fast


PREFIXING = {
  "Llama 2, legacy": lambda: sentence_piece("normalizer"),
  "Llama 2": lambda: sentence_piece("first"),
  "always": lambda: sentence_piece("always"),
  "GPT-2 with a space": lambda: byte_level(True),
}
ALL = PREFIXING | {"never": lambda: sentence_piece("never"), "GPT-2": lambda: byte_level(False), "words": word_level}


def wrapped(name):
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=ALL[name](), eos_token="</s>", clean_up_tokenization_spaces=False
  )


@pytest.mark.parametrize("name", ALL)
def test_a_piece_adds_what_it_adds_in_the_middle_of_a_text(name):
  ours = wrapped(name)
  # A newline merges with nothing here, so what stands behind one is encoded as in the middle of any text.
  before = ours.encode("e\n", add_special_tokens=False)
  for piece in ("ab", " ab", "cd ab", "  a", "b", "\nab", "a\nab ", ""):
    whole = ours.encode("e\n" + piece, add_special_tokens=False)
    assert whole[: len(before)] == before
    assert tokenizer.encode_piece(ours, piece) == whole[len(before) :], piece
  pieces = ["ab", " cd", "e", "\n", "ab", " "]
  ids = [token for piece in pieces for token in tokenizer.encode_piece(ours, piece)]
  assert ours.decode(ids) == "".join(pieces)


@pytest.mark.parametrize("name", PREFIXING)
def test_a_whole_text_still_begins_as_the_tokenizer_wants(name):
  ours = wrapped(name)
  alone, piece = ours.encode("ab", add_special_tokens=False), tokenizer.encode_piece(ours, "ab")
  assert alone != piece and alone == tokenizer.encode_piece(ours, " ab") == ours.encode("ab", add_special_tokens=False)


@pytest.mark.parametrize("template", [None, "{{ eos_token }}{{ messages[0].content }}", "{{ messages[0].content }}",
                                      "b\n{{ messages[0].content }}"])  # fmt: skip
@pytest.mark.parametrize("name", [name for name in ALL if name != "words"])
def test_a_question_is_written_as_the_tokenizer_writes_the_whole_prompt(name, template):
  ours = wrapped(name)
  ours.chat_template = template
  marker = tokenizer.encode_piece(ours, "<think>")
  for question in ("ab cd", " ab", "e\nab", "<think>ab"):
    text = question if template is None else tokenizer.render_chat(ours, [{"role": "user", "content": question}])
    ids = Codec(ours).prompt_ids(tasks.Example(question, (), "1"))
    assert ids == [*ours.encode(text, add_special_tokens=False), *marker], (question, ours.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("name", ALL)
def test_special_tokens_in_a_piece_are_text_unless_asked_for(name):
  ours = wrapped(name)
  end = ours.eos_token_id
  assert tokenizer.encode_piece(ours, "ab</s>", special=True)[-1] == end
  if name != "words":  # Which has no other token for these characters.
    assert end not in tokenizer.encode_piece(ours, "ab</s>")
  assert tokenizer.encode_piece(ours, "a</s>b", special=True).count(end) == 1


@pytest.mark.parametrize("name", ALL)
def test_a_piece_is_neither_cut_nor_padded(name):
  ours = wrapped(name)
  ours.backend_tokenizer.enable_truncation(3)
  ours.backend_tokenizer.enable_padding(length=9)
  assert ours.decode(tokenizer.encode_piece(ours, "ab cd ab cd")) == "ab cd ab cd"
  assert len(tokenizer.encode_piece(ours, "a")) == 1


# ---- Chat templates --------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "2 + 2? {{ 1 }} <eos>"}]
TEMPLATES = {
  "loops and conditions": """
    {%- for message in messages %}
      {%- if loop.first and messages[0].role != 'system' %}
        {{- '<|im_start|>system\\nHelp.<|im_end|>\\n' }}
      {%- endif %}
      {{- '<|im_start|>' + message['role'] + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
    {%- endfor %}
    {%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}""",
  "white space of blocks": "  {% for m in messages %}\n  {{ m.content }}\n  {% endfor %}\n\n{# a note #}\nspeak:\n",
  "a namespace": "{% set ns = namespace(found=false) %}{% for m in messages %}{% set ns.found = true %}{% endfor %}"
  "{{ ns.found }}{{ messages[-1]['content'] }}",
  "loop controls": "{% for m in messages * 3 %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.content }}"
  "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
  "JSON": "{{ messages | tojson }}{{ {'é': [1, '<']} | tojson(indent=2) }}{{ messages[0].content }}",
  "special tokens": "{{ eos_token }}{{ pad_token }}{{ messages[0].content }}{{ x is defined }}{{ tools is none }}",
  "generation": "{{ messages[0].content }}{% generation %}{{ 'x' }} y{% endgeneration %}{{ dict(a=1).a }}",
  "macros and slices": "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[0].content.split('+')[0]) }}"
  "{{ messages[::-1] | map(attribute='role') | join(',') }}{{ 'a' ~ 1 }}{{ [3, 1] | sort }}",
}


@pytest.fixture(scope="module")
def chain():
  return tokenizer.load_tokenizer(CHAIN)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_is_rendered_as_transformers_renders_it(kind, chain):
  chain.chat_template = TEMPLATES[kind]
  expected = chain.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
  assert tokenizer.render_chat(chain, MESSAGES) == expected
  assert "2 +" in expected or "[2 ]" in expected


def test_transformers_offers_templates_nothing_else():
  from transformers.utils import chat_template_utils

  theirs, ours = chat_template_utils._compile_jinja_template("").environment, chat_template._environment()
  assert set(theirs.filters) - set(ours.filters) == {"random"} and set(ours.filters) <= set(theirs.filters)
  assert set(theirs.globals) - set(ours.globals) == {"lipsum"} and set(ours.globals) <= set(theirs.globals)
  assert set(theirs.tests) == set(ours.tests)
  assert type(ours).__mro__[0] is type(theirs).__mro__[0] and ours.trim_blocks and ours.lstrip_blocks


def test_a_template_is_told_one_date(chain):
  chain.chat_template = "{{ strftime_now('%d %b %Y %H:%M:%S') }} {{ messages[0].content }}"
  assert tokenizer.render_chat(chain, MESSAGES).startswith("26 Jul 2024 00:00:00 2 +")


HOSTILE = {
  "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "not done after 1 seconds",
  "{{ 'a' * 4000000000 }}": "needs more than 512 megabytes",
  "{{ 'a' * 2000000 }}": "writes more than 1048576 characters",
  "{% for i in range(3000) %}{{ 'a' * 1000 }}{% endfor %}": "writes more than 1048576 characters",
  "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
  "{{" + "(" * 100_000: "RecursionError",
  "{% if": "TemplateSyntaxError",
  "{{ ''.__class__.__mro__ }}": "SecurityError",
  "{{ namespace(_x=1) }}": "SecurityError",
  "{% set n = namespace() %}{% set n._x = 1 %}": "SecurityError",
  "{{ messages.append(1) }}": "SecurityError",
  "{{ [1, 2] | random }}": "random",
  "{{ lipsum() }}": "lipsum",
  "{{ 1 / 0 }}": "ZeroDivisionError",
  "{{ raise_exception('no system role') }}": "no system role",
  "x" * (2**20 + 1): "1048577 characters long",
}


@pytest.mark.parametrize("template", HOSTILE, ids=lambda template: template[:30])
def test_a_hostile_template_ends_in_an_error_that_names_the_tokenizer(template, chain, monkeypatch):
  monkeypatch.setattr(chat_template, "SECONDS", 1 if "not done" in HOSTILE[template] else 10)
  chain.chat_template = template
  with pytest.raises(ValueError, match=HOSTILE[template]) as caught:
    tokenizer.render_chat(chain, MESSAGES)
  assert str(CHAIN) in str(caught.value) and "tokenizer.chat=False" in str(caught.value)


def test_what_a_template_says_can_be_shown(chain):
  chain.chat_template = "{{ raise_exception('\x1b[31m\u202e' + 'x' * 10000) }}"
  with pytest.raises(ValueError, match=r"\\x1b\[31m\\u202exx") as caught:
    tokenizer.render_chat(chain, MESSAGES)
  assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_a_tokenizer_without_a_template_renders_nothing(chain):
  chain.chat_template = None
  with pytest.raises(ValueError, match="there is none"):
    tokenizer.render_chat(chain, MESSAGES)


def test_the_default_of_several_templates_is_taken_and_none_without_chat(write):
  config = CONFIG | {"chat_template": [{"name": "default", "template": "d{{ messages[0].content }}"},
                                       {"name": "other", "template": "o"}]}  # fmt: skip
  assert tokenizer.render_chat(tokenizer.load_tokenizer(write(config=config)), MESSAGES) == "d2 + 2? {{ 1 }} <eos>"
  assert tokenizer.load_tokenizer(write(config=config), chat=False).chat_template is None


def test_parameters_of_ours_may_lie_beside_a_tokenizer(write):
  directory = write()
  safetensors.numpy.save_file({"embedding": np.zeros((20, 2), np.float32)}, directory / "start.safetensors")
  assert tokenizer.find(directory / "start.safetensors") == directory
