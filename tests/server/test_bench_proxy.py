"""tools/bench_proxy.py: each case is measured in each round, and what is missing is told in one line."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pypop_gguf.terminal import available_cores
from tests.support.nginx import NGINX
from tests.support.paths import ROOT
from tools import bench_proxy

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gives each server a core, as Linux alone can")
SMALL = ["--prompt", 100, "--answer", 4, "--conversations", 20, "--clients", 3, "--rounds", 2]


def run(model: Path, *options: object, cores: set[int] | None = None) -> subprocess.CompletedProcess:
    command = list(map(str, [sys.executable, "-m", "tools.bench_proxy", model, *options]))
    restrict = (lambda: os.sched_setaffinity(0, cores)) if cores else None
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, preexec_fn=restrict)


@pytest.mark.skipif(not NGINX, reason="needs the program nginx")
@pytest.mark.skipif(available_cores() < 2, reason="needs two cores")
def test_each_case_is_measured_in_each_round(served_gguf, tmp_path):
    done = run(served_gguf, *SMALL, "--csv", tmp_path / "runs.csv")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == bench_proxy.COLUMNS
    cases = [(str(n), str(pop)) for n, pop in bench_proxy.CASES]
    assert [(row["servers"], row["pop"]) for row in rows] == cases + cases[::-1]
    for row in rows:
        assert 0 < float(row["first_median_ms"]) <= float(row["first_worst_ms"])
        most = int(row["most_conversations"])
        assert most == 20 if row["servers"] == "1" else 10 <= most < 20
    assert len(done.stdout.splitlines()) == 1 + len(cases) + 2


def test_one_core_is_refused_in_one_line(served_gguf):
    done = run(served_gguf, cores={min(os.sched_getaffinity(0))})
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "a core of its own" in done.stderr


@pytest.mark.skipif(available_cores() < 2, reason="needs two cores")
def test_missing_nginx_is_told_in_one_line(served_gguf, monkeypatch, capsys):
    monkeypatch.setattr(bench_proxy, "NGINX", None)
    monkeypatch.setattr(sys, "argv", ["bench_proxy", str(served_gguf)])
    assert bench_proxy.main() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "apt-get install nginx-light" in error


def test_no_round_is_refused_in_one_line(served_gguf):
    done = run(served_gguf, "--rounds", 0)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "--rounds 0" in done.stderr
