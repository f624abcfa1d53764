"""Images in chats: a second question about the same image finds image and text before it in the cache.

llama-cpp-python's mtmd chat handlers clear the cache, then read a message's chunks of text and images in turn. While one does that, a
``Reader`` stands between it and the model: what the cache holds already is skipped, an image is known by a hash of its file, and
between the micro-batches of an image the call can be cancelled.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np

from pypop_gguf import native
from pypop_gguf.errors import PopError
from pypop_gguf.status import Cancelled

if TYPE_CHECKING:
    from pypop_gguf.llama import PopLlama


class Reader:
    """Stands for a handler's ``mtmd_cpp`` module while the handler reads a prompt.

    Attributes:
        known: Positions of the cache that may still prove to be the prompt's.
        reused: Positions that did.
        total: Positions of the prompt, 0 before the handler has cut it into chunks.
    """

    def __init__(self, llm: PopLlama, mtmd_cpp) -> None:
        self._llm, self._mtmd_cpp = llm, mtmd_cpp
        self.known = self.reused = self.total = 0

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

    def mtmd_tokenize(self, mtmd_ctx, chunks, *arguments) -> int:
        """Cuts the prompt into chunks of text and images."""
        status = self._mtmd_cpp.mtmd_tokenize(mtmd_ctx, chunks, *arguments)
        if status == 0:
            self.total = int(self._mtmd_cpp.mtmd_helper_get_n_pos(chunks))
        return status

    def mtmd_helper_eval_chunk_single(
        self, mtmd_ctx, ctx, chunk, n_past, seq_id, n_batch, logits_last, new_n_past
    ) -> int:
        """Reads an image, or finds it in the cache. The record gets tokens that stand for it: its hash as a seed.

        Raises:
            Cancelled: Before the image was encoded, or between the micro-batches that read it.
            PopError: The image's tokens see each other, so they have to fit into one micro-batch, and do not.
        """
        start, n_pos = int(n_past.value), int(self._mtmd_cpp.mtmd_input_chunk_get_n_pos(chunk))
        digest = self._mtmd_cpp.mtmd_input_chunk_get_id(chunk)
        ids = np.random.default_rng(int(digest, 16) if digest else None).integers(self._llm.n_vocab(), size=n_pos)
        if not self.skip(ids, whole=True):
            status = self._read(mtmd_ctx, ctx, chunk, start, seq_id, n_batch, new_n_past, ids)
            if status:
                return status
        ctypes.cast(new_n_past, ctypes.POINTER(ctypes.c_int32))[0] = start + n_pos
        return 0

    def _read(self, mtmd_ctx, ctx, chunk, start: int, seq_id, n_batch: int, new_n_past, ids: np.ndarray) -> int:
        llm, mtmd, stopped = self._llm, self._mtmd_cpp, []
        n_tokens, n_ubatch = int(mtmd.mtmd_input_chunk_get_n_tokens(chunk)), int(llm.context_params.n_ubatch)
        if not mtmd.mtmd_decode_use_non_causal(mtmd_ctx, chunk):
            n_batch = n_ubatch  # what llama.cpp makes of a larger batch anyway
        elif n_tokens > min(n_batch, n_ubatch):
            raise PopError(
                f"an image of this model is {n_tokens} tokens that are read at once: open the model with n_batch and n_ubatch of "
                f"{n_tokens} or more (now {n_batch} and {n_ubatch})"
            )
        n_read = 0

        @mtmd.mtmd_helper_post_decode_callback
        def go_on(batch, _user_data) -> int:
            nonlocal n_read
            try:
                n_read += batch.contents.n_tokens
                if n_read < n_tokens:
                    llm._go_on(start + len(ids) * n_read // n_tokens, self.total)
            except BaseException as error:  # ctypes would print it and go on
                stopped.append(error)
            return len(stopped)

        boundary = llm._asked_boundary()
        native.set_boundary(llm._ctx.ctx, boundary)
        llm._ctx.kv_cache_seq_rm(-1, start, -1)
        try:
            llm._go_on(start, self.total)
            if status := mtmd.mtmd_encode_chunk(mtmd_ctx, chunk):
                return status
            llm._go_on(start, self.total)
            status = mtmd.mtmd_helper_decode_image_chunk(
                mtmd_ctx,
                ctx,
                chunk,
                mtmd.mtmd_get_output_embd(mtmd_ctx),
                start,
                seq_id,
                n_batch,
                new_n_past,
                go_on,
                None,
            )
            if stopped:
                raise stopped[0]
        except BaseException as error:
            llm._roll_back(start)
            if isinstance(error, Cancelled):
                raise Cancelled(llm.n_tokens, self.total, lost=llm.n_tokens < start) from None
            raise
        if status == 0:
            self._record(start, ids, boundary)
        return status

    def _record(self, start: int, ids: np.ndarray, boundary: int) -> None:
        llm, end = self._llm, start + len(ids)
        llm.input_ids[start:end] = ids
        llm._computed_with[start:end] = llm._as_recorded(boundary)
        llm._computed_with[start : min(end, llm.pop.head)] = llm.pop.n_layer
