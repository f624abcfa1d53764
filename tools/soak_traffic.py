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
        complete: The server's ``--complete``.

    Attributes:
        done: How many requests of each kind were sent.
        faults: One line for each fault. The first fault ends the traffic.
        n_reused: How many tokens whole requests have found in the cache after everything was completed.
        over: Set when the clients have to end.
    """

    def __init__(
        self,
        client: httpx.Client,
        answers: dict[bool, dict[str, str]],
        n_requests: int,
        stuck_s: float = 60,
        complete: str = "off",
    ) -> None:
        self._http, self._answers, self._left, self._stuck_s = client, answers, n_requests, stuck_s
        self._complete = complete
        self._twice = sorted(answers[True].keys() & answers[False].keys())
        self._lock, self._others_wait, self.n_reused = threading.Lock(), threading.Lock(), 0
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
            self.answer_again: 20 if self._twice else 0,
        }
        while not self.over.is_set():
            with self._lock:
                self._left -= 1
                if self._left < 0:
                    return
            with self._others_wait:
                pass
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
        except Exception as error:  # an answer that makes no sense may raise anything
            self.fault(f"{name}: {type(error).__name__}: {error}")

    def answer(self, chance: random.Random) -> None:
        """Asks for a greedy answer, streamed or in one piece, and compares it with the expected one."""
        pop = chance.random() < 0.6
        self._compare(chance, pop, chance.choice(list(self._answers[pop])), chance.random() < 0.4)

    def answer_again(self, chance: random.Random) -> None:
        """Asks for a pruned answer, and then for the whole model's to the same prompt in the same slot.

        Half of the time, the server first completes all that is cached, while the other clients wait.
        """
        prompt, slot = chance.choice(self._twice), chance.choice(SLOTS[True])
        self._compare(chance, True, prompt, False, id_slot=slot)
        if chance.random() < 0.5:
            self._compare(chance, False, prompt, False, id_slot=slot)
            return
        with self._others_wait:
            deadline = time.monotonic() + self._stuck_s
            while self.is_busy():
                if time.monotonic() > deadline:
                    raise TimeoutError
                time.sleep(0.02)
            last = self._compare(chance, False, prompt, False, id_slot=slot, cache_prompt=True)
            self.n_reused += last.get("timings", {}).get("cache_n", 0)

    def is_busy(self) -> bool:
        """Returns whether the server computes a request or has something to complete."""
        slots = self._http.get("/slots", timeout=self._stuck_s).raise_for_status().json()
        return any(slot["is_processing"] or slot["n_incomplete"] for slot in slots)

    def _compare(self, chance: random.Random, pop: bool, prompt: str, stream: bool, **options: object) -> dict:
        """Asks for an answer, compares it with the expected one, and returns its last event."""
        response = self._post(self._body(chance, pop, prompt, stream, **options))
        if response.status_code != 200:
            self.fault(f"status {response.status_code} for {prompt!r}: {response.text[:200]}")
            return {}
        lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
        events = [json.loads(event) for event in (lines if stream else [response.text])]
        text, expected = "".join(event["content"] for event in events), self._answers[pop][prompt]
        if not (text.startswith(expected) if pop and self._complete == "answer" else text == expected):
            self.fault(f"pop {pop}, {prompt!r}: {text!r} instead of {expected!r}")
        return events[-1]

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
        self._http.get(path, timeout=self._stuck_s).raise_for_status()

    def _connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._http.base_url.port), timeout=self._stuck_s)

    def _post(self, body: bytes) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        return self._http.post("/completion", content=body, headers=headers, timeout=self._stuck_s)

    def _body(
        self, chance: random.Random, pop: bool, prompt: str, stream: bool, n_predict: int = N_WRITTEN, **others: object
    ) -> bytes:
        # A pruned request that reused what is completed would not get the answer of a pruned prompt.
        cache_prompt = chance.random() < 0.5 and not (pop and self._complete != "off")
        options = {"cache_prompt": cache_prompt, "id_slot": chance.choice(SLOTS[pop]), "stream": stream, **others}
        body = {"prompt": prompt, "pop": pop, "n_predict": n_predict, "temperature": 0, **options}
        return json.dumps(body).encode()
