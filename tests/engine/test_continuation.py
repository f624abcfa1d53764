"""Continuation: tokens that ask for logits go on from their own state at the boundary, with the same results."""

import ctypes

import numpy as np
import pytest

from pypop_gguf import native
from tests.support.engine import Engine, llama_cpp
from tests.support.pop_reference import squared_error

BOUNDARY = 3
TOLERANCE = 1e-9
# Random Gemma amplifies rounding: the whole model differs by 1e-7 between one batch and the same tokens one by one, and
# Gemma 3n, which has five times as many layers here, by more.
RANDOM_MIXTURES = {"llama": 1e-9, "gemma3": 1e-6, "deepseek2": 1e-9, "gemma3n": 1e-4}

CONTINUED = ["llama", "qwen3", "gemma3", "mixtral", "deepseek2", "bundled"]


def engine(model, continues, **parameters):
    result = Engine(model.gguf, BOUNDARY, **parameters)
    native.set_continuation(result.context, continues)
    return result


class PassCounter:
    """Counts how often the attention of each layer is computed, from llama.cpp's evaluation callback."""

    def __init__(self):
        self.passes = [0] * 6
        base = llama_cpp.llama_cpp._lib
        base.ggml_get_name.argtypes, base.ggml_get_name.restype = [ctypes.c_void_p], ctypes.c_char_p
        self._get_name = base.ggml_get_name
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._see)

    def _see(self, tensor, _ask, _data):
        name = self._get_name(tensor).decode()
        if name.startswith("kqv_out-"):
            self.passes[int(name.split("-")[1])] += 1
        return False  # llama.cpp asks whether this tensor's data is wanted


@pytest.mark.parametrize("continues", [True, False])
def test_the_layers_below_the_boundary_are_read_once(reference_models, continues):
    model, counter = reference_models["llama"], PassCounter()
    with engine(model, continues, n_ubatch=64, cb_eval=counter.callback) as counted:
        counted.prefill(model.tokens(40))
    assert counter.passes == [1 if continues else 2] * BOUNDARY + [1] * 3


@pytest.mark.parametrize("name", [*CONTINUED, "gemma3n", "gemma4"])
@pytest.mark.parametrize("flash_attention", [False, True])
def test_continued_equals_repeated(reference_models, shared_cache_models, name, flash_attention):
    model = {**reference_models, **shared_cache_models}[name]
    options = dict(flash_attn_type=int(flash_attention))
    for count in (2, 17, 40):
        tokens = model.tokens(count, seed=count)
        rows = []
        for continues in (True, False):
            with engine(model, continues, **options) as each:
                assert native.continues(each.context) == continues
                rows.append([each.prefill(tokens), *(each.step(7, count + i) for i in range(3))])
                assert each.n_pruned == count - 1
        # Flash attention rounds to F16, differently for one query and for many. So does the table of Gemma's GELU. The
        # 30 layers of this random Gemma 3n amplify what flash attention rounds.
        rounded = flash_attention or name.startswith("gemma")
        tolerance = 1e-4 if flash_attention and name == "gemma3n" else 1e-6 if rounded else TOLERANCE
        assert squared_error(*map(np.array, rows)) <= tolerance


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("name", RANDOM_MIXTURES)
def test_random_mixtures_of_sequences_continue_as_they_repeat(reference_models, shared_cache_models, name, unified):
    """Batches of up to four sequences differ in length: some read, some write, some ask for logits in the middle."""
    model, random = {**reference_models, **shared_cache_models}[name], np.random.default_rng(11)
    n_past = np.zeros(4, int)
    with (
        engine(model, True, n_seq_max=4, kv_unified=unified, swa_full=False) as continued,
        engine(model, False, n_seq_max=4, kv_unified=unified, swa_full=False) as repeated,
    ):
        for _ in range(12):
            entries = []
            for s in random.permutation(4)[: random.integers(1, 5)]:
                count = int(random.choice([1, 5, 23]))
                asks = random.random(count) < random.choice([0, 0.2, 1])
                asks[-1] |= count == 1
                entries += [
                    (int(random.integers(3, 128)), int(n_past[s]) + i, int(s), bool(asks[i])) for i in range(count)
                ]
                n_past[s] += count
            ours, theirs = continued.decode(entries), repeated.decode(entries)
            assert ours.keys() == theirs.keys() == {i for i, entry in enumerate(entries) if entry[3]}
            for i in ours:
                assert squared_error(ours[i], theirs[i]) <= RANDOM_MIXTURES[name], (entries, i)
            assert continued.n_pruned == repeated.n_pruned


def test_recurrent_states_repeat(reference_models):
    with engine(reference_models["lfm2"], True) as hybrid:
        assert not native.continues(hybrid.context)


def test_boundary_states_survive_a_change_of_boundary(reference_models):
    model = reference_models["llama"]
    tokens = model.tokens(40)
    with Engine(model.gguf, 5) as moved:
        moved.prefill(tokens)
        llama_cpp.llama_memory_clear(moved.memory, True)
        native.set_boundary(moved.context, 2)
        logits = moved.prefill(tokens)
    with Engine(model.gguf, 2) as fresh:
        assert np.array_equal(logits, fresh.prefill(tokens))
