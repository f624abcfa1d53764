"""Reads how much memory a process uses."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def peak_bytes(children: bool = False) -> int | None:
    """Returns the most memory that this process has held, mapped model pages included; None where it is unknown.

    Args:
        children: Also look at the child processes that have ended, and return the largest of all.
    """
    try:
        import resource  # Windows does not have it.
    except ImportError:
        return None
    scale = 1 if sys.platform == "darwin" else 1024
    # Linux starts ru_maxrss of a new program at the memory of the process that started it; VmHWM does not have that.
    peaks = [_status_bytes("self", "VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale]
    if children:
        peaks.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * scale)
    return max(peaks)


def resident_bytes(pid: int | None = None) -> int | None:
    """Returns the memory that a process (by default this one) holds now; None where it is unknown."""
    return _status_bytes(str(os.getpid() if pid is None else pid), "VmRSS")


def _status_bytes(process: str, name: str) -> int | None:
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    except (OSError, StopIteration):
        return None
