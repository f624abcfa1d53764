"""Fits keys and values of skipped layers through the engine, so it needs no torch and works on any GGUF file.

An observer in the engine (csrc/pop-products.h) copies what the weights that fill the caches read and write. One whole
pass over a text gives the outputs, and usually the inputs at every boundary too: what a layer above the boundary reads
in a pruned pass follows from what the boundary layer reads in a whole one, because both normalize the same state. Where
it does not follow, a pruned pass at that boundary gives the inputs.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pypop_gguf import library, native
from pypop_gguf.errors import PopError
from pypop_gguf.fitting.regression import FittedWeight, InputSums, Moments, OutputSums, Relation, relate, solve
from pypop_gguf.llama import PopLlama

llama_cpp = library.load()

_HELD_OUT = 8  # every eighth text chooses lambda and takes no part in the fit
_RARITY = -0.25  # A token counts by this power of how often the texts have it: 8% less KL divergence on SmolLM2-135M.
_FIRST = 1  # the first position of a text is left out: its state is unlike all others


class Products:
    """Evaluates texts on a context and gives the products of the observed weights."""

    def __init__(self, llm: PopLlama, observer) -> None:
        self._llm, self._observer = llm, observer
        names = (native.observer_weight(observer, i) for i in itertools.count())
        self.weights: list[str] = [name for name in itertools.takewhile(bool, names) if name]
        self.n_layer = llm.pop.n_layer

    def evaluate(self, tokens: Sequence[int], boundary: int) -> None:
        """Reads a text into the empty cache without asking for logits, pruned at a boundary; L for a whole pass."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._llm.ctx), True)
        native.set_boundary(self._llm.ctx, boundary)
        native.observer_clear(self._observer)
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.logits[i] = token, i, False
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            if status := llama_cpp.llama_decode(self._llm.ctx, batch):
                raise PopError(f"llama.cpp cannot read a text of {len(tokens)} tokens (status {status})")
        finally:
            llama_cpp.llama_batch_free(batch)

    def get(self, weight: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns what the product has read and written but for position 0, F32 [n - 1, n_in] and [n - 1, n_out]."""
        x, y = native.observer_get(self._observer, weight)
        return x[_FIRST:], y[_FIRST:]


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


class BoundarySums:
    """The sums of all weights above one boundary.

    Attributes:
        relations: For each weight the base input that its own follows from, and how.
        needs_pruned_pass: Whether a base is taken from a pruned pass.
    """

    def __init__(self, boundary: int, products: Products, text: Sequence[int]) -> None:
        self.boundary = boundary
        products.evaluate(text, products.n_layer)
        # A weight that a whole pass uses twice has two outputs, and one replacement cannot give both.
        weights = [name for name in products.weights if len(products.get(name)[0]) == len(text) - _FIRST]
        self._whole_base = next((name for name in weights if layer_of(name) == boundary), None)
        bases: dict[str, np.ndarray] = {}
        if self._whole_base is not None:
            bases[""] = products.get(self._whole_base)[0]
        products.evaluate(text, boundary)
        self.relations: dict[str, tuple[str, Relation]] = {}
        for name in weights:
            if layer_of(name) <= boundary:
                continue
            x = products.get(name)[0]
            found = ((key, relate(base, x)) for key, base in bases.items())
            key, relation = next(((key, relation) for key, relation in found if relation), (name, None))
            if relation is None:
                bases[name] = x
                relation = Relation(np.ones(x.shape[1]), np.zeros(x.shape[1]))
            self.relations[name] = key, relation
        self.needs_pruned_pass = any(key for key, _ in self.relations.values())
        self._inputs: dict[tuple[str, bool], InputSums] = {}
        self._outputs: dict[tuple[str, bool], OutputSums] = {}

    def add(
        self, products: Products, text: Sequence[int], whole: dict[str, tuple], weights: np.ndarray, held_out: bool
    ) -> None:
        """Adds a text after a whole pass over it.

        Args:
            products: For the pruned pass where one is needed.
            text: Its tokens.
            whole: What each weight has read and written in the whole pass.
            weights: How much each token counts, F32 [len(text) - 1].
            held_out: Whether the text only chooses lambda.
        """
        bases = {} if self._whole_base is None else {"": whole[self._whole_base][0]}
        if self.needs_pruned_pass:
            products.evaluate(text, self.boundary)
            bases |= {key: products.get(key)[0] for key, _ in self.relations.values() if key}
        centred = {}
        for key in {key for key, _ in self.relations.values()}:
            sums = self._inputs.setdefault((key, held_out), InputSums(bases[key].shape[1]))
            centred[key] = sums.add(bases[key], weights)
        for name, (key, _) in self.relations.items():
            x, y = centred[key], whole[name][1]
            self._outputs.setdefault((name, held_out), OutputSums(x.shape[1], y.shape[1])).add(x, y, weights)

    def solve(self, name: str, weight: np.ndarray) -> FittedWeight:
        """Fits one weight, F32 [n_out, n_in].

        Raises:
            PopError: The sums are not finite.
        """
        key, relation = self.relations[name]
        fitted, held_out = (
            Moments.from_sums(self._inputs[key, part], self._outputs[name, part], relation) for part in (False, True)
        )
        if not (np.isfinite(fitted.xx).all() and np.isfinite(fitted.xy).all()):
            raise PopError(f"{name} reads or writes values that are not finite: the file is damaged")
        return solve(fitted, held_out, weight)


def collect(
    llm: PopLlama,
    texts: Sequence[Sequence[int]],
    boundaries: Sequence[int],
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[BoundarySums]:
    """Sums what the regression needs, for several boundaries at once.

    Args:
        llm: A model opened with ``pop=False``; its context is used and left empty.
        texts: Token ids of at least eight texts; longer ones are cut to the context.
        boundaries: 1..L-1 each.
        progress: Called with the tokens that are read and those in all.

    Raises:
        PopError: There are too few texts, or the model cannot be pruned at a boundary.
    """
    texts = [list(text)[: llm.n_ctx()] for text in texts if len(text) > 2 * _FIRST + 2]
    if len(texts) < _HELD_OUT:
        raise PopError(f"{len(texts)} texts are too few to fit keys and values: give at least {_HELD_OUT}")
    total, done = sum(map(len, texts)), 0
    counts = collections.Counter(itertools.chain.from_iterable(texts))
    with observing(llm, min(boundaries)) as products:
        longest = max(texts[: 2 * _HELD_OUT], key=len)
        sums = [BoundarySums(boundary, products, longest) for boundary in boundaries]
        for i, text in enumerate(texts):
            products.evaluate(text, products.n_layer)
            whole = {name: products.get(name) for name in products.weights}
            # A rare token, such as a name or a number, matters more to an answer than one more comma does.
            weights = np.array([counts[token] ** _RARITY for token in text[_FIRST:]], dtype=np.float32)
            for one in sums:
                one.add(products, text, whole, weights, held_out=i % _HELD_OUT == _HELD_OUT - 1)
            done += len(text)
            progress(done, total)
    return sums
