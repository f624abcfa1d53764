"""``pop-gguf convert`` from Hugging Face models and GGUFs to several types: what the files say and who can run them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from pypop_gguf import PopLlama, cli
from pypop_gguf.boundary_rules import skipped_share
from pypop_gguf.gguf_files import quantize
from pypop_gguf.gguf_files.metadata import PopMetadata, read_metadata
from pypop_gguf.gguf_files.writer import copy_with_metadata
from tests.support.gguf_files import ARRAY, INT32, STRING, UINT32, raw_tensors, write_model
from tests.support.paths import ROOT

BUNDLED = ROOT / "models" / "lab-llama-12l"
PROMPT = "Once upon a time there was a little fox who lived near the river. One day the fox found a map. " * 4
FEW_SAMPLES = ["--calibration-samples", "4", "--calibration-tokens", "64"]

STOCK_CODE = """
import json, sys
import llama_cpp

assert not hasattr(llama_cpp.llama_cpp._lib, "llama_pop_set_boundary")
texts = {}
for path in sys.argv[2:]:
    llm = llama_cpp.Llama(path, n_ctx=256, verbose=False)
    texts[path] = llm.create_completion(sys.argv[1], max_tokens=16, temperature=0)["choices"][0]["text"]
print(json.dumps(texts))
"""


def convert(*arguments: object) -> None:
    assert cli.main(["convert", *map(str, arguments)]) == 0


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Lets torch use one thread: on a model this small, several threads only wait for each other."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def converted(bundled_gguf, tmp_path_factory) -> dict[str, Path]:
    """Converts the bundled model from both kinds of source to three types; two of the files have importance."""
    base = tmp_path_factory.mktemp("converted")
    runs = {
        "hf-f16": [BUNDLED, "--outtype", "f16", *FEW_SAMPLES],  # with importance
        "hf-q8_0": [BUNDLED, "--outtype", "q8_0", "--no-importance"],
        "hf-q4_k_m": [BUNDLED, "--outtype", "q4_k_m", "--no-importance"],
        "gguf-f16": [bundled_gguf],
        "gguf-q8_0": [bundled_gguf, "--outtype", "q8_0"],
        "gguf-q4_k_m": [bundled_gguf, "--outtype", "q4_k_m", *FEW_SAMPLES, "--importance"],
    }
    for name, arguments in runs.items():
        convert(*arguments, "--outfile", base / f"{name}.gguf")
    return {name: base / f"{name}.gguf" for name in runs}


@pytest.fixture(scope="module")
def stock_texts(converted, stock) -> dict[str, str]:
    return stock(STOCK_CODE, PROMPT, *converted.values())


NAMES = ["hf-f16", "hf-q8_0", "hf-q4_k_m", "gguf-f16", "gguf-q8_0", "gguf-q4_k_m"]


@pytest.mark.parametrize("name", NAMES)
def test_result_answers_with_the_boundary_of_the_file(converted, name):
    llm = PopLlama(str(converted[name]), n_ctx=256, verbose=False)
    assert (llm.pop.enabled, llm.pop.boundary, llm.pop.source) == (True, 8, "file")
    text = llm.create_completion(PROMPT, max_tokens=16, temperature=0)["choices"][0]["text"]
    assert text.strip()
    assert llm.timings.pruned_tokens == llm.timings.prompt_tokens - 1


@pytest.mark.parametrize("name", NAMES)
def test_stock_engine_runs_the_result_unpruned(converted, stock_texts, name):
    llm = PopLlama(str(converted[name]), pop=False, n_ctx=256, verbose=False)
    text = llm.create_completion(PROMPT, max_tokens=16, temperature=0)["choices"][0]["text"]
    assert stock_texts[str(converted[name])] == text


@pytest.mark.parametrize("name", NAMES)
def test_result_has_the_type_that_was_asked_for(converted, name):
    reader = gguf.GGUFReader(converted[name])
    weight = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_gate.weight")
    # Rows of 192 numbers fit no block of 256, so llama.cpp takes q5_0 instead of q4_k.
    assert weight.tensor_type.name == {"f16": "F16", "q8_0": "Q8_0", "q4_k_m": "Q5_0"}[name.split("-")[1]]
    assert reader.get_field("general.architecture").contents() == "llama"
    assert len(reader.tensors) == 110


def test_both_sources_give_the_same_tensors(converted):
    assert raw_tensors(converted["hf-f16"]) == raw_tensors(converted["gguf-f16"])


@pytest.mark.parametrize("name", ["hf-f16", "gguf-q4_k_m"])
def test_importance_has_a_score_for_each_layer(converted, name):
    metadata = read_metadata(converted[name])
    for scores in (metadata.importance_prefill, metadata.importance_decode):
        assert scores.shape == (12,) and (scores[:-1] > 0).all()
    assert metadata.importance_prefill[-1] == 0  # Nothing reads what a prompt token computes in the last layer.
    assert metadata.importance_decode[-1] > 0


def test_calibration_is_on_record(converted):
    metadata = read_metadata(converted["hf-f16"])
    assert (metadata.calibration_source, metadata.calibration_samples, metadata.calibration_seed) == ("bundled", 4, 0)
    assert 4 * 8 <= metadata.calibration_tokens <= 4 * 64
    assert re.fullmatch("[0-9a-f]{64}", metadata.calibration_sha256)


def test_without_importance_only_the_boundary_is_written(converted):
    keys = [key for key in gguf.GGUFReader(converted["gguf-f16"]).fields if key.startswith("pop.")]
    assert keys == ["pop.version", "pop.boundary"]


def scores(path: Path) -> np.ndarray:
    metadata = read_metadata(path)
    return np.stack([metadata.importance_prefill, metadata.importance_decode])


def test_same_seed_gives_the_same_scores_and_another_seed_others(bundled_gguf, tmp_path):
    for name, seed in {"a": 3, "b": 3, "c": 4}.items():
        convert(bundled_gguf, "--importance", *FEW_SAMPLES, "--seed", seed, "--outfile", tmp_path / f"{name}.gguf")
    np.testing.assert_array_equal(scores(tmp_path / "a.gguf"), scores(tmp_path / "b.gguf"))
    assert (scores(tmp_path / "a.gguf") != scores(tmp_path / "c.gguf")).any()
    assert [read_metadata(tmp_path / f"{name}.gguf").calibration_seed for name in "ac"] == [3, 4]


def test_own_calibration_file_is_named_and_max_importance_loss_kept(bundled_gguf, tmp_path, capsys):
    texts = tmp_path / "prose.txt"
    texts.write_text("The fox lived near the river and every day it went to look for the old map. " * 40)
    target = tmp_path / "a.gguf"
    convert(bundled_gguf, "--calibration", texts, *FEW_SAMPLES, "--max-importance-loss", "0.2", "--outfile", target)
    metadata = read_metadata(target)
    assert metadata.calibration_source == "prose.txt"
    share = skipped_share(metadata.importance_prefill, metadata.boundary)
    assert share <= 0.2 < skipped_share(metadata.importance_prefill, metadata.boundary - 1)
    assert f"importance lost  {share:.1%} of prefill importance lies in the skipped layers" in capsys.readouterr().out


def test_importance_that_is_estimated_anew_keeps_the_other_keys(bundled_gguf, tmp_path):
    stored = PopMetadata(boundary=8, head=1, tail=3, min_tokens=24)
    copy_with_metadata(bundled_gguf, tmp_path / "a.gguf", stored)
    convert(tmp_path / "a.gguf", "--importance", *FEW_SAMPLES, "--outfile", tmp_path / "b.gguf")
    metadata = read_metadata(tmp_path / "b.gguf")
    assert metadata.importance_prefill is not None
    assert (metadata.head, metadata.tail, metadata.min_tokens) == (1, 3, 24)


@pytest.mark.parametrize(
    ("option", "boundary"),
    [
        (["--boundary", "5"], 5),
        (["--boundary", "lossless"], 11),
        (["--prune-ratio", "0.5"], 6),
        (["--prune-ratio", "0"], 12),
    ],
)
def test_boundary_options_reach_the_file(bundled_gguf, tmp_path, capsys, option, boundary):
    convert(bundled_gguf, *option, "--outfile", tmp_path / "a.gguf")
    assert read_metadata(tmp_path / "a.gguf").boundary == boundary
    output = capsys.readouterr().out
    assert f"layer {boundary} of 12: prefill skips {12 - boundary} ({' '.join(option)})" in output
    assert "unknown, because importance was not estimated" in output


def test_default_name_stands_beside_a_gguf(tmp_path):
    source = write_model(tmp_path / "tiny.gguf")
    convert(source)
    convert(source, "--outtype", "q8_0")
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", "tiny-pop.gguf", "tiny-q8_0.gguf"}


def test_outfile_may_be_a_directory_or_name_the_type(tmp_path):
    source = write_model(tmp_path / "tiny.gguf")
    (tmp_path / "out").mkdir()
    convert(source, "--outfile", tmp_path / "out")
    convert(source, "--outtype", "q8_0", "--outfile", tmp_path / "out" / "x-{ftype}.gguf")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tiny-pop.gguf", "x-q8_0.gguf"}


def test_gguf_can_be_converted_in_place(bundled_gguf, tmp_path):
    path = shutil.copy(bundled_gguf, tmp_path / "a.gguf")
    convert(path, "--outfile", path)
    assert read_metadata(path).boundary == 8
    convert(path, "--boundary", "6", "--outtype", "q8_0", "--outfile", path)
    assert read_metadata(path).boundary == 6
    assert [file.name for file in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize(
    "keys",
    [
        [("pop.version", 99, UINT32), ("pop.boundary", 4, UINT32)],
        [("pop.boundary", "4", STRING)],
        [("pop.version", 1, UINT32), ("pop.importance.prefill", [1, 2], ARRAY, INT32)],
    ],
    ids=["later version", "no version", "bad scores"],
)
def test_bad_pop_keys_are_replaced_by_good_ones(tmp_path, keys):
    source = write_model(tmp_path / "bad.gguf", *keys)
    convert(source, "--boundary", "2", "--outfile", tmp_path / "good.gguf")
    metadata = read_metadata(tmp_path / "good.gguf")
    assert metadata.boundary == 2 and metadata.importance_prefill is None


def test_quantizing_with_llama_cpp_keeps_the_keys(converted, tmp_path):
    quantize.quantize(converted["hf-f16"], tmp_path / "a.gguf", "q8_0")
    assert read_metadata(tmp_path / "a.gguf").boundary == 8
    np.testing.assert_array_equal(scores(tmp_path / "a.gguf"), scores(converted["hf-f16"]))


def test_both_command_lines_convert(tmp_path):
    source = write_model(tmp_path / "tiny.gguf")
    for i, command in enumerate((["-m", "pypop_gguf", "convert"], [ROOT / "tools" / "convert.py"])):
        target = tmp_path / f"{i}.gguf"
        done = subprocess.run(
            [sys.executable, *command, source, "--outfile", target], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith(f"next             pop-gguf inspect {target}\n")
        assert read_metadata(target).boundary == 4


def test_gguf_with_a_given_boundary_needs_no_torch(tmp_path):
    source = write_model(tmp_path / "tiny.gguf")
    code = (
        "import sys; from pypop_gguf.cli import main; status = main(['convert', *sys.argv[1:]]);"
        "sys.exit(status or bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    command = [
        sys.executable,
        "-c",
        code,
        source,
        "--boundary",
        "3",
        "--no-importance",
        "--outfile",
        tmp_path / "a.gguf",
    ]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_help_names_every_choice_of_the_boundary(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["convert", "--help"])
    assert caught.value.code == 0
    output = capsys.readouterr().out
    assert all(option in output for option in ("--prune-ratio", "--boundary", "--max-importance-loss", "lossless"))


def test_another_boundary_for_a_converted_gguf_keeps_its_importance(converted, tmp_path):
    again = tmp_path / "again.gguf"
    convert(converted["hf-f16"], "--boundary", "9", "--outfile", again)
    before, after = read_metadata(converted["hf-f16"]), read_metadata(again)
    assert (before.boundary, after.boundary) == (8, 9)
    assert np.array_equal(before.importance_prefill, after.importance_prefill)
    assert after.calibration_sha256 == before.calibration_sha256
