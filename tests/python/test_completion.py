"""``PopLlama`` with ``pop_complete``: what was pruned is completed in calls, between them or during an answer."""

import gc
import itertools
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from pypop_gguf import Cancelled, PopError, PopLlama, native
from pypop_gguf.cache_record import CacheRecord
from pypop_gguf.cli import main
from pypop_gguf.completion import Pace
from tests.support.pop_reference import squared_error

from llama_cpp.llama_speculative import LlamaPromptLookupDecoding  # isort: skip - pypop_gguf provides it

TEXT = "Once upon a time, there was a little girl named Lily. She had a red ball and a small dog. " * 8
OPTIONS = dict(
    n_ctx=512, n_batch=64, n_ubatch=32, pop_boundary=4, n_threads=1, n_threads_batch=1, type_k=0, type_v=0,
    verbose=False,
)  # fmt: skip
CALL = dict(max_tokens=12, temperature=0)
N_LAYER = 12


@pytest.fixture
def quantized(tmp_path) -> str:
    """A tiny random model, whose products our kernels compute."""
    path = str(tmp_path / "tiny.gguf")
    assert main(["random-model", "tiny", path, "--outtype", "q8_0"]) == 0
    return path


@pytest.fixture
def opened(bundled_gguf):
    """Opens the bundled model in a mode."""
    models = []

    def open_model(mode="call", **options):
        models.append(PopLlama(str(bundled_gguf), **{"pop_complete": mode, **OPTIONS, **options}))
        return models[-1]

    yield open_model
    for llm in models:
        llm.close()


def complete(llm, prompt=TEXT, **options):
    return llm.create_completion(prompt, **{**CALL, **options})


def text_of(result) -> str:
    return result["choices"][0]["text"]


def next_logits(llm) -> np.ndarray:
    llm.eval([100])
    return llm._logits_of(1)[0]


def wait_until_complete(llm, seconds=60) -> None:
    """Waits until the thread has completed what the last call has left. Meanwhile only it may use the context."""
    end = time.monotonic() + seconds
    while llm.timings.completed_tokens < llm.timings.incomplete_tokens:
        assert time.monotonic() < end, "the thread completes nothing"
        time.sleep(0.01)


# In a call


def test_a_completed_cache_is_the_whole_models(opened):
    llm, whole = opened(), opened("off", pop=False)
    tokens = llm.tokenize(TEXT.encode())
    llm.eval(tokens)
    whole.eval(tokens)
    before = squared_error(llm._logits_of(1)[0], whole._logits_of(1)[0])
    assert llm.complete_cache() == 0
    assert squared_error(next_logits(llm), next_logits(whole)) <= 1e-9 < before


def test_the_first_positions_are_completed_first_and_their_number_is_returned(opened):
    llm = opened()
    complete(llm)
    n = llm.timings.incomplete_tokens
    assert n == llm.n_tokens > 100
    assert llm.complete_cache(40) == n - 40
    assert llm._record.usable(llm.n_tokens, N_LAYER) == 40
    calls = []
    assert llm.complete_cache(progress=lambda *at: calls.append(at)) == 0
    assert calls[0] == (64, n - 40) and calls[-1] == (n - 40, n - 40)
    assert llm._record.usable(llm.n_tokens, N_LAYER) == llm.n_tokens
    assert llm.timings.completed_tokens == n and llm.timings.complete_ms > 0
    assert llm.complete_cache() == 0


def test_completing_ends_where_progress_or_cancel_says(opened):
    llm = opened()
    complete(llm)
    n = llm.n_tokens
    assert llm.complete_cache(progress=lambda done, total: False) == n - 64
    cancel = threading.Event()
    cancel.set()
    assert llm.complete_cache(cancel=cancel) == n - 64


def test_a_function_that_reports_progress_cannot_begin_a_call(opened):
    llm = opened()
    complete(llm)

    def call_again(_done, _total):
        with pytest.raises(PopError, match=r"^this model is in the middle of a call"):
            complete(llm)

    assert llm.complete_cache(progress=call_again) == 0


def test_completing_takes_its_turn_beside_a_stream(opened):
    llm = opened()
    stream = complete(llm, stream=True)
    next(stream)
    with pytest.raises(PopError, match=r"^another stream of this model is open"):
        llm.complete_cache()
    cancel = threading.Event()
    errors = []

    def work():
        try:
            llm.complete_cache(cancel=cancel)
        except Cancelled as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    cancel.set()
    thread.join(60)
    assert len(errors) == 1 and native.n_incomplete(llm.ctx) > 100
    list(stream)
    assert llm.complete_cache() == 0


def test_a_whole_call_reuses_what_was_completed(opened):
    llm, whole = opened(), opened("off", pop=False)
    prompt = llm.tokenize(TEXT.encode())
    complete(llm, prompt)
    llm.complete_cache()
    question = [*prompt, *llm.tokenize(b" Then", add_bos=False)]
    answer = complete(llm, question, pop=False)
    assert answer["timings"]["cache_n"] == len(prompt)
    assert text_of(answer) == text_of(complete(whole, question))


def test_a_whole_call_reads_generated_tokens_again_that_saw_pruned_ones(opened):
    """Every layer has run for them, but their keys and values are not the whole model's."""
    llm = opened()
    prompt = llm.tokenize(TEXT.encode())
    complete(llm, prompt)
    answer = llm.input_ids[len(prompt) : llm.n_tokens].tolist()
    llm.complete_cache(len(prompt))
    result = complete(llm, [*prompt, *answer, 100], pop=False)
    assert result["timings"]["cache_n"] == len(prompt)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the kernels are for x86")
def test_without_our_kernels_completion_leaves_them_out_too(quantized):
    """Both prompts are read without them, so only the graphs of completion can make a difference."""
    logits = []
    for kernels in (False, True, False):
        llm = PopLlama(quantized, **{**OPTIONS, "pop_boundary": 1}, pop_complete="call", pop_kernels=False)
        llm.eval(range(260, 360))
        native.set_kernels(llm.ctx, kernels)
        assert llm.complete_cache() == 0
        native.set_kernels(llm.ctx, False)
        logits.append(next_logits(llm))
        llm.close()
    assert np.array_equal(logits[0], logits[2]) and not np.array_equal(logits[0], logits[1])


def test_off_has_nothing_to_complete_and_says_how_to_get_it(opened):
    llm = opened("off")
    assert complete(llm)["timings"]["incomplete_n"] is None
    with pytest.raises(PopError, match=r'^open the model with pop_complete="call"'):
        llm.complete_cache()
    with pytest.raises(PopError, match=r"^completion is off"):
        native.complete(llm.ctx, 1)


# While an answer is given


@pytest.mark.parametrize("chunk", [16, None])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_completes_its_prompt(opened, chunk, stream):
    llm = opened("answer", pop_complete_chunk=chunk)
    result = complete(llm, max_tokens=40, stream=stream)
    timings = list(result)[-1]["timings"] if stream else result["timings"]
    assert timings["pruned_n"] > 100
    if chunk == 16:
        n = timings["prompt_n"]
        assert timings["completed_n"] >= n and timings["incomplete_n"] == 0
    assert timings["completed_n"] > 0 and timings["complete_ms"] > 0


@pytest.mark.parametrize("chunk", [32, 512])
def test_an_answer_is_the_whole_models_once_its_prompt_is_completed(opened, chunk):
    llm, whole = opened("answer", pop_complete_chunk=chunk), opened("off", pop=False)
    prompt = llm.tokenize(TEXT.encode())
    tokens = list(itertools.islice(llm.generate(prompt, temp=0), 10))
    whole.eval([*prompt, *tokens[:-1]])
    pruned = opened("off")
    pruned.eval(prompt)
    pruned.eval(tokens[:-1])
    expected = whole._logits_of(1)[0]
    error = squared_error(llm._logits_of(1)[0], expected)
    # The weights are F16, so one token rounds in another way than many.
    assert error <= 1e-5 < 1e-2 * squared_error(pruned._logits_of(1)[0], expected)


@pytest.mark.parametrize("drafted", [False, True])
def test_tokens_join_chunks_unless_several_are_decoded_at_once(opened, monkeypatch, drafted):
    llm = opened("answer", pop_complete_chunk=16, draft_model=LlamaPromptLookupDecoding() if drafted else None)
    done = []
    complete_with_next = native.complete_with_next

    def ask(ctx, n_max):
        done.append(native.n_completed(ctx))
        complete_with_next(ctx, n_max)

    monkeypatch.setattr(native, "complete_with_next", ask)
    timings = complete(llm, max_tokens=60)["timings"]
    assert timings["completed_n"] >= timings["prompt_n"] and timings["incomplete_n"] == 0
    if drafted:
        assert len(done) >= 1
    else:
        assert len(done) > 5 and set(np.diff(done)) == {15}


def test_a_stream_completes_the_rest_after_its_last_chunk(opened):
    llm = opened("answer", pop_complete_chunk=1)
    stream = complete(llm, max_tokens=3, stream=True)
    for chunk in stream:
        if chunk["choices"][0]["finish_reason"]:
            break
    assert chunk["timings"]["incomplete_n"] > 100
    assert list(stream) == []
    assert native.n_incomplete(llm.ctx) == 0


def test_chunks_take_the_time_of_some_decode_steps():
    pace = Pace(None)
    assert pace.next_chunk() == 16
    pace.count_step(10.0)
    pace.count_chunk(16, 16.0)
    assert pace.next_chunk() == 40
    pace.count_step(1e6)
    assert pace.next_chunk() == 256
    assert Pace(5).next_chunk() == 5


# While no call uses the engine


def test_a_thread_completes_between_calls_and_answers_stay_whole(opened):
    llm, whole = opened("idle"), opened("off", pop=False)
    prompt = llm.tokenize(TEXT.encode())
    complete(llm, prompt)
    wait_until_complete(llm)
    question = [*prompt, *llm.tokenize(b" Then", add_bos=False)]
    answer = complete(llm, question, pop=False)
    assert answer["timings"]["cache_n"] == len(prompt)
    assert text_of(answer) == text_of(complete(whole, question))


@pytest.mark.skipif(
    not os.path.isdir("/proc/self/task"), reason="the threads of a process are counted in Linux's /proc"
)
def test_the_completing_thread_leaves_no_other_threads_behind(opened):
    """A team of OpenMP's that stays makes the team of the calls sleep between the parts of a graph."""
    llm = opened("idle", n_threads=2, n_threads_batch=2)
    complete(llm, pop=False)
    before = len(os.listdir("/proc/self/task"))
    complete(llm, "Another text. " + TEXT)
    wait_until_complete(llm)
    end = time.monotonic() + 60
    while len(os.listdir("/proc/self/task")) > before:
        assert time.monotonic() < end, "threads of the completing thread stay"
        time.sleep(0.01)


def test_calls_of_many_threads_and_the_completing_thread_take_turns(opened):
    """Prompts with pop=False do not depend on what the thread has completed, so their texts stay the same."""
    llm, whole = opened("idle"), opened("off", pop=False)
    texts = [TEXT[i * 7 :] for i in range(4)]
    expected = [text_of(complete(whole, text)) for text in texts]
    failures = []

    def work(text, answer):
        for i in range(3):
            complete(llm, text)
            time.sleep(0.06 * (i % 2))
            if text_of(complete(llm, text, pop=False)) != answer:
                failures.append(text)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(texts, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_thread_leaves_the_cache_of_an_open_stream_as_it_is(opened):
    """Otherwise the answer would depend on how fast the stream is read."""
    llm = opened("idle")
    expected = text_of(complete(llm))
    llm.reset()
    stream = complete(llm, stream=True)
    text = text_of(next(stream))
    time.sleep(0.3)
    assert native.n_incomplete(llm.ctx) > 100
    assert text + "".join(map(text_of, stream)) == expected
    wait_until_complete(llm)


def test_the_thread_ends_with_the_model(bundled_gguf):
    def alive() -> int:
        return sum(thread.name == "pop-complete" for thread in threading.enumerate())

    before = alive()
    llm = PopLlama(str(bundled_gguf), pop_complete="idle", **OPTIONS)
    complete(llm)
    assert alive() == before + 1
    llm.close()
    assert alive() == before
    llm = PopLlama(str(bundled_gguf), pop_complete="idle", **OPTIONS)
    complete(llm)
    del llm
    gc.collect()
    end = time.monotonic() + 60
    while alive() > before and time.monotonic() < end:  # It may be in the middle of a chunk.
        time.sleep(0.01)
    assert alive() == before


def test_the_interpreter_ends_while_the_thread_works(bundled_gguf):
    code = f"""
from pypop_gguf import PopLlama
import time
llm = PopLlama({str(bundled_gguf)!r}, pop_complete="idle", **{OPTIONS!r})
llm.create_completion({TEXT!r}, **{CALL!r})
time.sleep(0.06)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def call_in_child(llm) -> None:
    try:
        complete(llm)
    except PopError:
        os._exit(3)
    os._exit(1)


def test_a_fork_refuses_and_does_not_wait_for_the_thread(opened):
    llm = opened("idle")
    complete(llm)
    child = multiprocessing.get_context("fork").Process(target=call_in_child, args=(llm,))
    child.start()
    child.join(30)
    assert child.exitcode == 3


# States


def test_a_saved_state_is_completed_first_in_the_modes_that_complete_by_themselves(opened):
    for mode, whole in (("call", False), ("answer", True), ("idle", True)):
        llm = opened(mode)
        complete(llm, max_tokens=2)
        state = llm.save_state()
        assert (state.pop_computed_with == N_LAYER).all() == whole
        other = opened("call")
        other.load_state(state)
        assert native.n_lost(other.ctx) == (0 if whole else state.n_tokens)


def test_a_state_that_was_saved_incomplete_stays_so_and_that_is_said_once(opened, capfd):
    writer, llm = opened("off"), opened("call")
    complete(writer)
    llm.load_state(writer.save_state())
    capfd.readouterr()
    assert llm.complete_cache() == 0
    for _ in range(2):
        timings = complete(llm, max_tokens=2)["timings"]
        assert timings["incomplete_n"] > 100
    assert capfd.readouterr().err.count("cannot be completed") == 1


def test_the_record_counts_what_follows_an_incomplete_position_as_incomplete():
    record = CacheRecord(8, n_layer=12, lossless=11)
    record.mark(0, 4, 5)
    record.mark(4, 6, 12)  # generated
    record.complete(4, 6)
    assert record.boundaries[:6].tolist() == [12, 12, 12, 12, 5, 5]
    record.mark(6, 8, 12)
    record.complete(6, 8)
    assert record.boundaries.tolist() == [12] * 6 + [5, 5]
    record.complete(8, 8)
    assert record.boundaries.tolist() == [12] * 8


# Arguments


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(pop_complete="later"), "pop_complete is 'later': choose one of 'off', 'call', 'idle', 'answer'"),
        (dict(pop_complete_chunk=0), "pop_complete_chunk is 0: give a number of tokens, 1 or more"),
        (dict(pop_complete_states="q8"), "pop_complete_states is 'q8': choose one of 'f32', 'f16', 'bf16'"),
    ],
)
def test_wrong_arguments_are_refused(opened, options, reason):
    with pytest.raises(PopError) as caught:
        opened(**options)
    assert str(caught.value) == reason


def test_a_model_whose_cache_cannot_be_completed_is_refused(reference_models):
    options = {**OPTIONS, "pop_boundary": 3, "pop_complete": "idle"}
    with pytest.raises(PopError, match=r"cannot be completed"):
        PopLlama(str(reference_models["lfm2"].gguf), **options)


def test_logits_all_prunes_nothing_so_that_nothing_is_left(opened):
    llm = opened("answer", logits_all=True)
    complete(llm)
    assert llm.complete_cache() == 0
