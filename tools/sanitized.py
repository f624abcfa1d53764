"""Builds our C++ and llama.cpp with sanitizers, and runs POP in them: `python -m tools.sanitized asan` or `tsan`.

asan looks for wrong addresses and undefined behaviour. It runs the fuzzers of batches, of completion and of the native
reader, the tests that need neither torch nor another build, and mixed traffic on the server. tsan looks for data races.
It runs two contexts of one model in two threads, the tests that have several clients on the server, and the thread that
completes the cache of a `PopLlama` beside its calls. Each finding that is llama.cpp's own has an exception with its
reason in tests/sanitizers/; any other finding ends the program in which it is found. The build takes about half an hour
on 2 cores. It needs Linux and GCC, and is for AVX2: to check the kernels for AVX-512 too, configure it with
-DGGML_NATIVE=ON.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.paths import BUNDLED, ROOT

SUPPRESSIONS = ROOT / "tests" / "sanitizers"
LIBRARY = {"asan": "libasan.so", "tsan": "libtsan.so"}
MODELS = "POP_TEST_MODELS"  # tests/conftest.py reads the directory of written models from this variable
TESTS = [
    "test_attention_kernel",
    "test_boundary",
    "test_c_api",
    "python/test_completion",
    "test_continuation",
    "test_golden",
    "test_joined_chunks",
    "test_kernels",
    "test_llama",
    "test_progress",
    "test_properties",
]
SERVER_TESTS = ["test_server", "test_security", "test_request_limits", "server/test_completion"]
SERVER_NEEDS_TORCH = "pickled or code or shared_cache"
NEEDS_TORCH = "cannot_be_completed"
SEVERAL_CLIENTS = "clients or share_batches or share_its or hangs_up or metrics or more_requests or busy"


def build(preset: str) -> Path:
    """Builds the sanitized library and returns the Python of an environment that loads it.

    The environment has all other packages from the one that runs this script.
    """
    base = ROOT / "build" / preset
    # The programs cmake and ninja of this environment come first.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    configure = ["cmake", "--preset", preset, f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run(configure, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
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
    return [next((ROOT / "tests").glob(f"**/{name}.py")) for name in names]


def write_models(directory: Path) -> None:
    """Writes the models of the tests with torch, which a process with sanitizers cannot load."""
    from pypop_gguf import library
    from tests.support import tiny_models

    if (directory / "bundled.gguf").exists():
        return
    tiny_models.write(directory, tiny_models.configs())
    shutil.copytree(BUNDLED, directory / "bundled", dirs_exist_ok=True)
    tiny_models.to_gguf([directory / "bundled"])
    tiny_models.write_served(directory / "served.gguf")
    script = library.vendor_dir() / "llama.cpp" / "convert_hf_to_gguf.py"
    convert = [sys.executable, script, BUNDLED, "--outtype", "f16", "--outfile", directory / "bundled.gguf"]
    subprocess.run(convert, check=True, capture_output=True)


def sanitizer_variables(preset: str, models: Path) -> dict[str, str]:
    """Returns the environment variables of a process that loads the sanitized library."""
    # The C++ library is loaded early too, because the sanitizer has to find the function that throws exceptions before
    # Python loads a library that calls it.
    preload = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in (LIBRARY[preset], "libstdc++.so.6")
    ]
    stop = "halt_on_error=1:exitcode=66"
    return {
        **os.environ,
        MODELS: str(models),
        "LD_PRELOAD": " ".join(preload),
        # Leaks are not looked for, because Python frees little at its end.
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
    parser.add_argument("--mixtures", type=int, default=200, help="number of cases of fuzz/batches.py")
    parser.add_argument("--files", type=int, default=2000, help="number of cases of fuzz/native.py")
    parser.add_argument("--minutes", type=float, default=3, help="minutes of tools/soak.py")
    arguments = parser.parse_args()
    models = ROOT / "build" / "sanitized-models"
    models.mkdir(parents=True, exist_ok=True)
    write_models(models)
    python = build(arguments.preset)
    environment = sanitizer_variables(arguments.preset, models)
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    server_tests = test_files(SERVER_TESTS)
    soak = ["-m", "tools.soak", "--model", models / "served.gguf"]
    commands = {
        "asan": [
            ["-m", "fuzz.batches", "--models", models, "--cases", arguments.mixtures],
            ["-m", "fuzz.native", "--cases", arguments.files],
            ["-m", "fuzz.completions", "--models", models, "--cases", arguments.mixtures],
            [*tests, "-k", f"not {NEEDS_TORCH}", *test_files(TESTS)],
            [*tests, "-k", f"not ({SERVER_NEEDS_TORCH})", *server_tests],
            # The sanitizer keeps freed memory for a while, so any growth is allowed.
            [*soak, "--minutes", arguments.minutes, "--max-growth", 99],
        ],
        "tsan": [
            ["-m", "tests.support.two_threads", *(models / name / "model.gguf" for name in ("llama", "gemma3"))],
            [*tests, "-k", SEVERAL_CLIENTS, *server_tests],
            [*tests, "-k", f"not {NEEDS_TORCH}", *test_files(["python/test_completion"])],
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
