"""Moving the pin: hunks that stand elsewhere are found, and what no longer applies is named with its patch, file and line."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SDIST = ROOT / "build" / "sdist" / "llama-cpp-python.tar.gz"
BATCH = Path("vendor/llama.cpp/src/llama-batch.cpp")  # patch 0001 changes it, in several places
SERIES = [name for name in (ROOT / "third_party" / "patches" / "series").read_text().split() if name.endswith(".patch")]


@pytest.fixture(scope="module")
def pinned(tmp_path_factory) -> Path:
    """What the patches touch of the pinned source, and where its version stands."""
    base = tmp_path_factory.mktemp("pinned")
    touched = set()
    for patch in (ROOT / "third_party" / "patches").glob("*.patch"):
        touched |= set(re.findall(r"^\+\+\+ b/(.+)$", patch.read_text(), re.MULTILINE))
    with tarfile.open(SDIST) as archive:
        wanted = [
            m
            for m in archive
            if m.name.partition("/vendor/llama.cpp/")[2] in touched or m.name.endswith("/llama_cpp/__init__.py")
        ]
        archive.extractall(base, members=wanted)
    return next(base.iterdir())


@pytest.fixture
def source(pinned, tmp_path) -> Path:
    return Path(shutil.copytree(pinned, tmp_path / "source"))


@pytest.fixture
def move_pin(tmp_path):
    """Runs the tool in a copy of third_party, which it may change."""
    copy = Path(
        shutil.copytree(
            ROOT / "third_party", tmp_path / "tree" / "third_party", ignore=shutil.ignore_patterns("__pycache__")
        )
    )

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, copy / "move_pin.py", *arguments]
        return subprocess.run([*map(str, command)], capture_output=True, text=True, env={**os.environ, **environment})

    run.third_party = copy
    return run


def edit(source: Path, old: str, new: str, path: Path = BATCH) -> None:
    text = (source / path).read_text()
    assert old in text
    (source / path).write_text(text.replace(old, new))


def pack(source: Path, sdist: Path) -> Path:
    with tarfile.open(sdist, "w:gz") as archive:
        archive.add(source, "llama_cpp_python-9.9.9")
    return sdist


def test_pinned_source_takes_every_patch_where_it_is(move_pin, source):
    done = move_pin("--source", source)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[1:] == [f"{name}: applies" for name in SERIES]


def test_patched_text_is_what_the_build_makes(move_pin, source, tmp_path):
    move_pin("--source", source)
    command = [
        sys.executable,
        ROOT / "third_party" / "fetch_source.py",
        tmp_path / "built",
        "--cache",
        tmp_path,
        "--source",
        source,
    ]
    assert subprocess.run([*map(str, command)], capture_output=True).returncode == 0
    ours = move_pin.third_party.parent / "build" / "pin" / "tree"
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert all((ours / path).read_bytes() == (tmp_path / "built" / path).read_bytes() for path in files)


def test_moved_lines_are_found_and_the_patches_written_for_them(move_pin, source, tmp_path):
    before = (source / BATCH).read_text()
    (source / BATCH).write_text("// a line more\n" * 7 + before)
    edit(source, "void llama_batch_allocr::clear() {", "// and one more\n" * 40 + "void llama_batch_allocr::clear() {")
    edit(source, '__version__ = "', '__version__ = "9.', Path("llama_cpp/__init__.py"))
    sdist = pack(source, tmp_path / "newer.tar.gz")
    done = move_pin("--source", sdist, "--write")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"^{SERIES[0]}: applies, \d+ hunks at other lines$", done.stdout, re.MULTILINE)
    pin = (move_pin.third_party / "llama-cpp-python.txt").read_text()
    assert re.search(
        rf"^llama-cpp-python==9\.\S+ --hash=sha256:{hashlib.sha256(sdist.read_bytes()).hexdigest()}$", pin, re.MULTILINE
    )
    again = move_pin("--source", sdist)
    assert again.stdout.splitlines()[1:] == [f"{name}: applies" for name in SERIES]  # at their lines now
    command = [
        sys.executable,
        move_pin.third_party / "fetch_source.py",
        tmp_path / "built",
        "--cache",
        tmp_path,
        "--source",
        sdist,
    ]
    built = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr


def test_changed_lines_are_named_for_every_patch_at_once(move_pin, source):
    edit(source, "split_simple", "split_plain")
    (source / "vendor/llama.cpp/src/llama-model.cpp").unlink()
    pins = (move_pin.third_party / "llama-cpp-python.txt").read_text()
    done = move_pin("--source", source, "--build")
    assert "need an sdist" in done.stderr and done.returncode == 1
    done = move_pin("--source", source)
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    at = lines.index(f"{SERIES[0]}: does not apply")
    number = next(i for i, line in enumerate((source / BATCH).read_text().splitlines(), 1) if "split_plain" in line)
    assert re.search(
        rf"src/llama-batch\.cpp, hunk at line \d+: line {number} is '.*split_plain.*', not '.*split_simple.*'",
        "\n".join(lines[at:]),
    )
    assert (
        f"{SERIES[1]}: does not apply" in lines
        and "src/llama-model.cpp" in lines[lines.index(f"{SERIES[1]}: does not apply") + 1]
    )
    assert f"{SERIES[4]}: applies" in lines
    assert re.match(rf"\d of {len(SERIES)} patches do not apply: rebase them", lines[-1])
    assert (move_pin.third_party / "llama-cpp-python.txt").read_text() == pins


def test_file_that_is_gone_is_named(move_pin, source):
    (source / BATCH).unlink()
    done = move_pin("--source", source)
    assert done.returncode == 1 and "    src/llama-batch.cpp is not there any more" in done.stdout.splitlines()


def test_version_that_does_not_exist_is_refused(move_pin):
    done = move_pin("0.0.0", PIP_NO_INDEX="1")
    assert done.returncode == 1
    assert (
        done.stderr.splitlines()[-1]
        == "move_pin: pip has no source of llama-cpp-python==0.0.0; give another version, or --source FILE"
    )


@pytest.mark.parametrize("version", ["newest", "0.3.36"])
def test_source_comes_from_pip(move_pin, tmp_path, version):
    (tmp_path / "links").mkdir()
    shutil.copy(SDIST, tmp_path / "links" / "llama_cpp_python-0.3.36.tar.gz")
    done = move_pin(
        *([version] if version != "newest" else []), PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path / "links")
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["llama-cpp-python 0.3.36", *(f"{name}: applies" for name in SERIES)]


DAMAGED = {
    "missing": (lambda path, whole: None, "does not exist"),
    "empty": (lambda path, whole: path.write_bytes(b""), "is no whole source"),
    "cut short": (lambda path, whole: path.write_bytes(whole[: len(whole) // 2]), "is no whole source"),
    "damaged": (
        lambda path, whole: path.write_bytes(whole[:3000] + b"\xff" * 3000 + whole[6000:]),
        "is no whole source",
    ),
    "another archive": (lambda path, whole: pack(ROOT / "docs" / "assets", path), "is no whole source"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_archive_that_is_damaged_is_refused_in_one_line(move_pin, source, tmp_path, damage, reason):
    path = tmp_path / "damaged.tar.gz"
    damage(path, pack(source, tmp_path / "whole.tar.gz").read_bytes())
    done = move_pin("--source", path, "--write")
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and reason in done.stderr and str(path) in done.stderr
