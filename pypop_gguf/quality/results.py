"""Figures of single questions, kept in a file of JSON Lines as they are measured, so that a run can be resumed.

The first line names the model. Each other line has the figures of one item of a task for one variant, which is a way
to read prompts such as "whole" or "b20 fitted". No texts are kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pypop_gguf import library
from pypop_gguf.errors import PopError

WHOLE = "whole"
Figures = dict[str, float]
_BEGINNING = b'{"model":'  # of the first line


def name_variant(boundary: int, n_layer: int, *, fitted: bool = False, head: int = 0, tail: int = 1) -> str:
    """Returns the name of a way to read prompts, such as "b20 fitted head 1"."""
    if boundary == n_layer:
        return WHOLE
    parts = [f"b{boundary}"]
    parts += ["fitted"] if fitted else []
    parts += [f"head {head}"] if head else []
    parts += [f"tail {tail}"] if tail != 1 else []
    return " ".join(parts)


class Results:
    """Figures by task, item and variant.

    Attributes:
        model: Name of the model's file.
        n_layer: Number of its layers.
    """

    def __init__(self, path: Path | None = None, model: Path | None = None) -> None:
        """Reads what a file has already. A line that an interruption has cut off is dropped.

        Args:
            path: The file, which is made if it is missing; None keeps the figures in memory.
            model: The model that is measured; None only reads.

        Raises:
            PopError: The file has results of another model, a line is not a result, or it cannot be read or written.
        """
        self.model = ""
        self.n_layer = 0
        self._header: dict = {}
        self._path = path
        self._figures: dict[tuple[str, str, str], Figures] = {}
        if path is None:
            return
        try:
            lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
            for number, line in enumerate(lines[:-1], start=1):
                self._read_line(number, line)
            if model is None:
                return
            header = _describe(model)
            if len(lines) == 1 and not lines[0].startswith(_BEGINNING[: len(lines[0])]):
                raise PopError(f"{path} is no file of results; give another --out")
            if lines[-1]:
                with path.open("r+b") as file:
                    file.truncate(path.stat().st_size - len(lines[-1]))
        except OSError as error:
            raise PopError(f"{path}: {error.strerror}; give another --out") from error
        if not lines[:-1]:
            self._write(header)
        elif self._header != header:
            raise PopError(f"{path} has results of {self.model}, and this is {model.name}; give another --out")
        self.model, self.n_layer = model.name, header["layers"]

    def _read_line(self, number: int, line: bytes) -> None:
        wrong = PopError(f"{self._path}: line {number} is not a result; delete the line, or give another --out")
        try:
            row = json.loads(line)
            if number == 1:
                self._header, self.model, self.n_layer = row, str(row["model"]), int(row["layers"])
                return
            key = row["task"], row["item"], row["variant"]
            figures = {str(name): float(value) for name, value in row["figures"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise wrong from None
        if not all(isinstance(part, str) for part in key) or not all(map(math.isfinite, figures.values())):
            raise wrong
        self._figures[key] = figures

    def get(self, task: str, item: str, variant: str) -> Figures | None:
        """Returns the figures of one item, or None if they were not measured yet."""
        return self._figures.get((task, item, variant))

    def add(self, task: str, item: str, variant: str, figures: Figures) -> Figures:
        """Keeps figures, and appends them to the file. Returns them as the file has them, rounded.

        Raises:
            PopError: The file cannot be written.
        """
        figures = {name: float(f"{value:.6g}") for name, value in figures.items()}
        self._figures[task, item, variant] = figures
        self._write({"task": task, "item": item, "variant": variant, "figures": figures})
        return figures

    def _write(self, row: dict) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
        except OSError as error:
            raise PopError(f"{self._path}: {error.strerror}; give another --out") from error

    def tasks(self) -> list[str]:
        """Returns the tasks, in the order in which they were measured first."""
        return list(dict.fromkeys(task for task, _, _ in self._figures))

    def variants(self) -> list[str]:
        """Returns the variants, in the order in which they were measured first."""
        return list(dict.fromkeys(variant for _, _, variant in self._figures))

    def items(self, task: str, variants: Iterable[str]) -> list[str]:
        """Returns the items of a task that were measured for all these variants, so that they can be paired."""
        variants = list(variants)
        items = dict.fromkeys(item for of, item, _ in self._figures if of == task)
        return [item for item in items if all((task, item, variant) in self._figures for variant in variants)]

    def column(self, task: str, variant: str, name: str, items: Iterable[str]) -> np.ndarray:
        """Returns one figure of a variant for each of these items, F64 [n]; nan where it is not there."""
        return np.array([self._figures[task, item, variant].get(name, math.nan) for item in items])


def _describe(model: Path) -> dict:
    # The fingerprint is the same for all quantizations, so the size tells them apart.
    return {
        "model": model.name,
        "layers": library.describe_model(model).n_layer,
        "bytes": model.stat().st_size,
        "fingerprint": library.fingerprint(model),
    }
