"""Writes random LoRA adapters for a GGUF model. Tests and fuzzers of the server load several of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

_RANK = 4


def write_lora(path: Path, model: Path, seed: int, scale: float = 0.3, invocation: Sequence[int] = ()) -> Path:
    """Writes an adapter of the attention's K and V and of the FFN in every layer, and returns its path.

    Args:
        path: The file to write.
        model: The GGUF model that the adapter is for.
        seed: Another seed gives another adapter.
        scale: Standard deviation of the values in both factors.
        invocation: Tokens that activate the adapter. An adapter with such tokens is what llama.cpp calls an aLoRA.
    """
    random, reader = np.random.default_rng(seed), gguf.GGUFReader(model)
    writer = gguf.GGUFWriter(path, reader.get_field("general.architecture").contents())
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(_RANK))
    if invocation:
        writer.add_key_value(
            "adapter.alora.invocation_tokens", list(invocation), gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32
        )
    for tensor in reader.tensors:
        if tensor.name.split(".")[-2] in ("attn_k", "attn_v", "ffn_up"):
            n_in, n_out = map(int, tensor.shape)
            for factor, shape in (("lora_a", (_RANK, n_in)), ("lora_b", (n_out, _RANK))):
                writer.add_tensor(f"{tensor.name}.{factor}", random.normal(0, scale, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
