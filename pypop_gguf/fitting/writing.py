"""Lets a model write answers, and prompts of its own, to train on. It writes several at once.

Half of its own prompts are written from the place on where the chat template has the user's words. The others go on
from a given prompt that was cut at a random place, so they are of the same kinds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Iterator, Sequence

from pypop_gguf import library, native
from pypop_gguf.errors import PopError
from pypop_gguf.fitting.texts import WRITTEN_TOKENS, chat_frame
from pypop_gguf.llama import PopLlama
from pypop_gguf.terminal import progress

llama_cpp = library.load()

ANSWER = 48  # tokens of an answer that is trained on
_AT_ONCE = 24  # Texts that are written at once: a pass for so many takes less time than one for 8, which has no kernel.
_FEWEST = 20  # texts that are written in any case
_SHORTEST, _LONGEST = 8, 120  # tokens that the model writes of a prompt
_FROM_THE_BEGINNING = 0.5  # share of its own prompts that go on from no given one
_LIKELIEST = 100  # Each token of a prompt is drawn among so many.


@dataclasses.dataclass
class _Draft:
    """A text that is being written.

    Attributes:
        tokens: The tokens that it has so far.
        to_write: Tokens that the model still writes of the prompt, at most.
        n_read: Tokens that are in the cache.
        n_prompt: Tokens of the prompt once it is whole, else 0.
    """

    tokens: list[int]
    to_write: int = 0
    n_read: int = 0
    n_prompt: int = 0


class Author:
    """Writes texts with a context of its own."""

    def __init__(self, llm: PopLlama, prompts: Sequence[Sequence[int]], frame: tuple[Sequence[int], Sequence[int]]):
        """Makes the context, which :meth:`close` frees.

        Args:
            llm: The model.
            prompts: Token ids of the given prompts. One that leaves a batch no room for an answer is left out.
            frame: What the chat template has before the user's words and behind them.
        """
        self._opening, self._ending = frame
        self._longest = llm.n_batch - ANSWER  # A text is read in one batch later.
        self._prompts = [list(prompt) for prompt in prompts if len(prompt) <= self._longest]
        self._vocabulary = llama_cpp.llama_model_get_vocab(llm.model)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_seq_max = _AT_ONCE
        parameters.n_ctx = parameters.n_batch = _AT_ONCE * llm.n_batch
        parameters.n_threads, parameters.n_threads_batch = llm.n_threads, llm.n_threads_batch
        with contextlib.ExitStack() as stack:
            with library.captured_log() as errors:
                self._ctx = llama_cpp.llama_init_from_model(llm.model, parameters)
            if not self._ctx:
                reason = (errors or ["no reason given"])[0]
                raise PopError(f"llama.cpp cannot make a context of {parameters.n_ctx} tokens to write in: {reason}")
            stack.callback(llama_cpp.llama_free, self._ctx)
            native.open_context(self._ctx, None, boundary=native.OFF)
            self._memory = llama_cpp.llama_get_memory(self._ctx)
            self._sampler = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
            stack.callback(llama_cpp.llama_sampler_free, self._sampler)
            for sampler in (llama_cpp.llama_sampler_init_top_k(_LIKELIEST), llama_cpp.llama_sampler_init_dist(0)):
                llama_cpp.llama_sampler_chain_add(self._sampler, sampler)
            self._greedy = llama_cpp.llama_sampler_init_greedy()
            stack.callback(llama_cpp.llama_sampler_free, self._greedy)
            self._batch = llama_cpp.llama_batch_init(parameters.n_batch, 0, 1)
            stack.callback(llama_cpp.llama_batch_free, self._batch)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Frees the context."""
        self._stack.close()

    def write(self, deadline: float, chance: random.Random) -> Iterator[tuple[list[int], list[int]]]:
        """Yields prompts with greedy answers of the model: the given prompts, then prompts of its own.

        Args:
            deadline: The time of :func:`time.monotonic` from which on no text is begun, but for the first few.
            chance: Where prompts are cut.
        """
        drafts: dict[int, _Draft] = {}  # by sequence
        waiting, n_begun = self._drafts(chance), 0
        while True:
            for sequence in set(range(_AT_ONCE)) - set(drafts):
                if n_begun < _FEWEST or time.monotonic() < deadline:
                    drafts[sequence] = next(waiting)
                    n_begun += 1
                    llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            if not drafts:
                return
            for sequence, row in self._read(drafts).items():
                draft = drafts[sequence]
                if self._append(draft, row):
                    del drafts[sequence]
                    if draft.n_prompt > 1:  # A shorter prompt has no token that is pruned.
                        yield draft.tokens[: draft.n_prompt], draft.tokens[draft.n_prompt :]

    def _drafts(self, chance: random.Random) -> Iterator[_Draft]:
        for prompt in chance.sample(self._prompts, len(self._prompts)):
            yield _Draft(list(prompt), n_prompt=len(prompt))
        while True:
            begun = list(self._opening)
            if self._prompts and (not begun or chance.random() >= _FROM_THE_BEGINNING):
                prompt = chance.choice(self._prompts)
                end = max(1, len(prompt) - len(self._ending) - 1)  # At least one token is written anew.
                begun = prompt[: chance.randint(max(1, min(len(begun), end)), end)]
            room = self._longest - len(begun) - len(self._ending)
            yield _Draft(begun, max(1, min(chance.randint(_SHORTEST, _LONGEST), room)))

    def _read(self, drafts: dict[int, _Draft]) -> dict[int, int]:
        """Reads what is new of each draft, and returns the row of logits behind it."""
        batch, rows = self._batch, {}
        batch.n_tokens = 0
        for sequence, draft in drafts.items():
            for position in range(draft.n_read, len(draft.tokens)):
                i = batch.n_tokens
                batch.token[i], batch.pos[i] = draft.tokens[position], position
                batch.logits[i] = position == len(draft.tokens) - 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.n_tokens += 1
            draft.n_read, rows[sequence] = len(draft.tokens), batch.n_tokens - 1
        if status := llama_cpp.llama_decode(self._ctx, batch):
            raise PopError(f"llama.cpp cannot write texts to train on (status {status})")
        return rows

    def _append(self, draft: _Draft, row: int) -> bool:
        """Appends the token that the model writes next. Returns whether the text is whole."""
        sampler = self._sampler if not draft.n_prompt else self._greedy
        token = llama_cpp.llama_sampler_sample(sampler, self._ctx, row)
        ends = llama_cpp.llama_vocab_is_eog(self._vocabulary, token)
        if not draft.n_prompt:
            draft.to_write -= 1
            if not ends:
                draft.tokens.append(token)
            if ends or draft.to_write == 0:
                draft.tokens += self._ending
                draft.n_prompt = len(draft.tokens)
            if draft.n_read < len(draft.tokens):
                return False
            token = llama_cpp.llama_sampler_sample(self._greedy, self._ctx, row)
            ends = llama_cpp.llama_vocab_is_eog(self._vocabulary, token)
        draft.tokens.append(token)
        return ends or len(draft.tokens) == draft.n_prompt + ANSWER


def write_texts(llm: PopLlama, prompts: Sequence[Sequence[int]], seconds: float) -> list[tuple[list[int], list[int]]]:
    """Lets a model answer given prompts, and then prompts of its own, for so long or until there are enough.

    Returns:
        Token ids of each prompt and of its answer, in the order in which they were whole.
    """
    author, began, total = Author(llm, prompts, chat_frame(llm)), time.monotonic(), max(1, round(seconds))
    texts: list[tuple[list[int], list[int]]] = []
    n_tokens = 0
    with contextlib.closing(author), progress(total=total, description="writing texts to train on", unit="s") as bar:
        for text in author.write(began + seconds, random.Random(0)):
            texts.append(text)
            n_tokens += sum(map(len, text))
            if n_tokens >= WRITTEN_TOKENS:
                break
            bar.set_postfix_str(f"{len(texts)} texts", refresh=False)
            bar.update_to(min(total, int(time.monotonic() - began)), total)
    return texts
