"""Fits keys and values of skipped layers through the engine, so it needs no torch and works on any GGUF file.

An observer in the engine (csrc/pop-products.h) copies what the weights that fill the caches read and write. One whole
pass over a text gives the outputs, and usually the inputs at every boundary too: what a layer above the boundary reads
in a pruned pass follows from what the boundary layer reads in a whole one, because both normalize the same state. Where
it does not follow, a pruned pass at that boundary gives the inputs.

States of layers below the boundary, which run anyway, are further inputs of every weight that reads the state there.
They pass one bottleneck, from which on sums of what has passed it are enough. It is found from all texts, or, where the
inputs are wide, after some of them.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from pypop_gguf.errors import PopError
from pypop_gguf.fitting.products import FIRST, Products, layer_of, observing
from pypop_gguf.fitting.regression import (
    FittedWeight,
    InputSums,
    Moments,
    OutputSums,
    Relation,
    find_bottleneck,
    relate,
    solve,
)
from pypop_gguf.llama import PopLlama

_HELD_OUT = 8  # every eighth text chooses lambda and takes no part in the fit
_RARITY = -0.25  # A token counts by this power of how often the texts have it: 8% less KL divergence on SmolLM2-135M.
_MOST = 8192  # Columns of an input and the further ones: the sums of more would take several gigabytes.
_KEYS = 2  # An error of keys counts this much more in the bottleneck: 4% less KL divergence at half of SmolLM2-135M.
_WIDE = 4096  # Columns of an input and the further ones: sums of more take long until the bottleneck is found.
_TO_NARROW = 10_000  # tokens after which the bottleneck of wide inputs is found


class BoundarySums:
    """The sums of all weights above one boundary.

    Attributes:
        is_wide: Whether input and further inputs have so many columns that the bottleneck is found after some texts.
        relations: For each weight the base input that its own follows from, and how.
        further: The weights below the boundary whose inputs are further inputs, and the columns of each.
        bottlenecks: F32 [rank, n_in] for each further input, after :meth:`narrow`.
        needs_pruned_pass: Whether a base is taken from a pruned pass.
    """

    def __init__(self, boundary: int, products: Products, text: Sequence[int], further_inputs: bool = True) -> None:
        self.boundary = boundary
        products.evaluate(text, products.n_layer)
        # A weight that a whole pass uses twice has two outputs, and one replacement cannot give both.
        weights = [name for name in products.weights if len(products.get(name)[0]) == len(text) - FIRST]
        self._whole_base = next((name for name in weights if layer_of(name) == boundary), None)
        bases: dict[str, np.ndarray] = {}
        if self._whole_base is not None:
            bases[""] = products.get(self._whole_base)[0]
        self.further: dict[str, int] = {}
        self.bottlenecks: dict[str, np.ndarray] = {}
        self.is_wide = False
        if further_inputs and self._whole_base is not None:
            self._choose_further(products, text, self._whole_base)
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

    def _choose_further(self, products: Products, text: Sequence[int], base: str) -> None:
        candidates = further_candidates(base)
        for name in candidates:
            products.add(name)
        products.evaluate(text, products.n_layer)
        whole = products.get_all()
        n_in = whole[base][0].shape[1]
        for name in candidates:
            x = whole[name][0] if name in whole else np.empty((0, 0))
            if len(x) == len(text) - FIRST and n_in + x.shape[1] <= _MOST:
                self.further[name] = x.shape[1]
                n_in += x.shape[1]
        self.is_wide = n_in > _WIDE

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
        bases = {}
        if self._whole_base is not None:
            further = [whole[name][0] for name in self.further]
            if self.bottlenecks:
                narrowed = (x @ self.bottlenecks[name].T for name, x in zip(self.further, further, strict=True))
                further = [np.sum(list(narrowed), axis=0)]
            bases[""] = np.concatenate([whole[self._whole_base][0], *further], axis=1)
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

    def narrow(self) -> None:
        """Finds what of the further inputs passes the bottleneck, unless it is found. No text may be held out yet.

        Raises:
            PopError: The sums are not finite.
        """
        names = [name for name, (key, _) in self.relations.items() if not key]
        if self.bottlenecks or not self.further or not names:
            return
        inputs, outputs = self._inputs["", False], [self._outputs[name, False] for name in names]
        for name, one in zip(names, outputs, strict=True):
            _check_finite(name, inputs.gram, one.cross)
        n_own = len(self.relations[names[0]][1].scale)
        factors = (_KEYS if ".attn_k." in name else 1 for name in names)
        bottleneck = find_bottleneck(inputs, zip(outputs, factors, strict=True), n_own)
        self._inputs["", False] = inputs.narrowed(bottleneck)
        for name, one in zip(names, outputs, strict=True):
            self._outputs[name, False] = one.narrowed(bottleneck)
        ends = np.cumsum(list(self.further.values()))[:-1]
        self.bottlenecks = dict(zip(self.further, np.split(bottleneck, ends, axis=1), strict=True))

    def solve(self, name: str, weight: np.ndarray) -> FittedWeight:
        """Fits one weight, F32 [n_out, n_in].

        Raises:
            PopError: The sums are not finite.
        """
        key, relation = self.relations[name]
        fitted, held_out = (
            Moments.from_sums(
                self._inputs[key, part],
                self._outputs[name, part],
                relation.extended(len(self._inputs[key, part].sum)),
            )
            for part in (False, True)
        )
        _check_finite(name, fitted.xx, fitted.xy)
        return solve(fitted, held_out, weight)


def _check_finite(name: str, *sums: np.ndarray) -> None:
    if not all(np.isfinite(one).all() for one in sums):
        raise PopError(f"{name} reads or writes values that are not finite: the file is damaged")


def further_candidates(base: str) -> list[str]:
    """Returns the weights whose inputs may be further inputs, by the weight that reads the state at the boundary.

    They are the states near the input and two layers below the boundary, the hidden activations of the feed-forward
    network below the boundary, and the state halfway. The first ones bring most: where there is no room for all, the
    last ones are left out.
    """
    boundary, part = layer_of(base), base.split(".", 2)[2]
    first, near, halfway = (f"blk.{max(0, layer)}.{part}" for layer in (boundary // 8, boundary - 2, boundary // 2))
    return list(dict.fromkeys((first, near, f"blk.{boundary - 1}.ffn_down.weight", halfway)))


def collect(
    llm: PopLlama,
    texts: Sequence[Sequence[int]],
    boundaries: Sequence[int],
    progress: Callable[[int, int], object] = lambda done, total: None,
    further_inputs: bool = True,
) -> list[BoundarySums]:
    """Sums what the regression needs, for several boundaries at once.

    Args:
        llm: A model opened with ``pop=False``; its context is used and left empty.
        texts: Token ids of at least eight texts; longer ones are cut to the context.
        boundaries: 1..L-1 each.
        progress: Called with the tokens that are read and those in all.
        further_inputs: Whether the fit also reads states below the boundary.

    Raises:
        PopError: There are too few texts, or the model cannot be pruned at a boundary.
    """
    texts = [list(text)[: llm.n_ctx()] for text in texts if len(text) > 2 * FIRST + 2]
    if len(texts) < _HELD_OUT:
        raise PopError(f"{len(texts)} texts are too few to fit keys and values: give at least {_HELD_OUT}")
    total, done = sum(map(len, texts)), 0
    counts = collections.Counter(itertools.chain.from_iterable(texts))
    held_out = texts[_HELD_OUT - 1 :: _HELD_OUT]
    del texts[_HELD_OUT - 1 :: _HELD_OUT]
    with observing(llm, min(boundaries)) as products:
        longest = max(texts[:_HELD_OUT], key=len)
        sums = [BoundarySums(boundary, products, longest, further_inputs) for boundary in boundaries]
        for i, text in enumerate([*texts, *held_out]):
            for one in sums:
                if i == len(texts) or (one.is_wide and done >= _TO_NARROW):
                    one.narrow()
            products.evaluate(text, products.n_layer)
            whole = products.get_all()
            # A rare token, such as a name or a number, matters more to an answer than one more comma does.
            weights = np.array([counts[token] ** _RARITY for token in text[FIRST:]], dtype=np.float32)
            for one in sums:
                one.add(products, text, whole, weights, held_out=i >= len(texts))
            done += len(text)
            progress(done, total)
    return sums
