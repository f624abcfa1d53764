"""Fuzzes the command line and the choice of the boundary: any arguments end in success or in one line of error.

    python -m fuzz.arguments --cases 5000 --seed 1

Each command runs in this process on tiny files, some of them damaged, with options that its parser has. Files may not
grow beyond 16 MB, ``chat`` gets no input, and a case ends where ``serve`` would become the server.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import random
import resource
import shutil
import sys
from pathlib import Path

import numpy as np

from fuzz import harness
from fuzz.harness import Failure
from pypop_gguf import PopError, cli
from pypop_gguf import boundary_rules as boundary
from tests.support.gguf_files import UINT32, write_keys, write_model
from tests.support.scaled_adapter import write_scaled

_NUMBERS = [
    "0",
    "1",
    "2",
    "3",
    "6",
    "7",
    "-1",
    "0.5",
    "1e400",
    "nan",
    "inf",
    "-inf",
    "",
    "x",
    "99999999999999999999",
    "1,2",
    "1,,2",
    ",",
    "2,2",
    "٣",
]
_WORDS = ["", "lossless", "x", "a b", "%s", "{}", "ß", "\udcff", "--", "q8_0", "-", "a\nb"]
_FILES = [
    "good.gguf",
    "small.gguf",
    "good.pop-b4.gguf",
    "keys.gguf",
    "cut.gguf",
    "empty.gguf",
    "text.txt",
    "text.jsonl",
    "missing.gguf",
    ".",
    "missing/a.gguf",
    "",
    "out.gguf",
]


def write_files(directory: Path) -> None:
    good = write_model(directory / "good.gguf", ("pop.version", 1, UINT32), ("pop.boundary", 4, UINT32))
    write_scaled(directory / "good.pop-b4.gguf", good, 4)
    write_model(directory / "small.gguf", n_layer=1)
    write_keys(directory / "keys.gguf")
    (directory / "cut.gguf").write_bytes((directory / "good.gguf").read_bytes()[:5000])
    (directory / "empty.gguf").write_bytes(b"")
    (directory / "text.txt").write_text("Once upon a time there was a cat. " * 9)
    (directory / "text.jsonl").write_text('{"text": "Once upon a time there was a cat."}\n{"x": 1}\n')


def options_of(name: str) -> list[argparse.Action]:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"pypop_gguf.commands.{cli.COMMANDS[name][0]}").add_arguments(parser)
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


def value(chance: random.Random, action: argparse.Action) -> str:
    if action.choices and chance.random() < 0.8:
        return str(chance.choice(list(action.choices)))
    if action.type is Path:
        return chance.choice(_FILES)
    if action.dest in ("model", "file", "files"):
        return chance.choice(_FILES)
    if action.type is not None and chance.random() < 0.9:  # a value of this type, since argparse refuses others
        return chance.choice([text for text in _NUMBERS if is_of(action.type, text)])
    return chance.choice(_NUMBERS if chance.random() < 0.7 else _WORDS + _FILES)


def is_of(kind, text: str) -> bool:
    try:
        kind(text)
    except (ValueError, argparse.ArgumentTypeError):
        return False
    return True


def command(chance: random.Random, options: dict[str, list[argparse.Action]]) -> list[str]:
    name = chance.choice(list(options))
    argv = [name]
    share = chance.choice([0.05, 0.2, 0.4])
    for action in options[name]:
        least = {None: 1, "?": 1, "+": 1}.get(action.nargs, 0)
        several = action.nargs in ("*", "+", argparse.REMAINDER)
        n_values = chance.randint(least, 2) if several else least
        values = [value(chance, action) for _ in range(n_values)]
        if not action.option_strings:
            if chance.random() < 0.97:
                argv += values if chance.random() < 0.3 or action.choices or not values else ["good.gguf", *values[1:]]
        elif action.required or (action.dest == "max_kl" and chance.random() < 0.8) or chance.random() < share:
            argv += [chance.choice(action.option_strings), *values]
    if chance.random() < 0.05:
        argv.insert(chance.randint(1, len(argv)), chance.choice(["--nonsense", "-h", "--", "extra"]))
    return argv


def run_command(argv: list[str], directory: Path, pristine: Path) -> str:
    for file in pristine.iterdir():
        shutil.copyfile(file, directory / file.name)
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            status = cli.main(argv)
        except SystemExit as stop:
            status = stop.code
        except Started:
            status = 0
    last = errors.getvalue().rstrip("\n").split("\n")[-1]
    if status not in (0, 1, 2) or "Traceback" in errors.getvalue():
        raise Failure(f"exit status {status}: {errors.getvalue()[-500:]}")
    if status == 1 and not (last.startswith("pop-gguf: error: ") and len(last) < 500):
        raise Failure(f"no clear line: {errors.getvalue()[-500:]!r}")
    return f"{argv[0]} {('done', 'refused', 'wrong usage')[status]}"


class Started(BaseException):
    """Raised where this process would become the server."""


def start(*_command) -> None:
    raise Started


def choice(chance: random.Random) -> str:
    """Lets ``convert`` or ``tune`` choose a boundary from random figures."""

    def number() -> float | None:
        numbers = map(float, ("0", "0.3", "0.999", "1", "-1", "nan", "inf"))
        return chance.choice([None, None, *numbers, chance.random()])

    n_layer = chance.choice([1, 2, 6, 48, 126])
    importance = chance.choice(
        [None, np.zeros(n_layer), np.array([chance.random() for _ in range(n_layer)], np.float32)]
    )
    try:
        if chance.random() < 0.7:
            ratio, loss, layer = number(), number(), chance.choice([None, None, "lossless", *_NUMBERS])
            chosen = boundary.choose_boundary(
                n_layer,
                chance.randint(1, n_layer),
                prune_ratio=ratio,
                boundary=layer,
                max_importance_loss=loss,
                importance=importance,
            )
        else:
            max_kl = chance.random()
            curve = {
                b: (chance.choice([0.0, 0.5, float("nan")]), chance.uniform(-1, 1))
                for b in range(1, n_layer)
                if chance.random() < 0.5
            }
            boundary.check_budget(max_kl, None)
            chosen = boundary.choose_by_curve(n_layer, curve, max_kl=max_kl)
    except PopError as error:
        if len(str(error).splitlines()) != 1:
            raise Failure(f"no clear line: {error}") from error
        return "boundary refused"
    share = chosen.skipped_share
    if not 1 <= chosen.boundary <= n_layer or not (share is None or 0 <= share <= 1):
        raise Failure(f"{chosen} of {n_layer} layers")
    return "boundary chosen"


def main() -> int:
    arguments = harness.parse(__doc__.splitlines()[0], 1000)
    return harness.in_a_child(arguments, lambda: fuzz(arguments))


def fuzz(arguments: argparse.Namespace) -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.execv = os.execve = os.execvp = start
    sys.stdin = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    harness.limit_memory(4096)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 20, 16 << 20))  # random-model would write gigabytes
    with harness.directory() as base:
        pristine, directory = base / "pristine", base / "work"
        pristine.mkdir(), directory.mkdir()
        write_files(pristine)
        os.chdir(directory)
        options = {name: options_of(name) for name in cli.COMMANDS}

        def one(chance: random.Random) -> str:
            if chance.random() < 0.3:
                return choice(chance)
            argv = command(chance, options)
            try:
                return run_command(argv, directory, pristine)
            except BaseException:
                print(f"pop-gguf {argv}", file=sys.stderr)
                raise

        return harness.run(arguments, one, seconds=60)


if __name__ == "__main__":
    sys.exit(main())
