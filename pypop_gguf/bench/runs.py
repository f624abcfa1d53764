"""The raw runs of ``pop-gguf bench`` and the CSV file that keeps them. One row is one run of one engine."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pypop_gguf.errors import PopError


@dataclass(frozen=True)
class Setting:
    """The conditions that the runs of one table have in common."""

    machine: str
    model: str
    file_type: str
    n_layer: int
    threads: int
    ubatch: int
    flash_attn: str
    n_decode: int
    version: str
    baseline: str  # "stock", or "off" for our library with POP off in a process of its own


@dataclass(frozen=True)
class Run:
    """One measured run, a row of the CSV.

    Attributes:
        session: When the command started; rounds are paired within one session.
        timestamp: When the run ended.
        setting: The conditions.
        phase: "control": two baseline processes; "before": POP off in the POP process, before any pruned pass; "main":
            all engines in turn; "mixed": half of the sequences read while the others write.
        engine: "stock" or "off" is the baseline, with "-2" a second process of it. "pop": the last prompt tokens
            continue from the boundary; "pop-repeat": they repeat the layers below it; "pop-off": POP off in the POP
            process.
        boundary: Boundary of a "pop" or "pop-repeat" run; 0 for the others.
        n_prompt: Tokens of each sequence's prompt.
        n_parallel: Number of sequences.
        run: Round within its phase.
        ttft_ms: Time until the logits after every prompt are there; for "mixed", until all prompts are read.
        decode_ms_per_token: Mean over the tokens generated after the prompt; for "mixed", how long a writing sequence
            waits for each token.
        flops_ratio: Operations of the pruned pass of a POP run over those of stock's whole prefill.
        plan_ms: Part of the time to first token that building and planning graphs took; not known for stock.
        peak_bytes: The most memory that the engine's process has held so far.
    """

    session: str
    timestamp: str
    setting: Setting
    phase: str
    engine: str
    boundary: int
    n_prompt: int
    n_parallel: int
    run: int
    ttft_ms: float
    decode_ms_per_token: float
    flops_ratio: float | None
    plan_ms: float | None
    peak_bytes: int | None


_SETTING = [field.name for field in dataclasses.fields(Setting)]
_OWN = [field.name for field in dataclasses.fields(Run) if field.name != "setting"]
COLUMNS = [*_OWN[:2], *_SETTING, *_OWN[2:]]


class Recorder:
    """Keeps runs, and appends each to a CSV file at once, so that nothing measured is lost if the command is ended.

    Args:
        path: File to append to; None keeps the runs in memory only.

    Raises:
        PopError: The file cannot be written or has other columns.
    """

    def __init__(self, path: Path | None) -> None:
        self.runs: list[Run] = []
        self._path = path
        self._file: IO[str] | None = None
        if path is None:
            return
        try:
            if path.exists() and path.stat().st_size:
                with path.open(newline="", encoding="utf-8") as file:
                    _check_columns(file, path)
            self._file = path.open("a", newline="", encoding="utf-8")
        except OSError as error:
            raise self._failure(error) from error
        if not self._file.tell():
            self._write(self._file, COLUMNS)

    def add(self, run: Run) -> None:
        self.runs.append(run)
        if self._file:
            values = {**vars(run), **vars(run.setting)}
            self._write(self._file, ["" if values[name] is None else values[name] for name in COLUMNS])

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _write(self, file: IO[str], row: Sequence[object]) -> None:
        try:
            csv.writer(file).writerow(row)
            file.flush()
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> PopError:
        return PopError(f"cannot write {self._path}: {error.strerror or error}")


def read_csv(path: Path) -> list[Run]:
    """Reads the runs of a file that ``Recorder`` wrote.

    Raises:
        PopError: No such file, other columns, or a row that makes no sense.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            _check_columns(file, path)
            rows = list(csv.DictReader(file, COLUMNS))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PopError(f"{path}: cannot read it: {getattr(error, 'strerror', None) or error}") from error
    runs = []
    for number, row in enumerate(rows, 2):
        try:
            setting = Setting(**{name: _parse(name, row[name]) for name in _SETTING})
            own = {name: _parse(name, row[name]) for name in _OWN}
        except (TypeError, ValueError):
            raise PopError(f"{path}: line {number} is damaged: delete it") from None
        runs.append(Run(setting=setting, **own))
    return runs


_INTEGERS = {"n_layer", "threads", "ubatch", "n_decode", "boundary", "n_prompt", "n_parallel", "run", "peak_bytes"}
_FLOATS = {"ttft_ms", "decode_ms_per_token", "flops_ratio", "plan_ms"}


def _parse(name: str, text: str) -> Any:
    if not text and name in ("flops_ratio", "plan_ms", "peak_bytes"):
        return None
    if name not in _FLOATS:
        return int(text) if name in _INTEGERS else text
    value = float(text)
    if not 0 <= value < math.inf or (value == 0 and name != "plan_ms"):
        raise ValueError(f"{name} is {text}")
    return value


def _check_columns(file: IO[str], path: Path) -> None:
    try:
        columns = next(csv.reader(file), None)
    except (UnicodeDecodeError, csv.Error):  # The file is no text, but a model for example.
        columns = None
    if columns != COLUMNS:
        raise PopError(f"{path} is not a table of this version of `pop-gguf bench`: give another file")
