"""The limit of the speed-up that a boundary allows, from the floating-point operations of the graphs."""

from __future__ import annotations

from collections.abc import Iterable

from pypop_gguf import native
from pypop_gguf.llama import PopLlama

N_TOKENS = 512  # of the prompt that is counted: one micro-batch


def speedup_limits(llm: PopLlama, boundaries: Iterable[int]) -> dict[int, float]:
    """Returns the operations of a whole prompt of ``N_TOKENS`` over those that each boundary leaves.

    Args:
        llm: A model with a context of at least ``N_TOKENS``; its tail counts.
        boundaries: 1..L each.
    """
    n_layer = llm.pop.n_layer

    def flops(boundary: int, n_tokens: int, n_outputs: int) -> float:
        return native.graph_flops(llm.ctx, boundary=boundary, n_tokens=n_tokens, n_seqs=1, n_outputs=n_outputs)

    whole, last = flops(n_layer, N_TOKENS, 1), flops(n_layer, min(llm.pop.tail, N_TOKENS), 1)
    return {
        # The last tokens of the prompt, the tail, also run the layers above the boundary.
        boundary: 1.0
        if boundary == n_layer
        else whole / (flops(boundary, N_TOKENS, 0) + last * (n_layer - boundary) / n_layer)
        for boundary in boundaries
    }
