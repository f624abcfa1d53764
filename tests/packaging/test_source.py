"""The pinned source: verified, patched whole or not at all, also from a tree that an offline build brings."""

import hashlib
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SDIST = ROOT / "build" / "sdist" / "llama-cpp-python.tar.gz"
MARK = "pop_rewrite_graph(params, *llm->res);"  # a call site of pop/0002


def fetch(target: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        ROOT / "third_party" / "fetch_source.py",
        target,
        "--cache",
        ROOT / "build" / "sdist",
        *arguments,
    ]
    return subprocess.run([*map(str, command)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The parts of the pinned source that the patches touch, as an offline user would have them unpacked."""
    base = tmp_path_factory.mktemp("offline")
    touched = set()
    for patch in (ROOT / "third_party" / "patches").glob("*/*.patch"):
        touched |= set(re.findall(r"^\+\+\+ b/(.+)$", patch.read_text(), re.MULTILINE))
    with tarfile.open(SDIST) as archive:
        members = [member for member in archive if member.name.partition("/vendor/llama.cpp/")[2] in touched]
        archive.extractall(base, members=members)
    assert len(members) == len(touched)
    return next(base.iterdir())


def test_cached_sdist_has_the_pinned_hash():
    pin = (ROOT / "third_party" / "llama-cpp-python.txt").read_text()
    assert hashlib.sha256(SDIST.read_bytes()).hexdigest() in pin


def test_tree_of_ones_own_is_patched_in_a_copy(tree, tmp_path):
    target = tmp_path / "source"
    done = fetch(target, "--source", tree)
    assert done.returncode == 0, done.stderr
    assert MARK in (target / "vendor/llama.cpp/src/llama-model.cpp").read_text()
    assert MARK not in (tree / "vendor/llama.cpp/src/llama-model.cpp").read_text()


def test_up_to_date_tree_is_left_alone_and_an_unstamped_one_replaced(tree, tmp_path):
    target = tmp_path / "source"
    fetch(target, "--source", tree)
    (target / "mine").touch()
    fetch(target, "--source", tree)
    assert (target / "mine").exists()
    (target / ".pop-stamp").unlink()
    fetch(target, "--source", tree)
    assert not (target / "mine").exists()


def test_source_that_the_series_does_not_fit_is_refused_with_the_patch(tree, tmp_path):
    fetch(tmp_path / "other", "--source", tree, "--pristine")
    file = tmp_path / "other/vendor/llama.cpp/src/llama-batch.cpp"
    file.write_text(file.read_text().replace("split_simple", "split_plain"))
    done = fetch(tmp_path / "source", "--source", tmp_path / "other")
    assert done.returncode != 0
    assert "pop/0001-batch-label.patch does not apply" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "source" / ".pop-stamp").exists()


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_source_that_is_none_is_refused_in_one_line(tmp_path, what):
    (tmp_path / "empty").mkdir()
    done = fetch(tmp_path / "source", "--source", tmp_path / what)
    assert done.returncode != 0
    assert len(done.stderr.strip().splitlines()) == 1 and str(tmp_path / what) in done.stderr
