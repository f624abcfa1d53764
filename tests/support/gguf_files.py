"""Writes GGUF files by hand: tiny models of any architecture, and files of keys alone. Reads raw keys and tensors.

A key is a tuple (key, value, type), or (key, value, type, type of the items) for an array.
"""

import struct
from pathlib import Path

import gguf
import numpy as np

UINT32, INT32, FLOAT32, FLOAT64 = (gguf.GGUFValueType[name] for name in ("UINT32", "INT32", "FLOAT32", "FLOAT64"))
BOOL, STRING, ARRAY = (gguf.GGUFValueType[name] for name in ("BOOL", "STRING", "ARRAY"))

N_VOCAB, N_EMBD = 32, 64


def write_keys(path: Path, *keys: tuple, architecture: str = "llama", n_layer: int = 12) -> Path:
    """Writes a file without tensors, which is enough for a reader of keys."""
    return _write(path, architecture, [(f"{architecture}.block_count", n_layer, UINT32), *keys], {})


def write_model(path: Path, *keys: tuple, architecture: str = "llama", n_layer: int = 6, **options) -> Path:
    """Writes a random model without a vocabulary that llama.cpp can load. ``options`` go to ``gguf.GGUFWriter``."""
    is_encoder = architecture == "bert"
    sizes = {"block_count": n_layer, "context_length": 64, "embedding_length": N_EMBD, "feed_forward_length": N_EMBD}
    sizes |= {"attention.head_count": 2, "rope.dimension_count": 32, "vocab_size": N_VOCAB}
    common = [(f"{architecture}.{name}", value, UINT32) for name, value in sizes.items()]
    for kind in ("layer_norm_epsilon", "layer_norm_rms_epsilon"):
        common.append((f"{architecture}.attention.{kind}", 1e-5, FLOAT32))
    common.append(("tokenizer.ggml.model", "none", STRING))
    if is_encoder:
        common += [("bert.attention.causal", False, BOOL), ("tokenizer.ggml.token_type_count", 2, UINT32)]

    shapes = {"token_embd.weight": (N_VOCAB, N_EMBD)}
    if is_encoder:
        shapes |= {"token_types.weight": (2, N_EMBD), "position_embd.weight": (64, N_EMBD)}
        shapes |= {"token_embd_norm.weight": (N_EMBD,), "token_embd_norm.bias": (N_EMBD,)}
    else:
        shapes |= {"output_norm.weight": (N_EMBD,), "output.weight": (N_VOCAB, N_EMBD)}
    norms = ("attn_output_norm", "layer_output_norm") if is_encoder else ("attn_norm", "ffn_norm")
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down") + (
        () if is_encoder else ("ffn_gate",)
    )
    biased = (*norms, *matrices) if is_encoder else ("attn_q", "attn_k", "attn_v") if architecture == "dream" else ()
    for il in range(n_layer):
        shapes |= {f"blk.{il}.{name}.weight": (N_EMBD, N_EMBD) for name in matrices}
        shapes |= {f"blk.{il}.{name}.weight": (N_EMBD,) for name in norms}
        shapes |= {f"blk.{il}.{name}.bias": (N_EMBD,) for name in biased}
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return _write(path, architecture, [*common, *keys], tensors, **options)


def _write(path: Path, architecture: str, keys: list[tuple], tensors: dict[str, np.ndarray], **options) -> Path:
    writer = gguf.GGUFWriter(path, architecture, **options)
    for key in keys:
        if key[0] == "general.alignment":
            writer.add_custom_alignment(key[1])
        else:
            writer.add_key_value(*key)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def copy_model(path: Path, copy: Path, keys: list[tuple], tensors: dict[str, np.ndarray], labels: list[str]) -> Path:
    """Writes a copy of an F32 model with more keys and tensors, and with these classifier labels."""
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    kept = [
        (name, field.contents(), *field.types[:2])
        for name, field in reader.fields.items()
        if not name.startswith(("GGUF.", "general.architecture"))
    ]
    labels_key = (f"{architecture}.classifier.output_labels", labels, ARRAY, STRING)
    own = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    return _write(copy, architecture, [*kept, *keys, labels_key], {**own, **tensors})


def insert_raw_key(path: Path, key: str, kind: int, value: bytes) -> None:
    """Adds a key that ``gguf.GGUFWriter`` refuses to write. The file is little-endian."""
    reader = gguf.GGUFReader(path)
    raw = path.read_bytes()
    last = reader.tensors[-1].field
    end = last.offset + sum(part.nbytes for part in last.parts)
    name = key.encode()
    header = raw[:16] + struct.pack("<QQ", struct.unpack_from("<Q", raw, 16)[0] + 1, len(name)) + name
    header += struct.pack("<I", kind) + value + raw[24:end]
    header += bytes(-len(header) % reader.alignment)
    path.write_bytes(header + raw[reader.data_offset :])


def raw_keys(path: Path) -> dict[str, bytes]:
    """Reads the bytes of each key, type and value, in the order of the file. ``pop.*`` keys are left out."""
    raw, result = path.read_bytes(), {}
    for name, field in gguf.GGUFReader(path).fields.items():
        if not name.startswith(("GGUF.", "pop.")):
            result[name] = raw[field.offset : field.offset + sum(part.nbytes for part in field.parts)]
    return result


def raw_tensors(path: Path) -> dict[str, tuple]:
    """Reads type, shape and bytes of each tensor, in the order of the file."""
    raw = path.read_bytes()
    return {
        tensor.name: (
            tensor.tensor_type,
            tensor.shape.tolist(),
            raw[tensor.data_offset : tensor.data_offset + tensor.n_bytes],
        )
        for tensor in gguf.GGUFReader(path).tensors
    }
