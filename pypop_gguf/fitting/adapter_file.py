"""Write an adapter file: fitted K/V projections for one model and one boundary, in a GGUF of their own.

docs/metadata.md defines the keys and the tensors, and csrc/pop-adapter.cpp reads them. The value of ``adapter.type`` is
one that only this engine takes, so no other engine applies the file to every pass by mistake.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from pypop_gguf.gguf_files.writer import replacing

_VERSION = 2
_Q8_0_BLOCK = 32  # numbers that share a scale


def write_replacements(
    target: Path,
    replacements: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    architecture: str,
    boundary: int,
    fingerprint: str,
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
        kind: The type that the weights are stored in. Default: Q8_0 where rows have whole blocks of 32, else F16.

    Raises:
        PopError: The file cannot be written.
    """
    with replacing(target) as beside:
        writer = GGUFWriter(beside, architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "pop")
        writer.add_uint32("pop.adapter.version", _VERSION)
        writer.add_uint32("pop.boundary", boundary)
        writer.add_string("pop.fingerprint", fingerprint)
        for name, (weight, shift) in replacements.items():
            has_blocks = weight.shape[1] % _Q8_0_BLOCK == 0
            default = GGMLQuantizationType.Q8_0 if has_blocks else GGMLQuantizationType.F16
            stored = default if kind is None else kind
            writer.add_tensor(name, quantize(weight, stored), raw_dtype=stored)
            writer.add_tensor(f"{name}.shift", shift.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
