"""Put virtual gates on what each decoder layer adds to the residual stream.

A gate is a factor of 1 whose gradient tells how much the loss depends on the layer. A decoder layer adds the outputs of
two branches, attention and feed-forward network, to the stream. Which modules end these branches is found by watching
one short forward pass rather than by name, so this works for any causal Transformers decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from pypop_gguf.errors import PopError
from pypop_gguf.importance.decoder import compute_logits, read_layer_input, read_output, replace_output

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Gating:
    """The places of the gates.

    Attributes:
        layers: The decoder layers, first to last.
        branch_ends: For each layer, the modules that end its residual branches and whose outputs are gated. None means
            that the whole update of each layer is gated instead.
    """

    layers: list[nn.Module]
    branch_ends: list[list[nn.Module]] | None


def find_gating(model: PreTrainedModel, layers: list[nn.Module], tokens: Sequence[int]) -> Gating:
    """Choose gates on branches if they are right in every layer, else gates on whole layers for all of them.

    All layers are gated in the same way so that their scores can be compared. Gates on branches are right if the
    outputs of the branch ends add up to each layer's update, and if gates of 0 turn each layer into the identity. The
    first check alone would miss a layer that rescales the residual stream. The second check alone would miss a gate
    in front of a norm, which undoes the gate's scale.

    Args:
        model: A causal language model.
        layers: Its decoder layers, from ``find_decoder_layers``.
        tokens: Token ids of a short text to run.

    Raises:
        PopError: The model does not run each layer exactly once.
    """
    ends = [_find_branch_ends(trace) for trace in _trace_layers(model, layers, tokens)]
    if all(ends):
        gating = Gating(layers, ends)
        with apply_gates(gating, torch.zeros(len(layers), len(tokens), device=next(model.parameters()).device)):
            closed = _trace_layers(model, layers, tokens)
        if all(torch.allclose(trace.before.float(), trace.after.float(), rtol=1e-5) for trace in closed):
            return gating
    return Gating(layers, None)


@contextmanager
def apply_gates(gating: Gating, gates: torch.Tensor) -> Iterator[None]:
    """Within the block, multiply what each layer adds to the residual stream by its gates.

    Args:
        gating: Where the gates go.
        gates: One gate for each layer and token, float32 [n_layer, n_tokens].
    """

    def gate_branch(gate: torch.Tensor):
        def hook(_module, _args, output):
            tensor = read_output(output)
            # The shape is [1, n_tokens, n_embd], or [n_tokens, n_embd] in architectures that flatten the batch.
            gated = (tensor.float() * gate.view(*tensor.shape[:-1], 1)).to(tensor.dtype)
            return replace_output(output, gated)

        return hook

    def gate_layer(gate: torch.Tensor):
        def hook(_module, args, kwargs, output):
            before, after = read_layer_input(args, kwargs), read_output(output)
            gate_view = gate.view(1, -1, *[1] * (after.dim() - 2))
            update = after.float() - before.float()
            return replace_output(output, (before.float() + gate_view * update).to(after.dtype))

        return hook

    handles = []
    try:
        for il, layer in enumerate(gating.layers):
            if gating.branch_ends is None:
                handles.append(layer.register_forward_hook(gate_layer(gates[il]), with_kwargs=True))
            else:
                for module in gating.branch_ends[il]:
                    handles.append(module.register_forward_hook(gate_branch(gates[il])))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Call:
    """One call of a module inside a layer.

    Attributes:
        module: The module.
        input_pointers: Addresses of the tensors that it was called with.
        output: Its output. Keeping it keeps its memory in use, so that no later tensor gets the same address.
        value: A copy of the output, because some layers add to a branch's output in place.
    """

    module: nn.Module
    input_pointers: set[int]
    output: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class _Trace:
    """A record of what one layer did in a forward pass.

    Attributes:
        calls: The calls of the layer's direct children, in order.
        before: The hidden states that the layer read, [1, n_tokens, n_embd].
        after: The hidden states that it returned, of the same shape.
    """

    calls: list[_Call]
    before: torch.Tensor
    after: torch.Tensor


@torch.no_grad()
def _trace_layers(model: PreTrainedModel, layers: list[nn.Module], tokens: Sequence[int]) -> list[_Trace]:
    """Run ``tokens`` through the model and record what each layer did.

    Raises:
        PopError: The model does not run each layer exactly once.
    """
    calls: list[list[_Call]] = [[] for _ in layers]
    states: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in layers]  # before and after, for each run

    def watch_child(il: int):
        def hook(module, args, kwargs, output):
            tensor = read_output(output)
            if isinstance(tensor, torch.Tensor):
                inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
                pointers = {_find_pointer(value) for value in inputs}
                calls[il].append(_Call(module, pointers, tensor, tensor.clone()))

        return hook

    def watch_layer(il: int):
        def hook(_module, args, kwargs, output):
            states[il].append((read_layer_input(args, kwargs).clone(), read_output(output).clone()))

        return hook

    handles = []
    try:
        for il, layer in enumerate(layers):
            handles.append(layer.register_forward_hook(watch_layer(il), with_kwargs=True))
            for child in _list_children(layer):
                handles.append(child.register_forward_hook(watch_child(il), with_kwargs=True))
        compute_logits(model, tokens, 1)
    finally:
        for handle in handles:
            handle.remove()
    if any(len(runs) != 1 for runs in states):
        raise PopError(f"{type(model).__name__} does not run each decoder layer once; this model is not supported")
    return [_Trace(calls[il], *states[il][0]) for il in range(len(layers))]


def _find_branch_ends(trace: _Trace) -> list[nn.Module]:
    """Find the modules whose outputs a layer adds to its residual stream; the list is empty if they cannot be told."""
    before, after = trace.before.double().cpu().flatten(), trace.after.double().cpu().flatten()
    n_embd = trace.before.shape[-1]
    # A branch ends with an output of the stream's shape that no later module of the layer reads.
    ends = [
        call
        for i, call in enumerate(trace.calls)
        if call.value.numel() == before.numel()
        and call.value.shape[-1] == n_embd
        and not any(_find_pointer(call.output) in later.input_pointers for later in trace.calls[i + 1 :])
    ]
    if not ends:
        return []
    outputs = torch.stack([call.value.double().cpu().flatten() for call in ends], dim=1)  # [n_tokens * n_embd, n_end]
    update = after - before
    if not (outputs.isfinite().all() and update.isfinite().all()):
        return []
    # An architecture may multiply its branches by constants, so the coefficients need not be 1.
    coefficients = torch.linalg.lstsq(outputs, update[:, None]).solution  # [n_end, 1]
    rounding = torch.finfo(trace.after.dtype).eps * (before.norm() + after.norm() + outputs.norm())
    if (outputs @ coefficients - update[:, None]).norm() > 4 * rounding:
        return []
    # A coefficient of 0 marks an output that is not added to the stream, such as that of a norm which the layer scales
    # before the next module reads it. An output of zeros has no coefficient to judge by and counts as added.
    added = [call for i, call in enumerate(ends) if abs(coefficients[i, 0]) > 1e-3 or not outputs[:, i].any()]
    modules = list({id(call.module): call.module for call in added}.values())
    n_calls = sum(any(call.module is module for module in modules) for call in trace.calls)
    # A module that the layer also calls for another purpose cannot be gated.
    return modules if n_calls == len(added) else []


def _list_children(layer: nn.Module) -> list[nn.Module]:
    """List the modules that a layer calls directly: its children, and the members of containers among them."""
    children = []
    for child in layer.children():
        children += _list_children(child) if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else [child]
    return children


def _find_pointer(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's memory; views of one tensor share it."""
    return tensor.untyped_storage().data_ptr()
