"""Measures how long an abort in a long prefill takes: from the wish to stop until the model is free.

    python -m tools.bench_cancel MODEL.gguf --boundary 11 --prompt 2048 --ubatch 512,64 --csv bench/cancel-NAME.csv

`python` sets the threading.Event of a PopLlama call from another thread. `server` hangs up on pop-gguf serve and waits
until /metrics counts no request. The moments are random over the whole prefill. Afterwards the memory is read, and the
answer to the next request is compared with one before the aborts. The model is one of `pop-gguf random-model`. Run it
from the source tree with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
from tqdm import tqdm

from pypop_gguf import Cancelled, PopError, PopLlama
from pypop_gguf.memory import resident_bytes
from pypop_gguf.terminal import available_cores, check_ranges
from tests.support.server import Server, serve
from tools.bench_common import append_row, check_table, number_prompt
from tools.reporting import one_line_errors

ENGINES = ["python", "server"]
N_ANSWER = 8  # answers are compared as tokens, because a random model's tokens are no text
SEEDS = 2**31  # seeds below this one are for prompts of aborted calls, those from here on for the others
COLUMNS = [
    *("date", "model", "boundary", "engine", "n_ubatch", "prompt_tokens", "threads", "abort"),
    *("asked_after_ms", "latency_ms", "micro_batch_ms", "rss_mib"),
]


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model of pop-gguf random-model")
    parser.add_argument("--boundary", type=int, required=True, help="first layer that prefill skips")
    parser.add_argument(
        "--prompt", type=int, default=2048, metavar="TOKENS", help="length of the prompt (default: 2048)"
    )
    parser.add_argument(
        "--ubatch",
        default="512,64",
        help="lengths of a micro-batch, and of llama-server's batch, separated by commas (default: 512,64)",
    )
    parser.add_argument("--aborts", type=int, default=50, help="number of aborted calls in each case (default: 50)")
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=ENGINES, help="engines to measure (default: both)"
    )
    parser.add_argument("--threads", type=int, default=available_cores(), help="number of threads")
    parser.add_argument("--csv", type=Path, help="file to append every run to")
    arguments = parser.parse_args()
    return 0 if all(_measure(arguments, engine, n_ubatch) for n_ubatch, engine in _cases(arguments)) else 1


def _cases(arguments: argparse.Namespace) -> list[tuple[int, str]]:
    sizes = arguments.ubatch.split(",")
    if not all(size.isascii() and size.isdigit() and 1 <= int(size) < arguments.prompt for size in sizes):
        raise PopError(
            f"--ubatch {arguments.ubatch}: give numbers from 1 to less than --prompt, or nothing can be aborted"
        )
    check_ranges(arguments, aborts=1, threads=1)
    if arguments.csv:
        check_table(arguments.csv, COLUMNS)
    return [(int(size), engine) for size in sizes for engine in arguments.engines]


def _measure(arguments: argparse.Namespace, engine: str, n_ubatch: int) -> bool:
    chance, rows = random.Random(0), []
    with (_opened if engine == "python" else _served)(arguments, n_ubatch) as model:
        model.answer(number_prompt(SEEDS, arguments.prompt))  # loads the weights' pages into memory
        started = time.perf_counter()
        before_aborts = model.answer(number_prompt(SEEDS + 1, arguments.prompt))
        whole = time.perf_counter() - started
        micro_batch = whole / -(-arguments.prompt // n_ubatch)
        mib_before = resident_bytes(model.pid) / 2**20
        with tqdm(total=arguments.aborts, desc=f"{engine}, {n_ubatch} tokens", leave=False, disable=None) as bar:
            for _ in range(10 * arguments.aborts):
                if len(rows) == arguments.aborts:
                    break
                moment = chance.uniform(0, 0.95 * whole)
                latency = model.abort(number_prompt(chance.randrange(SEEDS), arguments.prompt), moment)
                if latency is None:
                    continue  # the call had ended before
                values = [
                    *(time.strftime("%Y-%m-%d %H:%M:%S"), arguments.model.stem, arguments.boundary, engine, n_ubatch),
                    *(arguments.prompt, arguments.threads, len(rows)),
                    *(round(1e3 * seconds, 1) for seconds in (moment, latency, micro_batch)),
                    round(resident_bytes(model.pid) / 2**20, 1),
                ]
                rows.append(dict(zip(COLUMNS, values, strict=True)))
                if arguments.csv:
                    append_row(arguments.csv, rows[-1])
                bar.update()
        is_equal = model.answer(number_prompt(SEEDS + 1, arguments.prompt)) == before_aborts
        mib_after = resident_bytes(model.pid) / 2**20
    if not rows:
        raise PopError("every call ended before it was aborted: give a longer --prompt")
    latencies = [row["latency_ms"] for row in rows]
    print(
        f"{engine:6} micro-batch of {n_ubatch} tokens, {1e3 * micro_batch:.0f} ms: "
        f"abort takes {np.median(latencies):.0f} ms (median of {len(rows)}), {max(latencies):.0f} ms (worst); "
        f"memory {mib_before:.0f} MiB before, {mib_after:.0f} after; "
        f"next answer {'equals' if is_equal else 'DIFFERS FROM'} the one before the aborts",
        flush=True,
    )
    return is_equal


class OpenedModel:
    """PopLlama in this process."""

    def __init__(self, llm: PopLlama) -> None:
        self._llm, self.pid = llm, os.getpid()

    def answer(self, text: str) -> list[int]:
        self._llm.reset()
        with contextlib.closing(self._llm.generate(self._llm.tokenize(text.encode()), temp=0)) as tokens:
            return list(itertools.islice(tokens, N_ANSWER))

    def abort(self, text: str, moment: float) -> float | None:
        """Returns the seconds from the wish to stop until the call has ended; None if the call ended before."""
        event, wished = threading.Event(), []

        def wish() -> None:
            wished.append(time.perf_counter())
            event.set()

        timer = threading.Timer(moment, wish)
        timer.start()
        try:
            self._llm.create_completion(text, cancel=event, max_tokens=1, temperature=0)
        except Cancelled:
            took = time.perf_counter() - wished[0]
            return None if self._llm.timings.generated_tokens else took
        finally:
            timer.cancel()
            timer.join()
        return None


@contextlib.contextmanager
def _opened(arguments: argparse.Namespace, n_ubatch: int) -> Iterator[OpenedModel]:
    threads = dict(n_threads=arguments.threads, n_threads_batch=arguments.threads)
    options = dict(n_ctx=arguments.prompt + 32, n_batch=max(n_ubatch, 512), n_ubatch=n_ubatch, verbose=False, **threads)
    llm = PopLlama(str(arguments.model), pop_boundary=arguments.boundary, **options)
    try:
        yield OpenedModel(llm)
    finally:
        llm.close()


class ServedModel:
    """pop-gguf serve, asked over the loopback address."""

    def __init__(self, server: Server) -> None:
        self._server, self.pid = server, server.process.pid

    def answer(self, text: str) -> list[int]:
        options = dict(n_predict=N_ANSWER, cache_prompt=False, ignore_eos=True, return_tokens=True)
        return self._server.complete(text, **options)["tokens"]

    def abort(self, text: str, moment: float) -> float | None:
        """Returns the seconds from hanging up until the server counts no request; None where the answer came before."""
        body = dict(prompt=text, n_predict=1, temperature=0, cache_prompt=False)
        try:
            # The client hangs up when it has waited so long for the first byte, which comes with the whole answer.
            self._server.client.post("/completion", json=body, timeout=httpx.Timeout(600, read=moment))
            return None
        except httpx.ReadTimeout:
            wished = time.perf_counter()
        while self._server.metric("requests_processing"):  # the server answers this between two batches
            time.sleep(0.001)
        return time.perf_counter() - wished


@contextlib.contextmanager
def _served(arguments: argparse.Namespace, n_ubatch: int) -> Iterator[ServedModel]:
    options = ["--boundary", arguments.boundary, "--threads", arguments.threads, "--parallel", 1]
    options += ["--context", arguments.prompt + 32, "--server-options", "--no-warmup", "--cache-ram", 0]
    options += ["--batch-size", n_ubatch, "--ubatch-size", n_ubatch]
    with (
        tempfile.TemporaryDirectory() as directory,
        serve(arguments.model, Path(directory, "log.txt"), *options) as server,
    ):
        server.client.timeout = 600
        yield ServedModel(server)


if __name__ == "__main__":
    sys.exit(main())
