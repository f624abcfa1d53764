"""Images in chats: a second question about the same image finds image and text before it in the cache.

llama-cpp-python's mtmd chat handlers clear the cache, then read a message's chunks of text and images in turn. While one does that, a
``Reader`` stands between it and the model: what the cache holds already is skipped, and an image is known by a hash of its file.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np

from pypop_gguf import _library

if TYPE_CHECKING:
    from pypop_gguf.llama import PopLlama


class Reader:
    """Stands for a handler's ``mtmd_cpp`` module while the handler reads a prompt.

    Attributes:
        known: Positions of the cache that may still prove to be the prompt's.
        reused: Positions that did.
    """

    def __init__(self, llm: PopLlama, mtmd_cpp) -> None:
        self._llm, self._mtmd_cpp = llm, mtmd_cpp
        self.known = self.reused = 0

    def __getattr__(self, name: str):
        return getattr(self._mtmd_cpp, name)

    def rewind(self) -> None:
        """What the handler's wish to clear the cache becomes."""
        self.known, self._llm.n_tokens = self._llm.n_tokens, 0

    def skip(self, ids: np.ndarray, whole: bool) -> int:
        """Moves on over ids that the cache holds: all or, unless ``whole``, the first of them; returns how many."""
        start = self._llm.n_tokens
        cached = self._llm.input_ids[start : min(start + len(ids), self.known)]
        differs = np.flatnonzero(cached != ids[: len(cached)])
        n = int(differs[0]) if len(differs) else len(cached)
        if whole and n < len(ids):
            n = 0
        if n < len(ids):
            self.known = 0
        self._llm.n_tokens += n
        self.reused += n
        return n

    def mtmd_helper_eval_chunk_single(self, mtmd_ctx, ctx, chunk, n_past, seq_id, n_batch, logits_last, new_n_past) -> int:
        """Reads an image, or finds it in the cache. The record gets tokens that stand for it: its hash as a seed."""
        start, n_pos = int(n_past.value), int(self._mtmd_cpp.mtmd_input_chunk_get_n_pos(chunk))
        digest = self._mtmd_cpp.mtmd_input_chunk_get_id(chunk)
        ids = np.random.default_rng(int(digest, 16) if digest else None).integers(self._llm.n_vocab(), size=n_pos)
        if self.skip(ids, whole=True):
            ctypes.cast(new_n_past, ctypes.POINTER(ctypes.c_int32))[0] = start + n_pos
            return 0
        boundary = self._llm._asked_boundary()
        _library.set_boundary(self._llm._ctx.ctx, boundary)
        self._llm._ctx.kv_cache_seq_rm(-1, start, -1)
        status = self._mtmd_cpp.mtmd_helper_eval_chunk_single(mtmd_ctx, ctx, chunk, n_past, seq_id, n_batch, logits_last, new_n_past)
        if status == 0:
            self._record(start, ids, boundary)
        return status

    def _record(self, start: int, ids: np.ndarray, boundary: int) -> None:
        llm, end = self._llm, start + len(ids)
        llm.input_ids[start:end] = ids
        llm._computed_with[start:end] = llm._as_recorded(boundary)
        llm._computed_with[start : min(end, llm.pop.head)] = llm.pop.n_layer
