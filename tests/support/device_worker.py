"""One process of tests/engine/test_devices.py: ``MODEL BOUNDARY CONTINUES OUT.npy HOST:PORT...``.

It reads a prompt with the layers split over these RPC servers, or on the CPU if there are none, and saves the logits.
"""

import ctypes
import json
import sys

import numpy as np

from pypop_gguf import library, native, rpc

N_PROMPT, N_DECODE = 41, 3

llama_cpp = library.load()


def run(path: str, boundary: str, continues: str, out: str, *servers: str) -> None:
    llama_cpp.llama_backend_init()
    rpc.use_servers(servers)
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 99
    shares = (ctypes.c_float * llama_cpp.LLAMA_MAX_DEVICES)(*[1.0] * len(servers))
    parameters.tensor_split = shares
    model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
    context_parameters = llama_cpp.llama_context_default_params()
    context_parameters.n_ctx, context_parameters.n_ubatch = 128, 16
    context_parameters.type_k = context_parameters.type_v = 0  # F32
    context_parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, context_parameters)
    native.set_boundary(context, int(boundary))
    native.set_continuation(context, continues == "True")

    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    tokens = np.random.default_rng(3).integers(3, n_vocab, N_PROMPT + N_DECODE).tolist()
    rows = []
    for first, last in [(0, N_PROMPT), *((N_PROMPT + i, N_PROMPT + i + 1) for i in range(N_DECODE))]:
        batch = llama_cpp.llama_batch_init(last - first, 0, 1)
        batch.n_tokens = last - first
        for i in range(last - first):
            batch.token[i], batch.pos[i], batch.logits[i] = tokens[first + i], first + i, first + i == last - 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if llama_cpp.llama_decode(context, batch):
            sys.exit("llama_decode failed")
        rows.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(n_vocab,)).copy())
    np.save(out, np.stack(rows))
    print(json.dumps({"pruned": native.n_pruned(context)}))


if __name__ == "__main__":
    run(*sys.argv[1:])
