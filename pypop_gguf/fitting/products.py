"""Reads a text and returns the inputs and the outputs of the weights that fill the caches.

An observer in the engine (csrc/pop-products.h) copies them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from pypop_gguf import library, native
from pypop_gguf.errors import PopError
from pypop_gguf.llama import PopLlama

llama_cpp = library.load()

FIRST = 1  # The first position of a text is left out: its state is unlike all others.


class Products:
    """Evaluates texts on a context and gives the products of the observed weights."""

    def __init__(self, llm: PopLlama, observer) -> None:
        self._llm, self._observer = llm, observer
        names = (native.observer_weight(observer, i) for i in itertools.count())
        self.weights: list[str] = [name for name in itertools.takewhile(bool, names) if name]
        self._added: list[str] = []
        self.n_layer = llm.pop.n_layer

    def evaluate(self, tokens: Sequence[int], boundary: int, logits: bool = False) -> None:
        """Reads a text into the empty cache, pruned at a boundary; L for a whole pass.

        Args:
            tokens: Token ids.
            boundary: 1..L.
            logits: Whether to ask for logits. Without, the last layer writes nothing to the states.
        """
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._llm.ctx), True)
        native.set_boundary(self._llm.ctx, boundary)
        native.observer_clear(self._observer)
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.logits[i] = token, i, logits
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            if status := llama_cpp.llama_decode(self._llm.ctx, batch):
                raise PopError(f"llama.cpp cannot read a text of {len(tokens)} tokens (status {status})")
        finally:
            llama_cpp.llama_batch_free(batch)

    def add(self, weight: str) -> None:
        """Observes one more weight, which fills no cache above the boundary."""
        if weight not in self._added:
            native.observer_add(self._observer, weight)
            self._added.append(weight)

    def get_all(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Returns what :meth:`get` gives, for every weight that was evaluated."""
        found = {}
        for name in (*self.weights, *self._added):
            with contextlib.suppress(PopError):  # a weight that the model does not have, or does not use
                found[name] = self.get(name)
        return found

    def get_first(self, weight: str) -> np.ndarray:
        """Returns what the product has written for position 0, F32 [n_out]."""
        return native.observer_get(self._observer, weight, with_input=False)[1][0]

    def get_output(self, weight: str) -> np.ndarray:
        """Returns what the product has written but for position 0, F32 [n - 1, n_out]."""
        return native.observer_get(self._observer, weight, with_input=False)[1][FIRST:]

    def get(self, weight: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns what the product has read and written but for position 0, F32 [n - 1, n_in] and [n - 1, n_out]."""
        x, y = native.observer_get(self._observer, weight)
        return x[FIRST:], y[FIRST:]


@contextlib.contextmanager
def observing(llm: PopLlama, boundary: int) -> Iterator[Products]:
    """Observes the weights that fill the caches of layers from the boundary on."""
    observer = native.observer_init(llm.ctx, boundary)
    native.set_ends(llm.ctx, n_head=0, n_tail=1)  # A head would run its products a second time, in a whole pass.
    native.observe(llm.ctx, observer)
    try:
        yield Products(llm, observer)
    finally:
        native.observe(llm.ctx, None)
        native.observer_free(observer)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm.ctx), True)
        native.set_ends(llm.ctx, n_head=llm.pop.head, n_tail=llm.pop.tail)
        native.set_boundary(llm.ctx, llm.pop.boundary)


def layer_of(weight: str) -> int:
    """The layer of a weight's name, such as 7 for ``blk.7.attn_v.weight``."""
    return int(weight.split(".")[1])
