"""``pop-gguf tune``: measures quality and speed over the boundary, and chooses the lowest boundary within a budget.

pypop_gguf/quality/score.py measures, pypop_gguf/boundary_rules.py chooses, pypop_gguf/quality/plot.py draws, and
pypop_gguf/gguf_files/writer.py writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pypop_gguf import PopLlama, library
from pypop_gguf.boundary_rules import check_budget, choose_by_curve
from pypop_gguf.errors import PopError, one_line
from pypop_gguf.gguf_files.adapters import find_adapters, write_adapter_copies
from pypop_gguf.gguf_files.header import read_header
from pypop_gguf.gguf_files.metadata import Curve, PopMetadata, read_metadata
from pypop_gguf.gguf_files.writer import replace_together, write_copy, writing
from pypop_gguf.plotting import check_plot
from pypop_gguf.quality.model import add_model_arguments, label_boundary, open_model
from pypop_gguf.quality.plot import plot_curve
from pypop_gguf.quality.score import Quality, Score, Tokenizer, score_samples, summarize
from pypop_gguf.quality.tasks import read_task, report_skipped
from pypop_gguf.speedup_limit import N_TOKENS, speedup_limits
from pypop_gguf.terminal import aligned, check_ranges, integer_list, progress

DESCRIPTION = """\
Measures quality at each boundary, as `pop-gguf eval` does, and computes the limit of the speed-up there. Then it
chooses the lowest boundary within the budget. --outfile writes this boundary and the measured curve into the metadata
of a copy, or of the model file itself. A copy also gets copies of the adapters. No torch is needed."""

EPILOG = """\
The chosen boundary and every measured boundary above it keep the budget, as means over the samples. The limit is the
operations of the whole model, divided by those that are left, for a prompt of 512 tokens. --measure times this machine;
`pop-gguf bench` does so with more care, against stock llama.cpp."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", type=Path, metavar="MODEL.gguf", help="model to measure")
    parser.add_argument(
        "--text",
        type=Path,
        required=True,
        metavar="FILE",
        help="texts like those that you will use the model on, in any format that eval reads",
    )
    budget = parser.add_argument_group("budget (one of)").add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--max-kl", type=float, metavar="X", help="largest KL divergence to the whole model, in nats per token"
    )
    budget.add_argument(
        "--max-loss-increase",
        type=float,
        metavar="P",
        help="largest increase of the negative log-likelihood, in percent",
    )
    parser.add_argument(
        "--boundary",
        type=integer_list,
        metavar="B,B",
        help="boundaries to measure (default: all from a third of the layers up)",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--measure",
        type=int,
        default=0,
        metavar="N",
        help="also time a prompt of --context tokens N times at each boundary",
    )
    parser.add_argument(
        "--outfile",
        type=Path,
        metavar="FILE.gguf",
        help="file to write the boundary and the curve into; it may be MODEL.gguf itself, whose adapters stay as they "
        "are",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="file to plot the curve into")
    parser.add_argument("--json", action="store_true", help="print the curve as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measures, chooses, prints, and writes what was asked for.

    Raises:
        PopError: The arguments do not fit the model, the file has nothing to measure on, or a file cannot be written.
    """
    check_budget(arguments.max_kl, arguments.max_loss_increase)
    check_ranges(arguments, measure=0)
    if arguments.plot:
        check_plot(arguments.plot)
    if arguments.outfile and not arguments.outfile.absolute().parent.is_dir():
        raise PopError(f"{arguments.outfile.parent}: no such directory; make it first, or give another --outfile")
    n_layer = library.describe_model(arguments.model).n_layer
    llm, boundaries = open_model(arguments, arguments.boundary or list(range(max(1, n_layer // 3), n_layer)))
    task = read_task(
        Tokenizer(llm),
        arguments.text,
        max_samples=arguments.samples,
        max_tokens=arguments.context,
        seed=arguments.seed,
        run_code=False,
    )
    report_skipped([task])

    scores: list[dict[int, Score]] = []
    measured: dict[int, list[float]] = {}
    interrupted = False
    try:
        with progress(total=len(task.samples), description=task.name, unit="samples") as bar:
            for score in score_samples(llm, task.samples, boundaries):
                scores.append(score)
                bar.update()
        if arguments.measure:
            measured = _measure_speedups(llm, sorted({n_layer, *boundaries}, reverse=True), arguments.measure)
    except KeyboardInterrupt:
        if not scores:
            raise
        interrupted = True
    qualities = summarize(scores)
    limits = _count_limits(arguments.model, [quality.boundary for quality in qualities], llm.pop.tail)
    choice = choose_by_curve(
        n_layer,
        {quality.boundary: (quality.kl.value, quality.loss_increase.value) for quality in qualities},
        max_kl=arguments.max_kl,
        max_loss_increase=arguments.max_loss_increase,
    )
    title = f"{arguments.model.stem} on {arguments.text.name}, {len(scores)} samples"
    if arguments.json:
        print(json.dumps(_as_json(qualities, limits, measured, choice.boundary), indent=2))
    else:
        print(_format_table(title, qualities, limits, measured, choice.boundary, llm))
    if arguments.plot:
        plot_curve(title, qualities, limits, choice.boundary, arguments.plot)
    if interrupted:
        count = f"{len(scores)} of {len(task.samples)} samples"
        print(f"interrupted after {count}: no boundary was written", file=sys.stderr)
        return 130
    if arguments.outfile:
        curve = _make_curve(n_layer, qualities, limits, arguments.text.name)
        _write(arguments.model, arguments.outfile, llm, choice.boundary, curve, _list_adapters(arguments))
    return 0


def _count_limits(model: Path, boundaries: list[int], tail: int) -> dict[int, float]:
    """Returns the limit of the speed-up at each boundary, for a prompt of one micro-batch."""
    tail = min(tail, N_TOKENS)
    sized = PopLlama(str(model), pop=False, pop_tail=tail, n_ctx=N_TOKENS, n_batch=N_TOKENS, verbose=False)
    limits = speedup_limits(sized, boundaries)
    sized.close()
    return limits


def _measure_speedups(llm: PopLlama, boundaries: list[int], rounds: int) -> dict[int, list[float]]:
    """Times the first token at each boundary in each of ``rounds``.

    Returns:
        For each boundary the smallest, the median and the largest speed-up: the whole model's time in a round, divided
        by the boundary's.
    """
    # It does not matter which tokens they are.
    tokens = [token % llm.n_vocab() for token in range(1000, 1000 + llm.n_ctx() - 1)]
    ratios: dict[int, list[float]] = {boundary: [] for boundary in boundaries}

    def first_token_ms(boundary: int) -> float:
        llm.reset()
        llm.create_completion(tokens, max_tokens=1, temperature=0, boundary=boundary)
        assert llm.timings.time_to_first_token_ms is not None  # one token was generated
        return llm.timings.time_to_first_token_ms

    with progress(total=(1 + rounds) * len(boundaries), description="timing", unit="reads") as bar:
        for turn in range(-1, rounds):  # The round before the first is for what is done once, like reserving buffers.
            times = {}
            for boundary in boundaries:
                times[boundary] = first_token_ms(boundary)
                bar.update()
            if turn >= 0:
                for boundary in boundaries:
                    ratios[boundary].append(times[llm.pop.n_layer] / times[boundary])
    return {boundary: np.percentile(found, (0, 50, 100)).tolist() for boundary, found in ratios.items()}


def _make_curve(n_layer: int, qualities: list[Quality], limits: dict[int, float], source: str) -> Curve:
    pruned = [quality for quality in qualities if quality.boundary != n_layer]
    if not pruned:
        raise PopError(f"--boundary {n_layer} alone is the whole model: there is no curve to write")
    return Curve(
        boundary=[quality.boundary for quality in pruned],
        kl=[quality.kl.value for quality in pruned],
        loss_increase=[quality.loss_increase.value for quality in pruned],
        speedup=[limits[quality.boundary] for quality in pruned],
        samples=pruned[0].samples,
        source=source,
    )


def _list_adapters(arguments: argparse.Namespace) -> dict[int, Path]:
    """Returns the adapters that the curve holds with, by boundary: those beside the model unless others were named."""
    if arguments.adapter:  # The engine has read them, so they have this key.
        return {read_header(path).fields["pop.boundary"].contents(): path for path in arguments.adapter}
    return {} if arguments.no_adapter else find_adapters(arguments.model)


def _write(model: Path, target: Path, llm: PopLlama, boundary: int, curve: Curve, adapters: Mapping[int, Path]) -> None:
    metadata = dataclasses.replace(
        read_metadata(model) or PopMetadata(),
        boundary=boundary,
        curve=curve,
        # The curve holds for the head and the tail that it was measured with.
        head=llm.pop.head or None,
        tail=llm.pop.tail if llm.pop.tail > 1 else None,
    )
    with writing(target) as part:
        with progress(total=model.stat().st_size, description=f"writing {target.name}", unit="B", in_log=False) as bar:
            write_copy(model, target, metadata, bar.update_to)
        if target.exists() and target.samefile(model):
            replace_together({target: part})  # The adapters beside the model stay as they are.
        else:
            replace_together({target: part, **write_adapter_copies(adapters, target)}, find_adapters(target).values())
    print(f"wrote {one_line(str(target))}: boundary {boundary} of {llm.pop.n_layer} and the curve", file=sys.stderr)


def _as_json(qualities: list[Quality], limits: dict[int, float], measured: dict[int, list[float]], chosen: int) -> dict:
    rows = [
        {
            **dataclasses.asdict(quality),
            "speedup": limits[quality.boundary],
            "measured_speedup": measured.get(quality.boundary),
        }
        for quality in qualities
    ]
    return {"chosen": chosen, "boundaries": rows}


def _format_table(
    title: str,
    qualities: list[Quality],
    limits: dict[int, float],
    measured: dict[int, list[float]],
    chosen: int,
    llm: PopLlama,
) -> str:
    timed = ("speed-up [range]",) if measured else ()
    rows: list[tuple] = [
        ("", "boundary", "layers kept", "limit", *timed, "KL [95%]", "loss increase [95%]", "same top token")
    ]
    for quality in qualities:
        rows.append(
            (
                "*" if quality.boundary == chosen else "",
                label_boundary(llm, quality.boundary),
                f"{quality.boundary / llm.pop.n_layer:.0%}",
                f"{limits[quality.boundary]:.3f}",
                *("{1:.3f} [{0:.3f}, {2:.3f}]".format(*measured[quality.boundary]) for _ in timed),
                quality.kl,
                f"{quality.loss_increase:.1%}",
                f"{quality.top1:.1%}",
            )
        )
    ends = f"head {llm.pop.head}, tail {llm.pop.tail}"
    return "\n".join([title, f"{ends}; per token of the continuation; * is chosen", *aligned(rows)])
