"""Generates answers to a task's questions, greedily, and counts how many are right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from pypop_gguf.llama import PopLlama
from pypop_gguf.quality.tasks import Question, Task
from pypop_gguf.statistics import Mean, bootstrap_mean


def answer_questions(llm: PopLlama, task: Task, boundaries: Iterable[int]) -> Iterator[dict[int, bool]]:
    """Yields for each question whether the answer is right, by boundary; L, the whole model, is always there."""
    asked = [llm.pop.n_layer, *boundaries]
    for question in task.questions:
        yield {boundary: _is_answered(llm, task, question, boundary) for boundary in asked}


def _is_answered(llm: PopLlama, task: Task, question: Question, boundary: int) -> bool:
    room = llm.n_ctx() - len(llm.tokenize(question.prompt.encode()))
    if room < 1:
        return False  # A question that does not fit into the context counts as answered wrong.
    llm.reset()  # Otherwise the cache of another boundary would be reused.
    done = llm.create_completion(
        question.prompt, max_tokens=min(task.max_tokens, room), temperature=0, stop=list(task.stop), boundary=boundary
    )
    return question.check(done["choices"][0]["text"])


def share_of_right_answers(answered: Sequence[dict[int, bool]]) -> dict[int, Mean]:
    """Returns the share of right answers at each boundary; empty where nothing was asked."""
    if not answered:
        return {}
    return {
        boundary: bootstrap_mean(np.array([float(right[boundary]) for right in answered])) for boundary in answered[0]
    }
