"""``PopLlama``: llama-cpp-python's ``Llama`` whose prompts are read by the layers below the boundary only.

What differs from the parent: which tokens ask for logits (only a prompt's last one), and a record of the boundary that each cached
position was computed with. ``arguments`` reads the ``pop_*`` arguments, ``calls`` has what a single call takes, ``states`` saves and loads.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import time
from collections.abc import Sequence

import numpy as np

from pypop_gguf import arguments, library, native, states
from pypop_gguf.calls import Calls
from pypop_gguf.errors import PopError
from pypop_gguf.gguf_files.header import read_header
from pypop_gguf.gguf_files.metadata import parse_metadata
from pypop_gguf.status import PopStatus, Timings

llama_cpp = library.load()

_PARENT_PARAMETERS = frozenset(
    name
    for name, parameter in inspect.signature(llama_cpp.Llama.__init__).parameters.items()
    if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name != "self"
)
# The parent drops any name it does not know. These it once knew: its own server and LangChain give them still.
_OUTLIVED_PARAMETERS = frozenset({"f16_kv", "low_vram", "mul_mat_q", "n_gqa", "n_parts", "rms_norm_eps", "rpc_servers"})


class PopLlama(Calls):
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
        **llama_kwargs: Everything that ``llama_cpp.Llama`` takes; what it once took is dropped, as it does.

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
        unknown = sorted(set(llama_kwargs) - _PARENT_PARAMETERS - _OUTLIVED_PARAMETERS)
        if unknown:
            raise TypeError(f"PopLlama() got an unexpected keyword argument {unknown[0]!r}")
        arguments.check_boundary_type("pop_boundary", pop_boundary)
        ends = {"pop_head": pop_head, "pop_tail": pop_tail, "pop_min_tokens": pop_min_tokens}
        self._pop_arguments = {"pop": pop, "pop_boundary": pop_boundary, "pop_adapter": pop_adapter, **ends}
        self._pid = os.getpid()
        self._reading_prompt = False
        self._logits_everywhere = bool(llama_kwargs.get("logits_all", False))
        self.timings = Timings()

        header = read_header(model_path)  # before the model: it tells a bad file from a bad key in one line
        stored = parse_metadata(header, model_path)
        self._load(model_path, llama_kwargs)

        self._digest = states.model_digest(self, header)
        self._adapters: dict[int, str] = {}  # digests of the fitted projections, by boundary
        if llama_kwargs.get("vocab_only", False):
            self._lossless = 0
            self._status = PopStatus(False, 0, 0, "off")
        else:
            self._lossless = native.lossless_boundary(self._model.model)
            n_layer = native.n_layer(self._model.model)
            boundary, source = arguments.choose_boundary(self, pop=pop, asked=pop_boundary, stored=stored)
            if boundary < n_layer:
                native.set_boundary(self._ctx.ctx, boundary)
            chosen = arguments.choose_ends(self, ends, stored)
            files = arguments.add_adapters(self, pop_adapter, boundary)
            self._adapters = {at: states.file_digest(path) for at, path in files.items()}
            self._status = PopStatus(boundary < n_layer, boundary, n_layer, source, *chosen, tuple(files))
        if (
            self.draft_model is not None
        ):  # the parent keeps scores for n_batch positions only; memory is taken as it is written
            self.scores = np.empty((len(self.input_ids), self._n_vocab), dtype=np.single)
        # Boundary that each cached position was computed with; n_layer = by the whole model.
        self._computed_with = np.full(len(self.input_ids), self._status.n_layer, dtype=np.int32)

    def _load(self, model_path: str, llama_kwargs: dict) -> None:
        if mtmd := getattr(llama_kwargs.get("chat_handler"), "_mtmd_cpp", None):
            mtmd.mtmd_helper_log_set(
                llama_cpp._logger.llama_log_callback, None
            )  # else it is loud also where verbose is off
        if llama_kwargs.get("verbose", True):
            super().__init__(model_path, **llama_kwargs)
            return
        with library.captured_log() as errors:
            try:
                super().__init__(model_path, **llama_kwargs)
            except ValueError as error:
                raise PopError(library.load_failure(model_path, errors or [str(error)])) from error

    @property
    def pop(self) -> PopStatus:
        """Whether prompts are pruned, where, and why there."""
        return self._status

    def generate(self, tokens: Sequence[int], *args, **kwargs):
        """``llama_cpp.Llama.generate``: yields token ids; the prompt is read with the boundary of the running call."""
        self._check_process()
        if kwargs.get("reset", True):
            self._forget_shallower_than(self._asked_boundary())

        began = self._call_began or (time.perf_counter(), native.n_pruned(self._ctx.ctx), None)
        started, pruned_before, reused_by_reader = began
        self._call_began = None
        timings = self.timings = Timings(prompt_tokens=len(tokens), boundary=self._asked_boundary())
        self._reading_prompt = True
        self._prefill = (0, time.perf_counter())  # where the whole prompt is cached nothing is read
        generator = super().generate(tokens, *args, **kwargs)
        sent = None
        try:
            while True:
                try:
                    token = generator.send(sent)
                except StopIteration:
                    return
                if timings.generated_tokens == 0:
                    n_read, ended = self._prefill
                    timings.reused_tokens = (
                        len(tokens) - n_read if reused_by_reader is None else min(reused_by_reader, len(tokens) - 1)
                    )
                    timings.pruned_tokens = native.n_pruned(self._ctx.ctx) - pruned_before
                    timings.prefill_ms = 1e3 * (ended - started)
                timings.count_token(1e3 * (time.perf_counter() - started))
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
        self._check_process()
        if self._reader is not None:
            tokens = tokens[self._reader.skip(np.asarray(tokens), whole=False) :]
            if not tokens:
                self._requires_eval = True
                return
        self._eval(tokens, self._logits_everywhere or (self._logits_all and not self._reading_prompt))

    def score(
        self,
        prompt: Sequence[int],
        continuation: Sequence[int],
        *,
        pop: bool | None = None,
        boundary: int | str | None = None,
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
            raise ValueError(
                f"{len(prompt)} and {len(continuation)} tokens: give one each at least, and {self.n_ctx()} at most"
            )
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
        native.set_boundary(self._ctx.ctx, boundary)
        self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        starts = self._chunk_starts(len(tokens))
        for start, end in zip(starts, [*starts[1:], len(tokens)]):
            self._go_on(self.n_tokens, self.n_tokens + len(tokens) - start)
            chunk = tokens[start:end]
            past, size = self.n_tokens, len(chunk)
            self._batch.set_batch(batch=chunk, n_past=past, logits_all=every_token)
            # beside images, what is given may end before the prompt does
            last_of_all = start + size == len(tokens) and (self._reader is None or past + size == self._reader.total)
            self._batch.batch.logits[size - 1] = every_token or last_of_all
            try:
                self._ctx.decode(self._batch)
            except BaseException:  # Ctrl-C is heard only after a micro-batch that then counts for nothing
                self._roll_back(past)
                raise

            self.input_ids[past : past + size] = chunk
            self._computed_with[past : past + size] = self._status.n_layer
            if every_token and self._logits_all:
                logits = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(size, self._n_vocab))
                self.scores[past : past + size] = logits
            elif not every_token:
                whole_from = past + size - self._status.tail if last_of_all else past + size
                self._computed_with[max(past, self._status.head) : max(past, whole_from)] = self._as_recorded(boundary)
                if last_of_all and self._logits_all:  # with a draft model, for logprobs
                    self.scores[past + size - 1] = self._logits_of(1)[0]
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
        """``llama_cpp.Llama.save_state``; the state also says which model it is of, and by which layers each position was read."""
        return states.save(self)

    def load_state(self, state) -> None:
        """``llama_cpp.Llama.load_state``, also in a context of another length; a plain ``Llama``'s state counts as the whole model's.

        Positions that fewer layers or other fitted projections computed than the next call asks for are read again.

        Raises:
            PopError: The state is of another model, or does not fit.
        """
        states.load(self, state)

    def set_cache(self, cache) -> None:
        """``llama_cpp.Llama.set_cache``; other models may share the cache: each finds its own entries only."""
        self.cache = None if cache is None else states.ModelCache(cache, self)

    def __getstate__(self):
        return {**super().__getstate__(), **self._pop_arguments, "logits_all": self._logits_everywhere}
