"""The one exception users are meant to see; the command line prints its text as a single line."""


class PopError(ValueError):
    """A problem the user can mend. ``str(error)`` is one line that says what is wrong and what to do."""
