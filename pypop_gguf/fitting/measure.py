"""Measures what pruning costs a model's own answers, with the skipped layers' own weights and with fitted ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pypop_gguf.llama import PopLlama
from pypop_gguf.quality.score import Score, compare, log_softmax


@dataclass(frozen=True)
class Answer:
    """A prompt, the whole model's greedy answer to it, and the log-probabilities that it gave to the answer.

    Attributes:
        prompt: Token ids.
        tokens: Token ids of the answer, at least one.
        log_p: F32 [len(tokens), n_vocab].
    """

    prompt: list[int]
    tokens: list[int]
    log_p: np.ndarray


def write_answers(
    llm: PopLlama, prompts: Sequence[list[int]], n_tokens: int, progress: Callable[[], object] = lambda: None
) -> list[Answer]:
    """Lets the whole model answer each prompt.

    Args:
        llm: The model.
        prompts: Token ids of each prompt.
        n_tokens: Tokens of an answer; an answer that ends itself is shorter.
        progress: Called after each answer.
    """
    answers = []
    for prompt in prompts:
        tokens = []
        for token in llm.generate(prompt, temp=0.0):
            tokens.append(token)
            if len(tokens) == n_tokens or token == llm.token_eos():
                break
        log_p = log_softmax(llm.score(prompt, tokens, pop=False)).astype(np.float32)
        answers.append(Answer(prompt, tokens, log_p))
        progress()
    return answers


def score_answers(
    llm: PopLlama, answers: Sequence[Answer], boundary: int, progress: Callable[[], object] = lambda: None
) -> list[Score]:
    """Scores the answers after prompts that were pruned at a boundary, with the adapters that the context has.

    Args:
        llm: The model.
        answers: From :func:`write_answers`.
        boundary: 1..L.
        progress: Called after each answer.
    """
    scores = []
    for answer in answers:
        log_p = log_softmax(llm.score(answer.prompt, answer.tokens, boundary=boundary))
        scores.append(compare(log_p, answer.log_p.astype(np.float64), answer.tokens))
        progress()
    return scores
