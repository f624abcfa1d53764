"""Keeps the boundary that each cached position was read with: a prompt may only reuse what enough layers have read."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class CacheRecord:
    """The boundaries of a context's positions. The owner knows how many of them are cached.

    Args:
        n_positions: Length of the context.
        n_layer: Layers of the model, L: the boundary of what all of them have read.
        lossless: Boundary from which on pruning changes nothing, so that it counts as L.
        n_head: First positions that always run every layer.

    Attributes:
        boundaries: Boundary of each position, int32 [n_positions]; 0 if nobody may reuse it.
    """

    def __init__(self, n_positions: int, n_layer: int, lossless: int, n_head: int = 0) -> None:
        self._n_layer, self._lossless, self._n_head = n_layer, lossless, n_head
        self.boundaries = np.full(n_positions, n_layer, dtype=np.int32)

    def mark(self, start: int, end: int, boundary: int) -> None:
        """Records that positions from ``start`` to ``end`` were read with this boundary, those of the head whole."""
        self.boundaries[start:end] = self._counted(boundary)
        self.boundaries[start : min(end, self._n_head)] = self._n_layer

    def complete(self, first: int, n_cached: int) -> None:
        """Records that the positions before ``first`` are the whole model's, and those from there on are not.

        What follows a pruned position was computed from its keys and values, so it counts as read with its boundary.
        """
        cached = self.boundaries[:n_cached]
        lowest = int(cached[cached > 0].min(initial=self._n_layer))
        cached[:first][cached[:first] > 0] = self._n_layer
        cached[first:] = np.minimum(cached[first:], lowest)

    def forget(self, start: int, end: int) -> None:
        """Makes positions from ``start`` to ``end`` unusable for every prompt."""
        self.boundaries[start:end] = 0

    def usable(self, n_cached: int, boundary: int) -> int:
        """Returns how many cached positions a prompt with this boundary may reuse, up to the first unusable one."""
        shallow = np.flatnonzero(self.boundaries[:n_cached] < self._counted(boundary))
        return int(shallow[0]) if len(shallow) else n_cached

    def to_state(self, n_cached: int) -> np.ndarray:
        """Returns a copy of the first ``n_cached`` boundaries, int32 [n_cached]."""
        return self.boundaries[:n_cached].copy()

    def from_state(self, n_cached: int, boundaries: np.ndarray | None, unusable: Iterable[int] = ()) -> None:
        """Takes over the boundaries of a saved state.

        Args:
            n_cached: Positions of the state.
            boundaries: What ``to_state`` has given; None if every layer has read all of it.
            unusable: Boundaries that mean something else in that state.
        """
        self.boundaries[:n_cached] = self._n_layer if boundaries is None else boundaries
        cached = self.boundaries[:n_cached]
        cached[np.isin(cached, list(unusable))] = 0

    def _counted(self, boundary: int) -> int:
        return self._n_layer if boundary >= self._lossless else boundary
