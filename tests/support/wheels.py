"""Wheels of other platforms, which pip of this machine installs and an emulator runs."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path


def install_for(platforms: Iterable[str], target: Path, constraints: Path, wheel: Path) -> None:
    """Installs a wheel and its dependencies into a directory for Python 3.11 of other platforms."""
    names = [word for platform in platforms for word in ("--platform", platform)]
    options = ["--quiet", "--only-binary=:all:", "--python-version", "3.11", *names]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", target, "-c", constraints, wheel.resolve()]
    subprocess.run([*map(str, command)], check=True)
