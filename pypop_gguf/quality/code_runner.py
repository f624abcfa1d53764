"""Runs what a model wrote for a HumanEval problem, in a process of its own with limits.

The limits keep a mistake from doing harm. They do not hold a program that means harm, so ``pop-gguf eval`` runs code
only where the user asks for it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from pypop_gguf.quality.grading import Grader
from pypop_gguf.quality.limited_program import COMPLETED

_RUNNER = Path(__file__).with_name("limited_program.py")


def expect_passes(item: dict) -> Grader:
    """Expects that a text passes the tests of a problem of HumanEval: ``prompt``, ``test`` and ``entry_point``.

    The text goes on where the prompt ends, or it is the whole function again. Either way the prompt stays before it,
    because it may import or define what the function needs.
    """
    prompt, test, entry_point = (str(item.get(key, "")) for key in ("prompt", "test", "entry_point"))

    def grade(text: str) -> dict[str, float]:
        between = "\n" if f"def {entry_point}(" in text else ""
        return {"passed": float(passes(f"{prompt}{between}{text}\n\n{test}\n\ncheck({entry_point})\n"))}

    return grade


def passes(program: str, seconds: float = 10) -> bool:
    """Returns whether a Python program runs to its end within this time and the limits of limited_program.py."""
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
    return done.returncode == COMPLETED
