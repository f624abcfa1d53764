"""What users see of ``PopLlama``: boundaries and their sources, reuse of prefixes, timings, states, errors."""

import pickle

import llama_cpp
import numpy as np
import pytest

from pypop_gguf import PopError, PopLlama

PROMPT = "The code of the mirror is 87. The code of the engine is 56. Once upon a time there was a fox. " * 4


@pytest.fixture(scope="module")
def llm(bundled_gguf):
    return PopLlama(str(bundled_gguf), pop_boundary=8, n_ctx=512, n_batch=32, verbose=False)


def complete(llm, prompt=PROMPT, **options):
    return llm.create_completion(prompt, max_tokens=12, temperature=0, **options)["choices"][0]["text"]


def fresh(llm, prompt=PROMPT, **options):
    llm.reset()
    return complete(llm, prompt, **options)


def test_status_tells_boundary_layers_and_source(llm, bundled_gguf):
    assert (llm.pop.enabled, llm.pop.boundary, llm.pop.n_layer, llm.pop.source) == (True, 8, 12, "argument")
    off = PopLlama(str(bundled_gguf), pop=False, n_ctx=64, verbose=False)
    assert (off.pop.enabled, off.pop.boundary, off.pop.source) == (False, 12, "off")
    lossless = PopLlama(str(bundled_gguf), pop_boundary="lossless", n_ctx=64, verbose=False)
    assert (lossless.pop.enabled, lossless.pop.boundary) == (True, 11)


def test_file_without_boundary_is_off_and_says_so(bundled_gguf, capfd):
    llm = PopLlama(str(bundled_gguf), n_ctx=64, verbose=False)
    assert (llm.pop.enabled, llm.pop.source) == (False, "off")
    advice = capfd.readouterr().err
    assert advice.count("\n") == 1 and "pop-gguf prepare" in advice


def test_only_the_last_prompt_token_runs_the_whole_model_across_chunks(llm):
    fresh(llm)
    timings = llm.timings
    assert timings.prompt_tokens > 3 * llm.n_batch
    assert timings.reused_tokens == 0
    assert timings.pruned_tokens == timings.prompt_tokens - 1


def test_after_a_cached_prefix_only_the_last_new_token_runs_the_whole_model(llm):
    fresh(llm)
    first = llm.timings.prompt_tokens
    complete(llm, PROMPT + "What is the code of the mirror?")
    assert llm.timings.reused_tokens >= first - 1  # the text may tokenize differently where it joins
    assert llm.timings.pruned_tokens == llm.timings.prompt_tokens - llm.timings.reused_tokens - 1


def test_prefix_computed_by_fewer_layers_is_not_reused(llm):
    fresh(llm, boundary=6)
    deep = complete(llm, boundary=9)
    assert llm.timings.reused_tokens == 0
    assert deep == fresh(llm, boundary=9)


def test_prefix_computed_by_more_layers_is_reused(llm):
    fresh(llm, pop=False)
    complete(llm, boundary=6)
    assert llm.timings.reused_tokens == llm.timings.prompt_tokens - 1


def test_lossless_prefix_counts_as_computed_by_the_whole_model(llm):
    fresh(llm, boundary="lossless")
    complete(llm, pop=False)
    assert llm.timings.reused_tokens == llm.timings.prompt_tokens - 1


def test_generated_tokens_are_reused_as_computed_by_the_whole_model(llm):
    text = fresh(llm, boundary=6)
    complete(llm, PROMPT + text, boundary=6)
    assert llm.timings.reused_tokens >= llm.timings.prompt_tokens - 3


def test_boundary_of_one_call_does_not_outlive_it(llm):
    expected = fresh(llm)
    fresh(llm, boundary=5)
    assert fresh(llm) == expected
    assert llm.pop.boundary == 8


def test_streamed_call_keeps_its_boundary(llm):
    expected = fresh(llm, boundary=5)
    llm.reset()
    stream = llm.create_completion(PROMPT, max_tokens=12, temperature=0, boundary=5, stream=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in stream) == expected
    assert llm.timings.pruned_tokens > 0


def test_chat_takes_a_boundary(llm):
    llm.reset()
    messages = [{"role": "user", "content": "Tell me a story about a fox and a river, please."}]
    llm.create_chat_completion(messages, max_tokens=4, temperature=0, pop=False)
    assert llm.timings.pruned_tokens == 0
    llm.reset()
    answer = llm.create_chat_completion(messages, max_tokens=4, temperature=0)
    assert llm.timings.pruned_tokens == llm.timings.prompt_tokens - 1
    assert answer["choices"][0]["message"]["role"] == "assistant"


def test_timings_cover_the_call(llm):
    fresh(llm)
    timings = llm.timings
    assert timings.generated_tokens == 12
    assert 0 < timings.prefill_ms <= timings.time_to_first_token_ms
    assert timings.decode_ms_per_token > 0


def test_logits_all_runs_the_whole_model_and_gives_the_parents_scores(bundled_gguf):
    plain = llama_cpp.Llama(str(bundled_gguf), n_ctx=256, logits_all=True, verbose=False)
    ours = PopLlama(str(bundled_gguf), pop_boundary=6, n_ctx=256, logits_all=True, flash_attn=False, verbose=False)
    results = [
        llm.create_completion(PROMPT, max_tokens=4, temperature=0, logprobs=3, echo=True) for llm in (plain, ours)
    ]
    assert ours.timings.pruned_tokens == 0
    assert results[0]["choices"][0]["logprobs"] == results[1]["choices"][0]["logprobs"]


@pytest.mark.parametrize(
    "options",
    [{"embedding": True}, {"logits_all": True}, {"attention_type": llama_cpp.LLAMA_ATTENTION_TYPE_NON_CAUSAL}],
)
def test_object_that_cannot_prune_says_so(bundled_gguf, options, capfd):
    """The number of pruned tokens is counted in the engine."""
    llm = PopLlama(str(bundled_gguf), pop_boundary=6, n_ctx=512, verbose=False, **options)
    advice = capfd.readouterr().err
    assert advice.count("\n") == 1 and "so all 12 layers read it" in advice
    assert (llm.pop.enabled, llm.pop.boundary, llm.pop.source) == (False, 12, "off")
    for asked in ({}, {"boundary": 4}):
        timings = llm.create_completion(PROMPT, max_tokens=2, **asked)["timings"]
        assert (timings["pruned_n"], timings["boundary"]) == (0, 12)
    with pytest.raises(PopError, match="out of range"):
        llm.create_completion(PROMPT, boundary=99)
    llm.close()


@pytest.mark.parametrize("options", [{"pop_min_tokens": 60}, {"pop_head": 60}, {"pop_tail": 60}])
def test_timings_of_a_prompt_that_was_too_short_to_prune_say_so(bundled_gguf, options):
    llm = PopLlama(str(bundled_gguf), pop_boundary=6, n_ctx=512, verbose=False, **options)
    for prompt, boundary in ((PROMPT[:100], 12), (PROMPT, 6), (PROMPT[:100], 12)):
        llm.reset()
        timings = llm.create_completion(prompt, max_tokens=1)["timings"]
        assert (timings["pruned_n"] > 0) == (prompt == PROMPT) and timings["boundary"] == boundary
    llm.close()


def test_timings_of_a_cached_prompt_tell_the_boundary_that_it_was_read_with(llm):
    for first, boundary in (({}, 8), ({"pop": False}, 12)):
        fresh(llm, **first)
        complete(llm)
        assert llm.timings.reused_tokens > 20 and llm.timings.boundary == boundary


def test_draft_model_leaves_the_prompt_pruned(bundled_gguf):
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    plain = PopLlama(str(bundled_gguf), pop_boundary=8, n_ctx=512, verbose=False)
    drafted = PopLlama(
        str(bundled_gguf), pop_boundary=8, n_ctx=512, draft_model=LlamaPromptLookupDecoding(), verbose=False
    )
    assert complete(drafted) == complete(plain)
    assert drafted.timings.pruned_tokens == drafted.timings.prompt_tokens - 1


def test_score_of_a_continuation_longer_than_a_micro_batch(bundled_gguf):
    """llama.cpp gives the logits of the last micro-batch only."""
    options = dict(pop_boundary=8, n_ctx=256, n_batch=64, n_threads=1, n_threads_batch=1, verbose=False)
    small, large = (PopLlama(str(bundled_gguf), n_ubatch=n_ubatch, **options) for n_ubatch in (16, 64))
    tokens = small.tokenize(PROMPT.encode())
    scores = [llm.score(tokens[:40], tokens[40:90]) for llm in (small, large)]
    assert scores[0].shape == scores[1].shape == (50, small.n_vocab())
    assert np.allclose(*scores, atol=2e-2) and np.array_equal(*(one.argmax(axis=1) for one in scores))
    small.close()
    large.close()


def test_state_keeps_the_boundaries_of_its_positions(llm, bundled_gguf):
    expected = fresh(llm, pop=False)
    fresh(llm, boundary=6)
    state = llm.save_state()
    llm.reset()
    llm.load_state(state)
    assert complete(llm, pop=False) == expected
    assert llm.timings.reused_tokens == 0
    llm.load_state(state)
    complete(llm, boundary=6)
    assert llm.timings.reused_tokens > 0


def test_pickle_keeps_the_boundary(bundled_gguf):
    llm = PopLlama(str(bundled_gguf), pop_boundary=7, n_ctx=64, verbose=False)
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.pop == llm.pop


def test_unknown_argument_raises_type_error(bundled_gguf):
    with pytest.raises(TypeError, match="n_gpu_layer'"):
        PopLlama(str(bundled_gguf), n_gpu_layer=1)


@pytest.mark.parametrize("boundary", ["half", 1.5, True])
def test_boundary_of_another_type_raises_type_error(bundled_gguf, boundary):
    with pytest.raises(TypeError, match="pop_boundary"):
        PopLlama(str(bundled_gguf), pop_boundary=boundary)


@pytest.mark.parametrize("boundary", [0, 13, -2, 2**40, -(2**40)])
def test_boundary_out_of_range_names_the_range(bundled_gguf, boundary):
    with pytest.raises(PopError, match="choose 1 to 12"):
        PopLlama(str(bundled_gguf), pop_boundary=boundary, verbose=False)


def test_refused_boundary_of_a_call_leaves_the_object_usable(llm):
    expected = fresh(llm)
    for boundary in (99, 2**40):
        with pytest.raises(PopError, match="out of range"):
            complete(llm, boundary=boundary)
    with pytest.raises(TypeError, match="boundary must be a layer number"):
        complete(llm, boundary=True)
    assert fresh(llm) == expected


def test_tokens_that_do_not_fit_into_the_context_are_refused_with_words(llm):
    llm.reset()
    llm.eval(list(range(5, 405)))
    with pytest.raises(
        RuntimeError, match=r"^200 tokens do not fit after the 400 that are cached: call reset\(\), or open"
    ):
        llm.eval(list(range(5, 205)))
    assert llm.n_tokens == 400
    llm.reset()


def test_lora_that_is_missing_is_named(bundled_gguf, tmp_path):
    with pytest.raises(PopError, match=r"none\.gguf: no such file"):
        PopLlama(bundled_gguf, lora_path=tmp_path / "none.gguf", verbose=False)
