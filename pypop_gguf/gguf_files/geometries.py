"""The shapes of known models, as files of random weights have them: their tensors, keys and tokenizer.

``pop-gguf random-model`` (pypop_gguf/commands/random_model.py) fills these files with weights. The numbers are those of
the configuration that each model was published with. For Gemma 3n and Gemma 4, the definitions that their authors
publish have them, too (google-deepmind/gemma, ``gemma/gm/nn/gemma3n/_gemma3n.py`` and
``gemma/gm/nn/gemma4/_gemma4.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import gguf
from gguf import GGUFWriter

from pypop_gguf.errors import PopError

# llama.cpp has these numbers of Gemma 3n in its code (src/models/gemma3n.cpp and src/llama-hparams.h), not in the file.
_GEMMA3N_WRITING = 20  # layers that write a cache, however many there are above them
_ALTUP_INPUTS = 4  # copies of the residual stream
_LAUREL_RANK = 64
_SPARSE_LAYERS, _SPARSITY = 10, 1.6448533535003662  # the standard deviations that a share of 0.95 lies below


@dataclass(frozen=True)
class Geometry:
    """The shape of a model, as its own configuration gives it."""

    architecture: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    n_ctx_train: int
    rope_base: float
    tied: bool = False  # whether the output layer is the token embedding
    rms_eps: float = 1e-5
    sliding_window: int | None = None  # In gemma3, llama.cpp lets every sixth layer see all tokens.
    rope_scaling: float | None = None  # factor of linear scaling
    n_shared: int = 0  # upper layers that read the caches of the layers below them
    window_period: int = 0  # Every layer of this number sees all tokens. 0 leaves it to the architecture.
    head_dim_window: int | None = None  # of layers with a sliding window, where it differs from head_dim
    n_embd_layer: int = 0  # width of the embedding that each layer has of its own
    wide_shared: bool = False  # The feed-forward networks of the sharing layers are twice as wide.

    @property
    def head_norms(self) -> bool:
        return self.architecture in ("qwen3", "gemma3", "gemma3n", "gemma4")

    @property
    def post_norms(self) -> bool:
        return self.architecture in ("gemma3", "gemma3n", "gemma4")

    @property
    def n_writing(self) -> int:
        """Number of layers that write a cache."""
        return self.n_layer - self.n_shared

    def is_windowed(self, il: int) -> bool:
        """Returns whether a layer has a sliding window, where the file says so."""
        return self.window_period > 0 and (il + 1) % self.window_period != 0

    def head_dim_of(self, il: int) -> int:
        return self.head_dim_window if self.head_dim_window and self.is_windowed(il) else self.head_dim

    def n_ff_of(self, il: int) -> int:
        return 2 * self.n_ff if self.wide_shared and il >= self.n_writing else self.n_ff

    def with_layers(self, n_layer: int) -> Geometry:
        """Returns the shape with another number of layers. About the same share of them reads the caches of others.

        Raises:
            PopError: There are too few layers for any to share a cache.
        """
        if not self.n_shared:
            return replace(self, n_layer=n_layer)
        n_writing = _GEMMA3N_WRITING
        if self.architecture != "gemma3n":
            # The sharing layers read the last two caches, of which the upper one has to be that of a full layer.
            periods = round(n_layer * self.n_writing / self.n_layer / self.window_period)
            n_writing = max(1, periods) * self.window_period
        if n_layer <= n_writing:
            raise PopError(
                f"--layers {n_layer} is out of range: {n_writing} layers of this geometry write the cache that those "
                f"above them share, so give at least {n_writing + 1}"
            )
        return replace(self, n_layer=n_layer, n_shared=n_layer - n_writing)


_GEMMA_3N_E2B = Geometry(
    "gemma3n",
    30,
    2048,
    8192,
    8,
    2,
    256,
    262400,  # The converter fills the embeddings up with rows for images and sounds.
    32768,
    1000000.0,
    tied=True,
    rms_eps=1e-6,
    sliding_window=512,
    n_shared=10,
    window_period=5,
    n_embd_layer=256,
)
_GEMMA_4_E2B = Geometry(
    "gemma4",
    35,
    1536,
    6144,
    8,
    1,
    512,
    262144,
    131072,
    1000000.0,
    tied=True,
    rms_eps=1e-6,
    sliding_window=512,
    n_shared=20,
    window_period=5,
    head_dim_window=256,
    n_embd_layer=256,
    wide_shared=True,
)

GEOMETRIES = {
    "llama-3.2-1b": Geometry("llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072, 500000.0, tied=True),
    "llama-3.1-8b": Geometry("llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072, 500000.0),
    "qwen3-8b": Geometry("qwen3", 36, 4096, 12288, 32, 8, 128, 151936, 40960, 1000000.0, rms_eps=1e-6),
    "gemma-3-12b": Geometry(
        "gemma3",
        48,
        3840,
        15360,
        16,
        8,
        256,
        262208,
        131072,
        1000000.0,
        tied=True,
        rms_eps=1e-6,
        sliding_window=1024,
        rope_scaling=8.0,
    ),
    "gemma-3n-e2b": _GEMMA_3N_E2B,
    "gemma-3n-e4b": replace(_GEMMA_3N_E2B, n_layer=35, n_ff=16384, n_shared=15),
    "gemma-4-e2b": _GEMMA_4_E2B,
    "gemma-4-e4b": replace(
        _GEMMA_4_E2B,
        n_layer=42,
        n_embd=2560,
        n_ff=10240,
        n_head_kv=2,
        n_shared=18,
        window_period=6,
        wide_shared=False,
    ),
    "tiny": Geometry("llama", 8, 256, 512, 4, 2, 64, 512, 4096, 10000.0),
}


def list_tensors(geometry: Geometry) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields names and shapes in numpy's order (rows, columns), which is the opposite of ggml's."""
    g = geometry
    yield "token_embd.weight", (g.n_vocab, g.n_embd)
    if g.n_embd_layer:
        yield "per_layer_token_embd.weight", (g.n_vocab, g.n_layer * g.n_embd_layer)
        yield "per_layer_model_proj.weight", (g.n_layer * g.n_embd_layer, g.n_embd)
        yield "per_layer_proj_norm.weight", (g.n_embd_layer,)
    if g.architecture == "gemma3n":
        yield "altup_proj.weight", (_ALTUP_INPUTS - 1, g.n_embd, g.n_embd)
        yield "altup_unembd_proj.weight", (_ALTUP_INPUTS - 1, g.n_embd, g.n_embd)
    if g.architecture == "gemma4":
        yield "rope_freqs.weight", (g.head_dim // 2,)
    for il in range(g.n_layer):
        for tensor, shape in _list_block(g, il).items():
            yield f"blk.{il}.{tensor}.weight", shape
    yield "output_norm.weight", (g.n_embd,)
    if not g.tied:
        yield "output.weight", (g.n_vocab, g.n_embd)


def _list_block(g: Geometry, il: int) -> dict[str, tuple[int, ...]]:
    """Returns the tensors of a layer. As in the published files, layers that write no cache have attn_k and attn_v."""
    head_dim, n_ff = g.head_dim_of(il), g.n_ff_of(il)
    n_q, n_kv = g.n_head * head_dim, g.n_head_kv * head_dim
    block = {
        "attn_norm": (g.n_embd,),
        "attn_q": (n_q, g.n_embd),
        "attn_k": (n_kv, g.n_embd),
        "attn_v": (n_kv, g.n_embd),
        "attn_output": (g.n_embd, n_q),
        "ffn_norm": (g.n_embd,),
        "ffn_gate": (n_ff, g.n_embd),
        "ffn_up": (n_ff, g.n_embd),
        "ffn_down": (g.n_embd, n_ff),
    }
    if g.head_norms:
        block |= {"attn_q_norm": (head_dim,), "attn_k_norm": (head_dim,)}
    if g.post_norms:
        block |= {"post_attention_norm": (g.n_embd,), "post_ffw_norm": (g.n_embd,)}
    if g.n_embd_layer:
        block |= {
            "inp_gate": (g.n_embd_layer, g.n_embd),
            "proj": (g.n_embd, g.n_embd_layer),
            "post_norm": (g.n_embd,),
        }
    if g.architecture == "gemma3n":
        block |= {
            "altup_correct_coef": (_ALTUP_INPUTS, _ALTUP_INPUTS),
            "altup_correct_scale": (g.n_embd,),
            "altup_predict_coef": (_ALTUP_INPUTS**2, _ALTUP_INPUTS),
            "altup_router": (_ALTUP_INPUTS, g.n_embd),
            "altup_router_norm": (g.n_embd,),
            "laurel_l": (_LAUREL_RANK, g.n_embd),
            "laurel_r": (g.n_embd, _LAUREL_RANK),
            "laurel_post_norm": (g.n_embd,),
        }
    if g.architecture == "gemma4":
        block["layer_output_scale"] = (1,)
    return block


def add_keys(writer: GGUFWriter, geometry: Geometry) -> None:
    """Adds what llama.cpp has to know of the shape, and a tokenizer."""
    g = geometry
    writer.add_block_count(g.n_layer)
    writer.add_context_length(g.n_ctx_train)
    writer.add_embedding_length(g.n_embd)
    writer.add_feed_forward_length([g.n_ff_of(il) for il in range(g.n_layer)] if g.wide_shared else g.n_ff)
    writer.add_head_count(g.n_head)
    writer.add_head_count_kv(g.n_head_kv)
    writer.add_key_length(g.head_dim)
    writer.add_value_length(g.head_dim)
    writer.add_rope_dimension_count(g.head_dim)
    writer.add_rope_freq_base(g.rope_base)
    writer.add_layer_norm_rms_eps(g.rms_eps)
    writer.add_vocab_size(g.n_vocab)
    add_tokenizer(writer, g.n_vocab)
    if g.sliding_window:
        writer.add_sliding_window(g.sliding_window)
    if g.rope_scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(g.rope_scaling)
    if g.n_shared:
        _add_shared_cache_keys(writer, g)


def _add_shared_cache_keys(writer: GGUFWriter, g: Geometry) -> None:
    writer.add_shared_kv_layers(g.n_shared)
    writer.add_embedding_length_per_layer_input(g.n_embd_layer)
    writer.add_sliding_window_pattern([g.is_windowed(il) for il in range(g.n_layer)])
    writer.add_rope_freq_base_swa(10000.0)
    writer.add_final_logit_softcapping(30.0)
    if g.head_dim_window:
        writer.add_key_length_swa(g.head_dim_window)
        writer.add_value_length_swa(g.head_dim_window)
        writer.add_rope_dimension_count_swa(g.head_dim_window)
    if g.architecture == "gemma3n":
        writer.add_altup_active_idx(0)
        writer.add_altup_num_inputs(_ALTUP_INPUTS)
        writer.add_activation_sparsity_scale(
            [_SPARSITY if il < _SPARSE_LAYERS else float("-inf") for il in range(g.n_layer)]
        )


def add_tokenizer(writer: GGUFWriter, n_vocab: int) -> None:
    """Adds a tokenizer that has a token for each byte and, with the rest of its tokens, for each number from 0 on."""
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL] + [gguf.TokenType.BYTE] * 256
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    n_numbers = n_vocab - len(tokens)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, *(f"\u2581{number}" for number in range(n_numbers))])
    writer.add_token_scores([0.0] * n_vocab)
    writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * n_numbers])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
