"""Reads the pages of the documentation for the tests that check them."""

import re

from tests.support.paths import ROOT


def section(page: str, title: str) -> str:
    """Return the text between a heading of the second level and the next one."""
    text = (ROOT / page).read_text()
    found = re.search(rf"^## {re.escape(title)}\n(.+?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no section {title!r}"
    return found[1]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def table_rows(page: str) -> list[list[str]]:
    """Return the cells of all rows of tables of a page."""
    return [cells(row) for row in re.findall(r"^\|.+\|$", (ROOT / page).read_text(), re.MULTILINE)]
