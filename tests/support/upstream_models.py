"""Writes tiny models in the place of those that llama-cpp-python's own tests download.

Each is of the same kind, with random weights and the tokenizer of one of llama.cpp's vocabulary files. The model for
Qwen 3.5 also knows which token follows which in the texts that the tests expect: the output row of each token points to
the embedding of the token before it. Its vocabulary is that of Qwen 2, which llama.cpp has as a file, with two pairs of
tokens exchanged, because a test knows the ids of a text in Qwen 3.5.
"""

import itertools
import struct
from pathlib import Path

from gguf import GGUFValueType

from pypop_gguf.gguf_files.header import Field, read_header
from tests.support import tiny_models

# The texts that the tests expect Qwen 3.5 to write.
_TEXTS = (b" fox jumps over the lazy dog.", b"?:\ntrue", b" parrot")
# The ids of tokens in the vocabulary file and in the test.
_IDS = {"Hello": (9707, 9419), "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}world": (1879, 1814)}
_VOCABULARIES = {"qwen35": "qwen35", "mamba": "gpt-2", "falcon-h1": "gpt-2", "bert": "bert-bge"}


def _configs() -> dict:
    import transformers

    small = dict(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, tie_word_embeddings=False, initializer_range=0.12
    )
    state = dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1)
    linear = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)
    rope = dict(
        rope_type="default",
        rope_theta=10000.0,
        partial_rotary_factor=0.25,
        mrope_section=[2, 1, 1],
        mrope_interleaved=True,
    )
    return {
        "qwen35": transformers.Qwen3_5TextConfig(
            num_hidden_layers=8,
            vocab_size=151936,
            head_dim=32,
            num_key_value_heads=2,
            bos_token_id=None,
            eos_token_id=None,
            rope_parameters=rope,
            **linear,
            **{**small, "initializer_range": 0.02},
        ),
        "mamba": transformers.MambaConfig(
            num_hidden_layers=4, vocab_size=50257, hidden_size=64, state_size=8, initializer_range=0.12
        ),
        "falcon-h1": transformers.FalconH1Config(
            num_hidden_layers=6, vocab_size=50257, head_dim=16, num_key_value_heads=2, **state, **small
        ),
        "bert": transformers.BertConfig(num_hidden_layers=3, vocab_size=30522, max_position_embeddings=64, **small),
    }


def write(base: Path, vocabularies: Path) -> dict[str, Path]:
    """Writes the models below ``base``. ``vocabularies`` is the directory of llama.cpp's ``ggml-vocab-*.gguf``.

    Returns:
        Each file by the name of the file that the tests download.
    """
    import torch
    import transformers

    for name, config in _configs().items():
        torch.manual_seed(7)
        kind = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
        model = kind.from_config(config, dtype=torch.float32).eval()
        if name == "qwen35":
            _teach(model, vocabularies / "ggml-vocab-qwen35.gguf")
        model.save_pretrained(base / name)
    tiny_models.to_gguf([base / name for name in _VOCABULARIES])
    for name, vocabulary in _VOCABULARIES.items():
        fields = read_header(vocabularies / f"ggml-vocab-{vocabulary}.gguf").fields
        keys = {key: field.raw for key, field in fields.items() if key.startswith("tokenizer.")}
        if name == "bert":
            name_of_key, first_token = b"bert.pooling_type", 2
            keys["bert.pooling_type"] = struct.pack("<Q17sII", 17, name_of_key, GGUFValueType.UINT32, first_token)
        if name == "qwen35":
            keys["tokenizer.ggml.tokens"] = _exchanged(fields["tokenizer.ggml.tokens"])
        _set_tokenizer(base / name / "model.gguf", keys, base / f"{name}.gguf")
    return {
        "Qwen3.5-0.8B-Q8_0.gguf": base / "qwen35.gguf",
        "mamba-130m-hf.Q2_K.gguf": base / "mamba.gguf",
        "Falcon-H1-Tiny-90M-Instruct-Q2_K.gguf": base / "falcon-h1.gguf",
        "bge-small-en-v1.5-q4_k_m.gguf": base / "bert.gguf",
    }


def _teach(model, vocabulary: Path) -> None:
    """Makes each text of ``_TEXTS`` the most likely continuation of its first token, whatever comes before."""
    import llama_cpp
    import torch

    tokenizer = llama_cpp.Llama(str(vocabulary), vocab_only=True, verbose=False)
    inputs, outputs = model.model.embed_tokens.weight, model.lm_head.weight
    with torch.no_grad():
        torch.nn.init.normal_(inputs)
        for text in _TEXTS:
            tokens = tokenizer.tokenize(text, add_bos=False, special=True)
            for before, after in itertools.pairwise(tokens):
                outputs[after] = inputs[before] / 4
    tokenizer.close()


def _exchanged(tokens: Field) -> bytes:
    """Returns the raw value of a vocabulary in which the tokens of ``_IDS`` are exchanged."""
    texts, at = [], tokens.start
    for _ in range(tokens.count):
        end = at + 8 + struct.unpack_from("<Q", tokens.raw, at)[0]
        texts.append(tokens.raw[at:end])
        at = end
    for text, (there, here) in _IDS.items():
        assert texts[there][8:] == text.encode()
        texts[there], texts[here] = texts[here], texts[there]
    return tokens.raw[: tokens.start] + b"".join(texts)


def _set_tokenizer(model: Path, keys: dict[str, bytes], target: Path) -> None:
    header = read_header(model)
    fields = {name: field.raw for name, field in header.fields.items() if not name.startswith("tokenizer.")} | keys
    start = (
        b"GGUF"
        + struct.pack("<IQQ", header.version, header.n_tensors, len(fields))
        + b"".join(fields.values())
        + header.tensor_infos
    )
    target.write_bytes(start + bytes(-len(start) % header.alignment) + model.read_bytes()[header.data_offset :])
