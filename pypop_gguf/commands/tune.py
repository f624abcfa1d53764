"""``pop-gguf tune``: the curve of quality and speed over the boundary, and the deepest boundary within a budget.

pypop_gguf/quality/score.py measures, pypop_gguf/boundary_rules.py chooses, pypop_gguf/quality/plot.py draws, pypop_gguf/gguf_files/writer.py writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from pypop_gguf import PopLlama, _library
from pypop_gguf.boundary_rules import check_budget, choose_by_curve
from pypop_gguf.commands.eval import Progress, add_model_arguments, fitted, numbers, open_model, percent, report_skipped
from pypop_gguf.errors import PopError
from pypop_gguf.gguf_files.metadata import Curve, PopMetadata, read_metadata
from pypop_gguf.gguf_files.writer import copy_with_metadata
from pypop_gguf.quality import plot as curve_plot
from pypop_gguf.quality import tasks
from pypop_gguf.quality.score import Quality, Tokenizer, score_samples, summarize
from pypop_gguf.terminal import aligned

DESCRIPTION = """\
Measures quality at each boundary, as `pop-gguf eval` does, and the speed-up that the operations left allow; chooses the deepest
boundary within the budget. --outfile writes both into a file's metadata, a copy or the model itself. Needs no torch."""

EPILOG = """\
The budget is kept by the mean over samples, at the chosen boundary and at every one above it. The speed-up is the operations of
the whole graph over those of the pruned one, a prompt of 512 tokens; --measure times this machine, `pop-gguf bench` does it
with care, against stock llama.cpp."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument(
        "--text",
        type=Path,
        required=True,
        metavar="FILE",
        help="texts like those you will use the model on, as for eval",
    )
    budget = parser.add_argument_group("budget (one of)").add_mutually_exclusive_group(required=True)
    budget.add_argument("--max-kl", type=float, metavar="X", help="KL divergence to the whole model, nats a token")
    budget.add_argument(
        "--max-loss-increase", type=float, metavar="P", help="increase of the negative log-likelihood, percent"
    )
    parser.add_argument(
        "--boundary",
        type=numbers,
        metavar="B,B",
        help="boundaries to measure (default: all from a third of the layers on)",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--measure",
        type=int,
        default=0,
        metavar="N",
        help="also time N reads of a prompt of --context tokens at each boundary",
    )
    parser.add_argument(
        "--outfile", type=Path, metavar="FILE.gguf", help="write boundary and curve into it; may be MODEL.gguf itself"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="plot the curve, also as FILE.html with figures under the pointer"
    )
    parser.add_argument("--json", action="store_true", help="print the curve as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measures, chooses, prints, and writes what was asked for.

    Raises:
        PopError: The arguments do not fit the model, the file has nothing to measure on, or a file cannot be written.
    """
    check_budget(arguments.max_kl, arguments.max_loss_increase)
    if arguments.measure < 0:
        raise PopError(f"--measure {arguments.measure} is out of range: give at least 0")
    if arguments.plot:
        curve_plot.check(arguments.plot)
    if arguments.outfile and not arguments.outfile.absolute().parent.is_dir():
        raise PopError(f"{arguments.outfile.parent}: no such directory; make it first, or give another --outfile")
    n_layer = _library.describe_model(arguments.model).n_layer
    llm, boundaries = open_model(arguments, arguments.boundary or list(range(max(1, n_layer // 3), n_layer)))
    task = tasks.of_file(
        Tokenizer(llm),
        arguments.text,
        max_samples=arguments.samples,
        max_tokens=arguments.context,
        seed=arguments.seed,
        run_code=False,
    )
    report_skipped([task])

    scores, measured, interrupted = [], {}, False
    progress = Progress(task.name, len(task.samples))
    try:
        for score in progress.over(score_samples(llm, task.samples, boundaries)):
            scores.append(score)
        progress.end()
        measured = _measured(
            llm, [n_layer, *(boundary for boundary in boundaries if boundary != n_layer)], arguments.measure
        )
    except KeyboardInterrupt:
        interrupted = True
        progress.end()
    if interrupted and not scores:
        raise KeyboardInterrupt
    qualities = summarize(scores)
    speedups = _speedups(arguments.model, [quality.boundary for quality in qualities])
    choice = choose_by_curve(
        n_layer,
        {quality.boundary: (quality.kl.value, quality.loss_increase.value) for quality in qualities},
        max_kl=arguments.max_kl,
        max_loss_increase=arguments.max_loss_increase,
    )
    title = f"{arguments.model.stem} on {arguments.text.name}, {len(scores)} samples"
    if arguments.json:
        print(json.dumps(_as_json(qualities, speedups, measured, choice.boundary), indent=2))
    else:
        print(_table(title, qualities, speedups, measured, choice.boundary, llm))
    if arguments.plot:
        curve_plot.plot(title, qualities, speedups, choice.boundary, arguments.plot)
    if interrupted:
        print(
            f"interrupted after {len(scores)} of {len(task.samples)} samples: no boundary was written", file=sys.stderr
        )
        return 130
    if arguments.outfile:
        _write(arguments, llm, qualities, speedups, choice.boundary)
    return 0


def _speedups(model: Path, boundaries: list[int]) -> dict[int, float]:
    """What the operations left allow, for a prompt of one micro-batch."""
    n_tokens = 512
    sized = PopLlama(str(model), pop=False, n_ctx=n_tokens, n_batch=n_tokens, verbose=False)
    n_layer, context = sized.pop.n_layer, sized.ctx
    whole = _library.graph_flops(context, n_tokens, 1, n_layer, 1)
    last = _library.graph_flops(context, 1, 1, n_layer, 1)

    def speedup(boundary: int) -> float:
        if boundary == n_layer:
            return 1.0
        pruned = _library.graph_flops(context, n_tokens, 1, boundary, 0)
        return whole / (pruned + last * (n_layer - boundary) / n_layer)

    result = {boundary: speedup(boundary) for boundary in boundaries}
    sized.close()
    return result


def _measured(llm: PopLlama, boundaries: list[int], rounds: int) -> dict[int, list[float]]:
    """Time to first token of the whole model over a boundary's: [least, median, most] of ``rounds``, all boundaries in each."""
    tokens = [
        token % llm.n_vocab() for token in range(1000, 1000 + llm.n_ctx() - 1)
    ]  # which tokens they are costs nothing
    ratios = {boundary: [] for boundary in boundaries}
    progress = Progress("timing", rounds * len(boundaries))

    def first_token_ms(boundary: int) -> float:
        llm.reset()
        llm.create_completion(tokens, max_tokens=1, temperature=0, boundary=boundary)
        return llm.timings.time_to_first_token_ms

    for boundary in boundaries if rounds else []:
        first_token_ms(boundary)  # what is done once, like reserving buffers
    for _ in range(rounds):
        times = dict(zip(boundaries, progress.over(map(first_token_ms, boundaries))))
        for boundary in boundaries:
            ratios[boundary].append(times[llm.pop.n_layer] / times[boundary])
    progress.end()
    return {boundary: np.percentile(found, (0, 50, 100)).tolist() for boundary, found in ratios.items() if found}


def _write(
    arguments: argparse.Namespace, llm: PopLlama, qualities: list[Quality], speedups: dict, boundary: int
) -> None:
    kept = [quality for quality in qualities if quality.boundary != llm.pop.n_layer]
    if not kept:
        raise PopError(f"--boundary {llm.pop.n_layer} alone is the whole model: there is no curve to write")
    curve = Curve(
        boundary=[quality.boundary for quality in kept],
        kl=[quality.kl.value for quality in kept],
        loss_increase=[quality.loss_increase.value for quality in kept],
        speedup=[speedups[quality.boundary] for quality in kept],
        samples=kept[0].samples,
        source=arguments.text.name,
    )
    stored = read_metadata(arguments.model) or PopMetadata()
    # the curve holds for the head and the tail that it was measured with
    ends = {"head": llm.pop.head or None, "tail": llm.pop.tail if llm.pop.tail > 1 else None}
    copy_with_metadata(
        arguments.model, arguments.outfile, dataclasses.replace(stored, boundary=boundary, curve=curve, **ends)
    )
    print(f"wrote {arguments.outfile}: boundary {boundary} of {llm.pop.n_layer} and the curve", file=sys.stderr)


def _as_json(
    qualities: list[Quality], speedups: dict[int, float], measured: dict[int, list[float]], chosen: int
) -> dict:
    rows = [
        {
            **dataclasses.asdict(quality),
            "speedup": speedups[quality.boundary],
            "measured_speedup": measured.get(quality.boundary),
        }
        for quality in qualities
    ]
    return {"chosen": chosen, "boundaries": rows}


def _table(title: str, qualities: list[Quality], speedups: dict, measured: dict, chosen: int, llm: PopLlama) -> str:
    timed = ("measured [range]",) if measured else ()
    rows = [("", "boundary", "layers kept", "speed-up", *timed, "KL [95%]", "loss increase [95%]", "same top token")]
    for quality in qualities:
        rows.append(
            (
                "*" if quality.boundary == chosen else "",
                f"{quality.boundary}{fitted(llm, quality.boundary)}",
                f"{quality.boundary / llm.pop.n_layer:.0%}",
                f"{speedups[quality.boundary]:.3f}",
                *("{1:.3f} [{0:.3f}, {2:.3f}]".format(*measured[quality.boundary]) for _ in timed),
                quality.kl,
                percent(quality.loss_increase),
                percent(quality.top1),
            )
        )
    ends = f"head {llm.pop.head}, tail {llm.pop.tail}"
    return "\n".join([title, f"{ends}; per token of the continuation; * is chosen", *aligned(rows)])
