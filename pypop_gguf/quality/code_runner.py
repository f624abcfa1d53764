"""Runs what a model wrote for a HumanEval problem, in a process of its own with limits.

The limits keep a mistake from hurting; they are no prison for a model that means harm. ``pop-gguf eval`` runs code only where
the user says so.
"""

from __future__ import annotations

import errno
import subprocess
import sys
import tempfile
from collections.abc import Callable

_LIMITS = """\
import resource
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
"""


def check_of(item: dict) -> Callable[[str], bool]:
    """A check of generated text for one problem: ``prompt``, ``test`` and ``entry_point`` of HumanEval's format."""
    prompt, test, entry_point = (str(item.get(key, "")) for key in ("prompt", "test", "entry_point"))
    return lambda text: passes(f"{prompt}{text}\n\n{test}\n\ncheck({entry_point})\n")


def passes(program: str, seconds: float = 10) -> bool:
    """Whether a Python program ends without an error, within this time, 1 GB of memory and files of 1 MB."""
    limits = _LIMITS if sys.platform != "win32" else ""  # Windows has none of these but the time
    with tempfile.TemporaryDirectory() as directory:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", limits + program],
                cwd=directory,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=seconds,
            )
        except (subprocess.TimeoutExpired, ValueError):  # ValueError: a null character in the text
            return False
        except OSError as error:
            if error.errno == errno.E2BIG:  # longer than a command may be
                return False
            raise
    return done.returncode == 0
