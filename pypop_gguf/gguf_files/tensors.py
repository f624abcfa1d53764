"""Reads tensors of a GGUF file: their names, shapes and types, and their values as float32 whatever the type is."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from pypop_gguf.errors import PopError
from pypop_gguf.gguf_files.header import GGUFHeader, read_header


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
        name: Its name, such as ``blk.7.attn_v.weight``.
        shape: Its dimensions in ggml's order: the first one is contiguous.
        type_number: Its ggml type.
        offset: Where it starts, in bytes from ``GGUFHeader.data_offset``.
    """

    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int


def list_shards(path: str | os.PathLike) -> list[Path]:
    """The files of a model: the file itself, or all shards of a split one whose first shard is given."""
    split = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", os.fspath(path), re.DOTALL)
    if not split:
        return [Path(path)]
    return [Path(f"{split[1]}-{shard:05}-of-{split[2]}.gguf") for shard in range(1, int(split[2]) + 1)]


def list_tensors(header: GGUFHeader) -> Iterator[TensorInfo]:
    """The tensors of one file, in its order."""
    infos, at, order = header.tensor_infos, 0, header.order
    for _ in range(header.n_tensors):
        (length,) = struct.unpack_from(f"{order}Q", infos, at)
        name = infos[at + 8 : at + 8 + length].decode("utf-8", "replace")
        at += 8 + length
        (n_dims,) = struct.unpack_from(f"{order}I", infos, at)
        shape = struct.unpack_from(f"{order}{n_dims}Q", infos, at + 4)
        at += 4 + 8 * n_dims
        type_number, offset = struct.unpack_from(f"{order}IQ", infos, at)
        at += 12
        yield TensorInfo(name, shape, type_number, offset)


def read_matrices(path: str | os.PathLike, names: Collection[str]) -> dict[str, np.ndarray]:
    """Reads some weights of a model as float32 matrices.

    Args:
        path: The file; of a split one, the first shard.
        names: The tensors to read.

    Returns:
        Name -> F32 [n_out, n_in].

    Raises:
        PopError: A file cannot be read, lacks a tensor, or has one of a type that cannot be made float32.
    """
    found: dict[str, np.ndarray] = {}
    for shard in list_shards(path):
        header = read_header(shard)
        for info in list_tensors(header):
            if info.name in names:
                found[info.name] = _read_matrix(shard, header, info)
    if missing := sorted(set(names) - set(found)):
        raise PopError(f"{path}: it has no tensor {missing[0]}")
    return found


def _read_matrix(path: Path, header: GGUFHeader, info: TensorInfo) -> np.ndarray:
    try:
        kind = GGMLQuantizationType(info.type_number)
    except ValueError:
        raise PopError(f"{path}: {info.name} has type {info.type_number}, which cannot be fitted") from None
    n_in, n_rows = info.shape[0], int(np.prod(info.shape[1:], dtype=np.int64))
    block, block_bytes = GGML_QUANT_SIZES[kind]
    row_bytes = n_in // block * block_bytes
    data = np.fromfile(path, np.uint8, n_rows * row_bytes, offset=header.data_offset + info.offset)
    try:
        return dequantize(data.reshape(n_rows, row_bytes), kind).astype(np.float32, copy=False).reshape(n_rows, n_in)
    except NotImplementedError:
        raise PopError(f"{path}: {info.name} has type {kind.name.lower()}, which cannot be fitted") from None
