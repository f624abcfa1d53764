"""Measures the peak memory of a model with POP and without, and how long it takes to load.

    python -m tools.memory_table MODEL.gguf --boundary 16 --stock build/stock/package --csv bench/memory-NAME.csv

Memory is the most that a process has held while it read a prompt into a context of the given length and wrote a few
tokens. It includes Python and the mapped pages of the model. Each figure comes from a process of its own. A prompt is
shorter than its context, whose cache is allocated and written at once, so long contexts stay affordable.

The time to load is measured in new processes, too: the import of the package, and then the constructor of `PopLlama`
or of stock `Llama`, with the model in the page cache. Other programs on the machine change this time, but not memory.
The engines take turns: "stock" is unpatched llama.cpp, "whole" our library with POP off, and "pop" with POP on.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pypop_gguf import PopError
from pypop_gguf.bench.engine import Engine
from pypop_gguf.bench.measure import in_turn
from pypop_gguf.terminal import aligned, check_ranges, integer_list, progress
from tools.bench_common import append_row, check_table
from tools.reporting import one_line_errors, spread

COLUMNS = [
    *("date", "model", "boundary", "threads", "context", "sequences", "prompt_tokens", "round"),
    *("engine", "quantity", "value"),
]
N_WRITTEN = 2  # tokens that each sequence writes after its prompt

# Prints how many milliseconds the import and the constructor take. Stock Llama comes from the path of the process.
LOAD = """
import json, sys, time
options, began = json.loads(sys.argv[2]), time.perf_counter()
if sys.argv[1] == "stock":
    from llama_cpp import Llama
else:
    from pypop_gguf import PopLlama as Llama
imported = time.perf_counter()
llm = Llama(verbose=False, **options)
loaded = time.perf_counter()
print(json.dumps({"import_ms": 1e3 * (imported - began), "load_ms": 1e3 * (loaded - imported)}))
"""


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--boundary", type=int, required=True, help="first layer that prefill skips")
    parser.add_argument(
        "--context",
        type=integer_list,
        default=[2048, 8192, 16384, 32768],
        metavar="N,N",
        help="positions of each sequence (default: 2048,8192,16384,32768)",
    )
    parser.add_argument(
        "--parallel", type=integer_list, default=[1, 8], metavar="N,N", help="numbers of sequences (default: 1,8)"
    )
    parser.add_argument(
        "--prompt", type=int, default=2048, metavar="N", help="tokens that all sequences read together (default: 2048)"
    )
    parser.add_argument(
        "--runs", type=int, default=3, metavar="N", help="processes of each case; 0 measures no memory (default: 3)"
    )
    parser.add_argument(
        "--loads", type=int, default=15, metavar="N", help="processes that load; 0 measures no loading (default: 15)"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="number of threads (default: 1)")
    parser.add_argument("--stock", type=Path, metavar="DIR", help="directory with an unpatched llama_cpp package")
    parser.add_argument("--csv", type=Path, help="file to append every value to")
    arguments = parser.parse_args()
    check_ranges(arguments, boundary=1, context=1, parallel=1, prompt=1, threads=1, runs=0, loads=0)
    if arguments.csv:
        check_table(arguments.csv, COLUMNS)
    rows = []
    for row in itertools.chain(measure_memory(arguments), measure_loads(arguments)):
        rows.append(row)
        if arguments.csv:
            append_row(arguments.csv, row)
    print("\n".join([*memory_table(rows), "", *load_table(rows)]))
    return 0


def measure_memory(arguments: argparse.Namespace) -> Iterator[dict]:
    """Yields a row for each process."""
    cases = list(itertools.product(arguments.context, arguments.parallel, range(arguments.runs)))
    with progress(total=len(cases), description="memory", unit="rounds") as bar:
        for context, n_sequences, number in cases:
            n_prompt = min(arguments.prompt // n_sequences, context - N_WRITTEN)
            for name in in_turn(_list_engines(arguments), number):
                peak = _peak_bytes(arguments, name, context, n_sequences, n_prompt)
                yield _row(arguments, context, n_sequences, n_prompt, number, name, "peak_bytes", peak)
            bar.update()


def _list_engines(arguments: argparse.Namespace) -> list[str]:
    return [*(["stock"] if arguments.stock else []), "whole", "pop"]


def _peak_bytes(arguments: argparse.Namespace, name: str, context: int, n_sequences: int, n_prompt: int) -> int:
    engine = Engine(
        name,
        arguments.model,
        arguments.stock if name == "stock" else None,
        n_threads=arguments.threads,
        n_ubatch=512,
        flash_attn="on",
        n_prompt=context - N_WRITTEN,
        n_decode=N_WRITTEN,
        n_parallel=n_sequences,
    )
    with contextlib.closing(engine):
        done = engine.ask("prefill", n_prompt=n_prompt, boundary=arguments.boundary if name == "pop" else None)
        if name == "pop" and not done["pruned"]:
            raise PopError(f"no token was pruned at boundary {arguments.boundary}: give a lower one")
        engine.ask("decode", n=N_WRITTEN)
        return engine.ask("memory")["peak_bytes"]


def measure_loads(arguments: argparse.Namespace) -> Iterator[dict]:
    """Yields two rows for each process. Round 0 fills the page cache and does not count."""
    context = arguments.context[0]
    n_rounds = arguments.loads + 1 if arguments.loads else 0
    with progress(total=n_rounds, description="loading", unit="rounds") as bar:
        for number in range(n_rounds):
            for name in in_turn(_list_engines(arguments), number):
                times_ms = _load(arguments, name, context)
                if number:
                    for quantity, value in times_ms.items():
                        yield _row(arguments, context, 1, 0, number, name, quantity, round(value, 2))
            bar.update()


def _load(arguments: argparse.Namespace, name: str, context: int) -> dict[str, float]:
    options = dict(model_path=str(arguments.model), n_ctx=context, n_threads=arguments.threads, flash_attn=True)
    environment = dict(os.environ)
    if name == "stock":
        path = [str(arguments.stock.resolve()), environment.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    else:
        options |= dict(pop=name == "pop", pop_boundary=arguments.boundary)
    command = [sys.executable, "-c", LOAD, name, json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise PopError(f"the engine {name} cannot load the model: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def _row(arguments: argparse.Namespace, context: int, n_sequences: int, n_prompt: int, *measured) -> dict:
    case = [arguments.model.stem, arguments.boundary, arguments.threads, context, n_sequences, n_prompt]
    return dict(zip(COLUMNS, [time.strftime("%Y-%m-%d %H:%M:%S"), *case, *measured], strict=True))


def memory_table(rows: list[dict]) -> list[str]:
    """Returns medians of peak memory, and how much more POP takes than our library without it, and than stock."""
    lines = [("context", "sequences", "prompt", "stock MiB", "whole MiB", "POP MiB", "over whole", "over stock")]
    of_memory = [row for row in rows if row["quantity"] == "peak_bytes"]
    for case, values in _collect(of_memory, "context", "sequences", "prompt_tokens").items():
        mib = {name: statistics.median(peaks) / 2**20 for name, peaks in values.items()}
        sizes = [f"{mib[name]:.0f}" if name in mib else "N/A" for name in ("stock", "whole", "pop")]
        more = [f"{mib['pop'] - mib[name]:+.1f}" if name in mib else "N/A" for name in ("whole", "stock")]
        lines.append((*map(str, case), *sizes, *more))
    return aligned(lines)


def load_table(rows: list[dict]) -> list[str]:
    """Returns medians and ranges of the times to import the package and to load the model."""
    lines = [("engine", "import ms", "load ms")]
    times_ms = _collect([row for row in rows if row["quantity"] != "peak_bytes"], "quantity")
    for name in sorted(times_ms.get(("load_ms",), {}), key=["stock", "whole", "pop"].index):
        lines.append((name, *(spread(times_ms[quantity,][name]) for quantity in ("import_ms", "load_ms"))))
    return aligned(lines)


def _collect(rows: list[dict], *columns: str) -> dict[tuple, dict[str, list[float]]]:
    """Returns the values of each engine, by what the columns say."""
    found: dict[tuple, dict[str, list[float]]] = {}
    for row in rows:
        case = found.setdefault(tuple(row[column] for column in columns), {})
        case.setdefault(row["engine"], []).append(float(row["value"]))
    return found


if __name__ == "__main__":
    sys.exit(main())
