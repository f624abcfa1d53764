"""Completion: the layers that pruned tokens have skipped run later, and the cache is then the whole model's."""

import ctypes
import threading
import time

import numpy as np
import pytest

from pypop_gguf import PopError, native
from tests.support.engine import F16, Q8_0, Engine, llama_cpp
from tests.support.pop_reference import squared_error

TOLERANCE = 1e-9
COMPLETED = ["llama", "qwen3", "gemma3", "mixtral", "deepseek2", "bundled"]
# ggml's GELU reads a table of F16 numbers, where the last bit of a sum can lead to the next entry. Mixtures show it.
ROUGH = {"gemma3": 1e-8, "gemma4": 1e-7}
N_PROMPT, N_GENERATED = 90, 8
COMPLETE = 2**31 - 1


def engine(model, boundary, states="f32", **parameters):
    result = Engine(model.gguf, boundary, **{"swa_full": True, **parameters})
    if states != "off":
        native.set_completion(result.context, states)
    return result


def n_incomplete(engine, sequence=0) -> int:
    return native.n_incomplete(engine.context, sequence)


def complete(engine, n_max=COMPLETE, sequence=0) -> int:
    return native.complete(engine.context, n_max, sequence)


def generate(engine, tokens, n_generated=N_GENERATED, sequence=0, first=0) -> np.ndarray:
    """Reads a prompt and then tokens one by one, and returns the logits of the last one."""
    logits = engine.prefill(tokens[:-n_generated], sequence, first)
    for i, token in enumerate(tokens[-n_generated:]):
        logits = engine.step(token, first + len(tokens) - n_generated + i, sequence)
    return logits


def continuation(engine, first, sequence=0) -> np.ndarray:
    return np.array([engine.step(token, first + i, sequence) for i, token in enumerate((5, 9, 17, 3))])


def boundaries(model) -> range:
    with Engine(model.gguf) as opened:
        return range(1, native.n_layer(opened.model))


@pytest.mark.parametrize("chunk", [5, 16, 64])
@pytest.mark.parametrize("name", [*COMPLETED, "gemma4"])
def test_a_completed_cache_is_the_whole_models_at_every_boundary(reference_models, shared_cache_models, name, chunk):
    model = {**reference_models, **shared_cache_models}[name]
    tokens = model.tokens(N_PROMPT + N_GENERATED)
    n_ubatch = max(16, chunk)
    with Engine(model.gguf, n_ubatch=n_ubatch, swa_full=True) as whole:
        generate(whole, tokens)
        state, expected = whole.state(), continuation(whole, len(tokens))
        lossless = native.lossless_boundary(whole.model)
    for boundary in boundaries(model):
        with engine(model, boundary, n_ubatch=n_ubatch) as pruned:
            assert native.completes(pruned.context)
            last = generate(pruned, tokens)
            if boundary >= lossless:
                assert n_incomplete(pruned) == 0 and pruned.n_pruned > 0
                continue
            assert pruned.state() != state
            n = n_incomplete(pruned)
            assert n == len(tokens)  # generated tokens and the prompt's last one have attended to pruned ones
            while n:
                assert complete(pruned, chunk) == min(chunk, n)
                n -= min(chunk, n)
                assert n_incomplete(pruned) == n
            assert np.array_equal(pruned.logits(-1), last)  # what was decoded before can still be read
            assert native.n_lost(pruned.context) == 0 and complete(pruned) == 0
            assert squared_error(continuation(pruned, len(tokens)), expected) <= TOLERANCE, boundary


def test_the_states_of_a_completed_cache_are_bit_for_bit_those_of_the_whole_model(reference_models):
    model = reference_models["bundled"]
    tokens = model.tokens(N_PROMPT)
    with Engine(model.gguf, n_ubatch=16) as whole, engine(model, 4) as pruned:
        whole.prefill(tokens)
        pruned.prefill(tokens)
        assert pruned.state() != whole.state()
        complete(pruned)
        assert pruned.state() == whole.state()
