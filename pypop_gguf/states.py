"""Saved states and shared caches: which model a state is of, and which of its positions a ``PopLlama`` may reuse.

A state is llama-cpp-python's ``LlamaState`` with four more attributes, so that a plain ``Llama`` loads it as well:
``pop_model``, a digest of the model; ``pop_computed_with``, the boundary of each position, int32 [n_tokens];
``pop_adapters``, the digests of the adapters in use by boundary; ``pop_checksum``, the CRC-32 of llama.cpp's bytes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pypop_gguf import library
from pypop_gguf.cache_record import CacheRecord
from pypop_gguf.errors import PopError
from pypop_gguf.gguf_files.header import GGUFHeader, read_header
from pypop_gguf.gguf_files.tensors import list_shards, list_tensors

if TYPE_CHECKING:
    import llama_cpp
else:
    llama_cpp = library.load()

_SAMPLE_BYTES = 256
_using_a_cache = threading.Lock()  # models in several threads may share one, which changes with each look-up
# Context parameters that decide what the cache holds for a text.
_CONTENT = (
    "rope_scaling_type",
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_orig_ctx",
    "attention_type",
)
# Context parameters that decide whether a state fits.
_LAYOUT = ("n_ctx", "n_seq_max", "type_k", "type_v", "flash_attn_type", "swa_full", "kv_unified")


def file_digest(path: str | os.PathLike, first: GGUFHeader | None = None) -> str:
    """Returns a digest of the names, shapes, types and first bytes of a GGUF file's tensors. Its keys do not count.

    Args:
        path: The file. If it is split, this is the first shard, and the digest covers all shards.
        first: The header of this file, if it has been read already.

    Raises:
        PopError: The file cannot be read.
    """
    digest = hashlib.sha256()
    for i, shard in enumerate(list_shards(path)):
        header = first if first and i == 0 else read_header(shard)
        digest.update(header.tensor_infos)
        with open(shard, "rb") as file:
            for tensor in list_tensors(header):
                file.seek(header.data_offset + tensor.offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def model_digest(
    header: GGUFHeader,
    model_path: str,
    context_params: Any,
    lora: tuple[str, float] | None,
    kv_overrides: Mapping[str, Any] | None,
) -> str:
    """Returns a digest of all that decides which keys and values a text leaves in the cache when every layer reads it.

    Args:
        header: The header of the model's file.
        model_path: The file.
        context_params: llama.cpp's parameters of the context.
        lora: The LoRA's file and scale, if there is one.
        kv_overrides: The keys of the file that are overridden.
    """
    parameters = [getattr(context_params, name) for name in _CONTENT]
    lora_parts = (file_digest(lora[0]), lora[1]) if lora else None
    parts = file_digest(model_path, header), lora_parts, sorted((kv_overrides or {}).items()), parameters
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def save(
    ctx: int,
    *,
    input_ids: np.ndarray,
    n_tokens: int,
    scores: np.ndarray,
    seed: int,
    record: CacheRecord,
    digest: str,
    adapters: Mapping[int, str],
):
    """Makes a ``LlamaState`` of what is cached in a context.

    Args:
        ctx: The context.
        input_ids: Token of each position, int32 [n_ctx].
        n_tokens: Number of positions that are cached.
        scores: Logits of these positions if they are kept, else those of any one, F32 [n, n_vocab].
        seed: The sampler's seed.
        record: The boundaries of the positions.
        digest: The model's digest.
        adapters: The digests of the adapters in use, by boundary.
    """
    buffer = ctypes.create_string_buffer(llama_cpp.llama_state_get_size(ctx))
    size = llama_cpp.llama_state_get_data(ctx, ctypes.cast(buffer, ctypes.POINTER(ctypes.c_uint8)), len(buffer))
    input_ids = input_ids.copy()
    input_ids[n_tokens:] = -1  # a cache compares all of it with the prompt
    state: Any = llama_cpp.LlamaState(input_ids, scores, n_tokens, buffer.raw[:size], size, seed)
    state.pop_model, state.pop_adapters = digest, dict(adapters)
    state.pop_computed_with = record.to_state(n_tokens)
    state.pop_checksum = zlib.crc32(state.llama_state)
    return state


def check(state, name: str, *, digest: str, n_vocab: int, n_positions: int) -> None:
    """Checks that a state is whole, of this model, and no longer than its context.

    A plain ``Llama``'s state has neither digest nor checksum.

    Raises:
        PopError: It is not.
    """
    if not _is_whole(state):
        raise PopError("this state is damaged or cut short: save it again")
    if getattr(state, "pop_model", digest) != digest:
        raise PopError(
            f"this state was not saved by {name} with the same LoRA, overrides and rope settings: load it where it was "
            "saved"
        )
    if state.scores.shape[1:] != (n_vocab,):
        raise PopError(f"this state is of a model with another vocabulary than {name}: load it where it was saved")
    if state.n_tokens > n_positions:
        raise PopError(
            f"this state holds {state.n_tokens} tokens, the context {n_positions}: "
            f"open the model with n_ctx={state.n_tokens} or more"
        )


def _is_whole(state) -> bool:
    n, record = state.n_tokens, getattr(state, "pop_computed_with", None)
    return bool(
        isinstance(n, (int, np.integer))
        and 0 <= n <= len(state.input_ids)
        and np.ndim(state.scores) == 2
        and 0 < state.llama_state_size == len(state.llama_state)
        and (record is None or len(record) == n)
        and getattr(state, "pop_checksum", None) in (None, zlib.crc32(state.llama_state))
    )


def restore(state, name: str, ctx: int) -> None:
    """Puts a state into a context of the model with this name.

    Raises:
        PopError: It does not fit. The cache may then hold anything.
    """
    data = (ctypes.c_uint8 * state.llama_state_size).from_buffer_copy(state.llama_state)
    with library.captured_log() as errors:
        if llama_cpp.llama_state_set_data(ctx, data, len(data)) == len(data):
            memory = llama_cpp.llama_get_memory(ctx)
            if llama_cpp.llama_memory_seq_pos_max(memory, 0) + 1 >= state.n_tokens:
                return
            errors.append("fewer positions than tokens")
    reason = errors[0].split(": ")[-1] if errors else "of another size"
    if "V transposition" in reason:
        raise PopError(
            f"this state was saved with another flash_attn than {name} is open with: open it as it was there "
            "(llama_cpp.Llama has flash_attn=False by default)"
        )
    raise PopError(
        f"this state does not fit {name} as it is open here ({reason}): "
        "load it with the model and options that saved it"
    )


def restore_record(state, record: CacheRecord, adapters: Mapping[int, str]) -> None:
    """Puts the boundaries of a state into the record. What a plain ``Llama`` has saved was read by every layer.

    Positions that another adapter has filled cannot be reused.
    """
    boundaries, theirs = getattr(state, "pop_computed_with", None), getattr(state, "pop_adapters", {})
    other = {at for at in {*theirs, *adapters} if theirs.get(at) != adapters.get(at)}
    record.from_state(state.n_tokens, boundaries, unusable=other)


class ModelCache(llama_cpp.llama_cache.BaseLlamaCache):
    """A model's own entries in a cache that others may share: the keys are tokens plus a number for the model.

    Args:
        shared: The cache.
        digest: The model's digest.
        context_params: llama.cpp's parameters of the context.
        with_scores: Whether the model's states hold the logits of each position.

    Attributes:
        shared: The cache.
    """

    def __init__(self, shared, digest: str, context_params: Any, with_scores: bool) -> None:
        self.shared = shared
        # The version counts too: a cache on disk outlives it, and states have no format that does.
        layout = [getattr(context_params, name) for name in _LAYOUT]
        parts = digest, layout, with_scores, llama_cpp.__version__
        self._offset = int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16) << 31

    def _key(self, tokens: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._offset + int(token) for token in tokens)

    @property
    def capacity_bytes(self) -> int:  # type: ignore[override]
        """The size in bytes that the shared cache may have."""
        return self.shared.capacity_bytes

    @property
    def cache_size(self) -> int:
        """The size in bytes of what the shared cache holds, for all models."""
        return self.shared.cache_size

    def __getitem__(self, key: Sequence[int]):
        with _using_a_cache:
            return self.shared[self._key(key)]

    def __contains__(self, key: Sequence[int]) -> bool:
        with _using_a_cache:
            return self._key(key) in self.shared

    def __setitem__(self, key: Sequence[int], value) -> None:
        with _using_a_cache:
            self.shared[self._key(key)] = value
