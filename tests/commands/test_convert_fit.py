"""``pop-gguf convert --fit-kv``: the adapter that it writes beside the file, and which adapters it removes."""

import shutil
import subprocess
import sys

import gguf
import pytest

from pypop_gguf import PopLlama, cli
from pypop_gguf.gguf_files.adapters import find_adapters
from pypop_gguf.gguf_files.metadata import Curve, PopMetadata, read_metadata
from pypop_gguf.gguf_files.writer import copy_with_metadata
from tests.support.gguf_files import write_model
from tests.support.paths import BUNDLED


def convert(*arguments: object) -> int:
    return cli.main(["convert", *map(str, arguments), "--no-importance"])


def files_in(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("kind", ["hf-f16", "hf-q8_0", "gguf", "gguf-q4_k_m"])
def test_adapter_lies_beside_the_file_and_popllama_finds_it(bundled_gguf, short_texts, tmp_path, capsys, kind):
    source, _, outtype = kind.partition("-")
    options = ["--outtype", outtype] if outtype else []
    target = tmp_path / "out.gguf"
    model = BUNDLED if source == "hf" else bundled_gguf
    options += ["--boundary", 6, "--fit-kv", "--calibration", short_texts, "--outfile", target]
    assert convert(model, *options) == 0
    shown = capsys.readouterr().out
    assert files_in(tmp_path) == ["out.gguf", "out.pop-b6.gguf"]
    adapter = gguf.GGUFReader(tmp_path / "out.pop-b6.gguf")
    assert adapter.fields["pop.adapter.version"].contents() == 3
    assert adapter.fields["pop.boundary"].contents() == 6
    weights = {f"blk.{il}.{name}.weight" for il in range(7, 12) for name in ("attn_k", "attn_v")}
    below = {*(f"blk.{il}.attn_v.weight" for il in (0, 3, 4)), "blk.5.ffn_down.weight"}
    expected = {f"{name}{part}" for name in weights for part in ("", ".shift", ".further")}
    assert {tensor.name for tensor in adapter.tensors} == expected | {f"{name}.bottleneck" for name in below}
    metadata = read_metadata(target)
    assert (metadata.boundary, metadata.head) == (6, 1)
    llm = PopLlama(str(target), n_ctx=64, verbose=False)
    assert llm.pop.adapters == (6,)
    llm.close()
    [row] = [line.split() for line in shown.splitlines() if line.startswith("*")]
    boundary, plain, fitted = row[1], float(row[6]), float(row[7])
    assert boundary == "6" and fitted < plain
    assert "error of the fitted layers on texts held out" in shown
    assert f"adapter          {tmp_path / 'out.pop-b6.gguf'}" in shown
    assert shown.endswith(f"next             pop-gguf inspect {target}\n")


def test_fit_of_a_gguf_needs_no_torch(bundled_gguf, short_texts, tmp_path):
    code = (
        "import sys; from pypop_gguf.cli import main; status = main(['convert', *sys.argv[1:]]);"
        "sys.exit(status or bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    arguments = [
        bundled_gguf,
        "--boundary",
        "8",
        "--fit-kv",
        "--calibration",
        short_texts,
        "--outfile",
        tmp_path / "a.gguf",
    ]
    assert subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True).returncode == 0


def test_curve_that_was_measured_without_the_adapter_is_dropped(bundled_gguf, short_texts, tmp_path):
    source = tmp_path / "a.gguf"
    copy_with_metadata(bundled_gguf, source, PopMetadata(boundary=8, curve=Curve([8], [0.1], [0.1], [1.4], 9, "x")))
    assert convert(source, "--boundary", 8, "--fit-kv", "--calibration", short_texts, "--outfile", source) == 0
    assert read_metadata(source).curve is None


def test_file_that_replaces_another_models_removes_its_adapters(bundled_gguf, tmp_path):
    target = tmp_path / "a.gguf"
    kept = ["a.pop-b0.gguf", "a.pop-b06.gguf", "ab.pop-b6.gguf", "a.gguf.pop-b6.gguf", "b.pop-b6.gguf"]
    for name in ["a.gguf", "a.pop-b6.gguf", "a.pop-b10.gguf", *kept]:
        (tmp_path / name).write_bytes(b"another model's")
    assert convert(bundled_gguf, "--boundary", 6, "--outfile", target) == 0
    assert files_in(tmp_path) == sorted(["a.gguf", *kept])


@pytest.mark.parametrize("options", [[], ["--outtype", "q8_0"]], ids=["same type", "quantized"])
def test_model_that_is_converted_in_place_keeps_its_adapters(bundled_gguf, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    shutil.copy(bundled_gguf, "a.gguf")
    (tmp_path / "a.pop-b6.gguf").write_bytes(b"its own")
    assert convert("a.gguf", "--boundary", 8, *options, "--outfile", tmp_path / "a.gguf") == 0
    assert files_in(tmp_path) == ["a.gguf", "a.pop-b6.gguf"]


def test_adapters_are_found_by_their_name(tmp_path):
    model = tmp_path / "a[1]*.gguf"
    names = {10: "a[1]*.pop-b10.gguf", 6: "a[1]*.pop-b6.gguf"}
    for name in [*names.values(), "a1x.pop-b7.gguf", "a[1]*.pop-b99999999999.gguf", "a[1]*.pop-b-7.gguf"]:
        (tmp_path / name).touch()
    (tmp_path / "a[1]*.pop-b8.gguf").mkdir()
    assert find_adapters(model) == {boundary: tmp_path / names[boundary] for boundary in (6, 10)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--boundary", "11"], "boundary 11 leaves nothing to fit: give 1 to 10"),
        (["--prune-ratio", "0"], "boundary 12 leaves nothing to fit"),
        (["--boundary", "6", "--calibration", "few.txt"], "are too few to fit and to measure on: give at least 16"),
    ],
    ids=["lossless", "off", "few texts"],
)
def test_what_cannot_be_fitted_is_refused_in_one_line(bundled_gguf, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.txt").write_text("One short text.\n")
    assert convert(bundled_gguf, "--fit-kv", *options, "--outfile", "out.gguf") == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert files_in(tmp_path) == ["few.txt"]


@pytest.mark.parametrize(
    "command",
    [
        ["convert", "a.gguf", "--boundary", "2", "--no-importance", "--fit-kv"],
        ["prepare", "a.gguf"],
        ["eval", "a.gguf", "--recall", "2", "--context", "64"],
    ],
    ids=["convert", "prepare", "eval"],
)
def test_model_without_a_tokenizer_is_refused_in_one_line(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "a.gguf")
    assert cli.main(command) == 1
    assert "a.gguf has no tokenizer, so it reads no text" in capsys.readouterr().err.splitlines()[-1]
    assert files_in(tmp_path) == ["a.gguf"]
