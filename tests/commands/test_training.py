"""``prepare --train``: an adapter is trained by gradient descent, and costs less in the engine afterwards."""

import contextlib
import itertools
import random
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pypop_gguf import PopError  # noqa: E402 - torch may be missing
from pypop_gguf.cli import main  # noqa: E402
from pypop_gguf.fitting import steps, training, writing  # noqa: E402
from pypop_gguf.fitting.decoder import Decoder  # noqa: E402
from pypop_gguf.fitting.maps import Maps, divergence  # noqa: E402
from pypop_gguf.fitting.measure import Meter  # noqa: E402
from pypop_gguf.fitting.states import reading_states  # noqa: E402
from pypop_gguf.fitting.texts import chat_frame, encode_chat, read_prompts  # noqa: E402
from pypop_gguf.gguf_files.adapters import find_adapters  # noqa: E402
from pypop_gguf.quality.score import log_softmax  # noqa: E402
from tests.support.engine import F32, Engine  # noqa: E402
from tests.support.pop_reference import squared_error  # noqa: E402
from tests.support.scaled_adapter import write_scaled  # noqa: E402

BOUNDARY = 6


@pytest.fixture(scope="module")
def fitted(served_gguf, tmp_path_factory):
    """The served model, its closed-form adapter and some of the bundled prompts."""
    adapter = tmp_path_factory.mktemp("fitted") / "adapter.gguf"
    llm = steps.open_whole(served_gguf, 1)
    prompts = read_prompts(llm, None, 200)[0][:60]
    steps.fit(llm, served_gguf, prompts, {BOUNDARY: adapter})
    yield llm, adapter, prompts
    llm.close()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_pytorch_computes_what_the_engine_computes(reference_models, name):
    model = reference_models[name]
    tokens = model.tokens(30)
    decoder = Decoder(model.gguf, "cpu")
    nothing = torch.zeros(0, decoder.heads, decoder.head_width)
    with torch.no_grad():
        last = decoder.run([decoder.embedded(tokens)], [0], [[(nothing, nothing)]] * decoder.n_layer)
        found = decoder.log_probabilities(last)[-1].numpy()
    with Engine(model.gguf, n_gpu_layers=0, type_k=F32, type_v=F32) as engine:
        expected = log_softmax(engine.prefill(tokens)[None])[0]
    assert squared_error(found, expected) <= 1e-9


def test_divergence_in_pytorch_is_that_of_the_engine_before_and_after_training(
    served_gguf, fitted, tmp_path, monkeypatch
):
    llm, _, prompts = fitted
    # A fit leaves so little to learn for a model as small as this that a few steps need not help.
    adapter = write_scaled(tmp_path / "adapter.gguf", served_gguf, BOUNDARY, factor=0.9)
    trained = Path(shutil.copy(adapter, tmp_path / "trained.gguf"))
    monkeypatch.setattr(training, "WARM_UP", 5)
    line = training.train(llm, served_gguf, trained, prompts, minutes=0.5, n_threads=1)
    assert trained.read_bytes() != adapter.read_bytes(), line
    decoder = Decoder(served_gguf, "cpu", BOUNDARY)
    costs = {}
    for file in (adapter, trained):
        meter, maps = Meter(llm, {BOUNDARY: file}), Maps(decoder, file)
        engine, pytorch = [], []
        for prompt in prompts[:: _step(prompts)]:
            engine.append(meter.measure(prompt, 16)[BOUNDARY].fitted.kl)
            answer = meter.answer(prompt, 16)
            with reading_states(llm, decoder, BOUNDARY, maps.inputs) as reader:
                text = reader.read(prompt, answer)
            maps.begin([text])
            with torch.no_grad():
                pytorch.append(float(divergence(decoder, maps, [text], maps.learned())))
        assert np.mean(pytorch) == pytest.approx(np.mean(engine), rel=0.1)
        costs[file] = np.mean(engine)
    assert costs[trained] < costs[adapter], line


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def test_the_frame_is_what_prompts_of_one_message_share(fitted, monkeypatch):
    llm, *_ = fitted
    monkeypatch.setitem(llm.metadata, "tokenizer.chat_template", TEMPLATE)
    opening, ending = chat_frame(llm)
    assert llm.detokenize(opening).strip() == b"<user>" and llm.detokenize(ending).endswith(b"assistant>")
    prompt = encode_chat(llm, [{"role": "user", "content": "Once there was a dog."}], 100)
    assert prompt[: len(opening)] == opening and prompt[-len(ending) :] == ending


@pytest.mark.parametrize("ending", [[301, 302], []], ids=["with an ending", "without one"])
def test_written_texts_are_greedy_answers_to_given_prompts_and_to_prompts_in_the_same_frame(fitted, ending):
    llm, _, prompts = fitted
    opening, given = [prompts[0][0], 300], [*prompts[:6], (prompts[0] * 40)[: llm.n_batch - writing.ANSWER]]
    too_long = (prompts[0] * 40)[: llm.n_batch]
    with contextlib.closing(writing.Author(llm, [*given, too_long], (opening, ending))) as author:
        texts = list(itertools.islice(author.write(time.monotonic() + 60, random.Random(0)), 36))
    assert sorted(prompt for prompt, _ in texts if prompt in given) == sorted(given)
    for prompt, answer in texts:
        assert len(prompt) in range(2, llm.n_batch - writing.ANSWER + 1)
        logits = llm.score(prompt, answer, pop=False)
        chosen = logits[range(len(answer)), answer]
        assert np.all(logits.max(1) - chosen < 0.05), "an answer is not the likeliest, but for rounding"
        assert len(answer) == writing.ANSWER or answer[-1] == llm.token_eos()
    own = [prompt for prompt, _ in texts if prompt not in given]
    assert all(prompt[len(prompt) - len(ending) :] == ending for prompt in own)
    assert any(prompt[:2] == opening for prompt in own)  # from the beginning
    assert any(prompt[:8] in [one[:8] for one in given] for prompt in own)  # from a piece of a given one


def test_parts_and_several_texts_at_once_are_read_as_if_each_were_all(served_gguf, fitted):
    llm, adapter, prompts = fitted
    decoder = Decoder(served_gguf, "cpu", BOUNDARY)
    maps = Maps(decoder, adapter)
    with reading_states(llm, decoder, BOUNDARY, maps.inputs) as reader:
        long, short = reader.read(prompts[0][:20], prompts[0][20:40]), reader.read(prompts[0][:15], prompts[0][15:31])
    maps.begin([long])
    with torch.no_grad():
        costs = [float(divergence(decoder, maps, [x], maps.learned())) for x in (long.part(13, 29), short)]
        texts = [long.part(13, 29), long.part(7, 30), short]
        together = float(divergence(decoder, maps, texts, maps.learned()))
        apart = [float(divergence(decoder, maps, [x], maps.learned())) for x in texts]
    assert costs[0] == pytest.approx(costs[1], rel=1e-3)
    assert together == pytest.approx(np.mean(apart), rel=1e-5)


def _step(prompts) -> int:
    return max(1, len(prompts) // 8)


def test_training_that_does_not_help_leaves_the_adapter(served_gguf, fitted, tmp_path, monkeypatch):
    llm, adapter, prompts = fitted
    copy = tmp_path / "copy.gguf"
    shutil.copy(adapter, copy)
    monkeypatch.setattr(training, "LEARNING_RATE", 1.0)
    line = training.train(llm, served_gguf, copy, prompts[:20], minutes=0.05, n_threads=1)
    assert line.endswith("the adapter stays as it was fitted")
    assert copy.read_bytes() == adapter.read_bytes()


def test_prompts_that_leave_little_room_are_trained_on(served_gguf, fitted, tmp_path):
    llm, adapter, prompts = fitted
    copy = Path(shutil.copy(adapter, tmp_path / "copy.gguf"))
    long = [(prompt * 40)[: llm.n_batch - writing.ANSWER - i] for i, prompt in enumerate(prompts[:5])]
    assert training.train(llm, served_gguf, copy, [*long, *prompts[:15]], 0.01, 1).startswith("trained on ")


def test_prepare_trains_and_writes(served_gguf, short_texts, tmp_path, capsys):
    target = tmp_path / "out.gguf"
    command = ["prepare", str(served_gguf), "--outfile", str(target), "--boundary", "6", "--text", str(short_texts)]
    assert main([*command, "--train", "0.05", "--samples", "2", "--threads", "1"]) == 0
    assert "trained on " in capsys.readouterr().out
    assert list(find_adapters(target)) == [6]


def test_prepare_trains_below_the_lowest_boundary_within_the_budget(served_gguf, short_texts, tmp_path, capsys):
    target = tmp_path / "out.gguf"
    command = ["prepare", str(served_gguf), "--outfile", str(target), "--text", str(short_texts), "--samples", "2"]

    def run(*options: str) -> tuple[str, list[tuple[int, float]]]:
        assert main([*command, "--threads", "1", *options]) == 0
        out = capsys.readouterr().out
        rows = re.findall(r"(\d+) of 12 .+ (\d\.\d+)  +\S+ -> ", out)
        return out, [(int(boundary), float(fitted)) for boundary, fitted in rows]

    _, fitted = run("--max-kl", "100")
    budget = fitted[0][1] + 0.0001  # The table has four decimals.
    within = min(boundary for boundary, kl in fitted if kl <= budget)
    expected = max(boundary for boundary, _ in fitted if boundary < within)
    out, trained = run("--max-kl", str(budget), "--train", "0.05")
    assert f"boundary {expected}: trained on " in out
    assert [boundary for boundary, _ in trained] == [boundary for boundary, _ in fitted]
    assert list(find_adapters(target)) == [min(boundary for boundary, kl in trained if kl <= budget)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "0", "--boundary", "6"], "--train 0 is out of range: give minutes, up to 10000"),
        (["--train", "nan", "--boundary", "6"], "--train nan is out of range: give minutes, up to 10000"),
    ],
)
def test_wrong_arguments_are_refused(served_gguf, tmp_path, capsys, options, message):
    assert main(["prepare", str(served_gguf), "--outfile", str(tmp_path / "out.gguf"), *options]) == 1
    assert capsys.readouterr().err.strip().endswith(message)
    assert not list(tmp_path.iterdir())


def test_architectures_that_training_does_not_know_are_refused(reference_models):
    with pytest.raises(PopError, match="training knows llama, qwen2, qwen3, not gemma3: leave --train out"):
        Decoder(reference_models["gemma3"].gguf, "cpu")
    with pytest.raises(PopError, match=r"training does not know layers without blk\.0\.ffn_down\.weight"):
        Decoder(reference_models["mixtral"].gguf, "cpu")
