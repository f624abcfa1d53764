"""Chooses the boundary from what the user asked for. Importance and quality are measured elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pypop_gguf.errors import PopError

if TYPE_CHECKING:
    from pypop_gguf.gguf_files.metadata import PopMetadata
    from pypop_gguf.library import ModelSupport

DEFAULT_PRUNE_RATIO = 1 / 3  # the rule that the paper deploys


@dataclass(frozen=True)
class BoundaryChoice:
    """A boundary, and how much importance a prompt loses by it.

    Attributes:
        boundary: First layer that prefill skips, 1..L; L skips none.
        skipped_share: Share of the prefill importance that lies in the skipped layers, 0..1; None where it is unknown.
        rule: The rule that chose the boundary, as text for the user.
    """

    boundary: int
    skipped_share: float | None
    rule: str


def check_rule(
    prune_ratio: float | None = None, boundary: str | None = None, max_importance_loss: float | None = None
) -> None:
    """Checks the rules for values that no model could satisfy, before any work is done.

    Raises:
        PopError: A value is out of range.
    """
    if prune_ratio is not None and not 0 <= prune_ratio < 1:
        raise PopError(f"--prune-ratio {prune_ratio:g} is out of range: give at least 0 and less than 1")
    if max_importance_loss is not None and not 0 <= max_importance_loss <= 1:
        raise PopError(f"--max-importance-loss {max_importance_loss:g} is out of range: give 0 to 1")
    if boundary not in (None, "lossless") and not (boundary.isascii() and boundary.isdigit() and int(boundary) >= 1):
        raise PopError(
            f'--boundary {boundary} is out of range: give a layer, from 1 to the model\'s last, or "lossless"'
        )


def check_support(model: object, support: ModelSupport) -> None:
    """Checks that a model can be pruned.

    Raises:
        PopError: Its architecture has no prefill to prune. The message names ``model``.
    """
    if support.refusal:
        raise PopError(f"{model} ({support.architecture}): {support.refusal}")


def own_boundary(support: ModelSupport, stored: PopMetadata | None) -> int | None:
    """Returns the boundary that a model is read with unless the user says otherwise; None if all layers read prompts.

    It is the file's. Without one it is the lossless boundary, where upper layers share a cache.
    """
    if stored is not None and stored.boundary is not None:
        return stored.boundary
    return support.lossless_boundary if support.lossless_boundary < support.n_layer - 1 else None


def default_boundary(support: ModelSupport, stored: PopMetadata | None) -> int:
    """Returns the boundary to measure where the user names none: the model's own one, or that of the default ratio."""
    own = own_boundary(support, stored)
    return choose_boundary(support.n_layer, support.lossless_boundary).boundary if own is None else own


def choose_boundary(
    n_layer: int,
    lossless_boundary: int,
    *,
    prune_ratio: float | None = None,
    boundary: str | None = None,
    max_importance_loss: float | None = None,
    importance: np.ndarray | None = None,
) -> BoundaryChoice:
    """Applies the one rule that is given. Without a rule, it skips a third of the layers.

    Args:
        n_layer: Layers of the model, L.
        lossless_boundary: The last layer that writes to the cache.
        prune_ratio: R in [0, 1): skip floor(L R) layers.
        boundary: A number 1..L or ``"lossless"``.
        max_importance_loss: S in [0, 1]: the lowest boundary whose skipped share of prefill importance is at most S.
        importance: Prefill importance of each layer, [L].

    Raises:
        PopError: A value is out of range, or the rule needs importance and there is none.
    """
    check_rule(prune_ratio, boundary, max_importance_loss)
    if boundary is not None:
        chosen = lossless_boundary if boundary == "lossless" else int(boundary)
        if chosen > n_layer:
            raise PopError(f'--boundary {boundary} is out of range: give 1 to {n_layer} or "lossless"')
        rule = f"--boundary {boundary}"
    elif max_importance_loss is not None:
        if importance is None:
            raise PopError("--max-importance-loss needs importance: leave out --no-importance")
        if not np.any(importance):
            raise PopError("prefill importance is 0 everywhere, so it tells no layer from another: give --boundary")
        chosen = next(b for b in range(1, n_layer + 1) if skipped_share(importance, b) <= max_importance_loss)
        rule = f"--max-importance-loss {max_importance_loss:g}"
    else:
        ratio = DEFAULT_PRUNE_RATIO if prune_ratio is None else prune_ratio
        # The small number makes a third of 12 layers 4, however the ratio was rounded.
        chosen = max(1, n_layer - math.floor(n_layer * ratio + 1e-6))
        if lossless_boundary < chosen < n_layer:
            chosen = lossless_boundary  # Layers above it share the cache of lower ones, so skipping them costs nothing.
        rule = f"--prune-ratio {ratio:.4g}"
    return BoundaryChoice(chosen, None if importance is None else skipped_share(importance, chosen), rule)


def check_budget(max_kl: float | None, max_loss_increase: float | None) -> None:
    """Checks the budget of :func:`choose_by_curve`.

    Raises:
        PopError: A number is out of range.
    """
    for name, value in (("--max-kl", max_kl), ("--max-loss-increase", max_loss_increase)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise PopError(f"{name} {value:g} is out of range: give at least 0")


def choose_by_curve(
    n_layer: int,
    curve: dict[int, tuple[float, float]],
    *,
    max_kl: float | None = None,
    max_loss_increase: float | None = None,
) -> BoundaryChoice:
    """Chooses the lowest boundary that keeps the budget, as all measured boundaries above it do too.

    Args:
        n_layer: Layers of the model, L.
        curve: KL divergence and relative increase of the loss, measured at each boundary. L keeps any budget.
        max_kl: Largest divergence, nats a token.
        max_loss_increase: Largest increase of the loss, percent. One of the two is given.
    """

    def keeps_budget(kl: float, increase: float) -> bool:
        return (max_kl is None or kl <= max_kl) and (max_loss_increase is None or 100 * increase <= max_loss_increase)

    chosen = n_layer
    for boundary in sorted(curve, reverse=True):
        if boundary != n_layer and not keeps_budget(*curve[boundary]):
            break
        chosen = boundary
    rule = f"--max-kl {max_kl:g}" if max_kl is not None else f"--max-loss-increase {max_loss_increase:g}"
    return BoundaryChoice(chosen, None, rule)


def skipped_share(importance: np.ndarray, boundary: int) -> float:
    """Returns the share of the prefill importance that lies in layers ``boundary`` and above, 0..1."""
    total = float(np.sum(importance, dtype=np.float64))
    return float(np.sum(importance[boundary:], dtype=np.float64)) / total if total > 0 else 0.0
