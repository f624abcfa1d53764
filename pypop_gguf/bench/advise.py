"""Searches the settings that read a prompt fastest on this machine, for ``pop-gguf bench --advise``.

The search starts from the defaults and changes one setting at a time. Each change is measured in turns with the best
settings so far, in two processes, and taken only where the gain is larger than the spread of the rounds.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pypop_gguf.bench.engine import Engine
from pypop_gguf.bench.measure import in_turn
from pypop_gguf.bench.plan import Plan, describe_setting
from pypop_gguf.bench.runs import Setting
from pypop_gguf.errors import PopError
from pypop_gguf.terminal import aligned, available_cores, default_kernels, physical_cores, progress

_MICRO_BATCHES = (128, 256, 512, 1024)
_LABELS = {
    "threads": "threads {}",
    "ubatch": "micro-batch {}",
    "flash_attn": "flash attention {}",
    "kernels": "kernels {}",
    "cache_type": "cache {}",
}


@dataclass(frozen=True)
class Choice:
    """Settings of an engine."""

    threads: int
    ubatch: int = 512
    flash_attn: str = "auto"
    kernels: str = "on"
    cache_type: str = "F16"


def default_choice() -> Choice:
    """Returns what ``chat`` and ``serve`` use on this machine."""
    return Choice(available_cores(), kernels=default_kernels())


@dataclass
class Trial:
    """One changed setting, measured beside the best settings so far.

    Attributes:
        name: The field of ``Choice`` that is changed.
        value: Its new value.
        times_ms: Time to read the prompt in each round.
        best_ms: The time with the best settings so far, in the same rounds.
        failure: Why the engine cannot run with this setting; None where it can.
    """

    name: str
    value: int | str
    times_ms: list[float] = field(default_factory=list)
    best_ms: list[float] = field(default_factory=list)
    failure: str | None = None

    @property
    def is_taken(self) -> bool:
        """True if the search goes on with this value. A type of cache is only reported, because it changes results."""
        return self.name != "cache_type" and not self.failure and is_faster(self.times_ms, self.best_ms)


def is_faster(times_ms: Sequence[float], best_ms: Sequence[float]) -> bool:
    """Returns whether the median of the times is below that of the others by more than either of the two ranges."""
    spread = max(max(side) - min(side) for side in (times_ms, best_ms))
    return statistics.median(best_ms) - statistics.median(times_ms) > spread


def list_changes(start: Choice, n_prompt: int, n_physical: int | None) -> list[tuple[str, int | str]]:
    """Returns the changes to try, each as a field of ``Choice`` and its new value.

    Args:
        start: The settings that the search starts from; its threads are all cores that are available.
        n_prompt: Tokens of the prompt. Of the micro-batches that hold all of it, one is tried at most.
        n_physical: Number of physical cores; None where it is not known.
    """
    threads = [n for n in (n_physical, start.threads // 2) if n and n < start.threads]
    changes: list[tuple[str, int | str]] = [("threads", n) for n in dict.fromkeys(threads)]
    lengths = {min(start.ubatch, n_prompt)}
    for ubatch in _MICRO_BATCHES:
        if min(ubatch, n_prompt) not in lengths:
            lengths.add(min(ubatch, n_prompt))
            changes.append(("ubatch", ubatch))
    others = (("flash_attn", "off"), ("kernels", "off"), ("cache_type", "Q8_0"))
    return changes + [(name, value) for name, value in others if getattr(start, name) != value]


def search(plan: Plan) -> tuple[Choice, list[Trial], Setting]:
    """Measures all changes.

    Returns:
        The best settings, the trials in the order in which they ran, and the conditions.

    Raises:
        PopError: The engine fails with settings that it has already run with.
    """
    best, trials = default_choice(), []
    changes = list_changes(best, plan.prompts[0], physical_cores())
    total = len(changes) * plan.runs
    with contextlib.ExitStack() as of_best, progress(total=total, description="settings", unit="rounds") as bar:
        engine = of_best.enter_context(_started(plan, best))
        setting = describe_setting(plan, engine.info)
        for i, (name, value) in enumerate(changes):
            trial = Trial(name, value)
            trials.append(trial)
            bar.set_postfix_str(_label(trial))
            changed = Choice(**{**vars(best), name: value})
            with contextlib.ExitStack() as of_trial:
                try:
                    candidate = of_trial.enter_context(_started(plan, changed))
                except PopError as error:
                    trial.failure = str(error)
                else:
                    for turn in _rounds(trial, plan.runs):
                        for side, times in in_turn([(candidate, trial.times_ms), (engine, trial.best_ms)], turn):
                            times.append(_read(plan, side))
                        bar.update()
                    if trial.is_taken:
                        best, engine = changed, candidate
                        of_best.close()
                        of_best.push(of_trial.pop_all())  # the candidate's process goes on as the one to beat
            bar.update_to((i + 1) * plan.runs, total)
    return best, trials, setting


def _rounds(trial: Trial, n: int) -> Iterator[int]:
    """Yields the rounds, but only two where the change was slower in both than the best settings in either."""
    for turn in range(n):
        if turn == 2 and min(trial.times_ms) > max(trial.best_ms):
            return
        yield turn


@contextlib.contextmanager
def _started(plan: Plan, choice: Choice) -> Iterator[Engine]:
    engine = Engine(
        "pop",
        plan.model,
        None,
        n_threads=choice.threads,
        n_ubatch=choice.ubatch,
        flash_attn=choice.flash_attn,
        cache_type=choice.cache_type,
        kernels="off" if choice.kernels == "off" else None,
        n_prompt=plan.prompts[0],
        n_decode=1,
        n_parallel=1,
    )
    with contextlib.closing(engine):
        engine.warm_up(plan.prompts[0], plan.boundaries[0])
        yield engine


def _read(plan: Plan, engine: Engine) -> float:
    """Returns how many milliseconds the engine takes to read the prompt."""
    return engine.ask("prefill", n_prompt=plan.prompts[0], boundary=plan.boundaries[0])["ttft_ms"]


def _label(trial: Trial) -> str:
    return _LABELS[trial.name].format(trial.value)


def format_report(plan: Plan, setting: Setting, best: Choice, trials: list[Trial]) -> str:
    """Returns what is printed: the conditions, a table of all trials, and the arguments in the last line."""
    n_prompt, boundary = plan.prompts[0], plan.boundaries[0]
    rows: list[tuple[str, ...]] = [("setting", "tokens/s", "range", "best so far", "range", "result")]
    for trial in trials:
        if trial.failure:
            rows.append((_label(trial), *["N/A"] * 4, "cannot run"))
            continue
        figures = (figure for times in (trial.times_ms, trial.best_ms) for figure in _speeds(n_prompt, times))
        verdict = "reported only" if trial.name == "cache_type" else "taken" if trial.is_taken else "no gain"
        rows.append((_label(trial), *figures, verdict))
    start = default_choice()
    return "\n".join(
        (
            f"model     {setting.model} ({setting.file_type}), prompt of {n_prompt} tokens read by {boundary} of "
            f"{setting.n_layer} layers",
            f"machine   {setting.machine}; {setting.version}",
            f"defaults  {', '.join(_LABELS[name].format(value) for name, value in vars(start).items())}",
            "",
            *_EXPLANATION,
            *aligned(rows),
            *(f"{_label(trial)} cannot run: {trial.failure}" for trial in trials if trial.failure),
            "",
            format_arguments(best, start, os.cpu_count()),
        )
    )


_EXPLANATION = (
    "Medians of rounds in which the setting and the best settings so far took turns. A setting is taken where its gain",
    "is larger than the spread of the rounds. Cache Q8_0 changes results slightly, so it is reported, but never taken.",
)


def _speeds(n_prompt: int, times_ms: list[float]) -> tuple[str, str]:
    speed, slowest, fastest = (1e3 * n_prompt / f(times_ms) for f in (statistics.median, max, min))
    return f"{speed:.1f}", f"{slowest:.1f} to {fastest:.1f}"


def format_arguments(best: Choice, default: Choice, n_processors: int | None) -> str:
    """Returns the arguments that choose the best settings in Python and in the commands, in one line.

    Args:
        best: The settings.
        default: The defaults of the commands, which need no argument.
        n_processors: Threads that ``PopLlama`` reads prompts with by default: all of the machine's.
    """
    python, chat, server = [], [], []
    if best.threads != n_processors:
        python.append(f"n_threads_batch={best.threads}")
    if best.threads != default.threads:
        chat.append(f"--threads {best.threads}")
        server.append(f"--threads-batch {best.threads}")
    if best.ubatch != default.ubatch:
        python += [f"n_batch={best.ubatch}"] * (best.ubatch > default.ubatch) + [f"n_ubatch={best.ubatch}"]
        server += [f"--batch-size {best.ubatch}"] * (best.ubatch > default.ubatch) + [f"--ubatch-size {best.ubatch}"]
    if best.flash_attn != default.flash_attn:
        python.append("flash_attn=False")
        server.append("--flash-attn off")
    kernels = ["--kernels off"] * (best.kernels != default.kernels)
    python += ["pop_kernels=False"] * len(kernels)
    chat += kernels
    serve = kernels + ["--server-options"] * bool(server) + server
    if not python + chat + serve:
        return "the defaults are fastest here"
    ways = (("PopLlama", ", ".join(python)), ("chat", " ".join(chat)), ("serve", " ".join(serve)))
    return "; ".join(f"{name}: {text or 'the defaults'}" for name, text in ways)
