"""The ``pop.*`` keys of a file survive other tools: llama-quantize, its COPY and --keep-split, and llama-gguf-split.

The tools are llama.cpp's own, unpatched. The quantizer of the library in the wheel is tried too.
"""

import ctypes
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pypop_gguf import PopLlama, cli, library, native
from pypop_gguf.gguf_files.metadata import PopMetadata, read_metadata
from pypop_gguf.gguf_files.writer import copy_with_metadata
from tests.support.gguf_files import raw_keys, raw_tensors
from tests.support.paths import ROOT

STOCK = ROOT / "build" / "stock"
TOOLS = {"quantize": STOCK / "quantize" / "llama-quantize", "gguf-split": STOCK / "gguf-split" / "llama-gguf-split"}
TOKENS = list(range(5, 15))
SCORES = np.arange(12, dtype=np.float32)
METADATA = PopMetadata(
    boundary=8,
    head=1,
    tail=2,
    min_tokens=3,
    importance_prefill=SCORES,
    importance_decode=SCORES + 1,
    calibration_source="märchen.txt",
    calibration_samples=2,
    calibration_tokens=3,
    calibration_seed=4,
    calibration_sha256="ab" * 32,
)


@pytest.fixture(scope="module")
def model(bundled_gguf, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("compatibility") / "model.gguf"
    copy_with_metadata(bundled_gguf, path, METADATA)
    return path


@pytest.fixture
def tool():
    def run(name: str, *arguments: object) -> str:
        if not TOOLS[name].is_file():
            pytest.skip(f"{TOOLS[name].name} is not built: run `make test-slow`")
        done = subprocess.run([*map(str, [TOOLS[name], *arguments])], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def by_library(source: Path, target: Path, **parameters) -> None:
    llama_cpp = library.load()
    wanted = llama_cpp.llama_model_quantize_default_params()
    for name, value in {"nthread": 1, **parameters}.items():
        setattr(wanted, name, value)
    with library.captured_log():
        assert llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(wanted)) == 0


def key_values(metadata: PopMetadata) -> list:
    return [(key, np.asarray(value).tolist(), kind) for key, value, kind in metadata.key_values()]


def assert_kept(path: Path) -> None:
    """Checks that a file has the keys of METADATA, and that PopLlama prunes by them."""
    assert key_values(read_metadata(path)) == key_values(METADATA)
    llm = PopLlama(str(path), n_ctx=64, n_threads=1, verbose=False)
    status = llm.pop
    assert (status.boundary, status.source, status.head, status.tail, status.min_tokens) == (8, "file", 1, 2, 3)
    before = native.n_pruned(llm._ctx.ctx)
    llm.eval(TOKENS)
    assert native.n_pruned(llm._ctx.ctx) - before == len(TOKENS) - 3
    llm.close()


@pytest.fixture
def shards(model, tmp_path, tool) -> list[Path]:
    tool("gguf-split", "--split", "--split-max-tensors", 40, model, tmp_path / "part")
    found = sorted(tmp_path.glob("part-*.gguf"))
    assert len(found) > 1
    return found


@pytest.mark.parametrize("ftype", ["MOSTLY_Q8_0", "MOSTLY_Q4_K_M", "ALL_F32"])
def test_quantizer_of_the_library_keeps_them(model, tmp_path, ftype):
    by_library(model, tmp_path / "a.gguf", ftype=getattr(library.load(), f"LLAMA_FTYPE_{ftype}"))
    assert_kept(tmp_path / "a.gguf")


def test_copy_by_the_library_keeps_them_and_the_tensors(model, tmp_path):
    by_library(model, tmp_path / "a.gguf", only_copy=True)
    assert_kept(tmp_path / "a.gguf")
    assert raw_tensors(tmp_path / "a.gguf") == raw_tensors(model)


@pytest.mark.parametrize("ftype", ["COPY", "Q8_0", "Q4_K_M"])
def test_llama_quantize_keeps_them(model, tmp_path, tool, ftype):
    tool("quantize", model, tmp_path / "a.gguf", ftype, 1)
    assert_kept(tmp_path / "a.gguf")


def test_split_keeps_them_in_the_first_file_and_merged_files_are_the_old_one(model, shards, tmp_path, tool):
    assert_kept(shards[0])
    tool("gguf-split", "--merge", shards[0], tmp_path / "merged.gguf")
    assert_kept(tmp_path / "merged.gguf")
    assert raw_tensors(tmp_path / "merged.gguf") == raw_tensors(model)


@pytest.mark.parametrize("ftype", ["COPY", "Q8_0"])
def test_llama_quantize_of_a_split_file_keeps_them(model, shards, tmp_path, tool, ftype):
    (tmp_path / "out").mkdir()
    tool("quantize", "--keep-split", shards[0], tmp_path / "out" / "a.gguf", ftype, 1)
    written = sorted((tmp_path / "out").iterdir())
    assert len(written) == len(shards)
    assert_kept(written[0])
    tool("quantize", shards[0], tmp_path / "whole.gguf", ftype, 1)
    assert_kept(tmp_path / "whole.gguf")


def test_tool_that_drops_them_is_mended_by_convert(bundled_gguf, tmp_path):
    """llama.cpp's converter, for example, writes a file without the keys, and convert adds them."""
    assert read_metadata(bundled_gguf) is None
    assert cli.main(["convert", str(bundled_gguf), "--boundary", "8", "--outfile", str(tmp_path / "a.gguf")]) == 0
    assert read_metadata(tmp_path / "a.gguf").boundary == 8
    assert raw_keys(tmp_path / "a.gguf") == raw_keys(bundled_gguf)
