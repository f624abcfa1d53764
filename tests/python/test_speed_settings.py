"""The settings of ``PopLlama`` that make prompts faster by default: flash attention and our own kernels."""

import copy
import pickle
import platform

import llama_cpp
import numpy as np
import pytest

from pypop_gguf import PopError, PopLlama
from pypop_gguf.cli import main

OPTIONS = dict(n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False)
TOKENS = [1, *range(260, 340)]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> str:
    """A tiny random model, whose products our kernels compute."""
    path = str(tmp_path_factory.mktemp("random") / "tiny.gguf")
    assert main(["random-model", "tiny", path, "--outtype", "q8_0"]) == 0
    return path


def logits(llm) -> np.ndarray:
    llm.reset()
    llm.eval(TOKENS)
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy()


def test_flash_attention_is_on_by_default_and_off_by_an_argument(quantized):
    # Without our kernels both compute the same each time, and each rounds in its own way.
    default, on, off = (
        logits(PopLlama(quantized, pop_kernels=False, **options, **OPTIONS))
        for options in ({}, {"flash_attn": True}, {"flash_attn": False})
    )
    assert np.array_equal(default, on) and not np.array_equal(default, off)
    assert np.array_equal(off, logits(opened_as_a_plain_llama_is(quantized)))


def opened_as_a_plain_llama_is(path: str) -> PopLlama:
    """A PopLlama that is opened by what a plain Llama says of itself."""
    plain = llama_cpp.Llama(path, **OPTIONS)
    assert plain.context_params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return PopLlama(**plain.__getstate__(), pop_kernels=False)


def test_quantized_values_in_the_cache_need_no_argument(quantized):
    options = dict(type_k=llama_cpp.GGML_TYPE_Q8_0, type_v=llama_cpp.GGML_TYPE_Q8_0, **OPTIONS)
    assert np.isfinite(logits(PopLlama(quantized, **options))).all()
    with pytest.raises(PopError, match="quantized V cache requires flash_attn"):
        PopLlama(quantized, flash_attn=False, **options)


@pytest.mark.parametrize("flash_attn", [None, True, False])
@pytest.mark.parametrize("pop_kernels", [True, False])
def test_copies_keep_the_settings(quantized, flash_attn, pop_kernels):
    llm = PopLlama(quantized, flash_attn=flash_attn, pop_kernels=pop_kernels, **OPTIONS)
    expected = logits(llm)
    for other in (pickle.loads(pickle.dumps(llm)), copy.deepcopy(llm)):
        assert other.context_params.flash_attn_type == llm.context_params.flash_attn_type
        assert other.__getstate__()["flash_attn"] is flash_attn
        assert np.array_equal(logits(other), expected)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the kernels are for x86")
def test_kernels_belong_to_one_object(quantized):
    on, off = (PopLlama(quantized, pop_kernels=pop_kernels, **OPTIONS) for pop_kernels in (True, False))
    first = logits(on), logits(off)
    assert not np.array_equal(*first)
    assert all(map(np.array_equal, (logits(on), logits(off)), first))
