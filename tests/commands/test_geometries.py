"""The shapes that ``pop-gguf random-model`` knows, above all those of models whose upper layers share a cache.

Gemma 3n and Gemma 4 are compared with public figures: the parameters and tensors that llama.cpp reports of the
published files, and the configurations that transformers has. Small files of the same kind are read by stock
llama.cpp, too.
"""

import dataclasses
import re
import subprocess
import sys

import numpy as np
import pytest

from pypop_gguf import PopError, PopLlama, library
from pypop_gguf.boundary_rules import default_boundary
from pypop_gguf.cli import main
from pypop_gguf.commands import random_model
from pypop_gguf.gguf_files import quantize
from pypop_gguf.gguf_files.geometries import GEOMETRIES, list_tensors
from tests.commands.test_bench import STOCK_OPTIONS, needs_stock, tensor_types
from tests.support.pop_reference import squared_error

SHARING = ["gemma-3n-e2b", "gemma-3n-e4b", "gemma-4-e2b", "gemma-4-e4b"]
N_LAYER = {"gemma-3n-e2b": 24, "gemma-4-e2b": 10}  # of small models, of which 20 and 5 write the cache
N_PROMPT, N_TOKENS = 70, 74

# The logits of the last prompt token and of each token after it. Stock llama.cpp and ours run this in their processes.
LOGITS_CODE = """
import sys
import numpy as np, llama_cpp

def logits(kind, path, tokens, parts, **options):
    options |= dict(n_ctx=256, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, flash_attn=False, verbose=False)
    llm = kind(path, **options)
    rows = []
    for part in parts:
        llm.eval([tokens[i] for i in part])
        pointer = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        rows.append(np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),)).copy())
    llm.close()
    return np.stack(rows[-5:])
"""


def parts(last_alone: bool) -> list[range]:
    """The indices of the tokens of each pass: the prompt in one pass or with its last token alone, then the others."""
    prompt = [range(N_PROMPT - 1), range(N_PROMPT - 1, N_PROMPT)] if last_alone else [range(N_PROMPT)]
    return [*prompt, *(range(i, i + 1) for i in range(N_PROMPT, N_TOKENS))]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Writes a model of few and narrow layers and a small vocabulary, and returns its path."""
    base = tmp_path_factory.mktemp("small")

    def write(name: str, outtype: str):
        path = base / f"{name}-{outtype}.gguf"
        if not path.exists():
            geometry = dataclasses.replace(
                GEOMETRIES[name].with_layers(N_LAYER[name]), n_embd=256, n_ff=512, n_vocab=512, sliding_window=32
            )
            random_model.write_model(geometry, name, path, outtype)
        return path

    return write


@pytest.mark.parametrize(
    ("name", "billions", "n_tensors"),
    [  # as llama.cpp prints them of the published files
        ("gemma-3n-e2b", 4.46, None),
        ("gemma-3n-e4b", 6.87, None),
        ("gemma-4-e2b", 4.65, 601),
        ("gemma-4-e4b", 7.52, 720),
    ],
)
def test_shared_cache_models_have_the_parameters_of_the_published_files(name, billions, n_tensors):
    tensors = dict(list_tensors(GEOMETRIES[name]))
    assert round(sum(int(np.prod(shape)) for shape in tensors.values()) / 1e9, 2) == billions
    assert n_tensors in (None, len(tensors))


def test_shared_cache_models_write_the_known_number_of_caches():
    assert {name: (GEOMETRIES[name].n_writing, GEOMETRIES[name].n_layer) for name in SHARING} == {
        "gemma-3n-e2b": (20, 30),
        "gemma-3n-e4b": (20, 35),
        "gemma-4-e2b": (15, 35),
        "gemma-4-e4b": (24, 42),
    }


def test_gemma_3n_e4b_is_what_transformers_has_as_its_default():
    import transformers

    config, g = transformers.Gemma3nTextConfig(), GEOMETRIES["gemma-3n-e4b"]
    assert (g.n_layer, g.n_embd, g.n_vocab) == (config.num_hidden_layers, config.hidden_size, config.vocab_size)
    assert [g.n_ff_of(il) for il in range(g.n_layer)] == config.intermediate_size
    assert (g.n_head, g.n_head_kv, g.head_dim) == (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    assert (g.n_shared, g.n_embd_layer) == (config.num_kv_shared_layers, config.hidden_size_per_layer_input)
    assert (g.sliding_window, g.n_ctx_train) == (config.sliding_window, config.max_position_embeddings)
    windowed = [kind == "sliding_attention" for kind in config.layer_types]
    assert [g.is_windowed(il) for il in range(g.n_layer)] == windowed
    shapes = dict(list_tensors(g))
    assert shapes["blk.0.laurel_l.weight"] == (config.laurel_rank, config.hidden_size)
    assert shapes["blk.0.altup_router.weight"] == (config.altup_num_inputs, config.hidden_size)


@pytest.mark.parametrize("name", ["gemma-4-e2b", "gemma-4-e4b"])
def test_gemma_4_has_the_numbers_that_transformers_has_for_all_sizes(name):
    import transformers

    config, g = transformers.Gemma4TextConfig(), GEOMETRIES[name]
    assert (g.n_vocab, g.n_head) == (config.vocab_size, config.num_attention_heads)
    assert (g.sliding_window, g.n_ctx_train) == (config.sliding_window, config.max_position_embeddings)
    assert g.n_embd_layer == config.hidden_size_per_layer_input
    widths = dict(zip(config.layer_types, (config.per_layer_config[il].head_dim for il in range(6)), strict=False))
    assert {"sliding_attention": g.head_dim_window, "full_attention": g.head_dim} == widths


@pytest.mark.parametrize("name", SHARING)
def test_fewer_layers_keep_the_share_and_end_in_a_full_layer_that_writes(name):
    whole = GEOMETRIES[name]
    for n_layer in range(1, 2 * whole.n_layer):
        try:
            g = whole.with_layers(n_layer)
        except PopError as error:
            least = whole.window_period if name.startswith("gemma-4") else 20
            assert n_layer <= least and f"give at least {least + 1}" in str(error)
            continue
        assert not g.is_windowed(g.n_writing - 1) and g.is_windowed(g.n_writing - 2)
        share = n_layer * whole.n_writing / whole.n_layer if name.startswith("gemma-4") else 20
        assert g.n_layer == n_layer and g.n_shared >= 1
        assert abs(g.n_writing - share) <= whole.window_period / 2 or g.n_writing == whole.window_period


def test_too_few_layers_to_share_are_refused_in_one_line(tmp_path, capsys):
    for name, n_layer, least in (("gemma-4-e2b", 5, 6), ("gemma-4-e4b", 6, 7), ("gemma-3n-e2b", 12, 21)):
        assert main(["random-model", name, str(tmp_path / "x.gguf"), "--layers", str(n_layer)]) != 0
        error = capsys.readouterr().err.strip()
        assert f"--layers {n_layer}" in error and f"give at least {least}" in error and "\n" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", N_LAYER)
def test_default_boundary_of_measurements_is_the_lossless_one(small, name):
    support = library.describe_model(small(name, "q4_k_m"))
    assert default_boundary(support, None) == support.lossless_boundary == {24: 19, 10: 4}[N_LAYER[name]]


@pytest.mark.parametrize("name", N_LAYER)
@pytest.mark.parametrize("outtype", ["q4_k_m", "q8_0", "q4_0"])
def test_shared_cache_model_has_the_tensor_types_that_llama_cpp_gives(small, tmp_path, name, outtype):
    quantize.quantize(small(name, "f16"), tmp_path / "quantized.gguf", outtype)
    assert tensor_types(small(name, outtype)) == tensor_types(tmp_path / "quantized.gguf")


@pytest.mark.parametrize("outtype", ["f16", "q4_k_m"])
@pytest.mark.parametrize("name", N_LAYER)
@pytest.mark.usefixtures("kernels_off")
def test_lossless_boundary_gives_the_logits_of_stock(small, stock, tmp_path, continuation, name, outtype):
    path = str(small(name, outtype))
    tokens = np.random.default_rng(5).integers(3, 512, N_TOKENS).tolist()
    run = f"""
{LOGITS_CODE}
for i, parts in enumerate({[parts(True), parts(False)]}):
    np.save(sys.argv[2] + f"/{{i}}.npy", logits(llama_cpp.Llama, sys.argv[1], {tokens}, parts))
print("null")
"""
    stock(run, path, tmp_path)
    last_alone, in_one_pass = (np.load(tmp_path / f"{i}.npy") for i in range(2))

    names: dict = {}
    exec(LOGITS_CODE, names)
    actual = names["logits"](PopLlama, path, tokens, parts(False))
    lower = names["logits"](PopLlama, path, tokens, parts(False), pop_boundary={24: 18, 10: 3}[N_LAYER[name]])
    if not continuation:  # The same passes run as in stock, where the last prompt token is read alone.
        assert np.array_equal(actual, last_alone)
    error, effect = (
        min(squared_error(logits, expected) for expected in (last_alone, in_one_pass)) for logits in (actual, lower)
    )
    # A token that continues runs the lower layers with the others and the upper ones alone, so it is rounded otherwise.
    assert error <= 1e-4 < effect / 100


@needs_stock
def test_bench_measures_the_lossless_boundary_against_stock(small, tmp_path):
    path = small("gemma-4-e2b", "q4_k_m")
    options = ["--prompt", "32", "--parallel", "1", "--runs", "1", "--decode", "1", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "pypop_gguf", "bench", str(path), *options, *STOCK_OPTIONS],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    row = re.search(r"^ +32 +1 +4 +continued +1 .*$", done.stdout, re.MULTILINE)
    assert row, done.stdout
    limit = float(row[0].split()[-3])
    assert 2 < limit < 4
