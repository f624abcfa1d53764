"""The standard streams of ``pop-gguf``: whatever they are, a command works, or one line says what is wrong.

``cli.py`` uses them for every command, and ``chat`` reads its question here.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator

from pypop_gguf.errors import PopError


class StdoutError(PopError):
    """Stdout takes nothing more."""


class _Results(io.TextIOWrapper):
    """Stdout. What cannot be written ends the command, because results would be lost."""

    def write(self, text: str) -> int:
        with _naming_stdout():
            return super().write(text)

    def flush(self) -> None:
        with _naming_stdout():
            super().flush()


@contextlib.contextmanager
def _naming_stdout() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # The reader of a pipe has seen enough.
        raise
    except OSError as error:
        raise StdoutError(f"cannot write to stdout: {error.strerror}; send it to an open file with space") from error


class _Reports(io.TextIOWrapper):
    """Stderr. What cannot be written is dropped, and the command goes on."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Opens the streams that are closed, and gives stdout and stderr an answer to letters and bytes that do not fit."""
    _open_closed()
    before = sys.stdout, sys.stderr
    wrappers = []
    try:
        # A file in the wrapper of pytest, for example, is left alone.
        if isinstance(sys.stdout, io.TextIOWrapper):
            wrappers.append(_wrap(_Results, sys.stdout, sys.stdout.line_buffering))
            sys.stdout = wrappers[-1]
        if isinstance(sys.stderr, io.TextIOWrapper):
            wrappers.append(_wrap(_Reports, sys.stderr, True))
            sys.stderr = wrappers[-1]
        yield
    finally:
        sys.stdout, sys.stderr = before
        for wrapper in wrappers:
            with contextlib.suppress(PopError, OSError):
                wrapper.detach()


def _wrap(kind, stream: io.TextIOWrapper, line_buffering: bool):
    stream.flush()
    return kind(stream.buffer, stream.encoding, errors="replace", line_buffering=line_buffering)


def _open_closed() -> None:
    """Occupies the numbers 0 to 2, so that no file gets one of them and then what is meant for a stream."""
    for number, (name, mode, flags) in enumerate(
        (
            ("stdin", "r", os.O_RDONLY),
            ("stdout", "w", os.O_RDONLY),  # so that writing fails, as it does to a closed stream
            ("stderr", "w", os.O_WRONLY),
        )
    ):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, flags)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", errors="replace", closefd=False))  # noqa: SIM115


def leave_stdout() -> None:
    """Lets nothing more be written to stdout: the interpreter flushes it at its end, which would fail again."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def read_question() -> str:
    """Returns all of stdin as text.

    Raises:
        PopError: It cannot be read, or is not text in the encoding of stdin.
    """
    encoding = "utf-8-sig" if sys.stdin.encoding.lower() in ("utf-8", "ascii", "us-ascii") else sys.stdin.encoding
    try:
        data = sys.stdin.buffer.read()
    except OSError as error:
        raise PopError(f"cannot read stdin: {error.strerror}; pipe a question in") from error
    try:
        return data.decode(encoding).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise PopError(
            f"stdin is not {name} text: byte {error.start} is 0x{data[error.start]:02x}; convert it, for example with "
            f"`iconv -f latin1 -t {name}`"
        ) from error


def check_text(name: str, text: str) -> None:
    """Checks that a text from the command line or the terminal is one.

    Raises:
        PopError: It has bytes that are not in the encoding of this environment.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PopError(
            f"{name} is not {sys.getfilesystemencoding().upper()} text: write it in that encoding"
        ) from error
