"""A library for another platform gives what PyTorch gives, and what the library for this machine gives.

`make arm` compiles it for Linux on aarch64 and runs these tests, in which qemu stands in for three kinds of processors.
`make windows` compiles it for Windows on x86-64, and wine runs it. ggml loads the most capable of its CPU libraries.
The models are those of test_reference.py, and so is the bound.
"""

import shutil
from dataclasses import dataclass

import numpy as np
import pytest

from pypop_gguf import native
from pypop_gguf.gguf_files.quantize import quantize
from tests.engine.test_kv_adapter import write
from tests.support import emulation, pop_reference
from tests.support.engine import F16, F32, Q8_0, Engine, llama_cpp
from tests.support.pop_reference import squared_error
from tests.support.report import report
from tests.support.scaled_adapter import write_scaled

if not emulation.PROGRAMS:
    pytest.skip("libraries for other platforms are tested by `make arm` and `make windows`", allow_module_level=True)

NAMES = ["llama", "qwen3", "gemma3", "mixtral", "deepseek2", "lfm2", "bundled"]
N_PROMPT, N_TOKENS = 41, 44
FLASH_ON, FLASH_OFF = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED


@dataclass(frozen=True)
class Case:
    """A prompt of ``N_PROMPT`` tokens, tokens that follow it, and how both are read."""

    boundary: int
    head: int = 0
    tail: int = 1
    continues: bool = True
    type_kv: int = F32
    flash_attention: bool = False
    adapter: object = None

    def line(self, tokens: list[int]) -> str:
        flags = [self.continues, self.type_kv, self.flash_attention]
        adapter = emulation.name_of(self.adapter) if self.adapter else "-"
        words = [self.boundary, self.head, self.tail, *map(int, flags), adapter, N_PROMPT, *tokens]
        return " ".join(map(str, words))

    @property
    def n_pruned(self) -> int:
        return N_PROMPT - self.head - self.tail if self.boundary else 0


@pytest.fixture(params=emulation.EMULATORS)
def emulated(request, tmp_path):
    """Reads cases with the library for another platform.

    The fixture is a function of a model's file, its tokens, the cases and POP_KERNELS. It returns F32
    [cases, tokens, n_vocab].
    """

    def read(gguf, tokens, cases, kernels="off") -> np.ndarray:
        out = tmp_path / "logits.bin"
        lines = [emulation.name_of(gguf), *(case.line(tokens) for case in cases)]
        given = "".join(line + "\n" for line in lines).encode()
        n_pruned = emulation.run(request.param, "worker", emulation.name_of(out), given=given, kernels=kernels)
        assert [int(line) for line in n_pruned.split()] == [case.n_pruned for case in cases]
        return np.fromfile(out, np.float32).reshape(len(cases), len(tokens) - N_PROMPT + 1, -1)

    return read


def read_here(gguf, tokens, case) -> np.ndarray:
    """Returns what the library for this machine computes, F32 [tokens, n_vocab]."""
    parameters = dict(type_k=case.type_kv, type_v=case.type_kv)
    parameters["flash_attn_type"] = FLASH_ON if case.flash_attention else FLASH_OFF
    with Engine(gguf, case.boundary or None, n_gpu_layers=0, **parameters) as engine:
        if case.adapter:
            native.load_adapter(engine.context, engine.model, case.adapter)
            native.set_boundary(engine.context, case.boundary)
        rows = [engine.prefill(tokens[:N_PROMPT])]
        return np.stack(rows + [engine.step(tokens[i], i) for i in range(N_PROMPT, len(tokens))])


def check(model, case, actual, expected, bound=1e-6) -> None:
    error = squared_error(actual, expected)
    report(model=model.name, boundary=case.boundary, error=error)
    assert error <= bound, case


@pytest.mark.parametrize("continues", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_every_boundary_equals_pytorch(emulated, reference_models, name, continues):
    model = reference_models[name]
    tokens = model.tokens(N_TOKENS)
    cases = [Case(boundary, continues=continues) for boundary in range(1, len(model.layers))]
    for case, actual in zip(cases, emulated(model.gguf, tokens, cases)):
        expected = pop_reference.logits(model.torch_model, model.layers, tokens, case.boundary, N_PROMPT)
        check(model, case, actual, expected)


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek2"])
def test_head_and_tail_equal_pytorch(emulated, reference_models, name):
    model = reference_models[name]
    tokens = model.tokens(N_TOKENS, seed=1)
    cases = [Case(3, head, tail) for head, tail in ((0, 8), (4, 1), (5, 19))]
    for case, actual in zip(cases, emulated(model.gguf, tokens, cases)):
        ends = dict(head=case.head, tail=case.tail)
        expected = pop_reference.logits(model.torch_model, model.layers, tokens, 3, N_PROMPT, **ends)
        check(model, case, actual, expected)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_adapters(emulated, reference_models, tmp_path, name):
    """Version 1 adds differences, as PyTorch does. Version 3 has quantized weights, which this machine reads too."""
    model = reference_models[name]
    tokens = model.tokens(N_TOKENS, seed=2)
    added = write(model, tmp_path / "angepaßt.gguf", 3)
    scaled = write_scaled(tmp_path / "scaled.gguf", model.gguf, 3, 0.5)
    cases = [Case(3, adapter=tmp_path / "angepaßt.gguf"), Case(3, adapter=scaled), Case(3)]
    differences, replacements, plain = emulated(model.gguf, tokens, cases)
    expected = pop_reference.logits(model.torch_model, model.layers, tokens, 3, N_PROMPT, added=added)
    check(model, cases[0], differences, expected)
    check(model, cases[1], replacements, read_here(model.gguf, tokens, cases[1]))
    assert min(squared_error(plain, differences), squared_error(plain, replacements)) > 1e-3


# llama.cpp and our kernels round the states that they multiply with quantized weights to 8 bits, in another way on each
# processor. On this machine, which gives the expected results, llama.cpp's own kernels compute.
QUANTIZED = [(outtype, kernels, 1e-3) for outtype in ("q8_0", "q4_0", "q4_k_m") for kernels in ("off", "on")]


@pytest.mark.usefixtures("kernels_off")
@pytest.mark.parametrize(("outtype", "kernels", "bound"), [("f32", "off", 1e-5), *QUANTIZED])
def test_quantized_models_and_caches_equal_this_machines(emulated, reference_models, tmp_path, outtype, kernels, bound):
    model = reference_models["bundled"]
    target = shutil.copy(model.gguf, tmp_path / "Modell für Prüfungen.gguf")
    if outtype != "f32":
        quantize(model.gguf, target, outtype)
    tokens = model.tokens(N_TOKENS, seed=3)
    for type_kv, flash_attention in ((F32, False), (F16, True), (Q8_0, True)):
        cases = [Case(b, type_kv=type_kv, flash_attention=flash_attention) for b in (0, 3, 6)]
        there = emulated(target, tokens, cases, kernels)
        here = [read_here(target, tokens, case) for case in cases]
        whole, *errors = map(squared_error, there, here)
        for case, error in zip(cases[1:], errors):
            report(model=outtype, boundary=case.boundary, error=error, whole=whole)
        assert max(whole, *errors) <= bound
        others = [squared_error(there[i], here[j]) for i in range(3) for j in range(3) if i != j]
        assert min(others) > 10 * bound  # another boundary would be noticed
