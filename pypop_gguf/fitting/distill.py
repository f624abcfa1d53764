"""Goes on from fitted projections by gradient descent: what the whole model says after a pruned prompt shall be what it says after
a whole one. Only the low-rank differences are trained, those of keys too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import nn

from pypop_gguf.errors import PopError
from pypop_gguf.fitting.fit import Difference, find_projections, pruned
from pypop_gguf.importance.calibration import Sample
from pypop_gguf.importance.decoder import find_decoder_layers

_BATCH = 4  # texts a step
_RATE = 1e-3
_WARM_UP = 10


def distill(
    model: nn.Module,
    samples: Sequence[Sample],
    boundary: int,
    start: Sequence[Difference],
    *,
    steps: int,
    rank: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Difference]:
    """Minimizes KL(whole model || POP) over the outputs of the samples.

    Adam, four texts a step, the rate falling to 0. An adapter of keys starts at zero, one of values where ``start`` has it.

    Args:
        model: As for :func:`pypop_gguf.fitting.fit.fit_values`.
        samples: Prompt and output each.
        boundary: First layer that prefill skips.
        start: From ``fit_values``.
        steps: At least 1.
        rank: Of the differences of keys.
        seed: Of the order of the samples and the start of keys.
        progress: Called as ``progress(done, total)`` after each step.

    Raises:
        PopError: A loss that is not finite.
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
    masks = [_row_mask(difference) for difference in differences]
    trained = [t.requires_grad_() for difference in differences for t in (difference.a, difference.b)]
    optimizer = torch.optim.Adam(trained, lr=_RATE)
    order = random.Random(seed)
    try:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = _RATE * min(1.0, (step + 1) / _WARM_UP) * (1 - step / steps)
            optimizer.zero_grad()
            for sample in order.sample(list(samples), min(_BATCH, len(samples))):
                loss = _divergence(model, layers, sample, boundary, differences) / _BATCH
                if not torch.isfinite(loss):
                    raise PopError("distillation diverged: give fewer --distill-steps or more calibration texts")
                loss.backward()
            for difference, mask in zip(differences, masks, strict=True):
                difference.b.grad.mul_(mask)
            optimizer.step()
            if progress is not None:
                progress(step + 1, steps)
    finally:
        for t in trained:
            t.requires_grad_(False)
    return [difference for difference in differences if difference.b.any()]


def _row_mask(difference: Difference) -> torch.Tensor:
    mask = torch.zeros(len(difference.b), 1, device=difference.b.device)
    mask[difference.projection.rows] = 1
    return mask


def _divergence(
    model: nn.Module, layers: Sequence[nn.Module], sample: Sample, boundary: int, differences
) -> torch.Tensor:
    """KL(whole || POP) over the output, nats a token."""
    ids = torch.tensor([sample.tokens], device=next(model.parameters()).device)
    n = sample.prompt_len
    with torch.no_grad():
        whole = model(input_ids=ids[:, :-1], use_cache=False).logits[0, n - 1 :].float().log_softmax(-1)
    cache = None
    if n > 1:
        with pruned(layers, boundary, differences):
            cache = model(input_ids=ids[:, : n - 1], use_cache=True).past_key_values
    out = model(input_ids=ids[:, n - 1 : -1], past_key_values=cache, use_cache=True).logits[0].float().log_softmax(-1)
    return (whole.exp() * (whole - out)).sum(-1).mean()
