"""Measures POP beside its ablations and rivals in PyTorch.

They differ in which layers are skipped, when, and in what is left in the caches of these layers. The code is written
apart from the engine: it runs models of transformers and skips layers with hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pypop_gguf.importance.calibration import Sample


@dataclass(frozen=True)
class Variant:
    """One way to make a model cheaper.

    Attributes:
        name: Name in the table.
        skipped: Layers that prefill skips. Each passes its input on and fills its cache from it.
        head: Number of first prompt tokens that run every layer.
        tail: Number of last prompt tokens that run every layer.
        empty_caches: Whether the caches of the skipped layers hold zeros for the prompt instead.
        both_stages: Whether the layers are skipped for every token, as if they were removed from the model.
        sparsity: Share of each weight matrix that is set to zero for every token (:func:`wanda`).
    """

    name: str
    skipped: tuple[int, ...] = ()
    head: int = 0
    tail: int = 1
    empty_caches: bool = False
    both_stages: bool = False
    sparsity: float = 0.0


def variants(n_layer: int, n_skipped: int, influence: np.ndarray) -> list[Variant]:
    """Returns the rows of the table for one number of skipped layers.

    Args:
        n_layer: Number of layers, L.
        n_skipped: How many of them are skipped.
        influence: Influence of each layer from :func:`block_influence`, [L].
    """
    deep = tuple(range(n_layer - n_skipped, n_layer))
    step = n_layer / n_skipped
    spread = tuple(round((i + 1) * step) - 1 for i in range(n_skipped))
    least = tuple(sorted(np.argsort(influence)[:n_skipped].tolist()))
    rows = [
        Variant("POP", deep),
        Variant("POP, last 16 prompt tokens whole", deep, tail=16),
        Variant("POP, first 8 tokens whole", deep, head=8),
        Variant("no KV projections (empty caches)", deep, empty_caches=True),
        Variant("no boundary handling (last token pruned too)", deep, tail=0),
        Variant("as many shallow layers, from 0 on", tuple(range(n_skipped))),
        Variant("every 2nd layer" if n_skipped * 2 == n_layer else "every 3rd layer", spread),
    ]
    # One deep layer runs, and one more layer below the boundary is skipped in its place.
    below = n_layer - n_skipped - 1
    rows += [
        Variant(f"layer {kept} kept, {below} skipped instead", tuple(sorted({below, *deep} - {kept})))
        for kept in deep[1:]
    ]
    if n_skipped >= 4:
        kept = deep[-3], deep[-2]
        skipped = {below - 1, below, *deep} - set(kept)
        rows.append(Variant(f"layers {kept[0]}, {kept[1]} kept, two more skipped below", tuple(sorted(skipped))))
    rows += [
        Variant("ShortGPT (least block influence, both stages)", least, both_stages=True),
        Variant("POP's layers removed (both stages)", deep, both_stages=True),
        Variant("Wanda (unstructured, both stages)", sparsity=n_skipped / n_layer),
    ]
    return rows


@contextmanager
def _skipping(layers: Sequence[nn.Module], skipped: Sequence[int]):
    def skip(_layer, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with ExitStack() as hooks:
        for il in skipped:
            hooks.callback(layers[il].register_forward_hook(skip, with_kwargs=True).remove)
        yield


@torch.no_grad()
def continuation_log_probs(
    model: nn.Module, layers: Sequence[nn.Module], sample: Sample, variant: Variant
) -> np.ndarray:
    """Returns log-probabilities of every token at each position of a continuation, F64 [n_continuation, n_vocab]."""
    n = sample.prompt_len
    ids = torch.tensor([sample.tokens])
    if variant.both_stages or variant.sparsity:
        with _skipping(layers, variant.skipped):
            logits = model(input_ids=ids).logits[0, n - 1 : -1]
        return _log_softmax(logits)
    head, first_whole = min(variant.head, n - 1), max(n - variant.tail, min(variant.head, n - 1))
    cache = model(input_ids=ids[:, :head], use_cache=True).past_key_values if head else None
    rows = []
    if head < first_whole:
        with _skipping(layers, variant.skipped):
            out = model(input_ids=ids[:, head:first_whole], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        if first_whole == n:
            rows.append(out.logits[0, -1:])
        if variant.empty_caches:
            for il in variant.skipped:
                cache.layers[il].keys.zero_()
                cache.layers[il].values.zero_()
    out = model(input_ids=ids[:, first_whole:-1], past_key_values=cache, use_cache=True)
    rows.append(out.logits[0, max(0, n - 1 - first_whole) :])
    return _log_softmax(torch.cat(rows))


def _log_softmax(logits: torch.Tensor) -> np.ndarray:
    return torch.log_softmax(logits.double(), dim=-1).numpy()


@torch.no_grad()
def block_influence(model: nn.Module, layers: Sequence[nn.Module], samples: Sequence[Sample]) -> np.ndarray:
    """Returns 1 - cosine of input and output of each layer, mean over tokens (ShortGPT, arXiv 2403.03853), [L]."""
    sums, count = np.zeros(len(layers)), 0
    inputs: dict[int, torch.Tensor] = {}

    def watch(il: int):
        def hook(_layer, args, kwargs, output):
            x = args[0] if args else kwargs["hidden_states"]
            y = output[0] if isinstance(output, tuple) else output
            inputs[il] = 1 - torch.cosine_similarity(x.double(), y.double(), dim=-1)

        return hook

    with ExitStack() as hooks:
        for il, layer in enumerate(layers):
            hooks.callback(layer.register_forward_hook(watch(il), with_kwargs=True).remove)
        for sample in samples:
            model(input_ids=torch.tensor([sample.tokens]))
            sums += [inputs[il].sum().item() for il in range(len(layers))]
            count += len(sample.tokens)
    return sums / count


@torch.no_grad()
def wanda(model: nn.Module, layers: Sequence[nn.Module], samples: Sequence[Sample], sparsity: float) -> nn.Module:
    """Returns a copy in which a share of the weights in each row of each matrix is zero (Wanda, arXiv 2306.11695).

    Those weights are chosen whose size times the norm of their input is smallest.
    """
    pruned = copy.deepcopy(model)
    own = dict(zip([id(module) for module in model.modules()], pruned.modules(), strict=True))
    matrices = [
        (name, module) for layer in layers for name, module in layer.named_modules() if isinstance(module, nn.Linear)
    ]
    squares = {id(module): torch.zeros(module.in_features, dtype=torch.float64) for _, module in matrices}

    def watch(module, args):
        squares[id(module)] += args[0].double().pow(2).reshape(-1, module.in_features).sum(0)

    with ExitStack() as hooks:
        for _, module in matrices:
            hooks.callback(module.register_forward_pre_hook(watch).remove)
        for sample in samples:
            model(input_ids=torch.tensor([sample.tokens]))
    for _, module in matrices:
        score = module.weight.abs().double() * squares[id(module)].sqrt()
        drop = score.argsort(dim=1)[:, : int(sparsity * module.in_features)]
        own[id(module)].weight.scatter_(1, drop, 0.0)
    return pruned
