"""The wheel works in an empty environment, alone and beside a stock llama-cpp-python, in both import orders.

``POP_WHEEL=path/to.whl`` names a wheel to test, such as a repaired one. Without it, the tests build one.
"""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT, STOCK


def run(command, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel. It is built without isolation, so that it takes what is compiled already."""
    if "POP_WHEEL" in os.environ:
        return Path(os.environ["POP_WHEEL"]).resolve()
    target = tmp_path_factory.mktemp("wheel")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", target, ROOT]
    done = run(pip, env=environment)
    assert done.returncode == 0, done.stderr
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """Runs Python code, or a file, in a virtual environment that holds only the wheel and its dependencies."""
    base = tmp_path_factory.mktemp("environment")
    venv.create(base / "venv", with_pip=True)
    python = base / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = run([python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel])
    assert done.returncode == 0, done.stderr

    def python_says(code: str | Path, *arguments, **variables) -> subprocess.CompletedProcess:
        program = [code] if isinstance(code, Path) else ["-c", code]
        inherited = {
            name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LLAMA_CPP_LIB_PATH")
        }
        return run([python, *program, *arguments], cwd=base, env={**inherited, **variables})

    python_says.site_packages = Path(
        python_says("import sysconfig; print(sysconfig.get_path('platlib'))").stdout.strip()
    )
    return python_says


@pytest.fixture
def stock_installed(environment):
    """A stock llama-cpp-python in the same environment."""
    if not STOCK.is_dir():
        pytest.skip("the unpatched llama-cpp-python is not built: run `make test`")
    target = environment.site_packages / "llama_cpp"
    shutil.copytree(STOCK / "llama_cpp", target)
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
    assert len(libraries) == len({re.split(r"\.(so|dylib|dll)\b", library)[0] for library in libraries})
    assert any("llama" in library for library in libraries) and any("mtmd" in library for library in libraries)
    parts = ["xxhash", "rotate-bits", "cpp-httplib", "json", "tinyblas"]
    if any("pop-cxx" in library for library in libraries):
        parts += ["libcxx", "libcxxabi", "libunwind", "zig"]
    notices = [
        "llama_cpp/LICENSE.md",
        "llama.cpp/LICENSE",
        "gguf-py/LICENSE",
        *(f"licenses/LICENSE-{part}" for part in parts),
    ]
    for notice in [*notices, "dist-info/licenses/LICENSE", "dist-info/licenses/third_party/LICENSES.md"]:
        assert any(name.endswith(notice) for name in names), notice
    assert "pypop_gguf/importance/data/calibration.jsonl" in names
    assert not any(name.startswith(("lib/", "include/", "bin/", "llama_cpp/")) for name in names)


def test_notices_are_those_of_their_owners(wheel):
    archive = zipfile.ZipFile(wheel)
    owners = {
        "cpp-httplib": "yhirose",
        "json": "Niels Lohmann",
        "xxhash": "Yann Collet",
        "tinyblas": "Mozilla Foundation",
    }
    for part, owner in owners.items():
        text = archive.read(f"pypop_gguf/_vendor/llama.cpp/licenses/LICENSE-{part}").decode()
        assert owner in text and re.search(r"(SOFTWARE|DAMAGE)\.\s*$", text), part  # the text is whole


@pytest.mark.skipif(os.name == "nt", reason="Windows marks no file as a program")
def test_server_may_be_run(wheel):
    entry = zipfile.ZipFile(wheel).getinfo("pypop_gguf/_vendor/llama_cpp/lib/llama-server")
    assert entry.external_attr >> 16 & 0o111 == 0o111


def test_metadata_passes_twine(wheel):
    done = run([sys.executable, "-m", "twine", "check", "--strict", wheel])
    assert done.returncode == 0 and "PASSED" in done.stdout, done.stdout + done.stderr


def test_wheel_prunes_and_serves_in_an_empty_environment(environment):
    done = environment(ROOT / "tests" / "installed_wheel.py")
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


def test_carried_llama_cpp_works_without_pypop_gguf(environment, bundled_gguf):
    code = "import sys, llama_cpp; llm = llama_cpp.Llama(sys.argv[1], n_ctx=64, verbose=False)"
    done = environment(f"{code}; print(llm('Once upon', max_tokens=2)['object'])", bundled_gguf)
    assert done.stdout == "text_completion\n", done.stderr


def test_wheel_answers_in_an_empty_environment(environment, bundled_gguf):
    done = environment("import sys; from pypop_gguf import PopLlama" + ANSWER, bundled_gguf)
    assert done.stdout.startswith("True\n") and done.stderr == "", done.stderr


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
    assert (
        error.startswith("ImportError: llama_cpp was already imported")
        and "import PopLlama` before `import llama_cpp`" in error
    )


def test_stock_installation_is_left_alone_when_ours_loads_first(environment, stock_installed, bundled_gguf):
    before = sorted((path, path.stat().st_mtime_ns) for path in stock_installed.rglob("*.py"))
    code = "import sys; from pypop_gguf import PopLlama; import llama_cpp.mtmd_cpp, llama_cpp._ggml" + ANSWER
    done = environment(code, bundled_gguf)
    pruned, libraries = done.stdout.splitlines()
    assert pruned == "True"
    if sys.platform == "linux":
        assert ".so.0" not in libraries  # the names of stock's libraries have a version, ours do not
    assert before == sorted((path, path.stat().st_mtime_ns) for path in stock_installed.rglob("*.py"))


@pytest.mark.parametrize("variable", ["LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB"])
def test_variable_that_points_elsewhere_is_refused_in_one_line(environment, tmp_path, variable):
    done = environment("from pypop_gguf import PopLlama", **{variable: str(tmp_path)})
    assert done.stderr.strip().splitlines()[-1].startswith(f"ImportError: {variable}=")
