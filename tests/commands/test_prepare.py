"""``pop-gguf prepare`` from a GGUF to a POP GGUF with its adapter, on the bundled model, and the inputs it refuses."""

import json
import re

import pytest

from pypop_gguf import PopLlama, cli
from pypop_gguf.fitting.texts import read_prompts
from pypop_gguf.gguf_files.metadata import read_metadata
from tests.support.gguf_files import raw_tensors


def prepare(*arguments: object) -> int:
    return cli.main(["prepare", *map(str, arguments), "--samples", "4", "--threads", "1"])


def test_it_writes_a_file_and_an_adapter_that_popllama_finds_and_that_cost_less(bundled_gguf, tmp_path, capsys):
    target = tmp_path / "out.gguf"
    assert prepare(bundled_gguf, "--boundary", 6, "--outfile", target) == 0
    table = capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "out.pop-b6.gguf"]
    metadata = read_metadata(target)
    assert metadata is not None and (metadata.boundary, metadata.head) == (6, 1)
    assert raw_tensors(target) == raw_tensors(bundled_gguf)
    llm = PopLlama(str(target), n_ctx=256, verbose=False)
    assert llm.pop.adapters == (6,)
    plain, fitted = map(float, re.search(r"\* +6 +50% +([\d.]+) +([\d.]+)", table).groups())
    assert fitted < plain
    assert f"next  pop-gguf chat {target}" in table


def test_model_itself_can_be_the_outfile_and_an_adapter_of_the_same_name_is_replaced(bundled_gguf, tmp_path):
    target = tmp_path / "model.gguf"
    target.write_bytes(bundled_gguf.read_bytes())
    (tmp_path / "model.pop-b8.gguf").write_bytes(b"an old one")
    assert prepare(target, "--boundary", 8, "--outfile", target) == 0
    assert PopLlama(str(target), n_ctx=256, verbose=False).pop.adapters == (8,)


def test_budget_that_no_boundary_keeps_shows_the_table_and_writes_nothing(bundled_gguf, tmp_path, capsys):
    assert prepare(bundled_gguf, "--max-kl", "0", "--outfile", tmp_path / "out.gguf") == 1
    shown = capsys.readouterr()
    assert "KL fitted" in shown.out and "no boundary keeps --max-kl 0" in shown.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_texts_of_ones_own_are_divided_into_those_fitted_on_and_those_measured_on(bundled_gguf, tmp_path):
    texts = tmp_path / "texts.jsonl"
    lines = [{"text": f"Once upon a time, child {i} went to the park and saw a big red ball."} for i in range(20)]
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    llm = PopLlama(str(bundled_gguf), pop=False, n_ctx=256, verbose=False)
    fitted_on, measured_on = read_prompts(llm, texts, 128)
    assert (len(fitted_on), len(measured_on)) == (15, 5)
    assert not {tuple(text) for text in fitted_on} & {tuple(text) for text in measured_on}


def test_bundled_prompts_to_fit_on_are_none_of_those_to_measure_on(bundled_gguf):
    llm = PopLlama(str(bundled_gguf), pop=False, n_ctx=256, verbose=False)
    fitted_on, measured_on = read_prompts(llm, None, 10**6)
    assert len(fitted_on) > 100 and len(measured_on) > 50
    assert not {tuple(text) for text in fitted_on} & {tuple(text) for text in measured_on}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--boundary", "11"], "leaves nothing to fit: give 1 to 10"),
        (["--boundary", "0"], "leaves nothing to fit: give 1 to 10"),
        (["--max-kl", "-1"], "--max-kl -1 is out of range"),
        (["--text", "few.txt"], "are too few to fit and to measure on: give at least 16"),
        (["--text", "missing.txt"], "cannot read missing.txt"),
    ],
    ids=["boundary above", "boundary below", "budget", "few texts", "no file"],
)
def test_bad_input_is_one_line_and_leaves_nothing(bundled_gguf, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.txt").write_text("One short text.\n")
    assert prepare(bundled_gguf, *arguments, "--outfile", "out.gguf") == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["few.txt"]


def test_split_model_is_prepared_in_place_alone(bundled_gguf, tmp_path, capsys):
    shard = tmp_path / "model-00001-of-00002.gguf"
    shard.write_bytes(bundled_gguf.read_bytes())
    assert prepare(shard, "--boundary", 8, "--outfile", tmp_path / "out.gguf") == 1
    assert f"give --outfile {shard}" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [shard]


def test_interrupted_run_leaves_nothing(bundled_gguf, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pypop_gguf.commands.prepare.write_copy", interrupt)
    assert prepare(bundled_gguf, "--boundary", 8, "--outfile", tmp_path / "out.gguf") == 130
    assert list(tmp_path.iterdir()) == []
