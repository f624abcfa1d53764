"""Mixed traffic on the server for a while: `python -m tools.soak --minutes 60`. Needs the source tree.

Greedy answers, streams, cancelled, broken and bad requests, by several clients at once, on the loopback address. It fails where
an answer differs from what PopLlama gives alone (F32 caches, no flash attention, so that batches of other shapes differ by
rounding only), where a request is stuck, where the server ends, or where its memory grows after the warm-up.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from pypop_gguf import PopLlama

STUCK_S = 60
N_WRITTEN = 16
# Each in slots and with prompts of its own: a pruned request may go on from what a whole one has left, and then differs.
KINDS = {True: (0, 1), False: (2, 3)}
OPENINGS = {
    True: ("Once upon a time there was a", "Every morning the old"),
    False: ("Tim and his sister saw a", "In the garden lived a"),
}
WORDS = [
    "small",
    "big",
    "red",
    "blue",
    "happy",
    "sad",
    "dog",
    "cat",
    "bird",
    "fish",
    "tree",
    "ball",
    "kite",
    "house",
    "river",
    "stone",
    "friend",
    "cake",
    "hat",
    "boat",
]
BAD = [
    b"",
    b"[]",
    b"{",
    b'{"prompt": {}}',
    b'{"prompt": [-1]}',
    b'{"prompt": "a", "n_predict": "x"}',
    b'{"prompt": "\xff"}',
    b'{"prompt": "a", "grammar": "root ::= root"}',
    json.dumps({"prompt": "far too long " * 3000}).encode(),
]


class Traffic:
    """What was sent and what came of it; shared by the clients."""

    def __init__(self, port: int, answers: dict[bool, dict[str, str]], n_requests: int) -> None:
        self.port, self.answers, self.left = port, answers, n_requests
        self.done, self.faults = collections.Counter(), []
        self.lock, self.over = threading.Lock(), threading.Event()

    def post(self, path: str, body: bytes) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=STUCK_S)
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        return connection, connection.getresponse()

    def get(self, path: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=STUCK_S)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().read().decode()

    def fault(self, text: str) -> None:
        with self.lock:
            self.faults.append(text)
        self.over.set()

    def burst(self, n_clients: int) -> None:
        """The most that they can ask at once: what the server's allocator keeps of it is no growth."""
        longest = [
            self.body(random.Random(0), pop, f"{OPENINGS[pop][0]} {' '.join(WORDS * 20)}", False) for pop in KINDS
        ]

        def send(body: bytes) -> None:
            connection, response = self.post("/completion", body)
            with contextlib.closing(connection):
                response.read()

        with concurrent.futures.ThreadPoolExecutor(n_clients) as pool:
            for body in [*BAD, *longest]:
                list(pool.map(send, [body] * n_clients))

    def client(self, seed: int) -> None:
        chance = random.Random(seed)
        actions = [
            (self.answer, 50),
            (self.hang_up, 15),
            (self.cancel, 10),
            (self.bad, 15),
            (self.no_http, 5),
            (self.look, 5),
        ]
        while not self.over.is_set():
            with self.lock:
                self.left -= 1
                if self.left < 0:
                    return
            [action] = chance.choices([a for a, _ in actions], [weight for _, weight in actions])
            try:
                action(chance)
            except TimeoutError:
                self.fault(f"stuck: {action.__name__} had no answer in {STUCK_S} s")
            except (OSError, http.client.HTTPException) as error:
                self.fault(f"{action.__name__}: {type(error).__name__}: {error}")
            with self.lock:
                self.done[action.__name__] += 1

    def body(self, chance: random.Random, pop: bool, prompt: str, stream: bool, n: int = N_WRITTEN) -> bytes:
        options = {"cache_prompt": chance.random() < 0.5, "id_slot": chance.choice(KINDS[pop]), "stream": stream}
        return json.dumps({"prompt": prompt, "pop": pop, "n_predict": n, "temperature": 0, **options}).encode()

    def answer(self, chance: random.Random) -> None:
        pop, stream = chance.random() < 0.6, chance.random() < 0.4
        prompt, expected = chance.choice(list(self.answers[pop].items()))
        connection, response = self.post("/completion", self.body(chance, pop, prompt, stream))
        with contextlib.closing(connection):
            raw = response.read().decode()
        if response.status != 200:
            return self.fault(f"status {response.status} for {prompt!r}: {raw[:200]}")
        events = (
            [line.removeprefix("data: ") for line in raw.splitlines() if line.startswith("data: {")]
            if stream
            else [raw]
        )
        text = "".join(json.loads(event)["content"] for event in events)
        if text != expected:
            self.fault(f"pop {pop}, {prompt!r}: {text!r} instead of {expected!r}")

    def hang_up(self, chance: random.Random) -> None:
        """In the middle of an answer."""
        pop = chance.random() < 0.5
        connection, response = self.post(
            "/completion", self.body(chance, pop, chance.choice(list(self.answers[pop])), True, n=400)
        )
        with contextlib.closing(connection):
            response.read(chance.randrange(1, 300))
            response.close()

    def cancel(self, chance: random.Random) -> None:
        """While the prompt is read, or before."""
        pop = chance.random() < 0.5
        body = self.body(chance, pop, f"{chance.choice(OPENINGS[pop])} {' '.join(chance.choices(WORDS, k=400))}", False)
        with socket.create_connection(("127.0.0.1", self.port), timeout=STUCK_S) as client:
            client.sendall(b"POST /completion HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            time.sleep(chance.uniform(0, 0.2))

    def bad(self, chance: random.Random) -> None:
        connection, response = self.post("/completion", chance.choice(BAD))
        with contextlib.closing(connection):
            response.read()
        if response.status not in (400, 500):
            self.fault(f"status {response.status} for a bad request")

    def no_http(self, chance: random.Random) -> None:
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=STUCK_S) as client,
            contextlib.suppress(ConnectionError),
        ):
            client.sendall(chance.randbytes(chance.randrange(1, 2000)))
            client.shutdown(socket.SHUT_WR)
            client.recv(1000)

    def look(self, chance: random.Random) -> None:
        self.get(chance.choice(["/health", "/props", "/slots", "/metrics", "/v1/models"]))

    def idle_within(self, seconds: float) -> bool:
        """Whether nothing is computed or waits any more."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            counts = [
                line.split() for line in self.get("/metrics").splitlines() if line.startswith("llamacpp:requests_")
            ]
            if all(float(count) == 0 for _, count in counts):
                return True
            time.sleep(0.1)
        return False


def reference(model: Path, n_prompts: int, seed: int) -> dict[bool, dict[str, str]]:
    """Greedy answers by whether the prompt is pruned, of prompts whose likeliest tokens are ahead by more than rounding."""
    llm = PopLlama(
        str(model), n_ctx=512, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, flash_attn=False, verbose=False
    )
    chance, answers = random.Random(seed), {True: {}, False: {}}
    for pop, found in answers.items():
        while len(found) < n_prompts:
            prompt = f"{chance.choice(OPENINGS[pop])} {' '.join(chance.choices(WORDS, k=chance.randrange(1, 60)))}"
            llm.reset()
            text = llm.create_completion(prompt, max_tokens=N_WRITTEN, temperature=0, repeat_penalty=1.0, pop=pop)[
                "choices"
            ][0]["text"]
            tokens = llm.tokenize(prompt.encode())
            written = llm.input_ids[
                len(tokens) : llm.n_tokens
            ].tolist()  # without the last one, which a token of any id stands for
            best = np.sort(llm.score(tokens, [*written, 0], pop=pop), axis=1)
            if (best[:, -1] - best[:, -2]).min() > 0.01:
                found[prompt] = text
    llm.close()
    return answers


@contextlib.contextmanager
def serving(model: Path, log: Path):
    """Yields process and port; the process is asked to end, and what it ends with checked by the caller."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "pypop_gguf",
        "serve",
        model,
        "--port",
        port,
        "--threads",
        1,
        "--context",
        4096,
        "--parallel",
        4,
    ]
    command += ["--server-options", "-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    command += ["--cache-ram", 16]
    with log.open("w") as file:
        process = subprocess.Popen([*map(str, command)], stdout=file, stderr=file, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + STUCK_S
        while True:
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield process, port
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def resident_bytes(process: subprocess.Popen) -> int:
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(model: Path, log: Path, minutes: float, n_clients: int, n_requests: int, seed: int, max_growth: float) -> int:
    answers = reference(model, 40, seed)
    with serving(model, log) as (process, port):
        traffic = Traffic(port, answers, n_requests)
        clients = [threading.Thread(target=traffic.client, args=(seed * 1000 + i,)) for i in range(n_clients)]
        traffic.burst(n_clients)
        began, sizes = time.monotonic(), []
        for client in clients:
            client.start()
        while (
            time.monotonic() - began < 60 * minutes
            and not traffic.over.is_set()
            and any(client.is_alive() for client in clients)
        ):
            time.sleep(0.5)
            if process.poll() is not None:
                traffic.fault(f"the server ended with status {process.returncode}")
                break
            sizes.append(resident_bytes(process))
        traffic.over.set()
        for client in clients:
            client.join()
        seconds = time.monotonic() - began
        if process.poll() is None:
            if not traffic.idle_within(30):
                traffic.fault("a request is still there 30 s after the last client has gone")
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            if process.returncode != 0:
                traffic.fault(f"asked to end, the server ended with {process.returncode}")
    # a third is warm-up too; then the medians of the first and of the last tenth of the rest
    sizes = list(filter(None, sizes))  # an ended process has none
    rest = sizes[len(sizes) // 3 :]
    tenth = max(1, len(rest) // 10)
    first, last = (statistics.median(part) for part in (rest[:tenth] or [1], rest[-tenth:] or [1]))
    growth = last / first - 1
    if growth > max_growth:
        traffic.fault(f"memory grew by {growth:.2%}")
    print(
        f"{sum(traffic.done.values())} requests in {seconds / 60:.1f} minutes by {n_clients} clients: {dict(sorted(traffic.done.items()))}"
    )
    print(f"memory {first / 1e6:.1f} MB after the warm-up, {last / 1e6:.1f} MB at the end: {growth:+.2%}")
    for fault in traffic.faults:
        print(f"FAULT {fault}")
    if traffic.faults:
        print(f"the server's last words: {log.read_text(errors='replace')[-4000:]}")
    print(
        "failed"
        if traffic.faults
        else f"passed: {traffic.done['answer']} greedy answers equal to their references, none stuck"
    )
    return 1 if traffic.faults else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--requests", type=int, default=10_000_000, help="at most")
    parser.add_argument("--clients", type=int, default=8, help="at once, on four slots")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--max-growth", type=float, default=0.01, help="of the server's memory after the warm-up, as a share"
    )
    parser.add_argument(
        "--model", type=Path, help="an F32 GGUF with a boundary (default: the bundled model, 8 of 12 layers)"
    )
    a = parser.parse_args()
    bundled = Path(__file__).resolve().parents[1] / "models" / "lab-llama-12l"
    with tempfile.TemporaryDirectory() as directory:
        model = a.model or Path(directory, "model.gguf")
        if not a.model:
            convert = ["convert", bundled, "--outtype", "f32", "--boundary", 8, "--no-importance", "--outfile", model]
            subprocess.run([sys.executable, "-m", "pypop_gguf", *map(str, convert)], check=True, capture_output=True)
        return soak(model, Path(directory, "log.txt"), a.minutes, a.clients, a.requests, a.seed, a.max_growth)


if __name__ == "__main__":
    sys.exit(main())
