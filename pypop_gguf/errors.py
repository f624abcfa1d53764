"""The exception for problems that users can mend, a notice, and the function that puts any text on one line."""

import contextlib
import sys
import unicodedata

_ESCAPED = ("Cc", "Cs", "Zl", "Zp")  # Unicode's categories: control, surrogate, line and paragraph separator


class PopError(ValueError):
    """A problem that the user can mend. ``str(error)`` is one line that says what is wrong and what to do."""

    def __str__(self) -> str:
        return one_line(super().__str__())


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
