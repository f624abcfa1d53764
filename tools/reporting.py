"""How the scripts here report errors, and how they write a median with its range."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import numpy as np

from pypop_gguf import PopError
from tests.support.process import NotReady


def one_line_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Makes ``main`` report what a user can correct in one line, with the name of its script, and return 1."""
    script = Path(main.__code__.co_filename).stem

    @functools.wraps(main)
    def reporting(*arguments: object) -> int:
        try:
            return main(*arguments)
        except (PopError, NotReady, OSError, httpx.HTTPError) as error:
            print(f"{script}: error: {error}", file=sys.stderr)
            return 1

    return reporting


def spread(values: Sequence[float], digits: int | None = 0) -> str:
    """Returns the median of some values, and the least and the largest of them.

    With None digits behind the point, values below 100 have one, and others have none.
    """
    if digits is None:
        digits = 0 if np.median(values) >= 100 else 1
    return f"{np.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
