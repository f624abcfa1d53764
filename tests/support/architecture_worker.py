"""Runs a tiny random model for tools/architectures.py, in a process with our library or with stock.

``engine MODEL OUT.npz ADAPTER`` reads a prompt at several boundaries, then fits keys and values at the lowest boundary,
writes them to the adapter file and reads the prompt with it. ``stock MODEL OUT.npz NAME=IDENTITY_COPY...`` computes the
logits and the cache that POP has to give at each boundary and with the fit. Both print their other results as JSON on
their last line.
"""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np

if sys.argv[1] == "engine":
    from gguf import GGMLQuantizationType

    from pypop_gguf import PopError, PopLlama, library, native
    from pypop_gguf.fitting.adapter_file import write_replacements
    from pypop_gguf.fitting.engine_fit import collect
    from pypop_gguf.fitting.products import layer_of
    from pypop_gguf.gguf_files.header import read_header
    from pypop_gguf.gguf_files.tensors import list_tensors, read_matrices

    llama_cpp = library.load()
else:
    import llama_cpp

N_PROMPT, N_DECODE = 41, 3
N_TEXTS, N_TEXT = 24, 40  # to fit keys and values on
FIT_BOUNDARY = 1  # the fit then has layers of every kind
N_CTX, N_UBATCH = 128, 16
CHUNK = 9  # tokens that are completed at once
F32 = 0


def load(path: str):
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
    if not model:
        sys.exit(f"{path} does not load")
    return model


def new_context(model, n_ctx=N_CTX, n_ubatch=N_UBATCH):
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


def cache(context) -> np.ndarray:
    """Returns what llama.cpp saves of the cache: F32 keys, values and recurrent states, and a few integers as F32."""
    size = llama_cpp.llama_state_seq_get_size(context, 0)
    state = (ctypes.c_uint8 * size)()
    size = llama_cpp.llama_state_seq_get_data(context, state, size, 0)
    return np.frombuffer(state, np.float32, size // 4).copy()


def prune(model, context, boundary: int, name: str, results: dict[str, np.ndarray]) -> None:
    """Reads the prompt pruned, and puts what follows from it into the results."""
    tokens = tokens_for(model)
    memory = llama_cpp.llama_get_memory(context)
    llama_cpp.llama_memory_clear(memory, True)
    native.set_boundary(context, boundary)
    decode(context, tokens[: N_PROMPT - 1], 0, False)
    results[f"{name} cache"] = cache(context)
    results[name] = last_logits(model, context, tokens)
    if native.continues(context):
        llama_cpp.llama_memory_clear(memory, True)
        results[f"{name} continued"] = last_logits(model, context, tokens, last_alone=False)


def complete(model, lossless: int) -> dict:
    """Completes a pruned prompt at every boundary where something is lost, and lets a token join the last chunk.

    Returns:
        The errors against the whole model by boundary: of completion, None where a boundary cannot be completed, and of
        the token that joins and those behind it, where it can; or the refusal.
    """
    tokens, context = tokens_for(model), new_context(model)
    memory = llama_cpp.llama_get_memory(context)
    try:
        decode(context, tokens[: N_PROMPT - 1], 0, False)
        whole = last_logits(model, context, tokens)
        llama_cpp.llama_memory_clear(memory, True)
        native.set_completion(context, "f32")
        errors, joined = {}, {}
        for boundary in range(1, lossless):
            for left, found in ((0, errors), (CHUNK, joined)):  # the next token joins a chunk of so many
                llama_cpp.llama_memory_clear(memory, True)
                native.set_boundary(context, boundary)
                decode(context, tokens[: N_PROMPT - 1], 0, False)
                while native.n_incomplete(context) > left:
                    native.complete(context, min(CHUNK, native.n_incomplete(context) - left))
                native.complete_with_next(context, left)
                error = float(np.sum((last_logits(model, context, tokens) - whole) ** 2) / np.sum(whole**2))
                if native.n_incomplete(context) == 0:
                    found[boundary] = None if native.n_lost(context) else error
    except PopError as refused:
        return {"refused": str(refused)}
    finally:
        llama_cpp.llama_free(context)
    return {"errors": errors, "joined": joined}


def fit(path: str, boundary: int, adapter: str, results: dict[str, np.ndarray]) -> dict:
    """Fits keys and values as ``pop-gguf prepare`` does, but to random texts and stored as F32."""
    llm = PopLlama(
        path,
        pop=False,
        n_ctx=N_CTX,
        n_batch=N_CTX,
        n_ubatch=N_UBATCH,
        n_threads=1,
        n_threads_batch=1,
        type_k=F32,
        type_v=F32,
        flash_attn=False,
        verbose=False,
    )
    texts = np.random.default_rng(4).integers(0, min(llm.n_vocab(), 128), (N_TEXTS, N_TEXT)).tolist()
    [sums] = collect(llm, texts, [boundary])
    weights = read_matrices(path, sums.relations)
    fits = {name: sums.solve(name, weights[name]) for name in sums.relations}
    found = {"weights": len(fits), "layers": len({layer_of(name) for name in fits}), "further": bool(sums.bottlenecks)}
    if not fits:
        return found
    found["held_out"] = [
        float(np.mean([getattr(fit, name) for fit in fits.values()])) for name in ("error_before", "error_after")
    ]
    architecture = llm.metadata["general.architecture"]
    # The reference can add a shift only to a bias.
    biases = {tensor.name for tensor in list_tensors(read_header(path)) if tensor.name.endswith(".bias")}
    if architecture in ("kimi-k3", "kimi-linear", "mimo2"):
        biases = set()  # llama.cpp loads them, but its graph does not add all of them
    n_own = {name: weight.shape[1] for name, weight in weights.items()}
    replacements = {
        name: (fit.weight[:, : n_own[name]], fit.shift * (name.removesuffix("weight") + "bias" in biases))
        for name, fit in fits.items()
    }
    further = {name: fit.weight[:, n_own[name] :] for name, fit in fits.items() if fit.weight.shape[1] > n_own[name]}
    prune(llm.model, llm.ctx, boundary, "unfitted", results)
    # The reference has no further inputs, so the adapter that is compared with it has none either.
    for key, inputs in (("further", further), ("fitted", {})):
        write_replacements(
            Path(adapter),
            replacements,
            architecture=architecture,
            boundary=boundary,
            fingerprint=library.fingerprint(path),
            bottlenecks=sums.bottlenecks if inputs else {},
            further=inputs,
            kind=GGMLQuantizationType.F32,
        )
        loaded = native.adapter_init(llm.model, adapter)
        native.clear_adapters(llm.ctx)
        native.add_adapter(llm.ctx, loaded)
        prune(llm.model, llm.ctx, boundary, key, results)
    return found


def engine(path: str, out: str, adapter: str) -> dict:
    model = load(path)
    n_layer, lossless = native.n_layer(model), native.lossless_boundary(model)
    found = {"n_layer": n_layer, "lossless": lossless, "refusal": native.refusal(model), "pruned": {}, "errors": {}}
    found |= {"fit": None, "fit_boundary": FIT_BOUNDARY, "completed": {}}
    if found["refusal"]:
        return found
    results = {}
    for boundary in sorted({n_layer, lossless, max(1, n_layer - n_layer // 3), max(1, n_layer // 2)}):
        context = new_context(model)
        try:
            prune(model, context, boundary, str(boundary), results)
            found["pruned"][boundary] = native.n_pruned(context)
        except (RuntimeError, ValueError) as error:
            found["errors"][boundary] = str(error)
        llama_cpp.llama_free(context)
    found["completed"] = complete(model, lossless)
    if lossless > FIT_BOUNDARY:
        found["fit"] = fit(path, FIT_BOUNDARY, adapter, results)
    np.savez(out, **results)
    context = new_context(model, n_ctx=512, n_ubatch=512)
    full = native.graph_flops(context, boundary=n_layer, n_tokens=512, n_seqs=1, n_outputs=1)
    boundary = max(1, n_layer - n_layer // 3)
    found["flop_limit"] = full / native.graph_flops(context, boundary=boundary, n_tokens=511, n_seqs=1, n_outputs=0)
    return found


def stock(path: str, out: str, copies: list[str]) -> dict:
    results = {}
    for copy in copies:
        name, identity_copy = copy.split("=", 1)
        model = load(identity_copy)
        tokens = tokens_for(model)
        context = new_context(model)
        decode(context, tokens[: N_PROMPT - 1], 0, False)
        state = results[f"{name} cache"] = cache(context)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)

        model = load(path)
        context = new_context(model)
        data = (ctypes.c_uint8 * state.nbytes).from_buffer(state)
        if not llama_cpp.llama_state_seq_set_data(context, data, state.nbytes, 0):
            sys.exit("the state does not fit the original file")
        results[name] = last_logits(model, context, tokens)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    np.savez(out, **results)
    return {}


if __name__ == "__main__":
    llama_cpp._logger.set_verbose(False)
    mode, *arguments = sys.argv[1:]
    print(json.dumps(engine(*arguments) if mode == "engine" else stock(*arguments[:2], arguments[2:])))
