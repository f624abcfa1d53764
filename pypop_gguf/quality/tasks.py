"""What ``pop-gguf eval`` measures on: files of texts or questions, and code recall, which needs no file.

A task has samples, whose continuation is scored, and where an answer can be checked, questions to generate from.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pypop_gguf.importance.calibration import Sample, choose_samples
from pypop_gguf.importance.records import Record, describe_skipped, read_records
from pypop_gguf.quality import code_runner
from pypop_gguf.quality.score import Tokenizer

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")

# code recall: who has a code, and what stands between the codes
_OWNERS = [
    "apple",
    "basket",
    "bridge",
    "candle",
    "carpet",
    "castle",
    "compass",
    "dragon",
    "engine",
    "feather",
    "garden",
    "hammer",
    "harbour",
    "helmet",
    "island",
    "jacket",
    "kettle",
    "ladder",
    "lantern",
    "magnet",
    "mirror",
    "orange",
    "pencil",
    "pillow",
    "planet",
    "rabbit",
    "ribbon",
    "river",
    "saddle",
    "ticket",
    "tunnel",
    "violin",
    "wagon",
    "window",
]
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
    """A prompt to generate from.

    Attributes:
        prompt: Text.
        check: Whether a generated text is right.
    """

    prompt: str
    check: Callable[[str], bool]


@dataclass(frozen=True)
class Task:
    """Samples to score and questions to answer.

    Attributes:
        name: For tables.
        max_tokens: Of a generated answer.
        stop: Texts that end one.
        skipped: One note for each line of the file that could not be used.
    """

    name: str
    samples: list[Sample]
    questions: list[Question] = field(default_factory=list)
    max_tokens: int = 0
    stop: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def of_file(tokenizer: Tokenizer, path: Path, *, max_samples: int, max_tokens: int, seed: int, run_code: bool) -> Task:
    """A text file or JSON Lines as :func:`pypop_gguf.importance.calibration.load_samples` reads them.

    Lines with ``"answer"`` are also questions: GSM8K's (the number after ``####``), or a prompt whose generated text has to begin
    with the answer. HumanEval's lines are questions where ``run_code`` allows to run what the model wrote.

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

    common = dict(name=path.stem, samples=samples, skipped=describe_skipped(skipped))
    if are_pairs_with("question", "answer"):
        questions = [_question(record, _same_number(record.item["answer"])) for record, _ in chosen]
        return Task(**common, questions=questions, max_tokens=320, stop=("Question:",))
    if are_pairs_with("prompt", "canonical_solution"):
        questions = [_question(record, code_runner.check_of(record.item)) for record, _ in chosen] if run_code else []
        return Task(
            **common, questions=questions, max_tokens=384, stop=("\ndef ", "\nclass ", "\nif __name__", "\nprint(")
        )
    if are_pairs_with("answer"):
        questions = [_question(record, _begins_with(record.item["answer"])) for record, _ in chosen]
        return Task(**common, questions=questions, max_tokens=16, stop=("\n",))
    return Task(**common)


def recall(tokenizer: Tokenizer, n_samples: int, max_tokens: int, seed: int) -> Task:
    """Two-digit codes of things, buried in a text of about ``max_tokens`` tokens, asked for from every depth in turn."""
    chance = random.Random(seed)
    samples, questions = [], []
    for number in range(n_samples):
        prompt, answer = _recall_prompt(tokenizer, chance, max_tokens - 4, number / max(1, n_samples - 1))
        # encoded as one text, as the model would see it
        tokens, n_prompt = tokenizer(f"{prompt} {answer}")["input_ids"], len(tokenizer(prompt)["input_ids"])
        samples.append(Sample(tuple(tokens), min(n_prompt, len(tokens) - 1)))
        questions.append(Question(prompt, _begins_with(answer)))
    return Task(f"recall-{max_tokens}", samples, questions, max_tokens=8, stop=("\n",))


def _recall_prompt(tokenizer: Tokenizer, chance: random.Random, max_tokens: int, depth: float) -> tuple[str, str]:
    owners = chance.sample(_OWNERS, 8)
    codes = {owner: chance.randrange(10, 100) for owner in owners}
    asked = owners[round(depth * (len(owners) - 1))]
    end = f"\nWhat is the code of the {asked}? The code of the {asked} is"
    facts = [f"The code of the {owner} is {code}." for owner, code in codes.items()]

    def text(n_fillers: int) -> str:
        parts = list(facts)
        for i in range(n_fillers):  # evenly between the facts
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


def _question(record: Record, check: Callable[[str], bool]) -> Question:
    return Question(record.content[0], check)


def _begins_with(answer: str) -> Callable[[str], bool]:
    def check(text: str) -> bool:
        words, expected = text.split(), answer.split()
        return [word.strip(".,;:!?") for word in words[: len(expected)]] == [word.strip(".,;:!?") for word in expected]

    return check


def _same_number(answer: str) -> Callable[[str], bool]:
    expected = _last_number(answer)
    return lambda text: expected is not None and _last_number(text) == expected


def _last_number(text: str) -> float | None:
    """The number after ``####``, or the last one there is."""
    numbers = _NUMBER.findall(text.split("####", 1)[1])[:1] if "####" in text else _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None
