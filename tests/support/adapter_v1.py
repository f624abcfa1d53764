"""Writes adapters of version 1, low-rank pairs, which the engine still reads and no command writes any more."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np


def write_pairs(
    target: Path,
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    architecture: str,
    boundary: int,
    fingerprint: str,
) -> None:
    """Writes low-rank differences, each number as float16.

    Args:
        target: File to write.
        pairs: For each weight, such as ``blk.7.attn_v.weight``, the two matrices whose product ``B A`` a pruned pass
            adds to it: A of shape [rank, n_in] and B of shape [n_out, rank].
        architecture: The model's ``general.architecture``.
        boundary: Boundary that the adapter is for.
        fingerprint: The model's fingerprint, from ``library.fingerprint``.
    """
    writer = gguf.GGUFWriter(target, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "pop")
    writer.add_uint32("pop.adapter.version", 1)
    writer.add_uint32("pop.boundary", boundary)
    writer.add_string("pop.fingerprint", fingerprint)
    for weight, (a, b) in pairs.items():
        writer.add_tensor(f"{weight}.lora_a", np.asarray(a, dtype=np.float16))
        writer.add_tensor(f"{weight}.lora_b", np.asarray(b, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
