"""``pop-gguf chat``: a conversation in the terminal that shows how far a prompt is read, and how long it took."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

from pypop_gguf import PopLlama, library
from pypop_gguf.commands.prepare import add_prepare_argument, prepared
from pypop_gguf.errors import PopError, one_line
from pypop_gguf.rpc import add_rpc_argument, reachable_servers, use_servers
from pypop_gguf.streams import StdoutError, check_text, read_question
from pypop_gguf.terminal import (
    Progress,
    add_complete_argument,
    add_gpu_layers_argument,
    add_kernels_argument,
    available_cores,
    check_ranges,
    choose_kernels,
    progress,
)

DESCRIPTION = """\
Talks with a model. Answers are shown as they come, and stderr shows how far a prompt is read. Ctrl-C stops reading or
answering. Ctrl-C at the prompt, Ctrl-D or /bye ends the conversation. All that comes from a pipe is one question, and
only the answer goes to stdout."""

HELP = """\
/pop on|off|N  read prompts with the file's boundary, with every layer, or with the layers below N
/new           forget the conversation
/bye           end (or Ctrl-D)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", type=Path, metavar="MODEL.gguf", help="model to talk with")
    add_prepare_argument(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message, which tells the model how to answer")
    parser.add_argument(
        "--context",
        type=int,
        default=4096,
        metavar="N",
        help="length of the longest conversation in tokens (default: 4096, or less if the model was trained for less)",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=512, metavar="N", help="length of the longest answer in tokens (default: 512)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.7,
        metavar="T",
        help="randomness of the answers; 0 always takes the likeliest token (default: 0.7)",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="number of threads (default: the cores this process may use)"
    )
    add_kernels_argument(parser)
    add_gpu_layers_argument(parser)
    add_complete_argument(parser)
    add_rpc_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Talks until the input ends.

    Raises:
        PopError: The model cannot be loaded, or a number is out of range.
    """
    check_ranges(arguments, context=1, max_tokens=1, threads=1)
    choose_kernels(arguments)
    if arguments.system:
        check_text("--system", arguments.system)
    servers = reachable_servers(arguments.rpc) if arguments.rpc else []
    threads = arguments.threads or available_cores()
    model = prepared(arguments.model, threads, arguments.gpu_layers) if arguments.prepare else arguments.model
    if servers:
        library.load()
        use_servers(servers)
    llm = PopLlama(
        str(model),
        n_ctx=arguments.context,
        n_threads=threads,
        n_threads_batch=threads,
        pop_complete=arguments.complete,
        n_gpu_layers=arguments.gpu_layers,
        verbose=False,
    )
    chat = Chat(llm, arguments.system, arguments.max_tokens, arguments.temperature)
    if not sys.stdin.isatty():
        question = read_question().strip()
        if not question:
            raise PopError("nothing to read on stdin: pipe a question in, or start it in a terminal")
        return chat.answer(question)
    print(f"{model.stem}, {_describe_reading(llm, None)}. /help lists commands.", file=sys.stderr)
    while (line := _read_line()) is not None:
        if line.startswith("/"):
            if line == "/bye":
                break
            chat.obey(line)
        elif line:
            try:
                check_text("this line", line)
                chat.answer(line)
            except StdoutError:
                raise
            except PopError as error:
                print(f"{error}; /new begins a new conversation", file=sys.stderr)
    return 0


def _read_line() -> str | None:
    """Returns the next line, or None at the end of the input."""
    try:
        return input("> ").strip()
    except UnicodeDecodeError:
        return "\udcff"  # no text either, which is said as for other lines
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None


def _describe_reading(llm: PopLlama, boundary: int | None) -> str:
    boundary = llm.pop.boundary if boundary is None else boundary
    if boundary == llm.pop.n_layer:
        return f"prompts are read by all {llm.pop.n_layer} layers"
    return f"prompts are read by {boundary} of {llm.pop.n_layer} layers"


class Chat:
    """A conversation: its messages, and the boundary that prompts are read with."""

    def __init__(self, llm: PopLlama, system: str | None, max_tokens: int, temperature: float) -> None:
        self._llm, self._max_tokens, self._temperature = llm, max_tokens, temperature
        self._boundary: int | None = None  # None is the model's own.
        self._first_messages = [{"role": "system", "content": system}] if system else []
        self._messages: list[Any] = list(self._first_messages)

    def obey(self, line: str) -> None:
        """Carries out a command, which starts with a slash, and says what it has done or could not do."""
        name, _, value = line.partition(" ")
        if name == "/new":
            self._messages = list(self._first_messages)
            print("a new conversation", file=sys.stderr)
        elif name == "/pop" and value in ("on", "off"):
            self._boundary = None if value == "on" else self._llm.pop.n_layer
            print(_describe_reading(self._llm, self._boundary), file=sys.stderr)
        elif name == "/pop" and value.isascii() and value.isdigit() and 1 <= int(value) <= self._llm.pop.n_layer:
            self._boundary = int(value)
            print(_describe_reading(self._llm, self._boundary), file=sys.stderr)
        elif name == "/pop":
            print(f"give /pop on, /pop off or /pop 1 to {self._llm.pop.n_layer}", file=sys.stderr)
        else:
            print(HELP, file=sys.stderr)

    def answer(self, question: str) -> int:
        """Answers a question. Returns 0, or 130 where Ctrl-C has stopped it; then the question is forgotten.

        Raises:
            PopError: The conversation does not fit into the context, for example.
        """
        self._messages.append({"role": "user", "content": question})
        parts: list[str] = []
        stopped = False
        stream: Any = None
        try:
            with _ReadingBar() as bar:
                stream = self._llm.create_chat_completion(
                    self._messages,
                    stream=True,
                    max_tokens=self._max_tokens,
                    temperature=self._temperature,
                    boundary=self._boundary,
                    progress=bar.show,
                )
                for chunk in stream:
                    if text := chunk["choices"][0]["delta"].get("content"):
                        parts.append(text)
                        print(one_line(text, allowed="\n\t") if sys.stdout.isatty() else text, end="", flush=True)
                    if chunk["choices"][0]["finish_reason"]:
                        break
        except KeyboardInterrupt:
            stopped = True
        except StdoutError:
            raise
        except ValueError as error:
            self._messages.pop()
            too_long = "" if isinstance(error, PopError) else "; give a larger --context, or a shorter question"
            raise PopError(f"{error}{too_long}") from error
        print(flush=True)
        if stopped:
            self._messages.pop()
            print("stopped; the question is forgotten", file=sys.stderr)
            return 130
        self._messages.append({"role": "assistant", "content": "".join(parts)})
        if sys.stdin.isatty():
            print(_format_timings(self._llm), file=sys.stderr)
            with contextlib.suppress(KeyboardInterrupt):
                next(stream, None)  # completes what is left, which only a further question makes use of
        return 0


class _ReadingBar(contextlib.ExitStack):
    """Shows how far a prompt is read. The bar is gone when the answer begins, and when the block ends."""

    _bar: Progress | None = None

    def show(self, done: int, total: int) -> None:
        if done == total:
            self.close()
            return
        if self._bar is None:
            bar = progress(total=total, description="reading", unit="tokens", in_log=False)
            self._bar = self.enter_context(bar)
        self._bar.update_to(done, total)


def _format_timings(llm: PopLlama) -> str:
    timings = llm.timings
    speed = f", {1e3 / timings.decode_ms_per_token:.1f} tokens/s" if timings.decode_ms_per_token else ""
    first = f"{timings.time_to_first_token_ms:.0f} ms" if timings.time_to_first_token_ms is not None else "N/A"
    completed = f", {timings.completed_tokens} completed" if timings.completed_tokens else ""
    return (
        f"[first token after {first}: {timings.prompt_tokens} prompt tokens, {timings.reused_tokens} from the cache, "
        f"{timings.pruned_tokens} pruned{completed}{speed}]"
    )
