"""Head and tail of a prompt run every layer, in batches of any size, alone and beside other prompts."""

import numpy as np
import pytest

from pypop_gguf import PopError, PopLlama, native
from tests.support import pop_reference
from tests.support.engine import Engine
from tests.support.pop_reference import squared_error

pytestmark = pytest.mark.usefixtures("continuation")

BOUNDARY, N_PROMPT, N_TOKENS = 3, 40, 44
F32 = 0
NAMES = ["llama", "gemma3", "deepseek2", "lfm2"]


def open_model(model, **options) -> PopLlama:
    exact = dict(type_k=F32, type_v=F32, flash_attn=False, n_threads=1, n_threads_batch=1, n_ctx=256, verbose=False)
    return PopLlama(str(model.gguf), pop_boundary=BOUNDARY, **{**exact, **options})


@pytest.mark.parametrize("n_batch", [512, 16], ids=["one-chunk", "many-chunks"])
@pytest.mark.parametrize(("head", "tail"), [(0, 7), (5, 1), (5, 7), (0, 16)])
@pytest.mark.parametrize("name", NAMES)
def test_head_and_tail_equal_pytorch(reference_models, name, head, tail, n_batch):
    model = reference_models[name]
    tokens = model.tokens(N_TOKENS)
    expected, plain = (
        pop_reference.logits(model.torch_model, model.layers, tokens, BOUNDARY, N_PROMPT, *ends)
        for ends in ((head, tail), ())
    )
    llm = open_model(model, pop_head=head, pop_tail=tail, n_batch=n_batch)
    before = native.n_pruned(llm._ctx.ctx)
    actual = llm.score(tokens[:N_PROMPT], [*tokens[N_PROMPT:], 0])
    assert native.n_pruned(llm._ctx.ctx) - before == N_PROMPT - head - tail
    error = squared_error(actual, expected)
    assert error <= 1e-6
    assert squared_error(plain, expected) > 100 * error  # head and tail change the result
    llm.close()


def test_tails_of_parallel_sequences_are_their_own(reference_models):
    model = reference_models["llama"]
    prompts = [model.tokens(count, seed=count) for count in (30, 12, 4)]
    with Engine(model.gguf, BOUNDARY, n_seq_max=3) as engine:
        native.set_ends(engine.context, n_head=0, n_tail=6)
        entries = [
            (prompts[s][i], i, s, i == len(prompts[s]) - 1) for i in range(30) for s in range(3) if i < len(prompts[s])
        ]
        logits = {entries[i][2]: row for i, row in engine.decode(entries).items()}
        assert engine.n_pruned == 30 - 6 + 12 - 6
    for s, tokens in enumerate(prompts):
        with Engine(model.gguf, BOUNDARY) as alone:
            native.set_ends(alone.context, n_head=0, n_tail=6)
            assert squared_error(logits[s], alone.prefill(tokens)) <= 1e-9


def test_a_shared_token_counts_in_the_tail_of_each_of_its_sequences(reference_models):
    model = reference_models["llama"]
    shared, first, second = model.tokens(10), model.tokens(8, seed=1), model.tokens(1, seed=2)
    with Engine(model.gguf, BOUNDARY, n_seq_max=2, kv_unified=True) as engine:
        native.set_ends(engine.context, n_head=0, n_tail=3)
        entries = [(token, i, (0, 1), False) for i, token in enumerate(shared)]
        entries += [(token, 10 + i, 0, i == 7) for i, token in enumerate(first)]
        entries += [(token, 10, 1, True) for token in second]
        logits = engine.decode(entries)
        assert engine.n_pruned == 8 + 5  # the last two shared tokens are in the tail of the second sequence
    with Engine(model.gguf, BOUNDARY) as alone:
        native.set_ends(alone.context, n_head=0, n_tail=3)
        assert squared_error(logits[len(entries) - 1], alone.prefill([*shared, *second])) <= 1e-9


def test_prompts_with_few_new_tokens_are_not_pruned(reference_models):
    model = reference_models["llama"]
    tokens = model.tokens(60)
    llm = open_model(model, pop_min_tokens=20)

    def pruned(prompt) -> int:
        for _ in zip(range(1), llm.generate(prompt, temp=0)):
            pass
        return llm.timings.pruned_tokens

    assert pruned(tokens[:19]) == 0
    assert pruned(tokens[:30]) == 0  # 19 tokens are reused and 11 are new
    assert pruned(tokens[:60]) == 29
    llm.close()


def test_positions_remember_that_the_ends_ran_whole(reference_models):
    llm = open_model(reference_models["llama"], pop_head=2, pop_tail=4)
    llm.eval(reference_models["llama"].tokens(10))
    assert llm._record.boundaries[:10].tolist() == [6, 6, 3, 3, 3, 3, 6, 6, 6, 6]
    llm.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(pop_tail=0), "pop_tail is 0: give a whole number, 1 to 256"),
        (dict(pop_tail=600), "pop_tail is 600: give a whole number, 1 to 256"),
        (dict(pop_head=-1), "pop_head is -1: give a whole number, 0 to 2147483647"),
        (dict(pop_head=2**40), "pop_head is 1099511627776: give"),
        (dict(pop_tail=True), "pop_tail is True: give a whole number, 1 to 256 .n_batch."),
        (dict(pop_tail=-1), "pop_tail is -1: give a whole number, 1 to 256 .n_batch."),
        (dict(pop_min_tokens=1.5), "pop_min_tokens is 1.5: give a whole number"),
        (dict(pop_min_tokens=2**31), "pop_min_tokens is 2147483648: give"),
    ],
)
def test_numbers_out_of_range_are_refused(reference_models, options, message):
    with pytest.raises(PopError, match=message):
        open_model(reference_models["llama"], **options)


def test_score_equals_eval_and_refuses_what_does_not_fit(reference_models):
    model = reference_models["llama"]
    tokens = model.tokens(30)
    llm = open_model(model, n_batch=8)
    scored = llm.score(tokens[:20], tokens[20:])
    llm.reset()
    llm._ctx.kv_cache_clear()
    llm.eval(tokens[:20])
    rows = [llm._logits_of(1)[0]]
    for token in tokens[20:-1]:
        llm.eval([token])
        rows.append(llm._logits_of(1)[0])
    assert squared_error(scored, np.stack(rows)) <= 1e-9
    for prompt, continuation in (([], [1]), ([1], []), ([1] * 200, [1] * 57)):
        with pytest.raises(ValueError, match="give one each at least, and 256 at most"):
            llm.score(prompt, continuation)
    llm.close()
