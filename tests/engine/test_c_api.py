"""The C API of csrc/llama-pop.h: what llama_pop_open() decides, and that no bad argument ends the process."""

import ctypes
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pypop_gguf import PopError, native
from tests.support.engine import Engine, llama_cpp
from tests.support.gguf_files import STRING, UINT32, write_model
from tests.support.paths import ROOT

N_LAYER, N_BATCH = 6, 64  # of gguf_files.write_model() and of contexts here
VERSION = ("pop.version", 1, UINT32)
GOLDEN = ROOT / "tests" / "golden"
HEADER = (ROOT / "csrc" / "llama-pop.h").read_text()


@pytest.fixture
def opened(tmp_path):
    """Opens a random model whose file has these keys, in a context that was pruned at 3 with other ends before."""
    engines = []

    def open_engine(*keys, **parameters) -> Engine:
        path = write_model(tmp_path / f"{len(engines)}.gguf", *keys)
        engines.append(Engine(path, boundary=3, **{"n_ctx": N_BATCH, "n_batch": N_BATCH, **parameters}))
        native.set_ends(engines[-1].context, n_head=2, n_tail=4)
        return engines[-1]

    yield open_engine
    for engine in engines:
        engine.__exit__()


def n_pruned(engine, count=20) -> int:
    """Tokens that a prompt of ``count`` has pruned."""
    llama_cpp.llama_memory_clear(engine.memory, True)
    before = engine.n_pruned
    engine.prefill([3 + i % 20 for i in range(count)])
    return engine.n_pruned - before


# llama_pop_open


@pytest.mark.parametrize(
    ("asked", "of_file", "boundary", "source"),
    [
        (native.DEFAULT, 4, 4, "file"),
        (native.DEFAULT, N_LAYER, N_LAYER, "off"),
        (native.DEFAULT, None, N_LAYER, "off"),
        (native.OFF, 4, N_LAYER, "off"),
        (N_LAYER, 4, N_LAYER, "off"),
        (2, 4, 2, "argument"),
        (native.LOSSLESS, 4, N_LAYER - 1, "argument"),
    ],
)
def test_open_decides_the_boundary_and_sets_it(opened, asked, of_file, boundary, source):
    engine = opened(*([VERSION, ("pop.boundary", of_file, UINT32)] if of_file else []))
    choice = native.open_context(engine.context, None, boundary=asked)
    assert (choice.boundary, choice.source) == (boundary, source)
    assert native.get_boundary(engine.context) == boundary
    assert n_pruned(engine) == (0 if boundary == N_LAYER else 19)


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_open_without_a_boundary_takes_the_exact_one_where_upper_layers_share_a_cache(shared_cache_models, name):
    with Engine(shared_cache_models[name].gguf) as engine:
        choice = native.open_context(engine.context, None)
        lossless = native.lossless_boundary(engine.model)
        assert (choice.boundary, choice.source) == (lossless, "lossless") and lossless < native.n_layer(
            engine.model
        ) - 1


def test_open_takes_ends_from_the_request_then_from_the_file_then_none(opened):
    ends = [("pop.head", 1, UINT32), ("pop.tail", 3, UINT32), ("pop.min_tokens", 24, UINT32)]
    for keys, request, expected in (
        ([], {}, (0, 1, 0)),
        (ends, {}, (1, 3, 24)),
        (ends, dict(n_head=0, n_tail=5, min_tokens=7), (0, 5, 7)),
    ):
        engine = opened(VERSION, *keys)
        choice = native.open_context(engine.context, None, boundary=4, **request)
        assert (choice.n_head, choice.n_tail, choice.min_tokens) == expected
        assert n_pruned(engine) == 20 - choice.n_head - choice.n_tail


def unchanged(engine) -> bool:
    return native.get_boundary(engine.context) == 3 and n_pruned(engine) == 20 - 2 - 4


@pytest.mark.parametrize(
    ("keys", "advice"),
    [
        ([("pop.version", 2, UINT32), ("pop.boundary", 4, UINT32)], "update pypop-gguf"),
        ([VERSION, ("pop.boundary", 0, UINT32)], "not an integer from 1 to 6"),
        ([VERSION, ("pop.boundary", 7, UINT32)], "not an integer from 1 to 6"),
        ([VERSION, ("pop.boundary", "four", STRING)], "not an integer from 1 to 6"),
        ([("pop.boundary", 4, UINT32)], "without pop.version"),
        ([VERSION, ("pop.tail", 0, UINT32)], "pop.tail is not an integer from 1"),
        ([VERSION, ("pop.boundary", 4, UINT32), ("pop.tail", 65, UINT32)], "pop.tail is 65: give .* 1 to 64 .n_batch."),
    ],
    ids=["newer-version", "zero", "above-the-last", "text", "no-version", "no-tail", "tail-above-n_batch"],
)
def test_unusable_key_is_refused_and_changes_nothing(opened, keys, advice):
    engine = opened(*keys)
    with pytest.raises(PopError, match=advice):
        native.open_context(engine.context, None)
    assert unchanged(engine)
    # with every value given the file is not asked
    assert native.open_context(engine.context, None, boundary=2, n_head=0, n_tail=1, min_tokens=0).boundary == 2


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (dict(boundary=7), "boundary 7 is out of range: choose 1 to 6"),
        (dict(boundary=-3), "boundary -3 is out of range: choose 1 to 6"),
        (dict(boundary=2**31 - 1), "boundary 2147483647 is out of range"),
        (dict(n_head=-2), "pop_head is -2: give a whole number, 0 to 2147483647"),
        (dict(n_tail=0), "pop_tail is 0: give a whole number, 1 to 64 .n_batch."),
        (dict(n_tail=65), "pop_tail is 65: give a whole number, 1 to 64 .n_batch."),
        (dict(min_tokens=-2), "pop_min_tokens is -2: give a whole number, 0 to 2147483647"),
    ],
)
def test_request_out_of_range_is_refused_and_changes_nothing(opened, request_, reason):
    engine = opened()
    with pytest.raises(PopError, match=reason):
        native.open_context(engine.context, None, **{"boundary": 4, **request_})
    assert unchanged(engine)


# Adapters


@pytest.mark.parametrize(
    ("model", "adapter"),
    [
        ("model.gguf", "model.pop-b8.gguf"),
        ("a.b/model", "a.b/model.pop-b8.gguf"),
        ("a.b/m.q8_0.gguf", "a.b/m.q8_0.pop-b8.gguf"),
        ("a/.hidden", "a/.hidden.pop-b8.gguf"),
        ("ä/ü.gguf", "ä/ü.pop-b8.gguf"),
    ],
)
def test_adapter_path_replaces_the_suffix(model, adapter):
    assert native.adapter_path(model, 8) == Path(adapter)


def test_adapter_path_tells_its_length_and_stays_in_its_buffer():
    ffi, functions = native._bound()
    buffer = ffi.new("char[8]", b"#######")
    assert functions.llama_pop_adapter_path(b"model.gguf", 8, buffer, 6) == len("model.pop-b8.gguf")
    assert bytes(ffi.buffer(buffer)) == b"model\0#\0"
    for path, boundary in ((b"", 8), (b"model.gguf", 0)):
        assert functions.llama_pop_adapter_path(path, boundary, ffi.NULL, 0) == -1 and native.last_error()


@pytest.fixture
def golden(tmp_path):
    """A model with an adapter beside it, and a context that prunes nothing."""
    model = Path(shutil.copy(GOLDEN / "pop-v1.gguf", tmp_path / "model.gguf"))
    shutil.copy(GOLDEN / "pop-v1.pop-b1.gguf", native.adapter_path(model, 1))
    with Engine(model, n_ctx=64) as engine:
        yield model, engine


def prompt_logits(engine) -> np.ndarray:
    llama_cpp.llama_memory_clear(engine.memory, True)
    return engine.prefill([3, 5, 7, 11, 2, 9, 4, 8, 1, 6, 13, 12])


def test_open_loads_the_adapter_beside_the_model_if_it_prunes(golden):
    path, engine = golden
    assert not native.open_context(engine.context, None).has_adapter
    without = prompt_logits(engine)
    assert not native.open_context(engine.context, path, boundary=native.OFF).has_adapter
    assert not native.open_context(engine.context, path, boundary=2).has_adapter  # no file for this boundary
    assert native.open_context(engine.context, path).has_adapter
    assert not np.array_equal(prompt_logits(engine), without)


def test_unusable_adapter_beside_the_model_is_refused_and_changes_nothing(golden):
    path, engine = golden
    adapter = native.adapter_path(path, 1)
    adapter.write_bytes(adapter.read_bytes()[:200])
    with pytest.raises(PopError, match=re.escape(str(adapter))):
        native.open_context(engine.context, path)
    assert native.get_boundary(engine.context) == native.n_layer(engine.model)


def test_freeing_an_adapter_that_a_context_uses_leaves_it_in_use(golden):
    path, engine = golden
    native.set_boundary(engine.context, 1)
    adapter = native.adapter_init(engine.model, native.adapter_path(path, 1))
    native.add_adapter(engine.context, adapter)
    before = prompt_logits(engine)
    address = int(native._bound()[0].cast("uintptr_t", adapter))
    llama_cpp.llama_adapter_lora_free(ctypes.cast(address, ctypes.POINTER(ctypes.c_void_p)))
    assert np.array_equal(prompt_logits(engine), before)
    native.clear_adapters(engine.context)
    assert not np.array_equal(prompt_logits(engine), before)


def test_adapter_of_another_model_is_refused(golden, opened):
    path, engine = golden
    adapter = native.adapter_init(engine.model, native.adapter_path(path, 1))
    with pytest.raises(PopError, match=r"no adapter that llama_pop_adapter_init.. made for this context's model"):
        native.add_adapter(opened().context, adapter)


# Arguments


def function_names() -> list[str]:
    return re.findall(r"^LLAMA_API .*?\b(llama_pop_\w+)\(", HEADER, re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in function_names() if name != "llama_pop_last_error"])
def test_null_is_refused_with_a_reason(opened, name):
    ffi, functions = native._bound()
    with pytest.raises(PopError):
        native.set_boundary(opened().context, 99)  # leaves another reason
    function = getattr(functions, name)
    arguments = [ffi.new(f"{kind.cname} *")[0] for kind in ffi.typeof(function).args]
    result = function(*arguments)
    failed = math.isnan(result) if isinstance(result, float) else result in (0, -1, ffi.NULL)
    assert failed and native.last_error() == "an argument is NULL"


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (dict(boundary=0), "boundary is 0: give 1 to 6"),
        (dict(boundary=7), "boundary is 7: give 1 to 6"),
        (dict(boundary=2**31 - 1), "boundary is 2147483647: give 1 to 6"),
        (dict(n_seqs=0), "n_seqs is 0: give 1 to 2"),
        (dict(n_seqs=-1), "n_seqs is -1: give 1 to 2"),
        (dict(n_seqs=3), "n_seqs is 3: give 1 to 2"),
        (dict(n_tokens=0), "n_tokens is 0: give 2 to 16"),
        (dict(n_tokens=17), "n_tokens is 17: give 2 to 16"),
        (dict(n_outputs=-1), "n_outputs is -1: give 0 to 8"),
        (dict(n_outputs=9), "n_outputs is 9: give 0 to 8"),
    ],
)
def test_size_of_a_graph_out_of_range_is_refused(opened, sizes, reason):
    engine = opened(n_seq_max=2, n_ubatch=16)
    fine = dict(boundary=4, n_tokens=8, n_seqs=2, n_outputs=0)
    pruned = native.graph_flops(engine.context, **fine)
    with pytest.raises(PopError, match=reason):
        native.graph_flops(engine.context, **{**fine, **sizes})
    assert 0 < pruned < native.graph_flops(engine.context, **{**fine, "n_outputs": 8})
    assert native.graph_flops(engine.context, **{**fine, "boundary": N_LAYER}) > pruned


def test_graph_of_a_context_that_runs_whole_is_the_whole_one(opened):
    sizes = dict(n_tokens=8, n_seqs=1, n_outputs=0)
    engine = opened(embeddings=True)
    pruned, whole = (native.graph_flops(engine.context, boundary=boundary, **sizes) for boundary in (3, N_LAYER))
    assert pruned == whole


def test_context_without_a_cache_is_refused(tmp_path):
    with Engine(write_model(tmp_path / "a.gguf", architecture="bert")) as engine:
        assert not engine.memory
        with pytest.raises(PopError, match="no cache to fill"):
            native.graph_flops(engine.context, boundary=3, n_tokens=8, n_seqs=1, n_outputs=0)
        with pytest.raises(PopError, match="attends in both directions"):
            native.set_boundary(engine.context, 3)
        assert native.open_context(engine.context, tmp_path / "a.gguf").source == "off"


@pytest.mark.parametrize("seq_id", [-1, 2])
def test_sequence_that_the_context_has_not_is_refused(opened, seq_id):
    with pytest.raises(PopError, match=f"seq_id is {seq_id}: give 0 to 1"):
        native.set_sequence(opened(n_seq_max=2).context, seq_id, prunes=False)


@pytest.mark.parametrize("boundary", [native.DEFAULT, native.LOSSLESS, 7])
def test_only_open_takes_other_boundaries_than_layers(opened, boundary):
    engine = opened()
    with pytest.raises(PopError, match="out of range: choose 1 to 6"):
        native.set_boundary(engine.context, boundary)
    assert unchanged(engine)


@pytest.mark.parametrize(("n_head", "n_tail"), [(-1, 1), (0, 0)])
def test_ends_out_of_range_are_refused(opened, n_head, n_tail):
    engine = opened()
    with pytest.raises(PopError, match="give at least 0 and at least 1"):
        native.set_ends(engine.context, n_head=n_head, n_tail=n_tail)
    assert unchanged(engine)


# native.py and the header


def test_python_has_a_function_for_each_of_the_header_in_its_order():
    renamed = {"open": "open_context", "supports": "refusal"}
    expected = [name.removeprefix("llama_pop_") for name in function_names()]
    source = Path(native.__file__).read_text()
    defined = re.findall(r"^def ([a-z]\w*)\(", source, re.MULTILINE)
    assert [name for name in defined if name not in ("declarations", "load_adapter")] == [
        renamed.get(name, name) for name in expected
    ]


def test_python_has_the_constants_of_the_header():
    functions = native._bound()[1]
    assert (functions.LLAMA_POP_OFF, functions.LLAMA_POP_DEFAULT, functions.LLAMA_POP_LOSSLESS) == (
        native.OFF, native.DEFAULT, native.LOSSLESS,
    )  # fmt: skip
    named = [getattr(functions, f"LLAMA_POP_SOURCE_{source.upper()}") for source in native.SOURCES]
    assert named == list(range(len(native.SOURCES)))
    for name, value in native.STATES.items():
        assert getattr(functions, f"LLAMA_POP_STATES_{name.upper()}") == value


BIND_AT_ONCE = """
import sys, threading
from pypop_gguf import native

sys.setswitchinterval(1e-6)
together, found = threading.Barrier(4), []

def bind():
    together.wait()
    found.append(native._bound())

threads = [threading.Thread(target=bind) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(found) == 4 and len({id(ffi) for ffi, _ in found}) == 1
"""


def test_threads_that_use_the_library_first_at_once_share_its_types():
    """It runs in a new process, since the library is bound only once in each."""
    subprocess.run([sys.executable, "-c", BIND_AT_ONCE], check=True, timeout=60)
