"""Prompts to fit keys and values on, and others to measure the result on, in the model's own chat template.

data/fit.jsonl and data/measure.jsonl are the bundled prompts: chat, code, retrieval, summaries, mathematics and ten
languages. They were written for this package and share its license. No text is in both. A user's own file is divided.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pypop_gguf.errors import PopError
from pypop_gguf.importance.records import read_records
from pypop_gguf.llama import PopLlama
from pypop_gguf.quality.score import Tokenizer

FEWEST = 16  # prompts in a user's own file
FIT_TOKENS = 40_000  # More text hardly improves a linear fit.
WRITTEN_TOKENS = 300_000  # More text improves training, but the states of all of it are held in memory.
_SAMPLED = 20_000  # letters of a file whose tokens are counted
_DATA = Path(__file__).with_name("data")
_MEASURED = 4  # every fourth prompt of a user's own file is measured on


def read_prompts(
    llm: PopLlama, path: Path | None, max_tokens: int, fit_tokens: int = FIT_TOKENS
) -> tuple[list[list[int]], list[list[int]]]:
    """Reads the prompts to fit on and the prompts to measure on.

    Args:
        llm: The model, whose tokenizer and chat template are used.
        path: Plain text or JSON Lines, as ``pop-gguf eval`` reads them; None for the bundled prompts.
        max_tokens: A longer prompt is left out: a part of it would not be what its end asks about.
        fit_tokens: Most tokens in all of the prompts to fit on.

    Returns:
        The token ids of each prompt to fit on and of each to measure on.

    Raises:
        PopError: The file cannot be read, or has too few prompts.
    """
    if path is None:
        fitted, measured = (_read_bundled(_DATA / name) for name in ("fit.jsonl", "measure.jsonl"))
        return first_prompts(encode_chats(llm, fitted, max_tokens), fit_tokens), encode_chats(llm, measured, max_tokens)
    chats = [_as_chat(record.content) for record in read_records(path, max_tokens)[0]]
    prompts = encode_chats(llm, chats, max_tokens)
    if len(prompts) < FEWEST:
        raise PopError(
            f"{path}: {len(prompts)} texts of at most {max_tokens} tokens are too few to fit and to measure on: "
            f"give at least {FEWEST}"
        )
    _warn_of_unknown_language(llm, path, chats)
    to_fit = [prompt for i, prompt in enumerate(prompts) if i % _MEASURED != _MEASURED - 1]
    return first_prompts(to_fit, fit_tokens), prompts[_MEASURED - 1 :: _MEASURED]


def first_prompts(prompts: list[list[int]], most: int) -> list[list[int]]:
    """Returns the first prompts, as many as have at most so many tokens in all."""
    ends = itertools.accumulate(map(len, prompts))
    return [prompt for prompt, end in zip(prompts, ends, strict=True) if end <= most]


def _warn_of_unknown_language(llm: PopLlama, path: Path, chats: Iterable[list[dict[str, str]]]) -> None:
    text = "\n".join(message["content"] for chat in chats for message in chat)[:_SAMPLED]
    tokens_per_character = len(Tokenizer(llm)(text)["input_ids"]) / max(1, len(text))
    if tokens_per_character > 1:  # Most letters are then spelled byte by byte; in a known language it is 0.2 to 0.7.
        print(
            f"{path} needs {tokens_per_character:.1f} tokens for each letter: the model hardly knows its language, so "
            "this fit and its costs say little about others",
            file=sys.stderr,
        )


def _read_bundled(file: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]


def _as_chat(content: Any) -> list[dict[str, str]]:
    """A record as a chat that ends where the model has to answer."""
    if isinstance(content, list):
        return content[:-1]  # The last message is the assistant's.
    return [{"role": "user", "content": content if isinstance(content, str) else content[0]}]


def chat_frame(llm: PopLlama) -> tuple[list[int], list[int]]:
    """Returns the tokens that every prompt of one message has before the user's words and behind them."""
    tokenizer = Tokenizer(llm)
    one, other = (_encode_chat(tokenizer, [{"role": "user", "content": words}]) for words in ("one", "7"))

    def shared(first: list[int], second: list[int]) -> list[int]:
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
        return [token for token, _ in pairs]

    return shared(one, other), shared(one[::-1], other[::-1])[::-1]


def encode_chat(llm: PopLlama, chat: list[dict[str, str]], max_tokens: int) -> list[int]:
    """Returns the token ids of one chat up to the place of the answer.

    Raises:
        PopError: It has more than ``max_tokens`` of them, or hardly any.
    """
    prompts = encode_chats(llm, [chat], max_tokens)
    if not prompts:
        raise PopError(f"a prompt has no more than 4 tokens, or more than {max_tokens}: give another one")
    return prompts[0]


def encode_chats(llm: PopLlama, chats: Iterable[list[dict[str, str]]], max_tokens: int) -> list[list[int]]:
    """Returns the token ids of each chat up to the place of the answer, without those that are too long or too short.

    Args:
        llm: The model, whose tokenizer and chat template are used.
        chats: The messages of each.
        max_tokens: Longer prompts are left out, and so are those of up to 4 tokens.
    """
    tokenizer = Tokenizer(llm)
    prompts = [_encode_chat(tokenizer, chat) for chat in chats]
    return [prompt for prompt in prompts if 4 < len(prompt) <= max_tokens]


def _encode_chat(tokenizer: Tokenizer, chat: list[dict[str, str]]) -> list[int]:
    """Returns the tokens of a chat up to the place of the answer."""
    if not tokenizer.chat_template:
        return tokenizer("\n\n".join(message["content"] for message in chat))["input_ids"]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
