"""Images in chats: a second question about the same image finds the image, and the text before it, in the cache.

llama-cpp-python's chat handlers for images clear the cache and then read the pieces of a message, texts and images, in
turn. While a handler does that, it works on stand-ins for the model and for itself, whose functions are those of a
``_Reader``. What the cache holds already is skipped, an image is known by a hash of its file, and the call can be
cancelled between the micro-batches of an image. The handler and the model themselves stay as they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from pypop_gguf import library, native, parent
from pypop_gguf.cache_record import CacheRecord
from pypop_gguf.call import Call
from pypop_gguf.errors import PopError
from pypop_gguf.status import Cancelled

if TYPE_CHECKING:
    import llama_cpp
else:
    llama_cpp = library.load()

_in_use: set[int] = set()  # the ids of the handlers that are reading
_changing_in_use = threading.Lock()


@contextlib.contextmanager
def reading(
    llm: llama_cpp.Llama, call: Call, record: CacheRecord, roll_back: Callable[[int], None]
) -> Iterator[parent.Overlay]:
    """Lets the model's chat handler read the prompt of one call through the cache.

    Args:
        llm: The model; its handler is one that reads images.
        call: The call, which is told how much of the prompt was reused.
        record: The boundaries of the cached positions; those of images are marked in it.
        roll_back: Takes the cache back to its first positions; called if the reading of an image stops halfway.

    Yields:
        A stand-in for the model; its ``create_chat_completion`` is to be called.

    Raises:
        PopError: The handler is reading for another call.
    """
    handler = llm.chat_handler
    with _using(handler):
        parent.load_projector(handler, llm)  # before there is a stand-in that the projector would keep alive
        reader = _Reader(llm, call, record, roll_back, parent.mtmd(handler))
        with parent.handler_with(
            handler, mtmd_tokenize=reader.tokenize, mtmd_helper_eval_chunk_single=reader.evaluate_image
        ) as stand_in:
            yield parent.model_for_handler(
                llm, stand_in, reset=reader.reset, clear_cache=reader.clear_cache, evaluate=reader.evaluate_text
            )


@contextlib.contextmanager
def _using(handler: Any) -> Iterator[None]:
    with _changing_in_use:
        if id(handler) in _in_use:
            raise PopError(
                "this chat handler is reading another prompt: wait until that call has ended, or give each model a "
                "handler of its own"
            )
        _in_use.add(id(handler))
    try:
        yield
    finally:
        with _changing_in_use:
            _in_use.remove(id(handler))


class _Reader:
    """The functions by which a chat handler reads a prompt, in the place of the model's and of mtmd's."""

    def __init__(
        self, llm: llama_cpp.Llama, call: Call, record: CacheRecord, roll_back: Callable[[int], None], mtmd: Any
    ) -> None:
        self._llm, self._call, self._record, self._roll_back, self._mtmd = llm, call, record, roll_back, mtmd
        self._known = 0  # positions of the cache that may still prove to be the prompt's
        # A recurrent memory cannot drop what follows a common begin, so nothing of it is reused.
        self._reuses = not (llama_cpp.llama_model_is_recurrent(llm.model) or llama_cpp.llama_model_is_hybrid(llm.model))

    def reset(self) -> None:
        """``Llama.reset``: goes back to the start of the cache, whose content may be the prompt's."""
        if self._reuses:
            self._known, self._llm.n_tokens = self._llm.n_tokens, 0
        else:
            self._llm.reset()

    def clear_cache(self) -> None:
        """``LlamaContext.kv_cache_clear``, unless the cache may be reused."""
        if not self._reuses:
            parent.clear_cache(self._llm)

    def tokenize(self, mtmd_ctx, chunks, *arguments) -> int:
        """``mtmd_tokenize``: cuts the prompt into chunks of text and images."""
        status = self._mtmd.mtmd_tokenize(mtmd_ctx, chunks, *arguments)
        if status == 0:
            self._call.image_total = int(self._mtmd.mtmd_helper_get_n_pos(chunks))
        return status

    def evaluate_text(self, tokens: list[int]) -> None:
        """``Llama.eval``: reads the tokens that are not found in the cache."""
        n_found = self._skip(np.asarray(tokens), all_or_nothing=False)
        if n_found < len(tokens):
            self._llm.eval(tokens[n_found:])
        else:
            parent.set_requires_eval(self._llm, True)

    def evaluate_image(self, mtmd_ctx, ctx, chunk, n_past, seq_id, n_batch, _logits_last, new_n_past) -> int:
        """``mtmd_helper_eval_chunk_single``: reads an image, or finds it in the cache.

        In ``input_ids`` an image is the random tokens that its hash is the seed of, so the same image is found again.

        Raises:
            Cancelled: Before the image was encoded, or between the micro-batches that read it.
            PopError: Each token of the image sees all others, so they have to fit into one micro-batch, and do not.
        """
        start, n_pos = int(n_past.value), int(self._mtmd.mtmd_input_chunk_get_n_pos(chunk))
        digest = self._mtmd.mtmd_input_chunk_get_id(chunk)
        ids = np.random.default_rng(int(digest, 16) if digest else None).integers(self._llm.n_vocab(), size=n_pos)
        if not self._skip(ids, all_or_nothing=True):
            status = self._read(mtmd_ctx, ctx, chunk, start, seq_id, n_batch, new_n_past, ids)
            if status:
                return status
        ctypes.cast(new_n_past, ctypes.POINTER(ctypes.c_int32))[0] = start + n_pos
        return 0

    def _skip(self, ids: np.ndarray, all_or_nothing: bool) -> int:
        """Moves on over those of the next ids that the cache holds, and returns how many they are."""
        start = self._llm.n_tokens
        cached = self._llm.input_ids[start : min(start + len(ids), self._known)]
        differs = np.flatnonzero(cached != ids[: len(cached)])
        n_found = int(differs[0]) if len(differs) else len(cached)
        if all_or_nothing and n_found < len(ids):
            n_found = 0
        if n_found < len(ids):
            self._known = 0
        self._llm.n_tokens += n_found
        assert self._call.image_reused is not None
        self._call.image_reused += n_found
        return n_found

    def _read(self, mtmd_ctx, ctx, chunk, start: int, seq_id, n_batch: int, new_n_past, ids: np.ndarray) -> int:
        llm, mtmd, call = self._llm, self._mtmd, self._call
        n_tokens, n_ubatch = int(mtmd.mtmd_input_chunk_get_n_tokens(chunk)), int(llm.context_params.n_ubatch)
        causal = not mtmd.mtmd_decode_use_non_causal(mtmd_ctx, chunk)
        if causal:
            n_batch = n_ubatch  # llama.cpp cuts larger batches into these anyway; a call can be stopped between them
        elif n_tokens > min(n_batch, n_ubatch):
            raise PopError(
                f"an image of this model is {n_tokens} tokens that are read at once: open the model with n_batch and "
                f"n_ubatch of {n_tokens} or more (now {n_batch} and {n_ubatch})"
            )
        stopped: list[BaseException] = []
        n_read = 0

        @mtmd.mtmd_helper_post_decode_callback
        def after_batch(batch, _user_data) -> int:
            nonlocal n_read
            try:
                n_read += batch.contents.n_tokens
                if n_read < n_tokens:
                    call.check(start + len(ids) * n_read // n_tokens, 0)
            except BaseException as error:  # ctypes would print it and go on
                stopped.append(error)
            return len(stopped)

        native.set_boundary(llm.ctx, call.boundary)
        parent.drop_cache_from(llm, start)
        try:
            call.check(start, 0)
            if status := mtmd.mtmd_encode_chunk(mtmd_ctx, chunk):
                return status
            call.check(start, 0)
            embeddings = mtmd.mtmd_get_output_embd(mtmd_ctx)
            status = mtmd.mtmd_helper_decode_image_chunk(
                mtmd_ctx, ctx, chunk, embeddings, start, seq_id, n_batch, new_n_past, after_batch, None
            )
            if stopped:
                raise stopped[0]
        except BaseException as error:
            self._roll_back(start)
            if isinstance(error, Cancelled):
                raise Cancelled(llm.n_tokens, error.total, lost=llm.n_tokens < start) from None
            raise
        if status == 0:
            llm.input_ids[start : start + len(ids)] = ids
            self._record.mark(start, start + len(ids), call.boundary if causal else native.n_layer(llm.model))
        return status
