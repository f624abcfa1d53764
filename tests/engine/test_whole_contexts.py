"""A context that reads something of every layer, or runs other layers than the trunk, runs whole at any boundary."""

import ctypes
import json
import sys

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support import tiny_models
from tests.support.engine import Engine, llama_cpp
from tests.support.gguf_files import UINT32, copy_model
from tests.support.pop_reference import squared_error

BOUNDARY = 3
MTP = 1  # enum llama_context_type


@pytest.mark.skipif(sys.platform == "win32", reason="Visual C++ gives the functions other names")
@pytest.mark.parametrize("what", ["layer-inputs", "nextn-embeddings"])
def test_contexts_that_read_every_layer_run_whole(reference_models, what):
    model = reference_models["llama"]
    tokens = model.tokens(40)
    # llama.cpp exports these functions with C++ names only.
    symbol, arguments = {
        "layer-inputs": (
            "_Z30llama_set_embeddings_layer_inpP13llama_contextjb",
            (ctypes.c_uint32(4), ctypes.c_bool(True)),
        ),
        "nextn-embeddings": (
            "_Z26llama_set_embeddings_nextnP13llama_contextbb",
            (ctypes.c_bool(True), ctypes.c_bool(False)),
        ),
    }[what]
    assert hasattr(llama_cpp.llama_cpp._lib, symbol), f"llama.cpp has no {symbol}: look up the function's new signature"
    with Engine(model.gguf, BOUNDARY) as engine:
        getattr(llama_cpp.llama_cpp._lib, symbol)(ctypes.c_void_p(engine.context), *arguments)
        logits = engine.prefill(tokens)
        assert engine.n_pruned == 0
    with Engine(model.gguf) as whole:
        assert squared_error(logits, whole.prefill(tokens)) <= 1e-9


# lfm2 has recurrent states, so llama.cpp splits its batches by sequence.
@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_embedding_contexts_run_whole(reference_models, name):
    model = reference_models[name]
    tokens = [model.tokens(count, seed=count) for count in (40, 23)]
    rows = []
    for boundary in (BOUNDARY, None):
        with Engine(model.gguf, boundary, embeddings=True, n_ubatch=64, n_seq_max=2) as engine:
            entries = [(token, i, s, True) for s, prompt in enumerate(tokens) for i, token in enumerate(prompt)]
            engine.decode(entries)
            assert engine.n_pruned == 0
            pointers = [llama_cpp.llama_get_embeddings_ith(engine.context, i) for i in (39, 62)]
            rows.append([np.ctypeslib.as_array(pointer, shape=(64,)).copy() for pointer in pointers])
    assert np.array_equal(*rows)


def test_rerank_models_run_whole(reference_models, tmp_path):
    model = reference_models["qwen3"]
    tokens = model.tokens(40)
    head = np.random.default_rng(3).normal(0, 0.1, (2, 64)).astype(np.float32)  # the rows of "yes" and "no"
    path = copy_model(
        model.gguf,
        tmp_path / "rerank.gguf",
        [("qwen3.pooling_type", llama_cpp.LLAMA_POOLING_TYPE_RANK, UINT32)],
        {"cls.output.weight": head},
        labels=["yes", "no"],
    )
    with Engine(path, BOUNDARY, embeddings=True, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_RANK, n_ubatch=64) as engine:
        engine.decode([(token, i, 0, True) for i, token in enumerate(tokens)])
        assert engine.n_pruned == 0
        scores = np.ctypeslib.as_array(llama_cpp.llama_get_embeddings_seq(engine.context, 0), shape=(2,)).copy()
    with torch.no_grad():
        state = model.torch_model.model(torch.tensor([tokens])).last_hidden_state[0, -1]
        expected = torch.softmax(torch.from_numpy(head) @ state, 0).numpy()
    assert squared_error(scores, expected) <= 1e-9
    assert 0.01 < scores[0] < 0.99


@pytest.fixture(scope="module")
def mtp_model(tmp_path_factory):
    """A model with a trunk of six layers and a seventh layer that predicts the token after the next."""
    config = transformers.Glm4MoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=48,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        max_position_embeddings=512,
        initializer_range=0.12,
        num_nextn_predict_layers=1,
    )

    def add_predictor(directory):
        tensors = load_file(directory / "model.safetensors")
        layer = "model.layers.6."
        tensors |= {
            name.replace("layers.5.", "layers.6."): value.clone()
            for name, value in tensors.items()
            if "layers.5." in name
        }
        tensors[layer + "eh_proj.weight"] = torch.randn(64, 128) * 0.1
        for name in ("enorm", "hnorm", "shared_head.norm"):
            tensors[f"{layer}{name}.weight"] = torch.ones(64)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        written = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**written, "num_nextn_predict_layers": 1}))

    return tiny_models.write(tmp_path_factory.mktemp("mtp"), {"glm4": config}, add_predictor)["glm4"]


def decode_mtp(engine, tokens, states):
    """Decodes tokens in an MTP context and returns the last logits.

    Args:
        engine: Has the context.
        tokens: Tokens to read.
        states: The trunk's states of the tokens, F32 [n_tokens, n_embd].
    """
    batch = llama_cpp.llama_batch_init(len(tokens), states.shape[1], 1)
    ctypes.memmove(batch.embd, states.ctypes.data, states.nbytes)
    token_ids = (llama_cpp.llama_token * len(tokens))(*tokens)
    batch.token = ctypes.cast(token_ids, type(batch.token))
    batch.n_tokens = len(tokens)
    for i in range(len(tokens)):
        batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = i, 1, 0, i == len(tokens) - 1
    status = llama_cpp.llama_decode(engine.context, batch)
    batch.token = None
    llama_cpp.llama_batch_free(batch)
    assert status == 0
    return engine.logits(len(tokens) - 1)


def test_mtp_contexts_run_whole_beside_a_pruned_trunk(mtp_model):
    assert {tensor.name for tensor in gguf.GGUFReader(mtp_model.gguf).tensors} >= {"blk.6.nextn.eh_proj.weight"}
    tokens = mtp_model.tokens(40)
    states = np.random.default_rng(4).normal(0, 1, (len(tokens), 64)).astype(np.float32)
    with Engine(mtp_model.gguf, BOUNDARY) as trunk:
        trunk.prefill(tokens)
        assert trunk.n_pruned == len(tokens) - 1
    with Engine(mtp_model.gguf, BOUNDARY, load_mtp=True, ctx_type=MTP) as engine:
        predicted = decode_mtp(engine, tokens, states)
        assert engine.n_pruned == 0
    with Engine(mtp_model.gguf, load_mtp=True, ctx_type=MTP) as engine:
        expected = decode_mtp(engine, tokens, states)
    assert squared_error(predicted, expected) <= 1e-9


def test_drafters_with_a_cache_of_their_own_read_the_state_of_every_prompt_token(mtp_model):
    """This is why the trunk prunes nothing for them: a pruned token has no state of the last layer."""
    tokens = mtp_model.tokens(40)
    states = np.random.default_rng(4).normal(0, 1, (len(tokens), 64)).astype(np.float32)
    with Engine(mtp_model.gguf, load_mtp=True, ctx_type=MTP) as engine:
        expected = decode_mtp(engine, tokens, states)
    for position in (0, 17, 38):
        changed = states.copy()
        changed[position] = 0
        with Engine(mtp_model.gguf, load_mtp=True, ctx_type=MTP) as engine:
            assert squared_error(decode_mtp(engine, tokens, changed), expected) > 1e-6
