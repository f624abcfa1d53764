"""tools/bench_call.py: it tells each part of a call and of a request, and errors are told in one line."""

import re
import subprocess
import sys

import pytest

from tests.support.paths import ROOT, STOCK

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the processor time of threads from Linux")


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.bench_call", *map(str, arguments), "--calls", "4", "--threads", "1"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_each_part_of_a_call_and_of_a_request_is_told(served_gguf):
    stock = ["--stock", STOCK] if (STOCK / "llama_cpp" / "lib").is_dir() else []
    done = run(served_gguf, "--boundary", 8, *stock)
    assert done.returncode == 0, done.stderr
    names, *parts = done.stdout.splitlines()
    assert names.split()[3:] == ["POP", "whole", *(["stock"] if stock else [])]
    rows = [[int(median) for median in re.findall(r"(\d+) \(", line)] for line in parts]
    before, after, graphs, first = rows[:4]
    assert len(before) == len(first) == 2 + bool(stock)
    assert all(0 < a + b < c for a, b, c in zip(before, after, first, strict=True))
    assert graphs[0] > 0 and graphs[1] > 0  # Every second prompt is longer, so no graph is used again.
    assert [line.split()[0] for line in parts[-2:]] == ["/completion", "/v1/chat/completions"]
    assert all(row[0] > 0 for row in rows[-2:])


def test_error_of_an_engine_is_told_in_one_line(served_gguf):
    done = run(served_gguf, "--boundary", 99)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("bench_call: error: the engine off has ended: ")
