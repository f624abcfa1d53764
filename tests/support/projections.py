"""Finds the projections of a model in transformers that write its caches, and records what they read and write.

The tests compare with it what the engine observes and what an adapter changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Projection:
    """A weight W that writes keys or values: ``y = x W'``, plus a bias where it has one.

    Attributes:
        layer: Layer that it belongs to.
        name: Name of the module in the model, which is also its name in the checkpoint.
        module: Module that holds W, of shape [n_out, n_in].
        rows: Rows of W that write what ``kind`` says. A fused weight also has rows for other purposes.
        kind: ``"key"``, ``"value"``, or ``"latent"`` for the state of multi-head latent attention (MLA), from which
            both keys and values are made.
    """

    layer: int
    name: str
    module: nn.Linear
    rows: slice
    kind: str


def find_projections(model, boundary: int) -> list[Projection]:
    """Returns the projections of the layers above the boundary. The cache of the boundary layer itself is exact."""
    names = {module: name for name, module in model.named_modules()}
    return [
        Projection(il, names[module], module, rows, kind)
        for il, layer in enumerate(model.model.layers)
        if il > boundary
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
        for kind, rows in _find_rows(name.rsplit(".", 1)[-1], module.out_features, model.config)
    ]


def _find_rows(name: str, n_out: int, config: Any) -> list[tuple[str, slice]]:
    """Returns the kinds of projection that a module of this name holds, each with its rows."""
    if name in ("k_proj", "v_proj"):
        return [("key" if name == "k_proj" else "value", slice(0, n_out))]
    if name == "qkv_proj":  # The rows of queries, keys and values follow one another.
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        n_kv = config.num_key_value_heads * head
        return [("key", slice(n_out - 2 * n_kv, n_out - n_kv)), ("value", slice(n_out - n_kv, n_out))]
    if name == "kv_a_proj_with_mqa":  # The rows of the latent state come first, then the rotary part of the keys.
        return [("latent", slice(0, config.kv_lora_rank))]
    return []


@contextmanager
def skip_layers(layers: Sequence[nn.Module], boundary: int) -> Iterator[None]:
    """Within the block, the layers from the boundary on return the state that they read, as in a pruned pass."""

    def pass_on(_layer, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with ExitStack() as hooks:
        for layer in layers[boundary:]:
            hooks.callback(layer.register_forward_hook(pass_on, with_kwargs=True).remove)
        yield


@torch.no_grad()
def record(
    model, tokens: Sequence[int], boundary: int, projections: Sequence[Projection]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Records what each projection reads in a pruned pass and what it writes, without its bias, in a whole pass.

    Returns:
        By the name of the projection a pair of shapes [T, n_in] and [T, n_rows].
    """
    ids = torch.tensor([tokens])
    read: dict[str, torch.Tensor] = {}
    written: dict[str, torch.Tensor] = {}

    def record_input(projection: Projection):
        def hook(_module, args, _output):
            read[projection.name] = args[0][0]

        return hook

    def record_output(projection: Projection):
        def hook(module, _args, output):
            bias = 0 if module.bias is None else module.bias
            written[projection.name] = (output - bias)[0, :, projection.rows]

        return hook

    with ExitStack() as hooks:
        for projection in projections:
            hooks.callback(projection.module.register_forward_hook(record_output(projection)).remove)
        model(input_ids=ids, use_cache=False)
    with ExitStack() as hooks, skip_layers(model.model.layers, boundary):
        for projection in projections:
            hooks.callback(projection.module.register_forward_hook(record_input(projection)).remove)
        model(input_ids=ids, use_cache=False)
    return {projection.name: (read[projection.name], written[projection.name]) for projection in projections}
