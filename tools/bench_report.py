"""What ``pop-gguf bench`` makes of its raw runs: the CSV, medians with intervals, the bound, and the tables.

One row of the CSV is one run of one engine. A run is paired with those of the same phase and round, so that a slow moment of
the machine falls on both sides of a ratio; outliers stay in.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from pypop_gguf.errors import PopError

_RESAMPLES = 10000


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
        phase: "control": two baseline processes; "before": POP off in the POP process, before any pruned pass; "main".
        engine: "stock" or "off" (the baseline) and the same with "-2", "pop", or "pop-off": off in the POP process.
        boundary: Of a "pop" run; 0 for the others.
        n_prompt: Tokens of each sequence's prompt.
        n_parallel: Sequences.
        run: Round within its phase.
        flops_ratio: Of a "pop" run: operations of the pruned pass over those of stock's whole prefill.
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
    peak_bytes: int | None


@dataclass(frozen=True)
class Ratio:
    """Median of the baseline's times over the median of an engine's, with a 95% bootstrap interval over paired rounds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Case:
    """One line of the tables. Ratios are above 1 where the engine is faster than the baseline; None is not measured.

    Attributes:
        baseline_ms: Median time to first token; ``pop_ms`` likewise.
        bound: The speed-up that the operations left allow: baseline time x flops_ratio, plus one token's pass.
        reached: The bound's time over the measured one.
        off_before: POP off in the POP process before its first pruned pass; ``off_after``: between pruned passes.
        control: One stock process over another: the machine's own spread.
    """

    n_parallel: int
    n_prompt: int
    boundary: int
    runs: int
    baseline_ms: float
    pop_ms: float
    speedup: Ratio
    bound: float | None
    reached: float | None
    decode: Ratio
    off_before: Ratio | None
    off_after: Ratio | None
    control: Ratio | None
    baseline_peak_bytes: int | None
    pop_peak_bytes: int | None


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
_FLOATS = {"ttft_ms", "decode_ms_per_token", "flops_ratio"}


def _parsed(name: str, text: str) -> int | float | str | None:
    if not text and name in ("flops_ratio", "peak_bytes"):
        return None
    return int(text) if name in _INTEGERS else float(text) if name in _FLOATS else text


def _check_columns(file: IO[str], path: Path) -> None:
    if next(csv.reader(file), None) != COLUMNS:
        raise PopError(f"{path} is not a table of this version of `pop-gguf bench`: give another file")


def summarize(runs: Iterable[Run]) -> dict[Setting, list[Case]]:
    """Medians and ratios of all cases that have at least one paired round, in order of sequences, prompt and boundary."""
    result: dict[Setting, list[Case]] = {}
    ordered = sorted(runs, key=lambda run: (*map(str, vars(run.setting).values()), run.n_parallel, run.n_prompt))
    for (setting, n_parallel, n_prompt), group in itertools.groupby(
        ordered, key=lambda run: (run.setting, run.n_parallel, run.n_prompt)
    ):
        of_case = list(group)
        for boundary in sorted({run.boundary for run in of_case if run.engine == "pop"}):
            case = _case(of_case, setting.baseline, n_parallel, n_prompt, boundary)
            if case:
                result.setdefault(setting, []).append(case)
    return result


def _case(runs: list[Run], baseline: str, n_parallel: int, n_prompt: int, boundary: int) -> Case | None:
    def pairs(phase: str, engine: str, against: str = baseline) -> list[tuple[Run, Run]]:
        cut = boundary if engine == "pop" else 0
        of_phase = [run for run in runs if run.phase == phase]
        left = {(run.session, run.run): run for run in of_phase if run.engine == against}
        right = {(run.session, run.run): run for run in of_phase if run.engine == engine and run.boundary == cut}
        return [(left[key], right[key]) for key in left if key in right]

    main = pairs("main", "pop")
    if not main:
        return None
    stock, pop = zip(*main, strict=True)
    baseline_ms, pop_ms = (statistics.median(run.ttft_ms for run in side) for side in (stock, pop))
    one_token_ms = statistics.median(run.decode_ms_per_token for run in stock)
    flops_ratio = pop[-1].flops_ratio
    bound_ms = None if flops_ratio is None else baseline_ms * flops_ratio + one_token_ms
    return Case(
        n_parallel=n_parallel,
        n_prompt=n_prompt,
        boundary=boundary,
        runs=len(main),
        baseline_ms=baseline_ms,
        pop_ms=pop_ms,
        speedup=_ratio(main, "ttft_ms"),
        bound=bound_ms and baseline_ms / bound_ms,
        reached=bound_ms and bound_ms / pop_ms,
        decode=_ratio(main, "decode_ms_per_token"),
        off_before=_ratio(pairs("before", "pop-off"), "ttft_ms"),
        off_after=_ratio(pairs("main", "pop-off"), "ttft_ms"),
        control=_ratio(pairs("control", f"{baseline}-2"), "ttft_ms"),
        baseline_peak_bytes=max((run.peak_bytes for run in stock if run.peak_bytes), default=None),
        pop_peak_bytes=max((run.peak_bytes for run in pop if run.peak_bytes), default=None),
    )


def _ratio(pairs: list[tuple[Run, Run]], attribute: str) -> Ratio | None:
    if not pairs:
        return None
    times = np.array([[getattr(run, attribute) for run in pair] for pair in pairs])  # [rounds, 2]
    picked = np.random.default_rng(0).integers(len(times), size=(_RESAMPLES, len(times)))
    medians = np.median(times[picked], axis=1)  # [resamples, 2]
    low, high = np.percentile(medians[:, 0] / medians[:, 1], (2.5, 97.5))
    value = np.median(times[:, 0]) / np.median(times[:, 1])
    return Ratio(float(value), float(low), float(high))


def as_json(summary: dict[Setting, list[Case]]) -> list[dict]:
    return [{**vars(setting), "cases": [dataclasses.asdict(case) for case in cases]} for setting, cases in summary.items()]


def tables(setting: Setting, cases: list[Case]) -> str:
    """The printed form of one setting's cases: its conditions, times to first token, and what should stay as it was."""
    stock = setting.baseline == "stock"
    name = "stock" if stock else "off"
    baseline = "stock llama.cpp in a process of its own" if stock else "our library with POP off (no --stock given)"
    first = [("prompt", "seqs", "boundary", "runs", f"{name} ms", "POP ms", "speed-up [95%]", "bound", "of bound")]
    second = [("prompt", "seqs", "boundary", f"{name}/{name}", "POP off before", "POP off after", "decode", f"{name} MB", "POP MB")]
    for case in cases:
        key = (case.n_prompt, case.n_parallel, case.boundary)
        reached = _text(case.reached, "{:.1%}")
        times = (f"{case.baseline_ms:.1f}", f"{case.pop_ms:.1f}", str(case.speedup), _text(case.bound, "{:.3f}"), reached)
        first.append((*key, case.runs, *times))
        ratios = map(_text, (case.control, case.off_before, case.off_after, case.decode))
        peaks = (_text(peak and peak / 1e6, "{:.0f}") for peak in (case.baseline_peak_bytes, case.pop_peak_bytes))
        second.append((*key, *ratios, *peaks))
    return "\n".join(
        (
            f"model     {setting.model} ({setting.file_type}), {setting.n_layer} layers",
            f"machine   {setting.machine}; {setting.threads} threads, micro-batches of {setting.ubatch}, flash attention {setting.flash_attn}",
            f"baseline  {baseline}; {setting.version}",
            "",
            "Time to first token, medians. bound: the speed-up that the operations left allow (from the two real graphs, plus one",
            "token's pass through the whole model).",
            *_aligned(first),
            "",
            f"What POP must leave alone, as {name} time / other time: two {name} processes (the machine's own spread), POP off before",
            f"the first pruned pass and between pruned passes, time per generated token (mean of {setting.n_decode}); peak memory.",
            *_aligned(second),
        )
    )


def _text(value: object, form: str = "{}") -> str:
    return "N/A" if value is None else form.format(value)


def _aligned(rows: list[tuple]) -> list[str]:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{cell!s:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
