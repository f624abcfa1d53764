"""The raw runs of ``pop-gguf bench`` and the CSV file that keeps them. One row is one run of one engine."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pypop_gguf.errors import PopError


@dataclass(frozen=True)
class Setting:
    """What the runs of one table have in common."""

    machine: str
    model: str
    file_type: str
    n_layer: int
    threads: int
    ubatch: int
    flash_attn: str
    n_decode: int
    version: str
    baseline: str  # "stock", or "off": our library with POP off in a process of its own


@dataclass(frozen=True)
class Run:
    """One measured run, a row of the CSV.

    Attributes:
        session: When the command started; rounds are paired within one session.
        phase: "control": two baseline processes; "before": POP off in the POP process, before any pruned pass; "main"; "mixed":
            half of the sequences read while the others write.
        engine: "stock" or "off" (the baseline) and the same with "-2"; "pop": the last prompt tokens go on from the boundary;
            "pop-repeat": they repeat the layers below it; "pop-off": off in the POP process.
        boundary: Of a "pop" or "pop-repeat" run; 0 for the others.
        n_prompt: Tokens of each sequence's prompt.
        n_parallel: Sequences.
        run: Round within its phase.
        ttft_ms: Until the logits after every prompt are there. "mixed": until all prompts are read.
        decode_ms_per_token: Mean over the tokens generated after the prompt. "mixed": a writing sequence's wait for each token.
        flops_ratio: Of a POP run: operations of the pruned pass over those of stock's whole prefill.
        plan_ms: Of the time to first token, spent on building and planning graphs. Not known of stock.
        peak_bytes: The most memory the engine's process has held so far.
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
    """Keeps runs, and appends each to a CSV file at once, so that whatever ends the command leaves what it has measured.

    Args:
        path: None keeps them in memory only; an existing file is continued.

    Raises:
        PopError: The file cannot be written or has other columns.
    """

    def __init__(self, path: Path | None) -> None:
        self.runs: list[Run] = []
        self._path, self._file = path, None
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
            self._write(COLUMNS)

    def add(self, run: Run) -> None:
        self.runs.append(run)
        if self._file:
            values = {**vars(run), **vars(run.setting)}
            self._write(["" if values[name] is None else values[name] for name in COLUMNS])

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _write(self, row: Sequence[object]) -> None:
        try:
            csv.writer(self._file).writerow(row)
            self._file.flush()
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
    except (OSError, UnicodeDecodeError) as error:
        raise PopError(f"{path}: cannot read it: {getattr(error, 'strerror', None) or error}") from error
    runs = []
    for number, row in enumerate(rows, 2):
        try:
            setting = Setting(**{name: int(row[name]) if name in _INTEGERS else row[name] for name in _SETTING})
            own = {name: _parsed(name, row[name]) for name in _OWN}
        except (TypeError, ValueError):
            raise PopError(f"{path}: line {number} is damaged: delete it") from None
        runs.append(Run(setting=setting, **own))
    return runs


_INTEGERS = {"n_layer", "threads", "ubatch", "n_decode", "boundary", "n_prompt", "n_parallel", "run", "peak_bytes"}
_FLOATS = {"ttft_ms", "decode_ms_per_token", "flops_ratio", "plan_ms"}


def _parsed(name: str, text: str) -> int | float | str | None:
    if not text and name in ("flops_ratio", "plan_ms", "peak_bytes"):
        return None
    return int(text) if name in _INTEGERS else float(text) if name in _FLOATS else text


def _check_columns(file: IO[str], path: Path) -> None:
    try:
        columns = next(csv.reader(file), None)
    except (UnicodeDecodeError, csv.Error):  # a model, say
        columns = None
    if columns != COLUMNS:
        raise PopError(f"{path} is not a table of this version of `pop-gguf bench`: give another file")
