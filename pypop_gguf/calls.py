"""What a single call takes beyond llama-cpp-python's arguments: its boundary, its progress, its cancelling; and images.

``Calls`` is the layer between ``llama_cpp.Llama`` and ``PopLlama``, which knows the boundary where a call gives none and what is cached.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
import time
from collections.abc import Callable, Iterator

from pypop_gguf import arguments, library, native
from pypop_gguf.errors import PopError
from pypop_gguf.status import Cancelled
from pypop_gguf.vision import Reader

llama_cpp = library.load()


class Calls(llama_cpp.Llama):
    """The methods of ``PopLlama`` that people call to have text written, and what the running call has asked for."""

    # Of the call that is running; None outside calls.
    _requested: int | None = None  # its boundary
    _progress: Callable[[int, int], bool | None] | None = None
    _cancel: threading.Event | None = None
    _reader: Reader | None = None  # while a chat handler reads a prompt with images
    _call_began: tuple[float, int, int] | None = None  # time, tokens pruned before, tokens reused by the reader

    def _check_process(self) -> None:
        """
        Raises:
            PopError: The process is a child of the one that loaded the model; llama.cpp's threads are not in it, and would be waited for.
        """
        if os.getpid() != self._pid:
            raise PopError(
                "this model was loaded before a fork: load it in the child, or start children by spawn (multiprocessing's)"
            )

    def embed(self, *args, **kwargs):
        """``llama_cpp.Llama.embed``."""
        self._check_process()
        return super().embed(*args, **kwargs)

    def _boundary_for(self, pop: bool | None, boundary: int | str | None) -> int:
        arguments.check_boundary_type("boundary", boundary)
        if pop is False:
            return self._status.n_layer
        if boundary is not None:
            return arguments.resolve_boundary(self, boundary)
        return self._asked_boundary()  # a chat handler calls create_completion inside create_chat_completion

    @contextlib.contextmanager
    def _calling(self, boundary: int, progress=None, cancel=None):
        self._check_process()
        outer = self._requested, self._progress, self._cancel
        # a chat handler calls create_completion inside create_chat_completion
        self._requested, self._progress, self._cancel = boundary, progress or self._progress, cancel or self._cancel
        native.set_boundary(self._ctx.ctx, boundary)  # images are read before any eval()
        try:
            yield
        finally:
            self._requested, self._progress, self._cancel = outer

    def _call(self, method, args: tuple, kwargs: dict, *, pop, boundary, progress, cancel):
        requested = self._boundary_for(pop, boundary)
        with self._calling(requested, progress, cancel):
            result = method(*args, **kwargs)
        if not isinstance(result, Iterator):
            result["timings"] = self.timings.as_dict()
            return result

        def streamed():
            while True:
                with self._calling(requested, progress, cancel):
                    try:
                        chunk = next(result)
                    except StopIteration:
                        return
                if any(choice["finish_reason"] for choice in chunk["choices"]):
                    chunk["timings"] = self.timings.as_dict()
                yield chunk

        return streamed()

    def create_completion(
        self,
        *args,
        pop: bool | None = None,
        boundary: int | str | None = None,
        progress: Callable[[int, int], bool | None] | None = None,
        cancel: threading.Event | None = None,
        **kwargs,
    ):
        """``llama_cpp.Llama.create_completion`` with more arguments, and ``timings`` in the result and the last streamed chunk.

        Args:
            pop: False reads this prompt by every layer.
            boundary: The boundary of this call, 1..L or ``"lossless"``; default: the object's.
            progress: Called as ``progress(done, total)``, prompt tokens, before each micro-batch of the prompt and after the
                last; returning False cancels.
            cancel: Once set, from any thread, the call stops before the next micro-batch or token.

        Raises:
            Cancelled: By one of the two. What was read stays in the cache, for the next call to go on from.
            PopError: The model cannot be pruned there.
            ValueError: ``logprobs`` where the object was not opened for them, or with ``echo`` and only a draft model.
        """
        self._end_reading()
        if self._logits_all and not self._logits_everywhere:
            given = inspect.signature(super().create_completion).bind(*args, **kwargs).arguments
            if given.get("echo") and given.get("logprobs") is not None:
                raise ValueError(
                    "logprobs of an echoed prompt need logits_all=True: with a draft model alone a prompt asks for no logits"
                )
        ours = dict(pop=pop, boundary=boundary, progress=progress, cancel=cancel)
        return self._call(super().create_completion, args, kwargs, **ours)

    def __call__(self, *args, **kwargs):
        """Same as :meth:`create_completion`."""
        return self.create_completion(*args, **kwargs)

    def create_chat_completion(
        self,
        *args,
        pop: bool | None = None,
        boundary: int | str | None = None,
        progress: Callable[[int, int], bool | None] | None = None,
        cancel: threading.Event | None = None,
        **kwargs,
    ):
        """``llama_cpp.Llama.create_chat_completion`` with ``pop``, ``boundary``, ``progress`` and ``cancel`` as in
        :meth:`create_completion`."""
        ours = dict(pop=pop, boundary=boundary, progress=progress, cancel=cancel)
        if not hasattr(self.chat_handler, "_mtmd_cpp"):
            return self._call(super().create_chat_completion, args, kwargs, **ours)
        requested = self._boundary_for(pop, boundary)
        self._begin_reading(requested)
        try:
            return self._call(super().create_chat_completion, args, kwargs, **ours)
        except BaseException:
            self._end_reading()
            self._call_began = None  # no generate() will come that belongs to it
            raise

    # Images: a chat handler reads them with llama.cpp itself, between calls of eval()

    def _begin_reading(self, boundary: int) -> None:
        self._forget_shallower_than(boundary)
        self._reader = Reader(self, self.chat_handler._mtmd_cpp)
        self._call_began = time.perf_counter(), native.n_pruned(self._ctx.ctx), 0
        self.chat_handler._mtmd_cpp = self._reader
        if not (self._is_recurrent or self._is_hybrid):  # those cannot drop what follows a common begin
            self._ctx.kv_cache_clear = lambda: None

    def _end_reading(self) -> None:
        if self._reader is not None:
            began, pruned, _ = self._call_began
            self._call_began = began, pruned, self._reader.reused
            self.chat_handler._mtmd_cpp = self._reader._mtmd_cpp
            self._ctx.__dict__.pop("kv_cache_clear", None)
            self._reader = None

    def reset(self) -> None:
        """``llama_cpp.Llama.reset``."""
        if self._reader is not None and not (self._is_recurrent or self._is_hybrid):
            self._reader.rewind()
        else:
            super().reset()

    def _go_on(self, done: int, total: int) -> None:
        """Between micro-batches and tokens.

        Raises:
            Cancelled: The caller wants no more.
        """
        if self._reader is not None:
            total = self._reader.total
        reading = self._reading_prompt or self._reader is not None
        stopped = reading and self._progress is not None and self._progress(done, total) is False
        if stopped or (self._cancel is not None and self._cancel.is_set()):
            raise Cancelled(done, total)
