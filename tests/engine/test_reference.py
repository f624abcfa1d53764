"""The engine gives what POP in PyTorch gives: at every boundary, in one batch and in many, in all kinds of caches."""

import llama_cpp
import numpy as np
import pytest

from pypop_gguf import PopLlama
from tests.support import pop_reference
from tests.support.report import report

pytestmark = pytest.mark.usefixtures("continuation")

NAMES = ["llama", "qwen3", "gemma3", "mixtral", "deepseek2", "lfm2", "bundled"]
N_PROMPT, N_TOKENS = 70, 74
F32 = 0  # ggml type
ONE_THREAD = dict(n_threads=1, n_threads_batch=1, verbose=False)  # tiny models lose time with a second thread


def engine_logits(path, tokens, n_prompt, boundary, last_alone=False, **options) -> np.ndarray:
    """Logits of the last prompt token and of every token after it, F32 [T - N + 1, n_vocab].

    ``last_alone`` puts the last prompt token in a batch of its own, as POP does without continuation.
    """
    llm = PopLlama(str(path), pop_boundary=boundary, n_ctx=256, **ONE_THREAD, **options)
    parts = [tokens[: n_prompt - 1], tokens[n_prompt - 1 : n_prompt]] if last_alone else [tokens[:n_prompt]]
    rows = []
    for part in [*parts, *([token] for token in tokens[n_prompt:])]:
        llm.eval(part)
        rows.append(last_logits(llm))
    llm.close()
    return np.stack(rows[len(parts) - 1 :])


def error_against_whole_model(pruned, path, tokens, n_layer, **options) -> float:
    """Compares with the whole model, once with the prompt in one batch and once with its last token in another.

    The smaller error counts, because random models amplify even the rounding of another batch size, up to 1e-7.
    """
    whole = (engine_logits(path, tokens, N_PROMPT, n_layer, last_alone=alone, **options) for alone in (False, True))
    return min(pop_reference.squared_error(pruned, logits) for logits in whole)


def last_logits(llm) -> np.ndarray:
    pointer = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),)).copy()


def boundaries(model):
    return range(1, len(model.layers) + 1)


@pytest.mark.parametrize("n_batch", [512, 16], ids=["one-chunk", "many-chunks"])
@pytest.mark.parametrize("name", NAMES)
def test_every_boundary_equals_pytorch(reference_models, name, n_batch):
    model = reference_models[name]
    tokens = model.tokens(N_TOKENS)
    n_layer, errors = len(model.layers), {}
    full = pop_reference.logits(model.torch_model, model.layers, tokens, n_layer, N_PROMPT)
    for boundary in boundaries(model):
        expected = pop_reference.logits(model.torch_model, model.layers, tokens, boundary, N_PROMPT)
        actual = engine_logits(
            model.gguf, tokens, N_PROMPT, boundary, n_batch=n_batch, type_k=F32, type_v=F32, flash_attn=False
        )
        errors[boundary] = error = pop_reference.squared_error(actual, expected)
        assert error <= 1e-6, f"boundary {boundary}"
        if boundary < n_layer - 1:  # the test can distinguish POP from the whole model
            assert pop_reference.squared_error(full, expected) > 100 * error, f"boundary {boundary}"
    whole = errors.pop(n_layer)
    for boundary, error in errors.items():
        report(model=name, boundary=boundary, error=error, whole=whole)


# llama.cpp's flash attention sums the values for a single token in 16 bits.
@pytest.mark.parametrize(("flash_attn", "bound"), [(False, 1e-5), (None, 5e-5)], ids=["plain", "default"])
@pytest.mark.parametrize("name", NAMES)
def test_default_caches_equal_pytorch(reference_models, name, flash_attn, bound):
    model = reference_models[name]
    tokens = model.tokens(N_TOKENS, seed=1)
    for boundary in boundaries(model):
        expected = pop_reference.logits(model.torch_model, model.layers, tokens, boundary, N_PROMPT)
        actual = engine_logits(model.gguf, tokens, N_PROMPT, boundary, flash_attn=flash_attn)
        assert pop_reference.squared_error(actual, expected) <= bound, f"boundary {boundary}"


@pytest.mark.parametrize("name", NAMES)
def test_boundary_at_last_layer_is_lossless(reference_models, name):
    model = reference_models[name]
    tokens = model.tokens(N_TOKENS, seed=2)
    n_layer, exact = len(model.layers), dict(type_k=F32, type_v=F32, flash_attn=False)
    pruned = engine_logits(model.gguf, tokens, N_PROMPT, n_layer - 1, **exact)
    assert error_against_whole_model(pruned, model.gguf, tokens, n_layer, **exact) <= 1e-9


@pytest.mark.parametrize(("name", "n_writing"), [("gemma3n", 20), ("gemma4", 6)])
def test_lossless_boundary_of_shared_caches_is_low_exact_and_the_default(shared_cache_models, name, n_writing):
    model = shared_cache_models[name]
    tokens = model.tokens(N_TOKENS)
    llm = PopLlama(str(model.gguf), n_ctx=256, verbose=False)
    assert (llm.pop.boundary, llm.pop.source, llm.pop.enabled) == (n_writing - 1, "lossless", True)

    exact = dict(type_k=F32, type_v=F32, flash_attn=False)
    lossless, lower = (
        error_against_whole_model(logits, model.gguf, tokens, llm.pop.n_layer, **exact)
        for logits in (engine_logits(model.gguf, tokens, N_PROMPT, b, **exact) for b in ("lossless", n_writing - 2))
    )
    assert lossless <= (1e-7 if name == "gemma3n" else 1e-9)  # its 30 random layers amplify rounding
    assert lower > 1e-6
