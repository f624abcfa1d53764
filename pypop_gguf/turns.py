"""The turns of the calls of one ``PopLlama``: a context can serve only one call at a time.

A call has its turn from its first step to its end. A result takes one step; a stream takes one for each chunk, and
keeps its turn while the caller looks at a chunk. A call from another thread waits. A call from the thread that the
stream belongs to would wait for itself, so it is refused.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from pypop_gguf.errors import PopError
from pypop_gguf.status import Cancelled

WITHIN = "this model is in the middle of a call: a function that the call has called cannot begin another one"

_POLL_S = 0.1  # a call that waits looks at its cancel event this often


class Turns:
    """Decides which call may use a context."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._turn: object | None = None  # whose turn it is
        self._thread: int | None = None  # the thread that is in a step
        self._last_thread: int | None = None  # the thread that made the last step

    def is_mine(self) -> bool:
        """Returns whether this thread is in a step."""
        return self._thread == threading.get_ident()

    @contextlib.contextmanager
    def step(self, turn: object, cancel: threading.Event | None = None) -> Iterator[None]:
        """Waits until ``turn`` may make a step, and makes it. A step of the same turn may lie within.

        Args:
            turn: Stands for the call.
            cancel: Ends the waiting once it is set.

        Raises:
            Cancelled: ``cancel`` was set.
            PopError: This thread would wait for a stream of its own, or for the call that it is in.
        """
        if self.is_mine():
            if self._turn is not turn:
                raise PopError(WITHIN)
            yield
            return
        with self._changed:
            while self._thread is not None or self._turn not in (None, turn):
                if self._thread is None and self._last_thread == threading.get_ident():
                    raise PopError(
                        "another stream of this model is open: read it to its end, or close() it, before the next call"
                    )
                self._wait(cancel)
            self._turn, self._thread, self._last_thread = turn, threading.get_ident(), threading.get_ident()
        try:
            yield
        finally:
            self._leave()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Waits until no other thread is in a step, and keeps the others waiting. The turns stay as they are."""
        if self.is_mine():
            yield
            return
        with self._changed:
            while self._thread is not None:
                self._changed.wait()
            self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._leave()

    def end(self, turn: object) -> None:
        """Ends a turn, unless it has ended already."""
        with self._changed:
            if self._turn is turn:
                self._turn = None
                self._changed.notify_all()

    def _leave(self) -> None:
        with self._changed:
            self._thread = None
            self._changed.notify_all()

    def _wait(self, cancel: threading.Event | None) -> None:
        if cancel is None:
            self._changed.wait()
            return
        if cancel.is_set():
            raise Cancelled(0, 0)
        self._changed.wait(_POLL_S)
