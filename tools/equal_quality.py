"""Shows how soon the first token comes at equal quality, from figures that were measured: a table and a plot.

RUNS.csv is from `pop-gguf bench --boundary B,B --csv`, and has one or more models. A model without costs is left out.
COSTS is what `tools.real_quality` has written for each of them, in a file with the model's name, such as
costs/SmolLM2-135M-Instruct.Q4_1.jsonl.

    python -m tools.equal_quality --runs RUNS.csv --costs COSTS --plot kl-over-time.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pypop_gguf.bench.report import Case, summarize
from pypop_gguf.bench.runs import Setting, read_csv
from pypop_gguf.boundary_rules import choose_by_curve
from pypop_gguf.plotting import save_figure, style_axes
from tools.reporting import one_line_errors

BUDGETS = (0.005, 0.02, 0.05)  # nats a token
PLOTTED = 512  # tokens of the prompts in the plot
_STYLES = {"plain": ("o:", "none"), "fitted": ("o-", None)}  # line and fill of the markers


@one_line_errors
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, metavar="RUNS.csv")
    parser.add_argument("--costs", type=Path, required=True, metavar="DIR")
    parser.add_argument("--plot", type=Path, required=True, metavar="FILE.png")
    arguments = parser.parse_args()
    measured = read_measured(arguments.runs, arguments.costs)
    print(format_table(measured))
    plot(measured, arguments.plot)
    return 0


Costs = dict[str, dict[int, float]]  # mean KL divergence of each boundary, "plain" and "fitted"
Measured = dict[Setting, tuple[list[Case], Costs]]


def read_measured(runs: Path, costs: Path) -> Measured:
    """Returns the cases and the costs of each model that has both."""
    return {
        setting: (cases, read_costs(costs / f"{setting.model}.jsonl"))
        for setting, cases in summarize(read_csv(runs)).items()
        if (costs / f"{setting.model}.jsonl").exists()
    }


def read_costs(path: Path) -> Costs:
    """Returns the mean KL divergence over all prompts, plain and fitted, of each boundary."""
    rows = [json.loads(line)["costs"] for line in path.read_text(encoding="utf-8").splitlines()]
    return {
        kind: {int(boundary): float(np.mean([row[boundary][kind]["kl"] for row in rows])) for boundary in rows[0]}
        for kind in _STYLES
    }


def format_table(measured: Measured) -> str:
    """Returns a Markdown table: for each budget the lowest boundary that keeps it, and its speed-ups."""
    prompts = sorted({case.n_prompt for cases, _ in measured.values() for case in cases})
    rows = [["Model", "KL at most", "Keys and values", "Layers skipped", *(f"{n} tokens" for n in prompts)]]
    for setting, (cases, costs) in measured.items():
        for budget in BUDGETS:
            for kind in _STYLES:
                curve = {b: (kl, 0.0) for b, kl in costs[kind].items()}
                chosen = choose_by_curve(setting.n_layer, curve, max_kl=budget).boundary
                boundary = None if chosen == setting.n_layer else chosen
                skipped = "none" if boundary is None else f"{setting.n_layer - boundary} of {setting.n_layer}"
                speedups = [_speedup(cases, boundary, n) for n in prompts]
                rows.append([setting.model, f"{budget:g}", kind, skipped, *speedups])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _speedup(cases: Sequence[Case], boundary: int | None, n_prompt: int) -> str:
    """The speed-up at a boundary, or with all layers."""
    of_prompt = [case for case in cases if (case.n_prompt, case.n_parallel, case.way) == (n_prompt, 1, "continued")]
    found = next((case for case in of_prompt if case.boundary == boundary), None)
    if found is not None:
        return f"{found.speedup.value:.2f} [{found.speedup.low:.2f}, {found.speedup.high:.2f}]"
    off = next((case.off_after for case in of_prompt if boundary is None and case.off_after), None)
    return "N/A" if off is None else f"{off.value:.2f} [{off.low:.2f}, {off.high:.2f}]"


def plot(measured: Measured, path: Path) -> None:
    """Draws the KL divergence over the time to the first token, as a share of stock llama.cpp's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots()
    for number, (setting, (cases, costs)) in enumerate(measured.items()):
        for kind, (style, fill) in _STYLES.items():
            points = [
                (100 * case.pop_ms / case.baseline_ms, costs[kind][case.boundary])
                for case in cases
                if (case.n_prompt, case.n_parallel, case.way) == (PLOTTED, 1, "continued")
                and case.boundary in costs[kind]
            ]
            axes.plot(*zip(*points), style, color=f"C{number}", mfc=fill, ms=4, label=f"{setting.model}, {kind}")
    axes.set(
        xlabel=f"time to the first token of {PLOTTED} prompt tokens, % of stock llama.cpp's",
        ylabel="KL divergence, nats per token",
        yscale="log",
    )
    figure.legend(frameon=False, fontsize=8, ncols=2, loc="outside lower center")
    style_axes(axes)
    save_figure(figure, path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
