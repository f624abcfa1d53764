"""Measures how many more requests two servers behind nginx answer than one, with POP and with `"pop": false`.

    python -m tools.bench_proxy MODEL.gguf --rounds 5 --csv bench/proxy-NAME.csv

Clients ask one server, or two, through nginx with the configuration in docs/server.md. Each server has one thread and a
core of its own, so the two stand for two machines of one core each. They share memory and caches of one machine, and
nginx and the clients need a part of the same two cores, while beside one server a core is free. Both make the gain look
smaller than on two machines.

Both servers run all the time; a proxy in front of the first one alone makes the case of one server. The four cases take
turns. Every conversation has one request, with a header and a prompt of its own, and no prompt finds a part of itself
in a cache. Conversations of each round have new names, so nginx divides them anew. Answers are greedy and do not end
before their number of tokens. Nothing else should run on the machine. The script needs Linux.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np

from pypop_gguf import PopError
from pypop_gguf.bench.measure import in_turn
from pypop_gguf.gguf_files.metadata import read_metadata
from pypop_gguf.statistics import bootstrap_ratio
from pypop_gguf.terminal import aligned, check_ranges, physical_cores, progress
from tests.support.nginx import NGINX, proxy
from tests.support.server import Server, serve, stream_events
from tools.bench_common import append_row, check_table, cut_tokens, prompt_text
from tools.reporting import one_line_errors, spread

COLUMNS = [
    *("date", "model", "threads", "servers", "pop", "round", "conversations", "clients", "prompt_tokens"),
    *("answer_tokens", "requests_per_s", "first_median_ms", "first_worst_ms", "most_conversations"),
]
CASES = list(itertools.product((1, 2), (True, False)))  # the number of servers, and whether requests use POP
LONGEST_WAIT_S = 1200


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model with a boundary")
    parser.add_argument("--prompt", type=int, default=256, metavar="TOKENS", help="length of a prompt (default: 256)")
    parser.add_argument("--answer", type=int, default=32, metavar="TOKENS", help="length of an answer (default: 32)")
    parser.add_argument("--conversations", type=int, default=32, metavar="N", help="in each round (default: 32)")
    parser.add_argument("--clients", type=int, default=8, metavar="N", help="number of clients at once (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="number of rounds (default: 5)")
    parser.add_argument("--csv", type=Path, help="file to append every run to")
    arguments = parser.parse_args()
    check_ranges(arguments, prompt=1, answer=1, conversations=1, clients=1, rounds=1)
    if arguments.csv:
        check_table(arguments.csv, COLUMNS)
    read_metadata(arguments.model)  # A bad file is reported in one line here.
    rows = []
    for row in measure(arguments):
        rows.append(row)
        if arguments.csv:
            append_row(arguments.csv, row)
    print("\n".join(table(rows)))
    return 0


def measure(arguments: argparse.Namespace) -> Iterator[dict]:
    """Yields a row for each run of a case."""
    cores = _two_cores()
    if not NGINX:
        raise PopError("the program nginx is missing: install it, on Debian with `apt-get install nginx-light`")
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = [stack.enter_context(_serve(arguments, core, directory)) for core in cores]
        text = servers[0].post("/tokenize", content=prompt_text("summary"))["tokens"]
        for server, pop in itertools.product(servers, (True, False)):  # loads the weights' pages into memory
            warm = server.complete(cut_tokens(text, arguments.prompt, 0), n_predict=2, pop=pop)
            if pop and not warm["timings"]["pruned_n"]:
                raise PopError(f"{arguments.model} prunes no prompt: make a copy with `pop-gguf prepare` and give that")
        proxies = {}
        for n in (1, 2):
            (place := directory / f"nginx-{n}").mkdir()
            proxies[n] = stack.enter_context(proxy(place, *(server.port for server in servers[:n])))
            proxies[n].timeout = LONGEST_WAIT_S
        bar = stack.enter_context(
            progress(total=arguments.rounds * len(CASES), description="one server and two", unit="runs")
        )
        for number in range(arguments.rounds):
            prompts = {
                f"round {number}, conversation {i}": cut_tokens(text, arguments.prompt, i)
                for i in range(number * arguments.conversations, (number + 1) * arguments.conversations)
            }
            for n, pop in in_turn(CASES, number):
                bar.set_postfix_str(f"round {number + 1}")
                case = [time.strftime("%Y-%m-%d %H:%M:%S"), arguments.model.stem, 1, n, pop, number]
                case += [arguments.conversations, arguments.clients, arguments.prompt, arguments.answer]
                figures = _measure_case(arguments, proxies[n], servers, prompts, pop)
                yield dict(zip(COLUMNS, [*case, *figures], strict=True))
                bar.update()


def _two_cores() -> tuple[int, int]:
    """Returns the first and the last core that this process may use: neighbours may be two threads of one core."""
    if not hasattr(os, "sched_setaffinity"):
        raise PopError("this script gives each server a core of its own, which it can do on Linux only")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2 or physical_cores() == 1:
        raise PopError("each of two servers needs a core of its own, and this process may use one core only")
    return cores[0], cores[-1]


@contextlib.contextmanager
def _serve(arguments: argparse.Namespace, core: int, directory: Path) -> Iterator[Server]:
    """Runs a server on one core. It has a slot for each client, because nginx may send all clients to it."""
    n_context = arguments.prompt + arguments.answer + 16
    options = ["--threads", 1, "--parallel", arguments.clients, "--context", arguments.clients * n_context]
    # Without --cache-ram 0, the server would bring old prompts back into the cache.
    options += ["--server-options", "--no-cache-prompt", "--cache-ram", 0]
    with contextlib.ExitStack() as stack:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {core})  # The server inherits this affinity.
        try:
            server = stack.enter_context(serve(arguments.model, directory / f"server-{core}.txt", *options))
        finally:
            os.sched_setaffinity(0, before)
        server.client.timeout = LONGEST_WAIT_S
        if (longest := server.get("/props")["default_generation_settings"]["n_ctx"]) < n_context:
            raise PopError(f"the model reads {longest} tokens, not {n_context}: give a shorter --prompt")
        yield server


def _measure_case(
    arguments: argparse.Namespace, client: httpx.Client, servers: list[Server], prompts: dict[str, list[int]], pop: bool
) -> tuple[float, float, float, int]:
    """Returns the figures of a run, as the last columns of the table have them."""
    before = [server.metric("prompt_tokens_total") for server in servers]
    with concurrent.futures.ThreadPoolExecutor(arguments.clients) as pool:
        started = time.perf_counter()
        waits = list(pool.map(lambda asked: _first_ms(client, *asked, arguments.answer, pop), prompts.items()))
        seconds = time.perf_counter() - started
    read = [server.metric("prompt_tokens_total") - n for server, n in zip(servers, before, strict=True)]
    if sum(read) != (n_tokens := len(prompts) * arguments.prompt):
        raise PopError(f"the servers read {sum(read):.0f} tokens instead of {n_tokens}: nginx sent a request to both")
    most = round(max(read) / arguments.prompt)
    return round(len(prompts) / seconds, 4), round(float(np.median(waits)), 1), round(max(waits), 1), most


def _first_ms(client: httpx.Client, conversation: str, prompt: list[int], n_answer: int, pop: bool) -> float:
    """Returns the time to the first token, once the whole answer is there."""
    body = dict(prompt=prompt, n_predict=n_answer, ignore_eos=True, temperature=0, cache_prompt=False, pop=pop)
    started, times, timings = time.perf_counter(), [], {}
    for event in stream_events(client, "/completion", body, {"X-Conversation": conversation}):
        times.append(1e3 * (time.perf_counter() - started))
        timings = event.get("timings", timings)
    got = timings.get("predicted_n"), timings.get("cache_n"), bool(timings.get("pruned_n"))
    if got != (n_answer, 0, pop):
        raise PopError(f"not {n_answer} tokens without a cache and with pop={pop}, but an answer with {timings}")
    return times[0]


def table(rows: list[dict]) -> list[str]:
    """Returns medians over the rounds with ranges, and how many times as many requests two servers answer."""
    lines = [("servers", "prompts", "requests/s", "first token ms", "conversations at the busier server")]
    names, rates = {True: "POP", False: "whole"}, {}
    for n, pop in CASES:
        chosen = [row for row in rows if (row["servers"], row["pop"]) == (n, pop)]
        rates[n, pop] = np.array([row["requests_per_s"] for row in chosen])
        firsts, most = (np.array([row[name] for row in chosen]) for name in ("first_median_ms", "most_conversations"))
        lines.append((n, names[pop], spread(rates[n, pop], 2), spread(firsts), spread(most)))
    ratios = {name: bootstrap_ratio(rates[2, pop], rates[1, pop]) for pop, name in names.items()}
    return [*aligned(lines), *(f"{name}, two servers over one: {ratio}" for name, ratio in ratios.items())]


if __name__ == "__main__":
    sys.exit(main())
