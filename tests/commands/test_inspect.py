"""``pop-gguf inspect``: both profiles, the boundary between them, JSON, and files without metadata."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from pypop_gguf import cli
from pypop_gguf.gguf_files.metadata import PopMetadata
from pypop_gguf.gguf_files.writer import copy_with_metadata
from tests.support.gguf_files import STRING, UINT32, insert_raw_key, write_keys, write_model

PREFILL = np.array([4, 3, 2, 1e-20, 0.5, 0.25, 0.25, 0], dtype=np.float32)
DECODE = np.array([0, 1, 2, 3, 4e20, 3, 2, 1], dtype=np.float32)
METADATA = PopMetadata(
    boundary=5,
    importance_prefill=PREFILL,
    importance_decode=DECODE,
    calibration_source="prose.txt",
    calibration_samples=4,
    calibration_tokens=900,
    calibration_seed=3,
    calibration_sha256="0f" * 32,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    base = tmp_path_factory.mktemp("inspect")
    source = write_model(
        base / "plain.gguf", ("general.name", "Tiny", STRING), ("general.file_type", 0, UINT32), n_layer=8
    )
    copy_with_metadata(source, base / "pop.gguf", METADATA)
    return base / "pop.gguf"


def inspect(capsys, *arguments) -> str:
    assert cli.main(["inspect", *map(str, arguments)]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


def rows(text: str) -> list[list[str]]:
    """Returns the cells of the lines with layers."""
    return [line.split() for line in text.splitlines() if line[:5].strip().isdigit()]


def test_it_names_the_model_the_boundary_and_the_share(path, capsys):
    output = inspect(capsys, path)
    assert "Tiny (llama, F32)" in output
    assert "layer 5 of 8: prefill skips 3 (38%)" in output
    assert "5.0% of prefill importance is skipped" in output  # (0.25 + 0.25 + 0) / 10
    assert "prose.txt: 4 samples, 900 tokens, seed 3" in output


def test_profiles_of_all_layers_fit_80_columns(path, capsys):
    output = inspect(capsys, path)
    table = output[output.index("\nlayer") :].splitlines()
    assert max(map(len, table)) <= 80
    assert [cells[0] for cells in rows(output)] == [str(il) for il in range(8)]
    numbers = [[float(cell) for cell in cells[1:] if cell[0] in "0123456789"] for cells in rows(output)]
    np.testing.assert_allclose(numbers, np.stack([PREFILL, DECODE], axis=1), rtol=5e-3)


def test_bars_are_as_long_as_the_scores(path, capsys):
    bars = [line[7:31].rstrip() for line in inspect(capsys, path).splitlines() if line[:5].strip().isdigit()]
    assert bars == ["█" * 24, "█" * 18, "█" * 12, "", "█" * 3, "█▌", "█▌", ""]


def test_boundary_stands_between_its_layers(path, capsys):
    lines = inspect(capsys, path).splitlines()
    line = next(i for i, text in enumerate(lines) if "prefill skips from here on" in text)
    assert lines[line - 1].split()[0] == "4" and lines[line + 1].split()[0] == "5"


def test_json_holds_every_key(path, capsys):
    found = json.loads(inspect(capsys, path, "--json"))
    assert found.pop("n_layer") == 8
    assert found == {key: value for key, value, _kind in METADATA.key_values()}


def test_file_without_pop_keys_says_so(tmp_path, capsys):
    path = write_keys(tmp_path / "a.gguf")
    assert f"none: prompts are read by all layers. `pop-gguf convert {path}` writes one" in inspect(capsys, path)
    assert json.loads(inspect(capsys, path, "--json")) == {"n_layer": 12}


def test_boundary_without_importance_says_so(tmp_path, capsys):
    path = write_keys(tmp_path / "a.gguf", ("pop.version", 1, UINT32), ("pop.boundary", 8, UINT32))
    output = inspect(capsys, path)
    assert "layer 8 of 12: prefill skips 4 (33%)" in output and "not estimated" in output
    assert rows(output) == []


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_bars_are_ascii_where_the_terminal_is(path, encoding):
    done = subprocess.run(
        [sys.executable, "-m", "pypop_gguf", "inspect", path],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    bar = "█" if encoding == "utf-8" else "#"
    assert rows(done.stdout.decode(encoding))[0][1] == bar * 24


def test_damaged_name_does_not_matter(tmp_path, capsys):
    path = write_model(tmp_path / "a.gguf")
    insert_raw_key(path, "general.name", STRING, b"\x02\0\0\0\0\0\0\0\xff\xfe")
    assert "(llama, unknown type)" in inspect(capsys, path)


def test_name_in_the_terminals_language_is_shown_as_text(tmp_path, capsys):
    path = write_model(tmp_path / "a\x1b.gguf", ("general.name", "a\x1b[2J\nboundary     layer 1", STRING))
    output = inspect(capsys, path)
    assert "model        a\\x1b[2J\\nboundary     layer 1 (llama" in output and "\x1b" not in output


def test_it_loads_neither_torch_nor_the_library(path):
    code = (
        "import sys; from pypop_gguf.cli import main; main(['inspect', sys.argv[1]]);"
        "sys.exit(bool({'torch', 'transformers', 'llama_cpp'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
