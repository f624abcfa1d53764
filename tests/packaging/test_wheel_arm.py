"""The wheel for aarch64 prunes a prompt, and its server loads, in qemu with the Python of Debian's arm64.

`make wheel-arm` names the wheel in ``POP_WHEEL``. Debian's packages come through apt-get, which must know arm64:
`dpkg --add-architecture arm64 && apt-get update`. They are unpacked and not installed.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.wheels import install_for

WHEEL = Path(os.environ.get("POP_WHEEL", "none"))
pytestmark = pytest.mark.skipif("aarch64" not in WHEEL.name, reason="no wheel for aarch64 is named: make wheel-arm")

PACKAGES = [
    *("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "libgcc-s1", "libstdc++6"),
    *("libexpat1", "libffi8", "libssl3", "libbz2-1.0", "liblzma5", "libuuid1", "libcrypt1", "libsqlite3-0"),
    "zlib1g",
]
PLATFORMS = ["manylinux_2_17_aarch64", "manylinux2014_aarch64", "manylinux_2_26_aarch64", "manylinux_2_28_aarch64"]
# Only one process runs: where the kernel does not know qemu, an emulated one cannot start others.
ANSWER = """
import site, sys
from pathlib import Path
site.addsitedir(sys.argv[2])  # as pip would install the wheel, whose .pth file Python then reads
from pypop_gguf.cli import main
from installed_wheel import check_answer
path = Path(sys.argv[1])
assert main(["random-model", "tiny", str(path)]) == 0
check_answer(path)
"""


def run(*command, **options) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def system(tmp_path_factory) -> Path:
    """A directory with Debian's Python for arm64 and what it needs."""
    base = tmp_path_factory.mktemp("arm64")
    run("apt-get", "download", *(f"{package}:arm64" for package in PACKAGES), cwd=base)
    for package in base.glob("*.deb"):
        run("dpkg-deb", "-x", package, base / "root")
    return base / "root"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A directory with the wheel and its dependencies."""
    target = tmp_path_factory.mktemp("site")
    install_for(PLATFORMS, target, ROOT / "constraints.txt", WHEEL)
    return target


@pytest.mark.parametrize(
    ("processor", "variant"), [("cortex-a57", "armv8.0_1"), ("cortex-a76", "armv8.2_2"), ("max", "armv9.2_2")]
)
def test_wheel_answers_with_the_best_library_for_the_processor(system, site, tmp_path, processor, variant):
    qemu = ["qemu-aarch64", "-cpu", processor, "-L", system]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    python = [*qemu, system / "usr" / "bin" / "python3.11"]
    said = run(*python, "-c", ANSWER, tmp_path / "tiny.gguf", site, cwd=tmp_path, env=environment)
    assert "pruned 6" in said and f"libggml-cpu-{variant}.so" in said, said


def test_server_loads_its_libraries(system, site, tmp_path):
    server = next(site.rglob("llama-server"))
    assert "version:" in run("qemu-aarch64", "-cpu", "max", "-L", system, server, "--version", cwd=tmp_path)
