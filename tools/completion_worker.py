"""One engine of bench_completion.py or bench_call.py in a process of its own: it answers or completes, and times it.

Its arguments are the mode and the options of the model as JSON. Each line of stdin is a request, and each line of
stdout answers one. The mode "stock" imports the llama_cpp that comes first on the path, so this file imports nothing of
ours before it.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import sys
import time

_PAUSE_S = 0.2  # the threads of what ran before have stopped spinning by then


class Worker:
    """A model. Each public method answers the request of its name."""

    def __init__(self, mode: str, boundary: int, **options) -> None:
        self._mode = mode
        if mode == "stock":
            import llama_cpp

            self._native = None
            if hasattr(llama_cpp.llama_cpp._lib, "llama_pop_set_boundary"):
                raise RuntimeError(f"{llama_cpp.__file__} has POP: give --stock an unpatched one")
            self._llm = llama_cpp.Llama(**options)
        else:
            from pypop_gguf import PopLlama, native

            self._native = native
            complete = "off" if mode == "whole" else mode
            self._llm = PopLlama(pop=mode != "whole", pop_boundary=boundary, pop_complete=complete, **options)

    def answer(self, seed: int, n_prompt: int, n_answer: int) -> dict:
        """Answers a random prompt. ``at_ms`` is when each token of the answer came, counted from the start.

        ``complete_ms`` is the time of completion, during the answer and after it, and ``incomplete`` how many tokens
        were left at the end of the answer.
        """
        prompt = self._begin(seed, n_prompt)
        at_ms, began = [], time.perf_counter()
        for _ in itertools.islice(self._llm.generate(prompt, temp=0), n_answer):
            at_ms.append(1e3 * (time.perf_counter() - began))
        if self._mode not in ("idle", "answer"):
            return {"at_ms": at_ms, "complete_ms": 0.0, "incomplete": 0}
        incomplete = self._native.n_incomplete(self._llm.ctx)
        while self._mode == "idle" and self._llm.timings.completed_tokens < incomplete:
            time.sleep(0.05)
        return {"at_ms": at_ms, "complete_ms": self._llm.timings.complete_ms, "incomplete": incomplete}

    def prefill(self, seed: int, n_prompt: int, chunk: int | None) -> dict:
        """Reads a random prompt, pruned, and completes it in chunks. Without a chunk, all layers read it.

        ``prompt_ms`` is the time until the logits are there, and ``chunks_ms`` that of each chunk.
        """
        prompt = self._begin(seed, n_prompt)
        began = time.perf_counter()
        self._llm.score(prompt, [0], pop=chunk is not None)
        prompt_ms, chunks_ms = 1e3 * (time.perf_counter() - began), []
        while chunk is not None:
            began = time.perf_counter()
            if not self._native.complete(self._llm.ctx, chunk):
                break
            chunks_ms.append(1e3 * (time.perf_counter() - began))
        return {"prompt_ms": prompt_ms, "chunks_ms": chunks_ms}

    def tokens(self, seed: int, n_prompt: int, n_answer: int, chunk: int, joins: bool) -> dict:
        """Reads a random prompt, pruned, and decodes tokens, each with a chunk, until the cache is the whole model's.

        There are ``n_answer`` tokens at most. With ``joins``, a token is one row of its chunk; without, the chunk runs
        before the token. ``tokens_ms`` is the time of each token with its chunk.
        """
        from llama_cpp import llama_cpp

        self._llm.score(self._begin(seed, n_prompt), [0])
        tokens_ms = []
        while self._native.n_incomplete(self._llm.ctx) and len(tokens_ms) < n_answer:
            began = time.perf_counter()
            if joins:
                self._native.complete_with_next(self._llm.ctx, chunk - 1)
            else:
                self._native.complete(self._llm.ctx, chunk)
            self._llm.eval([len(tokens_ms)])
            llama_cpp.llama_synchronize(self._llm.ctx)
            tokens_ms.append(1e3 * (time.perf_counter() - began))
        return {"tokens_ms": tokens_ms}

    def call(self, text: str) -> dict:
        """Answers a text by one token. Of the call, ``before_us`` is the processor time of this thread until the first
        decode and ``after_us`` that after the last one; ``plan_us`` is the engine's time for graphs, 0 if unknown.
        """
        from llama_cpp import llama_cpp

        decode, marks = llama_cpp.llama_decode, []

        def marking(*arguments):
            marks.append(time.thread_time())
            try:
                return decode(*arguments)
            finally:
                marks.append(time.thread_time())

        self._llm.reset()
        llama_cpp.llama_decode = marking
        gc.disable()
        planned_us, began, marks_began = self._plan_us(), time.perf_counter(), time.thread_time()
        self._llm.create_completion(text, max_tokens=1, temperature=0)
        ended, first_ms = time.thread_time(), 1e3 * (time.perf_counter() - began)
        llama_cpp.llama_decode = decode
        return {
            "before_us": 1e6 * (marks[0] - marks_began),
            "after_us": 1e6 * (ended - marks[-1]),
            "plan_us": self._plan_us() - planned_us,
            "first_ms": first_ms,
        }

    def _plan_us(self) -> int:
        return self._native.plan_us(self._llm.ctx) if self._native else 0

    def _begin(self, seed: int, n_prompt: int) -> list[int]:
        """Forgets what is cached, and returns a prompt."""
        self._llm.reset()
        chance = random.Random(seed)
        time.sleep(_PAUSE_S)
        return [chance.randrange(self._llm.n_vocab()) for _ in range(n_prompt)]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    worker = Worker(sys.argv[1], **json.loads(sys.argv[2]))
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(worker, request.pop("request"))(**request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
