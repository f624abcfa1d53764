"""Measures what a call costs besides the model, for a short prompt and an answer of one token.

    python -m tools.bench_call MODEL.gguf --boundary 20 --stock build/stock/package

The first table has the parts of `create_completion`: processor time of the calling thread before the prompt is decoded
and after that, and the time in which the engine builds and plans graphs. "POP" prunes, "whole" is PopLlama without
pruning, and "stock" is unpatched llama-cpp-python. The second table has requests to `pop-gguf serve` with one thread:
processor time of all threads but the one that computes, which is for HTTP, JSON, the chat template and the tokenizer.
Both tables have medians and the smallest value. A share is the smallest value by the shortest time to the first token.
Other load on the machine changes these figures little. Linux is needed, and Python's garbage collector is off.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pypop_gguf.terminal import aligned, available_cores, check_ranges, progress
from tests.support.server import Server, serve
from tools.bench_completion import Engine
from tools.reporting import one_line_errors

WORDS = ("river", "dog", "tree", "the", "was", "a", "house", "green", "little", "sun", "day", "went")
NAMES = {"off": "POP", "whole": "whole", "stock": "stock"}  # by the mode of the engine
PARTS = {"before_us": "before the decode", "after_us": "after the decode", "plan_us": "graphs"}


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--boundary", type=int, required=True, help="first layer that prefill skips")
    parser.add_argument("--words", type=int, default=16, metavar="N", help="words of the prompt (default: 16)")
    parser.add_argument("--calls", type=int, default=100, metavar="N", help="calls of each engine (default: 100)")
    parser.add_argument("--threads", type=int, default=available_cores(), metavar="N", help="threads of an engine")
    parser.add_argument("--stock", type=Path, help="directory with an unpatched llama_cpp package")
    arguments = parser.parse_args()
    check_ranges(arguments, boundary=1, words=1, calls=1, threads=1)
    calls = measure_calls(arguments)
    first_us = 1e3 * min(calls["off"]["first_ms"])
    print("\n".join(call_table(calls, first_us)), flush=True)
    print("\n".join(request_table(measure_requests(arguments), first_us)))
    return 0


def prompt(seed: int, n_words: int) -> str:
    """Returns a prompt. Every second one is a word longer, so that no engine uses the graph of the last one again."""
    return " ".join(random.Random(seed).choices(WORDS, k=n_words + seed % 2))


def measure_calls(arguments: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Returns the values of all calls by the mode and the quantity. The engines take turns."""
    found: dict[str, dict[str, list[float]]] = {}
    options = dict(model_path=str(arguments.model), n_ctx=2048, flash_attn=True, verbose=False)
    threads = dict(n_threads=arguments.threads, n_threads_batch=arguments.threads)
    with contextlib.ExitStack() as stack:
        modes = [mode for mode in NAMES if mode != "stock" or arguments.stock]
        engines = {}
        for mode in modes:
            engine = Engine(mode, arguments.stock, boundary=arguments.boundary, **options, **threads)
            engines[mode] = stack.enter_context(contextlib.closing(engine))
        bar = stack.enter_context(progress(total=arguments.calls + 2, description="calls", unit="rounds"))
        for number in range(arguments.calls + 2):
            for mode, engine in engines.items():
                done = engine.ask("call", text=prompt(number, arguments.words))
                if number >= 2:  # The first two warm up.
                    for quantity, value in done.items():
                        found.setdefault(mode, {}).setdefault(quantity, []).append(value)
            bar.update()
    return found


def measure_requests(arguments: argparse.Namespace) -> dict[str, float]:
    """Returns the processor time of one request besides the computing thread's, in microseconds, by its path."""
    found = {}
    options = ("--threads", 1, "--context", 2048, "--parallel", 1, "--boundary", arguments.boundary)
    with tempfile.TemporaryDirectory() as directory, serve(arguments.model, Path(directory, "log"), *options) as server:
        for path in ("/completion", "/v1/chat/completions"):
            for number in range(-2, arguments.calls):
                if number == 0:
                    before_us = other_threads_us(server.process.pid)
                ask(server, path, prompt(abs(number), arguments.words))
            found[path] = (other_threads_us(server.process.pid) - before_us) / arguments.calls
    return found


def ask(server: Server, path: str, text: str) -> None:
    """Asks for one token."""
    if path == "/completion":
        server.complete(text, n_predict=1)
    else:
        server.post(path, messages=[{"role": "user", "content": text}], max_tokens=1)


def other_threads_us(pid: int) -> float:
    """Returns the processor time of all threads of a process but its first one, in microseconds."""
    threads = [task for task in Path(f"/proc/{pid}/task").iterdir() if task.name != str(pid)]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in threads) / 1e3


def call_table(found: dict[str, dict[str, list[float]]], first_us: float) -> list[str]:
    """Returns the lines of the table of calls."""
    rows: list[tuple] = [("call, in microseconds", *(NAMES[mode] for mode in found))]
    for quantity, name in PARTS.items():
        rows.append((name, *(cell(values[quantity], first_us) for values in found.values())))
    rows.append(("first token", *(cell([1e3 * ms for ms in values["first_ms"]]) for values in found.values())))
    return aligned(rows)


def request_table(found: dict[str, float], first_us: float) -> list[str]:
    """Returns the lines of the table of requests."""
    rows: list[tuple] = [("request, in microseconds", "mean")]
    return aligned(rows + [(path, f"{us:.0f} ({us / first_us:.1%})") for path, us in found.items()])


def cell(values: Sequence[float], first_us: float | None = None) -> str:
    share = "" if first_us is None else f", {min(values) / first_us:.1%}"
    return f"{np.median(values):.0f} (least {min(values):.0f}{share})"


if __name__ == "__main__":
    sys.exit(main())
