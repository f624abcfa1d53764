"""The exception for problems that users can mend, a notice, and functions that make texts and paths fit to be shown."""

import contextlib
import os
import re
import shlex
import sys
import unicodedata

_ESCAPED = ("Cc", "Cs", "Zl", "Zp")  # Unicode's categories: control, surrogate, line and paragraph separator


class PopError(ValueError):
    """A problem that the user can mend. ``str(error)`` is one line that says what is wrong and what to do."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def shell_path(path: str | os.PathLike) -> str:
    """Returns a path as it has to be written in a command of a shell, on one line."""
    text = os.fspath(path)
    if text.startswith("-"):
        text = f"./{text}"  # else it would be an option
    if os.name == "nt":  # The name of a file contains no quotation mark there.
        return text if re.fullmatch(r"[\w.:\\/~-]+", text) else f'"{one_line(text)}"'
    if one_line(text) == text:
        return shlex.quote(text)
    # $'...' is understood by most shells
    return (
        "$'" + "".join(chr(b) if 32 <= b < 127 and b not in b"\\'" else f"\\x{b:02x}" for b in os.fsencode(text)) + "'"
    )


def check_name(path: str | os.PathLike) -> str:
    """Returns a path as the native library takes it.

    Raises:
        PopError: The name is not in the encoding of the file system.
    """
    text = os.fsdecode(path)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PopError(f"{text}: this name is not UTF-8 text, and llama.cpp takes no other: rename it") from error
    return text


def notice(text: str) -> None:
    """Prints one line on stderr. Where there is no stderr, or nobody reads it, nothing happens."""
    if sys.stderr is not None:  # print() would take stdout in its place
        with contextlib.suppress(OSError):
            print(f"pypop_gguf: {one_line(text)}", file=sys.stderr)


def one_line(text: str, allowed: str = "") -> str:
    """Returns the text on one line: control characters, lone surrogates and line separators become backslash escapes.

    Use it for anything that comes from a file or a model before it is printed.

    Args:
        text: The text.
        allowed: Characters that stay as they are.
    """
    return "".join(
        repr(letter)[1:-1] if unicodedata.category(letter) in _ESCAPED and letter not in allowed else letter
        for letter in text
    )
