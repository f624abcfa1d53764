"""Tables on a terminal."""

from __future__ import annotations


def aligned(rows: list[tuple]) -> list[str]:
    """A line for each row, cells right-aligned in columns."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{cell!s:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
