"""``pop-gguf prepare`` from a GGUF to a POP GGUF with its adapter, on the bundled model, and the inputs it refuses."""

import json
import pkgutil
import re
import subprocess
import sys
from importlib.resources import files

import gguf
import pytest

from pypop_gguf import PopLlama, cli
from pypop_gguf.commands.prepare import prepared
from pypop_gguf.fitting.texts import read_prompts
from pypop_gguf.gguf_files.adapters import find_adapters
from pypop_gguf.gguf_files.metadata import read_metadata
from tests.support.gguf_files import raw_tensors, write_model
from tests.support.paths import ROOT


@pytest.fixture
def prepare(short_texts):
    """The command with few short texts, unless others are given."""

    def run(*arguments: object) -> int:
        texts = [] if "--text" in arguments else ["--text", str(short_texts)]
        return cli.main(["prepare", *map(str, arguments), *texts, "--samples", "4", "--threads", "1"])

    return run


def test_it_writes_a_file_and_an_adapter_that_cost_less(prepare, bundled_gguf, tmp_path, capsys):
    target = tmp_path / "out.gguf"
    assert prepare(bundled_gguf, "--boundary", 6, "--outfile", target) == 0
    table = capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "out.pop-b6.gguf"]
    metadata = read_metadata(target)
    assert metadata is not None and (metadata.boundary, metadata.head) == (6, 1)
    assert raw_tensors(target) == raw_tensors(bundled_gguf)
    llm = PopLlama(str(target), n_ctx=256, verbose=False)
    assert llm.pop.adapters == (6,)
    plain, fitted = map(float, re.search(r"\* +6 of 12 +50% +[\d.]+ +([\d.]+) +([\d.]+)", table).groups())
    assert fitted < plain
    layers = re.findall(r"^ +(\d+)  ([\d.]+) -> ([\d.]+)  ([\d.]+) -> ([\d.]+)$", table, re.MULTILINE)
    assert [int(layer) for layer, *_ in layers] == list(range(7, 12))
    for _, *errors in layers:
        keys_before, keys_after, values_before, values_after = map(float, errors)
        assert 0 < keys_after < keys_before and 0 < values_after < values_before
    assert f"next  pop-gguf chat {target}" in table


def test_tail_is_measured_and_written(prepare, bundled_gguf, tmp_path, capsys):
    def costs(source, *options) -> list[float]:
        assert prepare(source, "--boundary", 6, *options, "--outfile", tmp_path / "out.gguf") == 0
        row = re.search(r"\* +6 of 12 +50% +([\d.]+) +([\d.]+) +([\d.]+)", capsys.readouterr().out)
        return [float(value) for value in row.groups()]

    without, with_tail = costs(bundled_gguf), costs(bundled_gguf, "--tail", 24)
    assert all(0 < some < more for some, more in zip(with_tail, without, strict=True))
    metadata = read_metadata(tmp_path / "out.gguf")
    assert metadata is not None and metadata.tail == 24
    assert PopLlama(str(tmp_path / "out.gguf"), n_ctx=256, verbose=False).pop.tail == 24
    assert costs(tmp_path / "out.gguf") == with_tail  # The tail of the file counts where none is given.
    # A tail that is longer than all prompts leaves nothing to prune.
    limit, *without_pruning = costs(bundled_gguf, "--tail", 600)
    assert 0.9 < limit <= 1 and without_pruning == [0, 0]


def test_importance_of_the_layers_is_added_where_transformers_can_unpack_the_file(prepare, bundled_gguf, tmp_path):
    target = tmp_path / "out.gguf"
    assert prepare(bundled_gguf, "--boundary", 8, "--importance", "--outfile", target) == 0
    metadata = read_metadata(target)
    assert metadata is not None and metadata.boundary == 8 and metadata.calibration_samples == 30
    assert len(metadata.importance_prefill) == len(metadata.importance_decode) == 12
    assert min(metadata.importance_prefill[:-1]) > 0  # No later layer reads what prompt tokens make of the last one.


def test_model_itself_can_be_the_outfile_and_its_old_adapters_are_replaced(prepare, bundled_gguf, tmp_path):
    target = tmp_path / "model.gguf"
    target.write_bytes(bundled_gguf.read_bytes())
    for name in ("model.pop-b8.gguf", "model.pop-b6.gguf", "model-b.pop-b6.gguf"):
        (tmp_path / name).write_bytes(b"an old one")
    assert prepare(target, "--boundary", 8, "--outfile", target) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "model.pop-b8.gguf", "model-b.pop-b6.gguf"}
    assert PopLlama(str(target), n_ctx=256, verbose=False).pop.adapters == (8,)


def test_budget_that_no_boundary_keeps_shows_the_table_and_writes_nothing(prepare, bundled_gguf, tmp_path, capsys):
    assert prepare(bundled_gguf, "--max-kl", "0", "--outfile", tmp_path / "out.gguf") == 1
    shown = capsys.readouterr()
    assert "KL fitted" in shown.out and "no boundary costs at most 0: the best is" in shown.err.splitlines()[-1]
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


def test_bundled_prompts_hold_no_sentence_that_real_models_are_measured_on():
    [number_to_recall] = re.findall(r'f"(The secret number of )', (ROOT / "tools" / "real_quality.py").read_text())
    for name in ("fit.jsonl", "measure.jsonl"):
        assert number_to_recall not in (files("pypop_gguf.fitting") / "data" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--boundary", "11"], "leaves nothing to fit: give 1 to 10"),
        (["--boundary", "0"], "leaves nothing to fit: give 1 to 10"),
        (["--tail", "0"], "--tail 0 is out of range"),
        (["--max-kl", "-1"], "--max-kl -1 is out of range"),
        (["--text", "few.txt"], "are too few to fit and to measure on: give at least 16"),
        (["--text", "missing.txt"], "cannot read missing.txt"),
    ],
    ids=["above", "below", "tail", "budget", "few texts", "no file"],
)
def test_bad_input_is_one_line(prepare, bundled_gguf, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.txt").write_text("One short text.\n")
    assert prepare(bundled_gguf, *arguments, "--outfile", "out.gguf") == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["few.txt"]


def test_split_model_is_prepared_in_place_alone(prepare, bundled_gguf, tmp_path, capsys):
    shard = tmp_path / "model-00001-of-00002.gguf"
    shard.write_bytes(bundled_gguf.read_bytes())
    assert prepare(shard, "--boundary", 8, "--outfile", tmp_path / "out.gguf") == 1
    assert f"--outfile {shard}" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [shard]


STAGES = [
    "pypop_gguf.commands.prepare.read_prompts",
    "pypop_gguf.fitting.steps.fit",
    "pypop_gguf.fitting.steps.measure",
    "pypop_gguf.commands.prepare.write_copy",
    "pypop_gguf.commands.prepare.replace_together",
]


@pytest.mark.parametrize("stage", STAGES)
def test_interrupted_run_leaves_nothing(prepare, bundled_gguf, tmp_path, monkeypatch, stage):
    """Ctrl-C comes at the end of a stage, when its files are written, and before the last one."""
    whole = pkgutil.resolve_name(stage)

    def interrupt(*arguments, **options):
        if not stage.endswith("replace_together"):
            whole(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, interrupt)
    assert prepare(bundled_gguf, "--boundary", 8, "--outfile", tmp_path / "out.gguf") == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tensor", ["blk.9.attn_v.weight", "blk.3.ffn_down.weight", "output_norm.weight"])
def test_damaged_file_is_refused_in_one_line(prepare, bundled_gguf, tmp_path, capsys, tensor):
    """A weight is not a number: one that is fitted, one below the boundary, and one that only the answer passes."""
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(bundled_gguf.read_bytes())
    found = next(one for one in gguf.GGUFReader(damaged).tensors if one.name == tensor)
    with damaged.open("r+b") as file:
        file.seek(found.data_offset)
        file.write(b"\xff" * 64)
    assert prepare(damaged, "--boundary", 8, "--outfile", tmp_path / "out.gguf") == 1
    assert "the file is damaged" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == [damaged]


def test_text_in_a_language_that_the_model_does_not_know_is_told(bundled_gguf, tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    lines = [{"text": f"第{i}个孩子去公园，看见一个红色的大球。"} for i in range(20)]
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    llm = PopLlama(str(bundled_gguf), pop=False, n_ctx=256, verbose=False)
    read_prompts(llm, texts, 128)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "hardly knows its language" in line]
    assert "tokens for each letter" in line


def test_model_that_cannot_be_pruned_is_refused(prepare, tmp_path, capsys):
    model = write_model(tmp_path / "model.gguf", architecture="bert")
    assert prepare(model) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [model]


def test_chat_prepares_once_and_keeps_the_file(bundled_gguf, tmp_path):
    model = tmp_path / "model.gguf"
    model.write_bytes(bundled_gguf.read_bytes())
    command = [sys.executable, "-m", "pypop_gguf", "chat", model, "--prepare", "--max-tokens", "4", "--threads", "1"]
    first, second = (
        subprocess.run(command, input="Once upon a time", capture_output=True, text=True) for _ in range(2)
    )
    assert first.returncode == second.returncode == 0, first.stderr
    assert "KL fitted" in first.stderr and "KL fitted" not in first.stdout + second.stdout + second.stderr
    metadata = read_metadata(tmp_path / "model-pop.gguf")
    assert metadata is not None and metadata.boundary in find_adapters(tmp_path / "model-pop.gguf")
    assert prepared(tmp_path / "model-pop.gguf", 1) == tmp_path / "model-pop.gguf"
