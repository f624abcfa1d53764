"""``PopLlama``: llama-cpp-python's ``Llama`` whose prompts are read only by the layers below the boundary.

It is the highest of three layers: ``calling`` lets calls take turns, ``evaluation`` reads prompts and keeps a record of
the cache, and this file opens a model and has the calls. Only these three write the object's own fields. The others
work on what they give: ``opening`` reads the ``pop_*`` arguments, ``images`` reads prompts with images, ``logprobs``
computes log-probabilities, and ``parent`` has what is private in the parent.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pypop_gguf import completion, evaluation, images, library, logprobs, native, opening, parent, states
from pypop_gguf.cache_record import CacheRecord
from pypop_gguf.call import Call
from pypop_gguf.errors import PopError, check_name
from pypop_gguf.gguf_files.header import read_header
from pypop_gguf.gguf_files.metadata import parse_metadata
from pypop_gguf.status import PopStatus, Timings
from pypop_gguf.turns import WITHIN, Turns

llama_cpp = library.load()

_COMPLETION = inspect.signature(llama_cpp.Llama.create_completion)  # Reading it takes a tenth of a millisecond.


class PopLlama(evaluation.EvaluatingLlama):
    """A ``llama_cpp.Llama`` with prefill-only pruning (POP, arXiv 2602.03295).

    Example:
        >>> llm = PopLlama("model.gguf")
        >>> llm.create_completion("Once upon a time", max_tokens=32)["choices"][0]["text"]

    Args:
        model_path: A GGUF file; for split files the first shard.
        pop: False runs every layer for every token, exactly as the parent does.
        pop_boundary: First layer that prefill skips, 1..L (L = off), or ``"lossless"``: the last layer that writes to
            the cache. Default: the file's ``pop.boundary``. A file without one is not pruned, unless its upper layers
            share a cache (Gemma 3n, Gemma 4): then the lossless boundary is the default.
        pop_head: First tokens of each sequence that run every layer. Default: the file's ``pop.head``, else 0.
        pop_tail: Last tokens of each prompt that run every layer, 1 to ``n_batch``. Default: the file's ``pop.tail``,
            else 1.
        pop_min_tokens: Prompts with fewer new tokens are not pruned; tokens that are found in the cache are not new.
            Default: the file's ``pop.min_tokens``, else 0.
        pop_adapter: A file with fitted K/V projections (``pop-gguf prepare``), files for several boundaries, or False
            for none. Default: ``<model>.pop-b<boundary>.gguf`` beside the model, if there is one.
        pop_kernels: False leaves all products and attention of this object to llama.cpp's own kernels. With
            ``pop=False`` its logits are then bit for bit those of stock llama.cpp. ``POP_KERNELS=off`` in the
            environment does so for the whole process, and also for projectors of images. On Arm processors, kernels of
            ours run only with ``POP_KERNELS=on`` there.
        flash_attn: Whether attention is flash attention. Default: wherever llama.cpp can compute it on the model's
            devices, which is faster for prompts. The parent's default is False.
        pop_complete: When the layers that a prompt has skipped run for it after all, which makes the cache the whole
            model's. ``"off"``: never. ``"call"``: in :meth:`complete_cache`. ``"idle"``: also in a thread of its own,
            while no call uses the model. ``"answer"``: a chunk with each token of an answer after the first, and
            what is left after the last chunk of a stream. All but ``"off"`` keep one state for each position of the
            context.
        pop_complete_chunk: Tokens that are computed at once before each token of an answer or together with it.
            Default: as many as 4 decode steps take time.
        pop_complete_states: Type of the states that are kept: ``"f32"``, or ``"f16"`` or ``"bf16"`` of half the size.
        **llama_kwargs: Everything that ``llama_cpp.Llama`` takes. What it took once is dropped, as it does itself.

    Raises:
        TypeError: Neither class knows an argument, or ``pop_boundary`` is of another type.
        PopError: The file cannot be read, the model cannot be pruned at that boundary, its cache cannot be completed,
            or a number of tokens is out of range.
    """

    def __init__(
        self,
        model_path: str | os.PathLike,
        *,
        pop: bool = True,
        pop_boundary: int | str | None = None,
        pop_head: int | None = None,
        pop_tail: int | None = None,
        pop_min_tokens: int | None = None,
        pop_adapter: str | os.PathLike | Sequence[str | os.PathLike] | bool | None = None,
        pop_kernels: bool = True,
        flash_attn: bool | None = None,
        pop_complete: str = "off",
        pop_complete_chunk: int | None = None,
        pop_complete_states: str = "f32",
        **llama_kwargs,
    ) -> None:
        self._pid = os.getpid()
        self._turns = Turns()
        parent.let_close(self)
        opening.check_keywords(llama_kwargs)
        opening.check_sizes(llama_kwargs)
        completion.check_arguments(pop_complete, pop_complete_chunk, pop_complete_states)
        opening.check_boundary_type("pop_boundary", pop_boundary)
        self._pop_arguments = dict(
            pop=pop,
            pop_boundary=pop_boundary,
            pop_head=pop_head,
            pop_tail=pop_tail,
            pop_min_tokens=pop_min_tokens,
            pop_adapter=pop_adapter,
            pop_kernels=pop_kernels,
        )
        self._complete_arguments = dict(
            pop_complete=pop_complete, pop_complete_chunk=pop_complete_chunk, pop_complete_states=pop_complete_states
        )
        self._flash_attn = flash_attn
        self._logits_everywhere = bool(llama_kwargs.get("logits_all", False))
        self._keeps_scores = self._logits_everywhere or llama_kwargs.get("draft_model") is not None
        self.timings = Timings()

        model_path = check_name(model_path)
        for name in ("lora_path", "lora_base"):
            if llama_kwargs.get(name):
                llama_kwargs[name] = check_name(llama_kwargs[name])
                read_header(llama_kwargs[name])
        header = read_header(model_path)  # before the model: it tells a bad file from a bad key in one line
        parse_metadata(header, model_path)
        self._load(model_path, llama_kwargs)
        self._size_arrays()
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self._has_tokenizer = llama_cpp.llama_vocab_type(vocabulary) != llama_cpp.LLAMA_VOCAB_TYPE_NONE

        lora = (self.lora_path, self.lora_scale) if self.lora_path else None
        self._digest = states.model_digest(header, model_path, self.context_params, lora, self.kv_overrides)
        opened = opening.Opened(PopStatus(False, 0, 0, "off"), 0, {})
        if not llama_kwargs.get("vocab_only", False):
            everywhere = self._logits_everywhere
            opened = opening.open_context(self, **self._pop_arguments, logits_everywhere=everywhere)
        self._status, self._runs_whole = opened.status, opened.runs_whole
        self._adapters = {at: states.file_digest(path) for at, path in opened.adapters.items()}
        self._record = CacheRecord(len(self.input_ids), self._status.n_layer, opened.lossless, self._status.head)
        self._running = None

        # Every token of logits_all asks for logits, so nothing is pruned.
        if pop_complete != "off" and not (self._logits_everywhere or llama_kwargs.get("vocab_only", False)):
            chosen = pop_complete, pop_complete_chunk, pop_complete_states
            self._completion = completion.Completion(self, self._turns, self._record, *chosen)
            self._completes_answers = pop_complete == "answer"

    def _size_arrays(self) -> None:
        """Gives the arrays the length of the context that llama.cpp has made: it rounds what was asked for upwards."""
        self.context_params.n_ctx = n_ctx = self.n_ctx()
        self.context_params.n_ubatch = llama_cpp.llama_n_ubatch(self.ctx)  # 0 asks for n_batch
        self.input_ids = np.zeros(n_ctx, dtype=np.intc)
        if self._keeps_scores:  # else the parent's n_batch rows are enough; memory is taken as it is written
            self.scores = np.empty((n_ctx, self.n_vocab()), dtype=np.single)

    def _load(self, model_path: str, llama_kwargs: dict) -> None:
        handler = llama_kwargs.get("chat_handler")
        if parent.reads_images(handler):
            parent.share_log(llama_cpp, handler)
        if llama_kwargs.get("verbose", True):
            super().__init__(model_path, **llama_kwargs)
            return
        with library.captured_log() as errors:
            try:
                super().__init__(model_path, **llama_kwargs)
            except ValueError as error:
                raise PopError(library.load_failure(model_path, errors or [str(error)])) from error

    @property
    def context_params(self):
        """The parameters of the context, ``llama_cpp.llama_context_params``."""
        # The parent writes on or off into them before it makes the context of them, and knows no automatic choice.
        self._context_params.flash_attn_type = opening.flash_attn_type(self._flash_attn)
        return self._context_params

    @context_params.setter
    def context_params(self, parameters) -> None:
        self._context_params = parameters

    @property
    def pop(self) -> PopStatus:
        """The state of pruning: whether prompts are pruned, at which boundary, and where the boundary comes from."""
        return self._status

    # Calls

    def create_completion(
        self,
        *args,
        pop: bool | None = None,
        boundary: int | str | None = None,
        progress: Callable[[int, int], bool | None] | None = None,
        cancel: threading.Event | None = None,
        **kwargs,
    ):
        """Completes a prompt as ``llama_cpp.Llama`` does. The result, or a stream's last chunk, also has ``timings``.

        Args:
            pop: False reads this prompt by every layer.
            boundary: The boundary of this call, 1..L or ``"lossless"``. Default: the object's.
            progress: Called as ``progress(done, total)``, in prompt tokens, before each micro-batch of the prompt and
                after the last. It cancels the call by returning False.
            cancel: Once it is set, from any thread, the call stops before the next micro-batch or token.

        Raises:
            Cancelled: ``progress`` or ``cancel`` has stopped the call. What was read stays in the cache.
            PopError: The model cannot be pruned at that boundary.
            ValueError: The object keeps no logits for the ``logprobs`` that were asked for.
        """
        given = _COMPLETION.bind(self, *args, **kwargs).arguments
        del given["self"]
        echo, asks_logprobs = bool(given.get("echo")), given.get("logprobs") is not None
        if echo and asks_logprobs and self._keeps_scores and not self._logits_everywhere:
            raise ValueError(
                "logprobs of an echoed prompt need logits_all=True: with a draft model alone a prompt asks for no "
                "logits"
            )
        call = self._new_call(pop, boundary, progress, cancel)
        if not given.get("stream") and (echo or (asks_logprobs and self._keeps_scores)):
            return self._run(functools.partial(self._complete, call, given), call)
        return self._run(functools.partial(super().create_completion, *args, **kwargs), call)

    def _complete(self, call: Call, given: dict[str, Any]):
        """Lets the parent complete a prompt, and adds the echo and the log-probabilities."""
        echo, n_top, prompt = given.pop("echo", False), given.get("logprobs"), given["prompt"]
        text = prompt if isinstance(prompt, str) else logprobs.text_of(self, prompt)
        if self._keeps_scores:  # else the parent has to refuse the log-probabilities
            given["logprobs"] = None
        result: Any = super().create_completion(**given)
        n_prompt = result["usage"]["prompt_tokens"]
        choice = result["choices"][0]
        if n_top is not None:
            vocabulary = llama_cpp.llama_model_get_vocab(self.model)
            generated = [
                token for token in call.tokens[n_prompt:] if not llama_cpp.llama_vocab_is_eog(vocabulary, token)
            ]
            choice["logprobs"] = logprobs.completion_logprobs(
                self, call.tokens[:n_prompt], generated, n_top, echo=echo, n_characters=len(text)
            )
        if echo:
            choice["text"] = text + choice["text"]
        return result

    def __call__(self, *args, **kwargs):
        """Does the same as :meth:`create_completion`."""
        return self.create_completion(*args, **kwargs)

    def create_chat_completion(
        self,
        *args,
        pop: bool | None = None,
        boundary: int | str | None = None,
        progress: Callable[[int, int], bool | None] | None = None,
        cancel: threading.Event | None = None,
        **kwargs,
    ):
        """``llama_cpp.Llama.create_chat_completion`` with ``pop``, ``boundary``, ``progress`` and ``cancel`` as in
        :meth:`create_completion`."""
        call = self._new_call(pop, boundary, progress, cancel)
        if not parent.reads_images(self.chat_handler):
            return self._run(functools.partial(super().create_chat_completion, *args, **kwargs), call)
        # Also a stream has read its prompt by then, so it keeps its turn until its first chunk.
        return self._run(functools.partial(self._chat_about_images, call, *args, **kwargs), call, keep_turn=True)

    def _chat_about_images(self, call: Call, *args, **kwargs):
        self._drop_unusable(call.boundary)
        call.begin_images(native.n_pruned(self.ctx))
        with images.reading(self, call, self._record, self._roll_back) as model:
            return llama_cpp.Llama.create_chat_completion(model, *args, **kwargs)

    def score(
        self,
        prompt: Sequence[int],
        continuation: Sequence[int],
        *,
        pop: bool | None = None,
        boundary: int | str | None = None,
    ) -> np.ndarray:
        """Returns logits for a continuation, from the whole model on the cache that a pruned prompt has left.

        Args:
            prompt: Token ids, at least one. What is cached is forgotten first.
            continuation: Token ids, at least one.
            pop: As in :meth:`create_completion`.
            boundary: As in :meth:`create_completion`.

        Returns:
            F32 [len(continuation), n_vocab]; row i predicts ``continuation[i]``.

        Raises:
            ValueError: Both together are longer than the context, or one is empty.
            PopError: The model cannot be pruned at that boundary.
        """
        if not prompt or not continuation or len(prompt) + len(continuation) > self.n_ctx():
            raise ValueError(
                f"{len(prompt)} and {len(continuation)} tokens: give one each at least, and {self.n_ctx()} at most"
            )
        call = self._new_call(pop, boundary)
        rows = []
        with self._calling(call):
            self.reset()
            parent.clear_cache(self)
            self._eval(prompt, self._logits_everywhere)
            rows.append(self._logits_of(1))
            n_ubatch = self.context_params.n_ubatch  # logits are those of the last micro-batch
            for start in range(0, len(continuation) - 1, n_ubatch):
                chunk = continuation[start : min(start + n_ubatch, len(continuation) - 1)]
                self._eval(chunk, True)
                rows.append(self._logits_of(len(chunk)))
        return np.concatenate(rows)

    def embed(self, input: str | Sequence[str], *args, **kwargs):
        """Computes embeddings as ``llama_cpp.Llama`` does; all layers run for them.

        Raises:
            PopError: There is no text, or one has no tokens.
        """
        texts = [input] if isinstance(input, str) else list(input)
        if not texts:
            raise PopError("there is nothing to embed: give at least one text")
        for i, text in enumerate(texts):
            if not self.tokenize(text.encode()):
                which = "the text" if isinstance(input, str) else f"text {i}"
                raise PopError(f"{which} is empty, and this model adds no token of its own: give at least one letter")
        with self._calling(self._new_call()):
            return super().embed(input if isinstance(input, str) else texts, *args, **kwargs)

    def close(self) -> None:
        """Frees the model, after the step that another thread is in. A stream that is open then cannot go on."""
        if os.getpid() != self._pid:
            super().close()
            return
        if self._turns.is_mine():
            raise PopError(WITHIN)
        if self._completion is not None:
            self._completion.close()
        with self._turns.pause():
            super().close()
            parent.mark_closed(self)

    def __getstate__(self):
        own = {"flash_attn": self._flash_attn, "logits_all": self._logits_everywhere}
        return {**super().__getstate__(), **self._pop_arguments, **self._complete_arguments, **own}
