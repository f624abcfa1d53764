"""tools/bench_requests.py: it measures each request on both sides in each round, and tells errors in one line."""

import csv
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.support.paths import ROOT
from tools.bench_requests import COLUMNS

PARTS = {"chat": 5, "retrieval": 1, "code completion": 1, "tool call": 1, "eight clients": 8}


def run(model: Path, *options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.bench_requests", model, "--threads", 1, "--scale", 0.05, *options]
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)


def test_each_request_is_measured_on_both_sides(served_gguf, tmp_path):
    for _ in range(2):  # The second call appends to the file of the first.
        done = run(served_gguf, "--runs", 1, "--csv", tmp_path / "runs.csv")
        assert done.returncode == 0, done.stderr
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    counts = Counter((row["request"], row["pop"]) for row in rows)
    assert counts == {(name, pop): 2 * n for name, n in PARTS.items() for pop in ("True", "False")}
    for row in rows:
        assert 0 < float(row["first_ms"]) < float(row["last_ms"])
        # Everything but the tokens that came from the cache and the last one is pruned.
        n_read = int(row["prompt_tokens"]) - int(row["cached_tokens"])
        assert int(row["pruned_tokens"]) == (n_read - 1 if row["pop"] == "True" else 0)
        is_cold = row["request"] != "chat" or row["part"] == "1"
        assert (int(row["cached_tokens"]) == 0) == is_cold
    assert {(row["prompt_tokens"], row["answer_tokens"]) for row in rows if row["request"] == "retrieval"} == {
        ("100", "10")
    }
    turns = [f"chat, turn {part}" for part in range(1, 6)]
    names = [*turns, *list(PARTS)[1:]]
    lines = [line.strip() for line in done.stdout.splitlines()[1:]]
    assert all(line.startswith(name) for line, name in zip(lines, 2 * names, strict=True))


def test_model_without_a_boundary_is_refused_in_one_line(bundled_gguf):
    done = run(bundled_gguf)
    assert done.returncode == 1
    assert "prunes no prompt: make a copy with `pop-gguf prepare`" in done.stderr.splitlines()[-1]


def test_prompts_beyond_the_context_of_the_model_are_refused_in_one_line(served_gguf):
    done = run(served_gguf, "--scale", 2)
    assert done.returncode == 1 and "give a --scale below 1" in done.stderr.splitlines()[-1]


def test_bad_model_is_refused_in_one_line(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"no model")
    done = run(tmp_path / "bad.gguf")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "bad.gguf" in done.stderr
