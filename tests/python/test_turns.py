"""Calls that meet on one object: from several threads, from streams that are open at once, and from callbacks.

The right answers are those of calls that were alone.
"""

import threading
import time

import llama_cpp
import pytest

from pypop_gguf import Cancelled, PopError, PopLlama
from pypop_gguf.turns import Turns

PROMPTS = ["Once upon a time there was a fox.", "The code of the mirror is 87. The code of the engine is"]
CALL = dict(max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def llm(bundled_gguf):
    llm = PopLlama(
        str(bundled_gguf), pop_boundary=6, n_ctx=256, n_batch=32, n_threads=1, n_threads_batch=1, verbose=False
    )
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def alone(llm):
    """The answer to each prompt."""
    answers = []
    for prompt in PROMPTS:
        llm.reset()
        answers.append(llm.create_completion(prompt, **CALL)["choices"][0]["text"])
    assert answers[0] != answers[1]
    return answers


def text_of(stream):
    return "".join(chunk["choices"][0]["text"] for chunk in stream)


def run_in_threads(functions, seconds=120):
    """Calls the functions at once, each in a thread of its own, and returns their results or errors."""
    results = [None] * len(functions)

    def run(i):
        try:
            results[i] = functions[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
        assert not thread.is_alive()
    return results


def test_calls_from_several_threads_get_the_answers_that_they_get_alone(llm, alone):
    def result(i):
        return llm.create_completion(PROMPTS[i % 2], **CALL)["choices"][0]["text"]

    def stream(i):
        return text_of(llm.create_completion(PROMPTS[i % 2], **CALL, stream=True))

    def other_boundary(_i):
        return llm.create_completion(PROMPTS[0], **CALL, boundary=9)["choices"][0]["text"]

    llm.reset()
    expected = other_boundary(0)
    calls = [lambda i=i, kind=kind: kind(i) for i in range(4) for kind in (result, stream, other_boundary)]
    results = run_in_threads(calls)
    assert results == [text for i in range(4) for text in (alone[i % 2], alone[i % 2], expected)]


def test_every_method_waits_while_another_thread_streams(llm, alone):
    state = llm.save_state()
    first = threading.Event()

    def stream():
        chunks = llm.create_completion(PROMPTS[0], **CALL, stream=True)
        text = next(chunks)["choices"][0]["text"]
        first.set()
        return text + text_of(chunks)

    def after_first(method):
        assert first.wait(60)
        return method()

    methods = [
        lambda: llm.score(llm.tokenize(b"a fox"), [5, 6]).shape,
        lambda: llm.eval([5, 6, 7]),
        lambda: llm.load_state(state),
        lambda: type(llm.save_state()),  # the context may be empty: the methods run in any order
        llm.reset,
        lambda: len(list(zip(range(3), llm.generate([5, 6, 7])))),
        lambda: llm.create_chat_completion([{"role": "user", "content": "Hello."}], **CALL)["object"],
    ]
    results = run_in_threads([stream, *(lambda method=method: after_first(method) for method in methods)])
    assert results[0] == alone[0]
    assert results[1:] == [(2, llm.n_vocab()), None, None, type(state), None, 3, "chat.completion"]


def test_call_that_waits_for_its_turn_can_be_cancelled(llm):
    chunks = llm.create_completion(PROMPTS[0], **CALL, stream=True)
    next(chunks)
    cancel = threading.Event()
    threading.Timer(0.3, cancel.set).start()
    (error,) = run_in_threads([lambda: llm.create_completion(PROMPTS[1], **CALL, cancel=cancel)])
    assert isinstance(error, Cancelled)
    chunks.close()


@pytest.mark.parametrize("streams", [True, False])
def test_call_beside_an_open_stream_of_the_same_thread_is_refused_and_the_stream_goes_on(llm, alone, streams):
    chunks = llm.create_completion(PROMPTS[0], **CALL, stream=True)
    text = next(chunks)["choices"][0]["text"]
    for call in (
        lambda: llm.create_completion(PROMPTS[1], **CALL, stream=streams),
        lambda: llm.create_chat_completion([{"role": "user", "content": "Hello."}], **CALL, stream=streams),
        lambda: next(llm.generate([5, 6])),
        lambda: llm.eval([5, 6]),
        lambda: llm.score([5], [6]),
        llm.reset,
    ):
        with pytest.raises(PopError, match=r"^another stream of this model is open: read it to its end, or close"):
            call()
    assert llm.save_state().n_tokens == llm.n_tokens > 0  # this only reads
    assert text + text_of(chunks) == alone[0]
    assert text_of(llm.create_completion(PROMPTS[1], **CALL, stream=True)) == alone[1]


def test_stream_that_was_closed_or_dropped_or_never_begun_is_in_nobodys_way(llm, alone):
    begun = llm.create_completion(PROMPTS[0], **CALL, stream=True)
    next(begun)
    begun.close()
    dropped = llm.create_completion(PROMPTS[0], **CALL, stream=True)
    next(dropped)
    del dropped
    waiting = llm.create_completion(PROMPTS[0], **CALL, stream=True)
    tokens = llm.generate([5, 6])
    next(tokens)
    tokens.close()
    assert llm.create_completion(PROMPTS[1], **CALL)["choices"][0]["text"] == alone[1]
    assert text_of(waiting) == alone[0]


def test_stream_that_several_threads_read_in_turn_goes_on(llm, alone):
    chunks = llm.create_completion(PROMPTS[0], **CALL, stream=True)
    text = ""
    while True:
        (chunk,) = run_in_threads([lambda: next(chunks, None)])
        if chunk is None:
            break
        text += chunk["choices"][0]["text"]
    assert text == alone[0]


@pytest.mark.parametrize("where", ["progress", "logits_processor", "stopping_criteria"])
def test_call_from_a_function_that_a_call_has_called_is_refused(llm, alone, where):
    errors = []

    def call_again(*_arguments):
        for call in (
            lambda: llm.create_completion(PROMPTS[1], **CALL),
            lambda: next(llm.generate([5, 6])),
            lambda: llm.score([5], [6]),
            llm.close,
        ):
            try:
                call()
            except PopError as error:
                errors.append(str(error))
        return _arguments[1] if where == "logits_processor" else where == "progress"

    function = {
        "progress": call_again,
        "logits_processor": llama_cpp.LogitsProcessorList([call_again]),
        "stopping_criteria": llama_cpp.StoppingCriteriaList([call_again]),
    }[where]
    llm.reset()
    result = llm.create_completion(PROMPTS[0], **CALL, **{where: function})
    assert result["choices"][0]["text"] == alone[0]
    assert len(errors) >= 4 and {error.split(":")[0] for error in errors} == {"this model is in the middle of a call"}


def test_closing_waits_for_the_step_of_another_thread_and_ends_its_stream(bundled_gguf):
    llm = PopLlama(str(bundled_gguf), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
    begun = threading.Event()
    closer = threading.Thread(target=lambda: (begun.wait(60), llm.close()))
    closer.start()
    with pytest.raises(PopError, match=r"^this model was closed: make a new PopLlama to go on$"):
        for _ in llm.create_completion(PROMPTS[0], max_tokens=200, temperature=0, stream=True, logit_bias={2: -100}):
            begun.set()
            closer.join(0.05)
    closer.join(60)


def test_every_use_of_a_closed_model_says_that_it_was_closed(bundled_gguf):
    llm = PopLlama(str(bundled_gguf), n_ctx=64, verbose=False)
    state = llm.save_state()
    llm.close()
    llm.close()
    for use in (
        lambda: llm.create_completion("Once", **CALL),
        lambda: llm("Once", **CALL, stream=True),
        lambda: llm.create_chat_completion([{"role": "user", "content": "Hello."}], **CALL),
        lambda: next(llm.generate([5, 6])),
        lambda: llm.eval([5]),
        lambda: llm.score([5], [6]),
        lambda: llm.embed("Once"),
        lambda: llm.create_embedding("Once"),
        lambda: llm.tokenize(b"Once"),
        lambda: llm.detokenize([5]),
        lambda: llm.tokenizer().encode("Once"),
        lambda: llm.load_state(state),
        llm.save_state,
        llm.reset,
        llm.sample,
        llm.n_ctx,
        llm.n_vocab,
        llm.n_embd,
        llm.token_eos,
        llm.pooling_type,
        lambda: llm.ctx,
        lambda: llm.model,
    ):
        with pytest.raises(PopError, match=r"^this model was closed: make a new PopLlama to go on$"):
            use()
    assert llm.pop.n_layer == 12


def test_models_in_several_threads_share_a_cache(bundled_gguf, alone):
    cache = llama_cpp.LlamaRAMCache(capacity_bytes=3_000_000)  # entries are dropped all the time
    options = dict(pop_boundary=6, n_ctx=256, n_batch=32, n_threads=1, n_threads_batch=1, verbose=False)
    models = [PopLlama(str(bundled_gguf), **options) for _ in range(3)]

    def ask(model):
        model.set_cache(cache)
        return [model.create_completion(prompt, **CALL)["choices"][0]["text"] for prompt in PROMPTS * 4]

    assert run_in_threads([lambda model=model: ask(model) for model in models]) == [alone * 4] * 3
    for model in models:
        model.close()


# Idle work


def test_idle_work_waits_for_the_end_of_a_turn_and_for_a_moment_after_it():
    turns, turn = Turns(), object()
    with turns.step(turn):
        pass
    began = []
    thread = threading.Thread(target=lambda: began.append(turns.wait_until_idle(work_is_left=False)))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()  # a stream keeps its turn between its chunks
    with turns.step(turn):
        left_at = time.monotonic()
    turns.end(turn)
    thread.join(60)
    assert began == [True] and time.monotonic() - left_at >= 0.05


def test_steps_within_a_turn_do_not_wake_the_thread_of_idle_work():
    class Counted(Turns):
        n_looks = 0

        def _is_free(self):
            self.n_looks += threading.current_thread().name == "idle work"
            return super()._is_free()

    turns, turn = Counted(), object()
    with turns.step(turn):
        thread = threading.Thread(target=turns.wait_until_idle, args=(True,), name="idle work")
        thread.start()
        while turns.n_looks == 0:
            time.sleep(0.01)
        time.sleep(0.05)
    for _ in range(20):
        with turns.step(turn):
            time.sleep(0.005)
    assert turns.n_looks == 1
    turns.end(turn)
    thread.join(timeout=60)
    assert not thread.is_alive() and turns.n_looks > 1


def test_idle_work_begins_again_after_each_use_of_the_context_or_while_work_is_left():
    turns = Turns()
    with turns.pause():
        pass
    assert turns.wait_until_idle(work_is_left=False)
    assert turns.wait_until_idle(work_is_left=True)
    ended = []
    thread = threading.Thread(target=lambda: ended.append(turns.wait_until_idle(work_is_left=False)))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    turns.end_idle_work()
    thread.join(60)
    assert ended == [False] and not turns.wait_until_idle(work_is_left=True)


@pytest.mark.parametrize("use", ["step", "pause"])
def test_call_interrupts_idle_work_once_and_then_comes_first(monkeypatch, use):
    monkeypatch.setattr("pypop_gguf.turns._REST_S", 0)  # It comes first however long it takes to wake up.
    turns, turn = Turns(), object()
    interrupts, used = [], threading.Event()

    def call():
        with turns.step(turn) if use == "step" else turns.pause():
            used.set()
        turns.end(turn)

    with turns.idle_step(lambda: interrupts.append(threading.get_ident())) as may_run:
        assert may_run
        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        while not interrupts:
            time.sleep(0.001)
        time.sleep(0.1)
        assert not used.is_set()
    assert turns.wait_until_idle(work_is_left=True) and used.is_set()
    for thread in threads:
        thread.join(60)
    assert len(interrupts) == 1 and interrupts[0] in {thread.ident for thread in threads}


def test_idle_step_does_not_run_beside_a_call_or_after_the_end():
    turns, turn = Turns(), object()
    with turns.step(turn):
        pass
    with turns.idle_step(lambda: None) as may_run:
        assert not may_run
    turns.end(turn)
    turns.end_idle_work()
    with turns.idle_step(lambda: None) as may_run:
        assert not may_run
