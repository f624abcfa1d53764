"""Answers the questions of a task: generates an answer greedily, or scores the endings of a choice.

The prompt is read with the boundary that is measured. The whole model writes the answer and scores the endings on the
cache that the prompt has left.
"""

from __future__ import annotations

import numpy as np

from pypop_gguf.importance.forms import ChoiceForm
from pypop_gguf.llama import PopLlama
from pypop_gguf.quality.score import Tokenizer, log_softmax
from pypop_gguf.quality.tasks import Question, encode_choice, encode_question


def answer(llm: PopLlama, tokenizer: Tokenizer, question: Question | ChoiceForm, boundary: int) -> dict[str, float]:
    """Answers a question.

    Args:
        llm: The model.
        tokenizer: Its tokenizer.
        question: A question that fits into the context.
        boundary: First layer that prefill skips, L for the whole model.

    Returns:
        Figures of the answer by the names of :data:`pypop_gguf.quality.grading.METRICS`.
    """
    if isinstance(question, ChoiceForm):
        return grade_choice(question, score_choice(llm, tokenizer, question, boundary))
    prompt = encode_question(tokenizer, question)
    max_tokens = min(question.max_tokens, llm.n_ctx() - len(prompt))
    llm.reset()  # Otherwise the cache of another boundary would be reused.
    done = llm.create_completion(
        prompt, max_tokens=max_tokens, temperature=0, stop=list(question.stop), boundary=boundary
    )
    return question.grade(done["choices"][0]["text"])


def score_choice(llm: PopLlama, tokenizer: Tokenizer, choice: ChoiceForm, boundary: int) -> np.ndarray:
    """Returns the log-likelihood of each ending after the prompt, F64 [n_endings]."""
    prompt, endings = encode_choice(tokenizer, choice)
    if all(len(ending) == 1 for ending in endings):  # Then one read of the prompt predicts them all.
        log_p = log_softmax(llm.score(prompt, endings[0], boundary=boundary))
        return log_p[0, [ending[0] for ending in endings]]
    found = []
    for ending in endings:
        log_p = log_softmax(llm.score(prompt, ending, boundary=boundary))
        found.append(log_p[np.arange(len(ending)), ending].sum())
    return np.array(found)


def grade_choice(choice: ChoiceForm, log_likelihoods: np.ndarray) -> dict[str, float]:
    """Returns whether the likeliest ending is the right one, and for longer endings also by likelihood per letter."""
    lengths = np.array([len(ending.strip()) for ending in choice.endings])
    figures = {"accuracy": float(log_likelihoods.argmax() == choice.answer)}
    if max(lengths) > 1:
        figures["accuracy_norm"] = float((log_likelihoods / lengths).argmax() == choice.answer)
    return figures
