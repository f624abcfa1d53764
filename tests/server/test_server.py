"""``pop-gguf serve`` prunes prompts in every slot and cache of llama-server. PopLlama gives the expected answers."""

import concurrent.futures
import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gguf
import httpx
import pytest

from pypop_gguf import PopLlama
from pypop_gguf.cli import main
from pypop_gguf.gguf_files.metadata import PopMetadata
from tests.support.server import OPTIONS as FOUR_SLOTS
from tests.support.server import ask, serve

BOUNDARY, N_LAYER = 8, 12
# With one thread, F32 caches and no flash attention, batches of different shapes differ by rounding alone.
OPTIONS = (*FOUR_SLOTS, "-ctk", "f32", "-ctv", "f32", "-fa", "off")
TEXTS = [
    "Lily and her mom went to the garden. They planted a small seed in the ground. "
    "Every day, Lily gave the seed some water.",
    "Sara was sad because her kite was stuck in a tall tree. Her brother Tim said,",
    "Once upon a time, there was a little dog named Max. Max loved to play in the park. "
    "One day, Max saw a big red ball. He",
    "One day, a bird found a shiny stone near the river. The bird wanted to show it to her friend, the fish.",
    "Tom had a big box of toys. He liked the blue car the most. His sister Anna wanted to play with it too, so",
    "The old man lived in a house on the hill. Every morning he fed the hens and then he",
    "Mia and Ben made a cake for their dad. They put too much sugar in the bowl. When dad came home, he",
    "There was a small frog who could not jump. All the other frogs laughed at him. Then a kind turtle said,",
]


@pytest.fixture(scope="module")
def model(served_gguf):
    return served_gguf


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with serve(model, tmp_path_factory.mktemp("log") / "log.txt", *OPTIONS) as running:
        yield running


@pytest.fixture(scope="module")
def reference(model):
    """Returns PopLlama's greedy answer to a text, each from an empty cache."""
    llm = PopLlama(
        str(model), n_ctx=1024, type_k=0, type_v=0, flash_attn=False, n_threads=1, n_threads_batch=1, verbose=False
    )

    def answer(text: str, n: int = 12, **options) -> str:
        llm.reset()
        return llm.create_completion(text, max_tokens=n, temperature=0, repeat_penalty=1.0, **options)["choices"][0][
            "text"
        ]

    yield answer
    llm.close()


def n_tokens(server, text: str) -> int:
    return len(server.post("/tokenize", content=text, add_special=True)["tokens"])


def test_answer_and_timings_of_a_pruned_prompt(server, reference):
    done = server.complete(TEXTS[0], cache_prompt=False)
    assert done["content"] == reference(TEXTS[0])
    n = n_tokens(server, TEXTS[0])
    timings = done["timings"]
    assert (timings["prompt_n"], timings["pruned_n"], timings["boundary"]) == (n, n - 1, BOUNDARY)
    assert server.get("/props")["pop"] == {"boundary": BOUNDARY, "n_layer": N_LAYER}


def test_pop_false_is_the_whole_model(server, reference):
    done = server.complete(TEXTS[1], pop=False, cache_prompt=False)
    assert done["content"] == reference(TEXTS[1], pop=False)
    assert (done["timings"]["pruned_n"], done["timings"]["boundary"]) == (0, N_LAYER)
    assert any(reference(text) != reference(text, pop=False) for text in TEXTS)  # pruning changes an answer


def test_whole_request_does_not_use_what_a_pruned_one_left(server, reference):
    text = "The king lost his crown in the deep forest. " + TEXTS[2]
    n = n_tokens(server, text)
    assert server.complete(text, id_slot=0)["timings"]["pruned_n"] == n - 1
    whole = server.complete(text, id_slot=0, pop=False)
    assert (whole["timings"]["cache_n"], whole["timings"]["prompt_n"]) == (0, n)
    assert whole["content"] == reference(text, pop=False)
    again = server.complete(text, id_slot=0)  # a pruned request may reuse whole positions
    assert (again["timings"]["cache_n"], again["timings"]["pruned_n"]) == (n - 1, 0)
    assert again["content"] == whole["content"]


def test_whole_request_uses_the_whole_part_of_a_mixed_cache(server):
    text, more = (
        "A cat sat on a mat. The cat was fat.",
        " Then a dog came and the cat ran up a tree and did not come down.",
    )
    n = n_tokens(server, text)
    server.complete(text, id_slot=1, pop=False, n_predict=0)
    assert server.complete(text + more, id_slot=1, n_predict=1)["timings"]["pruned_n"] > 5
    assert server.complete(text + more, id_slot=1, pop=False, n_predict=1)["timings"]["cache_n"] >= n - 1
    assert server.complete(text + more, id_slot=1, pop=False, n_predict=1)["timings"]["cache_n"] > n + 5


def test_prompt_cache_keeps_how_a_prompt_was_read(server, reference):
    """With more conversations than slots, the server moves them to its prompt cache and takes them back."""
    texts = [f"Number {i}. {text}" for i, text in enumerate(TEXTS[:6])]
    for text in texts:
        server.complete(text)
    whole = server.complete(texts[0], pop=False)
    assert whole["content"] == reference(texts[0], pop=False) and whole["timings"]["cache_n"] == 0
    again = server.complete(texts[1])
    assert again["content"] == reference(texts[1]) and again["timings"]["cache_n"] > 10


def test_several_answers_to_one_prompt_share_its_pruned_cache(server, reference):
    done = server.post("/v1/completions", prompt=TEXTS[3], n=3, max_tokens=12, temperature=0, cache_prompt=False)
    assert [choice["text"] for choice in done["choices"]] == [reference(TEXTS[3])] * 3


@pytest.mark.parametrize("pop", [True, False])
def test_eight_clients_get_what_each_gets_alone(server, reference, pop):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda text: server.complete(text, pop=pop, cache_prompt=False), TEXTS))
    assert [one["content"] for one in done] == [reference(text, pop=pop) for text in TEXTS]
    assert [one["timings"]["pruned_n"] for one in done] == [(n_tokens(server, text) - 1) * pop for text in TEXTS]


def test_whole_and_pruned_prompts_share_batches(server, reference):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda at: server.complete(TEXTS[at], pop=at % 2 == 0, cache_prompt=False), range(8)))
    assert [one["content"] for one in done] == [reference(text, pop=at % 2 == 0) for at, text in enumerate(TEXTS)]


def test_metrics_count_what_was_pruned(server):
    before = server.metric("prompt_tokens_pruned_total")
    n = server.complete(TEXTS[4], cache_prompt=False)["timings"]["pruned_n"]
    server.complete(TEXTS[4], cache_prompt=False, pop=False)
    assert server.metric("prompt_tokens_pruned_total") - before == n > 0


def test_streamed_timings_name_what_was_pruned(server):
    *_, last = server.stream("/completion", prompt=TEXTS[5], n_predict=3, temperature=0, cache_prompt=False)
    assert last["stop"] and last["timings"]["pruned_n"] == n_tokens(server, TEXTS[5]) - 1


def test_work_stops_when_the_client_hangs_up(server):
    """The client is gone long before the thousands of tokens that it asked for are written."""
    events = server.stream("/completion", prompt=TEXTS[6], n_predict=-1, ignore_eos=True)
    next(events)
    assert server.metric("requests_processing") == 1
    events.close()
    written = server.metric("tokens_predicted_total")
    for _ in itertools.takewhile(lambda _: server.metric("requests_processing"), range(200)):
        time.sleep(0.05)
    assert server.metric("requests_processing") == 0
    assert server.metric("tokens_predicted_total") - written < 900


def test_a_restored_slot_counts_as_pruned(model, tmp_path, reference):
    (tmp_path / "slots").mkdir()
    with serve(model, tmp_path / "log.txt", *OPTIONS, "--slot-save-path", tmp_path / "slots") as server:
        server.complete(TEXTS[0], id_slot=0)
        server.post("/slots/0?action=save", filename="a.bin")
        server.complete(TEXTS[1], id_slot=0)
        server.post("/slots/0?action=restore", filename="a.bin")
        whole = server.complete(TEXTS[0], id_slot=0, pop=False)
        assert whole["timings"]["cache_n"] == 0 and whole["content"] == reference(TEXTS[0], pop=False)


def test_fewest_tokens_and_boundary_of_the_command(model, tmp_path):
    from pypop_gguf.gguf_files.writer import copy_with_metadata

    copy_with_metadata(model, tmp_path / "few.gguf", PopMetadata(boundary=BOUNDARY, min_tokens=20))
    with serve(tmp_path / "few.gguf", tmp_path / "log.txt", "--boundary", 10, *OPTIONS) as server:
        assert server.get("/props")["pop"] == {"boundary": 10, "n_layer": N_LAYER}
        short = server.complete("The cat sat.", cache_prompt=False)
        assert (short["timings"]["pruned_n"], short["timings"]["boundary"]) == (0, N_LAYER)
        assert server.complete(TEXTS[0], cache_prompt=False)["timings"]["pruned_n"] > 20


def test_layers_that_only_read_a_shared_cache_are_skipped_without_a_key(shared_cache_models, tmp_path):
    with serve(shared_cache_models["gemma4"].gguf, tmp_path / "log.txt", "--threads", 1, "--context", 256) as server:
        assert server.get("/props")["pop"] == {"boundary": 5, "n_layer": 10}


EMPTY = [
    ("/completion", {"prompt": ""}),
    ("/completion", {"prompt": ["", "The cat"]}),
    ("/completion", {"prompt": [[], [5]]}),
    ("/v1/completions", {"prompt": "", "n": 2}),
    ("/v1/completions", {"prompt": "", "stream": True, "n": 2}),
    ("/v1/chat/completions", {"messages": []}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}]}),
    ("/v1/responses", {"input": ""}),
    ("/tokenize", {"content": ""}),
    ("/detokenize", {"tokens": []}),
]


def serve_with_bos(model, directory, adds_bos: bool, *options):
    """Serves a copy of the model whose tokenizer adds BOS to a prompt, or does not."""
    path = Path(shutil.copy(model, directory / "model.gguf"))
    reader = gguf.GGUFReader(path, "r+")
    field = reader.get_field("tokenizer.ggml.add_bos_token")
    field.parts[field.data[0]][0] = adds_bos
    reader.data.flush()
    return serve(path, directory / "log.txt", *FOUR_SLOTS, *options)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_empty_prompts_get_an_answer(model, tmp_path, adds_bos):
    """Without BOS a prompt has no token, and several answers to it waited for ever."""
    with serve_with_bos(model, tmp_path, adds_bos) as server:
        for path, body in EMPTY:
            status, text, _ = ask(server, path, json.dumps({"max_tokens": 2, "n_predict": 2, **body}).encode())
            assert status == 200, (path, body, text)
        assert ask(server, "/completion", b'{"prompt": []}')[0] == 400
        assert server.complete("The cat", n_predict=2)["tokens_predicted"] == 2


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "last", "none"])
def test_embedding_of_an_empty_text_is_that_of_bos_or_refused(model, tmp_path, adds_bos, pooling):
    with serve_with_bos(model, tmp_path, adds_bos, "--embeddings", "--pooling", pooling) as server:
        for path, key in (("/embedding", "content"), ("/v1/embeddings", "input")):
            for text, expected in (("", adds_bos), (["", "The cat"], adds_bos), ([], False)):
                if pooling == "none" and path == "/v1/embeddings":
                    expected = False  # which OpenAI's format cannot hold
                status, answer, _ = ask(server, path, json.dumps({key: text}).encode())
                assert status == (200 if expected else 400), (path, text, answer)
        assert ask(server, "/embedding", b'{"content": "The cat"}')[0] == 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.gguf"], "missing.gguf"),
        (["{model}", "--port", "70000"], "--port 70000 is out of range: give 0 to 65535"),
        (["{model}", "--parallel", "0"], "--parallel 0 is out of range: give 1 to 256"),
        (["{model}", "--api-key-file", "nowhere"], "nowhere: cannot be read"),
    ],
)
def test_bad_arguments_end_in_one_line(model, capsys, arguments, message):
    assert main(["serve", *(argument.format(model=model) for argument in arguments)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_boundary_that_the_model_has_not_is_named(model):
    command = [sys.executable, "-m", "pypop_gguf", "serve", str(model), "--boundary", "13", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "boundary 13 is out of range: choose 1 to 12" in done.stdout + done.stderr


def test_keys_are_asked_for(model, tmp_path):
    (tmp_path / "keys").write_text("open sesame\n")
    with (
        serve(model, tmp_path / "log.txt", "--api-key-file", tmp_path / "keys", *OPTIONS) as server,
        pytest.raises(httpx.HTTPStatusError, match="401"),
    ):
        server.complete(TEXTS[0])
