"""Checks, styles and saves the figures of ``pop-gguf tune`` and ``pop-gguf bench``."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pypop_gguf.errors import PopError
from pypop_gguf.gguf_files.writer import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_plot(path: Path) -> None:
    """Checks before anything is measured that a figure can be drawn afterwards.

    Raises:
        PopError: matplotlib is missing, or the directory is missing or cannot be written to.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise PopError("--plot needs matplotlib: pip install '.[bench]' in the source tree")
    if not path.suffix or path.is_dir():
        raise PopError(f"--plot {path}: give the name of a picture, such as plot.png")
    if not path.absolute().parent.is_dir():
        raise PopError(f"--plot {path}: no such directory; make it first, or give another --plot")
    if not os.access(path.absolute().parent, os.W_OK):
        raise PopError(f"--plot {path}: no permission to write there; give another --plot")


def save_figure(figure: Figure, path: Path, **options: Any) -> None:
    """Writes a figure in the format that the suffix of ``path`` names.

    Raises:
        PopError: The file cannot be written.
    """
    with replacing(path) as part:
        figure.savefig(part, format=path.suffix[1:], **options)


def style_axes(axes: Any, grid: str = "both") -> None:
    """Gives the axes a light grid and no frame at the top and the right."""
    axes.grid(axis=grid, color="#e5e5e5", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
