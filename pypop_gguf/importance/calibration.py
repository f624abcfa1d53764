"""Texts to calibrate or to measure on: read, choose, tokenize, split into prompt and output.

``convert`` estimates layer importance on them (``pypop_gguf.importance.scores``), ``eval`` and ``tune`` measure quality. Needs a
tokenizer but not torch. The bundled texts, ``data/calibration.jsonl``, were written for this package and share its license.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pypop_gguf.errors import PopError

BUNDLED_PATH = Path(__file__).with_name("data") / "calibration.jsonl"

_JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
_PROMPT_SHARE = 0.6  # of a plain text's tokens; an overlong pair is cut to the same shares
_MIN_TEXT_TOKENS = 8  # a shorter text has nothing to prefill
_MIN_PROMPT_TOKENS = 2  # the last prompt token is a decode step, so one token alone would leave prefill empty
_CHARACTERS_PER_TOKEN = 4  # sizes the pieces of a long text before it is tokenized; too large only wastes text
_GIVE = 'give a plain text file, or JSON Lines with "text", "prompt" and "response", or "messages"'
# keys of a JSON line -> how its prompt is written, and what stands before the response
_PAIRS = {
    ("prompt", "response"): ("{}", ""),
    ("question", "answer"): ("Question: {}\nAnswer:", " "),  # GSM8K
    ("prompt", "canonical_solution"): ("{}", ""),  # HumanEval
}


@dataclass(frozen=True)
class Sample:
    """One request.

    Attributes:
        tokens: Token ids of the prompt and the output after it, [T].
        prompt_len: N, the number of prompt tokens; ``1 <= N < T``.

    Raises:
        PopError: ``prompt_len`` leaves no prompt or no output.
    """

    tokens: tuple[int, ...]
    prompt_len: int

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_len < len(self.tokens):
            raise PopError(
                f"a sample of {len(self.tokens)} tokens cannot have a prompt of {self.prompt_len}; "
                "leave at least one token for the prompt and one for the output"
            )


@dataclass(frozen=True)
class CalibrationInfo:
    """What the samples were made of, for the record.

    Attributes:
        source: File name, or ``"bundled"``.
        n_samples: Number of samples.
        n_tokens: Tokens of all samples together, prompts and outputs.
        seed: Seed of the choice among the file's texts.
        sha256: Hex digest of the chosen texts as read, before any tokenizer: equal for two models calibrated on the
            same texts.
        skipped: One note for each text that could not be used, with its line number.
    """

    source: str
    n_samples: int
    n_tokens: int
    seed: int
    sha256: str
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """A text as it stands in the file.

    Attributes:
        line: Its first line, 1-based.
        content: A text, a (prompt, response) pair or a list of messages.
        item: The JSON object it was read from; empty for plain text.
    """

    line: int
    content: Any
    item: dict = field(default_factory=dict)


class _Unusable(Exception):
    """A single record cannot be used; the message says why."""


def load_samples(
    tokenizer: Any, path: str | Path | None = None, *, max_samples: int = 200, max_tokens: int = 512, seed: int = 0
) -> tuple[list[Sample], CalibrationInfo]:
    """Read samples.

    A plain text file is taken as blocks separated by blank lines, joined and cut to pieces of about ``max_tokens``.
    A ``.jsonl``, ``.ndjson`` or ``.json`` file has one JSON object a line with one of

    - ``"text"``: the first 60% of its tokens are the prompt, as for plain text;
    - ``"prompt"`` and ``"response"``: joined as they are, with a newline where neither has white space; so are
      ``"question"`` and ``"answer"`` (GSM8K), written as ``Question:`` and ``Answer:``, and ``"prompt"`` and
      ``"canonical_solution"`` (HumanEval);
    - ``"messages"``: a chat, written with the tokenizer's chat template, or as ``role: content`` lines where it has
      none; everything before the last assistant message is the prompt.

    A pair that is too long loses the begin of its prompt and the end of its output.

    Args:
        tokenizer: A Hugging Face tokenizer.
        path: File to read, UTF-8; default: the texts that come with the package.
        max_samples: Use at most so many; more are thinned out by a seeded choice. Default 200, the paper's number
            (arXiv 2602.03295).
        max_tokens: Longest sample in tokens; a smaller limit of the tokenizer wins.
        seed: Seed of the choice.

    Returns:
        The samples, in the order of the file, and what they are.

    Raises:
        PopError: The file cannot be read, has no usable text, or a limit is out of range.
    """
    if max_samples < 1:
        raise PopError(f"max_samples is {max_samples}; give at least 1")
    max_tokens = min(max_tokens, getattr(tokenizer, "model_max_length", max_tokens))
    if max_tokens < _MIN_TEXT_TOKENS:
        raise PopError(f"max_tokens is {max_tokens}; give at least {_MIN_TEXT_TOKENS}")

    file = BUNDLED_PATH if path is None else Path(path)
    records, skipped = read_records(file, max_tokens)
    chosen = choose_samples(
        tokenizer, file, records, skipped, max_samples=max_samples, max_tokens=max_tokens, seed=seed
    )
    samples = [sample for _, sample in chosen]
    digest = hashlib.sha256()
    for record, _ in chosen:
        digest.update(json.dumps(record.content).encode() + b"\n")
    return samples, CalibrationInfo(
        source="bundled" if path is None else file.name,
        n_samples=len(samples),
        n_tokens=sum(len(sample.tokens) for sample in samples),
        seed=seed,
        sha256=digest.hexdigest(),
        skipped=notes(skipped),
    )


def read_records(file: Path, max_tokens: int) -> tuple[list[Record], dict[int, str]]:
    """The texts of a file, and the reasons against the lines that are none, by line number.

    Raises:
        PopError: The file cannot be read or is no UTF-8 text.
    """
    text = _read_text(file)
    if file.suffix.lower() in _JSONL_SUFFIXES:
        return _parse_json_lines(text)
    return _parse_plain_text(text, max_tokens * _CHARACTERS_PER_TOKEN), {}


def notes(skipped: dict[int, str]) -> tuple[str, ...]:
    """Each reason with its line number."""
    return tuple(f"line {line}: {skipped[line]}" for line in sorted(skipped))


def choose_samples(
    tokenizer: Any,
    file: Path,
    records: list[Record],
    skipped: dict[int, str],
    *,
    max_samples: int,
    max_tokens: int,
    seed: int,
) -> list[tuple[Record, Sample]]:
    """At most ``max_samples`` records that can be used, in the file's order, tokenized; adds to ``skipped`` those that cannot.

    Raises:
        PopError: None can be used.
    """
    # Only chosen texts are tokenized: a calibration file may be far larger than what is needed of it.
    order = list(range(len(records)))
    if len(records) > max_samples:
        random.Random(seed).shuffle(order)
    chosen: dict[int, Sample] = {}
    for i in order:
        if len(chosen) == max_samples:
            break
        try:
            chosen[i] = _make_sample(tokenizer, records[i].content, max_tokens)
        except _Unusable as reason:
            skipped[records[i].line] = str(reason)
    if not chosen:
        first = f" (line {min(skipped)}: {skipped[min(skipped)]})" if skipped else ""
        raise PopError(f"{file} has no usable text{first}; {_GIVE}")
    return [(records[i], chosen[i]) for i in sorted(chosen)]


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PopError(f"{file} is not UTF-8 text; {_GIVE}") from error
    except OSError as error:
        raise PopError(f"cannot read {file}: {error.strerror}; {_GIVE}") from error


def _parse_plain_text(text: str, piece_characters: int) -> list[Record]:
    """Join blocks up to ``piece_characters`` and cut longer ones, each record named by its first line."""
    blocks: list[tuple[int, str]] = []  # line number, block
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
    """Records of the well-formed lines, and the reasons against the others by line number."""
    records: list[Record] = []
    skipped: dict[int, str] = {}
    # Not splitlines(): JSON strings may hold other line separators of Unicode unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            if "\\ud" in line.lower():
                json.dumps(item, ensure_ascii=False).encode()
            records.append(Record(number, _record_content(item), item))
        except json.JSONDecodeError as error:
            skipped[number] = f"not JSON: {error.msg}"
        except UnicodeEncodeError:
            skipped[number] = "half of a surrogate pair, which is no text"
        except (ValueError, RecursionError):
            skipped[number] = "not JSON that can be read: a number too long, or nested too deeply"
        except _Unusable as reason:
            skipped[number] = str(reason)
    return records, skipped


def _record_content(item: Any) -> str | tuple[str, str] | list[dict[str, str]]:
    if not isinstance(item, dict):
        raise _Unusable("not a JSON object")
    if "messages" in item:
        return _chat_messages(item["messages"])
    given = [keys for keys in _PAIRS if keys[0] in item and keys[1] in item]
    given += [
        keys for keys in _PAIRS if keys[0] in item or (keys[1] in item and "text" not in item)
    ]  # one of them is missing
    keys = given[0] if given else ("text",)
    for key in keys:
        if not isinstance(item.get(key), str) or not item[key].strip():
            raise _Unusable(f'no "{key}" text')
    if keys == ("text",):
        return item["text"]
    form, before = _PAIRS[keys]
    return form.format(item[keys[0]]), before + item[keys[1]]


def _chat_messages(messages: Any) -> list[dict[str, str]]:
    """The chat up to its last assistant message, contents as plain strings."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _Unusable('"messages" is not a list of objects')
    chat = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if isinstance(content, list):  # parts, as multimodal data writes them; only the text is of use
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        if not isinstance(role, str) or not isinstance(content, str):
            raise _Unusable('a message without "role" or "content"')
        chat.append({"role": role, "content": content})
    while chat and chat[-1]["role"] != "assistant":
        chat.pop()
    if len(chat) < 2 or not chat[-1]["content"].strip():
        raise _Unusable("no assistant message with text after another message")
    return chat


def _make_sample(tokenizer: Any, content: Any, max_tokens: int) -> Sample:
    if isinstance(content, str):
        tokens = _encode(tokenizer, content)[:max_tokens]
        if len(tokens) < _MIN_TEXT_TOKENS:
            raise _Unusable(f"{len(tokens)} tokens, fewer than {_MIN_TEXT_TOKENS}")
        return Sample(tuple(tokens), int(len(tokens) * _PROMPT_SHARE))

    if isinstance(content, tuple):
        prompt, response = content
        if not prompt[-1].isspace() and not response[0].isspace():
            prompt += "\n"
        full = prompt + response
        special_tokens = True
    else:
        prompt, full, special_tokens = _format_chat(tokenizer, content)

    # Encoded as one text, since a tokenizer may merge or mark pieces otherwise at the start of a text. What the
    # prompt alone has in common with it is the prompt; a closing special token drops out the same way.
    tokens = _encode(tokenizer, full, special_tokens)
    prompt_len = 0
    for one, other in zip(tokens, _encode(tokenizer, prompt, special_tokens)):
        if one != other:
            break
        prompt_len += 1
    if not _MIN_PROMPT_TOKENS <= prompt_len < len(tokens):
        raise _Unusable("too short a prompt or response")
    return _fit(tokens, prompt_len, max_tokens, getattr(tokenizer, "bos_token_id", None))


def _format_chat(tokenizer: Any, chat: list[dict[str, str]]) -> tuple[str, str, bool]:
    """Prompt, prompt with answer, and whether special tokens are still to be added."""
    if getattr(tokenizer, "chat_template", None):
        try:
            prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
            return prompt, tokenizer.apply_chat_template(chat, tokenize=False), False
        except Exception as error:  # whatever a template raises, e.g. for a role it does not know
            raise _Unusable(f"the chat template refuses it: {error}".replace("\n", " ")) from error
    lines = [f"{message['role']}: {message['content']}" for message in chat[:-1]]
    prompt = "\n".join([*lines, f"{chat[-1]['role']}:"])
    return prompt, f"{prompt} {chat[-1]['content']}", True


def _fit(tokens: list[int], prompt_len: int, max_tokens: int, bos_token_id: int | None) -> Sample:
    """Cut to ``max_tokens``: the output keeps its begin, the prompt its end, behind the token that starts a text."""
    prompt, output = tokens[:prompt_len], tokens[prompt_len:]
    output_share = max_tokens - int(max_tokens * _PROMPT_SHARE)
    output = output[: max(max_tokens - len(prompt), output_share)]
    start = prompt[:1] if prompt[0] == bos_token_id else []
    if len(prompt) + len(output) > max_tokens:
        prompt = start + prompt[len(prompt) + len(output) + len(start) - max_tokens :]
    return Sample(tuple(prompt + output), len(prompt))


def _encode(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
