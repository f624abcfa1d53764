"""The one exception users are meant to see, and what makes a line of any text; the command line prints the error's text as it is."""

import unicodedata

_UNSHOWN = ("Cc", "Cs", "Zl", "Zp")  # Unicode's categories: control, surrogate, line and paragraph separator


class PopError(ValueError):
    """A problem the user can mend. ``str(error)`` is one line that says what is wrong and what to do."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: str, allowed: str = "") -> str:
    """Texts of files and models are strangers': what a terminal would obey, or end a line at, becomes a backslash sequence."""
    return "".join(
        repr(letter)[1:-1] if unicodedata.category(letter) in _UNSHOWN and letter not in allowed else letter
        for letter in text
    )
