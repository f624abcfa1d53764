"""``pop-gguf random-model``: writes a GGUF with the geometry of a known model and random weights, to measure speed on.

The speed of a model depends on its shapes and types, not on what it has learned, so a benchmark needs no download. The
text that such a model writes means nothing. The weights come from a small pool of random blocks, and each tensor starts
to read it at another place, so a file of 8B weights is written at the speed of the disk and in little memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, LlamaFileType

from pypop_gguf.errors import one_line
from pypop_gguf.gguf_files.geometries import GEOMETRIES, Geometry, add_keys, list_tensors
from pypop_gguf.gguf_files.metadata import MAX_LAYERS
from pypop_gguf.gguf_files.writer import check_free_space, replacing
from pypop_gguf.terminal import check_ranges

DESCRIPTION = """\
Writes a GGUF with the geometry of a known model and random weights, which serves to measure speed and
memory. Its tokenizer has a token for each number and each byte: "17 4 4096" is three tokens."""

_WEIGHT_STD = 0.02  # It keeps the activations of every geometry here far from the limits of F16.
_WRITE_BYTES = 16 << 20
_NEVER_QUANTIZED = ("altup", "laurel", "per_layer_model_proj")

_FILE_TYPES = {
    "q4_k_m": (LlamaFileType.MOSTLY_Q4_K_M, Type.Q4_K),
    "q8_0": (LlamaFileType.MOSTLY_Q8_0, Type.Q8_0),
    "q4_0": (LlamaFileType.MOSTLY_Q4_0, Type.Q4_0),
    "f16": (LlamaFileType.MOSTLY_F16, Type.F16),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("geometry", choices=GEOMETRIES, help="one of " + ", ".join(GEOMETRIES), metavar="GEOMETRY")
    parser.add_argument("outfile", type=Path, metavar="OUT.gguf", help="file to write")
    parser.add_argument(
        "--outtype", choices=_FILE_TYPES, default="q4_k_m", help="type of the weights (default: q4_k_m)"
    )
    parser.add_argument(
        "--layers",
        type=int,
        metavar="N",
        help="number of layers (default: that of the geometry); about the same share of them shares caches",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for drawing the weights (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Writes one model.

    Raises:
        PopError: A number is out of range, or the file cannot be written.
    """
    geometry = GEOMETRIES[arguments.geometry]
    check_ranges(arguments, layers=(1, MAX_LAYERS), seed=0)
    if arguments.layers is not None:
        geometry = geometry.with_layers(arguments.layers)
    write_model(geometry, f"{arguments.geometry} random", arguments.outfile, arguments.outtype, arguments.seed)
    size = arguments.outfile.stat().st_size
    model = f"{arguments.geometry}, {geometry.n_layer} layers, {arguments.outtype}"
    print(f"{one_line(str(arguments.outfile))}: {model}, {size / 1e6:.1f} MB")
    return 0


def write_model(geometry: Geometry, name: str, target: Path, outtype: str, seed: int = 0) -> None:
    """Writes a random model.

    Args:
        geometry: Shape of the model.
        name: ``general.name``.
        target: File to write; it is replaced as a whole.
        outtype: q4_k_m, q8_0, q4_0 or f16, with llama.cpp's own mixture of tensor types.
        seed: Seed of the weights.

    Raises:
        PopError: The file does not fit or cannot be written.
    """
    file_type, _ = _FILE_TYPES[outtype]
    tensors = [
        (tensor, shape, _choose_type(tensor, len(shape), geometry, outtype)) for tensor, shape in list_tensors(geometry)
    ]
    sizes = [_count_bytes(shape, kind) for _, shape, kind in tensors]
    pools = {kind: _make_pool(kind, np.random.default_rng([seed, kind])) for kind in {kind for *_, kind in tensors}}
    places = np.random.default_rng(seed)

    with replacing(target) as part:
        check_free_space(target.absolute().parent, sum(sizes))
        writer = GGUFWriter(part, geometry.architecture)
        writer.add_name(name)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_keys(writer, geometry)
        for (tensor, shape, kind), n_bytes in zip(tensors, sizes, strict=True):
            writer.add_tensor_info(tensor, shape, np.dtype(np.float32), n_bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None  # The header is written.
        try:
            # GGUFWriter.write_tensor_data() takes a whole tensor, and the largest tensors here have 2 GB.
            file = writer.fout[0]
            for (_, _, kind), n_bytes in zip(tensors, sizes, strict=True):
                writer.write_padding(file, file.tell())
                _write_repeated(file.write, pools[kind], n_bytes, int(places.integers(len(pools[kind]))))
            writer.write_padding(file, file.tell())
        finally:
            writer.close()


def _choose_type(name: str, n_dims: int, geometry: Geometry, outtype: str) -> Type:
    """Returns the type that llama-quantize gives this tensor."""
    if n_dims == 1 or "_coef." in name:
        return Type.F32
    if any(part in name for part in _NEVER_QUANTIZED):
        return Type.F16
    kind = _FILE_TYPES[outtype][1]
    if kind in (Type.F16, Type.Q8_0):
        return kind
    if name == "output.weight" or (geometry.tied and name.endswith("token_embd.weight")):
        return Type.Q6_K
    if outtype == "q4_k_m" and name.endswith(("attn_v.weight", "ffn_down.weight")):
        il, n_layer = int(name.split(".")[1]), geometry.n_layer
        if il < n_layer // 8 or il >= 7 * n_layer // 8 or (il - n_layer // 8) % 3 == 2:
            return Type.Q6_K
    return kind


def _count_bytes(shape: tuple[int, ...], kind: Type) -> int:
    block_weights, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block_weights * block_bytes


def _write_repeated(write: Callable[[memoryview], int], pool: np.ndarray, n_bytes: int, first_block: int) -> None:
    """Writes ``n_bytes`` of a pool, uint8 [blocks, bytes of a block], from a block on, and from the start again."""
    ring = pool.reshape(-1).data
    start = first_block * pool.shape[1]
    while n_bytes:
        part = ring[start : start + min(n_bytes, _WRITE_BYTES)]
        write(part)
        n_bytes -= len(part)
        start = (start + len(part)) % len(ring)


def _make_pool(kind: Type, random: np.random.Generator) -> np.ndarray:
    """Makes random blocks of a type, uint8 [blocks, bytes of a block].

    Their number is prime, so that no two rows of a tensor start at the same place.
    """
    if kind == Type.F32:  # Norms, scales and the small matrices of AltUp have this type.
        return np.ones((1 << 14, 1), dtype="<f4").view(np.uint8)
    if kind == Type.F16:
        values = random.standard_normal((4194301, 1), dtype=np.float32) * _WEIGHT_STD
        return values.astype("<f2").view(np.uint8)
    blocks = random.integers(0, 256, (65521, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    # The F16 scale of a block follows from the spread of its random quants, so that the weights have _WEIGHT_STD.
    if kind == Type.Q4_0:  # d, 32 quants of 4 bits less 8
        blocks[:, 0:2] = _pack_scale(4.61)
    elif kind == Type.Q8_0:  # d, 32 signed bytes
        blocks[:, 0:2] = _pack_scale(73.9)
    elif kind == Type.Q4_K:  # d, dmin, 8 scales and 8 minima of 6 bits, 256 quants of 4 bits: d s q - dmin m
        blocks[:, 0:2] = _pack_scale(257.0)
        blocks[:, 2:4] = _pack_scale(257.0 / 7.5)  # the middle quant is 7.5, so that the mean is 0
    elif kind == Type.Q6_K:  # 256 quants of 6 bits less 32, 16 signed scales of 8 bits, d
        blocks[:, 192:208] = random.integers(16, 64, (len(blocks), 16), dtype=np.uint8)
        blocks[:, 208:210] = _pack_scale(18.5 * 41.9)
    return blocks


def _pack_scale(quants_std: float) -> np.ndarray:
    return np.array([_WEIGHT_STD / quants_std], dtype="<f2").view(np.uint8)
