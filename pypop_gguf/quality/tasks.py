"""The tasks of ``pop-gguf eval``: files of texts or questions. ``builtin`` has tasks that need no file.

A task has items. An item has a sample, whose continuation is scored, and where answers can be checked, a question.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pypop_gguf.importance.calibration import Sample, choose_samples
from pypop_gguf.importance.forms import ChoiceForm, read_choice, read_passages
from pypop_gguf.importance.records import Record, UnusableRecordError, describe_skipped, read_records
from pypop_gguf.quality import code_runner
from pypop_gguf.quality.grading import Grader, expect_begin, expect_number, expect_words
from pypop_gguf.quality.score import Tokenizer

_LEAST_ROOM = 32  # tokens of an answer for which a question has to leave room, unless its answers are shorter
_CODE_STOP = ("\ndef ", "\nclass ", "\nif __name__", "\nprint(")
# Asked for GSM8K's "####", Qwen2.5-Coder-0.5B begins with it and does not reason; its authors ask for a box.
_NUMBER_REQUEST = "Please reason step by step, and put your final answer within \\boxed{}."
_CODE_REQUEST = "Complete this Python function. Answer with the whole function."


@dataclass(frozen=True)
class Question:
    """A prompt whose answer is generated and graded.

    Attributes:
        prompt: Its text.
        grade: Gives a generated text its figures.
        max_tokens: Longest answer, in tokens.
        stop: Texts that end an answer.
        is_chat: Whether the prompt comes from a chat template, which has written all special tokens.
    """

    prompt: str
    grade: Grader
    max_tokens: int
    stop: tuple[str, ...] = ()
    is_chat: bool = False


@dataclass(frozen=True)
class Item:
    """One line of a file, or one built-in text.

    Attributes:
        id: Its number and a digest of its text. It names the item in files of results.
        sample: A prompt with a continuation to score.
        question: A question to answer, if it has one.
    """

    id: str
    sample: Sample
    question: Question | ChoiceForm | None = None


@dataclass(frozen=True)
class Task:
    """Items to measure on.

    Attributes:
        name: Its name in tables.
        items: What is scored and asked.
        skipped: A note for each line of the file that cannot be used.
    """

    name: str
    items: list[Item]
    skipped: tuple[str, ...] = ()

    @property
    def samples(self) -> list[Sample]:
        return [item.sample for item in self.items]

    @property
    def questions(self) -> list[Question | ChoiceForm]:
        return [item.question for item in self.items if item.question is not None]


def make_id(number: int, text: str) -> str:
    """Returns the name of an item in files of results, which tells nothing of its text."""
    return f"{number}-{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:6]}"


def read_task(
    tokenizer: Tokenizer, path: Path, *, max_samples: int, max_tokens: int, seed: int, run_code: bool
) -> Task:
    """Reads a text file or JSON Lines, as :func:`pypop_gguf.importance.calibration.load_samples` does.

    Lines with an ``"answer"`` are also questions. Questions of GSM8K and HumanEval are asked through the chat template
    of the model, if it has one. A problem of HumanEval is a question only if ``run_code`` allows to run what the model
    writes. The answer to a question of no known set has to begin the generated text.

    Raises:
        PopError: The file cannot be read, or no text in it can be used.
    """
    records, skipped = read_records(path, max_tokens)
    chosen = choose_samples(
        tokenizer, path, records, skipped, max_samples=max_samples, max_tokens=max_tokens, seed=seed
    )
    items = []
    for record, sample in chosen:
        question = None
        try:
            question = _read_question(tokenizer, record, run_code)
            _check_room(tokenizer, question, max_tokens)
        except UnusableRecordError as reason:
            skipped[record.line] = str(reason)
            question = None
        items.append(Item(make_id(record.line, json.dumps(record.item or record.content)), sample, question))
    return Task(path.stem, items, describe_skipped(skipped))


def _read_question(tokenizer: Tokenizer, record: Record, run_code: bool) -> Question | ChoiceForm | None:
    item = record.item
    if not isinstance(record.content, tuple):
        return None
    prompt = record.content[0]
    if (choice := read_choice(item)) is not None:
        return choice
    if isinstance(item.get("canonical_solution"), str):
        return _ask_for_code(tokenizer, item, prompt) if run_code else None
    if not isinstance(item.get("answer"), str):
        return None
    if item.get("context") and read_passages(item) is not None:
        chat = _format_request(tokenizer, prompt)
        return Question(chat or prompt, expect_words(item["answer"]), 32, ("\n",), is_chat=bool(chat))
    if isinstance(item.get("question"), str):
        chat = _format_request(tokenizer, f"{item['question']}\n\n{_NUMBER_REQUEST}")
        stop = () if chat else ("Question:",)  # A model without a template goes on with further questions.
        return Question(chat or prompt, expect_number(item["answer"]), 400 if chat else 320, stop, is_chat=bool(chat))
    return Question(prompt, expect_begin(item["answer"]), 16, ("\n",))


def _ask_for_code(tokenizer: Tokenizer, item: dict, prompt: str) -> Question:
    chat = _format_request(tokenizer, f"{_CODE_REQUEST}\n\n```python\n{prompt}\n```")
    grade = code_runner.expect_passes(item)
    if not chat:
        return Question(prompt, grade, 384, _CODE_STOP)
    # The answer is begun, so that it is code from its first token on and ends where the code ends.
    return Question(f"{chat}```python\n", grade, 384, ("\n```",), is_chat=True)


def _format_request(tokenizer: Tokenizer, request: str) -> str:
    """Returns the prompt of a chat with one message, "" if the model has no chat template.

    Raises:
        UnusableRecordError: The template refuses the message.
    """
    if not getattr(tokenizer, "chat_template", None):
        return ""
    try:
        return tokenizer.apply_chat_template([{"role": "user", "content": request}], add_generation_prompt=True)
    except Exception as error:  # A template may raise anything.
        raise UnusableRecordError(f"the chat template refuses it: {error}".replace("\n", " ")) from error


def _check_room(tokenizer: Tokenizer, question: Question | ChoiceForm | None, max_tokens: int) -> None:
    """Checks that a question and the begin of its answer fit into the context.

    Raises:
        UnusableRecordError: They do not.
    """
    if question is None:
        return
    if isinstance(question, ChoiceForm):
        prompt, endings = encode_choice(tokenizer, question)
        needed = len(prompt) + max(map(len, endings))
    else:
        needed = len(encode_question(tokenizer, question)) + min(question.max_tokens, _LEAST_ROOM)
    if needed > max_tokens:
        raise UnusableRecordError(f"its question needs a context of {needed} tokens")


def encode_question(tokenizer: Tokenizer, question: Question) -> list[int]:
    """Returns the token ids of a prompt."""
    return list(tokenizer(question.prompt, add_special_tokens=not question.is_chat)["input_ids"])


def encode_choice(tokenizer: Tokenizer, choice: ChoiceForm) -> tuple[list[int], list[list[int]]]:
    """Returns the token ids of the prompt that all endings share, and those of each ending.

    Prompt and ending are encoded as one text, because a tokenizer may merge pieces where they meet.
    """
    prompt = list(tokenizer(choice.prompt)["input_ids"])
    texts = [list(tokenizer(choice.prompt + ending)["input_ids"]) for ending in choice.endings]
    shared = 0
    for tokens in zip(prompt, *(text[:-1] for text in texts)):
        if len(set(tokens)) > 1:
            break
        shared += 1
    return prompt[:shared], [text[shared:] for text in texts]


def report_skipped(tasks: Iterable[Task]) -> None:
    """Reports on stderr the lines of files that cannot be used, a few of them in full."""
    for task in tasks:
        if task.skipped:
            more = f", and {len(task.skipped) - 3} more" if len(task.skipped) > 3 else ""
            text = f"{task.name}: {len(task.skipped)} lines not used ({'; '.join(task.skipped[:3])}{more})"
            print(text, file=sys.stderr)
