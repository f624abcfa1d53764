"""``PopLlama``: llama-cpp-python's ``Llama`` whose prompts are read by the layers below the boundary only.

What differs from the parent: which tokens ask for logits (only a prompt's last one), the boundary that the context
holds while a call runs, and a record of the boundary that each cached position was computed with.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pypop_gguf import _library
from pypop_gguf.errors import PopError
from pypop_gguf.metadata import PopMetadata, read_metadata
from pypop_gguf.vision import Reader
from pypop_gguf.status import Cancelled, PopStatus, Timings

llama_cpp = _library.load()

_PARENT_PARAMETERS = frozenset(
    name
    for name, parameter in inspect.signature(llama_cpp.Llama.__init__).parameters.items()
    if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name != "self"
)


class PopLlama(llama_cpp.Llama):
    """A ``llama_cpp.Llama`` with prefill-only pruning (POP, arXiv 2602.03295).

    Example:
        >>> llm = PopLlama("model.gguf")
        >>> llm.create_completion("Once upon a time", max_tokens=32)["choices"][0]["text"]

    Args:
        model_path: A GGUF file; for split files the first shard.
        pop: False runs every layer for every token, exactly as the parent does.
        pop_boundary: First layer that prefill skips, 1..L (L = off), or ``"lossless"``: the last layer that writes to the
            cache. Default: the file's ``pop.boundary``; without one, off, except where upper layers share a cache
            (Gemma 3n, Gemma 4), where the lossless boundary is the default.
        pop_head: First tokens of each sequence that run every layer. Default: the file's ``pop.head``, else 0.
        pop_tail: Last tokens of each prompt that run every layer, 1 to ``n_batch``. Default: the file's ``pop.tail``, else 1.
        pop_min_tokens: Prompts with fewer new tokens, what is reused from the cache left out, are not pruned. Default: the
            file's ``pop.min_tokens``, else 0.
        pop_adapter: File, or files for several boundaries, with fitted K/V projections (``pop-gguf convert --fit-kv``); False for
            none. Default: ``<model>.pop-b<boundary>.gguf`` beside the model, where there is one.
        **llama_kwargs: Everything that ``llama_cpp.Llama`` takes.

    Raises:
        TypeError: An argument neither class knows, or ``pop_boundary`` of another type.
        PopError: The file cannot be read, the model cannot be pruned at that boundary, or a number of tokens is out of range.
    """

    def __init__(
        self,
        model_path: str,
        *,
        pop: bool = True,
        pop_boundary: int | str | None = None,
        pop_head: int | None = None,
        pop_tail: int | None = None,
        pop_min_tokens: int | None = None,
        pop_adapter: str | os.PathLike | Sequence[str | os.PathLike] | bool | None = None,
        **llama_kwargs,
    ) -> None:
        self._stack = contextlib.ExitStack()  # the parent's __del__ needs it also where we refuse to start
        unknown = sorted(set(llama_kwargs) - _PARENT_PARAMETERS)
        if unknown:
            raise TypeError(f"PopLlama() got an unexpected keyword argument {unknown[0]!r}")
        _check_boundary_type("pop_boundary", pop_boundary)
        ends = {"pop_head": pop_head, "pop_tail": pop_tail, "pop_min_tokens": pop_min_tokens}
        self._pop_arguments = {"pop": pop, "pop_boundary": pop_boundary, "pop_adapter": pop_adapter, **ends}
        self._requested: int | None = None  # boundary of the call that is running, None outside calls
        self._progress: Callable[[int, int], bool | None] | None = None  # of the call that is running
        self._cancel: threading.Event | None = None
        self._reader: Reader | None = None  # while a chat handler reads a prompt with images
        self._call_began: tuple[float, int, int] | None = None  # time, tokens pruned before, tokens reused by the reader
        self._reading_prompt = False
        self._logits_everywhere = bool(llama_kwargs.get("logits_all", False))
        self.timings = Timings()

        stored = read_metadata(model_path)  # before the model: it tells a bad file from a bad key in one line
        self._load(model_path, llama_kwargs)

        if llama_kwargs.get("vocab_only", False):
            self._lossless = 0
            self._status = PopStatus(False, 0, 0, "off")
        else:
            self._lossless = _library.lossless_boundary(self._model.model)
            n_layer = _library.n_layer(self._model.model)
            boundary, source = self._choose(stored.boundary if stored else None, n_layer)
            if boundary < n_layer:
                _library.set_boundary(self._ctx.ctx, boundary)
            self._status = PopStatus(
                boundary < n_layer, boundary, n_layer, source if boundary < n_layer else "off", *self._choose_ends(stored),
                self._add_adapters(boundary, n_layer),
            )  # fmt: skip
        # Boundary that each cached position was computed with; n_layer = by the whole model.
        self._computed_with = np.full(len(self.input_ids), self._status.n_layer, dtype=np.int32)

    def _load(self, model_path: str, llama_kwargs: dict) -> None:
        if mtmd := getattr(llama_kwargs.get("chat_handler"), "_mtmd_cpp", None):
            mtmd.mtmd_helper_log_set(llama_cpp._logger.llama_log_callback, None)  # else it is loud also where verbose is off
        if llama_kwargs.get("verbose", True):
            super().__init__(model_path, **llama_kwargs)
            return
        with _library.captured_log() as errors:
            try:
                super().__init__(model_path, **llama_kwargs)
            except ValueError as error:
                raise PopError(_library.load_failure(model_path, errors or [str(error)])) from error

    def _choose(self, stored: int | None, n_layer: int) -> tuple[int, str]:
        asked = self._pop_arguments["pop_boundary"]
        if not self._pop_arguments["pop"]:
            return n_layer, "off"
        if asked is not None:
            return self._resolve(asked), "argument"
        if stored is not None:
            return stored, "file"
        if _library.refusal(self._model.model) is None:
            if self._lossless < n_layer - 1:
                return self._lossless, "lossless"
            print(
                f"pypop_gguf: {os.path.basename(self.model_path)} has no pop.boundary, so prompts are read by all "
                f"{n_layer} layers; `pop-gguf convert` writes one, or pass pop_boundary=",
                file=sys.stderr,
            )
        return n_layer, "off"

    def _choose_ends(self, stored: PopMetadata | None) -> tuple[int, int, int]:
        """Head, tail and fewest tokens; head and tail are the context's from now on."""
        chosen = []
        for name, default, low, high in (("head", 0, 0, None), ("tail", 1, 1, self.n_batch), ("min_tokens", 0, 0, None)):
            value = self._pop_arguments[f"pop_{name}"]
            if value is None:
                of_file = getattr(stored, name, None)
                value = default if of_file is None else of_file
            if not isinstance(value, int) or value < low or (high is not None and value > high):
                allowed = f"at least {low}" if high is None else f"{low} to {high} (n_batch)"
                raise PopError(f"pop_{name} is {value!r}: give a whole number, {allowed}")
            chosen.append(value)
        _library.set_ends(self._ctx.ctx, *chosen[:2])
        return tuple(chosen)

    def _add_adapters(self, boundary: int, n_layer: int) -> tuple[int, ...]:
        """Loads what was asked for or lies beside the model; returns the boundaries that it is for."""
        asked = self._pop_arguments["pop_adapter"]
        single = isinstance(asked, (str, os.PathLike))
        if asked is None:
            beside = os.path.splitext(self.model_path)[0] + f".pop-b{boundary}.gguf"
            asked = [beside] if boundary < n_layer and os.path.isfile(beside) else []
        elif isinstance(asked, bool):
            if asked:
                raise PopError("pop_adapter=True names no file: give a path, or leave it out to take the one beside the model")
            asked = []
        elif single:
            asked = [asked]
        with _library.captured_log():  # what it says is in the error
            found = tuple(_library.add_adapter(self._ctx.ctx, self._model.model, path) for path in asked)
        if single and found != (boundary,) and boundary < n_layer:
            raise PopError(f"{os.fspath(asked[0])} was fitted for boundary {found[0]}, this model is pruned at {boundary}: give both the same")
        return found

    def _resolve(self, boundary: int | str) -> int:
        """Validates a boundary by setting it; every eval() sets the one it needs again, which then costs nothing."""
        if boundary == "lossless":
            return self._lossless
        if reason := _library.refusal(self._model.model, boundary):
            raise PopError(reason)
        _library.set_boundary(self._ctx.ctx, boundary)
        return boundary

    @property
    def pop(self) -> PopStatus:
        """Whether prompts are pruned, where, and why there."""
        return self._status

    # Per call: create_completion(..., pop=False) or (..., boundary=b)

    def _boundary_for(self, pop: bool | None, boundary: int | str | None) -> int:
        _check_boundary_type("boundary", boundary)
        if pop is False:
            return self._status.n_layer
        if boundary is not None:
            return self._resolve(boundary)
        return self._asked_boundary()  # a chat handler calls create_completion inside create_chat_completion

    @contextlib.contextmanager
    def _calling(self, boundary: int, progress=None, cancel=None):
        outer = self._requested, self._progress, self._cancel
        # a chat handler calls create_completion inside create_chat_completion
        self._requested, self._progress, self._cancel = boundary, progress or self._progress, cancel or self._cancel
        _library.set_boundary(self._ctx.ctx, boundary)  # images are read before any eval()
        try:
            yield
        finally:
            self._requested, self._progress, self._cancel = outer

    def _call(self, method, args: tuple, kwargs: dict, *, pop, boundary, progress, cancel):
        requested = self._boundary_for(pop, boundary)
        with self._calling(requested, progress, cancel):
            result = method(*args, **kwargs)
        if not isinstance(result, Iterator):
            result["timings"] = self.timings.as_dict()
            return result

        def streamed():
            while True:
                with self._calling(requested, progress, cancel):
                    try:
                        chunk = next(result)
                    except StopIteration:
                        return
                if any(choice["finish_reason"] for choice in chunk["choices"]):
                    chunk["timings"] = self.timings.as_dict()
                yield chunk

        return streamed()

    def create_completion(
        self,
        *args,
        pop: bool | None = None,
        boundary: int | str | None = None,
        progress: Callable[[int, int], bool | None] | None = None,
        cancel: threading.Event | None = None,
        **kwargs,
    ):
        """``llama_cpp.Llama.create_completion`` with more arguments, and ``timings`` in the result and the last streamed chunk.

        Args:
            pop: False reads this prompt by every layer.
            boundary: The boundary of this call, 1..L or ``"lossless"``; default: the object's.
            progress: Called as ``progress(done, total)``, prompt tokens, before each micro-batch of the prompt and after the
                last; returning False cancels.
            cancel: Once set, from any thread, the call stops before the next micro-batch or token.

        Raises:
            Cancelled: By one of the two. What was read stays in the cache, for the next call to go on from.
            PopError: The model cannot be pruned there.
        """
        self._end_reading()
        ours = dict(pop=pop, boundary=boundary, progress=progress, cancel=cancel)
        return self._call(super().create_completion, args, kwargs, **ours)

    def __call__(self, *args, **kwargs):
        """Same as :meth:`create_completion`."""
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
        ours = dict(pop=pop, boundary=boundary, progress=progress, cancel=cancel)
        if not hasattr(self.chat_handler, "_mtmd_cpp"):
            return self._call(super().create_chat_completion, args, kwargs, **ours)
        requested = self._boundary_for(pop, boundary)
        self._begin_reading(requested)
        try:
            return self._call(super().create_chat_completion, args, kwargs, **ours)
        except BaseException:
            self._end_reading()
            self._call_began = None  # no generate() will come that belongs to it
            raise

    # Images: a chat handler reads them with llama.cpp itself, between calls of eval()

    def _begin_reading(self, boundary: int) -> None:
        self._forget_shallower_than(boundary)
        self._reader = Reader(self, self.chat_handler._mtmd_cpp)
        self._call_began = time.perf_counter(), _library.n_pruned(self._ctx.ctx), 0
        self.chat_handler._mtmd_cpp = self._reader
        if not (self._is_recurrent or self._is_hybrid):  # those cannot drop what follows a common begin
            self._ctx.kv_cache_clear = lambda: None

    def _end_reading(self) -> None:
        if self._reader is not None:
            began, pruned, _ = self._call_began
            self._call_began = began, pruned, self._reader.reused
            self.chat_handler._mtmd_cpp = self._reader._mtmd_cpp
            self._ctx.__dict__.pop("kv_cache_clear", None)
            self._reader = None

    def reset(self) -> None:
        """``llama_cpp.Llama.reset``."""
        if self._reader is not None and not (self._is_recurrent or self._is_hybrid):
            self._reader.rewind()
        else:
            super().reset()

    def _go_on(self, done: int, total: int) -> None:
        """Between micro-batches and tokens.

        Raises:
            Cancelled: The caller wants no more.
        """
        stopped = self._reading_prompt and self._progress is not None and self._progress(done, total) is False
        if stopped or (self._cancel is not None and self._cancel.is_set()):
            raise Cancelled(done, total)

    # The engine's side

    def generate(self, tokens: Sequence[int], *args, **kwargs):
        """``llama_cpp.Llama.generate``: yields token ids; the prompt is read with the boundary of the running call."""
        if kwargs.get("reset", True):
            self._forget_shallower_than(self._asked_boundary())

        began = self._call_began or (time.perf_counter(), _library.n_pruned(self._ctx.ctx), None)
        started, pruned_before, reused_by_reader = began
        self._call_began = None
        timings = self.timings = Timings(prompt_tokens=len(tokens), boundary=self._asked_boundary())
        self._reading_prompt = True
        self._prefill = (0, time.perf_counter())  # where the whole prompt is cached nothing is read
        generator = super().generate(tokens, *args, **kwargs)
        first = None
        sent = None
        try:
            while True:
                try:
                    token = generator.send(sent)
                except StopIteration:
                    return
                now = time.perf_counter()
                if first is None:
                    first = now
                    n_read, ended = self._prefill
                    timings.reused_tokens = len(tokens) - n_read if reused_by_reader is None else min(reused_by_reader, len(tokens) - 1)
                    timings.pruned_tokens = _library.n_pruned(self._ctx.ctx) - pruned_before
                    timings.prefill_ms = 1e3 * (ended - started)
                    timings.time_to_first_token_ms = 1e3 * (first - started)
                else:
                    timings.decode_ms_per_token = 1e3 * (now - first) / timings.generated_tokens
                timings.generated_tokens += 1
                sent = yield token
                self._go_on(len(tokens), len(tokens))
        finally:
            self._reading_prompt = False
            generator.close()

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluates tokens after the ``n_tokens`` that are cached.

        Unlike the parent, only the last token asks for logits, not the last of every ``n_batch``: the others of a prompt
        may then be pruned. With ``logits_all`` every token asks; with a draft model, every token after the prompt.

        Args:
            tokens: Token ids.

        Raises:
            RuntimeError: llama.cpp could not decode (the context is full, for one).
        """
        if self._reader is not None:
            tokens = tokens[self._reader.skip(np.asarray(tokens), whole=False) :]
            if not tokens:
                self._requires_eval = True
                return
        self._eval(tokens, self._logits_everywhere or (self._logits_all and not self._reading_prompt))

    def score(
        self, prompt: Sequence[int], continuation: Sequence[int], *, pop: bool | None = None, boundary: int | str | None = None
    ) -> np.ndarray:
        """Logits for each token of a continuation, by the whole model on the cache that a pruned prompt has left.

        Args:
            prompt: Token ids, at least one. What is cached is forgotten first.
            continuation: Token ids, at least one.
            pop: As in :meth:`create_completion`; ``boundary`` likewise.

        Returns:
            F32 [len(continuation), n_vocab]; row i predicts ``continuation[i]``.

        Raises:
            ValueError: Both together are longer than the context, or one is empty.
            PopError: The model cannot be pruned at that boundary.
        """
        if not prompt or not continuation or len(prompt) + len(continuation) > self.n_ctx():
            raise ValueError(f"{len(prompt)} and {len(continuation)} tokens: give one each at least, and {self.n_ctx()} at most")
        requested = self._boundary_for(pop, boundary)
        self.reset()
        self._ctx.kv_cache_clear()
        rows = []
        with self._calling(requested):
            self._eval(prompt, self._logits_everywhere)
            rows.append(self._logits_of(1))
            for start in range(0, len(continuation) - 1, self.n_batch):
                chunk = continuation[start : min(start + self.n_batch, len(continuation) - 1)]
                self._eval(chunk, True)
                rows.append(self._logits_of(len(chunk)))
        return np.concatenate(rows)

    def _logits_of(self, n: int) -> np.ndarray:
        """Of the last ``n`` tokens that asked for them, F32 [n, n_vocab]."""
        rows = (llama_cpp.llama_get_logits_ith(self._ctx.ctx, i) for i in range(-n, 0))
        return np.stack([np.ctypeslib.as_array(row, shape=(self._n_vocab,)) for row in rows])

    def _eval(self, tokens: Sequence[int], every_token: bool) -> None:
        boundary = self._status.n_layer if len(tokens) < self._status.min_tokens else self._asked_boundary()
        _library.set_boundary(self._ctx.ctx, boundary)
        self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        starts = self._chunk_starts(len(tokens))
        for start, end in zip(starts, [*starts[1:], len(tokens)]):
            self._go_on(self.n_tokens, self.n_tokens + len(tokens) - start)
            chunk = tokens[start:end]
            past, size = self.n_tokens, len(chunk)
            self._batch.set_batch(batch=chunk, n_past=past, logits_all=every_token)
            last_of_all = start + size == len(tokens)
            self._batch.batch.logits[size - 1] = every_token or last_of_all
            try:
                self._ctx.decode(self._batch)
            except BaseException:  # Ctrl-C is heard only after a micro-batch that then counts for nothing
                self._roll_back(past)
                raise

            self.input_ids[past : past + size] = chunk
            if every_token:
                logits = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(size * self._n_vocab,))
                if past + size <= len(self.scores):  # with a draft model the parent keeps only n_batch rows
                    self.scores[past : past + size, :].reshape(-1)[::] = logits
                self._computed_with[past : past + size] = self._status.n_layer
            else:
                whole_from = past + size - self._status.tail if last_of_all else past + size
                pruned = slice(max(past, self._status.head), max(past, whole_from))
                self._computed_with[past : past + size] = self._status.n_layer
                self._computed_with[pruned] = self._as_recorded(boundary)
            self.n_tokens += size
            self._requires_eval = not (every_token or last_of_all)
        if self._reading_prompt:
            llama_cpp.llama_synchronize(self._ctx.ctx)
            self._go_on(self.n_tokens, self.n_tokens)
            self._prefill = (len(tokens), time.perf_counter())
            self._reading_prompt = False

    def _roll_back(self, n_tokens: int) -> None:
        """To the first ``n_tokens``; recurrent memories cannot drop a part, so they are cleared."""
        self.n_tokens, self._requires_eval = n_tokens, True
        if not self._ctx.kv_cache_seq_rm(-1, n_tokens, -1):
            self.reset()

    def _chunk_starts(self, n_tokens: int) -> list[int]:
        """Where pieces start; the tail stays in one of them, with the token that asks for logits.

        A piece is a micro-batch, what llama.cpp makes of a larger one anyway: between two of them a call can be stopped.
        """
        starts = list(range(0, n_tokens, max(self.context_params.n_ubatch, self._status.tail)))
        if len(starts) > 1 and n_tokens - starts[-1] < self._status.tail:
            starts[-1] = n_tokens - self._status.tail
        return starts

    def _asked_boundary(self) -> int:
        return self._status.boundary if self._requested is None else self._requested

    def _as_recorded(self, boundary: int) -> int:
        """A lossless boundary counts as the whole model: it computes the same."""
        return self._status.n_layer if boundary >= self._lossless else boundary

    def _forget_shallower_than(self, boundary: int) -> None:
        """Drops cached positions from the first one on that fewer layers computed than ``boundary`` asks for."""
        shallow = np.flatnonzero(self._computed_with[: self.n_tokens] < self._as_recorded(boundary))
        if len(shallow):
            self._roll_back(int(shallow[0]))

    # State

    def save_state(self):
        """``llama_cpp.Llama.save_state``; the state also says which boundary each position was computed with."""
        state = super().save_state()
        state.pop_computed_with = self._computed_with[: self.n_tokens].copy()
        return state

    def load_state(self, state) -> None:
        """``llama_cpp.Llama.load_state``; a state that a plain ``Llama`` saved counts as computed by the whole model."""
        super().load_state(state)
        self._computed_with[:] = self._status.n_layer
        boundaries = getattr(state, "pop_computed_with", None)
        if boundaries is not None:
            self._computed_with[: len(boundaries)] = boundaries

    def __getstate__(self):
        return {**super().__getstate__(), **self._pop_arguments, "logits_all": self._logits_everywhere}


def _check_boundary_type(name: str, boundary: int | str | None) -> None:
    if isinstance(boundary, bool) or not (boundary is None or boundary == "lossless" or isinstance(boundary, int)):
        raise TypeError(f'{name} must be a layer number, "lossless" or None, not {boundary!r}')
