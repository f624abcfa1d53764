"""Adapter files beside a model: finds them, and copies them with their model."""

from __future__ import annotations

import glob
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from pypop_gguf import native
from pypop_gguf.errors import PopError
from pypop_gguf.gguf_files.writer import part_path


def find_adapters(model: Path) -> dict[int, Path]:
    """Returns the adapter files beside a model by their boundary, in order. They are found by name and not opened."""
    prefix = native.adapter_path(model, 1).name.removesuffix("1.gguf")
    found = {}
    for path in model.absolute().parent.glob(f"{glob.escape(prefix)}*.gguf"):
        number = re.fullmatch(r"[1-9]\d{0,8}", path.name.removeprefix(prefix).removesuffix(".gguf"))
        if number and path.is_file():
            found[int(number[0])] = model.with_name(path.name)
    return dict(sorted(found.items()))


def write_adapter_copies(adapters: Mapping[int, Path], target: Path) -> dict[Path, Path]:
    """Copies adapters for a model that is about to be written to ``target``, within ``writing(target)``.

    Args:
        adapters: The files to copy, by boundary.
        target: The model that they will lie beside.

    Returns:
        Their targets and their parts, for ``replace_together``.

    Raises:
        PopError: A file cannot be copied.
    """
    parts = {}
    for boundary, path in adapters.items():
        part = parts[native.adapter_path(target, boundary)] = part_path(target, f"b{boundary}")
        try:
            shutil.copyfile(path, part)
        except OSError as error:
            raise PopError(f"cannot copy {path} beside {target}: {error.strerror or error}") from error
    return parts
