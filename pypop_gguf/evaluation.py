"""Evaluates and caches prompts and tokens for ``PopLlama``, with a record of the boundary of each position.

It differs from llama-cpp-python in two ways: only a prompt's last token asks for logits, and a record says which
boundary each cached position was read with. ``cache_record`` is the record, ``completion`` says when skipped layers run
later, and ``states`` saves and loads.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pypop_gguf import library, native, parent, states
from pypop_gguf.cache_record import CacheRecord
from pypop_gguf.call import pieces
from pypop_gguf.calling import CallingLlama
from pypop_gguf.errors import PopError
from pypop_gguf.status import Timings

if TYPE_CHECKING:
    import llama_cpp
else:
    llama_cpp = library.load()


class EvaluatingLlama(CallingLlama):
    """A ``Llama`` that knows how many layers have read each cached position. ``PopLlama`` gives it its fields."""

    _logits_everywhere: bool  # every token asks for logits
    _keeps_scores: bool  # logits are kept, for all tokens or for those after the prompt
    _has_tokenizer: bool
    _record: CacheRecord
    _digest: str  # of the model
    _adapters: dict[int, str]  # the digests of the adapters in use, by boundary
    _complete_arguments: dict[str, Any]

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
                        answering.after_token(self, 1e3 * (time.perf_counter() - began))
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
