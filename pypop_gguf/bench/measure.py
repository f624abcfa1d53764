"""Runs what ``pop-gguf bench`` measures: for each case, engines that take turns in both orders."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Sequence
from typing import TypeVar

from pypop_gguf.bench.engine import Engine
from pypop_gguf.bench.plan import Plan, describe_setting
from pypop_gguf.bench.runs import Recorder, Run
from pypop_gguf.errors import PopError
from pypop_gguf.terminal import Progress, progress

_T = TypeVar("_T")


def measure(plan: Plan, recorder: Recorder) -> None:
    """Measures all cases and adds their runs to the recorder.

    Raises:
        PopError: An engine failed.
    """
    cases = [(n_parallel, n_prompt) for n_parallel in plan.parallels for n_prompt in plan.prompts]
    total = sum(_run_tokens(plan, *case) * sum(_count_runs(plan, case[0])) for case in cases)
    session = _now()
    with progress(total=total, description="all cases", unit="tokens", in_log=False) as bar:
        for n_parallel, n_prompt in cases:
            case = _Case(plan, n_parallel, n_prompt, session, recorder, bar)
            case.measure_prompts()
            if plan.measures_mixed(n_parallel):
                case.measure_mixed()


def _run_tokens(plan: Plan, n_parallel: int, n_prompt: int) -> int:
    """Returns how long a run takes, in prompt tokens; a generated token takes about as long as eight of a prompt."""
    return n_parallel * n_prompt + 8 * plan.n_decode


def _count_runs(plan: Plan, n_parallel: int) -> tuple[int, int]:
    """Returns the runs of a case with prompts alone, and with half of the sequences writing."""
    n_ways = len(plan.boundaries) * (2 if plan.repeat else 1)
    n_mixed = plan.runs * (2 + n_ways) if plan.measures_mixed(n_parallel) else 0
    return plan.runs * (2 + n_ways) + 2 * (plan.control_runs + plan.before_runs), n_mixed


class _Case:
    """One number of sequences and prompt tokens.

    It starts new processes, so their peak memory is that of this case, and "before" is before any pruned pass.
    """

    def __init__(
        self, plan: Plan, n_parallel: int, n_prompt: int, session: str, recorder: Recorder, all_cases: Progress
    ) -> None:
        self._plan, self._n_parallel, self._n_prompt = plan, n_parallel, n_prompt
        self._session, self._recorder, self._all_cases = session, recorder, all_cases
        self._name = f"prompt {n_prompt} x {n_parallel}"
        self._n_warm_up = min(n_prompt, max(2, plan.ubatch // n_parallel))  # One micro-batch touches every weight.
        self._n_runs, self._n_mixed_runs = _count_runs(plan, n_parallel)

    def measure_prompts(self) -> None:
        """Measures sequences that read their prompts and then write."""
        plan = self._plan
        with self._start(plan.baseline) as first:
            self._setting = describe_setting(plan, first.info)
            with progress(total=self._n_runs, description=self._name, unit="runs") as self._bar:
                first.warm_up(self._n_warm_up)
                if plan.control_runs:
                    self._measure_spread(first)
                with self._start("pop") as pop:
                    self._measure_pop(first, pop)

    def _measure_spread(self, first: Engine) -> None:
        with self._start(f"{self._plan.baseline}-2") as second:
            second.warm_up(self._n_warm_up)
            for turn in range(self._plan.control_runs):
                for engine in in_turn([first, second], turn):
                    self._run("control", turn, engine.name, engine)

    def _measure_pop(self, first: Engine, pop: Engine) -> None:
        pop.warm_up(self._n_warm_up)
        for turn in range(self._plan.before_runs):
            for engine in in_turn([first, pop], turn):
                self._run("before", turn, "pop-off" if engine is pop else engine.name, engine)
        ways = self._list_ways(pop)
        flops_ratios: dict[tuple[str, int | None], float] = {
            (name, boundary): self._flops_ratio(pop, boundary, continues=name == "pop") for name, boundary in ways
        }
        for boundary in self._plan.boundaries:
            pop.warm_up(self._n_warm_up, boundary)
        engines = self._list_engines(first, pop, ways)
        for turn in range(self._plan.runs):
            for name, engine, at in in_turn(engines, turn):
                self._run("main", turn, name, engine, at, flops_ratios.get((name, at)))

    def measure_mixed(self) -> None:
        """Measures half of the sequences reading while the others write."""
        n_steps = self._plan.n_steps(self._n_parallel, self._n_prompt)
        with (
            self._start(self._plan.baseline, n_steps) as first,
            self._start("pop", n_steps) as pop,
            progress(total=self._n_mixed_runs, description=f"{self._name}, mixed", unit="runs") as self._bar,
        ):
            engines = self._list_engines(first, pop, self._list_ways(pop))
            for engine in (first, pop):
                engine.warm_up(self._n_warm_up)
            for turn in range(self._plan.runs):
                for name, engine, boundary in in_turn(engines, turn):
                    self._run("mixed", turn, name, engine, boundary)

    def _start(self, name: str, n_mixed: int = 0) -> contextlib.closing[Engine]:
        plan = self._plan
        engine = Engine(
            name,
            plan.model,
            plan.stock if name.startswith("stock") else None,
            n_threads=plan.threads,
            n_ubatch=plan.ubatch,
            flash_attn=plan.flash_attn,
            cache_type=plan.cache_type,
            n_prompt=self._n_prompt,
            n_decode=max(plan.n_decode, n_mixed),
            n_parallel=self._n_parallel,
            unified=n_mixed > 0,
            rpc=plan.rpc[0 if name == plan.baseline else 1],
        )
        return contextlib.closing(engine)

    def _list_ways(self, pop: Engine) -> list[tuple[str, int]]:
        """Returns the engines that prune, with their boundaries."""
        ways = []
        for boundary in self._plan.boundaries:
            continues = pop.ask("boundary", boundary=boundary)["continues"]
            ways += [("pop", boundary)] * continues + [("pop-repeat", boundary)] * (self._plan.repeat or not continues)
        return ways

    def _list_engines(
        self, first: Engine, pop: Engine, ways: list[tuple[str, int]]
    ) -> list[tuple[str, Engine, int | None]]:
        """Returns what runs in each round: the name of the engine, its process, and its boundary."""
        pruned = [(name, pop, boundary) for name, boundary in ways]
        return [(first.name, first, None), *pruned, ("pop-off", pop, self._plan.n_layer)]

    def _flops_ratio(self, pop: Engine, boundary: int, continues: bool) -> float:
        """Returns the operations of the pruned pass over those of the whole prefill."""
        plan, n_parallel, n_prompt = self._plan, self._n_parallel, self._n_prompt
        n_pruned = n_prompt if continues else n_prompt - 1  # A repeated last token is not in the pruned pass.
        whole, pruned = (
            pop.ask("flops", micro_batches=list(plan.micro_batches(n_parallel, n_tokens, at, n_outputs)))["flops"]
            for n_tokens, at, n_outputs in ((n_prompt, plan.n_layer, n_parallel), (n_pruned, boundary, 0))
        )
        return pruned / whole

    def _run(
        self,
        phase: str,
        turn: int,
        name: str,
        engine: Engine,
        boundary: int | None = None,
        flops_ratio: float | None = None,
    ) -> None:
        self._bar.set_postfix_str(f"{phase}, round {turn + 1}")
        request = "mixed" if phase == "mixed" else "prefill"
        result = engine.ask(request, n_prompt=self._n_prompt, boundary=boundary, continues=name != "pop-repeat")
        pruned_at = 0 if boundary in (None, self._plan.n_layer) else boundary
        if bool(result["pruned"]) != bool(pruned_at):
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
                boundary=pruned_at,
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
        self._bar.update()
        self._all_cases.update(_run_tokens(self._plan, self._n_parallel, self._n_prompt))


def in_turn(engines: Sequence[_T], turn: int) -> Sequence[_T]:
    """Returns the engines in the order of this round: every second round has the opposite order."""
    return engines[::-1] if turn % 2 else engines


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
