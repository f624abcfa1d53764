"""``pop-gguf serve --complete``: the server completes pruned prompts in idle moments and between tokens."""

import concurrent.futures
import struct
import subprocess
import sys
import time

import pytest

from pypop_gguf import PopLlama
from tests.server.test_cached_tokens import Slots, lora
from tests.server.test_server import OPTIONS, TEXTS
from tests.support.lora import write_lora
from tests.support.server import serve

TEXT = " ".join(TEXTS)


@pytest.fixture(scope="module", params=["idle", "answer"])
def server(request, served_gguf, tmp_path_factory):
    directory = tmp_path_factory.mktemp("slots")
    options = ("--complete", request.param, *OPTIONS, "--slot-save-path", directory)
    with serve(served_gguf, directory / "log.txt", *options) as running:
        running.mode, running.directory = request.param, directory
        yield running


@pytest.fixture(scope="module")
def slots(server):
    return Slots(server, server.directory)


@pytest.fixture(scope="module")
def whole(served_gguf):
    """Returns the whole model's greedy answer to a text."""
    options = dict(n_threads=1, n_threads_batch=1, verbose=False)
    llm = PopLlama(str(served_gguf), pop=False, n_ctx=1024, type_k=0, type_v=0, flash_attn=False, **options)

    def answer(text: str, n: int = 12) -> str:
        llm.reset()
        done = llm.create_completion(text, max_tokens=n, temperature=0, repeat_penalty=1.0)
        return done["choices"][0]["text"]

    yield answer
    llm.close()


def wait_until_complete(server, seconds=60) -> None:
    end = time.monotonic() + seconds
    while any(slot["n_incomplete"] for slot in server.get("/slots")):
        assert time.monotonic() < end, "the server completes nothing"
        time.sleep(0.02)


def test_a_whole_request_reuses_what_was_completed(server, whole):
    before = server.metric("tokens_completed_total")
    done = server.complete(TEXT, id_slot=0, n_predict=4)
    assert done["timings"]["pruned_n"] > 100
    wait_until_complete(server)
    assert server.metric("tokens_completed_total") >= before + done["timings"]["pruned_n"]
    question = TEXT + done["content"] + " Then"
    again = server.complete(question, id_slot=0, pop=False)
    assert again["timings"]["cache_n"] >= done["timings"]["pruned_n"]
    assert again["content"] == whole(question)


def test_slots_can_be_listed_while_clients_are_answered(server):
    """The list counts tokens of the cache, and must not read it while a batch is written into it."""
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        texts = [f"{i} {text} {TEXT}" for i in range(3) for text in TEXTS]
        answers = [pool.submit(server.complete, text, n_predict=8) for text in texts]
        while not all(answer.done() for answer in answers):
            slots = server.get("/slots")
            assert len(slots) == 4 and all(slot["n_incomplete"] >= 0 for slot in slots)
        assert all(answer.result()["tokens_predicted"] for answer in answers)
    wait_until_complete(server)


def test_only_answer_completes_between_tokens(server):
    timings = server.complete("A new text. " + TEXT, id_slot=1, n_predict=24)["timings"]
    assert (timings["completed_n"] > 100) == (server.mode == "answer")
    wait_until_complete(server)


def test_requests_that_come_while_the_server_completes_get_the_whole_models_answers(server, whole):
    texts = [f"{text} {TEXT}" for text in TEXTS]
    expected = [whole(text, 6) for text in texts]

    def ask(i: int) -> str:
        server.complete(texts[i], n_predict=3)
        return server.complete(texts[i], n_predict=6, pop=False)["content"]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(len(texts)))) == expected
    wait_until_complete(server)


# Tokens that move, go to files or were read with adapters


def test_what_was_completed_goes_to_the_prompt_cache_and_to_a_file_as_whole(slots):
    [prompt] = slots.prompts(60)
    slots.ask(prompt)
    wait_until_complete(slots.server)
    slots.act("save")
    slots.move_to_prompt_cache()
    assert slots.ask_as_alone(prompt, pop=False) == 59
    slots.act("restore", slot=1)
    assert slots.ask_as_alone(prompt, pop=False, id_slot=1) == 59


def test_what_a_file_holds_incomplete_stays_so(slots):
    first, second = slots.prompts(60, 60)
    slots.ask(first, n_predict=1)
    slots.act("save")
    file = (slots.directory / "a.bin").read_bytes()
    n_text = struct.unpack("<Q", file[-24:-16])[0]
    (slots.directory / "b.bin").write_bytes(file[: -24 - n_text])  # without its record a file counts as pruned
    slots.act("restore", slot=1, file="b.bin")
    assert slots.ask(first + second, id_slot=1)["cached"] == 60
    wait_until_complete(slots.server)
    assert slots.ask_as_alone(first + second, id_slot=1, pop=False) == 0


def test_moved_chunks_do_not_become_the_whole_models(slots):
    first, second = slots.prompts(26, 52)
    slots.ask(first + second)
    assert slots.ask(first[:10] + second, n_cache_reuse=4)["cached"] > 10
    wait_until_complete(slots.server)
    assert slots.ask_as_alone(first[:10] + second, pop=False) == 10


def test_a_context_shift_ends_the_completion_of_what_it_moves(served_gguf, tmp_path):
    options = ("--complete", "idle", "--threads", 1, "--context", 256, "--parallel", 1, "--server-options")
    options += ("-ctk", "f32", "-ctv", "f32", "-fa", "off", "--context-shift")
    with serve(served_gguf, tmp_path / "log.txt", *options) as server:
        slots = Slots(server, tmp_path)
        [prompt] = slots.prompts(100)
        done = server.complete(prompt, n_predict=200, id_slot=0, ignore_eos=True, return_tokens=True, n_keep=8)
        assert done["truncated"]  # the shift dropped half of what stood between the first 9 tokens and the 255th
        wait_until_complete(server)
        assert server.metric("tokens_completed_total") == 9
        shifted = (prompt + done["tokens"])[:-1]
        shifted = shifted[:9] + shifted[9 + 123 :]
        assert slots.ask(shifted, pop=False)["cached"] == 9


def test_tokens_are_completed_with_the_adapters_that_have_read_them(served_gguf, tmp_path):
    adapter = write_lora(tmp_path / "lora.gguf", served_gguf, 0, 0.3, ())
    options = ("--complete", "idle", *OPTIONS, "--lora", adapter, "--lora-init-without-apply")
    with serve(served_gguf, tmp_path / "log.txt", *options) as server:
        slots = Slots(server, tmp_path)
        for adapters, others in (lora(0), []), ([], lora(0)):
            [prompt] = slots.prompts(60)
            slots.ask(prompt, lora=adapters)
            slots.ask(slots.prompts(60)[0], lora=others, id_slot=1)
            wait_until_complete(server)
            assert slots.ask_as_alone(prompt, pop=False, lora=adapters) == 59
            assert slots.ask_as_alone(prompt, pop=False, lora=others) == 0


def test_tokens_of_a_lone_answer_join_chunks(server, whole):
    """Chunks that a token has joined take no time of their own."""
    if server.mode != "answer":
        pytest.skip("with idle, nothing is completed during an answer")
    server.complete("First, something else.", id_slot=0, n_predict=1)
    wait_until_complete(server)
    before = server.metric("completion_seconds_total")
    done = server.complete("Now. " + TEXT, id_slot=0, n_predict=16)
    assert done["timings"]["completed_n"] >= done["timings"]["pruned_n"] > 100
    assert server.metric("completion_seconds_total") == before
    question = "Now. " + TEXT + done["content"]
    assert server.complete(question, id_slot=0, n_predict=12, pop=False)["content"] == whole(question)


def test_a_mode_that_is_none_is_refused(served_gguf):
    command = [sys.executable, "-m", "pypop_gguf", "serve", str(served_gguf), "--complete", "later"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "invalid choice: 'later'" in done.stderr
