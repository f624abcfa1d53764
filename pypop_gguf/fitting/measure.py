"""Measures what pruning costs a model's own answers, with the skipped layers' own weights and with fitted ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pypop_gguf import library, native
from pypop_gguf.errors import PopError
from pypop_gguf.llama import PopLlama
from pypop_gguf.quality.score import Score, compare, log_softmax

llama_cpp = library.load()


@dataclass(frozen=True)
class Cost:
    """The scores of one answer at one boundary, without the adapter and with it."""

    plain: Score
    fitted: Score


class Meter:
    """Lets the whole model answer a prompt, and scores that answer after pruned prompts."""

    def __init__(self, llm: PopLlama, adapters: Mapping[int, Path]) -> None:
        """Loads the adapters.

        Args:
            llm: The model, opened with ``pop=False`` and without adapters.
            adapters: The adapter file of each boundary that is measured.

        Raises:
            PopError: An adapter cannot be read, or is not for this model.
        """
        self._llm = llm
        self._adapters = {boundary: native.adapter_init(llm.model, path) for boundary, path in adapters.items()}

    def measure(self, prompt: Sequence[int], n_tokens: int) -> dict[int, Cost]:
        """Measures one prompt.

        Args:
            prompt: Token ids.
            n_tokens: Tokens of the answer that is scored. An answer that ends itself is shorter.

        Returns:
            The cost at each boundary.

        Raises:
            PopError: The model's predictions are not finite.
        """
        answer = self.answer(prompt, n_tokens)
        # The whole model scores the answer in one batch, as the pruned ones do: single tokens take other products,
        # whose rounding alone cost 0.002 nats a token on SmolLM2-135M in Q4_1.
        whole = log_softmax(self._llm.score(prompt, answer, pop=False))
        if not np.isfinite(whole).all():
            raise PopError("the model predicts values that are not finite: the file is damaged")

        def score(boundary: int) -> Score:
            return compare(log_softmax(self._llm.score(prompt, answer, boundary=boundary)), whole, answer)

        plain = {boundary: score(boundary) for boundary in self._adapters}
        for adapter in self._adapters.values():
            native.add_adapter(self._llm.ctx, adapter)
        return {boundary: Cost(plain[boundary], score(boundary)) for boundary in self._adapters}

    def answer(self, prompt: Sequence[int], n_tokens: int) -> list[int]:
        """Returns the greedy answer of the whole model."""
        native.clear_adapters(self._llm.ctx)
        self._llm.reset()
        vocabulary = llama_cpp.llama_model_get_vocab(self._llm.model)
        answer: list[int] = []
        for token in self._llm.generate(prompt, temp=0.0):
            answer.append(token)
            if len(answer) == n_tokens or llama_cpp.llama_vocab_is_eog(vocabulary, token):
                break
        return answer
