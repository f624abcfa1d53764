"""The figure of ``pop-gguf bench``: speed-up over prompt length, with its limit and the machine's own spread.

It has one panel for each setting and number of sequences, and one line for each boundary and way of the last token.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pypop_gguf.bench.report import Case
from pypop_gguf.bench.runs import Setting
from pypop_gguf.plotting import save_figure, style_axes

_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # Colour-blind readers can tell them apart.


def plot_speedups(summary: dict[Setting, list[Case]], path: Path) -> None:
    """Writes the figure as PNG and, beside it, as SVG.

    Raises:
        PopError: A file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    panels = [
        (setting, n_parallel, [case for case in cases if case.n_parallel == n_parallel])
        for setting, cases in summary.items()
        for n_parallel in sorted({case.n_parallel for case in cases})
    ]
    n_columns = min(2, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure = Figure(figsize=(5.4 * n_columns, 0.9 + 3.4 * n_rows), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    for axes, (setting, n_parallel, cases) in zip(grid, panels):
        _draw_panel(axes, setting, cases)
        sequences = "" if n_parallel == 1 else f", {n_parallel} prompts at once"
        axes.set_title(f"{setting.model}, {setting.threads} threads{sequences}", fontsize=10)
        axes.set_ylabel(f"speed-up over {_name_baseline(setting)}")
        axes.set_xlabel("prompt tokens")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle("Time to first token", fontsize=12)
    figure.legend(*_merge_legends(grid), loc="outside lower center", ncols=n_columns, fontsize=8, frameon=False)
    save_figure(figure, path.with_suffix(".png"), dpi=150)
    # The salt is fixed and there is no date, so the same numbers give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "pop-gguf"}):
        save_figure(figure, path.with_suffix(".svg"), metadata={"Date": None})


def _draw_panel(axes: Any, setting: Setting, cases: list[Case]) -> None:
    spread = {case.n_prompt: case.control for case in cases if case.control}
    if spread:
        band = sorted((float(n_prompt), ratio.low, ratio.high) for n_prompt, ratio in spread.items())
        if len(band) == 1:  # A band needs a width.
            [(n_prompt, low, high)] = band
            band = [(n_prompt * 0.9, low, high), (n_prompt * 1.1, low, high)]
        label = f"{_name_baseline(setting)} against itself"
        axes.fill_between(*zip(*band, strict=True), color="#bbbbbb", alpha=0.6, linewidth=0, label=label)
    axes.axhline(1, color="#666666", linewidth=0.8)
    lines = sorted({(case.boundary, case.way) for case in cases})
    for i, (boundary, way) in enumerate(lines):
        colour = _COLOURS[i % len(_COLOURS)]
        of_boundary = sorted(
            (case for case in cases if (case.boundary, case.way) == (boundary, way)), key=lambda case: case.n_prompt
        )
        # The lines are shifted a little, so that their error bars stay apart.
        shift = 1.03 ** (i - (len(lines) - 1) / 2)
        prompts = [case.n_prompt * shift for case in of_boundary]
        values = [case.speedup.value for case in of_boundary]
        errors = [
            [case.speedup.value - case.speedup.low for case in of_boundary],
            [case.speedup.high - case.speedup.value for case in of_boundary],
        ]
        label = f"{boundary} of {setting.n_layer} layers kept" + (", last token repeated" if way == "repeated" else "")
        axes.errorbar(prompts, values, yerr=errors, color=colour, marker="o", markersize=4, capsize=3, label=label)
        limits = [(case.n_prompt * shift, case.limit) for case in of_boundary if case.limit]
        if limits:
            marker = "_" if len(limits) == 1 else None  # A single point draws no line.
            axes.plot(*zip(*limits, strict=True), color=colour, linestyle="--", linewidth=1, marker=marker)
    if any(case.limit for case in cases):
        axes.plot([], [], color="#444444", linestyle="--", linewidth=1, label="limit (operations left)")
    axes.set_xscale("log", base=2)
    ticks = sorted({case.n_prompt for case in cases})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.margins(x=0.08)
    style_axes(axes, grid="y")


def _merge_legends(panels: Iterable[Any]) -> tuple[list, list[str]]:
    """Returns the handles and labels of all panels, each label once."""
    entries = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    return list(entries.values()), list(entries)


def _name_baseline(setting: Setting) -> str:
    return "stock" if setting.baseline == "stock" else "POP off"
