"""The container of a GGUF file: read as the gguf library reads it, and no count or length is believed unbounded."""

import re
import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest

from rredcot_jax.model import gguf_reader, huggingface

KIND = gguf.GGUFValueType


def text(value):
  data = value if isinstance(value, bytes) else value.encode()
  return struct.pack("<Q", len(data)) + data


def field(name, kind, data):
  return text(name) + struct.pack("<I", kind) + data


def array(kind, count, data=b""):
  return struct.pack("<IQ", kind, count) + data


def tensor(name, shape, kind=0, offset=0):
  return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def container(fields=(), tensors=(), data=b"", version=3, counts=None, alignment=32):
  """The bytes of a file; `counts` is what it says of the numbers of tensors and fields."""
  counts = counts or (len(tensors), len(fields))
  head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join([*fields, *tensors])
  return head + b"\0" * (-len(head) % alignment) + data


@pytest.fixture
def read(tmp_path):
  def read(data):
    (tmp_path / "a.gguf").write_bytes(data)
    return gguf_reader.read(tmp_path / "a.gguf")

  return read


def test_a_file_is_read_as_the_library_reads_it(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
  rng = np.random.default_rng(0)
  for kind, value in (("uint8", 200), ("int8", -3), ("uint16", 60000), ("int16", -300), ("uint32", 2**31),
                      ("int32", -7), ("float32", 0.1), ("bool", True), ("uint64", 2**63), ("int64", -(2**40)),
                      ("float64", 0.1), ("string", "héllo\n"), ("array", ["a", "", "é"]), ("array", [1, 2, 3]),
                      ("array", [0.5, 0.25])):  # fmt: skip
    getattr(writer, f"add_{kind}")(f"{kind}.{value!r}"[:40], value)
  writer.add_custom_alignment(64)
  kinds = [getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")]
  for i, kind in enumerate(kinds):
    values = rng.normal(size=(3 + i, 64)).astype(np.float32)
    writer.add_tensor(kind.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
  writer.add_tensor("vector", values[0, :7])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  fields, tensors = gguf_reader.read(tmp_path / "a.gguf")
  library = gguf.GGUFReader(tmp_path / "a.gguf")
  theirs = {name: known.contents() for name, known in library.fields.items() if not name.startswith("GGUF.")}
  assert fields == theirs and len(fields) > 15 and fields["general.alignment"] == 64
  assert list(tensors) == [one.name for one in library.tensors]
  for one in library.tensors:
    ours = tensors[one.name]
    assert ours.kind == one.tensor_type and ours.shape == tuple(one.shape[::-1].tolist())
    np.testing.assert_array_equal(
      gguf.quants.dequantize(ours.data, ours.kind).reshape(ours.shape),
      gguf.quants.dequantize(one.data, one.tensor_type).reshape(ours.shape),
    )


X = field("x", KIND.UINT8, b"\7")
BAD = {
  "it does not begin with 'GGUF'": b"JUNK" + container()[4:],
  "its version 9 is not supported": container(version=9),
  "of the other byte order": container(version=3 << 24),
  "it has 1152921504606846976 tensors; at most 160000": container(counts=(2**60, 0)),
  "it has 10001 metadata fields; at most 10000": container(counts=(0, 10_001)),
  "it ends early, at 32 bytes": container(counts=(0, 2)),
  "the metadata field 'x' is there twice": container([X, X]),
  "the name of a metadata field is a text of 4294967296 bytes; at most 65536": container([struct.pack("<Q", 2**32)]),
  "the name of a metadata field is no UTF-8 text": container([field(b"\xff", KIND.UINT8, b"\7")]),
  "the metadata field 'x' is a text of 4294967296 bytes": container(
    [field("x", KIND.STRING, struct.pack("<Q", 2**32))]
  ),
  "the metadata field 'x' is no UTF-8 text": container([field("x", KIND.STRING, text(b"\xff"))]),
  "the metadata field 'x' is of the type 13": container([field("x", 13, b"")]),
  "the metadata field 'x' is of the type 9, which": container(
    [field("x", KIND.ARRAY, array(KIND.ARRAY, 1, b"\0" * 20))]
  ),
  "the metadata field 'x' is an array of 1152921504606846976 values": container(
    [field("x", KIND.ARRAY, array(KIND.UINT8, 2**60))]
  ),
  "the metadata field 'x' is an array of 8000000 values": container(
    [field("x", KIND.ARRAY, array(KIND.UINT8, 8_000_000, b"\0" * 8_000_000))]
  ),
  # Two that are small enough alone.
  "the metadata field 'y' is an array of 1500000 values": container(
    [field(name, KIND.ARRAY, array(KIND.UINT8, 1_500_000, b"\0" * 1_500_000)) for name in "xy"]
  ),
  "general.alignment=24 is not a power of two": container(
    [field("general.alignment", KIND.UINT32, struct.pack("<I", 24))]
  ),
  "general.alignment='32' is not": container([field("general.alignment", KIND.STRING, text("32"))]),
  "the tensor 't' has 0 axes": container(tensors=[tensor("t", ())]),
  "the tensor 't' has 5 axes": container(tensors=[tensor("t", (1,) * 5)]),
  "the tensor 't' has the quantisation 999": container(tensors=[tensor("t", (1,), 999)], data=b"\0" * 64),
  "the tensor 't' has rows of 33, no multiple of Q8_0's 32": container(
    tensors=[tensor("t", (33,), 8)], data=b"\0" * 64
  ),
  "within the tensor 't'": container(tensors=[tensor("t", (2**62, 2**62))], data=b"\0" * 64),
  "at 95 bytes, within the tensor 't'": container(tensors=[tensor("t", (8,))], data=b"\0" * 31),
  "within the tensor 'far'": container(tensors=[tensor("far", (8,), 0, 2**63)], data=b"\0" * 32),
  "the tensor 't' is there twice": container(tensors=[tensor("t", (8,)), tensor("t", (8,), 0, 32)], data=b"\0" * 64),
  "the tensors 't' and 'u' overlap": container(tensors=[tensor("t", (8,)), tensor("u", (8,), 0, 28)], data=b"\0" * 64),
  "the tensors 'v' and 't' overlap": container(tensors=[tensor("v", (8,)), tensor("t", (8,))], data=b"\0" * 64),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_is_named(message, read):
  with pytest.raises(ValueError, match=re.escape(message)):
    read(BAD[message])


def test_tensors_may_lie_in_any_order_and_touch(read):
  data = np.arange(16, dtype=np.float32).tobytes()
  _, tensors = read(container([X], [tensor("b", (4, 2), 0, 32), tensor("a", (8,))], data))
  np.testing.assert_array_equal(tensors["a"].data.view(np.float32), np.arange(8))
  np.testing.assert_array_equal(tensors["b"].data.view(np.float32), np.arange(8, 16).reshape(2, 4))


@pytest.mark.parametrize("alignment", [8, 64, 512])
def test_tensors_begin_where_the_files_alignment_says(alignment, read):
  stated = field("general.alignment", KIND.UINT32, struct.pack("<I", alignment))
  data = np.arange(8, dtype=np.float32).tobytes()
  _, tensors = read(container([stated], [tensor("a", (8,))], data, alignment=alignment))
  np.testing.assert_array_equal(tensors["a"].data.view(np.float32), np.arange(8))


def test_the_arrays_of_a_file_take_little_memory(tmp_path):
  """As many values as a file may have, in a process that may not have ten times what they take."""
  count = gguf_reader._MOST_VALUES
  strings = array(KIND.STRING, count, text("ab") * count)
  (tmp_path / "a.gguf").write_bytes(container([field("x", KIND.ARRAY, strings)]))
  script = (
    "import pathlib, resource, sys\n"
    "from rredcot_jax.model import gguf_reader\n"
    "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    f"fields, _ = gguf_reader.read(pathlib.Path({str(tmp_path / 'a.gguf')!r}))\n"
    f"assert fields['x'] == ['ab'] * {count}\n"
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
  )
  output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
  assert int(output.split()[-1]) * (1 if sys.platform == "darwin" else 1024) < 400e6


def test_a_file_that_is_refused_is_named(tmp_path):
  path = tmp_path / "forged.gguf"
  path.write_bytes(container([field("x\x1b[31m", KIND.ARRAY, array(KIND.UINT8, 2**60))]))
  with pytest.raises(
    ValueError, match=r"forged\.gguf is no GGUF file that can be read: the metadata field 'x"
  ) as caught:
    huggingface.load(path)
  assert str(caught.value).isprintable()
