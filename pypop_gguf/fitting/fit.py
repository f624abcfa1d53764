"""Fits the projections by which skipped layers fill their caches, from one calibration pass.

A pruned prefill applies the value projection of each skipped layer to the state at the boundary, for which it was never meant.
This solves for the low-rank difference that brings it nearest to what the whole model would have written; ``distill_kv`` goes on
from there, ``kv_adapter`` writes the result. Works on any Transformers decoder whose projections it knows by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from pypop_gguf.errors import PopError
from pypop_gguf.importance.calibration import Sample
from pypop_gguf.importance.decoder import find_decoder_layers

LAMBDAS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the mean diagonal of X'X
_HELD_OUT = 10  # every tenth text chooses lambda


@dataclass(frozen=True)
class Projection:
    """A weight that writes keys or values.

    Attributes:
        layer: 0-based index.
        name: Of the module in the model, as in its checkpoint.
        module: ``y = x W' (+ bias)``.
        rows: Of W: those that write what ``kind`` says.
        kind: ``"key"``, ``"value"``, or ``"latent"`` (MLA: both are made from it).
    """

    layer: int
    name: str
    module: nn.Linear
    rows: slice
    kind: str


@dataclass
class Difference:
    """What a pruned pass adds to a projection: ``y += x A' B'``.

    Attributes:
        projection: To which.
        a: F32 [rank, n_in].
        b: F32 [n_out, rank], zero outside the projection's rows.
        lam: Ridge that was chosen, a share of the mean diagonal of X'X.
        error_before: Squared error of the values on held-out texts, as a share of their square; ``error_after`` with the difference.
    """

    projection: Projection
    a: torch.Tensor
    b: torch.Tensor
    lam: float = 0.0
    error_before: float = 0.0
    error_after: float = 0.0


def find_projections(model: nn.Module, boundary: int) -> list[Projection]:
    """Key and value projections of the layers above ``boundary``, whose own cache is exact already.

    Raises:
        PopError: None that is known by name.
    """
    names = {module: name for name, module in model.named_modules()}
    config = model.config.get_text_config(decoder=True)
    layers = find_decoder_layers(model)
    found = []
    for il in range(boundary + 1, len(layers)):
        for name, module in layers[il].named_modules():
            if isinstance(module, nn.Linear):
                for kind, rows in _rows(name.rsplit(".", 1)[-1], module, config):
                    found.append(Projection(il, names[module], module, rows, kind))
    if not found:
        raise PopError(
            f"no key and value projections to fit above layer {boundary}: give a lower boundary, or leave out --fit-kv"
        )
    return found


def _rows(name: str, module: nn.Linear, config) -> list[tuple[str, slice]]:
    n_out = module.out_features
    if name in ("k_proj", "v_proj"):
        return [("key" if name == "k_proj" else "value", slice(0, n_out))]
    if name == "qkv_proj":  # queries, keys, values, one after the other
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        n_kv = config.num_key_value_heads * head
        return [("key", slice(n_out - 2 * n_kv, n_out - n_kv)), ("value", slice(n_out - n_kv, n_out))]
    if name == "kv_a_proj_with_mqa":  # the latent state, then the keys' rotary part
        return [("latent", slice(0, config.kv_lora_rank))]
    return []


@contextmanager
def pruned(layers: Sequence[nn.Module], boundary: int, differences: Sequence[Difference] = ()) -> Iterator[None]:
    """Within it, layers from the boundary on pass their input on, and write their caches from it with the differences."""

    def pass_on(_layer, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def add(difference: Difference):
        return lambda _module, args, output: (
            output + (args[0] @ difference.a.T.to(args[0].dtype)) @ difference.b.T.to(args[0].dtype)
        )

    with ExitStack() as hooks:
        for layer in layers[boundary:]:
            hooks.callback(layer.register_forward_hook(pass_on, with_kwargs=True).remove)
        for difference in differences:
            hooks.callback(difference.projection.module.register_forward_hook(add(difference)).remove)
        yield


class _Moments:
    """Normal equations of one projection, summed over texts in float64."""

    def __init__(self) -> None:
        self.xx = self.xy = self.yy = 0.0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        x, y = x.double(), y.double()
        self.xx, self.xy, self.yy = self.xx + x.T @ x, self.xy + x.T @ y, self.yy + float((y * y).sum())

    def error(self, w: torch.Tensor) -> float:
        """Of ``y = x w'``, squared, as a share of the square of y."""
        return float((self.yy - 2 * (w.T * self.xy).sum() + (w @ self.xx * w).sum()) / max(self.yy, 1e-300))


def memory_bytes(projections: Sequence[Projection]) -> int:
    """What the sums of :func:`fit_values` take beside the model."""
    return sum(
        2 * 8 * p.module.in_features * (p.module.in_features + p.rows.stop - p.rows.start) for p in _fitted(projections)
    )


def _fitted(projections: Sequence[Projection]) -> list[Projection]:
    # Keys are left alone: a key's error moves attention to other tokens, which squared error does not see (docs/quality.md).
    return [projection for projection in projections if projection.kind != "key"]


def fit_values(
    model: nn.Module,
    samples: Sequence[Sample],
    boundary: int,
    *,
    rank: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Difference]:
    """Ridge regression of the whole model's values on the normed boundary state, towards the original weights.

    ``W' = (X'X + lambda I)^-1 (X'Y + lambda W)``, in float64, with the lambda of each projection that errs least on every tenth
    text, which takes no part in the fit; then the part of ``W' - W`` of the given rank that keeps most of it on X.

    Args:
        model: Causal language model, as from ``load_for_importance``.
        samples: Texts; prompt and output count alike.
        boundary: First layer that prefill skips; layers above it are fitted.
        rank: Of the differences, at least 1.
        progress: Called as ``progress(done, total)`` after each sample.

    Returns:
        One difference for each value projection that the model's pass uses.

    Raises:
        PopError: No known projections, fewer than ten texts, or sums that are not finite.
    """
    if len(samples) < _HELD_OUT:
        raise PopError(f"{len(samples)} texts are too few to fit projections: give at least {_HELD_OUT}")
    projections = _fitted(find_projections(model, boundary))
    layers = find_decoder_layers(model)
    sums = [(_Moments(), _Moments()) for _ in projections]
    for i, sample in enumerate(samples):
        held_out = i % _HELD_OUT == _HELD_OUT - 1
        for (fit, check), pair in zip(
            sums, _inputs_and_outputs(model, layers, sample, boundary, projections), strict=True
        ):
            if pair:
                (check if held_out else fit).add(*pair)
        if progress is not None:
            progress(i + 1, len(samples))
    return [
        _solve(p, fit, check, rank)
        for p, (fit, check) in zip(projections, sums, strict=True)
        if torch.is_tensor(fit.xx)
    ]


@torch.no_grad()
def _inputs_and_outputs(
    model, layers, sample: Sample, boundary: int, projections: Sequence[Projection]
) -> list[tuple | None]:
    """What each projection reads in a pruned pass, [T, n_in], and what it writes in a whole one, [T, n_rows]."""
    ids = torch.tensor([sample.tokens], device=next(model.parameters()).device)
    x, y = {}, {}

    def record(i: int, projection: Projection):
        def hook(module, args, output):
            bias = 0 if module.bias is None else module.bias
            (y if whole else x)[i] = ((output - bias)[0, :, projection.rows] if whole else args[0][0]).float()

        return hook

    with ExitStack() as hooks:
        for i, projection in enumerate(projections):
            hooks.callback(projection.module.register_forward_hook(record(i, projection)).remove)
        whole = True
        model(input_ids=ids, use_cache=False)
        whole = False
        with pruned(layers, boundary):
            model(input_ids=ids, use_cache=False)
    return [(x[i], y[i]) if i in x and i in y else None for i in range(len(projections))]


def _solve(projection: Projection, fit: _Moments, check: _Moments, rank: int) -> Difference:
    weight = projection.module.weight.detach()[projection.rows].double()
    if not torch.isfinite(fit.xx).all() or not torch.isfinite(fit.xy).all():
        raise PopError(f"{projection.name}: its inputs are not finite; load the model as float32 or bfloat16")
    scale, eye = fit.xx.diagonal().mean(), torch.eye(len(fit.xx), dtype=torch.float64, device=fit.xx.device)
    factor = torch.linalg.cholesky(fit.xx + 1e-6 * scale * eye)
    best = None
    for lam in LAMBDAS:
        solved = torch.linalg.solve(fit.xx + lam * scale * eye, fit.xy + lam * scale * weight.T).T
        a, b = _low_rank(solved - weight, factor, rank)
        error = check.error(weight + b @ a)
        if best is None or error < best[0]:
            best = error, lam, a, b
    error, lam, a, b = best
    full = torch.zeros(projection.module.out_features, b.shape[1], dtype=torch.float64, device=b.device)
    full[projection.rows] = b
    return Difference(projection, a.float(), full.float(), lam, check.error(weight), error)


def _low_rank(difference: torch.Tensor, factor: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best B A of a rank for inputs whose second moment is ``factor factor'``."""
    u, s, v = torch.linalg.svd(difference @ factor, full_matrices=False)
    root = s[:rank].sqrt()
    return torch.linalg.solve_triangular(factor, root[:, None] * v[:rank], upper=False, left=False), u[:, :rank] * root
