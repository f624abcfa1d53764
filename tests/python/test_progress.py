"""Progress, cancelling and timings of a call."""

import ctypes
import signal
import threading

import pytest

from pypop_gguf import Cancelled, PopLlama

TEXT = "Once upon a time, there was a little girl named Lily. She had a red ball and a small dog. " * 8
OPTIONS = dict(n_ctx=512, n_batch=64, n_ubatch=32, pop_boundary=8, n_threads=1, n_threads_batch=1, verbose=False)
CALL = dict(max_tokens=6, temperature=0)


@pytest.fixture
def llm(bundled_gguf):
    llm = PopLlama(str(bundled_gguf), **OPTIONS)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def answer(bundled_gguf) -> str:
    llm = PopLlama(str(bundled_gguf), **OPTIONS)
    text = llm.create_completion(TEXT, **CALL)["choices"][0]["text"]
    llm.close()
    return text


@pytest.mark.parametrize("stream", [False, True])
def test_progress_counts_micro_batches_up_to_the_whole_prompt(llm, stream):
    calls = []
    done = llm.create_completion(TEXT, stream=stream, progress=lambda *at: calls.append(at), **CALL)
    if stream:
        list(done)
    total = len(llm.tokenize(TEXT.encode()))
    assert calls == [(at, total) for at in (*range(0, total, 32), total)] and total > 128


def test_progress_of_a_reused_prompt_starts_at_what_is_cached(llm):
    llm.create_completion(TEXT, **CALL)
    calls = []
    llm.create_completion(TEXT + "She was", progress=lambda *at: calls.append(at), **CALL)
    assert calls[0][0] == llm.timings.reused_tokens > 100 and calls[-1] == (calls[-1][1],) * 2


def test_returning_false_stops_and_the_next_call_goes_on_from_there(llm, answer):
    with pytest.raises(Cancelled, match="cancelled after 64 of") as caught:
        llm.create_completion(TEXT, progress=lambda done, total: done < 64, **CALL)
    assert (caught.value.done, caught.value.total) == (64, len(llm.tokenize(TEXT.encode())))
    done = llm.create_completion(TEXT, **CALL)
    assert done["choices"][0]["text"] == answer and llm.timings.reused_tokens == 64
    # Now the prompt is just the part that was read. It is all cached, but its last token was not asked for logits.
    with pytest.raises(Cancelled):
        llm.create_completion("Two dogs. " + TEXT, progress=lambda done, total: done < 64, **CALL)
    part = llm._input_ids[:64].tolist()
    fresh = PopLlama(llm.model_path, **OPTIONS)
    assert llm.create_completion(part, **CALL)["choices"] == fresh.create_completion(part, **CALL)["choices"]
    fresh.close()


def test_event_of_another_thread_stops_prompt_and_answer(llm, answer):
    event = threading.Event()
    threading.Timer(0.0, event.set).start()
    event.wait()
    with pytest.raises(Cancelled):
        llm.create_completion(TEXT, cancel=event, **CALL)
    event.clear()
    stream = llm.create_completion(TEXT, cancel=event, stream=True, **CALL)
    next(stream)
    event.set()
    with pytest.raises(Cancelled):
        list(stream)
    assert llm.create_completion(TEXT, **CALL)["choices"][0]["text"] == answer


def test_recurrent_memory_keeps_what_a_cancelled_call_has_read(reference_models):
    """Its state between micro-batches is complete, so the same prompt goes on from there. Another one begins anew."""
    model = reference_models["lfm2"]
    prompt, other = model.tokens(200), model.tokens(200)[:32] + model.tokens(120)[5:]
    options = {**OPTIONS, "pop_boundary": 4}
    llm, fresh = PopLlama(str(model.gguf), **options), PopLlama(str(model.gguf), **options)
    expected = [next(fresh.generate(tokens, temp=0)) for tokens in (prompt, other)]
    for tokens, answer in zip((prompt, other), expected):
        llm.reset()
        with pytest.raises(
            Cancelled, match="after 64 of 200 prompt tokens; what was read stays in the cache"
        ) as caught:
            llm.create_completion(prompt, progress=lambda done, total: done < 64, **CALL)
        assert llm.n_tokens == caught.value.done == 64 and not caught.value.lost
        assert next(llm.generate(tokens, temp=0)) == answer
    llm.close()
    fresh.close()


@pytest.mark.parametrize("recurrent", [False, True], ids=["attention", "hybrid"])
def test_ctrl_c_within_a_micro_batch_undoes_it(request, bundled_gguf, reference_models, recurrent):
    """A signal that comes during llama_decode is handled by Python when that returns, before the tokens are counted."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    path = reference_models["lfm2"].gguf if recurrent else bundled_gguf
    tokens = reference_models["lfm2"].tokens(200) if recurrent else None
    options = {**OPTIONS, "pop_boundary": 4 if recurrent else 8}

    def interrupted(llm):
        tokens_ = tokens or llm.tokenize(TEXT.encode())
        decode, calls = llm._ctx.decode, []

        def decode_and_signal(batch):
            decode(batch)
            calls.append(None)
            if len(calls) == 3:
                ctypes.pythonapi.PyErr_SetInterruptEx(signal.SIGINT)  # Python handles it now

        llm._ctx.decode = decode_and_signal
        with pytest.raises(KeyboardInterrupt):
            llm.eval(tokens_)
        llm._ctx.decode = decode
        return tokens_

    llm = PopLlama(str(path), **options)
    prompt = interrupted(llm)
    assert llm.n_tokens == (0 if recurrent else 64)
    fresh = PopLlama(str(path), **options)
    assert next(llm.generate(prompt, temp=0)) == next(fresh.generate(prompt, temp=0))
    assert list(zip(range(5), llm.generate(prompt, temp=0))) == list(zip(range(5), fresh.generate(prompt, temp=0)))
    llm.close()
    fresh.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_timings_stand_in_the_result_and_in_the_last_chunk(llm, stream, chat):
    options = dict(stream=stream, max_tokens=4, temperature=0)
    if chat:
        done = llm.create_chat_completion([{"role": "user", "content": TEXT}], **options)
    else:
        done = llm.create_completion(TEXT, **options)
    if stream:
        *others, done = list(done)
        assert not any("timings" in chunk for chunk in others)
    timings = done["timings"]
    assert timings["prompt_n"] + timings["cache_n"] == llm.timings.prompt_tokens
    assert timings["pruned_n"] == timings["prompt_n"] - 1 and timings["boundary"] == 8
    assert timings["predicted_n"] == llm.timings.generated_tokens >= 1
    assert timings["prompt_per_second"] == pytest.approx(1e3 * timings["prompt_n"] / timings["prompt_ms"])
    assert timings["prompt_ms"] <= timings["time_to_first_token_ms"]
