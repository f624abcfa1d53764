"""The tasks of ``pop-gguf eval``: files of texts or questions, and code recall, which needs no file.

A task has samples, whose continuations are scored. Where answers can be checked, it also has questions to answer.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from pypop_gguf.importance.calibration import Sample, choose_samples
from pypop_gguf.importance.records import describe_skipped, read_records
from pypop_gguf.quality import code_runner
from pypop_gguf.quality.score import Tokenizer

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")

# Code recall: the things that have a code, and the sentences between the codes.
_OWNERS = (  # noqa: SIM905 - a list has 34 lines
    "apple basket bridge candle carpet castle compass dragon engine feather garden hammer harbour helmet "
    "island jacket kettle ladder lantern magnet mirror orange pencil pillow planet rabbit ribbon river "
    "saddle ticket tunnel violin wagon window"
).split()
_FILLERS = [
    "The rain had stopped an hour ago",
    "Nobody was in a hurry that day",
    "A dog barked somewhere behind the houses",
    "They had a lovely time until it was time to go home",
    "The shop on the corner was still open",
    "She counted the steps without thinking",
    "It was colder than the day before",
    "He looked out and saw nothing new",
    "The tea had gone cold by then",
    "Two boys ran past, laughing.",
]


@dataclass(frozen=True)
class Question:
    """A prompt whose answer can be checked.

    Attributes:
        prompt: Its text.
        check: Returns whether a generated text answers it right.
    """

    prompt: str
    check: Callable[[str], bool]


@dataclass(frozen=True)
class Task:
    """Samples to score and questions to answer.

    Attributes:
        name: Its name in tables.
        samples: Prompts with continuations.
        questions: Prompts to answer.
        max_tokens: Longest answer, in tokens.
        stop: Texts that end an answer.
        skipped: A note for each line of the file that cannot be used.
    """

    name: str
    samples: list[Sample]
    questions: list[Question] = field(default_factory=list)
    max_tokens: int = 0
    stop: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def read_task(
    tokenizer: Tokenizer, path: Path, *, max_samples: int, max_tokens: int, seed: int, run_code: bool
) -> Task:
    """Reads a text file or JSON Lines, as :func:`pypop_gguf.importance.calibration.load_samples` does.

    Lines with ``"answer"`` are also questions. The answer to one of GSM8K is the number after ``####``; any other
    answer has to begin the generated text. Lines of HumanEval are questions if ``run_code`` allows to run what the
    model writes.

    Raises:
        PopError: The file cannot be read, or no text in it can be used.
    """
    records, skipped = read_records(path, max_tokens)
    chosen = choose_samples(
        tokenizer, path, records, skipped, max_samples=max_samples, max_tokens=max_tokens, seed=seed
    )
    samples = [sample for _, sample in chosen]

    def are_pairs_with(*keys: str) -> bool:
        return all(
            isinstance(record.content, tuple) and all(isinstance(record.item.get(key), str) for key in keys)
            for record, _ in chosen
        )

    def make_questions(make_check: Callable[[dict], Callable[[str], bool]]) -> list[Question]:
        return [Question(record.content[0], make_check(record.item)) for record, _ in chosen]

    task = Task(path.stem, samples, skipped=describe_skipped(skipped))
    if are_pairs_with("question", "answer"):
        questions = make_questions(lambda item: _check_number(item["answer"]))
        return replace(task, questions=questions, max_tokens=320, stop=("Question:",))
    if are_pairs_with("prompt", "canonical_solution"):
        questions = make_questions(code_runner.make_check) if run_code else []
        stop = ("\ndef ", "\nclass ", "\nif __name__", "\nprint(")
        return replace(task, questions=questions, max_tokens=384, stop=stop)
    if are_pairs_with("answer"):
        questions = make_questions(lambda item: _check_begin(item["answer"]))
        return replace(task, questions=questions, max_tokens=16, stop=("\n",))
    return task


def report_skipped(tasks: Iterable[Task]) -> None:
    """Reports on stderr the lines of files that cannot be used, a few of them in full."""
    for task in tasks:
        if task.skipped:
            more = f", and {len(task.skipped) - 3} more" if len(task.skipped) > 3 else ""
            text = f"{task.name}: {len(task.skipped)} lines not used ({'; '.join(task.skipped[:3])}{more})"
            print(text, file=sys.stderr)


def make_recall_task(tokenizer: Tokenizer, n_samples: int, max_tokens: int, seed: int) -> Task:
    """Makes texts of about ``max_tokens`` tokens with two-digit codes, and asks for a code from each depth."""
    chance = random.Random(seed)
    samples, questions = [], []
    for number in range(n_samples):
        prompt, answer = _make_recall_prompt(tokenizer, chance, max_tokens - 4, number / max(1, n_samples - 1))
        # Prompt and answer are encoded as one text, as the model would see them.
        tokens, n_prompt = tokenizer(f"{prompt} {answer}")["input_ids"], len(tokenizer(prompt)["input_ids"])
        samples.append(Sample(tuple(tokens), min(n_prompt, len(tokens) - 1)))
        questions.append(Question(prompt, _check_begin(answer)))
    return Task(f"recall-{max_tokens}", samples, questions, max_tokens=8, stop=("\n",))


def _make_recall_prompt(tokenizer: Tokenizer, chance: random.Random, max_tokens: int, depth: float) -> tuple[str, str]:
    owners = chance.sample(_OWNERS, 8)
    codes = {owner: chance.randrange(10, 100) for owner in owners}
    asked = owners[round(depth * (len(owners) - 1))]
    end = f"\nWhat is the code of the {asked}? The code of the {asked} is"
    facts = [f"The code of the {owner} is {code}." for owner, code in codes.items()]

    def text(n_fillers: int) -> str:
        parts = list(facts)
        for i in range(n_fillers):  # They are spread evenly between the facts.
            parts.insert(
                1 + i * len(parts) // max(1, n_fillers) % len(parts), chance.choice(_FILLERS).rstrip(".") + "."
            )
        return " ".join(parts) + end

    per_filler = len(tokenizer(" ".join(_FILLERS))["input_ids"]) / len(_FILLERS)
    n_fillers = max(0, int((max_tokens - len(tokenizer(text(0))["input_ids"])) / per_filler))
    prompt = text(n_fillers)
    while n_fillers and len(tokenizer(prompt)["input_ids"]) > max_tokens:
        n_fillers -= 1
        prompt = text(n_fillers)
    return prompt, str(codes[asked])


def _check_begin(answer: str) -> Callable[[str], bool]:
    """Returns a check that a text begins with the words of ``answer``."""

    def check(text: str) -> bool:
        words, expected = text.split(), answer.split()
        return [word.strip(".,;:!?") for word in words[: len(expected)]] == [word.strip(".,;:!?") for word in expected]

    return check


def _check_number(answer: str) -> Callable[[str], bool]:
    """Returns a check that a text gives the same number as ``answer``."""
    expected = _find_number(answer)
    return lambda text: expected is not None and _find_number(text) == expected


def _find_number(text: str) -> float | None:
    """Returns the number after ``####``, else the last number of the text."""
    numbers = _NUMBER.findall(text.split("####", 1)[1])[:1] if "####" in text else _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None
