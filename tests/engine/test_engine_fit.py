"""Keys and values fitted through the engine: what it observes, the regression, and adapters of whole weights."""

import collections

import gguf
import numpy as np
import pytest
import torch

from pypop_gguf import PopError, PopLlama, library, native
from pypop_gguf.fitting import engine_fit
from pypop_gguf.fitting.adapter_file import write_replacements
from pypop_gguf.fitting.products import layer_of, observing
from pypop_gguf.fitting.regression import (
    InputSums,
    Moments,
    OutputSums,
    Relation,
    find_bottleneck,
    relate,
    solve,
)
from pypop_gguf.gguf_files.tensors import read_matrices
from tests.support import pop_reference
from tests.support.engine import Engine
from tests.support.projections import Projection, find_projections, record

NAMES = ["llama", "qwen3", "gemma3", "mixtral", "deepseek2"]
B, N_PROMPT, N_TOKENS = 2, 40, 44
_RANK = 24
EXACT = dict(n_ctx=128, type_k=0, type_v=0, flash_attn=False, n_threads=1, n_threads_batch=1, verbose=False)


def make_texts(model, n: int = 24, length: int = 40) -> list[list[int]]:
    chance = np.random.default_rng(0)
    return [chance.integers(3, len(model.tokens(8)) + 100, length).tolist() for _ in range(n)]


def torch_products(model, text: list[int], projections: list) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns what each projection reads in a pruned pass and writes in a whole one, by PyTorch, but for position 0."""
    found = record(model.torch_model, text, B, projections)
    return {name: (x[1:].numpy(), y[1:].numpy()) for name, (x, y) in found.items()}


@pytest.mark.parametrize("name", NAMES)
def test_observed_inputs_and_outputs_are_pytorchs(reference_models, name):
    model = reference_models[name]
    text = model.tokens(40)
    projections = [p for p in find_projections(model.torch_model, B) if p.kind != "key"]
    expected = torch_products(model, text, projections)
    llm = PopLlama(str(model.gguf), pop=False, **EXACT)
    with observing(llm, B) as products:
        assert all(layer_of(weight) >= B for weight in products.weights)
        products.evaluate(text, B)
        inputs = {weight: products.get(weight)[0] for weight in products.weights}
        products.evaluate(text, products.n_layer)
        outputs = {weight: products.get(weight)[1] for weight in products.weights}
    for projection in projections:
        part = "attn_kv_a_mqa" if projection.kind == "latent" else "attn_v"
        weight = f"blk.{projection.layer}.{part}.weight"
        x, y = expected[projection.name]
        assert pop_reference.squared_error(inputs[weight], x) <= 1e-6
        rows = outputs[weight][:, projection.rows] if projection.kind == "latent" else outputs[weight]
        assert pop_reference.squared_error(rows, y) <= 1e-6


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_fit_equals_one_by_pytorch_on_its_own_activations(reference_models, name, monkeypatch):
    monkeypatch.setattr(engine_fit, "_TO_NARROW", 400)  # about half of the texts
    model = reference_models[name]
    texts = make_texts(model)
    llm = PopLlama(str(model.gguf), pop=False, **EXACT)
    [sums] = engine_fit.collect(llm, texts, [B])
    assert not sums.needs_pruned_pass  # The layers normalize the same state, so one whole pass has it all.
    weights = read_matrices(model.gguf, sums.relations.keys())
    state, hidden, halfway = sums.further
    assert layer_of(state) == 0 and hidden == "blk.1.ffn_down.weight" and layer_of(halfway) == 1
    modules = {
        state: model.layers[0].self_attn.k_proj,
        hidden: model.layers[1].mlp.down_proj,
        halfway: model.layers[1].self_attn.k_proj,
    }
    bottleneck = np.concatenate(list(sums.bottlenecks.values()), axis=1).astype(np.float64)
    below = [Projection(1, weight, module, slice(None), "below") for weight, module in modules.items()]
    for projection in find_projections(model.torch_model, B):
        part = {"key": "attn_k", "value": "attn_v"}[projection.kind]
        found = sums.solve(f"blk.{projection.layer}.{part}.weight", weights[f"blk.{projection.layer}.{part}.weight"])
        records = [torch_products(model, text, [projection, *below]) for i, text in enumerate(texts) if i % 8 != 7]
        x, y = (
            np.concatenate([one[projection.name][column] for one in records]).astype(np.float64) for column in (0, 1)
        )
        n_own = x.shape[1]
        further = np.concatenate([np.concatenate([one[weight][0] for weight in modules], axis=1) for one in records])
        x = np.concatenate([x, further @ bottleneck.T], axis=1)
        if np.isinf(found.penalty):
            continue
        counts = collections.Counter(token for text in texts for token in text)
        w = np.array([counts[token] ** -0.25 for i, text in enumerate(texts) if i % 8 != 7 for token in text[1:]])
        mean_x, mean_y = np.average(x, axis=0, weights=w), np.average(y, axis=0, weights=w)
        centred, weighted = x - mean_x, (x - mean_x).T * w
        own = np.zeros((y.shape[1], x.shape[1]))
        own[:, :n_own] = projection.module.weight.detach().double().numpy()
        variances = np.diag(weighted @ centred)
        parts = [variances[:n_own], variances[n_own:]]
        level = found.penalty * np.concatenate([np.full(len(part), part.mean()) for part in parts])
        ridge = weighted @ centred + np.diag(level)
        expected = np.linalg.solve(ridge, weighted @ (y - mean_y) + (level * own).T).T
        shift = mean_y - expected @ mean_x
        assert pop_reference.squared_error(x @ found.weight.T + found.shift, x @ expected.T + shift) <= 1e-6
        assert found.error_after <= found.error_before


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_pruned_passes_use_the_replaced_weights_and_whole_ones_do_not(reference_models, name, tmp_path):
    model = reference_models[name]
    tokens = model.tokens(N_TOKENS)
    generator = torch.Generator().manual_seed(1)
    replacements, added = {}, {}
    for projection in find_projections(model.torch_model, B):
        if projection.kind == "value":
            weight = projection.module.weight.detach()
            # These numbers survive the rounding of the file: eighths, the largest of each block being 127 of them.
            new = torch.randint(-126, 127, weight.shape, generator=generator).float()
            new[:, ::32] = 127
            new = new / 1024
            shift = torch.randint(-8, 9, (len(weight),), generator=generator).float() / 8
            replacements[f"blk.{projection.layer}.attn_v.weight"] = new.numpy(), shift.numpy()
            added[projection.module] = new - weight, shift
    path = tmp_path / "fit.gguf"
    architecture = gguf.GGUFReader(model.gguf).get_field("general.architecture").contents()
    fingerprint = library.fingerprint(model.gguf)
    write_replacements(path, replacements, architecture=architecture, boundary=B, fingerprint=fingerprint)
    expected = pop_reference.logits(model.torch_model, model.layers, tokens, B, N_PROMPT, added=added)
    plain = pop_reference.logits(model.torch_model, model.layers, tokens, B, N_PROMPT)
    continuation = [*tokens[N_PROMPT:], 0]
    llm = PopLlama(str(model.gguf), pop_boundary=B, pop_adapter=path, **EXACT)
    error = pop_reference.squared_error(llm.score(tokens[:N_PROMPT], continuation), expected)
    whole = llm.score(tokens[:N_PROMPT], continuation, pop=False)
    llm.close()
    assert error <= 1e-4  # A product with a Q8_0 weight rounds what it reads.
    assert pop_reference.squared_error(plain, expected) > 20 * error
    bare = PopLlama(str(model.gguf), pop_boundary=B, **EXACT)
    assert np.array_equal(whole, bare.score(tokens[:N_PROMPT], continuation, pop=False))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mixtral"])
def test_pruned_passes_add_what_further_inputs_say(reference_models, name, tmp_path):
    model = reference_models[name]
    tokens, boundary = model.tokens(N_TOKENS), 3
    generator = torch.Generator().manual_seed(1)
    sources = {f"blk.{il}.attn_k.weight": model.layers[il].self_attn.k_proj for il in (1, 2)}
    bottlenecks = {
        weight: torch.randn(_RANK, module.in_features, generator=generator) / 8 for weight, module in sources.items()
    }
    replacements, further, expected_further = {}, {}, {}
    for projection in find_projections(model.torch_model, boundary):
        if projection.kind == "value":
            weight = f"blk.{projection.layer}.attn_v.weight"
            own = projection.module.weight.detach().numpy()
            replacements[weight] = own, np.zeros(len(own), np.float32)
            further[weight] = torch.randn(len(own), _RANK, generator=generator) / 8
            for source, module in sources.items():
                expected_further[module, projection.module] = further[weight] @ bottlenecks[source]
    path = tmp_path / "fit.gguf"
    write_replacements(
        path,
        replacements,
        architecture=gguf.GGUFReader(model.gguf).get_field("general.architecture").contents(),
        boundary=boundary,
        fingerprint=library.fingerprint(model.gguf),
        bottlenecks={name: matrix.numpy() for name, matrix in bottlenecks.items()},
        further={name: matrix.numpy() for name, matrix in further.items()},
        kind=gguf.GGMLQuantizationType.F32,
    )
    torch_model, layers = model.torch_model, model.layers
    plain = pop_reference.logits(torch_model, layers, tokens, boundary, N_PROMPT)
    expected = pop_reference.logits(torch_model, layers, tokens, boundary, N_PROMPT, further=expected_further)
    continuation = [*tokens[N_PROMPT:], 0]
    llm = PopLlama(str(model.gguf), pop_boundary=boundary, pop_adapter=path, **EXACT)
    error = pop_reference.squared_error(llm.score(tokens[:N_PROMPT], continuation), expected)
    whole = llm.score(tokens[:N_PROMPT], continuation, pop=False)
    llm.close()
    assert error <= 1e-6
    assert pop_reference.squared_error(plain, expected) > 1e-3
    bare = PopLlama(str(model.gguf), pop_boundary=boundary, **EXACT)
    assert np.array_equal(whole, bare.score(tokens[:N_PROMPT], continuation, pop=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blk.9.attn_v.weight": ((8, 8), 8)}, "belongs to no weight"),
        ({"blk.4.attn_v.weight": ((8, 8), 8)}, "another shape"),
        ({"blk.1.attn_v.weight": (None, None)}, "no weight of a layer above its boundary"),
    ],
    ids=["unknown", "shape", "below"],
)
def test_replacement_that_does_not_fit_is_refused_in_one_line(reference_models, tmp_path, change, message):
    model = reference_models["llama"]
    [(name, (shape, n_out))] = change.items()
    if shape is None:
        weight = read_matrices(model.gguf, [name])[name]
        shape, n_out = weight.shape, len(weight)
    path = tmp_path / "fit.gguf"
    replacement = np.zeros(shape, np.float32), np.zeros(n_out, np.float32)
    fingerprint = library.fingerprint(model.gguf)
    write_replacements(path, {name: replacement}, architecture="llama", boundary=B, fingerprint=fingerprint)
    with Engine(model.gguf) as engine, pytest.raises(PopError, match=message):
        native.load_adapter(engine.context, engine.model, path)


@pytest.mark.parametrize(
    ("bottlenecks", "further", "message"),
    [
        ({"blk.2.attn_v.weight": 8}, {"blk.3.attn_v.weight": 8}, "reads no state below its boundary 2"),
        ({"blk.1.attn_v.weight": 8}, {"blk.3.attn_v.weight": 4}, "has another rank than the other bottlenecks"),
        ({"blk.1.attn_v.weight": 8}, {"blk.3.attn_k.weight": 8}, "belongs to no weight that is replaced"),
        ({"blk.1.attn_v.weight": 8}, {}, "its further inputs lack their bottlenecks or their use"),
        ({}, {"blk.3.attn_v.weight": 8}, "its further inputs lack their bottlenecks or their use"),
        ({"blk.1.attn_x.weight": 8}, {"blk.3.attn_v.weight": 8}, "belongs to no weight of this model"),
    ],
    ids=["above", "rank", "unused weight", "no use", "no bottleneck", "unknown"],
)
def test_further_inputs_that_do_not_fit_are_refused_in_one_line(
    reference_models, tmp_path, bottlenecks, further, message
):
    model = reference_models["llama"]
    own = read_matrices(model.gguf, ["blk.3.attn_v.weight"])["blk.3.attn_v.weight"]
    n_out, n_in = own.shape
    path = tmp_path / "fit.gguf"
    write_replacements(
        path,
        {"blk.3.attn_v.weight": (own, np.zeros(n_out, np.float32))},
        architecture="llama",
        boundary=B,
        fingerprint=library.fingerprint(model.gguf),
        bottlenecks={name: np.zeros((rank, n_in), np.float32) for name, rank in bottlenecks.items()},
        further={name: np.zeros((n_out, rank), np.float32) for name, rank in further.items()},
    )
    with Engine(model.gguf) as engine, pytest.raises(PopError, match=message):
        native.load_adapter(engine.context, engine.model, path)


def test_input_that_follows_from_another_is_recognized():
    chance = np.random.default_rng(0)
    base = chance.standard_normal((50, 8), dtype=np.float32)
    scale, offset = chance.standard_normal(8), chance.standard_normal(8)
    found = relate(base, (base * scale + offset).astype(np.float32))
    assert isinstance(found, Relation)
    assert np.allclose(found.scale, scale, atol=1e-4) and np.allclose(found.offset, offset, atol=1e-4)
    assert relate(base, base[:, ::-1].copy()) is None


def test_weight_that_a_whole_pass_uses_twice_is_not_fitted(shared_cache_models):
    model = shared_cache_models["gemma3n"]
    llm = PopLlama(str(model.gguf), pop=False, **EXACT)
    [sums] = engine_fit.collect(llm, make_texts(model, 8), [B])
    assert not any("altup_router" in name for name in sums.relations)


def test_fit_without_further_inputs_reads_the_state_at_the_boundary_alone(reference_models):
    llm = PopLlama(str(reference_models["llama"].gguf), pop=False, **EXACT)
    texts = make_texts(reference_models["llama"], 8)
    [with_further], [alone] = (engine_fit.collect(llm, texts, [B], further_inputs=x) for x in (True, False))
    assert with_further.further and with_further.bottlenecks
    assert not alone.further and not alone.bottlenecks and alone.relations.keys() == with_further.relations.keys()


def test_fit_is_accurate_far_from_zero():
    chance = np.random.default_rng(0)
    weight = chance.standard_normal((3, 8), dtype=np.float32)
    parts = []
    for _ in range(2):
        inputs, outputs = InputSums(8), OutputSums(8, 3)
        for _ in range(4):
            x = 1000 + chance.standard_normal((50, 8), dtype=np.float32)
            ones = np.ones(50, np.float32)
            outputs.add(inputs.add(x, ones), (x.astype(np.float64) @ weight.T).astype(np.float32) + 5, ones)
        parts.append(Moments.from_sums(inputs, outputs, Relation(np.ones(8), np.zeros(8))))
    assert np.allclose(parts[0].xx / parts[0].weight, np.eye(8), atol=0.3)
    found = solve(*parts, np.zeros((3, 8), np.float32))
    assert 0 <= found.error_after <= 1e-5
    assert np.allclose(found.weight, weight, atol=1e-2)


def test_weight_that_no_fit_improves_stays_as_it_is():
    chance = np.random.default_rng(0)
    weight = chance.standard_normal((3, 8), dtype=np.float32)
    fitted, held_out = InputSums(8), InputSums(8)
    parts = []
    for inputs, noise in ((fitted, 10), (held_out, 0)):
        x, outputs = chance.standard_normal((12, 8), dtype=np.float32), OutputSums(8, 3)
        y = x @ weight.T + noise * chance.standard_normal((12, 3), dtype=np.float32)
        ones = np.ones(12, np.float32)
        outputs.add(inputs.add(x, ones), y, ones)
        parts.append(Moments.from_sums(inputs, outputs, Relation(np.ones(8), np.zeros(8))))
    found = solve(*parts, weight)
    assert found.error_after == found.error_before
    assert np.array_equal(found.weight, weight) and not found.shift.any()


def test_bottleneck_finds_what_the_own_input_lacks_beside_activations_that_never_change():
    """The output is the own input plus one direction of the further ones; some of these are 0, and one is huge."""
    chance = np.random.default_rng(0)
    n, n_own = 2000, 8
    own, further = (chance.standard_normal((n, columns)).astype(np.float32) for columns in (n_own, 16))
    further[:, 12:] = 0
    further[:, 11] *= 1e4
    direction = np.zeros(16)
    direction[[1, 3]] = 0.6, 0.8
    ones = np.ones(n, np.float32)
    inputs, outputs = InputSums(n_own + 16), OutputSums(n_own + 16, 1)
    y = (own[:, :1] + further @ direction[:, None]).astype(np.float32)
    outputs.add(inputs.add(np.concatenate([own, further], axis=1), ones), y, ones)
    bottleneck = find_bottleneck(inputs, [(outputs, 1)], n_own)
    assert bottleneck.shape == (1, 16) and np.isfinite(bottleneck).all()
    passed = further @ bottleneck.T
    rest = (further @ direction) - passed @ np.linalg.lstsq(passed, further @ direction, rcond=None)[0]
    assert rest.var() <= 1e-3


def test_too_few_texts_are_refused(reference_models):
    llm = PopLlama(str(reference_models["llama"].gguf), pop=False, **EXACT)
    with pytest.raises(PopError, match="7 texts are too few"):
        engine_fit.collect(llm, make_texts(reference_models["llama"], 7), [B])
