"""Makes prompts of numbers or of text, and CSV files of runs, for the scripts bench_*.py."""

from __future__ import annotations

import csv
import itertools
import json
import random
from pathlib import Path

from pypop_gguf import PopError
from tests.support.paths import ROOT


def number_prompt(seed: int, n_tokens: int) -> str:
    """Returns a prompt of so many tokens, the BOS token counted, for models of `pop-gguf random-model`.

    Their tokenizer has a token for each number. Prompts of different seeds begin differently, so that no cache holds a
    part of them.
    """
    chance = random.Random(seed)
    return " ".join(str(chance.randrange(250)) for _ in range(n_tokens - 1))


def prompt_text(kind: str) -> str:
    """Returns all bundled prompts of a kind as one text. The kind "tools" is a list of functions in JSON."""
    if kind == "tools":
        names = [f"{verb}_{noun}" for verb in ("find", "create", "delete") for noun in ("event", "note", "mail")]
        argument = {"type": "object", "properties": {"name": {"type": "string"}, "limit": {"type": "integer"}}}
        return "\n".join(json.dumps({"function": {"name": name, "parameters": argument}}) for name in names)
    lines = (ROOT / "pypop_gguf" / "fitting" / "data" / "fit.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == kind]
    return "\n\n".join(record["messages"][0]["content"] for record in records)


def cut_tokens(tokens: list[int], n: int, number: int) -> list[int]:
    """Returns ``n`` of the tokens; another number begins elsewhere."""
    start = 977 * number % len(tokens)
    return list(itertools.islice(itertools.cycle(tokens), start, start + n))


def check_table(path: Path, columns: list[str]) -> None:
    """Refuses a file that :func:`append_row` could not write to."""
    if not path.parent.is_dir():
        raise PopError(f"cannot write {path}: its directory does not exist")
    heading = ",".join(columns).encode()
    if not path.exists():
        return
    with path.open("rb") as file:
        found = file.readline(len(heading) + 2).strip()
    if found != heading:
        raise PopError(f"{path} is not a table of this version: give another file")


def append_row(path: Path, row: dict) -> None:
    """Writes a row, below the names of its columns where the file is new."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)
