"""The numbers of an adapter as PyTorch learns them, and what a prompt costs that was pruned with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from pypop_gguf.errors import PopError
from pypop_gguf.fitting.adapter_file import write_replacements
from pypop_gguf.fitting.decoder import Decoder, Pair, behind
from pypop_gguf.fitting.states import Text

_SCALED = 30  # texts by whose states the steps are scaled
_SMALL_NORM = 0.3  # A layer's norm that is smaller than this share of its mean damps what its columns learn.

Learned = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, list[torch.Tensor]]


class Maps(torch.nn.Module):
    """The numbers of an adapter that :func:`steps.fit` has written, and what training adds to them."""

    def __init__(self, decoder: Decoder, path: Path) -> None:
        super().__init__()
        reader = GGUFReader(path)
        tensors = {
            tensor.name: decoder.moved(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32))
            for tensor in reader.tensors
        }
        self._decoder = decoder
        self.boundary = reader.fields["pop.boundary"].contents()
        self._layers = range(self.boundary + 1, decoder.n_layer)
        self._names = [f"blk.{layer}.attn_{part}.weight" for layer in self._layers for part in "kv"]
        if not all(name in tensors for name in self._names):
            raise PopError("this adapter does not hold the keys and values of every skipped layer: leave --train out")
        self.inputs = [name.removesuffix(".bottleneck") for name in tensors if name.endswith(".bottleneck")]
        self._n_rows = decoder.heads * decoder.head_width
        self._weight = torch.cat([tensors[name] for name in self._names])
        self._shift = torch.cat([tensors[f"{name}.shift"] for name in self._names])
        self._bias = torch.cat([self._bias_of(name) for name in self._names])
        self._bottlenecks = [tensors[f"{name}.bottleneck"] for name in self.inputs]
        if self.inputs:
            self._further = torch.cat([tensors[f"{name}.further"] for name in self._names])
        norms = torch.stack([decoder.weights[f"blk.{layer}.attn_norm.weight"] for layer in self._layers])
        self._norm = norms.repeat_interleave(2 * self._n_rows, 0)

    def _bias_of(self, name: str) -> torch.Tensor:
        zeros = self._weight.new_zeros(self._n_rows)
        return self._decoder.weights.get(f"{name.removesuffix('weight')}bias", zeros)

    def begin(self, texts: Sequence[Text]) -> None:
        """Scales what is learned by the inputs and outputs of some texts, so that one rate suits all of it."""
        own = torch.cat([text.own for text in texts[:_SCALED]]).float()
        inputs = zip(*(text.further for text in texts[:_SCALED]), strict=True)
        further = [torch.cat(parts).float() for parts in inputs]
        output = own @ (self._weight * self._norm).T
        self._own_scale = 1 / _deviation(own)
        self._norm_scale = self._norm / (self._norm**2 + _SMALL_NORM**2 * (self._norm**2).mean(-1, keepdim=True))
        self.d_weight, self.d_shift = (_zeros_like(x) for x in (self._weight, self._shift))
        if self.inputs:
            narrowed = _narrow(self._decoder, further, self._bottlenecks)
            output = output + narrowed @ self._further.T
            self._narrow_scale = narrowed.std(0).clamp(min=1e-6)
            self._further_scales = [1 / _deviation(x) for x in further]
            self.d_further = _zeros_like(self._further)
            self.d_bottlenecks = torch.nn.ParameterList(map(_zeros_like, self._bottlenecks))
        self._output_scale = output.std(0).clamp(min=1e-6)[:, None]

    def learned(self) -> Learned:
        """Returns what :meth:`caches` multiplies with: norms are in the weights, and biases in the shifts."""
        weight, shift, further, bottlenecks = self._trained()
        return weight * self._norm, shift + self._bias, further, bottlenecks

    def _trained(self) -> Learned:
        """Returns the weights of all layers, their shifts, the weights behind the bottleneck, and the bottleneck."""
        weight = self._weight + self._output_scale * self.d_weight * self._own_scale * self._norm_scale
        shift = self._shift + self._output_scale[:, 0] * self.d_shift
        if not self.inputs:
            return weight, shift, None, []
        further = self._further + self._output_scale * self.d_further / self._narrow_scale
        bottlenecks = [
            matrix + self._narrow_scale[:, None] * change * scale
            for matrix, change, scale in zip(self._bottlenecks, self.d_bottlenecks, self._further_scales, strict=True)
        ]
        return weight, shift, further, bottlenecks

    def caches(self, texts: Sequence[Text], learned: Learned) -> Iterator[list[Pair]]:
        """Yields the keys and values that the pruned prompt of each text leaves in each layer from the boundary on.

        Those of the first token come first.
        """
        decoder, sizes = self._decoder, [text.start for text in texts]
        own = torch.cat([text.own[: text.start] for text in texts])
        positions = torch.cat([torch.arange(1, n + 1, device=own.device) for n in sizes])
        x = own.float() * decoder.weights[f"blk.{self.boundary}.attn_norm.weight"]
        pairs = [decoder.key_value_products(self.boundary, x)]
        weight, shift, further, bottlenecks = learned
        output = decoder.product(own, weight) + shift
        if further is not None:
            inputs = zip(*([x[: text.start] for x in text.further] for text in texts), strict=True)
            output = output + decoder.product(_narrow(decoder, [torch.cat(x) for x in inputs], bottlenecks), further)
        parts = output.split(self._n_rows, -1)
        pairs += zip(parts[0::2], parts[1::2], strict=True)
        heads = zip(*(text.head for text in texts), strict=True)
        for layer, pair, first in zip(range(self.boundary, decoder.n_layer), pairs, heads, strict=True):
            yield behind(first, decoder.cached(layer, pair, positions), sizes)

    def write(self, path: Path, architecture: str, fingerprint: str) -> None:
        """Writes the adapter as it is now."""
        with torch.no_grad():
            weight, shift, further, bottlenecks = self._trained()

        def of_each(x: torch.Tensor) -> dict[str, np.ndarray]:
            return dict(zip(self._names, (part.cpu().numpy() for part in x.split(self._n_rows)), strict=True))

        shifts = of_each(shift)
        write_replacements(
            path,
            {name: (matrix, shifts[name]) for name, matrix in of_each(weight).items()},
            architecture=architecture,
            boundary=self.boundary,
            fingerprint=fingerprint,
            bottlenecks={name: x.cpu().numpy() for name, x in zip(self.inputs, bottlenecks, strict=True)},
            further={} if further is None else of_each(further),
        )


def _narrow(decoder: Decoder, inputs: Sequence[torch.Tensor], bottlenecks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the sum of what the bottleneck makes of further inputs, [tokens, rank]."""
    return torch.stack([decoder.product(x, matrix) for x, matrix in zip(inputs, bottlenecks, strict=True)]).sum(0)


def _zeros_like(x: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros_like(x))


def _deviation(x: torch.Tensor) -> torch.Tensor:
    """Returns the standard deviation of each column, at least a fiftieth of the root of their mean square."""
    deviation = x.std(0)
    return torch.maximum(deviation, 0.02 * deviation.square().mean().sqrt())


def divergence(decoder: Decoder, maps: Maps, texts: Sequence[Text], learned: Learned) -> torch.Tensor:
    """Returns the KL divergence to the whole model behind pruned prompts: the mean of the texts' means."""
    found = decoder.log_probabilities(predict(decoder, maps, texts, learned))
    with torch.no_grad():
        expected = decoder.log_probabilities(torch.cat([text.expected[text.start :].float() for text in texts]))
    of_tokens = (expected.exp() * (expected - found)).sum(-1)
    return torch.stack([part.mean() for part in of_tokens.split([len(text.own) - text.start for text in texts])]).mean()


def predict(decoder: Decoder, maps: Maps, texts: Sequence[Text], learned: Learned) -> torch.Tensor:
    """Returns the states after the last layer, [tokens, width], of the tokens behind each text's pruned prompt."""
    states = [text.own[text.start :].float() * text.size[text.start :] for text in texts]
    return decoder.run(states, [text.start + 1 for text in texts], maps.caches(texts, learned))
