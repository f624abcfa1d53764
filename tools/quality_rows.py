"""Computes what a variant of a model costs on each task, from the figures that `real_table` has measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pypop_gguf.quality.results import WHOLE, Results
from pypop_gguf.statistics import Difference, Mean, bootstrap_mean, bootstrap_mean_of_groups, paired_difference

# The metric that stands for a task, and what guessing scores.
METRICS = {
    "mmlu": ("MMLU", "accuracy", 0.25),
    "hellaswag": ("HellaSwag", "accuracy_norm", 0.25),
    "gsm8k": ("GSM8K", "exact_match", 0.0),
    "humaneval": ("HumanEval", "passed", 0.0),
    "hotpotqa": ("HotpotQA, F1", "f1", 0.0),
    "recall-500": ("Recall, 500 tokens", "exact_match", 0.0),
    "recall-2000": ("Recall, 2,000 tokens", "exact_match", 0.0),
    "tracking-500": ("Variables, 500 tokens, F1", "f1", 0.0),
}
LABELS = {
    "plain": "plain",
    "head": "plain, first token whole",
    "alone": "fitted to one state",
    "fitted": "fitted",
    "trained": "trained",
    "completed": "fitted, completed",
    "removed": "removed",
    "shortgpt": "ShortGPT",
}


@dataclass(frozen=True)
class Row:
    """One variant of one model.

    Attributes:
        model: Key of ``MODELS``.
        variant: Its name in the results.
        kl: Mean KL divergence over all prompts, None if it was not measured.
        losses: By task: the difference of the score to the whole model.
        mean_loss: The mean of these differences over the tasks that are not guessed, None if one is missing.
        guessed: Tasks on which the whole model does no better than guessing, so that nothing can be lost there.
    """

    model: str
    variant: str
    kl: Mean | None
    losses: dict[str, Difference]
    mean_loss: Mean | None
    guessed: frozenset[str]

    @property
    def kind(self) -> str:
        return kind_of(self.variant)


def kind_of(variant: str) -> str:
    """Returns the key of ``KINDS`` that a variant belongs to."""
    first = variant.split()[0]
    if first in ("removed", "shortgpt"):
        return first
    for kind in ("completed", "trained", "alone"):
        if kind in variant:
            return kind
    if "fitted" in variant:
        return "fitted"
    return "head" if "head" in variant else "plain"


def boundary_of(variant: str) -> int | None:
    first = variant.split()[0]
    return int(first[1:]) if first[1:].isdecimal() else None


def kl_tasks(results: Results) -> list[str]:
    return [task for task in results.tasks() if task.startswith("kl-")]


def sorted_variants(results: Results) -> list[str]:
    """Returns the variants without the whole model, from few skipped layers to many, and rivals last."""
    kinds = list(LABELS)
    found = [variant for variant in results.variants() if variant != WHOLE]
    return sorted(found, key=lambda variant: (-(boundary_of(variant) or 0), kinds.index(kind_of(variant))))


def is_guess(score: Mean, task: str) -> bool:
    return score.low <= METRICS[task][2]


def make_rows(model: str, results: Results) -> list[Row]:
    """Returns the rows of a model, without the whole model itself."""
    whole = {
        task: bootstrap_mean(results.column(task, WHOLE, metric, items))
        for task, (_, metric, _) in METRICS.items()
        if (items := results.items(task, [WHOLE]))
    }
    guessed = frozenset(task for task, score in whole.items() if is_guess(score, task))
    rows = []
    for variant in sorted_variants(results):
        values = [results.column(task, variant, "kl", results.items(task, [variant])) for task in kl_tasks(results)]
        joined = np.concatenate(values) if values else np.array([])
        losses, groups = {}, []
        for task, (_, metric, _) in METRICS.items():
            if items := results.items(task, [WHOLE, variant]):
                found, expected = (results.column(task, name, metric, items) for name in (variant, WHOLE))
                losses[task] = paired_difference(found, expected)
                if task not in guessed:
                    groups.append(found - expected)
        kl = bootstrap_mean(joined) if len(joined) else None
        is_complete = groups and len(groups) == len(whole.keys() - guessed)
        mean_loss = bootstrap_mean_of_groups(groups) if is_complete else None
        rows.append(Row(model, variant, kl, losses, mean_loss, guessed))
    return rows


def mean_score(results: Results) -> float:
    """Returns the mean of the whole model's scores over the tasks that it does not guess."""
    columns = {
        task: results.column(task, WHOLE, metric, items)
        for task, (_, metric, _) in METRICS.items()
        if (items := results.items(task, [WHOLE]))
    }
    known = [column.mean() for task, column in columns.items() if not is_guess(bootstrap_mean(column), task)]
    return float(np.mean(known))
