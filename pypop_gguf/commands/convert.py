"""``pop-gguf convert``: a Hugging Face model or a GGUF becomes a GGUF that says where prefill may stop.

Conversion and quantization are llama.cpp's own; this adds layer importance, the boundary and the ``pop.*`` keys.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

from pypop_gguf import library
from pypop_gguf.boundary_rules import BoundaryChoice, check_rule, choose_boundary
from pypop_gguf.errors import PopError
from pypop_gguf.gguf_files import hf_to_gguf, quantize
from pypop_gguf.gguf_files.header import read_header
from pypop_gguf.gguf_files.metadata import PopMetadata, read_metadata
from pypop_gguf.gguf_files.writer import adapter_path, check_free_space, copy_with_metadata, replacing, scratch

DESCRIPTION = """\
Writes a GGUF with pop.* metadata: where prefill may stop, and the layer importance behind it. A GGUF is copied with its
tensors untouched; of a split GGUF only the first shard is rewritten (the others have to stand beside the result). The
result still loads in any llama.cpp, which then runs it unpruned."""

EPILOG = """\
Importance takes one forward and one backward pass a sample with torch: about the model's size in its --dtype plus the
activations of --calibration-tokens tokens in memory. --boundary with --no-importance needs no torch for a GGUF. --fit-kv keeps
sums in float64 beside the model, 16 n_in (n_in + n_out) bytes for each fitted layer: 5.0 GB for half of an 8B Llama."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="Hugging Face directory, hub id, or GGUF file")
    parser.add_argument(
        "--outfile", type=Path, help="file to write; {ftype} is replaced by the outtype; may be the input GGUF"
    )
    parser.add_argument(
        "--outtype",
        choices=("auto", *quantize.FLOAT_TYPES, *quantize.QUANTIZER_TYPES),
        default="auto",
        help="auto: the highest-fidelity 16-bit type for a Hugging Face model, as it is for a GGUF (default: auto)",
    )
    parser.add_argument("--model-name", help="name of the model, for the file's metadata")
    parser.add_argument(
        "--mmproj", action="store_true", help="also write a vision model's projector, as mmproj-OUTFILE"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with a Hugging Face model (default: refuse)",
    )
    parser.add_argument("--verbose", action="store_true", help="show the converter's log")

    rule = parser.add_argument_group("boundary (one of)").add_mutually_exclusive_group()
    rule.add_argument("--prune-ratio", type=float, metavar="R", help="skip floor(L R) of the L layers (default: 1/3)")
    rule.add_argument("--boundary", metavar="B", help='first layer that prefill skips, 1..L, or "lossless"')
    rule.add_argument(
        "--max-importance-loss",
        type=float,
        metavar="S",
        help="deepest cut whose skipped share of prefill importance is <= S",
    )

    importance = parser.add_argument_group("importance")
    importance.add_argument(
        "--importance",
        action=argparse.BooleanOptionalAction,
        help="estimate it (default: for a Hugging Face model; for a GGUF where --calibration or "
        "--max-importance-loss asks for it, since transformers unpacks quantized weights)",
    )
    importance.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text, or JSONL with text, prompt and response, or messages (default: bundled prompts)",
    )
    importance.add_argument("--calibration-samples", type=int, default=200, metavar="N", help="at most (default: 200)")
    importance.add_argument(
        "--calibration-tokens", type=int, default=512, metavar="N", help="tokens of a sample at most (default: 512)"
    )
    importance.add_argument(
        "--seed", type=int, default=0, help="of the choice of samples and the sampled labels (default: 0)"
    )
    importance.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(default: auto)")
    importance.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights (default: auto, float32 on the CPU)",
    )

    fit = parser.add_argument_group("fitted projections")
    fit.add_argument(
        "--fit-kv",
        action="store_true",
        help="fit what skipped layers write to their caches, as OUTFILE's stem with .pop-bN.gguf; on the calibration texts",
    )
    fit.add_argument("--rank", type=int, default=32, metavar="R", help="of the fitted differences (default: 32)")
    fit.add_argument(
        "--distill-steps",
        type=int,
        default=0,
        metavar="N",
        help="then N steps of gradient descent on the KL to the whole model (default: 0)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Carries out one conversion.

    Raises:
        PopError: Nothing is left at the target then, or what stood there before.
    """
    started = time.perf_counter()
    check_rule(arguments.prune_ratio, arguments.boundary, arguments.max_importance_loss)
    _check_arguments(arguments)
    is_gguf = arguments.model.endswith(".gguf") or Path(arguments.model).is_file()
    n_shard = _count_shards(arguments.model) if is_gguf else 1
    source = (
        Path(arguments.model) if is_gguf else hf_to_gguf.model_directory(arguments.model, arguments.trust_remote_code)
    )
    target = _target(arguments, source, is_gguf)
    if not target.parent.is_dir():
        raise PopError(f"{target.parent}: no such directory; make it first, or give another --outfile")
    shard = f"-00001-of-{n_shard:05}.gguf"  # llama.cpp finds the others by this name
    if n_shard > 1 and arguments.outtype == "auto" and not target.name.endswith(shard):
        raise PopError(
            f"{source} is split: give --outfile, the file itself or another *{shard} beside the other shards"
        )

    with scratch(target.parent) as directory:
        plain = source if is_gguf else directory / "model.gguf"
        if not is_gguf:
            _convert(arguments, source, plain, target.parent)
        support = library.describe_model(plain)
        if support.refusal:
            raise PopError(f"{arguments.model} ({support.architecture}): {support.refusal}")
        if arguments.mmproj:
            _convert_projector(arguments, source, directory / "projector.gguf")
        _choose(arguments, support, None if arguments.max_importance_loss is None else [1.0] * support.n_layer)

        calibration = _Calibration(arguments, source)
        metadata = _importance(arguments, calibration, source, is_gguf, support)
        choice = _choose(arguments, support, metadata.importance_prefill)
        metadata = dataclasses.replace(metadata, boundary=choice.boundary)

        adapter = adapter_path(target, choice.boundary)
        if arguments.fit_kv:
            fits = _fit(arguments, calibration, choice.boundary, plain, directory / "adapter.gguf")
        if arguments.outtype in quantize.QUANTIZER_TYPES and (
            is_gguf or arguments.outtype not in quantize.CONVERTER_TYPES
        ):
            print(f"quantizing to {arguments.outtype}", file=sys.stderr)
            quantize.quantize(plain, directory / "quantized.gguf", arguments.outtype)
            metadata = dataclasses.replace(metadata, curve=None)  # measured on other weights
            plain = directory / "quantized.gguf"
        copy_with_metadata(plain, target, metadata, _bytes_progress)
        if arguments.mmproj:
            with replacing(target.with_name(f"mmproj-{target.name}")) as beside:
                (directory / "projector.gguf").rename(beside)
        if arguments.fit_kv:
            with replacing(adapter) as beside:
                (directory / "adapter.gguf").rename(beside)
    _summary(arguments, target, support, choice, time.perf_counter() - started)
    if arguments.fit_kv:
        _fit_summary(adapter, fits)
    return 0


def _check_arguments(arguments: argparse.Namespace) -> None:
    for name, least in (("calibration_samples", 1), ("calibration_tokens", 8), ("rank", 1), ("distill_steps", 0)):
        if getattr(arguments, name) < least:
            raise PopError(
                f"--{name.replace('_', '-')} {getattr(arguments, name)} is out of range: give at least {least}"
            )
    if arguments.distill_steps and not arguments.fit_kv:
        raise PopError("--distill-steps goes on from fitted projections: give --fit-kv too")
    if not 0 <= arguments.seed < 2**32:
        raise PopError(f"--seed {arguments.seed} is out of range: give 0 to {2**32 - 1}")
    if arguments.importance is False and (
        (arguments.calibration and not arguments.fit_kv) or arguments.max_importance_loss is not None
    ):
        raise PopError(
            "--no-importance leaves nothing for --calibration or --max-importance-loss to do: drop one of them"
        )
    if arguments.calibration and not arguments.calibration.is_file():
        raise PopError(f"{arguments.calibration}: no such calibration file")


def _count_shards(path: str) -> int:
    count = read_header(path).get_field("split.count")  # opening tells a missing or damaged file apart
    return count.contents() if count else 1


def _target(arguments: argparse.Namespace, source: Path, is_gguf: bool) -> Path:
    ftype = "" if arguments.outtype == "auto" else arguments.outtype
    if is_gguf:
        name = f"{source.stem}-{ftype or 'pop'}.gguf"
        directory = source.parent
        if arguments.outtype in quantize.FLOAT_TYPES or arguments.mmproj or arguments.model_name:
            raise PopError(
                "a GGUF keeps its tensors: --outtype takes a quantized type, --mmproj and --model-name a Hugging Face model"
            )
    else:
        name, directory = f"{source.resolve().name}-{ftype or '16bit'}.gguf", source
    target = arguments.outfile or directory / name
    target = Path(str(target).replace("{ftype}", ftype or "auto"))
    return target / name if target.is_dir() else target


def _convert(arguments: argparse.Namespace, source: Path, plain: Path, directory: Path) -> None:
    weights = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    check_free_space(directory, 2 * weights)  # the converter's file and the final one
    outtype = arguments.outtype if arguments.outtype in quantize.CONVERTER_TYPES else "auto"
    options = ["--model-name", arguments.model_name] if arguments.model_name else []
    print(f"converting {source} with llama.cpp's converter", file=sys.stderr)
    hf_to_gguf.convert(source, plain, outtype, options, arguments.verbose, arguments.trust_remote_code)


def _convert_projector(arguments: argparse.Namespace, source: Path, target: Path) -> None:
    outtype = arguments.outtype if arguments.outtype in quantize.CONVERTER_TYPES else "auto"
    try:
        hf_to_gguf.convert(source, target, outtype, ["--mmproj"], arguments.verbose, arguments.trust_remote_code)
    except PopError as error:
        raise PopError(f"no projector, leave out --mmproj: {error}") from error


def _choose(arguments: argparse.Namespace, support: library.ModelSupport, importance) -> BoundaryChoice:
    return choose_boundary(
        support.n_layer,
        support.lossless_boundary,
        prune_ratio=arguments.prune_ratio,
        boundary=arguments.boundary,
        max_importance_loss=arguments.max_importance_loss,
        importance=importance,
    )


class _Calibration:
    """The model in torch and the texts, loaded when first asked for."""

    def __init__(self, arguments: argparse.Namespace, source: Path) -> None:
        self._arguments, self._source, self._loaded = arguments, source, None

    def load(self) -> tuple:
        """Model, samples, and what they were made of."""
        if self._loaded is None:
            from pypop_gguf.importance.calibration import load_samples
            from pypop_gguf.importance.load_model import load_for_importance

            arguments = self._arguments
            model, tokenizer = load_for_importance(
                self._source,
                device=arguments.device,
                dtype=arguments.dtype,
                trust_remote_code=arguments.trust_remote_code,
            )
            samples, info = load_samples(
                tokenizer,
                arguments.calibration,
                max_samples=arguments.calibration_samples,
                max_tokens=arguments.calibration_tokens,
                seed=arguments.seed,
            )
            for note in info.skipped:
                print(f"{info.source}: {note}", file=sys.stderr)
            self._loaded = model, samples, info
        return self._loaded


def _importance(
    arguments: argparse.Namespace,
    calibration: _Calibration,
    source: Path,
    is_gguf: bool,
    support: library.ModelSupport,
) -> PopMetadata:
    stored = _stored(source) if is_gguf else PopMetadata()
    wanted = arguments.max_importance_loss is not None and stored.importance_prefill is None
    asked = arguments.importance or (arguments.calibration and not arguments.fit_kv) or wanted
    if arguments.importance is False or (is_gguf and not asked):
        return stored

    model, samples, info = calibration.load()
    from pypop_gguf.importance.scores import compute_importance  # imports torch, whose absence the loader has told

    scores = compute_importance(model, samples, seed=arguments.seed, progress=_progress("importance", "samples"))
    if len(scores.prefill) != support.n_layer:
        raise PopError(f"torch sees {len(scores.prefill)} layers, llama.cpp {support.n_layer}: use --no-importance")
    return PopMetadata(
        importance_prefill=scores.prefill,
        importance_decode=scores.decode,
        calibration_source=info.source,
        calibration_samples=info.n_samples,
        calibration_tokens=info.n_tokens,
        calibration_seed=info.seed,
        calibration_sha256=info.sha256,
    )


def _fit(arguments: argparse.Namespace, calibration: _Calibration, boundary: int, plain: Path, target: Path) -> list:
    """Fits the projections above the boundary and writes them; returns the differences."""
    model, samples, _ = calibration.load()
    from pypop_gguf.fitting.distill import distill
    from pypop_gguf.fitting.fit import find_projections, fit_values, memory_bytes
    from pypop_gguf.fitting.hf_to_adapter import write_adapter

    needed = memory_bytes(find_projections(model, boundary))
    print(f"fitting needs {needed / 1e9:.2f} GB beside the model", file=sys.stderr)
    fits = fit_values(model, samples, boundary, rank=arguments.rank, progress=_progress("fit", "texts"))
    trained = fits
    if arguments.distill_steps:
        trained = distill(
            model,
            samples,
            boundary,
            fits,
            steps=arguments.distill_steps,
            rank=arguments.rank,
            seed=arguments.seed,
            progress=_progress("distill", "steps"),
        )
    write_adapter(target, model, boundary, trained, library.fingerprint(plain))
    return fits


def _fit_summary(adapter: Path, fits: list) -> None:
    print(f"adapter          {adapter} ({adapter.stat().st_size / 1e6:.2f} MB)")
    for fit in fits:
        print(
            f"  {fit.projection.name}: error on held-out texts {fit.error_before:.3f} -> {fit.error_after:.3f} (lambda {fit.lam:g})"
        )


def _stored(source: Path) -> PopMetadata:
    """What the file has already; keys that make no sense are there to be replaced."""
    try:
        return read_metadata(source) or PopMetadata()
    except PopError:
        return PopMetadata()


def _progress(what: str, of: str):
    started = time.perf_counter()

    def show(done: int, total: int) -> None:
        left = (time.perf_counter() - started) / done * (total - done)
        _show(f"{what} {done}/{total} {of}, {left:.0f} s left", done == total)

    return show


def _bytes_progress(done: int, total: int) -> None:
    _show(f"writing {done / 1e6:.0f}/{total / 1e6:.0f} MB", done == total)


def _show(text: str, last: bool) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\n" if last else "", file=sys.stderr, flush=True)
    elif last:
        print(text, file=sys.stderr)


def _summary(
    arguments: argparse.Namespace, target: Path, support: library.ModelSupport, choice: BoundaryChoice, seconds: float
) -> None:
    skipped = support.n_layer - choice.boundary
    share = "unknown (no importance)" if choice.skipped_share is None else f"{choice.skipped_share:.1%}"
    print(f"file             {target} ({target.stat().st_size / 1e6:.1f} MB)")
    print(f"boundary         layer {choice.boundary} of {support.n_layer}: prefill skips {skipped} ({choice.rule})")
    print(f"importance lost  {share} of prefill importance lies in the skipped layers")
    print(f"took             {seconds:.1f} s{_peak_memory()}")
    print(f"next             pop-gguf inspect {target}")


def _peak_memory() -> str:
    try:
        import resource  # not on Windows
    except ImportError:
        return ""
    scale = 1 if sys.platform == "darwin" else 1024
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * scale
    return f", peak memory {peak / 1e9:.2f} GB"
