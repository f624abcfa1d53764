"""Saved states and caches: positions keep their boundaries, and a state of another model is refused."""

import contextlib
import copy
import pickle
import random
import shutil

import llama_cpp
import numpy as np
import pytest
import torch

from pypop_gguf import PopError, PopLlama, library, native, states
from pypop_gguf.call import Call
from pypop_gguf.gguf_files.header import read_header
from pypop_gguf.gguf_files.metadata import PopMetadata
from pypop_gguf.gguf_files.tensors import list_tensors
from pypop_gguf.gguf_files.writer import copy_with_metadata
from tests.support import pair_adapter
from tests.support.projections import find_projections

PROMPT = "Once upon a time there was a little fox who lived near the river. One day the fox found a map. " * 2
# llama_cpp.Llama's default is without flash attention.
ONE_THREAD = dict(n_threads=1, n_threads_batch=1, flash_attn=False, verbose=False)
OPTIONS = dict(n_ctx=128, n_batch=32, pop_boundary=6, **ONE_THREAD)
CALL = dict(max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def llm(bundled_gguf):
    llm = PopLlama(str(bundled_gguf), **OPTIONS)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def tuned(bundled_gguf, tmp_path_factory):
    """The bundled model with other attention weights in some layers; names, shapes and norms are the same."""
    path = tmp_path_factory.mktemp("tuned") / "tuned.gguf"
    shutil.copy(bundled_gguf, path)
    header = read_header(path)
    offsets = [tensor.offset for tensor in list_tensors(header)]
    with path.open("r+b") as file:
        for il in range(1, 6):
            name = header.tensor_infos.index(b"blk.%d.attn_v.weight" % il)
            offset = header.data_offset + offsets[header.tensor_infos[:name].count(b".weight")]
            file.seek(offset)
            weights = np.frombuffer(file.read(2 * 192 * 96), dtype=np.float16)
            file.seek(offset)
            file.write((-weights).tobytes())
    return path


def complete(llm, prompt=PROMPT, **options):
    return llm.create_completion(prompt, **CALL, **options)["choices"][0]["text"]


def fresh(path, prompt=PROMPT, **options):
    """The answer of a new object."""
    llm = PopLlama(str(path), **{**OPTIONS, **options})
    text = complete(llm, prompt)
    llm.close()
    return text


def make_cache(kind: str, directory):
    return llama_cpp.LlamaRAMCache() if kind == "RAM" else llama_cpp.LlamaDiskCache(str(directory / "cache"))


both_caches = pytest.mark.parametrize("kind", ["RAM", "disk"])


@both_caches
def test_cache_gives_back_what_was_read_and_reads_shallow_positions_again(bundled_gguf, kind, tmp_path):
    cache = make_cache(kind, tmp_path)
    writer, reader = (PopLlama(str(bundled_gguf), **OPTIONS) for _ in range(2))
    writer.set_cache(cache)
    reader.set_cache(cache)
    expected = complete(writer)
    assert complete(reader) == expected
    assert reader.timings.reused_tokens == reader.timings.prompt_tokens - 1
    reader.reset()
    assert complete(reader, pop=False) == fresh(bundled_gguf, pop=False) != expected
    assert reader.timings.reused_tokens == 0
    writer.reset()  # The cache now holds what every layer has read, which a pruned call may reuse.
    complete(writer)
    assert writer.timings.reused_tokens == writer.timings.prompt_tokens - 1
    writer.close()
    reader.close()


@both_caches
def test_models_that_share_a_cache_find_their_own_entries(bundled_gguf, tuned, kind, tmp_path):
    cache = make_cache(kind, tmp_path)
    expected = {path: fresh(path) for path in (bundled_gguf, tuned)}
    assert expected[bundled_gguf] != expected[tuned]
    plain = llama_cpp.Llama(str(bundled_gguf), n_ctx=128, **ONE_THREAD)  # it does not mark its entries as its own
    plain.set_cache(cache)
    complete(plain)
    models = {path: PopLlama(str(path), **OPTIONS) for path in expected}
    for path, model in models.items():
        model.set_cache(cache)
        assert complete(model) == expected[path] and model.timings.reused_tokens == 0
    for path, model in models.items():
        model.reset()
        assert complete(model) == expected[path] and model.timings.reused_tokens > 20
    # A model that is open with another memory layout finds only its own entries too, as other states would not load.
    other = PopLlama(str(bundled_gguf), **{**OPTIONS, "type_k": llama_cpp.GGML_TYPE_F32})
    other.set_cache(cache)
    complete(other)
    assert other.timings.reused_tokens == 0
    plain.reset()
    assert complete(plain) == fresh(bundled_gguf, pop=False)
    for model in (plain, other, *models.values()):
        model.close()


def test_cache_can_be_looked_at_and_taken_away(llm):
    cache = llama_cpp.LlamaRAMCache(capacity_bytes=10**8)
    llm.set_cache(cache)
    tokens = llm.tokenize(PROMPT.encode())
    assert tokens not in llm.cache
    llm.reset()
    complete(llm)
    assert tokens in llm.cache and llm.cache.cache_size == cache.cache_size > 0 and llm.cache.capacity_bytes == 10**8
    llm.set_cache(None)
    assert llm.cache is None
    complete(llm)


def test_state_of_another_model_is_refused_and_leaves_this_one_as_it_was(llm, tuned):
    llm.reset()
    expected = complete(llm)
    other = PopLlama(str(tuned), **OPTIONS)
    complete(other)
    with pytest.raises(PopError, match=r"^this state was not saved by .*f16.gguf"):
        llm.load_state(other.save_state())
    assert complete(llm) == expected and llm.timings.reused_tokens == llm.timings.prompt_tokens - 1
    other.close()


def test_state_read_with_other_rope_settings_is_refused(llm, bundled_gguf):
    stretched = PopLlama(str(bundled_gguf), rope_freq_base=500_000.0, **OPTIONS)
    complete(stretched)
    with pytest.raises(PopError, match="rope settings"):
        llm.load_state(stretched.save_state())
    stretched.close()


def test_model_whose_keys_changed_is_the_same_model(llm, bundled_gguf, tmp_path):
    copy_with_metadata(bundled_gguf, tmp_path / "keys.gguf", PopMetadata(boundary=6, tail=4))
    other = PopLlama(str(tmp_path / "keys.gguf"), **OPTIONS)
    complete(other)
    llm.load_state(other.save_state())
    assert llm.n_tokens == other.n_tokens
    other.close()


def test_every_shard_of_a_split_model_counts(tmp_path, bundled_gguf, tuned):
    """The shards here are whole models. This makes no difference to the digest."""
    for directory, second in (("a", bundled_gguf), ("b", tuned)):
        (tmp_path / directory).mkdir()
        shutil.copy(bundled_gguf, tmp_path / directory / "m-00001-of-00002.gguf")
        shutil.copy(second, tmp_path / directory / "m-00002-of-00002.gguf")
    digests = [states.file_digest(tmp_path / directory / "m-00001-of-00002.gguf") for directory in "ab"]
    assert digests[0] != digests[1] != states.file_digest(tuned)


def test_states_travel_between_pop_and_plain(llm, bundled_gguf):
    plain = llama_cpp.Llama(str(bundled_gguf), n_ctx=128, n_batch=32, **ONE_THREAD)
    whole = complete(plain)
    llm.reset()
    llm.load_state(plain.save_state())
    assert complete(llm, pop=False) == whole
    assert llm.timings.reused_tokens == llm.timings.prompt_tokens - 1
    llm.reset()
    pruned = complete(llm)
    plain.reset()
    plain.load_state(llm.save_state())
    assert complete(plain) == pruned != whole
    plain.close()


def test_stock_loads_a_pickled_state(llm, bundled_gguf, stock, tmp_path):
    llm.reset()
    pruned = complete(llm)
    (tmp_path / "state").write_bytes(pickle.dumps(llm.save_state()))
    code = """
import json, pickle, sys, llama_cpp
assert not hasattr(llama_cpp.llama_cpp._lib, "llama_pop_set_boundary")
llm = llama_cpp.Llama(sys.argv[1], n_ctx=128, n_batch=32, n_threads=1, n_threads_batch=1, verbose=False)
llm.load_state(pickle.load(open(sys.argv[2], "rb")))
print(json.dumps([llm.n_tokens, llm.create_completion(sys.argv[3], max_tokens=8, temperature=0)["choices"][0]["text"]]))
"""
    assert stock(code, bundled_gguf, tmp_path / "state", PROMPT) == [llm.n_tokens, pruned]


def test_plain_states_that_do_not_fit_are_refused_in_one_line(llm, reference_models, bundled_gguf):
    other = llama_cpp.Llama(str(reference_models["llama"].gguf), n_ctx=64, **ONE_THREAD)
    other.eval(reference_models["llama"].tokens(5))
    with pytest.raises(PopError, match="with another vocabulary"):
        llm.load_state(other.save_state())
    other.close()
    # This one has the right vocabulary, but the cells of its cache are of another type.
    other = llama_cpp.Llama(str(bundled_gguf), n_ctx=128, type_k=llama_cpp.GGML_TYPE_F32, **ONE_THREAD)
    other.eval([1, 2, 3])
    with pytest.raises(PopError, match=r"does not fit .*type"):
        llm.load_state(other.save_state())
    assert llm.n_tokens == 0
    assert complete(llm) == fresh(bundled_gguf)
    other.close()
    # A cache that flash attention reads has its values in another order.
    llm.reset()
    complete(llm)
    default = PopLlama(str(bundled_gguf), **{**OPTIONS, "flash_attn": None})
    with pytest.raises(PopError, match="saved with another flash_attn"):
        default.load_state(llm.save_state())
    complete(default)
    with pytest.raises(PopError, match="saved with another flash_attn"):
        llm.load_state(default.save_state())
    default.close()


def test_state_moves_to_a_context_of_another_length(llm, bundled_gguf):
    llm.reset()
    expected = complete(llm)
    state = llm.save_state()
    for n_ctx, n_batch in ((256, 256), (64, 16)):
        other = PopLlama(str(bundled_gguf), **{**OPTIONS, "n_ctx": n_ctx, "n_batch": n_batch})
        other.load_state(state)
        assert complete(other) == expected and other.timings.reused_tokens > 20
        longer = other.create_completion(PROMPT + expected, max_tokens=20, temperature=0)
        assert longer["usage"]["completion_tokens"] > 1
        other.close()
    large = PopLlama(str(bundled_gguf), **{**OPTIONS, "n_ctx": 512})
    large.eval(list(range(5, 305)))  # llama.cpp has made a context of 256 positions out of 128
    with pytest.raises(PopError, match=r"holds 300 tokens, the context 256: open the model with n_ctx=300 or more"):
        llm.load_state(large.save_state())
    large.close()


def test_state_without_logits_is_read_again_where_every_token_needs_them(llm, bundled_gguf):
    # The second reading has other batches. Our kernels compute large ones only, and do not round F16 products as ggml
    # does, so the logits would change by more than the order of sums changes them.
    plain = llama_cpp.Llama(str(bundled_gguf), n_ctx=128, logits_all=True, **ONE_THREAD)
    native.set_kernels(plain.ctx, False)
    ours = PopLlama(str(bundled_gguf), logits_all=True, pop_kernels=False, **OPTIONS)

    def logprobs(llm) -> np.ndarray:
        done = llm.create_completion(PROMPT, **CALL, logprobs=1, echo=True)
        return np.array(done["choices"][0]["logprobs"]["token_logprobs"][1:])

    expected = logprobs(plain)
    llm.reset()
    complete(llm, pop=False)
    ours.load_state(llm.save_state())
    assert np.array_equal(logprobs(ours), expected)
    assert ours.timings.reused_tokens == 0
    state = ours.save_state()
    ours.reset()
    ours.scores[:] = 0
    ours.load_state(state)
    assert np.allclose(logprobs(ours), expected, atol=1e-3) and len(expected) > 50
    assert ours.timings.reused_tokens > 20
    plain.close()
    ours.close()


def write_adapter(model, target, seed: int):
    """Writes an adapter for boundary 2 with large random differences."""
    generator = torch.Generator().manual_seed(seed)
    differences = []
    for projection in find_projections(model.torch_model, 2):
        n_out, n_in = projection.module.weight.shape
        b = torch.zeros(n_out, 2)
        b[projection.rows] = torch.randn(len(b[projection.rows]), 2, generator=generator)
        differences.append(pair_adapter.Difference(projection, torch.randn(2, n_in, generator=generator), b))
    pair_adapter.write_adapter(target, model.torch_model, 2, differences, library.fingerprint(model.gguf))
    return target


def test_positions_that_other_projections_filled_are_read_again(reference_models, tmp_path):
    model = reference_models["llama"]
    tokens = model.tokens(40)
    files = [False, *(write_adapter(model, tmp_path / f"{seed}.gguf", seed) for seed in (1, 2))]

    def logits(llm, state=None):
        if state is not None:
            llm.load_state(state)
        next(llm.generate(tokens, temp=0))
        return llm._logits_of(1)

    options = dict(
        pop_boundary=2,
        n_ctx=64,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        **ONE_THREAD,
    )
    written = []
    for file in files:
        llm = PopLlama(str(model.gguf), pop_adapter=file, **options)
        written.append((llm, logits(llm), llm.save_state()))
    for i, (llm, expected, _) in enumerate(written):
        for j, (_, _, state) in enumerate(written):
            llm.reset()
            assert np.allclose(logits(llm, state), expected, atol=1e-3)
            assert llm.timings.reused_tokens == (len(tokens) - 1 if i == j else 0)
    assert not np.allclose(written[0][1], written[1][1], atol=1e-2) and not np.allclose(
        written[1][1], written[2][1], atol=1e-2
    )
    for llm, *_ in written:
        llm.close()


def test_shallow_state_of_a_hybrid_is_cleared_and_read_again(reference_models):
    model = reference_models["lfm2"]
    tokens = model.tokens(40)

    def answer(llm, **which):
        with llm._calling(Call(which.get("boundary", llm.pop.boundary))):
            return [token for token, _ in zip(llm.generate(tokens, temp=0), range(4))]

    options = dict(pop_boundary=4, n_ctx=64, **ONE_THREAD)
    expected = [answer(PopLlama(str(model.gguf), **options), boundary=boundary) for boundary in (2, 4)]
    llm = PopLlama(str(model.gguf), **options)
    assert answer(llm, boundary=2) == expected[0]
    state = llm.save_state()
    other = PopLlama(str(model.gguf), **options)
    other.load_state(state)
    assert answer(other) == expected[1] and other.timings.reused_tokens == 0
    llm.close()
    other.close()


# llama.cpp makes a context of 256 positions out of these 100


@pytest.fixture(scope="module")
def rounded_up(bundled_gguf):
    llm = PopLlama(str(bundled_gguf), **{**OPTIONS, "n_ctx": 100}, logits_all=True)
    yield llm
    llm.close()


def test_state_that_is_longer_than_the_asked_context_loads(bundled_gguf, rounded_up):
    """llama.cpp's ``llama_n_ctx`` tells how much fits."""
    tokens = list(range(5, 104))
    rounded_up.create_completion(tokens, **CALL)
    state = rounded_up.save_state()
    assert llama_cpp.llama_n_ctx(rounded_up.ctx) == 256 and state.n_tokens == 106
    rounded_up.reset()
    rounded_up.load_state(state)
    assert rounded_up.n_tokens == 106 and rounded_up.input_ids[:99].tolist() == tokens
    pruned = PopLlama(str(bundled_gguf), **{**OPTIONS, "n_ctx": 100})
    pruned.create_completion(tokens, **CALL)
    pruned.load_state(pruned.save_state())
    pruned.create_completion(tokens, **CALL)
    assert pruned.timings.reused_tokens == 98
    pruned.close()


def test_prompt_scores_and_cache_reach_the_end_of_the_context(bundled_gguf, rounded_up, stock):
    tokens = [5 + i % 900 for i in range(255)]
    code = """
import json, sys, llama_cpp
one = dict(n_threads=1, n_threads_batch=1, verbose=False)
llm = llama_cpp.Llama(sys.argv[1], n_ctx=256, n_batch=32, logits_all=True, **one)
llm.eval(json.loads(sys.argv[2]))
print(json.dumps(llm.scores[:255].argmax(axis=1).tolist()))
"""
    rounded_up.reset()
    rounded_up.eval(tokens)
    assert rounded_up.scores[:255].argmax(axis=1).tolist() == stock(code, bundled_gguf, tokens)
    rounded_up.set_cache(llama_cpp.LlamaRAMCache())
    rounded_up.create_completion(tokens, **CALL)
    rounded_up.reset()
    rounded_up.create_completion(tokens, **CALL)
    assert rounded_up.timings.reused_tokens == 254
    rounded_up.set_cache(None)
    assert rounded_up.score(tokens[:156], tokens[:100]).shape == (100, rounded_up.n_vocab())


def test_copy_of_an_object_has_the_context_that_there_is(rounded_up):
    other = pickle.loads(pickle.dumps(rounded_up))
    other.load_state(rounded_up.save_state())
    assert other.n_ctx() == rounded_up.n_ctx() and len(other.input_ids) == 256
    other.close()


def test_micro_batch_of_size_0_is_as_long_as_a_batch(bundled_gguf):
    llm = PopLlama(str(bundled_gguf), **OPTIONS, n_ubatch=0)
    reports = []
    llm.create_completion(list(range(5, 80)), **CALL, progress=lambda done, total: reports.append(done))
    assert reports == [0, 32, 64, 75]
    assert llm.score([5, 6], [7, 8, 9]).shape == (3, llm.n_vocab())
    llm.close()


@pytest.mark.parametrize("size", [{"n_ctx": -1}, {"n_batch": 0}, {"n_batch": -5}, {"n_ubatch": -1}, {"n_ctx": 2**40}])
def test_size_out_of_range_is_refused(bundled_gguf, size):
    with pytest.raises(PopError, match=rf"^{min(size)} is -?\d+: give a whole number, at least"):
        PopLlama(str(bundled_gguf), **size, verbose=False)


def test_state_that_is_damaged_is_refused_and_leaves_this_object_usable(llm):
    llm.reset()
    expected = complete(llm)
    state = llm.save_state()
    moment = random.Random(5)

    def flipped(data, at):
        return data[:at] + bytes([data[at] ^ 1 << moment.randrange(8)]) + data[at + 1 :]

    data = state.llama_state
    cuts = [0, 1, 100, len(data) - 1, *(moment.randrange(len(data)) for _ in range(10))]
    damages = [
        *({"llama_state": data[:n]} for n in cuts),
        *({"llama_state": data[:n], "llama_state_size": n} for n in cuts),
        *({"llama_state": flipped(data, moment.randrange(len(data)))} for _ in range(10)),
        *({"llama_state": flipped(data, at)} for at in range(0, 80, 7)),
        *({"n_tokens": n} for n in (-1, state.n_tokens - 1, state.n_tokens + 1, 10**6, "5", None)),
        {"input_ids": state.input_ids[:3]},
        {"scores": None},
        {"scores": state.scores[0]},
        {"pop_computed_with": state.pop_computed_with[:3]},
    ]
    for damage in damages:
        damaged = copy.copy(state)
        vars(damaged).update(damage)
        with pytest.raises(PopError, match=r"^this state is damaged or cut short: save it again$"):
            llm.load_state(damaged)
        plain = copy.copy(damaged)  # a plain Llama knows no checksum, so llama.cpp has to notice what it can
        del plain.pop_checksum, plain.pop_computed_with
        with contextlib.suppress(PopError):
            llm.load_state(plain)
        llm.reset()
    llm.load_state(state)
    assert complete(llm) == expected
    with pytest.raises(TypeError, match="takes what save_state"):
        llm.load_state("state.bin")
