"""Keeps the figures of comparisons for the table of platforms, which tools/platforms.py writes.

The environment variable ``POP_REPORT`` names a file to which each comparison appends its figures, as a line of JSON.
"""

import json
import os


def report(**figures) -> None:
    """Appends the figures and the name of the running test, if a report is wanted."""
    if path := os.environ.get("POP_REPORT"):
        test = os.environ["PYTEST_CURRENT_TEST"].split("::")[1].split(" ")[0]
        with open(path, "a") as file:
            file.write(json.dumps(dict(test=test, **figures)) + "\n")
