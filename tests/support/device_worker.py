"""One process of tests/engine/test_devices.py. It uses the build with the RPC backend, which the wheel does not have.

``serve PORT`` makes the CPU of this machine a device behind a local port. ``run MODEL BOUNDARY CONTINUES OUT.npy
PORT...`` reads a prompt with the layers split over such devices, or on the CPU if there are no ports, and saves the
logits.
"""

import ctypes
import json
import sys

import llama_cpp
import numpy as np

N_PROMPT, N_DECODE = 41, 3
CPU_DEVICE = 0  # GGML_BACKEND_DEVICE_TYPE_CPU

library = llama_cpp.llama_cpp._lib
handle = ctypes.c_void_p


def serve(port: str) -> None:
    library.ggml_backend_dev_by_type.restype = handle
    rpc = ctypes.CDLL(str(llama_cpp.llama_cpp._base_path / "libggml-rpc.so"))
    devices = (handle * 1)(library.ggml_backend_dev_by_type(CPU_DEVICE))
    rpc.ggml_backend_rpc_start_server(
        f"127.0.0.1:{port}".encode(), None, ctypes.c_size_t(1), ctypes.c_size_t(1), devices
    )


def run(path: str, boundary: str, continues: str, out: str, *ports: str) -> None:
    llama_cpp.llama_backend_init()
    rpc = ctypes.CDLL(str(llama_cpp.llama_cpp._base_path / "libggml-rpc.so"))
    rpc.ggml_backend_rpc_add_server.restype = handle
    for port in ports:
        registry = rpc.ggml_backend_rpc_add_server(f"127.0.0.1:{port}".encode())
        if not registry:
            sys.exit(f"no device answers at port {port}")
        library.ggml_backend_register(handle(registry))
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 99
    shares = (ctypes.c_float * llama_cpp.LLAMA_MAX_DEVICES)(*[1.0] * len(ports))
    parameters.tensor_split = shares
    model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
    context_parameters = llama_cpp.llama_context_default_params()
    context_parameters.n_ctx, context_parameters.n_ubatch = 128, 16
    context_parameters.type_k = context_parameters.type_v = 0  # F32
    context_parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, context_parameters)
    if not library.llama_pop_set_boundary(handle(context), ctypes.c_int32(int(boundary))):
        sys.exit("the boundary was refused")
    library.llama_pop_set_continuation(handle(context), ctypes.c_bool(continues == "True"))

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
    library.llama_pop_n_pruned.restype = ctypes.c_uint64
    print(json.dumps({"pruned": library.llama_pop_n_pruned(handle(context))}))


if __name__ == "__main__":
    mode, *arguments = sys.argv[1:]
    serve(*arguments) if mode == "serve" else run(*arguments)
