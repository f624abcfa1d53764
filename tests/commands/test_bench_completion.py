"""tools/bench_completion.py: each way is measured in each round, values are kept, and errors are told in one line."""

import csv
import subprocess
import sys
from collections import Counter

from tests.support.paths import ROOT, STOCK

OPTIONS = ["--boundary", "8", "--prompt", "40", "--answer", "6", "--chunk", "16,64", "--rounds", "2", "--threads", "1"]


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.bench_completion", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_each_way_is_measured_in_each_round(served_gguf, tmp_path):
    stock = ["--stock", STOCK] if (STOCK / "llama_cpp" / "lib").is_dir() else []
    done = run(served_gguf, *OPTIONS, "--csv", tmp_path / "runs.csv", *stock)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    counts = Counter((row["way"], row["quantity"]) for row in rows)
    assert set(counts.values()) == {2}
    modes = [*(["stock"] if stock else []), "whole", "off", "idle", "answer"]
    chunks = ["chunks of 16", "chunks of 64"]
    tokens = [f"tokens {where} {way}" for way in chunks for where in ("behind", "in")]
    assert {way for way, _ in counts} == {*chunks, *tokens, *modes}
    values = {(row["way"], row["quantity"]): float(row["value"]) for row in rows}
    assert values["chunks of 16", "longest_chunk_ms"] < values["chunks of 16", "complete_ms"]
    assert [values[way, "whole_after"] for way in tokens] == [3, 3, 1, 1]
    assert values["idle", "incomplete"] == 45  # all that is cached: the last token of the answer is not
    assert values["idle", "complete_ms"] > 0 == values["whole", "complete_ms"]
    assert values["answer", "incomplete"] < 45
    assert all(values[mode, "first_ms"] < values[mode, "last_ms"] for mode in modes)
    assert "completed in chunks of 16" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()[-len(modes) :]] == modes


def test_patched_package_is_not_taken_for_stock(served_gguf, tmp_path):
    done = run(served_gguf, *OPTIONS, "--rounds", "1", "--stock", tmp_path)  # only ours is found
    assert done.returncode == 1 and "has POP: give --stock an unpatched one" in done.stderr.splitlines()[-1]


def test_error_of_an_engine_is_told_in_one_line(served_gguf):
    done = run(served_gguf, *OPTIONS, "--boundary", "99")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("bench_completion: error: the engine call has ended: ")
