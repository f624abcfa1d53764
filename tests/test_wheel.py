"""The built wheel in an empty environment, alone and beside a stock llama-cpp-python, in both import orders."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STOCK = ROOT / "build" / "stock" / "package" / "llama_cpp"


def run(command, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built without isolation, so that it takes what the set-up compiled instead of compiling again."""
    target = tmp_path_factory.mktemp("wheel")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", target, ROOT]
    done = run(pip, env=environment)
    assert done.returncode == 0, done.stderr
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """Runs a piece of Python in a virtual environment that holds the wheel and its dependencies only."""
    base = tmp_path_factory.mktemp("environment")
    venv.create(base / "venv", with_pip=True)
    python = base / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = run([python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel])
    assert done.returncode == 0, done.stderr

    def python_says(code: str, *arguments, **variables) -> subprocess.CompletedProcess:
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LLAMA_CPP_LIB_PATH")}
        return run([python, "-c", code, *arguments], cwd=base, env={**inherited, **variables})

    python_says.site_packages = Path(python_says("import sysconfig; print(sysconfig.get_path('platlib'))").stdout.strip())
    return python_says


@pytest.fixture
def stock_installed(environment):
    """A real llama-cpp-python that somebody already has in that environment."""
    if not STOCK.is_dir():
        pytest.skip("the unpatched llama-cpp-python is not built: run `make test`")
    target = environment.site_packages / "llama_cpp"
    shutil.copytree(STOCK, target)
    yield target
    shutil.rmtree(target)


ANSWER = """
llm = PopLlama(sys.argv[1], pop_boundary=8, n_ctx=128, verbose=False)
llm.create_completion("Once upon a time there was a fox", max_tokens=4)
print(llm.timings.pruned_tokens > 0)
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
print(*sorted({line.split("/")[-1] for line in maps.splitlines() if "llama" in line or "ggml" in line}))
"""


def test_wheel_holds_each_library_once_and_the_licences(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    libraries = [Path(name).name for name in names if "/lib/" in name and not name.endswith(".py")]
    assert len(libraries) == len({library.split(".")[0] for library in libraries})
    assert any("llama" in library for library in libraries) and any("mtmd" in library for library in libraries)
    for notice in ("llama_cpp/LICENSE.md", "llama.cpp/LICENSE", "gguf-py/LICENSE", "LICENSE-xxhash", "licenses/LICENSE"):
        assert any(name.endswith(notice) for name in names), notice
    assert "pypop_gguf/tools/data/calibration.jsonl" in names
    assert not any(name.startswith(("lib/", "include/", "bin/", "llama_cpp/")) for name in names)


def test_wheel_answers_in_an_empty_environment(environment, bundled_gguf):
    done = environment("import sys; from pypop_gguf import PopLlama" + ANSWER, bundled_gguf)
    assert done.stdout.startswith("True\n"), done.stderr


@pytest.mark.parametrize("order", ["llama_cpp, pypop_gguf", "pypop_gguf, llama_cpp"])
def test_both_import_orders_give_one_library(environment, bundled_gguf, order):
    code = f"import sys, {order}, llama_cpp.mtmd_cpp, llama_cpp._ggml; from pypop_gguf import PopLlama{ANSWER}"
    done = environment(code, bundled_gguf)
    pruned, libraries = done.stdout.splitlines()
    assert pruned == "True"
    if sys.platform == "linux":
        assert "libllama.so" in libraries and ".so." not in libraries.replace("libgomp.so.", "")
    assert "pypop_gguf" in environment("import pypop_gguf, llama_cpp; print(llama_cpp.__file__)").stdout


def test_stock_library_loaded_first_is_refused_in_one_line(environment, stock_installed):
    done = environment("import llama_cpp; print(llama_cpp.__file__); from pypop_gguf import PopLlama")
    assert str(stock_installed) in done.stdout
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError: llama_cpp was already imported") and "import PopLlama` before `import llama_cpp`" in error


def test_stock_installation_is_left_alone_when_ours_loads_first(environment, stock_installed, bundled_gguf):
    before = sorted((path, path.stat().st_mtime_ns) for path in stock_installed.rglob("*.py"))
    code = "import sys; from pypop_gguf import PopLlama; import llama_cpp.mtmd_cpp, llama_cpp._ggml" + ANSWER
    done = environment(code, bundled_gguf)
    pruned, libraries = done.stdout.splitlines()
    assert pruned == "True"
    if sys.platform == "linux":
        assert ".so.0" not in libraries  # stock's SONAMEs carry a version, ours do not
    assert before == sorted((path, path.stat().st_mtime_ns) for path in stock_installed.rglob("*.py"))


@pytest.mark.parametrize("variable", ["LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB"])
def test_variable_that_points_elsewhere_is_refused_in_one_line(environment, tmp_path, variable):
    done = environment("from pypop_gguf import PopLlama", **{variable: str(tmp_path)})
    assert done.stderr.strip().splitlines()[-1].startswith(f"ImportError: {variable}=")
