"""Progress, tables, numbers as arguments, the number of cores, and options that several commands have."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from pypop_gguf.errors import PopError, one_line

_BAR = "{desc}: {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt}{unit}, {remaining} left{postfix}"
ALL_LAYERS = -1  # what llama.cpp takes for all layers on a GPU


class Progress(tqdm):
    """A progress bar. Use it in a ``with`` block, which removes the bar, so that an error starts on a clean line."""

    def update_to(self, done: int, total: int) -> None:
        """Moves the bar to ``done`` of ``total``. A function that reports its progress can call this directly."""
        self.total = total
        self.update(done - self.n)


def progress(
    iterable: Iterable | None = None, *, total: int, description: str, unit: str = "", in_log: bool = True
) -> Progress:
    """Starts a progress bar on stderr. Where stderr is no terminal, one line says what starts, and no bar follows.

    Args:
        iterable: Iterating over the bar yields its items and counts them. Without it, call ``update`` or ``update_to``.
        total: Number of steps.
        description: What is being done.
        unit: What a step is, in the plural. "B" stands for bytes, which are shown with a prefix such as M or G.
        in_log: Whether a log gets the line.
    """
    description, on_terminal = one_line(description), sys.stderr.isatty()
    if in_log and not on_terminal:
        count = f"{tqdm.format_sizeof(total)}B" if unit == "B" else f"{total} {unit}"
        print(f"{description}: {count}" if unit else description, file=sys.stderr, flush=True)
    return Progress(
        iterable,
        total=total,
        desc=description,
        unit=unit if unit == "B" else f" {unit}" if unit else "",
        unit_scale=unit == "B",
        bar_format=_BAR,
        file=sys.stderr,
        disable=not on_terminal,
        leave=False,
        dynamic_ncols=True,
    )


def aligned(rows: Sequence[Sequence[object]]) -> list[str]:
    """Returns one line of text for each row, with the cells right-aligned in columns."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{cell!s:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]


def integer_list(text: str) -> list[int]:
    """Converts an argument such as ``20,22`` to its numbers, sorted and each once. Give it to argparse as ``type``."""
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 20,22") from None


def check_ranges(arguments: argparse.Namespace, **ranges: int | tuple[int, int | None]) -> None:
    """Checks parsed numbers and lists of numbers; one that was not given passes.

    Args:
        arguments: The parsed arguments.
        ranges: The smallest value of each by its name, or the smallest and the largest.

    Raises:
        PopError: A number is out of its range.
    """
    for name, allowed in ranges.items():
        low, high = allowed if isinstance(allowed, tuple) else (allowed, None)
        given = getattr(arguments, name)
        for value in given if isinstance(given, list | tuple) else [given]:
            if value is not None and (value < low or (high is not None and value > high)):
                wanted = f"at least {low}" if high is None else f"{low} to {high}"
                raise PopError(f"--{name.replace('_', '-')} {value} is out of range: give {wanted}")


def add_kernels_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--kernels``, which :func:`choose_kernels` obeys."""
    parser.add_argument(
        "--kernels",
        choices=("on", "off"),
        help="who computes prompts on a CPU: kernels of pypop_gguf where they are faster (on), or those of llama.cpp "
        "alone. The kernels for Arm processors, and those with AMX, were never measured and run only with on (default: "
        "POP_KERNELS in the environment, else on, but without these)",
    )


def add_complete_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--complete``, which says when the cache is completed."""
    parser.add_argument(
        "--complete",
        choices=("off", "idle", "answer"),
        default="off",
        help="when the layers that prompts have skipped run for them after all, which makes their caches the whole "
        "model's: never, while no answer is wanted, or also between the tokens of answers (default: off)",
    )


def add_gpu_layers_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--gpu-layers``, the ``n_gpu_layers`` of ``PopLlama``."""
    parser.add_argument(
        "--gpu-layers",
        type=layer_count,
        default=ALL_LAYERS,
        metavar="N",
        help="number of layers that a GPU holds and computes, the last ones first, in a build with a GPU; "
        f"{ALL_LAYERS} is all of them (default: {ALL_LAYERS})",
    )


def layer_count(text: str) -> int:
    """Converts an argument to a number of layers. Give it to argparse as ``type``."""
    if text != str(ALL_LAYERS) and not (text.isascii() and text.isdigit() and int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of layers: give 0 or more, or {ALL_LAYERS} for all")
    return int(text)


def choose_kernels(arguments: argparse.Namespace) -> None:
    """Chooses the kernels of this process, before its engine starts, and of the processes that it starts."""
    if arguments.kernels:
        os.environ["POP_KERNELS"] = arguments.kernels


def default_kernels() -> str:
    """Returns "on" or "off": what ``--kernels`` is where it is not given. csrc/pop-kernels-setting.h decides it."""
    asked = os.environ.get("POP_KERNELS")
    if platform.machine() in ("aarch64", "arm64"):
        return "on" if asked == "on" else "off"
    return "off" if asked == "off" else "on"


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def physical_cores() -> int | None:
    """Returns on how many physical cores the cores of this process lie; None on a system that does not tell."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    try:
        return len({Path(topology.format(core)).read_text() for core in os.sched_getaffinity(0)})
    except OSError:
        return None
