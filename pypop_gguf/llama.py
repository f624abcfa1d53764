"""``PopLlama``: llama-cpp-python's ``Llama`` whose prompts are read only by the layers below the boundary.

It differs from its parent in two ways: only a prompt's last token asks for logits, and a record says which boundary
each cached position was read with. Only this file writes the object's own fields. The others work on what it gives:
``opening`` reads the ``pop_*`` arguments, ``call`` has what a single call asks for, ``cache_record`` is the record,
``images`` reads prompts with images, ``states`` saves and loads, ``completion`` says when skipped layers run later, and
``parent`` has what is private in the parent.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pypop_gguf import completion, images, library, logprobs, native, opening, parent, states
from pypop_gguf.cache_record import CacheRecord
from pypop_gguf.call import Call, pieces, streamed_with_timings
from pypop_gguf.errors import PopError, check_name
from pypop_gguf.gguf_files.header import read_header
from pypop_gguf.gguf_files.metadata import parse_metadata
from pypop_gguf.status import PopStatus, Timings
from pypop_gguf.turns import WITHIN, Turns

llama_cpp = library.load()


class PopLlama(llama_cpp.Llama):
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
            environment does so for the whole process, and also for projectors of images.
        flash_attn: Whether attention is flash attention. Default: wherever llama.cpp can compute it on the model's
            devices, which is faster for prompts. The parent's default is False.
        pop_complete: When the layers that a prompt has skipped run for it after all, which makes the cache the whole
            model's. ``"off"``: never. ``"call"``: in :meth:`complete_cache`. ``"idle"``: also in a thread of its own,
            while no call uses the model. ``"answer"``: before each token of an answer after the first, a chunk, and
            what is left after the last chunk of a stream. All but ``"off"`` keep one state for each position of the
            context.
        pop_complete_chunk: Tokens that are completed before each token of an answer. Default: as many as 4 decode steps
            take time.
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
        self._running: Call | None = None

        # Every token of logits_all asks for logits, so nothing is pruned.
        if pop_complete != "off" and not (self._logits_everywhere or llama_kwargs.get("vocab_only", False)):
            chosen = pop_complete, pop_complete_chunk, pop_complete_states
            self._completion = completion.Completion(self, self._turns, self._record, *chosen)
            self._completes_answers = pop_complete == "answer"

    _completion: completion.Completion | None = None  # while it is on
    _completes_answers = False

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
        given = inspect.signature(super().create_completion).bind(*args, **kwargs).arguments
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

    def _new_call(self, pop: bool | None = None, boundary: int | str | None = None, progress=None, cancel=None) -> Call:
        """Makes a call, within the running one if there is one: ``create_chat_completion`` calls others."""
        self._check_process()
        opening.check_boundary_type("boundary", boundary)
        if not self._turns.is_mine():
            call = Call(self._status.boundary, progress, cancel)
        elif self._running is None or self._running.in_use:
            raise PopError(WITHIN)
        else:
            call = self._running.inner(progress=progress, cancel=cancel)
        if boundary is not None and pop is not False:
            with self._calling(call):
                call.boundary = opening.checked_boundary(self, boundary)
        if pop is False or self._runs_whole:
            call.boundary = self._status.n_layer
        return call

    @contextlib.contextmanager
    def _calling(self, call: Call) -> Iterator[None]:
        """Makes the one step of a call, which begins and ends in this block."""
        try:
            with self._stepping(call):
                yield
        finally:
            self._end(call)

    @contextlib.contextmanager
    def _stepping(self, call: Call) -> Iterator[None]:
        """Makes a step of a call, and waits until the call may."""
        self._check_process()
        with self._turns.step(call.turn, call.cancel):
            outer, self._running = self._running, call
            native.set_boundary(self.ctx, call.boundary)  # for a chat handler that decodes without eval()
            try:
                yield
            finally:
                self._running = outer

    @contextlib.contextmanager
    def _within_call(self) -> Iterator[None]:
        """Is for methods that calls use, and users as well, who then make a call of their own."""
        if self._turns.is_mine():
            yield
        else:
            with self._calling(self._new_call()):
                yield

    def _end(self, call: Call) -> None:
        if call.outermost:
            self._turns.end(call.turn)

    def _run(self, method: Callable, call: Call, keep_turn: bool = False):
        """Returns the result of a method of the parent, or its stream, with the call's timings.

        Args:
            method: The method.
            call: The call.
            keep_turn: Whether a stream has its turn from now on, and not only from its first chunk on.
        """
        is_stream = False
        try:
            with self._stepping(call):
                result = method()
                is_stream = isinstance(result, Iterator)
                if not is_stream:
                    result["timings"] = self._final_timings()
                    return result
        finally:
            if not (is_stream and keep_turn):
                self._end(call)
        if call.outermost and self._completes_answers:
            result = self._completing_rest(result)
        return streamed_with_timings(result, lambda: self._stepping(call), self._final_timings, lambda: self._end(call))

    def _final_timings(self) -> dict[str, float | int | None]:
        if self._completion is not None:
            self._completion.end_call(self)
        return self.timings.as_dict()

    def _completing_rest(self, chunks: Iterator) -> Iterator:
        """Yields a stream's chunks and, in the step that finds its end, completes what is left."""
        yield from chunks
        assert self._completion is not None
        self._completion.run(self, None)

    def _check_process(self) -> None:
        """Refuses to go on in a fork of the process that loaded the model: it would wait for llama.cpp's threads."""
        if os.getpid() != self._pid:
            raise PopError(
                "this model was loaded before a fork: load it in the child, or start children by spawn "
                "(multiprocessing's)"
            )

    # Tokens

    def tokenize(self, *args, **kwargs):
        """Does the same as ``llama_cpp.Llama.tokenize``.

        Raises:
            PopError: The file has no tokenizer.
        """
        self._check_tokenizer()
        return super().tokenize(*args, **kwargs)

    def detokenize(self, *args, **kwargs):
        """Does the same as ``llama_cpp.Llama.detokenize``.

        Raises:
            PopError: The file has no tokenizer.
        """
        self._check_tokenizer()
        return super().detokenize(*args, **kwargs)

    def _check_tokenizer(self) -> None:
        """Refuses what would end the process."""
        if not self._has_tokenizer and type(self.tokenizer_) is llama_cpp.LlamaTokenizer:
            raise PopError(f"{self.model_path} has no tokenizer, so it reads no text: take a file that has one")

    def generate(self, tokens: Sequence[int], *args, **kwargs):
        """Yields token ids as ``llama_cpp.Llama`` does. The prompt is read with the boundary of the running call."""
        if len(tokens) == 0:
            raise PopError("the prompt is empty, and this model adds no token of its own: give at least one token")
        call = self._new_call()
        call.tokens[:] = tokens
        generator = None
        answering = self._completion if self._completes_answers else None
        try:
            with self._stepping(call):
                if kwargs.get("reset", True):
                    self._drop_unusable(call.boundary)
                call.begin_prompt(native.n_pruned(self.ctx))
                timings = self.timings = Timings(prompt_tokens=len(tokens), boundary=call.boundary)
            generator = super().generate(tokens, *args, **kwargs)
            sent = None
            while True:
                with self._stepping(call):
                    if answering is not None and timings.generated_tokens and not answering.before_token(self):
                        answering = None
                    began = time.perf_counter()
                    call.in_use = True
                    try:
                        token = generator.send(sent)
                    except StopIteration:
                        return
                    finally:
                        call.in_use = False
                    if answering is not None and timings.generated_tokens:
                        answering.count_step(1e3 * (time.perf_counter() - began))
                    if timings.generated_tokens == 0:
                        call.time_prompt(timings, native.n_pruned(self.ctx))
                        n_whole = self._record.usable(len(tokens), self._status.n_layer)
                        if timings.pruned_tokens == 0 and n_whole == len(tokens):  # short, or read whole before
                            timings.boundary = self._status.n_layer
                    timings.count_token(call.ms_since_began())
                    call.tokens.append(token)
                sent = yield token
                call.check(len(tokens), len(tokens))
        finally:
            if generator:
                generator.close()
            self._end(call)

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluates tokens after the ``n_tokens`` that are cached.

        Unlike in the parent, only the last token asks for logits, not the last of every ``n_batch``: all others of a
        prompt may then be pruned. With ``logits_all`` every token asks; with a draft model, all those after the prompt.

        Args:
            tokens: Token ids.

        Raises:
            RuntimeError: llama.cpp could not decode, for example because the context is full.
        """
        with self._within_call():
            assert self._running is not None
            drafted = self._keeps_scores and not self._running.reading_prompt
            self._eval(tokens, self._logits_everywhere or drafted)

    def _eval(self, tokens: Sequence[int], every_token: bool) -> None:
        call, status = self._running, self._status
        assert call is not None
        n_vocab = self.n_vocab()
        if unknown := [token for token in tokens if not 0 <= token < n_vocab]:
            raise PopError(f"the model has no token {unknown[0]}: give numbers from 0 to {n_vocab - 1}")
        boundary = status.n_layer if len(tokens) < status.min_tokens else call.boundary
        if self.n_tokens + len(tokens) > self.n_ctx():
            raise RuntimeError(
                f"{len(tokens)} tokens do not fit after the {self.n_tokens} that are cached: call reset(), or open the "
                f"model with an n_ctx of more than {self.n_ctx()}"
            )
        native.set_boundary(self.ctx, boundary)
        parent.drop_cache_from(self, self.n_tokens)
        for start, end in pieces(len(tokens), self.context_params.n_ubatch, status.tail):
            past, now = self.n_tokens, self.n_tokens + end - start
            call.check(past, past + len(tokens) - start)
            last_of_all = end == len(tokens) and call.prompt_ends_at(now)
            try:
                parent.decode(self, tokens[start:end], past, every_token=every_token, last_token=last_of_all)
            except BaseException:  # Ctrl-C is heard only after a micro-batch, which then counts for nothing
                self._roll_back(past)
                raise

            self.input_ids[past:now] = tokens[start:end]
            self._record.mark(past, now, status.n_layer)
            if not every_token:
                self._record.mark(past, max(past, now - status.tail) if last_of_all else now, boundary)
                if last_of_all and self._keeps_scores:  # with a draft model, for logprobs
                    self.scores[now - 1] = self._logits_of(1)[0]
            elif self._keeps_scores:
                logits = llama_cpp.llama_get_logits(self.ctx)
                self.scores[past:now] = np.ctypeslib.as_array(logits, shape=(now - past, self.n_vocab()))
            self.n_tokens = now
            parent.set_requires_eval(self, not (every_token or last_of_all))
        if call.reading_prompt:
            llama_cpp.llama_synchronize(self.ctx)
            call.check(self.n_tokens, self.n_tokens)
            call.end_prompt(len(tokens))

    def sample(self, *args, **kwargs) -> int:
        """Chooses the next token as ``llama_cpp.Llama`` does."""
        with self._turns.pause():
            if self.ctx and self.n_tokens == 0:
                raise PopError("there is no token to go on from: evaluate at least one first")
            return super().sample(*args, **kwargs)

    def reset(self) -> None:
        """Forgets what is cached, as ``llama_cpp.Llama`` does."""
        with self._within_call():
            super().reset()

    def _logits_of(self, n: int) -> np.ndarray:
        """Returns the logits of the last ``n`` tokens that asked for them, F32 [n, n_vocab]."""
        first = llama_cpp.llama_get_logits_ith(self.ctx, -n)
        return np.ctypeslib.as_array(first, shape=(n, self.n_vocab())).copy()

    def _roll_back(self, n_tokens: int) -> None:
        """Goes back to the first ``n_tokens``. A recurrent memory cannot drop a part, so it is cleared."""
        self.n_tokens = n_tokens
        parent.set_requires_eval(self, True)
        if not parent.drop_cache_from(self, n_tokens):
            self.reset()

    def _drop_unusable(self, boundary: int) -> None:
        """Drops cached positions from the first on that fewer layers have read than this boundary asks for."""
        usable = self._record.usable(self.n_tokens, boundary)
        if usable < self.n_tokens:
            self._roll_back(usable)

    # Completion

    def complete_cache(
        self,
        max_tokens: int | None = None,
        *,
        progress: Callable[[int, int], bool | None] | None = None,
        cancel: threading.Event | None = None,
    ) -> int:
        """Runs the skipped layers for what is cached, the first positions first: the cache is then the whole model's.

        Args:
            max_tokens: Stop after so many tokens. Default: after all.
            progress: Called as ``progress(done, total)``, in tokens, after each chunk of 64. It ends the work by
                returning False.
            cancel: Once it is set, from any thread, no further chunk begins.

        Returns:
            Tokens that are left. Those that can never be completed do not count.

        Raises:
            Cancelled: ``cancel`` was set while this call waited for another one.
            PopError: The model was opened without ``pop_complete``, or with another LoRA than the tokens were read
                with.
        """
        call = self._new_call(cancel=cancel)
        with self._calling(call):
            call.in_use = True  # for progress, which cannot begin another call
            if self._completion is not None:
                return self._completion.run(self, max_tokens, progress, cancel)
        if self._complete_arguments["pop_complete"] == "off":
            raise PopError('open the model with pop_complete="call", "idle" or "answer" to complete its cache')
        return 0  # nothing was pruned

    # States

    def save_state(self):
        """Saves a state as ``llama_cpp.Llama`` does, with a digest of the model and the boundary of each position.

        With ``pop_complete="idle"`` or ``"answer"`` the cache is completed first. With ``"call"`` it is saved as it is.
        """
        # Without logits_all nobody reads scores, so they are not kept: a plain Llama spreads the one row over its own.
        self._check_process()
        zeros = np.zeros((1, self.n_vocab()), dtype=np.single)
        with self._turns.pause():
            if self._completion is not None:
                self._completion.begin_save(self)
            return states.save(
                self.ctx,
                input_ids=self.input_ids,
                n_tokens=self.n_tokens,
                scores=self.scores[: self.n_tokens].copy() if self._logits_everywhere else zeros,
                seed=parent.seed(self),
                record=self._record,
                digest=self._digest,
                adapters=self._adapters,
            )

    def load_state(self, state) -> None:
        """Loads a state, also one of a context of another length. All layers have read what a plain ``Llama`` saved.

        Positions that fewer layers or another adapter have read than the next call asks for are read again.

        Raises:
            PopError: The state is of another model, damaged, or does not fit. In the last case the cache is empty.
            TypeError: This is no state.
        """
        if not isinstance(state, llama_cpp.LlamaState):
            raise TypeError(f"load_state() takes what save_state() has returned, not {type(state).__name__}")
        with self._within_call():
            self._load_state(state)

    def _load_state(self, state) -> None:
        name, n = os.path.basename(self.model_path), state.n_tokens
        states.check(state, name, digest=self._digest, n_vocab=self.n_vocab(), n_positions=len(self.input_ids))
        try:
            states.restore(state, name, self.ctx)
        except PopError:
            parent.clear_cache(self)
            self.reset()
            raise
        self.n_tokens = n
        parent.set_requires_eval(self, True)
        self.set_seed(state.seed)
        self.input_ids[:n] = state.input_ids[:n]
        states.restore_record(state, self._record, self._adapters)
        if self._logits_everywhere and len(state.scores) == n:
            self.scores[:n] = state.scores
        elif self._logits_everywhere:
            self._record.forget(0, n)  # it was read without the logits that are needed
        if self._completion is not None:
            self._completion.end_load(self, self._status.n_layer)

    def set_cache(self, cache) -> None:
        """Sets the cache. Other models may share it, since each finds only its own entries."""
        if cache is not None:
            cache = states.ModelCache(cache, self._digest, self.context_params, self._logits_everywhere)
        self.cache = cache

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
