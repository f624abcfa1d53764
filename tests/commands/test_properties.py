"""What holds for any prompt, however it is cut, shared, shifted, saved or cancelled. hypothesis draws the cases."""

import functools
import itertools
import random
import struct
from pathlib import Path

import gguf
import hypothesis
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz import gguf_cases
from pypop_gguf import Cancelled, PopLlama, native
from pypop_gguf.call import Call
from pypop_gguf.gguf_files.header import read_header
from pypop_gguf.gguf_files.metadata import PopMetadata, read_metadata
from pypop_gguf.gguf_files.writer import copy_with_metadata
from tests.support.engine import Engine, llama_cpp
from tests.support.gguf_files import raw_keys, raw_tensors
from tests.support.pop_reference import squared_error
from tools.architectures import identity_copy

BOUNDARY = 3
OTHER_SHAPE = 1e-7  # tests/engine/test_batches.py explains it.
F16_CACHE = 1e-5  # The caches of llama-cpp-python have 16 bits.
VISIBLE = 1e-5  # What POP changes is more than this.
NAMES = ["llama", "gemma3", "deepseek2", "lfm2"]
SHIFTABLE = ["llama", "gemma3"]
ROLL_BACK = ["llama", "gemma3", "deepseek2"]  # Recurrent states cannot drop a part.

# Each run draws the same cases. The fixtures live as long as the session.
drawn = functools.partial(
    settings, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)
by_model = pytest.mark.parametrize("name", NAMES)


@st.composite
def cuts(draw, length: int):
    """Draws where a sequence of this length is cut into parts: [0, ..., length]."""
    inside = draw(st.sets(st.integers(1, length - 1), max_size=5))
    return [0, *sorted(inside), length]


def read_in_parts(
    engine: Engine, tokens: list[int], at: list[int], asks: set[int], sequence: int = 0
) -> dict[int, np.ndarray]:
    """Reads each part in a call of its own. Returns the logits of each position that asks for them."""
    rows = {}
    for start, end in itertools.pairwise(at):
        part = [(tokens[i], i, sequence, i in asks) for i in range(start, end)]
        rows |= {start + i: row for i, row in engine.decode(part).items()}
    return rows


@by_model
@drawn(max_examples=15)
@given(data=st.data())
def test_any_cut_into_calls_and_micro_batches_gives_the_same(reference_models, name, data):
    model, length = reference_models[name], data.draw(st.integers(2, 60), "length")
    tokens = model.tokens(length, seed=length)
    asks = data.draw(st.sets(st.integers(0, length - 1), max_size=4), "asks") | {length - 1}
    head = data.draw(st.sampled_from([0, 0, 3]), "head")
    boundary = data.draw(st.integers(1, 5), "boundary")
    results = []
    for at in ([0, length], data.draw(cuts(length), "cuts")):
        with Engine(model.gguf, boundary, n_ubatch=data.draw(st.sampled_from([1, 4, 7, 16, 64]), "n_ubatch")) as engine:
            native.set_ends(engine.context, n_head=head, n_tail=1)
            results.append(read_in_parts(engine, tokens, at, asks))
            assert engine.n_pruned == length - len(asks | set(range(min(head, length))))
    assert results[0].keys() == results[1].keys() == asks
    for i in asks:
        assert squared_error(results[1][i], results[0][i]) <= OTHER_SHAPE, i


def greedy(llm: PopLlama, tokens: list[int], n: int = 3) -> tuple[list[int], np.ndarray]:
    """Returns the next tokens, and the logits of the first of them."""
    generator, written, logits = llm.generate(tokens, temp=0.0, top_k=1), [], None
    for token in generator:
        logits = llm._logits_of(1)[0].copy() if logits is None else logits
        written.append(token)
        if len(written) == n:
            break
    generator.close()
    return written, logits


@by_model
@drawn(max_examples=8)
@given(data=st.data())
def test_fresh_equals_reused_at_the_lossless_boundary(reference_models, name, data):
    model = reference_models[name]
    first, common = data.draw(st.integers(5, 50), "first"), data.draw(st.integers(1, 40), "common")
    rest = data.draw(st.integers(1, 20), "rest")
    before = model.tokens(first, seed=1)
    tokens = before[: min(common, first)] + model.tokens(rest, seed=2)
    options = dict(pop_boundary="lossless", n_ctx=128, n_ubatch=16, n_threads=1, n_threads_batch=1, verbose=False)
    results = []
    for warm in (True, False):
        llm = PopLlama(str(model.gguf), **options)
        if warm:
            greedy(llm, before)
        results.append(greedy(llm, tokens))
        if warm and name in ROLL_BACK:
            assert llm.timings.reused_tokens >= min(common, first, len(tokens) - 1)
        llm.close()
    assert results[0][0] == results[1][0]
    assert squared_error(results[0][1], results[1][1]) <= F16_CACHE


@pytest.mark.parametrize("name", ROLL_BACK)
@drawn(max_examples=8)
@given(data=st.data())
def test_cancelled_at_any_micro_batch_equals_never_begun(reference_models, name, data):
    model = reference_models[name]
    begun = model.tokens(data.draw(st.integers(17, 90), "begun"), seed=1)
    stop = data.draw(st.integers(0, (len(begun) - 1) // 16), "micro-batches")
    common = data.draw(st.integers(0, len(begun)), "common")
    tokens = begun[:common] + model.tokens(data.draw(st.integers(1, 60), "then"), seed=2)
    options = dict(pop_boundary=BOUNDARY, n_ctx=256, n_ubatch=16, n_threads=1, n_threads_batch=1, verbose=False)
    results = []
    for interrupted in (True, False):
        llm = PopLlama(str(model.gguf), **options)
        if interrupted:
            with pytest.raises(Cancelled), llm._calling(Call(BOUNDARY, lambda done, _: done < 16 * stop)):
                greedy(llm, begun)
            assert llm.n_tokens == 16 * stop
        results.append(greedy(llm, tokens))
        if interrupted:
            assert llm.timings.reused_tokens == min(16 * stop, common, len(tokens) - 1)
        llm.close()
    assert results[0][0] == results[1][0]
    assert squared_error(results[0][1], results[1][1]) <= F16_CACHE


@by_model
@drawn(max_examples=12)
@given(data=st.data())
def test_saved_and_restored_equals_never_saved(reference_models, name, data):
    model, length = reference_models[name], data.draw(st.integers(3, 60), "length")
    tokens = model.tokens(length, seed=length)
    at = data.draw(st.integers(1, length - 1), "saved at")
    unified = data.draw(st.booleans(), "unified")
    other = data.draw(st.integers(0, 1), "restored as")
    with Engine(model.gguf, BOUNDARY, n_seq_max=2, kv_unified=unified) as engine:
        read_in_parts(engine, tokens, [0, at], set())
        state = engine.state()
        expected = read_in_parts(engine, tokens, [at, length], {length - 1})
    with Engine(model.gguf, BOUNDARY, n_seq_max=2, kv_unified=unified) as engine:
        engine.decode(
            [(token, i, 0, False) for i, token in enumerate(model.tokens(9, seed=9))]
        )  # something else stood there
        llama_cpp.llama_memory_clear(engine.memory, False)
        engine.restore(state, sequence=other)
        restored = read_in_parts(engine, tokens, [at, length], {length - 1}, sequence=other)
    assert squared_error(restored[length - 1], expected[length - 1]) <= OTHER_SHAPE


@pytest.mark.parametrize("name", ROLL_BACK)
@drawn(max_examples=12)
@given(data=st.data())
def test_removed_and_copied_sequences_equal_fresh_ones(reference_models, name, data):
    """A sequence copied up to anywhere and one cut back to anywhere read on as prompts of their own do."""
    model, length = reference_models[name], data.draw(st.integers(4, 40), "length")
    tokens = model.tokens(length, seed=length)
    copied, kept = (data.draw(st.integers(1, length), what) for what in ("copied", "kept"))
    more = [model.tokens(data.draw(st.integers(1, 12), "more"), seed=50 + s) for s in (0, 1)]
    with Engine(model.gguf, BOUNDARY, n_seq_max=2, kv_unified=True, swa_full=True) as engine:
        engine.decode([(token, i, 0, False) for i, token in enumerate(tokens)])
        llama_cpp.llama_memory_seq_cp(engine.memory, 0, 1, 0, copied)
        assert llama_cpp.llama_memory_seq_rm(engine.memory, 0, kept, -1)
        ends = [llama_cpp.llama_memory_seq_pos_max(engine.memory, s) for s in (0, 1)]
        assert ends == [kept - 1, copied - 1]
        rows = [engine.prefill(more[s], sequence=s, first=(kept, copied)[s]) for s in (0, 1)]
    for s, common in enumerate((kept, copied)):
        with Engine(model.gguf, BOUNDARY) as alone:
            whole = tokens[:common] + more[s]
            assert squared_error(rows[s], alone.prefill(whole)) <= OTHER_SHAPE
        if common > 3:
            with Engine(model.gguf) as unpruned:
                assert squared_error(rows[s], unpruned.prefill(whole)) > VISIBLE


@pytest.fixture(scope="module")
def identity_models(reference_models, tmp_path_factory) -> dict[str, Path]:
    """Copies models so that layers from the boundary on pass their input on, and fill caches as pruned prefill does."""
    base = tmp_path_factory.mktemp("identity")
    for name in SHIFTABLE:
        identity_copy(reference_models[name].gguf, BOUNDARY, base / name)
    return {name: base / name for name in SHIFTABLE}


@pytest.mark.parametrize("name", SHIFTABLE)
@drawn(max_examples=12)
@given(data=st.data())
def test_shifted_context_equals_a_shift_without_pop(reference_models, identity_models, name, data):
    """In the reference, an identity copy fills and shifts the caches, and the whole model continues from its state."""
    model, length = reference_models[name], data.draw(st.integers(12, 60), "length")
    tokens = model.tokens(length, seed=length)
    start = data.draw(st.integers(0, length - 4), "start")
    removed = data.draw(st.integers(1, length - 2 - start), "removed")
    end, last = start + removed, length - 1 - removed

    def shift(engine):
        assert llama_cpp.llama_memory_seq_rm(engine.memory, 0, start, end)
        llama_cpp.llama_memory_seq_add(engine.memory, 0, end, -1, -removed)

    with Engine(model.gguf, BOUNDARY, swa_full=True) as engine:
        engine.decode([(token, i, 0, False) for i, token in enumerate(tokens[:-1])])
        shift(engine)
        shifted = engine.step(tokens[-1], last)
        assert llama_cpp.llama_memory_seq_pos_max(engine.memory, 0) == last
    with Engine(identity_models[name], swa_full=True) as copy:
        copy.decode([(token, i, 0, False) for i, token in enumerate(tokens[:-1])])
        shift(copy)
        copy.decode([(tokens[-1], last, 0, False)])  # The next decode rotates the keys.
        assert llama_cpp.llama_memory_seq_rm(copy.memory, 0, last, -1)
        state = copy.state()
    with Engine(model.gguf, swa_full=True) as reference:
        reference.restore(state)
        expected = reference.step(tokens[-1], last)
    assert squared_error(shifted, expected) <= 1e-6


@drawn(max_examples=150)
@given(seed=st.integers(0, 2**32), boundary=st.integers(1, gguf_cases.N_LAYER))
def test_copy_returns_every_tensor_and_key_unchanged(tmp_path_factory, seed, boundary):
    """The files have keys of all types, nested arrays, tensors of any shape, either byte order and any alignment."""
    chance, directory = random.Random(seed), tmp_path_factory.mktemp("copy")
    order, alignment = chance.choice("<>"), chance.choice([8, 32, 64, 256])
    keys = gguf_cases.valid(chance, order)
    keys.append(gguf_cases.Key(b"general.alignment", gguf_cases.Kind.UINT32, struct.pack(f"{order}I", alignment)))
    for i in range(chance.randint(0, 6)):
        kind = chance.choice(list(gguf_cases.Kind))
        keys.append(gguf_cases.Key(f"key.{i}".encode(), kind, gguf_cases.value(chance, kind, order)))
    infos, data, n_tensors = b"", b"", chance.randint(0, 5)
    for i in range(n_tensors):
        kind = chance.choice(
            [gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0]
        )
        shape = [32 * chance.randint(1, 3), *(chance.randint(1, 4) for _ in range(chance.randint(0, 3)))]
        n_values, (block, n_bytes) = int(np.prod(shape)), gguf.GGML_QUANT_SIZES[kind]
        infos += gguf_cases.tensor(f"tensor.{i}".encode(), shape, kind, len(data), order)
        raw = chance.randbytes(n_values // block * n_bytes)
        data += raw + bytes(-len(raw) % alignment)
    source, target = directory / "a.gguf", directory / "b.gguf"
    source.write_bytes(gguf_cases.File(keys, infos, n_tensors, data, order, alignment=alignment).bytes())

    copy_with_metadata(source, target, PopMetadata(boundary=boundary))
    assert read_metadata(target) == PopMetadata(boundary=boundary)
    assert target.read_bytes().endswith(data)
    kept = {key.name: (key.kind, key.value) for key in keys if not key.name.startswith(b"pop.")}
    assert own_keys(target, order) == kept
    with_reader = all(key.kind != gguf_cases.Kind.ARRAY for key in keys)  # gguf.GGUFReader cannot read every array.
    if with_reader:
        assert raw_keys(target) == raw_keys(source) and raw_tensors(target) == raw_tensors(source)


def own_keys(path: Path, order: str) -> dict[bytes, tuple[int, bytes]]:
    """Returns each key that is not of POP, with its type and the bytes of its value."""
    found = {}
    for name, field in read_header(path).fields.items():
        raw = name.encode()
        if not name.startswith("pop."):
            found[raw] = (struct.unpack_from(f"{order}I", field.raw, 8 + len(raw))[0], field.raw[12 + len(raw) :])
    return found
