"""Move the pin: `python third_party/move_pin.py VERSION` tries the patches on another llama-cpp-python.

git applies them, one commit each, in a repository in build/pin/tree/vendor/llama.cpp. Every patch that does not apply
is named, with the file and the line. The patches in patches/upstream can be left out: --build and --write go on without
those that do not apply. --build builds and runs the architecture table in a copy of this tree, build/pin/copy. --write
changes the pin and the patches of this tree. `make pin` calls this script. It needs git and pip, and make for --build.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import fetch_source

ROOT = Path(__file__).resolve().parents[1]
_GIT = ["git", "-c", "user.name=pypop_gguf", "-c", "user.email=pypop_gguf", "-c", "commit.gpgSign=false"]
_GIT += ["-c", "core.autocrlf=false", "-c", "core.hooksPath="]


@dataclass
class Tried:
    """The outcome of applying one patch."""

    file: Path
    text: str = ""  # for the new source; empty if the patch does not apply
    reasons: list[str] = field(default_factory=list)

    @property
    def optional(self) -> bool:
        return self.file.parent.name == "upstream"


def git(repository: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [*_GIT, "-C", str(repository), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def touched_files() -> set[str]:
    text = "".join(file.read_text() for file in fetch_source.patch_files())
    return set(re.findall(r"^(?:---|\+\+\+) [ab]/(.+)$", text, re.MULTILINE))


def start_repository(source: Path) -> None:
    """Make a repository of llama.cpp's directory that knows the files that the patches touch."""
    (source / ".git").unlink(missing_ok=True)  # the sdist has the link of a submodule here
    git(source, "init", "--quiet")
    git(source, "add", "--force", "--", *(name for name in touched_files() if (source / name).is_file()))
    git(source, "commit", "--quiet", "-m", "source")


def learn_pinned_source(repository: Path) -> None:
    """Give git the files that the patches were made for, so that it can merge where lines have changed."""
    sdist = ROOT / "build" / "sdist" / "llama-cpp-python.tar.gz"
    if not sdist.exists():
        return
    touched = touched_files()
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(sdist) as archive:
        members = [member for member in archive if member.name.partition("/vendor/llama.cpp/")[2] in touched]
        archive.extractall(scratch, members=members)
        pinned = next(Path(scratch).iterdir()) / "vendor" / "llama.cpp"
        start_repository(pinned)
        git(pinned, "am", "--keep-cr", *fetch_source.patch_files())
        git(repository, "fetch", "--quiet", pinned, "HEAD")


def try_patches(repository: Path) -> list[Tried]:
    """Commit every patch that applies, in order, to llama.cpp's directory."""
    start_repository(repository)
    learn_pinned_source(repository)
    return [try_patch(repository, Tried(file)) for file in fetch_source.patch_files()]


def try_patch(repository: Path, patch: Tried) -> Tried:
    if git(repository, "am", "--3way", "--keep-cr", patch.file).returncode == 0:
        patch.text = git(repository, "format-patch", "--zero-commit", "-N", "-1", "--stdout").stdout
        return patch
    git(repository, "am", "--abort")
    errors = git(repository, "apply", "--check", patch.file).stderr
    for failed, missing in re.findall(
        r"^error: (?:patch failed: (.+)|(.+): No such file or directory)$", errors, re.MULTILINE
    ):
        patch.reasons.append(f"{failed} has other lines" if failed else f"{missing} is not there any more")
    patch.reasons = patch.reasons or ["it changes nothing: its change is already there"]
    return patch


def fetch(version: str, directory: Path) -> Path:
    """Fetch the sdist of a version, or of the newest one, by pip."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    name = "llama-cpp-python" if version == "newest" else f"llama-cpp-python=={version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    if subprocess.run([*command, "--no-build-isolation", "-d", str(directory), name]).returncode != 0:
        sys.exit(f"move_pin: pip has no source of {name}; give another version, or --source FILE")
    return next(directory.glob("*.tar.gz"))


def unpack(source: Path, tree: Path) -> str:
    """Lay the source out and return its version."""
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


def write(patches: list[Tried], third_party: Path, sdist: Path, version: str) -> None:
    """Write the pin and the patches into a tree. A patch that does not apply stays, but leaves its series."""
    for patch in patches:
        series = third_party / "patches" / patch.file.parent.name / "series"
        if patch.text:
            (series.parent / patch.file.name).write_text(patch.text)
        else:
            lines = series.read_text().splitlines()
            left_out = f"# {patch.file.name} does not apply to {version}"
            series.write_text("\n".join(left_out if line == patch.file.name else line for line in lines) + "\n")
    pin = third_party / "llama-cpp-python.txt"
    pinned = f"llama-cpp-python=={version} --hash=sha256:{hashlib.sha256(sdist.read_bytes()).hexdigest()}"
    pin.write_text(re.sub(r"llama-cpp-python==\S+ --hash=sha256:\S+", pinned, pin.read_text()))


def build(patches: list[Tried], copy: Path, sdist: Path, version: str) -> bool:
    """Build a copy of this tree with the new pin and run the architecture table. Return whether both went well."""
    shutil.rmtree(copy, ignore_errors=True)
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(lambda name: (ROOT / name).is_file(), files):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    write(patches, copy / "third_party", sdist, version)
    (copy / "build" / "sdist").mkdir(parents=True)
    shutil.copy2(sdist, copy / "build" / "sdist" / "llama-cpp-python.tar.gz")
    return subprocess.run(["make", f"PYTHON={sys.executable}", "architectures"], cwd=copy).returncode == 0


def report(patches: list[Tried]) -> None:
    for patch in patches:
        print(f"{fetch_source.patch_name(patch.file)}: {'applies' if patch.text else 'does not apply'}")
        for reason in patch.reasons:
            print(f"    {reason}")
    failed = [patch for patch in patches if not patch.text]
    if failed:
        print(f"{len(failed)} of {len(patches)} patches do not apply: rebase them as third_party/README.md says")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "version", nargs="?", default="newest", help="version of llama-cpp-python (default: the newest)"
    )
    parser.add_argument("--source", type=Path, help="sdist or unpacked tree to use instead of asking pip")
    parser.add_argument(
        "--build", action="store_true", help="also build a copy of this tree, and run the architecture table there"
    )
    parser.add_argument("--write", action="store_true", help="also change the pin and the patches of this tree")
    arguments = parser.parse_args()
    if arguments.source and not arguments.source.exists():
        sys.exit(f"move_pin: {arguments.source} does not exist")
    if arguments.source and arguments.source.is_dir() and (arguments.build or arguments.write):
        sys.exit(
            "move_pin: --build and --write need an sdist, whose hash is pinned: give a version, or a .tar.gz --source"
        )
    base = ROOT / "build" / "pin"
    source = arguments.source or fetch(arguments.version, base / "sdist")
    version = unpack(source, base / "tree")
    sys.stdout.reconfigure(line_buffering=True)  # the build's own lines follow
    print(f"llama-cpp-python {version}")
    patches = try_patches(base / "tree" / "vendor" / "llama.cpp")
    report(patches)
    if any(not patch.text and not patch.optional for patch in patches):
        return 1
    if arguments.build:
        if not build(patches, base / "copy", source, version):
            print(f"the build or the architecture table failed, see above; it lies in {base / 'copy'}")
            return 1
        print(f"built; the architecture table is {base / 'copy' / 'docs' / 'architectures.md'}")
    if arguments.write:
        write(patches, ROOT / "third_party", source, version)
        print("wrote the pin and the patches; put llama.cpp's commit into llama-cpp-python.txt, then `make test`")
    return 0 if all(patch.text for patch in patches) else 1


if __name__ == "__main__":
    sys.exit(main())
