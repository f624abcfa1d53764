"""Fit the projections with which a pruned pass fills the caches of skipped layers, from one calibration pass.

A pruned pass applies the key and value projections of each skipped layer to the state at the boundary, for which they
were not trained. This module solves for the low-rank difference of each value projection that brings its output
nearest to what the whole model would have written. ``distill`` can train the result further, and ``hf_to_adapter``
writes it to a file. This works for any Transformers decoder whose projections are known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pypop_gguf.errors import PopError
from pypop_gguf.importance.calibration import Sample
from pypop_gguf.importance.decoder import find_decoder_layers, read_layer_input, replace_output

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAMBDAS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # The ridges to try, as shares of the mean diagonal of X'X.
_HELD_OUT = 10  # Every tenth text is held out of the fit, to choose lambda.


@dataclass(frozen=True)
class Projection:
    """A weight W that writes keys or values: ``y = x W'``, plus a bias where it has one.

    Attributes:
        layer: The 0-based index of the layer.
        name: The name of the module in the model, which is also its name in the checkpoint.
        module: The module that holds W, of shape [n_out, n_in].
        rows: The rows of W that write what ``kind`` says. A fused weight also has rows for other purposes.
        kind: ``"key"``, ``"value"``, or ``"latent"`` for the state of multi-head latent attention (MLA), from which
            both keys and values are made.
    """

    layer: int
    name: str
    module: nn.Linear
    rows: slice
    kind: str


@dataclass
class Difference:
    """A low-rank difference that a pruned pass adds to a projection: ``y += x A' B'``.

    Attributes:
        projection: The projection.
        a: The matrix A, float32 [rank, n_in].
        b: The matrix B, float32 [n_out, rank]; it is zero outside the projection's rows.
        lam: The ridge that was chosen, as a share of the mean diagonal of X'X.
        error_before: The squared error of the values on held-out texts without the difference, as a share of the
            square of the values.
        error_after: The same error with the difference.
    """

    projection: Projection
    a: torch.Tensor
    b: torch.Tensor
    lam: float = 0.0
    error_before: float = 0.0
    error_after: float = 0.0


def find_projections(model: PreTrainedModel, boundary: int) -> list[Projection]:
    """Find the key and value projections of the layers above the boundary.

    The layer at the boundary is left out: it reads the state that it would read in a whole pass, so what it writes to
    its cache is exact.

    Raises:
        PopError: No layer above the boundary has a projection that is known by name.
    """
    names = {module: name for name, module in model.named_modules()}
    config = model.config.get_text_config(decoder=True)
    layers = find_decoder_layers(model)
    found = []
    for il in range(boundary + 1, len(layers)):
        for name, module in layers[il].named_modules():
            if isinstance(module, nn.Linear):
                for kind, rows in _find_rows(name.rsplit(".", 1)[-1], module, config):
                    found.append(Projection(il, names[module], module, rows, kind))
    if not found:
        raise PopError(
            f"no key and value projections to fit above layer {boundary}: give a lower boundary, or leave out --fit-kv"
        )
    return found


def _find_rows(name: str, module: nn.Linear, config: Any) -> list[tuple[str, slice]]:
    """Return the kinds of projection that a module of this name holds, each with its rows of the weight."""
    n_out = module.out_features
    if name in ("k_proj", "v_proj"):
        return [("key" if name == "k_proj" else "value", slice(0, n_out))]
    if name == "qkv_proj":  # The rows of queries, keys and values follow one another.
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        n_kv = config.num_key_value_heads * head
        return [("key", slice(n_out - 2 * n_kv, n_out - n_kv)), ("value", slice(n_out - n_kv, n_out))]
    if name == "kv_a_proj_with_mqa":  # The rows of the latent state come first, then the rotary part of the keys.
        return [("latent", slice(0, config.kv_lora_rank))]
    return []


@contextmanager
def skip_layers(layers: Sequence[nn.Module], boundary: int, differences: Sequence[Difference] = ()) -> Iterator[None]:
    """Within the block, the layers from the boundary on return the state that they read, as in a pruned pass.

    They still write their caches, from the state at the boundary and with the differences added.

    Args:
        layers: All decoder layers, first to last.
        boundary: The first layer to skip.
        differences: The differences to add to projections.
    """

    def pass_on(_layer, args, kwargs, output):
        return replace_output(output, read_layer_input(args, kwargs))

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
    """The sums of one projection's least-squares problem over texts, in float64.

    Attributes:
        n_tokens: The number of tokens that were added.
        xx: X'X, [n_in, n_in].
        xy: X'Y, [n_in, n_rows].
        yy: The sum of the squares of Y.
    """

    def __init__(self, projection: Projection) -> None:
        n_in, n_rows = projection.module.in_features, projection.rows.stop - projection.rows.start
        options: dict[str, Any] = {"dtype": torch.float64, "device": projection.module.weight.device}
        self.n_tokens = 0
        self.xx = torch.zeros(n_in, n_in, **options)
        self.xy = torch.zeros(n_in, n_rows, **options)
        self.yy = 0.0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the inputs x [T, n_in] and the wanted outputs y [T, n_rows] of one text."""
        x, y = x.double(), y.double()
        self.n_tokens += len(x)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += float((y * y).sum())

    def compute_error(self, w: torch.Tensor) -> float:
        """Return the squared error of ``x w'``, as a share of the square of y, of a weight w [n_rows, n_in]."""
        return float((self.yy - 2 * (w.T * self.xy).sum() + (w @ self.xx * w).sum()) / max(self.yy, 1e-300))


def memory_bytes(projections: Sequence[Projection]) -> int:
    """Return the memory that the sums of :func:`fit_values` take in addition to the model, in bytes."""
    # Each projection has two sets of sums, for the fit and for the choice of lambda, of 8 bytes a number.
    return sum(
        2 * 8 * p.module.in_features * (p.module.in_features + p.rows.stop - p.rows.start)
        for p in _leave_out_keys(projections)
    )


def _leave_out_keys(projections: Sequence[Projection]) -> list[Projection]:
    """Return the projections that :func:`fit_values` fits."""
    # An error in a key moves attention to other tokens, which the squared error of the key does not show
    # (docs/quality.md). Only distillation trains keys.
    return [projection for projection in projections if projection.kind != "key"]


def fit_values(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    boundary: int,
    *,
    rank: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Difference]:
    """Fit the value projections by ridge regression towards the original weights.

    X is the state at the boundary as a projection reads it in a pruned pass, and Y is what the projection writes in a
    whole pass. The new weight is ``W' = (X'X + lambda I)^-1 (X'Y + lambda W)``, computed in float64. Of ``W' - W`` the
    part of the given rank is kept that preserves most of it on X. Each projection takes the lambda of :data:`LAMBDAS`
    with the least error on every tenth text, which is held out of the fit.

    Args:
        model: A causal language model, as from ``load_for_importance``.
        samples: Texts, at least ten. Tokens of prompts and outputs count alike.
        boundary: The first layer that prefill skips. The layers above it are fitted.
        rank: The rank of the differences, at least 1.
        progress: Called as ``progress(done, total)`` after each sample.

    Returns:
        One difference for each value projection that the model uses in its pass.

    Raises:
        PopError: No projections are known, there are fewer than ten texts, or the sums are not finite.
    """
    if len(samples) < _HELD_OUT:
        raise PopError(f"{len(samples)} texts are too few to fit projections: give at least {_HELD_OUT}")
    projections = _leave_out_keys(find_projections(model, boundary))
    layers = find_decoder_layers(model)
    sums = [(_Moments(projection), _Moments(projection)) for projection in projections]  # fitted and held-out texts
    for i, sample in enumerate(samples):
        held_out = i % _HELD_OUT == _HELD_OUT - 1
        pairs = _record_projections(model, layers, sample, boundary, projections)
        for (fit, check), pair in zip(sums, pairs, strict=True):
            if pair:
                (check if held_out else fit).add(*pair)
        if progress is not None:
            progress(i + 1, len(samples))
    return [
        _solve(projection, fit, check, rank)
        for projection, (fit, check) in zip(projections, sums, strict=True)
        if fit.n_tokens
    ]


@torch.no_grad()
def _record_projections(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    sample: Sample,
    boundary: int,
    projections: Sequence[Projection],
) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """Record what each projection reads in a pruned pass and what it writes, without its bias, in a whole pass.

    Returns:
        For each projection a float32 pair of shapes [T, n_in] and [T, n_rows], or None if the model does not use it.
    """
    ids = torch.tensor([sample.tokens], device=next(model.parameters()).device)
    x: dict[int, torch.Tensor] = {}
    y: dict[int, torch.Tensor] = {}

    def record_input(i: int):
        def hook(_module, args, _output):
            x[i] = args[0][0].float()

        return hook

    def record_output(i: int):
        def hook(module, _args, output):
            bias = 0 if module.bias is None else module.bias
            y[i] = (output - bias)[0, :, projections[i].rows].float()

        return hook

    with ExitStack() as hooks:
        for i, projection in enumerate(projections):
            hooks.callback(projection.module.register_forward_hook(record_output(i)).remove)
        model(input_ids=ids, use_cache=False)
    with ExitStack() as hooks, skip_layers(layers, boundary):
        for i, projection in enumerate(projections):
            hooks.callback(projection.module.register_forward_hook(record_input(i)).remove)
        model(input_ids=ids, use_cache=False)
    return [(x[i], y[i]) if i in x and i in y else None for i in range(len(projections))]


def _solve(projection: Projection, fit: _Moments, check: _Moments, rank: int) -> Difference:
    """Solve for the difference of one projection, with the lambda that has the least error on held-out texts.

    Raises:
        PopError: The sums are not finite.
    """
    weight = projection.module.weight.detach()[projection.rows].double()
    if not torch.isfinite(fit.xx).all() or not torch.isfinite(fit.xy).all():
        raise PopError(f"{projection.name}: its inputs are not finite; load the model as float32 or bfloat16")
    scale, eye = fit.xx.diagonal().mean(), torch.eye(len(fit.xx), dtype=torch.float64, device=fit.xx.device)
    # A little is added to the diagonal, because X'X is singular if the texts have fewer tokens than X has columns.
    factor = torch.linalg.cholesky(fit.xx + 1e-6 * scale * eye)
    candidates = []
    for lam in LAMBDAS:
        solved = torch.linalg.solve(fit.xx + lam * scale * eye, fit.xy + lam * scale * weight.T).T
        a, b = _reduce_rank(solved - weight, factor, rank)
        candidates.append((check.compute_error(weight + b @ a), lam, a, b))
    error, lam, a, b = min(candidates, key=lambda candidate: candidate[0])
    full = torch.zeros(projection.module.out_features, b.shape[1], dtype=torch.float64, device=b.device)
    full[projection.rows] = b
    return Difference(projection, a.float(), full.float(), lam, check.compute_error(weight), error)


def _reduce_rank(difference: torch.Tensor, factor: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find A [rank, n_in] and B [n_out, rank] whose product B A is nearest to a difference on its inputs.

    The second moment of the inputs is ``F F'``. The squared error of B A on them is then ``||(D - B A) F||^2``, which
    the truncated singular value decomposition of ``D F`` minimizes (Eckart and Young).

    Args:
        difference: The difference D, [n_out, n_in].
        factor: The Cholesky factor F of the inputs' second moment, lower triangular [n_in, n_in].
        rank: The rank to keep.
    """
    u, s, v = torch.linalg.svd(difference @ factor, full_matrices=False)
    root = s[:rank].sqrt()
    return torch.linalg.solve_triangular(factor, root[:, None] * v[:rank], upper=False, left=False), u[:, :rank] * root
