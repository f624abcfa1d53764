"""Make samples of texts, to calibrate or to measure on: choose texts, tokenize them, split each into prompt and output.

``convert`` estimates layer importance on the samples (``pypop_gguf.importance.scores``); ``eval`` and ``tune`` measure
quality on them. This needs a tokenizer but not torch. The bundled texts, ``data/calibration.jsonl``, were written for
this package and share its license.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pypop_gguf.errors import PopError
from pypop_gguf.importance.records import ADVICE, Record, UnusableRecordError, describe_skipped, read_records

BUNDLED_PATH = Path(__file__).with_name("data") / "calibration.jsonl"

_PROMPT_SHARE = 0.6  # The prompt's share of a plain text's tokens. A pair that is too long is cut to the same shares.
_MIN_TEXT_TOKENS = 8  # A shorter text would leave next to nothing for prefill.
_MIN_PROMPT_TOKENS = 2  # The last prompt token is a decode step, so a prompt of one token has no prefill.


@dataclass(frozen=True)
class Sample:
    """One request: a prompt and the output after it.

    Attributes:
        tokens: Token ids of the prompt and of the output, [T].
        prompt_len: The number of prompt tokens N, ``1 <= N < T``.

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
    """A record of what the samples were made of.

    Attributes:
        source: The name of the file, or ``"bundled"``.
        n_samples: The number of samples.
        n_tokens: The number of tokens of all samples together, prompts and outputs.
        seed: The seed of the choice among the file's texts.
        sha256: Hex digest of the chosen texts as read, before any tokenizer. It is equal for two models that were
            calibrated on the same texts.
        skipped: One note for each text that could not be used, with its line number.
    """

    source: str
    n_samples: int
    n_tokens: int
    seed: int
    sha256: str
    skipped: tuple[str, ...]


def load_samples(
    tokenizer: Any, path: str | Path | None = None, *, max_samples: int = 200, max_tokens: int = 512, seed: int = 0
) -> tuple[list[Sample], CalibrationInfo]:
    """Read samples from a file.

    A plain text file is read as blocks separated by blank lines, which are joined and cut to pieces of about
    ``max_tokens``. A ``.jsonl``, ``.ndjson`` or ``.json`` file has one JSON object on each line, with one of

    - ``"text"``: the first 60% of its tokens are the prompt, as for plain text;
    - ``"prompt"`` and ``"response"``: joined as they are, with a newline where neither has white space.
      ``"question"`` and ``"answer"`` (GSM8K), written as ``Question:`` and ``Answer:``, are read in the same way, and
      so are ``"prompt"`` and ``"canonical_solution"`` (HumanEval);
    - ``"messages"``: a chat, written with the tokenizer's chat template, or as ``role: content`` lines if it has
      none. Everything before the last assistant message is the prompt.

    A pair that is too long loses the beginning of its prompt and the end of its output.

    Args:
        tokenizer: A Hugging Face tokenizer.
        path: The file to read, in UTF-8. The default are the texts that come with the package.
        max_samples: The largest number of samples; from more texts a seeded choice is taken. The default, 200, is the
            paper's number (arXiv 2602.03295).
        max_tokens: The length of the longest sample, in tokens. The tokenizer's own limit is kept if it is smaller.
        seed: The seed of the choice.

    Returns:
        The samples in the order of the file, and a record of what they were made of.

    Raises:
        PopError: The file cannot be read or has no usable text, or a limit is out of range.
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
        skipped=describe_skipped(skipped),
    )


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
    """Choose at most ``max_samples`` usable records and tokenize them.

    Args:
        tokenizer: A Hugging Face tokenizer, or one that can be called as such.
        file: The file that the records come from, named in the error.
        records: The records of the file, from ``read_records``.
        skipped: The reason why each skipped line is skipped, by line number. The records that turn out to be unusable
            are added.
        max_samples: The largest number of records to choose, at least 1.
        max_tokens: The length of the longest sample, in tokens.
        seed: The seed of the choice if there are more records.

    Returns:
        Each chosen record and its sample, in the order of the file.

    Raises:
        PopError: No record can be used.
    """
    # Only chosen texts are tokenized, because a calibration file may be far larger than what is needed of it.
    order = list(range(len(records)))
    if len(records) > max_samples:
        random.Random(seed).shuffle(order)
    chosen: dict[int, Sample] = {}
    for i in order:
        if len(chosen) == max_samples:
            break
        try:
            chosen[i] = _make_sample(tokenizer, records[i].content, max_tokens)
        except UnusableRecordError as reason:
            skipped[records[i].line] = str(reason)
    if not chosen:
        first = f" (line {min(skipped)}: {skipped[min(skipped)]})" if skipped else ""
        raise PopError(f"{file} has no usable text{first}; {ADVICE}")
    return [(records[i], chosen[i]) for i in sorted(chosen)]


def _make_sample(tokenizer: Any, content: Any, max_tokens: int) -> Sample:
    """Tokenize the content of a record and split it into prompt and output.

    Raises:
        UnusableRecordError: The text, the prompt or the output is too short, or the chat template refuses the chat.
    """
    if isinstance(content, str):
        tokens = _encode(tokenizer, content)[:max_tokens]
        if len(tokens) < _MIN_TEXT_TOKENS:
            raise UnusableRecordError(f"{len(tokens)} tokens, fewer than {_MIN_TEXT_TOKENS}")
        return Sample(tuple(tokens), int(len(tokens) * _PROMPT_SHARE))

    if isinstance(content, tuple):
        prompt, response = content
        if not prompt[-1].isspace() and not response[0].isspace():
            prompt += "\n"
        full = prompt + response
        special_tokens = True
    else:
        prompt, full, special_tokens = _format_chat(tokenizer, content)

    # Prompt and output are encoded as one text, because a tokenizer may merge pieces where they meet or mark the start
    # of a text. The prompt's tokens are those that this text and the prompt alone begin with. A special token that
    # closes the prompt alone drops out in this way too.
    tokens = _encode(tokenizer, full, special_tokens)
    prompt_len = 0
    for one, other in zip(tokens, _encode(tokenizer, prompt, special_tokens)):
        if one != other:
            break
        prompt_len += 1
    if not _MIN_PROMPT_TOKENS <= prompt_len < len(tokens):
        raise UnusableRecordError("too short a prompt or response")
    return _cut_pair(tokens, prompt_len, max_tokens, getattr(tokenizer, "bos_token_id", None))


def _format_chat(tokenizer: Any, chat: list[dict[str, str]]) -> tuple[str, str, bool]:
    """Return the prompt, the prompt with the answer, and whether the tokenizer still has to add special tokens.

    Raises:
        UnusableRecordError: The tokenizer's chat template refuses the chat.
    """
    if getattr(tokenizer, "chat_template", None):
        try:
            prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
            return prompt, tokenizer.apply_chat_template(chat, tokenize=False), False
        except Exception as error:  # A template may raise anything, for a role that it does not know for example.
            raise UnusableRecordError(f"the chat template refuses it: {error}".replace("\n", " ")) from error
    lines = [f"{message['role']}: {message['content']}" for message in chat[:-1]]
    prompt = "\n".join([*lines, f"{chat[-1]['role']}:"])
    return prompt, f"{prompt} {chat[-1]['content']}", True


def _cut_pair(tokens: list[int], prompt_len: int, max_tokens: int, bos_token_id: int | None) -> Sample:
    """Cut a pair to ``max_tokens``.

    The output keeps its beginning. The prompt keeps its end, and in front of it the token that starts a text.
    """
    prompt, output = tokens[:prompt_len], tokens[prompt_len:]
    output_share = max_tokens - int(max_tokens * _PROMPT_SHARE)
    output = output[: max(max_tokens - len(prompt), output_share)]
    start = prompt[:1] if prompt[0] == bos_token_id else []
    if len(prompt) + len(output) > max_tokens:
        prompt = start + prompt[len(prompt) + len(output) + len(start) - max_tokens :]
    return Sample(tuple(prompt + output), len(prompt))


def _encode(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    """Return the token ids of a text."""
    return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
