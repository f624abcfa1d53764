"""Writes golden files with the code of today: ``python -m tools.write_golden [DIRECTORY]``.

The committed files stay as they are, because they show that files of old versions can still be read. A new version of
the keys gets files of its own beside them.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np

from pypop_gguf import library, native
from pypop_gguf.gguf_files.metadata import VERSION, Curve, PopMetadata
from pypop_gguf.gguf_files.writer import copy_with_metadata
from tests.support.adapter_v1 import write_pairs
from tests.support.paths import ROOT

N_LAYER, N_EMBD, N_VOCAB, BOUNDARY = 3, 8, 16, 1
# float32 holds these numbers exactly, so the JSON file has the same ones
METADATA = PopMetadata(
    boundary=BOUNDARY,
    head=1,
    tail=2,
    min_tokens=4,
    importance_prefill=np.array([3.5, 0.25, 0], dtype=np.float32),
    importance_decode=np.array([1, 2, 0.125], dtype=np.float32),
    curve=Curve([2, 1], [0.0, 0.25], [0.0, -0.125], [1.25, 1.5], 40, "held-out.jsonl"),
    calibration_source="märchen.txt",
    calibration_samples=200,
    calibration_tokens=2**32 - 1,
    calibration_seed=7,
    calibration_sha256="ab" * 32,
)


def write_model(path: Path) -> None:
    writer, chance = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_block_count(N_LAYER)
    writer.add_context_length(64)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_EMBD)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(4)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("none")
    shapes = {
        "token_embd.weight": (N_VOCAB, N_EMBD),
        "output_norm.weight": (N_EMBD,),
        "output.weight": (N_VOCAB, N_EMBD),
    }
    for il in range(N_LAYER):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down", "ffn_gate"):
            shapes[f"blk.{il}.{name}.weight"] = (N_EMBD, N_EMBD)
        shapes |= {f"blk.{il}.{name}.weight": (N_EMBD,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        writer.add_tensor(name, chance.normal(size=shape).astype(np.float32))
    close(writer)


def write_adapter(path: Path, fingerprint: str) -> None:
    chance = np.random.default_rng(1)
    pairs = {
        f"blk.{BOUNDARY + 1}.{name}.weight": (chance.normal(size=(1, N_EMBD)), chance.normal(size=(N_EMBD, 1)))
        for name in ("attn_k", "attn_v")
    }
    write_pairs(path, pairs, architecture="llama", boundary=BOUNDARY, fingerprint=fingerprint)


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(directory: Path) -> None:
    model = directory / f"pop-v{VERSION}.gguf"
    write_model(model)
    copy_with_metadata(model, model, METADATA)
    fingerprint = library.fingerprint(model)
    write_adapter(native.adapter_path(model, BOUNDARY), fingerprint)
    expected = {key: value for key, value, _kind in METADATA.key_values()}
    model.with_suffix(".json").write_text(
        json.dumps({"n_layer": N_LAYER, **expected, "fingerprint": fingerprint}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests" / "golden")
