"""Log-probabilities and echoes of completions. PyTorch, or arithmetic on its logits, tells the right values."""

import llama_cpp
import numpy as np
import pytest

from pypop_gguf import PopError, PopLlama
from tests.support import tiny_models

TEXT = "Once upon a time there was a fox."
OPTIONS = dict(n_ctx=128, logits_all=True, n_threads=1, n_threads_batch=1, verbose=False)
CALL = dict(max_tokens=6, temperature=0)


@pytest.fixture(scope="module")
def bundled(reference_models, bundled_gguf):
    """The bundled model in PyTorch, and as a GGUF with its tokenizer, in 16 bits."""
    return tiny_models.ReferenceModel("bundled", reference_models["bundled"].torch_model, bundled_gguf)


@pytest.fixture(scope="module", params=[True, False], ids=["with BOS", "without BOS"])
def llm(request, bundled):
    llm = PopLlama(str(bundled.gguf), **OPTIONS, kv_overrides={"tokenizer.ggml.add_bos_token": request.param})
    llm.begins = [llm.token_bos()] if request.param else []
    yield llm
    llm.close()


def torch_logprobs(bundled, tokens):
    """The log-probability of each token after those before it, of the second and all later ones, and all rows."""
    import torch

    with torch.no_grad():
        rows = torch.log_softmax(bundled.torch_model(torch.tensor([tokens])).logits[0], dim=-1).numpy()
    return np.array([rows[i, token] for i, token in enumerate(tokens[1:])]), rows


def generated_by(bundled, tokens, n):
    for _ in range(n):
        tokens = [*tokens, int(torch_logprobs(bundled, tokens)[1][-1].argmax())]
    return tokens


@pytest.mark.parametrize("prompt", ["text", "tokens"])
def test_echoed_prompt_has_the_log_probabilities_of_its_own_tokens(bundled, llm, prompt):
    tokens = llm.begins + llm.tokenize(TEXT.encode(), add_bos=False)
    result = llm.create_completion(TEXT if prompt == "text" else tokens, **CALL, echo=True, logprobs=2)
    choice = result["choices"][0]
    found = choice["logprobs"]
    tokens = generated_by(bundled, tokens, 6)
    expected, rows = torch_logprobs(bundled, tokens)
    shown = tokens[len(llm.begins) :]
    assert len(found["tokens"]) == len(shown) and "".join(found["tokens"]).strip() == choice["text"].strip()
    assert choice["text"].lstrip().startswith(TEXT)  # this tokenizer puts a space before the first word
    # The first shown token has none, as in OpenAI's API; llama-cpp-python does so after a BOS token, too.
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert np.allclose(found["token_logprobs"][1:], expected[-len(shown) + 1 :], atol=2e-2)
    for top, row in zip(found["top_logprobs"][1:], rows[-len(shown) : -1], strict=True):
        assert np.allclose(sorted(top.values(), reverse=True)[:2], np.sort(row)[::-1][:2], atol=2e-2)
    assert found["text_offset"] == np.cumsum([0, *map(len, found["tokens"][:-1])]).tolist()


@pytest.mark.parametrize("stream", [True, False])
def test_generated_tokens_have_their_own_log_probabilities(bundled, llm, stream):
    llm.reset()
    result = llm.create_completion(TEXT, **CALL, logprobs=2, stream=stream)
    chunks = result if stream else [result]
    found = [
        lp for chunk in chunks for lp in (chunk["choices"][0]["logprobs"] or {"token_logprobs": []})["token_logprobs"]
    ]
    tokens = llm.begins + llm.tokenize(TEXT.encode(), add_bos=False)
    expected, _ = torch_logprobs(bundled, generated_by(bundled, tokens, 6))
    assert np.allclose(found, expected[-6:], atol=2e-2)


def test_tokens_after_an_empty_prompt_have_their_own_log_probabilities(bundled, llm):
    if not llm.begins:
        pytest.skip("the prompt has no token")
    llm.reset()
    found = llm.create_completion("", **CALL, logprobs=1, echo=True)["choices"][0]["logprobs"]
    tokens = generated_by(bundled, llm.begins, 6)
    expected, _ = torch_logprobs(bundled, tokens)
    n = len(found["token_logprobs"])
    assert n >= 5 and np.allclose(found["token_logprobs"][1:], expected[1:n], atol=2e-2)


def test_log_probabilities_that_stock_computes_right_are_the_same(llm, bundled, stock):
    if not llm.begins:
        pytest.skip("stock's are wrong")
    code = """
import json, sys, llama_cpp
one = dict(n_threads=1, n_threads_batch=1, verbose=False)
llm = llama_cpp.Llama(sys.argv[1], n_ctx=128, logits_all=True, **one)
answer = []
for options in ({"echo": True}, {}):
    found = llm.create_completion(sys.argv[2], max_tokens=6, temperature=0, logprobs=3, **options)["choices"][0]
    answer.append(json.loads(json.dumps(found, default=float)))
print(json.dumps(answer))
"""
    for options, expected in zip(({"echo": True}, {}), stock(code, bundled.gguf, TEXT), strict=True):
        llm.reset()
        found = llm.create_completion(TEXT, **CALL, logprobs=3, **options)["choices"][0]
        numbers = [one["logprobs"].pop("token_logprobs") for one in (found, expected)]
        tops = [one["logprobs"].pop("top_logprobs") for one in (found, expected)]
        assert found == expected
        assert np.allclose(*(np.array(one, dtype=float) for one in numbers), atol=1e-2, equal_nan=True)
        assert [top and set(top) for top in tops[0]] == [top and set(top) for top in tops[1]]


def test_chat_and_a_generation_that_ends_early_have_log_probabilities(llm):
    llm.reset()
    biased = {llm.token_eos(): 100}
    result = llm.create_completion(TEXT, **CALL, logprobs=1, logit_bias=biased)["choices"][0]
    assert result["finish_reason"] == "stop" and result["logprobs"]["tokens"] == []
    messages = [{"role": "user", "content": "Hello."}]
    answer = llm.create_chat_completion(messages, **CALL, logprobs=True, top_logprobs=2)["choices"][0]
    assert len(answer["logprobs"]["content"]) == 6


def test_log_probabilities_without_kept_logits_are_refused(bundled):
    with PopLlamaClosing(str(bundled.gguf), **{**OPTIONS, "logits_all": False}) as llm:
        for echo in (True, False):
            with pytest.raises(ValueError, match="logits_all=False"):
                llm.create_completion(TEXT, **CALL, echo=echo, logprobs=1)


# Prompts without tokens, and tokens that do not exist


class PopLlamaClosing(PopLlama):
    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.close()


EMPTY = r"^the prompt is empty, and this model adds no token of its own: give at least one token$"


@pytest.mark.parametrize("prompt", ["", []])
def test_empty_prompt_of_a_model_without_bos_is_refused_and_the_next_one_is_answered(llm, prompt):
    if prompt == "" and llm.begins:
        assert llm.create_completion(prompt, **CALL)["usage"]["prompt_tokens"] == 1
        return
    for options in ({}, {"echo": True}, {"echo": True, "logprobs": 1}, {"stream": True}):
        with pytest.raises(PopError, match=EMPTY):
            list(llm.create_completion(prompt, **CALL, **options))
    with pytest.raises(PopError, match=EMPTY):
        next(llm.generate([]))
    assert llm.create_completion(TEXT, **CALL)["usage"]["completion_tokens"] == 6


def test_chat_whose_template_gives_no_text_is_refused(bundled):
    options = {**OPTIONS, "logits_all": False}
    with PopLlamaClosing(str(bundled.gguf), **options, kv_overrides={"tokenizer.ggml.add_bos_token": False}) as llm:
        llm.chat_handler = llama_cpp.llama_chat_format.Jinja2ChatFormatter("", "", "").to_chat_handler()
        with pytest.raises(PopError, match=EMPTY):
            llm.create_chat_completion([{"role": "user", "content": "Hello."}], **CALL)


@pytest.mark.parametrize("token", [-1, 2**30])
def test_token_that_the_model_does_not_have_is_named(llm, token):
    for use in (
        lambda: llm.create_completion([5, token], **CALL),
        lambda: llm.eval([token]),
        lambda: llm.score([5, token], [6, 7]),
        lambda: llm.score([5], [6, token, 7]),
    ):
        with pytest.raises(
            PopError, match=rf"^the model has no token {token}: give numbers from 0 to {llm.n_vocab() - 1}$"
        ):
            use()
    assert llm.create_completion(TEXT, **CALL)["usage"]["completion_tokens"] == 6


def test_nothing_to_sample_from_is_an_error_with_words(llm):
    llm.reset()
    with pytest.raises(PopError, match="there is no token to go on from"):
        llm.sample()
    llm.eval([])


def test_file_without_a_tokenizer_reads_and_writes_no_text(reference_models):
    with PopLlamaClosing(str(reference_models["llama"].gguf), **OPTIONS) as llm:
        for use in (
            lambda: llm.create_completion("Once", **CALL),
            lambda: llm.create_completion([5, 6], **CALL),
            lambda: llm.tokenize(b"Once"),
            lambda: llm.detokenize([5]),
        ):
            with pytest.raises(PopError, match="has no tokenizer, so it reads no text: take a file that has one"):
                use()


# Embeddings


@pytest.mark.parametrize("begins", [True, False])
def test_empty_text_is_embedded_as_its_bos_token_or_refused(bundled, begins):
    options = {**OPTIONS, "logits_all": False, "kv_overrides": {"tokenizer.ggml.add_bos_token": begins}}
    with PopLlamaClosing(str(bundled.gguf), **options, embedding=True, pooling_type=1) as llm:
        expected = llm.embed("a fox")
        if begins:
            assert len(llm.create_embedding("")["data"][0]["embedding"]) == llm.n_embd()
        else:
            for use, named in (
                (lambda: llm.embed(""), "the text"),
                (lambda: llm.create_embedding(""), "text 0"),
                (lambda: llm.embed(["a fox", ""]), "text 1"),
                (lambda: llm.create_embedding(["", "a fox"]), "text 0"),
            ):
                with pytest.raises(PopError, match=f"^{named} is empty, and this model adds no token of its own"):
                    use()
        with pytest.raises(PopError, match="there is nothing to embed: give at least one text"):
            llm.create_embedding([])
        assert np.allclose(llm.embed("a fox"), expected)
        assert np.allclose(llm.embed(iter(["a fox", "a hen"]))[0], expected, atol=1e-3)
