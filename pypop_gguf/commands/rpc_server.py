"""``pop-gguf rpc-server``: lends this machine to models that are split over several, by llama.cpp's ggml-rpc-server."""

from __future__ import annotations

import argparse
import socket
import sys

from pypop_gguf import programs
from pypop_gguf.errors import PopError
from pypop_gguf.rpc import DEFAULT_PORT
from pypop_gguf.terminal import add_kernels_argument, available_cores, check_ranges, choose_kernels

DESCRIPTION = """\
Lends this machine's memory and processors, or its graphics device, to a model that runs on another machine: `serve`,
`chat` and `bench` name it with --rpc. It serves one program at a time. It asks for no key and sends everything in the
clear, and whoever reaches it can crash it or run code on this machine: let it listen only in a network whose every
member you trust."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="IPv4 address of this machine to listen on (default: 127.0.0.1, this machine alone)",
    )
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help=f"port to listen on (default: {DEFAULT_PORT})")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="number of threads (default: the cores this process may use)"
    )
    add_kernels_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Becomes the server, or waits for it on Windows; returns only where it cannot.

    Raises:
        PopError: The address is not free or no IPv4 address, or a number is out of range.
    """
    check_ranges(arguments, port=(1, 65535), threads=1)
    try:
        socket.inet_pton(socket.AF_INET, arguments.host)
    except OSError as error:
        raise PopError(f"--host {arguments.host} is no IPv4 address: give one, such as 127.0.0.1") from error
    programs.check_address(arguments.host, arguments.port)
    choose_kernels(arguments)
    if not arguments.host.startswith("127."):
        print(f"pop-gguf: whoever reaches {arguments.host} can take over this process", file=sys.stderr)
    threads = arguments.threads or available_cores()
    program = programs.find("ggml-rpc-server", "-DGGML_RPC=OFF")
    programs.become([str(program), "--host", arguments.host, "--port", str(arguments.port), "--threads", str(threads)])
