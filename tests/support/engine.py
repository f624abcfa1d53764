"""A thin layer over llama.cpp's C API, for tests that choose sequences, outputs and memories themselves."""

import ctypes

import numpy as np

from pypop_gguf import library, native

llama_cpp = library.load()
F32, F16, Q8_0 = 0, 1, 8  # ggml types


class Engine:
    """A model and a context. Use it in a ``with`` block, which frees both.

    Args:
        path: GGUF file.
        boundary: 1..L; None leaves POP off.
        load_mtp: Whether to load the layers that predict further tokens, too.
        model: The model of another engine, which has to live longer than this one. Default: a model of its own.
        n_gpu_layers: Number of layers on the graphics device, counted from the last, the output among them; 0 keeps all
            of the computation on the CPU. None is llama.cpp's default: all layers, if there is a device.
        parameters: Fields of ``llama_context_params``.
    """

    def __init__(self, path, boundary=None, load_mtp=False, model=None, n_gpu_layers=None, **parameters):
        llama_cpp._logger.set_verbose(False)
        llama_cpp.llama_backend_init()
        model_parameters = llama_cpp.llama_model_default_params()
        model_parameters.load_mtp = load_mtp
        if n_gpu_layers is not None:
            model_parameters.n_gpu_layers = n_gpu_layers
        self.owns_model = model is None
        self.model = model or llama_cpp.llama_model_load_from_file(str(path).encode(), model_parameters)
        assert self.model
        defaults = dict(
            n_ctx=512,
            n_batch=512,
            n_ubatch=16,
            n_threads=1,
            n_threads_batch=1,
            type_k=F32,
            type_v=F32,
            flash_attn_type=llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        )
        if n_gpu_layers == 0:
            defaults |= dict(offload_kqv=False, op_offload=False)
        context_parameters = llama_cpp.llama_context_default_params()
        for name, value in {**defaults, **parameters}.items():
            setattr(context_parameters, name, value)
        self.context = llama_cpp.llama_init_from_model(self.model, context_parameters)
        assert self.context
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        if boundary is not None:
            native.set_boundary(self.context, boundary)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        llama_cpp.llama_free(self.context)
        if self.owns_model:
            llama_cpp.llama_model_free(self.model)

    @property
    def n_pruned(self) -> int:
        return native.n_pruned(self.context)

    def decode(self, entries) -> dict[int, np.ndarray]:
        """Decodes a batch of entries (token, position, sequence, whether it asks for logits).

        A tuple of sequences shares the token.

        Returns:
            The logits F32 [n_vocab] of each entry that asks, by its index in the batch.
        """
        shared = [sequence if isinstance(sequence, tuple) else (sequence,) for _, _, sequence, _ in entries]
        batch = llama_cpp.llama_batch_init(len(entries), 0, max(map(len, shared)))
        batch.n_tokens = len(entries)
        for i, (token, position, _, asks) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, asks
            batch.n_seq_id[i] = len(shared[i])
            for k, sequence in enumerate(shared[i]):
                batch.seq_id[i][k] = sequence
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_batch_free(batch)
        assert status == 0, f"llama_decode returned {status}"
        return {i: self.logits(i) for i, entry in enumerate(entries) if entry[3]}

    def logits(self, index: int) -> np.ndarray:
        pointer = llama_cpp.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(pointer, shape=(self.n_vocab,)).copy()

    def prefill(self, tokens, sequence=0, first=0) -> np.ndarray:
        """Reads a prompt in one batch and returns the logits of its last token, F32 [n_vocab]."""
        entries = [(token, first + i, sequence, i == len(tokens) - 1) for i, token in enumerate(tokens)]
        return self.decode(entries)[len(tokens) - 1]

    def step(self, token, position, sequence=0) -> np.ndarray:
        """Decodes one token and returns its logits, F32 [n_vocab]."""
        return self.decode([(token, position, sequence, True)])[0]

    def state(self, sequence=0) -> bytes:
        size = llama_cpp.llama_state_seq_get_size(self.context, sequence)
        state = (ctypes.c_uint8 * size)()
        return bytes(state[: llama_cpp.llama_state_seq_get_data(self.context, state, size, sequence)])

    def restore(self, state: bytes, sequence=0) -> None:
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        assert llama_cpp.llama_state_seq_set_data(self.context, data, len(state), sequence)
