"""Files that are no valid GGUF are refused at once and in one line. Large headers are read in a moment."""

import struct
import time

import gguf
import pytest

from pypop_gguf.errors import PopError
from pypop_gguf.gguf_files.header import read_header
from tests.support.gguf_files import ARRAY, FLOAT32, STRING, UINT32, write_model

UINT8 = gguf.GGUFValueType.UINT8


def refusal(path) -> str:
    with pytest.raises(PopError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("endianess", list(gguf.GGUFEndian), ids=lambda endianess: endianess.name.lower())
def test_header_agrees_with_the_gguf_package(tmp_path, endianess):
    keys = [("general.alignment", 64, UINT32), ("made.up", [0.5, -1.5], ARRAY, FLOAT32), ("general.name", "ß", STRING)]
    path = write_model(tmp_path / "a.gguf", *keys, endianess=endianess)
    header, reader = read_header(path), gguf.GGUFReader(path)
    assert list(header.fields) == [name for name in reader.fields if not name.startswith("GGUF.")]
    for name, field in header.fields.items():
        assert field.types == reader.fields[name].types, name
        assert field.raw == b"".join(part.tobytes() for part in reader.fields[name].parts), name
        assert field.contents() == reader.fields[name].contents(), name
    assert (header.n_tensors, header.data_offset, header.alignment) == (len(reader.tensors), reader.data_offset, 64)


def test_missing_file_directory_and_other_files_are_told_apart(tmp_path):
    assert "no such file" in refusal(tmp_path / "missing.gguf")
    assert "not a file" in refusal(tmp_path)
    for content in (b"", b"GG", b"PK\x03\x04" * 100, b"not a model\n"):
        (tmp_path / "other.gguf").write_bytes(content)
        assert "not a GGUF file" in refusal(tmp_path / "other.gguf")


def test_file_cut_anywhere_is_refused(tmp_path):
    path, cut = write_model(tmp_path / "a.gguf"), tmp_path / "cut.gguf"
    whole, data_offset = path.read_bytes(), read_header(path).data_offset
    last = gguf.GGUFReader(path).tensors[-1]
    end = int(last.data_offset + last.n_bytes)
    for length in [*range(4, data_offset + 64, 3), *range(end - 64, end)]:
        cut.write_bytes(whole[:length])
        assert "cut short" in refusal(cut), length
    cut.write_bytes(whole[:end])  # The padding after the last tensor may be missing.
    read_header(cut)


def test_any_damaged_byte_gives_a_header_or_one_line(tmp_path):
    path, damaged = write_model(tmp_path / "a.gguf"), tmp_path / "damaged.gguf"
    whole = path.read_bytes()
    for offset in range(4, read_header(path).data_offset):
        damaged.write_bytes(whole[:offset] + bytes([whole[offset] ^ 0xFF]) + whole[offset + 1 :])
        try:
            read_header(damaged)
        except PopError as error:
            assert str(damaged) in str(error)


def header(n_tensors: int, n_keys: int, rest: bytes = b"", version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, n_tensors, n_keys) + rest


def name(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


HOSTILE = {
    "endless keys": header(0, 2**63),
    "endless tensors": header(2**63, 0),
    "endless name": header(0, 1, struct.pack("<Q", 2**64 - 1)),
    "endless numbers": header(0, 1, name(b"a") + struct.pack("<IIQ", ARRAY, UINT8, 2**63)),
    "endless strings": header(0, 1, name(b"a") + struct.pack("<IIQ", ARRAY, STRING, 2**63) + bytes(64)),
    "arrays all the way down": header(
        0, 1, name(b"a") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 5000
    ),
    "unknown type": header(0, 1, name(b"a") + struct.pack("<II", 99, 0)),
    "key twice": header(0, 2, 2 * (name(b"a") + struct.pack("<II", UINT32, 0))),
    "alignment 0": header(0, 1, name(b"general.alignment") + struct.pack("<II", UINT32, 0)),
    "alignment 3": header(0, 1, name(b"general.alignment") + struct.pack("<II", UINT32, 3)),
    "alignment as text": header(0, 1, name(b"general.alignment") + struct.pack("<I", STRING) + name(b"32")),
    "endless shape": header(1, 0, name(b"t") + struct.pack("<I", 2**32 - 1) + bytes(64)),
    "endless tensor": header(1, 0, name(b"t") + struct.pack("<IQQQIQ", 3, 2**62, 2**62, 2**62, 0, 0)),
    "tensor far away": header(1, 0, name(b"t") + struct.pack("<IQIQ", 1, 8, 0, 2**63)),
    "version 1": header(0, 0, version=1),
    "version 9": header(0, 0, version=9),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_header_is_refused_at_once(tmp_path, content):
    (tmp_path / "a.gguf").write_bytes(content)
    started = time.process_time()
    assert "cut short" in refusal(tmp_path / "a.gguf")
    assert time.process_time() - started < 1


def test_large_vocabulary_is_read_in_a_moment(tmp_path):
    """gguf.GGUFReader takes 20 s for this file, and every start of PopLlama would wait for it."""
    n_vocab = 262144
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_token_list([f"token{i}" for i in range(n_vocab)])
    writer.add_token_merges([f"a{i} b{i}" for i in range(n_vocab)])
    writer.add_token_types([1] * n_vocab)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    started = time.process_time()
    assert read_header(tmp_path / "a.gguf").fields["tokenizer.ggml.tokens"].count == n_vocab
    assert time.process_time() - started < 2
