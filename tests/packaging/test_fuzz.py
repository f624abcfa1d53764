"""Runs each fuzzer of fuzz/ for a short time with a fixed seed, and tests what long runs have found."""

import json
import os
import re
import struct
import subprocess
import sys

import gguf
import pytest

from pypop_gguf import PopError, PopLlama, cli, native
from pypop_gguf.gguf_files.header import read_header
from pypop_gguf.gguf_files.metadata import read_metadata, trunk_layers
from pypop_gguf.importance.calibration import load_samples
from pypop_gguf.quality import tasks
from tests.support.engine import Engine
from tests.support.gguf_files import ARRAY, FLOAT32, STRING, UINT32, insert_raw_key, write_keys, write_model
from tests.support.paths import ROOT

VERSION_1 = ("pop.version", 1, UINT32)


def fuzz(name: str, cases: int, *arguments: object, seed: int = 0) -> dict[str, int]:
    """Runs a fuzzer and returns the number of cases by outcome."""
    command = [sys.executable, "-m", f"fuzz.{name}", "--cases", str(cases), "--seed", str(seed), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report = re.findall(rf"^{cases} \w+ in .* a second: (.*)$", done.stdout, re.M)[-1]  # slow runs report on the way
    outcomes = {outcome: int(count) for count, outcome in re.findall(r"(\d+) ([^,]+)", report)}
    assert sum(outcomes.values()) == cases
    return outcomes


def test_metadata_of_any_file_is_valid_or_refused_in_one_line():
    outcomes = fuzz("metadata", 3000)
    assert all(outcomes[outcome] > 300 for outcome in ("valid", "refused", "damaged"))


def test_texts_of_any_bytes_are_read_or_refused_in_one_line():
    outcomes = fuzz("texts", 3000)
    assert outcomes["read"] > 300 and outcomes["refused"] > 300


def test_mixtures_of_sequences_equal_each_alone(reference_models):
    outcomes = fuzz("batches", 60, "--models", reference_models["llama"].gguf.parents[1])
    assert all(outcomes[name] > 0 for name in ("llama", "qwen3", "gemma3", "mixtral", "deepseek2", "lfm2"))


def test_completed_mixtures_of_sequences_equal_the_whole_model(reference_models):
    outcomes = fuzz("completions", 80, "--models", reference_models["llama"].gguf.parents[1])
    assert outcomes["completed"] > 5 and outcomes["stopped"] > 5


def test_native_library_reads_or_refuses_any_keys_and_adapters():
    outcomes = fuzz("native", 600)
    assert outcomes["accepted by both"] > 50 and outcomes["adapter refused"] > 50 and outcomes["adapter accepted"] > 50


def test_damaged_states_are_refused_or_load(reference_models):
    outcomes = fuzz("states", 300, "--models", reference_models["llama"].gguf.parents[1])
    assert outcomes["refused"] > 50 and outcomes["loaded"] > 50


def test_command_line_ends_in_one_line_for_any_arguments():
    outcomes = fuzz("arguments", 200)
    assert outcomes["inspect done"] > 3 and outcomes["eval refused"] > 3 and outcomes["boundary chosen"] > 5


def test_requests_end_in_time_and_the_server_goes_on(served_gguf):
    outcomes = fuzz("http_requests", 150, "--model", served_gguf)
    assert sum(n for outcome, n in outcomes.items() if outcome.endswith("2xx")) > 20 and outcomes.keys() >= {
        "/completion 4xx",
        "/completion 2xx",
    }


def test_requests_that_share_cached_tokens_are_answered_as_alone(served_gguf):
    outcomes = fuzz("http_requests", 25, "--caches", "--model", served_gguf)
    assert outcomes["cached and as alone"] + outcomes["as after its history"] > 5


# What fuzz/metadata.py has found


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
    path.write_bytes(
        path.read_bytes().replace(b"llama.block_count", b"llama.block_xxxxx").replace(b"other.block", b"llama.block")
    )
    with pytest.raises(PopError, match="no usable block_count"):
        trunk_layers(read_header(path))


def test_file_type_that_is_a_list_of_texts_is_shown_as_unknown(tmp_path, capsys):
    path = write_model(tmp_path / "a.gguf")
    insert_raw_key(path, "general.file_type", ARRAY, struct.pack("<IQ", STRING, 0))
    assert cli.main(["inspect", str(path)]) == 0
    assert "unknown type" in capsys.readouterr().out


# What fuzz/texts.py has found


class Words:
    """A tokenizer with a token for each byte."""

    model_max_length = 512

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": list(text.encode())}


UNUSABLE = {
    "nested too deeply": "[" * 100_000,
    "a number too long": "9" * 5000,
    "half of a surrogate pair": '{"text": "\\ud83d long enough"}',
}


@pytest.mark.parametrize(("reason", "line"), UNUSABLE.items(), ids=UNUSABLE)
def test_line_that_json_cannot_hold_is_left_out_with_its_reason(tmp_path, reason, line):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "long enough to be used"}}\n{line}\n')
    samples, info = load_samples(Words(), tmp_path / "a.jsonl")
    assert len(samples) == 1 and len(info.skipped) == 1
    assert info.skipped[0].startswith("line 2: ") and reason in info.skipped[0]


@pytest.mark.parametrize(
    "item",
    [
        {
            "messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "It is 2."}],
            "question": "1 + 1?",
        },
        {"text": "A text that has an answer beside it.", "answer": "2"},
    ],
    ids=["chat", "text"],
)
def test_question_beside_what_is_no_pair_is_not_asked(tmp_path, item):
    (tmp_path / "a.jsonl").write_text(json.dumps(item))
    task = tasks.read_task(Words(), tmp_path / "a.jsonl", max_samples=4, max_tokens=64, seed=0, run_code=False)
    assert len(task.samples) == 1 and task.questions == []


# What fuzz/batches.py, fuzz/native.py and fuzz/arguments.py have found


def in_a_process(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """Runs Python code in a process of its own, because it may abort. The code can import from the source tree."""
    command = [sys.executable, "-c", f"import sys\n{code}", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GGML_NO_BACKTRACE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_boundary_can_be_set_where_a_micro_batch_is_smaller_than_the_number_of_sequences(tmp_path):
    code = "from tests.support.engine import Engine\nwith Engine(sys.argv[1], 3, n_ubatch=2, n_seq_max=5): print('set')"
    done = in_a_process(code, write_model(tmp_path / "a.gguf"))
    assert (done.returncode, done.stdout) == (0, "set\n"), done.stderr[-500:]


@pytest.mark.parametrize("name", ["lfm2", "llama"])
def test_sequence_left_out_of_a_micro_batch_is_not_brought_in_by_a_later_token(reference_models, name):
    """Separate caches take sequences in the order of their ids.

    Here the first token of sequence 2 comes before that of sequence 1, and asks for logits as its second does not.
    """
    with Engine(reference_models[name].gguf, 3, n_seq_max=3, kv_unified=False) as engine:
        native.set_continuation(engine.context, False)  # as recurrent memories are read always
        engine.decode([(5, 0, 0, False), (6, 0, 1, False)])
        entries = [
            (7, 1, 0, False),
            (8, 0, 2, True),
            (9, 1, 1, False),
            (10, 1, 2, False),
            (11, 2, 2, True),
            (4, 2, 0, True),
            (5, 2, 1, True),
        ]
        assert sorted(engine.decode(entries)) == [1, 4, 5, 6]


@pytest.mark.parametrize("number", [61, 285])
def test_window_of_an_early_micro_batch_survives_the_preparation_of_later_ones(reference_models, number):
    """llama.cpp prepares all micro-batches before it runs the first, and did not restore what this had removed."""
    models = reference_models["gemma3"].gguf.parents[1]
    assert fuzz("batches", 1, "--first", number, "--models", models, seed=1) == {"gemma3": 1}


@pytest.mark.parametrize("key", ["general.type", "general.architecture", "adapter.type"])
def test_adapter_whose_texts_are_numbers_is_refused(tmp_path, key):
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", "llama")
    values = {"general.type": "adapter", "adapter.type": "pop"}
    for name, text in {**values, key: None}.items():
        if name == "general.architecture":
            continue
        writer.add_uint32(name, 1) if text is None else writer.add_string(name, text)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    if key == "general.architecture":
        raw = (tmp_path / "adapter.gguf").read_bytes()
        name = struct.pack("<Q", len(key)) + key.encode()
        text = name + struct.pack("<IQ", STRING, 5) + b"llama"
        (tmp_path / "adapter.gguf").write_bytes(raw.replace(text, name + struct.pack("<II", UINT32, 1)))
    code = """if True:
        from tests.support.engine import Engine
        from pypop_gguf import PopError, native
        with Engine(sys.argv[1]) as engine:
            try:
                native.load_adapter(engine.context, engine.model, sys.argv[2])
            except PopError as error:
                print(error)"""
    done = in_a_process(code, write_model(tmp_path / "a.gguf"), tmp_path / "adapter.gguf")
    assert done.returncode == 0 and f"its {key} is not of type str" in done.stdout, done.stderr[-500:]


def test_text_of_an_adapter_stays_within_the_line_of_its_refusal(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", "llama")
    writer.add_type("adapter\nof two lines")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with Engine(write_model(tmp_path / "a.gguf")) as engine, pytest.raises(PopError) as caught:
        native.load_adapter(engine.context, engine.model, tmp_path / "adapter.gguf")
    assert "of two lines" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("argument", ["pop_head", "pop_min_tokens", "pop_boundary"])
def test_argument_past_int32_is_refused(tmp_path, argument):
    with pytest.raises(PopError):
        PopLlama(str(write_model(tmp_path / "a.gguf")), n_ctx=32, verbose=False, **{argument: 2**40})


@pytest.mark.parametrize(
    "argv",
    [
        ["random-model", "llama-3.2-1b", ".", "--layers", "1"],
        ["random-model", "llama-3.2-1b", "out.gguf", "--layers", "99999999999999999999"],
        ["bench", "a.gguf", "--prompt", "4", "--decode", "1", "--csv", "a.gguf"],
        ["convert", "a.gguf", "--outfile", "b.gguf", "--boundary", "two\nlines"],
        ["inspect", "a\x1b[2J\u2028.gguf"],
    ],
    ids=["no name", "endless layers", "CSV that is none", "two lines in an argument", "control characters in a name"],
)
def test_command_ends_in_one_line(tmp_path, argv, monkeypatch, capfd):
    write_model(tmp_path / "a.gguf")
    monkeypatch.chdir(tmp_path)
    if "--layers" in argv:  # the command fills all memory that it can get
        code = """if True:
            from fuzz import harness
            harness.limit_memory(2048)
            from pypop_gguf import cli
            sys.exit(cli.main(sys.argv[1:]))"""
        done = in_a_process(code, *argv)
        assert done.returncode == 1 and "Traceback" not in done.stderr and "error: " in done.stderr
        return
    assert cli.main(argv) == 1
    said = capfd.readouterr().err
    line = said[said.index("pop-gguf: error: ") :]
    assert len(line.splitlines()) == 1 and "\x1b" not in line


def test_text_that_the_terminal_cannot_show_is_printed_all_the_same():
    command = [sys.executable, "-m", "pypop_gguf", "inspect", ROOT / "tests" / "golden" / "pop-v1.gguf"]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert done.returncode == 0 and "m?rchen.txt" in done.stdout, done.stderr
