"""Files that were written once and never change, so that ``pop.version`` 1 is always read as it was meant."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from pypop_gguf import PopError, PopLlama, cli, library, native
from pypop_gguf.gguf_files.metadata import VERSION, read_metadata
from pypop_gguf.gguf_files.writer import copy_with_metadata
from tests.support.engine import Engine, llama_cpp
from tests.support.gguf_files import ARRAY, STRING, insert_raw_key
from tests.support.paths import ROOT
from tests.support.pop_reference import squared_error

GOLDEN = ROOT / "tests" / "golden"
MODEL, ADAPTER = GOLDEN / "pop-v1.gguf", GOLDEN / "pop-v1.pop-b1.gguf"
EXPECTED = json.loads((GOLDEN / "pop-v1.json").read_text())
KEYS = {key: value for key, value in EXPECTED.items() if key.startswith("pop.")}
TOKENS = [3, 5, 7, 11, 2, 9, 4, 8, 1, 6, 13, 12]
OPTIONS = dict(n_ctx=64, verbose=False, n_threads=1, n_threads_batch=1)


def test_every_key_reads_as_it_was_meant():
    found = {key: value for key, value, _kind in read_metadata(MODEL).key_values()}
    assert {**found, "pop.version": 1} == KEYS
    assert found["pop.importance.prefill"] == [3.5, 0.25, 0.0]


def test_inspect_prints_it(capsys):
    assert cli.main(["inspect", str(MODEL), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {**shown, "pop.version": 1} == {"n_layer": EXPECTED["n_layer"], **KEYS}


def test_native_library_reads_it_alike():
    with Engine(MODEL) as engine:
        choice = native.open_context(engine.context, None)
        assert native.get_boundary(engine.context) == choice.boundary == KEYS["pop.boundary"]
        assert choice.min_tokens == KEYS["pop.min_tokens"]
        engine.prefill(TOKENS)
        assert engine.n_pruned == len(TOKENS) - KEYS["pop.head"] - KEYS["pop.tail"]


def test_pop_llama_takes_boundary_ends_and_the_adapter_beside_the_model(tmp_path):
    alone = Path(shutil.copy(MODEL, tmp_path))
    prompts = []
    for path, adapters in ((MODEL, 1), (alone, 0)):
        llm = PopLlama(str(path), **OPTIONS)
        status = llm.pop
        assert (status.boundary, status.source) == (KEYS["pop.boundary"], "file")
        assert (status.head, status.tail, status.min_tokens) == tuple(
            KEYS[f"pop.{name}"] for name in ("head", "tail", "min_tokens")
        )
        assert len(llm._adapters) == adapters
        llm.eval(TOKENS)
        prompts.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits(llm._ctx.ctx), shape=(16,)).copy())
        llm.close()
    assert squared_error(*prompts) > 1e-6  # The adapter changes the result.


def test_adapter_is_still_for_this_model():
    assert library.fingerprint(MODEL) == EXPECTED["fingerprint"]


@pytest.mark.parametrize("name", ["pop.colour", "pop.importance.of_heads", "pop.curve.newer"])
def test_key_that_a_later_version_added_is_ignored(tmp_path, name):
    path = Path(shutil.copy(MODEL, tmp_path / "newer.gguf"))
    insert_raw_key(path, name, ARRAY, struct.pack("<IQQ", STRING, 1, 3) + b"red")
    assert read_metadata(path).key_values() == read_metadata(MODEL).key_values()
    with Engine(path) as engine:
        assert native.open_context(engine.context, None).source == "file"


def test_file_of_a_later_version_is_refused_in_one_line(tmp_path, capsys):
    raw = MODEL.read_bytes()
    at = raw.index(b"pop.version") + len(b"pop.version") + 4
    path = tmp_path / "newer.gguf"
    path.write_bytes(raw[:at] + struct.pack("<I", VERSION + 1) + raw[at + 4 :])
    reason = f"pop.version {VERSION + 1} is newer than {VERSION}: update pypop-gguf"
    with pytest.raises(PopError, match=reason):
        read_metadata(path)
    with pytest.raises(PopError, match=reason):
        PopLlama(str(path), **OPTIONS)
    assert cli.main(["inspect", str(path)]) == 1
    output = capsys.readouterr()
    assert output.out == "" and reason in output.err and output.err.count("\n") == 1
    with Engine(path) as engine, pytest.raises(PopError, match="update pypop-gguf"):
        native.open_context(engine.context, None)


def test_adapter_of_a_later_version_is_refused_in_one_line(tmp_path):
    raw = ADAPTER.read_bytes()
    at = raw.index(b"pop.adapter.version") + len(b"pop.adapter.version") + 4
    path = tmp_path / "newer.gguf"
    path.write_bytes(raw[:at] + struct.pack("<I", 4) + raw[at + 4 :])
    with Engine(MODEL) as engine, pytest.raises(PopError, match="its version is 4, this build reads 1 to 3"):
        native.load_adapter(engine.context, engine.model, path)


def test_written_again_it_says_the_same(tmp_path):
    copy_with_metadata(MODEL, tmp_path / "again.gguf", read_metadata(MODEL))
    again = {key: value for key, value, _kind in read_metadata(tmp_path / "again.gguf").key_values()}
    assert {**again, "pop.version": 1} == KEYS
