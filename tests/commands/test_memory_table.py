"""tools/memory_table.py: each engine is measured in each round, and POP adds no more memory than docs/speed.md says."""

import csv
import re
import statistics
import subprocess
import sys
from collections import Counter

from tests.support.paths import ROOT, STOCK
from tools.memory_table import COLUMNS

CONTEXTS, OPTIONS = (256, 512), ["--prompt", 200, "--runs", 3, "--loads", 1]


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.memory_table", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_pop_adds_no_more_memory_than_documented(served_gguf, tmp_path):
    stock = ["--stock", STOCK] if (STOCK / "llama_cpp" / "lib").is_dir() else []
    contexts = ["--context", ",".join(map(str, CONTEXTS)), "--parallel", "1,2"]
    done = run(served_gguf, "--boundary", 8, *contexts, *OPTIONS, "--csv", tmp_path / "runs.csv", *stock)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert list(rows[0]) == COLUMNS
    engines = [*(["stock"] if stock else []), "whole", "pop"]
    peaks: dict[tuple, list[int]] = {}
    for row in rows:
        if row["quantity"] == "peak_bytes":
            case = int(row["context"]), int(row["sequences"]), row["engine"]
            peaks.setdefault(case, []).append(int(row["value"]))
            assert int(row["prompt_tokens"]) == 200 // case[1]
    assert Counter(map(len, peaks.values())) == {3: len(CONTEXTS) * 2 * len(engines)}
    loads = Counter((row["engine"], row["quantity"]) for row in rows if row["quantity"] != "peak_bytes")
    assert loads == {(engine, quantity): 1 for engine in engines for quantity in ("import_ms", "load_ms")}

    text = " ".join((ROOT / "docs" / "speed.md").read_text().split())
    said = re.search(r"On the CPU, pruning adds less than (\d+) MiB", text)
    assert said, "docs/speed.md no longer says how much memory pruning adds on the CPU"
    for context in CONTEXTS:
        for n_sequences in (1, 2):
            pop, whole = (statistics.median(peaks[context, n_sequences, name]) for name in ("pop", "whole"))
            assert pop - whole < int(said[1]) * 2**20
            # Memory of this size exists: a process with a cache of F16 and the whole model holds more than both.
            assert whole > served_gguf.stat().st_size


def test_boundary_that_prunes_nothing_is_refused_in_one_line(served_gguf):
    done = run(served_gguf, "--boundary", 12, "--context", 256, "--parallel", 1, *OPTIONS)
    assert done.returncode == 1
    assert "no token was pruned at boundary 12: give a lower one" in done.stderr.splitlines()[-1]
