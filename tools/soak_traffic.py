"""Sends the requests of soak.py and judges the answers."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import json
import random
import socket
import threading
import time
from collections.abc import Callable

import httpx

N_WRITTEN = 16
# Slots of pruned and of whole requests. They are kept apart, with openings of their own, because a pruned request may
# reuse what a whole one has left in the cache, and its answer would then differ from the expected one.
SLOTS = {True: (0, 1), False: (2, 3)}
OPENINGS = {
    True: ("Once upon a time there was a", "Every morning the old"),
    False: ("Tim and his sister saw a", "In the garden lived a"),
}
_WORDS = "small big red blue happy sad dog cat bird fish tree ball kite house river stone friend cake hat boat"
WORDS = _WORDS.split()
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
    """Requests of several clients, which share one object of this class; each runs ``client`` in a thread.

    Args:
        client: Asks the server.
        answers: Expected answers by prompt, for pruned prompts under True and for whole ones under False.
        n_requests: How many requests all clients together send at most.
        stuck_s: A request that is not answered for so long is a fault.

    Attributes:
        done: How many requests of each kind were sent.
        faults: One line for each fault. The first fault ends the traffic.
        over: Set when the clients have to end.
    """

    def __init__(
        self, client: httpx.Client, answers: dict[bool, dict[str, str]], n_requests: int, stuck_s: float = 60
    ) -> None:
        self._http, self._answers, self._left, self._stuck_s = client, answers, n_requests, stuck_s
        self._lock = threading.Lock()
        self.done, self.faults, self.over = collections.Counter(), [], threading.Event()

    def fault(self, text: str) -> None:
        with self._lock:
            self.faults.append(text)
        self.over.set()

    def burst(self, n_clients: int) -> None:
        """Sends the largest requests all at once, so that memory that the allocator keeps of them counts as warm-up."""
        longest = [
            self._body(random.Random(0), pop, f"{OPENINGS[pop][0]} {' '.join(WORDS * 20)}", False) for pop in SLOTS
        ]

        def send(body: bytes) -> None:
            self._run("burst", lambda: self._post(body))

        with concurrent.futures.ThreadPoolExecutor(n_clients) as pool:
            for body in [*BAD, *longest]:
                list(pool.map(send, [body] * n_clients))

    def client(self, seed: int) -> None:
        """Sends requests of random kinds until none is left or the traffic is over."""
        chance = random.Random(seed)
        actions = {
            self.answer: 50,
            self.hang_up: 15,
            self.cancel: 10,
            self.bad: 15,
            self.no_http: 5,
            self.look: 5,
        }
        while not self.over.is_set():
            with self._lock:
                self._left -= 1
                if self._left < 0:
                    return
            [action] = chance.choices(list(actions), list(actions.values()))
            self._run(action.__name__, functools.partial(action, chance))
            with self._lock:
                self.done[action.__name__] += 1

    def _run(self, name: str, action: Callable[[], object]) -> None:
        """Runs an action, and makes a fault of a request that has no answer or loses its connection."""
        try:
            action()
        except (TimeoutError, httpx.TimeoutException):
            self.fault(f"stuck: {name} had no answer in {self._stuck_s} s")
        except (OSError, httpx.TransportError) as error:
            self.fault(f"{name}: {type(error).__name__}: {error}")

    def answer(self, chance: random.Random) -> None:
        """Asks for a greedy answer, streamed or in one piece, and compares it with the expected one."""
        pop, stream = chance.random() < 0.6, chance.random() < 0.4
        prompt, expected = chance.choice(list(self._answers[pop].items()))
        response = self._post(self._body(chance, pop, prompt, stream))
        if response.status_code != 200:
            return self.fault(f"status {response.status_code} for {prompt!r}: {response.text[:200]}")
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
        text = "".join(json.loads(event)["content"] for event in (lines if stream else [response.text]))
        if text != expected:
            self.fault(f"pop {pop}, {prompt!r}: {text!r} instead of {expected!r}")

    def hang_up(self, chance: random.Random) -> None:
        """Ends the connection in the middle of a streamed answer."""
        pop = chance.random() < 0.5
        body = self._body(chance, pop, chance.choice(list(self._answers[pop])), True, n_predict=400)
        with self._http.stream("POST", "/completion", content=body, timeout=self._stuck_s) as response:
            next(response.iter_raw(chance.randrange(1, 300)), None)

    def cancel(self, chance: random.Random) -> None:
        """Ends the connection while the prompt is read, or before."""
        pop = chance.random() < 0.5
        body = self._body(
            chance, pop, f"{chance.choice(OPENINGS[pop])} {' '.join(chance.choices(WORDS, k=400))}", False
        )
        with self._connect() as connection:
            connection.sendall(b"POST /completion HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            time.sleep(chance.uniform(0, 0.2))

    def bad(self, chance: random.Random) -> None:
        """Sends a request that has to be refused."""
        status = self._post(chance.choice(BAD)).status_code
        if status not in (400, 500):
            self.fault(f"status {status} for a bad request")

    def no_http(self, chance: random.Random) -> None:
        """Sends bytes that are no HTTP."""
        with self._connect() as connection, contextlib.suppress(ConnectionError):
            connection.sendall(chance.randbytes(chance.randrange(1, 2000)))
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1000)

    def look(self, chance: random.Random) -> None:
        """Reads one of the pages about the server's state."""
        path = chance.choice(["/health", "/props", "/slots", "/metrics", "/v1/models"])
        self._http.get(path, timeout=self._stuck_s)

    def _connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._http.base_url.port), timeout=self._stuck_s)

    def _post(self, body: bytes) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        return self._http.post("/completion", content=body, headers=headers, timeout=self._stuck_s)

    @staticmethod
    def _body(chance: random.Random, pop: bool, prompt: str, stream: bool, n_predict: int = N_WRITTEN) -> bytes:
        options = {"cache_prompt": chance.random() < 0.5, "id_slot": chance.choice(SLOTS[pop]), "stream": stream}
        body = {"prompt": prompt, "pop": pop, "n_predict": n_predict, "temperature": 0, **options}
        return json.dumps(body).encode()
