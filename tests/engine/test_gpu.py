"""On a graphics device a pruned prompt gets the logits that it gets on the CPU, up to the device's rounding.

A device computes matrix products in fewer bits (CUDA takes TF32, for example), and random models amplify rounding. So
each comparison has a yardstick: the error of the whole model on the device against the CPU. Pruning may double it. If a
boundary were one layer off, the logits would differ by a tenth and more.

Run it with a build for the device: `python -m pytest tests/engine/test_gpu.py`, or `make vulkan` for Mesa's device on
the CPU.
"""

import ctypes
import functools

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from pypop_gguf import PopLlama, native, parent
from pypop_gguf.fitting.products import observing
from tests.support.engine import F16, F32, Q8_0, Engine, llama_cpp
from tests.support.pop_reference import squared_error
from tests.support.report import report
from tests.support.scaled_adapter import write_scaled

find = parent.ggml_library().ggml_backend_dev_by_type
find.restype = ctypes.c_void_p
if not find(1) and not find(2):  # GGML_BACKEND_DEVICE_TYPE_GPU, _IGPU
    pytest.skip("this build finds no graphics device", allow_module_level=True)

ALL = 99
N_PROMPT, N_STEPS = 41, 4
NAMES = ["llama", "qwen3", "gemma3", "mixtral", "deepseek2", "lfm2", "bundled"]
FLASH_ON, FLASH_OFF = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
MOST = 1e-3  # No device may be further off than this, whatever the whole model's own error is.


def read(model, boundary, n_gpu_layers, *, n_steps=N_STEPS, ends=None, adapter=None, continues=True, **parameters):
    """Returns the logits after a prompt and after each of some further tokens, F32 [1 + n_steps, n_vocab]."""
    tokens = model.tokens(N_PROMPT + n_steps, seed=3)
    with Engine(model.gguf, boundary, n_gpu_layers=n_gpu_layers, **parameters) as engine:
        native.set_continuation(engine.context, continues)
        if ends:
            native.set_ends(engine.context, n_head=ends[0], n_tail=ends[1])
        if adapter:
            native.load_adapter(engine.context, engine.model, adapter)
            native.set_boundary(engine.context, boundary)
        rows = [engine.prefill(tokens[:N_PROMPT])]
        rows += [engine.step(tokens[N_PROMPT + i], N_PROMPT + i) for i in range(n_steps)]
        expected = 0 if boundary is None else N_PROMPT - sum(ends or (0, 1))
        assert engine.n_pruned == expected
    return np.stack(rows)


@functools.cache
def yardstick(path, n_vocab, n_gpu_layers, parameters) -> float:
    """Returns the error of the whole model on the device against the CPU."""
    model = _Model(path, n_vocab)
    return squared_error(*(read(model, None, n, **dict(parameters)) for n in (n_gpu_layers, 0)))


class _Model:
    def __init__(self, gguf, n_vocab):
        self.gguf, self.n_vocab = gguf, n_vocab

    def tokens(self, count, seed=0):
        return np.random.default_rng(seed).integers(3, self.n_vocab, count).tolist()


def compare(
    model,
    boundary,
    n_gpu_layers=ALL,
    reference=None,
    n_steps=N_STEPS,
    ends=None,
    adapter=None,
    rounding=0,
    **parameters,
):
    """Compares a pruned prompt on the device with the CPU, or with ``reference``, logits from elsewhere.

    Args:
        rounding: Error that weights in fewer bits than the model's may add to what the whole model has on the device.
    """
    options = dict(n_steps=n_steps, ends=ends, adapter=adapter, **parameters)
    found = read(model, boundary, n_gpu_layers, **options)
    expected = read(model, boundary, 0, **options) if reference is None else reference
    error = squared_error(found, expected)
    whole = yardstick(model.gguf, model.n_vocab, n_gpu_layers, (("n_steps", n_steps), *sorted(parameters.items())))
    report(model=model.name, boundary=boundary, n_gpu_layers=n_gpu_layers, error=error, whole=whole)
    assert error <= min(2 * whole + 1e-6, MOST) + rounding


@pytest.mark.parametrize("flash_attention", [FLASH_OFF, FLASH_ON], ids=["plain", "flash"])
@pytest.mark.parametrize("name", NAMES)
def test_every_boundary_equals_the_cpu(reference_models, name, flash_attention):
    model = reference_models[name]
    n_layer = 12 if name == "bundled" else 7 if name == "gemma3" else 6
    for boundary in range(1, n_layer):
        compare(model, boundary, flash_attn_type=flash_attention)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_layers_on_both_sides_of_the_boundary(reference_models, name):
    model = reference_models[name]
    for n_gpu_layers in range(1, 8):
        for boundary in (2, 4):
            compare(model, boundary, n_gpu_layers)


@pytest.mark.parametrize("name", NAMES)
def test_continued_equals_repeated(reference_models, name):
    model = reference_models[name]
    compare(model, 3, reference=read(model, 3, ALL, continues=False))


@pytest.mark.parametrize("ends", [(0, 8), (4, 1), (5, 19)])
@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek2"])
def test_head_and_tail(reference_models, name, ends):
    compare(reference_models[name], 3, ends=ends)


@pytest.mark.parametrize("n_gpu_layers", [3, 5, ALL])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_adapter(reference_models, tmp_path, name, n_gpu_layers):
    """The further inputs are states of layers 0 to 2. With 3 or 5 layers on the device, the CPU has all or some.

    The CPU rounds states to 8 bits before it multiplies them with weights in Q8_0, and a device may not.
    """
    model = reference_models[name]
    kinds = (GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0)
    exact, adapter = (write_scaled(tmp_path / f"{kind.name}.gguf", model.gguf, 3, 0.5, kind) for kind in kinds)
    compare(model, 3, n_gpu_layers, adapter=exact)
    rounding = squared_error(*(read(model, 3, 0, adapter=file) for file in (adapter, exact)))
    assert rounding < 1e-4
    compare(model, 3, n_gpu_layers, adapter=adapter, rounding=rounding)
    changed = squared_error(read(model, 3, n_gpu_layers, adapter=adapter), read(model, 3, n_gpu_layers))
    assert changed > 1e-3


# States of each type may add as much to the error as test_completion.py allows on the CPU.
@pytest.mark.parametrize(("states", "rounding"), [("f32", 0), ("f16", 1e-6), ("bf16", 1e-5)])
@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("n_gpu_layers", [5, 9, ALL])
def test_completed_cache_is_the_whole_models(reference_models, n_gpu_layers, joins, states, rounding):
    """The states that completion needs lie where the boundary layer lies, on the CPU for 5 of 12 layers.

    With ``joins``, the first token that is decoded joins the last chunk.
    """
    model = reference_models["bundled"]
    tokens = model.tokens(N_PROMPT + N_STEPS, seed=3)
    with Engine(model.gguf, 4, n_gpu_layers=n_gpu_layers) as engine:
        native.set_completion(engine.context, states)
        engine.prefill(tokens[:N_PROMPT])
        n_joined = 10 if joins else 0
        assert native.complete(engine.context, N_PROMPT - n_joined) == N_PROMPT - n_joined
        native.complete_with_next(engine.context, n_joined)
        found = np.stack([engine.step(tokens[i], i) for i in range(N_PROMPT, len(tokens))])
        assert native.n_completed(engine.context) == N_PROMPT
    whole = yardstick(model.gguf, model.n_vocab, n_gpu_layers, (("n_steps", N_STEPS),))
    error = squared_error(found, read(model, None, 0)[1:])
    report(model=model.name, boundary=4, n_gpu_layers=n_gpu_layers, error=error, whole=whole)
    assert error <= min(2 * whole + 1e-6, MOST) + rounding


@pytest.mark.parametrize("type_kv", [F32, F16, Q8_0])
def test_types_of_cache(reference_models, type_kv):
    """On a cache in Q8_0 a device may round queries to 8 bits, which our attention on the CPU does not."""
    model = reference_models["bundled"]
    flash_attention = FLASH_ON if type_kv == Q8_0 else FLASH_OFF
    rounding = 0.0
    if type_kv == Q8_0:
        options = dict(flash_attn_type=flash_attention)
        rounding = squared_error(*(read(model, 4, 0, type_k=kind, type_v=kind, **options) for kind in (Q8_0, F16)))
        assert rounding < 1e-4
    compare(model, 4, rounding=rounding, type_k=type_kv, type_v=type_kv, flash_attn_type=flash_attention)


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
def test_several_sequences_in_a_batch(reference_models, name, unified):
    model = reference_models[name]
    prompts = [model.tokens(count, seed=count) for count in (37, 52, 20)]

    def together(boundary, n_gpu_layers) -> np.ndarray:
        options = dict(n_seq_max=3, kv_unified=unified, swa_full=False, n_gpu_layers=n_gpu_layers)
        with Engine(model.gguf, boundary, **options) as engine:
            entries = [
                (token, i, s, i == len(tokens) - 1)
                for s, tokens in enumerate(prompts)
                for i, token in enumerate(tokens)
            ]
            rows = [*engine.decode(entries).values()]
            for step in range(3):
                written = [(7 + step, len(tokens) + step, s, True) for s, tokens in enumerate(prompts)]
                rows += engine.decode(written).values()
            return np.stack(rows)

    error, whole = (squared_error(*(together(boundary, n) for n in (ALL, 0))) for boundary in (3, None))
    report(model=name, boundary=3, n_gpu_layers=ALL, error=error, whole=whole)
    assert error <= min(2 * whole + 1e-6, MOST)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bundled"])
def test_long_answers_reuse_the_graph(reference_models, name):
    compare(reference_models[name], 3, n_steps=60)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_states_move_between_the_device_and_the_cpu(reference_models, name):
    model = reference_models[name]
    tokens = model.tokens(N_PROMPT + 1)
    rows = []
    for source, target in ((0, 0), (ALL, 0), (0, ALL)):
        with Engine(model.gguf, 3, n_gpu_layers=source) as first, Engine(model.gguf, 3, n_gpu_layers=target) as second:
            first.prefill(tokens[:N_PROMPT])
            second.restore(first.state())
            rows.append(second.step(tokens[N_PROMPT], N_PROMPT))
    whole = yardstick(model.gguf, model.n_vocab, ALL, (("n_steps", N_STEPS),))
    for row in rows[1:]:
        error = squared_error(row, rows[0])
        report(model=name, boundary=3, n_gpu_layers=ALL, error=error, whole=whole)
        assert error <= min(2 * whole + 1e-6, MOST)


def test_a_trained_model_writes_the_same_answer(served_gguf):
    def answer(n_gpu_layers):
        llm = PopLlama(str(served_gguf), pop_boundary=8, n_ctx=512, n_gpu_layers=n_gpu_layers, verbose=False)
        text = llm.create_completion(
            "Once upon a time, there was a little girl named Lily.", max_tokens=40, temperature=0
        )
        assert llm.timings.pruned_tokens > 5
        return text["choices"][0]["text"]

    assert answer(-1) == answer(0)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_what_a_fit_observes(reference_models, name):
    """With no layer on the device, llama.cpp still copies weights there for the products of a long batch."""
    model = reference_models[name]
    text = model.tokens(40)

    def observe(n_gpu_layers, op_offload):
        options = dict(n_gpu_layers=n_gpu_layers, op_offload=op_offload, offload_kqv=op_offload)
        llm = PopLlama(str(model.gguf), pop=False, n_ctx=128, type_k=0, type_v=0, verbose=False, **options)
        with observing(llm, 3) as products:
            products.evaluate(text, 3)
            inputs = {weight: products.get(weight)[0].copy() for weight in products.weights}
            products.evaluate(text, products.n_layer)
            return inputs, {weight: products.get(weight)[1].copy() for weight in products.weights}

    expected = observe(0, False)
    assert expected[0]
    for found in (observe(-1, True), observe(0, True)):
        for device, cpu in zip(found, expected, strict=True):
            assert device.keys() == cpu.keys()
            for weight in cpu:
                assert squared_error(device[weight], cpu[weight]) <= MOST
