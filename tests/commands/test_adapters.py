"""``eval`` and ``tune`` measure with the adapters beside a model, and ``tune`` writes them beside another file."""

import json
import shutil
from pathlib import Path

import pytest

from pypop_gguf import PopLlama, cli
from pypop_gguf.gguf_files.metadata import read_metadata
from tests.support.gguf_files import write_model
from tests.support.scaled_adapter import write_scaled

STORY = "Once upon a time, there was a little girl named Lily. She had a red ball and a small dog. "


@pytest.fixture(scope="module")
def adapters(bundled_gguf, tmp_path_factory) -> dict[int, bytes]:
    """Adapters of three boundaries whose keys and values are 0, which changes every answer."""
    path = tmp_path_factory.mktemp("adapters") / "a.gguf"
    return {b: write_scaled(path, bundled_gguf, b, factor=0).read_bytes() for b in (6, 8, 10)}


@pytest.fixture
def directory(bundled_gguf, adapters, tmp_path, monkeypatch) -> Path:
    """The working directory, with a model, an adapter beside it for boundary 6, and a text."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(bundled_gguf, "model.gguf")
    Path("model.pop-b6.gguf").write_bytes(adapters[6])
    Path("text.txt").write_text(STORY * 6)
    return tmp_path


def measure(command: str, *options: object) -> int:
    text = ["text.txt"] if command == "eval" else ["--text", "text.txt", "--max-kl", "9"]
    common = ["--samples", "2", "--context", "64", "--threads", "1"]
    return cli.main([command, "model.gguf", *text, *common, *map(str, options)])


def measured_kl(capsys, command: str, *options: object) -> float:
    assert measure(command, "--boundary", 6, "--json", *options) == 0
    found = json.loads(capsys.readouterr().out)
    return (found["tasks"][0] if command == "eval" else found)["boundaries"][1]["kl"]["value"]


@pytest.mark.parametrize("command", ["eval", "tune"])
def test_adapters_beside_the_model_are_measured_unless_told_otherwise(directory, bundled_gguf, capsys, command):
    default, without = (measured_kl(capsys, command, *options) for options in ([], ["--no-adapter"]))
    named = write_scaled(directory / "other.gguf", bundled_gguf, 6)
    own = measured_kl(capsys, command, "--adapter", named)
    assert default > 2 * without
    assert own == pytest.approx(without, rel=0.05)  # The model's own weights, rounded to Q8_0.
    assert measure(command, "--boundary", "6,8") == 0
    rows = [line.replace("*", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert [row[1] for row in rows if row[:1] == ["6"]] == ["(fitted)"]
    assert ["(fitted)"] not in [row[1:2] for row in rows if row[:1] == ["8"]]


@pytest.mark.parametrize("command", ["eval", "tune"])
def test_adapter_beside_the_model_that_cannot_be_used_ends_in_one_line(directory, adapters, capsys, command):
    beside = directory / "model.pop-b6.gguf"

    def refusal() -> str:
        assert measure(command, "--boundary", 6) == 1
        [line] = capsys.readouterr().err.splitlines()
        return line

    beside.write_bytes(adapters[6][:-100])
    assert "model.pop-b6.gguf" in refusal() and measure(command, "--boundary", 8) == 0  # It is not read for 8.
    capsys.readouterr()
    beside.write_bytes(adapters[8])
    assert "was fitted for another boundary than its name says" in refusal()
    raw = bytearray(adapters[6])
    at = raw.index(b"pop.fingerprint") + len(b"pop.fingerprint") + 12
    raw[at : at + 16] = b"0" * 16
    beside.write_bytes(raw)
    assert "model.pop-b6.gguf: it was fitted for another model" in refusal()
    assert measure(command, "--boundary", 6, "--no-adapter") == 0


def test_adapter_and_no_adapter_exclude_each_other(directory, capsys):
    with pytest.raises(SystemExit):
        measure("eval", "--no-adapter", "--adapter", "model.pop-b6.gguf")
    assert "not allowed with" in capsys.readouterr().err


def test_tune_carries_the_adapters_to_another_name_and_removes_what_stood_there(directory, adapters):
    Path("model.pop-b10.gguf").write_bytes(adapters[10])
    for name in ("other.gguf", "other.pop-b6.gguf", "other.pop-b9.gguf", "other-b.pop-b9.gguf"):
        Path(name).write_bytes(b"another model's")
    assert measure("tune", "--boundary", "6,8", "--outfile", "other.gguf") == 0
    here = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert here["other.pop-b6.gguf"] == here["model.pop-b6.gguf"] == adapters[6]
    assert here["other.pop-b10.gguf"] == here["model.pop-b10.gguf"] == adapters[10]
    assert "other.pop-b9.gguf" not in here and "other-b.pop-b9.gguf" in here
    assert not [name for name in here if ".part" in name]
    assert read_metadata(Path("other.gguf")).boundary == 6
    llm = PopLlama("other.gguf", n_ctx=64, verbose=False)
    assert llm.pop.adapters == (6,)
    llm.close()


@pytest.mark.parametrize(
    ("options", "carried"),
    [(["--no-adapter"], []), (["--adapter", "named.gguf"], ["other.pop-b8.gguf"])],
    ids=["none", "named"],
)
def test_tune_carries_what_the_curve_was_measured_with(directory, adapters, options, carried):
    Path("named.gguf").write_bytes(adapters[8])
    assert measure("tune", "--boundary", "6,8", "--outfile", "other.gguf", *options) == 0
    assert [path.name for path in directory.glob("other.pop-*")] == carried


def test_tune_in_place_keeps_the_adapters(directory, adapters):
    assert measure("tune", "--boundary", "6,8", "--outfile", directory / "model.gguf") == 0
    assert {path.name for path in directory.iterdir()} == {"model.gguf", "model.pop-b6.gguf", "text.txt"}
    assert Path("model.pop-b6.gguf").read_bytes() == adapters[6]


def test_tune_that_cannot_copy_an_adapter_leaves_the_old_files(directory, monkeypatch, capsys):
    write_model(directory / "other.gguf")
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pypop_gguf.gguf_files.adapters.shutil.copyfile", fail)
    assert measure("tune", "--boundary", "6", "--outfile", "other.gguf") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "cannot copy model.pop-b6.gguf beside other.gguf: No space left on device" in line
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
