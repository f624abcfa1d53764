"""What ``pop-gguf bench`` makes of its raw runs: medians with intervals, the bound, and the tables.

A run is paired with those of the same phase and round, so that a slow moment of the machine falls on both sides of a ratio;
outliers stay in.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pypop_gguf.bench.runs import Run, Setting
from pypop_gguf.terminal import aligned

_RESAMPLES = 10000


@dataclass(frozen=True)
class Ratio:
    """Median of the baseline's times over the median of an engine's, with a 95% bootstrap interval over paired rounds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Mixed:
    """Half of the sequences read while the others write.

    Attributes:
        baseline_tokens_per_s: Prompt tokens and generated ones, median; ``pop_tokens_per_s`` likewise.
        baseline_wait_ms: Between two tokens of a writing sequence, median; ``pop_wait_ms`` likewise.
    """

    speedup: Ratio
    baseline_tokens_per_s: float
    pop_tokens_per_s: float
    baseline_wait_ms: float
    pop_wait_ms: float


_ENGINES = {"pop": "continued", "pop-repeat": "repeated"}


@dataclass(frozen=True)
class Case:
    """One line of the tables. Ratios are above 1 where the engine is faster than the baseline; None is not measured.

    Attributes:
        way: "continued" or "repeated", how the last prompt tokens go through the whole model.
        baseline_ms: Median time to first token; ``pop_ms`` likewise.
        bound: The speed-up that the operations left allow: baseline time x flops_ratio, plus one token's pass through the
            layers that remain for it.
        reached: The bound's time over the measured one.
        planning: Share of POP's time to first token that building and planning graphs took.
        off_before: POP off in the POP process before its first pruned pass; ``off_after``: between pruned passes.
        control: One stock process over another: the machine's own spread.
    """

    n_parallel: int
    n_prompt: int
    boundary: int
    way: str
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
    planning: float | None
    mixed: Mixed | None
    baseline_peak_bytes: int | None
    pop_peak_bytes: int | None


def summarize(runs: Iterable[Run]) -> dict[Setting, list[Case]]:
    """Medians and ratios of all cases that have at least one paired round, in order of sequences, prompt and boundary."""
    result: dict[Setting, list[Case]] = {}
    ordered = sorted(runs, key=lambda run: (*map(str, vars(run.setting).values()), run.n_parallel, run.n_prompt))
    for (setting, n_parallel, n_prompt), group in itertools.groupby(
        ordered, key=lambda run: (run.setting, run.n_parallel, run.n_prompt)
    ):
        of_case = list(group)
        for engine, boundary in sorted(
            {(run.engine, run.boundary) for run in of_case if run.engine in _ENGINES}, key=lambda key: key[::-1]
        ):
            case = _case(of_case, setting, n_parallel, n_prompt, engine, boundary)
            if case:
                result.setdefault(setting, []).append(case)
    return result


def _case(runs: list[Run], setting: Setting, n_parallel: int, n_prompt: int, engine: str, boundary: int) -> Case | None:
    baseline = setting.baseline

    def pairs(phase: str, name: str) -> list[tuple[Run, Run]]:
        of_phase = [run for run in runs if run.phase == phase]
        left = {(run.session, run.run): run for run in of_phase if run.engine == baseline}
        right = {
            (run.session, run.run): run
            for run in of_phase
            if run.engine == name and (name not in _ENGINES or run.boundary == boundary)
        }
        return [(left[key], right[key]) for key in left if key in right]

    main = pairs("main", engine)
    if not main:
        return None
    stock, pop = zip(*main, strict=True)
    baseline_ms, pop_ms = (_median(side, "ttft_ms") for side in (stock, pop))
    # one token's pass; a token that is continued has only the layers from the boundary on before it
    share = (setting.n_layer - boundary) / setting.n_layer if engine == "pop" else 1
    flops_ratio = pop[-1].flops_ratio
    bound_ms = (
        None if flops_ratio is None else baseline_ms * flops_ratio + _median(stock, "decode_ms_per_token") * share
    )
    planned = [run.plan_ms / run.ttft_ms for run in pop if run.plan_ms is not None]
    return Case(
        n_parallel=n_parallel,
        n_prompt=n_prompt,
        boundary=boundary,
        way=_ENGINES[engine],
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
        planning=statistics.median(planned) if planned else None,
        mixed=_mixed(pairs("mixed", engine), n_parallel, n_prompt),
        baseline_peak_bytes=max((run.peak_bytes for run in stock if run.peak_bytes), default=None),
        pop_peak_bytes=max((run.peak_bytes for run in pop if run.peak_bytes), default=None),
    )


def _mixed(pairs: list[tuple[Run, Run]], n_parallel: int, n_prompt: int) -> Mixed | None:
    if not pairs:
        return None
    n_writers = n_parallel // 2
    n_read = (n_parallel - n_writers) * n_prompt

    def tokens_per_s(run: Run) -> float:
        return 1000 * (n_read / run.ttft_ms + n_writers / run.decode_ms_per_token)

    stock, pop = zip(*pairs, strict=True)
    return Mixed(
        _ratio(pairs, "ttft_ms"),
        *(statistics.median(map(tokens_per_s, side)) for side in (stock, pop)),
        *(_median(side, "decode_ms_per_token") for side in (stock, pop)),
    )


def _median(runs: Iterable[Run], attribute: str) -> float:
    return statistics.median(getattr(run, attribute) for run in runs)


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
    return [
        {**vars(setting), "cases": [dataclasses.asdict(case) for case in cases]} for setting, cases in summary.items()
    ]


def tables(setting: Setting, cases: list[Case]) -> str:
    """The printed form of one setting's cases: its conditions, times to first token, and what should stay as it was."""
    stock = setting.baseline == "stock"
    name = "stock" if stock else "off"
    baseline = "stock llama.cpp in a process of its own" if stock else "our library with POP off (no --stock given)"
    key = ("prompt", "seqs", "boundary", "last token")
    first = [(*key, "runs", f"{name} ms", "POP ms", "speed-up [95%]", "bound", "of bound", "planning")]
    second = [(*key, f"{name}/{name}", "POP off before", "POP off after", "decode", f"{name} MB", "POP MB")]
    third = [(*key, f"{name} tokens/s", "POP tokens/s", "speed-up [95%]", f"{name} ms/token", "POP ms/token")]
    for case in cases:
        key = (case.n_prompt, case.n_parallel, case.boundary, case.way)
        reached = _text(case.reached, "{:.1%}")
        times = (
            f"{case.baseline_ms:.1f}",
            f"{case.pop_ms:.1f}",
            str(case.speedup),
            _text(case.bound, "{:.3f}"),
            reached,
        )
        first.append((*key, case.runs, *times, _text(case.planning, "{:.2%}")))
        ratios = map(_text, (case.control, case.off_before, case.off_after, case.decode))
        peaks = (_text(peak and peak / 1e6, "{:.0f}") for peak in (case.baseline_peak_bytes, case.pop_peak_bytes))
        second.append((*key, *ratios, *peaks))
        if mixed := case.mixed:
            rates = (f"{value:.1f}" for value in (mixed.baseline_tokens_per_s, mixed.pop_tokens_per_s))
            waits = (f"{value:.1f}" for value in (mixed.baseline_wait_ms, mixed.pop_wait_ms))
            third.append((*key, *rates, str(mixed.speedup), *waits))
    return "\n".join(
        (
            f"model     {setting.model} ({setting.file_type}), {setting.n_layer} layers",
            f"machine   {setting.machine}; {setting.threads} threads, micro-batches of {setting.ubatch}, flash attention {setting.flash_attn}",
            f"baseline  {baseline}; {setting.version}",
            "",
            "Time to first token, medians. bound: the speed-up that the operations left allow (from the two real graphs, plus one",
            "token's pass through the layers that remain for it). planning: share that building and planning POP's graphs took.",
            *aligned(first),
            "",
            f"What POP must leave alone, as {name} time / other time: two {name} processes (the machine's own spread), POP off before",
            f"the first pruned pass and between pruned passes, time per generated token (mean of {setting.n_decode}); peak memory.",
            *aligned(second),
            *(["", *_MIXED, *aligned(third)] if len(third) > 1 else []),
        )
    )


_MIXED = (
    "Half of the sequences read their prompts while the others write: tokens per second of both, and a writer's wait for each",
    "token (a step: one token of each writer, and as much of the prompts as fits into the micro-batch).",
)


def _text(value: object, form: str = "{}") -> str:
    return "N/A" if value is None else form.format(value)
