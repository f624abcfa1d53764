"""With POP off the engine is stock llama.cpp, bit for bit: compared with an unpatched build in a process of its own."""

import hashlib

import llama_cpp
import numpy as np

from pypop_gguf import PopLlama

PROMPT = "Once upon a time there was a little fox who lived near the river. One day the fox found a map. " * 6

# Reads the prompt in chunks of 64 and decodes 8 greedy tokens; prints a digest of each step's logits and the text.
STOCK_CODE = """
import hashlib, json, sys
import numpy as np, llama_cpp

llm = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_batch=64, verbose=False)
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


def digests(llm) -> list[str]:
    """Digests of the logits after the prompt and after each of 8 greedy tokens."""
    tokens, result = llm.tokenize(PROMPT.encode()), []
    llm.reset()
    for _ in range(9):
        llm.eval(tokens)
        row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),))
        result.append(hashlib.sha256(row.tobytes()).hexdigest())
        tokens = [int(row.argmax())]
    return result


def test_pop_off_equals_stock_bit_for_bit(bundled_gguf, stock):
    llm = PopLlama(str(bundled_gguf), pop=False, n_ctx=512, n_batch=64, verbose=False)
    expected = stock(STOCK_CODE, bundled_gguf, PROMPT)
    assert digests(llm) == expected["digests"]
    assert llm.create_completion(PROMPT, max_tokens=24, temperature=0)["choices"][0]["text"] == expected["text"]


def test_plain_llama_beside_a_pruning_one_stays_stock(bundled_gguf, stock):
    pruning = PopLlama(str(bundled_gguf), pop_boundary=8, n_ctx=512, verbose=False)
    pruning.create_completion(PROMPT, max_tokens=2, temperature=0)
    plain = llama_cpp.Llama(str(bundled_gguf), n_ctx=512, n_batch=64, verbose=False)
    assert digests(plain) == stock(STOCK_CODE, bundled_gguf, PROMPT)["digests"]


def test_call_without_pop_after_a_pruned_one_equals_stock(bundled_gguf, stock):
    llm = PopLlama(str(bundled_gguf), pop_boundary=6, n_ctx=512, n_batch=64, verbose=False)
    expected = stock(STOCK_CODE, bundled_gguf, PROMPT)["text"]
    pruned = llm.create_completion(PROMPT, max_tokens=24, temperature=0)["choices"][0]["text"]
    assert llm.timings.pruned_tokens > 0
    assert pruned != expected  # half the layers skipped shows on this prompt, so the next line means something
    full = llm.create_completion(PROMPT, max_tokens=24, temperature=0, pop=False)["choices"][0]["text"]
    assert llm.timings.pruned_tokens == 0
    assert full == expected
