"""Write an adapter file: fitted K/V projections for one model and one boundary, in a small GGUF of their own.

This module owns the keys, the tensor layout and the version of the file on the Python side. docs/metadata.md defines
them and csrc/pop-adapter.cpp reads them. The tensors are laid out as llama.cpp lays out a LoRA, but the value of
``adapter.type`` is one that only this engine takes, so no other engine applies the file to every pass by mistake.
Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from pypop_gguf.gguf_files.writer import replacing

ADAPTER_TYPE = "pop"
VERSION = 1
A_SUFFIX = ".lora_a"
B_SUFFIX = ".lora_b"


def write_pairs(
    target: Path,
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    architecture: str,
    boundary: int,
    fingerprint: str,
) -> None:
    """Write low-rank differences to an adapter file, each number as float16.

    Args:
        target: The GGUF file to write. An existing file is replaced as a whole, or left as it is if writing fails.
        pairs: For each GGUF weight, such as ``blk.7.attn_v.weight``, the two matrices whose product ``B A`` a pruned
            pass adds to the weight: A of shape [rank, n_in] and B of shape [n_out, rank]. The engine takes only
            weights of layers above the boundary.
        architecture: The model's ``general.architecture``.
        boundary: The boundary that the differences were fitted for, 1..L.
        fingerprint: The model's fingerprint, 16 hexadecimal digits, from ``library.fingerprint``.

    Raises:
        PopError: The file cannot be written.
    """
    with replacing(target) as beside:
        writer = GGUFWriter(beside, architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", ADAPTER_TYPE)
        writer.add_uint32("pop.adapter.version", VERSION)
        writer.add_uint32("pop.boundary", boundary)
        writer.add_string("pop.fingerprint", fingerprint)
        for weight, (a, b) in pairs.items():
            writer.add_tensor(weight + A_SUFFIX, np.asarray(a, dtype=np.float16))
            writer.add_tensor(weight + B_SUFFIX, np.asarray(b, dtype=np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
