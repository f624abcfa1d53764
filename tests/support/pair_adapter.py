"""Writes low-rank differences of a model in transformers as an adapter of version 1 for the GGUF of the same model.

llama.cpp names, orders and splits some weights differently from transformers; the rotary rows of queries and keys are
one example. llama.cpp's own LoRA converter does to the differences what its model converter did to the weights.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from safetensors.torch import save_file

from pypop_gguf.library import vendor_dir
from tests.support.adapter_v1 import write_pairs
from tests.support.projections import Projection


@dataclass
class Difference:
    """A low-rank difference that a pruned pass adds to a projection: ``y += x A' B'``.

    Attributes:
        projection: The projection.
        a: F32 [rank, n_in].
        b: F32 [n_out, rank], which is zero outside the projection's rows.
    """

    projection: Projection
    a: torch.Tensor
    b: torch.Tensor


def write_adapter(target: Path, model, boundary: int, differences: Sequence[Difference], fingerprint: str) -> None:
    """Writes the differences, each number as float16.

    Args:
        target: File to write.
        model: The model in transformers. Its configuration tells the converter how the weights are laid out.
        boundary: Boundary that the adapter is for.
        differences: Differences of the model's projections.
        fingerprint: Fingerprint of the model's GGUF, from ``library.fingerprint``.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        _save_lora(directory, model, differences)
        reader = gguf.GGUFReader(_convert_lora(directory))
        tensors = {tensor.name: tensor.data for tensor in reader.tensors}
        weights = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
        write_pairs(
            target,
            {weight: (tensors[f"{weight}.lora_a"], tensors[f"{weight}.lora_b"]) for weight in weights},
            architecture=reader.fields["general.architecture"].contents(),
            boundary=boundary,
            fingerprint=fingerprint,
        )


def _save_lora(directory: Path, model, differences: Sequence[Difference]) -> None:
    """Saves the differences as a LoRA in the layout of the PEFT library, beside the model's configuration."""
    model.config.architectures = [type(model).__name__]  # The converter chooses by this name.
    model.config.save_pretrained(directory)
    (directory / "adapter_config.json").write_text('{"lora_alpha": 0}')
    # A fused weight has one difference for its keys and one for its values: their matrices are put side by side.
    halves: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for difference in differences:
        all_a, all_b = halves.setdefault(difference.projection.name, ([], []))
        all_a.append(difference.a)
        all_b.append(difference.b)
    tensors = {}
    for weight, (all_a, all_b) in halves.items():
        tensors[f"base_model.model.{weight}.lora_A.weight"] = torch.cat(all_a).contiguous()
        tensors[f"base_model.model.{weight}.lora_B.weight"] = torch.cat(all_b, dim=1).contiguous()
    save_file(tensors, directory / "adapter_model.safetensors")


def _convert_lora(directory: Path) -> Path:
    """Runs llama.cpp's LoRA converter on ``directory`` and returns the F32 file that it wrote there."""
    target = directory / "adapter.gguf"
    script = vendor_dir() / "llama.cpp" / "convert_lora_to_gguf.py"
    options = ["--base", str(directory), "--outtype", "f32", "--outfile", str(target)]
    done = subprocess.run([sys.executable, str(script), str(directory), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target
