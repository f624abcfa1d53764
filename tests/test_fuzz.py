"""A short seeded run of each fuzzer (fuzz/), and what the long ones have found."""

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_files import ARRAY, FLOAT32, STRING, UINT32, insert_raw_key, write_keys, write_model

from pypop_gguf import PopError, cli
from pypop_gguf.gguf_header import read_header
from pypop_gguf.metadata import read_metadata, trunk_layers
from pypop_gguf.tools import tasks
from pypop_gguf.tools.calibration import load_samples

FUZZ = Path(__file__).parents[1] / "fuzz"
VERSION_1 = ("pop.version", 1, UINT32)


def fuzz(name: str, cases: int, *arguments: object) -> dict[str, int]:
    """Runs a fuzzer with seed 0; the number of cases by outcome."""
    command = [sys.executable, FUZZ / f"{name}.py", "--cases", str(cases), "--seed", "0", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (report,) = re.findall(rf"^{cases} \w+ in .* a second: (.*)$", done.stdout, re.M)
    outcomes = {outcome: int(count) for count, outcome in re.findall(r"(\d+) ([^,]+)", report)}
    assert sum(outcomes.values()) == cases
    return outcomes


def test_metadata_of_any_file_is_valid_or_refused_in_one_line():
    outcomes = fuzz("metadata", 3000)
    assert all(outcomes[outcome] > 300 for outcome in ("valid", "refused", "damaged"))


def test_texts_of_any_bytes_are_read_or_refused_in_one_line():
    outcomes = fuzz("texts", 3000)
    assert outcomes["read"] > 300 and outcomes["refused"] > 300


# Found by fuzz/metadata.py


@pytest.mark.parametrize("key", ["pop.head", "pop.tail", "pop.min_tokens"])
def test_more_tokens_than_llama_cpp_can_count_are_refused(tmp_path, key):
    for count, fits in ((2**31 - 1, True), (2**31, False)):
        path = write_keys(tmp_path / "a.gguf", VERSION_1, (key, count, UINT32))
        if fits:
            assert getattr(read_metadata(path), key.removeprefix("pop.")) == count
        else:
            with pytest.raises(PopError, match=f"{key} is 2147483648, not at most 2147483647"):
                read_metadata(path)


def test_more_layers_than_llama_cpp_can_hold_are_refused(tmp_path):
    assert trunk_layers(read_header(write_keys(tmp_path / "a.gguf", n_layer=512))) == 512
    with pytest.raises(PopError, match="no usable block_count"):
        trunk_layers(read_header(write_keys(tmp_path / "b.gguf", n_layer=513)))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 6.5])
def test_number_of_layers_that_is_no_integer_is_refused(tmp_path, value):
    path = write_keys(tmp_path / "a.gguf", ("other.block_count", value, FLOAT32))
    path.write_bytes(path.read_bytes().replace(b"llama.block_count", b"llama.block_xxxxx").replace(b"other.block", b"llama.block"))
    with pytest.raises(PopError, match="no usable block_count"):
        trunk_layers(read_header(path))


def test_file_type_that_is_a_list_of_texts_is_shown_as_unknown(tmp_path, capsys):
    path = write_model(tmp_path / "a.gguf")
    insert_raw_key(path, "general.file_type", ARRAY, struct.pack("<IQ", STRING, 0))
    assert cli.main(["inspect", str(path)]) == 0
    assert "unknown type" in capsys.readouterr().out


# Found by fuzz/texts.py


class Words:
    """A tokenizer with a token for each character."""

    model_max_length = 512

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": list(text.encode())}


UNUSABLE = {"nested too deeply": "[" * 100_000, "a number too long": "9" * 5000, "half of a surrogate pair": '{"text": "\\ud83d long enough"}'}


@pytest.mark.parametrize(("reason", "line"), UNUSABLE.items(), ids=UNUSABLE)
def test_line_that_json_cannot_hold_is_left_out_with_its_reason(tmp_path, reason, line):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "long enough to be used"}}\n{line}\n')
    samples, info = load_samples(Words(), tmp_path / "a.jsonl")
    assert len(samples) == 1 and len(info.skipped) == 1
    assert info.skipped[0].startswith("line 2: ") and reason in info.skipped[0]


@pytest.mark.parametrize(
    "item",
    [
        {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "It is 2."}], "question": "1 + 1?"},
        {"text": "A text that has an answer beside it.", "answer": "2"},
    ],
    ids=["chat", "text"],
)
def test_question_beside_what_is_no_pair_is_not_asked(tmp_path, item):
    (tmp_path / "a.jsonl").write_text(json.dumps(item))
    task = tasks.of_file(Words(), tmp_path / "a.jsonl", max_samples=4, max_tokens=64, seed=0, run_code=False)
    assert len(task.samples) == 1 and task.questions == []
