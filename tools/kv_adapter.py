"""Writes fitted projections as a small GGUF of their own: the LoRA tensor layout, an ``adapter.type`` that only this engine takes.

llama.cpp's own LoRA converter does what its model converter does to the same weights (the order of rotary rows, for one).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import save_file
from torch import nn

from pypop_gguf.library import vendor_dir
from pypop_gguf.errors import PopError
from pypop_gguf.tools.fit_kv import Difference
from pypop_gguf.tools.gguf_copy import replacing

ADAPTER_TYPE, VERSION = "pop", 1  # csrc/pop-adapter.cpp reads the same


def write_adapter(target: Path, model: nn.Module, boundary: int, differences: Sequence[Difference], fingerprint: str) -> None:
    """Writes the file, in 16 bits a number.

    Args:
        target: GGUF to write, replaced as a whole.
        model: The Transformers model, for its configuration.
        boundary: That the differences were fitted for.
        fingerprint: Of the model, from ``library.fingerprint``.

    Raises:
        PopError: llama.cpp's converter cannot map the weights, or the file cannot be written.
    """
    with tempfile.TemporaryDirectory() as directory:
        model.config.save_pretrained(directory)
        config = Path(directory, "config.json")
        # a model that was read from a GGUF lacks the name that the converter chooses by, and says how it was stored
        keys = {"architectures": [type(model).__name__], **json.loads(config.read_text())}
        config.write_text(json.dumps({key: value for key, value in keys.items() if key != "quantization_config"}))
        halves: dict[str, tuple[list, list]] = {}  # a fused weight has one difference for keys and one for values
        for difference in differences:
            # balanced, so that 16 bits hold both
            balance = (difference.b.norm(dim=0) / difference.a.norm(dim=1).clamp(min=1e-30)).clamp(min=1e-30).sqrt()
            a, b = halves.setdefault(difference.projection.name, ([], []))
            a.append((difference.a * balance[:, None]).detach().cpu())
            b.append((difference.b / balance).detach().cpu())
        tensors = {}
        for name, (a, b) in halves.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.cat(a).contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.cat(b, dim=1).contiguous()
        save_file(tensors, f"{directory}/adapter_model.safetensors")
        Path(directory, "adapter_config.json").write_text(json.dumps({"lora_alpha": 0}))
        plain = Path(directory, "adapter.gguf")
        script = vendor_dir() / "llama.cpp" / "convert_lora_to_gguf.py"
        command = [sys.executable, str(script), directory, "--base", directory, "--outtype", "f32", "--outfile", str(plain)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise PopError(f"llama.cpp's LoRA converter cannot write the fitted projections: {last}")
        with replacing(target) as beside:
            _relabel(GGUFReader(plain), beside, boundary, fingerprint)


def _relabel(reader: GGUFReader, target: Path, boundary: int, fingerprint: str) -> None:
    writer = GGUFWriter(target, reader.get_field("general.architecture").contents())
    writer.add_type("adapter")
    writer.add_string("adapter.type", ADAPTER_TYPE)
    writer.add_uint32("pop.adapter.version", VERSION)
    writer.add_uint32("pop.boundary", boundary)
    writer.add_string("pop.fingerprint", fingerprint)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data.astype("float16"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
