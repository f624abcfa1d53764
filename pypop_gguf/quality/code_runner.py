"""Runs what a model wrote for a HumanEval problem, in a process of its own with limits.

The limits keep a mistake from doing harm. They do not hold a program that means harm, so ``pop-gguf eval`` runs code
only where the user asks for it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

_RUNNER = Path(__file__).with_name("limited_program.py")


def make_check(item: dict) -> Callable[[str], bool]:
    """Returns a check of generated text for a problem of HumanEval: ``prompt``, ``test`` and ``entry_point``."""
    prompt, test, entry_point = (str(item.get(key, "")) for key in ("prompt", "test", "entry_point"))
    return lambda text: passes(f"{prompt}{text}\n\n{test}\n\ncheck({entry_point})\n")


def passes(program: str, seconds: float = 10) -> bool:
    """Returns whether a Python program ends without an error within this time and the limits of limited_program.py."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            done = subprocess.run(
                [sys.executable, "-I", _RUNNER],
                cwd=directory,
                env={},
                input=program.encode("utf-8", "replace"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0
