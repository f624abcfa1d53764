"""``pop-gguf bench``: time to first token with POP against stock llama.cpp, with the bound and the machine's own spread.

Engines are processes of their own (pypop_gguf/bench/engine.py) that take turns in both orders. pypop_gguf/bench/report.py turns the
raw runs (pypop_gguf/bench/runs.py) into tables, pypop_gguf/bench/plot.py into a figure.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pypop_gguf.bench import plot as bench_plot
from pypop_gguf.bench import report as bench_report
from pypop_gguf.bench.engine import Engine
from pypop_gguf.bench.plan import Plan, plan_of, setting_of
from pypop_gguf.bench.runs import Recorder, Run, read_csv
from pypop_gguf.errors import PopError

DESCRIPTION = """\
Measures time to first token and time per token with POP and without. For each case: two stock processes against each other,
then stock, POP at each boundary, and POP off taking turns. Every run is appended to the CSV at once; Ctrl-C prints the tables
of what was measured so far."""

EPILOG = """\
Prompts are random tokens, the same for every engine. `pop-gguf random-model` writes a model to measure on without a
download. A model is loaded twice at a time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL.gguf")
    parser.add_argument(
        "--prompt",
        type=_numbers,
        default=[32, 128, 512, 2048],
        metavar="N,N",
        help="prompt tokens (default: 32,128,512,2048)",
    )
    parser.add_argument(
        "--boundary",
        type=_numbers,
        metavar="B,B",
        help="first layer that prefill skips (default: the file's, or two thirds of the layers)",
    )
    parser.add_argument(
        "--parallel", type=_numbers, default=[1, 8], metavar="N,N", help="sequences read at once (default: 1,8)"
    )
    parser.add_argument(
        "--decode", type=int, default=32, metavar="N", help="tokens generated after each prompt (default: 32)"
    )
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="rounds of each case (default: 5)")
    parser.add_argument("--threads", type=int, metavar="N", help="(default: the cores this process may use)")
    parser.add_argument("--ubatch", type=int, default=512, metavar="N", help="tokens of a micro-batch (default: 512)")
    parser.add_argument(
        "--repeat",
        action="store_true",
        help="also POP that repeats the layers below the boundary for the last prompt tokens",
    )
    parser.add_argument(
        "--mixed", action="store_true", help="also half of the sequences reading while the others write"
    )
    parser.add_argument("--flash-attn", choices=("on", "off"), default="off", help="(default: off)")
    parser.add_argument(
        "--stock",
        type=Path,
        metavar="DIR",
        help="directory with an unpatched llama_cpp package (default: compare with POP off)",
    )
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
        runs = read_csv(arguments.from_csv)
    else:
        plan = plan_of(arguments)
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


def _measure(plan: Plan, recorder: Recorder) -> None:
    cases = [(n_parallel, n_prompt) for n_parallel in plan.parallels for n_prompt in plan.prompts]
    progress = _Progress(plan, cases)
    session = _now()
    try:
        for n_parallel, n_prompt in cases:
            case = _Case(plan, n_parallel, n_prompt, session, recorder, progress)
            case.measure_prompts()
            if plan.measures_mixed(n_parallel):
                case.measure_mixed()
    finally:
        progress.end()


class _Case:
    """One number of sequences and prompt tokens.

    Its processes are fresh: its peak memory is its own, and "before" really is before any pruned pass.
    """

    def __init__(
        self, plan: Plan, n_parallel: int, n_prompt: int, session: str, recorder: Recorder, progress: _Progress
    ) -> None:
        self._plan, self._n_parallel, self._n_prompt = plan, n_parallel, n_prompt
        self._session, self._recorder, self._progress = session, recorder, progress
        self._n_warm_up = min(n_prompt, max(2, plan.ubatch // n_parallel))  # one micro-batch touches every weight

    def measure_prompts(self) -> None:
        plan = self._plan
        with self._start(plan.baseline) as first:
            self._setting = setting_of(plan, first.info)
            with self._start(f"{plan.baseline}-2") as second:
                for engine in (first, second):
                    engine.warm_up(self._n_warm_up)
                for turn in range(plan.runs):
                    for engine in _in_turn([first, second], turn):
                        self._run("control", turn, engine.name, engine)
            with self._start("pop") as pop:
                pop.warm_up(self._n_warm_up)
                for turn in range(plan.before_runs):
                    for engine in _in_turn([first, pop], turn):
                        self._run("before", turn, "pop-off" if engine is pop else engine.name, engine)
                ways = self._ways(pop)
                flops_ratios = {
                    way: _flops_ratio(plan, pop, self._n_parallel, self._n_prompt, way[1], way[0] == "pop")
                    for way in ways
                }
                for boundary in plan.boundaries:
                    pop.warm_up(self._n_warm_up, boundary)
                main = [(first.name, first, None), *((name, pop, boundary) for name, boundary in ways)]
                main.append(("pop-off", pop, plan.n_layer))
                for turn in range(plan.runs):
                    for name, engine, boundary in _in_turn(main, turn):
                        self._run("main", turn, name, engine, boundary, flops_ratios.get((name, boundary)))

    def measure_mixed(self) -> None:
        n_steps = self._plan.n_steps(self._n_parallel, self._n_prompt)
        with self._start(self._plan.baseline, n_steps) as first, self._start("pop", n_steps) as pop:
            engines = [(first.name, first, None), *((name, pop, boundary) for name, boundary in self._ways(pop))]
            engines.append(("pop-off", pop, self._plan.n_layer))
            for engine in (first, pop):
                engine.warm_up(self._n_warm_up)
            for turn in range(self._plan.runs):
                for name, engine, boundary in _in_turn(engines, turn):
                    self._run("mixed", turn, name, engine, boundary)

    def _start(self, name: str, n_mixed: int = 0) -> contextlib.closing[Engine]:
        plan = self._plan
        engine = Engine(
            name,
            plan.model,
            plan.stock if name.startswith("stock") else None,
            n_threads=plan.threads,
            n_ubatch=plan.ubatch,
            flash_attn=plan.flash_attn == "on",
            n_prompt=self._n_prompt,
            n_decode=max(plan.n_decode, n_mixed),
            n_parallel=self._n_parallel,
            unified=n_mixed > 0,
        )
        return contextlib.closing(engine)

    def _ways(self, pop: Engine) -> list[tuple[str, int]]:
        """The engines that prune, with their boundaries."""
        ways = []
        for boundary in self._plan.boundaries:
            continues = pop.ask("boundary", boundary=boundary)["continues"]
            ways += [("pop", boundary)] * continues + [("pop-repeat", boundary)] * (self._plan.repeat or not continues)
        return ways

    def _run(
        self,
        phase: str,
        turn: int,
        name: str,
        engine: Engine,
        boundary: int | None = None,
        flops_ratio: float | None = None,
    ) -> None:
        self._progress.show(phase, turn, self._n_parallel, self._n_prompt)
        request = "mixed" if phase == "mixed" else "prefill"
        result = engine.ask(request, n_prompt=self._n_prompt, boundary=boundary, continues=name != "pop-repeat")
        pruned = boundary is not None and boundary < self._plan.n_layer
        if bool(result["pruned"]) != pruned:
            raise PopError(
                f"engine {name} pruned {result['pruned']} tokens at boundary {boundary}: not what was to be measured"
            )
        if phase == "mixed":
            ttft_ms, decode_ms = result["ms"], result["ms"] / result["steps"]
        else:
            ttft_ms, decode_ms = result["ttft_ms"], engine.ask("decode", n=self._plan.n_decode)["ms_per_token"]
        self._recorder.add(
            Run(
                session=self._session,
                timestamp=_now(),
                setting=self._setting,
                phase=phase,
                engine=name,
                boundary=boundary if pruned else 0,
                n_prompt=self._n_prompt,
                n_parallel=self._n_parallel,
                run=turn,
                ttft_ms=ttft_ms,
                decode_ms_per_token=decode_ms,
                flops_ratio=flops_ratio,
                plan_ms=result.get("plan_ms"),
                peak_bytes=engine.ask("memory")["peak_bytes"],
            )
        )
        self._progress.advance(self._n_parallel, self._n_prompt)


def _in_turn(engines: list, turn: int) -> list:
    return engines[::-1] if turn % 2 else engines


def _flops_ratio(
    plan: Plan, pop: Engine, n_parallel: int, n_prompt: int, boundary: int, continues: bool
) -> float | None:
    n_pruned = n_prompt if continues else n_prompt - 1  # the last token of a prompt is in the pruned pass, or it is not
    full = pop.ask("flops", micro_batches=list(plan.micro_batches(n_parallel, n_prompt, plan.n_layer, n_parallel)))
    pruned = pop.ask("flops", micro_batches=list(plan.micro_batches(n_parallel, n_pruned, boundary, 0)))
    return full["flops"] and pruned["flops"] / full["flops"]


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")


class _Progress:
    """One line on stderr with the time left, judged by tokens: a generated one takes about as long as eight of a prompt."""

    def __init__(self, plan: Plan, cases: list[tuple[int, int]]) -> None:
        n_ways = len(plan.boundaries) * (2 if plan.repeat else 1)
        self._cost: Callable[[int, int], int] = lambda n_parallel, n_prompt: n_parallel * n_prompt + 8 * plan.n_decode
        runs = [
            plan.runs * (4 + n_ways) + 2 * plan.before_runs + plan.measures_mixed(n_parallel) * plan.runs * (2 + n_ways)
            for n_parallel, _ in cases
        ]
        self._left = sum(n * self._cost(*case) for n, case in zip(runs, cases, strict=True))
        self._done_runs, self._runs, self._case = 0, sum(runs), None
        self._started, self._done = time.perf_counter(), 0

    def show(self, phase: str, turn: int, n_parallel: int, n_prompt: int) -> None:
        case = f"prompt {n_prompt} x {n_parallel}"
        left = (
            f", {(time.perf_counter() - self._started) / self._done * self._left / 60:.1f} min left"
            if self._done
            else ""
        )
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
