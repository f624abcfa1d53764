"""Lay out the pinned llama-cpp-python source (with llama.cpp inside), optionally patched.

Called by CMakeLists.txt (patched, for the product) and tests/stock/CMakeLists.txt (pristine, for comparison).
The tree is unpacked and patched, then stamped with a hash of everything that went in. A tree with the right stamp is
left alone and any other is replaced, so a tree that is only half patched cannot be built.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PIN = HERE / "llama-cpp-python.txt"
PATCHES = HERE / "patches"
SERIES = ("pop", "upstream")  # what POP needs comes first; cures of faults in llama.cpp apply on top


def pinned_sha256() -> str:
    return PIN.read_text().split("--hash=sha256:")[1].split()[0]


def patch_files() -> list[Path]:
    """Return the patches of both series, in the order in which they apply."""
    files = []
    for series in SERIES:
        names = [line.strip() for line in (PATCHES / series / "series").read_text().splitlines()]
        files += [PATCHES / series / name for name in names if name and not name.startswith("#")]
    return files


def patch_name(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"


def download(cache: Path) -> Path:
    """Return the sdist, which lies in ``cache`` or comes through pip, which verifies the pinned hash."""
    kept = cache / "llama-cpp-python.tar.gz"
    if not (kept.exists() and hashlib.sha256(kept.read_bytes()).hexdigest() == pinned_sha256()):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            # Without isolation pip reuses the build backend that is already here instead of installing one more.
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            command += ["--no-build-isolation", "--require-hashes", "-r", str(PIN), "-d", scratch]
            if subprocess.run(command).returncode != 0:
                sys.exit(
                    f"pypop_gguf: pip could not fetch {PIN.name}; offline, set -DPOP_SOURCE=<llama-cpp-python 0.3.36 "
                    "sdist or its unpacked directory>"
                )
            next(Path(scratch).glob("*.tar.gz")).replace(kept)
    return kept


def unpack(source: Path, target: Path) -> None:
    if source.is_dir():
        if not (source / "vendor" / "llama.cpp" / "src").is_dir():
            sys.exit(f"pypop_gguf: {source} is no llama-cpp-python source tree: it has no vendor/llama.cpp/src")
        shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns(".git", "build", ".pop-stamp"))
        return
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch, tarfile.open(source) as archive:
        archive.extractall(scratch, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        next(Path(scratch).iterdir()).replace(target)


def apply_series(target: Path) -> None:
    import patch_ng  # a build requirement; git and patch(1) may both be missing on a bare machine

    for file in patch_files():
        patches = patch_ng.fromfile(str(file))
        if not patches or not patches.apply(root=str(target / "vendor" / "llama.cpp")):
            name = patch_name(file)
            sys.exit(f"pypop_gguf: {name} does not apply to this llama.cpp; see third_party/README.md for the pin")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="directory to lay the source out in (replaced when outdated)")
    parser.add_argument("--cache", type=Path, required=True, help="directory that keeps the downloaded sdist")
    parser.add_argument("--source", type=Path, help="an sdist or unpacked tree to use instead of downloading")
    parser.add_argument("--pristine", action="store_true", help="apply no patches")
    arguments = parser.parse_args()

    recipe = hashlib.sha256(PIN.read_bytes())
    recipe.update(str(arguments.source.resolve() if arguments.source else "").encode())
    for file in [] if arguments.pristine else patch_files():
        recipe.update(file.read_bytes())
    stamp = arguments.target / ".pop-stamp"
    if stamp.exists() and stamp.read_text() == recipe.hexdigest():
        return

    source = arguments.source or download(arguments.cache)
    if not source.exists():
        sys.exit(f"pypop_gguf: POP_SOURCE={source} does not exist")
    shutil.rmtree(arguments.target, ignore_errors=True)
    arguments.target.parent.mkdir(parents=True, exist_ok=True)
    unpack(source, arguments.target)
    if not arguments.pristine:
        apply_series(arguments.target)
    stamp.write_text(recipe.hexdigest())


if __name__ == "__main__":
    main()
