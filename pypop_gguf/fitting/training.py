"""Trains a fitted adapter further, by gradient descent on what pruning costs the model's own answers.

A fit in closed form makes the keys and values of each skipped layer as near as it can to the whole model's, each number
for itself. Training makes what the answer's tokens read of all of them give the whole model's predictions: its loss is
the KL divergence that ``prepare`` measures. Only the adapter learns. Its shape and its file stay the same, so a trained
adapter costs the engine nothing more.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from gguf import GGUFReader
from gguf.quants import dequantize

from pypop_gguf.errors import PopError
from pypop_gguf.fitting.adapter_file import write_replacements
from pypop_gguf.fitting.decoder import Decoder, Pair
from pypop_gguf.fitting.states import Text, reading_states
from pypop_gguf.fitting.writing import write_texts
from pypop_gguf.llama import PopLlama
from pypop_gguf.quality.score import log_softmax
from pypop_gguf.terminal import progress

LEARNING_RATE = 3e-4  # 1e-3 costs a fifth more at the end, and 3e-3 destroys the fit
WARM_UP = 30  # steps
BATCH = 8  # texts of a step
_WRITING = 0.35  # share of the time in which texts are written
_LIKELIEST = 64  # tokens of each prediction: the divergence counts those that are among them somewhere
_HELD_OUT = 10  # every tenth text is not trained on
_SCALED = 30  # texts by whose states the steps are scaled
_LIKE_THE_ENGINE = 0.05  # nats a token by which PyTorch's predictions may differ from the engine's
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

    def caches(self, text: Text, learned: Learned) -> Iterator[Pair]:
        """Yields keys and values behind a pruned prompt for each layer from the boundary on, the first token's too."""
        decoder, n_pruned = self._decoder, text.answer
        own = text.own[:n_pruned]
        positions = torch.arange(1, n_pruned + 1, device=own.device)[None]
        x = own.float()[None] * decoder.weights[f"blk.{self.boundary}.attn_norm.weight"]
        pairs = [decoder.key_value_products(self.boundary, x)]
        weight, shift, further, bottlenecks = learned
        output = decoder.product(own, weight) + shift
        if further is not None:
            narrowed = _narrow(decoder, [x[:n_pruned] for x in text.further], bottlenecks)
            output = output + decoder.product(narrowed, further)
        parts = output[None].split(self._n_rows, -1)
        pairs += zip(parts[0::2], parts[1::2], strict=True)
        for layer, pair, head in zip(range(self.boundary, decoder.n_layer), pairs, text.head, strict=True):
            keys, values = (torch.cat(x, 1) for x in zip(head, decoder.cached(layer, pair, positions), strict=True))
            yield keys, values

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


def divergence(decoder: Decoder, maps: Maps, text: Text, learned: Learned) -> torch.Tensor:
    """Returns the mean KL divergence to the whole model over the tokens of an answer behind a pruned prompt."""
    found = decoder.log_probabilities(predict(decoder, maps, text, learned))
    with torch.no_grad():
        expected = decoder.log_probabilities(text.expected[text.answer :].float())
    return (expected.exp() * (expected - found)).sum(-1).mean()


def predict(decoder: Decoder, maps: Maps, text: Text, learned: Learned) -> torch.Tensor:
    """Returns the states after the last layer, [answer, width], of the tokens behind a pruned prompt."""
    state = text.own[text.answer :].float() * text.size[text.answer :]
    return decoder.run(state, maps.caches(text, learned))


def train(
    llm: PopLlama, source: Path, adapter: Path, prompts: Sequence[Sequence[int]], minutes: float, n_threads: int
) -> str:
    """Trains an adapter file and replaces it, if that helps texts that were not trained on.

    Args:
        llm: The model, from :func:`steps.open_whole`. It writes the answers, and prompts of its own.
        source: Its file.
        adapter: The adapter, from :func:`steps.fit`.
        prompts: Token ids of the given prompts.
        minutes: Time for all of it.
        n_threads: Number of threads, where PyTorch finds no GPU.

    Returns:
        One line about the result.

    Raises:
        PopError: PyTorch computes other predictions than the engine, so this model is of another kind.
    """
    began = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(n_threads)
    boundary = int(GGUFReader(adapter).fields["pop.boundary"].contents())
    decoder = Decoder(source, device, boundary, fastest_type(device))
    maps = Maps(decoder, adapter)
    written = write_texts(llm, prompts, 60 * minutes * _WRITING)
    with (
        progress(total=len(written), description="reading texts to train on", unit="texts") as bar,
        reading_states(llm, decoder, boundary, maps.inputs) as reader,
    ):
        texts = []
        for prompt, answer in written:
            texts.append(reader.read(prompt, answer))
            bar.update()
    held_out, trained_on = texts[::_HELD_OUT], [text for i, text in enumerate(texts) if i % _HELD_OUT]
    maps.begin(trained_on)
    _check_alike(llm, decoder, maps, texts[0], *written[0])
    decoder.keep_likely((text.expected[text.answer :].float() for text in texts), _LIKELIEST)
    before = _mean_divergence(decoder, maps, held_out)
    n_steps = _descend(decoder, maps, trained_on, began + 60 * minutes)
    after = _mean_divergence(decoder, maps, held_out)
    if after < before:
        architecture = llm.metadata["general.architecture"]
        maps.write(adapter, architecture, GGUFReader(adapter).fields["pop.fingerprint"].contents())
    kept = "" if after < before else "; the adapter stays as it was fitted"
    return (
        f"trained on {len(trained_on)} texts in {n_steps} steps: KL on {len(held_out)} texts held out "
        f"{before:.4f} -> {after:.4f}{kept}"
    )


def fastest_type(device: str) -> torch.dtype:
    """Returns BF16 where PyTorch multiplies it faster, else F32."""

    def seconds(kind: torch.dtype) -> float:
        x, matrix = (torch.ones(n, 1024, dtype=kind, device=device) for n in (256, 1024))
        times = []
        for _ in range(8):
            began = time.perf_counter()
            functional.linear(x, matrix).sum().item()
            times.append(time.perf_counter() - began)
        return min(times)

    return min(torch.float32, torch.bfloat16, key=seconds)


def _check_alike(
    llm: PopLlama, decoder: Decoder, maps: Maps, text: Text, prompt: Sequence[int], answer: list[int]
) -> None:
    """Checks that PyTorch computes what the engine computes."""
    engine = decoder.moved(log_softmax(llm.score(prompt, answer, pop=False)))
    with torch.no_grad():
        whole = dataclasses.replace(text, answer=0)
        found = decoder.log_probabilities(predict(decoder, maps, whole, maps.learned())[text.answer :])
    difference = float((engine.exp() * (engine - found)).sum(-1).mean())
    if not difference <= _LIKE_THE_ENGINE:
        raise PopError(
            f"in PyTorch this model predicts other tokens than in the engine (KL {difference:.2g}), so training does "
            "not know its layers: leave --train out"
        )


@torch.no_grad()
def _mean_divergence(decoder: Decoder, maps: Maps, texts: Sequence[Text]) -> float:
    learned = maps.learned()
    return float(np.mean([float(divergence(decoder, maps, text, learned)) for text in texts]))


def _descend(decoder: Decoder, maps: Maps, texts: list[Text], deadline: float) -> int:
    """Takes steps until a time of :func:`time.monotonic`, and returns their number."""
    optimizer = torch.optim.Adam(maps.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    chance, n_steps = random.Random(0), 0
    queue: list[Text] = []
    began = time.monotonic()
    seconds = max(1.0, deadline - began)
    with progress(total=round(seconds), description="training", unit="s") as bar:
        while (share := (time.monotonic() - began) / seconds) < 1:
            rate = LEARNING_RATE * min(1, (n_steps + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * share))
            for group in optimizer.param_groups:
                group["lr"] = rate
            if len(queue) < BATCH:
                queue = chance.sample(texts, len(texts)) + queue
            batch = [queue.pop() for _ in range(min(BATCH, len(queue)))]
            learned = maps.learned()
            loss = torch.stack([divergence(decoder, maps, text, learned) for text in batch]).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(maps.parameters(), 1.0)
            optimizer.step()
            n_steps += 1
            bar.set_postfix_str(f"KL {loss.item():.4f}", refresh=False)
            bar.update_to(min(round(seconds), int(time.monotonic() - began)), round(seconds))
    return n_steps
