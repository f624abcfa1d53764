"""Runs cases by number for the fuzzers, with a time limit for each, and counts outcomes and failures.

A case depends on the seed and its number alone, so ``--seed S --first N --cases 1`` replays it. ``Failure`` and any
exception that a fuzzer does not expect count as failures. The run goes on after a failure, prints each kind once and
exits with status 1.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

_REPORT_SECONDS = 30
_STATE = "POP_FUZZ_STATE"  # variable that names a file for the number of the running case


class Failure(Exception):
    """A promise that did not hold; the message says which."""


class TooLong(BaseException):
    """A case took too long. This is no Exception, so that the code under test cannot catch it by accident."""


def parse(
    description: str, cases: int, add: Callable[[argparse.ArgumentParser], None] = lambda parser: None
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--cases", type=int, default=cases, help=f"number of cases (default: {cases})")
    parser.add_argument("--seed", type=int, default=1, help="seed of all cases (default: 1)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to replay a case (default: 0)")
    parser.add_argument("--keep", type=Path, help="directory to keep the input of failing cases in")
    add(parser)
    return parser.parse_args()


def run(
    arguments: argparse.Namespace, case: Callable[[random.Random], str], seconds: float, counted: str = "cases"
) -> int:
    """Runs the cases, each with random numbers of its own, and prints the counts of their outcomes.

    Args:
        arguments: From :func:`parse`.
        case: Runs one case and returns the name of its outcome. It raises an exception where a promise does not hold.
        seconds: Longest processor time of a case, which does not depend on how busy the machine is.
        counted: The plural of what a case is, for the report.

    Returns:
        The exit status.
    """
    outcomes: collections.Counter[str] = collections.Counter()
    failures: dict[str, int] = collections.Counter()
    started = reported = time.perf_counter()
    signal.signal(signal.SIGPROF, _too_long)
    state = os.open(os.environ[_STATE], os.O_WRONLY) if _STATE in os.environ else None
    for number in range(arguments.first, arguments.first + arguments.cases):
        if state is not None:
            os.pwrite(state, b"%d" % number, 0)
        try:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                outcomes[case(random.Random(f"{arguments.seed}/{number}"))] += 1
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        except (Exception, TooLong, SystemExit) as error:
            outcomes["FAILED"] += 1
            kind = f"{type(error).__name__} {_place(error)}"
            failures[kind] += 1
            if failures[kind] == 1:
                traceback.print_exc()
                print(f"FAILED: --seed {arguments.seed} --first {number} --cases 1", file=sys.stderr, flush=True)
        if time.perf_counter() - reported > _REPORT_SECONDS:
            reported = time.perf_counter()
            print(_report(outcomes, counted, reported - started), flush=True)
    print(_report(outcomes, counted, time.perf_counter() - started), flush=True)
    for kind, count in failures.items():
        print(f"FAILED {count} times: {kind}", file=sys.stderr)
    return 1 if failures else 0


def in_a_child(arguments: argparse.Namespace, body: Callable[[], int]) -> int:
    """Runs ``body`` in a process of its own and returns its exit status.

    An abort of native code ends the run and is reported with the number of its case.
    """
    if _STATE in os.environ:
        return body()
    with tempfile.NamedTemporaryFile() as file:
        status = subprocess.call([sys.executable, *sys.argv], env={**os.environ, _STATE: file.name})
        if status < 0:
            number = int(file.read() or arguments.first)
            print(f"FAILED: signal {-status}: --seed {arguments.seed} --first {number} --cases 1", file=sys.stderr)
        return 0 if status == 0 else 1


def limit_memory(megabytes: int) -> None:
    """Lets the process allocate so much more than it has now. More ends in MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    """Yields a temporary directory, in memory where possible, because every case writes files."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


def _too_long(_signal, _frame):
    raise TooLong


def _report(outcomes: collections.Counter, counted: str, seconds: float) -> str:
    parts = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
    total = sum(outcomes.values())
    return f"{total} {counted} in {seconds:.0f} s, {total / seconds:.0f} a second: {parts}"


def _place(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"in {Path(frame.filename).name}:{frame.lineno}"
