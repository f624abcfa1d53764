"""``pop-gguf serve``: starts llama.cpp's own server, OpenAI-compatible, with pruned prompts.

The server is llama-server, built from the patched source. This command checks the model file, chooses options that suit
pruning, and becomes that process.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from pathlib import Path

from pypop_gguf import programs
from pypop_gguf.commands.prepare import add_prepare_argument, prepared
from pypop_gguf.errors import PopError, check_name
from pypop_gguf.gguf_files.metadata import read_metadata
from pypop_gguf.rpc import add_rpc_argument, reachable_servers
from pypop_gguf.terminal import (
    add_complete_argument,
    add_kernels_argument,
    available_cores,
    check_ranges,
    choose_kernels,
)

DESCRIPTION = """\
Serves a model over HTTP, with OpenAI-compatible endpoints and several requests at once: /v1/chat/completions,
/v1/completions, /v1/embeddings, /metrics (Prometheus), /health. The boundary comes from the file. If a request has
"pop": false, all layers read its prompt. The server is llama.cpp's llama-server, and what follows --server-options goes
to it unchanged."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", type=Path, metavar="MODEL.gguf", help="model to serve")
    add_prepare_argument(parser)
    parser.add_argument(
        "--boundary",
        type=int,
        metavar="N",
        help="first layer that prompts skip; the number of layers of the model skips none (default: the file's)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument("--port", type=int, default=8080, help="port to listen on (default: 8080)")
    parser.add_argument(
        "--parallel",
        type=int,
        default=4,
        metavar="N",
        help="number of requests that run at once, while others wait (default: 4)",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="length of the context in tokens, which the requests that run at once share equally (default: what the "
        "model was trained for, if it fits into memory)",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="number of threads (default: the cores this process may use)"
    )
    add_kernels_argument(parser)
    add_rpc_argument(parser)
    parser.add_argument("--mmproj", type=Path, metavar="FILE", help="projector of a model that reads images")
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="file with the keys of which clients must send one, one key per line",
    )
    add_complete_argument(parser)
    parser.add_argument(
        "--server-options",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="OPTION",
        help="options of llama-server, up to the end of the line; `--server-options --help` lists them",
    )


def run(arguments: argparse.Namespace) -> int:
    """Becomes the server, or waits for it on Windows; returns only where it cannot.

    Raises:
        PopError: The model or another file cannot be read, or a number is out of range.
    """
    check_ranges(arguments, port=(0, 65535), parallel=(1, 256), context=1, threads=1, boundary=1)
    read_metadata(arguments.model)  # A bad file is reported in one line here.
    for file in (arguments.model, arguments.mmproj, arguments.api_key_file):
        if file is not None and check_name(file) and not os.access(file, os.R_OK):
            raise PopError(f"{file}: cannot be read; give another file, or make it readable")
    if arguments.rpc:
        reachable_servers(arguments.rpc)
    choose_kernels(arguments)
    if arguments.prepare:
        arguments.model = prepared(arguments.model, arguments.threads or available_cores())
    command = [str(programs.find("llama-server", "-DLLAMA_BUILD_SERVER=OFF")), *server_options(arguments)]
    if not {"--host", "--port"} & set(arguments.server_options):
        programs.check_address(arguments.host, arguments.port)
    host = _host(arguments)
    if not _asks_for_keys(arguments) and not _is_loopback(host):
        print(f"pop-gguf: {host} is open to all who reach it: give --api-key-file", file=sys.stderr)
    # glibc keeps a pool of memory for each thread, and the server has a thread for each connection. In time glibc also
    # raises the size from which a piece is returned to the system, and the server grows for hours. This fixes both.
    for name, value in {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "131072",
        "MALLOC_TRIM_THRESHOLD_": "131072",
    }.items():
        os.environ.setdefault(name, value)
    programs.become(command)


def _asks_for_keys(arguments: argparse.Namespace) -> bool:
    return arguments.api_key_file is not None or any(
        option.startswith("--api-key") for option in arguments.server_options
    )


def _host(arguments: argparse.Namespace) -> str:
    """Returns the address that the server listens on: the one behind ``--server-options`` comes last and counts."""
    options = ["--host", arguments.host, *arguments.server_options]
    return [value for option, value in itertools.pairwise(options) if option == "--host"][-1]


def _is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches the addresses, a list as llama-server takes it.

    A socket in the file system counts as well, because it has the permissions of a file.
    """
    return all(
        part in ("localhost", "::1") or part.startswith("127.") or part.endswith(".sock") for part in host.split(",")
    )


def server_options(arguments: argparse.Namespace) -> list[str]:
    """Returns the options of llama-server for the arguments."""
    threads = arguments.threads or available_cores()
    given = {
        "--rpc": arguments.rpc,
        "--model": arguments.model,
        "--pop-boundary": arguments.boundary,
        "--pop-complete": None if arguments.complete == "off" else arguments.complete,
        "--host": arguments.host,
        "--port": arguments.port,
        "--parallel": arguments.parallel,
        "--ctx-size": arguments.context,
        "--threads": threads,
        "--mmproj": arguments.mmproj,
        "--api-key-file": arguments.api_key_file,
        # A cancelled request still computes the rest of its batch, and the next tokens of other requests wait for a
        # batch.
        "--batch-size": 512,
        # This is how many seconds a client may take to send or to receive the next bytes.
        "--timeout": 60,
        # Web pages from this machine may ask the server, pages from elsewhere may not.
        "--cors-origins": "localhost",
    }
    pairs = [part for name, value in given.items() if value is not None for part in (name, str(value))]
    return [*pairs, "--metrics", "--offline", *arguments.server_options]
