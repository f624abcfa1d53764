"""``pop-gguf bench``: time to first token with POP against stock llama.cpp, with the bound and the machine's own spread.

Engines are processes of their own (tools/bench_engine.py) that take turns in both orders. tools/bench_report.py turns the
raw runs into tables, tools/bench_plot.py into a figure.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pypop_gguf import __version__, _library
from pypop_gguf.errors import PopError
from pypop_gguf.gguf_header import read_header
from pypop_gguf.metadata import metadata_of
from pypop_gguf.tools import bench_plot, bench_report
from pypop_gguf.tools.bench_engine import Engine
from pypop_gguf.tools.bench_report import Recorder, Run, Setting

DESCRIPTION = """\
Measures time to first token and time per token with POP and without. For each case: two stock processes against each other,
then stock, POP at each boundary, and POP off taking turns. Every run is appended to the CSV at once; Ctrl-C prints the tables
of what was measured so far."""

EPILOG = """\
Prompts are random tokens, the same for every engine. `pop-gguf random-model` writes a model to measure on without a
download. A model is loaded twice at a time."""

_MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--prompt", type=_numbers, default=[32, 128, 512, 2048], metavar="N,N", help="prompt tokens (default: 32,128,512,2048)")
    parser.add_argument("--boundary", type=_numbers, metavar="B,B", help="first layer that prefill skips (default: the file's, or two thirds of the layers)")
    parser.add_argument("--parallel", type=_numbers, default=[1, 8], metavar="N,N", help="sequences read at once (default: 1,8)")
    parser.add_argument("--decode", type=int, default=32, metavar="N", help="tokens generated after each prompt (default: 32)")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="rounds of each case (default: 5)")
    parser.add_argument("--threads", type=int, metavar="N", help="(default: the cores this process may use)")
    parser.add_argument("--ubatch", type=int, default=512, metavar="N", help="tokens of a micro-batch (default: 512)")
    parser.add_argument("--flash-attn", choices=("on", "off"), default="off", help="(default: off)")
    parser.add_argument("--stock", type=Path, metavar="DIR", help="directory with an unpatched llama_cpp package (default: compare with POP off)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append every run to it")
    parser.add_argument("--from-csv", type=Path, metavar="FILE", help="make tables and plot from it without measuring")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot the speed-ups, also as FILE.svg")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measures, or reads what was measured, and prints it.

    Raises:
        PopError: The arguments do not fit the model, or an engine failed; runs finished before are in the CSV.
    """
    if arguments.plot:
        bench_plot.check(arguments.plot)
    interrupted = False
    if arguments.from_csv:
        if arguments.model or arguments.csv:
            raise PopError("--from-csv measures nothing: drop it, or MODEL.gguf and --csv")
        runs = bench_report.read_csv(arguments.from_csv)
    else:
        plan = _plan(arguments)
        recorder = Recorder(arguments.csv)
        try:
            _measure(plan, recorder)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            recorder.close()
        runs = recorder.runs
    summary = bench_report.summarize(runs)
    if interrupted:
        print(f"interrupted after {len(runs)} runs", file=sys.stderr)
    elif not summary:
        raise PopError(f"{arguments.from_csv}: no case in it is complete enough to compare")
    if arguments.json:
        print(json.dumps(bench_report.as_json(summary), indent=2))
    elif summary:
        print("\n\n".join(bench_report.tables(setting, cases) for setting, cases in summary.items()))
    if arguments.plot and summary:
        bench_plot.plot(summary, arguments.plot)
    return 130 if interrupted else 0


def _numbers(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 32,128") from None


@dataclass(frozen=True)
class _Plan:
    """The checked arguments."""

    model: Path
    n_layer: int
    boundaries: list[int]
    prompts: list[int]
    parallels: list[int]
    n_decode: int
    runs: int
    threads: int
    ubatch: int
    flash_attn: str
    stock: Path | None

    @property
    def baseline(self) -> str:
        return "stock" if self.stock else "off"


def _plan(arguments: argparse.Namespace) -> _Plan:
    if arguments.model is None:
        raise PopError("give a GGUF file to measure, or --from-csv FILE")
    reader = read_header(arguments.model)
    metadata = metadata_of(reader, arguments.model)
    support = _library.describe_model(arguments.model)
    n_layer = support.n_layer
    if support.refusal:
        raise PopError(f"{arguments.model} ({support.architecture}): {support.refusal}")
    of_file = metadata.boundary if metadata else None
    boundaries = arguments.boundary or [n_layer - n_layer // 3 if of_file is None else of_file]
    context = reader.get_field(f"{support.architecture}.context_length")

    _check_range("--boundary", boundaries, 1, n_layer)
    longest = int(context.contents()) if context else None
    _check_range("--decode", [arguments.decode], 1, None)
    _check_range("--prompt", arguments.prompt, 2, longest and longest - arguments.decode)
    _check_range("--runs", [arguments.runs], 1, None)
    _check_range("--ubatch", [arguments.ubatch], 1, None)
    _check_range("--parallel", arguments.parallel, 1, min(_MAX_SEQUENCES, arguments.ubatch))
    threads = _cores() if arguments.threads is None else arguments.threads
    _check_range("--threads", [threads], 1, None)
    if arguments.stock and not (arguments.stock / "llama_cpp" / "__init__.py").is_file():
        raise PopError(f"--stock {arguments.stock}: no llama_cpp package in it")
    return _Plan(
        arguments.model, n_layer, boundaries, arguments.prompt, arguments.parallel, arguments.decode, arguments.runs,
        threads, arguments.ubatch, arguments.flash_attn, arguments.stock,
    )  # fmt: skip


def _check_range(option: str, values: list[int], low: int, high: int | None) -> None:
    for value in values:
        if value < low or (high is not None and value > high):
            allowed = f"at least {low}" if high is None else f"{low} to {high}"
            raise PopError(f"{option} {value} is out of range for this model and these settings: give {allowed}")


def _measure(plan: _Plan, recorder: Recorder) -> None:
    cases = [(n_parallel, n_prompt) for n_parallel in plan.parallels for n_prompt in plan.prompts]
    progress = _Progress(plan, cases)
    session = _now()
    try:
        for n_parallel, n_prompt in cases:
            _measure_case(plan, n_parallel, n_prompt, session, recorder, progress)
    finally:
        progress.end()


def _measure_case(
    plan: _Plan, n_parallel: int, n_prompt: int, session: str, recorder: Recorder, progress: _Progress
) -> None:
    # Fresh processes for each case: its peak memory is its own, and "before" really is before any pruned pass.
    def start(name: str) -> contextlib.closing[Engine]:
        engine = Engine(
            name, plan.model, plan.stock if name.startswith("stock") else None,
            n_threads=plan.threads, n_ubatch=plan.ubatch, flash_attn=plan.flash_attn == "on",
            n_prompt=n_prompt, n_decode=plan.n_decode, n_parallel=n_parallel,
        )  # fmt: skip
        return contextlib.closing(engine)

    def measure(phase: str, turn: int, name: str, engine: Engine, boundary: int | None = None) -> None:
        progress.show(phase, turn, n_parallel, n_prompt)
        prefill = engine.ask("prefill", n_prompt=n_prompt, boundary=boundary)
        decode = engine.ask("decode", n=plan.n_decode)
        pruned = boundary is not None and boundary < plan.n_layer
        if bool(prefill["pruned"]) != pruned:
            raise PopError(f"engine {name} pruned {prefill['pruned']} tokens at boundary {boundary}: not what was to be measured")
        recorder.add(
            Run(
                session=session,
                timestamp=_now(),
                setting=setting,
                phase=phase,
                engine=name,
                boundary=boundary if name == "pop" else 0,
                n_prompt=n_prompt,
                n_parallel=n_parallel,
                run=turn,
                ttft_ms=prefill["ttft_ms"],
                decode_ms_per_token=decode["ms_per_token"],
                flops_ratio=flops_ratios.get(boundary) if name == "pop" else None,
                peak_bytes=engine.ask("memory")["peak_bytes"],
            )
        )
        progress.advance(n_parallel, n_prompt)

    flops_ratios: dict[int | None, float | None] = {}
    n_warm_up = min(n_prompt, max(2, plan.ubatch // n_parallel))  # one micro-batch touches every weight
    with start(plan.baseline) as first:
        setting = _setting(plan, first.info)
        with start(f"{plan.baseline}-2") as second:
            for engine in (first, second):
                engine.warm_up(n_warm_up)
            for turn in range(plan.runs):
                for engine in _in_turn([first, second], turn):
                    measure("control", turn, engine.name, engine)
        with start("pop") as pop:
            pop.warm_up(n_warm_up)
            for turn in range(_before_runs(plan)):
                for engine in _in_turn([first, pop], turn):
                    measure("before", turn, "pop-off" if engine is pop else engine.name, engine)
            for boundary in plan.boundaries:
                flops_ratios[boundary] = _flops_ratio(plan, pop, n_parallel, n_prompt, boundary)
                pop.warm_up(n_warm_up, boundary)
            main = [(first.name, first, None), *(("pop", pop, boundary) for boundary in plan.boundaries)]
            main.append(("pop-off", pop, plan.n_layer))
            for turn in range(plan.runs):
                for name, engine, boundary in _in_turn(main, turn):
                    measure("main", turn, name, engine, boundary)


def _in_turn(engines: list, turn: int) -> list:
    return engines[::-1] if turn % 2 else engines


def _before_runs(plan: _Plan) -> int:
    return (plan.runs + 1) // 2


def _flops_ratio(plan: _Plan, pop: Engine, n_parallel: int, n_prompt: int, boundary: int) -> float | None:
    full = pop.ask("flops", micro_batches=list(_micro_batches(plan, n_parallel, n_prompt, plan.n_layer, n_parallel)))
    pruned = pop.ask("flops", micro_batches=list(_micro_batches(plan, n_parallel, n_prompt - 1, boundary, 0)))
    return full["flops"] and pruned["flops"] / full["flops"]


def _micro_batches(
    plan: _Plan, n_parallel: int, n_tokens: int, boundary: int, n_outputs: int
) -> Iterator[tuple[int, int, int, int]]:
    """How llama.cpp splits ``n_tokens`` of each sequence: (n_tokens, n_seqs, boundary, n_outputs); only the last one has outputs."""
    step = plan.ubatch // n_parallel
    for start in range(0, n_tokens, step):
        size = min(step, n_tokens - start)
        yield size * n_parallel, n_parallel, boundary, n_outputs if start + size == n_tokens else 0


def _setting(plan: _Plan, baseline_info: dict) -> Setting:
    versions = [f"pypop-gguf {__version__}{_commit()}"]
    if plan.stock:
        versions.append(f"stock llama-cpp-python {baseline_info['version']}")
    return Setting(
        machine=", ".join([_cpu(), f"{_cores()} cores", *baseline_info["devices"]]),
        model=plan.model.stem,
        file_type=baseline_info["model"],
        n_layer=plan.n_layer,
        threads=plan.threads,
        ubatch=plan.ubatch,
        flash_attn=plan.flash_attn,
        n_decode=plan.n_decode,
        version=", ".join(versions),
        baseline=plan.baseline,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the source tree this runs from; nothing for an installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        return f" ({subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()})"
    return ""


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")


class _Progress:
    """One line on stderr with the time left, judged by tokens: a generated one takes about as long as eight of a prompt."""

    def __init__(self, plan: _Plan, cases: list[tuple[int, int]]) -> None:
        per_case = plan.runs * (4 + len(plan.boundaries)) + 2 * _before_runs(plan)
        self._cost: Callable[[int, int], int] = lambda n_parallel, n_prompt: n_parallel * n_prompt + 8 * plan.n_decode
        self._left = sum(per_case * self._cost(*case) for case in cases)
        self._done_runs, self._runs, self._case = 0, per_case * len(cases), None
        self._started, self._done = time.perf_counter(), 0

    def show(self, phase: str, turn: int, n_parallel: int, n_prompt: int) -> None:
        case = f"prompt {n_prompt} x {n_parallel}"
        left = f", {(time.perf_counter() - self._started) / self._done * self._left / 60:.1f} min left" if self._done else ""
        text = f"run {self._done_runs + 1}/{self._runs}{left}: {case}, {phase}, round {turn + 1}"
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif case != self._case:  # a log gets one line a case
            print(text, file=sys.stderr, flush=True)
        self._case = case

    def advance(self, n_parallel: int, n_prompt: int) -> None:
        cost = self._cost(n_parallel, n_prompt)
        self._done, self._left, self._done_runs = self._done + cost, self._left - cost, self._done_runs + 1

    def end(self) -> None:
        if self._case and sys.stderr.isatty():
            print(file=sys.stderr)


if __name__ == "__main__":
    from pypop_gguf.cli import main

    sys.exit(main(["bench", *sys.argv[1:]]))
