"""Read the texts of a calibration file as they stand, before any tokenizer: plain text, or JSON Lines of several kinds.

``pypop_gguf.importance.calibration`` makes samples of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pypop_gguf.errors import PopError
from pypop_gguf.importance.forms import read_choice, read_passages

# The end of an error message about a file, which says what to give instead.
ADVICE = 'give a plain text file, or JSON Lines with "text", "prompt" and "response", or "messages"'

_JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
_CHARACTERS_PER_TOKEN = 4  # An estimate that sizes the pieces of a long text; too large only wastes text.
# For each pair of JSON keys: how the prompt is written, and what stands before the response.
_PAIRS = {
    ("prompt", "response"): ("{}", ""),
    ("question", "answer"): ("Question: {}\nAnswer:", " "),  # GSM8K
    ("prompt", "canonical_solution"): ("{}", ""),  # HumanEval
}


@dataclass(frozen=True)
class Record:
    """One text as it stands in the file.

    Attributes:
        line: The number of the record's first line, 1-based.
        content: A text, a (prompt, response) pair or a list of chat messages.
        item: The JSON object that the record was read from; empty for plain text.
    """

    line: int
    content: Any
    item: dict[str, Any] = field(default_factory=dict)


class UnusableRecordError(Exception):
    """A single record cannot be used. The message says why."""


def read_records(file: Path, max_tokens: int) -> tuple[list[Record], dict[int, str]]:
    """Read the texts of a file.

    Args:
        file: A file of JSON Lines if its name ends in ``.jsonl``, ``.ndjson`` or ``.json``, else plain text; UTF-8.
        max_tokens: The length of a sample in tokens. Blocks of plain text are joined and cut to about this length.

    Returns:
        The records in the order of the file, and the reason why each other line is skipped, by line number.

    Raises:
        PopError: The file cannot be read or is not UTF-8 text.
    """
    text = _read_text(file)
    if file.suffix.lower() in _JSONL_SUFFIXES:
        return _parse_json_lines(text)
    return _parse_plain_text(text, max_tokens * _CHARACTERS_PER_TOKEN), {}


def describe_skipped(skipped: dict[int, str]) -> tuple[str, ...]:
    """Return one note for each skipped line, in order: the line number and the reason."""
    return tuple(f"line {line}: {skipped[line]}" for line in sorted(skipped))


def _read_text(file: Path) -> str:
    """Read a file as UTF-8 text, without its byte order mark.

    Raises:
        PopError: The file cannot be read or is not UTF-8 text.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PopError(f"{file} is not UTF-8 text; {ADVICE}") from error
    except OSError as error:
        raise PopError(f"cannot read {file}: {error.strerror}; {ADVICE}") from error


def _parse_plain_text(text: str, piece_characters: int) -> list[Record]:
    """Make records of the blocks between blank lines: join short blocks up to ``piece_characters`` and cut longer ones.

    The line of a record is the first line of its first block.
    """
    blocks: list[tuple[int, str]] = []  # the block's first line number, and its text
    lines: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        if line.strip():
            lines.append(line.rstrip())
        elif lines:
            blocks.append((number - len(lines), "\n".join(lines)))
            lines = []

    records: list[Record] = []
    for number, block in blocks:
        last = records[-1].content if records else None
        if last is not None and len(last) + 2 + len(block) <= piece_characters:
            records[-1] = Record(records[-1].line, f"{last}\n\n{block}")
            continue
        while len(block) > piece_characters:
            cut = block.rfind(" ", piece_characters // 2, piece_characters)
            cut = piece_characters if cut < 0 else cut
            records.append(Record(number, block[:cut]))
            block = block[cut:].lstrip()
        if block:
            records.append(Record(number, block))
    return records


def _parse_json_lines(text: str) -> tuple[list[Record], dict[int, str]]:
    """Return the records of the usable lines, and the reason why each other line is skipped, by line number."""
    records: list[Record] = []
    skipped: dict[int, str] = {}
    # str.splitlines() would also split at other line separators of Unicode, which a JSON string may hold as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            # JSON can spell half of a surrogate pair, which no UTF-8 text can hold.
            if "\\ud" in line.lower():
                json.dumps(item, ensure_ascii=False).encode()
            records.append(Record(number, _read_content(item), item))
        except json.JSONDecodeError as error:
            skipped[number] = f"not JSON: {error.msg}"
        except UnicodeEncodeError:
            skipped[number] = "half of a surrogate pair, which is no text"
        except (ValueError, RecursionError):
            skipped[number] = "not JSON that can be read: a number too long, or nested too deeply"
        except UnusableRecordError as reason:
            skipped[number] = str(reason)
    return records, skipped


def _read_content(item: Any) -> str | tuple[str, str] | list[dict[str, str]]:
    """Read the text, the (prompt, response) pair or the chat from a JSON value.

    Raises:
        UnusableRecordError: The value holds none of them.
    """
    if not isinstance(item, dict):
        raise UnusableRecordError("not a JSON object")
    if "messages" in item:
        return _read_chat(item["messages"])
    if ("choices" in item or "endings" in item) and "text" not in item and "prompt" not in item:
        choice = read_choice(item)
        if choice is None:
            raise UnusableRecordError('no "question" or "context" with "choices" and the number of the right "answer"')
        return choice.prompt, choice.endings[choice.answer]
    if item.get("context") and "question" in item:
        passages = read_passages(item)
        if passages is None:
            raise UnusableRecordError('no "question" and "answer" texts with a "context" of passages')
        return passages[0], f" {passages[1]}"
    complete = [keys for keys in _PAIRS if keys[0] in item and keys[1] in item]
    # Half of a pair is taken for a mistake and reported, unless its second key only accompanies a "text".
    half = [keys for keys in _PAIRS if keys[0] in item or (keys[1] in item and "text" not in item)]
    pairs = complete + half
    if not pairs:
        return _read_string(item, "text")
    prompt, response = (_read_string(item, key) for key in pairs[0])
    form, before = _PAIRS[pairs[0]]
    return form.format(prompt), before + response


def _read_string(item: dict[str, Any], key: str) -> str:
    """Return the text under a key of a JSON object.

    Raises:
        UnusableRecordError: There is no text under the key, or only white space.
    """
    text = item.get(key)
    if not isinstance(text, str) or not text.strip():
        raise UnusableRecordError(f'no "{key}" text')
    return text


def _read_chat(messages: Any) -> list[dict[str, str]]:
    """Return a chat up to its last assistant message, with the content of each message as a plain string.

    Raises:
        UnusableRecordError: The value is no chat, or its last assistant message is empty or comes first.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UnusableRecordError('"messages" is not a list of objects')
    chat = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if isinstance(content, list):  # Multimodal data writes contents in parts; only the text is of use here.
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        if not isinstance(role, str) or not isinstance(content, str):
            raise UnusableRecordError('a message without "role" or "content"')
        chat.append({"role": role, "content": content})
    while chat and chat[-1]["role"] != "assistant":
        chat.pop()
    if len(chat) < 2 or not chat[-1]["content"].strip():
        raise UnusableRecordError("no assistant message with text after another message")
    return chat
