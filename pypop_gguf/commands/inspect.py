"""``pop-gguf inspect``: prints what a GGUF file says about POP, with both importance profiles as bars."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFValueType

from pypop_gguf.boundary_rules import skipped_share
from pypop_gguf.errors import one_line, shell_path
from pypop_gguf.gguf_files.header import GGUFHeader, read_header
from pypop_gguf.gguf_files.metadata import PopMetadata, parse_metadata, trunk_layers

_BAR_WIDTH = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Prints the pop.* metadata of a file. It loads neither the weights nor the native library."
    parser.add_argument("file", type=Path, help="GGUF file; if it is split, the first shard")
    parser.add_argument("--json", action="store_true", help="print the metadata as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints the metadata.

    Raises:
        PopError: The file cannot be read, or its ``pop.*`` keys are not valid.
    """
    reader = read_header(arguments.file)
    metadata = parse_metadata(reader, arguments.file)
    n_layer = trunk_layers(reader)
    if arguments.json:
        print(json.dumps(_as_json(metadata, n_layer), indent=2))
        return 0

    file = one_line(str(arguments.file))
    print(f"file         {file} ({arguments.file.stat().st_size / 1e6:.1f} MB)")
    name, architecture = (
        one_line(_read_text(reader, f"general.{key}") or "unnamed") for key in ("name", "architecture")
    )
    print(f"model        {name} ({architecture}, {_name_file_type(reader)})")
    if metadata is None:
        print(f"layers       {n_layer}")
        command = f"pop-gguf convert {shell_path(arguments.file)}"
        print(f"boundary     none: prompts are read by all layers. `{command}` writes one")
        return 0
    boundary = n_layer if metadata.boundary is None else metadata.boundary
    skipped = n_layer - boundary
    print(f"boundary     layer {boundary} of {n_layer}: prefill skips {skipped} ({skipped / n_layer:.0%})")
    if metadata.calibration_source is not None:
        print(
            f"calibration  {one_line(metadata.calibration_source)}: {metadata.calibration_samples} samples, "
            f"{metadata.calibration_tokens} tokens, seed {metadata.calibration_seed}"
        )
    if metadata.importance_prefill is None:
        print("importance   not estimated")
    else:
        print(
            f"importance   {skipped_share(metadata.importance_prefill, boundary):.1%} of prefill importance is skipped"
        )
        _print_profiles(metadata, boundary)
    return 0


def _print_profiles(metadata: PopMetadata, boundary: int) -> None:
    profiles = [scores for scores in (metadata.importance_prefill, metadata.importance_decode) if scores is not None]
    print(f"\nlayer  {'prefill':<{_BAR_WIDTH + 10}}  decode")
    for il in range(len(profiles[0])):
        if il == boundary:
            print(f"{' boundary: prefill skips from here on ':-^78}")
        cells = [f"{_draw_bar(scores[il], scores):<{_BAR_WIDTH}} {scores[il]:9.3g}" for scores in profiles]
        print(f"{il:5}  " + "  ".join(cells))


def _draw_bar(value: float, scores: np.ndarray) -> str:
    share = float(value) / float(scores.max()) if scores.max() > 0 else 0.0
    eighths = round(share * _BAR_WIDTH * 8)
    blocks = "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")
    try:
        blocks.encode(sys.stdout.encoding or "ascii")
        return blocks
    except UnicodeEncodeError:
        return "#" * round(share * _BAR_WIDTH)


def _as_json(metadata: PopMetadata | None, n_layer: int) -> dict:
    keys = {key: value for key, value, _kind in metadata.key_values()} if metadata else {}
    return {"n_layer": n_layer, **keys}


def _read_text(reader: GGUFHeader, key: str) -> str | None:
    field = reader.get_field(key)
    return (
        field.raw[field.start + 8 :].decode("utf-8", "replace")
        if field and field.types == [GGUFValueType.STRING]
        else None
    )


def _name_file_type(reader: GGUFHeader) -> str:
    field = reader.get_field("general.file_type")
    if field is None:
        return "unknown type"
    try:
        return gguf.LlamaFileType(field.contents()).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return "unknown type"
