"""Saved states and shared caches: whose a state is, and which of its positions ``PopLlama`` may go on from.

A state is llama-cpp-python's ``LlamaState`` with three more attributes, so that a plain ``Llama`` loads it as well:
``pop_model``, a digest of the model; ``pop_computed_with``, int32 [n_tokens], the boundary of each position; ``pop_adapters``, the
digests of the fitted projections by boundary.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pypop_gguf import library
from pypop_gguf.errors import PopError
from pypop_gguf.gguf_files.header import GGUFHeader, read_header

if TYPE_CHECKING:
    from pypop_gguf.llama import PopLlama

llama_cpp = library.load()

_SAMPLE_BYTES = 256
# Context parameters that decide what the cache holds for a text, and those that decide whether a state fits.
_CONTENT = (
    "rope_scaling_type",
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
)
_CONTENT += ("yarn_beta_slow", "yarn_orig_ctx", "attention_type")
_LAYOUT = ("n_ctx", "n_seq_max", "type_k", "type_v", "flash_attn_type", "swa_full", "kv_unified")


def file_digest(path: str | os.PathLike, first: GGUFHeader | None = None) -> str:
    """Of a GGUF file's tensors: their names, shapes, types and first bytes; of a split file, of every shard's. Keys do not count.

    Args:
        path: The file; of a split one, the first shard.
        first: Its header, where it has been read already.

    Raises:
        PopError: The file cannot be read.
    """
    digest = hashlib.sha256()
    for i, shard in enumerate(_shards(os.fspath(path))):
        header = first if first and i == 0 else read_header(shard)
        digest.update(header.tensor_infos)
        with open(shard, "rb") as file:
            for offset in _tensor_offsets(header):
                file.seek(header.data_offset + offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _shards(path: str) -> list[str]:
    split = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", path, re.DOTALL)
    if not split:
        return [path]
    return [f"{split[1]}-{shard:05}-of-{split[2]}.gguf" for shard in range(1, int(split[2]) + 1)]


def _tensor_offsets(header: GGUFHeader) -> Iterator[int]:
    """From the start of the tensor data."""
    infos, at, order = header.tensor_infos, 0, header.order
    for _ in range(header.n_tensors):
        at += 8 + struct.unpack_from(f"{order}Q", infos, at)[0]  # the name
        at += 4 + 8 * struct.unpack_from(f"{order}I", infos, at)[0] + 4  # the shape, the type
        yield struct.unpack_from(f"{order}Q", infos, at)[0]
        at += 8


def model_digest(llm: PopLlama, header: GGUFHeader) -> str:
    """Of all that decides which keys and values a text leaves in the cache when every layer reads it."""
    lora = (file_digest(llm.lora_path), llm.lora_scale) if llm.lora_path else None
    parameters = [getattr(llm.context_params, name) for name in _CONTENT]
    parts = file_digest(llm.model_path, header), lora, sorted((llm.kv_overrides or {}).items()), parameters
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def save(llm: PopLlama):
    """A ``LlamaState`` of what is cached."""
    buffer = ctypes.create_string_buffer(llama_cpp.llama_state_get_size(llm.ctx))
    size = llama_cpp.llama_state_get_data(llm.ctx, ctypes.cast(buffer, ctypes.POINTER(ctypes.c_uint8)), len(buffer))
    # Without logits_all nobody reads scores, so they are not kept: a plain Llama spreads the one row over its own.
    scores = llm._scores.copy() if llm._logits_everywhere else np.zeros((1, llm.n_vocab()), dtype=np.single)
    input_ids = llm.input_ids.copy()
    input_ids[llm.n_tokens :] = -1  # a cache compares all of it with the prompt
    state = llama_cpp.LlamaState(input_ids, scores, llm.n_tokens, buffer.raw[:size], size, llm._seed)
    state.pop_model, state.pop_adapters = llm._digest, llm._adapters
    state.pop_computed_with = llm._computed_with[: llm.n_tokens].copy()
    return state


def load(llm: PopLlama, state) -> None:
    """Puts a state into the cache, the boundary of each position into the record; what a plain ``Llama`` saved counts as whole.

    Raises:
        PopError: The state is of another model, or does not fit. In the second case the cache is empty.
    """
    n, name = state.n_tokens, os.path.basename(llm.model_path)
    if getattr(state, "pop_model", llm._digest) != llm._digest:
        raise PopError(
            f"this state was not saved by {name} with the same LoRA, overrides and rope settings: load it where it was saved"
        )
    if state.scores.shape[1:] != (llm.n_vocab(),):
        raise PopError(f"this state is of a model with another vocabulary than {name}: load it where it was saved")
    if n > len(llm.input_ids):
        raise PopError(
            f"this state holds {n} tokens, the context {len(llm.input_ids)}: open the model with n_ctx={n} or more"
        )
    data = (ctypes.c_uint8 * state.llama_state_size).from_buffer_copy(state.llama_state)
    with library.captured_log() as errors:
        loaded = llama_cpp.llama_state_set_data(llm.ctx, data, len(data)) == len(data)
    llm.n_tokens, llm._requires_eval = n, True
    if not loaded:
        llm._ctx.kv_cache_clear()
        llm.reset()
        reason = errors[0].split(": ")[-1] if errors else "of another size"
        raise PopError(
            f"this state does not fit {name} as it is open here ({reason}): load it with the model and options that saved it"
        )

    llm._seed = state.seed
    llm.input_ids[:n] = state.input_ids[:n]
    llm._computed_with[:n] = getattr(state, "pop_computed_with", llm.pop.n_layer)
    for boundary in np.unique(llm._computed_with[:n]).tolist():
        if boundary < llm.pop.n_layer and getattr(state, "pop_adapters", {}).get(boundary) != llm._adapters.get(
            boundary
        ):
            llm._computed_with[:n][llm._computed_with[:n] == boundary] = 0  # other projections filled the upper layers
    if llm._logits_everywhere and len(state.scores) == n:
        llm.scores[:n] = state.scores
    elif llm._logits_everywhere:
        llm._computed_with[:n] = 0  # read without their logits


class ModelCache(llama_cpp.llama_cache.BaseLlamaCache):
    """A model's own entries of a cache that others may share: its keys are tokens plus a number that stands for the model.

    Attributes:
        shared: The cache.
    """

    def __init__(self, shared, llm: PopLlama) -> None:
        self.shared = shared
        # the version too: a cache on disk outlives it, and states have no format that does
        layout = [getattr(llm.context_params, name) for name in _LAYOUT]
        parts = llm._digest, layout, llm._logits_everywhere, llama_cpp.__version__
        self._offset = int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16) << 31

    def _key(self, tokens: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._offset + int(token) for token in tokens)

    @property
    def capacity_bytes(self) -> int:
        return self.shared.capacity_bytes

    @property
    def cache_size(self) -> int:
        return self.shared.cache_size

    def __getitem__(self, key: Sequence[int]):
        return self.shared[self._key(key)]

    def __contains__(self, key: Sequence[int]) -> bool:
        return self._key(key) in self.shared

    def __setitem__(self, key: Sequence[int], value) -> None:
        self.shared[self._key(key)] = value
