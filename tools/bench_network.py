"""Measures prompts of a model that is split over two machines, with a delay on the network between them.

    python -m tools.bench_network MODEL.gguf --boundary 20 --delay 0,1,10 --csv bench/network-NAME.csv

Each half of the layers lies on an RPC server. Both servers run on this machine, and a relay of this program stands for
the network in front of the second one: what it gets, it passes on at the rate of the link and after the delay. It does
not imitate lost packets. The prompt is read by all layers ("whole") and pruned ("pop") in turns, by the same process.
Both servers share the cores of this machine, so only times of the same delay can be compared.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import queue
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pypop_gguf import PopError
from pypop_gguf.bench.engine import Engine
from pypop_gguf.bench.measure import in_turn
from pypop_gguf.gguf_files.header import read_header
from pypop_gguf.gguf_files.metadata import trunk_layers
from pypop_gguf.statistics import bootstrap_ratio
from pypop_gguf.terminal import aligned, check_ranges, integer_list, progress
from tests.support.server import rpc_servers
from tools.bench_common import append_row, check_table
from tools.reporting import one_line_errors, spread

COLUMNS = [
    *("date", "model", "boundary", "threads", "rate_mbit", "delay_ms", "prompt_tokens", "round"),
    *("engine", "ttft_ms", "decode_ms_per_token"),
]
N_DECODE = 8


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--boundary", type=int, required=True, help="first layer that prefill skips")
    parser.add_argument("--prompt", type=integer_list, default=[128, 512], metavar="N,N", help="(default: 128,512)")
    parser.add_argument(
        "--delay", type=integer_list, default=[0, 1, 10], metavar="MS,MS", help="of one direction (default: 0,1,10)"
    )
    parser.add_argument("--rate", type=int, default=1000, help="megabits a second of the link (default: 1000)")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="number of rounds of each case (default: 5)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of each server (default: 1)")
    parser.add_argument("--csv", type=Path, help="file to append every run to")
    arguments = parser.parse_args()
    check_ranges(arguments, boundary=1, prompt=1, rate=1, runs=1, threads=1, delay=0)
    if arguments.csv:
        check_table(arguments.csv, COLUMNS)
    rows = []
    for row in measure(arguments):
        rows.append(row)
        if arguments.csv:
            append_row(arguments.csv, row)
    print("\n".join(table(rows)))
    return 0


def measure(arguments: argparse.Namespace) -> Iterator[dict]:
    """Yields a row for each prompt that was read."""
    n_runs = 2 * len(arguments.prompt) * len(arguments.delay) * arguments.runs
    with (
        progress(total=n_runs, description="prompts", unit="runs") as bar,
        tempfile.TemporaryDirectory() as directory,
        rpc_servers(2, Path(directory), arguments.threads) as (near, far),
        contextlib.closing(Link(far, arguments.rate * 1e6 / 8)) as link,
    ):
        for n_prompt in arguments.prompt:
            link.delay_s = 0  # Loading takes long over a slow link, and is not measured.
            with contextlib.closing(_start(arguments, n_prompt, [near, link.address])) as engine:
                for row in _measure_prompt(arguments, n_prompt, engine, link):
                    yield row
                    bar.update()


def _measure_prompt(arguments: argparse.Namespace, n_prompt: int, engine: Engine, link: Link) -> Iterator[dict]:
    ways = [("whole", trunk_layers(read_header(arguments.model))), ("pop", arguments.boundary)]
    for _, boundary in ways:
        engine.warm_up(n_prompt, boundary)
    for delay, number in itertools.product(arguments.delay, range(arguments.runs)):
        link.delay_s = delay / 1e3
        for name, boundary in in_turn(ways, number):
            read = engine.ask("prefill", n_prompt=n_prompt, boundary=boundary)
            if name == "pop" and not read["pruned"]:
                raise PopError(f"no token was pruned at boundary {boundary}: give a lower one")
            decode_ms = engine.ask("decode", n=N_DECODE)["ms_per_token"]
            case = [arguments.model.stem, arguments.boundary, arguments.threads, arguments.rate, delay, n_prompt]
            case = [time.strftime("%Y-%m-%d %H:%M:%S"), *case, number, name]
            yield dict(zip(COLUMNS, [*case, round(read["ttft_ms"], 2), round(decode_ms, 2)], strict=True))


def _start(arguments: argparse.Namespace, n_prompt: int, servers: list[str]) -> Engine:
    return Engine(
        "pop",
        arguments.model,
        None,
        n_threads=arguments.threads,
        n_ubatch=512,
        flash_attn="auto",
        n_prompt=n_prompt,
        n_decode=N_DECODE,
        n_parallel=1,
        rpc=servers,
    )


class Link:
    """A network in front of a server: an address of this machine that passes everything on later, in both directions.

    Attributes:
        address: Where to connect to instead of the server, as HOST:PORT.
        delay_s: What each direction adds. It may change at any time.
    """

    def __init__(self, server: str, bytes_per_s: float) -> None:
        self.delay_s, self._s_per_byte = 0.0, 1 / bytes_per_s
        host, _, port = server.partition(":")
        self._server, self._listener = (host, int(port)), socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._run(self._accept)

    def close(self) -> None:
        """Takes no more connections. Those that are open end with their programs."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            far = socket.create_connection(self._server)
            for source, sink in ((near, far), (far, near)):
                sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                under_way: queue.Queue[tuple[float, bytes]] = queue.Queue()
                self._run(self._take, source, under_way)
                self._run(self._deliver, under_way, sink)

    def _take(self, source: socket.socket, under_way: queue.Queue) -> None:
        free_at, data = 0.0, b"any"
        while data:
            try:
                data = source.recv(1 << 16)
            except OSError:  # The program at this end was killed; the other end has to learn of it.
                data = b""
            free_at = max(free_at, time.monotonic()) + len(data) * self._s_per_byte
            under_way.put((free_at + self.delay_s, data))

    def _deliver(self, under_way: queue.Queue, sink: socket.socket) -> None:
        while True:
            arrives_at, data = under_way.get()
            time.sleep(max(0.0, arrives_at - time.monotonic()))
            if not data:
                return sink.shutdown(socket.SHUT_WR)
            sink.sendall(data)

    @staticmethod
    def _run(work: Callable, *arguments: object) -> None:
        def until_closed() -> None:
            with contextlib.suppress(OSError):
                work(*arguments)

        threading.Thread(target=until_closed, daemon=True).start()


def table(rows: list[dict]) -> list[str]:
    """Returns medians over the rounds with ranges, and how many times sooner the first token comes."""
    cases: dict[tuple, dict[str, list[dict]]] = {}
    for row in rows:
        cases.setdefault((row["prompt_tokens"], row["delay_ms"]), {}).setdefault(row["engine"], []).append(row)
    lines = [("prompt", "delay ms", "whole ms", "POP ms", "speed-up [95%]", "whole ms/token", "POP ms/token")]
    for case, engines in cases.items():
        whole, pop = (np.array([row["ttft_ms"] for row in engines[name]]) for name in ("whole", "pop"))
        decode = [f"{np.median([row['decode_ms_per_token'] for row in engines[name]]):.1f}" for name in engines]
        lines.append((*map(str, case), spread(whole), spread(pop), bootstrap_ratio(whole, pop), *decode))
    return aligned(lines)


if __name__ == "__main__":
    sys.exit(main())
