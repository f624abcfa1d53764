"""Makes tiny random models of several architectures, in transformers and as F32 GGUFs by llama.cpp's own converter."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.support.paths import BUNDLED

_COMMON = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    initializer_range=0.12,
    tie_word_embeddings=False,
)


@dataclass
class ReferenceModel:
    """A model in transformers (None where torch is not loaded) and the same model as an F32 GGUF."""

    name: str
    torch_model: object | None
    gguf: Path

    @property
    def layers(self):
        return self.torch_model.model.layers

    @property
    def n_vocab(self) -> int:
        return self.torch_model.config.vocab_size if self.torch_model else _COMMON["vocab_size"]

    def tokens(self, count: int, seed: int = 0) -> list[int]:
        return np.random.default_rng(seed).integers(3, self.n_vocab, count).tolist()


def configs() -> dict:
    """Configurations by name, with 6 layers or as many as the architecture needs to show what is special about it."""
    import transformers

    plain = {key: value for key, value in _COMMON.items() if key != "head_dim"}
    latent = {key: value for key, value in plain.items() if key != "num_key_value_heads"}
    return {
        "llama": transformers.LlamaConfig(num_hidden_layers=6, **_COMMON),
        "qwen3": transformers.Qwen3Config(num_hidden_layers=6, **_COMMON),
        # Five of the 7 layers have a sliding window that is shorter than the prompts. The sixth sees all tokens.
        "gemma3": transformers.Gemma3TextConfig(
            num_hidden_layers=7, sliding_window=16, query_pre_attn_scalar=16, **_COMMON
        ),
        "mixtral": transformers.MixtralConfig(
            num_hidden_layers=6, num_local_experts=4, num_experts_per_tok=2, **_COMMON
        ),
        "deepseek2": transformers.DeepseekV2Config(
            num_hidden_layers=6,
            num_key_value_heads=4,
            kv_lora_rank=32,
            q_lora_rank=32,
            qk_rope_head_dim=16,
            qk_nope_head_dim=16,
            v_head_dim=16,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            topk_method="greedy",
            norm_topk_prob=False,
            routed_scaling_factor=1.0,
            **latent,
        ),
        "lfm2": transformers.Lfm2Config(
            num_hidden_layers=6,
            layer_types=["conv", "full_attention", "conv", "conv", "full_attention", "conv"],
            block_auto_adjust_ff_dim=False,
            conv_L_cache=3,
            **plain,
        ),
    }


def fused_configs() -> dict:
    """Configurations of models that compute queries, keys and values with one matrix."""
    import transformers

    plain = {key: value for key, value in _COMMON.items() if key != "head_dim"}
    return {
        "phi3": transformers.Phi3Config(num_hidden_layers=6, pad_token_id=0, bos_token_id=1, eos_token_id=2, **plain)
    }


def shared_cache_configs() -> dict:
    """Configurations of models whose upper layers read the caches of lower ones: 20 of 30 and 6 of 10 layers write."""
    import transformers

    small = {
        key: _COMMON[key]
        for key in _COMMON
        if key not in ("intermediate_size", "max_position_embeddings", "tie_word_embeddings")
    }
    return {
        "gemma3n": transformers.Gemma3nTextConfig(
            num_hidden_layers=30,
            vocab_size_per_layer_input=128,
            intermediate_size=[96] * 30,
            laurel_rank=64,
            hidden_size_per_layer_input=256,
            sliding_window=16,
            num_kv_shared_layers=10,
            activation_sparsity_pattern=[0.0] * 30,
            **small,
        ),
        "gemma4": transformers.Gemma4TextConfig(
            num_hidden_layers=10,
            vocab_size_per_layer_input=128,
            intermediate_size=96,
            global_head_dim=32,
            hidden_size_per_layer_input=16,
            sliding_window=16,
            num_kv_shared_layers=4,
            **small,
        ),
    }


def write(base: Path, tiny: dict, finish=lambda directory: None) -> dict[str, ReferenceModel]:
    """Writes each configuration with random weights in a directory below ``base``, and converts it.

    ``finish`` is called with the directory before the conversion and may change the checkpoint.
    """
    import torch
    import transformers

    models = {}
    for name, config in tiny.items():
        torch.manual_seed(7)
        models[name] = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        models[name].save_pretrained(base / name)
        # The converter for Gemma counts these entries to know which rows of the embedding are padding.
        vocab = {str(token): token for token in range(config.vocab_size)}
        (base / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}))
        if name == "gemma3n":
            _add_unused_projections(base / name / "model.safetensors")
        finish(base / name)
    to_gguf([base / name for name in models])
    return {name: ReferenceModel(name, model, base / name / "model.gguf") for name, model in models.items()}


def write_served(path: Path) -> None:
    """Writes the bundled model as F32 that skips the upper 4 of its 12 layers."""
    from pypop_gguf.cli import main

    options = ["--outtype", "f32", "--boundary", "8", "--no-importance", "--outfile", str(path)]
    assert main(["convert", str(BUNDLED), *options]) == 0


def _add_unused_projections(weights: Path) -> None:
    """Adds K and V weights to the layers that never use them: llama.cpp wants them, transformers has none."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    for name in [
        name for name in tensors if ".19.self_attn." in name and name.split(".")[-2] in ("k_proj", "v_proj", "k_norm")
    ]:
        for il in range(20, 30):
            tensors[name.replace(".19.", f".{il}.")] = tensors[name].clone()
    save_file(tensors, weights, metadata={"format": "pt"})


def to_gguf(directories: list[Path]) -> None:
    """Converts the checkpoint in each directory to ``model.gguf`` beside it."""
    from pypop_gguf import library

    script = Path(__file__).parent / "convert_without_vocab.py"
    command = [sys.executable, script, library.vendor_dir() / "llama.cpp", *directories]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
