"""Grades answers: each function returns a grader, which gives a text its figures by name, 0 for wrong to 1 for right.

The names are the keys of ``METRICS``, which has their headings in tables.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Collection

Grader = Callable[[str], dict[str, float]]

METRICS = {
    "accuracy": "accuracy",
    "accuracy_norm": "accuracy by length",
    "exact_match": "exact match",
    "f1": "F1",
    "passed": "tests passed",
}

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_BOXED = re.compile(r"\\boxed\{([^{}]*)")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def expect_begin(answer: str) -> Grader:
    """Expects that a text begins with the words of ``answer``."""

    def grade(text: str) -> dict[str, float]:
        words, expected = text.split(), answer.split()
        given = [word.strip(".,;:!?") for word in words[: len(expected)]]
        return {"exact_match": float(given == [word.strip(".,;:!?") for word in expected])}

    return grade


def expect_number(answer: str) -> Grader:
    """Expects that a text gives the same number as ``answer``."""
    expected = find_number(answer)
    return lambda text: {"exact_match": float(expected is not None and find_number(text) == expected)}


def find_number(text: str) -> float | None:
    """Returns the number in the last ``\\boxed{}`` of LaTeX, else the one after ``####``, else the last of the text."""
    numbers = _NUMBER.findall(text)[-1:]
    if boxed := _BOXED.findall(text):
        numbers = _NUMBER.findall(boxed[-1])[:1] or numbers
    elif "####" in text:
        numbers = _NUMBER.findall(text.rsplit("####", 1)[1])[:1]  # The last one: others are headings of Markdown.
    return float(numbers[0].replace(",", "")) if numbers else None


def expect_words(answer: str) -> Grader:
    """Expects the words of ``answer`` as HotpotQA does: exact match, and F1 over the words that both have."""
    expected = normalize(answer)

    def grade(text: str) -> dict[str, float]:
        given = normalize(text)
        return {"exact_match": float(given == expected), "f1": _word_f1(given, expected)}

    return grade


def normalize(text: str) -> str:
    """Returns a text in lower case without punctuation, articles and surplus spaces, as SQuAD and HotpotQA do."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", text).split())


def _word_f1(given: str, expected: str) -> float:
    closed = ("yes", "no", "noanswer")
    if given != expected and (given in closed or expected in closed):
        return 0.0
    words, expected_words = given.split(), expected.split()
    common = sum((Counter(words) & Counter(expected_words)).values())
    return 2 * common / (len(words) + len(expected_words)) if common else 0.0


def expect_names(names: Collection[str], known: Collection[str]) -> Grader:
    """Expects that a text names each of ``names`` and no other of the ``known`` names."""
    expected = set(names)

    def grade(text: str) -> dict[str, float]:
        given = set(re.findall(r"\w+", text)) & set(known)
        f1 = 2 * len(given & expected) / (len(given) + len(expected))
        return {"exact_match": float(given == expected), "f1": f1}

    return grade
