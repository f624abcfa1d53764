"""How the items of known sets are asked: multiple choice, and questions over passages.

Both are plain text without a chat template. ``records`` reads files with this module, and ``pop-gguf eval`` scores the
choices.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_LETTERS = "ABCDEFGHIJ"
_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words."
)


@dataclass(frozen=True)
class ChoiceForm:
    """A question with several endings, one of which is right.

    Attributes:
        prompt: What all endings follow.
        endings: The endings, each with the space before it.
        answer: Number of the right ending, counted from 0.
    """

    prompt: str
    endings: tuple[str, ...]
    answer: int


def read_choice(item: dict[str, Any]) -> ChoiceForm | None:
    """Returns a question of MMLU's or HellaSwag's form, or None if the item is not a whole one.

    A ``question`` with ``choices`` is asked for the letter of the right choice, as MMLU is. A ``context`` or ``ctx``
    with ``choices`` or ``endings`` is asked for the whole ending, as HellaSwag is. ``answer`` or ``label`` is the
    number of the right one; it may also be its letter. The texts are the ones of lm-evaluation-harness.
    """
    choices = item.get("choices", item.get("endings"))
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(_LETTERS):
        return None
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        return None
    answer = _read_answer(item.get("answer", item.get("label")), len(choices))
    if answer is None:
        return None
    question = item.get("question")
    if isinstance(question, str) and question.strip():
        subject = item.get("subject")
        about = f" about {subject.replace('_', ' ')}" if isinstance(subject, str) and subject.strip() else ""
        lines = [f"The following are multiple choice questions (with answers){about}.", "", question.strip()]
        lines += [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices)]
        endings = tuple(f" {letter}" for letter in _LETTERS[: len(choices)])
        return ChoiceForm("\n".join([*lines, "Answer:"]), endings, answer)
    context = _read_context(item)
    if not context:
        return None
    endings = tuple(f" {_clean(choice)}" for choice in choices)
    return ChoiceForm(context, endings, answer) if all(map(str.strip, endings)) else None


def read_passages(item: dict[str, Any]) -> tuple[str, str] | None:
    """Returns prompt and answer of a question over passages, or None if the item is not one.

    ``context`` is a text, a list of texts, or has the form of HotpotQA's files: pairs of a title and its sentences, or
    lists of titles and sentences. The prompt is LongBench's.
    """
    question, answer = item.get("question"), item.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str) or not question.strip() or not answer.strip():
        return None
    passages = _read_sentences(item.get("context"))
    if not passages:
        return None
    text = "\n".join(passages)
    given = f"{_PASSAGES}\n\nThe following are given passages.\n{text}"
    return f"{given}\n\n{_PASSAGES}\n\nQuestion: {question.strip()}\nAnswer:", answer.strip()


def _read_answer(answer: Any, n_choices: int) -> int | None:
    if isinstance(answer, str) and len(answer) == 1:
        answer = "0123456789".find(answer) if answer.isdecimal() else _LETTERS.find(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < n_choices:
        return None
    return answer


def _read_context(item: dict[str, Any]) -> str:
    """Returns the context of an item of HellaSwag, "" if it has none."""
    first, second, activity = (item.get(key) for key in ("ctx_a", "ctx_b", "activity_label"))
    if isinstance(first, str) and isinstance(second, str):
        context = f"{first} {second.capitalize()}"
        return _clean(f"{activity}: {context}" if isinstance(activity, str) else context)
    given = item.get("context", item.get("ctx"))
    return _clean(given) if isinstance(given, str) else ""


def _clean(text: str) -> str:
    """Returns a text of HellaSwag without the marks of WikiHow's pages, which only some of its texts have."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _read_sentences(context: Any) -> list[str]:
    if isinstance(context, str):
        return [context] if context.strip() else []
    if isinstance(context, dict):  # as the Hugging Face hub has HotpotQA
        titles, sentences = context.get("title"), context.get("sentences")
        if not isinstance(titles, list) or not isinstance(sentences, list) or len(titles) != len(sentences):
            return []
        context = list(zip(titles, sentences))
    if not isinstance(context, list):
        return []
    passages = [passage if isinstance(passage, str) else _join_passage(passage) for passage in context]
    return passages if all(passages) else []


def _join_passage(passage: Any) -> str:
    """Returns a pair of a title and its sentences as one text, "" if it is no such pair."""
    if not isinstance(passage, (list, tuple)) or len(passage) != 2:
        return ""
    title, sentences = passage
    if not isinstance(title, str) or not isinstance(sentences, list):
        return ""
    if not all(isinstance(sentence, str) for sentence in sentences):
        return ""
    return f"{title} — {''.join(sentences).strip()}"
