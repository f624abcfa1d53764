"""The turns of the calls of one ``PopLlama``: a context can serve only one call at a time.

A call has its turn from its first step to its end. A result takes one step; a stream takes one for each chunk, and
keeps its turn while the caller looks at a chunk. A call from another thread waits. A call from the thread that the
stream belongs to would wait for itself, so it is refused. Idle work is no call: it runs while nobody has a turn, and a
call that comes meanwhile interrupts it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from pypop_gguf.errors import PopError
from pypop_gguf.status import Cancelled

WITHIN = "this model is in the middle of a call: a function that the call has called cannot begin another one"

_POLL_S = 0.1  # a call that waits looks at its cancel event this often
_REST_S = 0.05  # idle work waits this long after a call, because the next one often comes at once


class Turns:
    """Decides which call may use a context."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._turn: object | None = None  # whose turn it is
        self._thread: int | None = None  # the thread that is in a step
        self._last_thread: int | None = None  # the thread that made the last step
        self._interrupt: Callable[[], None] | None = None  # interrupts the idle work that runs, unless it was called
        self._n_waiting = 0  # calls that wait for their turn, which come before idle work
        self._may_have_work = False  # a call has used the context since idle work has begun for the last time
        self._rests_until = 0.0  # idle work does not begin before this time
        self._no_idle_work = False  # for ever

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
            self._leave_call()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Waits until no other thread is in a step, and keeps the others waiting. The turns stay as they are."""
        if self.is_mine():
            yield
            return
        with self._changed:
            while self._thread is not None:
                self._wait()
            self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._leave_call()

    def end(self, turn: object) -> None:
        """Ends a turn, unless it has ended already."""
        with self._changed:
            if self._turn is turn:
                self._turn = None
                self._changed.notify_all()

    def wait_until_idle(self, work_is_left: bool) -> bool:
        """Waits until idle work may begin.

        Args:
            work_is_left: Whether there is work although no call has used the context since it began the last time.

        Returns:
            False once ``end_idle_work`` was called.
        """
        with self._changed:
            while not self._no_idle_work:
                rest_s = self._rests_until - time.monotonic()
                if not self._is_free() or not (work_is_left or self._may_have_work):
                    self._changed.wait()
                elif rest_s > 0:
                    self._changed.wait(rest_s)
                elif self._n_waiting > 0:
                    self._changed.wait(_REST_S)  # and look again: a call that is cancelled now notifies nobody
                else:
                    self._may_have_work = False
                    return True
            return False

    @contextlib.contextmanager
    def idle_step(self, interrupt: Callable[[], None]) -> Iterator[bool]:
        """Makes a step of idle work, unless a call has come first; yields whether the work may run.

        Args:
            interrupt: Called once if a call comes, from its thread and perhaps when the work is already done, but not
                after this block.
        """
        with self._changed:
            may_run = self._is_free() and self._n_waiting == 0 and not self._no_idle_work
            if may_run:
                self._thread, self._interrupt = threading.get_ident(), interrupt
            else:
                self._may_have_work = True  # The call may be cancelled before it has used the context.
        try:
            yield may_run
        finally:
            if may_run:
                self._leave_idle_step()

    def end_idle_work(self) -> None:
        """Lets no more idle work begin, and interrupts what runs."""
        with self._changed:
            self._no_idle_work = True
            self._interrupt_idle_work()
            self._changed.notify_all()

    def _is_free(self) -> bool:
        return self._thread is None and self._turn is None

    def _leave_call(self) -> None:
        with self._changed:
            self._thread, self._may_have_work, self._rests_until = None, True, time.monotonic() + _REST_S
            if self._is_free() or self._n_waiting:  # The idle thread woken for each token would delay the next one.
                self._changed.notify_all()

    def _leave_idle_step(self) -> None:
        with self._changed:
            self._thread = self._interrupt = None
            self._changed.notify_all()

    def _interrupt_idle_work(self) -> None:
        if self._interrupt is not None:
            self._interrupt()
            self._interrupt = None

    def _wait(self, cancel: threading.Event | None = None) -> None:
        self._interrupt_idle_work()
        if cancel is not None and cancel.is_set():
            raise Cancelled(0, 0)
        self._n_waiting += 1
        try:
            self._changed.wait(None if cancel is None else _POLL_S)
        finally:
            self._n_waiting -= 1
