"""A drafter without a cache of its own reads pruned prompts: drafts and answers are those of the whole model.

Gemma 4 has such drafters. They read the last caches of the model, and of its states only that of the last token. All
others run over the whole prompt; tests/engine/test_whole_contexts.py shows what that means.
"""

import dataclasses

import gguf
import numpy as np
import pytest

from pypop_gguf.commands import random_model
from pypop_gguf.gguf_files.geometries import GEOMETRIES, add_tokenizer
from tests.support.server import serve

TARGET = dataclasses.replace(
    GEOMETRIES["gemma-4-e2b"].with_layers(10),
    n_embd=256,
    n_ff=512,
    n_head=4,
    head_dim=64,
    head_dim_window=32,
    n_vocab=512,
    n_ctx_train=4096,
    sliding_window=32,
)
PROMPTS = [
    np.random.default_rng(seed).integers(300, 512, length).tolist() for seed, length in enumerate((33, 150, 700))
]


def write_target(path) -> np.ndarray:
    """Writes a model that often repeats a token, because its layers add little, and sometimes goes on to another.

    Returns its token embedding, F32 [n_vocab, n_embd].
    """
    random_model.write_model(TARGET, "target", path, "f16")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path, "r+").tensors}
    for name, data in tensors.items():
        if name.endswith(("post_attention_norm.weight", "post_ffw_norm.weight", "post_norm.weight")):
            data[:] = 0.3
    return tensors["token_embd.weight"].astype(np.float32)


def write_drafter(path, embedding: np.ndarray) -> None:
    """Writes a drafter of two layers, one of them with a sliding window.

    It sees a token and the model's state through a random projection, and its layers add little, so it repeats
    tokens, too.
    """
    n_embd, backbone = 64, TARGET.n_embd
    writer, rng = gguf.GGUFWriter(path, "gemma4-assistant"), np.random.default_rng(11)
    writer.add_block_count(2)
    writer.add_nextn_predict_layers(2)
    writer.add_context_length(TARGET.n_ctx_train)
    writer.add_embedding_length(n_embd)
    writer.add_embedding_length_out(backbone)
    writer.add_feed_forward_length(128)
    writer.add_head_count(TARGET.n_head)
    writer.add_head_count_kv(TARGET.n_head_kv)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(TARGET.head_dim)
    for add in (writer.add_key_length_swa, writer.add_value_length_swa, writer.add_rope_dimension_count_swa):
        add(TARGET.head_dim_window)
    writer.add_rope_freq_base(TARGET.rope_base)
    writer.add_rope_freq_base_swa(10000.0)
    writer.add_layer_norm_rms_eps(TARGET.rms_eps)
    writer.add_sliding_window(TARGET.sliding_window)
    writer.add_sliding_window_pattern([True, False])
    writer.add_shared_kv_layers(2)
    writer.add_vocab_size(TARGET.n_vocab)
    add_tokenizer(writer, TARGET.n_vocab)

    shapes = {
        "token_embd": (TARGET.n_vocab, n_embd),
        "output_norm": (n_embd,),
        "nextn.pre_projection": (n_embd, 2 * backbone),
        "nextn.post_projection": (backbone, n_embd),
        "rope_freqs": (TARGET.head_dim // 2,),
    }
    for il, head_dim in enumerate((TARGET.head_dim_window, TARGET.head_dim)):
        shapes |= {f"blk.{il}.{name}": (n_embd,) for name in ("attn_norm", "post_attention_norm", "ffn_norm")}
        shapes |= {f"blk.{il}.post_ffw_norm": (n_embd,), f"blk.{il}.attn_q_norm": (head_dim,)}
        shapes |= {f"blk.{il}.layer_output_scale": (1,)}
        shapes |= {f"blk.{il}.attn_q": (TARGET.n_head * head_dim, n_embd)}
        shapes |= {f"blk.{il}.attn_output": (n_embd, TARGET.n_head * head_dim)}
        shapes |= {f"blk.{il}.{name}": (128, n_embd) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{il}.ffn_down": (n_embd, 128)}
    tensors = {
        name: np.full(shape, 0.1 if "post" in name else 1.0) if len(shape) == 1 else rng.normal(0, 0.1, shape)
        for name, shape in shapes.items()
    }
    projection = rng.normal(0, 1 / np.sqrt(backbone), (n_embd, backbone))
    tensors["nextn.pre_projection"] = np.concatenate([projection, projection], axis=1)
    tensors["nextn.post_projection"] = projection.T
    tensors["token_embd"] = embedding @ projection.T
    for name, values in tensors.items():
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("drafter")
    write_drafter(base / "drafter.gguf", write_target(base / "target.gguf"))
    options = ["--threads", 1, "--context", 2048, "--parallel", 2, "--server-options", "--spec-type", "draft-mtp"]
    with serve(base / "target.gguf", base / "log.txt", *options, "--model-draft", base / "drafter.gguf") as server:
        yield server


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_drafts_and_answers_after_a_pruned_prompt_are_those_of_the_whole_model(server, prompt):
    options = dict(n_predict=48, ignore_eos=True, cache_prompt=False, return_tokens=True)
    pruned, whole = (server.complete(prompt, **options, pop=pop) for pop in (True, False))
    assert pruned["timings"]["pruned_n"] == len(prompt) - 1 and whole["timings"]["pruned_n"] == 0
    assert pruned["tokens"] == whole["tokens"]
    assert 0 < pruned["timings"]["draft_n_accepted"] < pruned["timings"]["draft_n"] and len(set(pruned["tokens"])) > 3
    for name in ("draft_n", "draft_n_accepted"):
        assert pruned["timings"][name] == whole["timings"][name]
