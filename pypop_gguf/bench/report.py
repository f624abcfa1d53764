"""Turns the raw runs of ``pop-gguf bench`` into medians with intervals, the limit of the speed-up, and tables.

A run is paired with the baseline's run of the same phase and round, so that a slow moment of the machine is on both
sides of a ratio. Outliers stay in.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pypop_gguf.bench.runs import Run, Setting
from pypop_gguf.statistics import Ratio, bootstrap_ratio
from pypop_gguf.terminal import aligned


@dataclass(frozen=True)
class Mixed:
    """The results of the case in which half of the sequences read and the others write.

    Attributes:
        speedup: Time until all prompts are read, the baseline's over POP's.
        baseline_tokens_per_s: Median rate of prompt tokens and generated ones together; ``pop_tokens_per_s`` likewise.
        baseline_wait_ms: Median time between two tokens of a writing sequence; ``pop_wait_ms`` likewise.
    """

    speedup: Ratio
    baseline_tokens_per_s: float
    pop_tokens_per_s: float
    baseline_wait_ms: float
    pop_wait_ms: float


_ENGINES = {"pop": "continued", "pop-repeat": "repeated"}


@dataclass(frozen=True)
class Case:
    """One line of the tables. A ratio is above 1 where the engine is faster than the baseline; None was not measured.

    Attributes:
        way: "continued" if the last prompt tokens reuse what the layers below the boundary have computed, else
            "repeated".
        runs: Number of paired rounds.
        baseline_ms: Median time to first token; ``pop_ms`` likewise.
        speedup: Time to first token, the baseline's over POP's.
        limit: The speed-up to expect if time were proportional to operations. The expected time is flops_ratio times
            that of the baseline, plus the pass of one token through the layers that remain for it.
        reached: The time expected at the limit, over the measured one.
        decode: Time per generated token, the baseline's over POP's.
        off_before: The baseline's time over that of POP off in the POP process, before its first pruned pass;
            ``off_after``: between pruned passes.
        control: The time of one baseline process over that of another one: the machine's own spread.
        planning: Share of POP's time to first token that building and planning graphs took.
        mixed: What is measured while half of the sequences read.
        baseline_peak_bytes: Most memory that the process has held; ``pop_peak_bytes`` likewise.
    """

    n_parallel: int
    n_prompt: int
    boundary: int
    way: str
    runs: int
    baseline_ms: float
    pop_ms: float
    speedup: Ratio
    limit: float | None
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
    """Returns the cases that have at least one paired round, in order of sequences, prompt and boundary."""
    result: dict[Setting, list[Case]] = {}
    ordered = sorted(runs, key=lambda run: (*map(str, vars(run.setting).values()), run.n_parallel, run.n_prompt))
    for (setting, n_parallel, n_prompt), group in itertools.groupby(
        ordered, key=lambda run: (run.setting, run.n_parallel, run.n_prompt)
    ):
        of_case = list(group)
        for engine, boundary in sorted(
            {(run.engine, run.boundary) for run in of_case if run.engine in _ENGINES}, key=lambda key: key[::-1]
        ):
            case = _summarize_case(of_case, setting, n_parallel, n_prompt, engine, boundary)
            if case:
                result.setdefault(setting, []).append(case)
    return result


def _summarize_case(
    runs: list[Run], setting: Setting, n_parallel: int, n_prompt: int, engine: str, boundary: int
) -> Case | None:
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

    def ttft_ratio(phase: str, name: str) -> Ratio | None:
        found = pairs(phase, name)
        return _compute_ratio(found, "ttft_ms") if found else None

    main = pairs("main", engine)
    if not main:
        return None
    stock, pop = zip(*main, strict=True)
    baseline_ms, pop_ms = (_compute_median(side, "ttft_ms") for side in (stock, pop))
    # This is the share of one token's pass that is left: a continued token runs only the layers from the boundary on.
    share = (setting.n_layer - boundary) / setting.n_layer if engine == "pop" else 1
    flops_ratio = pop[-1].flops_ratio
    limit_ms = (
        None
        if flops_ratio is None
        else baseline_ms * flops_ratio + _compute_median(stock, "decode_ms_per_token") * share
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
        speedup=_compute_ratio(main, "ttft_ms"),
        limit=limit_ms and baseline_ms / limit_ms,
        reached=limit_ms and limit_ms / pop_ms,
        decode=_compute_ratio(main, "decode_ms_per_token"),
        off_before=ttft_ratio("before", "pop-off"),
        off_after=ttft_ratio("main", "pop-off"),
        control=ttft_ratio("control", f"{baseline}-2"),
        planning=statistics.median(planned) if planned else None,
        mixed=_summarize_mixed(pairs("mixed", engine), n_parallel, n_prompt),
        baseline_peak_bytes=max((run.peak_bytes for run in stock if run.peak_bytes), default=None),
        pop_peak_bytes=max((run.peak_bytes for run in pop if run.peak_bytes), default=None),
    )


def _summarize_mixed(pairs: list[tuple[Run, Run]], n_parallel: int, n_prompt: int) -> Mixed | None:
    if not pairs:
        return None
    n_writers = n_parallel // 2
    n_read = (n_parallel - n_writers) * n_prompt

    def tokens_per_s(run: Run) -> float:
        return 1000 * (n_read / run.ttft_ms + n_writers / run.decode_ms_per_token)

    stock, pop = zip(*pairs, strict=True)
    return Mixed(
        speedup=_compute_ratio(pairs, "ttft_ms"),
        baseline_tokens_per_s=statistics.median(map(tokens_per_s, stock)),
        pop_tokens_per_s=statistics.median(map(tokens_per_s, pop)),
        baseline_wait_ms=_compute_median(stock, "decode_ms_per_token"),
        pop_wait_ms=_compute_median(pop, "decode_ms_per_token"),
    )


def _compute_median(runs: Iterable[Run], attribute: str) -> float:
    return statistics.median(getattr(run, attribute) for run in runs)


def _compute_ratio(pairs: list[tuple[Run, Run]], attribute: str) -> Ratio:
    stock, pop = (np.array([getattr(run, attribute) for run in side]) for side in zip(*pairs, strict=True))
    return bootstrap_ratio(stock, pop)


def as_json(summary: dict[Setting, list[Case]]) -> list[dict]:
    """Returns the conditions and the cases of each setting, in types that JSON has."""
    return [
        {**vars(setting), "cases": [dataclasses.asdict(case) for case in cases]} for setting, cases in summary.items()
    ]


def format_tables(setting: Setting, cases: list[Case]) -> str:
    """Returns what is printed of one setting: its conditions, times to first token, and what should stay as it was."""
    name = "stock" if setting.baseline == "stock" else "off"
    baseline = "stock llama.cpp in a process of its own" if name == "stock" else _OFF
    case_columns = ("prompt", "seqs", "boundary", "last token")
    times: list[tuple] = [
        (*case_columns, "runs", f"{name} ms", "POP ms", "speed-up [95%]", "limit", "of limit", "planning")
    ]
    others: list[tuple] = [
        (*case_columns, f"{name}/{name}", "POP off before", "POP off after", "decode", f"{name} MB", "POP MB")
    ]
    mixes: list[tuple] = [
        (*case_columns, f"{name} tokens/s", "POP tokens/s", "speed-up [95%]", f"{name} ms/token", "POP ms/token")
    ]
    for case in cases:
        key = (case.n_prompt, case.n_parallel, case.boundary, case.way)
        times.append(
            (
                *key,
                case.runs,
                f"{case.baseline_ms:.1f}",
                f"{case.pop_ms:.1f}",
                case.speedup,
                _format(case.limit, "{:.3f}"),
                _format(case.reached, "{:.1%}"),
                _format(case.planning, "{:.2%}"),
            )
        )
        ratios = map(_format, (case.control, case.off_before, case.off_after, case.decode))
        peaks = (_format(peak and peak / 1e6, "{:.0f}") for peak in (case.baseline_peak_bytes, case.pop_peak_bytes))
        others.append((*key, *ratios, *peaks))
        if mixed := case.mixed:
            rates = (f"{value:.1f}" for value in (mixed.baseline_tokens_per_s, mixed.pop_tokens_per_s))
            waits = (f"{value:.1f}" for value in (mixed.baseline_wait_ms, mixed.pop_wait_ms))
            mixes.append((*key, *rates, mixed.speedup, *waits))
    conditions = f"{setting.threads} threads, micro-batches of {setting.ubatch}, flash attention {setting.flash_attn}"
    return "\n".join(
        (
            f"model     {setting.model} ({setting.file_type}), {setting.n_layer} layers",
            f"machine   {setting.machine}; {conditions}",
            f"baseline  {baseline}; {setting.version}",
            "",
            *_TIMES,
            *aligned(times),
            "",
            *(line.format(name=name, n_decode=setting.n_decode) for line in _OTHERS),
            *aligned(others),
            *(["", *_MIXES, *aligned(mixes)] if len(mixes) > 1 else []),
        )
    )


_OFF = "our library with POP off (no --stock given)"
_TIMES = (
    "Medians of the time to the first token. limit: the speed-up to expect if time were proportional to operations,",
    "counted from both graphs and the last token's own pass. planning: the share of time that planning graphs took.",
)
_OTHERS = (
    "What POP must leave alone, as the time of {name} over the other time: two {name} processes (the machine's own",
    "spread), POP off before the first pruned pass and between pruned ones, and the time per generated token (the",
    "mean of {n_decode}). The last columns are peak memory.",
)
_MIXES = (
    "Half of the sequences read their prompts while the others write: tokens per second of both, and how long a writer",
    "waits for each token (a step has a token of each writer, and as much of the prompts as the micro-batch holds).",
)


def _format(value: object, form: str = "{}") -> str:
    return "N/A" if value is None else form.format(value)
