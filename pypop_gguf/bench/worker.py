"""One engine of ``pop-gguf bench`` in a process of its own: it reads JSON requests from stdin and answers on stdout.

It runs as a script, so that it also works with an unpatched llama-cpp-python. Stock llama.cpp and our library go
through the same calls of llama.h's bindings; only the boundary is set in addition. Nothing but llama_decode is timed.
"""

from __future__ import annotations

import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent handles Ctrl-C and ends this process.

import ctypes
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from pypop_gguf.memory import peak_bytes
from pypop_gguf.rpc import use_servers

_PAUSE_S = 0.02  # Threads of the engine that ran before this one spin for some milliseconds after their last pass.
_FLASH_ATTN_TYPES = {"auto": -1, "off": 0, "on": 1}  # LLAMA_FLASH_ATTN_TYPE_AUTO, _DISABLED, _ENABLED
_CACHE_TYPES = {"F16": 1, "Q8_0": 8}  # GGML_TYPE_F16, GGML_TYPE_Q8_0
_ACCELERATOR_DEVICES = (1, 2)  # GGML_BACKEND_DEVICE_TYPE_GPU, _IGPU


class Worker:
    """A model and one context at a time. Each public method answers the request of its name."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.native: Any = None  # pypop_gguf.native if this is our engine
        self.ctx: Any = None
        self.n_vocab = self.n_parallel = 0
        self.tokens: list[list[int]] = []  # the prompt of each sequence

    def load(
        self,
        model: str,
        ours: bool,
        n_threads: int,
        n_ubatch: int,
        flash_attn: str,
        cache_type: str = "F16",
        rpc: Sequence[str] = (),
    ) -> dict:
        """Loads the model, on these RPC servers if there are any, and keeps the settings for ``context``.

        Returns:
            ``version`` of llama-cpp-python, ``patched``, ``model`` (llama.cpp's line about it), ``devices``.
        """
        if ours:
            from pypop_gguf import library, native

            self.native, self.llama = native, library.load()
        else:
            import llama_cpp

            self.llama = llama_cpp
        self.n_threads, self.n_ubatch, self.flash_attn, self.cache_type = n_threads, n_ubatch, flash_attn, cache_type
        self._log = self.llama.llama_log_callback(self._keep_error)
        self.llama.llama_log_set(self._log, ctypes.c_void_p(0))
        self.llama.llama_backend_init()
        if rpc:
            use_servers(rpc)
        self.model = self.llama.llama_model_load_from_file(os.fsencode(model), self.llama.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {model}: {self._reason()}")
        text = ctypes.create_string_buffer(256)
        self.llama.llama_model_desc(self.model, text, len(text))
        return {
            "version": self.llama.__version__,
            "patched": hasattr(self.llama.llama_cpp._lib, "llama_pop_set_boundary"),
            "model": text.value.decode(),
            "devices": self._devices(),
        }

    def context(self, n_prompt: int, n_decode: int, n_parallel: int, unified: bool) -> dict:
        """Makes a context that holds the case and no more. A prompt is read by a single llama_decode.

        Args:
            n_prompt: Tokens of each sequence's prompt.
            n_decode: Tokens generated after the prompt.
            n_parallel: Number of sequences.
            unified: Whether all sequences share one cache, as in a server.
        """
        if self.ctx:
            self.llama.llama_free(self.ctx)
        per_sequence = -(-(n_prompt + n_decode) // 256) * 256
        parameters = self.llama.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = n_parallel * per_sequence
        parameters.n_ubatch = self.n_ubatch
        parameters.n_seq_max = n_parallel
        parameters.kv_unified = unified
        parameters.n_threads = parameters.n_threads_batch = self.n_threads
        parameters.flash_attn_type = _FLASH_ATTN_TYPES[self.flash_attn]
        parameters.type_k = parameters.type_v = _CACHE_TYPES[self.cache_type]
        self.ctx = self.llama.llama_init_from_model(self.model, parameters)
        if not self.ctx:
            raise RuntimeError(f"llama.cpp cannot make a context of {parameters.n_ctx} tokens: {self._reason()}")
        if self.native:  # POP is off at first; the head and the tail are those of the file
            self.native.open_context(self.ctx, None, boundary=self.native.OFF)
        vocabulary = self.llama.llama_model_get_vocab(self.model)
        seeded = random.Random(0)
        n_vocab = self.llama.llama_vocab_n_tokens(vocabulary)
        self.n_vocab, self.n_parallel = n_vocab, n_parallel
        self.tokens = [[seeded.randrange(n_vocab) for _ in range(n_prompt + n_decode)] for _ in range(n_parallel)]
        return {}

    def boundary(self, boundary: int) -> dict:
        """Sets the boundary. ``continues`` is whether tokens that ask for logits continue from it there."""
        self.native.set_boundary(self.ctx, boundary)
        return {"continues": self.native.continues(self.ctx)}

    def prefill(self, n_prompt: int, boundary: int | None, continues: bool = True) -> dict:
        """Reads the prompt of every sequence into an empty cache.

        Args:
            n_prompt: Tokens of each sequence.
            boundary: Boundary of our engine. None leaves the context as it is; at its start, POP is off.
            continues: Whether tokens that ask for logits continue from the boundary, where they can.

        Returns:
            ``ttft_ms``: time until the logits after every prompt are there; ``pruned``: tokens that were pruned;
            ``plan_ms``: time spent on building and planning graphs, None for stock; ``logits_sha256``: hash of the last
            sequence's logits.
        """
        self._begin(boundary, continues)
        pruned_before, plan_ms_before = self._counters()
        time.sleep(_PAUSE_S)
        ttft_ms = self._decode(n_prompt)
        pruned, plan_ms = self._counters()
        row = np.ctypeslib.as_array(self.llama.llama_get_logits_ith(self.ctx, -1), shape=(self.n_vocab,))
        if not np.isfinite(row).all():
            raise RuntimeError("the logits are not finite: timings of this model would mean nothing")
        return {
            "ttft_ms": ttft_ms,
            "pruned": pruned - pruned_before,
            "plan_ms": plan_ms - plan_ms_before if self.native else None,
            "logits_sha256": hashlib.sha256(row.tobytes()).hexdigest(),
        }

    def decode(self, n: int) -> dict:
        """Decodes ``n`` steps of one token a sequence after the prefill. ``ms_per_token`` is the mean of a step."""
        return {"ms_per_token": sum(self._decode(1) for _ in range(n)) / n}

    def mixed(self, n_prompt: int, boundary: int | None, continues: bool = True) -> dict:
        """Lets one half of the sequences read their prompts, one after the other, while the other half writes.

        The writers' prompts are in the cache. A step is one llama_decode with a token of each writer, and as much of
        the prompts as fits into the micro-batch.

        Returns:
            ``ms``: time until all prompts are read; ``steps``: number of steps; ``pruned``: tokens that were pruned.
        """
        self._begin(boundary, continues)
        writers, readers = range(self.n_parallel // 2), range(self.n_parallel // 2, self.n_parallel)
        self._run([(self.tokens[s][i], i, s, i == n_prompt - 1) for s in writers for i in range(n_prompt)])
        to_read = [(self.tokens[s][i], i, s, i == n_prompt - 1) for s in readers for i in range(n_prompt)]
        pruned, _ = self._counters()
        time.sleep(_PAUSE_S)
        ms, steps, chunk = 0.0, 0, self.n_ubatch - len(writers)
        for first in range(0, len(to_read), chunk):
            position = n_prompt + steps
            writes = [(self.tokens[s][position], position, s, True) for s in writers]
            ms += self._run(writes + to_read[first : first + chunk])
            steps += 1
        return {"ms": ms, "steps": steps, "pruned": self._counters()[0] - pruned}

    def flops(self, micro_batches: list[dict[str, int]]) -> dict:
        """Counts the operations of these micro-batches in all; each has the arguments of ``graph_flops``."""
        return {"flops": sum(self.native.graph_flops(self.ctx, **micro_batch) for micro_batch in micro_batches)}

    def memory(self) -> dict:
        """Reads ``peak_bytes``, the most memory that this process has held, mapped model pages included."""
        return {"peak_bytes": peak_bytes()}

    def _begin(self, boundary: int | None, continues: bool) -> None:
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.ctx), True)
        if boundary is not None:
            self.native.set_boundary(self.ctx, boundary)
            self.native.set_continuation(self.ctx, continues)
        self.n_past = 0

    def _counters(self) -> tuple[int, float]:
        """Returns the tokens that were pruned and the milliseconds spent on graphs since the context was made."""
        return (self.native.n_pruned(self.ctx), self.native.plan_us(self.ctx) / 1e3) if self.native else (0, 0.0)

    def _decode(self, n_tokens: int) -> float:
        """Decodes the next ``n_tokens`` of every sequence, with logits for the last of each. Returns milliseconds."""
        last = self.n_past + n_tokens - 1
        entries = [
            (tokens[i], i, s, i == last) for s, tokens in enumerate(self.tokens) for i in range(self.n_past, last + 1)
        ]
        self.n_past += n_tokens
        return self._run(entries)

    def _run(self, entries: list[tuple[int, int, int, bool]]) -> float:
        """Calls llama_decode for a batch of (token, position, sequence, asks for logits). Returns milliseconds."""
        batch = self.llama.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, asks) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, asks
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        started = time.perf_counter_ns()
        status = self.llama.llama_decode(self.ctx, batch)
        self.llama.llama_synchronize(self.ctx)
        elapsed = time.perf_counter_ns() - started
        self.llama.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode of {len(entries)} tokens failed with {status}: {self._reason()}")
        return elapsed / 1e6

    def _keep_error(self, level: int, text: bytes, _user_data) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            self.errors.append(text.decode("utf-8", "replace").strip())

    def _reason(self) -> str:
        return self.errors[0].split(": ", 1)[-1] if self.errors else "no reason given"

    def _devices(self) -> list[str]:
        """Returns the names of the graphics devices that llama.cpp computes on."""
        ggml = (
            self.llama.llama_cpp._lib
        )  # It also has the symbols of the libraries that it is linked with, except on Windows.
        try:
            ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
            ggml.ggml_backend_dev_get.argtypes, ggml.ggml_backend_dev_get.restype = [ctypes.c_size_t], ctypes.c_void_p
            ggml.ggml_backend_dev_type.argtypes = ggml.ggml_backend_dev_description.argtypes = [ctypes.c_void_p]
            ggml.ggml_backend_dev_description.restype = ctypes.c_char_p
        except AttributeError:
            return []
        found = map(ggml.ggml_backend_dev_get, range(ggml.ggml_backend_dev_count()))
        return [
            ggml.ggml_backend_dev_description(device).decode()
            for device in found
            if ggml.ggml_backend_dev_type(device) in _ACCELERATOR_DEVICES
        ]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # A library's own prints must not get between the answers.
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("request"))(**request)
        except Exception as error:  # The parent reports every failure.
            answer = {"error": str(error) or type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
