"""The plots of docs/quality.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pypop_gguf.plotting import style_axes
from pypop_gguf.quality.results import Results
from tools.ablation_table import layer_costs
from tools.quality_rows import LABELS, METRICS, Row, boundary_of

_COLOURS = ("#0072b2", "#d55e00", "#009e73")
_MARKERS = {
    "plain": "o",
    "head": "^",
    "alone": "<",
    "fitted": "s",
    "trained": "v",
    "completed": "d",
    "removed": "x",
    "shortgpt": "+",
}

_STYLES = {"plain": ":", "head": (0, (1, 4)), "alone": "-.", "fitted": "-", "trained": "--"}


def plot_kl(rows: list[Row], layers: dict[str, int], path: Path) -> None:
    """Draws the KL divergence over the share of skipped layers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    for colour, (model, n_layer) in zip(_COLOURS, layers.items()):
        for kind, style in _STYLES.items():
            points = [
                (1 - boundary_of(row.variant) / n_layer, row.kl)
                for row in rows
                if row.model == model and row.kind == kind and row.kl
            ]
            if points:
                x, y = [100 * share for share, _ in points], [kl.value for _, kl in points]
                spread = [[kl.value - kl.low for _, kl in points], [kl.high - kl.value for _, kl in points]]
                label = f"{model}, {LABELS[kind]}"
                axes.errorbar(
                    x, y, yerr=spread, color=colour, ls=style, marker=_MARKERS[kind], ms=4, capsize=3, label=label
                )
    axes.set(xlabel="layers skipped, %", ylabel="KL divergence, nats per token", yscale="log")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    style_axes(axes)
    figure.savefig(path, dpi=150)


def plot_losses(rows: list[Row], path: Path) -> None:
    """Draws for each task by how many points its score changes, over the KL divergence."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    tasks = [task for task in METRICS if any(task in row.losses and row.kl for row in rows)]
    models = list(dict.fromkeys(row.model for row in rows))
    figure = Figure(figsize=(10, 2.6 * -(-max(1, len(tasks)) // 3) + 0.6), layout="constrained")
    grid = figure.subplots(-(-max(1, len(tasks)) // 3), 3, squeeze=False, sharex=True)
    for axes, task in zip(grid.flat, tasks):
        axes.axhline(0, color="#666666", linewidth=0.8)
        for row in rows:
            if row.kl is None or task not in row.losses:
                continue
            loss = row.losses[task]
            spread = [[100 * (loss.value - loss.low)], [100 * (loss.high - loss.value)]]
            colour = _COLOURS[models.index(row.model)]
            axes.errorbar(
                max(row.kl.value, 1e-4),
                100 * loss.value,
                yerr=spread,
                color=colour,
                marker=_MARKERS[row.kind],
                ms=5,
                mfc=colour if row.kind == "fitted" else "none",
                lw=0.8,
            )
        axes.set(title=METRICS[task][0], xscale="log")
        style_axes(axes)
    for axes in list(grid.flat)[len(tasks) :]:
        axes.set_visible(False)
    figure.supxlabel("KL divergence, nats per token")
    figure.supylabel("difference to the whole model, points")
    kinds = [kind for kind in _MARKERS if any(row.kind == kind and row.kl and row.losses for row in rows)]
    handles = [Line2D([], [], color=_COLOURS[i], lw=4, label=model) for i, model in enumerate(models)]
    handles += [
        Line2D(
            [], [], color="#444444", ls="", marker=_MARKERS[k], mfc=None if k == "fitted" else "none", label=LABELS[k]
        )
        for k in kinds
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def plot_layers(results: Results, path: Path) -> None:
    """Draws the importance of each layer for prefill and, where it was measured, the cost of skipping it alone."""
    from matplotlib.figure import Figure

    importance, costs = layer_costs(results)
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    lines = [(importance, "importance for prefill", _COLOURS[1])]
    if costs is not None:
        lines[0] = (importance / importance.max() * costs.max(), "importance for prefill, scaled", _COLOURS[1])
        lines.append((costs, "KL divergence where the layer is skipped, nats per token", _COLOURS[0]))
    for values, label, colour in lines:
        shown = np.where(values > 0, values, np.nan)  # The last layer costs nothing, and a logarithm has no 0.
        axes.plot(range(len(values)), shown, marker="o", ms=4, lw=1, color=colour, label=label)
    axes.set(xlabel="layer", yscale="log")
    axes.legend(frameon=False, fontsize=8)
    style_axes(axes)
    figure.savefig(path, dpi=150)
