"""Qwen3-VL adds image features to the residual stream after the first layers, and the boundary state includes them."""

import ctypes
import json

import numpy as np
import pytest
import torch
import transformers

from pypop_gguf import native
from tests.support import tiny_models
from tests.support.engine import Engine, llama_cpp
from tests.support.pop_reference import squared_error

pytestmark = pytest.mark.usefixtures("continuation")

N_EMBD, N_IMAGE, N_LAYER = 64, 24, 6
DEEPSTACK = [0, 1]  # the features of these vision layers are added after text layers 0 and 1
TOKENS = [5, 9, 17, 3]  # the text of the prompt, after the image


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("deepstack")
    config = transformers.Qwen3VLConfig(
        text_config=dict(
            vocab_size=128,
            hidden_size=N_EMBD,
            intermediate_size=96,
            num_hidden_layers=N_LAYER,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
            initializer_range=0.12,
            rope_scaling=dict(rope_type="default", mrope_section=[2, 3, 3], mrope_interleaved=True),
        ),
        vision_config=dict(
            depth=2,
            hidden_size=32,
            intermediate_size=64,
            num_heads=2,
            out_hidden_size=N_EMBD,
            patch_size=14,
            num_position_embeddings=16,
            deepstack_visual_indexes=DEEPSTACK,
        ),
        tie_word_embeddings=False,
    )
    torch.manual_seed(7)
    torch_model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    torch_model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {}}, "added_tokens": []}))
    tiny_models.to_gguf([directory])
    return torch_model, directory / "model.gguf"


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """Embeddings and deepstack features of each position as a projector gives them, F32 [n_image, 3 n_embd]."""
    return np.random.default_rng(0).normal(0, 0.5, (N_IMAGE, N_EMBD * (1 + len(DEEPSTACK)))).astype(np.float32)


def torch_logits(torch_model, image, boundary) -> np.ndarray:
    """Logits of the last token, which runs whole after all others have skipped the layers from the boundary on."""
    decoder = torch_model.model.language_model
    main, *deep = (torch.tensor(part) for part in np.split(image, 1 + len(DEEPSTACK), axis=1))

    def skip(_layer, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with torch.no_grad():
        hooks = [layer.register_forward_hook(skip, with_kwargs=True) for layer in decoder.layers[boundary:]]
        cache = decoder(
            inputs_embeds=main[None],
            use_cache=True,
            visual_pos_masks=torch.ones(1, N_IMAGE, dtype=torch.bool),
            deepstack_visual_embeds=deep,
        ).past_key_values
        cache = decoder(input_ids=torch.tensor([TOKENS[:-1]]), past_key_values=cache, use_cache=True).past_key_values
        for hook in hooks:
            hook.remove()
        hidden = decoder(input_ids=torch.tensor([TOKENS[-1:]]), past_key_values=cache, use_cache=True).last_hidden_state
        return torch_model.lm_head(hidden)[0, -1].numpy()


def engine_logits(gguf, image, boundary) -> tuple[np.ndarray, int]:
    with Engine(gguf, boundary) as engine:
        return read(engine, image), engine.n_pruned


def read(engine, image) -> np.ndarray:
    """Reads the image and then the text; returns the logits of the last token."""
    batch = llama_cpp.llama_batch_init(N_IMAGE, image.shape[1], 1)
    kind, allocated = type(batch.pos), ctypes.cast(batch.pos, ctypes.c_void_p)
    # Each row has four positions: time, height, width and an unused one. They are stored section by section.
    positions = (ctypes.c_int32 * (4 * N_IMAGE))(*(list(range(N_IMAGE)) * 3 + [0] * N_IMAGE))
    batch.pos = ctypes.cast(positions, kind)
    batch.n_tokens = N_IMAGE
    ctypes.memmove(batch.embd, np.ascontiguousarray(image).ctypes.data, image.nbytes)
    for i in range(N_IMAGE):
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, False
    assert llama_cpp.llama_decode(engine.context, batch) == 0
    batch.pos = ctypes.cast(allocated, kind)
    llama_cpp.llama_batch_free(batch)
    return engine.prefill(TOKENS, first=N_IMAGE)


def test_images_are_completed_above_the_deepstack_layers_and_lost_below(model, image):
    _, gguf = model
    n_all = N_IMAGE + len(TOKENS)
    with Engine(gguf) as whole:
        read(whole, image)
        expected = whole.step(7, n_all)
    for boundary in range(1, N_LAYER - 1):
        with Engine(gguf, boundary) as pruned:
            native.set_completion(pruned.context, "f32")
            read(pruned, image)
            if boundary < len(DEEPSTACK):
                assert (native.n_incomplete(pruned.context), native.n_lost(pruned.context)) == (0, n_all)
                continue
            assert native.n_incomplete(pruned.context) == n_all
            while native.n_incomplete(pruned.context):
                native.complete(pruned.context, 7)
            error = squared_error(pruned.step(7, n_all), expected)
            assert error <= 1e-9, boundary


@pytest.mark.parametrize("boundary", range(len(DEEPSTACK), N_LAYER + 1))
def test_boundary_above_the_deepstack_layers_equals_pytorch(model, image, boundary):
    torch_model, gguf = model
    expected = torch_logits(torch_model, image, boundary)
    logits, n_pruned = engine_logits(gguf, image, boundary)
    assert squared_error(logits, expected) <= 1e-6
    if boundary < N_LAYER:
        assert n_pruned == N_IMAGE + len(TOKENS) - 1
    # The features matter, so the test would notice a boundary state without them.
    without = np.concatenate([image[:, :N_EMBD], np.zeros_like(image[:, N_EMBD:])], axis=1)
    assert squared_error(engine_logits(gguf, without, boundary)[0], expected) > 1e-3
