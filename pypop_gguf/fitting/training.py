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
from pypop_gguf.fitting.decoder import Decoder, Products
from pypop_gguf.fitting.measure import Meter
from pypop_gguf.llama import PopLlama
from pypop_gguf.quality.score import log_softmax
from pypop_gguf.terminal import progress

ANSWER = 48  # tokens of an answer that is trained on
LEARNING_RATE = 3e-4  # 1e-3 costs a fifth more at the end, and 3e-3 destroys the fit
WARM_UP = 30  # steps
BATCH = 8  # texts of a step
_LIKELIEST = 64  # tokens of each prediction: the divergence counts those that are among them somewhere
_HELD_OUT = 10  # every tenth text is not trained on
_SCALED = 100  # texts by whose states the steps are scaled
_LIKE_THE_ENGINE = 0.05  # nats a token by which PyTorch's predictions may differ from the engine's
_SMALL_NORM = 0.3  # A layer's norm that is smaller than this share of its mean damps what its columns learn.


@dataclasses.dataclass
class Text:
    """A prompt and the model's answer to it, as training reads them.

    Attributes:
        own: States at the boundary of the pruned tokens, divided by their root mean square, F16 [tokens, width].
        further: What the bottleneck reads of them, F16 [tokens, numbers] for each further input.
        answering: States at the boundary of the last prompt token and of the answer without its end, [answer, width].
        expected: Their states after the last layer of the whole model, [answer, width].
        head: Keys and values of the first token for each layer from the boundary on.
    """

    own: torch.Tensor
    further: list[torch.Tensor]
    answering: torch.Tensor
    expected: torch.Tensor
    head: list[Products]


class Maps(torch.nn.Module):
    """The numbers of an adapter that :func:`steps.fit` has written, and what training adds to them."""

    def __init__(self, decoder: Decoder, path: Path, device: str) -> None:
        super().__init__()
        reader = GGUFReader(path)
        tensors = {
            tensor.name: torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)).to(device)
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
            narrowed = _narrow(further, self._bottlenecks)
            output = output + narrowed @ self._further.T
            self._narrow_scale = narrowed.std(0).clamp(min=1e-6)
            self._further_scales = [1 / _deviation(x) for x in further]
            self.d_further = _zeros_like(self._further)
            self.d_bottlenecks = torch.nn.ParameterList(map(_zeros_like, self._bottlenecks))
        self._output_scale = output.std(0).clamp(min=1e-6)[:, None]

    def learned(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
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

    def caches(self, text: Text, learned, positions: torch.Tensor) -> Iterator[Products]:
        """Yields the keys and values of a text's pruned tokens, for each layer above the boundary."""
        weight, shift, further, bottlenecks = learned
        output = functional.linear(text.own.float(), weight * self._norm, shift + self._bias)
        if bottlenecks:
            output = output + functional.linear(_narrow(text.further, bottlenecks), further)
        parts = output[None].split(self._n_rows, -1)
        for i, layer in enumerate(self._layers):
            yield self._decoder.cached(layer, (parts[2 * i], parts[2 * i + 1]), positions)

    def write(self, path: Path, architecture: str, fingerprint: str) -> None:
        """Writes the adapter as it is now."""
        with torch.no_grad():
            weight, shift, further, bottlenecks = self.learned()

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


def _narrow(inputs: Sequence[torch.Tensor], bottlenecks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the sum of what the bottleneck makes of further inputs, [tokens, rank]."""
    products = [functional.linear(x.float(), matrix) for x, matrix in zip(inputs, bottlenecks, strict=True)]
    return torch.stack(products).sum(0)


def _zeros_like(x: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros_like(x))


def _deviation(x: torch.Tensor) -> torch.Tensor:
    """Returns the standard deviation of each column, at least a fiftieth of the root of their mean square."""
    deviation = x.std(0)
    return torch.maximum(deviation, 0.02 * deviation.square().mean().sqrt())


@torch.no_grad()
def read_text(decoder: Decoder, maps: Maps, prompt: Sequence[int], answer: Sequence[int], device: str) -> Text:
    """Runs the whole model over a prompt and its answer, and keeps what training needs."""
    b, first = maps.boundary, len(prompt) - 1
    wanted = {name: (int(name.split(".")[1]), "hidden" if ".ffn_down." in name else "state") for name in maps.inputs}
    grabbed: dict[tuple[int, str], torch.Tensor] = {}
    head: list[Products] = []

    def grab(layer: int, part: str, x: torch.Tensor) -> None:
        if (layer, part) in wanted.values() or (layer, part) == (b, "state"):
            grabbed[layer, part] = x[0]
        if layer >= b and part == "state":
            own = decoder.own_input(layer, x[:, :1])
            first_position = torch.zeros(1, 1, device=device)
            head.append(decoder.cached(layer, decoder.key_value_products(layer, own), first_position))

    tokens = torch.tensor([*prompt, *answer[:-1]], device=device)
    last = decoder.run(tokens, grab)[0, first:]
    state = grabbed[b, "state"]
    further = []
    for layer, part in wanted.values():
        x = grabbed[layer, part][1:first]
        further.append((x if part == "hidden" else decoder.own_input(layer, x)).half())
    return Text(decoder.normalized(state[1:first]).half(), further, state[first:].clone(), last.clone(), head)


def divergence(decoder: Decoder, maps: Maps, text: Text, learned) -> torch.Tensor:
    """Returns the mean KL divergence to the whole model over the tokens of an answer behind a pruned prompt."""
    n_pruned, n_answer = len(text.own), len(text.answering)
    device = text.own.device
    pruned = torch.arange(1, n_pruned + 1, device=device)[None]
    positions = torch.arange(n_pruned + 1, n_pruned + 1 + n_answer, device=device)[None]
    seen = torch.ones(1, n_answer, n_pruned + 1, dtype=torch.bool, device=device)
    mask = torch.cat([seen, torch.ones(1, n_answer, n_answer, dtype=torch.bool, device=device).tril()], -1)
    state, b = text.answering[None], maps.boundary
    at_boundary = text.own.float()[None] * decoder.weights[f"blk.{b}.attn_norm.weight"]
    exact = decoder.cached(b, decoder.key_value_products(b, at_boundary), pruned)
    caches = [exact, *maps.caches(text, learned, pruned)]
    for layer, cache, head in zip(range(b, decoder.n_layer), caches, text.head, strict=True):
        x = decoder.own_input(layer, state)
        own = decoder.cached(layer, decoder.key_value_products(layer, x), positions)
        keys, values = (torch.cat(parts, 1) for parts in zip(head, cache, own, strict=True))
        state, _ = decoder.fed_forward(layer, decoder.attended(layer, state, keys, values, mask, positions))
    found = decoder.log_probabilities(state[0])
    with torch.no_grad():
        expected = decoder.log_probabilities(text.expected)
    return (expected.exp() * (expected - found)).sum(-1).mean()


def train(
    llm: PopLlama, source: Path, adapter: Path, prompts: Sequence[Sequence[int]], minutes: float, n_threads: int
) -> str:
    """Trains an adapter file and replaces it, if that helps texts that were not trained on.

    Args:
        llm: The model, from :func:`steps.open_whole`. It writes the answers.
        source: Its file.
        adapter: The adapter, from :func:`steps.fit`.
        prompts: Token ids of the prompts to train on.
        minutes: Time for the steps. The answers and the states of the texts come before.
        n_threads: Number of threads, where PyTorch finds no GPU.

    Returns:
        One line about the result.

    Raises:
        PopError: PyTorch computes other predictions than the engine, so this model is of another kind.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(n_threads)
    decoder = Decoder(source, device)
    maps = Maps(decoder, adapter, device)
    prompts = [prompt for prompt in prompts if len(prompt) > 3]
    answers = _answers(llm, prompts)
    _check_alike(llm, decoder, prompts[0], answers[0], device)
    texts = []
    with progress(total=len(prompts), description="reading texts to train on", unit="texts") as bar:
        for prompt, answer in zip(prompts, answers, strict=True):
            texts.append(read_text(decoder, maps, prompt, answer, device))
            bar.update()
    decoder.keep_likely((text.expected for text in texts), _LIKELIEST)
    held_out, trained_on = texts[::_HELD_OUT], [text for i, text in enumerate(texts) if i % _HELD_OUT]
    maps.begin(trained_on)
    before = _mean_divergence(decoder, maps, held_out)
    n_steps = _descend(decoder, maps, trained_on, 60 * minutes)
    after = _mean_divergence(decoder, maps, held_out)
    if after < before:
        architecture = llm.metadata["general.architecture"]
        maps.write(adapter, architecture, GGUFReader(adapter).fields["pop.fingerprint"].contents())
    kept = "" if after < before else "; the adapter stays as it was fitted"
    return f"trained in {n_steps} steps: KL on {len(held_out)} texts held out {before:.4f} -> {after:.4f}{kept}"


def _answers(llm: PopLlama, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Lets the model answer, so that its own predictions are trained on."""
    meter, answers = Meter(llm, {}), []
    with progress(total=len(prompts), description="writing answers to train on", unit="prompts") as bar:
        for prompt in prompts:
            answers.append(meter.answer(prompt, ANSWER))
            bar.update()
    return answers


def _check_alike(llm: PopLlama, decoder: Decoder, prompt: Sequence[int], answer: list[int], device: str) -> None:
    """Checks that PyTorch computes what the engine computes."""
    engine = torch.from_numpy(log_softmax(llm.score(prompt, answer, pop=False))).to(device)
    tokens = torch.tensor([*prompt, *answer[:-1]], device=device)
    with torch.no_grad():
        found = decoder.log_probabilities(decoder.run(tokens, lambda *_: None)[0, len(prompt) - 1 :])
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


def _descend(decoder: Decoder, maps: Maps, texts: list[Text], seconds: float) -> int:
    """Takes steps until the time is over, and returns their number."""
    optimizer = torch.optim.Adam(maps.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    chance, n_steps = random.Random(0), 0
    queue: list[Text] = []
    began = time.monotonic()
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
