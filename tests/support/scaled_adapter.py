"""Writes adapters that were not fitted: a model's own weights of keys and values, times a factor."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from pypop_gguf import library
from pypop_gguf.fitting.adapter_file import write_replacements
from pypop_gguf.fitting.engine_fit import further_candidates
from pypop_gguf.fitting.regression import RANK
from pypop_gguf.gguf_files.header import read_header
from pypop_gguf.gguf_files.tensors import list_shards, list_tensors, read_matrices


def write_scaled(
    target: Path, model: Path, boundary: int, factor: float = 1.0, kind: GGMLQuantizationType | None = None
) -> Path:
    """Writes an adapter for all weights of keys and values above the boundary, with the further inputs of a fit.

    Args:
        target: File to write.
        model: The model's file.
        boundary: Boundary that the adapter is for.
        factor: Number that each weight is multiplied by. What further inputs add grows with its distance from 1. With 1
            the adapter changes no more than rounding does.
        kind: As in ``write_replacements``.
    """
    names = [info.name for shard in list_shards(model) for info in list_tensors(read_header(shard))]
    found = {name: re.fullmatch(r"blk\.(\d+)\.attn_[kv]\.weight", name) for name in names}
    weights = read_matrices(model, [name for name, match in found.items() if match and int(match[1]) > boundary])
    below = [name for name in further_candidates(f"blk.{boundary}.attn_v.weight") if name in names]
    widths = {name: matrix.shape[1] for name, matrix in read_matrices(model, below).items()}
    chance = np.random.default_rng(0)

    def draw(n_out: int, n_in: int) -> np.ndarray:
        return chance.standard_normal((n_out, n_in), dtype=np.float32) / np.float32(n_in) ** 0.5

    write_replacements(
        target,
        {name: (factor * weight, np.zeros(len(weight), np.float32)) for name, weight in weights.items()},
        architecture=read_header(model).fields["general.architecture"].contents(),
        boundary=boundary,
        fingerprint=library.fingerprint(model),
        bottlenecks={name: draw(RANK, width) for name, width in widths.items()},
        further={name: (1 - factor) * draw(len(weight), RANK) for name, weight in weights.items()},
        kind=kind,
    )
    return target
