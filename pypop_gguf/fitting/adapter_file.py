"""Write an adapter file: fitted K/V projections for one model and one boundary, in a GGUF of their own.

docs/metadata.md defines the keys and the tensors, and csrc/pop-adapter.cpp reads them. The value of ``adapter.type`` is
one that only this engine takes, so no other engine applies the file to every pass by mistake.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from pypop_gguf.gguf_files.writer import replacing

_VERSION, _VERSION_FURTHER = 2, 3
_Q8_0_BLOCK = 32  # numbers that share a scale


def write_replacements(
    target: Path,
    replacements: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    architecture: str,
    boundary: int,
    fingerprint: str,
    bottlenecks: Mapping[str, np.ndarray] | None = None,
    further: Mapping[str, np.ndarray] | None = None,
    kind: GGMLQuantizationType | None = None,
) -> None:
    """Write replaced weights to an adapter file.

    Args:
        target: The GGUF file to write. An existing file is replaced as a whole, or left as it is if writing fails.
        replacements: For each GGUF weight, such as ``blk.7.attn_v.weight``, the weight F32 [n_out, n_in] that a pruned
            pass uses instead, and the shift F32 [n_out] that it adds to the product. The engine takes only weights of
            layers above the boundary.
        architecture: The model's ``general.architecture``.
        boundary: The boundary that the weights were fitted for, 1..L.
        fingerprint: The model's fingerprint, 16 hexadecimal digits, from ``library.fingerprint``.
        bottlenecks: The further inputs: for each GGUF weight of a layer below the boundary, F32 [rank, n_in], by which
            what the product of that weight reads is multiplied.
        further: For each replaced weight that has further inputs, F32 [n_out, rank], by which the sum of these is
            multiplied. The result is added to the product.
        kind: The type that the weights are stored in. Default: Q8_0 where rows have whole blocks of 32, else F16.

    Raises:
        PopError: The file cannot be written.
    """
    bottlenecks, further = bottlenecks or {}, further or {}

    def add_matrix(name: str, matrix: np.ndarray) -> None:
        default = GGMLQuantizationType.Q8_0 if matrix.shape[1] % _Q8_0_BLOCK == 0 else GGMLQuantizationType.F16
        stored = default if kind is None else kind
        writer.add_tensor(name, quantize(matrix, stored), raw_dtype=stored)

    with replacing(target) as beside, contextlib.closing(GGUFWriter(beside, architecture)) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "pop")
        writer.add_uint32("pop.adapter.version", _VERSION_FURTHER if further or bottlenecks else _VERSION)
        writer.add_uint32("pop.boundary", boundary)
        writer.add_string("pop.fingerprint", fingerprint)
        for name, matrix in bottlenecks.items():
            add_matrix(f"{name}.bottleneck", matrix)
        for name, (weight, shift) in replacements.items():
            add_matrix(name, weight)
            writer.add_tensor(f"{name}.shift", shift.astype(np.float32))
        for name, matrix in further.items():
            add_matrix(f"{name}.further", matrix)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
