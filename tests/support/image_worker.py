"""Computes with stock llama.cpp alone what a pruned prompt with images has to give, for tests/python/test_vision.py.

The arguments are ``MODEL PROMPT.npz OUT.npz BOUNDARY=IDENTITY_COPY...``. Stock reads the pruned pieces of the prompt
with a copy of the file whose layers from the boundary on are the identity. It reads all other pieces, and the tokens
that follow, with the original file. The state goes from one to the other. For the piece number I, PROMPT.npz has
``valuesI`` (tokens I32 [n] or embeddings F32 [n, n_embd_inp]), ``posI`` (I32 [n_pos_per_embd, n]) and ``wholeI``.
"""

import ctypes
import json
import sys

import llama_cpp
import numpy as np

F32 = 0


def load(path: str):
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 256
    parameters.n_threads = parameters.n_threads_batch = 1
    parameters.type_k = parameters.type_v = F32
    parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return model, llama_cpp.llama_init_from_model(model, parameters)


def read(context, values: np.ndarray, pos: np.ndarray, causal: bool, asks: bool = False) -> None:
    """Decodes tokens I32 [n] or embeddings F32 [n, n_embd_inp] in one batch. The last may ask for logits."""
    n, values = len(values), np.ascontiguousarray(values)
    batch = llama_cpp.llama_batch_init(n, values.shape[1] if values.ndim == 2 else 0, 1)
    allocated, kind = ctypes.cast(batch.pos, ctypes.c_void_p), type(batch.pos)
    pos = np.ascontiguousarray(pos, np.int32)
    batch.pos, batch.n_tokens = ctypes.cast(pos.ctypes.data, kind), n
    ctypes.memmove(batch.embd if values.ndim == 2 else batch.token, values.ctypes.data, values.nbytes)
    for i in range(n):
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, asks and i == n - 1
    llama_cpp.llama_set_causal_attn(context, causal)
    status = llama_cpp.llama_decode(context, batch)
    llama_cpp.llama_set_causal_attn(context, True)
    batch.pos = ctypes.cast(allocated, kind)
    llama_cpp.llama_batch_free(batch)
    if status:
        sys.exit(f"llama_decode returned {status}")


def move(source, target):
    """Copies the state of the source context to the target, and returns the target."""
    if source is target:
        return target
    size = llama_cpp.llama_state_seq_get_size(source, 0)
    state = (ctypes.c_uint8 * size)()
    size = llama_cpp.llama_state_seq_get_data(source, state, size, 0)
    if not llama_cpp.llama_state_seq_set_data(target, state, size, 0):
        sys.exit("the state does not fit the other file")
    return target


def main(path: str, prompt_path: str, out: str, *copies: str) -> None:
    llama_cpp._logger.set_verbose(False)
    llama_cpp.llama_backend_init()
    prompt, results = np.load(prompt_path), {}
    follow, first, causal = prompt["follow"], int(prompt["first"]), bool(prompt["causal"])
    for copy in copies:
        boundary, identity_copy = copy.split("=", 1)
        (model, context), (pruning_model, pruning) = load(path), load(identity_copy)
        at = pruning
        for i in range(int(prompt["n_pieces"])):
            at = move(at, context if prompt[f"whole{i}"] else pruning)
            values = prompt[f"values{i}"]
            read(at, values, prompt[f"pos{i}"], causal=values.ndim == 1 or causal)
        move(at, context)
        n_vocab, rows = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)), []
        for i, token in enumerate(follow):
            read(context, np.array([token], np.int32), np.array([first + i]), causal=True, asks=True)
            rows.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(n_vocab,)).copy())
        results[boundary] = np.stack(rows)
        for used in (context, pruning):
            llama_cpp.llama_free(used)
        for used in (model, pruning_model):
            llama_cpp.llama_model_free(used)
    np.savez(out, **results)
    print(json.dumps(sorted(results)))


if __name__ == "__main__":
    main(*sys.argv[1:])
