"""Runs a tiny random model for tools/architectures.py, in a process with our library or with stock.

``engine MODEL OUT.npz`` reads a prompt at several boundaries. ``stock MODEL OUT.npz BOUNDARY=IDENTITY_COPY...``
computes the logits that POP has to give at each boundary. Both print their other results as JSON on their last line.
"""

import ctypes
import json
import sys

import numpy as np

if sys.argv[1] == "engine":
    from pypop_gguf import library, native

    llama_cpp = library.load()
else:
    import llama_cpp

N_PROMPT, N_DECODE = 41, 3
F32 = 0


def load(path: str):
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
    if not model:
        sys.exit(f"{path} does not load")
    return model


def new_context(model, n_ctx=128, n_ubatch=16):
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = n_ctx
    parameters.n_ubatch = n_ubatch
    parameters.n_threads = parameters.n_threads_batch = 1
    parameters.type_k = parameters.type_v = F32
    parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        sys.exit("no context")
    return context


def n_vocab(model) -> int:
    return llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))


def tokens_for(model) -> list[int]:
    return np.random.default_rng(3).integers(0, min(n_vocab(model), 128), N_PROMPT + N_DECODE).tolist()


def decode(context, tokens, first_position, last_asks) -> None:
    """Decodes tokens in one batch. Only the last may ask for logits."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i] = token, first_position + i
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        batch.logits[i] = last_asks and i == len(tokens) - 1
    status = llama_cpp.llama_decode(context, batch)
    llama_cpp.llama_batch_free(batch)
    if status:
        raise RuntimeError(f"llama_decode returned {status}")


def last_logits(model, context, tokens, last_alone=True) -> np.ndarray:
    """Returns the logits of the last prompt token and of the tokens decoded after it, F32 [1 + N_DECODE, n_vocab].

    Args:
        model: Gives the size of the vocabulary.
        context: Has read all prompt tokens but the last, or nothing.
        tokens: The prompt and the tokens after it.
        last_alone: Whether the rest of the prompt is in the cache. If not, the whole prompt is decoded here.
    """
    rows = []
    for position in range(N_PROMPT - 1, N_PROMPT + N_DECODE):
        first = 0 if position == N_PROMPT - 1 and not last_alone else position
        decode(context, tokens[first : position + 1], first, True)
        pointer = llama_cpp.llama_get_logits_ith(context, -1)
        rows.append(np.ctypeslib.as_array(pointer, shape=(n_vocab(model),)).copy())
    return np.stack(rows)


def engine(path: str, out: str) -> dict:
    model = load(path)
    n_layer, lossless = native.n_layer(model), native.lossless_boundary(model)
    found = {"n_layer": n_layer, "lossless": lossless, "refusal": native.refusal(model), "pruned": {}, "errors": {}}
    if found["refusal"]:
        return found
    tokens, results = tokens_for(model), {}
    for boundary in sorted({n_layer, lossless, max(1, n_layer - n_layer // 3), max(1, n_layer // 2)}):
        context = new_context(model)
        try:
            native.set_boundary(context, boundary)
            decode(context, tokens[: N_PROMPT - 1], 0, False)
            results[str(boundary)] = last_logits(model, context, tokens)
            found["pruned"][boundary] = native.n_pruned(context)
            if native.continues(context):
                llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
                results[f"{boundary} continued"] = last_logits(model, context, tokens, last_alone=False)
        except (RuntimeError, ValueError) as error:
            found["errors"][boundary] = str(error)
        llama_cpp.llama_free(context)
    np.savez(out, **results)
    context = new_context(model, n_ctx=512, n_ubatch=512)
    full = native.graph_flops(context, boundary=n_layer, n_tokens=512, n_seqs=1, n_outputs=1)
    boundary = max(1, n_layer - n_layer // 3)
    found["flop_limit"] = full / native.graph_flops(context, boundary=boundary, n_tokens=511, n_seqs=1, n_outputs=0)
    return found


def stock(path: str, out: str, copies: list[str]) -> dict:
    results = {}
    for copy in copies:
        boundary, identity_copy = copy.split("=", 1)
        model = load(identity_copy)
        tokens = tokens_for(model)
        context = new_context(model)
        decode(context, tokens[: N_PROMPT - 1], 0, False)
        size = llama_cpp.llama_state_seq_get_size(context, 0)
        state = (ctypes.c_uint8 * size)()
        size = llama_cpp.llama_state_seq_get_data(context, state, size, 0)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)

        model = load(path)
        context = new_context(model)
        if not llama_cpp.llama_state_seq_set_data(context, state, size, 0):
            sys.exit("the state does not fit the original file")
        results[boundary] = last_logits(model, context, tokens)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    np.savez(out, **results)
    return {}


if __name__ == "__main__":
    llama_cpp._logger.set_verbose(False)
    mode, *arguments = sys.argv[1:]
    print(json.dumps(engine(*arguments) if mode == "engine" else stock(*arguments[:2], arguments[2:])))
