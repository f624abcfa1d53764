"""``pop-gguf bench --advise``: what it tries, when it takes a change, and the arguments that it prints."""

import signal
import subprocess
import sys

import pytest

from pypop_gguf.bench import advise
from pypop_gguf.bench.advise import Choice, Trial
from pypop_gguf.cli import main
from pypop_gguf.terminal import available_cores, physical_cores

HALF = ["threads " + str(available_cores() // 2)] if available_cores() > 1 else []


def advised(capsys, model, *options: object) -> list[str]:
    """Returns the lines that the command prints."""
    assert main(["bench", str(model), "--advise", *map(str, options)]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("times_ms", "best_ms", "is_faster"),
    [
        ([99.0, 101.0, 100.0], [100.0, 102.0, 101.0], False),  # noise
        ([100.0, 100.0, 100.0], [100.0, 100.0, 100.0], False),
        ([90.0, 91.0, 92.0], [100.0, 101.0, 102.0], True),
        ([90.0, 91.0, 105.0], [100.0, 101.0, 102.0], False),  # one slow round: the gain is within the spread
        ([90.0, 91.0, 92.0], [100.0, 101.0, 120.0], False),
        ([110.0, 111.0, 112.0], [100.0, 101.0, 102.0], False),
    ],
)
def test_gain_counts_only_beyond_the_spread_of_the_rounds(times_ms, best_ms, is_faster):
    assert advise.is_faster(times_ms, best_ms) == is_faster
    assert Trial("threads", 1, times_ms, best_ms).is_taken == is_faster


def test_quantized_cache_is_never_taken():
    assert not Trial("cache_type", "Q8_0", [1.0, 1.0, 1.0], [9.0, 9.0, 9.0]).is_taken


def test_change_that_is_slower_in_two_rounds_is_given_up():
    trial = Trial("kernels", "off")
    for _ in advise._rounds(trial, 5):
        trial.times_ms.append(20.0)
        trial.best_ms.append(10.0)
    assert len(trial.times_ms) == 2


@pytest.mark.parametrize(
    ("n_prompt", "micro_batches"), [(100, []), (200, [128]), (512, [128, 256]), (700, [128, 256, 1024])]
)
def test_micro_batches_that_hold_the_whole_prompt_are_tried_once(n_prompt, micro_batches):
    changes = advise.list_changes(Choice(threads=1), n_prompt, None)
    assert [value for name, value in changes if name == "ubatch"] == micro_batches


@pytest.mark.parametrize(
    ("available", "n_physical", "threads"), [(1, 1, []), (2, 2, [1]), (8, 4, [4]), (12, 8, [8, 6]), (8, None, [4])]
)
def test_threads_are_never_more_than_the_available_cores(available, n_physical, threads):
    changes = advise.list_changes(Choice(threads=available), 512, n_physical)
    assert [value for name, value in changes if name == "threads"] == threads


def test_physical_cores_are_among_the_available_ones():
    assert physical_cores() is None or 1 <= physical_cores() <= available_cores()


@pytest.mark.parametrize(
    ("machine", "setting", "kernels"),
    [
        ("x86_64", None, "on"),
        ("x86_64", "off", "off"),
        ("x86_64", "avx2", "on"),
        ("aarch64", None, "off"),
        ("arm64", "on", "on"),
        ("aarch64", "off", "off"),
    ],
)
def test_search_starts_from_the_kernels_that_run(monkeypatch, machine, setting, kernels):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.delenv("POP_KERNELS", raising=False)
    if setting:
        monkeypatch.setenv("POP_KERNELS", setting)
    assert advise.default_choice().kernels == kernels


def test_arguments_are_those_that_python_and_the_commands_have():
    default = Choice(threads=8)
    assert advise.format_arguments(default, default, 8) == "the defaults are fastest here"
    changed = Choice(threads=4, ubatch=1024, flash_attn="off", kernels="off")
    assert (
        advise.format_arguments(changed, default, 8)
        == "PopLlama: n_threads_batch=4, n_batch=1024, n_ubatch=1024, flash_attn=False, pop_kernels=False; "
        "chat: --threads 4 --kernels off; serve: --kernels off "
        "--server-options --threads-batch 4 --batch-size 1024 --ubatch-size 1024 --flash-attn off"
    )
    assert (
        advise.format_arguments(Choice(threads=8, ubatch=256), default, 8)
        == "PopLlama: n_ubatch=256; chat: the defaults; serve: --server-options --ubatch-size 256"
    )


def test_popllama_is_told_of_cores_that_the_process_may_not_use():
    default = Choice(threads=8)
    line = advise.format_arguments(default, default, 16)
    assert line == "PopLlama: n_threads_batch=8; chat: the defaults; serve: the defaults"


def test_report_ends_with_one_line_of_arguments(served_gguf):
    command = [sys.executable, "-m", "pypop_gguf", "bench", served_gguf, "--advise", "--prompt", "150", "--runs", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "prompt of 150 tokens read by 8 of 12 layers" in lines[0]
    names = ["micro-batch 128", "flash attention off", "kernels off", "cache Q8_0"]
    table = [line.strip() for line in lines if line.strip().startswith(("threads", *names))]
    assert [next(name for name in [*HALF, *names] if row.startswith(name)) for row in table[-4:]] == names
    assert len(table) >= 4 + len(HALF)
    assert all(row.endswith(("taken", "no gain", "reported only")) for row in table)
    assert lines[-1] == "the defaults are fastest here" or lines[-1].startswith("PopLlama: ")
    assert "settings: " in done.stderr  # the progress


def test_search_goes_on_from_what_it_has_taken(served_gguf, capsys, monkeypatch):
    monkeypatch.delenv("POP_KERNELS", raising=False)
    monkeypatch.setattr(advise, "is_faster", lambda times_ms, best_ms: True)
    lines = advised(capsys, served_gguf, "--prompt", 150, "--runs", 3)
    threads = f"--threads {available_cores() // 2} " if HALF else ""
    assert f"; chat: {threads}--kernels off; serve: --kernels off --server-options " in lines[-1]
    assert lines[-1].endswith("--ubatch-size 128 --flash-attn off")
    # A quantized cache needs flash attention, which was taken away: this setting is reported as impossible.
    assert any(line.startswith("cache Q8_0 cannot run: engine pop: ") for line in lines)


def test_interrupted_search_ends_in_one_line(served_gguf):
    # The shell may have started the tests with Ctrl-C ignored, and children inherit that.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from pypop_gguf.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "bench", served_gguf, "--advise", "--prompt", "900", "--runs", "1000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert "settings: " in started and process.returncode == 130
    assert out == "" and err == "pop-gguf: interrupted; no file was left half-written\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "2"], "--threads does not go with --advise: leave it out"),
        (["--from-csv", "runs.csv"], "--from-csv does not go with --advise"),
        (["--json"], "--json does not go with --advise"),
        (["--prompt", "32,64"], "--advise takes one length of a prompt"),
        (["--runs", "2"], "--runs 2 is out of range"),
    ],
)
def test_bad_options_are_refused_in_one_line(served_gguf, capsys, options, message):
    assert main(["bench", str(served_gguf), "--advise", *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_bad_model_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "bad.gguf").write_bytes(b"no model")
    assert main(["bench", str(tmp_path / "bad.gguf"), "--advise"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "bad.gguf" in line
