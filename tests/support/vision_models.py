"""Makes tiny random vision models and converts them: the text model's GGUF, and the projector's beside it.

They have the bundled model's tokenizer, which llama.cpp's converter accepts for all.
"""

import json
import re
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from pypop_gguf import cli
from tests.support.paths import BUNDLED

TEXT = dict(
    vocab_size=4096,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    initializer_range=0.1,
)
CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}\
{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}\
{% if add_generation_prompt %} She said:{% endif %}"""
VISION = dict(hidden_size=32, intermediate_size=64, patch_size=14)


def gemma3(directory: Path) -> None:
    config = transformers.Gemma3Config(
        text_config=dict(sliding_window=16, query_pre_attn_scalar=16, **TEXT),
        vision_config=dict(num_hidden_layers=2, num_attention_heads=2, image_size=56, **VISION),
        mm_tokens_per_image=4,
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(directory)
    # Published models name their tensors as Transformers did before version 5.
    weights = load_file(directory / "model.safetensors")
    old = {
        re.sub(r"vision_tower\.(vision_model\.)?", "vision_tower.vision_model.", name): weights[name]
        for name in weights
    }
    save_file(old, directory / "model.safetensors", metadata={"format": "pt"})


def qwen3vl(directory: Path) -> None:
    rope = dict(rope_type="default", mrope_section=[2, 3, 3], mrope_interleaved=True)
    config = transformers.Qwen3VLConfig(
        text_config=dict(rope_scaling=rope, **TEXT),
        vision_config=dict(
            depth=2,
            num_heads=2,
            out_hidden_size=64,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0],
            spatial_merge_size=2,
            temporal_patch_size=2,
            **VISION,
        ),
    )
    transformers.Qwen3VLForConditionalGeneration(config).save_pretrained(directory)


def convert(make, directory: Path) -> Path:
    """Makes a model with ``gemma3`` or ``qwen3vl``, and returns the path of its text model's GGUF.

    The projector is ``mmproj-text.gguf`` in the same directory.
    """
    source = directory / "model"
    torch.manual_seed(0)
    make(source)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, source / name)
    (source / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    preprocessor = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, image_seq_length=4)
    (source / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    target = directory / "out" / "text.gguf"
    target.parent.mkdir()
    calibration = ["--calibration-samples", "2", "--calibration-tokens", "32"]
    arguments = ["convert", str(source), "--mmproj", "--outtype", "f32", *calibration, "--outfile", str(target)]
    assert cli.main(arguments) == 0
    return target
