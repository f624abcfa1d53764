"""The command ``pop-gguf``.

Each subcommand is a module of pypop_gguf/commands/ with the functions ``add_arguments(parser)`` and ``run(arguments)``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from pypop_gguf import PopError, __version__, streams
from pypop_gguf.errors import one_line

# The name of each subcommand -> (its module in pypop_gguf.commands, one line of help).
COMMANDS = {
    "convert": ("convert", "write a GGUF with a boundary, from a Hugging Face model or another GGUF"),
    "prepare": ("prepare", "make the prompts of any GGUF faster: fit, measure, choose and write"),
    "inspect": ("inspect", "print the POP metadata of a GGUF"),
    "eval": ("eval", "measure how much pruning changes the model's answers, on your own texts"),
    "tune": ("tune", "choose the lowest boundary within a quality budget, measured on your own texts"),
    "bench": ("bench", "compare the time to the first token with that of stock llama.cpp"),
    "serve": ("serve", "serve a model to OpenAI clients"),
    "chat": ("chat", "talk with a model in the terminal"),
    "rpc-server": ("rpc_server", "lend this machine to a model that is split over several"),
    "random-model": ("random_model", "write a GGUF with the shape of a known model and random weights, to measure on"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``pop-gguf`` with these arguments. The default is the arguments of the process.

    Returns:
        The exit status: 0, 1 for an error that the user can mend, 2 for wrong usage, 130 after Ctrl-C.
    """
    with streams.prepared():
        clear = "\r\033[K" if sys.stderr.isatty() else ""  # removes a line of progress
        try:
            try:
                return _run(list(sys.argv[1:] if argv is None else argv))
            finally:
                sys.stdout.flush()
        except (PopError, ImportError) as error:  # An ImportError says that the native library is missing or another.
            print(f"{clear}pop-gguf: error: {one_line(str(error))}", file=sys.stderr)
            if isinstance(error, streams.StdoutError):
                streams.leave_stdout()
            return 1
        except KeyboardInterrupt:
            print(f"{clear}pop-gguf: interrupted; no file was left half-written", file=sys.stderr)
            return 130
        except BrokenPipeError:
            streams.leave_stdout()
            return 0


def _run(argv: list[str]) -> int:
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
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
