"""The figure of ``pop-gguf tune``: quality over the limit of the speed-up."""

from __future__ import annotations

from pathlib import Path

from pypop_gguf.plotting import save_figure, style_axes
from pypop_gguf.quality.score import Quality


def plot_curve(title: str, qualities: list[Quality], limits: dict[int, float], chosen: int, path: Path) -> None:
    """Writes the figure as PNG.

    Raises:
        PopError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    points = sorted(qualities, key=lambda quality: limits[quality.boundary])
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    x = [limits[quality.boundary] for quality in points]
    y = [quality.kl.value for quality in points]
    low = [quality.kl.value - quality.kl.low for quality in points]
    high = [quality.kl.high - quality.kl.value for quality in points]
    axes.errorbar(x, y, yerr=[low, high], color="#0072b2", marker="o", markersize=4, capsize=3)
    for quality in points:
        at = (limits[quality.boundary], quality.kl.value)
        axes.annotate(str(quality.boundary), at, textcoords="offset points", xytext=(-4, 6), ha="right", fontsize=8)
        if quality.boundary == chosen:
            axes.plot(
                *at, color="#d55e00", marker="o", markersize=11, fillstyle="none", label=f"chosen: layer {chosen}"
            )
    axes.set(title=title, xlabel="limit of the speed-up", ylabel="KL divergence to the whole model, nats per token")
    axes.legend(frameon=False)
    style_axes(axes)
    save_figure(figure, path.with_suffix(".png"), dpi=150)
