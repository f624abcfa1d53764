"""Sends mixed traffic to the server for a while: `python -m tools.soak --minutes 60`. It needs the source tree.

Several clients at once ask for greedy answers and streams, cancel requests, and send broken and bad ones. The run
fails where an answer differs from what PopLlama gives alone, where a request gets no answer, where the server ends, or
where its memory grows after the warm-up. Model and caches are F32 without flash attention, so that batches of other
shapes differ by rounding alone.

With `--complete`, the server completes pruned prompts, and requests that all layers have to read come after them to
the same slots with the same prompts: they reuse what was completed, and get the whole model's answers.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pypop_gguf import PopLlama
from pypop_gguf.terminal import add_complete_argument, check_ranges
from tests.support import tiny_models
from tests.support.process import stop
from tests.support.server import OPTIONS, Server, serve
from tools.reporting import one_line_errors
from tools.soak_traffic import N_WRITTEN, OPENINGS, WORDS, Traffic

SERVER_OPTIONS = (*OPTIONS, "-ctk", "f32", "-ctv", "f32", "-fa", "off", "--cache-ram", 16)


@dataclass
class Report:
    """The results of a run.

    Attributes:
        requests: How many requests of each kind were sent.
        resident_bytes: The server's memory every half second.
        faults: One line for each fault.
        n_completed: How many tokens the server has completed.
        n_reused: How many tokens whole requests have found in the cache after everything was completed.
    """

    requests: dict[str, int]
    resident_bytes: list[int]
    faults: list[str]
    n_completed: int = 0
    n_reused: int = 0


def expected_answers(model: Path, n_prompts: int, seed: int, complete: str = "off") -> dict[bool, dict[str, str]]:
    """Returns greedy answers by prompt, for pruned prompts under True and for whole ones under False.

    Every token of an answer is ahead of the second likeliest by more than rounding can change. With completion, the
    prompts that are pruned are also among the whole ones. While an answer itself is completed, the time decides which
    tokens are the whole model's, so only the first token of a pruned prompt is known.
    """
    llm = PopLlama(
        str(model), n_ctx=512, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, flash_attn=False, verbose=False
    )
    chance, answers = random.Random(seed), {True: {}, False: {}}

    def answer(prompt: str, pop: bool) -> str | None:
        """Returns the answer, unless rounding can change it."""
        n_written = 1 if pop and complete == "answer" else N_WRITTEN
        llm.reset()
        options = dict(max_tokens=n_written, temperature=0, repeat_penalty=1.0)
        text = llm.create_completion(prompt, pop=pop, **options)["choices"][0]["text"]
        tokens = llm.tokenize(prompt.encode())
        # The cache lacks the last token of the answer. Any id may stand for it: its own logits are not looked at.
        written = llm.input_ids[len(tokens) : llm.n_tokens].tolist()
        best = np.sort(llm.score(tokens, [*written, 0], pop=pop), axis=1)
        return text if (best[:, -1] - best[:, -2]).min() > 0.01 else None

    for pop, found in answers.items():
        while len(found) < n_prompts:
            prompt = f"{chance.choice(OPENINGS[pop])} {' '.join(chance.choices(WORDS, k=chance.randrange(1, 60)))}"
            if (text := answer(prompt, pop)) is not None:
                found[prompt] = text
    if complete != "off":
        both = {prompt: answer(prompt, False) for prompt in answers[True]}
        answers[False] |= {prompt: text for prompt, text in both.items() if text is not None}
    llm.close()
    return answers


def becomes_idle(server: Server, seconds: float) -> bool:
    """Returns whether within this time the server has no request any more, and nothing to complete."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        n_requests = server.metric("requests_processing") + server.metric("requests_deferred")
        if n_requests == 0 and not any(slot.get("n_incomplete") for slot in server.get("/slots")):
            return True
        time.sleep(0.1)
    return False


def warm_and_last_bytes(sizes: list[int]) -> tuple[float, float]:
    """Returns the memory after the warm-up, a third of the run, and at the end: medians over a tenth of the rest."""
    rest = sizes[len(sizes) // 3 :]
    tenth = max(1, len(rest) // 10)
    return statistics.median(rest[:tenth]), statistics.median(rest[-tenth:])


def soak(
    server: Server,
    answers: dict[bool, dict[str, str]],
    *,
    minutes: float,
    n_clients: int,
    n_requests: int,
    seed: int,
    max_growth: float,
    complete: str = "off",
) -> Report:
    """Sends the traffic, then asks the server to end.

    Args:
        server: Runs with four slots.
        answers: From :func:`expected_answers`.
        minutes: Longest time of the traffic.
        n_clients: How many clients send requests at once.
        n_requests: Most requests of all clients together.
        seed: Of the random requests.
        max_growth: Most growth of the server's memory after the warm-up, as a share of it.
        complete: The server's ``--complete``.
    """
    traffic, sizes, n_completed = Traffic(server.client, answers, n_requests, complete=complete), [], 0
    clients = [threading.Thread(target=traffic.client, args=(seed * 1000 + i,)) for i in range(n_clients)]
    traffic.burst(n_clients)
    deadline = time.monotonic() + 60 * minutes
    for client in clients:
        client.start()
    while time.monotonic() < deadline and not traffic.over.is_set() and any(client.is_alive() for client in clients):
        time.sleep(0.5)
        if server.process.poll() is not None:
            break
        sizes.append(server.resident_bytes())
    traffic.over.set()
    for client in clients:
        client.join()
    if traffic.faults:  # a server that is ending has closed its connections before its process is gone
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(1)
    if server.process.poll() is not None:
        traffic.fault(f"the server ended with status {server.process.returncode}")
    else:
        if not becomes_idle(server, 30):
            traffic.fault("a request, or something to complete, is still there 30 s after the last client has gone")
        n_completed = int(server.metric("tokens_completed_total"))
        if complete != "off" and not n_completed:
            traffic.fault("nothing was completed")
        with contextlib.suppress(subprocess.TimeoutExpired):
            stop(server.process, 30)
        if server.process.returncode != 0:
            traffic.fault(f"asked to end, the server ended with {server.process.returncode}")
    sizes = [size for size in sizes if size]  # a process that is ending has none
    if sizes:
        warm, last = warm_and_last_bytes(sizes)
        if last / warm - 1 > max_growth:
            traffic.fault(f"memory grew by {last / warm - 1:.2%}")
    return Report(dict(sorted(traffic.done.items())), sizes, traffic.faults, n_completed, traffic.n_reused)


def print_report(report: Report, n_clients: int, log: str) -> None:
    print(f"{sum(report.requests.values())} requests by {n_clients} clients: {report.requests}")
    if report.resident_bytes:
        warm, last = warm_and_last_bytes(report.resident_bytes)
        print(f"memory {warm / 1e6:.1f} MB after the warm-up, {last / 1e6:.1f} MB at the end: {last / warm - 1:+.2%}")
    if report.n_completed:
        print(f"{report.n_completed} tokens completed, and {report.n_reused} reused by requests for all layers")
    for fault in report.faults:
        print(f"FAULT {fault}")
    if report.faults:
        print(f"the server's last lines: {log[-4000:]}\nfailed")
    else:
        n_answers = report.requests.get("answer", 0) + 2 * report.requests.get("answer_again", 0)
        print(f"passed: {n_answers} greedy answers equal to the expected ones, none stuck")


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5, help="longest time of the run (default: 5)")
    parser.add_argument("--requests", type=int, default=10_000_000, help="largest number of requests")
    parser.add_argument("--clients", type=int, default=8, help="number of clients at once, on four slots (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the requests (default: 0)")
    parser.add_argument(
        "--max-growth",
        type=float,
        default=0.01,
        help="largest growth of the server's memory after the warm-up, as a share (default: 0.01)",
    )
    parser.add_argument(
        "--model", type=Path, help="F32 GGUF with a boundary (default: the bundled model, 8 of 12 layers)"
    )
    add_complete_argument(parser)
    arguments = parser.parse_args()
    check_ranges(arguments, requests=1, clients=1)
    with tempfile.TemporaryDirectory() as directory:
        model = arguments.model or Path(directory, "model.gguf")
        if not arguments.model:
            tiny_models.write_served(model)
        answers = expected_answers(model, 40, arguments.seed, arguments.complete)
        options = ("--complete", arguments.complete, *SERVER_OPTIONS)
        with serve(model, Path(directory, "log.txt"), *options) as server:
            report = soak(
                server,
                answers,
                minutes=arguments.minutes,
                n_clients=arguments.clients,
                n_requests=arguments.requests,
                seed=arguments.seed,
                max_growth=arguments.max_growth,
                complete=arguments.complete,
            )
        print_report(report, arguments.clients, server.log)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
