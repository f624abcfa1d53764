"""In batches of every shape and memories of every kind, each sequence gets the logits that it gets alone."""

import ctypes

import numpy as np
import pytest

from pypop_gguf import PopError, native
from tests.support.engine import F16, Q8_0, Engine, llama_cpp
from tests.support.pop_reference import squared_error
from tools.architectures import identity_copy

pytestmark = pytest.mark.usefixtures("continuation")

BOUNDARY = 3
TOLERANCE = 1e-9
# Batches of other shapes group the same sums differently; random Gemma amplifies this rounding to 2e-9.
OTHER_SHAPE = 1e-7
FLASH_ON = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED

# Each case is a model and its memory: one cache, sliding-window caches, or convolution states beside a cache; unified,
# or one stream for each sequence. llama.cpp splits batches into equal parts of each sequence where the memory has
# recurrent states or streams, and in order otherwise.
MEMORIES = [
    pytest.param("llama", dict(kv_unified=True), id="cache-unified"),
    pytest.param("llama", dict(kv_unified=False), id="cache-per-sequence"),
    pytest.param("gemma3", dict(kv_unified=True, swa_full=False), id="sliding-window-unified"),
    pytest.param("gemma3", dict(kv_unified=False, swa_full=False), id="sliding-window-per-sequence"),
    pytest.param("deepseek2", dict(kv_unified=True), id="latent-cache"),
    pytest.param("lfm2", dict(kv_unified=True), id="hybrid-unified"),
    pytest.param("lfm2", dict(kv_unified=False), id="hybrid-per-sequence"),
]


def prompt(model, tokens, sequence, asks=None, first=0):
    """Returns the entries of a prompt. By default only its last token asks for logits."""
    last = len(tokens) - 1
    return [(token, first + i, sequence, i in asks if asks else i == last) for i, token in enumerate(tokens)]


def interleaved(*sequences):
    """Takes an entry of each sequence in turn, as a server fills its batches. The rest of the longest comes last."""
    result = []
    for i in range(max(map(len, sequences))):
        result += [entries[i] for entries in sequences if i < len(entries)]
    return result


@pytest.mark.parametrize(("name", "memory"), MEMORIES)
def test_parallel_prompts_equal_each_alone(reference_models, name, memory):
    model = reference_models[name]
    prompts = [model.tokens(count, seed=count) for count in (37, 52, 20)]
    with Engine(model.gguf, BOUNDARY, n_seq_max=3, **memory) as engine:
        entries = interleaved(*(prompt(model, tokens, s) for s, tokens in enumerate(prompts)))
        logits = engine.decode(entries)
        assert engine.n_pruned == sum(map(len, prompts)) - 3
        together = {entries[i][2]: row for i, row in logits.items()}
        steps = engine.decode([(7, len(tokens), s, True) for s, tokens in enumerate(prompts)])
    for s, tokens in enumerate(prompts):
        with Engine(model.gguf, BOUNDARY) as alone:
            assert squared_error(together[s], alone.prefill(tokens)) <= OTHER_SHAPE
            assert squared_error(steps[s], alone.step(7, len(tokens))) <= OTHER_SHAPE


@pytest.mark.parametrize(("name", "memory"), MEMORIES)
def test_prefill_and_decode_in_one_batch_equal_each_alone(reference_models, name, memory):
    model = reference_models[name]
    reading, writing = model.tokens(45, seed=1), model.tokens(30, seed=2)
    with Engine(model.gguf, BOUNDARY, n_seq_max=2, **memory) as engine:
        engine.decode(prompt(model, writing, 1))
        before = engine.n_pruned
        entries = [(5, len(writing), 1, True), *prompt(model, reading, 0)]
        logits = engine.decode(entries)
        assert engine.n_pruned - before == len(reading) - 1
    with Engine(model.gguf, BOUNDARY) as alone:
        alone.prefill(writing)
        assert squared_error(logits[0], alone.step(5, len(writing))) <= TOLERANCE
    with Engine(model.gguf, BOUNDARY) as alone:
        assert squared_error(logits[len(entries) - 1], alone.prefill(reading)) <= TOLERANCE


@pytest.mark.parametrize(("name", "memory"), MEMORIES)
def test_tokens_that_ask_inside_a_prompt_run_the_whole_model_and_keep_their_index(reference_models, name, memory):
    model = reference_models[name]
    tokens = model.tokens(40)
    asks = {4, 5, 17, 39}
    with Engine(model.gguf, BOUNDARY, **memory) as engine:
        logits = engine.decode(prompt(model, tokens, 0, asks))
        assert engine.n_pruned == len(tokens) - len(asks)
    with Engine(model.gguf, BOUNDARY) as apart:  # each batch either asks for all logits or for none
        for first, last in ((0, 4), (4, 6), (6, 17), (17, 18), (18, 39), (39, 40)):
            part = [(tokens[i], i, 0, i in asks) for i in range(first, last)]
            for i, row in apart.decode(part).items():
                assert squared_error(logits[first + i], row) <= TOLERANCE, first + i


def test_coupled_sequences_share_their_prompt(reference_models):
    model = reference_models["llama"]
    tokens = model.tokens(24)
    with Engine(model.gguf, BOUNDARY, n_seq_max=2, kv_unified=True) as engine:
        engine.prefill(tokens, sequence=(0, 1))
        assert engine.n_pruned == len(tokens) - 1
        shared = engine.step(9, len(tokens), sequence=1)
    with Engine(model.gguf, BOUNDARY) as alone:
        alone.prefill(tokens)
        assert squared_error(shared, alone.step(9, len(tokens))) <= TOLERANCE


@pytest.mark.usefixtures("kernels_off")
@pytest.mark.parametrize("offload_kqv", [True, False])
@pytest.mark.parametrize(("name", "cache"), [("llama", F16), ("gemma3", F16), ("bundled", Q8_0)])
def test_flash_attention_and_quantized_caches(reference_models, identity_models, name, cache, offload_kqv):
    """The reference reads the prompt by the identity copy in the same caches. The whole model takes over its state."""
    model = reference_models[name]
    tokens = model.tokens(60)
    options = dict(type_k=cache, type_v=cache, flash_attn_type=FLASH_ON, offload_kqv=offload_kqv)
    with Engine(model.gguf, BOUNDARY, **options) as engine:
        logits = engine.prefill(tokens)
    assert squared_error(logits, reference_logits(model, identity_models[name], tokens, **options)) <= 1e-6
    with Engine(model.gguf, **options) as whole:
        assert squared_error(logits, whole.prefill(tokens)) > 1e-4  # pruning changes the logits


def reference_logits(
    model, copy, tokens, prepare=lambda engine: None, change=lambda engine: None, last_position=None, **options
):
    """Logits of the last token on a cache that the identity copy has filled. POP is off in both engines.

    Args:
        model: The model that reads the last token.
        copy: Its identity copy.
        tokens: The prompt.
        prepare: Called with each of the two engines before anything is decoded.
        change: Called with the copy's engine after the prompt.
        last_position: Position of the last token; default: after all others.
        options: Options of both engines.
    """
    with Engine(copy, **options) as engine:
        prepare(engine)
        engine.decode([(token, i, 0, False) for i, token in enumerate(tokens[:-1])])
        change(engine)
        state = engine.state()
    with Engine(model.gguf, **options) as engine:
        prepare(engine)
        engine.restore(state)
        return engine.step(tokens[-1], len(tokens) - 1 if last_position is None else last_position)


@pytest.fixture(scope="session")
def identity_models(reference_models, tmp_path_factory):
    """Copies whose layers from the boundary on leave the residual stream as it is."""
    base = tmp_path_factory.mktemp("identity")
    copies = {name: base / f"{name}.gguf" for name in ("llama", "gemma3", "bundled")}
    for name, copy in copies.items():
        identity_copy(reference_models[name].gguf, BOUNDARY, copy)
    return copies


def test_context_shift_on_a_pruned_cache(reference_models, identity_models):
    model = reference_models["llama"]
    tokens = model.tokens(50)

    def shift(engine):
        llama_cpp.llama_memory_seq_rm(engine.memory, 0, 10, 20)
        llama_cpp.llama_memory_seq_add(engine.memory, 0, 20, -1, -10)

    with Engine(model.gguf, BOUNDARY) as engine:
        engine.decode([(token, i, 0, False) for i, token in enumerate(tokens[:-1])])
        shift(engine)
        shifted = engine.step(tokens[-1], 39)
        # The shift has happened with this decode. Pruned batches still work after it.
        more = engine.prefill(tokens[:12], first=40)

    # A saved state has the new positions, but the keys are shifted only when the next decode has run.
    def shift_and_apply(engine):
        shift(engine)
        llama_cpp.llama_memory_seq_rm(engine.memory, 0, 39, -1)
        engine.decode([(tokens[-1], 39, 0, False)])
        llama_cpp.llama_memory_seq_rm(engine.memory, 0, 39, -1)

    expected = reference_logits(model, identity_models["llama"], tokens, change=shift_and_apply, last_position=39)
    assert squared_error(shifted, expected) <= 1e-6
    assert np.isfinite(more).all()


def test_copied_and_removed_sequences_on_a_pruned_cache(reference_models):
    model = reference_models["llama"]
    tokens = model.tokens(40)
    with Engine(model.gguf, BOUNDARY, n_seq_max=2, kv_unified=True) as engine:
        engine.decode([(token, i, 0, False) for i, token in enumerate(tokens)])
        llama_cpp.llama_memory_seq_cp(engine.memory, 0, 1, 0, 30)
        copied = engine.prefill(tokens[5:15], sequence=1, first=30)
        assert llama_cpp.llama_memory_seq_rm(engine.memory, 0, 30, -1)
        removed = engine.prefill(tokens[5:15], sequence=0, first=30)
    with Engine(model.gguf, BOUNDARY) as alone:
        expected = alone.prefill(tokens[:30] + tokens[5:15])
    assert squared_error(copied, expected) <= TOLERANCE
    assert squared_error(removed, expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gemma3", "lfm2"])
def test_saved_and_restored_state_equals_never_saved(reference_models, name):
    model = reference_models[name]
    tokens = model.tokens(40)
    with Engine(model.gguf, BOUNDARY) as engine:
        engine.decode([(token, i, 0, False) for i, token in enumerate(tokens)])
        state = engine.state()
        expected = engine.step(9, len(tokens))
    with Engine(model.gguf, BOUNDARY) as engine:
        engine.restore(state)
        assert squared_error(engine.step(9, len(tokens)), expected) <= TOLERANCE


def test_control_vector_below_the_boundary_acts_in_pruned_prefill(reference_models, identity_models):
    model = reference_models["llama"]
    tokens = model.tokens(40)
    n_embd = model.torch_model.config.hidden_size
    direction = np.random.default_rng(0).normal(0, 2, n_embd * 5).astype(np.float32)

    def steer(engine):
        pointer = direction.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert llama_cpp.llama_set_adapter_cvec(engine.context, pointer, direction.size, n_embd, 1, BOUNDARY - 1) == 0

    with Engine(model.gguf, BOUNDARY) as engine:
        steer(engine)
        steered = engine.prefill(tokens)
        assert engine.n_pruned == len(tokens) - 1
    expected = reference_logits(model, identity_models["llama"], tokens, prepare=steer)
    assert squared_error(steered, expected) <= TOLERANCE
    with Engine(model.gguf, BOUNDARY) as plain:
        assert squared_error(steered, plain.prefill(tokens)) > 1e-4


def write_lora(path, model, rank=4, scale=0.5):
    """Writes a random adapter for what prefill still runs: K and V of every layer, and the FFN."""
    import gguf

    random, config = np.random.default_rng(5), model.torch_model.config
    width = {"attn_k": 2 * config.head_dim, "attn_v": 2 * config.head_dim, "ffn_up": config.intermediate_size}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for il in range(len(model.layers)):
        for name, n_out in width.items():
            writer.add_tensor(f"blk.{il}.{name}.weight.lora_a", random.normal(0, scale, (rank, 64)).astype(np.float32))
            writer.add_tensor(
                f"blk.{il}.{name}.weight.lora_b", random.normal(0, scale, (n_out, rank)).astype(np.float32)
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_lora_acts_in_pruned_prefill(reference_models, identity_models, tmp_path):
    model = reference_models["llama"]
    tokens = model.tokens(40)
    write_lora(tmp_path / "lora.gguf", model)

    def adapt(engine):
        adapter = llama_cpp.llama_adapter_lora_init(engine.model, str(tmp_path / "lora.gguf").encode())
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        assert llama_cpp.llama_set_adapters_lora(engine.context, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0

    with Engine(model.gguf, BOUNDARY) as engine:
        adapt(engine)
        adapted = engine.prefill(tokens)
        assert engine.n_pruned == len(tokens) - 1
    expected = reference_logits(model, identity_models["llama"], tokens, prepare=adapt)
    assert squared_error(adapted, expected) <= TOLERANCE
    with Engine(model.gguf, BOUNDARY) as plain:
        assert squared_error(adapted, plain.prefill(tokens)) > 1e-4


def test_recurrent_snapshots_keep_a_sequences_tail_together_and_whole(reference_models):
    model = reference_models["lfm2"]
    tokens = model.tokens(40)
    with Engine(model.gguf, BOUNDARY, n_rs_seq=3) as engine:
        logits = engine.prefill(tokens)
        assert engine.n_pruned == len(tokens) - 4  # the snapshots need the last 3 + 1 tokens together
        # Two tokens are rolled back and read again, with the same result.
        assert llama_cpp.llama_memory_seq_rm(engine.memory, 0, len(tokens) - 2, -1)
        again = engine.decode([(tokens[-2], len(tokens) - 2, 0, True), (tokens[-1], len(tokens) - 1, 0, True)])[1]
    assert squared_error(again, logits) <= 1e-6
    with Engine(model.gguf, BOUNDARY) as engine:  # the last four tokens run whole here too
        engine.decode([(token, i, 0, False) for i, token in enumerate(tokens[:-4])])
        expected = engine.decode([(tokens[i], i, 0, True) for i in range(36, 40)])[3]
    assert squared_error(logits, expected) <= TOLERANCE


def test_refused_boundary_changes_nothing(reference_models):
    model = reference_models["llama"]
    with Engine(model.gguf, BOUNDARY) as engine:
        expected = engine.prefill(model.tokens(30))
        with pytest.raises(PopError, match="choose 1 to 6"):
            native.set_boundary(engine.context, 7)
        llama_cpp.llama_memory_clear(engine.memory, True)
        assert np.array_equal(engine.prefill(model.tokens(30)), expected)


@pytest.mark.parametrize(("name", "memory"), MEMORIES)
def test_a_sequence_can_run_whole_beside_pruned_ones(reference_models, name, memory):
    model = reference_models[name]
    prompts = [model.tokens(count, seed=count) for count in (37, 52, 20)]
    with Engine(model.gguf, BOUNDARY, n_seq_max=3, **memory) as engine:
        native.set_sequence(engine.context, 1, prunes=False)
        entries = interleaved(*(prompt(model, tokens, s) for s, tokens in enumerate(prompts)))
        logits = {entries[i][2]: row for i, row in engine.decode(entries).items()}
        assert [native.n_pruned_in(engine.context, s) for s in range(3)] == [36, 0, 19]
        assert engine.n_pruned == 36 + 19
        native.set_sequence(engine.context, 1, prunes=True)
        engine.decode(prompt(model, model.tokens(9), 1, first=52))
        assert native.n_pruned_in(engine.context, 1) == 8
    for s, tokens in enumerate(prompts):
        with (
            Engine(model.gguf, None if s == 1 else BOUNDARY) as alone,
            Engine(model.gguf, BOUNDARY if s == 1 else None) as other,
        ):
            expected = alone.prefill(tokens)
            error = squared_error(logits[s], expected)
            assert error <= OTHER_SHAPE and squared_error(other.prefill(tokens), expected) > 100 * error
