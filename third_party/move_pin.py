"""Moves the pin: `python third_party/move_pin.py VERSION` tries the patch series on another llama-cpp-python. `make pin` calls it.

A hunk may stand at another line than it did, but its lines have to be there; where they are not, the patch, the file and the first
line that differs are named, for all patches at once. --build goes on in a copy of this tree, below build/pin: it builds there and
runs the architecture table. --write changes the pin, and the line numbers in the patches, of this tree. Needs git, pip and make.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import fetch_source

ROOT = Path(__file__).resolve().parents[1]
_HUNK = re.compile(r"@@ -(\d+)(,\d+)? \+(\d+)(,\d+)? @@(.*)", re.DOTALL)


class Hunk:
    """Of one file in one patch: the lines it wants to find, those it leaves, and where."""

    def __init__(self, header: str) -> None:
        first, self._old_count, _, self._new_count, self._rest = _HUNK.fullmatch(header).groups()
        self.first, self.lines = int(first), []

    @property
    def old(self) -> list[str]:
        return [line[1:] for line in self.lines if line[0] in " -"]

    @property
    def new(self) -> list[str]:
        return [line[1:] for line in self.lines if line[0] in " +"]

    def header(self, at: int, moved: int) -> str:
        """For a file in which it stands at line ``at`` (from 1), and whose hunks before have added ``moved`` lines."""
        return f"@@ -{at}{self._old_count or ''} +{at + moved}{self._new_count or ''} @@{self._rest}"

    def place(self, lines: list[str], start: int, expected: int) -> int | None:
        """Index of its lines at or after ``start``, the nearest to ``expected``."""
        old = self.old
        found = [at for at in range(start, len(lines) - len(old) + 1) if lines[at : at + len(old)] == old]
        return min(found, key=lambda at: abs(at - expected), default=None)

    def difference(self, lines: list[str], expected: int) -> str:
        """Its first line that is not where most of its lines are."""
        old = self.old

        def matches(at: int) -> int:
            return sum(wanted == found for wanted, found in zip(old, lines[at : at + len(old)]))

        best = max(range(len(lines) or 1), key=lambda at: (matches(at), -abs(at - expected)))
        for i, wanted in enumerate(old):
            found = lines[best + i] if best + i < len(lines) else "the end of the file\n"
            if wanted != found:
                return f"line {best + i + 1} is {found.strip()!r}, not {wanted.strip()!r}"
        return "its lines stand before those of an earlier hunk"


class Applied:
    """What became of one patch: its text for the new source, or why it does not apply."""

    def __init__(self, path: Path) -> None:
        self.path, self.text, self.reasons, self.moved = path, [], [], 0

    def apply(self, tree: Path) -> None:
        lines = self.path.read_text().splitlines(keepends=True)
        at = 0
        while at < len(lines):
            if lines[at].startswith("--- a/") and lines[at + 1].startswith("+++ b/"):
                self.text += lines[at : at + 2]
                at = self._apply_file(tree, lines[at + 1].removeprefix("+++ b/").strip(), lines, at + 2)
            else:
                self.text.append(lines[at])
                at += 1

    def _apply_file(self, tree: Path, name: str, lines: list[str], at: int) -> int:
        """From the file's first hunk in the patch on; returns where its last one ends."""
        source = tree / name
        old = source.read_text().splitlines(keepends=True) if source.is_file() else None
        if old is None:
            self.reasons.append(f"{name} is not there any more")
        new, read, shift = [], 0, 0
        while at < len(lines) and lines[at].startswith("@@ "):
            hunk = Hunk(lines[at])
            at += 1
            while at < len(lines) and lines[at][0] in " +-" and lines[at] != "-- \n":
                hunk.lines.append(lines[at])
                at += 1
            if old is None:
                continue
            place = hunk.place(old, read, hunk.first - 1 + shift)
            if place is None:
                self.reasons.append(
                    f"{name}, hunk at line {hunk.first}: {hunk.difference(old, hunk.first - 1 + shift)}"
                )
                continue
            shift = place + 1 - hunk.first
            self.moved += shift != 0
            new += old[read:place]
            self.text += [hunk.header(place + 1, len(new) - place), *hunk.lines]
            new += hunk.new
            read = place + len(hunk.old)
        if old is not None:
            source.write_text("".join(new + old[read:]))
        return at


def apply_series(tree: Path) -> list[Applied]:
    """Applies all that applies, in order, to llama.cpp's directory."""
    series = [Applied(path) for path in fetch_source.patch_files()]
    for patch in series:
        patch.apply(tree)
    return series


def fetch(version: str, directory: Path) -> Path:
    """The sdist of a version, or of the newest one, by pip."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    name = "llama-cpp-python" if version == "newest" else f"llama-cpp-python=={version}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--no-build-isolation",
    ]
    if subprocess.run([*command, "-d", str(directory), name]).returncode != 0:
        sys.exit(f"move_pin: pip has no source of {name}; give another version, or --source FILE")
    return next(directory.glob("*.tar.gz"))


def unpack(source: Path, tree: Path) -> str:
    """Lays the source out; returns its version."""
    shutil.rmtree(tree, ignore_errors=True)
    tree.parent.mkdir(parents=True, exist_ok=True)
    try:
        fetch_source.unpack(source, tree)
        package = (tree / "llama_cpp" / "__init__.py").read_text()
    except (tarfile.TarError, zlib.error, EOFError, OSError, StopIteration) as error:
        reason = next(iter(str(error).splitlines()), "it is empty")
        sys.exit(f"move_pin: {source} is no whole source of llama-cpp-python: {reason}")
    if not (tree / "vendor" / "llama.cpp" / "src").is_dir():
        sys.exit(f"move_pin: {source} has no vendor/llama.cpp/src")
    return re.search(r'^__version__ = "(.+)"', package, re.MULTILINE)[1]


def write(series: list[Applied], third_party: Path, sdist: Path, version: str) -> None:
    """The pin and the patches, in a tree whose third_party this is."""
    for patch in series:
        (third_party / "patches" / patch.path.name).write_text("".join(patch.text))
    pin = third_party / "llama-cpp-python.txt"
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    pin.write_text(
        re.sub(
            r"llama-cpp-python==\S+ --hash=sha256:\S+",
            f"llama-cpp-python=={version} --hash=sha256:{digest}",
            pin.read_text(),
        )
    )


def build(series: list[Applied], copy: Path, sdist: Path, version: str) -> bool:
    """Builds a copy of this tree with the new pin and runs the architecture table; whether both went well."""
    shutil.rmtree(copy, ignore_errors=True)
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(lambda name: (ROOT / name).is_file(), files):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    write(series, copy / "third_party", sdist, version)
    (copy / "build" / "sdist").mkdir(parents=True)
    shutil.copy2(sdist, copy / "build" / "sdist" / "llama-cpp-python.tar.gz")
    return subprocess.run(["make", f"PYTHON={sys.executable}", "architectures"], cwd=copy).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", nargs="?", default="newest", help="of llama-cpp-python (default: the newest)")
    parser.add_argument("--source", type=Path, help="its sdist, or an unpacked tree, instead of asking pip")
    parser.add_argument(
        "--build", action="store_true", help="then build and run the architecture table in a copy of this tree"
    )
    parser.add_argument("--write", action="store_true", help="then change the pin and the patches of this tree")
    arguments = parser.parse_args()
    if arguments.source and not arguments.source.exists():
        sys.exit(f"move_pin: {arguments.source} does not exist")
    if arguments.source and arguments.source.is_dir() and (arguments.build or arguments.write):
        sys.exit(
            "move_pin: --build and --write need an sdist, whose hash is pinned: give a version, or --source with a .tar.gz"
        )
    base = ROOT / "build" / "pin"
    source = arguments.source or fetch(arguments.version, base / "sdist")
    tree = base / "tree"
    version = unpack(source, tree)
    sys.stdout.reconfigure(line_buffering=True)  # the build's own lines follow
    print(f"llama-cpp-python {version}")
    series = apply_series(tree / "vendor" / "llama.cpp")
    for patch in series:
        moved = f", {patch.moved} hunks at other lines" if patch.moved else ""
        print(f"{patch.path.name}: {'does not apply' if patch.reasons else f'applies{moved}'}")
        for reason in patch.reasons:
            print(f"    {reason}")
    failed = [patch.path.name for patch in series if patch.reasons]
    if failed:
        print(f"{len(failed)} of {len(series)} patches do not apply: rebase them as third_party/README.md says")
        return 1
    if arguments.build:
        if not build(series, base / "copy", source, version):
            print(f"the build or the architecture table failed, see above; it lies in {base / 'copy'}")
            return 1
        print(f"built; the architecture table is {base / 'copy' / 'docs' / 'architectures.md'}")
    if arguments.write:
        write(series, ROOT / "third_party", source, version)
        print(
            "wrote the pin and the patches; put llama.cpp's commit into llama-cpp-python.txt, README.md and the patches' Base, then `make test`"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
