"""Score how much each layer matters for prefill and for decode: the Fisher scores of POP (arXiv 2602.03295).

The converter calls this with a model from ``load_model`` and samples from ``calibration``. The choice of the layers to
skip is made elsewhere, in ``pypop_gguf.boundary_rules``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from pypop_gguf.errors import PopError
from pypop_gguf.importance.calibration import Sample
from pypop_gguf.importance.decoder import compute_logits, find_decoder_layers
from pypop_gguf.importance.gates import Gating, apply_gates, find_gating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_N_PROBE_TOKENS = 8


@dataclass(frozen=True)
class Importance:
    """The scores of all layers.

    Attributes:
        prefill: Mean squared gradient of the gates over prompt positions 0..N-2, float32 [n_layer]. The last entry
            is exactly 0, because nothing reads what a prompt token computes in the last layer.
        decode: Mean squared gradient of the gates over positions N-1 and after, float32 [n_layer].
        gating: ``"branches"`` if both residual branches of each layer were gated, as in the paper. ``"layers"`` if the
            branches could not be told apart in this architecture, so that each layer's whole update was gated.
    """

    prefill: np.ndarray
    decode: np.ndarray
    gating: str


def compute_importance(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Importance:
    """Score every layer for prefill and for decode.

    Both residual branches of layer l are multiplied by a gate of 1: ``g_prefill[l]`` at positions 0..N-2 and
    ``g_decode[l]`` from position N-1 on. The labels of the output tokens are drawn from the model's own predictions,
    and L is the sum of their cross-entropies. The score of a gate is the mean over the samples of ``(dL/dg)^2``, the
    diagonal of the Fisher information (arXiv 2602.03295). Each sample takes one forward and one backward pass. Gates
    and scores are float32 whatever the type of the model's weights.

    Args:
        model: A causal language model, as from ``load_for_importance``.
        samples: Requests with a prompt and an output each.
        seed: Seed of the label draws, which happen on the CPU for every device.
        progress: Called as ``progress(done, total)`` after each sample.

    Returns:
        The scores.

    Raises:
        PopError: There are no samples, the layers cannot be found or gated, a token id is outside the vocabulary, the
            GPU has too little memory, or the scores are not finite.
    """
    if not samples:
        raise PopError("no calibration samples; give at least one")
    embeddings: Any = model.get_input_embeddings()
    n_vocab = embeddings.num_embeddings
    if max(max(sample.tokens) for sample in samples) >= n_vocab:
        raise PopError(f"calibration tokens exceed the vocabulary of {n_vocab}; use the model's own tokenizer")
    model.eval()  # Dropout would make the gradients of the gates random.
    layers = find_decoder_layers(model)

    generator = torch.Generator().manual_seed(seed)
    sums = torch.zeros(2, len(layers), dtype=torch.float64)  # rows: prefill, decode
    try:
        gating = find_gating(model, layers, samples[0].tokens[:_N_PROBE_TOKENS])
        for i, sample in enumerate(samples):
            gradients = _compute_gate_gradients(model, gating, sample, generator)
            sums += gradients.cpu().double().square()
            if progress is not None:
                progress(i + 1, len(samples))
    except torch.cuda.OutOfMemoryError as error:
        raise PopError("not enough GPU memory for importance; use shorter samples or the CPU") from error
    scores = (sums / len(samples)).float().numpy()
    if not np.isfinite(scores).all():
        raise PopError("importance scores are not finite; load the model as float32 or bfloat16")
    return Importance(
        prefill=scores[0],
        decode=scores[1],
        gating="branches" if gating.branch_ends else "layers",
    )


def _compute_gate_gradients(
    model: PreTrainedModel, gating: Gating, sample: Sample, generator: torch.Generator
) -> torch.Tensor:
    """Return dL/dg for labels that are drawn once from the model, float32 [2, n_layer] with rows prefill and decode."""
    # The model does not see the last token, because what the token predicts is not scored.
    tokens = sample.tokens[:-1]
    n_prefill = sample.prompt_len - 1
    n_output = len(tokens) - n_prefill
    device = next(model.parameters()).device
    with torch.enable_grad():
        gates = torch.ones(2, len(gating.layers), device=device, requires_grad=True)
        positions = torch.cat(
            [gates[0, :, None].expand(-1, n_prefill), gates[1, :, None].expand(-1, n_output)], dim=1
        )  # float32 [n_layer, n_tokens]
        with apply_gates(gating, positions):
            logits = compute_logits(model, tokens, n_output)  # float32 [n_output, n_vocab]
        labels = _draw_labels(logits.detach(), generator).to(device)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        return torch.autograd.grad(loss, gates)[0]


def _draw_labels(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw one label for each row of ``logits`` from its probabilities, int64 [n_output].

    The draws invert the cumulative distribution on the CPU, so that a seed gives the same labels on every device.
    """
    draws = torch.rand(len(logits), generator=generator, dtype=torch.float64)
    labels = []
    for row, draw in zip(logits.softmax(dim=-1).cpu(), draws):
        cumulative = row.double().cumsum(dim=0)
        labels.append(torch.searchsorted(cumulative, draw * cumulative[-1], right=True).clamp(max=len(row) - 1))
    return torch.stack(labels)
