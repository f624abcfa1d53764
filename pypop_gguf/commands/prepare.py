"""``pop-gguf prepare``: from any GGUF to a POP GGUF with fitted keys and values, without torch.

fitting/engine_fit.py fits, fitting/measure.py measures, boundary_rules.py chooses, gguf_files/writer.py writes.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pypop_gguf import PopLlama, library, native
from pypop_gguf.boundary_rules import check_budget, check_support, choose_by_curve
from pypop_gguf.errors import PopError
from pypop_gguf.fitting.adapter_file import write_replacements
from pypop_gguf.fitting.engine_fit import BoundarySums, collect
from pypop_gguf.fitting.measure import score_answers, write_answers
from pypop_gguf.fitting.texts import read_prompts
from pypop_gguf.gguf_files.metadata import PopMetadata, read_metadata
from pypop_gguf.gguf_files.tensors import list_shards, read_matrices
from pypop_gguf.gguf_files.writer import check_free_space, part_path, replace_together, write_copy, writing
from pypop_gguf.terminal import aligned, available_cores, progress

DESCRIPTION = """\
Makes the prompts of a GGUF model faster to read. The keys and values that the skipped layers leave in the cache are
fitted to those of the whole model, at several boundaries; each is measured on answers that the model itself writes to
other prompts. The lowest boundary within the budget is written, with its adapter beside it."""

EPILOG = """\
An adapter is a file of its own, NAME.pop-bB.gguf, that every pop-gguf command and PopLlama find by its name. It fits
every quantization of the same model. Other engines run OUT.gguf with all layers, as they run MODEL.gguf."""

_CONTEXT = 1024  # tokens of the longest prompt that is read
_ANSWER = 32  # tokens of an answer that is measured on
_HEAD = 1  # The state of the first token is unlike all others: no fit holds for it, so it runs every layer.
_SHARES = (0.8, 0.75, 2 / 3, 0.58, 0.5)  # of the layers kept at the boundaries that are tried


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one boundary costs: KL divergence to the whole model in nats a token, and the share of equal top tokens."""

    boundary: int
    plain_kl: float
    plain_top1: float
    fitted_kl: float
    fitted_top1: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument(
        "--outfile",
        type=Path,
        metavar="OUT.gguf",
        help="file to write; it may be MODEL.gguf itself (default: MODEL-pop.gguf beside it)",
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="prompts of your own to fit and to measure on, as eval reads them (default: bundled prompts)",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--max-kl",
        type=float,
        default=0.02,
        metavar="X",
        help="largest KL divergence to the whole model, in nats a token (default: 0.02)",
    )
    budget.add_argument("--boundary", type=int, metavar="B", help="fit this boundary, whatever it costs")
    parser.add_argument(
        "--samples", type=int, default=24, metavar="N", help="number of prompts to measure on (default: 24)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=available_cores(),
        metavar="N",
        help="number of threads (default: the cores that this process may use)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Fits, measures, chooses and writes.

    Raises:
        PopError: The model cannot be pruned, the texts are too few, no boundary keeps the budget, or a file cannot be
            written. Nothing is left half-written.
    """
    check_budget(arguments.max_kl, None)
    for name in ("samples", "threads"):
        if getattr(arguments, name) < 1:
            raise PopError(f"--{name} {getattr(arguments, name)} is out of range: give at least 1")
    source: Path = arguments.model
    stored = read_metadata(source) or PopMetadata()
    support = library.describe_model(source)
    check_support(source, support)
    boundaries = _choose_boundaries(support.n_layer, support.lossless_boundary, arguments.boundary)
    target = arguments.outfile or source.with_name(f"{source.stem}-pop.gguf")
    if len(list_shards(source)) > 1 and target != source:
        raise PopError(f"{source} is split, and its shards are found by their names: give --outfile {source}")
    with writing(target):
        check_free_space(target.absolute().parent, 2 * source.stat().st_size)
        llm = _open(source, arguments.threads)
        sums, prompts = _fit(llm, arguments.text, boundaries)
        adapters = _write_adapters(llm, source, target, sums)
        measured = _measure(llm, prompts[: arguments.samples], adapters)
        llm.close()
        chosen = _choose(support.n_layer, measured, arguments.boundary, arguments.max_kl)
        print(_format_table(source, measured, chosen, support.n_layer))
        if chosen is None:
            best = min(measured, key=lambda one: one.fitted_kl)
            raise PopError(
                f"no boundary keeps --max-kl {arguments.max_kl:g}: the best is {best.boundary} with "
                f"{best.fitted_kl:.4f}; give a larger --max-kl, or --boundary {best.boundary}"
            )
        metadata = dataclasses.replace(stored, boundary=chosen, head=max(_HEAD, stored.head or 0), curve=None)
        with progress(total=source.stat().st_size, description=f"writing {target.name}", unit="B") as bar:
            write_copy(source, target, metadata, bar.update_to)
        replace_together({target: part_path(target), native.adapter_path(target, chosen): adapters[chosen]})
    print(f"next  pop-gguf chat {target}")
    return 0


def _choose_boundaries(n_layer: int, lossless: int, asked: int | None) -> list[int]:
    """Returns the boundaries to try, the lowest last; one above the lossless boundary has nothing to fit."""
    if asked is not None:
        if not 1 <= asked < lossless:
            raise PopError(f"--boundary {asked} leaves nothing to fit: give 1 to {lossless - 1}")
        return [asked]
    tried = sorted({round(share * n_layer) for share in _SHARES}, reverse=True)
    boundaries = [boundary for boundary in tried if 1 <= boundary < lossless]
    if not boundaries:
        raise PopError(f"a model of {n_layer} layers has no layer to skip: it is fast enough as it is")
    return boundaries


def _open(source: Path, n_threads: int) -> PopLlama:
    return PopLlama(
        str(source),
        pop=False,
        pop_adapter=False,
        pop_head=_HEAD,
        n_ctx=_CONTEXT + _ANSWER,
        n_batch=_CONTEXT + _ANSWER,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        verbose=False,
    )


def _fit(llm: PopLlama, text: Path | None, boundaries: Sequence[int]) -> tuple[list[BoundarySums], list[list[int]]]:
    to_fit, to_measure = read_prompts(llm, text, _CONTEXT)
    n_tokens = sum(map(len, to_fit))
    with progress(total=n_tokens, description="reading prompts to fit on", unit="tokens") as bar:
        return collect(llm, to_fit, boundaries, bar.update_to), to_measure


def _write_adapters(llm: PopLlama, source: Path, target: Path, sums: list[BoundarySums]) -> dict[int, Path]:
    """Solves each boundary and writes its adapter on the way to ``target``. Returns the files by boundary."""
    weights = read_matrices(source, {name for one in sums for name in one.relations})
    architecture = llm.metadata["general.architecture"]
    fingerprint = f"{native.fingerprint(llm.model):016x}"
    adapters = {}
    total = sum(len(one.relations) for one in sums)
    with progress(total=total, description="fitting keys and values", unit="weights") as bar:
        for one in sums:
            replacements = {}
            for name in one.relations:
                fit = one.solve(name, weights[name])
                replacements[name] = fit.weight, fit.shift
                bar.update()
            path = adapters[one.boundary] = part_path(target, f"b{one.boundary}")
            write_replacements(
                path, replacements, architecture=architecture, boundary=one.boundary, fingerprint=fingerprint
            )
    return adapters


def _measure(llm: PopLlama, prompts: list[list[int]], adapters: dict[int, Path]) -> list[Measured]:
    total = len(prompts) * (1 + 2 * len(adapters))
    with progress(total=total, description="measuring on other prompts", unit="answers") as bar:
        answers = write_answers(llm, prompts, _ANSWER, bar.update)
        measured = []
        for boundary, path in adapters.items():
            plain = score_answers(llm, answers, boundary, bar.update)
            native.load_adapter(llm.ctx, llm.model, path)
            fitted = score_answers(llm, answers, boundary, bar.update)
            means = [
                float(np.mean([getattr(score, name) for score in scores]))
                for scores in (plain, fitted)
                for name in ("kl", "top1")
            ]
            measured.append(Measured(boundary, *means))
    return measured


def _choose(n_layer: int, measured: list[Measured], asked: int | None, max_kl: float) -> int | None:
    """Returns the lowest boundary that keeps the budget, or the one that was asked for; None if none keeps it."""
    if asked is not None:
        return asked
    curve = {one.boundary: (one.fitted_kl, 0.0) for one in measured}
    chosen = choose_by_curve(n_layer, curve, max_kl=max_kl).boundary
    return None if chosen == n_layer else chosen


def _format_table(source: Path, measured: list[Measured], chosen: int | None, n_layer: int) -> str:
    rows: list[tuple] = [("", "boundary", "layers skipped", "KL plain", "KL fitted", "same top token")]
    for one in measured:
        rows.append(
            (
                "*" if one.boundary == chosen else "",
                one.boundary,
                f"{1 - one.boundary / n_layer:.0%}",
                f"{one.plain_kl:.4f}",
                f"{one.fitted_kl:.4f}",
                f"{one.plain_top1:.1%} -> {one.fitted_top1:.1%}",
            )
        )
    title = f"{source.stem}: cost of a pruned prompt in nats per token of the model's own answers; * is written"
    return "\n".join([title, *aligned(rows)])
