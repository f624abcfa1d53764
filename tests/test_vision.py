"""Vision models: the text model gets the pop.* keys, the projector becomes a second file, and the two load together.

Tiny random models with the bundled model's tokenizer; llama.cpp's converter takes it for every family here.
"""

import json
import re
import shutil
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pypop_gguf import PopLlama, cli
from pypop_gguf.metadata import read_metadata

BUNDLED = Path(__file__).parents[1] / "models" / "lab-llama-12l"
TEXT = dict(
    vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, initializer_range=0.1,
)  # fmt: skip
VISION = dict(hidden_size=32, intermediate_size=64, patch_size=14)


def gemma3(directory: Path) -> None:
    config = transformers.Gemma3Config(
        text_config=dict(sliding_window=16, query_pre_attn_scalar=16, **TEXT),
        vision_config=dict(num_hidden_layers=2, num_attention_heads=2, image_size=56, **VISION),
        mm_tokens_per_image=4,
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(directory)
    # published models have their tensors under the names that Transformers used before version 5
    weights = load_file(directory / "model.safetensors")
    old = {re.sub(r"vision_tower\.(vision_model\.)?", "vision_tower.vision_model.", name): weights[name] for name in weights}
    save_file(old, directory / "model.safetensors", metadata={"format": "pt"})


def qwen3vl(directory: Path) -> None:
    rope = dict(rope_type="default", mrope_section=[2, 3, 3], mrope_interleaved=True)
    config = transformers.Qwen3VLConfig(
        text_config=dict(rope_scaling=rope, **TEXT),
        vision_config=dict(
            depth=2, num_heads=2, out_hidden_size=64, num_position_embeddings=16, deepstack_visual_indexes=[0],
            spatial_merge_size=2, temporal_patch_size=2, **VISION,
        ),
    )  # fmt: skip
    transformers.Qwen3VLForConditionalGeneration(config).save_pretrained(directory)


@pytest.fixture(scope="module", params=[gemma3, qwen3vl], ids=["gemma3", "qwen3vl"])
def converted(request, tmp_path_factory) -> Path:
    """The text GGUF; the projector stands beside it."""
    directory = tmp_path_factory.mktemp(request.param.__name__)
    source = directory / "model"
    torch.manual_seed(0)
    request.param(source)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, source / name)
    preprocessor = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, image_seq_length=4)
    (source / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    target = directory / "out" / "text.gguf"
    target.parent.mkdir()
    arguments = ["--mmproj", "--calibration-samples", "2", "--calibration-tokens", "32", "--outfile", str(target)]
    assert cli.main(["convert", str(source), *arguments]) == 0
    return target


def test_text_model_and_projector_are_all_that_is_written(converted):
    assert sorted(path.name for path in converted.parent.iterdir()) == ["mmproj-text.gguf", "text.gguf"]
    projector = gguf.GGUFReader(converted.with_name("mmproj-text.gguf"))
    assert projector.get_field("general.type").contents() == "mmproj"
    assert not any(key.startswith("pop.") for key in projector.fields)


def test_text_model_has_boundary_and_importance_of_its_text_layers(converted):
    metadata = read_metadata(converted)
    assert metadata.boundary == 4
    for scores in (metadata.importance_prefill, metadata.importance_decode):
        assert scores.shape == (6,)


def test_text_model_answers_pruned(converted):
    llm = PopLlama(str(converted), n_ctx=128, verbose=False)
    assert (llm.pop.boundary, llm.pop.source) == (4, "file")
    llm.create_completion("The fox lived near the river", max_tokens=4, temperature=0)
    assert llm.timings.pruned_tokens == llm.timings.prompt_tokens - 1


def test_projector_loads_with_its_text_model(converted):
    import llama_cpp.mtmd_cpp as mtmd

    llm = PopLlama(str(converted), n_ctx=128, verbose=False)
    parameters = mtmd.mtmd_context_params_default()
    parameters.use_gpu = parameters.warmup = False
    context = mtmd.mtmd_init_from_file(bytes(converted.with_name("mmproj-text.gguf")), llm.model, parameters)
    assert context
    assert mtmd.mtmd_support_vision(context)
    mtmd.mtmd_free(context)
