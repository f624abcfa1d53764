"""Write an adapter file: fitted K/V projections for one model and one boundary, in a GGUF of their own.

This module owns the keys, the tensor layouts and the versions of the file on the Python side. docs/metadata.md defines
them and csrc/pop-adapter.cpp reads them. Version 2 holds whole replaced weights, version 1 low-rank differences laid
out as llama.cpp lays out a LoRA. The value of ``adapter.type`` is one that only this engine takes, so no other engine
applies the file to every pass by mistake. Needs no torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from pypop_gguf.gguf_files.writer import replacing

ADAPTER_TYPE = "pop"
A_SUFFIX = ".lora_a"
B_SUFFIX = ".lora_b"
SHIFT_SUFFIX = ".shift"
_Q8_0_BLOCK = 32  # numbers that share a scale


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
    with _adapter(target, 1, architecture, boundary, fingerprint) as writer:
        for weight, (a, b) in pairs.items():
            writer.add_tensor(weight + A_SUFFIX, np.asarray(a, dtype=np.float16))
            writer.add_tensor(weight + B_SUFFIX, np.asarray(b, dtype=np.float16))


def write_replacements(
    target: Path,
    replacements: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    architecture: str,
    boundary: int,
    fingerprint: str,
) -> None:
    """Write replaced weights to an adapter file of version 2: Q8_0 where rows have whole blocks of 32, else F16.

    Args:
        target: As for :func:`write_pairs`, like the three keyword arguments.
        replacements: For each GGUF weight the weight F32 [n_out, n_in] that a pruned pass uses instead, and the shift
            F32 [n_out] that it adds to the product.
        architecture: The model's ``general.architecture``.
        boundary: The boundary that the weights were fitted for, 1..L.
        fingerprint: The model's fingerprint.

    Raises:
        PopError: The file cannot be written.
    """
    with _adapter(target, 2, architecture, boundary, fingerprint) as writer:
        for name, (weight, shift) in replacements.items():
            if weight.shape[1] % _Q8_0_BLOCK == 0:
                kind = GGMLQuantizationType.Q8_0
                writer.add_tensor(name, quantize(weight, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, weight.astype(np.float16))
            writer.add_tensor(name + SHIFT_SUFFIX, shift.astype(np.float32))


@contextlib.contextmanager
def _adapter(target: Path, version: int, architecture: str, boundary: int, fingerprint: str) -> Iterator[GGUFWriter]:
    with replacing(target) as beside:
        writer = GGUFWriter(beside, architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", ADAPTER_TYPE)
        writer.add_uint32("pop.adapter.version", version)
        writer.add_uint32("pop.boundary", boundary)
        writer.add_string("pop.fingerprint", fingerprint)
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
