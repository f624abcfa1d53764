"""Measures whole requests as a client of `pop-gguf serve` sees them, with POP and with `"pop": false`.

    python -m tools.bench_requests MODEL.gguf --runs 5 --csv bench/requests-NAME.csv

The requests are a chat of five turns, a question about a long text, code to complete, a tool call, and eight clients at
once. Prompts are bundled texts, cut to a number of tokens. Answers are greedy and do not end before their number of
tokens, so both sides generate as many. The two sides take turns. No prompt finds a part of itself in the cache, except
that a turn of the chat goes on from the turn before. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pypop_gguf import PopError
from pypop_gguf.gguf_files.metadata import read_metadata
from pypop_gguf.statistics import bootstrap_ratio
from pypop_gguf.terminal import aligned, available_cores, check_ranges, progress
from tests.support.server import Server, serve
from tools.bench_common import append_row, check_table, cut_tokens, prompt_text
from tools.reporting import one_line_errors, spread

COLUMNS = [
    *("date", "model", "threads", "request", "part", "prompt_tokens", "answer_tokens", "round", "pop"),
    *("first_ms", "last_ms", "cached_tokens", "pruned_tokens"),
]
LONGEST_WAIT_S = 3600


@dataclass(frozen=True)
class Request:
    """A kind of request.

    Attributes:
        name: What the table calls it.
        text: Kind of the text that its prompt is cut from, as ``prompt_text`` names it.
        n_prompt: Tokens of the prompt; of a chat, tokens that each turn adds.
        n_answer: Tokens of the answer.
        n_turns: Number of turns.
        n_clients: How many clients send such a request at once, each with a prompt of its own.
    """

    name: str
    text: str
    n_prompt: int
    n_answer: int
    n_turns: int = 1
    n_clients: int = 1

    def scaled(self, scale: float) -> Request:
        sizes = {name: max(2, round(scale * getattr(self, name))) for name in ("n_prompt", "n_answer")}
        return dataclasses.replace(self, **sizes)


REQUESTS = (
    Request("chat", "chat", 200, 64, n_turns=5),
    Request("retrieval", "retrieval", 2000, 200),
    Request("code completion", "code", 1000, 64),
    Request("tool call", "tools", 800, 40),
    Request("eight clients", "summary", 500, 64, n_clients=8),
)


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model with a boundary")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="number of rounds (default: 5)")
    parser.add_argument("--threads", type=int, default=available_cores(), metavar="N", help="number of threads")
    parser.add_argument("--scale", type=float, default=1, help="factor for all lengths (default: 1)")
    parser.add_argument("--csv", type=Path, help="file to append every answer to")
    arguments = parser.parse_args()
    check_ranges(arguments, runs=1, threads=1)
    if arguments.csv:
        check_table(arguments.csv, COLUMNS)
    read_metadata(arguments.model)  # A bad file is reported in one line here.
    rows: list[dict] = []
    for row in measure(arguments):
        rows.append({name: row[name] for name in COLUMNS})
        if arguments.csv:
            append_row(arguments.csv, rows[-1])
    print("\n".join(table(rows)))
    return 0


def measure(arguments: argparse.Namespace) -> Iterator[dict]:
    """Yields a row for each answer. A server has one slot for each client that asks it at once."""
    requests = [request.scaled(arguments.scale) for request in REQUESTS]
    bar = progress(total=2 * arguments.runs * len(requests), description="requests", unit="requests")
    with bar, tempfile.TemporaryDirectory() as directory:
        for n_clients, group in itertools.groupby(requests, key=lambda request: request.n_clients):
            of_server = list(group)
            n_context = max(request.n_turns * (request.n_prompt + request.n_answer) for request in of_server) + 16
            options = ["--threads", arguments.threads, "--parallel", n_clients, "--context", n_clients * n_context]
            # Without --cache-ram 0, the server would bring old prompts back into the cache.
            options += ["--server-options", "--cache-ram", 0]
            with serve(arguments.model, Path(directory, "log.txt"), *options) as server:
                server.client.timeout = LONGEST_WAIT_S
                if (longest := server.get("/props")["default_generation_settings"]["n_ctx"]) < n_context:
                    raise PopError(f"the model reads {longest} tokens, not {n_context}: give a --scale below 1")
                yield from _measure_server(server, of_server, arguments, bar)


def _measure_server(server: Server, requests: list[Request], arguments: argparse.Namespace, bar) -> Iterator[dict]:
    texts = {text: server.post("/tokenize", content=prompt_text(text))["tokens"] for text in {r.text for r in requests}}
    for pop in (True, False):
        warm = _ask(server, cut_tokens(texts[requests[0].text], requests[-1].n_prompt, 0), 2, pop, cached=False)
        if pop and not warm["pruned_tokens"]:
            raise PopError(f"{arguments.model} prunes no prompt: make a copy with `pop-gguf prepare` and give that")
    for number, request in itertools.product(range(arguments.runs), requests):
        for pop in (True, False)[:: -1 if number % 2 else 1]:
            bar.set_postfix_str(f"{request.name}, round {number + 1}")
            with concurrent.futures.ThreadPoolExecutor(request.n_clients) as pool:
                clients = [
                    pool.submit(_converse, server, request, texts[request.text], number * request.n_clients + i, pop)
                    for i in range(request.n_clients)
                ]
            answers = [answer for client in clients for answer in client.result()]
            for part, answer in enumerate(answers, 1):
                case = dict(date=time.strftime("%Y-%m-%d %H:%M:%S"), model=arguments.model.stem, part=part, pop=pop)
                case |= dict(threads=arguments.threads, request=request.name, round=number)
                yield {**case, "answer_tokens": request.n_answer, **answer}
            bar.update()


def _converse(server: Server, request: Request, text: list[int], number: int, pop: bool) -> list[dict]:
    """Asks as many turns as the request has; each turn goes on from the answer before."""
    prompt: list[int] = []
    answers = []
    for turn in range(request.n_turns):
        prompt += cut_tokens(text, request.n_prompt, number * request.n_turns + turn)
        answer = _ask(server, prompt, request.n_answer, pop, cached=turn > 0)
        prompt = prompt + answer.pop("tokens")
        answers.append(answer)
    return answers


def _ask(server: Server, prompt: list[int], n_answer: int, pop: bool, cached: bool) -> dict:
    """Streams an answer and returns its times from the moment of asking, its tokens and what was cached and pruned."""
    asked = dict(prompt=prompt, n_predict=n_answer, ignore_eos=True, temperature=0, return_tokens=True)
    started, times, tokens, timings = time.perf_counter(), [], [], {}
    for event in server.stream("/completion", **asked, cache_prompt=cached, pop=pop):
        times.append(1e3 * (time.perf_counter() - started))
        tokens += event.get("tokens", [])
        timings = event.get("timings", timings)
    if timings.get("predicted_n") != n_answer:
        raise PopError(f"the server did not generate {n_answer} tokens: {server.log[-2000:]}")
    if not cached and timings["cache_n"]:
        raise PopError(f"{timings['cache_n']} tokens came from a cache that was to be cold")
    result = {"prompt_tokens": len(prompt), "first_ms": round(times[0], 2), "last_ms": round(times[-1], 2)}
    return {**result, "cached_tokens": timings["cache_n"], "pruned_tokens": timings["pruned_n"], "tokens": tokens}


def table(rows: list[dict]) -> list[str]:
    """Returns medians over the rounds with ranges; turns of a chat stand apart, clients that ask at once do not."""
    lines = [("request", "prompt", "answer", "until the", "POP ms", "whole ms", "speed-up [95%]")]
    for time_name, when in (("first_ms", "first token"), ("last_ms", "last token")):
        cases: dict[str, list[dict]] = {}
        for row in rows:
            name = f"{row['request']}, turn {row['part']}" if row["request"] == "chat" else row["request"]
            cases.setdefault(name, []).append(row)
        for name, of_case in cases.items():
            pop, whole = (np.array([row[time_name] for row in of_case if row["pop"] is side]) for side in (True, False))
            sizes = of_case[0]["prompt_tokens"], of_case[0]["answer_tokens"]
            lines.append((name, *sizes, when, *map(spread, (pop, whole)), bootstrap_ratio(whole, pop)))
    return aligned(lines)


if __name__ == "__main__":
    sys.exit(main())
