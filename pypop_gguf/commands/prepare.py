"""``pop-gguf prepare``: from any GGUF to a POP GGUF with fitted keys and values, without torch unless it trains them.

fitting/steps.py fits and measures, fitting/training.py trains, boundary_rules.py chooses, gguf_files/writer.py writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import TextIO

from pypop_gguf import library, native
from pypop_gguf.boundary_rules import check_budget, check_support, choose_by_curve
from pypop_gguf.errors import PopError, one_line, shell_path
from pypop_gguf.fitting import steps
from pypop_gguf.fitting.texts import FIT_TOKENS, WRITTEN_TOKENS, first_prompts, read_prompts
from pypop_gguf.gguf_files.adapters import find_adapters
from pypop_gguf.gguf_files.metadata import PopMetadata, read_metadata
from pypop_gguf.gguf_files.tensors import list_shards
from pypop_gguf.gguf_files.writer import check_free_space, part_path, replace_together, write_copy, writing
from pypop_gguf.importance.estimate import CalibrationOptions, estimate_importance
from pypop_gguf.memory import peak_bytes
from pypop_gguf.terminal import (
    ALL_LAYERS,
    add_gpu_layers_argument,
    add_kernels_argument,
    available_cores,
    check_ranges,
    choose_kernels,
    progress,
)

DESCRIPTION = """\
Makes the prompts of a GGUF model faster to read. The keys and values that the skipped layers leave in the cache are
fitted to those of the whole model, at several boundaries; each is measured on answers that the model itself writes to
other prompts. The lowest boundary within the budget is written, with its adapter beside it."""

EPILOG = """\
An adapter is a file of its own, NAME.pop-bB.gguf, that every pop-gguf command and PopLlama find by its name. It fits
every quantization of the same model. Other engines run OUT.gguf with all layers, as they run MODEL.gguf."""

MAX_KL = 0.015  # Nats a token: docs/quality.md has the cost at which a task first loses beyond noise.
_LONGEST_TRAINING = 10_000  # minutes
_SHARES = (0.8, 0.75, 2 / 3, 0.58, 0.5)  # of the layers kept at the boundaries that are tried


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
        default=MAX_KL,
        metavar="X",
        help=f"largest KL divergence to the whole model, in nats a token (default: {MAX_KL})",
    )
    budget.add_argument("--boundary", type=int, metavar="B", help="fit this boundary, whatever it costs")
    parser.add_argument(
        "--train",
        type=float,
        metavar="MINUTES",
        help="train an adapter for so long, with torch, on texts that the model writes: that of --boundary, or else "
        "that of the next boundary below the lowest one within the budget, written if it then keeps the budget",
    )
    parser.add_argument(
        "--tail",
        type=int,
        metavar="N",
        help="last tokens of each prompt that run all layers, written as pop.tail; give --text with prompts that are "
        "much longer, or the costs are those of short prompts (default: the file's, or 1)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=steps.SAMPLES,
        metavar="N",
        help=f"number of prompts to measure on (default: {steps.SAMPLES})",
    )
    parser.add_argument(
        "--importance",
        action="store_true",
        help="also write the importance of the layers, which torch estimates if transformers can unpack the weights",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=available_cores(),
        metavar="N",
        help="number of threads (default: the cores that this process may use)",
    )
    add_kernels_argument(parser)
    add_gpu_layers_argument(parser)


def add_prepare_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--prepare`` to another command; see :func:`prepared`."""
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="prepare the model first, as `pop-gguf prepare` does, unless MODEL-pop.gguf is beside it already",
    )


def run(arguments: argparse.Namespace) -> int:
    """Fits, measures, chooses and writes.

    Raises:
        PopError: As :func:`prepare`, or a number is out of range.
    """
    check_budget(arguments.max_kl, None)
    check_ranges(arguments, samples=1, threads=1, tail=(1, steps.CONTEXT))
    if arguments.train is not None and not 0 < arguments.train <= _LONGEST_TRAINING:
        raise PopError(f"--train {arguments.train:g} is out of range: give minutes, up to {_LONGEST_TRAINING}")
    choose_kernels(arguments)
    target = arguments.outfile or default_target(arguments.model)
    prepare(
        arguments.model,
        target,
        text=arguments.text,
        max_kl=arguments.max_kl,
        boundary=arguments.boundary,
        train_minutes=arguments.train,
        tail=arguments.tail,
        n_samples=arguments.samples,
        n_threads=arguments.threads,
        n_gpu_layers=arguments.gpu_layers,
        importance=arguments.importance,
        report=sys.stdout,
    )
    print(f"next  pop-gguf chat {shell_path(target)}")
    return 0


def default_target(source: Path) -> Path:
    """Returns the file that is written where the user names none."""
    return source.with_name(f"{source.stem}-pop.gguf")


def prepared(model: Path, n_threads: int, n_gpu_layers: int = ALL_LAYERS) -> Path:
    """Returns a model's prepared file, for ``--prepare`` of chat and serve. It is made if it is not there yet.

    Args:
        model: A GGUF file. If it is a prepared one, it is returned itself.
        n_threads: Number of threads to make it with.
        n_gpu_layers: Number of layers that a GPU computes, the last ones first.

    Raises:
        PopError: As :func:`prepare`.
    """
    stored = read_metadata(model)
    if stored and stored.boundary in find_adapters(model):
        return model
    target = default_target(model)
    if not target.is_file() or library.fingerprint(target) != library.fingerprint(model):
        prepare(model, target, n_threads=n_threads, n_gpu_layers=n_gpu_layers, report=sys.stderr)
    return target


def prepare(
    source: Path,
    target: Path,
    *,
    text: Path | None = None,
    max_kl: float = MAX_KL,
    boundary: int | None = None,
    train_minutes: float | None = None,
    tail: int | None = None,
    n_samples: int = steps.SAMPLES,
    n_threads: int,
    n_gpu_layers: int,
    importance: bool = False,
    report: TextIO,
) -> None:
    """Writes a copy of a model with the lowest boundary within the budget, and its adapter beside it.

    Args:
        source: The GGUF file.
        target: The file to write, which may be ``source``.
        text: Prompts of the user's own; None for the bundled ones.
        max_kl: Largest KL divergence to the whole model, in nats a token.
        boundary: Fits this boundary, whatever it costs.
        train_minutes: Also trains an adapter for so long, with torch: that of ``boundary``, else that of the next one
            that is tried below the lowest within the budget.
        tail: Last tokens of each prompt that run all layers; None for the number in ``source``, or 1.
        n_samples: Number of prompts to measure on.
        n_threads: Number of threads.
        n_gpu_layers: Number of layers that a GPU computes, the last ones first.
        importance: Also estimates the importance of the layers, with torch.
        report: What is shown goes there, progress aside.

    Raises:
        PopError: The model cannot be pruned, the texts are too few, no boundary keeps the budget, or a file cannot be
            written. Nothing is left half-written.
    """
    started = time.perf_counter()
    stored = read_metadata(source) or PopMetadata()
    support = library.describe_model(source)
    check_support(source, support)
    boundaries = _choose_boundaries(support.n_layer, support.lossless_boundary, boundary)
    training = None if train_minutes is None else _training()
    if len(list_shards(source)) > 1 and target != source:
        raise PopError(
            f"{source} is split, and its shards are found by their names: run pop-gguf prepare {shell_path(source)} "
            f"--outfile {shell_path(source)}"
        )
    if importance:
        stored = estimate_importance(CalibrationOptions(source, texts=text), support.n_layer, stored)
    with writing(target):
        check_free_space(target.absolute().parent, 2 * source.stat().st_size)
        llm = steps.open_whole(source, n_threads, min(tail or stored.tail or 1, steps.CONTEXT), n_gpu_layers)
        prompts, to_measure = read_prompts(llm, text, steps.CONTEXT, WRITTEN_TOKENS)
        adapters = {boundary: part_path(target, f"b{boundary}") for boundary in boundaries}
        errors = steps.fit(llm, source, first_prompts(prompts, FIT_TOKENS), adapters)
        to_measure = to_measure[:n_samples]
        costs = steps.measure(llm, to_measure, adapters) if boundary is None or training is None else []
        chosen = boundary or _choose(support.n_layer, costs, max_kl)
        if training is not None:
            trained = boundary or next((b for b in boundaries if chosen is None or b < chosen), boundaries[-1])
            line = training.train(llm, source, adapters[trained], prompts, train_minutes, n_threads)
            print(f"boundary {trained}: {line}", file=report, flush=True)
            costs = [cost for cost in costs if cost.boundary != trained]
            costs += steps.measure(llm, to_measure, {trained: adapters[trained]})
            costs.sort(key=lambda cost: -cost.boundary)
            chosen = boundary or _choose(support.n_layer, costs, max_kl)
        print(steps.format_costs(llm, costs, chosen), file=report, flush=True)
        llm.close()
        if chosen is None:
            best = min(costs, key=lambda cost: cost.fitted_kl)
            raise PopError(
                f"no boundary costs at most {max_kl:g}: the best is {best.boundary} with {best.fitted_kl:.4f}; run "
                f"pop-gguf prepare {shell_path(source)} with a larger --max-kl, or with --boundary {best.boundary}"
            )
        print(steps.format_errors(errors[chosen]), file=report, flush=True)
        head = max(steps.HEAD, stored.head or 0)
        metadata = dataclasses.replace(stored, boundary=chosen, head=head, tail=tail or stored.tail, curve=None)
        with progress(total=source.stat().st_size, description=f"writing {target.name}", unit="B") as bar:
            write_copy(source, target, metadata, bar.update_to)
        adapter = native.adapter_path(target, chosen)
        replace_together({target: part_path(target), adapter: adapters[chosen]}, find_adapters(target).values())
    peak = peak_bytes()
    sizes = [f"{one_line(str(path))} ({path.stat().st_size / 1e6:.1f} MB)" for path in (target, adapter)]
    print(f"wrote {' and '.join(sizes)}", file=report)
    used = f", peak memory {peak / 1e9:.2f} GB" if peak else ""
    print(f"took  {time.perf_counter() - started:.0f} s{used}", file=report)


def _training() -> ModuleType:
    """Returns the module that trains, which imports torch.

    Raises:
        PopError: torch is not installed.
    """
    try:
        from pypop_gguf.fitting import training
    except ImportError as error:
        raise PopError(f"--train needs torch ({error}); pip install '.[convert]' in the source tree") from error
    return training


def _choose_boundaries(n_layer: int, lossless: int, asked: int | None) -> list[int]:
    """Returns the boundaries to try, the lowest last; one above the lossless boundary has nothing to fit."""
    if asked is not None:
        steps.check_boundary(asked, lossless)
        return [asked]
    tried = sorted({round(share * n_layer) for share in _SHARES}, reverse=True)
    boundaries = [boundary for boundary in tried if 1 <= boundary < lossless]
    if not boundaries:
        raise PopError(f"a model of {n_layer} layers has no layer to skip: it is fast enough as it is")
    return boundaries


def _choose(n_layer: int, costs: list[steps.BoundaryCost], max_kl: float) -> int | None:
    """Returns the lowest boundary that keeps the budget; None if none keeps it."""
    curve = {cost.boundary: (cost.fitted_kl, 0.0) for cost in costs}
    chosen = choose_by_curve(n_layer, curve, max_kl=max_kl).boundary
    return None if chosen == n_layer else chosen
