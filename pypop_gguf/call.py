"""The call that a ``PopLlama`` is running: what was asked for, and how far the reading of its prompt has come.

A ``Call`` knows no model. ``llama.py`` makes one for each call and tells it what happens.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from pypop_gguf.status import Cancelled, Timings


@dataclass
class Call:
    """One call of a method that reads a prompt.

    Attributes:
        boundary: Boundary that the prompt is read with.
        progress: The caller's function of (tokens read, tokens of the prompt); it cancels the call by returning False.
        cancel: The caller's event, which cancels the call once it is set.
        began: Time when the call began, in seconds of ``time.perf_counter()``; None before that.
        pruned_before: Number of tokens that the context had pruned until then.
        reading_prompt: Whether ``generate()`` is reading the prompt.
        n_read: Prompt tokens that ``generate()`` has read and not found in the cache.
        read_at: Time when it had read them, in seconds of ``time.perf_counter()``.
        image_total: Positions of a prompt that a chat handler for images is reading piece by piece, 0 until it is cut
            into pieces; None in all other calls.
        image_reused: Number of them that were found in the cache; None if the prompt has no images.
        in_use: Whether the model computes, or a function of the caller has been called meanwhile.
        tokens: The prompt that ``generate()`` has read last, and then the tokens that it has generated.
        outermost: Whether no other call has made this one.
        turn: Stands for the outermost call and all those within it.
    """

    boundary: int
    progress: Callable[[int, int], bool | None] | None = None
    cancel: threading.Event | None = None
    began: float | None = None
    pruned_before: int = 0
    reading_prompt: bool = False
    n_read: int = 0
    read_at: float = 0.0
    image_total: int | None = None
    image_reused: int | None = None
    in_use: bool = False
    tokens: list[int] = dataclasses.field(default_factory=list, compare=False)
    outermost: bool = dataclasses.field(default=True, compare=False)
    turn: object = dataclasses.field(default_factory=object, compare=False)

    def inner(
        self,
        boundary: int | None = None,
        progress: Callable[[int, int], bool | None] | None = None,
        cancel: threading.Event | None = None,
    ) -> Call:
        """Returns a call within this one, such as the completion within a chat. None takes the value of this call."""
        return dataclasses.replace(
            self,
            boundary=self.boundary if boundary is None else boundary,
            progress=progress or self.progress,
            cancel=cancel or self.cancel,
            image_total=None,
            outermost=False,
        )

    def begin(self, n_pruned: int) -> None:
        """Starts the clock, unless an outer call has started it already."""
        if self.began is None:
            self.began, self.pruned_before = time.perf_counter(), n_pruned

    def begin_images(self, n_pruned: int) -> None:
        """Starts the clock of a call whose prompt a chat handler reads piece by piece."""
        self.begin(n_pruned)
        self.image_total = self.image_reused = 0

    def begin_prompt(self, n_pruned: int) -> None:
        """Notes that ``generate()`` begins to read. If the whole prompt is cached, ``end_prompt()`` is never called."""
        self.begin(n_pruned)
        self.reading_prompt, self.n_read, self.read_at = True, 0, time.perf_counter()

    def end_prompt(self, n_read: int) -> None:
        """Notes that ``generate()`` has read the prompt, or the part of it that was not cached."""
        self.reading_prompt, self.n_read, self.read_at = False, n_read, time.perf_counter()

    def prompt_ends_at(self, n_tokens: int) -> bool:
        """Returns whether a piece of text that ends at this position is the last of the prompt."""
        return self.image_total is None or self.image_total == n_tokens

    def check(self, done: int, total: int) -> None:
        """Reports progress and heeds a cancel; called between micro-batches and between tokens.

        Args:
            done: Prompt tokens that are in the cache.
            total: Tokens of the prompt, as far as the caller of this method knows.

        Raises:
            Cancelled: The caller wants no more.
        """
        if self.image_total is not None:
            total = self.image_total
        reading = self.reading_prompt or self.image_total is not None
        stopped = reading and self.progress is not None and self._reports(done, total) is False
        if stopped or (self.cancel is not None and self.cancel.is_set()):
            raise Cancelled(done, total)

    def _reports(self, done: int, total: int) -> bool | None:
        assert self.progress is not None
        before, self.in_use = self.in_use, True
        try:
            return self.progress(done, total)
        finally:
            self.in_use = before

    def time_prompt(self, timings: Timings, n_pruned: int) -> None:
        """Writes what the prompt took into the call's timings."""
        assert self.began is not None
        timings.reused_tokens = (
            timings.prompt_tokens - self.n_read
            if self.image_reused is None
            else min(self.image_reused, timings.prompt_tokens - 1)
        )
        timings.pruned_tokens = n_pruned - self.pruned_before
        timings.prefill_ms = 1e3 * (self.read_at - self.began)

    def ms_since_began(self) -> float:
        """Returns the milliseconds since the call began."""
        assert self.began is not None
        return 1e3 * (time.perf_counter() - self.began)


def streamed_with_timings(
    chunks: Iterator,
    stepping: Callable[[], AbstractContextManager],
    timings: Callable[[], dict],
    end: Callable[[], None],
) -> Iterator:
    """Adds timings to the last chunk of a call's stream.

    Args:
        chunks: The stream.
        stepping: Makes a context in which the call is the running one, for each chunk anew.
        timings: Gives the timings of the call; called in the step of its last chunk.
        end: Called when the stream has ended, was closed, or is gone, even if no chunk was ever read.
    """

    def streamed():
        try:
            yield
            while True:
                with stepping():
                    try:
                        chunk = next(chunks)
                    except StopIteration:
                        return
                    if any(choice["finish_reason"] for choice in chunk["choices"]):
                        chunk["timings"] = timings()
                yield chunk
        finally:
            end()

    stream = streamed()
    next(stream)  # a generator that has not begun would not call end()
    return stream


def pieces(n_tokens: int, n_ubatch: int, n_tail: int) -> Iterator[tuple[int, int]]:
    """Cuts the tokens of a prompt into micro-batches, between which a call can be stopped.

    Yields:
        Start and end of each. The tail stays in one piece, together with the token that asks for logits.
    """
    starts = list(range(0, n_tokens, max(n_ubatch, n_tail)))
    if len(starts) > 1 and n_tokens - starts[-1] < n_tail:
        starts[-1] = n_tokens - n_tail
    yield from zip(starts, [*starts[1:], n_tokens])
