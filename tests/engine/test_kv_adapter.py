"""Adapters of version 1: the engine against PyTorch, the graphs that they change, and the files that it refuses."""

import shutil

import gguf
import llama_cpp
import numpy as np
import pytest
import torch

from pypop_gguf import PopError, PopLlama, library, native
from pypop_gguf.call import Call
from pypop_gguf.gguf_files.metadata import PopMetadata
from pypop_gguf.gguf_files.writer import copy_with_metadata
from tests.support import pop_reference, tiny_models
from tests.support.engine import Engine
from tests.support.pair_adapter import Difference, write_adapter
from tests.support.projections import find_projections
from tests.support.report import report
from tests.support.server import serve

NAMES = ["llama", "qwen3", "gemma3", "mixtral", "deepseek2", "phi3"]
N_PROMPT, N_TOKENS, B = 70, 74, 2
EXACT = dict(n_ctx=256, type_k=0, type_v=0, flash_attn=False, n_threads=1, n_threads_batch=1, verbose=False)
_written: dict = {}  # for each model and boundary: the bytes of an adapter's file, and what PyTorch adds to weights


@pytest.fixture(scope="module")
def models(reference_models, tmp_path_factory):
    return {**reference_models, **tiny_models.write(tmp_path_factory.mktemp("fused"), tiny_models.fused_configs())}


def make_differences(model, boundary: int, rank: int = 3) -> list[Difference]:
    """Make large random differences of keys and values, of numbers that float16 holds exactly."""
    generator = torch.Generator().manual_seed(boundary)
    result = []
    for projection in find_projections(model.torch_model, boundary):
        n_out, n_in = projection.module.weight.shape
        a = torch.randint(-8, 9, (rank, n_in), generator=generator) / 32
        b = torch.zeros(n_out, rank)
        b[projection.rows] = (
            torch.randint(-8, 9, (projection.rows.stop - projection.rows.start, rank), generator=generator) / 32
        )
        result.append(Difference(projection, a, b))
    return result


def write(model, target, boundary: int) -> dict:
    """Write an adapter of random differences; return what PyTorch has to add to each module's weight to do the same."""
    key = model.gguf, boundary
    if key not in _written:  # Writing takes seconds, so each file is kept.
        differences = make_differences(model, boundary)
        write_adapter(target, model.torch_model, boundary, differences, library.fingerprint(model.gguf))
        added: dict = {}
        for d in differences:
            added[d.projection.module] = added.get(d.projection.module, 0) + d.b @ d.a
        _written[key] = target.read_bytes(), added
    content, added = _written[key]
    target.write_bytes(content)
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
        report(model=name, boundary=boundary, error=error)
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
