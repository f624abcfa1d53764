"""Calibration files: every format, what is cut and what is kept, and every way in which a file can be bad.

The tokenizer of these tests makes one token of each character, so lengths and ends of prompts can be read off.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pypop_gguf.errors import PopError
from pypop_gguf.importance.calibration import load_samples
from tests.support.paths import BUNDLED

BOS, EOS = 1, 2


class CharacterTokenizer:
    """A tokenizer with one token for each character, BOS in front and, as in some tokenizers, EOS behind."""

    bos_token_id = BOS
    model_max_length = 1000

    def __init__(self, chat_template: str | None = None, add_eos: bool = False) -> None:
        self.chat_template = chat_template
        self.add_eos = add_eos

    def __call__(self, text, add_special_tokens=True):
        ids = [ord(character) for character in text]
        return {"input_ids": [BOS, *ids, *[EOS] * self.add_eos] if add_special_tokens else ids}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        if any(message["role"] == "system" for message in messages):
            raise ValueError("System role\nnot supported")
        text = "".join(f"<{message['role']}>{message['content']}</>" for message in messages)
        return text + "<assistant>" * add_generation_prompt


def decode(tokens) -> str:
    return "".join(chr(token) for token in tokens if token not in (BOS, EOS))


def parts(sample) -> tuple[str, str]:
    return decode(sample.tokens[: sample.prompt_len]), decode(sample.tokens[sample.prompt_len :])


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, content) -> Path:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            lines = [line if isinstance(line, str) else json.dumps(line) for line in content]
            path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write_file


def test_plain_text_splits_at_sixty_percent(write):
    path = write("text.txt", ["abcdefghijklmnopqrs"])  # These are 20 tokens with BOS.
    samples, info = load_samples(CharacterTokenizer(), path)
    assert [parts(sample) for sample in samples] == [("abcdefghijk", "lmnopqrs")]
    assert samples[0].tokens[0] == BOS and samples[0].prompt_len == 12
    assert (info.source, info.n_samples, info.n_tokens, info.seed, info.skipped) == ("text.txt", 1, 20, 0, ())


def test_short_blocks_are_joined_and_long_ones_cut(write):
    path = write("text.txt", ["one two", "three", "", "  ", "four five", "", "word " * 30])
    samples, _ = load_samples(CharacterTokenizer(), path, max_tokens=10)  # Pieces have up to 40 characters.
    texts = ["".join(parts(sample)) for sample in samples]
    assert texts[0] == "one two\nt"  # The block was joined with the next one, then cut to the limit.
    assert texts[1:] == ["word word"] * 4
    assert all(len(sample.tokens) == 10 for sample in samples)


def test_text_without_spaces_is_cut_too(write):
    samples, _ = load_samples(CharacterTokenizer(), write("a.txt", ["x" * 100]), max_tokens=10)
    assert [len(sample.tokens) for sample in samples] == [10, 10, 10]


def test_json_lines_of_every_kind_are_read(write):
    path = write(
        "mixed.jsonl",
        [
            {"text": "abcdefghijklmnopqrs"},
            "",
            {"prompt": "Question?", "response": "Answer."},
            {"prompt": "def f(x):\n", "response": "    return x"},
            {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]},
        ],
    )
    samples, info = load_samples(CharacterTokenizer(), path)
    assert [parts(sample) for sample in samples] == [
        ("abcdefghijk", "lmnopqrs"),
        ("Question?\n", "Answer."),
        ("def f(x):\n", "    return x"),
        ("user: Hello\nassistant:", " Good day"),
    ]
    assert info.n_samples == 4 and info.skipped == ()


def test_chat_uses_the_template_and_ends_at_the_last_assistant_message(write):
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": "Me"},
        {"role": "user", "content": "Thanks"},
    ]
    samples, _ = load_samples(CharacterTokenizer(chat_template="yes"), write("a.jsonl", [{"messages": messages}]))
    assert parts(samples[0]) == ("<user>Hello</><assistant>Hi</><user>Who?</><assistant>", "Me</>")
    assert samples[0].tokens[0] != BOS  # The template brings its own special tokens.


def test_closing_token_of_a_tokenizer_does_not_end_the_prompt(write):
    path = write("a.jsonl", [{"prompt": "Question?", "response": "Answer."}])
    samples, _ = load_samples(CharacterTokenizer(add_eos=True), path)
    assert parts(samples[0]) == ("Question?\n", "Answer.") and samples[0].tokens[-1] == EOS


@pytest.mark.parametrize(
    ("n_prompt", "n_response", "expected"),
    [
        (50, 4, (15, 4)),  # The output is short, so the prompt gets the rest. BOS and the newline count as prompt.
        (4, 50, (5, 14)),  # The prompt is short, so the output gets the rest.
        (50, 50, (11, 8)),  # Both are long and get the shares that a plain text has.
    ],
    ids=["long prompt", "long response", "both long"],
)
def test_long_pair_keeps_end_of_prompt_and_begin_of_response(write, n_prompt, n_response, expected):
    prompt = "".join(chr(ord("A") + i % 26) for i in range(n_prompt))
    response = "".join(chr(ord("a") + i % 26) for i in range(n_response))
    samples, _ = load_samples(
        CharacterTokenizer(), write("a.jsonl", [{"prompt": prompt, "response": response}]), max_tokens=20
    )
    kept_prompt, kept_response = parts(samples[0])
    assert len(samples[0].tokens) == 20 and samples[0].tokens[0] == BOS
    assert (len(kept_prompt), len(kept_response)) == expected
    assert f"{prompt}\n".endswith(kept_prompt) and response.startswith(kept_response)


def test_limit_of_the_tokenizer_wins(write):
    tokenizer = CharacterTokenizer()
    tokenizer.model_max_length = 12
    samples, _ = load_samples(tokenizer, write("a.jsonl", [{"text": "x" * 100}]), max_tokens=512)
    assert len(samples[0].tokens) == 12


def test_bad_lines_are_skipped_and_named(write):
    good = {"prompt": "Question?", "response": "Answer."}
    path = write(
        "bad.jsonl",
        [
            good,
            '{"prompt": "cut o',
            "[1, 2]",
            {"prompt": "no response"},
            {"title": "no text"},
            {"messages": "hello"},
            {"messages": [{"role": "user", "content": "no answer"}]},
            {"messages": [{"role": "assistant", "content": "no question"}]},
            {"messages": [{"role": "user"}, {"role": "assistant", "content": "Hi"}]},
            {"text": "short"},
            good,
        ],
    )
    samples, info = load_samples(CharacterTokenizer(), path)
    assert len(samples) == info.n_samples == 2
    assert [note.split(":")[0] for note in info.skipped] == [f"line {number}" for number in range(2, 11)]
    assert "not JSON" in info.skipped[0] and '"response"' in info.skipped[2] and "6 tokens" in info.skipped[8]


def test_chat_that_the_template_refuses_is_skipped(write):
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    path = write("a.jsonl", [{"messages": [{"role": "system", "content": "Be brief."}, *chat]}, {"messages": chat}])
    samples, info = load_samples(CharacterTokenizer(chat_template="yes"), path)
    assert len(samples) == 1
    assert info.skipped == ("line 1: the chat template refuses it: System role not supported",)


def test_choice_among_many_is_seeded_and_keeps_the_order(write):
    path = write("a.jsonl", [{"text": f"{i:02d} and more text"} for i in range(50)])

    def chosen(seed):
        samples, info = load_samples(CharacterTokenizer(), path, max_samples=5, seed=seed)
        return [int(decode(sample.tokens)[:2]) for sample in samples], info.sha256

    assert chosen(1) == chosen(1) != chosen(2)
    numbers, _ = chosen(1)
    assert len(numbers) == 5 and numbers == sorted(numbers) and numbers != [0, 1, 2, 3, 4]


def test_unusable_texts_do_not_use_up_the_choice(write):
    path = write("a.jsonl", [{"text": "short" if i % 2 else "long enough to be used"} for i in range(20)])
    _, info = load_samples(CharacterTokenizer(), path, max_samples=10)
    assert info.n_samples == 10


def test_hash_depends_on_the_texts_and_not_on_the_tokenizer(write):
    one, other = (write(f"{i}.jsonl", [{"text": f"a text with number {i}"}]) for i in range(2))
    first = load_samples(CharacterTokenizer(), one)[1].sha256
    assert first == load_samples(CharacterTokenizer(add_eos=True), one)[1].sha256
    assert first != load_samples(CharacterTokenizer(), other)[1].sha256


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.txt", b"", "has no usable text; give"),
        ("blank.txt", b"\n \n\n", "has no usable text; give"),
        ("empty.jsonl", b"\n", "has no usable text; give"),
        ("broken.jsonl", b'{"text": \n{}\n', "no usable text .line 1: not JSON"),
        ("array.json", b'[{"text": "a text"}]', "no usable text .line 1: not a JSON object"),
        ("short.txt", b"short", "no usable text .line 1: 6 tokens"),
        ("binary.txt", b"\xff\xfe\x00\x80", "not UTF-8"),
    ],
)
def test_useless_file_is_an_error_of_one_line(write, name, content, reason):
    with pytest.raises(PopError, match=reason) as caught:
        load_samples(CharacterTokenizer(), write(name, content))
    assert name in str(caught.value)


def test_missing_file_directory_and_bad_limits_are_errors(tmp_path):
    for path in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(PopError, match="cannot read "):
            load_samples(CharacterTokenizer(), path)
    with pytest.raises(PopError, match="max_samples is 0"):
        load_samples(CharacterTokenizer(), max_samples=0)
    with pytest.raises(PopError, match="max_tokens is 4"):
        load_samples(CharacterTokenizer(), max_tokens=4)


def test_byte_order_mark_and_windows_line_ends_are_accepted(write):
    samples, _ = load_samples(CharacterTokenizer(), write("a.txt", "\ufefffirst line\r\nsecond line\r\n".encode()))
    assert "".join(parts(samples[0])) == "first line\nsecond line"


def test_bundled_set_is_usable_as_a_whole():
    samples, info = load_samples(CharacterTokenizer())
    assert info.source == "bundled" and info.n_samples == 64 and info.skipped == ()
    assert len(info.sha256) == 64
    assert all(1 < sample.prompt_len < len(sample.tokens) for sample in samples)


def test_real_tokenizer_puts_the_boundary_between_prompt_and_response(write):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED)
    path = write("a.jsonl", [{"prompt": "The cat sat on", "response": " the mat and slept."}])
    (sample,), _ = load_samples(tokenizer, path)
    assert sample.tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(sample.tokens[: sample.prompt_len], skip_special_tokens=True).strip() == "The cat sat on"
    assert tokenizer.decode(sample.tokens[sample.prompt_len :]).strip() == "the mat and slept."
