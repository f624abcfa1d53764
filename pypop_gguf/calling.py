"""The calls of a ``PopLlama``: each waits for its turn, is the running one during its steps, and tells its timings.

``CallingLlama`` is the lower of two layers below ``PopLlama``; ``evaluation`` is the other one. ``turns`` decides whose
turn it is, and ``call`` has what a single call asks for.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pypop_gguf import library, native, opening
from pypop_gguf.call import Call, streamed_with_timings
from pypop_gguf.completion import Completion
from pypop_gguf.errors import PopError
from pypop_gguf.status import PopStatus, Timings
from pypop_gguf.turns import WITHIN, Turns

if TYPE_CHECKING:
    import llama_cpp
else:
    llama_cpp = library.load()


class CallingLlama(llama_cpp.Llama):
    """A ``Llama`` whose calls take turns. ``PopLlama`` gives it its fields.

    Attributes:
        timings: The timings of the call that has read a prompt last.
    """

    timings: Timings
    _pid: int  # the process that has loaded the model
    _turns: Turns
    _running: Call | None
    _status: PopStatus
    _runs_whole: bool  # no prompt can be pruned, whatever a call asks for
    _completion: Completion | None = None  # while it is on
    _completes_answers = False

    def _new_call(self, pop: bool | None = None, boundary: int | str | None = None, progress=None, cancel=None) -> Call:
        """Makes a call, within the running one if there is one: ``create_chat_completion`` calls others."""
        self._check_process()
        opening.check_boundary_type("boundary", boundary)
        if not self._turns.is_mine():
            call = Call(self._status.boundary, progress, cancel)
        elif self._running is None or self._running.in_use:
            raise PopError(WITHIN)
        else:
            call = self._running.inner(progress=progress, cancel=cancel)
        if boundary is not None and pop is not False:
            with self._calling(call):
                call.boundary = opening.checked_boundary(self, boundary)
        if pop is False or self._runs_whole:
            call.boundary = self._status.n_layer
        return call

    @contextlib.contextmanager
    def _calling(self, call: Call) -> Iterator[None]:
        """Makes the one step of a call, which begins and ends in this block."""
        try:
            with self._stepping(call):
                yield
        finally:
            self._end(call)

    @contextlib.contextmanager
    def _stepping(self, call: Call) -> Iterator[None]:
        """Makes a step of a call, and waits until the call may."""
        self._check_process()
        with self._turns.step(call.turn, call.cancel):
            outer, self._running = self._running, call
            native.set_boundary(self.ctx, call.boundary)  # for a chat handler that decodes without eval()
            try:
                yield
            finally:
                self._running = outer

    @contextlib.contextmanager
    def _within_call(self) -> Iterator[None]:
        """Is for methods that calls use, and users as well, who then make a call of their own."""
        if self._turns.is_mine():
            yield
        else:
            with self._calling(self._new_call()):
                yield

    def _end(self, call: Call) -> None:
        if call.outermost:
            self._turns.end(call.turn)

    def _run(self, method: Callable, call: Call, keep_turn: bool = False):
        """Returns the result of a method of the parent, or its stream, with the call's timings.

        Args:
            method: The method.
            call: The call.
            keep_turn: Whether a stream has its turn from now on, and not only from its first chunk on.
        """
        is_stream = False
        try:
            with self._stepping(call):
                result = method()
                is_stream = isinstance(result, Iterator)
                if not is_stream:
                    result["timings"] = self._final_timings()
                    return result
        finally:
            if not (is_stream and keep_turn):
                self._end(call)
        if call.outermost and self._completes_answers:
            result = self._completing_rest(result)
        return streamed_with_timings(result, lambda: self._stepping(call), self._final_timings, lambda: self._end(call))

    def _final_timings(self) -> dict[str, float | int | None]:
        if self._completion is not None:
            self._completion.end_call(self)
        return self.timings.as_dict()

    def _completing_rest(self, chunks: Iterator) -> Iterator:
        """Yields a stream's chunks and, in the step that finds its end, completes what is left."""
        yield from chunks
        assert self._completion is not None
        self._completion.run(self, None)

    def _check_process(self) -> None:
        """Refuses to go on in a fork of the process that loaded the model: it would wait for llama.cpp's threads."""
        if os.getpid() != self._pid:
            raise PopError(
                "this model was loaded before a fork: load it in the child, or start children by spawn "
                "(multiprocessing's)"
            )
