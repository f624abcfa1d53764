"""Layer importance: scores against independent finite differences, gates in each architecture, loading of models.

The models are tiny and random and are made from configurations here. Only tests that load a model use the bundled one.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from pypop_gguf.errors import PopError
from pypop_gguf.importance.calibration import Sample, load_samples
from pypop_gguf.importance.decoder import find_decoder_layers
from pypop_gguf.importance.gates import apply_gates, find_gating
from pypop_gguf.importance.load_model import load_for_importance
from pypop_gguf.importance.scores import _draw_labels, compute_importance
from tests.support.paths import BUNDLED

N_VOCAB = 8
SAMPLE = Sample((3, 5, 1, 4, 7, 2, 6), prompt_len=4)
SHARED = {
    "vocab_size": N_VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WITHOUT_HEAD_DIM = {key: value for key, value in SHARED.items() if key != "head_dim"}
GPT2 = {"vocab_size": N_VOCAB, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
GEMMA3 = {**SHARED, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}
# For each architecture: its configuration, the modules that end the branches of a layer, and the weights that scale
# exactly what those modules add.
ARCHITECTURES = {
    "Llama": (SHARED, ["self_attn", "mlp"], ["self_attn.o_proj", "mlp.down_proj"]),
    "Qwen3": (SHARED, ["self_attn", "mlp"], ["self_attn.o_proj", "mlp.down_proj"]),
    "Gemma3Text": (
        GEMMA3,
        ["post_attention_layernorm", "post_feedforward_layernorm"],
        ["post_attention_layernorm", "post_feedforward_layernorm"],
    ),
    "Olmo2": (
        SHARED,
        ["post_attention_layernorm", "post_feedforward_layernorm"],
        ["post_attention_layernorm", "post_feedforward_layernorm"],
    ),
    "GPT2": ({**GPT2, "bos_token_id": 1, "eos_token_id": 2}, ["attn", "mlp"], ["attn.c_proj", "mlp.c_proj"]),
    "Mixtral": (
        {**SHARED, "num_local_experts": 4},
        ["self_attn", "mlp"],
        ["self_attn.o_proj", "mlp.experts.down_proj"],
    ),
    "Phi": (WITHOUT_HEAD_DIM, ["resid_dropout"], ["self_attn.dense", "mlp.fc2"]),
    "Granite": (
        {**SHARED, "residual_multiplier": 0.3},
        ["self_attn", "mlp"],
        ["self_attn.o_proj", "mlp.down_proj"],
    ),
    "Lfm2": (
        {**SHARED, "block_ff_dim": 24, "layer_types": ["conv", "full_attention", "conv"]},
        ["conv", "self_attn", "feed_forward"],
        ["conv.out_proj", "self_attn.out_proj", "feed_forward.w2"],
    ),
}
BLOOM = {"vocab_size": N_VOCAB, "hidden_size": 16, "n_layer": 3, "n_head": 2, "initializer_range": 0.3}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Run torch on one thread, which is fastest for models of this size."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def make_model(architecture: str, **options):
    settings = ARCHITECTURES[architecture][0] if architecture in ARCHITECTURES else BLOOM
    torch.manual_seed(7)
    config = getattr(transformers, f"{architecture}Config")(**{**settings, **options})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():  # Norm weights of 1 would hide whether they take part.
        if "norm" in name and name.endswith("weight"):
            parameter.add_(torch.rand_like(parameter) - 0.5)
    return model


def slope(loss, step: float = 1e-2) -> float:
    """Estimate d loss / d factor at 1 by a five-point rule, whose wide step keeps the noise of float32 small."""
    near, far = loss(1 + step) - loss(1 - step), loss(1 + 2 * step) - loss(1 - 2 * step)
    return (8 * near - far) / (12 * step)


def drawn_labels(logits, seed: int):
    """Draw the labels that ``compute_importance`` draws for its first sample."""
    return _draw_labels(logits.float(), torch.Generator().manual_seed(seed))


def loss_of(logits, labels) -> float:
    return -logits.double().log_softmax(-1)[torch.arange(len(labels)), labels].sum().item()


def reference_llama(model, tokens, prompt_len: int, gates):
    """Compute the logits of the output positions, float64 [n_output, n_vocab], by a Llama that is written out here.

    The gates are explicit factors, [2, n_layer] with rows prefill and decode.
    """
    weights = {name: value.double() for name, value in model.state_dict().items()}
    n_tokens, n_embd, head_dim = len(tokens), 16, 8

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt() * weights[name]

    def rotate(x):  # [n_head, n_tokens, head_dim]
        frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.arange(n_tokens, dtype=torch.float64)[:, None] * frequencies
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

    h = weights["model.embed_tokens.weight"][list(tokens)]
    for il in range(gates.shape[1]):
        at = f"model.layers.{il}."
        gate = torch.full((n_tokens, 1), gates[1, il].item(), dtype=torch.float64)
        gate[: prompt_len - 1] = gates[0, il]
        x = norm(h, at + "input_layernorm.weight")
        q, k, v = (
            (x @ weights[f"{at}self_attn.{name}_proj.weight"].T).view(n_tokens, -1, head_dim).transpose(0, 1)
            for name in "qkv"
        )
        scores = rotate(q) @ rotate(k).transpose(1, 2) / head_dim**0.5
        scores += torch.full((n_tokens, n_tokens), -torch.inf, dtype=torch.float64).triu(1)
        attention = (scores.softmax(-1) @ v).transpose(0, 1).reshape(n_tokens, n_embd)
        h = h + gate * (attention @ weights[at + "self_attn.o_proj.weight"].T)
        x = norm(h, at + "post_attention_layernorm.weight")
        hidden = torch.nn.functional.silu(x @ weights[at + "mlp.gate_proj.weight"].T)
        hidden = hidden * (x @ weights[at + "mlp.up_proj.weight"].T)
        h = h + gate * (hidden @ weights[at + "mlp.down_proj.weight"].T)
    return (norm(h, "model.norm.weight") @ weights["lm_head.weight"].T)[prompt_len - 1 : -1]


def reference_derivatives(function, n_layer: int, step: float = 1e-5):
    """Return central differences of ``function(gates)`` by each gate, [2, n_layer, *shape of the result]."""
    rows = []
    for stage in range(2):
        for il in range(n_layer):
            change = torch.zeros(2, n_layer, dtype=torch.float64)
            change[stage, il] = step
            rows.append(np.asarray(function(1 + change) - function(1 - change)) / (2 * step))
    return np.stack(rows).reshape(2, n_layer, *rows[0].shape)


def test_scores_equal_squared_finite_differences_for_the_drawn_labels():
    model = make_model("Llama")
    scores = compute_importance(model, [SAMPLE], seed=5)

    def logits(gates):
        return reference_llama(model, SAMPLE.tokens, SAMPLE.prompt_len, gates)

    labels = drawn_labels(logits(torch.ones(2, 3)), seed=5)
    expected = reference_derivatives(lambda gates: np.float64(loss_of(logits(gates), labels)), 3) ** 2
    np.testing.assert_allclose(scores.prefill, expected[0], rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(scores.decode, expected[1], rtol=1e-3, atol=1e-9)


def test_mean_over_many_draws_is_the_exact_fisher_information():
    model = make_model("Llama")
    sample = Sample((3, 5, 1, 4, 7), prompt_len=3)  # It has two output tokens and so 64 sequences of labels.

    def log_probabilities(gates):
        return reference_llama(model, sample.tokens, 3, gates).log_softmax(-1)

    p = log_probabilities(torch.ones(2, 3)).exp().numpy()  # [2, N_VOCAB]
    d = reference_derivatives(log_probabilities, 3)  # [2, n_layer, 2, N_VOCAB]
    fisher = sum(
        p[0, a] * p[1, b] * (d[:, :, 0, a] + d[:, :, 1, b]) ** 2 for a in range(N_VOCAB) for b in range(N_VOCAB)
    )
    scores = compute_importance(model, [sample] * 600)
    np.testing.assert_allclose([scores.prefill, scores.decode], fisher, rtol=0.2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gates_scale_what_the_branches_add(architecture):
    """Compare with scaled weights, which act at every position as the decode gate does after a prompt of one token."""
    model = make_model(architecture)
    sample = Sample(SAMPLE.tokens, prompt_len=1)
    scores = compute_importance(model, [sample], seed=1)

    def logits(il: int, factor: float):
        scaled = copy.deepcopy(model)
        layer = find_decoder_layers(scaled)[il]
        for path in ARCHITECTURES[architecture][2]:
            try:
                target = layer.get_submodule(path)
            except AttributeError:
                # The path names a parameter, or a module that only other layers of this model have.
                with contextlib.suppress(AttributeError):
                    layer.get_parameter(path).mul_(factor)
                continue
            if "Gemma3" in type(target).__name__:  # This norm multiplies by 1 + weight.
                target.weight.copy_(factor * (1 + target.weight) - 1)
            else:
                for parameter in target.parameters():
                    parameter.mul_(factor)
        return scaled(input_ids=torch.tensor([sample.tokens[:-1]]), use_cache=False).logits[0]

    labels = drawn_labels(logits(0, 1.0), seed=1)
    expected = [slope(lambda factor, il=il: loss_of(logits(il, factor), labels)) for il in range(3)]
    assert scores.gating == "branches"
    np.testing.assert_allclose(np.sqrt(scores.decode), np.abs(expected), rtol=1e-2, atol=2e-3)
    assert not scores.prefill.any()


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "Bloom"])
def test_gate_zero_makes_every_layer_the_identity(architecture):
    model = make_model(architecture)
    layers = find_decoder_layers(model)
    gating = find_gating(model, layers, SAMPLE.tokens)
    inputs = []
    handles = [
        layer.register_forward_pre_hook(
            lambda _module, args, kwargs: inputs.append((args or [kwargs["hidden_states"]])[0]), with_kwargs=True
        )
        for layer in layers
    ]
    with apply_gates(gating, torch.zeros(3, len(SAMPLE.tokens))):
        model(input_ids=torch.tensor([SAMPLE.tokens]), use_cache=False)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(inputs[1], inputs[0])
    torch.testing.assert_close(inputs[2], inputs[0])
    if architecture in ARCHITECTURES:
        names = {
            name
            for layer, ends in zip(layers, gating.branch_ends)
            for name, module in layer.named_children()
            if any(module is end for end in ends)
        }
        assert names == set(ARCHITECTURES[architecture][1])


def test_layers_without_visible_branches_are_gated_whole():
    model = make_model("Bloom")  # It adds the residual stream inside its branches.
    sample = Sample(SAMPLE.tokens, prompt_len=1)
    scores = compute_importance(model, [sample])

    def logits(il: int, gate: float):
        gated = copy.deepcopy(model)
        layer = find_decoder_layers(gated)[il]
        forward = layer.forward

        def forward_gated(h, *args, **kwargs):
            output = forward(h, *args, **kwargs)
            changed = h + gate * ((output[0] if isinstance(output, tuple) else output) - h)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        layer.forward = forward_gated
        return gated(input_ids=torch.tensor([sample.tokens[:-1]]), use_cache=False).logits[0]

    labels = drawn_labels(logits(0, 1.0), seed=0)
    expected = [slope(lambda gate, il=il: loss_of(logits(il, gate), labels)) for il in range(3)]
    assert scores.gating == "layers"
    np.testing.assert_allclose(np.sqrt(scores.decode), np.abs(expected), rtol=1e-2, atol=2e-3)


def test_rescaled_residual_stream_is_gated_whole():
    model = make_model("Llama")
    layer = find_decoder_layers(model)[1]
    layer.register_forward_hook(lambda _module, _args, output: output * 0.5)
    assert compute_importance(model, [SAMPLE]).gating == "layers"


def test_last_layer_prefill_importance_is_zero():
    scores = compute_importance(make_model("Qwen3"), [SAMPLE])
    assert scores.prefill[-1] == 0 and (scores.prefill[:-1] > 0).all() and (scores.decode > 0).all()


def test_same_seed_gives_same_scores_and_another_seed_others():
    model = make_model("Llama")
    first, again, other = (compute_importance(model, [SAMPLE] * 3, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.prefill, again.prefill)
    np.testing.assert_array_equal(first.decode, again.decode)
    assert not np.array_equal(first.decode, other.decode)


def test_labels_follow_the_models_probabilities():
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0]).expand(4000, 4)
    counts = torch.bincount(_draw_labels(logits, torch.Generator().manual_seed(0)), minlength=4)
    torch.testing.assert_close(counts / 4000, logits[0].softmax(-1), atol=0.03, rtol=0)


def test_scores_are_float32_and_close_for_a_bfloat16_model():
    model = make_model("Llama")
    full = compute_importance(model, [SAMPLE] * 20)
    half = compute_importance(model.bfloat16(), [SAMPLE] * 20)
    assert half.prefill.dtype == half.decode.dtype == np.float32
    np.testing.assert_allclose(half.decode, full.decode, rtol=0.3)


def test_every_sample_is_counted_by_the_progress():
    seen = []
    model = make_model("GPT2")
    scores = compute_importance(model, [SAMPLE] * 3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert scores.prefill.shape == (3,)
    assert not any(module._forward_hooks for module in model.modules())


def make_vision_model(architecture: str):
    torch.manual_seed(0)
    if architecture == "Gemma3":
        vision = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        }
        config = transformers.Gemma3Config(text_config=GEMMA3, vision_config=vision, mm_tokens_per_image=1)
        return transformers.Gemma3ForConditionalGeneration(config).eval()
    text = {**SHARED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "depth": 3,
        "num_heads": 2,
        "out_hidden_size": 16,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen3VLForConditionalGeneration(config).eval()


@pytest.mark.parametrize("architecture", ["Gemma3", "Qwen3VL"])
def test_vision_model_is_scored_by_its_text_layers(architecture):
    model = make_vision_model(architecture)  # It has as many vision layers as text layers.
    assert find_decoder_layers(model) == list(model.model.language_model.layers)
    scores = compute_importance(model, [SAMPLE])
    assert scores.gating == "branches" and scores.prefill[-1] == 0 and (scores.decode > 0).all()


def test_unusable_input_is_named():
    model = make_model("Llama")
    with pytest.raises(PopError, match="no calibration samples"):
        compute_importance(model, [])
    with pytest.raises(PopError, match="vocabulary of 8"):
        compute_importance(model, [Sample((1, 2, 8), 1)])
    with pytest.raises(PopError, match="leave at least one token"):
        Sample((1, 2), 2)
    model.config.num_hidden_layers = 5
    with pytest.raises(PopError, match="cannot find the 5 decoder layers"):
        find_decoder_layers(model)
    broken = make_model("Llama")
    broken.model.embed_tokens.weight.fill_(torch.nan)
    with pytest.raises(PopError, match="not finite"):
        compute_importance(broken, [SAMPLE])


def test_deep_layers_of_the_bundled_model_matter_more_for_decode_than_for_prefill():
    """POP rests on this asymmetry."""
    model, tokenizer = load_for_importance(BUNDLED)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    samples, _ = load_samples(tokenizer, max_samples=16, max_tokens=256)
    scores = compute_importance(model, samples)
    assert (scores.prefill[:-1] > 0).all() and scores.prefill[-1] == 0
    log_ratio = np.log(scores.decode[:-1] / scores.prefill[:-1])
    assert log_ratio[6:].mean() > log_ratio[:6].mean() + 0.5


def save_with_tokenizer(model, directory: Path) -> Path:
    model.save_pretrained(directory)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, directory)
    return directory


def test_dtype_and_vision_model_are_taken_from_the_directory(tmp_path):
    model, _ = load_for_importance(save_with_tokenizer(make_vision_model("Qwen3VL"), tmp_path / "a"), dtype="bfloat16")
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration" and model.dtype == torch.bfloat16
    model, _ = load_for_importance(save_with_tokenizer(make_model("Llama").bfloat16(), tmp_path / "b"), device="cpu")
    assert model.dtype == torch.float32


def test_models_that_read_in_both_directions_are_refused(tmp_path):
    tiny = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(num_hidden_layers=2, **tiny))
    with pytest.raises(PopError, match="both directions"):
        load_for_importance(save_with_tokenizer(bert, tmp_path / "bert"))
    t5 = transformers.T5Config(vocab_size=16, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    t5.save_pretrained(tmp_path / "t5")
    with pytest.raises(PopError, match="encoder-decoder"):
        load_for_importance(tmp_path / "t5")
    transformers.SiglipVisionConfig(hidden_size=16).save_pretrained(tmp_path / "siglip")
    with pytest.raises(PopError, match="not a causal language model"):
        load_for_importance(tmp_path / "siglip")


def test_incomplete_or_unsafe_weights_are_refused(tmp_path):
    headless = transformers.LlamaModel(transformers.LlamaConfig(**SHARED))
    with pytest.raises(PopError, match=r"lacks 1 weights .*lm_head\.weight"):
        load_for_importance(save_with_tokenizer(headless, tmp_path / "headless"))
    pickled = save_with_tokenizer(make_model("Llama"), tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(make_model("Llama").state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(PopError, match="safetensors"):
        load_for_importance(pickled)


def test_bad_paths_and_options_are_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    for path, reason in [
        (tmp_path / "missing", "does not exist"),
        ("./missing", "does not exist"),
        ("missing.gguf", "does not exist"),
        (tmp_path, "no config.json"),
        (tmp_path / "notes.txt", "not a .gguf file"),
    ]:
        with pytest.raises(PopError, match=reason):
            load_for_importance(path)
    with pytest.raises(PopError, match="device is 'tpu'"):
        load_for_importance(BUNDLED, device="tpu")
    with pytest.raises(PopError, match="dtype is 'int8'"):
        load_for_importance(BUNDLED, dtype="int8")
    if not torch.cuda.is_available():
        with pytest.raises(PopError, match="cuda is not available"):
            load_for_importance(BUNDLED, device="cuda")


def test_gguf_of_unknown_architecture_is_told_to_go_without(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", arch="nosuch")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(PopError, match="importance is optional for a GGUF file, so leave it out"):
        load_for_importance(tmp_path / "model.gguf")


def write_llama_gguf(path: Path, model) -> None:
    """Write a Llama model of the sizes in SHARED, with a vocabulary of single letters."""
    writer = gguf.GGUFWriter(path, arch="llama")
    writer.add_block_count(3)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(8)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "\u2581", "a", "b", "c", "d"])
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    for name, value in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # RoPE pairs neighbouring rows in GGUF, distant ones in Transformers.
            value = value.view(-1, 2, 4, 16).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_gives_the_scores_of_its_source(tmp_path):
    pytest.importorskip("accelerate")  # Transformers needs it to read GGUF files.
    source = make_model("Llama")
    write_llama_gguf(tmp_path / "tiny.gguf", source)
    model, tokenizer = load_for_importance(tmp_path / "tiny.gguf")
    assert tokenizer("a b")["input_ids"]
    expected, scores = (compute_importance(each, [SAMPLE]) for each in (source, model))
    np.testing.assert_allclose(scores.prefill, expected.prefill, rtol=1e-3)
    np.testing.assert_allclose(scores.decode, expected.decode, rtol=1e-3)
