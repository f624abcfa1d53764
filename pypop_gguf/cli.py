"""The command ``pop-gguf``.

Each subcommand is a module of pypop_gguf/commands/ with the functions ``add_arguments(parser)`` and ``run(arguments)``.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

from pypop_gguf import PopError, __version__

# The name of each subcommand -> (its module in pypop_gguf.commands, one line of help).
COMMANDS = {
    "convert": ("convert", "make a POP GGUF from a Hugging Face model or a GGUF"),
    "inspect": ("inspect", "print a GGUF's POP metadata"),
    "eval": ("eval", "measure what pruning costs the model's answers, on texts of your own"),
    "tune": ("tune", "choose the boundary by a budget of quality, measured on texts of your own"),
    "bench": ("bench", "measure time to first token with POP against stock llama.cpp"),
    "serve": ("serve", "serve a model to OpenAI clients"),
    "chat": ("chat", "talk with a model in the terminal"),
    "random-model": ("random_model", "write a GGUF of a known geometry with random weights, to measure on"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``pop-gguf`` with these arguments; the default are those of the process.

    Returns:
        The exit status: 0, 1 for an error that the user can mend, 2 for wrong usage, 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="pop-gguf", description="Prefill-only pruning for GGUF models.")
    parser.add_argument("--version", action="version", version=f"pop-gguf {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary)
        if name in argv[:1]:  # Only the command that runs is imported, so inspect needs neither torch nor the engine.
            command = importlib.import_module(f"pypop_gguf.commands.{module}")
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    arguments = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # A terminal may lack letters that stand in a model file's texts.
            stream.reconfigure(errors="replace")
    clear = "\r\033[K" if sys.stderr.isatty() else ""  # removes a line of progress
    try:
        return arguments.run(arguments)
    except (PopError, ImportError) as error:  # ImportError: the native library is missing, or another one is there
        print(f"{clear}pop-gguf: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{clear}pop-gguf: interrupted; no file was left half-written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # The reader of a pipe has left. The interpreter must not flush into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
