"""Runs the upper layers of a model in PyTorch, so that gradients flow through them: ``training`` learns with it.

The weights come from the GGUF and keep its order of rows. For Llama it interleaves the two numbers that RoPE rotates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from gguf import GGUFReader
from gguf.quants import dequantize

from pypop_gguf.errors import PopError
from pypop_gguf.fitting.products import layer_of
from pypop_gguf.gguf_files.tensors import list_shards

_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")  # of each layer
_INTERLEAVED = {"llama": True, "qwen2": False, "qwen3": False}  # how RoPE pairs the numbers of a head, by architecture

Pair = tuple[torch.Tensor, torch.Tensor]  # of keys and values


class Decoder:
    """The upper layers of a Llama, Qwen2 or Qwen3, without gradients of their own.

    Attributes:
        n_layer: Number of layers of the model.
        heads: Heads of keys and values.
        head_width: Numbers of a head.
        weights: Their tensors by names, those that belong to no layer, and the biases of all layers.
    """

    def __init__(self, path: Path, device: str, first_layer: int = 0, kind: torch.dtype = torch.float32) -> None:
        """Reads the weights.

        Args:
            path: The GGUF file.
            device: Where PyTorch computes.
            first_layer: The lowest layer that is needed.
            kind: The type in which matrices are kept and multiplied; all else is F32.

        Raises:
            PopError: The architecture is another one, or the file is one of several.
        """
        if len(list_shards(path)) > 1:
            raise PopError(f"{path} is split, and training reads one file: merge its parts, or leave --train out")
        reader = GGUFReader(path)
        architecture = reader.fields["general.architecture"].contents()
        if architecture not in _INTERLEAVED:
            raise PopError(f"training knows {', '.join(_INTERLEAVED)}, not {architecture}: leave --train out")

        def key(name: str, default=None):
            field = reader.fields.get(f"{architecture}.{name}")
            return default if field is None else field.contents()

        self._interleaved, self._device, self._kind = _INTERLEAVED[architecture], device, kind
        self.n_layer, n_head = key("block_count"), key("attention.head_count")
        self.heads = key("attention.head_count_kv", n_head)
        self.head_width = key("attention.key_length", key("embedding_length") // n_head)
        self._group, self._epsilon = n_head // self.heads, key("attention.layer_norm_rms_epsilon")
        self._first_layer = first_layer
        self.weights: dict[str, torch.Tensor] = {}
        for tensor in reader.tensors:
            is_below = tensor.name.startswith("blk.") and layer_of(tensor.name) < first_layer
            if not is_below or tensor.name.endswith(".bias"):
                weight = self.moved(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32))
                self.weights[tensor.name] = weight.to(kind) if weight.dim() > 1 else weight
        needed = {f"blk.{layer}.{name}.weight" for layer in range(first_layer, self.n_layer) for name in _MATRICES}
        if missing := sorted(needed - set(self.weights)):
            raise PopError(f"training does not know layers without {missing[0]}: leave --train out")
        self._embedding = self.weights["token_embd.weight"]
        self._output = self.weights.get("output.weight", self._embedding)
        exponents = torch.arange(0, self.head_width, 2, device=device).float() / self.head_width
        self._frequencies = key("rope.freq_base", 10000.0) ** -exponents / self.weights.get("rope_freqs.weight", 1.0)

    def moved(self, x: np.ndarray) -> torch.Tensor:
        """Returns an array as a tensor on the device that PyTorch computes on."""
        return torch.from_numpy(x).to(self._device)

    def embedded(self, tokens: Sequence[int]) -> torch.Tensor:
        """Returns the states [tokens, width] before the first layer."""
        return self._embedding[torch.tensor(tokens, device=self._device)].float()

    def size(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the root mean squares [..., 1] of states, by which they are divided before each layer."""
        return (x.square().mean(-1, keepdim=True) + self._epsilon).sqrt()

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        """Returns states [..., width] divided by their root mean square."""
        return x / self.size(x)

    def product(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Returns the product of inputs [..., n_in] with a matrix [n_out, n_in] as F32."""
        return functional.linear(x.to(self._kind), matrix.to(self._kind)).float()

    def rotated(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Applies RoPE to keys or queries [tokens, heads, head_width] at positions [tokens]."""
        angles = positions.float()[:, None, None] * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        first, second = (x[..., 0::2], x[..., 1::2]) if self._interleaved else x.chunk(2, -1)
        pair = first * cos - second * sin, first * sin + second * cos
        return torch.stack(pair, -1).flatten(-2) if self._interleaved else torch.cat(pair, -1)

    def cached(self, layer: int, products: Pair, positions: torch.Tensor) -> Pair:
        """Returns the keys and values of the cache from the products of their weights, with RoPE applied.

        Args:
            layer: The layer.
            products: Of the weights of keys and values, each [tokens, heads * head_width].
            positions: Of the tokens, [tokens].
        """
        keys, values = (x.view(-1, self.heads, self.head_width) for x in products)
        return self.rotated(self._head_norm(layer, "attn_k_norm", keys), positions), values

    def key_value_products(self, layer: int, x: torch.Tensor) -> Pair:
        """Returns the products of the weights of keys and values with what the attention of a layer reads."""
        return self.project(layer, "attn_k", x), self.project(layer, "attn_v", x)

    def project(self, layer: int, name: str, x: torch.Tensor) -> torch.Tensor:
        """Multiplies with a weight of a layer and adds its bias, if it has one."""
        return self.product(x, self.weights[f"blk.{layer}.{name}.weight"]) + self.bias(f"blk.{layer}.{name}")

    def bias(self, name: str) -> torch.Tensor | float:
        """Returns the bias of a weight such as ``blk.7.attn_v``, or 0 if it has none."""
        return self.weights.get(f"{name}.bias", 0.0)

    def own_input(self, layer: int, state: torch.Tensor) -> torch.Tensor:
        """Returns what the attention of a layer reads of states."""
        return self.normalized(state) * self.weights[f"blk.{layer}.attn_norm.weight"]

    def attended(self, layer: int, state: torch.Tensor, before: Sequence[Pair], masks, positions) -> torch.Tensor:
        """Returns the states [tokens, width] of all texts after the attention of a layer.

        Args:
            layer: The layer.
            state: The states before it, those of one text behind those of another.
            before: Keys and values of what stands before the tokens of each text, [cells, heads, head_width].
            masks: Whether a token sees a cell, its text's own tokens included, [tokens, cells] for each text.
            positions: Of all tokens, [tokens].
        """
        x, sizes = self.own_input(layer, state), [len(mask) for mask in masks]
        queries = self.project(layer, "attn_q", x).view(len(x), -1, self.head_width)
        queries = self.rotated(self._head_norm(layer, "attn_q_norm", queries), positions)
        own = self.cached(layer, self.key_value_products(layer, x), positions)
        parts = zip(queries.split(sizes), behind(before, own, sizes), masks, strict=True)
        mixed = [self._mixed(queries, *cache, mask) for queries, cache, mask in parts]
        return state + self.project(layer, "attn_output", torch.cat(mixed))

    def _mixed(self, queries, keys, values, mask) -> torch.Tensor:
        """Returns the values that the tokens of a text attend to, [tokens, heads of queries * head_width]."""
        tokens = len(queries)
        queries = queries.view(tokens, self.heads, self._group, self.head_width).permute(1, 2, 0, 3)
        scores = queries.flatten(1, 2) @ keys.permute(1, 2, 0) / math.sqrt(self.head_width)
        scores = scores.view(self.heads, self._group, tokens, -1).masked_fill(~mask, -1e30)
        mixed = scores.softmax(-1).flatten(1, 2) @ values.transpose(0, 1)
        return mixed.view(self.heads, self._group, tokens, self.head_width).permute(2, 0, 1, 3).flatten(1)

    def fed_forward(self, layer: int, state: torch.Tensor) -> torch.Tensor:
        """Returns the states after the feed-forward network of a layer."""
        x = self.normalized(state) * self.weights[f"blk.{layer}.ffn_norm.weight"]
        hidden = functional.silu(self.project(layer, "ffn_gate", x)) * self.project(layer, "ffn_up", x)
        return state + self.project(layer, "ffn_down", hidden)

    def log_probabilities(self, state: torch.Tensor) -> torch.Tensor:
        """Returns the natural logarithms of the next token's probabilities, from states of the last layer."""
        x = self.normalized(state) * self.weights["output_norm.weight"]
        return functional.log_softmax(self.product(x, self._output), -1)

    @torch.no_grad()
    def keep_likely(self, states: Iterable[torch.Tensor], n_likeliest: int) -> None:
        """Leaves out tokens that are nowhere among the likeliest: the output is most of a small model's operations.

        Args:
            states: States of the last layer, each [tokens, width].
            n_likeliest: Tokens that are kept for each state.
        """
        likeliest = [self.log_probabilities(state).topk(n_likeliest).indices.unique() for state in states]
        self._output = self._output[torch.cat(likeliest).unique()]

    def run(
        self, states: Sequence[torch.Tensor], n_before: Sequence[int], caches: Iterable[Sequence[Pair]]
    ) -> torch.Tensor:
        """Runs the layers over the ends of some texts.

        Args:
            states: The states of their tokens before the lowest of the layers, [tokens, width] for each text.
            n_before: Number of tokens that stand before them in each text.
            caches: Keys and values of these in each of the layers, each [n_before, heads, head_width], text by text.

        Returns:
            The states after the last layer, [tokens, width], those of one text behind those of another.
        """
        ends = [(cells, cells + len(state)) for state, cells in zip(states, n_before, strict=True)]
        positions = torch.cat([torch.arange(*end, device=self._device) for end in ends])
        masks = [
            torch.ones(last - cells, last, dtype=torch.bool, device=self._device).tril(cells) for cells, last in ends
        ]
        state = torch.cat(list(states))
        for layer, before in zip(range(self._first_layer, self.n_layer), caches, strict=True):
            state = self.fed_forward(layer, self.attended(layer, state, before, masks, positions))
        return state

    def _head_norm(self, layer: int, name: str, x: torch.Tensor) -> torch.Tensor:
        """Normalizes heads where the architecture does."""
        weight = self.weights.get(f"blk.{layer}.{name}.weight")
        return x if weight is None else self.normalized(x) * weight


def behind(first: Sequence[Pair], rest: Pair, sizes: Sequence[int]) -> list[Pair]:
    """Returns keys and values of some texts, with those of further tokens behind them.

    Args:
        first: Of each text, [cells, heads, head_width].
        rest: Of the further tokens of all texts, [tokens, heads, head_width].
        sizes: Number of these tokens in each text.
    """
    keys, values = (part.split(list(sizes)) for part in rest)
    return [
        (torch.cat((first_keys, own_keys)), torch.cat((first_values, own_values)))
        for (first_keys, first_values), own_keys, own_values in zip(first, keys, values, strict=True)
    ]
