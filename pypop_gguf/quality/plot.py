"""The figure of ``pop-gguf tune``: quality over the speed-up that the operations allow, a point a boundary. PNG and a page.

The page is one file with an SVG drawn by this module: it opens offline and shows a point's figures under the pointer.
"""

from __future__ import annotations

import html
import importlib.util
import math
import os
from pathlib import Path

from pypop_gguf.errors import PopError
from pypop_gguf.gguf_files.writer import replacing
from pypop_gguf.quality.score import Quality

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 760, 440, 70, 50, 20, 20


def check(path: Path) -> None:
    """Refuses before anything is measured what could not be drawn afterwards.

    Raises:
        PopError: matplotlib is missing, or the directory is missing or not writable.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise PopError("--plot needs matplotlib: pip install 'pypop-gguf[bench]'")
    if not path.absolute().parent.is_dir():
        raise PopError(f"--plot {path}: no such directory")
    if not os.access(path.absolute().parent, os.W_OK):
        raise PopError(f"--plot {path}: no permission to write there")


def plot(title: str, qualities: list[Quality], speedups: dict[int, float], chosen: int, path: Path) -> None:
    """Writes ``path`` as PNG and, beside it, as HTML.

    Raises:
        PopError: A file cannot be written.
    """
    from matplotlib.figure import Figure

    points = sorted(qualities, key=lambda quality: speedups[quality.boundary])
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    x = [speedups[quality.boundary] for quality in points]
    y = [quality.kl.value for quality in points]
    low = [quality.kl.value - quality.kl.low for quality in points]
    high = [quality.kl.high - quality.kl.value for quality in points]
    axes.errorbar(x, y, yerr=[low, high], color="#0072b2", marker="o", markersize=4, capsize=3)
    for quality in points:
        at = (speedups[quality.boundary], quality.kl.value)
        axes.annotate(str(quality.boundary), at, textcoords="offset points", xytext=(-4, 6), ha="right", fontsize=8)
        if quality.boundary == chosen:
            axes.plot(
                *at, color="#d55e00", marker="o", markersize=11, fillstyle="none", label=f"chosen: layer {chosen}"
            )
    axes.set(
        title=title, xlabel="speed-up that the operations left allow", ylabel="KL to the whole model, nats a token"
    )
    axes.legend(frameon=False)
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path.with_suffix(".png")) as beside:
        figure.savefig(beside, dpi=150, format="png")
    with replacing(path.with_suffix(".html")) as beside:
        beside.write_text(_page(title, points, speedups, chosen), encoding="utf-8")


def _page(title: str, points: list[Quality], speedups: dict[int, float], chosen: int) -> str:
    xs, ys = [speedups[quality.boundary] for quality in points], [quality.kl.value for quality in points]
    x_max, y_max = max(xs) * 1.03, max(max(quality.kl.high for quality in points), 1e-9) * 1.05

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - 1) / (x_max - 1 or 1) * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - y / y_max * (_HEIGHT - _BOTTOM - _TOP),
        )

    parts = []
    for y in _ticks(0, y_max):
        py = at(1, y)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{py:.1f}" x2="{_WIDTH - _RIGHT}" y2="{py:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{py + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    for x in _ticks(1, x_max):
        parts.append(f'<text x="{at(x, 0)[0]:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{x:.3g}</text>')
    parts.append(
        '<polyline class="curve" points="' + " ".join("{:.1f},{:.1f}".format(*at(*xy)) for xy in zip(xs, ys)) + '"/>'
    )
    for quality, x, y in zip(points, xs, ys, strict=True):
        px, py = at(x, y)
        figures = (
            f"layer {quality.boundary}{' (chosen)' if quality.boundary == chosen else ''}\n"
            f"speed-up {x:.3f}\nKL {quality.kl}\nloss increase {quality.loss_increase.value:.2%}\n"
            f"same top token {quality.top1.value:.1%}\n{quality.samples} samples"
        )
        parts.append(f'<text x="{px - 8:.1f}" y="{py - 8:.1f}" text-anchor="end">{quality.boundary}</text>')
        kind = "chosen" if quality.boundary == chosen else "point"
        parts.append(
            f'<circle class="{kind}" cx="{px:.1f}" cy="{py:.1f}" r="6" tabindex="0" data-figures="{html.escape(figures)}"/>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">speed-up that the operations left allow</text>'
    )
    parts.append(
        f'<text transform="translate(16 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">KL to the whole model, nats a token</text>'
    )
    return _TEMPLATE.format(title=html.escape(title), width=_WIDTH, height=_HEIGHT, parts="\n".join(parts))


def _ticks(low: float, high: float) -> list[float]:
    """From low on in round steps, six at most."""
    power = 10 ** math.floor(math.log10((high - low) / 5 or 1e-9))
    step = next(power * m for m in (1, 2, 5, 10) if (high - low) / (power * m) <= 6)
    return [low + i * step for i in range(int((high - low) / step) + 1)]


_TEMPLATE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px system-ui, sans-serif; max-width: {width}px; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }}
svg {{ width: 100%; height: auto; font-size: 13px }}
.grid {{ stroke: #e5e5e5 }}
.curve {{ fill: none; stroke: #0072b2; stroke-width: 2 }}
.point {{ fill: #0072b2 }}
.chosen {{ fill: #d55e00 }}
circle:hover, circle:focus {{ r: 9; outline: none }}
pre {{ min-height: 7em; margin: 0; font: inherit }}
</style>
<h1 style="font-size: 1.2em">{title}</h1>
<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}">
{parts}
</svg>
<pre id="figures">Numbers are boundaries, orange the chosen one. Point at one for its figures.</pre>
<script>
for (const point of document.querySelectorAll("circle"))
  for (const event of ["mouseenter", "focus"])
    point.addEventListener(event, () => document.getElementById("figures").textContent = point.dataset.figures);
</script>
</html>
"""
