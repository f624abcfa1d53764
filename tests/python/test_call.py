"""``Call`` alone, without a model: progress, cancelling, the clock, calls within calls, and the pieces of a prompt."""

import contextlib
import threading
import time

import pytest

from pypop_gguf import Cancelled, Timings
from pypop_gguf.call import Call, pieces, streamed_with_timings


def test_progress_is_reported_only_while_the_prompt_is_read():
    seen = []
    call = Call(4, progress=lambda *at: seen.append(at))
    call.check(0, 10)
    call.begin_prompt(0)
    call.check(5, 10)
    call.end_prompt(10)
    call.check(10, 10)
    assert seen == [(5, 10)]


@pytest.mark.parametrize("answer, stops", [(False, True), (None, False), (0, False), (True, False)])
def test_progress_cancels_only_by_returning_false(answer, stops):
    call = Call(4, progress=lambda done, total: answer)
    call.begin_prompt(0)
    if not stops:
        call.check(3, 7)
        return
    with pytest.raises(Cancelled) as caught:
        call.check(3, 7)
    assert (caught.value.done, caught.value.total, caught.value.lost) == (3, 7, False)


@pytest.mark.parametrize("reading", [True, False])
def test_event_cancels_while_the_prompt_is_read_and_afterwards(reading):
    call = Call(4, cancel=threading.Event())
    if reading:
        call.begin_prompt(0)
    call.check(1, 2)
    call.cancel.set()
    with pytest.raises(Cancelled):
        call.check(1, 2)


def test_call_within_a_call_has_what_it_is_not_given_from_the_outer_one():
    event, other = threading.Event(), threading.Event()
    outer = Call(4, progress=print, cancel=event)
    assert outer.inner() == outer and outer.inner() is not outer
    inner = outer.inner(2, cancel=other)
    assert (inner.boundary, inner.progress, inner.cancel) == (2, print, other)
    assert (outer.boundary, outer.cancel) == (4, event)


def test_prompt_with_images_counts_its_positions_until_the_completion_begins():
    seen = []
    call = Call(4, progress=lambda *at: seen.append(at))
    call.begin_images(n_pruned=100)
    assert not call.prompt_ends_at(8)
    call.image_total, call.image_reused = 30, 12
    call.check(8, 9)
    assert seen == [(8, 30)]
    assert call.prompt_ends_at(30) and not call.prompt_ends_at(29)
    completion = call.inner()
    assert completion.image_total is None and completion.prompt_ends_at(29)
    completion.begin_prompt(n_pruned=117)
    completion.end_prompt(1)
    timings = Timings(prompt_tokens=30)
    completion.time_prompt(timings, n_pruned=117)
    assert (timings.reused_tokens, timings.pruned_tokens) == (12, 17)


def test_clock_starts_with_the_outermost_call():
    call = Call(4)
    call.begin(n_pruned=5)
    began = call.began
    time.sleep(0.002)
    inner = call.inner()
    inner.begin_prompt(n_pruned=9)
    inner.end_prompt(3)
    timings = Timings(prompt_tokens=8)
    inner.time_prompt(timings, n_pruned=11)
    assert inner.began == began and (timings.reused_tokens, timings.pruned_tokens) == (5, 6)
    assert 2 <= timings.prefill_ms <= inner.ms_since_began()


def test_timings_of_a_prompt_that_was_all_cached():
    call = Call(4)
    call.begin_prompt(n_pruned=5)
    timings = Timings(prompt_tokens=8)
    call.time_prompt(timings, n_pruned=5)
    assert (timings.reused_tokens, timings.pruned_tokens) == (8, 0) and 0 <= timings.prefill_ms < 100


@pytest.mark.parametrize(
    "n_tokens, n_ubatch, n_tail, expected",
    [
        (0, 4, 1, []),
        (3, 4, 1, [(0, 3)]),
        (8, 4, 1, [(0, 4), (4, 8)]),
        (9, 4, 1, [(0, 4), (4, 8), (8, 9)]),
        (9, 4, 3, [(0, 4), (4, 6), (6, 9)]),  # the tail stays in one piece
        (9, 4, 6, [(0, 3), (3, 9)]),  # also if it is larger than a micro-batch
        (9, 4, 20, [(0, 9)]),
    ],
)
def test_pieces_of_a_prompt(n_tokens, n_ubatch, n_tail, expected):
    assert list(pieces(n_tokens, n_ubatch, n_tail)) == expected


def test_last_chunk_of_a_stream_has_the_timings_and_each_chunk_is_made_in_the_call():
    running = []

    @contextlib.contextmanager
    def calling():
        running.append(True)
        yield
        running.append(False)

    def chunks():
        for reason in (None, None, "stop"):
            assert running[-1]
            yield {"choices": [{"finish_reason": reason}]}

    found, ended = [], []
    for chunk in streamed_with_timings(chunks(), calling, lambda: {"boundary": 4}, lambda: ended.append(True)):
        assert not running[-1] and not ended
        found.append(chunk.get("timings"))
    assert found == [None, None, {"boundary": 4}] and ended == [True]


def test_stream_that_nobody_reads_ends_when_it_is_gone():
    ended = []
    stream = streamed_with_timings(iter([]), contextlib.nullcontext, dict, lambda: ended.append(True))
    assert not ended
    del stream
    assert ended == [True]
