"""Train fitted projections further by gradient descent, so that a pruned prompt is answered as a whole one is.

The loss compares what the whole model predicts after a pruned prompt with what it predicts after a whole prompt. Only
the low-rank differences are trained, those of keys too; the model's weights stay as they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from pypop_gguf.errors import PopError
from pypop_gguf.fitting.fit import Difference, find_projections, skip_layers
from pypop_gguf.importance.calibration import Sample
from pypop_gguf.importance.decoder import find_decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BATCH = 4  # samples for each step
_RATE = 1e-3  # highest learning rate
_WARM_UP = 10  # steps over which the learning rate rises


def distill(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    boundary: int,
    start: Sequence[Difference],
    *,
    steps: int,
    rank: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Difference]:
    """Minimize the divergence KL(whole || pruned) over the outputs of the samples.

    The optimizer is Adam with four samples for each step and a learning rate that falls to 0. The differences of values
    start from ``start`` and are changed in place; those of keys start at zero.

    Args:
        model: The model that ``start`` was fitted to.
        samples: Requests with a prompt and an output each.
        boundary: The first layer that prefill skips.
        start: The differences from ``fit_values``.
        steps: The number of steps, at least 1.
        rank: The rank of the differences of keys, at least 1.
        seed: The seed of the order of the samples and of the start of the keys.
        progress: Called as ``progress(done, total)`` after each step.

    Returns:
        The trained differences that are not zero.

    Raises:
        PopError: The loss is not finite.
    """
    layers = find_decoder_layers(model)
    generator = torch.Generator().manual_seed(seed)
    differences = list(start)
    for projection in find_projections(model, boundary):
        if projection.kind == "key":
            n_in, n_out = projection.module.in_features, projection.module.out_features
            device = projection.module.weight.device
            a = torch.randn(rank, n_in, generator=generator).to(device) / n_in**0.5
            differences.append(Difference(projection, a, torch.zeros(n_out, rank, device=device)))
    masks = [_make_row_mask(difference) for difference in differences]
    trained = [t.requires_grad_() for difference in differences for t in (difference.a, difference.b)]
    optimizer = torch.optim.Adam(trained, lr=_RATE)
    order = random.Random(seed)
    try:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = _RATE * min(1.0, (step + 1) / _WARM_UP) * (1 - step / steps)
            optimizer.zero_grad()
            for sample in order.sample(list(samples), min(_BATCH, len(samples))):
                loss = _compute_divergence(model, layers, sample, boundary, differences) / _BATCH
                if not torch.isfinite(loss):
                    raise PopError("distillation diverged: give fewer --distill-steps or more calibration texts")
                loss.backward()
            for difference, mask in zip(differences, masks, strict=True):
                if difference.b.grad is not None:  # It is None for a projection that the model's pass does not use.
                    difference.b.grad.mul_(mask)
            optimizer.step()
            if progress is not None:
                progress(step + 1, steps)
    finally:
        for t in trained:
            t.requires_grad_(False)
    return [difference for difference in differences if difference.b.any()]


def _make_row_mask(difference: Difference) -> torch.Tensor:
    """Return a mask that keeps B zero outside the projection's rows, float32 [n_out, 1]."""
    mask = torch.zeros(len(difference.b), 1, device=difference.b.device)
    mask[difference.projection.rows] = 1
    return mask


def _compute_divergence(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    sample: Sample,
    boundary: int,
    differences: Sequence[Difference],
) -> torch.Tensor:
    """Return the mean of KL(whole || pruned) over the output's tokens, in nats for each token."""
    ids = torch.tensor([sample.tokens], device=next(model.parameters()).device)
    n = sample.prompt_len
    with torch.no_grad():
        whole = model(input_ids=ids[:, :-1], use_cache=False).logits[0, n - 1 :].float().log_softmax(-1)
    # The last prompt token is a decode step, which runs all layers. A prompt of one token therefore leaves no prefill.
    cache = None
    if n > 1:
        with skip_layers(layers, boundary, differences):
            cache = model(input_ids=ids[:, : n - 1], use_cache=True).past_key_values
    out = model(input_ids=ids[:, n - 1 : -1], past_key_values=cache, use_cache=True).logits[0].float().log_softmax(-1)
    return (whole.exp() * (whole - out)).sum(-1).mean()
