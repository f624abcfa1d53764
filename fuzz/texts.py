"""Fuzzes the readers of text files: any bytes end in samples within the limits, or in an error of one line.

    python -m fuzz.texts --cases 100000 --seed 1

The files are text and JSON Lines, valid and damaged: wrong types, missing keys, broken JSON, deep nesting, lone
surrogates, bytes that are no UTF-8. The readers are those of ``convert`` (pypop_gguf/importance/calibration.py) and of
``eval`` (pypop_gguf/quality/tasks.py). The tokenizer has a token for each byte.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from fuzz import harness
from fuzz.harness import Failure
from pypop_gguf import PopError
from pypop_gguf.importance.calibration import load_samples
from pypop_gguf.quality import tasks

_KEYS = [
    "text",
    "prompt",
    "response",
    "question",
    "answer",
    "canonical_solution",
    "messages",
    "test",
    "entry_point",
    "choices",
    "endings",
    "context",
    "label",
    "x",
]
_WORDS = [
    "Once upon a time there was a cat.",
    "What is 2 + 2?",
    "#### 4",
    "#### -1,000.5",
    "####",
    "def f(x):",
    "    return x\n",
    "",
    " ",
    "\n",
    "{}",
    "{0}",
    "%s",
    "ß" * 9,
    "\u2028",
    "\ud800",
    "\0",
    "a" * 3000,
    "1" * 400,
    "9" * 5000,
    "####" + "9" * 400,
]
_ROLES = ["user", "assistant", "system", "", "tool", None, 7]


class Bytes:
    """A tokenizer with a token for each byte. Like real ones, it refuses what is no text."""

    model_max_length = 100_000
    bos_token_id = 1
    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict:
        return {"input_ids": ([1] if add_special_tokens else []) + [3 + byte for byte in text.encode()]}


def word(chance: random.Random) -> str:
    return " ".join(chance.choices(_WORDS, k=chance.choice([1, 1, 2, 5])))


def thing(chance: random.Random, depth: int = 0):
    """Returns any JSON value."""
    kind = chance.randrange(8 if depth < 3 else 6)
    if kind == 6:
        return [thing(chance, depth + 1) for _ in range(chance.randint(0, 3))]
    if kind == 7:
        return {chance.choice(_KEYS): thing(chance, depth + 1) for _ in range(chance.randint(0, 3))}
    return [
        None,
        True,
        chance.choice([0, -1, 10**30, 0.5, float("nan"), float("inf")]),
        word(chance),
        "",
        word(chance),
    ][kind]


def messages(chance: random.Random) -> list:
    result = []
    for _ in range(chance.randint(0, 5)):
        content = chance.choice([word(chance), [{"type": "text", "text": word(chance)}, thing(chance)], thing(chance)])
        result.append({"role": chance.choice(_ROLES), "content": content})
    return result


def line(chance: random.Random) -> str:
    shape = chance.random()
    if shape < 0.5:
        keys = chance.choice(
            [
                ["text"],
                ["prompt", "response"],
                ["question", "answer"],
                ["prompt", "canonical_solution", "test", "entry_point"],
                ["prompt", "answer"],
                ["text", "answer"],
                ["prompt", "response", "answer"],
            ]
        )
        item = {key: word(chance) for key in keys}
        if chance.random() < 0.3:
            item[chance.choice(_KEYS)] = thing(chance)
    elif shape < 0.7:
        item = {"messages": messages(chance)}
    elif shape < 0.9:
        item = {chance.choice(_KEYS): thing(chance) for _ in range(chance.randint(0, 4))}
    else:
        item = thing(chance)
    text = json.dumps(item, ensure_ascii=chance.random() < 0.5)
    if chance.random() < 0.1:
        at = chance.randint(0, len(text))
        text = chance.choice(
            [text[:at], text[:at] + chance.choice('"{}[]\\,:x\t') + text[at:], "[" * 3000, '{"text":' * 3000, "-" * 50]
        )
    return text


def content(chance: random.Random) -> bytes:
    one_kind = chance.random() < 0.5
    state = chance.getstate() if one_kind else None
    lines = []
    for _ in range(chance.choice([0, 1, 1, 2, 3, 8])):
        if state:
            chance.setstate(state)
        lines.append(line(chance))
    raw = (
        chance.choice(["\n", "\n", "\r\n", "\n\n"])
        .join(lines)
        .encode("utf-8", chance.choice(["surrogatepass", "replace"]))
    )
    if chance.random() < 0.1:
        at = chance.randint(0, len(raw))
        raw = raw[:at] + chance.randbytes(chance.choice([1, 4, 100])) + raw[at:]
    return (b"\xef\xbb\xbf" if chance.random() < 0.05 else b"") + raw


def case(chance: random.Random, directory: Path) -> str:
    path = directory / ("a" + chance.choice([".jsonl", ".jsonl", ".json", ".txt"]))
    path.write_bytes(content(chance))
    limits = dict(
        max_samples=chance.choice([1, 2, 200]), max_tokens=chance.choice([8, 20, 512]), seed=chance.randrange(3)
    )
    outcomes = []
    for read in (load_samples, tasks.read_task):
        more = {} if read is load_samples else {"run_code": chance.random() < 0.5}
        try:
            found = read(Bytes(), path, **limits, **more)
            if read is load_samples:
                samples, info = found
                notes = info.skipped
            else:
                samples, notes = found.samples, found.skipped
                for question in found.questions:
                    if not isinstance(question.prompt, str):
                        raise Failure(f"no prompt: {question.prompt!r}")
                    if isinstance(question, tasks.Question) and question.stop[:1] != ("\ndef ",):
                        question.grade(word(chance))  # it has an answer to compare, not a program to run
            if not 1 <= len(samples) <= limits["max_samples"] or any(
                len(sample.tokens) > limits["max_tokens"] for sample in samples
            ):
                raise Failure(
                    f"{len(samples)} samples of {[len(sample.tokens) for sample in samples]} tokens, asked for {limits}"
                )
            for note in notes:
                check_line(note)
            outcomes.append("read")
        except PopError as error:
            check_line(str(error).replace(str(path), ""))
            outcomes.append("refused")
    if len(set(outcomes)) != 1:
        raise Failure(f"one reader takes the file, the other does not: {outcomes}")
    return outcomes[0]


def check_line(text: str) -> None:
    if len(text.splitlines()) != 1 or len(text) > 500:
        raise Failure(f"no clear line: {text[:300]!r}")
    text.encode()  # a terminal has to be able to show it


def main() -> int:
    arguments = harness.parse(__doc__.splitlines()[0], 20_000)
    with harness.directory() as directory:
        harness.limit_memory(512)
        return harness.run(arguments, lambda chance: case(chance, directory), seconds=2.0)


if __name__ == "__main__":
    sys.exit(main())
