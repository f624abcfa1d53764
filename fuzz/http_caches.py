"""Sessions of requests that share cached tokens, for http_requests.py: each is answered as if it were alone.

A case is a session with one server. Its prompts have beginnings, ends and answers in common. They mix chunks that may
move (``n_cache_reuse``), slots that are chosen, saved, restored and erased, LoRA adapters of a request and of the
server, an adapter that tokens in the prompt activate, and ``pop``. Some requests are sent at the same time.

The answer to a request with ``"pop": false`` has to be the one that another server gives with an empty cache. A request
that prunes may also use tokens that an earlier request has read with every layer, so its answer may instead be the one
that the other server gives after those earlier requests alone. Where ``n_cache_reuse`` has moved tokens, the answer is
an approximation by design, and only what later requests make of these tokens is checked.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

from fuzz.harness import Failure
from tests.support.lora import write_lora
from tests.support.server import Server, serve

_N_SLOTS = 3
_OPTIONS = ("--threads", 1, "--context", 512 * _N_SLOTS, "--server-options")
# With one thread, F32 caches and no flash attention, batches of different shapes differ by rounding alone.
_EXACT = ("-ctk", "f32", "-ctv", "f32", "-fa", "off")
_ROUNDING = 2e-3  # of log-probabilities
_INVOCATION = [700, 701]  # tokens that activate the last adapter
_ADAPTERS: list[dict[int, float]] = [{}, {}, {}, {0: 1.0}, {0: 1.0}, {1: 1.0}, {0: 0.5, 1: 1.0}, {2: 1.0}]
_ACTIVATED = 2
_BY_CHANCE = 2  # tokens at the beginning that prompts of two sessions may have in common


@dataclass
class Asked:
    """A request of a session, its answer, and the requests before it that its answer depends on."""

    prompt: list[int]
    pop: bool
    adapters: dict[int, float]
    moves: int
    n_predict: int
    cached: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    history: list[Asked] = field(default_factory=list)

    def send(self, server: Server, **options: object) -> dict:
        body = dict(n_predict=self.n_predict, n_probs=5, return_tokens=True, n_cache_reuse=self.moves, pop=self.pop)
        return server.complete(self.prompt, **{**body, "lora": listed(self.adapters), **options})

    def has_answer(self, answer: dict) -> bool:
        """Returns whether the log-probabilities are equal up to the first token where a tie was broken otherwise."""
        tokens, logprobs = read_answer(answer)
        for mine, other, own, given in zip(self.tokens, tokens, self.logprobs, logprobs):
            if any(abs(a - b) > _ROUNDING for a, b in zip(own, given)):
                return False
            if mine != other:
                return own[0] - own[1] <= _ROUNDING
        return len(tokens) == len(self.tokens)


def read_answer(answer: dict) -> tuple[list[int], list[list[float]]]:
    rows = answer.get("completion_probabilities", [])  # an answer that ends at once has none
    return [row["id"] for row in rows], [[one["logprob"] for one in row["top_logprobs"]] for row in rows]


def listed(adapters: dict[int, float]) -> list[dict]:
    return [{"id": index, "scale": scale} for index, scale in adapters.items()]


class Servers:
    """The server under test, and one with one slot and no prompt cache that is emptied before each request."""

    def __init__(self, model: Path, directory: Path) -> None:
        self._open = contextlib.ExitStack()
        invocations: list[list[int]] = [[], [], _INVOCATION]
        loras: list[object] = ["--lora-init-without-apply"]
        for i, invocation in enumerate(invocations):
            loras += ["--lora", write_lora(directory / f"{i}.gguf", model, i, 0.3, invocation)]
        slots = ("--parallel", _N_SLOTS, *_OPTIONS, *_EXACT, *loras, "--slot-save-path", directory)
        alone = ("--parallel", 1, "--threads", 1, "--context", 512, "--server-options", *_EXACT, *loras)
        self.tested = self._open.enter_context(serve(model, directory / "tested.txt", *slots))
        self.alone = self._open.enter_context(serve(model, directory / "alone.txt", *alone, "--cache-ram", 0))

    def close(self) -> None:
        self._open.close()


class Session:
    def __init__(self, chance: random.Random, servers: Servers) -> None:
        self._chance, self._servers = chance, servers
        self._asked: list[Asked] = []
        self._saved: list[str] = []
        self._pieces = [self._tokens(chance.randint(3, 70)) for _ in range(4)]
        self._scales: dict[int, float] = {}  # of the server
        self.outcomes: set[str] = set()

    def _tokens(self, n: int) -> list[int]:
        """Returns tokens that other sessions hardly have at the same places."""
        return [self._chance.randrange(1000, 4000) for _ in range(n)]

    def run(self) -> None:
        self._set_scales({})
        for _ in range(self._chance.randint(4, 9)):
            kind = self._chance.random()
            if kind < 0.2:
                self._act()
            elif kind < 0.25:
                self._set_scales(self._chance.choice(_ADAPTERS))
            else:
                self._ask([self._request() for _ in range(1 if kind < 0.85 else 3)])
        self._set_scales({})

    def _set_scales(self, scales: dict[int, float]) -> None:
        self._scales = scales
        self._servers.tested.client.post("/lora-adapters", json=listed(scales)).raise_for_status()

    def _act(self) -> None:
        action = self._chance.choice(["save", "restore", "restore", "erase"])
        slot = self._chance.randrange(_N_SLOTS)
        file = f"{len(self._saved)}.bin"
        if action == "restore":
            if not self._saved:
                return
            file = self._chance.choice(self._saved)
        elif action == "save":
            self._saved.append(file)
        self._servers.tested.post(f"/slots/{slot}?action={action}", filename=file)

    def _request(self) -> tuple[Asked, dict]:
        """Returns a request whose prompt begins as an earlier prompt or answer, and what is sent with it."""
        chance = self._chance
        prompt = list(chance.choice(self._pieces))
        if self._asked and chance.random() < 0.85:
            before = chance.choice(self._asked[-4:])
            text = before.prompt + before.tokens
            prompt = text[: chance.choice([len(text), len(before.prompt), chance.randint(1, len(text))])]
        if chance.random() < 0.7:
            prompt = prompt + (_INVOCATION if chance.random() < 0.3 else []) + chance.choice(self._pieces)
        if self._asked and chance.random() < 0.25:  # leaves out a part, so that the rest may move
            cut = sorted(chance.randint(1, len(prompt)) for _ in range(2))
            prompt = prompt[: cut[0]] + prompt[cut[1] :]
        options: dict[str, object] = {
            "cache_prompt": chance.random() < 0.9,
            "id_slot": chance.randint(-1, _N_SLOTS - 1),
        }
        adapters = self._scales
        if chance.random() < 0.6:
            adapters = chance.choice(_ADAPTERS)
            options["lora"] = listed(adapters)
        moves = chance.choice([0, 0, 0, 1, 4])
        return Asked(prompt[-400:], chance.random() < 0.5, adapters, moves, chance.randint(1, 5)), options

    def _ask(self, requests: list[tuple[Asked, dict]]) -> None:
        def send(request: tuple[Asked, dict]) -> dict:
            asked, options = request
            body = dict(n_predict=asked.n_predict, n_probs=5, n_cache_reuse=asked.moves, pop=asked.pop)
            return self._servers.tested.complete(asked.prompt, **body, **options)

        with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
            answers = list(pool.map(send, requests))
        for (asked, _), answer in zip(requests, answers):
            asked.cached = answer["timings"]["cache_n"]
            asked.tokens, asked.logprobs = read_answer(answer)
        waiting = [asked for asked, _ in requests]
        while waiting:  # requests that are sent together may depend on one another, in any order
            explained = next(filter(self._explain, waiting), None) or next(filter(self._may_have_moved, waiting), None)
            if explained is None:
                raise Failure(f"another answer than alone, {waiting[0].cached} tokens cached: {waiting[0]}")
            waiting.remove(explained)
            self._asked.append(explained)

    def _explain(self, asked: Asked) -> bool:
        """Returns whether an answer is the one from an empty cache or, where it may be, the one after its history."""
        if asked.has_answer(asked.send(self._servers.alone, cache_prompt=False)):
            self.outcomes.add("cached and as alone" if asked.cached else "alone")
            return True
        if asked.pop and asked.cached:
            for before in reversed(self._asked):
                if self._may_share(asked, before) and self._follows(asked, [*before.history, before]):
                    asked.history = [*before.history, before]
                    self.outcomes.add("as after its history")
                    return True
            # Another session may have begun with the same few tokens and read them whole.
            if asked.cached <= _BY_CHANCE:
                whole = replace(asked, prompt=[*asked.prompt[: asked.cached], 999], pop=False, n_predict=1)
                return self._follows(asked, [whole])
        return False

    def _may_have_moved(self, asked: Asked) -> bool:
        if asked.pop and asked.moves and asked.cached:
            self.outcomes.add("moved")
            return True
        return False

    def _may_share(self, asked: Asked, before: Asked) -> bool:
        activated = {_ACTIVATED} & (asked.adapters.keys() | before.adapters.keys())
        text = before.prompt + before.tokens
        n_same = next(
            (i for i, (a, b) in enumerate(zip(text, asked.prompt)) if a != b), min(len(text), len(asked.prompt))
        )
        return (asked.adapters == before.adapters or bool(activated)) and (asked.moves > 0 or n_same >= asked.cached)

    def _follows(self, asked: Asked, history: list[Asked]) -> bool:
        for i, before in enumerate(history):
            before.send(self._servers.alone, cache_prompt=i > 0)
        return asked.has_answer(asked.send(self._servers.alone))


def case(chance: random.Random, servers: Servers) -> str:
    """Runs a session and returns the most telling outcome of its requests."""
    session = Session(chance, servers)
    session.run()
    return next(
        (name for name in ("as after its history", "moved", "cached and as alone") if name in session.outcomes), "alone"
    )
