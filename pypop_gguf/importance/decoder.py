"""Find and call the text decoder of a Transformers model, for layer importance."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pypop_gguf.errors import PopError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Find the layers of the text decoder, also where the decoder is nested in a vision-language model.

    Args:
        model: A Transformers model.

    Returns:
        The layers, first to last, as many as ``num_hidden_layers`` of the text configuration.

    Raises:
        PopError: The model has no list of that many layers.
    """
    config = model.config.get_text_config(decoder=True)
    n_layer = getattr(config, "num_hidden_layers", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    lists = [
        list(module)
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layer and len(set(module)) == n_layer
    ]
    if not lists:
        raise PopError(f"cannot find the {n_layer} decoder layers of {type(model).__name__}; it is not supported")
    # A decoder may keep small extras for each layer, such as projections, in a list of the same length. The list of
    # the layers is the one that holds most weights.
    return max(lists, key=lambda modules: sum(p.numel() for module in modules for p in module.parameters()))


def compute_logits(model: PreTrainedModel, tokens: Sequence[int], n_output: int) -> torch.Tensor:
    """Return the logits at the last ``n_output`` positions of ``tokens``, float32 [n_output, n_vocab]."""
    input_ids = torch.tensor([tokens], device=next(model.parameters()).device)
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = n_output  # The logits of the whole prompt would take most of the memory.
    return model(input_ids=input_ids, **options).logits[0, -n_output:].float()


def read_layer_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return the hidden states [1, n_tokens, n_embd] from the arguments that a decoder layer was called with.

    Raises:
        PopError: The layer was called without hidden states.
    """
    hidden_states = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden_states, torch.Tensor):
        raise PopError("a decoder layer takes no hidden states; this model is not supported")
    return hidden_states


def read_output(output: Any) -> Any:
    """Return what a module computed: its output, or the first part of an output in several parts."""
    return output[0] if isinstance(output, tuple) else output


def replace_output(output: Any, tensor: torch.Tensor) -> Any:
    """Return a module's output with ``tensor`` in place of what :func:`read_output` returns."""
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor
