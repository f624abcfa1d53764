"""Write the differences fitted to a Transformers model as an adapter file for the GGUF of the same model.

llama.cpp names, orders and splits some weights differently from Transformers; the rotary rows of queries and keys are
one example. llama.cpp's own LoRA converter does to the differences what its model converter did to the weights, so the
differences go through it here before ``adapter_file`` writes them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from gguf import GGUFReader
from safetensors.torch import save_file

from pypop_gguf.errors import PopError
from pypop_gguf.fitting import adapter_file
from pypop_gguf.fitting.fit import Difference
from pypop_gguf.library import vendor_dir

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_adapter(
    target: Path, model: PreTrainedModel, boundary: int, differences: Sequence[Difference], fingerprint: str
) -> None:
    """Write the differences to an adapter file, each number as float16.

    Args:
        target: The GGUF file to write, which is replaced as a whole.
        model: The Transformers model; its configuration tells the converter how the weights are laid out.
        boundary: The boundary that the differences were fitted for, 1..L.
        differences: The differences of the model's projections.
        fingerprint: The fingerprint of the model's GGUF file, from ``library.fingerprint``.

    Raises:
        PopError: llama.cpp's converter cannot map the weights, or the file cannot be written.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        _save_lora(directory, model, differences)
        reader = GGUFReader(_convert_lora(directory))
        adapter_file.write_pairs(
            target,
            _read_pairs(reader),
            architecture=reader.fields["general.architecture"].contents(),
            boundary=boundary,
            fingerprint=fingerprint,
        )


def _save_lora(directory: Path, model: PreTrainedModel, differences: Sequence[Difference]) -> None:
    """Save the differences as a LoRA in the layout of the PEFT library, beside the model's configuration."""
    model.config.save_pretrained(directory)
    config = directory / "config.json"
    # The converter chooses by the name of the architecture. The configuration of a model that was read from a GGUF
    # file lacks this name, and holds the file's quantization, which the converter refuses.
    keys = {"architectures": [type(model).__name__], **json.loads(config.read_text())}
    config.write_text(json.dumps({key: value for key, value in keys.items() if key != "quantization_config"}))
    (directory / "adapter_config.json").write_text(json.dumps({"lora_alpha": 0}))

    # A fused weight has one difference for its keys and one for its values: their matrices are put side by side.
    halves: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for difference in differences:
        a, b = _balance(difference)
        all_a, all_b = halves.setdefault(difference.projection.name, ([], []))
        all_a.append(a.detach().cpu())
        all_b.append(b.detach().cpu())
    tensors = {}
    for weight, (all_a, all_b) in halves.items():
        tensors[f"base_model.model.{weight}.lora_A.weight"] = torch.cat(all_a).contiguous()
        tensors[f"base_model.model.{weight}.lora_B.weight"] = torch.cat(all_b, dim=1).contiguous()
    save_file(tensors, directory / "adapter_model.safetensors")


def _balance(difference: Difference) -> tuple[torch.Tensor, torch.Tensor]:
    """Give both matrices of a difference the same scale in each rank, so that float16 holds the numbers of both."""
    ratio = difference.b.norm(dim=0) / difference.a.norm(dim=1).clamp(min=1e-30)
    balance = ratio.clamp(min=1e-30).sqrt()
    return difference.a * balance[:, None], difference.b / balance


def _convert_lora(directory: Path) -> Path:
    """Run llama.cpp's LoRA converter on ``directory`` and return the GGUF file that it wrote there, in float32."""
    target = directory / "adapter.gguf"
    script = vendor_dir() / "llama.cpp" / "convert_lora_to_gguf.py"
    options = ["--base", str(directory), "--outtype", "f32", "--outfile", str(target)]
    done = subprocess.run([sys.executable, str(script), str(directory), *options], capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PopError(f"llama.cpp's LoRA converter cannot write the fitted projections: {last}")
    return target


def _read_pairs(reader: GGUFReader) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return A [rank, n_in] and B [n_out, rank] of each weight of a LoRA file."""
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    weights = [name.removesuffix(adapter_file.A_SUFFIX) for name in tensors if name.endswith(adapter_file.A_SUFFIX)]
    return {
        weight: (tensors[weight + adapter_file.A_SUFFIX], tensors[weight + adapter_file.B_SUFFIX]) for weight in weights
    }
