"""Fitted projections: the engine with an adapter against PyTorch, the graphs it changes, and the files it refuses."""

import shutil

import gguf
import llama_cpp
import numpy as np
import pytest
import torch

from pypop_gguf import PopError, PopLlama, library, native
from pypop_gguf.call import Call
from pypop_gguf.cli import main
from pypop_gguf.fitting import distill, fit
from pypop_gguf.fitting.hf_to_adapter import write_adapter
from pypop_gguf.gguf_files.metadata import PopMetadata
from pypop_gguf.gguf_files.writer import copy_with_metadata
from pypop_gguf.importance.calibration import Sample
from tests.support import pop_reference, tiny_models
from tests.support.engine import Engine
from tests.support.paths import ROOT
from tests.support.server import serve

NAMES = ["llama", "qwen3", "gemma3", "mixtral", "deepseek2", "phi3"]
N_PROMPT, N_TOKENS, B = 70, 74, 2
EXACT = dict(n_ctx=256, type_k=0, type_v=0, flash_attn=False, n_threads=1, n_threads_batch=1, verbose=False)
_written: dict = {}  # for each model and boundary: the bytes of an adapter's file, and what PyTorch adds to weights


@pytest.fixture(scope="module")
def models(reference_models, tmp_path_factory):
    return {**reference_models, **tiny_models.write(tmp_path_factory.mktemp("fused"), tiny_models.fused_configs())}


def make_differences(model, boundary: int, rank: int = 3) -> list[fit.Difference]:
    """Make large random differences of keys and values, of numbers that float16 holds exactly."""
    generator = torch.Generator().manual_seed(boundary)
    result = []
    for projection in fit.find_projections(model.torch_model, boundary):
        n_out, n_in = projection.module.weight.shape
        a = torch.randint(-8, 9, (rank, n_in), generator=generator) / 32
        b = torch.zeros(n_out, rank)
        b[projection.rows] = (
            torch.randint(-8, 9, (projection.rows.stop - projection.rows.start, rank), generator=generator) / 32
        )
        result.append(fit.Difference(projection, a, b))
    return result


def write(model, target, boundary: int) -> dict:
    """Write an adapter of random differences; return what PyTorch has to add to each module's weight to do the same."""
    key = model.gguf, boundary
    if key not in _written:  # Writing takes seconds, so each file is kept.
        differences = make_differences(model, boundary)
        write_adapter(target, model.torch_model, boundary, differences, library.fingerprint(model.gguf))
        _written[key] = target.read_bytes(), round_as_written(differences)
    content, added = _written[key]
    target.write_bytes(content)
    return added


def round_as_written(differences: list[fit.Difference]) -> dict:
    """Return the product of each difference's matrices as the file holds them: balanced, then rounded to float16."""
    added = {}
    for d in differences:
        balance = (d.b.norm(dim=0) / d.a.norm(dim=1)).sqrt()
        a, b = (d.a * balance[:, None]).half().float(), (d.b / balance).half().float()
        added[d.projection.module] = added.get(d.projection.module, 0) + b @ a
    return added


@pytest.mark.parametrize("name", NAMES)
def test_pruned_passes_equal_pytorch_and_whole_ones_are_untouched(models, name, tmp_path, continuation):
    model = models[name]
    tokens = model.tokens(N_TOKENS)
    for boundary in (1, 3):
        added = write(model, tmp_path / "fit.gguf", boundary)
        expected = pop_reference.logits(model.torch_model, model.layers, tokens, boundary, N_PROMPT, added=added)
        plain = pop_reference.logits(model.torch_model, model.layers, tokens, boundary, N_PROMPT)
        llm = PopLlama(str(model.gguf), pop_boundary=boundary, pop_adapter=tmp_path / "fit.gguf", **EXACT)
        assert llm.pop.adapters == (boundary,)
        error = pop_reference.squared_error(score(llm, tokens), expected)
        assert error <= 1e-6
        assert pop_reference.squared_error(plain, expected) > 100 * error
        other = score(llm, tokens, boundary=2)  # The adapter is for another boundary and is not used here.
        whole = score(llm, tokens, pop=False)
        llm.close()
        bare = PopLlama(str(model.gguf), pop_boundary=boundary, **EXACT)
        assert np.array_equal(whole, score(bare, tokens, pop=False))
        assert np.array_equal(other, score(bare, tokens, boundary=2))
        bare.close()


def score(llm, tokens, **which) -> np.ndarray:
    return llm.score(tokens[:N_PROMPT], [*tokens[N_PROMPT:], 0], **which)


def test_whole_model_is_stocks_bit_for_bit_with_an_adapter_loaded(models, stock, tmp_path):
    model = models["llama"]
    write(model, tmp_path / "fit.gguf", B)
    tokens = model.tokens(N_TOKENS)
    llm = PopLlama(str(model.gguf), pop_boundary=B, pop_adapter=tmp_path / "fit.gguf", **EXACT)
    with llm._calling(Call(llm.pop.n_layer)):
        llm.eval(tokens)
    ours = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).tolist()
    llm.close()
    code = """
import json, sys, llama_cpp
options = dict(type_k=0, type_v=0, flash_attn=False, n_threads=1, n_threads_batch=1, verbose=False)
llm = llama_cpp.Llama(sys.argv[1], n_ctx=256, **options)
llm.eval(json.loads(sys.argv[2]))
print(json.dumps([llama_cpp.llama_get_logits_ith(llm.ctx, -1)[i] for i in range(llm.n_vocab())]))
"""
    assert ours == stock(code, model.gguf, tokens)


def test_adapter_and_the_users_lora_together(models, tmp_path):
    """A LoRA of the same weights acts in every pass, the adapter only in pruned ones."""
    model = models["llama"]
    added = write(model, tmp_path / "fit.gguf", B)
    lora = relabelled(tmp_path / "fit.gguf", tmp_path / "lora.gguf", "lora")
    tokens = model.tokens(N_TOKENS)
    with torch.no_grad():
        for module, matrix in added.items():
            module.weight += matrix
    try:
        expected = pop_reference.logits(model.torch_model, model.layers, tokens, B, N_PROMPT, added=added)
    finally:
        with torch.no_grad():
            for module, matrix in added.items():
                module.weight -= matrix
    llm = PopLlama(str(model.gguf), pop_boundary=B, pop_adapter=tmp_path / "fit.gguf", lora_path=str(lora), **EXACT)
    assert pop_reference.squared_error(score(llm, tokens), expected) <= 1e-6
    llm.close()


def relabelled(source, target, kind: str):
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    writer.add_type("adapter")
    writer.add_string("adapter.type", kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_adapters_come_and_go_between_prompts(models, tmp_path):
    model = models["qwen3"]
    tokens = model.tokens(40)
    paths = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for path, boundary in zip(paths, (1, 3)):
        write(model, path, boundary)

    def logits(boundary, adapters):
        with Engine(model.gguf, boundary) as engine:
            for adapter in adapters:
                native.load_adapter(engine.context, engine.model, adapter)
            return engine.prefill(tokens)

    with Engine(model.gguf, 1) as engine:
        found = [engine.prefill(tokens)]
        for step in ("add", "boundary", "clear"):
            llama_cpp.llama_memory_clear(engine.memory, True)
            if step == "add":
                for path in paths:
                    native.load_adapter(engine.context, engine.model, path)
            elif step == "boundary":
                native.set_boundary(engine.context, 3)
            else:
                native.clear_adapters(engine.context)
            found.append(engine.prefill(tokens))
    expected = [logits(1, []), logits(1, paths), logits(3, paths), logits(3, [])]
    for actual, wanted in zip(found, expected):
        assert np.array_equal(actual, wanted)
    assert not np.array_equal(expected[2], expected[3])


def test_found_beside_its_model_and_left_out_on_request(models, tmp_path):
    model = models["llama"]
    target = tmp_path / "model.gguf"
    shutil.copy(model.gguf, target)
    write(model, native.adapter_path(target, B), B)
    for options, adapters in ((dict(), (B,)), (dict(pop_adapter=False), ())):
        llm = PopLlama(str(target), pop_boundary=B, **options, **EXACT)
        assert llm.pop.adapters == adapters
        llm.close()
    llm = PopLlama(str(target), pop_boundary=B + 1, **EXACT)  # There is no adapter for this boundary.
    assert llm.pop.adapters == ()
    llm.close()


def test_server_takes_the_one_beside_its_model(models, bundled_gguf, tmp_path):
    target, text = tmp_path / "model.gguf", "Once upon a time, there was a little dog named Max. He had a red ball."
    copy_with_metadata(bundled_gguf, target, PopMetadata(boundary=B))
    write(models["bundled"], native.adapter_path(target, B), B)
    expected = {}
    for adapter in (None, False):
        llm = PopLlama(str(target), pop_adapter=adapter, logits_all=False, **EXACT)
        tokens = llm.tokenize(text.encode())
        (row,) = llm.score(tokens, [0])
        expected[adapter] = np.log(np.exp(row - row.max()) / np.exp(row - row.max()).sum())
        llm.close()
    options = (
        "--threads",
        1,
        "--context",
        256,
        "--parallel",
        1,
        "--server-options",
        "-ctk",
        "f32",
        "-ctv",
        "f32",
        "-fa",
        "off",
    )
    with serve(target, tmp_path / "log.txt", *options) as server:
        done = server.complete(text, n_predict=1, n_probs=20)
    likeliest = done["completion_probabilities"][0]["top_logprobs"]
    errors = {
        which: max(abs(one["logprob"] - rows[one["id"]]) for one in likeliest) for which, rows in expected.items()
    }
    assert errors[None] < 1e-3 < 0.1 < errors[False]


def test_wrong_model_boundary_version_or_kind_is_refused_in_one_line(models, tmp_path):
    model, path = models["llama"], tmp_path / "fit.gguf"

    def refusal(gguf_path, boundary=B, adapter=path) -> str:
        with pytest.raises(PopError) as error:
            PopLlama(str(gguf_path), pop_boundary=boundary, pop_adapter=adapter, **EXACT)
        assert "\n" not in str(error.value)
        return str(error.value)

    write(model, path, B)
    assert "was fitted for boundary 2, this model is pruned at 3: give both the same" in refusal(model.gguf, B + 1)
    assert "model arch and LoRA arch mismatch" in refusal(models["qwen3"].gguf)
    assert "does not exist in base model" in refusal(models["bundled"].gguf) or "incorrect shape" in refusal(
        models["bundled"].gguf
    )
    assert "cannot open" in refusal(model.gguf, adapter=tmp_path / "none.gguf")
    assert "expect adapter.type to be 'pop', but got: lora" in refusal(
        model.gguf, adapter=relabelled(path, tmp_path / "lora.gguf", "lora")
    )
    assert "its version is missing" in refusal(model.gguf, adapter=relabelled(path, tmp_path / "bare.gguf", "pop"))
    (tmp_path / "damaged.gguf").write_bytes(path.read_bytes()[:-100])
    assert "not within the file bounds" in refusal(model.gguf, adapter=tmp_path / "damaged.gguf")
    write_adapter(path, model.torch_model, B, make_differences(model, B), "0" * 16)
    assert "it was fitted for another model" in refusal(model.gguf)
    write_adapter(path, model.torch_model, B + 1, make_differences(model, B), library.fingerprint(model.gguf))
    assert "is no weight of a layer above its boundary 3" in refusal(model.gguf, B + 1)
    with pytest.raises(PopError, match="names no file"):
        PopLlama(str(model.gguf), pop_boundary=B, pop_adapter=True, **EXACT)


def test_no_engine_takes_it_for_a_lora(models, stock, tmp_path):
    model = models["llama"]
    write(model, tmp_path / "fit.gguf", B)
    code = """
import json, sys, llama_cpp
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), llama_cpp.llama_model_default_params())
print(json.dumps(bool(llama_cpp.llama_adapter_lora_init(model, sys.argv[2].encode()))))
"""
    assert stock(code, model.gguf, tmp_path / "fit.gguf") is False


def samples_of(model, count=20) -> list[Sample]:
    return [Sample(tuple(model.tokens(40, seed)), 24) for seed in range(count)]


def test_closed_form_is_ridge_regression_towards_the_weights(models):
    model = models["qwen3"]
    samples = samples_of(model)
    (first, *_), n_layer = fit.fit_values(model.torch_model, samples, B, rank=999), len(model.layers)
    projection = first.projection
    assert projection.name == f"model.layers.{B + 1}.self_attn.v_proj" and n_layer == 6
    x, y = [], []
    for i, sample in enumerate(samples):
        if i % 10 == 9:
            continue  # This text is held out of the fit.
        with torch.no_grad():
            states = model.torch_model(torch.tensor([sample.tokens]), output_hidden_states=True).hidden_states
            norm = model.layers[B + 1].input_layernorm
            x.append(norm(states[B])[0].double())
            y.append(projection.module(norm(states[B + 1]))[0].double())
    x, y, w = torch.cat(x), torch.cat(y), projection.module.weight.double()
    ridge = first.lam * (x * x).sum() / x.shape[1]
    stacked_x = torch.cat([x, ridge.sqrt() * torch.eye(x.shape[1])])
    expected = (torch.linalg.lstsq(stacked_x, torch.cat([y, ridge.sqrt() * w.T])).solution.T - w).detach()
    assert torch.allclose(first.b.double() @ first.a.double(), expected, atol=1e-4 * float(expected.abs().max()))
    assert first.lam in fit.LAMBDAS and first.error_after <= first.error_before


def test_distillation_lowers_the_divergence(models):
    model = models["llama"]
    samples = samples_of(model, 12)
    start = fit.fit_values(model.torch_model, samples, B, rank=8)

    def divergence(differences):
        with torch.no_grad():
            return sum(
                float(distill._compute_divergence(model.torch_model, model.layers, sample, B, differences))
                for sample in samples
            )

    before = divergence(start)
    trained = distill.distill(model.torch_model, samples, B, start, steps=30, rank=8)
    assert divergence(trained) < 0.9 * before
    assert {d.projection.kind for d in trained} == {"key", "value"} and not any(d.a.requires_grad for d in trained)


def test_projections_that_the_model_does_not_use_are_left_out(models):
    model = models["llama"]
    samples = samples_of(model, 10)
    unused = torch.nn.ModuleDict({name: torch.nn.Linear(64, 8) for name in ("k_proj", "v_proj")})
    model.layers[-1].register_module("unused", unused)
    try:
        projections = fit.find_projections(model.torch_model, B)
        start = fit.fit_values(model.torch_model, samples, B, rank=2)
        trained = distill.distill(model.torch_model, samples, B, start, steps=2, rank=2)
    finally:
        del model.layers[-1].unused
    assert sum(".unused." in projection.name for projection in projections) == 2
    assert trained and not any(".unused." in difference.projection.name for difference in [*start, *trained])


def test_convert_writes_both_files_and_quantized_ones_take_the_adapter(tmp_path, capsys):
    source = ROOT / "models" / "lab-llama-12l"
    common = ["--boundary", "6", "--no-importance", "--calibration-samples", "20", "--calibration-tokens", "128"]
    target = tmp_path / "fitted-q8.gguf"
    assert (
        main(
            ["convert", str(source), *common, "--outtype", "q8_0", "--fit-kv", "--rank", "4", "--outfile", str(target)]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "fitted-q8.pop-b6.gguf" in out and "model.layers.7.self_attn.v_proj: error on held-out texts" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fitted-q8.gguf", "fitted-q8.pop-b6.gguf"]
    assert (
        main(
            [
                "convert",
                str(source),
                "--boundary",
                "6",
                "--no-importance",
                "--outtype",
                "q4_k_m",
                "--outfile",
                str(tmp_path / "q4.gguf"),
            ]
        )
        == 0
    )
    llm = PopLlama(str(tmp_path / "q4.gguf"), pop_adapter=tmp_path / "fitted-q8.pop-b6.gguf", n_ctx=64, verbose=False)
    assert llm.pop.adapters == (6,)
    llm.close()
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl who had a red ball. " * 20)
    command = [
        "eval",
        str(target),
        str(text),
        "--context",
        "64",
        "--samples",
        "2",
        "--threads",
        "1",
        "--boundary",
        "6,8",
    ]
    assert main([*command, "--adapter", str(tmp_path / "fitted-q8.pop-b6.gguf")]) == 0
    assert "6 (fitted)" in capsys.readouterr().out


def test_fitting_refuses_what_it_cannot_do(models, capsys, tmp_path):
    model = models["llama"]
    with pytest.raises(PopError, match="9 texts are too few"):
        fit.fit_values(model.torch_model, samples_of(model, 9), B, rank=4)
    with pytest.raises(PopError, match="no key and value projections to fit above layer 5"):
        fit.find_projections(model.torch_model, 5)
    for options, message in (
        (["--distill-steps", "5"], "give --fit-kv too"),
        (["--fit-kv", "--rank", "0"], "--rank 0 is out of range"),
    ):
        assert main(["convert", str(tmp_path), *options]) == 1
        assert message in capsys.readouterr().err
