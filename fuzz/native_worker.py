"""Opens GGUF files with the native library for fuzz/native.py, in a process of its own.

Each request is one line of JSON. The answer is one line too, after a line for each step before it begins. llama.cpp
ends the process where one of its own assertions fails.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys

from pypop_gguf import PopError, library, native

llama_cpp = library.load()


def say(**what) -> None:
    print(json.dumps(what), flush=True)


def open_model(path: str):
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    return llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters)


def open_context(context) -> dict:
    try:
        choice = native.open_context(context, None)
    except PopError as error:
        if "(n_batch)" not in str(error):
            raise
        choice = native.open_context(
            context, None, n_tail=1
        )  # the file's tail is longer than this small context's batch
    return {"outcome": "accepted", "min_tokens": choice.min_tokens}


def read_model(path: str) -> dict:
    say(step="load")
    model = open_model(path)
    if not model:
        return {"outcome": "llama.cpp does not load it"}
    try:
        say(step="keys")
        result = {"n_layer": native.n_layer(model), "min_tokens": 0}
        say(step="context")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = 64, 1, 1
        context = llama_cpp.llama_init_from_model(model, parameters)
        if not context:
            return {"outcome": "llama.cpp makes no context"}
        try:
            say(step="boundary")
            try:
                outcome = open_context(context)
            except PopError as error:
                outcome = {"outcome": "refused", "why": str(error)}
            result |= {"boundary": native.get_boundary(context)} | outcome
            say(step="decode")
            tokens = (ctypes.c_int32 * 12)(*range(3, 15))
            status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, 12))
            result |= {"decoded": status, "pruned": native.n_pruned(context)}
        finally:
            llama_cpp.llama_free(context)
        return result
    finally:
        llama_cpp.llama_model_free(model)


def read_adapter(model, context, path: str) -> dict:
    say(step="adapter")
    try:
        boundary = native.load_adapter(context, model, path)
    except PopError as error:
        return {"outcome": "refused", "why": str(error)}
    say(step="decode")
    native.set_boundary(context, boundary)
    tokens = (ctypes.c_int32 * 12)(*range(3, 15))
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, 12))
    native.clear_adapters(context)
    return {"outcome": "accepted", "boundary": boundary, "decoded": status}


def main() -> None:
    if "ASAN_OPTIONS" not in os.environ:  # the address sanitizer needs more address space
        size = 4 << 30
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    llama_cpp.llama_backend_init()
    with library.captured_log():
        model = open_model(sys.argv[1])
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = 64, 1, 1
        context = llama_cpp.llama_init_from_model(model, parameters)
        say(step="ready")
        for line in sys.stdin:
            kind, path = json.loads(line)
            say(**(read_model(path) if kind == "model" else read_adapter(model, context, path)))


if __name__ == "__main__":
    main()
