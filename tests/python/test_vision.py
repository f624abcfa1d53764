"""Vision models: the text model gets the pop.* keys, the projector becomes a second file, and the two load together.

The models are tiny and random; ``tests/support/vision_models.py`` makes them.
"""

import base64
import io
import json
import threading
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from PIL import Image

from pypop_gguf import Cancelled, PopError, PopLlama, cli
from pypop_gguf.gguf_files.metadata import read_metadata
from pypop_gguf.llama import llama_cpp
from tests.support.paths import ROOT
from tests.support.pop_reference import squared_error
from tests.support.server import serve
from tests.support.vision_models import convert, gemma3, qwen3vl
from tools import architectures


@pytest.fixture(scope="module", params=[gemma3, qwen3vl], ids=["gemma3", "qwen3vl"])
def converted(request, tmp_path_factory) -> Path:
    """The text model's GGUF, which has the projector beside it."""
    return convert(request.param, tmp_path_factory.mktemp(request.param.__name__))


def test_text_model_and_projector_are_all_that_is_written(converted):
    assert sorted(path.name for path in converted.parent.iterdir()) == ["mmproj-text.gguf", "text.gguf"]
    projector = gguf.GGUFReader(converted.with_name("mmproj-text.gguf"))
    assert projector.get_field("general.type").contents() == "mmproj"
    assert not any(key.startswith("pop.") for key in projector.fields)


def test_text_model_has_boundary_and_importance_of_its_text_layers(converted):
    metadata = read_metadata(converted)
    assert metadata.boundary == 4
    for scores in (metadata.importance_prefill, metadata.importance_decode):
        assert scores.shape == (6,)


def test_text_model_answers_pruned(converted):
    llm = PopLlama(str(converted), n_ctx=128, verbose=False)
    assert (llm.pop.boundary, llm.pop.source) == (4, "file")
    llm.create_completion("The fox lived near the river", max_tokens=4, temperature=0)
    assert llm.timings.pruned_tokens == llm.timings.prompt_tokens - 1


def test_projector_loads_with_its_text_model(converted):
    import llama_cpp.mtmd_cpp as mtmd

    llm = PopLlama(str(converted), n_ctx=128, verbose=False)
    parameters = mtmd.mtmd_context_params_default()
    parameters.use_gpu = parameters.warmup = False
    context = mtmd.mtmd_init_from_file(bytes(converted.with_name("mmproj-text.gguf")), llm.model, parameters)
    assert context
    assert mtmd.mtmd_support_vision(context)
    mtmd.mtmd_free(context)


def _url(image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def image_url(colour) -> str:
    return _url(Image.new("RGB", (56, 56), colour))


def photo_url(seed: int) -> str:
    """An image that is wider than high, and of which no two parts are alike."""
    return _url(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (112, 168, 3), np.uint8)))


class Spy:
    """Takes the place of a handler's ``mtmd_cpp`` and notes what is encoded, and what the text model then reads."""

    def __init__(self, handler) -> None:
        self._mtmd, handler._mtmd_cpp = handler._mtmd_cpp, self
        self.encoded = 0  # number of images
        self.read = []  # micro-batches of images: embeddings F32 [n, n_embd_inp], positions I32 [n_pos_per_embd, n]

    def __getattr__(self, name: str):
        return getattr(self._mtmd, name)

    def mtmd_encode_chunk(self, context, chunk) -> int:
        self.encoded += 1
        return self._mtmd.mtmd_encode_chunk(context, chunk)

    def mtmd_helper_decode_image_chunk(self, *arguments) -> int:
        *before, callback, data = arguments

        @self._mtmd.mtmd_helper_post_decode_callback
        def note(batch, data) -> int:
            piece = batch.contents
            embeddings = np.ctypeslib.as_array(piece.embd, shape=(piece.n_tokens, piece.n_embd)).copy()
            self.read.append((embeddings, np.ctypeslib.as_array(piece.pos, shape=(piece.n_pos, piece.n_tokens)).copy()))
            return callback(batch, data)

        return self._mtmd.mtmd_helper_decode_image_chunk(*before, note, data)


def open_model(path, **options) -> tuple[PopLlama, Spy]:
    handler = llama_cpp.llama_chat_format.MTMDChatHandler(str(path.with_name("mmproj-text.gguf")), verbose=False)
    options = dict(n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False, **options)
    return PopLlama(str(path), chat_handler=handler, **options), Spy(handler)


def message(question: str, *urls: str) -> list:
    parts = [{"type": "text", "text": "Look: "}, *({"type": "image_url", "image_url": {"url": url}} for url in urls)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def ask(llm, url, question, **options):
    done = llm.create_chat_completion(message(question, url), max_tokens=6, temperature=0, **options)
    return done["choices"][0]["message"]["content"], done["timings"]


def prompt_pieces(llm: PopLlama, spy: Spy, images_whole: bool) -> list[tuple]:
    """What the text model has read, without the last token, in the form that ``image_worker.py`` takes.

    Each piece is its values, their positions, and whether every layer has read it.
    """
    pieces, at, last = [], 0, llm.timings.prompt_tokens - 1
    for values, pos in [*spy.read, (None, np.array([[last]]))]:
        while at < pos[0, 0]:  # text, in pieces that were read by the same layers
            read = llm._record.boundaries[at : pos[0, 0]] == llm.pop.n_layer
            n = int(np.flatnonzero(np.append(read != read[0], True))[0])
            pieces.append((llm.input_ids[at : at + n].astype(np.int32), np.arange(at, at + n), bool(read[0])))
            at += n
        if values is not None:
            pieces.append((values, pos, images_whole))
            at = pos.max() + 1
    return pieces


def test_every_boundary_equals_what_stock_makes_of_images_and_text(converted, stock, tmp_path):
    """Stock reads the same text and embeddings in a copy of the text model whose upper layers are the identity."""
    gemma = "gemma3" in converted.parts[-3]  # each token of its images sees all others, and such images are not pruned
    follow, rows = [300, 1700, 29], []

    def keep(_ids, scores):
        rows.append(scores.copy())
        chosen = np.full_like(scores, -np.inf)
        chosen[[*follow, 0][len(rows) - 1]] = 0  # so that every boundary has the same tokens after the prompt
        return chosen

    images = message(" Which colour has the ball?", photo_url(0), photo_url(1))
    actual, n_pruned = {}, {}
    for boundary in (6, 5, 4, 3, 2, 1):
        llm, spy = open_model(converted, pop_boundary=boundary, type_k=0, type_v=0, flash_attn=False, n_ubatch=16)
        rows.clear()
        processors = llama_cpp.LogitsProcessorList([keep])
        llm.create_chat_completion(images, max_tokens=len(follow) + 1, temperature=0, logits_processor=processors)
        actual[boundary], n_pruned[boundary] = np.stack(rows), llm.timings.pruned_tokens
        pieces, last = prompt_pieces(llm, spy, images_whole=gemma), llm.input_ids[llm.timings.prompt_tokens - 1]
        llm.close()
    assert (
        n_pruned[5] == n_pruned[1] == sum(len(values) for values, _, whole in pieces if not whole) > 40
        and n_pruned[6] == 0
    )
    prompt = {
        f"{name}{i}": part for i, piece in enumerate(pieces) for name, part in zip(("values", "pos", "whole"), piece)
    }
    prompt |= dict(n_pieces=len(pieces), first=pieces[-1][1].max() + 1, follow=[last, *follow])

    for boundary in actual:
        architectures.identity_copy(converted, boundary, tmp_path / f"{boundary}.gguf")
    copies = [f"{boundary}={tmp_path / f'{boundary}.gguf'}" for boundary in actual]
    worker = (ROOT / "tests" / "support" / "image_worker.py").read_text()
    expected = {}
    for causal in (not gemma, gemma):
        np.savez(tmp_path / "prompt.npz", causal=causal, **prompt)
        stock(worker, converted, tmp_path / "prompt.npz", tmp_path / "out.npz", *copies)
        expected[causal] = dict(np.load(tmp_path / "out.npz"))
    right, wrong = expected[not gemma], expected[gemma]
    for boundary, logits in actual.items():
        error = squared_error(logits, right[str(boundary)])
        assert error <= 1e-7, f"boundary {boundary}"  # batches have other shapes, and ggml's GELU is a table in F16
        assert squared_error(logits, wrong[str(boundary)]) > 1e-6  # the mask of the images matters
        if boundary < 5:  # pruning changes the logits, so the test would notice if it were missing
            assert squared_error(actual[6], right[str(boundary)]) > max(1e-5, 100 * error), f"boundary {boundary}"


def test_second_question_about_an_image_reads_neither_it_nor_what_stands_before_it(converted):
    red, blue = image_url((255, 0, 0)), image_url((0, 80, 255))

    def open_lossless():
        # The last boundary is lossless, so what was read for one question is exact for the next.
        return open_model(converted, pop_boundary=5)

    def fresh(*arguments, **options):
        llm, spy = open_lossless()
        answer, _ = ask(llm, *arguments, **options)
        assert spy.encoded == 1
        llm.close()
        return answer

    llm, spy = open_lossless()
    first, timings = ask(llm, red, " Which colour has the ball?")
    assert spy.encoded == 1
    assert timings["cache_n"] == 0 and timings["pruned_n"] > 10 and first == fresh(red, " Which colour has the ball?")
    second, timings = ask(llm, red, " Where is the dog?")
    image_and_begin = timings["cache_n"]
    assert spy.encoded == len(spy.read) == 1  # neither encoded nor read again
    assert image_and_begin >= 6 and second == fresh(red, " Where is the dog?")
    other, timings = ask(llm, blue, " Where is the dog?")
    assert spy.encoded == 2
    assert 0 < timings["cache_n"] < image_and_begin and other == fresh(blue, " Where is the dog?")
    deeper, timings = ask(llm, blue, " Where is the dog?", pop=False)
    assert deeper == fresh(blue, " Where is the dog?", pop=False)
    text = llm.create_completion("Once upon a time", max_tokens=4, temperature=0)["choices"][0]["text"]
    alone, _ = open_lossless()
    assert text == alone.create_completion("Once upon a time", max_tokens=4, temperature=0)["choices"][0]["text"]
    alone.close()
    shallow, timings = ask(llm, blue, " Where is the dog?", boundary=2)
    assert timings["pruned_n"] > 10 and shallow == fresh(blue, " Where is the dog?", boundary=2)
    encoded = spy.encoded
    deeper, timings = ask(llm, blue, " Where is the dog?")
    assert timings["cache_n"] <= 1  # fewer layers had read all but the first token
    assert deeper == fresh(blue, " Where is the dog?")
    assert spy.encoded == encoded + 1
    llm.close()


def test_call_with_an_image_is_cancelled_between_its_parts_and_leaves_the_model_usable(converted):
    question = " Which colour has the ball?"
    llm, spy = open_model(converted, pop_boundary=5, n_ubatch=16)
    calls = []
    whole, _ = ask(llm, photo_url(0), question, progress=lambda *at: calls.append(at))
    total = llm.timings.prompt_tokens
    assert calls == sorted(calls) and calls[-1] == (total, total) and {of for _, of in calls} == {total}
    # Progress is told twice for an image's first position: before the image is encoded and after.
    first_encoded = next(i for i in range(1, len(calls)) if calls[i] == calls[i - 1])
    n_pieces = len(spy.read)
    assert n_pieces == (1 if "gemma3" in converted.parts[-3] else 2) and len(calls) > first_encoded + n_pieces
    for stop_at in range(len(calls)):
        llm.reset()
        seen, encoded = [], spy.encoded

        def stop(*at, seen=seen, stop_at=stop_at):
            seen.append(at)
            return len(seen) <= stop_at

        with pytest.raises(Cancelled) as caught:
            ask(llm, photo_url(0), question, progress=stop)
        assert seen == calls[: stop_at + 1] and spy.encoded - encoded == (stop_at >= first_encoded)
        assert (caught.value.done, caught.value.total) == (llm.n_tokens, total)
        assert (
            caught.value.done
            == calls[first_encoded if first_encoded < stop_at < first_encoded + n_pieces else stop_at][0]
        )
        again, timings = ask(llm, photo_url(0), question)
        assert again == whole and timings["cache_n"] == min(caught.value.done, total - 1)
    event = threading.Event()
    with pytest.raises(Cancelled):
        ask(llm, photo_url(1), question, cancel=event, progress=lambda done, _: done and event.set())
    assert spy.encoded - encoded == 1  # the second image was not encoded
    assert ask(llm, photo_url(0), question)[0] == whole
    llm.close()


@pytest.mark.parametrize("converted", [gemma3], indirect=True, ids=["gemma3"])
def test_micro_batch_that_an_image_does_not_fit_into_is_refused_in_one_line(converted):
    """llama.cpp would end the process instead."""
    llm, _ = open_model(converted, n_ubatch=2)
    with pytest.raises(
        PopError,
        match="4 tokens that are read at once: open the model with n_batch and n_ubatch of 4 or more "
        r"\(now 256 and 2\)",
    ):
        ask(llm, photo_url(0), " Which colour has the ball?")
    assert llm.create_completion("Once upon a time", max_tokens=2)["choices"]
    llm.close()


@pytest.mark.parametrize("boundary", [5, 2])
def test_server_answers_about_an_image_as_popllama_does(converted, tmp_path, boundary):
    """Each begins with an empty cache. Boundary 5 is lossless; at 2 the answers differ from the whole model's."""
    options = (
        "--threads",
        1,
        "--context",
        256,
        "--parallel",
        1,
        "--boundary",
        boundary,
        "--mmproj",
        converted.with_name("mmproj-text.gguf"),
    )
    raw = ("--server-options", "-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-mmproj-offload")
    questions, found = [" Which colour has the ball?", " Where is the dog?"], {}
    with serve(converted, tmp_path / "log.txt", *options, *raw) as server:
        for question in questions:
            for pop in (True, False):
                body = dict(
                    messages=message(question, photo_url(0)), max_tokens=6, temperature=0, cache_prompt=False, pop=pop
                )
                done = server.post("/v1/chat/completions", **body)
                found[question, pop] = done["choices"][0]["message"]["content"], done["timings"]
    llm, _ = open_model(converted, pop_boundary=boundary, type_k=0, type_v=0, flash_attn=False)
    for (question, pop), (text, timings) in found.items():
        llm.reset()
        expected, ours = ask(llm, photo_url(0), question, pop=pop, repeat_penalty=1.0)
        assert text.strip() == expected.strip() and timings["boundary"] == (boundary if pop else 6)
        assert (timings["pruned_n"] > 10) == (ours["pruned_n"] > 10) == pop and timings["cache_n"] == 0
    assert boundary == 5 or any(found[question, True][0] != found[question, False][0] for question in questions)
    llm.close()


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_server_completes_every_turn_beside_a_projector(converted, tmp_path, image):
    """A request for all layers then reads only what is new, and its answer is that of a fresh slot."""
    if image and "gemma3" in str(converted):
        pytest.skip("the tokens of a Gemma 3 image attend to later ones, so they cannot be completed")
    options = ("--threads", 1, "--context", 512, "--parallel", 2, "--boundary", 3, "--complete", "idle", "--mmproj")
    raw = ("--server-options", "-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-mmproj-offload", "--swa-full")
    messages = message(" Which colour has the ball?", *([photo_url(0)] if image else []))
    with serve(
        converted, tmp_path / "log.txt", *options, converted.with_name("mmproj-text.gguf"), *raw, "--cache-ram", 0
    ) as server:

        def chat(**fields) -> tuple[str, dict]:
            body = dict(messages=messages, max_tokens=4, temperature=0, **fields)
            done = server.post("/v1/chat/completions", **body)
            return done["choices"][0]["message"]["content"], done["timings"]

        for question in (" And the dog?", " Where is it?", " Why?"):
            answer, timings = chat(id_slot=0)
            assert timings["pruned_n"] > 1
            deadline = time.monotonic() + 60
            while server.get("/slots")[0]["n_incomplete"]:
                assert time.monotonic() < deadline, "the server completes nothing"
                time.sleep(0.02)
            n_read = timings["cache_n"] + timings["prompt_n"]
            messages += [dict(role="assistant", content=answer), dict(role="user", content=question)]
        answer, timings = chat(id_slot=0, pop=False)
        assert timings["cache_n"] >= n_read - 4  # the template ends in " She said:", which the next turn lacks
        assert answer == chat(id_slot=1, pop=False, cache_prompt=False)[0]


IMAGE_TASK = """\
task: look
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_image: !function look.images
doc_to_target: answer
process_results: !function look.results
generation_kwargs: {{until: ["<|endoftext|>"], max_gen_toks: 6}}
metric_list: [{{metric: same, aggregation: mean, higher_is_better: true}}]
"""
IMAGE_CODE = """\
from PIL import Image
def images(doc):
    return [Image.new("RGB", (56, 56), tuple(colour)) for colour in doc["colours"]]
def results(doc, answers):
    return {"same": float(answers[0] == doc["answer"])}
"""


@pytest.mark.slow
@pytest.mark.parametrize("converted", [qwen3vl], indirect=True, ids=["qwen3vl"])
def test_harness_tasks_with_images_reach_the_projector(converted, tmp_path, capsys):
    """The task has MMMU's format: <image> marks in the text, and the images beside it.

    The right answers are the model's own, so the whole model scores 1.
    """
    pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[eval]' in the source tree"
    )
    from pypop_gguf.quality import lm_eval as lm_eval_model

    projector = converted.with_name("mmproj-text.gguf")
    handler = llama_cpp.llama_chat_format.MTMDChatHandler(str(projector), verbose=False)
    llm = PopLlama(
        str(converted), n_ctx=256, n_batch=256, chat_handler=handler, n_threads=1, n_threads_batch=1, verbose=False
    )
    model, options = lm_eval_model.PopLM(llm, 6), {"until": ["<|endoftext|>"], "max_gen_toks": 6}
    documents = []
    for colour in ((255, 0, 0), (0, 80, 255)):
        question = "Which colour has the <image> ball of Lily?"
        answer = model._generate(question, options, {"visual": [Image.new("RGB", (56, 56), colour)]})
        documents.append({"question": question, "colours": [colour], "answer": answer})
    llm.close()
    assert documents[0]["answer"] != documents[1]["answer"]  # the answer depends on the image
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tmp_path / "look.yaml").write_text(IMAGE_TASK.format(data=tmp_path / "data.jsonl"))
    (tmp_path / "look.py").write_text(IMAGE_CODE)
    command = [
        "eval",
        str(converted),
        "--lm-eval",
        "look",
        "--task-dir",
        str(tmp_path),
        "--context",
        "256",
        "--threads",
        "1",
        "--json",
    ]
    assert cli.main([*command, "--mmproj", str(projector), "--boundary", "1"]) == 0
    found = json.loads(capsys.readouterr().out)["lm_eval"]
    assert found["6"]["look"]["same,none"] == 1.0 and found["1"]["look"]["same,none"] < 1.0
    assert cli.main([*command, "--boundary", "1"]) == 1
    assert "multimodal" in capsys.readouterr().err
