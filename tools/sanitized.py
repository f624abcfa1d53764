"""Builds our C++ and llama.cpp with sanitizers and runs the POP path in them: `python -m tools.sanitized asan` or `tsan`.

asan: addresses and undefined behaviour; the fuzzers of batches and of the native reading, those tests that need neither torch nor
another build, mixed traffic on the server. tsan: two contexts of one model in two threads, and the tests of several clients on the
server. What is upstream's own stands in sanitizers/ with its reason; anything else ends the run. The build takes about half an hour on 2 cores. Linux and GCC.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUPPRESSIONS = ROOT / "tests" / "sanitizers"
LIBRARY = {"asan": "libasan.so", "tsan": "libtsan.so"}
MODELS = "POP_TEST_MODELS"  # conftest.py takes written models from there
TESTS = [
    "test_boundary",
    "test_c_api",
    "test_continuation",
    "test_golden",
    "test_llama",
    "test_progress",
    "test_properties",
]
SERVER_TESTS = ["test_server", "test_security", "test_request_limits"]
NEED_TORCH = "pickled or code or shared_cache"
SEVERAL_CLIENTS = "clients or share_batches or share_its or hangs_up or metrics or more_requests or busy"


def build(preset: str) -> Path:
    """Returns the Python of an environment that has the sanitized package, and all else from the one that runs."""
    base = ROOT / "build" / preset
    os.environ["PATH"] = (
        f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # its cmake and ninja come first
    )
    subprocess.run(
        ["cmake", "--preset", preset, f"-DPython_EXECUTABLE={sys.executable}"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    subprocess.run(["cmake", "--build", base], check=True)
    environment = base / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", environment], check=True)
    site = next(environment.glob("lib/python*/site-packages"))
    install = ["cmake", "--install", base, "--component", "pypop_gguf", "--prefix", site]
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    # The package is the one of the source tree; it finds its native part through this distribution.
    (site / "pypop_gguf-0.dist-info").mkdir()
    (site / "pypop_gguf-0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: pypop-gguf\nVersion: 0\n")
    others = [path for path in map(Path, sys.path) if path.name == "site-packages"]
    # Each line adds a directory. The .pth files of those directories do not run, an editable install's among them.
    (site / "others.pth").write_text("".join(f"{path}\n" for path in [ROOT, *others]))
    return environment / "bin" / "python"


def test_files(names: list[str]) -> list[Path]:
    return [path for name in names for path in (ROOT / "tests").glob(f"*/{name}.py")]


def write_models(directory: Path) -> None:
    """By torch, and so in a process without sanitizers."""
    from pypop_gguf import library
    from tests.support import tiny_models

    if (directory / "bundled.gguf").exists():
        return
    tiny_models.write(directory, tiny_models.configs())
    bundled = ROOT / "models" / "lab-llama-12l"
    shutil.copytree(bundled, directory / "bundled", dirs_exist_ok=True)
    tiny_models.to_gguf([directory / "bundled"])
    tiny_models.write_served(directory / "served.gguf")
    script = library.vendor_dir() / "llama.cpp" / "convert_hf_to_gguf.py"
    convert = [sys.executable, script, bundled, "--outtype", "f16", "--outfile", directory / "bundled.gguf"]
    subprocess.run(convert, check=True, capture_output=True)


def environment_of(preset: str, models: Path) -> dict[str, str]:
    # the C++ library too: the sanitizer has to find how exceptions are thrown before Python loads what throws them
    preload = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in (LIBRARY[preset], "libstdc++.so.6")
    ]
    stop = "halt_on_error=1:exitcode=66"
    return {
        **os.environ,
        MODELS: str(models),
        "LD_PRELOAD": " ".join(preload),
        # Python leaves much behind at its end, and ends some processes without one: leaks are not looked for
        "ASAN_OPTIONS": f"detect_leaks=0:{stop}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:{stop}:suppressions={SUPPRESSIONS / 'ubsan.supp'}",
        "TSAN_OPTIONS": f"{stop}:suppressions={SUPPRESSIONS / 'tsan.supp'}",
        "GGML_NO_BACKTRACE": "1",
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("preset", choices=LIBRARY)
    parser.add_argument("--mixtures", type=int, default=200, help="for fuzz/batches.py")
    parser.add_argument("--files", type=int, default=2000, help="for fuzz/native.py")
    parser.add_argument("--minutes", type=float, default=3, help="for tools/soak.py")
    arguments = parser.parse_args()
    models = ROOT / "build" / "sanitized-models"
    models.mkdir(parents=True, exist_ok=True)
    write_models(models)
    python = build(arguments.preset)
    environment = environment_of(arguments.preset, models)
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    server_tests = test_files(SERVER_TESTS)
    commands = {
        "asan": [
            ["-m", "fuzz.batches", "--models", models, "--cases", arguments.mixtures],
            ["-m", "fuzz.native", "--cases", arguments.files],
            [*tests, *test_files(TESTS)],
            [*tests, "-k", f"not ({NEED_TORCH})", *server_tests],
            # what was freed is kept for a while: growth counts for nothing
            [
                "-m",
                "tools.soak",
                "--model",
                models / "served.gguf",
                "--minutes",
                arguments.minutes,
                "--max-growth",
                99,
            ],
        ],
        "tsan": [
            [
                ROOT / "tests" / "support" / "two_threads.py",
                models / "llama" / "model.gguf",
                models / "gemma3" / "model.gguf",
            ],
            [*tests, "-k", SEVERAL_CLIENTS, *server_tests],
        ],
    }
    statuses = []
    for command in commands[arguments.preset]:
        print(f"{arguments.preset}: {' '.join(Path(part).name for part in map(str, command[:3]))}", flush=True)
        statuses.append(subprocess.run([python, *map(str, command)], cwd=python.parent, env=environment).returncode)
    print("clean" if not any(statuses) else f"not clean: exit statuses {statuses}")
    return 1 if any(statuses) else 0


if __name__ == "__main__":
    sys.exit(main())
