"""Completion: the layers that pruned tokens have skipped run later, and the cache is then the whole model's."""

import ctypes
import threading

import numpy as np
import pytest

from pypop_gguf import PopError, native
from tests.engine.test_batches import write_lora
from tests.support.engine import F16, Q8_0, Engine, llama_cpp
from tests.support.paths import ROOT
from tests.support.pop_reference import squared_error

TOLERANCE = 1e-9
COMPLETED = ["llama", "qwen3", "gemma3", "mixtral", "deepseek2", "bundled"]
B = 3
N_PROMPT, N_GENERATED = 90, 8
ALL = 2**31 - 1


def engine(model, boundary=B, states="f32", **parameters) -> Engine:
    result = Engine(model.gguf, boundary, **{"swa_full": True, **parameters})
    native.set_completion(result.context, states)
    return result


def whole_engine(model, **parameters) -> Engine:
    return Engine(model.gguf, **{"swa_full": True, **parameters})


def n_incomplete(engine, sequence=0) -> int:
    return native.n_incomplete(engine.context, sequence)


def complete(engine, n_max=ALL, sequence=0) -> int:
    return native.complete(engine.context, n_max, sequence)


def generate(engine, tokens, sequence=0) -> np.ndarray:
    """Reads a prompt and then the last tokens one by one; returns the logits of the last one."""
    logits = engine.prefill(tokens[:-N_GENERATED], sequence)
    for i, token in enumerate(tokens[-N_GENERATED:]):
        logits = engine.step(token, len(tokens) - N_GENERATED + i, sequence)
    return logits


def next_logits(engine, position, sequence=0) -> np.ndarray:
    return np.array([engine.step(token, position + i, sequence) for i, token in enumerate((5, 9, 17, 3))])


def completed_error(model, boundary=B, states="f32", **parameters) -> float:
    """The error of what follows a completed prompt and answer, against the whole model."""
    tokens = model.tokens(N_PROMPT + N_GENERATED)
    with whole_engine(model, **parameters) as whole, engine(model, boundary, states, **parameters) as pruned:
        generate(whole, tokens)
        generate(pruned, tokens)
        assert complete(pruned) == len(tokens)
        return squared_error(next_logits(pruned, len(tokens)), next_logits(whole, len(tokens)))


def noise(model, **parameters) -> float:
    """How much the whole model itself differs between tokens that it reads at once and one by one."""
    tokens = model.tokens(N_PROMPT + N_GENERATED)
    rows = []
    for read in (generate, Engine.prefill):
        with whole_engine(model, **parameters) as whole:
            read(whole, tokens)
            rows.append(next_logits(whole, len(tokens)))
    return squared_error(*rows)


# Completed caches equal those of the whole model


@pytest.mark.parametrize("chunk", [5, 16, 64])
@pytest.mark.parametrize("name", [*COMPLETED, "gemma3n", "gemma4"])
def test_a_completed_cache_is_the_whole_models_at_every_boundary(reference_models, shared_cache_models, name, chunk):
    model = {**reference_models, **shared_cache_models}[name]
    tokens = model.tokens(N_PROMPT + N_GENERATED)
    n_ubatch = max(16, chunk)
    # ggml looks up Gemma's activation function in a table of F16, so a difference in the last bit can grow.
    tolerance = max(4 * noise(model), TOLERANCE)
    assert tolerance < {"gemma3n": 3e-5, "gemma4": 3e-7}.get(name, 1e-8)
    with whole_engine(model, n_ubatch=n_ubatch) as whole:
        generate(whole, tokens)
        state, expected = whole.state(), next_logits(whole, len(tokens))
        lossless, n_layer = native.lossless_boundary(whole.model), native.n_layer(whole.model)
    for boundary in range(1, n_layer):
        if boundary < lossless:
            with engine(model, boundary, n_ubatch=n_ubatch) as incomplete:
                generate(incomplete, tokens)
                assert squared_error(next_logits(incomplete, len(tokens)), expected) > 10 * tolerance, boundary
        with engine(model, boundary, n_ubatch=n_ubatch) as pruned:
            assert native.completes(pruned.context)
            last = generate(pruned, tokens)
            if boundary >= lossless:
                assert n_incomplete(pruned) == 0 and pruned.n_pruned > 0
                continue
            assert pruned.state() != state
            n = n_incomplete(pruned)
            assert n == len(tokens)  # generated tokens and the prompt's last one have attended to pruned ones
            while n:
                assert complete(pruned, chunk) == min(chunk, n)
                n -= min(chunk, n)
                assert n_incomplete(pruned) == n
            assert np.array_equal(pruned.logits(-1), last)  # what was decoded before can still be read
            assert native.n_lost(pruned.context) == 0 and complete(pruned) == 0
            assert squared_error(next_logits(pruned, len(tokens)), expected) <= tolerance, boundary


def test_the_state_of_a_completed_cache_is_the_whole_models_byte_for_byte(reference_models):
    model = reference_models["bundled"]
    tokens = model.tokens(N_PROMPT)
    with whole_engine(model) as whole, engine(model, 4) as pruned:
        whole.prefill(tokens)
        pruned.prefill(tokens)
        assert pruned.state() != whole.state()
        complete(pruned)
        assert pruned.state() == whole.state()


def test_an_answer_that_goes_on_while_its_prompt_is_completed_becomes_the_whole_models(reference_models):
    model = reference_models["llama"]
    tokens = model.tokens(N_PROMPT + 20)
    with whole_engine(model) as whole, engine(model) as pruned:
        whole.prefill(tokens[:N_PROMPT])
        pruned.prefill(tokens[:N_PROMPT])
        errors = []
        for i in range(N_PROMPT, len(tokens)):
            complete(pruned, 16)
            errors.append(squared_error(pruned.step(tokens[i], i), whole.step(tokens[i], i)))
        assert errors[0] > 1e-3
        assert max(errors[N_PROMPT // 16 + 1 :]) <= TOLERANCE


@pytest.mark.parametrize(("states", "tolerance"), [("f16", 1e-6), ("bf16", 1e-5)])
def test_states_of_half_the_size_cost_little(reference_models, states, tolerance):
    error = completed_error(reference_models["bundled"], 4, states)
    assert 0 < error <= tolerance


@pytest.mark.parametrize(
    "parameters",
    [dict(flash_attn_type=1), dict(type_k=F16, type_v=F16), dict(flash_attn_type=1, type_k=Q8_0, type_v=Q8_0)],
    ids=["flash attention", "F16 caches", "Q8_0 caches"],
)
def test_rounded_caches_are_completed_as_closely_as_they_are_read(reference_models, parameters):
    model = reference_models["bundled"]
    tolerance = max(4 * noise(model, **parameters), TOLERANCE)
    assert completed_error(model, 4, **parameters) <= tolerance < 1e-3


def test_a_prompt_that_was_pruned_with_an_adapter_is_completed(tmp_path):
    golden = ROOT / "tests" / "golden"
    tokens = [3 + i % 10 for i in range(40)]
    with Engine(golden / "pop-v1.gguf") as whole, Engine(golden / "pop-v1.gguf", 1) as pruned:
        expected = [whole.prefill(tokens), whole.step(7, 40)][1]
        native.load_adapter(pruned.context, pruned.model, golden / "pop-v1.pop-b1.gguf")
        native.set_completion(pruned.context, "f32")
        pruned.prefill(tokens)
        assert complete(pruned) == 40
        assert squared_error(pruned.step(7, 40), expected) <= TOLERANCE


# Sequences


@pytest.mark.parametrize("unified", [True, False])
def test_copies_are_completed_with_or_apart_from_their_original(reference_models, unified):
    model = reference_models["llama"]
    tokens = model.tokens(N_PROMPT)
    parameters = dict(n_seq_max=2, kv_unified=unified, n_ctx=1024)
    with whole_engine(model, **parameters) as whole, engine(model, **parameters) as pruned:
        for each in (whole, pruned):
            each.prefill(tokens)
            llama_cpp.llama_memory_seq_cp(each.memory, 0, 1, -1, -1)
        assert n_incomplete(pruned, 0) == n_incomplete(pruned, 1) == N_PROMPT
        complete(pruned, sequence=0)
        assert n_incomplete(pruned, 1) == (0 if unified else N_PROMPT)  # a unified cache shares the cells
        complete(pruned, sequence=1)
        for s in (0, 1):
            error = squared_error(next_logits(pruned, N_PROMPT, s), next_logits(whole, N_PROMPT, s))
            assert error <= TOLERANCE


def test_only_the_sequences_that_prune_have_something_to_complete(reference_models):
    model = reference_models["llama"]
    with engine(model, n_seq_max=2, n_ctx=1024) as pruned:
        native.set_sequence(pruned.context, 1, prunes=False)
        tokens = model.tokens(40)
        pruned.decode([(token, i, s, i == 39) for i, token in enumerate(tokens) for s in (0, 1)])
        assert (n_incomplete(pruned, 0), n_incomplete(pruned, 1)) == (40, 0)


def test_removed_tokens_leave_nothing_to_complete(reference_models):
    model = reference_models["llama"]
    with engine(model) as pruned:
        pruned.prefill(model.tokens(40))
        llama_cpp.llama_memory_seq_rm(pruned.memory, 0, 10, -1)
        assert n_incomplete(pruned) == 10
        llama_cpp.llama_memory_seq_rm(pruned.memory, 0, -1, -1)
        assert n_incomplete(pruned) == 0
        native.set_boundary(pruned.context, native.OFF)
        pruned.prefill(model.tokens(40))
        assert n_incomplete(pruned) == 0


def test_a_higher_boundary_behind_pruned_tokens_is_completed_from_the_lower_one(reference_models):
    model = reference_models["llama"]
    tokens = model.tokens(80)
    with whole_engine(model) as whole, engine(model, 2) as pruned:
        for first, boundary in ((0, 2), (40, 4)):
            native.set_boundary(pruned.context, boundary)
            for each in (whole, pruned):
                each.prefill(tokens[first : first + 40], first=first)
        assert complete(pruned) == 80
        assert squared_error(next_logits(pruned, 80), next_logits(whole, 80)) <= TOLERANCE


def test_keys_that_are_shifted_after_completion_are_the_whole_models(reference_models):
    model = reference_models["llama"]
    with whole_engine(model) as whole, engine(model) as pruned:
        for each in (whole, pruned):
            each.prefill(model.tokens(60))
            if each is pruned:
                complete(each)
            llama_cpp.llama_memory_seq_rm(each.memory, 0, 4, 20)
            llama_cpp.llama_memory_seq_add(each.memory, 0, 20, -1, -16)
        assert squared_error(next_logits(pruned, 44), next_logits(whole, 44)) <= TOLERANCE


# Stopping


def test_a_completion_that_is_stopped_anywhere_can_go_on(reference_models):
    model = reference_models["bundled"]
    tokens = model.tokens(400)
    with whole_engine(model, n_ubatch=256) as whole, engine(model, 4, n_ubatch=256) as pruned:
        whole.prefill(tokens)
        pruned.prefill(tokens)
        stopped = 0
        for i in range(40):
            left = n_incomplete(pruned)
            timer = threading.Timer(i * 2e-4, native.stop, [pruned.context])
            timer.start()
            stopped += complete(pruned, 20) < min(20, left)
            timer.join()
            complete(pruned, 0)  # takes a stop that came too late
        assert stopped > 3
        complete(pruned)
        assert squared_error(next_logits(pruned, 400), next_logits(whole, 400)) <= TOLERANCE


def test_a_stop_without_a_completion_stops_the_next_one_and_no_other(reference_models):
    model = reference_models["llama"]
    with engine(model) as pruned:
        pruned.prefill(model.tokens(40))
        native.stop(pruned.context)
        assert complete(pruned) == 0
        assert complete(pruned) == 40


# Refusals


@pytest.mark.parametrize("name", ["lfm2"])
def test_recurrent_memories_are_refused(reference_models, name):
    with (
        Engine(reference_models[name].gguf, B) as hybrid,
        pytest.raises(PopError, match=r"^the cache of this architecture cannot be completed later"),
    ):
        native.set_completion(hybrid.context, "f32")


def test_completion_is_turned_on_before_the_first_token(reference_models):
    model = reference_models["llama"]
    with Engine(model.gguf, B) as late:
        late.prefill(model.tokens(8))
        with pytest.raises(PopError, match=r"only while the cache is empty$"):
            native.set_completion(late.context, "f32")
        assert n_incomplete(late) == 0
        with pytest.raises(PopError, match=r"^completion is off"):
            complete(late)


def read_image(engine, n_tokens: int, width: int) -> None:
    """Reads random features as those of an image."""
    batch = llama_cpp.llama_batch_init(n_tokens, width, 1)
    image = np.random.default_rng(0).normal(0, 0.5, (n_tokens, width)).astype(np.float32)
    ctypes.memmove(batch.embd, image.ctypes.data, image.nbytes)
    batch.n_tokens = n_tokens
    for i in range(n_tokens):
        batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = i, 1, 0, False
    status = llama_cpp.llama_decode(engine.context, batch)
    llama_cpp.llama_batch_free(batch)
    assert status == 0


@pytest.mark.parametrize(
    ("name", "boundary", "n_left"), [("gemma3n", 3, 17), ("gemma3n", 19, 0), ("gemma4", 3, 17), ("gemma4", 5, 0)]
)
def test_images_are_lost_where_upper_layers_read_them_too(shared_cache_models, name, boundary, n_left):
    """Each layer of these models has an input of its own, made from the features too. 19 and 5 lose nothing."""
    model = shared_cache_models[name]
    with engine(model, boundary) as pruned:
        read_image(pruned, 12, model.torch_model.config.hidden_size)
        pruned.prefill(model.tokens(5), first=12)
        assert (n_incomplete(pruned), native.n_lost(pruned.context)) == (0, n_left)
        llama_cpp.llama_memory_clear(pruned.memory, True)
        pruned.prefill(model.tokens(17))
        assert (n_incomplete(pruned), native.n_lost(pruned.context)) == (n_left, 0)


def test_what_has_left_a_sliding_window_is_lost(reference_models):
    model = reference_models["gemma3"]
    with engine(model, swa_full=False, n_ubatch=16) as pruned:
        pruned.prefill(model.tokens(300))
        assert complete(pruned) == 0
        assert (n_incomplete(pruned), native.n_lost(pruned.context)) == (0, 300)
        llama_cpp.llama_memory_clear(pruned.memory, True)
        native.set_boundary(pruned.context, native.OFF)
        pruned.prefill(model.tokens(300))
        assert native.n_lost(pruned.context) == 0


def test_a_prompt_as_short_as_the_window_is_completed(reference_models):
    model = reference_models["gemma3"]
    with whole_engine(model) as whole, engine(model, swa_full=False, n_ubatch=64) as pruned:
        for each in (whole, pruned):
            each.prefill(model.tokens(40))
        assert complete(pruned) == 40
        assert squared_error(next_logits(pruned, 40), next_logits(whole, 40)) <= 1e-8


def test_what_follows_a_non_causal_batch_behind_pruned_text_is_lost(reference_models):
    model = reference_models["llama"]
    with engine(model) as pruned:
        pruned.prefill(model.tokens(40))
        llama_cpp.llama_set_causal_attn(pruned.context, False)
        pruned.decode([(5, 40 + i, 0, True) for i in range(10)])
        with pytest.raises(PopError, match=r"^completion needs causal attention$"):
            complete(pruned)
        llama_cpp.llama_set_causal_attn(pruned.context, True)
        pruned.step(5, 50)
        assert (n_incomplete(pruned), native.n_lost(pruned.context)) == (40, 11)
        assert complete(pruned) == 40
        assert (n_incomplete(pruned), native.n_lost(pruned.context)) == (0, 11)


def test_tokens_are_completed_with_the_lora_that_read_them(reference_models, tmp_path):
    model = reference_models["llama"]
    write_lora(tmp_path / "lora.gguf", model)

    def use(engine, scale):
        adapter = llama_cpp.llama_adapter_lora_init(engine.model, str(tmp_path / "lora.gguf").encode())
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        return lambda on: llama_cpp.llama_set_adapters_lora(
            engine.context, adapters, int(on), (ctypes.c_float * 1)(scale)
        )

    with whole_engine(model) as whole, engine(model) as pruned:
        set_whole, set_pruned = use(whole, 1.0), use(pruned, 1.0)
        set_whole(True)
        set_pruned(True)
        for each in (whole, pruned):
            each.prefill(model.tokens(40))
        set_pruned(False)
        with pytest.raises(PopError, match=r"other LoRA adapters: set the same ones again$"):
            complete(pruned)
        set_pruned(True)
        assert complete(pruned) == 40
        assert squared_error(next_logits(pruned, 40), next_logits(whole, 40)) <= TOLERANCE


def test_many_sets_of_adapters_leave_those_that_are_still_needed(reference_models, tmp_path):
    """A set is forgotten once everything that was read with it is complete."""
    model = reference_models["llama"]
    write_lora(tmp_path / "lora.gguf", model)
    with whole_engine(model, n_seq_max=2) as whole, engine(model, n_seq_max=2) as pruned:
        engines = (whole, pruned)
        adapters = [
            llama_cpp.llama_adapter_lora_init(one.model, str(tmp_path / "lora.gguf").encode()) for one in engines
        ]

        def scale(value: float) -> None:
            for one, adapter in zip(engines, adapters, strict=True):
                pointers = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
                llama_cpp.llama_set_adapters_lora(one.context, pointers, 1, (ctypes.c_float * 1)(value))

        scale(0.5)
        for one in engines:
            one.prefill(model.tokens(40))
        for i in range(200):
            scale(1 + i / 100)
            llama_cpp.llama_memory_seq_rm(pruned.memory, 1, -1, -1)
            pruned.prefill(model.tokens(5, seed=i), sequence=1)
        scale(0.5)
        assert complete(pruned) == 40
        assert squared_error(next_logits(pruned, 40), next_logits(whole, 40)) <= TOLERANCE
        scale(1 + 199 / 100)
        assert complete(pruned, sequence=1) == 5


def test_a_restored_state_counts_as_whole_until_it_is_called_lost(reference_models):
    model = reference_models["llama"]
    with engine(model) as pruned:
        pruned.prefill(model.tokens(40))
        state = pruned.state()
        llama_cpp.llama_memory_seq_rm(pruned.memory, 0, -1, -1)
        pruned.restore(state)
        assert (n_incomplete(pruned), native.n_lost(pruned.context)) == (0, 0)
        native.set_lost(pruned.context, 30)
        assert native.n_lost(pruned.context) == 10
        pruned.step(5, 40)
        assert native.n_lost(pruned.context) == 11  # it has attended to them


# Off


def test_completion_can_be_turned_off_and_on_again(reference_models):
    model = reference_models["llama"]
    tokens = model.tokens(40)
    with whole_engine(model) as whole, engine(model) as pruned:
        whole.prefill(tokens)
        pruned.prefill(tokens)
        native.set_completion(pruned.context, "off")
        assert n_incomplete(pruned) == 0
        pruned.step(5, 40)
        llama_cpp.llama_memory_clear(pruned.memory, True)
        native.set_completion(pruned.context, "f32")
        pruned.prefill(tokens)
        assert complete(pruned) == 40
        assert squared_error(next_logits(pruned, 40), next_logits(whole, 40)) <= TOLERANCE


def test_without_completion_a_graph_has_no_node_more(reference_models):
    model, counts = reference_models["llama"], []
    for states in (None, "off", "f32"):
        nodes = []

        def see(_tensor, _ask, _data, nodes=nodes):
            nodes.append(1)
            return False

        callback = llama_cpp.ggml_backend_sched_eval_callback(see)
        with Engine(model.gguf, B, cb_eval=callback) as counted:
            if states:
                native.set_completion(counted.context, states)
            counted.prefill(model.tokens(12))
            counted.step(5, 12)
            counts.append(len(nodes))
    assert counts[0] == counts[1]
    assert counts[2] == counts[0] + 2  # one in the pruned pass, one in the step behind it
