"""``pop-gguf convert``: turns a Hugging Face model or a GGUF into a GGUF with a boundary.

llama.cpp itself converts and quantizes. This adds layer importance (pypop_gguf/importance/estimate.py), the boundary
(pypop_gguf/boundary_rules.py), the ``pop.*`` keys (pypop_gguf/gguf_files/writer.py), and fitted keys and values
(pypop_gguf/fitting/steps.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from pathlib import Path

import numpy as np

from pypop_gguf import library, native
from pypop_gguf.boundary_rules import BoundaryChoice, check_rule, check_support, choose_boundary
from pypop_gguf.errors import PopError, one_line, shell_path
from pypop_gguf.fitting import steps
from pypop_gguf.fitting.texts import read_prompts
from pypop_gguf.gguf_files import hf_to_gguf, quantize
from pypop_gguf.gguf_files.adapters import find_adapters
from pypop_gguf.gguf_files.header import read_header
from pypop_gguf.gguf_files.metadata import PopMetadata, read_metadata
from pypop_gguf.gguf_files.writer import (
    check_free_space,
    part_path,
    replace_together,
    write_copy,
    writing,
)
from pypop_gguf.importance.estimate import CalibrationOptions, estimate_importance
from pypop_gguf.memory import peak_bytes
from pypop_gguf.terminal import available_cores, check_ranges, progress

DESCRIPTION = """\
Writes a GGUF with pop.* metadata: the boundary, which is the first layer that prefill skips, and the importance of the
layers if it was estimated. The tensors of a GGUF are copied unchanged. If a GGUF is split, only its first shard is
rewritten, and the other shards have to stand beside the result. Every other llama.cpp program still loads the result
and runs all of its layers."""

EPILOG = """\
To estimate importance, torch takes one forward and one backward pass for each sample. It needs memory for the model in
its --dtype and for the activations of --calibration-tokens tokens. A GGUF with --boundary and --no-importance needs no
torch, and neither does --fit-kv."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="Hugging Face directory, hub id, or GGUF file")
    parser.add_argument(
        "--outfile", type=Path, help="file to write; {ftype} in its name becomes the outtype; it may be the input GGUF"
    )
    parser.add_argument(
        "--outtype",
        choices=("auto", *quantize.FLOAT_TYPES, *quantize.QUANTIZER_TYPES),
        default="auto",
        help="type of the weights; auto takes the best 16-bit type for a Hugging Face model, and keeps the tensors of "
        "a GGUF unchanged (default: auto)",
    )
    parser.add_argument("--model-name", help="name of the model to write into the file's metadata")
    parser.add_argument(
        "--mmproj", action="store_true", help="also write the projector of a vision model, as mmproj-OUTFILE"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with a Hugging Face model (default: refuse)",
    )
    parser.add_argument("--verbose", action="store_true", help="show the converter's log")

    rule = parser.add_argument_group("boundary (one of)").add_mutually_exclusive_group()
    rule.add_argument(
        "--prune-ratio",
        type=float,
        metavar="R",
        help="share of the layers to skip, rounded down to whole layers (default: 1/3)",
    )
    rule.add_argument("--boundary", metavar="B", help='first layer that prefill skips, 1..L, or "lossless"')
    rule.add_argument(
        "--max-importance-loss",
        type=float,
        metavar="S",
        help="lowest boundary whose skipped layers hold at most the share S of the prefill importance, 0 to 1",
    )

    importance = parser.add_argument_group("importance")
    importance.add_argument(
        "--importance",
        action=argparse.BooleanOptionalAction,
        help="estimate the importance of the layers (default: yes for a Hugging Face model; for a GGUF only if "
        "--calibration or --max-importance-loss needs it, because transformers unpacks quantized weights)",
    )
    importance.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help='calibration texts: plain text, or JSON Lines with "text", "prompt" and "response", or "messages" '
        "(default: the bundled texts)",
    )
    importance.add_argument(
        "--calibration-samples",
        type=int,
        default=CalibrationOptions.max_samples,
        metavar="N",
        help="largest number of samples (default: %(default)s)",
    )
    importance.add_argument(
        "--calibration-tokens",
        type=int,
        default=CalibrationOptions.max_tokens,
        metavar="N",
        help="length of the longest sample in tokens (default: %(default)s)",
    )
    importance.add_argument(
        "--seed", type=int, default=0, help="seed for choosing samples and drawing labels (default: 0)"
    )
    importance.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="device that torch computes on (default: auto)",
    )
    importance.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="type of the weights in torch; auto is float32 on the CPU (default: auto)",
    )

    parser.add_argument(
        "--fit-kv",
        action="store_true",
        help="fit the keys and values of the skipped layers through the engine, as prepare does, to the calibration "
        "texts or to the bundled prompts; the adapter goes beside OUTFILE, with a name that ends in .pop-bN.gguf",
    )


def run(arguments: argparse.Namespace) -> int:
    """Carries out one conversion.

    Raises:
        PopError: The conversion failed. What stood at the target before is still there.
    """
    started = time.perf_counter()
    check_rule(arguments.prune_ratio, arguments.boundary, arguments.max_importance_loss)
    _check_arguments(arguments)
    is_gguf = arguments.model.endswith(".gguf") or Path(arguments.model).is_file()
    n_shards = _count_shards(arguments.model) if is_gguf else 1
    source = (
        Path(arguments.model) if is_gguf else hf_to_gguf.model_directory(arguments.model, arguments.trust_remote_code)
    )
    target = _choose_target(source, is_gguf, arguments.outfile, arguments.outtype)
    if is_gguf and (arguments.outtype in quantize.FLOAT_TYPES or arguments.mmproj or arguments.model_name):
        raise PopError(
            "a GGUF keeps its tensors: --outtype takes a quantized type, --mmproj and --model-name a Hugging Face model"
        )
    if not target.parent.is_dir():
        raise PopError(f"{target.parent}: no such directory; make it first, or give another --outfile")
    if n_shards > 1 and arguments.outtype == "auto":
        _check_shard_name(source, target, n_shards)

    with writing(target) as part:
        plain = source if is_gguf else part_path(target, "16bit")
        convert = functools.partial(
            hf_to_gguf.convert,
            source,
            outtype=arguments.outtype if arguments.outtype in quantize.CONVERTER_TYPES else "auto",
            verbose=arguments.verbose,
            trust_remote_code=arguments.trust_remote_code,
        )
        if not is_gguf:
            _check_weights_fit(source, target.parent)
            print(f"converting {one_line(str(source))} with llama.cpp's converter", file=sys.stderr)
            convert(plain, options=["--model-name", arguments.model_name] if arguments.model_name else [])
        support = library.describe_model(plain)
        check_support(arguments.model, support)
        companions = {}
        if arguments.mmproj:
            projector = companions[target.with_name(f"mmproj-{target.name}")] = part_path(target, "projector")
            try:
                convert(projector, options=["--mmproj"])
            except PopError as error:
                raise PopError(f"this model has no projector: leave out --mmproj ({error})") from error

        choose = functools.partial(
            choose_boundary,
            support.n_layer,
            support.lossless_boundary,
            prune_ratio=arguments.prune_ratio,
            boundary=arguments.boundary,
            max_importance_loss=arguments.max_importance_loss,
        )
        # This refuses a boundary that the model does not have before the work begins.
        first = choose(importance=np.ones(support.n_layer))
        if arguments.fit_kv and arguments.max_importance_loss is None:
            steps.check_boundary(first.boundary, support.lossless_boundary)
        metadata = _read_stored(source) if is_gguf else PopMetadata()
        if _wants_importance(arguments, is_gguf, metadata):
            options = CalibrationOptions(
                source,
                device=arguments.device,
                dtype=arguments.dtype,
                trust_remote_code=arguments.trust_remote_code,
                texts=arguments.calibration,
                max_samples=arguments.calibration_samples,
                max_tokens=arguments.calibration_tokens,
                seed=arguments.seed,
            )
            metadata = estimate_importance(options, support.n_layer, metadata)
        choice = choose(importance=metadata.importance_prefill)
        metadata = dataclasses.replace(metadata, boundary=choice.boundary)

        if arguments.outtype in quantize.QUANTIZER_TYPES and (
            is_gguf or arguments.outtype not in quantize.CONVERTER_TYPES
        ):
            print(f"quantizing to {arguments.outtype}", file=sys.stderr)
            quantized = part_path(target, "quantized")
            quantize.quantize(plain, quantized, arguments.outtype)
            metadata = dataclasses.replace(metadata, curve=None)  # It was measured on other weights.
            plain = quantized
        adapter = native.adapter_path(target, choice.boundary)
        if arguments.fit_kv:
            steps.check_boundary(choice.boundary, support.lossless_boundary)
            companions[adapter] = part_path(target, "adapter")
            _fit(plain, arguments.calibration, choice.boundary, companions[adapter])
            # A stored curve was measured without this adapter.
            metadata = dataclasses.replace(metadata, head=max(steps.HEAD, metadata.head or 0), curve=None)
        with progress(total=plain.stat().st_size, description=f"writing {target.name}", unit="B") as bar:
            write_copy(plain, target, metadata, bar.update_to)
        # The adapters of another model would be refused; those of the same weights still fit.
        stale = [] if target.exists() and target.samefile(source) else find_adapters(target).values()
        replace_together({target: part, **companions}, stale)
    _print_summary(
        target, adapter if arguments.fit_kv else None, support.n_layer, choice, time.perf_counter() - started
    )
    return 0


def _fit(model: Path, texts: Path | None, boundary: int, adapter: Path) -> None:
    """Fits one boundary, writes the adapter and prints what the boundary costs and how well each layer was fitted."""
    llm = steps.open_whole(model, available_cores())
    to_fit, to_measure = read_prompts(llm, texts, steps.CONTEXT)
    errors = steps.fit(llm, model, to_fit, {boundary: adapter})
    costs = steps.measure(llm, to_measure[: steps.SAMPLES], {boundary: adapter})
    print(steps.format_costs(llm, costs, boundary))
    print(steps.format_errors(errors[boundary]), flush=True)
    llm.close()


def _check_arguments(arguments: argparse.Namespace) -> None:
    check_ranges(arguments, calibration_samples=1, calibration_tokens=8, seed=(0, 2**32 - 1))
    if arguments.importance is False and (
        (arguments.calibration and not arguments.fit_kv) or arguments.max_importance_loss is not None
    ):
        raise PopError(
            "--no-importance leaves nothing for --calibration or --max-importance-loss to do: drop one of them"
        )
    if arguments.calibration and not arguments.calibration.is_file():
        raise PopError(f"{arguments.calibration}: no such file; give a file of calibration texts")


def _wants_importance(arguments: argparse.Namespace, is_gguf: bool, stored: PopMetadata) -> bool:
    if arguments.importance is not None:
        return arguments.importance
    if not is_gguf:
        return True
    needs_scores = arguments.max_importance_loss is not None and stored.importance_prefill is None
    return needs_scores or (arguments.calibration is not None and not arguments.fit_kv)


def _count_shards(path: str) -> int:
    count = read_header(path).get_field("split.count")  # Reading the header reports a missing or damaged file.
    return count.contents() if count else 1


def _check_shard_name(source: Path, target: Path, n_shards: int) -> None:
    suffix = f"-00001-of-{n_shards:05}.gguf"  # llama.cpp finds the other shards by this name.
    if not target.name.endswith(suffix):
        raise PopError(
            f"{source} is split: give --outfile, the file itself or another *{suffix} beside the other shards"
        )


def _choose_target(source: Path, is_gguf: bool, outfile: Path | None, outtype: str) -> Path:
    ftype = "" if outtype == "auto" else outtype
    if is_gguf:
        name, directory = f"{source.stem}-{ftype or 'pop'}.gguf", source.parent
    else:
        name, directory = f"{source.resolve().name}-{ftype or '16bit'}.gguf", source
    target = outfile or directory / name
    if not target.exists():  # a file that has this name is meant itself
        target = Path(str(target).replace("{ftype}", ftype or "auto"))
    return target / name if target.is_dir() else target


def _check_weights_fit(source: Path, directory: Path) -> None:
    weights = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    check_free_space(directory, 2 * weights)  # There are two files at a time: the converter's and the final one.


def _read_stored(source: Path) -> PopMetadata:
    """Returns the metadata that the file already has. Invalid keys will be replaced, so they are no error."""
    try:
        return read_metadata(source) or PopMetadata()
    except PopError:
        return PopMetadata()


def _print_summary(target: Path, adapter: Path | None, n_layer: int, choice: BoundaryChoice, seconds: float) -> None:
    skipped = n_layer - choice.boundary
    lost = (
        "unknown, because importance was not estimated"
        if choice.skipped_share is None
        else f"{choice.skipped_share:.1%} of prefill importance lies in the skipped layers"
    )
    peak = peak_bytes(children=True)
    print(f"file             {one_line(str(target))} ({target.stat().st_size / 1e6:.1f} MB)")
    if adapter:
        print(f"adapter          {one_line(str(adapter))} ({adapter.stat().st_size / 1e6:.1f} MB)")
    print(f"boundary         layer {choice.boundary} of {n_layer}: prefill skips {skipped} ({choice.rule})")
    print(f"importance lost  {lost}")
    print(f"took             {seconds:.1f} s" + (f", peak memory {peak / 1e9:.2f} GB" if peak else ""))
    print(f"next             pop-gguf inspect {shell_path(target)}")
