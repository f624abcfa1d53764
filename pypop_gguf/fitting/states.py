"""Reads, through the engine, what training needs of a text: states at the boundary and after the last layer.

The engine reads a text many times faster than PyTorch. It hands over what each weight reads and writes, and a state is
the embedding of its token plus all that the layers below have written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from pypop_gguf.errors import PopError
from pypop_gguf.fitting.decoder import Decoder, Pair
from pypop_gguf.fitting.products import FIRST, Products, observing
from pypop_gguf.llama import PopLlama


@dataclasses.dataclass
class Text:
    """A text as training reads it: a prompt, and what the whole model reads behind it.

    Each token but the first has a row.

    Attributes:
        own: States at the boundary, divided by their root mean square, F16 [tokens, width].
        size: The root mean squares, F32 [tokens, 1].
        further: What the bottleneck reads, F16 [tokens, numbers] for each further input.
        expected: States after the whole model's last layer, divided by their root mean square, F16 [tokens, width].
        head: Keys and values of the first token for each layer from the boundary on.
        start: The row of the last prompt token, which is the first that the whole model reads.
    """

    own: torch.Tensor
    size: torch.Tensor
    further: list[torch.Tensor]
    expected: torch.Tensor
    head: list[Pair]
    start: int

    def part(self, start: int, end: int) -> Text:
        """Returns the text before the row ``end``, with ``start`` as the first row that the whole model reads."""
        rows = (self.own[:end], self.size[:end], [x[:end] for x in self.further], self.expected[:end])
        return Text(*rows, self.head, start)


class StateReader:
    """Reads texts; :func:`reading_states` makes one."""

    def __init__(self, products: Products, decoder: Decoder, boundary: int, inputs: Sequence[str]) -> None:
        self._products, self._decoder, self._boundary, self._inputs = products, decoder, boundary, inputs
        parts = ("attn_output", "ffn_down")
        self._writers = [[f"blk.{layer}.{part}.weight" for part in parts] for layer in range(decoder.n_layer)]
        for name in itertools.chain(inputs, *self._writers):
            products.add(name)

    def read(self, prompt: Sequence[int], behind: Sequence[int]) -> Text:
        """Reads a prompt and what follows it with the whole model.

        Args:
            prompt: Token ids, at least two.
            behind: Token ids of an answer, and of what may follow that.

        Raises:
            PopError: The engine cannot read the tokens, or the layers are of another kind.
        """
        tokens, decoder = [*prompt, *behind[:-1]], self._decoder
        self._products.evaluate(tokens, decoder.n_layer, logits=True)
        state = decoder.embedded(tokens[FIRST:])
        at_boundary = state
        for layer, names in enumerate(self._writers):
            at_boundary = state if layer == self._boundary else at_boundary
            for name in names:
                written = self._checked(name, self._products.get_output(name), len(state))
                state = state + written + decoder.bias(name.removesuffix(".weight"))
        inputs = (self._checked(name, self._products.get(name)[0], len(state)) for name in self._inputs)
        return Text(
            own=decoder.normalized(at_boundary).half(),
            size=decoder.size(at_boundary),
            further=[x.half() for x in inputs],
            expected=decoder.normalized(state).half(),
            head=[self._first(layer) for layer in range(self._boundary, decoder.n_layer)],
            start=len(prompt) - 1 - FIRST,
        )

    def _checked(self, name: str, rows: np.ndarray, n_tokens: int) -> torch.Tensor:
        """Returns what a weight has read or written, unless it is not for each token."""
        if len(rows) != n_tokens:
            raise PopError(f"training does not know a model that does not use {name} as Llama does: leave --train out")
        return self._decoder.moved(rows)

    def _first(self, layer: int) -> Pair:
        """Returns the keys and values of the first token."""
        decoder = self._decoder
        names = (f"blk.{layer}.attn_{part}" for part in "kv")
        products = (decoder.moved(self._products.get_first(f"{name}.weight")) + decoder.bias(name) for name in names)
        keys, values = (product[None] for product in products)
        return decoder.cached(layer, (keys, values), torch.zeros(1, device=keys.device))


@contextlib.contextmanager
def reading_states(llm: PopLlama, decoder: Decoder, boundary: int, inputs: Sequence[str]) -> Iterator[StateReader]:
    """Reads states with the engine until the block ends.

    Args:
        llm: The model, from :func:`steps.open_whole`.
        decoder: Its upper layers in PyTorch.
        boundary: The boundary.
        inputs: The weights below the boundary whose inputs are further inputs.
    """
    with observing(llm, boundary) as products:
        yield StateReader(products, decoder, boundary, inputs)
