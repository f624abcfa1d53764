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
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from gguf import GGUFReader

from pypop_gguf.errors import PopError
from pypop_gguf.fitting.decoder import Decoder
from pypop_gguf.fitting.maps import Maps, divergence, predict
from pypop_gguf.fitting.states import Text, reading_states
from pypop_gguf.fitting.writing import ANSWER, write_texts
from pypop_gguf.llama import PopLlama
from pypop_gguf.quality.score import log_softmax
from pypop_gguf.terminal import progress

LEARNING_RATE = 1.5e-4  # After 150 steps, twice and half as much cost 13% and 5% more on SmolLM2-135M.
WARM_UP = 30  # steps
BATCH = 8  # texts of a step
_WRITING = 0.2  # share of the time in which texts are written
_LIKELIEST = 64  # tokens of each prediction of an answer: the divergence counts those that are among them somewhere
_COPIED = 32  # tokens of a prompt that are repeated behind its answer
_ANSWERS, _COPIES = 0.5, 0.25  # shares of the steps' texts in which these are read behind the pruned tokens
_HELD_OUT = 10  # every tenth text is not trained on
_LIKE_THE_ENGINE = 0.05  # nats a token by which PyTorch's predictions may differ from the engine's


@dataclasses.dataclass
class Lesson:
    """A prompt, the model's answer, and a copy of a piece of the prompt.

    Attributes:
        text: All of it.
        n_answer: Tokens of the answer.
    """

    text: Text
    n_answer: int

    def answer(self) -> Text:
        """Returns the text without the copy."""
        return self.text.part(self.text.start, self.text.start + self.n_answer)

    def drawn(self, chance: random.Random) -> Text:
        """Returns the answer behind its prompt, the copy behind both, or some other place of the text."""
        drawn, end = chance.random(), len(self.text.own)
        if drawn < _ANSWERS or end <= ANSWER:
            return self.answer()
        if drawn < _ANSWERS + _COPIES and self.text.start + self.n_answer < end:
            return self.text.part(self.text.start + self.n_answer, end)
        start = chance.randint(1, end - ANSWER)
        return self.text.part(start, start + ANSWER)


def train(
    llm: PopLlama, source: Path, adapter: Path, prompts: Sequence[Sequence[int]], minutes: float, n_threads: int
) -> str:
    """Trains an adapter file and replaces it, if that helps texts that were not trained on.

    Args:
        llm: The model, from :func:`steps.open_whole`. It writes the answers, and prompts of its own.
        source: Its file.
        adapter: The adapter, from :func:`steps.fit`.
        prompts: Token ids of the given prompts.
        minutes: Time for the writing, the reading and the steps. At least 20 texts are written and one step is taken,
            however long that takes.
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
    decoder = Decoder(source, device, boundary, _fastest_type(device))
    maps = Maps(decoder, adapter)
    written = write_texts(llm, prompts, 60 * minutes * _WRITING)
    with (
        progress(total=len(written), description="reading texts to train on", unit="texts") as bar,
        reading_states(llm, decoder, boundary, maps.inputs) as reader,
    ):
        lessons, chance = [], random.Random(0)
        for prompt, answer in written:
            copied = _copy(prompt, llm.n_batch - len(prompt) - len(answer), chance)
            lessons.append(Lesson(reader.read(prompt, [*answer, *copied]), len(answer)))
            bar.update()
    answers = [lesson.answer() for lesson in lessons]
    trained_on, held_out = [lesson for i, lesson in enumerate(lessons) if i % _HELD_OUT], answers[::_HELD_OUT]
    maps.begin(answers)
    _check_alike(llm, decoder, maps, answers[0], *written[0])
    decoder.keep_likely((text.expected[text.start :].float() for text in answers), _LIKELIEST)
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


def _copy(prompt: Sequence[int], room: int, chance: random.Random) -> Sequence[int]:
    """Returns a piece of a prompt. Only a cache that has kept its details lets the model predict it once more."""
    n = min(_COPIED, len(prompt) // 2, room)
    start = chance.randint(0, len(prompt) - n)
    return prompt[start : start + n]


def _fastest_type(device: str) -> torch.dtype:
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
        whole = dataclasses.replace(text, start=0)
        found = decoder.log_probabilities(predict(decoder, maps, [whole], maps.learned())[text.start :])
    difference = float((engine.exp() * (engine - found)).sum(-1).mean())
    if not difference <= _LIKE_THE_ENGINE:
        raise PopError(
            f"in PyTorch this model predicts other tokens than in the engine (KL {difference:.2g}), so training does "
            "not know its layers: leave --train out"
        )


@torch.no_grad()
def _mean_divergence(decoder: Decoder, maps: Maps, texts: Sequence[Text]) -> float:
    learned = maps.learned()
    return float(np.mean([float(divergence(decoder, maps, [text], learned)) for text in texts]))


def _descend(decoder: Decoder, maps: Maps, lessons: list[Lesson], deadline: float) -> int:
    """Takes steps until a time of :func:`time.monotonic`, and returns their number."""
    optimizer = torch.optim.Adam(maps.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    chance, n_steps = random.Random(0), 0
    queue: list[Lesson] = []
    began = time.monotonic()
    seconds = max(1.0, deadline - began)
    with progress(total=round(seconds), description="training", unit="s") as bar:
        while (share := (time.monotonic() - began) / seconds) < 1:
            rate = LEARNING_RATE * min(1, (n_steps + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * share))
            for group in optimizer.param_groups:
                group["lr"] = rate
            if len(queue) < BATCH:
                queue = chance.sample(lessons, len(lessons)) + queue
            texts = [queue.pop().drawn(chance) for _ in range(min(BATCH, len(queue)))]
            learned = maps.learned()
            loss = divergence(decoder, maps, texts, learned)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(maps.parameters(), 1.0)
            optimizer.step()
            n_steps += 1
            bar.set_postfix_str(f"KL {loss.item():.4f}", refresh=False)
            bar.update_to(min(round(seconds), int(time.monotonic() - began)), round(seconds))
    return n_steps
