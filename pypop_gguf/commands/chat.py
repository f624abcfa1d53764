"""``pop-gguf chat``: a conversation in the terminal, with the prompt's progress and the time to first token of each turn."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from pypop_gguf import PopLlama
from pypop_gguf.bench.plan import cores
from pypop_gguf.errors import PopError, one_line

DESCRIPTION = """\
Talks with a model. Answers stream; while a prompt is read stderr shows how far. Ctrl-C stops reading or answering, a second one at the
prompt, Ctrl-D or /bye ends. From a pipe the whole input is one question, and only the answer goes to stdout."""

HELP = """\
/pop on|off|N  read prompts with the file's boundary, with every layer, or with the layers below N
/new           forget the conversation
/bye           end (or Ctrl-D)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--context",
        type=int,
        default=4096,
        metavar="N",
        help="tokens of the conversation at most (default: 4096, or what the model was trained for)",
    )
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="of an answer (default: 512)")
    parser.add_argument(
        "--temperature", type=float, default=0.7, metavar="T", help="(default: 0.7; 0: the likeliest token)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="(default: the cores this process may use)")


def run(arguments: argparse.Namespace) -> int:
    """Talks until the input ends.

    Raises:
        PopError: The model cannot be loaded, or a number is out of range.
    """
    for name in ("context", "max_tokens", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise PopError(f"--{name.replace('_', '-')} {value} is out of range: give at least 1")
    threads = arguments.threads or cores()
    llm = PopLlama(
        str(arguments.model), n_ctx=arguments.context, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    chat = Chat(llm, arguments)
    if not sys.stdin.isatty():
        question = sys.stdin.read().strip()
        if not question:
            raise PopError("nothing to read on stdin: pipe a question in, or start it in a terminal")
        return chat.turn(question)
    print(f"{arguments.model.stem}, {_how(llm, None)}. /help lists commands.", file=sys.stderr)
    while (line := _ask()) is not None:
        if line.startswith("/"):
            if line == "/bye":
                break
            chat.command(line)
        elif line:
            try:
                chat.turn(line)
            except PopError as error:
                print(error, file=sys.stderr)
    return 0


def _ask() -> str | None:
    """A line, None at the end of the input."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None


def _how(llm: PopLlama, boundary: int | None) -> str:
    boundary = llm.pop.boundary if boundary is None else boundary
    if boundary == llm.pop.n_layer:
        return f"prompts are read by all {llm.pop.n_layer} layers"
    return f"prompts are read by {boundary} of {llm.pop.n_layer} layers"


class Chat:
    """A conversation: its messages, and how prompts are read."""

    def __init__(self, llm: PopLlama, arguments: argparse.Namespace) -> None:
        self._llm, self._arguments = llm, arguments
        self._boundary: int | None = None  # the model's own
        self._begin()

    def _begin(self) -> None:
        self._messages = [{"role": "system", "content": self._arguments.system}] if self._arguments.system else []

    def command(self, line: str) -> None:
        """One that starts with a slash; says what it did, or what it could not do."""
        name, _, value = line.partition(" ")
        if name == "/new":
            self._begin()
            print("a new conversation", file=sys.stderr)
        elif name == "/pop" and value in ("on", "off"):
            self._boundary = None if value == "on" else self._llm.pop.n_layer
            print(_how(self._llm, self._boundary), file=sys.stderr)
        elif name == "/pop" and value.isascii() and value.isdigit() and 1 <= int(value) <= self._llm.pop.n_layer:
            self._boundary = int(value)
            print(_how(self._llm, self._boundary), file=sys.stderr)
        elif name == "/pop":
            print(f"give /pop on, /pop off or /pop 1 to {self._llm.pop.n_layer}", file=sys.stderr)
        else:
            print(HELP, file=sys.stderr)

    def turn(self, question: str) -> int:
        """One question and its answer, which is forgotten where Ctrl-C stops it; 0, or 130 where it did."""
        self._messages.append({"role": "user", "content": question})
        parts, stopped = [], False
        try:
            stream = self._llm.create_chat_completion(
                self._messages,
                stream=True,
                max_tokens=self._arguments.max_tokens,
                temperature=self._arguments.temperature,
                boundary=self._boundary,
                progress=_show_progress,
            )
            for chunk in stream:
                if text := chunk["choices"][0]["delta"].get("content"):
                    parts.append(text)
                    print(one_line(text, allowed="\n\t") if sys.stdout.isatty() else text, end="", flush=True)
        except KeyboardInterrupt:
            stopped = True
        except ValueError as error:  # the conversation is longer than the context, for one
            self._messages.pop()
            raise PopError(f"{error}; /new begins a new conversation") from error
        if not parts:
            _clear_line()  # stopped while reading
        print(flush=True)
        if stopped:
            self._messages.pop()
            print("stopped; the question is forgotten", file=sys.stderr)
            return 130
        self._messages.append({"role": "assistant", "content": "".join(parts)})
        if sys.stdin.isatty():
            print(_summary(self._llm), file=sys.stderr)
        return 0


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty() and done < total:
        count = f"{done}/{total}"
        width = max(
            0, min(20, shutil.get_terminal_size().columns - len(f"reading [] {count}") - 1)
        )  # a line that wraps is not wiped
        filled = width * done // total
        print(f"\r\033[Kreading [{'#' * filled}{'.' * (width - filled)}] {count}", end="", file=sys.stderr, flush=True)
    elif done == total:
        _clear_line()


def _clear_line() -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _summary(llm: PopLlama) -> str:
    timings = llm.timings
    speed = f", {1e3 / timings.decode_ms_per_token:.1f} tokens/s" if timings.decode_ms_per_token else ""
    first = f"{timings.time_to_first_token_ms:.0f} ms" if timings.time_to_first_token_ms is not None else "N/A"
    return (
        f"[first token after {first}: {timings.prompt_tokens} prompt tokens, {timings.reused_tokens} from the cache, "
        f"{timings.pruned_tokens} pruned{speed}]"
    )
