"""Moving the pin: patches apply to moved lines too, and those that do not apply are named with their file and line."""

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
PATCHES = ROOT / "third_party" / "patches"
SERIES = [
    f"{series}/{name}"
    for series in ("pop", "upstream")
    for name in (PATCHES / series / "series").read_text().splitlines()
    if name.endswith(".patch")
]
LLAMA_CPP = Path("vendor/llama.cpp")
BATCH = LLAMA_CPP / "src/llama-batch.cpp"  # pop/0001 changes it in several places
VOCAB = LLAMA_CPP / "src/llama-vocab.cpp"  # upstream/0011 is the only patch that changes it
VOCAB_PATCH = "upstream/0011-vocab-reserve.patch"


@pytest.fixture(scope="module")
def pinned(tmp_path_factory) -> Path:
    """The files of the pinned source that the patches touch, and the file that holds its version."""
    base = tmp_path_factory.mktemp("pinned")
    touched = set()
    for patch in PATCHES.glob("*/*.patch"):
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
    """Run the tool in a copy of third_party, which it may change."""
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


def test_patches_are_written_for_lines_that_have_moved(move_pin, source, tmp_path):
    (source / BATCH).write_text("// a line more\n" * 7 + (source / BATCH).read_text())
    edit(source, "void llama_batch_allocr::clear() {", "// and one more\n" * 40 + "void llama_batch_allocr::clear() {")
    edit(source, '__version__ = "', '__version__ = "9.', Path("llama_cpp/__init__.py"))
    sdist = pack(source, tmp_path / "newer.tar.gz")
    first_hunk = re.compile(r"^@@ -(\d+)", re.MULTILINE)
    before = int(first_hunk.search((PATCHES / SERIES[0]).read_text())[1])
    done = move_pin("--source", sdist, "--write")
    assert done.returncode == 0, done.stdout + done.stderr
    pin = (move_pin.third_party / "llama-cpp-python.txt").read_text()
    assert re.search(
        rf"^llama-cpp-python==9\.\S+ --hash=sha256:{hashlib.sha256(sdist.read_bytes()).hexdigest()}$", pin, re.MULTILINE
    )
    written = move_pin.third_party / "patches" / SERIES[0]
    assert int(first_hunk.search(written.read_text())[1]) >= before + 7
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


def test_lines_beside_a_change_are_merged_where_the_pinned_source_is_known(move_pin, source, tmp_path):
    """The line is in the context of a hunk, so the patch alone does not apply."""
    edit(source, "if (p == rev_merge.end()) {", "if (rev_merge.end() == p) {", VOCAB)
    assert f"{VOCAB_PATCH}: does not apply" in move_pin("--source", source).stdout.splitlines()
    cache = move_pin.third_party.parent / "build" / "sdist"
    cache.mkdir(parents=True)
    shutil.copy(SDIST, cache)
    assert move_pin("--source", source).stdout.splitlines()[1:] == [f"{name}: applies" for name in SERIES]


def test_changed_lines_are_named_for_every_patch_at_once(move_pin, source):
    edit(source, "split_simple", "split_plain")
    (source / LLAMA_CPP / "src/llama-model.cpp").unlink()
    pins = (move_pin.third_party / "llama-cpp-python.txt").read_text()
    done = move_pin("--source", source)
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert re.fullmatch(
        r"    src/llama-batch\.cpp:\d+ has other lines", lines[lines.index(f"{SERIES[0]}: does not apply") + 1]
    )
    assert lines[lines.index(f"{SERIES[1]}: does not apply") + 1] == "    src/llama-model.cpp is not there any more"
    assert f"{SERIES[-1]}: applies" in lines
    assert re.fullmatch(rf"\d of {len(SERIES)} patches do not apply: rebase them as .*", lines[-1])
    assert (move_pin.third_party / "llama-cpp-python.txt").read_text() == pins


def test_build_needs_an_sdist(move_pin, source):
    done = move_pin("--source", source, "--build")
    assert "need an sdist" in done.stderr and done.returncode == 1


def test_cure_of_an_upstream_fault_that_no_longer_applies_is_left_out(move_pin, source, tmp_path):
    edit(source, "            output.reserve(output.size() + symbol.n);\n", "", VOCAB)  # upstream has cured it
    name = VOCAB_PATCH
    sdist = pack(source, tmp_path / "newer.tar.gz")
    done = move_pin("--source", sdist, "--write")
    assert f"{name}: does not apply" in done.stdout.splitlines() and "wrote the pin and the patches" in done.stdout
    command = [
        sys.executable,
        move_pin.third_party / "fetch_source.py",
        tmp_path / "built",
        "--cache",
        tmp_path,
        "--source",
        sdist,
    ]
    assert subprocess.run([*map(str, command)], capture_output=True).returncode == 0
    again = move_pin("--source", sdist)
    assert again.stdout.splitlines()[1:] == [f"{other}: applies" for other in SERIES if other != name]


@pytest.mark.parametrize("name", [name for name in SERIES if name.startswith("upstream/")])
def test_each_cure_of_an_upstream_fault_applies_without_the_others(move_pin, source, name):
    (move_pin.third_party / "patches" / "upstream" / "series").write_text(name.removeprefix("upstream/") + "\n")
    done = move_pin("--source", source)
    expected = [other for other in SERIES if other.startswith("pop/")] + [name]
    assert done.stdout.splitlines()[1:] == [f"{other}: applies" for other in expected]


def test_version_that_does_not_exist_is_refused(move_pin):
    done = move_pin("0.0.0", PIP_NO_INDEX="1")
    assert done.returncode == 1
    assert (
        done.stderr.splitlines()[-1]
        == "move_pin: pip has no source of llama-cpp-python==0.0.0; give another version, or --source FILE"
    )


@pytest.mark.parametrize("version", [[], ["0.3.36"]], ids=["newest", "named"])
def test_source_comes_from_pip(move_pin, tmp_path, version):
    (tmp_path / "links").mkdir()
    shutil.copy(SDIST, tmp_path / "links" / "llama_cpp_python-0.3.36.tar.gz")
    done = move_pin(*version, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path / "links"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["llama-cpp-python 0.3.36", *(f"{name}: applies" for name in SERIES)]


DAMAGED = {
    "missing": (lambda path, whole: None, "does not exist"),
    "cut short": (lambda path, whole: path.write_bytes(whole[: len(whole) // 2]), "is no whole source"),
    "another archive": (lambda path, whole: pack(ROOT / "docs" / "assets", path), "is no whole source"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_archive_that_is_damaged_is_refused_in_one_line(move_pin, source, tmp_path, damage, reason):
    path = tmp_path / "damaged.tar.gz"
    damage(path, pack(source, tmp_path / "whole.tar.gz").read_bytes())
    done = move_pin("--source", path, "--write")
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and reason in done.stderr and str(path) in done.stderr
