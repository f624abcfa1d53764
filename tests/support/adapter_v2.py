"""Writes adapters of version 2 that were not fitted: a model's own weights of keys and values, times a factor."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from pypop_gguf import library
from pypop_gguf.fitting.adapter_file import write_replacements
from pypop_gguf.gguf_files.header import read_header
from pypop_gguf.gguf_files.tensors import list_shards, list_tensors, read_matrices


def write_scaled(target: Path, model: Path, boundary: int, factor: float = 1.0) -> Path:
    """Writes an adapter for all weights of keys and values above the boundary.

    Args:
        target: File to write.
        model: The model's file.
        boundary: Boundary that the adapter is for.
        factor: Number that each weight is multiplied by. With 1 the adapter changes no more than rounding does.
    """
    names = [info.name for shard in list_shards(model) for info in list_tensors(read_header(shard))]
    found = {name: re.fullmatch(r"blk\.(\d+)\.attn_[kv]\.weight", name) for name in names}
    weights = read_matrices(model, [name for name, match in found.items() if match and int(match[1]) > boundary])
    replacements = {name: (factor * weight, np.zeros(len(weight), np.float32)) for name, weight in weights.items()}
    architecture = read_header(model).fields["general.architecture"].contents()
    fingerprint = library.fingerprint(model)
    write_replacements(target, replacements, architecture=architecture, boundary=boundary, fingerprint=fingerprint)
    return target
