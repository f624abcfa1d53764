"""A request is answered from cached tokens only if they were read as it would read them itself.

The server moves, copies, shifts, saves, restores and trims cached tokens. Each answer here is compared with the answer
to the same request from an empty cache. fuzz/http_caches.py does the same with requests at random.
"""

import concurrent.futures
import itertools
import json
import random
import struct

import httpx
import pytest

from tests.support.lora import write_lora
from tests.support.server import OPTIONS as FOUR_SLOTS
from tests.support.server import serve

# With one thread, F32 caches and no flash attention, batches of different shapes differ by rounding alone.
OPTIONS = (*FOUR_SLOTS, "-ctk", "f32", "-ctv", "f32", "-fa", "off")
ROUNDING = 1e-3  # of log-probabilities
INVOCATION = [700, 701]
SEEDS = itertools.count()


class Slots:
    """Sends requests whose prompts are tokens, and compares their answers with those from an empty cache."""

    def __init__(self, server, directory) -> None:
        self.server, self.directory = server, directory

    def prompts(self, *lengths: int) -> list[list[int]]:
        """Returns tokens that no other test has used."""
        chance = random.Random(next(SEEDS))
        return [[chance.randrange(1000, 4000) for _ in range(length)] for length in lengths]

    def ask(self, prompt: list[int], **options) -> dict:
        """Returns the answer, the likeliest first tokens' log-probabilities, and the number of cached tokens."""
        done = self.server.complete(prompt, **{"n_predict": 4, "n_probs": 5, "id_slot": 0, **options})
        likeliest = done["completion_probabilities"][0]["top_logprobs"]
        return {
            "text": done["content"],
            "logprobs": [one["logprob"] for one in likeliest],
            "cached": done["timings"]["cache_n"],
        }

    def ask_as_alone(self, prompt: list[int], **options) -> int:
        """Asks, checks that the answer is the one from an empty cache, and returns how many tokens were cached."""
        done = self.ask(prompt, **options)
        alone = self.ask(prompt, **{**options, "cache_prompt": False, "id_slot": 3})
        assert alone["cached"] == 0
        assert done["logprobs"] == pytest.approx(alone["logprobs"], abs=ROUNDING), (done, alone)
        assert done["text"] == alone["text"]
        return done["cached"]

    def move_to_prompt_cache(self) -> None:
        """Fills slot 0 with another prompt, before which the server saves what it holds."""
        self.ask(self.prompts(40)[0], n_predict=1)

    def act(self, action: str, slot: int = 0, file: str = "a.bin") -> dict:
        return self.server.post(f"/slots/{slot}?action={action}", filename=file)


@pytest.fixture(scope="module")
def slots(served_gguf, tmp_path_factory):
    directory = tmp_path_factory.mktemp("slots")
    with serve(served_gguf, directory / "log.txt", *OPTIONS, "--slot-save-path", directory) as server:
        yield Slots(server, directory)


@pytest.fixture(scope="module")
def adapted(served_gguf, tmp_path_factory):
    """A server with two LoRA adapters and one that INVOCATION activates. None of them acts unless a request asks."""
    directory = tmp_path_factory.mktemp("adapted")
    invocations = [(), (), INVOCATION]
    paths = [write_lora(directory / f"{i}.gguf", served_gguf, i, 0.3, words) for i, words in enumerate(invocations)]
    options = [option for path in paths for option in ("--lora", path)]
    options += ["--lora-init-without-apply", "--slot-save-path", directory]
    with serve(served_gguf, directory / "log.txt", *OPTIONS, *options) as server:
        yield Slots(server, directory)


def lora(index: int, scale: float = 1.0) -> list[dict]:
    return [{"id": index, "scale": scale}]


# Pruned tokens and moved tokens


def test_moved_chunk_is_still_known_to_be_pruned(slots):
    first, second = slots.prompts(26, 52)
    slots.ask(first, pop=False)
    slots.ask(first + second)
    assert slots.ask(first[:10] + second, n_cache_reuse=4)["cached"] > 10
    assert slots.ask_as_alone(first[:10] + second, pop=False) == 10


@pytest.mark.parametrize("pop", [True, False])
def test_moved_chunk_is_used_only_where_moving_is_asked_for(slots, pop):
    """Tokens that were read at another position are an approximation, which a request asks for by n_cache_reuse."""
    first, second = slots.prompts(26, 52)
    slots.ask(first + second, pop=False)
    for _ in range(2):
        assert slots.ask(first[:10] + second, n_cache_reuse=4)["cached"] == 61
    assert slots.ask(first[:10] + second, pop=pop)["cached"] == 10
    assert slots.ask_as_alone(first[:10] + second, pop=False) == (10 if pop else 61)


def test_record_of_moved_chunks_goes_with_them_to_the_prompt_cache(slots):
    first, second = slots.prompts(26, 52)
    slots.ask(first, pop=False)
    slots.ask(first + second)
    slots.ask(first[:10] + second, n_cache_reuse=4)
    slots.move_to_prompt_cache()
    assert slots.ask_as_alone(first[:10] + second, pop=False) == 10


def test_record_of_moved_chunks_goes_with_them_to_a_file(slots):
    first, second = slots.prompts(26, 52)
    slots.ask(first, pop=False)
    slots.ask(first + second)
    slots.ask(first[:10] + second, n_cache_reuse=4)
    slots.act("save")
    slots.move_to_prompt_cache()
    slots.act("restore", slot=1)
    assert slots.ask_as_alone(first[:10] + second, pop=False, id_slot=1) == 10


def test_whole_prompt_is_still_known_to_be_whole_after_a_file(slots):
    [prompt] = slots.prompts(60)
    slots.ask(prompt, pop=False)
    slots.act("save")
    slots.act("restore", slot=1)
    assert slots.ask_as_alone(prompt, pop=False, id_slot=1) == 59


def test_tokens_after_a_context_shift_are_not_reused_at_their_new_positions(served_gguf, tmp_path):
    options = ("--threads", 1, "--context", 256, "--parallel", 2, "--server-options")
    options += ("-ctk", "f32", "-ctv", "f32", "-fa", "off", "--context-shift")
    with serve(served_gguf, tmp_path / "log.txt", *options) as server:
        slots = Slots(server, tmp_path)
        [prompt] = slots.prompts(100)
        done = server.complete(prompt, n_predict=200, id_slot=0, ignore_eos=True, return_tokens=True, n_keep=8)
        assert done["truncated"]  # the shift dropped half of what stood between the first 9 tokens and the 255th
        shifted = (prompt + done["tokens"])[:-1]
        shifted = shifted[:9] + shifted[9 + 123 :]
        assert slots.ask(shifted, id_slot=0)["cached"] == 9


# Tokens that were read with adapters


def test_request_without_lora_does_not_use_what_an_adapter_has_read(adapted):
    [prompt] = adapted.prompts(60)
    plain, changed = (adapted.ask(prompt, cache_prompt=False, **how)["logprobs"] for how in ({}, {"lora": lora(0)}))
    assert plain != pytest.approx(changed, abs=0.1)  # the adapter changes the answer
    adapted.ask(prompt, lora=lora(0))
    assert adapted.ask_as_alone(prompt) == 0


@pytest.mark.parametrize("pop", [True, False])
def test_every_change_of_adapters_reads_the_prompt_again(adapted, pop):
    [prompt] = adapted.prompts(60)
    for how in (None, lora(0), lora(1), lora(0, 0.5), lora(0) + lora(1), [], lora(0, 0.0)):
        options = {"pop": pop} if how is None else {"pop": pop, "lora": how}
        same_as_before = how == lora(0, 0.0)  # an adapter of the scale 0 is none
        assert adapted.ask_as_alone(prompt, **options) == (59 if same_as_before else 0), how
        assert adapted.ask_as_alone(prompt, **options) == 59


def test_scales_of_the_server_count_like_those_of_a_request(adapted):
    [prompt] = adapted.prompts(60)
    adapted.ask(prompt)
    try:
        adapted.server.client.post("/lora-adapters", json=lora(1)).raise_for_status()
        assert adapted.ask_as_alone(prompt) == 0
        assert adapted.ask_as_alone(prompt, lora=lora(1)) == 59
    finally:
        adapted.server.client.post("/lora-adapters", json=[]).raise_for_status()
    assert adapted.ask_as_alone(prompt) == 0


@pytest.mark.parametrize("again", [True, False])
def test_adapters_go_with_the_tokens_to_the_prompt_cache(adapted, again):
    [prompt] = adapted.prompts(60)
    adapted.ask(prompt, lora=lora(0))
    adapted.move_to_prompt_cache()
    assert adapted.ask_as_alone(prompt, **({"lora": lora(0)} if again else {})) == (59 if again else 0)


def test_adapter_that_no_request_asks_for_does_not_act(slots, adapted):
    """--lora-init-without-apply and an empty list ask for none."""
    [prompt] = adapted.prompts(60)
    without = slots.ask(prompt, cache_prompt=False)["logprobs"]
    assert [one["scale"] for one in adapted.server.get("/lora-adapters")] == [0, 0, 0]
    for how in ({}, {"lora": []}):
        assert adapted.ask(prompt, cache_prompt=False, **how)["logprobs"] == pytest.approx(without, abs=ROUNDING)
    try:
        adapted.server.client.post("/lora-adapters", json=lora(1)).raise_for_status()
        assert adapted.ask(prompt, lora=[])["logprobs"] == pytest.approx(without, abs=ROUNDING)
    finally:
        adapted.server.client.post("/lora-adapters", json=[]).raise_for_status()


def test_adapters_go_with_the_tokens_to_a_file(adapted):
    [prompt] = adapted.prompts(60)
    adapted.ask(prompt, lora=lora(0))
    adapted.act("save")
    for how, cached in (({"lora": lora(0)}, 59), ({}, 0)):
        adapted.act("restore", slot=1)
        assert adapted.ask_as_alone(prompt, id_slot=1, **how) == cached


def test_chunks_that_another_adapter_has_read_do_not_move(adapted):
    first, second = adapted.prompts(26, 52)
    adapted.ask(first + second, lora=lora(0))
    assert adapted.ask_as_alone(first[:10] + second, n_cache_reuse=4) == 0


def test_adapter_that_is_activated_shares_only_what_stands_before(adapted):
    first, second = adapted.prompts(30, 30)
    prompt = first + INVOCATION + second
    assert adapted.ask_as_alone(prompt) == 0
    assert adapted.ask_as_alone(prompt, lora=lora(2)) == 29  # the token before the invocation is read again
    assert adapted.ask_as_alone(prompt) == 29
    adapted.ask(prompt, lora=lora(2))
    later = first + INVOCATION + second + INVOCATION + second[:5]
    assert adapted.ask_as_alone(later, lora=lora(2)) == 29


def test_activated_adapter_does_not_read_what_stands_before_in_the_batch_of_another_slot(adapted):
    first, second = adapted.prompts(40, 40)
    options = dict(lora=lora(2), n_predict=40, ignore_eos=True, cache_prompt=False)
    prompts = [first + INVOCATION + second[:n] for n in (3, 9, 20)]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda at: adapted.ask(prompts[at], id_slot=at, **options), range(3)))
    for prompt, answer in zip(prompts, done):
        assert answer["logprobs"] == pytest.approx(adapted.ask(prompt, **options)["logprobs"], abs=ROUNDING)


def test_answers_of_one_request_share_its_adapters(adapted):
    [prompt] = adapted.prompts(60)
    adapted.ask(prompt)
    both = [{"id": 1, "scale": 1.0}]
    asked = dict(prompt=prompt, n=2, max_tokens=4, temperature=0)
    done = adapted.server.post("/v1/completions", lora=both, **asked)
    alone = adapted.ask(prompt, lora=both, cache_prompt=False)
    assert [choice["text"] for choice in done["choices"]] == [alone["text"]] * 2
    for slot in range(4):
        adapted.ask_as_alone(prompt, id_slot=slot)


# Slot files that are damaged


def damaged(file: bytes) -> dict[str, bytes]:
    n_text = struct.unpack("<Q", file[-24:-16])[0]
    stock = file[: -24 - n_text]  # what stock llama.cpp writes
    n_tokens = struct.unpack("<I", file[8:12])[0]
    at = 12 + 4 * n_tokens
    assert json.loads(file[-24 - n_text : -24])["pruned_from"] == 0

    def changed(data: bytes, at: int, value: int) -> bytes:
        return data[:at] + struct.pack("<I", value) + data[at + 4 :]

    cuts = [0, 1, 11, 12, 40, at, at + 4, at + 8, at + 40, len(stock) // 2, len(stock) - 1]
    return {
        **{f"cut to {n}": stock[:n] for n in cuts},
        "cut in the record": file[:-30],
        "cut by a byte": file[:-1],
        "one bit of a value": changed(file, len(stock) - 8, 1),
        "one bit of the record": file[:-30] + bytes([file[-30] ^ 1]) + file[-29:],
        "longer": file + b"\0",
        "stock, longer": stock + b"\0",
        "no cells": stock[: at + 4] + bytes(4),
        "more cells": changed(stock, at + 4, 2**32 - 1),
        "a negative position": changed(stock, at + 8, 2**32 - 1),
        "a large position": changed(stock, at + 8 + 12 * 59, 2**31 - 1),
        "more tokens": changed(stock, 8, 2**32 - 1),
        "a token that the model has not": changed(stock, 24, 2**31 - 1),
        "a size of a row": changed(stock, at + 8 + 12 * 60 + 12, 7),
    }


def test_damaged_slot_files_are_refused(slots):
    [prompt] = slots.prompts(60)
    slots.ask(prompt, n_predict=1)
    slots.act("save")
    file = (slots.directory / "a.bin").read_bytes()
    for name, content in damaged(file).items():
        (slots.directory / "b.bin").write_bytes(content)
        with pytest.raises(httpx.HTTPStatusError) as refused:
            slots.act("restore", file="b.bin")
        error = refused.value.response.json()["error"]
        assert error["code"] == 400 and error["message"].startswith("Unable to restore slot: "), name
        assert slots.ask_as_alone(prompt) == 0, name
    slots.act("restore")
    assert slots.ask(prompt)["cached"] == 59


def test_slot_file_of_stock_llama_cpp_counts_as_pruned_and_as_read_with_unknown_adapters(slots, adapted):
    for server, cached in ((slots, 59), (adapted, 0)):
        [prompt] = server.prompts(60)
        server.ask(prompt, n_predict=1)
        server.act("save")
        file = (server.directory / "a.bin").read_bytes()
        n_text = struct.unpack("<Q", file[-24:-16])[0]
        (server.directory / "b.bin").write_bytes(file[: -24 - n_text])
        server.act("restore", slot=1, file="b.bin")
        assert server.ask(prompt, id_slot=1)["cached"] == cached
        server.act("restore", slot=1, file="b.bin")
        assert server.ask_as_alone(prompt, id_slot=1, pop=False) == 0


def test_empty_slot_is_saved_and_restored(slots):
    slots.act("erase")
    assert slots.act("save")["n_saved"] == 0
    assert slots.act("restore")["n_restored"] == 0
    assert slots.ask_as_alone(slots.prompts(20)[0]) == 0
