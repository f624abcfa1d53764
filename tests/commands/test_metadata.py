"""The pop.* keys are read as they were written, refused if they are invalid, and listed in docs/metadata.md."""

import re
from dataclasses import fields

import gguf
import numpy as np
import pytest

from pypop_gguf import PopError, PopLlama, cli
from pypop_gguf.gguf_files.header import read_header
from pypop_gguf.gguf_files.metadata import VERSION, Curve, PopMetadata, read_metadata, trunk_layers
from pypop_gguf.gguf_files.writer import copy_with_metadata
from tests.support.gguf_files import (
    ARRAY,
    BOOL,
    FLOAT32,
    FLOAT64,
    INT32,
    STRING,
    UINT32,
    insert_raw_key,
    write_keys,
    write_model,
)
from tests.support.paths import ROOT

DOCS = ROOT / "docs" / "metadata.md"
VERSION_1 = ("pop.version", 1, UINT32)
FULL = PopMetadata(
    boundary=4,
    head=0,
    tail=16,
    min_tokens=32,
    curve=Curve([5, 4], [0.0, 0.25], [0.0, -0.125], [1.25, 1.5], 40, "texts.jsonl"),
    importance_prefill=np.array([3.5, 0.25, 1e-30, 0.1, 7, 0], dtype=np.float32),
    importance_decode=np.array([1, 2, 3, 4, 5, 6], dtype=np.float32),
    calibration_source="märchen.txt",
    calibration_samples=200,
    calibration_tokens=2**32 - 1,
    calibration_seed=0,
    calibration_sha256="ab" * 32,
)

# Keys beside pop.version, or instead of it -> what the refusal says for a model of 12 layers.
BAD_KEYS = {
    "tail 0": ([("pop.version", 1, UINT32), ("pop.tail", 0, UINT32)], "pop.tail is 0"),
    "curve without figures": (
        [("pop.version", 1, UINT32), ("pop.curve.boundary", [4], ARRAY, UINT32)],
        "pop.curve.kl is missing",
    ),
    "curve of another length": (
        [
            ("pop.version", 1, UINT32),
            ("pop.curve.boundary", [4], ARRAY, UINT32),
            ("pop.curve.kl", [0.5, 0.1], ARRAY, FLOAT32),
        ],
        "pop.curve.kl is of another length",
    ),
    "no version": ([("pop.boundary", 8, UINT32)], "pop.version is missing"),
    "version 0": ([("pop.version", 0, UINT32)], "pop.version is 0"),
    "version of another type": ([("pop.version", "1", STRING)], "pop.version is of type string"),
    "later version": ([("pop.version", 2, UINT32)], "pop.version 2 is newer than 1: update pypop-gguf"),
    "boundary 0": ([VERSION_1, ("pop.boundary", 0, UINT32)], "pop.boundary is 0, not 1 to 12"),
    "boundary above L": ([VERSION_1, ("pop.boundary", 13, UINT32)], "pop.boundary is 13, not 1 to 12"),
    "signed boundary": ([VERSION_1, ("pop.boundary", 8, INT32)], "pop.boundary is of type int32"),
    "boundary as text": ([VERSION_1, ("pop.boundary", "8", STRING)], "pop.boundary is of type string"),
    "boundary true": ([VERSION_1, ("pop.boundary", True, BOOL)], "pop.boundary is of type bool"),
    "short scores": (
        [VERSION_1, ("pop.importance.prefill", [1.0] * 11, ARRAY, FLOAT32)],
        "array of 11, not 12 float32",
    ),
    "float64 scores": ([VERSION_1, ("pop.importance.prefill", [1.0] * 12, ARRAY, FLOAT64)], "not 12 float32"),
    "a lone score": ([VERSION_1, ("pop.importance.decode", 1.0, FLOAT32)], "pop.importance.decode is of type float32"),
    "score not a number": (
        [VERSION_1, ("pop.importance.decode", [1.0] * 11 + [float("nan")], ARRAY, FLOAT32)],
        "not finite",
    ),
    "infinite score": ([VERSION_1, ("pop.importance.decode", [float("inf")] * 12, ARRAY, FLOAT32)], "not finite"),
    "negative score": ([VERSION_1, ("pop.importance.prefill", [-1.0] * 12, ARRAY, FLOAT32)], "negative"),
    "samples as text": (
        [VERSION_1, ("pop.calibration.samples", "200", STRING)],
        "pop.calibration.samples is of type string",
    ),
    "source as number": (
        [VERSION_1, ("pop.calibration.source", 200, UINT32)],
        "pop.calibration.source is of type uint32",
    ),
}
bad_keys = pytest.mark.parametrize(("keys", "reason"), BAD_KEYS.values(), ids=BAD_KEYS)


def test_written_keys_read_back_as_they_were(tmp_path):
    source, target = write_model(tmp_path / "a.gguf"), tmp_path / "b.gguf"
    copy_with_metadata(source, target, FULL)
    found = read_metadata(target)
    for field in fields(PopMetadata):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(FULL, field.name), err_msg=field.name)
    assert found.importance_prefill.dtype == np.float32


def test_key_that_is_not_set_is_not_written(tmp_path):
    copy_with_metadata(write_model(tmp_path / "a.gguf"), tmp_path / "b.gguf", PopMetadata(boundary=6))
    keys = [key for key in gguf.GGUFReader(tmp_path / "b.gguf").fields if key.startswith("pop.")]
    assert keys == ["pop.version", "pop.boundary"]


def test_file_without_pop_keys_has_no_metadata(tmp_path):
    assert read_metadata(write_keys(tmp_path / "a.gguf")) is None


def test_version_alone_is_enough(tmp_path):
    assert read_metadata(write_keys(tmp_path / "a.gguf", VERSION_1)) == PopMetadata()


def test_unknown_pop_key_is_ignored(tmp_path):
    unknown = [("pop.importance.of_heads", [1, 2], ARRAY, INT32), ("pop.colour", "red", STRING)]
    metadata = read_metadata(write_keys(tmp_path / "a.gguf", VERSION_1, ("pop.boundary", 8, UINT32), *unknown))
    assert metadata == PopMetadata(boundary=8)


@pytest.mark.parametrize("boundary", [1, 12])
def test_first_and_last_boundary_are_accepted(tmp_path, boundary):
    path = write_keys(tmp_path / "a.gguf", VERSION_1, ("pop.boundary", boundary, UINT32))
    assert read_metadata(path).boundary == boundary


def test_layers_for_multi_token_prediction_do_not_count(tmp_path):
    extra = ("glm4moe.nextn_predict_layers", 1, UINT32)

    def keys(boundary: int) -> tuple:
        return VERSION_1, ("pop.boundary", boundary, UINT32), extra

    path = write_keys(tmp_path / "a.gguf", *keys(4), architecture="glm4moe", n_layer=5)
    assert trunk_layers(read_header(path)) == 4
    assert read_metadata(path).boundary == 4
    with pytest.raises(PopError, match=r"pop\.boundary is 5, not 1 to 4"):
        read_metadata(write_keys(tmp_path / "b.gguf", *keys(5), architecture="glm4moe", n_layer=5))


@bad_keys
def test_bad_key_is_refused_by_name(tmp_path, keys, reason):
    path = write_keys(tmp_path / "bad.gguf", *keys)
    with pytest.raises(PopError) as caught:
        read_metadata(path)
    message = str(caught.value)
    assert reason in message and str(path) in message and "\n" not in message
    assert "pop-gguf convert" in message or "update pypop-gguf" in message


@bad_keys
def test_bad_key_stops_pop_llama_before_it_loads_the_model(tmp_path, keys, reason):
    path = write_keys(tmp_path / "bad.gguf", *keys)  # It has no tensors, so llama.cpp could not load it.
    with pytest.raises(PopError, match=re.escape(reason)):
        PopLlama(str(path), verbose=False)


@bad_keys
def test_bad_key_makes_inspect_exit_with_1_and_one_line(tmp_path, capfd, keys, reason):
    assert cli.main(["inspect", str(write_keys(tmp_path / "bad.gguf", *keys))]) == 1
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.startswith("pop-gguf: error: ") and reason in output.err and output.err.count("\n") == 1


def test_text_that_is_not_utf8_is_refused(tmp_path):
    path = write_model(tmp_path / "bad.gguf", VERSION_1)
    insert_raw_key(path, "pop.calibration.source", STRING, b"\x02\0\0\0\0\0\0\0\xff\xfe")
    with pytest.raises(PopError, match=r"pop\.calibration\.source is damaged"):
        read_metadata(path)


def test_empty_scores_are_refused(tmp_path):
    path = write_model(tmp_path / "bad.gguf", VERSION_1)
    insert_raw_key(path, "pop.importance.prefill", ARRAY, b"\x06" + bytes(11))  # an array of float32 with no items
    with pytest.raises(PopError, match="array of 0, not 6 float32"):
        read_metadata(path)


@pytest.mark.parametrize("layers", [0, 2])
def test_model_without_layers_of_its_own_is_refused(tmp_path, layers):
    path = write_keys(tmp_path / "a.gguf", VERSION_1, ("llama.nextn_predict_layers", layers, UINT32), n_layer=layers)
    with pytest.raises(PopError, match="no usable block_count"):
        read_metadata(path)


def test_docs_list_every_key_with_its_type_and_version():
    rows = re.findall(
        r"^\| `(pop\.[a-z0-9_.]+)` \| ([^|]+) \| ([^|]*)\| [^|]+ \| (\d+) \|$", DOCS.read_text("utf-8"), re.M
    )
    written = {}
    for key, value, kind in FULL.key_values():
        is_array = kind == ARRAY
        items = "uint32" if is_array and isinstance(value[0], int) else "float32"
        shape = "[n]" if key.startswith("pop.curve.") else "[L]"
        written[key] = (f"array of {items}" if is_array else kind.name.lower(), shape if is_array else "")
    assert {key: (kind, shape.strip()) for key, kind, shape, _since in rows} == written
    assert {since for *_row, since in rows} == {str(VERSION)}
