"""A token that is decoded can join a chunk of completion, and both run the upper layers together."""

import contextlib

import numpy as np
import pytest

from pypop_gguf import PopError, native
from tests.engine.test_completion import (
    ALL,
    COMPLETED,
    N_PROMPT,
    TOLERANCE,
    complete,
    engine,
    n_incomplete,
    next_logits,
    whole_engine,
)
from tests.support.engine import F16, Q8_0, llama_cpp
from tests.support.pop_reference import squared_error

CHUNK = 16


def joined_step(engine, token, position, n_max=CHUNK, sequence=0) -> tuple[np.ndarray, int]:
    """Decodes a token that joins a chunk; returns its logits and the number of tokens that were completed."""
    before = native.n_completed(engine.context)
    native.complete_with_next(engine.context, n_max, sequence)
    logits = engine.step(token, position, sequence)
    return logits, native.n_completed(engine.context) - before


@contextlib.contextmanager
def abort_after(engine, n_operations):
    """Aborts what is computed within, after so many operations of the graphs."""
    left = iter(range(n_operations))
    callback = llama_cpp.ggml_abort_callback(lambda _: next(left, None) is None)
    llama_cpp.llama_set_abort_callback(engine.context, callback, None)
    try:
        yield
    finally:
        llama_cpp.llama_set_abort_callback(engine.context, llama_cpp.ggml_abort_callback(), None)


def answers(model, boundary, join, n_steps=12, n_max=CHUNK, **parameters):
    """Yields the logits of each token of an answer and the number of incomplete tokens, each chunk before its token."""
    tokens = model.tokens(N_PROMPT + n_steps)
    with engine(model, boundary, **{"n_ubatch": 32, **parameters}) as pruned:
        pruned.prefill(tokens[:N_PROMPT])
        for i in range(N_PROMPT, len(tokens)):
            if join:
                logits, n_done = joined_step(pruned, tokens[i], i, n_max)
                left = i - n_max * (i - N_PROMPT + 1)
                assert n_done == max(0, min(n_max, left + n_max)), "the token has joined no chunk"
            else:
                complete(pruned, n_max)
                logits = pruned.step(tokens[i], i)
            yield logits, n_incomplete(pruned)
        complete(pruned)
        yield next_logits(pruned, len(tokens)), 0


def assert_as_one_after_the_other(model, boundary, tolerance=TOLERANCE, **parameters) -> None:
    pairs = zip(
        answers(model, boundary, True, **parameters), answers(model, boundary, False, **parameters), strict=True
    )
    for (joined, left), (expected, left_expected) in pairs:
        assert squared_error(joined, expected) <= tolerance, boundary
        assert left == left_expected


@pytest.mark.parametrize("name", [*COMPLETED, "gemma3n", "gemma4"])
def test_a_token_that_joins_a_chunk_gets_the_logits_that_it_gets_behind_the_chunk(
    reference_models, shared_cache_models, name
):
    model = {**reference_models, **shared_cache_models}[name]
    with whole_engine(model) as whole:
        last = min(native.lossless_boundary(whole.model), native.n_layer(whole.model) - 1)
    # ggml reads Gemma's activation function from a table, and the 30 layers of this Gemma 3n add to the rounding
    tolerance = {"gemma3": 1e-7, "gemma3n": 1e-4, "gemma4": 1e-7}.get(name, TOLERANCE)
    for boundary in range(1, last):
        assert_as_one_after_the_other(model, boundary, tolerance)


@pytest.mark.parametrize(
    "parameters",
    [dict(flash_attn_type=1), dict(kv_unified=True, n_seq_max=2), dict(n_seq_max=2), dict(n_ubatch=17)],
    ids=["flash attention", "one stream", "two streams", "small micro-batches"],
)
def test_it_does_so_with_other_parameters(reference_models, parameters):
    assert_as_one_after_the_other(reference_models["bundled"], 4, 1e-5, **parameters)


@pytest.mark.parametrize("cache", [F16, Q8_0])
def test_it_does_so_with_rounded_caches(reference_models, cache):
    assert_as_one_after_the_other(reference_models["bundled"], 4, 1e-4, flash_attn_type=1, type_k=cache, type_v=cache)


def test_an_answer_becomes_the_whole_models(reference_models):
    model = reference_models["llama"]
    tokens = model.tokens(N_PROMPT + 20)
    with whole_engine(model) as whole, engine(model, n_ubatch=32) as pruned:
        whole.prefill(tokens[:N_PROMPT])
        pruned.prefill(tokens[:N_PROMPT])
        errors = [
            squared_error(joined_step(pruned, tokens[i], i)[0], whole.step(tokens[i], i))
            for i in range(N_PROMPT, len(tokens))
        ]
        assert errors[0] > 1e-3
        assert max(errors[N_PROMPT // CHUNK + 1 :]) <= TOLERANCE
        assert n_incomplete(pruned) == 0
        assert squared_error(next_logits(pruned, len(tokens)), next_logits(whole, len(tokens))) <= TOLERANCE


def test_it_also_joins_while_the_boundary_is_off(reference_models):
    model = reference_models["llama"]
    tokens = model.tokens(N_PROMPT + 1)
    with engine(model, n_ubatch=128) as pruned:
        pruned.prefill(tokens[:N_PROMPT])
        native.set_boundary(pruned.context, native.n_layer(pruned.model))
        logits, n_done = joined_step(pruned, tokens[N_PROMPT], N_PROMPT, ALL)
        assert n_done == N_PROMPT and n_incomplete(pruned) == 0
        with whole_engine(model) as whole:
            whole.prefill(tokens[:N_PROMPT])
            assert squared_error(logits, whole.step(tokens[N_PROMPT], N_PROMPT)) <= TOLERANCE
        assert pruned.n_pruned == N_PROMPT - 1


def test_a_batch_that_cannot_join_is_decoded_as_usual(reference_models):
    model = reference_models["llama"]
    tokens = model.tokens(N_PROMPT + 4)
    with engine(model, n_seq_max=2) as pruned, engine(model, n_seq_max=2) as other:
        for each in (pruned, other):
            each.prefill(tokens[:N_PROMPT])
            each.prefill(tokens[:40], 1)
        native.complete_with_next(pruned.context, CHUNK, 1)  # of another sequence
        assert np.array_equal(pruned.step(tokens[N_PROMPT], N_PROMPT), other.step(tokens[N_PROMPT], N_PROMPT))
        native.complete_with_next(pruned.context, CHUNK)  # more than one token
        two = tokens[N_PROMPT + 1 : N_PROMPT + 3]
        assert np.array_equal(pruned.prefill(two, 0, N_PROMPT + 1), other.prefill(two, 0, N_PROMPT + 1))
        native.complete_with_next(pruned.context, 0)  # no token
        assert np.array_equal(pruned.step(tokens[-1], N_PROMPT + 3), other.step(tokens[-1], N_PROMPT + 3))
        assert native.n_completed(pruned.context) == 0
        assert n_incomplete(pruned) == n_incomplete(other) == len(tokens)


def test_a_request_to_join_holds_for_the_next_decode_alone(reference_models):
    model = reference_models["llama"]
    tokens = model.tokens(N_PROMPT + 3)
    with engine(model, n_ubatch=32) as pruned:
        pruned.prefill(tokens[:N_PROMPT])
        joined_step(pruned, tokens[N_PROMPT], N_PROMPT)
        pruned.step(tokens[N_PROMPT + 1], N_PROMPT + 1)
        assert native.n_completed(pruned.context) == CHUNK


def test_a_joined_step_that_is_aborted_loses_its_token_alone(reference_models):
    model = reference_models["llama"]
    tokens = model.tokens(N_PROMPT + 2)
    with engine(model, n_ubatch=128) as pruned, whole_engine(model) as whole:
        pruned.prefill(tokens[:N_PROMPT])
        for n_operations in (1, 40, 80, 120):
            with abort_after(pruned, n_operations):
                native.complete_with_next(pruned.context, CHUNK)
                with pytest.raises(AssertionError, match="llama_decode returned 2"):
                    pruned.step(tokens[N_PROMPT], N_PROMPT)
            assert llama_cpp.llama_memory_seq_pos_max(pruned.memory, 0) == N_PROMPT - 1
            assert n_incomplete(pruned) == N_PROMPT and native.n_completed(pruned.context) == 0
        logits, _ = joined_step(pruned, tokens[N_PROMPT], N_PROMPT, ALL)
        whole.prefill(tokens[:N_PROMPT])
        assert squared_error(logits, whole.step(tokens[N_PROMPT], N_PROMPT)) <= TOLERANCE


def test_wrong_arguments_are_refused(reference_models):
    with engine(reference_models["llama"]) as pruned:
        for n_max, sequence, message in ((-1, 0, "n_max is -1"), (1, 5, "seq_id is 5")):
            with pytest.raises(PopError, match=message):
                native.complete_with_next(pruned.context, n_max, sequence)
    with whole_engine(reference_models["llama"]) as whole, pytest.raises(PopError, match="completion is off"):
        native.complete_with_next(whole.context, 1)
