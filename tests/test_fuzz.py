"""A short seeded run of each fuzzer (fuzz/), and what the long ones have found."""

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
