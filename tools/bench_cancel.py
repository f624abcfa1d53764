"""How long an abort in a long prefill takes: from the wish to stop until the model is free, PopLlama and pop-gguf serve.

    python -m tools.bench_cancel MODEL.gguf --boundary 11 --prompt 2048 --ubatch 512,64 --aborts 50 --csv bench/cancel-NAME.csv

`python` sets the call's threading.Event from another thread, `server` hangs up and waits until /metrics counts no request. Moments are
random, of the whole prefill. Afterwards the memory, and the answer to the next request against a fresh one's. The model is one of
`pop-gguf random-model`, whose tokenizer has a token for each number. Run from the source tree with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import http.client
import itertools
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pypop_gguf import Cancelled, PopError, PopLlama
from pypop_gguf.terminal import available_cores

N_ANSWER = 8  # tokens, compared as such: a random model's are no text
SEEDS = 2**31  # of prompts that are asked in the end; those of aborted calls are below
COLUMNS = [
    "date",
    "model",
    "boundary",
    "engine",
    "n_ubatch",
    "prompt_tokens",
    "threads",
    "abort",
    "asked_after_ms",
    "latency_ms",
    "micro_batch_ms",
    "rss_mib",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--boundary", type=int, required=True)
    parser.add_argument("--prompt", type=int, default=2048, metavar="TOKENS")
    parser.add_argument(
        "--ubatch",
        default="512,64",
        help="tokens of a micro-batch, and of llama-server's batch; several by commas (default: 512,64)",
    )
    parser.add_argument("--aborts", type=int, default=50)
    parser.add_argument("--engines", default="python,server")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    try:
        return 0 if all(_measure(arguments, engine, n_ubatch) for n_ubatch, engine in _cases(arguments)) else 1
    except (PopError, OSError) as error:
        print(f"bench_cancel: error: {error}", file=sys.stderr)
        return 1


def _cases(arguments: argparse.Namespace) -> list[tuple[int, str]]:
    sizes, engines = arguments.ubatch.split(","), arguments.engines.split(",")
    if not all(size.isascii() and size.isdigit() and 1 <= int(size) < arguments.prompt for size in sizes):
        raise PopError(
            f"--ubatch {arguments.ubatch}: give numbers from 1 to less than --prompt, or nothing can be aborted"
        )
    if not set(engines) <= {"python", "server"}:
        raise PopError(f"--engines {arguments.engines}: give python, server or both")
    for name in ("aborts", "threads"):
        if getattr(arguments, name) < 1:
            raise PopError(f"--{name} {getattr(arguments, name)} is out of range: give at least 1")
    if arguments.csv and not arguments.csv.parent.is_dir():
        raise PopError(f"cannot write {arguments.csv}: its directory does not exist")
    if arguments.csv and arguments.csv.exists() and arguments.csv.open().readline().strip() != ",".join(COLUMNS):
        raise PopError(f"{arguments.csv} is not a table of this version: give another file")
    return [(int(size), engine) for size in sizes for engine in engines]


def prompt(seed: int, n_tokens: int) -> str:
    """With its BOS that many tokens; prompts of other seeds begin otherwise, so nothing is found in the cache."""
    chance = random.Random(seed)
    return " ".join(str(chance.randrange(250)) for _ in range(n_tokens - 1))


def _measure(arguments: argparse.Namespace, engine: str, n_ubatch: int) -> bool:
    chance = random.Random(0)
    rows = []
    with (_python if engine == "python" else _server)(arguments, n_ubatch) as model:
        model.answer(prompt(SEEDS, arguments.prompt))  # pages the weights in
        started = time.perf_counter()
        fresh = model.answer(prompt(SEEDS + 1, arguments.prompt))
        whole = time.perf_counter() - started
        micro_batch = whole / -(-arguments.prompt // n_ubatch)
        before = _rss_mib(model.pid)
        for _ in range(10 * arguments.aborts):
            if len(rows) == arguments.aborts:
                break
            moment = chance.uniform(0, 0.95 * whole)
            latency = model.abort(prompt(chance.randrange(SEEDS), arguments.prompt), moment)
            if latency is None:
                continue  # it had ended
            values = [
                time.strftime("%Y-%m-%d %H:%M:%S"),
                arguments.model.stem,
                arguments.boundary,
                engine,
                n_ubatch,
                arguments.prompt,
                arguments.threads,
                len(rows),
                round(1e3 * moment, 1),
                round(1e3 * latency, 1),
                round(1e3 * micro_batch, 1),
                round(_rss_mib(model.pid), 1),
            ]
            rows.append(dict(zip(COLUMNS, values)))
            if arguments.csv:
                _append(arguments.csv, rows[-1])
            if sys.stderr.isatty():
                print(
                    f"\r\033[K{engine}, {n_ubatch} tokens: {len(rows)}/{arguments.aborts}",
                    end="",
                    file=sys.stderr,
                    flush=True,
                )
        equal = model.answer(prompt(SEEDS + 1, arguments.prompt)) == fresh
        after = _rss_mib(model.pid)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    if not rows:
        raise PopError("every call ended before it was aborted: give a longer --prompt")
    latencies = [row["latency_ms"] for row in rows]
    print(
        f"{engine:6} micro-batch of {n_ubatch} tokens, {1e3 * micro_batch:.0f} ms: abort takes {np.median(latencies):.0f} ms (median of {len(rows)}), "
        f"{max(latencies):.0f} ms (worst); memory {before:.0f} MiB before, {after:.0f} after; next answer {'equals' if equal else 'DIFFERS FROM'} a fresh one's",
        flush=True,
    )
    return equal


def _rss_mib(pid: int | str) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def _append(path: Path, row: dict) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


class Python:
    """PopLlama in this process."""

    pid = "self"

    def __init__(self, llm: PopLlama) -> None:
        self._llm = llm

    def answer(self, text: str) -> list[int]:
        self._llm.reset()
        with contextlib.closing(self._llm.generate(self._llm.tokenize(text.encode()), temp=0)) as tokens:
            return list(itertools.islice(tokens, N_ANSWER))

    def abort(self, text: str, moment: float) -> float | None:
        """Seconds from the wish until the call has ended, None where it had before."""
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
def _python(arguments: argparse.Namespace, n_ubatch: int) -> Iterator[Python]:
    threads = dict(n_threads=arguments.threads, n_threads_batch=arguments.threads)
    options = dict(n_ctx=arguments.prompt + 32, n_batch=max(n_ubatch, 512), n_ubatch=n_ubatch, verbose=False, **threads)
    llm = PopLlama(str(arguments.model), pop_boundary=arguments.boundary, **options)
    try:
        yield Python(llm)
    finally:
        llm.close()


class Server:
    """pop-gguf serve, asked over the loopback address."""

    def __init__(self, port: int, pid: int) -> None:
        self._port, self.pid = port, pid

    def _send(self, method: str, path: str, body: dict | None = None) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        return connection

    def get(self, path: str) -> str:
        with contextlib.closing(self._send("GET", path)) as connection:
            return connection.getresponse().read().decode()

    def answer(self, text: str) -> list[int]:
        body = dict(
            prompt=text, n_predict=N_ANSWER, temperature=0, cache_prompt=False, ignore_eos=True, return_tokens=True
        )
        with contextlib.closing(self._send("POST", "/completion", body)) as connection:
            return json.loads(connection.getresponse().read())["tokens"]

    def _working(self) -> bool:
        line = next(
            line for line in self.get("/metrics").splitlines() if line.startswith("llamacpp:requests_processing ")
        )
        return float(line.split()[1]) > 0

    def abort(self, text: str, moment: float) -> float | None:
        """Seconds from hanging up until no request is counted, None where its answer had come before."""
        connection = self._send(
            "POST", "/completion", dict(prompt=text, n_predict=1, temperature=0, cache_prompt=False)
        )
        arrived = threading.Event()  # a thread waits for the answer, as a client does

        def wait() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if connection.getresponse().read():
                    arrived.set()

        thread = threading.Thread(target=wait)
        thread.start()
        ended = arrived.wait(moment)
        wished = time.perf_counter()
        with contextlib.suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)
        thread.join()
        while self._working():  # the server answers this between two batches
            time.sleep(0.001)
        took = time.perf_counter() - wished
        connection.close()
        return None if ended else took


@contextlib.contextmanager
def _server(arguments: argparse.Namespace, n_ubatch: int) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        "-m",
        "pypop_gguf",
        "serve",
        arguments.model,
        "--boundary",
        arguments.boundary,
        "--port",
        port,
        "--threads",
        arguments.threads,
        "--parallel",
        1,
    ]
    command += [
        "--context",
        arguments.prompt + 32,
        "--server-options",
        "--no-warmup",
        "--cache-ram",
        0,
        "--batch-size",
        n_ubatch,
        "--ubatch-size",
        n_ubatch,
    ]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    server = Server(port, process.pid)
    try:
        _until(lambda: '"ok"' in server.get("/health"), process)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def _until(ready: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise PopError(
                f"the server ended with {process.returncode}: run `pop-gguf serve` with the same model and boundary to see why"
            )
        with contextlib.suppress(OSError):
            if ready():
                return
        time.sleep(0.1)
    raise PopError("the server gave no answer in 120 s")


if __name__ == "__main__":
    sys.exit(main())
