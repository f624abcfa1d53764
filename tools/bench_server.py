"""Measures both servers a GGUF can have under eight clients, with POP and without: throughput and time to first token.

    python -m tools.bench_server MODEL.gguf --boundary 11 --prompt 512 --rounds 3 --csv bench/server-NAME.csv

`native` is pop-gguf serve (llama-server, continuous batching). `python` is llama-cpp-python's own server (one request
at a time) with PopLlama in the place of Llama. The model is one of `pop-gguf random-model`. Every client reads a prompt
of its own. Each round starts every server anew, in turns. Run it from the source tree with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import itertools
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pypop_gguf import PopError
from pypop_gguf.gguf_files.header import read_header
from pypop_gguf.gguf_files.metadata import trunk_layers
from pypop_gguf.terminal import available_cores, check_ranges
from tests.support.server import Server, running, serve
from tools.bench_common import append_row, check_table, number_prompt
from tools.reporting import one_line_errors, spread

COLUMNS = [
    *("date", "engine", "pop", "round", "clients", "prompt_tokens", "answer_tokens", "threads"),
    *("wall_s", "tokens_per_s", "ttft_median_ms", "ttft_worst_ms"),
]
ENGINES = ["native", "python"]
LONGEST_WAIT_S = 1200


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model of pop-gguf random-model")
    parser.add_argument("--boundary", type=int, required=True, help="first layer that prefill skips")
    parser.add_argument("--prompt", type=int, default=512, metavar="TOKENS", help="length of a prompt (default: 512)")
    parser.add_argument("--answer", type=int, default=32, metavar="TOKENS", help="length of an answer (default: 32)")
    parser.add_argument("--clients", type=int, default=8, help="number of clients at once (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (default: 3)")
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=ENGINES, help="servers to measure (default: both)"
    )
    parser.add_argument("--threads", type=int, default=available_cores(), help="number of threads")
    parser.add_argument("--csv", type=Path, help="file to append every run to")
    arguments = parser.parse_args()
    check_ranges(arguments, boundary=1, prompt=1, answer=1, clients=1, rounds=1, threads=1)
    _run(arguments)
    return 0


def _run(arguments: argparse.Namespace) -> None:
    if arguments.csv:
        check_table(arguments.csv, COLUMNS)
    layers = trunk_layers(read_header(arguments.model))
    cases = list(itertools.product(arguments.engines, (True, False)))
    rows = []
    for number in range(arguments.rounds):
        for engine, pop in cases if number % 2 == 0 else reversed(cases):
            figures = _measure(arguments, engine, arguments.boundary if pop else layers)
            date = time.strftime("%Y-%m-%d %H:%M:%S")
            rows.append({"date": date, "engine": engine, "pop": pop, "round": number, **figures})
            print({name: rows[-1][name] for name in COLUMNS[1:4] + COLUMNS[8:]}, flush=True)
            if arguments.csv:
                append_row(arguments.csv, rows[-1])
    _summarize(rows)


def _measure(arguments: argparse.Namespace, engine: str, boundary: int) -> dict:
    prompts = [number_prompt(seed, arguments.prompt) for seed in range(arguments.clients)]
    with (
        tempfile.TemporaryDirectory() as directory,
        _started(arguments, engine, boundary, Path(directory, "log.txt")) as server,
        concurrent.futures.ThreadPoolExecutor(arguments.clients) as pool,
    ):
        server.client.timeout = LONGEST_WAIT_S
        _seconds_to_first_token(server, number_prompt(-1, 32), 2)  # loads the weights' pages into memory
        started = time.perf_counter()
        first = list(pool.map(lambda prompt: _seconds_to_first_token(server, prompt, arguments.answer), prompts))
        wall = time.perf_counter() - started
    return {
        "clients": arguments.clients,
        "prompt_tokens": arguments.prompt,
        "answer_tokens": arguments.answer,
        "threads": arguments.threads,
        "wall_s": round(wall, 3),
        "tokens_per_s": round(arguments.clients * (arguments.prompt + arguments.answer) / wall, 2),
        "ttft_median_ms": round(1e3 * float(np.median(first)), 1),
        "ttft_worst_ms": round(1e3 * max(first), 1),
    }


def _seconds_to_first_token(server: Server, prompt: str, n_answer: int) -> float:
    """Returns once the whole answer is there."""
    body = {"model": "random", "prompt": prompt, "max_tokens": n_answer, "temperature": 0, "logit_bias": {"2": -100}}
    body["repeat_penalty"] = 1  # llama-cpp-python's server has 1.1 by default
    started, first = time.perf_counter(), None
    for event in server.stream("/v1/completions", **body):
        if event.get("choices"):
            first = first or time.perf_counter() - started
    if first is None:
        raise PopError(f"the server sent no token: {server.log[-2000:]}")
    return first


def _started(
    arguments: argparse.Namespace, engine: str, boundary: int, log: Path
) -> contextlib.AbstractContextManager[Server]:
    n_ctx, threads = arguments.prompt + arguments.answer + 16, arguments.threads
    if engine == "native":
        options = ["--boundary", boundary, "--threads", threads, "--parallel", arguments.clients]
        options += ["--context", n_ctx * arguments.clients, "--server-options", "--no-cache-prompt", "--no-warmup"]
        return serve(arguments.model, log, *options)
    pruned = arguments.model.with_suffix(f".b{boundary}.gguf")  # this server cannot pass pop_boundary= on
    if not pruned.exists():
        convert = ["convert", arguments.model, "--boundary", str(boundary), "--outfile", pruned]
        subprocess.run([sys.executable, "-m", "pypop_gguf", *convert], check=True)
    options = ["--model", pruned, "--n_ctx", n_ctx, "--n_threads", threads, "--n_threads_batch", threads]
    # By default this server asks for the logits of every prompt token, and then nothing is pruned. It also cuts an
    # answer short when another request arrives.
    options += ["--verbose", "false", "--logits_all", "false", "--interrupt_requests", "false"]
    return running(["-m", "tools.python_server"], options, log, "/v1/models")


def _summarize(rows: list[dict]) -> None:
    for engine, pop in dict.fromkeys((row["engine"], row["pop"]) for row in rows):
        chosen = [row for row in rows if (row["engine"], row["pop"]) == (engine, pop)]
        values = ([row[name] for row in chosen] for name in ("tokens_per_s", "ttft_median_ms"))
        throughput, first_token = (spread(of_name, None) for of_name in values)
        print(f"{engine:7} {'POP' if pop else 'whole':6} {throughput} tokens/s, first token {first_token} ms")


if __name__ == "__main__":
    sys.exit(main())
