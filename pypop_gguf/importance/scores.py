"""Layer importance for each stage, by virtual gates: the Fisher scores of POP (arXiv 2602.03295).

Owns the gates and the scores; which layers to skip is decided elsewhere. Called by the converter with a model from
``load_model`` and samples from ``calibration``. Works on any causal Transformers decoder: which modules end the
residual branches is found by watching one short forward pass, not by their names.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pypop_gguf.errors import PopError
from pypop_gguf.importance.calibration import Sample

_N_PROBE_TOKENS = 8


@dataclass(frozen=True)
class Importance:
    """Scores of all layers.

    Attributes:
        prefill: Mean squared gradient of the gates over prompt positions 0..N-2, float32 [n_layer]. The last entry
            is exactly 0: what a prompt token computes in the last layer is never read.
        decode: The same over positions N-1 and after, float32 [n_layer].
        n_samples: Samples behind the means.
        n_tokens: Tokens of these samples, prompts and outputs.
        gating: ``"branches"``: both residual branches of a layer were gated, as in the paper. ``"layers"``: the
            branches could not be told apart in this architecture, so each layer's whole update was gated.
        peak_memory_bytes: Most memory in use: on the GPU for CUDA, else of the process; None where unknown.
    """

    prefill: np.ndarray
    decode: np.ndarray
    n_samples: int
    n_tokens: int
    gating: str
    peak_memory_bytes: int | None


def compute_importance(
    model: nn.Module, samples: Sequence[Sample], *, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> Importance:
    """Score every layer for prefill and for decode.

    Both residual branches of layer l are multiplied by a gate of 1, ``g_prefill[l]`` at positions 0..N-2 and
    ``g_decode[l]`` from N-1 on. With labels drawn from the model's own predictions for the output tokens and L the
    sum of their cross-entropies, the score of a gate is the mean over the samples of ``(dL/dg)^2``, the diagonal of
    the Fisher information (arXiv 2602.03295). One forward and one backward pass a sample; gates and scores are
    float32 whatever the model's type.

    Args:
        model: Causal language model, as from ``load_for_importance``.
        samples: Requests with prompt and output.
        seed: Seed of the label draws, which happen on the CPU for every device.
        progress: Called as ``progress(done, total)`` after each sample.

    Returns:
        The scores.

    Raises:
        PopError: No samples, layers that cannot be found or gated, token ids outside the vocabulary, too little
            memory, or scores that are not finite.
    """
    if not samples:
        raise PopError("no calibration samples; give at least one")
    n_vocab = model.get_input_embeddings().num_embeddings
    if max(max(sample.tokens) for sample in samples) >= n_vocab:
        raise PopError(f"calibration tokens exceed the vocabulary of {n_vocab}; use the model's own tokenizer")
    model.eval()  # dropout would make the gates' gradients random
    layers = find_decoder_layers(model)
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    generator = torch.Generator().manual_seed(seed)
    sums = torch.zeros(2, len(layers), dtype=torch.float64)  # prefill, decode
    try:
        gating = _find_gating(model, layers, samples[0].tokens[:_N_PROBE_TOKENS])
        for i, sample in enumerate(samples):
            gradients = _gate_gradients(model, gating, sample, generator)
            sums += gradients.cpu().double().square()
            if progress is not None:
                progress(i + 1, len(samples))
    except torch.cuda.OutOfMemoryError as error:
        raise PopError("not enough GPU memory for importance; use shorter samples or the CPU") from error
    scores = (sums / len(samples)).float().numpy()
    if not np.isfinite(scores).all():
        raise PopError("importance scores are not finite; load the model as float32 or bfloat16")
    return Importance(
        prefill=scores[0],
        decode=scores[1],
        n_samples=len(samples),
        n_tokens=sum(len(sample.tokens) for sample in samples),
        gating="branches" if gating.branch_ends else "layers",
        peak_memory_bytes=_peak_memory_bytes(device),
    )


def find_decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the text decoder, first to last, also where it is nested in a vision-language model.

    Args:
        model: A Transformers model.

    Returns:
        Modules, as many as the text config's ``num_hidden_layers``.

    Raises:
        PopError: No such list of layers.
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
    # Small per-layer extras, such as projections, may come in lists as long; the layers hold most of the weights.
    return max(lists, key=lambda modules: sum(p.numel() for module in modules for p in module.parameters()))


@dataclass(frozen=True)
class _Gating:
    """Where the gates go: on the ends of each layer's branches, or on whole layers if ``branch_ends`` is None."""

    layers: list[nn.Module]
    branch_ends: list[list[nn.Module]] | None


def _gate_gradients(model: nn.Module, gating: _Gating, sample: Sample, generator: torch.Generator) -> torch.Tensor:
    """dL/dg for labels drawn once from the model, float32 [2, n_layer]: prefill, decode."""
    # The last token predicts nothing that is scored, so the model does not see it.
    tokens = sample.tokens[:-1]
    n_prefill = sample.prompt_len - 1
    n_output = len(tokens) - n_prefill
    device = next(model.parameters()).device
    with torch.enable_grad():
        gates = torch.ones(2, len(gating.layers), device=device, requires_grad=True)
        positions = torch.cat(
            [gates[0, :, None].expand(-1, n_prefill), gates[1, :, None].expand(-1, n_output)], dim=1
        )  # F32 [n_layer, n_tokens]
        with _gated(gating, positions):
            logits = _forward(model, tokens, n_output)  # F32 [n_output, n_vocab]
        labels = _sample_labels(logits.detach(), generator).to(device)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        return torch.autograd.grad(loss, gates)[0]


def _forward(model: nn.Module, tokens: Sequence[int], n_output: int) -> torch.Tensor:
    """Logits at the last ``n_output`` positions, float32 [n_output, n_vocab]."""
    input_ids = torch.tensor([tokens], device=next(model.parameters()).device)
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = n_output  # the prompt's logits would be most of the memory
    return model(input_ids=input_ids, **options).logits[0, -n_output:].float()


def _sample_labels(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One label a row by inverse CDF, int64 [n_output], on the CPU so that a seed means the same on every device."""
    draws = torch.rand(len(logits), generator=generator, dtype=torch.float64)
    labels = []
    for row, draw in zip(logits.softmax(dim=-1).cpu(), draws):
        cumulative = row.double().cumsum(dim=0)
        labels.append(torch.searchsorted(cumulative, draw * cumulative[-1], right=True).clamp(max=len(row) - 1))
    return torch.stack(labels)


@contextmanager
def _gated(gating: _Gating, gates: torch.Tensor):
    """Multiply what each layer adds to the residual stream by ``gates``, F32 [n_layer, n_tokens]."""

    def gate_branch(gate: torch.Tensor):
        def hook(_module, _args, output):
            tensor = _first(output)
            # [1, n_tokens, n_embd], or [n_tokens, n_embd] where an architecture flattens
            gated = (tensor.float() * gate.view(*tensor.shape[:-1], 1)).to(tensor.dtype)
            return _with_first(output, gated)

        return hook

    def gate_layer(gate: torch.Tensor):
        def hook(_module, args, kwargs, output):
            before, after = _layer_input(args, kwargs), _first(output)
            gate_view = gate.view(1, -1, *[1] * (after.dim() - 2))
            update = after.float() - before.float()
            return _with_first(output, (before.float() + gate_view * update).to(after.dtype))

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


def _find_gating(model: nn.Module, layers: list[nn.Module], tokens: Sequence[int]) -> _Gating:
    """Branch gates if they hold in every layer, else layer gates for all, so that scores stay comparable.

    They hold if the ends' outputs explain each layer's update, and gates of 0 make each layer the identity. Only the
    first notices a gate in front of a norm, which would hide its scale; only the second a stream that the layer
    rescales.
    """
    ends = [_branch_ends(trace) for trace in _trace(model, layers, tokens)]
    if all(ends):
        gating = _Gating(layers, ends)
        with _gated(gating, torch.zeros(len(layers), len(tokens), device=next(model.parameters()).device)):
            closed = _trace(model, layers, tokens)
        if all(torch.allclose(trace.before.float(), trace.after.float(), rtol=1e-5) for trace in closed):
            return gating
    return _Gating(layers, None)


@dataclass
class _Call:
    """One call of a layer's child. ``tensor`` keeps the output's storage alive, so that pointers stay distinct."""

    module: nn.Module
    input_pointers: set[int]
    tensor: torch.Tensor
    value: torch.Tensor  # a copy: some layers add to a branch's output in place


@dataclass
class _Trace:
    """What one layer did in a forward pass; ``before`` and ``after`` are its hidden states [1, n_tokens, n_embd]."""

    calls: list[_Call]
    before: torch.Tensor | None = None
    after: torch.Tensor | None = None


@torch.no_grad()
def _trace(model: nn.Module, layers: list[nn.Module], tokens: Sequence[int]) -> list[_Trace]:
    """Run ``tokens`` and record each layer's input and output and the calls of its children, in order."""
    traces = [_Trace([]) for _ in layers]
    n_runs = [0] * len(layers)

    def watch_child(trace: _Trace):
        def hook(module, args, kwargs, output):
            tensor = _first(output)
            if isinstance(tensor, torch.Tensor):
                inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
                pointers = {_pointer(value) for value in inputs}
                trace.calls.append(_Call(module, pointers, tensor, tensor.clone()))

        return hook

    def watch_layer(il: int):
        def hook(_module, args, kwargs, output):
            n_runs[il] += 1
            traces[il].before, traces[il].after = _layer_input(args, kwargs).clone(), _first(output).clone()

        return hook

    handles = []
    try:
        for il, layer in enumerate(layers):
            handles.append(layer.register_forward_hook(watch_layer(il), with_kwargs=True))
            for child in _called_children(layer):
                handles.append(child.register_forward_hook(watch_child(traces[il]), with_kwargs=True))
        _forward(model, tokens, 1)
    finally:
        for handle in handles:
            handle.remove()
    if n_runs != [1] * len(layers):
        raise PopError(f"{type(model).__name__} does not run each decoder layer once; this model is not supported")
    return traces


def _branch_ends(trace: _Trace) -> list[nn.Module]:
    """The modules whose outputs a layer adds to its residual stream, or none if they cannot be told."""
    before, after = trace.before.double().cpu().flatten(), trace.after.double().cpu().flatten()
    n_embd = trace.before.shape[-1]
    ends = [
        call
        for i, call in enumerate(trace.calls)
        if call.value.numel() == before.numel()
        and call.value.shape[-1] == n_embd
        and not any(_pointer(call.tensor) in later.input_pointers for later in trace.calls[i + 1 :])
    ]
    if not ends:
        return []
    outputs = torch.stack([call.value.double().cpu().flatten() for call in ends], dim=1)  # [n_tokens * n_embd, n_end]
    update = after - before
    if not (outputs.isfinite().all() and update.isfinite().all()):
        return []
    # Coefficients other than 1 are an architecture's own multipliers.
    coefficients = torch.linalg.lstsq(outputs, update[:, None]).solution  # [n_end, 1]
    rounding = torch.finfo(trace.after.dtype).eps * (before.norm() + after.norm() + outputs.norm())
    if (outputs @ coefficients - update[:, None]).norm() > 4 * rounding:
        return []
    # An output that is used, but in no sum, such as a norm's that is scaled before the next module reads it.
    added = [call for i, call in enumerate(ends) if abs(coefficients[i, 0]) > 1e-3 or not outputs[:, i].any()]
    modules = list({id(call.module): call.module for call in added}.values())
    n_calls = sum(any(call.module is module for module in modules) for call in trace.calls)
    return modules if n_calls == len(added) else []  # a module that also serves elsewhere cannot be gated


def _called_children(layer: nn.Module) -> list[nn.Module]:
    """Direct children, through containers that have no forward of their own."""
    children = []
    for child in layer.children():
        children += _called_children(child) if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else [child]
    return children


def _layer_input(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    hidden_states = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden_states, torch.Tensor):
        raise PopError("a decoder layer takes no hidden states; this model is not supported")
    return hidden_states


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _with_first(output: Any, tensor: torch.Tensor) -> Any:
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


def _pointer(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _peak_memory_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
