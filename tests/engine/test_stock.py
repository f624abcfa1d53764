"""With POP and our kernels off, logits equal those of an unpatched llama.cpp bit for bit. It runs in its own process.

Compared are a prompt and an answer of one sequence, and batches of several sequences, in one cache or in separate ones,
of a model with attention and of one that also has recurrent layers. csrc/llama-pop.h refers to these cases. Our kernels
(csrc/pop-kernels.h) round in another order; a PopLlama leaves them out by itself, a plain Llama only with the process.
"""

import hashlib
import platform

import llama_cpp
import numpy as np
import pytest

from pypop_gguf import PopLlama, native
from pypop_gguf.cli import main

OPTIONS = dict(n_ctx=512, n_batch=64, verbose=False)
PROMPT = "Once upon a time there was a little fox who lived near the river. One day the fox found a map. " * 6

# Reads the prompt in chunks of 64 and decodes 8 greedy tokens; prints a digest of each step's logits and the text. The
# third argument is "on" for flash attention.
STOCK_CODE = """
import hashlib, json, sys
import numpy as np, llama_cpp

llm = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_batch=64, flash_attn=sys.argv[3] == "on", verbose=False)
assert not hasattr(llama_cpp.llama_cpp._lib, "llama_pop_set_boundary")
tokens = llm.tokenize(sys.argv[2].encode())
digests = []
for _ in range(9):
    llm.eval(tokens)
    row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),))
    digests.append(hashlib.sha256(row.tobytes()).hexdigest())
    tokens = [int(row.argmax())]
text = llm.create_completion(sys.argv[2], max_tokens=24, temperature=0)["choices"][0]["text"]
print(json.dumps({"digests": digests, "text": text}))
"""


# Batches of three sequences, read in turns and then written; returns a digest of all logits. Both processes run it.
BATCHES_CODE = """
import hashlib, json, sys
import numpy as np, llama_cpp

def batches(path, unified, on_context=None):
    llama_cpp._logger.set_verbose(False)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx, parameters.n_batch, parameters.n_ubatch, parameters.n_seq_max = 384, 128, 16, 3
    parameters.n_threads = parameters.n_threads_batch = 1
    parameters.kv_unified = unified
    context = llama_cpp.llama_init_from_model(model, parameters)
    if on_context:
        on_context(context)
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    chance, past, digest = np.random.default_rng(4), [0, 0, 0], hashlib.sha256()
    for counts in ((20, 33, 0), (7, 1, 40), (1, 1, 1), (0, 1, 12)):
        entries = [(s, i, i == n - 1) for s, n in enumerate(counts) for i in range(n)]
        batch = llama_cpp.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for i, (s, offset, asks) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = int(chance.integers(3, 100)), past[s] + offset, asks
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, s
        assert llama_cpp.llama_decode(context, batch) == 0
        for i, entry in enumerate(entries):
            if entry[2]:
                row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), shape=(n_vocab,))
                digest.update(row.tobytes())
        past = [position + n for position, n in zip(past, counts)]
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return digest.hexdigest()
"""


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Writes a tiny random model of a type, and returns its path."""
    base = tmp_path_factory.mktemp("quantized")

    def write(outtype: str) -> str:
        path = base / f"{outtype}.gguf"
        assert path.exists() or main(["random-model", "tiny", str(path), "--outtype", outtype]) == 0
        return str(path)

    return write


def digests(llm, prompt: str = PROMPT) -> list[str]:
    """Digests of the logits after the prompt and after each of 8 greedy tokens."""
    tokens, result = llm.tokenize(prompt.encode()), []
    llm.reset()
    for _ in range(9):
        llm.eval(tokens)
        row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),))
        result.append(hashlib.sha256(row.tobytes()).hexdigest())
        tokens = [int(row.argmax())]
    return result


def test_pop_off_equals_stock_bit_for_bit(bundled_gguf, stock):
    llm = PopLlama(str(bundled_gguf), pop=False, pop_kernels=False, flash_attn=False, **OPTIONS)
    expected = stock(STOCK_CODE, bundled_gguf, PROMPT, "off")
    assert digests(llm) == expected["digests"]
    assert llm.create_completion(PROMPT, max_tokens=24, temperature=0)["choices"][0]["text"] == expected["text"]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the kernels are for x86")
@pytest.mark.parametrize("flash_attn", ["on", "off"])
@pytest.mark.parametrize("outtype", ["q4_k_m", "q8_0", "q4_0"])  # with and without weights that ggml rearranges
def test_quantized_model_without_kernels_equals_stock_bit_for_bit(quantized, stock, outtype, flash_attn):
    path, prompt = quantized(outtype), PROMPT[:200]  # its tokens are single letters
    options = dict(pop=False, flash_attn=flash_attn == "on", **OPTIONS)
    with_kernels, without = PopLlama(path, **options), PopLlama(path, pop_kernels=False, **options)
    expected = stock(STOCK_CODE, path, prompt, flash_attn)["digests"]
    assert digests(without, prompt) == expected
    assert digests(with_kernels, prompt)[0] != expected[0]  # the kernels show, so the line above means something
    assert digests(without, prompt) == expected  # each of both keeps its own setting
    native.set_kernels(with_kernels.ctx, False)
    assert digests(with_kernels, prompt) == expected


@pytest.mark.usefixtures("kernels_off")
def test_plain_llama_beside_a_pruning_one_stays_stock(bundled_gguf, stock):
    pruning = PopLlama(str(bundled_gguf), pop_boundary=8, n_ctx=512, verbose=False)
    pruning.create_completion(PROMPT, max_tokens=2, temperature=0)
    plain = llama_cpp.Llama(str(bundled_gguf), n_ctx=512, n_batch=64, verbose=False)
    assert digests(plain) == stock(STOCK_CODE, bundled_gguf, PROMPT, "off")["digests"]


def test_call_without_pop_after_a_pruned_one_equals_stock(bundled_gguf, stock):
    llm = PopLlama(str(bundled_gguf), pop_boundary=6, pop_kernels=False, flash_attn=False, **OPTIONS)
    expected = stock(STOCK_CODE, bundled_gguf, PROMPT, "off")["text"]
    pruned = llm.create_completion(PROMPT, max_tokens=24, temperature=0)["choices"][0]["text"]
    assert llm.timings.pruned_tokens > 0
    assert pruned != expected  # half the layers skipped shows on this prompt, so the next line means something
    full = llm.create_completion(PROMPT, max_tokens=24, temperature=0, pop=False)["choices"][0]["text"]
    assert llm.timings.pruned_tokens == 0
    assert full == expected


@pytest.mark.usefixtures("kernels_off")
@pytest.mark.parametrize("unified", [True, False], ids=["one-cache", "separate-caches"])
@pytest.mark.parametrize("name", ["llama", "lfm2"])  # attention, attention and recurrent
def test_batches_of_sequences_equal_stock_bit_for_bit(reference_models, stock, name, unified):
    names: dict = {}
    exec(BATCHES_CODE, names)
    path = str(reference_models[name].gguf)
    run = f"{BATCHES_CODE}\nprint(json.dumps(batches(sys.argv[1], {unified})))"
    expected = stock(run, path)
    assert names["batches"](path, unified) == expected
    # the comparison can fail: layers skipped by these batches show
    assert names["batches"](path, unified, lambda context: native.set_boundary(context, 3)) != expected
