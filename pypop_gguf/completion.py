"""Completion: when the layers that a pruned prompt has skipped run for it after all.

The engine keeps the states that it needs for that (``llama_pop_set_completion``). ``PopLlama`` runs chunks between the
tokens of an answer or when it is asked to. With ``pop_complete="idle"`` a thread runs them while no call uses the
engine.
"""

from __future__ import annotations

import functools
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from pypop_gguf import native, parent
from pypop_gguf.cache_record import CacheRecord
from pypop_gguf.errors import PopError, notice
from pypop_gguf.turns import Turns

MODES = ("off", "call", "idle", "answer")

_CHUNK = 64  # tokens of a chunk: larger ones are hardly cheaper
_FIRST_CHUNK = 16  # tokens, while nothing is known about times
_SMALLEST_CHUNK, _LARGEST_CHUNK = 8, 256
_STEPS = 4.0  # decode steps that a chunk before a token may take


def check_arguments(mode: Any, chunk: Any, states: Any) -> None:
    """Checks the arguments of ``PopLlama`` that are about completion.

    Raises:
        PopError: One of them has no meaning.
    """
    if mode not in MODES:
        raise PopError(f"pop_complete is {mode!r}: choose one of {', '.join(map(repr, MODES))}")
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise PopError(f"pop_complete_chunk is {chunk!r}: give a number of tokens, 1 or more")
    if states not in native.STATES or states == "off":
        names = [name for name in native.STATES if name != "off"]
        raise PopError(f"pop_complete_states is {states!r}: choose one of {', '.join(map(repr, names))}")


class Pace:
    """Chooses how many tokens are completed before the next token of an answer.

    Args:
        chunk: The number that the user has asked for. None takes as many as a few decode steps take time.
    """

    def __init__(self, chunk: int | None) -> None:
        self._chunk = chunk
        self._step_ms: float | None = None
        self._token_ms: float | None = None

    def count_step(self, ms: float) -> None:
        """Counts a decode step without completion."""
        self._step_ms = _smoothed(self._step_ms, ms)

    def knows_steps(self) -> bool:
        """Returns whether a decode step without completion was counted."""
        return self._step_ms is not None

    def ms_beyond_step(self, ms: float) -> float:
        """Returns what a chunk has added to a decode step that took so long with it."""
        assert self._step_ms is not None
        return max(ms - self._step_ms, 0.05 * ms)

    def count_chunk(self, n_tokens: int, ms: float) -> None:
        """Counts a chunk."""
        self._token_ms = _smoothed(self._token_ms, ms / n_tokens)

    def next_chunk(self) -> int:
        """Returns the number of tokens of the next chunk."""
        if self._chunk is not None:
            return self._chunk
        if self._step_ms is None or self._token_ms is None:
            return _FIRST_CHUNK
        return min(max(round(_STEPS * self._step_ms / self._token_ms), _SMALLEST_CHUNK), _LARGEST_CHUNK)


def _smoothed(before: float | None, now: float) -> float:
    return now if before is None else 0.75 * before + 0.25 * now


def _in_a_thread(function: Callable[[], int]) -> int:
    """Runs a function in a thread of its own, which has ended when this returns.

    OpenMP keeps a team of threads for each thread that computes. While all teams together outnumber the processor's
    cores, their threads sleep where they would spin, which makes each token of an answer slower by a fourth and more. A
    thread that has ended has no team.
    """
    result: Future[int] = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:  # the caller raises it
            result.set_exception(error)

    thread = threading.Thread(target=run, name="pop-complete-chunk", daemon=True)
    thread.start()
    thread.join()
    return result.result()


class Completion:
    """Completes the cache of one ``PopLlama``. The model comes as an argument, so that it is not kept alive.

    Args:
        llm: The model, whose context is empty.
        turns: Decides when the thread may use the context.
        record: The boundaries of its cached positions.
        mode: One of ``MODES`` but ``"off"``.
        chunk: Tokens that are completed before a token of an answer; None chooses by time.
        states: Type of the states that the engine keeps.

    Raises:
        PopError: This model's cache cannot be completed, at least not at the boundary in force.
    """

    def __init__(self, llm: Any, turns: Turns, record: CacheRecord, mode: str, chunk: int | None, states: str) -> None:
        native.set_completion(llm.ctx, states)
        if not native.completes(llm.ctx):
            raise PopError(
                f"what is pruned at boundary {native.get_boundary(llm.ctx)} of this model cannot be completed: leave "
                "completion off"
            )
        self._turns, self._record, self._mode = turns, record, mode
        self._pace = Pace(chunk)
        self._said_lost = False
        self._joins = True  # a token of this answer may join a chunk
        self._asked_at: int | None = None  # tokens completed before the chunk that the next token is to join
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        if mode == "idle":
            self._thread = threading.Thread(
                target=self._run_while_idle, args=(weakref.ref(llm),), name="pop-complete", daemon=True
            )
            self._thread.start()
            weakref.finalize(llm, self.close)  # also when the interpreter ends, before it freezes the thread

    def close(self) -> None:
        """Ends the thread, if there is one, and waits until it uses the context no more."""
        if self._thread is None or os.getpid() != self._pid:
            return  # a fork has no thread, and its locks may be held for ever
        self._turns.end_idle_work()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def run(self, llm: Any, max_tokens: int | None, progress=None, cancel: threading.Event | None = None) -> int:
        """Does what ``PopLlama.complete_cache`` says."""
        native.complete(llm.ctx, 0)  # takes the interrupt of a chunk of the thread that had ended by then
        left = native.n_incomplete(llm.ctx)
        total = left if max_tokens is None else min(left, max_tokens)
        done = 0
        while done < total and not (cancel is not None and cancel.is_set()):
            before, left = left, self._run_chunk(llm, min(_CHUNK, total - done))
            if left >= before:
                break  # what is left cannot be completed any more
            done += before - left
            if progress is not None and progress(done, total) is False:
                break
        return left

    def before_token(self, llm: Any) -> int:
        """Runs a chunk before the next token of an answer, or lets that token join it; returns how many are left.

        Together they read the weights of the upper layers once. ``after_token`` has to follow.
        """
        n = self._pace.next_chunk()
        self._asked_at = None
        self._joins = self._joins or llm.timings.generated_tokens == 1
        if not (self._joins and self._pace.knows_steps()):
            return self._run_chunk(llm, n)
        parent.drop_cache_from(llm, llm.n_tokens)  # what the next eval() drops anyway
        left = native.n_incomplete(llm.ctx)
        if left:
            self._asked_at = native.n_completed(llm.ctx)
            native.complete_with_next(llm.ctx, max(n - 1, 1))
        return left

    def after_token(self, llm: Any, ms: float) -> None:
        """Counts the decode step of a token, which took so long, and the chunk that the token has joined."""
        if self._asked_at is None:
            self._pace.count_step(ms)
            return
        done = native.n_completed(llm.ctx) - self._asked_at
        self._asked_at = None
        self._joins = done > 0  # the drafts of another model and image features cannot join
        if done:
            self._count(llm, done, self._pace.ms_beyond_step(ms))

    def end_call(self, llm: Any) -> None:
        """Writes into a call's timings how many cached tokens are not the whole model's."""
        llm.timings.incomplete_tokens = native.n_incomplete(llm.ctx) + self._n_lost(llm)

    def begin_save(self, llm: Any) -> None:
        """Prepares the cache, or at least its record, for a state that is about to be saved."""
        if self._mode != "call":
            self.run(llm, None)
        self._record.complete(native.first_incomplete(llm.ctx), llm.n_tokens)

    def end_load(self, llm: Any, n_layer: int) -> None:
        """Tells the engine which tokens of a loaded state are not the whole model's. It has no states of them."""
        native.set_lost(llm.ctx, self._record.usable(llm.n_tokens, n_layer))

    def _run_chunk(self, llm: Any, n_max: int) -> int:
        """Completes up to ``n_max`` tokens and returns how many are left."""
        parent.drop_cache_from(llm, llm.n_tokens)  # what the next eval() drops anyway
        began = time.perf_counter()
        done = native.complete(llm.ctx, n_max)
        if done:
            self._count(llm, done, 1e3 * (time.perf_counter() - began))
        self._n_lost(llm)
        return native.n_incomplete(llm.ctx)

    def _count(self, llm: Any, done: int, ms: float) -> None:
        """Counts a chunk, whose tokens are the whole model's now."""
        llm.timings.count_completed(done, ms)
        self._pace.count_chunk(done, ms)
        self._record.complete(native.first_incomplete(llm.ctx), llm.n_tokens)

    def _n_lost(self, llm: Any) -> int:
        """Returns how many tokens can never be completed, and says it once."""
        n_lost = native.n_lost(llm.ctx)
        if n_lost and not self._said_lost:
            self._said_lost = True
            notice(
                f"{n_lost} cached tokens cannot be completed: their sliding window has moved on (swa_full=True keeps "
                "it), an image stands behind pruned text, or a state was saved incomplete"
            )
        return n_lost

    def _run_while_idle(self, reference: weakref.ref) -> None:
        left = 0
        while self._turns.wait_until_idle(work_is_left=left > 0):
            llm = reference()
            if llm is None:
                return
            with self._turns.idle_step(functools.partial(native.stop, llm.ctx)) as may_run:
                try:
                    left = _in_a_thread(functools.partial(self._run_chunk, llm, _CHUNK)) if may_run else 0
                except PopError as error:
                    notice(f"what is cached stays incomplete: {error}")
                    return
            del llm  # only now: if this was the last reference, the model closes, which needs a step of its own
