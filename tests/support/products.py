"""Single products of quantized weights and single attentions, computed by ggml's CPU backend as it does in a model.

``in_process`` computes one in a process of its own, whose environment may have other settings.
"""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from cffi import FFI

from tests.support import emulation
from tests.support.paths import ROOT

DECLARATIONS = """
struct ggml_context; struct ggml_cgraph;
struct ggml_tensor { int type; void * buffer; };
struct ggml_init_params { size_t mem_size; void * mem_buffer; bool no_alloc; };
struct ggml_context * ggml_init(struct ggml_init_params params);
void ggml_free(struct ggml_context * ctx);
struct ggml_tensor * ggml_new_tensor(struct ggml_context * ctx, int type, int n_dims, const int64_t * ne);
struct ggml_tensor * ggml_mul_mat(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
struct ggml_tensor * ggml_mul_mat_id(struct ggml_context * ctx, struct ggml_tensor * as, struct ggml_tensor * b,
                                     struct ggml_tensor * ids);
struct ggml_tensor * ggml_flash_attn_ext(struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * k,
                                         struct ggml_tensor * v, struct ggml_tensor * mask, float scale,
                                         float max_bias, float logit_softcap);
void ggml_flash_attn_ext_add_sinks(struct ggml_tensor * a, struct ggml_tensor * sinks);
struct ggml_cgraph * ggml_new_graph(struct ggml_context * ctx);
void ggml_build_forward_expand(struct ggml_cgraph * graph, struct ggml_tensor * tensor);
size_t ggml_nbytes(const struct ggml_tensor * tensor);
size_t ggml_row_size(int type, int64_t ne);
size_t ggml_quantize_chunk(int type, const float * src, void * dst, int64_t start, int64_t nrows, int64_t n_per_row,
                           const float * imatrix);
void * ggml_backend_dev_by_type(int type);
void * ggml_backend_dev_init(void * device, const char * params);
void * ggml_backend_dev_backend_reg(void * device);
bool ggml_backend_dev_supports_op(void * device, const struct ggml_tensor * op);
void * ggml_backend_dev_buffer_type(void * device);
void * ggml_backend_reg_get_proc_address(void * reg, const char * name);
void ggml_backend_free(void * backend);
void * ggml_backend_buft_alloc_buffer(void * buft, size_t size);
void * ggml_backend_alloc_ctx_tensors_from_buft(struct ggml_context * ctx, void * buft);
void ggml_backend_buffer_free(void * buffer);
void ggml_backend_tensor_set(struct ggml_tensor * tensor, const void * data, size_t offset, size_t size);
void ggml_backend_tensor_get(const struct ggml_tensor * tensor, void * data, size_t offset, size_t size);
int ggml_backend_graph_compute(void * backend, struct ggml_cgraph * cgraph);
"""
CPU = 0  # GGML_BACKEND_DEVICE_TYPE_CPU
F32, F16, I32 = 0, 1, 26  # GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_I32


@dataclass
class Product:
    """``output[..., rows, outputs] = input[..., rows, inputs] @ weights[outputs, inputs].T``

    Attributes:
        kind: ggml's number of the type of the weights.
        weights: The quantized weights, a row of bytes for each output. Experts are one more dimension in front.
        input: The rows. It may have up to two more dimensions in front. With experts it is (rows, 1, inputs).
        experts: The experts that each row meets: (rows, used). The output is (rows, used, outputs).
        n_threads: Threads that compute it.
        repeat: How often it is computed. The shortest time counts.
    """

    kind: int
    weights: np.ndarray
    input: np.ndarray
    n_threads: int = 1
    repeat: int = 1
    experts: np.ndarray | None = None


@dataclass
class Attention:
    """Attention of ``query`` (sequences, heads, queries, n) on ``key`` and ``value`` (sequences, heads, keys, n).

    Attributes:
        mask: What is added to the scaled products: (1 or sequences, 1, queries, keys), or None.
        sinks: A product for each head that has no value, or None.
        kind: ggml's type of the keys and values.
    """

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    mask: np.ndarray | None
    sinks: np.ndarray | None = None
    kind: int = F16
    n_threads: int = 1
    repeat: int = 1


class Ggml:
    """ggml in the libraries of this package."""

    def __init__(self):
        from pypop_gguf import library, parent

        self.ffi = FFI()
        self.ffi.cdef(DECLARATIONS)
        self.lib = self.ffi.dlopen(parent.library_path(parent.native_library(library.load())))
        self.device = self.lib.ggml_backend_dev_by_type(CPU)

    def function(self, name: str, signature: str):
        """Returns a function of the CPU backend, which may be a library that is loaded later."""
        registry = self.lib.ggml_backend_dev_backend_reg(self.device)
        return self.ffi.cast(signature, self.lib.ggml_backend_reg_get_proc_address(registry, name.encode()))

    def quantize(self, kind: int, weights: np.ndarray) -> np.ndarray:
        n_outputs, n_inputs = weights.shape
        quantized = np.empty((n_outputs, self.lib.ggml_row_size(kind, n_inputs)), np.uint8)
        source = self.ffi.from_buffer("float[]", np.ascontiguousarray(weights, np.float32))
        target = self.ffi.from_buffer("char[]", quantized)
        importance = self.ffi.from_buffer("float[]", np.ones(n_inputs, np.float32))
        self.lib.ggml_quantize_chunk(kind, source, target, 0, n_outputs, n_inputs, importance)
        return quantized

    @contextlib.contextmanager
    def _context(self) -> Iterator:
        context = self.lib.ggml_init(self.ffi.new("struct ggml_init_params *", [2**20, self.ffi.NULL, True])[0])
        yield context
        self.lib.ggml_free(context)

    def _tensor(self, context, kind: int, shape: tuple[int, ...]):
        return self.lib.ggml_new_tensor(context, kind, len(shape), self.ffi.new("int64_t[]", shape[::-1]))

    def _buffer_type(self, weights, product):
        """Returns where llama.cpp would put the weights of this product."""
        extra = self.function("ggml_backend_dev_get_extra_bufts", "void ** (*)(void *)")(self.device)
        while extra != self.ffi.NULL and extra[0] != self.ffi.NULL:
            weights.buffer = self.lib.ggml_backend_buft_alloc_buffer(extra[0], 0)
            supported = self.lib.ggml_backend_dev_supports_op(self.device, product)
            self.lib.ggml_backend_buffer_free(weights.buffer)
            weights.buffer = self.ffi.NULL
            if supported:
                return extra[0]
            extra += 1
        return self.lib.ggml_backend_dev_buffer_type(self.device)

    def compute(self, asked: Product | Attention) -> tuple[np.ndarray, float]:
        """Returns the output and the shortest time in seconds. With one thread, the time is that of the processor."""
        return self._product(asked) if isinstance(asked, Product) else self._attention(asked)

    def _product(self, product: Product) -> tuple[np.ndarray, float]:
        shape = product.input.shape
        assert product.weights.shape[-1] == self.lib.ggml_row_size(product.kind, shape[-1])
        *outer, n_outputs, _ = product.weights.shape
        with self._context() as of_weights, self._context() as of_rest:
            weights = self._tensor(of_weights, product.kind, (*outer, n_outputs, shape[-1]))
            rows = self._tensor(of_rest, F32, shape)
            values = [(weights, product.weights), (rows, product.input.astype(np.float32))]
            if product.experts is None:
                output = self.lib.ggml_mul_mat(of_rest, weights, rows)
                shape = (*shape[:-1], n_outputs)
            else:
                experts = self._tensor(of_rest, I32, product.experts.shape)
                values.append((experts, product.experts.astype(np.int32)))
                output = self.lib.ggml_mul_mat_id(of_rest, weights, rows, experts)
                shape = (*product.experts.shape, n_outputs)
            buffer_type = self._buffer_type(weights, output)
            buffer = self.lib.ggml_backend_alloc_ctx_tensors_from_buft(of_weights, buffer_type)
            result = self._run(of_rest, output, values, shape, product)
            self.lib.ggml_backend_buffer_free(buffer)
        return result

    def _attention(self, attention: Attention) -> tuple[np.ndarray, float]:
        kinds = {"query": F32, "key": attention.kind, "value": attention.kind, "mask": F16, "sinks": F32}
        with self._context() as context:
            tensors, values = dict.fromkeys(kinds, self.ffi.NULL), []
            for name, kind in kinds.items():
                array = getattr(attention, name)
                if array is not None:
                    tensors[name] = self._tensor(context, kind, array.shape)
                    if kind in (F16, F32):
                        stored = array.astype(np.float16 if kind == F16 else np.float32)
                    else:
                        stored = self.quantize(kind, array.reshape(-1, array.shape[-1]))
                    values.append((tensors[name], stored))
            sources = [tensors[name] for name in ("query", "key", "value", "mask")]
            n = attention.query.shape[-1]
            output = self.lib.ggml_flash_attn_ext(context, *sources, n**-0.5, 0.0, 0.0)
            if attention.sinks is not None:
                self.lib.ggml_flash_attn_ext_add_sinks(output, tensors["sinks"])
            sequences, heads, queries, _ = attention.query.shape
            shape = (sequences, queries, heads, attention.value.shape[-1])
            return self._run(context, output, values, shape, attention)

    def _run(self, context, output, values: list, shape: tuple[int, ...], asked) -> tuple[np.ndarray, float]:
        lib = self.lib
        graph = lib.ggml_new_graph(context)
        lib.ggml_build_forward_expand(graph, output)
        buffer_type = lib.ggml_backend_dev_buffer_type(self.device)
        buffer = lib.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        for tensor, value in values:
            lib.ggml_backend_tensor_set(tensor, self.ffi.from_buffer(np.ascontiguousarray(value)), 0, value.nbytes)
        backend = lib.ggml_backend_dev_init(self.device, self.ffi.NULL)
        self.function("ggml_backend_set_n_threads", "void (*)(void *, int)")(backend, asked.n_threads)
        clock = time.thread_time if asked.n_threads == 1 else time.perf_counter
        times = []
        for _ in range(asked.repeat):
            start = clock()
            assert lib.ggml_backend_graph_compute(backend, graph) == 0
            times.append(clock() - start)
        result = np.empty(shape, np.float32)
        lib.ggml_backend_tensor_get(output, self.ffi.from_buffer(result), 0, result.nbytes)
        lib.ggml_backend_free(backend)
        lib.ggml_backend_buffer_free(buffer)
        return result, min(times)


def in_process(products: list[Product | Attention], kernels: str | None) -> list[tuple[np.ndarray, float]]:
    """Computes products in a process of its own. POP_KERNELS is ``kernels`` in its environment, or is missing."""
    command = [sys.executable, "-c", "from tests.support.products import main; main()"]
    done = subprocess.run(
        command, input=pickle.dumps(products), capture_output=True, cwd=ROOT, env=emulation.environment_with(kernels)
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return pickle.loads(done.stdout)


def in_emulator(products: list[Product], kernels: str | None, name: str) -> list[np.ndarray]:
    """Computes products in one of the emulators in tests/support/emulation.py."""
    written = emulation.run(name, "products", given=_packed(products), kernels=kernels)
    return _unpacked(written, products)


def with_amx(
    products: list[Product], kernels: str | None, *, granted: bool = True
) -> tuple[list[np.ndarray], tuple[int, int]]:
    """Computes products as a processor with AMX does, and returns what ``emulation.run_with_amx`` counts, too."""
    written, counts = emulation.run_with_amx("products", given=_packed(products), kernels=kernels, granted=granted)
    return _unpacked(written, products), counts


def _packed(products: list[Product]) -> bytes:
    """Returns what tests/programs/products.cpp reads."""
    given = b""
    for product in products:
        used = 0 if product.experts is None else product.experts.shape[-1]
        inputs = product.input.shape
        *outer, n_outputs, _ = product.weights.shape
        header = [product.kind, product.n_threads, inputs[-1], n_outputs, *outer, *[1] * (1 - len(outer))]
        header += [*inputs[::-1], *[1] * (4 - len(inputs)), used]
        given += np.array(header, np.int64).tobytes() + product.weights.tobytes()
        given += product.input.astype(np.float32).tobytes()
        if product.experts is not None:
            given += product.experts.astype(np.int32).tobytes()
    return given


def _unpacked(written: bytes, products: list[Product]) -> list[np.ndarray]:
    """Returns the outputs that tests/programs/products.cpp has written."""
    rows = [product.input.shape[:-1] if product.experts is None else product.experts.shape for product in products]
    shapes = [(*outer, product.weights.shape[-2]) for outer, product in zip(rows, products, strict=True)]
    ends = np.cumsum([np.prod(shape) for shape in shapes])
    flat = np.split(np.frombuffer(written, np.float32), ends)
    assert not flat[-1].size
    return [values.reshape(shape) for values, shape in zip(flat, shapes)]


def main() -> None:
    ggml = Ggml()
    sys.stdout.buffer.write(pickle.dumps([ggml.compute(product) for product in pickle.load(sys.stdin.buffer)]))
